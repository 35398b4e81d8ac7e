"""HTTP/1.1 as this service speaks it with vLLM: small requests, replies of a known length or in chunks, connections that are kept.

A client for everybody (redirects, cookies, encodings, tracing of its own) takes CPU time that a chat has no need of (docs/benchmarks.md,
"Steps"). This one is httptools, the parser of the server that runs the gateway, and one protocol for a connection.
"""

import asyncio
import re
import ssl
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import cast
from urllib.parse import urlsplit

import httptools

# Of a reply that nobody has read yet; then vLLM waits, as it would for a slow client.
MOST_UNREAD_BYTES = 1 << 18

BREAK = re.compile(r"[\r\n]")

Place = tuple[str, str, int]
"""Scheme, host, port."""


@dataclass(frozen=True)
class Limits:
    """How long a request waits, in seconds."""

    connect: float
    read: float
    """For the first byte of the reply, and for each after it."""
    total: float
    idle: float
    """How long a connection is kept that nobody uses."""


class Reply(asyncio.Protocol):
    """A connection, and the reply to the request that it was used for last. Failures are OSError (TimeoutError is one)."""

    def __init__(self, place: Place, limits: Limits) -> None:
        self.place = place
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._lost: OSError | None = None
        self.status = 0
        self.unused_since = 0.0
        self.under_way: set[Reply] = set()
        self.usable = True
        """For another request, once this one's reply is complete."""
        self.complete = True

    def begin(self, request: bytes) -> None:
        """Send a request. The last one's reply must be complete."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._unread = self.status = 0
        self._headed = self._delimited = self.complete = False
        self._active = self._loop.time()
        self._until = self._active + self._limits.total
        # The last request's may still be there: it rings too early, if at all.
        if self._timer is None:
            self._wind()
        self._transport.write(request)

    async def head(self) -> None:
        """Until the status is there."""
        while not self._headed:
            await self._more()

    async def read(self) -> bytes:
        """All of the body."""
        # Taken as it comes: what lies unread is bounded.
        pieces = [await self.readany()]
        while not self.complete:
            pieces.append(await self.readany())
        return b"".join(pieces)

    async def readany(self) -> bytes:
        """What there is of the body, empty at its end."""
        while not self._pieces and not self.complete:
            await self._more()
        return self._taken()

    def close(self) -> None:
        """Break off; whoever reads it learns of that."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    def release(self) -> bool:
        """It is not read any more: whether the connection can be used again. A reply that is not complete is broken off."""
        self.under_way.discard(self)
        self.unused_since = self._loop.time()
        # One with much unread has paused reading, and the next reply on it would never come.
        if not self.complete or not self.usable or self._unread > MOST_UNREAD_BYTES:
            self.close()
        return self.usable

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._active = self._loop.time()
        try:
            if self.complete:
                raise httptools.HttpParserError("more than the reply")
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"no HTTP: {error}"))
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if self._timer is not None:
            self._timer.cancel()
        if self.status and self._headed and not self._delimited and exc is None:
            self.complete = True
        self._lost = self._lost or ConnectionError(f"the connection broke: {exc or 'closed by the server'}")
        self._wake()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._delimited = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        # What begins with 1 is only announced.
        self._headed = self.status >= 200

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._unread += len(body)
        if self._unread > MOST_UNREAD_BYTES and self._transport is not None:
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._headed:
            self.complete = True
            self.usable = self.usable and self._parser.should_keep_alive()

    def _taken(self) -> bytes:
        if self._unread > MOST_UNREAD_BYTES and self._transport is not None:
            self._active = self._loop.time()
            self._transport.resume_reading()
        taken = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces, self._unread = [], 0
        return taken

    async def _more(self) -> None:
        """Until something has come. While nobody reads, nothing is waited for, and no time runs out."""
        if self._lost is not None:
            raise self._lost
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: OSError) -> None:
        self._lost = self._lost or error
        self.close()
        self._wake()

    def _wind(self) -> None:
        self._timer = self._loop.call_at(min(self._active + self._limits.read, self._until), self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = self._loop.time()
        if self.complete:
            return
        if now >= self._until:
            self._fail(TimeoutError(f"the reply is not complete after {self._limits.total:g} s"))
        elif now < self._active + self._limits.read:
            self._wind()
        elif self._unread > MOST_UNREAD_BYTES:
            # It is we who keep it waiting.
            self._active = now
            self._wind()
        else:
            self._fail(TimeoutError(f"nothing came for {self._limits.read:g} s"))


class Upstream:
    """Makes requests, over connections that it keeps.

    Args:
        headers: of every request.
        connections: most at once; more requests wait for theirs.
    """

    def __init__(self, limits: Limits, *, headers: Mapping[str, str], connections: int) -> None:
        self._limits = limits
        self._headers = _lines(headers)
        self._free = asyncio.Semaphore(connections)
        self._unused: defaultdict[Place, list[Reply]] = defaultdict(list)
        self._tls: ssl.SSLContext | None = None

    async def request(
        self,
        method: str,
        url: str,
        data: bytes = b"",
        headers: Mapping[str, str] = {},
        *,
        under_way: set[Reply] | None = None,
    ) -> Reply:
        """The reply, as soon as its status is there. It must be given back, whatever becomes of it.

        Args:
            under_way: holds it from when it is waited for until it is given back, so that others can close it.

        Raises:
            OSError: no connection, no reply, or none in time.
        """
        place, host, path = _address(url)
        request = _request(method, path, f"Host: {host}\r\n{self._headers}{_lines(headers)}", data)
        await self._room()
        reply: Reply | None = None
        try:
            reply = self._kept(place) or await self._connected(place)
            reply.under_way = under_way if under_way is not None else set()
            reply.under_way.add(reply)
            reply.begin(request)
            await reply.head()
        except BaseException:
            self._free.release()
            if reply is not None:
                reply.release()
                reply.close()
            raise
        return reply

    def give_back(self, reply: Reply) -> None:
        """A reply is not read any more; one that is not complete is broken off."""
        self._free.release()
        if reply.release():
            self._unused[reply.place].append(reply)

    def close(self) -> None:
        for replies in self._unused.values():
            for reply in replies:
                reply.close()
        self._unused.clear()

    async def _room(self) -> None:
        """One of the connections, within the time that a reply may take to begin."""
        if self._free.locked():
            async with asyncio.timeout(self._limits.read):
                await self._free.acquire()
        else:
            await self._free.acquire()

    def _kept(self, place: Place) -> Reply | None:
        unused, oldest = self._unused[place], asyncio.get_running_loop().time() - self._limits.idle
        while unused:
            reply = unused.pop()
            if reply.usable and reply.unused_since > oldest:
                return reply
            reply.close()
        return None

    async def _connected(self, place: Place) -> Reply:
        scheme, host, port = place
        if scheme == "https" and self._tls is None:
            self._tls = ssl.create_default_context()
        tls = self._tls if scheme == "https" else None
        async with asyncio.timeout(self._limits.connect):
            loop = asyncio.get_running_loop()
            _, reply = await loop.create_connection(lambda: Reply(place, self._limits), host, port, ssl=tls)
        return reply


@lru_cache(64)
def _address(url: str) -> tuple[Place, str, str]:
    """Where a URL is, the header `Host`, and the path there."""
    parts = urlsplit(url)
    place = parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    return place, parts.netloc.rpartition("@")[2], parts.path or "/"


def _lines(headers: Mapping[str, str]) -> str:
    """Headers as a request has them.

    Raises:
        ValueError: a value has a line break.
    """
    if BREAK.search("".join(headers.values())):
        raise ValueError("a header's value has a line break")
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


def _request(method: str, path: str, lines: str, body: bytes) -> bytes:
    """A request as bytes."""
    return f"{method} {path} HTTP/1.1\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body
