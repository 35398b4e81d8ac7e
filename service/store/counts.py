"""What workers count and measure, in Redis: they have no port that Prometheus could ask. A gateway reads it when it is scraped."""

import logging
from collections.abc import Mapping

from service.errors import StoreUnavailable
from service.store.connection import Connection
from service.store.keys import counts

log = logging.getLogger(__name__)

Amounts = Mapping[tuple[str, str], float]
"""(name, label) -> how often, how long, or how much."""


class CountStore:
    """One hash for all workers. What can't be counted while Redis is away is lost: no work fails for it."""

    def __init__(self, connection: Connection) -> None:
        self._redis = connection

    async def add(self, name: str, label: str) -> None:
        """Count something once."""
        await self.add_all({(name, label): 1})

    async def add_all(self, amounts: Amounts) -> None:
        """Add to what was counted before."""
        await self._write([("HINCRBYFLOAT", counts(), _field(key), amount) for key, amount in amounts.items()])

    async def set_all(self, amounts: Amounts) -> None:
        """Put in place of what was measured before."""
        await self._write([("HSET", counts(), _field(key), amount) for key, amount in amounts.items()])

    async def read(self) -> dict[tuple[str, str], float]:
        """All of it, over all workers.

        Raises:
            StoreUnavailable: Redis is away.
        """
        flat = await self._redis.call("HGETALL", counts())
        names = ((key.decode().partition("\0"), float(value)) for key, value in flat.items())
        return {(name, label): value for (name, _, label), value in names}

    async def _write(self, commands: list[tuple[str | float, ...]]) -> None:
        try:
            if commands:
                await self._redis.pipeline(commands)
        except StoreUnavailable as error:
            log.warning("%d counts are lost: %s", len(commands), error)


def _field(key: tuple[str, str]) -> str:
    return "\0".join(key)
