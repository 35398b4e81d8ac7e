"""What stands before the gateways, as a plain load balancer would: it takes each new connection to one that answers its health check.

It balances connections, not requests, and retries nothing but the connecting itself. A connection that a gateway closes is closed to the
client, and one to a gateway that hangs, hangs: what clients do about that is theirs.
"""

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import Sequence

PROBE_SECONDS = 0.5
PROBE_TIMEOUT_SECONDS = 1.0
CONNECT_SECONDS = 1.0


class Balancer:
    """Chooses a gateway for each connection, in turn; those that do not answer come last.

    Args:
        ports: of the gateways.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = list(ports)
        self._well = set(ports)
        self._turn = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def dial(self) -> tuple[StreamReader, StreamWriter]:
        """A connection to a gateway.

        Raises:
            ConnectionError: none takes one.
        """
        self._turn += 1
        turned = [self._ports[(self._turn + n) % len(self._ports)] for n in range(len(self._ports))]
        for port in sorted(turned, key=lambda port: port not in self._well):
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    return await asyncio.open_connection("127.0.0.1", port)
            except (OSError, TimeoutError):
                self._well.discard(port)
        raise ConnectionError("no gateway takes a connection")

    async def _watch(self) -> None:
        while True:
            await asyncio.gather(*map(self._probe, self._ports))
            await asyncio.sleep(PROBE_SECONDS)

    async def _probe(self, port: int) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                well = await _lives(port)
        except (OSError, TimeoutError):
            well = False
        (self._well.add if well else self._well.discard)(port)


async def _lives(port: int) -> bool:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: front\r\nConnection: close\r\n\r\n")
        return b" 200 " in await reader.readline()
    finally:
        writer.transport.abort()
