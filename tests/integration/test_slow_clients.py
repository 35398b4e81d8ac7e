"""Clients that hold on to a gateway: raw sockets against uvicorn, as it runs in production."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from service.settings import Settings
from tests.conftest import CLIENT_KEY, KEYS
from tests.fakes import MODEL, FakeVllm
from tests.gateway import gateway_process

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "What is a noun?"}]}
HEADERS = {"Authorization": f"Bearer {CLIENT_KEY}", "X-User-ID": "alice"}
SECONDS = 20.0
"""Longest that a test waits for the gateway."""


def head(**more: str) -> bytes:
    """A chat's request line and headers."""
    headers = HEADERS | {"Host": "gateway", "Content-Type": "application/json"} | more
    lines = ["POST /v1/chat/completions HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@asynccontextmanager
async def connection(url: str, *, receive_bytes: int = 0) -> AsyncIterator[tuple[asyncio.StreamReader, Any]]:
    """A plain socket to the gateway; one with few `receive_bytes` takes little before it is read from."""
    place = urlsplit(url)
    plain = socket.socket()
    if receive_bytes:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    plain.connect((place.hostname, place.port))
    # The reader stops taking from the socket at twice its limit.
    reader, writer = await asyncio.open_connection(sock=plain, limit=2 * receive_bytes or 1 << 16)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[int, str, dict[str, Any]]:
    """Status, headers and JSON of a reply after which the gateway closes the connection."""
    raw = await asyncio.wait_for(reader.read(), timeout=SECONDS)
    top, _, body = raw.partition(b"\r\n\r\n")
    return int(top.split()[1]), top.decode().lower(), json.loads(body)


@pytest.fixture
async def url(settings: Settings) -> AsyncIterator[str]:
    """Of a gateway with one place for chats, no line and little patience."""
    strict = {"chats_at_once": 1, "chats_waiting": 0, "client_send_seconds": 0.5, "client_take_seconds": 0.5}
    async with gateway_process(settings.model_copy(update=strict), KEYS) as url:
        yield url


async def chat(url: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=SECONDS) as http:
        return await http.post("/v1/chat/completions", json=CHAT)


async def metrics(url: str) -> str:
    async with httpx.AsyncClient(timeout=SECONDS) as http:
        return (await http.get(f"{url}/metrics")).text


async def test_bodies_that_drip_in_or_never_end_are_refused(url: str) -> None:
    async with connection(url) as (reader, writer):
        writer.write(head(**{"Content-Length": "100"}) + b'{"model": ')
        status, headers, body = await answer(reader)
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert "connection: close" in headers

    async with connection(url) as (reader, writer):
        writer.write(head(**{"Transfer-Encoding": "chunked"}))
        # More than a megabyte, in chunks of which none is large.
        for _ in range(20):
            writer.write(b"10000\r\n" + b" " * (1 << 16) + b"\r\n")
        top = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), timeout=SECONDS)
        told = await asyncio.wait_for(reader.readuntil(b"}}"), timeout=SECONDS)
    assert (top.split()[1], json.loads(told)["error"]["code"]) == (b"413", "request_too_large")
    assert (await chat(url)).status_code == 200
    assert 'fastslow_slow_clients_total{with_the="body"} 1.0' in await metrics(url)


async def test_heads_that_drip_in_or_never_come_are_not_waited_for(url: str) -> None:
    async with connection(url) as (reader, writer):
        writer.write(head()[:-2])
        status, headers, body = await answer(reader)
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert "headers were not there within 0.5 s" in body["error"]["message"]
    assert "connection: close" in headers

    # Not a byte: there is nothing to answer.
    async with connection(url) as (reader, writer):
        assert await asyncio.wait_for(reader.read(), timeout=SECONDS) == b""

    # The second request of a connection is timed from its own beginning.
    body = json.dumps(CHAT).encode()
    async with connection(url) as (reader, writer):
        writer.write(head(**{"Content-Length": str(len(body))}) + body)
        assert (await asyncio.wait_for(reader.readline(), timeout=SECONDS)).split()[1] == b"200"
        writer.write(head()[:9])
        raw = await asyncio.wait_for(reader.read(), timeout=SECONDS)
    assert b"HTTP/1.1 408" in raw
    assert 'fastslow_slow_clients_total{with_the="head"} 3.0' in await metrics(url)


async def test_the_gateways_own_standing_still_is_no_clients_lateness(url: str) -> None:
    """As on a machine that was paused: who sent all in time gets the reply, though the gateway reads it after its own limit."""
    gateway = next(p for p in psutil.Process().children() if url.rsplit(":", 1)[1] in p.cmdline())
    body = json.dumps(CHAT).encode()
    whole = head(**{"Content-Length": str(len(body))}) + body
    for there in (len(whole) - len(body), 9):
        async with connection(url) as (reader, writer):
            writer.write(whole[:there])
            await asyncio.sleep(0.2)
            gateway.suspend()
            try:
                writer.write(whole[there:])
                await asyncio.sleep(1.0)
            finally:
                gateway.resume()
            assert (await asyncio.wait_for(reader.readline(), timeout=SECONDS)).split()[1] == b"200"
    counted = await metrics(url)
    assert 'with_the="head"} 0.0' in counted
    assert 'with_the="body"' not in counted


async def test_a_head_behind_a_reply_that_takes_long_does_not_end_the_reply(url: str, vllm: FakeVllm) -> None:
    vllm.free.clear()
    body = json.dumps(CHAT).encode()
    async with connection(url) as (reader, writer):
        writer.write(head(**{"Content-Length": str(len(body))}) + body + head()[:9])
        # Several times as long as a head may take.
        await asyncio.sleep(2.0)
        vllm.free.set()
        assert (await asyncio.wait_for(reader.readline(), timeout=SECONDS)).split()[1] == b"200"


async def test_a_client_that_does_not_take_its_stream_loses_it_and_its_place(url: str, vllm: FakeVllm) -> None:
    piece = "x" * 20_000
    # More than all buffers on the way hold.
    vllm.reply = lambda _: " ".join([piece] * 1500)
    body = json.dumps(CHAT | {"stream": True}).encode()
    async with connection(url, receive_bytes=4096) as (_, writer):
        writer.write(head(**{"Content-Length": str(len(body))}) + body)
        await asyncio.wait_for(vllm.aborted.wait(), timeout=SECONDS)
        vllm.reply = lambda _: "A naming word."
        assert (await chat(url)).status_code == 200
        assert 'fastslow_slow_clients_total{with_the="reply"} 1.0' in await metrics(url)


async def test_no_head_waits_for_a_body_that_does_not_come(url: str) -> None:
    body = json.dumps(CHAT).encode()
    sized = {"Content-Length": str(len(body))}
    async with connection(url) as (reader, writer):
        for more, announced in (({}, b""), ({"Expect": "100-continue"}, b"HTTP/1.1 100 Continue\r\n\r\n")):
            writer.write(head(**sized, **more))
            assert await asyncio.wait_for(reader.readexactly(len(announced)), SECONDS) == announced
            writer.write(body)
            first = await asyncio.wait_for(reader.read(1 << 16), SECONDS)
            top, _, said = first.partition(b"\r\n\r\n")
            assert top.startswith(b"HTTP/1.1 200")
            assert json.loads(said)["object"] == "chat.completion"
        # HEAD, and a reply whose connection is closed over it.
        writer.write(b"HEAD /health/live HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), SECONDS)).startswith(b"HTTP/1.1 ")
