"""From fast weights to the messages of one chat: which items are rendered under a token budget, and how.

Items compete by posterior gain per token: the posterior mean of being helpful, over what is no longer rendered, fading with the age of
the evidence. What is chosen is ordered so that it rarely changes at the front (guidelines, then exemplars, each by age or as the
optimizer ordered them; exemplars recalled for this prompt last), because vLLM's prefix cache ends at the first difference. Where not all
exemplars fit, some room is kept for those of this epoch, so that not every new one pushes the oldest out at the front.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from service.domain.cold_start import offered, posterior
from service.domain.comments import stances
from service.domain.events import Member
from service.domain.fast_weights import FastWeights
from service.domain.feedback import AUTO, Frozen, Message
from service.domain.items import DECAY, Exemplar, Guideline, Item, ItemT, Prior

# Under this posterior mean of being helpful an item is no longer rendered: two blames more than praises, say.
MIN_HELPFUL = 1 / 3
# An overlong list of guidelines must not crowd out the exemplars, which small models follow better.
GUIDELINE_SHARE = 0.5
# Where exemplars are recalled for the prompt, what they may take of the exemplars' room; the rest stays the same from chat to chat.
RECALL_SHARE = 0.5
# Of the room of the exemplars that stay, what is kept for those of this epoch, who join at the end. Only when it is used up, or after so
# many events, older ones make room, several at once: each time vLLM's prefix cache loses all that follows.
EPOCH_EVENTS = 32
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
class _Ranking:
    """How the items of one user compete."""

    state: FastWeights
    member: Member | None
    _weighed: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Each is asked for several times, and a full state has two hundred items."""

    def weighed(self, item: Item) -> tuple[float, int]:
        """Posterior gain of rendering an item, in (-1, 1), negative where it is not worth rendering; revision of its newest support."""
        found = self._weighed.get(item.id)
        if found is None:
            renewed = item.renewed
            found = self._weighed[item.id] = self._gain(item, renewed), renewed
        return found

    def _gain(self, item: Item, renewed: int) -> float:
        credit = self.state.credit(item.id)
        if isinstance(item, Prior):
            return posterior(item, credit, clock=self.state.clock) - MIN_HELPFUL
        gain = credit.mean() - MIN_HELPFUL
        return gain * DECAY ** (self.state.revision - renewed) if gain > 0 else gain

    @property
    def since(self) -> int:
        """What is newer was said since the population was computed (or just now), so that the next chat must have it."""
        return self.member.basis if self.member else self.state.revision - 1

    def epoch(self, items: Iterable[ItemT], cost: Callable[[ItemT], int], *, room: int) -> int:
        """The revision since which items have this room to themselves.

        A new epoch begins when the room is used up, and every `EPOCH_EVENTS`, so that what was long ago decides nothing.
        """
        last, used = self.state.revision - 1, 0
        since = newest = last - last % EPOCH_EVENTS
        said = ((self.weighed(item)[1], cost(item)) for item in items if item.stated)
        for renewed, tokens in sorted(entry for entry in said if entry[0] > since):
            if used and used + tokens > room:
                since, used = newest, 0
            newest, used = renewed, used + tokens
        return since

    def allowed(self, item: Item) -> bool:
        """Whether it may be rendered at all: the member's choice and what is newer; without a member, what the user said."""
        if item.pinned:
            return True
        if isinstance(item, Prior):
            chosen = True
        elif self.member is None:
            # An inferred guideline must be proven first; a demonstration only stands in for exemplars that are missing.
            chosen = item.stated or isinstance(item, Exemplar)
        else:
            chosen = item.id in self.member.items or self.weighed(item)[1] > self.since
        return chosen and self.heard(item)

    def heard(self, item: Item) -> bool:
        """Whether it is worth rendering: not blamed, and not odd unless it was said last."""
        gain, renewed = self.weighed(item)
        return gain >= 0 and (item.id not in self.state.odd or renewed == self.state.revision)

    def order(self, items: Iterable[ItemT], cost: Callable[[ItemT], int]) -> list[ItemT]:
        """Who gets a place first: pinned, then what was said, then fresh, then by gain per token; ties to the newest."""
        since = self.since

        def place(item: ItemT) -> tuple[bool, bool, bool, float, int, str]:
            gain, renewed = self.weighed(item)
            return item.pinned, item.stated, renewed > since, gain / max(cost(item), 1), renewed, item.id

        return sorted(filter(self.allowed, items), key=place, reverse=True)

    def rendered(self, items: Iterable[ItemT]) -> tuple[ItemT, ...]:
        """In the optimizer's order, then by age."""
        places = {name: n for n, name in enumerate(self.member.items)} if self.member else {}
        return tuple(sorted(items, key=lambda i: (places.get(i.id, len(places)), i.born, i.id)))


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
        similarity: of exemplars to the prompt, by id; with it the nearest of those left out get part of the exemplars' room, or what
            a member leaves of it.
        priors: guidelines of other users, for one who has said little.
    """
    ranking = _Ranking(state, member)
    heading = count(GUIDELINES_HEADING) + TOKENS_AROUND_MESSAGE
    standing = without_contradicted(
        g for g in (*offered(state, priors), *state.guidelines.values()) if ranking.allowed(g)
    )
    guidelines, guideline_tokens = _fill(
        ranking.order((g for g in standing if g.id not in absorbed), _guideline_cost(count)),
        cost=_guideline_cost(count),
        budget=int(budget_tokens * GUIDELINE_SHARE) - heading,
    )
    used = guideline_tokens + heading if guidelines else 0
    wanted = ranking.order((x for x in state.exemplars.values() if x.id not in absorbed), _exemplar_cost(count))
    exemplars, recalled, exemplar_tokens = _exemplars(
        _one_of_each(wanted), ranking, cost=_exemplar_cost(count), room=budget_tokens - used, similarity=similarity
    )
    if similarity and member:
        others = (x for x in state.exemplars.values() if x.stated and x not in wanted and ranking.heard(x))
        nearest = sorted(
            (x for x in others if x.id in similarity), key=lambda x: (similarity[x.id], x.id), reverse=True
        )
        spare = budget_tokens - used - exemplar_tokens
        found, more = _fill((x for x in nearest if x.id not in absorbed), cost=_exemplar_cost(count), budget=spare)
        recalled, exemplar_tokens = [*found[::-1], *recalled], exemplar_tokens + more
    return Context(
        revision=state.revision,
        member=member.id if member else AUTO,
        guidelines=ranking.rendered(guidelines),
        exemplars=ranking.rendered(exemplars),
        recalled=tuple(recalled),
        tokens=used + exemplar_tokens,
    )


def _exemplars(
    wanted: Sequence[Exemplar],
    ranking: _Ranking,
    *,
    cost: Callable[[Exemplar], int],
    room: int,
    similarity: Mapping[str, float] | None,
) -> tuple[list[Exemplar], list[Exemplar], int]:
    """The exemplars that stay from chat to chat; those that fill what is left of the room, best last; and the tokens of all."""
    everything, tokens = _fill(wanted, cost=cost, budget=room)
    if len(everything) == len(wanted):
        return everything, [], tokens
    budget = int(room * (1 - RECALL_SHARE)) if similarity else room
    kept = int(budget * EPOCH_SHARE)
    since = ranking.epoch(wanted, cost, room=kept)
    young = [x for x in wanted if x.pinned or (x.stated and x.renewed > since)]
    staying, tokens = _fill(young, cost=cost, budget=budget)
    ids = {x.id for x in young}
    older, more = _fill((x for x in wanted if x.id not in ids), cost=cost, budget=budget - max(tokens, kept))
    staying, tokens = staying + older, tokens + more
    ids = {x.id for x in staying}
    left = [x for x in wanted if x.id not in ids]
    if similarity:
        left = sorted((x for x in left if x.id in similarity), key=lambda x: (similarity[x.id], x.id), reverse=True)
    rest, more = _fill(left, cost=cost, budget=room - tokens)
    return staying, rest[::-1], tokens + more


def left_out(
    state: FastWeights, context: Context, *, absorbed: frozenset[str], budget_tokens: int, count: Count
) -> list[Exemplar]:
    """Exemplars that recall may choose from: those that did not fit into a context, of a member's those that still would."""
    there, cost = set(context.items), _exemplar_cost(count)
    spare = budget_tokens if context.member == AUTO else budget_tokens - context.tokens
    others = (x for x in state.exemplars.values() if x.stated and x.id not in there and x.id not in absorbed)
    return [x for x in others if cost(x) <= spare]


def without_contradicted(guidelines: Iterable[Guideline]) -> list[Guideline]:
    """The guidelines that no later one contradicts ("shorter" after "more detail"). What is inferred gives way to what was said.

    Nothing is deleted: when the later one is retracted, the older one is back.
    """
    guidelines = list(guidelines)
    newest: dict[str, Guideline] = {}
    for g in sorted(guidelines, key=_authority):
        for axis in _stances(g.text):
            newest[axis] = g
    return [
        g
        for g in guidelines
        if g.pinned or all(_stances(newest[axis].text)[axis] == value for axis, value in _stances(g.text).items())
    ]


def _authority(guideline: Guideline) -> tuple[bool, bool, int, str]:
    return (guideline.pinned, guideline.stated, guideline.renewed, guideline.id)


@lru_cache(4096)
def _stances(text: str) -> dict[str, str]:
    return stances(text)


def _guideline_cost(count: Count) -> Callable[[Guideline], int]:
    return lambda g: count(g.text) + TOKENS_AROUND_GUIDELINE


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
