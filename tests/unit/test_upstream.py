"""Our client of vLLM against servers that speak HTTP in every way that vLLM, a router or an accident may."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from service.upstream import MOST_UNREAD_BYTES, Limits, Upstream
from tests.waiting import until

LIMITS = Limits(connect=5.0, read=5.0, total=60.0, idle=5.0)
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """What came in, and over how many connections."""

    url: str = ""
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    left: int = 0
    """Connections that the client closed."""


@asynccontextmanager
async def server(answer: Serve) -> AsyncIterator[Server]:
    """A server that reads each request with its body and then does what `answer` does."""
    seen = Server()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                seen.requests.append(head + await reader.readexactly(length))
                await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            seen.left += 1
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        seen.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        yield seen


def says(*pieces: bytes) -> Serve:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return answer


def client(limits: Limits = LIMITS, connections: int = 8, **headers: str) -> Upstream:
    return Upstream(limits, headers=headers, connections=connections)


async def body_of(upstream: Upstream, url: str) -> tuple[int, bytes]:
    reply = await upstream.request("POST", url, b"{}")
    try:
        return reply.status, await reply.read()
    finally:
        upstream.give_back(reply)


KNOWN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "connections"),
    [
        ((KNOWN,), 1),
        ((KNOWN[:30], KNOWN[30:-2], KNOWN[-2:]), 1),
        ((CHUNKED, b"3\r\nhel\r\n", b"2\r\nlo\r\n0\r\n\r\n"), 1),
        ((b"HTTP/1.1 100 Continue\r\n\r\n", KNOWN), 1),
        ((KNOWN.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"),), 2),
    ],
)
async def test_replies_are_read_whole_and_their_connections_used_again_where_they_may_be(
    pieces: tuple[bytes, ...], connections: int
) -> None:
    async with server(says(*pieces)) as served:
        upstream = client()
        assert [await body_of(upstream, served.url) for _ in range(2)] == [(200, b"hello")] * 2
        upstream.close()
    assert served.connections == connections


async def test_a_reply_that_ends_with_its_connection_is_whole_and_one_that_is_cut_is_not() -> None:
    async def ends(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhello")
        writer.close()

    async def cut(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"5\r\nhello\r\n")
        writer.close()

    upstream = client()
    async with server(ends) as served:
        assert await body_of(upstream, served.url) == (200, b"hello")
    async with server(cut) as served:
        with pytest.raises(OSError, match="the connection broke"):
            await body_of(upstream, served.url)
    async with server(says(b"nonsense\r\n\r\n")) as served:
        with pytest.raises(OSError, match="no HTTP"):
            await body_of(upstream, served.url)


async def test_what_is_asked_is_sent_as_it_should_be() -> None:
    async with server(says(KNOWN)) as served:
        upstream = client(Authorization="Bearer x")
        upstream.give_back(await upstream.request("POST", f"{served.url}/v1/x", b"{1}", {"X-Request-Id": "r"}))
        with pytest.raises(ValueError, match="line break"):
            await upstream.request("POST", served.url, b"", {"X-Request-Id": "r\r\nX-Evil: 1"})
    line, *headers = served.requests[0].partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert line == b"POST /v1/x HTTP/1.1"
    host = served.url.removeprefix("http://").encode()
    assert headers == [b"Host: " + host, b"Authorization: Bearer x", b"X-Request-Id: r", b"Content-Length: 3"]
    assert served.requests[0].endswith(b"{1}")


async def test_a_reply_that_is_given_back_before_its_end_is_broken_off() -> None:
    async with server(says(CHUNKED, b"3\r\nhel\r\n")) as served:
        upstream = client()
        reply = await upstream.request("POST", served.url, b"{}")
        assert await reply.readany() == b"hel"
        upstream.give_back(reply)

        async def left() -> bool:
            return served.left == 1

        await until(left)
        with pytest.raises(OSError, match="broke"):
            await reply.readany()


async def test_a_hanging_server_is_given_up_and_a_cancelled_request_gives_its_place_back() -> None:
    never = asyncio.Event()

    async def hangs(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await never.wait()

    async with server(hangs) as served:
        impatient = client(Limits(connect=5.0, read=0.05, total=60.0, idle=5.0), connections=1)
        for _ in range(2):
            with pytest.raises(TimeoutError, match="nothing came"):
                await body_of(impatient, served.url)
        hurried = client(Limits(connect=5.0, read=5.0, total=0.05, idle=5.0), connections=1)
        with pytest.raises(TimeoutError, match="not complete"):
            await body_of(hurried, served.url)
        upstream = client(connections=1)
        asking = asyncio.create_task(body_of(upstream, served.url))

        async def asked() -> bool:
            return len(served.requests) == 4

        await until(asked)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        never.set()
    async with server(says(KNOWN)) as served:
        assert await body_of(upstream, served.url) == (200, b"hello")


async def test_a_connection_that_was_idle_too_long_is_not_used_and_requests_past_the_limit_wait() -> None:
    async with server(says(KNOWN)) as served:
        upstream = client(Limits(connect=5.0, read=5.0, total=60.0, idle=0.0), connections=1)
        assert await asyncio.gather(*(body_of(upstream, served.url) for _ in range(3))) == [(200, b"hello")] * 3
        assert served.connections == 3
        upstream.close()


async def test_a_long_reply_that_nobody_reads_waits_at_the_server_and_comes_in_full() -> None:
    size = 64 * MOST_UNREAD_BYTES
    sent = asyncio.Event()

    async def floods(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
        await writer.drain()
        sent.set()

    async with server(floods) as served:
        upstream = client(Limits(connect=5.0, read=0.2, total=60.0, idle=5.0))
        reply = await upstream.request("POST", served.url, b"{}")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sent.wait(), 0.5)
        got = 0
        while piece := await reply.readany():
            assert len(piece) < size / 4
            got += len(piece)
        assert got == size
        upstream.give_back(reply)
        upstream.close()


async def test_a_request_waits_for_a_connection_no_longer_than_for_a_reply() -> None:
    async with server(says(KNOWN)) as served:
        upstream = client(Limits(connect=5.0, read=0.05, total=60.0, idle=5.0), connections=1)
        held = await upstream.request("POST", served.url, b"{}")
        with pytest.raises(TimeoutError):
            await upstream.request("POST", served.url, b"{}")
        upstream.give_back(held)
        assert await body_of(upstream, served.url) == (200, b"hello")
        upstream.close()
    assert len(served.requests) == 2


async def test_a_whole_reply_may_be_longer_than_what_may_lie_unread() -> None:
    body = b"x" * (4 * MOST_UNREAD_BYTES)
    async with server(says(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)) as served:
        upstream = client()
        for _ in range(2):
            assert await asyncio.wait_for(body_of(upstream, served.url), 30) == (200, body)
        upstream.close()
    assert served.connections == 1


async def test_a_connection_on_which_much_was_left_unread_is_not_used_again() -> None:
    chunk = b"%x\r\n" % (2 * MOST_UNREAD_BYTES) + b"x" * (2 * MOST_UNREAD_BYTES) + b"\r\n0\r\n\r\n"
    upstream = client()
    async with server(says(CHUNKED)) as served:
        reply = await upstream.request("POST", served.url, b"{}")
        # All of it in one read, which no server can promise.
        reply.data_received(chunk)
        assert reply.complete
        upstream.give_back(reply)
        assert (await upstream.request("POST", served.url, b"{}")).status == 200
    assert served.connections == 2
