"""What a fault is, and all of them by name.

To add one, write a generator in a module of `kinds/`: what it does before its `yield` breaks something, what it does after mends it.

    @fault("stop-redis")
    async def stop_redis(stack: Stack, seconds: float) -> AsyncIterator[None]:
        \"\"\"Redis hangs.\"\"\"
        with stack.paused("redis"):
            yield
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from tests.faults.members import Layout
from tests.faults.stack import Stack

Generator = Callable[[Stack, float], AsyncIterator[None]]


@dataclass(frozen=True)
class Fault:
    """One thing that breaks."""

    name: str
    says: str
    """In a line, for people."""
    break_it: Callable[[Stack, float], AbstractAsyncContextManager[None]]
    """Broken inside the block, which lasts as many seconds as it is told."""
    layout: Layout
    """The stack that it breaks."""
    instant: bool
    """It happens and is over, as a kill is; recovery counts from there, and not from a block's end."""
    on_request: bool
    """Only where it is named."""
    seamless: bool
    """No request may fail."""
    least_seconds: float
    """A shorter one would show nothing."""


FAULTS: dict[str, Fault] = {}


def fault(
    name: str,
    *,
    layout: Layout = Layout(),
    instant: bool = False,
    on_request: bool = False,
    seamless: bool = False,
    least_seconds: float = 0.0,
) -> Callable[[Generator], Generator]:
    """Register a generator; its docstring says what breaks."""

    def register(generator: Generator) -> Generator:
        says = " ".join((generator.__doc__ or "").split())
        assert name not in FAULTS, f"two faults are called {name}"
        assert says, f"{name} does not say what breaks"
        made = Fault(name, says, asynccontextmanager(generator), layout, instant, on_request, seamless, least_seconds)
        FAULTS[name] = made
        return generator

    return register
