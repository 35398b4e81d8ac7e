"""The bodies of the HTTP interface: what a client may send, checked field by field, and what we answer.

A chat request is OpenAI's. Fields that OpenAI clients send and that mean nothing here are accepted and go no further; any other unknown
field is an error that names it, because a setting that is silently ignored is a lie.
"""

import re
from typing import Annotated, Any, Literal, Required, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
    with_config,
)
from typing_extensions import TypedDict

from service.domain.feedback import RATING_DIGITS, Message
from service.serving import EVERYTHING, Personalization

# A name in a log line, a metric or an audit entry; longer ones are a mistake.
MAX_ID_CHARS = 256
# Of one request; a tenant with more scopes to train has weeks of work.
MAX_SCOPES = 256
COHORT = re.compile(r"^[A-Za-z0-9_.-]{1,64}$")
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]


# Messages are read once and then dropped: as dictionaries they are checked in three quarters of the time, and read in a third.
@with_config(extra="ignore")
class TextPart(TypedDict):
    """A text part of a message's content; other types are not served by a text model."""

    type: Literal["text"]
    text: str


@with_config(extra="ignore")
class ChatMessage(TypedDict, total=False):
    """One message of the request. Fields that OpenAI's clients echo and that mean nothing here are dropped."""

    role: Required[Literal["system", "developer", "user", "assistant", "tool"]]
    content: str | list[TextPart] | None
    name: str | None
    tool_calls: list[dict[str, Any]] | None
    tool_call_id: str | None


def _text(told: ChatMessage) -> str | None:
    content = told.get("content")
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content


def _message(told: ChatMessage) -> Message:
    """In our own terms; `developer` is `system` to an open model's template."""
    role = "system" if told["role"] == "developer" else told["role"]
    return Message(role, _text(told), told.get("name"), told.get("tool_calls"), told.get("tool_call_id"))


class StreamOptions(BaseModel):
    include_usage: bool = False


class PersonalizationBody(BaseModel):
    """Our extension of the chat request: what of the user it is served with."""

    model_config = ConfigDict(extra="forbid")

    context: bool = True
    """Whether the user's context is put before the conversation."""
    adapter: bool = True
    """Whether the user's adapter serves, where there is one."""
    dry_run: bool = False
    """Answer with the messages as they would be sent, and generate nothing."""


class ChatRequest(BaseModel):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    # What is passed on to vLLM, and nothing else is.
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    # Who the user is, if nothing stronger says so.
    user: Id | None = None
    safety_identifier: Id | None = None
    metadata: dict[str, Any] | None = None
    # Ours; OpenAI's client sends it by `extra_body`. false switches both context and adapter off.
    personalization: bool | PersonalizationBody = True
    # Accepted because clients send them; they change nothing.
    n: Literal[1] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    verbosity: str | None = None
    modalities: list[Literal["text"]] | None = None

    @field_validator("messages")
    @classmethod
    def _some_text(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        if not any((_text(message) or "").strip() for message in messages):
            raise ValueError("no message has any text")
        return messages

    def named_user(self) -> str | None:
        """The user that the body names."""
        named = self.user or self.safety_identifier or (self.metadata or {}).get("user_id")
        return named if isinstance(named, str) else None

    def wish(self) -> Personalization:
        """What of the user this chat is to be served with."""
        if self.personalization is True:
            return EVERYTHING
        if self.personalization is False:
            return Personalization(context=False, adapter=False)
        return Personalization(**self.personalization.model_dump())

    def conversation(self) -> list[Message]:
        return [_message(message) for message in self.messages]


PASSED_ON = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "seed",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "response_format",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
}
"""The whitelist of sampling fields in a request to vLLM."""


class DryRunReply(BaseModel):
    """What a chat with `"personalization": {"dry_run": true}` answers."""

    object: Literal["chat.dry_run"] = "chat.dry_run"
    model: str
    adapter: str
    context_revision: int
    member: str
    """Which of the user's population of contexts was drawn."""
    context_tokens: int
    items: list[str]
    """Ids of the context items, as they are rendered."""
    messages: list[dict[str, Any]]
    degraded: list[str]


class PreferenceBody(BaseModel):
    """Another reply to the same conversation (an interaction's id, or its text), and which of the two was better."""

    model_config = ConfigDict(extra="forbid")

    interaction_id: Id | None = None
    text: str | None = None
    better: Literal["this", "other"]

    @model_validator(mode="after")
    def _one_other(self) -> Self:
        if (self.interaction_id is None) == (self.text is None):
            raise ValueError("give either interaction_id or text")
        return self


def _rating(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return 1.0 if value else -1.0
    if not isinstance(value, int | float) or not -1 <= value <= 1:
        raise ValueError("give true or false, or a number from -1 to 1 (null retracts)")
    return round(float(value), RATING_DIGITS)


Rating = Annotated[
    float,
    BeforeValidator(_rating),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "number", "minimum": -1, "maximum": 1}]}),
]
"""true is 1 and false -1; kept to a thousandth."""


class FeedbackRequest(BaseModel):
    """`POST /v1/feedback`. A signal that is left out stays as it was; null retracts it."""

    model_config = ConfigDict(extra="forbid")

    interaction_id: Id
    """The completion's `id`."""
    user: Id | None = None
    rating: Rating | None = None
    comment: str | None = None
    correction: str | None = None
    """The reply that was wanted."""
    preference: PreferenceBody | None = None

    @field_validator("comment", "correction")
    @classmethod
    def _not_blank(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("is blank; send null to retract it")
        return text

    @model_validator(mode="after")
    def _any_signal(self) -> Self:
        if not self.named_signals():
            raise ValueError("give at least one of rating, comment, correction, preference")
        return self

    def named_signals(self) -> set[str]:
        return self.model_fields_set & {"rating", "comment", "correction", "preference"}


class FeedbackReply(BaseModel):
    """What a feedback came to."""

    object: Literal["feedback"] = "feedback"
    interaction_id: str
    context_revision: int
    """The revision that the next chat of this user is served with."""
    changed: bool
    """False where the feedback said what already stood."""


class ConsolidationRequest(BaseModel):
    """`POST /v1/admin/consolidations`."""

    model_config = ConfigDict(extra="forbid")

    scope: str = Field(max_length=2 * MAX_ID_CHARS)


class ConsolidationsRequest(BaseModel):
    """`POST /v1/admin/consolidations/batch`."""

    model_config = ConfigDict(extra="forbid")

    scopes: tuple[Annotated[str, Field(max_length=2 * MAX_ID_CHARS)], ...] = Field(min_length=1, max_length=MAX_SCOPES)


class RollbackRequest(BaseModel):
    """`POST /v1/admin/scopes/{scope}/rollback`."""

    model_config = ConfigDict(extra="forbid")

    to: str | None = None
    """A version's name or `base`; the version before if left out."""
    reason: str = Field(min_length=1, max_length=1000)


class PromoteRequest(BaseModel):
    """`POST /v1/admin/scopes/{scope}/promote`."""

    model_config = ConfigDict(extra="forbid")

    version: str
    reason: str = Field(min_length=1, max_length=1000)


class CohortRequest(BaseModel):
    """`PUT /v1/admin/users/{user}/cohort`."""

    model_config = ConfigDict(extra="forbid")

    cohort: Annotated[str, Field(pattern=COHORT)] | None
    """null takes the user out of any."""
