"""A load generator that costs little: keepalive connections of a raw asyncio protocol, requests made beforehand.

A client library would take longer for a request than the gateway itself. Each connection sends its next request when the last reply is
whole, and every reply is checked: its status, and the length of its body against the first reply's of the round.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from typing import cast

import httptools

from tests.benchmarks.stats import Round

# A round of requests that run out takes no longer; a target that no longer answers must not hold the benchmark. The slowest peer
# needs ten seconds of a busy core for 64 streams.
ROUND_SECONDS = 60.0
HANG_SECONDS = 60.0


class WrongReply(Exception):
    """A reply that the benchmark must not count: another status, another length, a connection that broke."""


def http_request(method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """A whole request as bytes, kept alive."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *(f"{k}: {v}" for k, v in headers.items())]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


class Connection(asyncio.Protocol):
    """One keepalive connection that works through its requests until they or the time run out."""

    def __init__(self, requests: Iterator[bytes], deadline: float, lengths: range | None) -> None:
        self.latencies: list[float] = []
        self.first_bytes: list[float] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests = requests
        self._deadline = deadline
        self._lengths = lengths
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._length = 0
        self._sent = self._first = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}; {data[:300]!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self._fail(f"the connection broke: {exc}")

    def on_body(self, body: bytes) -> None:
        if not self._length:
            self._first = time.perf_counter()
            status = self._parser.get_status_code()
            if status != 200:
                self._fail(f"status {status}: {body[:500]!r}")
        self._length += len(body)

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        self._lengths = self._lengths or range(self._length, self._length + 1)
        if self._length not in self._lengths:
            self._fail(f"a body of {self._length} bytes where {self._lengths} were expected")
        if self.ended.done():
            return
        self.latencies.append(now - self._sent)
        self.first_bytes.append(self._first - self._sent)
        self._next()

    def _next(self) -> None:
        request = next(self._requests, None) if time.perf_counter() < self._deadline else None
        assert self._transport is not None
        if request is None:
            self.ended.set_result(None)
            self._transport.close()
            return
        self._length = 0
        self._transport.write(request)
        self._sent = time.perf_counter()

    def _fail(self, problem: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(WrongReply(problem))
        if self._transport is not None:
            self._transport.abort()


async def load(
    port: int, requests: list[Iterator[bytes]], *, seconds: float = float("inf"), lengths: range | None = None
) -> Round:
    """One round: a connection for each iterator of requests, all at once, for `seconds` or until the requests run out.

    Args:
        lengths: bytes that a reply's body may have; those of the first reply of each connection if None.

    Raises:
        WrongReply: see there.
    """
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    opened = await asyncio.gather(
        *(
            loop.create_connection(lambda r=r: Connection(r, started + seconds, lengths), "127.0.0.1", port)
            for r in requests
        )
    )
    connections = [protocol for _, protocol in opened]
    try:
        async with asyncio.timeout(min(seconds, ROUND_SECONDS) + HANG_SECONDS):
            await asyncio.gather(*(c.ended for c in connections))
    finally:
        for transport, _ in opened:
            transport.abort()
    return Round(
        seconds=time.perf_counter() - started,
        latencies=tuple(x for c in connections for x in c.latencies),
        first_bytes=tuple(x for c in connections for x in c.first_bytes),
    )
