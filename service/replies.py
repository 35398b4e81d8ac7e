"""vLLM's replies: read whole or as they come; and what its failures mean, as errors of ours."""

from typing import Self

import orjson

from service.errors import ContextLengthExceeded, EngineUnavailable, UpstreamRejected
from service.upstream import Reply

OVERLOADED_RETRY_SECONDS = 2
AWAY_RETRY_SECONDS = 5


async def whole(response: Reply) -> bytes:
    """All of a reply."""
    return await response.read()


async def begun(response: Reply) -> "Events":
    """The events of a stream whose first piece is there: before that, another replica can still take the request."""
    first = await response.readany()
    if not first:
        raise ConnectionError("the stream ended before it began")
    return Events(first, response)


class Events:
    """Server-sent events without their blank lines, as many at a time as have come.

    Args:
        piece: the first bytes.
        reply: has the others.
    """

    def __init__(self, piece: bytes, reply: Reply) -> None:
        self._rest = piece
        self._reply = reply

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[bytes]:
        while True:
            *events, self._rest = self._rest.split(b"\n\n")
            if events:
                return events
            try:
                piece = await self._reply.readany()
            except OSError as error:
                raise away(error) from error
            if not piece:
                raise StopAsyncIteration
            self._rest += piece


def away(error: OSError) -> EngineUnavailable:
    """A connection that can't be made, breaks or hangs."""
    return EngineUnavailable(
        f"The inference server can't be reached: {str(error) or type(error).__name__}.",
        retry_after_seconds=AWAY_RETRY_SECONDS,
    )


def refusal(status: int, body: bytes) -> EngineUnavailable | UpstreamRejected | ContextLengthExceeded:
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
    if status < 400:
        return EngineUnavailable(
            f"The inference server answers with status {status}: set FASTSLOW_VLLM_URL to where it is.",
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
