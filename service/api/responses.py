"""How a chat's reply leaves: whole in one go, or as server-sent events for as long as the client is there."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

from service.api.presence import ClientGone, Presence

RawHeaders = list[tuple[bytes, bytes]]


class WholeReply(Response):
    """JSON, sent in one go.

    Args:
        then: is called when it has left.
    """

    def __init__(self, content: dict[str, Any], headers: RawHeaders, then: Callable[[], None] = lambda: None) -> None:
        self.status_code = 200
        self.background = None
        self.body = orjson.dumps(content)
        length = b"%d" % len(self.body)
        self.raw_headers = [(b"content-length", length), (b"content-type", b"application/json"), *headers]
        self._then = then

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body})
        self._then()


class EventStream(Response):
    """Server-sent events that end at once when the client goes away, which aborts the generation.

    Args:
        upstream: holds vLLM's reply. Closed even where the client left before the first event was asked for.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], upstream: AsyncExitStack, headers: RawHeaders) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = [(b"content-type", b"text/event-stream; charset=utf-8"), *headers]
        self._events = events
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._upstream, aclosing(self._events) as events:
            try:
                with Presence(receive, scope["state"]["attention"]):
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    async for piece in events:
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
            except ClientGone:
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
