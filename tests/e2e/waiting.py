"""Waiting for the stack, with a deadline and a word on what was waited for."""

import time
from collections.abc import Callable

POLL_SECONDS = 0.2


def settled(look: Callable[[], bool], *, what: str, seconds: float = 60.0, seen: Callable[[], object] = str) -> None:
    """Poll until `look` is true; after too long the failure tells what `seen` sees."""
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}: {seen()}"
        time.sleep(POLL_SECONDS)
