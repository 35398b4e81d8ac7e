"""The connection to Redis: one client per process, bounded waits, one place that turns Redis's errors into ours."""

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import AuthenticationError, NoScriptError, RedisError

from service.errors import StoreUnavailable
from service.store.redis_urls import clients

# A pooled connection that died with an old server fails once; a server that is away must not hold a chat for long.
RECONNECTS = 1
RECONNECT_SECONDS = 0.02


class Connection:
    """A client of one Redis, of a cluster, or of the primary that sentinels name; its failures are `StoreUnavailable`.

    Args:
        url: as `service/store/redis_urls.py` has it.
    """

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        # One timer for a whole call: redis-py's own socket_timeout costs a task for each write and a timer for each reply.
        self._timeout_seconds = timeout_seconds
        self._hashes: dict[str, str] = {}
        self._redis, self._close = clients(
            url,
            socket_timeout=None,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(ConstantBackoff(RECONNECT_SECONDS), RECONNECTS),
            max_connections=4096,
        )

    async def close(self) -> None:
        await self._close()

    async def call(self, *command: str | bytes | int | float) -> Any:
        """One command."""
        with store_errors():
            async with asyncio.timeout(self._timeout_seconds):
                # redis-py leaves this one method unannotated.
                return await self._redis.execute_command(*command)

    async def pipeline(
        self, commands: Sequence[Sequence[str | bytes | int | float]], *, atomic: bool = False
    ) -> list[Any]:
        """Several commands in one round trip (to each node of a cluster); `atomic`, keys of one bucket, lets nothing come between them."""
        with store_errors():
            pipe = self._redis.pipeline(transaction=atomic)
            for command in commands:
                pipe.execute_command(*command)
            async with asyncio.timeout(self._timeout_seconds):
                replies: list[Any] = await pipe.execute()
                return replies

    async def script(self, source: str, keys: Sequence[str], *args: str | bytes | int | float) -> Any:
        """Run a Lua script on keys of one bucket (by its hash where the server knows it)."""
        name = self._hashes.get(source) or self._hashes.setdefault(source, _sha1(source))
        with store_errors():
            async with asyncio.timeout(self._timeout_seconds):
                try:
                    return await self._redis.execute_command("EVALSHA", name, len(keys), *keys, *args)
                except NoScriptError:
                    # That leaves it at this server, of a cluster at the node that has the keys.
                    return await self._redis.execute_command("EVAL", source, len(keys), *keys, *args)

    async def append_only(self) -> bool:
        """Whether the server (of a cluster: every node) writes an append-only file, without which an acknowledgement is worth little."""
        info = await self.call("INFO", "persistence")
        nodes = [info] if "aof_enabled" in info else list(info.values())
        return all(int(node.get("aof_enabled", 0)) for node in nodes)


def _sha1(source: str) -> str:
    """What Redis knows a script by."""
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


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
