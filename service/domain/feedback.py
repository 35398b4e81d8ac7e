"""Interactions and what users say of them.

An *interaction* is one served chat completion; its id is the completion's `id`. *Feedback* carries any of four signals about it. Each
signal is absent (left as it was), null (retracted) or a value (set, replacing an earlier one), so a `Signals` is always the whole of
what the user now says of that interaction. An *event* is one entry of the user's log: it holds the signals before and after, and a
snapshot of the interaction, so that the log can be folded and trained on after the interaction itself has expired.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.domain.comments import implied_rating

BASE = "base"
"""Stands in a version tuple where no adapter was used."""
AUTO = "auto"
"""Stands in a version tuple where the context was no member of a population."""

# Ratings are kept to a thousandth, so that adding and taking back any number of them is exact after rounding.
RATING_DIGITS = 3


class Frozen(BaseModel):
    """An immutable value, stored as JSON."""

    model_config = ConfigDict(frozen=True, extra="ignore")


IfAny = Field(exclude_if=lambda value: value is None)
"""Not written where there is none: few messages have any."""


@dataclass(slots=True, unsafe_hash=True)
class Message:
    """One message of a conversation, which nobody changes. Every chat makes some: frozen it takes four times as long, as a model more."""

    role: str
    content: str | None = None
    name: Annotated[str | None, IfAny] = None
    tool_calls: Annotated[list[dict[str, Any]] | None, IfAny] = field(default=None, hash=False)
    tool_call_id: Annotated[str | None, IfAny] = None

    def more(self) -> dict[str, Any]:
        """What it has besides a role and a text."""
        if self.name is None and self.tool_calls is None and self.tool_call_id is None:
            return {}
        named = {"name": self.name, "tool_calls": self.tool_calls, "tool_call_id": self.tool_call_id}
        return {name: value for name, value in named.items() if value is not None}

    def sent(self) -> dict[str, Any]:
        """As vLLM takes it."""
        more = self.more()
        if self.content is None:
            return {"role": self.role, **more}
        told = {"role": self.role, "content": self.content}
        return told | more if more else told


def last_user_text(messages: Sequence[Message]) -> str:
    """The text of the last user message, empty if there is none."""
    return next((m.content or "" for m in reversed(messages) if m.role == "user"), "")


@dataclass(unsafe_hash=True)
class VersionTuple:
    """What served a reply: base model, adapter version (or `base`), revision of the context and which of the population it was."""

    model: str
    adapter: str = BASE
    context_revision: int = 0
    member: str = AUTO


class Preference(Frozen):
    """This reply against another one to the same conversation."""

    other: str
    """The other reply's text."""
    other_id: str | None = None
    """The other interaction's id, where it was one."""
    better: Literal["this", "other"]


class Signals(Frozen):
    """All that the user now says of one interaction."""

    rating: float | None = None
    """In [-1, 1]; true is 1 and false -1."""
    comment: str | None = None
    correction: str | None = None
    """The reply that was wanted."""
    preference: Preference | None = None

    def is_empty(self) -> bool:
        return self == NO_SIGNALS

    def stated_rating(self) -> float | None:
        """The rating, or the one that an unspecific comment ("meh") amounts to."""
        if self.rating is not None or self.comment is None:
            return self.rating
        return implied_rating(self.comment)


NO_SIGNALS = Signals()


@dataclass(kw_only=True)
class Interaction:
    """One served chat completion, which nobody changes; like a message, every chat makes one.

    `messages` is the conversation as the client sent it, without the context that was put before it; `items` are the ids of the
    context items that were.
    """

    id: str
    tenant: str
    user: str
    created: float
    """Seconds since the epoch."""
    messages: tuple[Message, ...]
    reply: str
    finish_reason: str | None = None
    version: VersionTuple
    items: tuple[str, ...] = ()
    signals: Signals = NO_SIGNALS
    """The feedback that stands now."""
    rated_at: int = 0
    """The user's feedback clock when the standing rating was given: credit decays from then on."""

    def last_user_text(self) -> str:
        """The text of the last user message, empty if there is none."""
        return last_user_text(self.messages)

    def in_brief(self) -> "Interaction":
        """Without the turns before the last user message; what feedback makes of an interaction needs those least."""
        last = max((n for n, m in enumerate(self.messages) if m.role == "user"), default=0)
        kept = [m for m in self.messages[:last] if m.role == "system"] + list(self.messages[last:])
        return replace(self, messages=tuple(kept))

    def pair(self) -> tuple[str, str] | None:
        """(wanted, unwanted) reply by the standing signals: a correction first, else a preference; None without either."""
        signals = self.signals
        if signals.correction is not None:
            return signals.correction, self.reply
        if signals.preference is not None:
            replies = (self.reply, signals.preference.other)
            return replies if signals.preference.better == "this" else (replies[1], replies[0])
        return None


class FeedbackEvent(Frozen):
    """One entry of a user's log. `revision` counts the log's entries from 1 and is also the entry's stream id."""

    kind: Literal["feedback"] = "feedback"
    revision: int = Field(ge=1)
    at: float
    """Seconds since the epoch."""
    interaction: Interaction
    """As served, with `signals` as they stand after this event."""
    previous: Signals = NO_SIGNALS
    """The signals as they stood before it."""
    previous_rated_at: int = 0
    """`rated_at` as it stood before it."""


def latest_interactions(events: Iterable[object]) -> list[Interaction]:
    """The interactions of a log with the signals that stand now, oldest feedback first, those with none left out."""
    standing: dict[str, Interaction] = {}
    for event in events:
        if not isinstance(event, FeedbackEvent):
            continue
        standing.pop(event.interaction.id, None)
        standing[event.interaction.id] = event.interaction
    return [i for i in standing.values() if not i.signals.is_empty()]


def merge_signals(previous: Signals, changes: dict[str, Any]) -> Signals:
    """The signals after `changes`, which holds only the fields that the feedback named (None retracts)."""
    return previous.model_copy(update=changes)
