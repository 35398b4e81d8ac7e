"""A TCP proxy that can be told to misbehave, and does so on connections that are open already too."""

import asyncio
import random
import struct
from asyncio import StreamReader, StreamWriter
from asyncio.trsock import TransportSocket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from socket import SO_LINGER, SOL_SOCKET

Dial = Callable[[], Awaitable[tuple[StreamReader, StreamWriter]]]
"""Connects to what is behind the proxy."""


class Link:
    """One connection through the proxy."""

    def __init__(self, client: StreamWriter, server: StreamWriter) -> None:
        self.client = client
        self.server = server
        self.vanished = False
        """One side never hears of the other again."""

    def cut(self) -> None:
        """Reset it on both sides."""
        for writer in (self.client, self.server):
            _reset(writer)


Trouble = Callable[[Link, bool], Awaitable[bool]]
"""Called with each piece's link and whether it is (of) a reply; answers whether the piece is passed on."""


def delaying(seconds: float) -> Trouble:
    """Each piece comes so much later."""

    async def trouble(link: Link, is_reply: bool) -> bool:
        await asyncio.sleep(seconds)
        return True

    return trouble


def cutting(chances: random.Random, *, share: float) -> Trouble:
    """Of this share of the replies nothing arrives but a reset: what was asked was done, and nobody is told."""

    async def trouble(link: Link, is_reply: bool) -> bool:
        if is_reply and chances.random() < share:
            link.cut()
            return False
        return True

    return trouble


def half_closing(chances: random.Random, *, share: float) -> Trouble:
    """In place of this share of the replies the client sees the connection's end, while the server hears on; or the other way round."""

    async def trouble(link: Link, is_reply: bool) -> bool:
        if chances.random() >= share:
            return True
        writer = link.client if is_reply else link.server
        with suppress(OSError, RuntimeError):
            writer.write_eof()
        return False

    return trouble


async def vanishing(link: Link, is_reply: bool) -> bool:
    """Nothing arrives any more, on this connection for ever, and neither side is told: the other's machine is gone."""
    link.vanished = True
    return False


class Proxy:
    """Listens on a port of this machine until it is closed.

    Args:
        dial: connects to what is behind it; where that fails with OSError or TimeoutError, the client is cut.
    """

    def __init__(self, dial: Dial) -> None:
        self.trouble: Trouble | None = None
        self.port = 0
        self._dial = dial
        self._server: asyncio.Server | None = None
        self._links: set[Link] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self.cut()

    def cut(self) -> None:
        """Reset all connections."""
        for link in tuple(self._links):
            link.cut()

    async def _serve(self, client_reader: StreamReader, client: StreamWriter) -> None:
        try:
            server_reader, server = await self._dial()
        except (OSError, TimeoutError):
            _reset(client)
            return
        link = Link(client, server)
        self._links.add(link)
        try:
            await asyncio.gather(
                self._pump(link, client_reader, server, is_reply=False),
                self._pump(link, server_reader, client, is_reply=True),
            )
        finally:
            self._links.discard(link)
            client.close()
            server.close()

    async def _pump(self, link: Link, reader: StreamReader, writer: StreamWriter, *, is_reply: bool) -> None:
        try:
            while piece := await reader.read(65536):
                if link.vanished:
                    continue
                if self.trouble is None or await self.trouble(link, is_reply):
                    writer.write(piece)
                    await writer.drain()
            writer.write_eof()
        except (OSError, RuntimeError):
            # One side is gone, or its end was told before.
            link.cut()


def _reset(writer: StreamWriter) -> None:
    """Close it with RST, not FIN."""
    with suppress(OSError):
        socket: TransportSocket = writer.get_extra_info("socket")
        socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def to_port(port: int) -> Dial:
    """To a server of this machine."""
    return lambda: asyncio.open_connection("127.0.0.1", port)
