"""Adapters of another base model: an adapter is a difference, and added to other weights than it was trained on it is noise.

Whoever loads the base notes its hash. What is in use and was trained on another is barred, and the base serves until the next
consolidation.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

from service.domain.slow_weights import Scope
from service.errors import Conflict
from service.rescoring import score_again
from service.settings import Settings
from service.store import Store
from workers.adapter_store import adapter_store, by_scope
from workers.undone import sparing_others

log = logging.getLogger(__name__)


class LoadedBase(Protocol):
    """The base model as a worker has loaded it."""

    @property
    def name(self) -> str:
        """Under which it is served."""
        ...

    @property
    def sha256(self) -> str:
        """Of its weight files."""
        ...


class HashedBase(NamedTuple):
    """A base model of which only the hash was computed."""

    name: str
    sha256: str


async def quarantine(store: Store, settings: Settings, scope: Scope, *, tenant: str, now: float) -> bool:
    """Have the base serve a scope whose version in use is of another base than was noted last; whether it was so.

    Raises:
        NotFound: the version in use has no record.
        Conflict: the pointer has just moved.
    """
    entry = await store.scopes.quarantine(scope, tenant=tenant, actor="worker", now=now)
    if entry is None:
        return False
    log.error("%s of %s is served by the base from now on: %s", scope, tenant, entry.reason)
    await score_again(store, settings, scope, tenant=tenant, now=now)
    return True


async def quarantine_all(store: Store, settings: Settings, *, base: Callable[[], LoadedBase], now: float) -> int:
    """Look at every scope that has versions in the adapter store; how many are served by the base from now on.

    Args:
        base: called, in a thread, where there are any.

    Raises:
        OSError: the adapter store can't be read.
        StoreUnavailable: Redis is away.
    """
    scopes = await asyncio.to_thread(lambda: list(by_scope(adapter_store(settings))))
    if not scopes:
        return 0
    loaded = await asyncio.to_thread(base)
    await store.scopes.note_base(loaded.name, loaded.sha256)
    moved = [await _moved(store, settings, scope, tenant=tenant, now=now) for tenant, scope, _ in scopes]
    return sum(moved)


async def _moved(store: Store, settings: Settings, scope: Scope, *, tenant: str, now: float) -> bool:
    """`quarantine` of one scope among many: this is asked for once, so what is wrong with one must not leave the others on another base."""
    told = "%s of %s may be served by an adapter of another base, for it can't be looked at"
    async with sparing_others(store, "quarantine", told, scope, tenant):
        while True:
            try:
                return await quarantine(store, settings, scope, tenant=tenant, now=now)
            except Conflict:
                log.info("the pointer of %s of %s has just moved: it is looked at again", scope, tenant)
    return False
