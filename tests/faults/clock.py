"""A gateway whose wall clock can jump: uvicorn's factory `tests.faults.clock:app_from_env`.

A machine's clock can't be set in a test, so the process's own view of it is: `time.time` answers an hour more after SIGUSR1, an hour less
after SIGUSR2. Monotonic clocks don't jump where a wall clock does, and so they don't here. `datetime.now` is not covered.
"""

import signal
import time

from fastapi import FastAPI

from service.api import app

JUMP_SECONDS = 3600.0
FACTORY = "tests.faults.clock:app_from_env"


def app_from_env() -> FastAPI:
    """The gateway, with such a clock."""
    jumped, true_time = 0.0, time.time

    def jump(number: int, _: object) -> None:
        nonlocal jumped
        jumped += JUMP_SECONDS if number == signal.SIGUSR1 else -JUMP_SECONDS

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, jump)
    time.time = lambda: true_time() + jumped
    return app.app_from_env()
