"""How much a tenant and each of its users may ask for, and how a wait is told in headers."""

import math

from pydantic import BaseModel, ConfigDict, Field

MINUTE_SECONDS = 60


class RateLimits(BaseModel):
    """Most of each in a minute, all at once if they were saved up; 0 is no limit.

    Feedback has limits of its own, so that who has chatted too much can still say what was wrong with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant_chats_per_minute: int = Field(0, ge=0)
    user_chats_per_minute: int = Field(0, ge=0)
    tenant_tokens_per_minute: int = Field(0, ge=0)
    user_tokens_per_minute: int = Field(0, ge=0)
    tenant_feedback_per_minute: int = Field(0, ge=0)
    user_feedback_per_minute: int = Field(0, ge=0)

    def overridden(self, by: "RateLimits | None") -> "RateLimits":
        """These, with what `by` names instead."""
        return self if by is None else self.model_copy(update=by.model_dump(exclude_unset=True))

    def most(self, what: str, *, of: str) -> int:
        """The limit on `chats`, `tokens` or `feedback` of the `tenant` or the `user`."""
        limit: int = getattr(self, f"{of}_{what}_per_minute")
        return limit


def spelled(seconds: float) -> str:
    """A wait as OpenAI's headers have it: `0s`, `850ms`, `1.5s`, `6m0s`."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < MINUTE_SECONDS:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(math.ceil(seconds), MINUTE_SECONDS)
    return f"{minutes}m{rest}s"
