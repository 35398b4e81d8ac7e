"""The proxy of the suite of faults, between a real client and a server that answers each line with itself."""

import asyncio
import random
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator

import pytest

from tests.faults.front import Balancer
from tests.faults.proxy import Proxy, cutting, delaying, half_closing, to_port
from tests.gateway import free_port
from tests.waiting import PATIENCE_SECONDS, until

ALWAYS, NEVER = 1.0, 0.0


class EchoServer:
    """Its lines, and how many clients have ended theirs."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.ended = 0

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            while line := await reader.readline():
                self.heard.append(line)
                writer.write(line)
            self.ended += 1
        except ConnectionError:
            pass
        finally:
            writer.close()


@pytest.fixture
def server() -> EchoServer:
    return EchoServer()


@pytest.fixture
async def proxy(server: EchoServer) -> AsyncIterator[Proxy]:
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    proxy = Proxy(to_port(listener.sockets[0].getsockname()[1]))
    await proxy.start()
    yield proxy
    await proxy.close()
    listener.close()


async def connected(proxy: Proxy) -> tuple[StreamReader, StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def answer(reader: StreamReader, writer: StreamWriter, line: bytes) -> bytes:
    writer.write(line)
    return await asyncio.wait_for(reader.readline(), PATIENCE_SECONDS)


async def test_without_trouble_all_is_passed_on_and_the_end_too(proxy: Proxy, server: EchoServer) -> None:
    reader, writer = await connected(proxy)
    assert await answer(reader, writer, b"one\n") == b"one\n"
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), PATIENCE_SECONDS) == b""
    assert server.ended == 1
    writer.close()


async def test_delayed_pieces_come_later_and_in_order(proxy: Proxy) -> None:
    proxy.trouble = delaying(0.05)
    reader, writer = await connected(proxy)
    began = asyncio.get_running_loop().time()
    assert await answer(reader, writer, b"one\n") == b"one\n"
    assert await answer(reader, writer, b"two\n") == b"two\n"
    assert asyncio.get_running_loop().time() - began >= 4 * 0.05
    writer.close()


async def test_a_cut_reply_is_a_reset_after_the_server_heard(proxy: Proxy, server: EchoServer) -> None:
    reader, writer = await connected(proxy)
    await answer(reader, writer, b"one\n")
    proxy.trouble = cutting(random.Random(1), share=ALWAYS)
    with pytest.raises(ConnectionResetError):
        await answer(reader, writer, b"two\n")
    assert server.heard == [b"one\n", b"two\n"]


async def test_a_half_closed_connection_ends_for_the_server_and_not_for_the_client(
    proxy: Proxy, server: EchoServer
) -> None:
    proxy.trouble = half_closing(random.Random(1), share=ALWAYS)
    _, writer = await connected(proxy)
    writer.write(b"one\n")

    async def ended() -> bool:
        return server.ended == 1

    await until(ended)
    assert server.heard == []
    writer.close()


async def test_a_share_of_none_is_no_trouble(proxy: Proxy) -> None:
    for trouble in (cutting, half_closing):
        proxy.trouble = trouble(random.Random(1), share=NEVER)
        reader, writer = await connected(proxy)
        assert await answer(reader, writer, b"one\n") == b"one\n"
        writer.close()


async def test_nobody_behind_it_is_a_cut() -> None:
    proxy = Proxy(to_port(free_port()))
    await proxy.start()
    reader, _ = await connected(proxy)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), PATIENCE_SECONDS)
    await proxy.close()


async def test_the_front_takes_connections_to_who_takes_them_in_turn() -> None:
    servers = [EchoServer(), EchoServer()]
    listeners = [await asyncio.start_server(server.serve, "127.0.0.1", 0) for server in servers]
    ports = [listener.sockets[0].getsockname()[1] for listener in listeners]
    front = Proxy(Balancer([*ports, free_port()]).dial)
    await front.start()
    for n in range(6):
        reader, writer = await connected(front)
        assert await answer(reader, writer, b"%d\n" % n) == b"%d\n" % n
        writer.close()
    assert all(len(server.heard) >= 2 for server in servers)
    await front.close()
    for listener in listeners:
        listener.close()
