"""Token buckets in Redis, shared by all gateways: by `throttled-py`, whose scripts run over our own connection.

Of the libraries looked at, `limits` has windows and no bucket: a client gets twice its limit around a window's edge, or every request is
kept. `pyrate-limiter` keeps every request. `throttled-py` has GCRA, which is a bucket that fills with the time: one key with one number,
which expires when the bucket is full, and one script by the server's clock. So it works on a Redis Cluster too.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from throttled.asyncio import RateLimiterRegistry, RateLimiterType, RedisStore, RedisStoreBackend, per_min

from service.store.connection import Connection
from service.store.keys import LIMITS

# Distinct limits in use at once; there are few.
CACHED_LIMITS = 1024


@dataclass(frozen=True)
class Take:
    """What a request takes out of one bucket."""

    key: str
    """`keys.rate_limit`."""
    per_minute: int
    """The bucket's size; it fills in a minute."""
    cost: int


@dataclass(frozen=True)
class Bucket:
    """A bucket after a request took out of it, or was refused to."""

    refused: bool
    limit: int
    remaining: int
    full_after_seconds: float
    room_after_seconds: float
    """When the refused request would find room."""


class RateLimitStore:
    """Takes out of several buckets at once, or out of none."""

    def __init__(self, connection: Connection) -> None:
        store = _Buckets(connection)
        gcra = RateLimiterRegistry.get(RateLimiterType.GCRA.value)
        self._of = lru_cache(CACHED_LIMITS)(lambda limit: gcra(per_min(limit), store, key_prefix=LIMITS))

    async def take(self, takes: Sequence[Take]) -> list[Bucket]:
        """The buckets after it. If any refuses, the others get back what was taken, in a second round trip.

        Raises:
            StoreUnavailable: Redis is away, or full.
        """
        buckets = await asyncio.gather(*(self._take(take, take.cost) for take in takes))
        if any(bucket.refused for bucket in buckets):
            given = [take for take, bucket in zip(takes, buckets, strict=True) if not bucket.refused]
            await asyncio.gather(*(self._take(take, -take.cost) for take in given))
        return buckets

    async def _take(self, take: Take, cost: int) -> Bucket:
        result = await self._of(take.per_minute).limit(take.key, cost)
        state = result.state
        return Bucket(
            refused=result.limited,
            limit=state.limit,
            remaining=state.remaining,
            full_after_seconds=state.reset_after,
            room_after_seconds=state.retry_after,
        )


class _Buckets(RedisStore):
    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._backend = _OverConnection(connection)


class _OverConnection(RedisStoreBackend):
    """The library's view of Redis: it opens no connection of its own."""

    base_exceptions = ()
    """None to translate: the connection raises our own."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._scripts = _Scripts(connection)

    def get_client(self) -> Any:
        return self._scripts


class _Scripts:
    """All that the library's rate limiters ask of a Redis client."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def register_script(self, source: str) -> Callable[[Sequence[str], Sequence[float]], Awaitable[Any]]:
        return lambda keys, args: self._connection.script(source, keys, *args)
