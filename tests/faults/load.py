"""Users who chat and give feedback at a steady pace, until they are told to stop."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from tests.faults.checks import Acknowledged, Person
from tests.faults.client import User
from tests.faults.records import Records, Request, clean_from

LOOK_SECONDS = 0.1


class Load:
    """All users of one trial.

    Args:
        keys: tenant -> its API key.
        pause_seconds: between a user's chats; each chat is followed by a feedback.
    """

    def __init__(
        self,
        persons: Sequence[Person],
        *,
        url: str,
        keys: Mapping[str, str],
        model: str,
        pause_seconds: float,
        reply_seconds: float,
        echoes: bool,
    ) -> None:
        self.records = Records()
        self._stop = asyncio.Event()
        self._users = [
            User(
                person,
                self.records,
                url=url,
                key=keys[person.tenant],
                model=model,
                pause_seconds=pause_seconds,
                reply_seconds=reply_seconds,
                echoes=echoes,
            )
            for person in persons
        ]

    @property
    def acknowledged(self) -> list[Acknowledged]:
        return [one for user in self._users for one in user.acknowledged]

    @asynccontextmanager
    async def running(self, *, drain_seconds: float) -> AsyncIterator[None]:
        """While the block lasts; afterwards feedback that was not acknowledged yet has so long for it."""
        chatting = [asyncio.create_task(user.chat_on(self._stop)) for user in self._users]
        telling = [asyncio.create_task(user.tell()) for user in self._users]
        try:
            yield
            self._stop.set()
            await asyncio.gather(*chatting)
            await asyncio.wait([asyncio.create_task(user.all_told()) for user in self._users], timeout=drain_seconds)
        finally:
            for task in (*chatting, *telling):
                task.cancel()
            ends = await asyncio.gather(*chatting, *telling, return_exceptions=True)
            self._count_untold()
            for user in self._users:
                await user.close()
        for end in ends:
            # A user that broke is a fault of ours, not of what is measured.
            if isinstance(end, Exception):
                raise end

    async def clean(self, *, since: float, within: float, seconds: float) -> float | None:
        """When the first clean stretch of so many seconds after `since` began; None where there was none in time."""
        while True:
            now = time.monotonic()
            found = clean_from(self.records, since=since, until=now, seconds=seconds)
            if found is not None or now > since + within:
                return found
            await asyncio.sleep(LOOK_SECONDS)

    def _count_untold(self) -> None:
        now = time.monotonic()
        for user in self._users:
            waits = [Request("feedback", now, now, "not done in time")] * user.untold()
            self.records.requests += waits
