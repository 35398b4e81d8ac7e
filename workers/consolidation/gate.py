"""After training: the exported file under the KL budgets, then whether it helps and what it makes unnecessary.

What is measured is always the exported folder, loaded again as PEFT (and so vLLM) loads it, against the base. Nothing here decides; the
figures go into the report and `service.domain.policy.decide` does.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from service.domain.context import choose
from service.domain.fast_weights import FastWeights
from service.domain.population import leading
from service.domain.slow_weights import Divergence, Margins
from service.settings import Settings
from workers.consolidation.adapters import WEIGHTS, Adapters
from workers.consolidation.anchors import KINDS, PASS_TOKENS, Anchor, Anchors, Kind
from workers.consolidation.base import Base
from workers.consolidation.divergence import kl_of_states, summarize
from workers.consolidation.prepare import Prepared, context_row
from workers.consolidation.rows import Row, batches, pack
from workers.consolidation.trainer import reply_logprobs

# The search for a scale ends here: measurements after the first.
MAX_MEASUREMENTS = 8
# A feasible scale that uses this much of the budget is near enough to the best one.
NEAR_BUDGET = 0.9
# KL grows about with the square of the scale, so one measurement tells where to look next; aimed a little under the budget.
AIM = 0.95
# Below this change in a reply's log-probability per token nobody could tell the replies apart: 2 % in likelihood.
COSTS_NOTHING_NATS = 0.02
# Each is a scoring pass over the held-out examples with their contexts, seconds on a CPU.
MAX_LEFT_OUT_PASSES = 6

CANDIDATE = "candidate"
CURRENT = "current"


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


def fit_scale(measure: Callable[[float], Measured]) -> Measured:
    """The largest scale found whose export is within both budgets: the whole if it fits, else by guided bisection.

    The lower end is always a scale that was measured and fits, or 0, which changes nothing. If no scale fits, the result is that of
    scale 0.
    """
    whole = measure(1.0)
    if whole.used <= 1.0:
        return whole
    low, high = None, whole
    for _ in range(MAX_MEASUREMENTS):
        floor = low.scale if low else 0.0
        guess = high.scale * (AIM / high.used) ** 0.5
        margin = 0.1 * (high.scale - floor)
        tried = measure(min(max(guess, floor + margin), high.scale - margin))
        if tried.used > 1.0:
            high = tried
            continue
        low = tried
        if low.used >= NEAR_BUDGET:
            break
    return low or measure(0.0)


class Meter:
    """Measures exports of the adapter in training, in one folder that holds the last one."""

    def __init__(self, base: Base, adapters: Adapters, anchors: Anchors, *, folder: Path, settings: Settings) -> None:
        self._base = base
        self._adapters = adapters
        self._anchors = anchors
        self._folder = folder
        self._budgets: dict[Kind, float] = {"text": settings.kl_text_budget_nats, "chat": settings.kl_chat_budget_nats}

    def measure(self, scale: float) -> Measured:
        """Export at this scale, load the folder as the candidate, measure."""
        sha256 = self.export(scale)
        kl = {}
        with self._adapters.on(CANDIDATE):
            for kind in KINDS:
                judges = self._anchors.of(kind, "judge")
                tokens = sum(len(anchor.row.replies[0]) for anchor in judges)
                kl[kind] = summarize(kl_of_anchors(self._base, judges), tokens=tokens, budget_nats=self._budgets[kind])
        return Measured(scale=scale, sha256=sha256, kl=kl)

    def export(self, scale: float) -> str:
        """Export at this scale and load it as the candidate; SHA-256 of the weights file."""
        self._adapters.export(self._folder, scale=scale)
        self._adapters.load(self._folder, CANDIDATE)
        with (self._folder / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def kl_of_anchors(base: Base, anchors: Sequence[Anchor]) -> Tensor:
    """Mean KL(base || adapter that is on) of each anchor, nats per token, shape (A,)."""
    kl_A = torch.zeros(len(anchors))
    rows = [anchor.row for anchor in anchors]
    with torch.no_grad():
        for batch in batches(rows, [len(row) for row in rows], max_tokens=PASS_TOKENS):
            packed = pack([rows[i] for i in batch], device=base.device)
            base_states_N_D = torch.cat([anchors[i].base_states_N_D for i in batch])
            kl_N = kl_of_states(base_states_N_D, base.states(packed), base.head)
            kl_A[batch] = packed.mean_by_reply(kl_N).cpu()
    return kl_A


def margin(base: Base, rows: Sequence[Row], heldout: Sequence[Prepared]) -> float:
    """Mean held-out margin under the adapter that is on, nats per token (what it is of a pair and of a rating: `Margins`)."""
    logprobs = [means.tolist() for means in reply_logprobs(base, rows, max_tokens=PASS_TOKENS)]
    return sum(
        means[0] - means[1] if prepared.example.rejected is not None else prepared.example.rating * means[0]
        for means, prepared in zip(logprobs, heldout, strict=True)
    ) / len(heldout)


def measure_margins(base: Base, adapters: Adapters, heldout: Sequence[Prepared], *, has_current: bool) -> Margins:
    """What serves against what might: each alone, and base and candidate with the context too."""
    alone = [prepared.alone for prepared in heldout]
    context = [prepared.row(context=True) for prepared in heldout]
    contexts = any(prepared.with_context is not None for prepared in heldout)
    with adapters.on(None):
        of_base = margin(base, alone, heldout)
        of_base_with_context = margin(base, context, heldout) if contexts else None
    of_current = of_base
    if has_current:
        with adapters.on(CURRENT):
            of_current = margin(base, alone, heldout)
    with adapters.on(CANDIDATE):
        return Margins(
            base=of_base,
            current=of_current,
            candidate=margin(base, alone, heldout),
            base_with_context=of_base_with_context,
            candidate_with_context=margin(base, context, heldout) if contexts else None,
        )


def find_absorbed(
    base: Base,
    adapters: Adapters,
    heldout: Sequence[Prepared],
    state: FastWeights,
    *,
    budget_tokens: int,
    on_pass: Callable[[int], None],
) -> tuple[str, ...]:
    """Ids of one user's context items whose absence costs nothing under the candidate, in the order that they were left out.

    Each group of items is left out together, oldest half first, and halved where that costs something, down to single items or
    `MAX_LEFT_OUT_PASSES`. Leaving items out lets older ones into the budget that were not rendered before, so every item is asked
    about, not only those that are rendered now. Every group is compared with the whole context, so that small losses can't add up.
    """
    items = sorted([*state.guidelines.values(), *state.exemplars.values()], key=lambda item: (item.born, item.id))
    absorbed: list[str] = []
    passes = 0

    def held_margin(left_out: Sequence[str]) -> float:
        rows = [
            context_row(
                base, p.example, state, p.alone.replies, absorbed=frozenset(left_out), budget_tokens=budget_tokens
            )
            or p.alone
            for p in heldout
        ]
        return margin(base, rows, heldout)

    with adapters.on(CANDIDATE):
        whole = held_margin(())
        waiting = [[item.id for item in items]]
        while waiting and waiting[-1] and passes < MAX_LEFT_OUT_PASSES:
            group = waiting.pop()
            passes += 1
            on_pass(passes)
            if held_margin([*absorbed, *group]) >= whole - COSTS_NOTHING_NATS:
                absorbed += group
            elif len(group) > 1:
                middle = len(group) // 2
                waiting += [group[middle:], group[:middle]]
    return tuple(absorbed)


def context_tokens(base: Base, state: FastWeights, *, absorbed: Sequence[str], budget_tokens: int) -> int:
    """Tokens of a user's rendered context."""
    context = choose(
        state,
        absorbed=frozenset(absorbed),
        budget_tokens=budget_tokens,
        count=base.tokens.count,
        member=leading(state, adapter=state.population.adapter),
    )
    return context.tokens
