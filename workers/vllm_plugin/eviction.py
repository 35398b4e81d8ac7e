"""Forgetting an adapter on this replica.

A request that runs under an adapter makes the engine read its files again whenever the adapter was dropped from memory meanwhile, and
the engine dies if they are gone. So the files are deleted only after every request that may have taken hold of the adapter has ended.
Adapters are forgotten because newer ones have replaced them, or because their copies take more of the disk than they may.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from service.domain.slow_weights import NAME
from workers.vllm_plugin.held_copies import HeldCopies

logger = logging.getLogger("vllm.fastslow")

# A client that hangs up ends its request a few turns of the event loop before its abort reaches the engine.
ABORT_GRACE_SECONDS = 0.5


class Readers:
    """The requests in flight, any of which may hold an adapter that is about to be forgotten."""

    def __init__(self) -> None:
        self._in_flight: set[asyncio.Event] = set()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A request is in flight inside this block."""
        ended = asyncio.Event()
        self._in_flight.add(ended)
        try:
            yield
        finally:
            self._in_flight.discard(ended)
            ended.set()

    async def drain(self) -> None:
        """Wait until every request that is in flight now has ended; later ones don't matter."""
        for ended in tuple(self._in_flight):
            await ended.wait()


class Adapters:
    """The adapters that this replica has loaded.

    Args:
        models: vLLM's `OpenAIServingModels`.
        engine: vLLM's `EngineClient`.
        readers: the requests in flight.
        copies: the files that the engine may read.
        abort_grace_seconds: how long after a request's end the engine may still run it.
    """

    def __init__(
        self,
        *,
        models: Any,
        engine: Any,
        readers: Readers,
        copies: HeldCopies,
        abort_grace_seconds: float = ABORT_GRACE_SECONDS,
    ) -> None:
        self._models = models
        self._engine = engine
        self._readers = readers
        self._copies = copies
        self._abort_grace_seconds = abort_grace_seconds

    def names(self) -> list[str]:
        """Names that are served without asking the store again."""
        return sorted(name for name in self._models.lora_requests if NAME.fullmatch(name))

    async def evict(self, name: str) -> bool:
        """Forget an adapter: its name, its weights in memory, its local copy. Evicting what is not there is fine.

        Returns:
            False if a request asked for it again meanwhile, so that it is loaded anew.
        """
        lock = self._models.lora_resolver_lock[name]
        async with lock:
            loaded = self._models.lora_requests.pop(name, None)
        await self._readers.drain()
        await asyncio.sleep(self._abort_grace_seconds)
        async with lock:
            if loaded is not None:
                # Loaded anew it has another id.
                await self._engine.remove_lora(loaded.lora_int_id)
            if name in self._models.lora_requests:
                return False
            await asyncio.to_thread(self._copies.let_go, name)
            return True

    async def make_room(self) -> list[str]:
        """Forget the least recently used adapters while the copies take more than they may; the names of those that could be.

        Raises:
            OSError: the copies' folder can't be read.
        """
        surplus = await asyncio.to_thread(self._copies.surplus)
        # One that fails must not have the others, which may wait for replies, asked for again meanwhile.
        answers = await asyncio.gather(*map(self.evict, surplus), return_exceptions=True)
        failed = {name: answer for name, answer in zip(surplus, answers, strict=True) if not isinstance(answer, bool)}
        for name, error in failed.items():
            logger.error("%s could not be evicted to make room", name, exc_info=error)
        return [name for name in surplus if name not in failed]

    async def keep_room(self, *, seconds: float) -> None:
        """Look every so many seconds whether there is room to be made; ends when it is cancelled."""
        while True:
            await asyncio.sleep(seconds)
            try:
                if gone := await self.make_room():
                    logger.info("%d adapters were least used and made room: %s", len(gone), ", ".join(gone))
            except OSError as error:
                logger.error("The copies of adapters can't be looked at: %s", error)
            except Exception:
                # Without another look they would fill the disk.
                logger.exception("The copies of adapters were not looked at")
