"""The hand-off between fast and slow: which context items an adapter makes unnecessary, each with what its absence costs.

Everything is asked about the candidate's held-out margin with what is left of the context, always against the whole context, so that
small losses can't add up. First without any of it: if that costs nothing, all is absorbed. Otherwise the items are left out one by one,
which gives each its cost, put in the order of that, and the longest beginning of this order whose absence costs nothing *together* is
searched by halving: items that say the same cost nothing one by one, because the others still say it.

What is left out makes room for items that wait for their turn. In the search these are left out too, or they would carry what the
adapter does not, and the context would be as long as before; so they are absorbed with what they waited for, or else not at all.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from service.domain.context import Context, Count, choose
from service.domain.items import Exemplar, Guideline, Item
from service.domain.measures import Handed
from service.domain.population import leading
from workers.consolidation.base import Base
from workers.consolidation.candidates import Candidate, OwnContext
from workers.consolidation.lora import LoraStack
from workers.consolidation.margins import Arm, mean, measure, rows_with
from workers.consolidation.rounds import in_rounds

# Below this change in a reply's log-probability per token nobody could tell the replies apart: 2 % in likelihood.
COSTS_NOTHING_NATS = 0.02
# Asked one by one, the longest first; the others come last. Each is a scoring of examples with their contexts: on two cores half a second
# an example for the default model.
MAX_ASKED_ALONE = 8
# The newest held-out examples on which that is done: it only makes an order; what is absorbed is decided on all.
EXAMPLES_ALONE = 4
# Of halving: enough for eight items, down to one.
MAX_PASSES = 3


@dataclass(frozen=True)
class Question:
    """What is the margin without these items, on the newest so many examples (None: on all)?"""

    left_out: frozenset[str]
    newest: int | None = None


Answers = list[list[float]]
"""To each question the margins, one an example."""


@dataclass(frozen=True)
class HandOff:
    """What becomes of each item, and the candidate's margins with the whole context and with what is left of it, one an example."""

    items: tuple[Handed, ...]
    whole: list[float]
    left: list[float]

    @property
    def absorbed(self) -> frozenset[str]:
        """Ids of the items that leave the context."""
        return frozenset(item.item for item in self.items if item.absorbed)


def hand_off(
    base: Base, judges: LoraStack, candidates: Sequence[Candidate], *, on_pass: Callable[[], None]
) -> list[HandOff]:
    """For each candidate what becomes of its user's context items; nothing for a scope of many users, which have none in common.

    The candidates' exports are loaded in their slots.
    """

    def answered(questions: dict[int, list[Question]]) -> dict[int, Answers]:
        on_pass()
        asked = [(index, question) for index, of_one in questions.items() for question in of_one]
        found = measure(base, judges, [_arm(base, candidates[index], question) for index, question in asked])
        answers: dict[int, Answers] = {index: [] for index in questions}
        for (index, _), margins in zip(asked, found, strict=True):
            answers[index].append(margins)
        return answers

    return in_rounds([search(c.context, base.tokens.count) for c in candidates], answered)


def context_tokens(own: OwnContext | None, *, left_out: frozenset[str], count: Count) -> int:
    """Tokens of a user's rendered context without these items; 0 for scopes of many users."""
    return 0 if own is None else _chosen(own, left_out, count).tokens


def _arm(base: Base, candidate: Candidate, question: Question) -> Arm:
    first = 0 if question.newest is None else max(len(candidate.heldout) - question.newest, 0)
    return Arm(candidate.heldout[first:], rows_with(base, candidate, question.left_out)[first:], candidate.slot)


def search(own: OwnContext | None, count: Count) -> Generator[list[Question], Answers, HandOff]:
    """One user's: asks for margins without these items or those, and returns what becomes of each."""
    rendered, waiting = _asked(own, count) if own else ([], [])
    if own is None or not rendered:
        [whole] = yield [Question(frozenset())]
        return HandOff((), whole, whole)
    everything = frozenset((*rendered, *waiting))
    whole, nothing = yield [Question(frozenset()), Question(everything)]
    enough = mean(whole) - COSTS_NOTHING_NATS
    items = own.state.items
    tokens = {name: _tokens(items[name], count) for name in everything}
    cost: dict[str, float] = {}
    gone, left = everything, nothing
    if mean(nothing) < enough:
        alone = sorted(rendered, key=lambda name: -tokens[name])[:MAX_ASKED_ALONE]
        singles = yield [Question(frozenset((name,)), newest=EXAMPLES_ALONE) for name in alone]
        with_all = mean(whole[-EXAMPLES_ALONE:])
        cost = {name: with_all - mean(margins) for name, margins in zip(alone, singles, strict=True)}
        order = sorted(alone, key=lambda name: cost[name]) + [name for name in rendered if name not in cost]
        gone, left = yield from _longest(order, frozenset(waiting), enough=enough, whole=whole)
    return HandOff(
        tuple(
            Handed(item=name, tokens=tokens[name], margin_cost_nats=cost.get(name), absorbed=name in gone)
            for name in (*rendered, *waiting)
        ),
        whole,
        left,
    )


def _longest(
    order: Sequence[str], waiting: frozenset[str], *, enough: float, whole: list[float]
) -> Generator[list[Question], Answers, tuple[frozenset[str], list[float]]]:
    """The longest beginning of this order, with what waits, that can be left out, and the margins without it.

    The lower end was always measured; the whole order is known to be too much.
    """
    low, high = 0, len(order)
    found: tuple[frozenset[str], list[float]] = (frozenset(), whole)
    for _ in range(MAX_PASSES):
        if high - low < 2:
            break
        middle = (low + high) // 2
        left_out = frozenset((*order[:middle], *waiting))
        [margins] = yield [Question(left_out)]
        if mean(margins) >= enough:
            low, found = middle, (left_out, margins)
        else:
            high = middle
    return found


def _asked(own: OwnContext, count: Count) -> tuple[list[str], list[str]]:
    """Ids of the items that are rendered now, and of those that would come in, one after the other, when all before them leave.

    Pinned ones stay whatever happens, so they are not asked about.
    """
    rendered = _unpinned(own, frozenset(), count)
    asked = list(rendered)
    while more := _unpinned(own, frozenset(asked), count):
        asked += more
    return rendered, asked[len(rendered) :]


def _unpinned(own: OwnContext, left_out: frozenset[str], count: Count) -> list[str]:
    return [name for name in _chosen(own, left_out, count).items if not own.state.items[name].pinned]


def _chosen(own: OwnContext, left_out: frozenset[str], count: Count) -> Context:
    return choose(
        own.state,
        absorbed=left_out,
        budget_tokens=own.budget_tokens,
        count=count,
        member=leading(own.state, adapter=own.state.population.adapter),
    )


def _tokens(item: Item, count: Count) -> int:
    match item:
        case Guideline():
            return count(item.text)
        case Exemplar():
            return count(item.prompt) + count(item.reply)
        case _:
            return 0
