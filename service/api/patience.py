"""How long a request waits for its client: a body that drips in, or a reply that nobody takes, must not hold a place for ever."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

# No callback of a gateway takes so long; none did in the learning benchmark's smoke run with asyncio's debugging on.
HELD_UP_SECONDS = 0.1


def held_up(until: float) -> float:
    """For how many seconds the running loop stood still when a timer was due, or 0. Whoever was waited for gets that time again, once.

    A process that stood still (stopped, or on a machine that was paused) has not read what was sent to it meanwhile, and timers may ring
    before that is read.

    Args:
        until: when the timer that rings now was due, by the loop's clock.
    """
    late = asyncio.get_running_loop().time() - until
    return late if late > HELD_UP_SECONDS else 0.0


class OutOfPatience(Exception):
    """The client took too long."""


class Patience:
    """Ends waits that take too long, with one timer for all: each chat has some, a stream thousands, and few of them wait at all.

    One wait at a time for each task. Like `asyncio.timeout` it cancels the waiting task and turns that into an error.
    """

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0
        self._until: dict[asyncio.Task[object], float] = {}
        self._out: set[asyncio.Task[object]] = set()

    async def wait(self, awaited: Awaitable[T], *, until: float) -> T:
        """The result of `awaited`.

        Args:
            until: by the loop's clock.

        Raises:
            OutOfPatience: it was not there by then.
        """
        task = asyncio.current_task()
        assert task is not None
        self._until[task] = until
        if self._timer is None or self._rings_at > until:
            self._wind(until)
        try:
            return await awaited
        except asyncio.CancelledError:
            if task not in self._out or task.uncancel() > 0:
                raise
            raise OutOfPatience from None
        finally:
            del self._until[task]
            self._out.discard(task)

    def close(self) -> None:
        """There are no more waits."""
        if self._timer is not None:
            self._timer.cancel()

    def _wind(self, at: float, *, again: bool = False) -> None:
        self.close()
        self._rings_at = at
        self._timer = asyncio.get_running_loop().call_at(at, self._ring, again)

    def _ring(self, again: bool) -> None:
        """Winds itself again for whoever is left: who has not waited long keeps the next ones from winding theirs."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        if not again and (stood := held_up(self._rings_at)):
            self._wind(now + stood, again=True)
            return
        for task, until in self._until.items():
            if until <= now and task not in self._out:
                self._out.add(task)
                task.cancel()
        left = [until for until in self._until.values() if until > now]
        if left:
            self._wind(min(left))
