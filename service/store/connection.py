"""The connection to Redis: one client per process, bounded waits, one place that turns Redis's errors into ours."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import AuthenticationError, RedisError

from service.errors import StoreUnavailable

# A pooled connection that died with an old server fails once; a server that is away must not hold a chat for long.
RECONNECTS = 1
RECONNECT_SECONDS = 0.02


class Connection:
    """A Redis client whose failures are `StoreUnavailable`."""

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        # One timer for a whole call: redis-py's own socket_timeout costs a task for each write and a timer for each reply.
        self._timeout_seconds = timeout_seconds
        self._scripts: dict[str, AsyncScript] = {}
        self._redis: Redis = Redis.from_url(
            url,
            socket_timeout=None,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(ConstantBackoff(RECONNECT_SECONDS), RECONNECTS),
            max_connections=4096,
        )

    async def close(self) -> None:
        await self._redis.aclose()

    async def call(self, *command: str | bytes | int | float) -> Any:
        """One command."""
        with store_errors():
            async with asyncio.timeout(self._timeout_seconds):
                # redis-py leaves this one method unannotated.
                return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]

    async def pipeline(
        self, commands: Sequence[Sequence[str | bytes | int | float]], *, atomic: bool = False
    ) -> list[Any]:
        """Several commands in one round trip; `atomic` (keys of one bucket) lets nothing come between them."""
        with store_errors():
            pipe: Pipeline = self._redis.pipeline(transaction=atomic)
            for command in commands:
                pipe.execute_command(*command)
            async with asyncio.timeout(self._timeout_seconds):
                replies: list[Any] = await pipe.execute()
                return replies

    async def script(self, source: str, keys: Sequence[str], *args: str | bytes | int | float) -> Any:
        """Run a Lua script (by its hash where the server knows it)."""
        script = self._scripts.get(source) or self._scripts.setdefault(source, self._redis.register_script(source))
        with store_errors():
            async with asyncio.timeout(self._timeout_seconds):
                return await script(keys=list(keys), args=list(args))

    async def append_only(self) -> bool:
        """Whether the server writes an append-only file, without which an acknowledgement is worth little."""
        info = await self.call("INFO", "persistence")
        return bool(int(info.get("aof_enabled", 0)))


@contextmanager
def store_errors() -> Iterator[None]:
    """Redis away, full, read-only or misconfigured becomes `StoreUnavailable`, with Redis's own words.

    Raises:
        StoreUnavailable: see above.
    """
    try:
        yield
    except AuthenticationError as error:
        raise StoreUnavailable(f"Redis refuses the credentials: {error}", retry_after_seconds=30) from error
    except (RedisError, OSError) as error:
        raise StoreUnavailable(f"Redis can't be used now: {str(error) or type(error).__name__}") from error
