"""Held-out margins, example by example: many scopes, many adapters, with this context or that, in one pass.

Of a pair the margin is mean log p(wanted) - mean log p(unwanted), of a rating r it is r * (mean log p(reply) - mean log p(the base's own
reply)), nats per token. A rated reply was said by what serves now, mostly with the user's context, so nothing else finds it as likely:
by its likelihood alone every change would count as a loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from service.domain.bootstrap import paired
from service.domain.measures import Difference
from service.domain.slow_weights import Margins
from workers.consolidation.base import Base
from workers.consolidation.candidates import Candidate
from workers.consolidation.lora import LoraStack
from workers.consolidation.prepare import Prepared, context_row
from workers.consolidation.rows import Row
from workers.consolidation.scoring import reply_logprobs

SEED = 2605


@dataclass(frozen=True)
class Arm:
    """Held-out examples as one adapter would answer them: a row an example, all under the same slot (None: the base)."""

    heldout: Sequence[Prepared]
    rows: Sequence[Row]
    slot: int | None

    def __post_init__(self) -> None:
        if len(self.heldout) != len(self.rows):
            raise ValueError(f"{len(self.rows)} rows for {len(self.heldout)} examples")


def measure(base: Base, judges: LoraStack, arms: Sequence[Arm]) -> list[list[float]]:
    """Each arm's margins, one an example. A row that several arms have in common is scored once for each slot."""
    cases = list(dict.fromkeys((row, arm.slot) for arm in arms for row in arm.rows))
    of_base = [row for row, slot in cases if slot is None]
    adapted = [(row, slot) for row, slot in cases if slot is not None]
    found: dict[tuple[Row, int | None], Tensor] = {}
    found.update(zip(((row, None) for row in of_base), reply_logprobs(base, of_base), strict=True))
    rows, slots = [row for row, _ in adapted], [slot for _, slot in adapted]
    found.update(zip(adapted, reply_logprobs(base, rows, stack=judges, slots=slots), strict=True))
    return [
        [_margin(prepared, found[row, arm.slot].tolist()) for prepared, row in zip(arm.heldout, arm.rows, strict=True)]
        for arm in arms
    ]


def _margin(prepared: Prepared, means: Sequence[float]) -> float:
    return prepared.example.rating * (means[0] - means[1])


def rows_alone(candidate: Candidate) -> list[Row]:
    """The held-out examples without a context."""
    return [prepared.alone for prepared in candidate.heldout]


def rows_with(base: Base, candidate: Candidate, left_out: frozenset[str] = frozenset()) -> list[Row]:
    """The held-out examples, each with its user's context without the items left out; alone where nothing is left of it.

    Only of a user's own scope can items be left out: its context is rendered anew.
    """
    own = candidate.context
    if own is None:
        return [prepared.row(context=True) for prepared in candidate.heldout]
    return [
        context_row(base, p.example, own.state, p.alone.replies, absorbed=left_out, budget_tokens=own.budget_tokens)
        or p.alone
        for p in candidate.heldout
    ]


@dataclass(frozen=True)
class Rivals:
    """Margins of what is there already, example by example."""

    base: list[float]
    base_with_context: list[float]
    current: list[float] | None
    pooled: list[float] | None
    serving: list[float]
    """What serves now, with the context that it is served with."""


def measure_rivals(base: Base, judges: LoraStack, candidates: Sequence[Candidate]) -> list[Rivals]:
    """All that a candidate must hold its own against, of all scopes in one pass."""
    arms: list[Arm] = []
    for c in candidates:
        alone = rows_alone(c)
        now = rows_with(base, c, c.context.absorbed if c.context else frozenset())
        arms += [
            Arm(c.heldout, alone, None),
            Arm(c.heldout, rows_with(base, c), None),
            Arm(c.heldout, alone, c.current),
            Arm(c.heldout, alone, c.pooled),
            Arm(c.heldout, now, c.serving),
        ]
    found = measure(base, judges, arms)
    return [
        Rivals(
            base=found[5 * n],
            base_with_context=found[5 * n + 1],
            current=found[5 * n + 2] if c.current is not None else None,
            pooled=found[5 * n + 3] if c.pooled is not None else None,
            serving=found[5 * n + 4],
        )
        for n, c in enumerate(candidates)
    ]


def compare(rivals: Rivals, *, alone: list[float], with_context: list[float], would_serve: list[float]) -> Margins:
    """The report's margins: means, and paired differences with their bounds."""

    def against(ours: list[float], theirs: list[float] | None) -> Difference | None:
        return None if theirs is None else paired(ours, theirs, seed=SEED)

    return Margins(
        base=mean(rivals.base),
        current=mean(rivals.base if rivals.current is None else rivals.current),
        candidate=mean(alone),
        base_with_context=mean(rivals.base_with_context),
        candidate_with_context=mean(with_context),
        pooled=None if rivals.pooled is None else mean(rivals.pooled),
        serving=mean(rivals.serving),
        would_serve=mean(would_serve),
        against_base=against(alone, rivals.base),
        against_current=against(alone, rivals.current),
        against_pooled=against(alone, rivals.pooled),
        against_serving=against(would_serve, rivals.serving),
    )


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)
