"""How long a request waits for its client: a body that drips in, or a reply that nobody takes, must not hold a place for ever."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class OutOfPatience(Exception):
    """The client took too long."""


class Patience:
    """Ends waits that take too long, with one timer for all the waits of a request: a stream has thousands, and few of them wait at all.

    One wait at a time. Like `asyncio.timeout` it cancels the waiting task and turns that into an error.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0
        self._until: float | None = None
        self._task: asyncio.Task[object] | None = None
        self._out = False

    async def wait(self, awaited: Awaitable[T], *, until: float) -> T:
        """The result of `awaited`.

        Args:
            until: by the loop's clock.

        Raises:
            OutOfPatience: it was not there by then.
        """
        self._task, self._until = asyncio.current_task(), until
        if self._timer is None or self._rings_at > until:
            self._wind(until)
        try:
            return await awaited
        except asyncio.CancelledError:
            if not self._out or self._task is None or self._task.uncancel() > 0:
                raise
            raise OutOfPatience from None
        finally:
            self._until = None

    def close(self) -> None:
        """There are no more waits."""
        if self._timer is not None:
            self._timer.cancel()

    def _wind(self, at: float) -> None:
        self.close()
        self._rings_at = at
        self._timer = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._until is None or self._task is None:
            return
        if self._until > self._loop.time():
            self._wind(self._until)
        else:
            self._out = True
            self._task.cancel()
