"""Polling with a deadline, instead of sleeping and hoping."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 60.0
"""For a machine that has little time for a test; only one that fails waits so long."""


async def until(
    look: Callable[[], Awaitable[T]], *, seconds: float = PATIENCE_SECONDS, every: float = 0.05, what: str = "it"
) -> T:
    """The first true value that `look` returns.

    Raises:
        AssertionError: it did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = await look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {seconds:g} s")
        await asyncio.sleep(every)
