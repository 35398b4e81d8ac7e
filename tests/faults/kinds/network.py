"""Connections of the gateways that are slow, are cut, or are closed by one side."""

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

from tests.faults.proxy import Proxy, Trouble, cutting, delaying, half_closing, vanishing
from tests.faults.registry import fault
from tests.faults.stack import Stack

# Within the gateway's wait for Redis (a second), and past it.
SLOW_SECONDS, TOO_SLOW_SECONDS = 0.2, 1.5
# A stream has twenty pieces; a gateway asks Redis over one connection, so that one that is cut is everybody's.
SHARE_OF_VLLM, SHARE_OF_REDIS = 0.05, 0.1
SEED = 7


@contextmanager
def troubled(proxies: Sequence[Proxy], trouble: Trouble) -> Iterator[None]:
    """Inside the block."""
    for proxy in proxies:
        proxy.trouble = trouble
    try:
        yield
    finally:
        for proxy in proxies:
            proxy.trouble = None


@fault("redis-slow")
async def redis_slow(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """Each piece to and from Redis takes 0.2 s more, which the gateways bear."""
    with troubled([stack.to_redis], delaying(SLOW_SECONDS)):
        yield


@fault("redis-too-slow")
async def redis_too_slow(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """Each takes 1.5 s more: what was written is written, and the gateway no longer waits to hear it."""
    with troubled([stack.to_redis], delaying(TOO_SLOW_SECONDS)):
        yield


@fault("redis-cut")
async def redis_cut(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """One in ten replies of Redis is a reset connection, after the command was done."""
    with troubled([stack.to_redis], cutting(random.Random(SEED), share=SHARE_OF_REDIS)):
        yield


@fault("redis-half-close")
async def redis_half_close(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """In place of one piece in ten, either side of a connection to Redis sees the other's end."""
    with troubled([stack.to_redis], half_closing(random.Random(SEED), share=SHARE_OF_REDIS)):
        yield


@fault("redis-vanish")
async def redis_vanish(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """Redis's machine is gone: what is sent there is swallowed, and no connection is closed. Later new ones reach it again."""
    with troubled([stack.to_redis], vanishing):
        yield


@fault("vllm-slow")
async def vllm_slow(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """Each piece to and from the upstreams takes 0.2 s more."""
    with troubled(stack.to_vllm, delaying(SLOW_SECONDS)):
        yield


@fault("vllm-cut")
async def vllm_cut(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """One in twenty pieces of the upstreams' replies is a reset connection; a stream has twenty pieces."""
    with troubled(stack.to_vllm, cutting(random.Random(SEED), share=SHARE_OF_VLLM)):
        yield


@fault("vllm-half-close")
async def vllm_half_close(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """In place of one piece in twenty, either side of a connection to the upstreams sees the other's end."""
    with troubled(stack.to_vllm, half_closing(random.Random(SEED), share=SHARE_OF_VLLM)):
        yield


@fault("vllm-vanish")
async def vllm_vanish(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """The machine of one of two upstreams is gone in the same way."""
    with troubled(stack.to_vllm[:1], vanishing):
        yield
