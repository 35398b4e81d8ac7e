"""The paper's figures from the curves of all runs: over seeds, a null where one can't be had."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tests.benchmarks.fst.fit import Fit, crossing, fit
from tests.benchmarks.fst.plan import SECOND_ARMS, Named, second_task

# KL is compared at a reward that both arms reach: this share of the lower one's rise.
MATCHED_SHARE = 0.9
# A curve that rises less than this has not left its start: a few replies of a test.
SMALLEST_RISE = 0.02
# A drift below this is rounding.
SMALLEST_KL_NATS = 1e-4


@dataclass(frozen=True)
class Point:
    """One point of a curve, a mean over seeds."""

    step: int
    samples: float
    reward: float
    kl_nats: float
    lowest: float
    highest: float
    """Of the seeds' rewards."""
    task: str


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    named: Named
    curve: list[dict[str, Any]]
    """Its points (no steps)."""
    result: dict[str, Any]


class Results:
    """All finished runs."""

    def __init__(self, finished: Sequence[Finished]) -> None:
        self._by: dict[tuple[str, str, str], list[Finished]] = defaultdict(list)
        for one in finished:
            self._by[one.named.role, one.named.task, one.named.arm].append(one)
        self.tasks = tuple(dict.fromkeys(one.named.task for one in finished))

    def of(self, role: str, task: str, arm: str) -> list[Finished]:
        return self._by[role, task, arm]

    def curve(self, role: str, task: str, arm: str) -> list[Point]:
        """Mean over the seeds at each step."""
        by_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for one in self.of(role, task, arm):
            for record in one.curve:
                by_step[record["step"]].append(record)
        return [
            Point(
                step=step,
                samples=fmean(r["samples"] for r in records),
                reward=fmean(r["test_reward"] for r in records),
                kl_nats=fmean(r["kl_nats"] for r in records),
                lowest=min(r["test_reward"] for r in records),
                highest=max(r["test_reward"] for r in records),
                task=records[0]["task"],
            )
            for step, records in sorted(by_step.items())
        ]

    def fit(self, task: str, arm: str) -> Fit | None:
        """Over the points of all seeds."""
        curve = self.curve("curve", task, arm)
        if not curve:
            return None
        points = [(r["samples"], r["test_reward"]) for one in self.of("curve", task, arm) for r in one.curve]
        return fit(points, start=curve[0].reward)

    def samples_ratio(self, task: str) -> float | None:
        """Samples that rl took to its peak, over what fst took to the same reward: above 1 where fst is faster."""
        rl, fst = self.curve("curve", task, "rl"), self.curve("curve", task, "fst")
        peak = risen(rl)
        if peak is None:
            return None
        taken, needed = (crossing([(p.samples, p.reward) for p in curve], peak) for curve in (rl, fst))
        return taken / needed if taken and needed else None

    def kl_ratio(self, task: str) -> float | None:
        """KL of fst over that of rl where both have the same reward: below 1 where fst drifts less."""
        rl, fst = self.curve("curve", task, "rl"), self.curve("curve", task, "fst")
        peaks = risen(rl), risen(fst)
        if peaks[0] is None or peaks[1] is None:
            return None
        start = max(rl[0].reward, fst[0].reward)
        level = start + MATCHED_SHARE * (min(peaks[0], peaks[1]) - start)
        of_rl, of_fst = kl_at(rl, level), kl_at(fst, level)
        return of_fst / of_rl if of_fst is not None and of_rl is not None and of_rl > SMALLEST_KL_NATS else None

    def after(self, task: str) -> dict[str, list[Point]]:
        """The curves of rl on the task that follows: from the base, from rl's and from fst's weights."""
        following = second_task(self.tasks, task)
        base = self.curve("curve", following, "rl") if following else []
        return {"base": base, **{arm: self.curve("second", task, arm) for arm in SECOND_ARMS}}

    def second(self, task: str) -> dict[str, float | None]:
        """Reward on the task that follows after as much training on it, by the weights that it starts from."""
        return {start: final(curve) for start, curve in self.after(task).items()}

    def two_by_two(self, task: str) -> list[dict[str, Any]]:
        """Rewards of base and slow weights of fst, each without and with the contexts."""
        cells: dict[tuple[str, bool], list[float]] = defaultdict(list)
        for one in self.of("curve", task, "fst"):
            for cell in one.result["two_by_two"]:
                cells[cell["weights"], cell["context"]].append(cell["reward"])
        return [{"weights": w, "context": c, "reward": fmean(rewards)} for (w, c), rewards in cells.items()]

    def headline(self, task: str) -> dict[str, Any]:
        """The figures of one task, as the last line has them."""
        fits = {arm: self.fit(task, arm) for arm in ("fst", "rl")}
        return {
            "samples_ratio": self.samples_ratio(task),
            **{f"asymptote_{arm}": found.asymptote if found else None for arm, found in fits.items()},
            "kl_ratio_at_matched_reward": self.kl_ratio(task),
            "second_task": self.second(task),
            "two_by_two": self.two_by_two(task),
        }


def risen(curve: Sequence[Point]) -> float | None:
    """The highest reward, if the curve has left its start."""
    peak = max((p.reward for p in curve), default=0.0)
    return peak if curve and peak - curve[0].reward >= SMALLEST_RISE else None


def kl_at(curve: Sequence[Point], level: float) -> float | None:
    """KL where a curve first reaches a reward."""
    samples = crossing([(p.samples, p.reward) for p in curve], level)
    if samples is None:
        return None
    before = max((p for p in curve if p.samples <= samples), key=lambda p: p.samples)
    after = min((p for p in curve if p.samples >= samples), key=lambda p: p.samples)
    way = (samples - before.samples) / (after.samples - before.samples) if after.samples > before.samples else 0.0
    return before.kl_nats + way * (after.kl_nats - before.kl_nats)


def final(curve: Sequence[Point]) -> float | None:
    return curve[-1].reward if curve else None


def drifts(results: Results) -> Mapping[str, Mapping[str, float]]:
    """KL at the end, nats per token, by task and arm."""
    arms = ("fst", "rl", "context", "distill")
    curves = {task: {arm: results.curve("curve", task, arm) for arm in arms} for task in results.tasks}
    return {task: {arm: curve[-1].kl_nats for arm, curve in by.items() if curve} for task, by in curves.items()}
