"""Fast weights: what a user's feedback says to put before their conversations.

The fast weights are `fold(log)`: a pure function of the user's events, so whatever is cached of it can be lost. A *guideline* comes from
a comment, an *exemplar* from a correction or a preference; an item is there as long as some interaction's standing feedback supports it.
Ratings credit the items that were in the context of the reply. Credits are kept beside the items, not in them: they are plain sums, so
a retracted or replaced signal leaves exactly the state that would be there without it.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from service.domain.feedback import RATING_DIGITS, FeedbackEvent, Frozen, Interaction, Message

MAX_GUIDELINE_CHARS = 300
# The state is read at every chat: bounded, oldest items first to go.
MAX_ITEMS = 512
# Under this posterior mean of being helpful an item is no longer rendered: two blames more than praises, say.
MIN_HELPFUL = 1 / 3
# An overlong list of guidelines must not crowd out the exemplars, which small models follow better.
GUIDELINE_SHARE = 0.5
# What a chat template adds around one message, at most, in the templates of the families that vLLM serves.
TOKENS_AROUND_MESSAGE = 8
GUIDELINES_HEADING = "What this user wants of every reply, learnt from their feedback:"


class Item(Frozen):
    """A thing that a context may hold, kept while some interaction's standing feedback supports it."""

    id: str
    sources: dict[str, int]
    """Supporting interaction -> the revision at which it began to."""

    @property
    def born(self) -> int:
        """The revision of the oldest support: items are rendered in this order."""
        return min(self.sources.values())


ItemT = TypeVar("ItemT", bound=Item)


class Guideline(Item):
    """One short instruction."""

    text: str


class Exemplar(Item):
    """One prompt with the reply that the user wanted and the one they did not."""

    prompt: str
    reply: str
    rejected: str


class Credit(Frozen):
    """Sums of praise and of blame over the replies that an item was in the context of."""

    helpful: float = 0.0
    harmful: float = 0.0

    def moved(self, before: float, after: float) -> "Credit":
        """This credit with a rating of `before` taken back and one of `after` given, exact to a thousandth."""
        return Credit(
            helpful=round(self.helpful + max(after, 0.0) - max(before, 0.0), RATING_DIGITS),
            harmful=round(self.harmful + max(-after, 0.0) - max(-before, 0.0), RATING_DIGITS),
        )

    @property
    def mean(self) -> float:
        """Posterior mean of being helpful under a uniform Beta prior."""
        return (self.helpful + 1) / (self.helpful + self.harmful + 2)


class FastWeights(Frozen):
    """The fold of a user's log up to `revision`."""

    revision: int = 0
    updated: float = 0.0
    guidelines: dict[str, Guideline] = {}
    exemplars: dict[str, Exemplar] = {}
    credits: dict[str, Credit] = {}


class Context(Frozen):
    """An ordered choice of items, as it will be rendered."""

    revision: int = 0
    guidelines: tuple[Guideline, ...] = ()
    exemplars: tuple[Exemplar, ...] = ()
    tokens: int = 0

    @property
    def items(self) -> tuple[str, ...]:
        return tuple(item.id for item in (*self.guidelines, *self.exemplars))


def item_id(kind: str, *parts: str) -> str:
    """An item is named by its content, so that a version's absorbed items can be told from later ones."""
    return f"{kind}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def clean_comment(comment: str) -> str:
    """A comment as the one line of a guideline."""
    return " ".join(comment.split())[:MAX_GUIDELINE_CHARS]


def guideline_of(interaction: Interaction, revision: int) -> Guideline | None:
    """The guideline that an interaction's comment supports."""
    text = clean_comment(interaction.signals.comment or "")
    return Guideline(id=item_id("g", text), text=text, sources={interaction.id: revision}) if text else None


def exemplar_of(interaction: Interaction, revision: int) -> Exemplar | None:
    """The exemplar that an interaction's correction or preference supports."""
    pair, prompt = interaction.pair(), interaction.last_user_text()
    if pair is None or not prompt.strip() or not pair[0].strip():
        return None
    wanted, unwanted = pair
    return Exemplar(
        id=item_id("x", prompt, wanted, unwanted),
        prompt=prompt,
        reply=wanted,
        rejected=unwanted,
        sources={interaction.id: revision},
    )


def apply(state: FastWeights, event: FeedbackEvent) -> FastWeights:
    """The fast weights after one more event. An event that is already folded in changes nothing.

    Raises:
        ValueError: the event does not follow the state; a part of the log is missing.
    """
    if event.revision <= state.revision:
        return state
    if event.revision != state.revision + 1:
        raise ValueError(f"event {event.revision} does not follow revision {state.revision}: the log has a gap")
    interaction = event.interaction
    return FastWeights(
        revision=event.revision,
        updated=event.at,
        guidelines=_support(state.guidelines, interaction.id, guideline_of(interaction, event.revision)),
        exemplars=_support(state.exemplars, interaction.id, exemplar_of(interaction, event.revision)),
        credits=_credit(state.credits, interaction, before=event.previous.rating or 0.0),
    )


def fold(events: Iterable[FeedbackEvent], state: FastWeights | None = None) -> FastWeights:
    """The fast weights after `events`, in the order of the log, from `state` (empty if None)."""
    state = state or FastWeights()
    for event in events:
        state = apply(state, event)
    return state


def _support(items: dict[str, ItemT], interaction_id: str, wanted: ItemT | None) -> dict[str, ItemT]:
    """`items` with this interaction supporting `wanted` and nothing else; an item that it supported before keeps its age."""
    after: dict[str, ItemT] = {}
    for item in items.values():
        sources = dict(item.sources)
        if wanted is not None and item.id == wanted.id:
            sources = {**wanted.sources, **sources}
        else:
            sources.pop(interaction_id, None)
        if sources:
            after[item.id] = item if sources == item.sources else item.model_copy(update={"sources": sources})
    if wanted is not None and wanted.id not in after:
        after[wanted.id] = wanted
    if len(after) > MAX_ITEMS:
        del after[min(after.values(), key=lambda item: item.born).id]
    return after


def _credit(credits: dict[str, Credit], interaction: Interaction, *, before: float) -> dict[str, Credit]:
    rating = interaction.signals.rating or 0.0
    if rating == before:
        return credits
    after = dict(credits)
    for name in interaction.items:
        credit = after.pop(name, Credit()).moved(before, rating)
        if credit != Credit():
            after[name] = credit
    return after


def choose(state: FastWeights, *, absorbed: frozenset[str], budget_tokens: int, count: Callable[[str], int]) -> Context:
    """The context of a user: the items that fit the budget and are not blamed, less those that the adapter has absorbed.

    Newer items win where not all fit; what is chosen is ordered by age, guidelines first, so that feedback adds at the end and
    vLLM's prefix cache stays warm.

    Args:
        absorbed: ids of items that the adapter version in use makes unnecessary.
        budget_tokens: most tokens that the rendered context may take, the template's own around each message included.
        count: tokens of a text under the served model's tokenizer.
    """
    guideline_budget = int(budget_tokens * GUIDELINE_SHARE)
    heading = count(GUIDELINES_HEADING) + TOKENS_AROUND_MESSAGE
    guidelines, guideline_tokens = _fill(
        _candidates(state.guidelines, state.credits, absorbed),
        same=lambda g: g.text.casefold(),
        cost=lambda g: count(g.text) + 3,
        budget=guideline_budget - heading,
    )
    used = guideline_tokens + heading if guidelines else 0
    exemplars, exemplar_tokens = _fill(
        _candidates(state.exemplars, state.credits, absorbed),
        same=lambda x: (x.prompt, x.reply),
        cost=lambda x: count(x.prompt) + count(x.reply) + 2 * TOKENS_AROUND_MESSAGE,
        budget=budget_tokens - used,
    )
    return Context(revision=state.revision, guidelines=guidelines, exemplars=exemplars, tokens=used + exemplar_tokens)


def _candidates(items: dict[str, ItemT], credits: dict[str, Credit], absorbed: frozenset[str]) -> list[ItemT]:
    """What may be rendered, newest first."""
    kept = [i for i in items.values() if i.id not in absorbed and credits.get(i.id, Credit()).mean >= MIN_HELPFUL]
    return sorted(kept, key=lambda item: (item.born, item.id), reverse=True)


def _fill(
    candidates: Sequence[ItemT], *, same: Callable[[ItemT], object], cost: Callable[[ItemT], int], budget: int
) -> tuple[tuple[ItemT, ...], int]:
    """The candidates that fit the budget in their order, duplicates left out, oldest first; and their tokens."""
    chosen: list[ItemT] = []
    seen: set[object] = set()
    used = 0
    for item in candidates:
        tokens = cost(item)
        if same(item) in seen or used + tokens > budget:
            continue
        seen.add(same(item))
        chosen.append(item)
        used += tokens
    return tuple(reversed(chosen)), used


def render(context: Context, messages: Sequence[Message]) -> list[Message]:
    """The conversation with the context before it: the client's system text, the guidelines, the exemplars as turns, the rest.

    Guidelines join the client's own system message, because many chat templates allow only one, at the start.
    """
    rest = list(messages)
    system = []
    if rest and rest[0].role in ("system", "developer"):
        system.append(rest.pop(0).content or "")
    if context.guidelines:
        system.append("\n".join([GUIDELINES_HEADING, *(f"- {g.text}" for g in context.guidelines)]))
    rendered = [Message(role="system", content="\n\n".join(system))] if system else []
    for exemplar in context.exemplars:
        rendered.append(Message(role="user", content=exemplar.prompt))
        rendered.append(Message(role="assistant", content=exemplar.reply))
    return rendered + rest


def neutralize(text: str, control_tokens: Sequence[str]) -> str:
    """`text` with a space after the first character of each control token, so that the tokenizer no longer sees one."""
    for token in control_tokens:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
