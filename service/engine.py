"""What the gateway and the workers ask of vLLM (`service/vllm.py` is how it is asked)."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from service.domain.feedback import Message
from service.replicas import Replicas

SCORE_PATH = "/fastslow/score"
"""Our plugin's route."""
MAX_SCORED_REPLIES = 256
"""In one request for scores."""
DONE = b"data: [DONE]"
"""A stream's last event."""
BACKGROUND_PRIORITY = 10
"""What workers ask for comes after chats, which have 0: vLLM takes the smaller first, and interrupts the larger where it lacks memory."""


@dataclass(frozen=True)
class Candidates:
    """Replies to one conversation, which has its context rendered into it."""

    messages: Sequence[Message]
    replies: Sequence[str]
    """Without control tokens (`Tokens.neutralize`)."""
    ended: bool = True
    """Score the end of turn too; not where replies were cut off."""


@dataclass(frozen=True)
class Score:
    """How likely a reply is."""

    logprob_sum: float
    """Nats."""
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.logprob_sum / self.tokens


@dataclass(frozen=True)
class Sampled:
    """A reply as it was drawn."""

    tokens: tuple[int, ...]
    """With the end of turn where the model ended it."""
    logprobs: tuple[float, ...]
    """Of each token, nats, by the distribution that it was drawn from."""


class Engine(Protocol):
    """What the gateway and the workers ask of vLLM.

    Requests of one `affinity` (`service/domain/affinity.py`) go to one replica, as long as that can serve them; empty: to any.
    """

    replicas: Replicas

    async def complete(self, body: dict[str, Any], *, request_id: str, affinity: str = "") -> dict[str, Any]:
        """A whole chat completion."""
        ...

    def stream(
        self, body: dict[str, Any], *, request_id: str, affinity: str = ""
    ) -> AbstractAsyncContextManager[AsyncIterator[list[bytes]]]:
        """A streamed one, entered when it has begun: server-sent events without their blank lines, as many at a time as have come,
        `data: [DONE]` last.

        Leaving early aborts it.
        """
        ...

    async def score(
        self, items: Sequence[Candidates], *, model: str, cache_salt: str, request_id: str, affinity: str = ""
    ) -> list[list[Score]]:
        """The scores of all replies, by item, under the base model or an adapter version. They give way to chats.

        Raises:
            ContextLengthExceeded: an item does not fit the window; the message says which.
            UpstreamRejected: an unknown model (404), no or too many replies.
        """
        ...

    async def sample(
        self,
        prompt: Sequence[int],
        *,
        model: str,
        samples: int,
        max_tokens: int,
        end: int,
        seed: int,
        cache_salt: str,
        request_id: str,
        affinity: str = "",
    ) -> list[Sampled]:
        """Replies to a prompt of tokens, drawn at temperature 1 from the whole distribution, up to `end`. They give way to chats.

        Raises:
            UpstreamRejected: an unknown model (404), or a prompt that is none.
        """
        ...

    async def preload(self, adapter: str, *, affinity: str = "") -> None:
        """Have an adapter version loaded where its user is served, of a version of many users (no affinity) everywhere.

        A replica that can't is logged: it is asked again by the first chat.
        """
        ...

    def waiting(self) -> int | None:
        """Requests in the shortest of the replicas' queues, as it was a second ago; None where no queue is known (yet)."""
        ...

    async def ready(self) -> None:
        """Raises EngineUnavailable unless a vLLM answers its health check."""
        ...

    async def close(self) -> None: ...
