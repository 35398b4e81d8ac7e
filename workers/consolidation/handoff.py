"""The hand-off between fast and slow: which context items an adapter makes unnecessary, each with what its absence costs.

Every question is about the candidate with what is left of the context, always against the whole context, so that small losses can't add
up. First without any of it: if that costs nothing, all is absorbed. Otherwise the items are left out one by one, which gives each its
cost in margin, put in the order of that, and the longest beginning of this order whose absence costs nothing *together* is searched by
halving: items that say the same cost nothing one by one, because the others still say it. The item at which that ends is needed and
stays; of those behind it, which stand there by a few examples' margins, as many leave as can without it (QuickXplain's search for what is
needed: Junker, AAAI 2004).

What costs nothing is seen in replies, where the user's pairs tell which style they want: without the items replies are as near to it as
with them and as what serves now. Margins hold back too much there: an exemplar makes wanted replies likelier long after they all have the
wanted style. Where nothing is known of a style, the margin must stay what it is. Either way nothing leaves for which the gate would refuse
the candidate.

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
from workers.consolidation.generated import served_then, style
from workers.consolidation.margins import Arm, mean, measure, rows_with
from workers.consolidation.rounds import in_rounds
from workers.consolidation.speaker import Speaker

# Below this change in a reply's log-probability per token nobody could tell the replies apart: 2 % in likelihood.
COSTS_NOTHING_NATS = 0.02
# Of [0, 1]: what replies may lose in style.
LOST_STYLE = 0.05
# Asked one by one, the longest first; the others come last. Each is a scoring of examples with their contexts: on two cores half a second
# an example for the default model.
MAX_ASKED_ALONE = 8
# The newest held-out examples on which that is done: it only makes an order; what is absorbed is decided on all.
EXAMPLES_ALONE = 4
# Of the search: three find the first of eight items that is needed, the others what can leave behind it.
MAX_PASSES = 8


@dataclass(frozen=True)
class Question:
    """What is the candidate without these items, on the newest so many examples (None: on all, and by its replies too)?"""

    left_out: frozenset[str]
    newest: int | None = None


@dataclass(frozen=True)
class Answer:
    """Margins, one an example, and how near replies are to the user's style, the mean; None where nothing tells, or it was not asked."""

    margins: list[float]
    style: float | None = None


Passes = Callable[[frozenset[str], list[float]], bool]
"""(items left out, margins without them) -> whether the gate lets a candidate through that serves like that."""


@dataclass(frozen=True)
class HandOff:
    """What becomes of each item, and the candidate with the whole context and with what is left of it."""

    items: tuple[Handed, ...]
    whole: Answer
    left: Answer

    @property
    def absorbed(self) -> frozenset[str]:
        """Ids of the items that leave the context."""
        return frozenset(item.item for item in self.items if item.absorbed)


def hand_off(
    speaker: Speaker,
    candidates: Sequence[Candidate],
    serving: Sequence[Answer],
    whole: Sequence[Answer],
    *,
    scales: Sequence[float],
    passes: Sequence[Passes],
    on_pass: Callable[[], None],
) -> list[HandOff]:
    """For each candidate what becomes of its user's context items; nothing for a scope of many users, which have none in common.

    The candidates' exports at these scales are loaded in their slots.

    Args:
        serving: what serves now, with its context.
        whole: the candidates with the whole context.
        passes: each candidate's.
    """
    base = speaker.base

    def answered(questions: dict[int, list[Question]]) -> dict[int, list[Answer]]:
        on_pass()
        asked = [(index, question) for index, of_one in questions.items() for question in of_one]
        found = measure(base, speaker.judges, [_arm(base, candidates[index], question) for index, question in asked])
        said = speaker.replies(
            [
                []
                if question.newest or not candidates[index].style
                else served_then(base, candidates[index], scales[index], question.left_out)
                for index, question in asked
            ]
        )
        answers: dict[int, list[Answer]] = {index: [] for index in questions}
        for (index, question), margins, replies in zip(asked, found, said, strict=True):
            near = None if question.newest else style(base, candidates[index], replies)
            answers[index].append(Answer(margins, near))
        return answers

    searches = [
        search(c.context, base.tokens.count, now, with_all, through)
        for c, now, with_all, through in zip(candidates, serving, whole, passes, strict=True)
    ]
    return in_rounds(searches, answered)


def costs_nothing(without: Answer, whole: Answer, now: Answer) -> bool:
    """Whether what is left of the context does as the whole."""
    if without.style is None or whole.style is None or now.style is None:
        return mean(without.margins) >= mean(whole.margins) - COSTS_NOTHING_NATS
    return without.style >= max(whole.style, now.style) - LOST_STYLE


def context_tokens(own: OwnContext | None, *, left_out: frozenset[str], count: Count) -> int:
    """Tokens of a user's rendered context without these items; 0 for scopes of many users."""
    return 0 if own is None else _chosen(own, left_out, count).tokens


def _arm(base: Base, candidate: Candidate, question: Question) -> Arm:
    first = 0 if question.newest is None else max(len(candidate.heldout) - question.newest, 0)
    return Arm(candidate.heldout[first:], rows_with(base, candidate, question.left_out)[first:], candidate.slot)


def search(
    own: OwnContext | None, count: Count, now: Answer, whole: Answer, passes: Passes
) -> Generator[list[Question], list[Answer], HandOff]:
    """One user's: asks what the candidate is without these items or those, and returns what becomes of each."""
    rendered, waiting = _asked(own, count) if own else ([], [])
    if own is None or not rendered:
        return HandOff((), whole, whole)
    everything = frozenset((*rendered, *waiting))
    [nothing] = yield [Question(everything)]

    def enough(left_out: frozenset[str], without: Answer) -> bool:
        return costs_nothing(without, whole, now) and passes(left_out, without.margins)

    items = own.state.items
    tokens = {name: _tokens(items[name], count) for name in everything}
    cost: dict[str, float] = {}
    gone, left = everything, nothing
    if not enough(everything, nothing):
        alone = sorted(rendered, key=lambda name: -tokens[name])[:MAX_ASKED_ALONE]
        singles = yield [Question(frozenset((name,)), newest=EXAMPLES_ALONE) for name in alone]
        with_all = mean(whole.margins[-EXAMPLES_ALONE:])
        cost = {name: with_all - mean(found.margins) for name, found in zip(alone, singles, strict=True)}
        order = sorted(alone, key=lambda name: cost[name]) + [name for name in rendered if name not in cost]
        gone, left = yield from _most(order, frozenset(waiting), enough=enough, whole=whole)
    return HandOff(
        tuple(
            Handed(item=name, tokens=tokens[name], margin_cost_nats=cost.get(name), absorbed=name in gone)
            for name in (*rendered, *waiting)
        ),
        whole,
        left,
    )


def _most(
    order: Sequence[str], waiting: frozenset[str], *, enough: Callable[[frozenset[str], Answer], bool], whole: Answer
) -> Generator[list[Question], list[Answer], tuple[frozenset[str], Answer]]:
    """Many of these items, with what waits, that can be left out together, and the candidate without them.

    All of them are known to be too many. What is returned was measured.
    """
    found: tuple[frozenset[str], Answer] = (frozenset(), whole)
    gone, rest = list[str](), list(order)
    # Leaving out `low` of the rest is enough, `high` is too many.
    low, high = 0, len(rest)
    for _ in range(MAX_PASSES):
        if high - low < 2:
            # The one after `low` is needed; whether those behind it are, nobody has asked.
            gone, rest = gone + rest[:low], rest[high:]
            low, high = 0, len(rest) + 1
            if not rest:
                break
        middle = len(rest) if high > len(rest) else (low + high) // 2
        left_out = frozenset((*gone, *rest[:middle], *waiting))
        [without] = yield [Question(left_out)]
        if enough(left_out, without):
            low, found = middle, (left_out, without)
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
