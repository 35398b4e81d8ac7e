"""The connection to Redis: one client per process, bounded waits, one place that turns Redis's errors into ours."""

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import AuthenticationError, NoScriptError, RedisClusterException, RedisError

from service.errors import StoreUnavailable
from service.store.lane import RECONNECT_SECONDS, Command, Lane
from service.store.redis_urls import clients

# A pooled connection that died with an old server fails once; a server that is away must not hold a chat for long.
RECONNECTS = 1

FAILURES = (RedisError, RedisClusterException, OSError)
"""What a client raises where Redis can't be used; that no node of a cluster can be reached is no RedisError."""

# A write of no meaning, which a full Redis takes too.
CONFIRM = """#!lua flags=allow-oom
redis.call('SET', KEYS[1], '', 'EX', 60)
return 1
"""


class Connection:
    """A client of one Redis, of a cluster, or of the primary that sentinels name; its failures are `StoreUnavailable`.

    Args:
        url: as `service/store/redis_urls.py` has it.
        wait_replicas: so many must have what is confirmed; 0: nothing is waited for.

    Raises:
        ValueError: a cluster can't be waited for.
    """

    def __init__(self, url: str, *, timeout_seconds: float, wait_replicas: int = 0) -> None:
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
        self.wait_replicas = wait_replicas
        if wait_replicas and not isinstance(self._redis, Redis):
            raise ValueError("FASTSLOW_REDIS_WAIT_REPLICAS is for a single Redis or sentinels, not for a cluster")
        # A cluster has no one connection for all.
        self._lane = Lane(self._redis.connection_pool, timeout_seconds) if isinstance(self._redis, Redis) else None

    async def close(self) -> None:
        if self._lane is not None:
            await self._lane.close()
        await self._close()

    async def call(self, *command: str | bytes | int | float) -> Any:
        """One command."""
        with store_errors():
            async with asyncio.timeout(self._timeout_seconds):
                # redis-py leaves this one method unannotated.
                return await self._redis.execute_command(*command)

    async def brief(self, *commands: Command) -> list[Any]:
        """Commands with short answers, in one round trip: what the calls of users wait for."""
        if self._lane is None:
            return await self.pipeline(commands)
        try:
            return await self._lane.ask(commands)
        except (RedisError, OSError) as error:
            raise unavailable(error) from error

    async def pipeline(self, commands: Sequence[Command], *, atomic: bool = False) -> list[Any]:
        """Several commands in one round trip (to each node of a cluster); `atomic`, keys of one bucket, lets nothing come between them."""
        with store_errors():
            pipe = self._redis.pipeline(transaction=atomic)
            for command in commands:
                pipe.execute_command(*command)
            async with asyncio.timeout(self._timeout_seconds):
                replies: list[Any] = await pipe.execute()
                return replies

    async def script(self, source: str, keys: Sequence[str], *args: str | bytes | int | float) -> Any:
        """Run a Lua script with a short answer on keys of one bucket (by its hash where the server knows it)."""
        name = self._hashes.get(source) or self._hashes.setdefault(source, _sha1(source))
        with store_errors():
            try:
                return await self._asked("EVALSHA", name, len(keys), *keys, *args)
            except NoScriptError:
                # That leaves it at this server, of a cluster at the node that has the keys.
                return await self._asked("EVAL", source, len(keys), *keys, *args)

    async def confirm(self, key: str) -> None:
        """Returns once `wait_replicas` replicas have all that was written before.

        Args:
            key: is written, for a replica that has that has all before it too.

        Raises:
            StoreUnavailable: fewer have, in time. What was written stays.
        """
        if not self.wait_replicas:
            return
        with store_errors():
            # On a connection of its own: a server that waits answers nothing else on it.
            pipe = self._redis.pipeline(transaction=False)
            pipe.execute_command("EVAL", CONFIRM, 1, key)
            pipe.execute_command("WAIT", self.wait_replicas, int(1000 * self._timeout_seconds))
            async with asyncio.timeout(2 * self._timeout_seconds):
                _, replicas = await pipe.execute()
        if replicas < self.wait_replicas:
            raise StoreUnavailable(f"{replicas} of {self.wait_replicas} replicas of Redis have it: send it again.")

    async def _asked(self, *command: str | bytes | int | float) -> Any:
        """A command with a short answer."""
        if self._lane is not None:
            return (await self._lane.ask([command]))[0]
        async with asyncio.timeout(self._timeout_seconds):
            return await self._redis.execute_command(*command)

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
    except FAILURES as error:
        raise unavailable(error) from error


def unavailable(error: Exception) -> StoreUnavailable:
    """What Redis says, as an error of ours."""
    if isinstance(error, AuthenticationError):
        return StoreUnavailable(f"Redis refuses the credentials: {error}", retry_after_seconds=30)
    return StoreUnavailable(f"Redis can't be used now: {str(error) or type(error).__name__}")
