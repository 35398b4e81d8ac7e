"""The copies that this replica's engine may read at any time: held from an adapter's first use until it is evicted."""

import asyncio
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workers.adapter_store import AdapterStore, Copies
from workers.adapter_store.copies import Copy

# Threads of its own: fetches that hang must not keep those of the whole process.
FETCHES_AT_ONCE = 8
# Inside a JSON string the quotes have backslashes before them, so no text of a user's can look like it.
MODEL = re.compile(rb'"model"\s*:\s*"(fs-[0-9a-f-]+)"')


class HeldCopies:
    """Safe to use from threads.

    Args:
        copies: on this machine.
        store: where they come from.
    """

    def __init__(self, copies: Copies, store: AdapterStore) -> None:
        self._copies = copies
        self._store = store
        self._held: dict[str, Copy] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="adapter-fetch")

    def take(self, name: str) -> Path | None:
        """The folder of a verified copy; None if there is no such version. Blocks on disk and network.

        Raises:
            AdapterRefused: its files fail a check, or can't be had.
        """
        copy = self._copies.take(name, self._store.copy_to)
        if copy is None:
            return None
        with self._lock:
            before = self._held.pop(name, None)
            self._held[name] = copy
        if before is not None:
            before.release()
        return copy.folder

    async def taken(self, name: str, *, seconds: float) -> Path | None:
        """`take`, waited for so long. A copy that takes longer is made all the same, for the next who asks.

        Raises:
            AdapterRefused: as `take`.
            TimeoutError: it takes longer.
        """
        taking = asyncio.get_running_loop().run_in_executor(self._threads, self.take, name)
        # Where nobody waits any more, nobody looks at its error either.
        taking.add_done_callback(lambda done: done.cancelled() or done.exception())
        async with asyncio.timeout(seconds):
            return await asyncio.shield(taking)

    def seen(self, body: bytes) -> None:
        """A request to the engine, or a piece of one: the adapter that it names is needed right now."""
        if found := MODEL.search(body):
            self._copies.used(found[1].decode())

    def surplus(self) -> list[str]:
        """Names whose copies have to go for the others to fit, the least recently used first."""
        return self._copies.surplus()

    def let_go(self, name: str) -> None:
        """Remove a copy that nothing here needs any more; it stays if another process on this machine needs it."""
        with self._lock:
            copy = self._held.pop(name, None)
        if copy is not None:
            copy.release()
        self._copies.remove(name)
