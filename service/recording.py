"""Keeps interactions so that they can be given feedback, as long as there is memory for it: they give way before feedback has to."""

import asyncio
import logging
import time

from service.domain.feedback import Interaction
from service.errors import StoreUnavailable
from service.settings import Settings
from service.store import Store
from service.tracing import span

log = logging.getLogger(__name__)

NOT_RECORDED = "interaction-not-recorded"
IN_BRIEF = "interaction-in-brief"
# Memory fills slowly, beside chats.
LOOK_SECONDS = 2.0


class Recording:
    """Keeps interactions whole, in brief while memory is short, and not at all where Redis is full or away.

    It looks at Redis's memory every few seconds while there are chats, and none of them waits for that.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._brief_share = settings.interactions_brief_share
        self._seconds = settings.interaction_retention_seconds
        self._brief_seconds = min(self._seconds, settings.brief_retention_seconds)
        self._fullest = 0.0
        self._look_at = 0.0
        self._look: asyncio.Task[None] | None = None

    async def keep(self, interaction: Interaction) -> str | None:
        """Store an interaction; what its chat was degraded by, if it was."""
        brief = self._memory_is_short()
        try:
            with span("record"):
                await self._store.users.record(
                    interaction.in_brief() if brief else interaction,
                    retention_seconds=self._brief_seconds if brief else self._seconds,
                )
        except StoreUnavailable as error:
            log.warning("interaction %s is not recorded: %s", interaction.id, error)
            return NOT_RECORDED
        return IN_BRIEF if brief else None

    async def aclose(self) -> None:
        if self._look is not None:
            self._look.cancel()
            await asyncio.gather(self._look, return_exceptions=True)

    def _memory_is_short(self) -> bool:
        """As it was last seen; not before that, nor while it can't be."""
        if self._look is None and time.monotonic() >= self._look_at:
            self._look = asyncio.create_task(self._look_at_memory())
        return self._fullest > self._brief_share

    async def _look_at_memory(self) -> None:
        try:
            self._fullest = (await self._store.backlog.memory()).fullest
        except StoreUnavailable as error:
            self._fullest = 0.0
            log.warning("how full Redis is can't be seen: %s", error)
        finally:
            self._look_at = time.monotonic() + LOOK_SECONDS
            self._look = None
