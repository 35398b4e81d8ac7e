"""Processes that are killed, and processes that hang."""

from collections.abc import AsyncIterator

from tests.faults.members import GATEWAYS, UPSTREAMS
from tests.faults.registry import fault
from tests.faults.stack import Stack


@fault("kill-gateway", instant=True)
async def kill_gateway(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """SIGKILL of one of two gateways."""
    stack.kill(GATEWAYS[0])
    yield


@fault("kill-worker", instant=True)
async def kill_worker(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """SIGKILL of the control worker, in the midst of archiving and optimizing."""
    stack.kill("control")
    yield


@fault("kill-beat", instant=True)
async def kill_beat(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """SIGKILL of the scheduler, whose lock stays behind."""
    stack.kill("beat")
    yield


@fault("kill-vllm", instant=True)
async def kill_vllm(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """SIGKILL of one of two upstreams."""
    stack.kill(UPSTREAMS[0])
    yield


@fault("kill-all-vllm", instant=True)
async def kill_all_vllm(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """SIGKILL of both upstreams."""
    stack.kill(*UPSTREAMS)
    yield


@fault("kill-redis", instant=True)
async def kill_redis(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """SIGKILL of Redis, which comes back on its append-only file."""
    stack.kill("redis")
    yield


@fault("stop-gateway")
async def stop_gateway(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """One of two gateways hangs."""
    with stack.paused(GATEWAYS[0]):
        yield


@fault("stop-worker")
async def stop_worker(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """The control worker hangs."""
    with stack.paused("control"):
        yield


@fault("stop-beat")
async def stop_beat(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """The scheduler hangs."""
    with stack.paused("beat"):
        yield


@fault("stop-vllm")
async def stop_vllm(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """One of two upstreams hangs."""
    with stack.paused(UPSTREAMS[0]):
        yield


@fault("stop-redis")
async def stop_redis(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """Redis hangs."""
    with stack.paused("redis"):
        yield
