"""From fast weights to the messages of one chat: which items are rendered under a token budget, and how.

Items compete by posterior gain per token: the posterior mean of being helpful, over what is no longer rendered, fading with the age of
the evidence. What is chosen is ordered so that it rarely changes at the front (guidelines, then exemplars, each by age or as the
optimizer ordered them; exemplars recalled for this prompt last), because vLLM's prefix cache ends at the first difference. Where not all
exemplars fit, some room is kept for those of this epoch, so that not every new one pushes the oldest out at the front.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from service.domain.cold_start import offered
from service.domain.events import Member
from service.domain.fast_weights import FastWeights
from service.domain.feedback import AUTO, Frozen, Message
from service.domain.items import Exemplar, Guideline, ItemT, Prior
from service.domain.ranking import Ranking, without_contradicted

# An overlong list of guidelines must not crowd out the exemplars, which small models follow better.
GUIDELINE_SHARE = 0.5
# Where exemplars are recalled for the prompt, what they may take of the exemplars' room; the rest stays the same from chat to chat.
RECALL_SHARE = 0.5
# Of the room of the exemplars that stay, what is kept for those of this epoch (`Ranking.epoch`), who join at the end. Only when it is used
# up, or after `EPOCH_EVENTS`, older ones make room, several at once: each time vLLM's prefix cache loses all that follows.
EPOCH_SHARE = 0.5
# What a chat template adds around one message, at most, in the templates of the families that vLLM serves.
TOKENS_AROUND_MESSAGE = 8
TOKENS_AROUND_GUIDELINE = 3
GUIDELINES_HEADING = "What this user wants of every reply, learnt from their feedback:"

Count = Callable[[str], int]


class Context(Frozen):
    """An ordered choice of items, as it will be rendered."""

    revision: int = 0
    member: str = AUTO
    guidelines: tuple[Guideline, ...] = ()
    exemplars: tuple[Exemplar, ...] = ()
    recalled: tuple[Exemplar, ...] = ()
    """What fills the room that is left: chosen for this prompt, nearest last; or, where likeness is not known, the next best."""
    tokens: int = 0

    @property
    def items(self) -> tuple[str, ...]:
        return tuple(item.id for item in (*self.guidelines, *self.exemplars, *self.recalled))


@dataclass(frozen=True)
class _Places:
    """Which exemplars have a place whatever the prompt."""

    staying: tuple[Exemplar, ...]
    """As they are rendered."""
    left: Sequence[Exemplar]
    """Who competes for what is left of the room, best first."""
    tokens: int
    """Of those that stay."""


@dataclass(frozen=True)
class Ranked:
    """How the items of one user stand before a prompt is known; `context` is what is left to do for each."""

    _ranking: Ranking
    _budget_tokens: int
    _guidelines: tuple[Guideline, ...]
    """Chosen."""
    _used: int
    """Tokens that they take."""
    _wanted: Sequence[Exemplar]
    """Who gets a place first."""
    _others: Sequence[Exemplar]
    """Those that a member leaves out, and recall may bring back."""
    _cost: Callable[[Exemplar], int]

    def context(self, similarity: Mapping[str, float] | None = None) -> Context:
        """The items that are worth their tokens.

        Args:
            similarity: of exemplars to the prompt, by id; with it the nearest of those left out get part of the exemplars' room, or what
                a member leaves of it.
        """
        member, cost = self._ranking.member, self._cost
        places = self._places_beside_recall if similarity else self._all_places
        room = self._room - places.tokens
        left = _nearest(places.left, similarity) if similarity else places.left
        recalled, tokens = _fill(left, cost=cost, budget=room)
        if similarity and member:
            others, more = _fill(_nearest(self._others, similarity), cost=cost, budget=room - tokens)
            recalled, tokens = [*recalled, *others], tokens + more
        return Context(
            revision=self._ranking.state.revision,
            member=member.id if member else AUTO,
            guidelines=self._guidelines,
            exemplars=places.staying,
            recalled=tuple(recalled[::-1]),
            tokens=self._used + places.tokens + tokens,
        )

    @property
    def _room(self) -> int:
        """Tokens for exemplars."""
        return self._budget_tokens - self._used

    @cached_property
    def _all_places(self) -> _Places:
        return _places(self._wanted, self._ranking, cost=self._cost, room=self._room, budget=self._room)

    @cached_property
    def _places_beside_recall(self) -> _Places:
        budget = int(self._room * (1 - RECALL_SHARE))
        return _places(self._wanted, self._ranking, cost=self._cost, room=self._room, budget=budget)


def ranked(
    state: FastWeights,
    *,
    absorbed: frozenset[str],
    budget_tokens: int,
    count: Count,
    member: Member | None = None,
    priors: Sequence[Prior] = (),
) -> Ranked:
    """The items of a user in their order, less those that the adapter has absorbed; the arguments are those of `choose`."""
    ranking = Ranking(state, member)
    heading = count(GUIDELINES_HEADING) + TOKENS_AROUND_MESSAGE
    standing = without_contradicted(
        g for g in (*offered(state, priors), *state.guidelines.values()) if ranking.allowed(g)
    )
    guidelines, guideline_tokens = _fill(
        ranking.order((g for g in standing if g.id not in absorbed), _guideline_cost(count)),
        cost=_guideline_cost(count),
        budget=int(budget_tokens * GUIDELINE_SHARE) - heading,
    )
    cost = _once_for_each(_exemplar_cost(count))
    wanted = ranking.order((x for x in state.exemplars.values() if x.id not in absorbed), cost)
    ids = absorbed.union(x.id for x in wanted)
    others = (
        [x for x in state.exemplars.values() if x.stated and x.id not in ids and ranking.heard(x)] if member else []
    )
    return Ranked(
        ranking,
        budget_tokens,
        ranking.rendered(guidelines),
        guideline_tokens + heading if guidelines else 0,
        _one_of_each(wanted),
        others,
        cost,
    )


def choose(
    state: FastWeights,
    *,
    absorbed: frozenset[str],
    budget_tokens: int,
    count: Count,
    member: Member | None = None,
    similarity: Mapping[str, float] | None = None,
    priors: Sequence[Prior] = (),
) -> Context:
    """The context of a user: the items that are worth their tokens, less those that the adapter has absorbed.

    Args:
        absorbed: ids of items that the adapter version in use makes unnecessary.
        budget_tokens: most tokens that the rendered context may take, the template's own around each message included.
        count: tokens of a text under the served model's tokenizer.
        member: the population's member that serves; None lets all items compete.
        similarity: as `Ranked.context` takes it.
        priors: guidelines of other users, for one who has said little.
    """
    found = ranked(state, absorbed=absorbed, budget_tokens=budget_tokens, count=count, member=member, priors=priors)
    return found.context(similarity)


def _nearest(exemplars: Iterable[Exemplar], similarity: Mapping[str, float]) -> list[Exemplar]:
    """Those whose likeness to the prompt is known, the nearest first; of equals the better one."""
    known = [x for x in exemplars if x.id in similarity]
    return sorted(known, key=lambda x: -similarity[x.id])


def _places(
    wanted: Sequence[Exemplar], ranking: Ranking, *, cost: Callable[[Exemplar], int], room: int, budget: int
) -> _Places:
    """Who stays from chat to chat.

    Args:
        room: tokens of all exemplars.
        budget: tokens of those that stay, where not all fit.
    """
    everything, tokens = _fill(wanted, cost=cost, budget=room)
    if len(everything) == len(wanted):
        return _Places(ranking.rendered(everything), (), tokens)
    kept = int(budget * EPOCH_SHARE)
    since = ranking.epoch(wanted, cost, room=kept)
    young = [x for x in wanted if x.pinned or (x.stated and x.renewed > since)]
    staying, tokens = _fill(young, cost=cost, budget=budget)
    ids = {x.id for x in young}
    older, more = _fill((x for x in wanted if x.id not in ids), cost=cost, budget=budget - max(tokens, kept))
    staying, tokens = staying + older, tokens + more
    ids = {x.id for x in staying}
    return _Places(ranking.rendered(staying), [x for x in wanted if x.id not in ids], tokens)


def left_out(
    state: FastWeights, context: Context, *, absorbed: frozenset[str], budget_tokens: int, count: Count
) -> list[Exemplar]:
    """Exemplars that recall may choose from: those that did not fit into a context, of a member's those that still would."""
    there, cost = set(context.items), _exemplar_cost(count)
    spare = budget_tokens if context.member == AUTO else budget_tokens - context.tokens
    others = (x for x in state.exemplars.values() if x.stated and x.id not in there and x.id not in absorbed)
    return [x for x in others if cost(x) <= spare]


def _guideline_cost(count: Count) -> Callable[[Guideline], int]:
    return lambda g: count(g.text) + TOKENS_AROUND_GUIDELINE


def _once_for_each(cost: Callable[[ItemT], int]) -> Callable[[ItemT], int]:
    """The same cost, asked for once for each item."""
    known: dict[str, int] = {}

    def cached(item: ItemT) -> int:
        found = known.get(item.id)
        if found is None:
            found = known[item.id] = cost(item)
        return found

    return cached


def _exemplar_cost(count: Count) -> Callable[[Exemplar], int]:
    return lambda x: count(x.prompt) + count(x.reply) + 2 * TOKENS_AROUND_MESSAGE


def _one_of_each(exemplars: Iterable[Exemplar]) -> list[Exemplar]:
    """One exemplar for each prompt and reply, whatever it was preferred to."""
    first: dict[tuple[str, str], Exemplar] = {}
    for x in exemplars:
        first.setdefault((x.prompt, x.reply), x)
    return list(first.values())


def _fill(candidates: Iterable[ItemT], *, cost: Callable[[ItemT], int], budget: int) -> tuple[list[ItemT], int]:
    """The candidates that fit the budget, each in its turn; and their tokens."""
    chosen: list[ItemT] = []
    used = 0
    for item in candidates:
        tokens = cost(item)
        if used + tokens <= budget:
            chosen.append(item)
            used += tokens
    return chosen, used


def render(context: Context, messages: Sequence[Message]) -> list[Message]:
    """The conversation with the context before it: the client's system text, the guidelines, the exemplars as turns, the rest."""
    system, rest = opening(instructions(context), messages)
    return system + turns(context) + rest


def instructions(context: Context) -> str:
    """The guidelines as text."""
    return "\n- ".join([GUIDELINES_HEADING, *(g.text for g in context.guidelines)]) if context.guidelines else ""


def turns(context: Context) -> list[Message]:
    """The exemplars as turns of a conversation."""
    pairs = [(("user", x.prompt), ("assistant", x.reply)) for x in (*context.exemplars, *context.recalled)]
    return [Message(role=role, content=text) for pair in pairs for role, text in pair]


def opening(instructions: str, messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The system message, if there is anything for it to say, and the rest of the conversation.

    Guidelines join the client's own system message, because many chat templates allow only one, at the start.
    """
    own = bool(messages) and messages[0].role in ("system", "developer")
    texts = ([messages[0].content or ""] if own else []) + ([instructions] if instructions else [])
    return [Message(role="system", content="\n\n".join(texts))] if texts else [], list(messages[own:])
