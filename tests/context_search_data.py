"""A user with planted preferences for tests of the context search: what helps and what harms is known, and so is what must be found."""

from collections.abc import Callable, Mapping, Sequence

from service.domain.context import Context
from service.domain.events import Event
from service.domain.fast_weights import FastWeights
from service.domain.feedback import (
    BASE,
    FeedbackEvent,
    Interaction,
    Message,
    Signals,
    VersionTuple,
)
from service.domain.fold import fold
from service.domain.items import Guideline
from tests.fakes import MODEL
from workers.context_search.candidates import Pool
from workers.context_search.duplicates import Duplicates
from workers.context_search.examples import usable
from workers.context_search.judge import Asked
from workers.context_search.reflection import Reflection
from workers.context_search.search import Means, Work

WITHOUT_CONTEXT = -3.0
"""Mean log-probability of any wanted reply without a context; unwanted ones are at -2 always."""


def feedback(revision: int, *, user: str = "alice", prompt: str | None = None, **signals: object) -> FeedbackEvent:
    """One feedback on an interaction of its own."""
    interaction = Interaction(
        id=f"chatcmpl-{user}-{revision}",
        tenant="acme",
        user=user,
        created=float(revision),
        messages=(Message(role="user", content=f"Question {revision}?" if prompt is None else prompt),),
        reply=f"A long reply to question {revision} that nobody asked for.",
        version=VersionTuple(model=MODEL),
        signals=Signals.model_validate(signals),
    )
    return FeedbackEvent(revision=revision, at=float(revision), interaction=interaction)


def corrections(count: int, *, comments: Mapping[int, str] | None = None) -> list[FeedbackEvent]:
    """A log of corrections, some of them with a comment."""
    return [feedback(n, correction=f"Wanted {n}.", comment=(comments or {}).get(n)) for n in range(1, count + 1)]


def words(text: str) -> int:
    return len(text.split())


def work(events: Sequence[Event], **changes: object) -> Work:
    """What a search of this log works on."""
    state = fold(events)
    examples, revisions = usable(events, user="alice", count=words, room_tokens=10_000)
    defaults: dict[str, object] = {
        "state": state,
        "examples": examples,
        "revisions": revisions,
        "model": MODEL,
        "adapter": BASE,
        "absorbed": frozenset(),
        "budget_tokens": 400,
        "count": words,
    }
    return Work(**(defaults | changes))  # type: ignore[arg-type]


def exemplar_for(state: FastWeights, revision: int) -> str:
    """The id of the exemplar that the feedback of this revision supports."""
    return next(x.id for x in state.exemplars.values() if revision in x.sources.values())


class PlantedScorer:
    """The likelihood of a wanted reply rises and falls with the texts that the context before it holds.

    Args:
        effects: text -> what it adds to the mean log-probability of every wanted reply.
    """

    def __init__(self, effects: Mapping[str, float]) -> None:
        self.effects = effects
        self.scored = 0
        self.models: list[str] = []
        self.contexts: list[str] = []

    async def score(self, model: str, items: Sequence[Asked]) -> list[list[float]]:
        self.models.append(model)
        self.scored += len(items)
        return [self._one(messages, len(replies)) for messages, replies in items]

    def _one(self, messages: Sequence[Message], replies: int) -> list[float]:
        context = "\n".join(m.content or "" for m in messages[:-1])
        self.contexts.append(context)
        raised = sum(effect for text, effect in self.effects.items() if text in context)
        return [WITHOUT_CONTEXT + raised, -2.0][:replies]


class Says:
    """A generator whose replies are a function of the context."""

    def __init__(self, reply: Callable[[str], str]) -> None:
        self._reply = reply
        self.asked = 0

    async def reply(self, model: str, messages: Sequence[Message], *, max_tokens: int) -> str:
        self.asked += 1
        return self._reply("\n".join(m.content or "" for m in messages[:-1]))


async def no_duplicates(guidelines: Sequence[Guideline]) -> Duplicates:
    return Duplicates()


def means(scorer: PlantedScorer, **changes: object) -> Means:
    """What a search asks of the world, with nothing but the scorer given."""
    defaults: dict[str, object] = {
        "scorer": scorer,
        "generator": Says(lambda context: "Wanted."),
        "find_duplicates": no_duplicates,
        "reflection": no_reflection,
        "metric_calls": 200,
        "cancelled": lambda: False,
    }
    return Means(**(defaults | changes))  # type: ignore[arg-type]


def no_reflection(pool: Pool) -> Reflection | None:
    return None


def rendered_texts(context: Context) -> list[str]:
    return [g.text for g in context.guidelines] + [x.reply for x in context.exemplars]
