"""vLLM's replies: read whole or as they come; and what its failures mean, as errors of ours."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import aiohttp
import orjson

from service.errors import ContextLengthExceeded, EngineUnavailable, UpstreamRejected

OVERLOADED_RETRY_SECONDS = 2
AWAY_RETRY_SECONDS = 5


async def whole(response: aiohttp.ClientResponse) -> bytes:
    """All of a reply."""
    return await response.read()


async def begun(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The events of a stream whose first piece is there: before that, another replica can still take the request."""
    pieces = response.content.iter_any()
    first = await anext(pieces, None)
    if first is None:
        raise aiohttp.ClientPayloadError("the stream ended before it began")
    return _events(first, pieces)


async def _events(piece: bytes | None, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    buffer = b""
    while piece is not None:
        *events, buffer = (buffer + piece).split(b"\n\n")
        for event in events:
            yield event
        # Around the read alone: what the consumer raises is not vLLM's fault.
        with transport_errors():
            piece = await anext(pieces, None)


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
