"""From the recorded replies to scores, intervals bootstrapped over users, and the controls."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from service.domain.slow_weights import Divergence
from tests.benchmarks.learning.arms import FIXED
from tests.benchmarks.learning.plan import Plan
from tests.benchmarks.learning.prompts import Prompt
from tests.benchmarks.learning.records import Records
from tests.benchmarks.learning.run import SHUFFLED
from tests.benchmarks.learning.users import Person, judge
from tests.benchmarks.stats import percentile

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over users and its bootstrapped interval."""

    mean: float
    low: float
    high: float

    def fields(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of one value per user, and where it lies in 95 of 100 draws of as many users.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("nothing to average")
    draw = random.Random(seed)
    means = [fmean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    return Interval(fmean(values), percentile(means, tail), percentile(means, 1 - tail))


class Results:
    """What a run measured."""

    def __init__(self, plan: Plan, people: Sequence[Person], records: Records) -> None:
        self.plan = plan
        self.people = people
        self.records = records

    @property
    def arms(self) -> list[str]:
        """The measured arms, peers last, without the control."""
        measured = sorted({r["key"][1] for r in self.records.under("reply")} - {SHUFFLED})
        return [arm for arm in self.plan.arms if arm in measured] + [
            arm for arm in measured if arm not in self.plan.arms
        ]

    def points(self, arm: str) -> list[int]:
        """Where an arm has a score; one that feedback does not change has the same everywhere."""
        measured = sorted({r["key"][3] for r in self.records.under("reply", arm)})
        return list(self.plan.points) if arm in FIXED else measured

    def replies(self, arm: str, person: Person, point: int) -> list[dict[str, Any]]:
        at = 0 if arm in FIXED else point
        return list(self.records.under("reply", arm, person.name, at))

    def users(self, arm: str, point: int, *, of: str = "satisfied") -> dict[str, float]:
        """Each user's share of satisfying replies (or the mean of another figure)."""
        measured = {person.name: self.replies(arm, person, point) for person in self.people}
        return {name: fmean(float(r[of]) for r in replies) for name, replies in measured.items() if replies}

    def score(self, arm: str, point: int) -> float:
        """The mean over users."""
        return fmean(self.users(arm, point).values())

    def curve(self, arm: str, *, of: str = "satisfied") -> dict[int, Interval]:
        return {point: bootstrap(list(self.users(arm, point, of=of).values())) for point in self.points(arm)}

    def difference(self, arm: str, other: str, point: int) -> Interval:
        """How much better one arm does than another by the same users."""
        ours, theirs = self.users(arm, point), self.users(other, point)
        return bootstrap([ours[name] - theirs[name] for name in sorted(ours.keys() & theirs.keys())])

    def shuffled(self) -> Interval | None:
        """What feedback of users who want something else gains over the base."""
        found = list(self.records.under("reply", SHUFFLED))
        if not found or "base" not in self.arms:
            return None
        return self.difference(SHUFFLED, "base", found[0]["key"][3])

    def swap(self, tests: Sequence[Prompt], taught: Sequence[Prompt]) -> list[list[float]]:
        """Row by row a user's satisfaction with the replies that the service gave every user at the last point, their own included.

        All are asked the same questions, so these are the replies that each would get under another's name.
        """
        by_ask = {prompt.ask: prompt for prompt in tests}
        given = [self.replies("fast", person, self.plan.points[-1]) for person in self.people]
        return [
            [
                fmean(judge(reader, r["reply"]["text"], by_ask[r["key"][4]], taught).satisfied for r in row)
                for row in given
            ]
            for reader in self.people
        ]

    def cost(self, arm: str) -> dict[str, float]:
        """Tokens, seconds and cache of an arm's requests at its last point, each request counted once."""
        point = self.points(arm)[-1]
        found = {r["reply"]["id"]: r["reply"] for p in self.people for r in self.replies(arm, p, point)}
        replies = list(found.values())
        prompt_tokens = sum(r["prompt_tokens"] for r in replies)
        seconds = [r["seconds"] for r in replies]
        return {
            "prompt_tokens": prompt_tokens / len(replies),
            "cached_share": sum(r["cached_tokens"] for r in replies) / max(1, prompt_tokens),
            "p50_ms": percentile(seconds, 0.50) * 1000,
            "p95_ms": percentile(seconds, 0.95) * 1000,
        }

    def context_tokens(self, arm: str) -> float:
        """What the arm puts before a question at its last point, in tokens; all of the prompt where there is no base to compare with."""
        question = self.cost("base")["prompt_tokens"] if "base" in self.arms else 0.0
        return self.cost(arm)["prompt_tokens"] - question


def diagonal_gain(matrix: Sequence[Sequence[float]]) -> Interval:
    """By how much users are better served by their own context than by others', over the rows."""
    rows = [(row[i], [*row[:i], *row[i + 1 :]]) for i, row in enumerate(matrix)]
    return bootstrap([own - fmean(others) for own, others in rows])


def adapters(versions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many adapter versions there are, how many break a budget as the gate reads it, and how far from the base they are."""
    reports = [version["report"] for version in versions]
    within = [
        all(Divergence.model_validate(report[kind]).within for kind in ("kl_text", "kl_chat")) for report in reports
    ]
    return {
        "adapters": len(reports),
        "over_budget": within.count(False),
        "kl_text_max_nats": max((r["kl_text"]["mean_nats"] for r in reports), default=0.0),
        "kl_chat_max_nats": max((r["kl_chat"]["mean_nats"] for r in reports), default=0.0),
    }
