"""Wall clocks that jump: of the gateways alone (`clock.py` says how)."""

import signal
from collections.abc import AsyncIterator

from tests.faults.clock import FACTORY
from tests.faults.members import GATEWAYS, Layout
from tests.faults.registry import fault
from tests.faults.stack import Stack

JUMPING = Layout(gateway_factory=FACTORY)


@fault("clock-ahead", layout=JUMPING)
async def clock_ahead(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """One gateway's clock jumps an hour ahead, and back."""
    stack.signal(GATEWAYS[0], signal.SIGUSR1)
    yield
    stack.signal(GATEWAYS[0], signal.SIGUSR2)


@fault("clock-behind", layout=JUMPING)
async def clock_behind(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """One gateway's clock jumps an hour back, and ahead."""
    stack.signal(GATEWAYS[0], signal.SIGUSR2)
    yield
    stack.signal(GATEWAYS[0], signal.SIGUSR1)
