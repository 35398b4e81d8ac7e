"""What is asked of the slow weights, as figures: at the last point, paired by user where arms are compared.

A figure is None where the run can't tell: an arm is missing, nothing was promoted, or satisfaction is not matched.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from service.domain.feedback import BASE
from tests.benchmarks.learning.analysis import Interval, Results
from tests.benchmarks.learning.arms import OWN, OWN_SMALL, POOLED, SLOW, STAGES, stage_of
from tests.benchmarks.learning.consolidations import PROMOTED

COMPARED = (
    ("both", "fast"),
    ("both", "slow"),
    ("both-small", "slow"),
    ("slow", "pooled"),
    ("pooled", "base"),
)
"""Arms whose paired difference tells something."""
# One in a thousand of a share, which no run has replies enough to tell apart.
EQUAL = 1e-3

Versions = Sequence[Mapping[str, Any]]


def headline(results: Results, versions: Versions) -> dict[str, Any]:
    """The figures by their names in the last line."""
    return {
        "feedback_ratio": feedback_ratio(results),
        "kl_ratio_at_matched_satisfaction": kl_ratio(results, versions),
        "context_tokens_ratio": context_tokens_ratio(results),
        "way_to_oracle": way_to_oracle(results),
        "rejected": rejected(results),
    }


def details(results: Results, versions: Versions) -> dict[str, Any]:
    """What the figures come from."""
    return {
        "differences": {f"{arm} - {other}": i.fields() for (arm, other), i in differences(results).items()},
        "promoted": {stage: found for stage in STAGES if (found := promoted(results, versions, stage))},
        "served_by_base": {arm: served_by_base(results, arm) for arm in results.arms if arm in SLOW},
    }


def feedback_ratio(results: Results) -> float | None:
    """How many times the feedback of `fast` the arm `slow` needs for its satisfaction at the last point."""
    if not {"fast", "slow"} <= set(results.arms):
        return None
    last = results.plan.points[-1]
    curve = {point: results.score("fast", point) for point in results.points("fast")}
    needed = feedbacks_for(curve, results.score("slow", last))
    return last / needed if needed else None


def feedbacks_for(curve: Mapping[int, float], target: float) -> float | None:
    """The smallest number of feedbacks at which the curve, straight between its points, reaches the target; None if it never does."""
    before: tuple[int, float] | None = None
    for point, score in sorted(curve.items()):
        if score >= target:
            if before is None:
                return float(point)
            at, reached = before
            return at + (point - at) * (target - reached) / (score - reached)
        before = (point, score)
    return None


def kl_ratio(results: Results, versions: Versions) -> float | None:
    """Mean chat KL of the versions made under the smaller budget over that of `slow`'s, if with the context they satisfy no less."""
    if not {"slow", "both-small"} <= set(results.arms):
        return None
    last = results.plan.points[-1]
    if results.score("both-small", last) < results.score("slow", last) - EQUAL:
        return None
    small, own = (promoted(results, versions, stage).get("kl_chat_nats") for stage in (OWN_SMALL, OWN))
    return small / own if small is not None and own else None


def context_tokens_ratio(results: Results) -> float | None:
    """Mean tokens of context that are left beside the adapters, over those without them. Read it with `both - fast`."""
    if not {"base", "fast", "both"} <= set(results.arms):
        return None
    before = results.context_tokens("fast")
    return results.context_tokens("both") / before if before > 0 else None


def way_to_oracle(results: Results) -> dict[str, float]:
    """The share of the way from the base to the oracle that each arm has gone."""
    if not {"base", "oracle"} <= set(results.arms):
        return {}
    last = results.plan.points[-1]
    base = results.score("base", last)
    way = results.score("oracle", last) - base
    arms = [arm for arm in results.arms if arm not in ("base", "oracle") and last in results.points(arm)]
    return {arm: (results.score(arm, last) - base) / way for arm in arms} if way > 0 else {}


def rejected(results: Results) -> dict[str, int]:
    """Users whom each arm served without its adapter, because that was rejected or could not be trained."""
    ends = list(results.records.under("consolidated"))
    refused = {stage: [r for r in ends if r["key"][1] == stage and r["state"] != PROMOTED] for stage in STAGES}
    users = {
        stage: len(results.people) if found and stage == POOLED else len(found) for stage, found in refused.items()
    }
    return {arm: users[stage_of(arm)] for arm in results.arms if arm in SLOW}


def differences(results: Results) -> dict[tuple[str, str], Interval]:
    last = results.plan.points[-1]
    pairs = [(arm, other) for arm, other in COMPARED if {arm, other} <= set(results.arms)]
    return {(arm, other): results.difference(arm, other, last) for arm, other in pairs}


def made(results: Results, versions: Versions, stages: Iterable[str] = STAGES) -> list[Mapping[str, Any]]:
    """The versions that the run's own consolidations have made."""
    jobs = {r["id"] for stage in stages for r in results.records.under("consolidating", stage)}
    return [version for version in versions if version["job"] in jobs]


def promoted(results: Results, versions: Versions, stage: str) -> dict[str, float]:
    """A stage's versions: how many, and the means of what their reports say; nothing without any."""
    reports = [version["report"] for version in made(results, versions, [stage])]
    if not reports:
        return {}
    return {
        "versions": len(reports),
        "kl_text_nats": fmean(r["kl_text"]["mean_nats"] for r in reports),
        "kl_chat_nats": fmean(r["kl_chat"]["mean_nats"] for r in reports),
        "context_tokens_before": fmean(r["context_tokens_before"] for r in reports),
        "context_tokens_after": fmean(r["context_tokens_after"] for r in reports),
    }


def served_by_base(results: Results, arm: str) -> float:
    """Share of an arm's replies that no adapter had a part in: those of rejected ones, and of any that vLLM could not serve."""
    last = results.plan.points[-1]
    replies = [r for person in results.people for r in results.replies(arm, person, last)]
    return fmean(r["reply"]["adapter"] == BASE for r in replies)
