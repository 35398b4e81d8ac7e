"""The client of vLLM: one pooled aiohttp session, vLLM's errors turned into ours, generation aborted when the caller goes away."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import orjson

from service.domain.feedback import Message
from service.errors import ContextLengthExceeded, EngineUnavailable, UpstreamRejected
from service.settings import Settings

CHAT_PATH = "/v1/chat/completions"
SCORE_PATH = "/fastslow/score"
MAX_SCORED_REPLIES = 256
"""In one request for scores."""
OVERLOADED_RETRY_SECONDS = 2
AWAY_RETRY_SECONDS = 5
DONE = b"data: [DONE]"


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


class Engine(Protocol):
    """What the gateway and the workers ask of vLLM."""

    async def complete(self, body: dict[str, Any], *, request_id: str) -> dict[str, Any]:
        """A whole chat completion."""
        ...

    def stream(self, body: dict[str, Any], *, request_id: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """A streamed one: server-sent events without their blank lines, `data: [DONE]` last. Leaving early aborts it."""
        ...

    async def score(
        self, items: Sequence[Candidates], *, model: str, cache_salt: str, request_id: str
    ) -> list[list[Score]]:
        """The scores of all replies, by item, under the base model or an adapter version. They give way to chats.

        Raises:
            ContextLengthExceeded: an item does not fit the window; the message says which.
            UpstreamRejected: an unknown model (404), no or too many replies.
        """
        ...

    async def ready(self) -> None:
        """Raises EngineUnavailable unless vLLM answers its health check."""
        ...

    async def close(self) -> None: ...


class VllmEngine:
    """`Engine` over HTTP."""

    def __init__(self, settings: Settings) -> None:
        key = settings.vllm_api_key.get_secret_value()
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._url = settings.effective_vllm_url
        self._connections = settings.upstream_connections
        self._timeout = aiohttp.ClientTimeout(
            total=None,
            connect=settings.upstream_timeout_seconds,
            sock_connect=settings.upstream_connect_seconds,
            sock_read=settings.upstream_timeout_seconds,
        )
        self._session: aiohttp.ClientSession | None = None

    def _http(self) -> aiohttp.ClientSession:
        # Made on first use, because aiohttp wants a running loop.
        if self._session is None:
            self._session = aiohttp.ClientSession(
                base_url=self._url,
                timeout=self._timeout,
                headers=self._headers,
                connector=aiohttp.TCPConnector(limit=self._connections),
            )
        return self._session

    async def complete(self, body: dict[str, Any], *, request_id: str) -> dict[str, Any]:
        async with self._post(CHAT_PATH, body, request_id) as response:
            reply: dict[str, Any] = orjson.loads(await response.read())
            return reply

    @asynccontextmanager
    async def stream(self, body: dict[str, Any], *, request_id: str) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._post(CHAT_PATH, body, request_id) as response:
            yield _events(response)

    async def score(
        self, items: Sequence[Candidates], *, model: str, cache_salt: str, request_id: str
    ) -> list[list[Score]]:
        bodies = [
            {
                "messages": [message.model_dump(exclude_none=True) for message in item.messages],
                "replies": item.replies,
                "ended": item.ended,
            }
            for item in items
        ]
        body = {"model": model, "cache_salt": cache_salt, "items": bodies}
        async with self._post(SCORE_PATH, body, request_id) as response:
            scores = orjson.loads(await response.read())["scores"]
        return [[Score(**score) for score in replies] for replies in scores]

    @asynccontextmanager
    async def _post(self, path: str, body: dict[str, Any], request_id: str) -> AsyncIterator[aiohttp.ClientResponse]:
        with transport_errors():
            async with self._http().post(
                path, data=orjson.dumps(body), headers={"X-Request-Id": request_id}
            ) as response:
                if response.status != 200:
                    raise refusal(response.status, await response.read())
                yield response

    async def ready(self) -> None:
        with transport_errors():
            async with self._http().get("/health", timeout=aiohttp.ClientTimeout(total=2)) as response:
                if response.status != 200:
                    raise refusal(max(response.status, 500), await response.read())

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    buffer = b""
    pieces = response.content.iter_any()
    while True:
        # Around the read alone: what the consumer raises is not vLLM's fault.
        with transport_errors():
            piece = await anext(pieces, None)
        if piece is None:
            return
        *events, buffer = (buffer + piece).split(b"\n\n")
        for event in events:
            yield event


@contextmanager
def transport_errors() -> Iterator[None]:
    """A connection that can't be made, breaks or hangs becomes EngineUnavailable."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise EngineUnavailable(
            f"The inference server can't be reached: {str(error) or type(error).__name__}.",
            retry_after_seconds=AWAY_RETRY_SECONDS,
        ) from error


def refusal(status: int, body: bytes) -> Exception:
    """vLLM's error reply as one of ours: overload and faults as 503, the request's own fault as it said it."""
    try:
        parsed = orjson.loads(body)
        error = parsed.get("error", parsed) if isinstance(parsed, dict) else {}
    except orjson.JSONDecodeError:
        error = {}
    if not isinstance(error, dict):
        error = {"message": str(error)}
    message = str(error.get("message") or body[:300].decode(errors="replace") or f"status {status}")
    if status == 401:
        return EngineUnavailable(
            "The inference server refuses this service's key: set FASTSLOW_VLLM_API_KEY to the key that it was started with.",
            retry_after_seconds=AWAY_RETRY_SECONDS,
        )
    if status >= 500 or status == 429:
        wait = OVERLOADED_RETRY_SECONDS if status in (429, 503) else AWAY_RETRY_SECONDS
        return EngineUnavailable(f"The inference server can't answer now: {message}", retry_after_seconds=wait)
    param = error.get("param")
    if param == "input_tokens":
        return ContextLengthExceeded(message, param="messages")
    return UpstreamRejected(
        message, status=status, param=param.removeprefix("body.") if isinstance(param, str) else None
    )
