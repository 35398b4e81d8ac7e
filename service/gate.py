"""How many chats this process has in flight: a number of places, a short line before them, and a plain no to who finds both full."""

import asyncio

from service.domain.turns import Turns
from service.errors import Overloaded


class Gate:
    """Places for requests, given out in fair turns (`service/domain/turns.py`).

    Args:
        places: requests in flight at once.
        line: most that wait for a place.
        wait_seconds: longest that one waits.
    """

    def __init__(self, *, places: int, line: int, wait_seconds: float) -> None:
        self._places = places
        self._line = line
        self._wait_seconds = wait_seconds
        self._turns: Turns[asyncio.Future[None]] = Turns()
        self.in_flight = 0

    @property
    def waiting(self) -> int:
        return len(self._turns)

    async def enter(self, *, tenant: str, user: str) -> None:
        """Take a place, in turn. Whoever has it must `leave`.

        Raises:
            Overloaded: the line is full, or it took too long.
        """
        if self.in_flight < self._places:
            self.in_flight += 1
            return
        if len(self._turns) >= self._line:
            self._make_room(tenant=tenant, user=user)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.add(turn, tenant=tenant, user=user)
        try:
            async with asyncio.timeout(self._wait_seconds):
                await turn
        except BaseException as error:
            self._turns.remove(turn, tenant=tenant, user=user)
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                # It was given its place at the very moment that it gave up.
                self.leave()
            if isinstance(error, TimeoutError):
                raise Overloaded(
                    f"No place became free within {self._wait_seconds:g} s: the service is overloaded, send it again later."
                ) from None
            raise

    def leave(self) -> None:
        """Give up a place, to whose turn it is."""
        while self._turns:
            turn = self._turns.next()
            if not turn.done():
                turn.set_result(None)
                return
        self.in_flight -= 1

    def _make_room(self, *, tenant: str, user: str) -> None:
        full = Overloaded(f"{self._places} chats are in flight and {self._line} wait: send it again later.")
        other = self._turns.give_way(tenant=tenant, user=user)
        if other is None:
            raise full
        if not other.done():
            other.set_exception(full)
