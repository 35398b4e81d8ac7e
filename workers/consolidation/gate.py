"""After training: the exported files under their KL budgets.

What is measured is always the exported folder, loaded again as PEFT (and so vLLM) loads it, against the base. Nothing here decides; the
figures go into the report and `service.domain.policy.decide` does.
"""

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from service.domain.slow_weights import Divergence
from service.errors import JobFailed
from workers.consolidation.anchors import KINDS, Anchor, Anchors, Kind
from workers.consolidation.base import Base
from workers.consolidation.candidates import Candidate
from workers.consolidation.divergence import summarize
from workers.consolidation.lora import WEIGHTS, LoraStack
from workers.consolidation.rounds import in_rounds
from workers.consolidation.rows import token_logprobs
from workers.consolidation.scoring import anchors_under

# The search for a scale ends here: measurements after the first.
MAX_MEASUREMENTS = 8
# A feasible scale that uses this much of the budget is near enough to the best one.
NEAR_BUDGET = 0.9
# KL grows about with the square of the scale, so one measurement tells where to look next; aimed a little under the budget.
AIM = 0.95


@dataclass(frozen=True)
class Measured:
    """One export and its divergence on the judge anchors."""

    scale: float
    sha256: str
    kl: dict[Kind, Divergence]

    @property
    def used(self) -> float:
        """The largest share of a budget that it uses; feasible up to 1."""
        return max(max(d.upper95_nats / d.budget_nats, d.worst_nats / (10 * d.budget_nats)) for d in self.kl.values())

    def share(self, kind: Kind) -> float:
        """Mean KL over its budget."""
        return self.kl[kind].mean_nats / self.kl[kind].budget_nats


def fit_scales(measure: Callable[[dict[int, float]], Mapping[int, Measured]], count: int) -> list[Measured]:
    """For each of `count` scopes the largest scale found whose export is within both budgets, all searched for at once.

    Args:
        measure: called once a round, with the scale that is next for each scope that still searches.
    """
    return in_rounds([_search() for _ in range(count)], measure)


def _search() -> Generator[float, Measured, Measured]:
    """One scope's: the whole if it fits, else by guided bisection.

    The lower end is always a scale that was measured and fits, or 0, which changes nothing. If no scale fits, the result is that of
    scale 0.
    """
    whole = yield 1.0
    if whole.used <= 1.0:
        return whole
    low, high = None, whole
    for _ in range(MAX_MEASUREMENTS):
        floor = low.scale if low else 0.0
        guess = high.scale * (AIM / high.used) ** 0.5
        margin = 0.1 * (high.scale - floor)
        tried = yield min(max(guess, floor + margin), high.scale - margin)
        if tried.used > 1.0:
            high = tried
            continue
        low = tried
        if low.used >= NEAR_BUDGET:
            break
    return low or (yield 0.0)


class Meter:
    """Measures exports of trained adapters. Each candidate's folder holds its last export, its slot among the judges the same."""

    def __init__(
        self,
        base: Base,
        trained: LoraStack,
        judges: LoraStack,
        anchors: Anchors,
        candidates: Sequence[Candidate],
        *,
        on_pass: Callable[[], None],
    ) -> None:
        self._base = base
        self._trained = trained
        self._judges = judges
        self._anchors = {kind: anchors.of(kind, "judge") for kind in KINDS}
        self._base_loss = {kind: base_loss(base, judged) for kind, judged in self._anchors.items()}
        self._candidates = candidates
        self._on_pass = on_pass
        self._measured: dict[tuple[int, float], Measured] = {}

    def measure(self, scales: Mapping[int, float]) -> dict[int, Measured]:
        """Each of these candidates at its scale: exported, loaded, measured, all in one pass a kind of anchor.

        A scale that was measured before is exported and loaded again, and not measured again.

        Raises:
            JobFailed: a scale that was measured before gave other bytes now.
        """
        hashes = {index: self._export(index, scale) for index, scale in scales.items()}
        new = [index for index, scale in scales.items() if (index, scale) not in self._measured]
        if new:
            self._on_pass()
            kls = {kind: self._kl(new, kind) for kind in KINDS}
            for number, index in enumerate(new):
                self._measured[index, scales[index]] = Measured(
                    scale=scales[index], sha256=hashes[index], kl={kind: kls[kind][number] for kind in KINDS}
                )
        found = {index: self._measured[index, scale] for index, scale in scales.items()}
        for index, measured in found.items():
            if measured.sha256 != hashes[index]:
                raise JobFailed(
                    f"exporting at scale {measured.scale:.4f} again gave other weights; the disk may be failing"
                )
        return found

    def _export(self, index: int, scale: float) -> str:
        """SHA-256 of the weights file."""
        candidate = self._candidates[index]
        self._trained.export(candidate.trained, candidate.folder, scale=scale)
        self._judges.load(candidate.slot, candidate.folder)
        with (candidate.folder / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _kl(self, indices: Sequence[int], kind: Kind) -> list[Divergence]:
        anchors = self._anchors[kind]
        slots = [self._candidates[index].slot for index in indices]
        kl_S_A, loss_S_A = anchors_under(self._base, self._judges, anchors, slots=slots)
        tokens = sum(len(anchor.row.replies[0]) for anchor in anchors)
        return [
            summarize(kl_A, tokens=tokens, budget_nats=self._candidates[index].budgets[kind]).model_copy(
                update={"base_loss_nats": self._base_loss[kind], "loss_nats": loss_A.mean().item()}
            )
            for index, kl_A, loss_A in zip(indices, kl_S_A, loss_S_A, strict=True)
        ]


def base_loss(base: Base, anchors: Sequence[Anchor]) -> float:
    """Mean over anchors of the base's loss on its own completions, nats per token; from its cached states."""

    def mean(anchor: Anchor) -> Tensor:
        target_N = anchor.base_states_N_D.new_tensor(anchor.row.replies[0]).long()
        return -token_logprobs(anchor.base_states_N_D, base.head, target_N).mean()

    return sum(mean(anchor).item() for anchor in anchors) / len(anchors)
