"""uvicorn's HTTP protocol with a limit that it lacks, how long a client may take to say what it wants, and a reply's head in one packet
with its body.

Its option is `--http service.api.protocol:PatientProtocol`. By itself uvicorn waits for ever for a request's first line and headers, and
silent connections use up the process's sockets. For bodies and replies the limits are the application's (`RequestFrame`).
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.api.patience import held_up
from service.errors import RequestTimeout

log = logging.getLogger(__name__)

GO_AHEAD = b"HTTP/1.1 100"
HEAD_LIMIT = "head_limit"
"""Of the state that the application's lifespan leaves to the server."""


@dataclass(frozen=True)
class HeadLimit:
    """Within how many seconds a request's head must be there, and who is told of one that was not."""

    seconds: float
    exceeded: Callable[[], None]


class HeadWithBody:
    """A connection as uvicorn's `RequestResponseCycle` uses it for one reply: the head waits for the first of the body, which is at hand,
    and both take one call of the kernel and one packet.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self._sent = False
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._sent or data.startswith(GO_AHEAD):
            self._transport.write(data)
        elif self._head:
            self._flush(data)
        else:
            self._head = data

    def close(self) -> None:
        if self._head:
            self._flush(b"")
        self._transport.close()

    def _flush(self, data: bytes) -> None:
        told, self._head, self._sent = b"".join((self._head, data)), b"", True
        self._transport.write(told)


class PatientProtocol(HttpToolsProtocol):
    """Closes a connection whose request's head is late: counted from the connection's beginning, later from a request's first byte.

    A client that had begun is told by 408 first. How long a connection may lie idle between requests is uvicorn's `--timeout-keep-alive`.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit: HeadLimit = self.app_state[HEAD_LIMIT]
        self._begun = False
        self._late: asyncio.TimerHandle | None = None
        self._wind()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwind()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Most heads come whole, and need no timer.
        if self._begun and self._late is None:
            self._wind()

    def on_message_begin(self) -> None:
        self._begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._begun = False
        self._unwind()
        before = self.cycle
        super().on_headers_complete()
        # A reply to HEAD has no body that its head could wait for, and what is upgraded has no cycle.
        if self.cycle is not before and self.scope["method"] != "HEAD":
            self.cycle.transport = HeadWithBody(self.transport)  # type: ignore[assignment]

    def _wind(self) -> None:
        self._rings_at = self.loop.time() + self._limit.seconds
        self._late = self.loop.call_at(self._rings_at, self._ring)

    def _unwind(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _ring(self, again: bool = False) -> None:
        self._late = None
        if self.transport.is_closing():
            return
        if not again and (stood := held_up(self._rings_at)):
            self._late = self.loop.call_later(stood, self._ring, True)
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # The next request's head, sent before the reply to this one: the reply goes first.
            self._wind()
            return
        self._limit.exceeded()
        log.info("a connection ends: no request's head within %g s", self._limit.seconds)
        if self._begun:
            error = RequestTimeout(f"The request's headers were not there within {self._limit.seconds:g} s.")
            body = orjson.dumps(error.body())
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
        self.transport.close()
