"""New versions are rolled out: one after the other is told to end, and the next follows when its successor is ready."""

from collections.abc import AsyncIterator

from tests.faults.members import GATEWAYS, UPSTREAMS
from tests.faults.registry import fault
from tests.faults.stack import Stack


@fault("roll-gateways", instant=True, seamless=True)
async def roll_gateways(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """SIGTERM to one gateway after the other."""
    for name in GATEWAYS:
        await stack.restart(name)
    yield


@fault("roll-vllm", instant=True, seamless=True)
async def roll_vllm(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """SIGTERM to one upstream after the other."""
    for name in UPSTREAMS:
        await stack.restart(name)
    yield
