"""Redis that is full, that takes no writes, and that fails over."""

import asyncio
from collections.abc import AsyncIterator

from redis.asyncio import Redis

from tests.faults.members import PRIMARY, REPLICA, Layout
from tests.faults.registry import fault
from tests.faults.stack import Stack
from tests.gateway import free_port

# The dead primary is started again only after the sentinel has given it up.
WATCHED = Layout(sentinels=True, restart_seconds=8.0, settings=(("redis_wait_replicas", 1),))
UNCONFIRMED = Layout(sentinels=True, restart_seconds=8.0)
LAG_SECONDS = 2.0


@fault("redis-full")
async def redis_full(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """Redis is past its `maxmemory`."""
    async with stack.redis() as redis:
        await redis.config_set("maxmemory", 1)
        try:
            yield
        finally:
            await redis.config_set("maxmemory", 0)


@fault("redis-read-only")
async def redis_read_only(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """Redis is made the replica of an address where nobody is: it keeps its data and takes no writes."""
    async with stack.redis() as redis:
        await redis.execute_command("REPLICAOF", "127.0.0.1", free_port())
        try:
            yield
        finally:
            await redis.execute_command("REPLICAOF", "NO", "ONE")


async def _fail_over(stack: Stack) -> None:
    # What the primary takes now, the replica never gets: what had been sent would still reach it when it goes on.
    with stack.paused(REPLICA):
        async with Redis(port=stack.ports.primary) as primary:
            await primary.execute_command("CLIENT", "KILL", "TYPE", "replica")
        await asyncio.sleep(LAG_SECONDS)
        stack.kill(PRIMARY)


@fault("redis-failover", layout=WATCHED, instant=True)
async def redis_failover(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """The replica is cut off for 2 s, the primary is killed, the sentinel promotes the replica; FASTSLOW_REDIS_WAIT_REPLICAS=1."""
    await _fail_over(stack)
    yield


@fault("redis-failover-unconfirmed", layout=UNCONFIRMED, instant=True, on_request=True)
async def redis_failover_unconfirmed(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """The same without waiting for replicas: what the primary had acknowledged meanwhile is lost, and the suite must find that."""
    await _fail_over(stack)
    yield
