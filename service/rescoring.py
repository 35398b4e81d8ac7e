"""After the pointer of a scope has moved: its users' populations were scored under another model, and want scoring again."""

import logging

from service.domain.slow_weights import Scope
from service.settings import Settings
from service.store import Store

log = logging.getLogger(__name__)

# Users who are asked for in one round trip.
AT_ONCE = 100


async def score_again(store: Store, settings: Settings, scope: Scope, *, tenant: str, now: float) -> int:
    """Ask for an optimization of every user of the scope who has a population; how many they are."""
    if not settings.optimize:
        return 0
    asked = 0
    waiting: list[str] = []
    users = await store.members.of(scope, tenant=tenant)
    async for user, state in store.members.folds(users, tenant=tenant):
        if state.population.members:
            waiting.append(user)
        if len(waiting) == AT_ONCE:
            asked += await _ask(store, waiting, tenant=tenant, now=now)
    asked += await _ask(store, waiting, tenant=tenant, now=now)
    log.info("the pointer of %s of %s has moved: %d populations are scored again", scope, tenant, asked)
    return asked


async def _ask(store: Store, waiting: list[str], *, tenant: str, now: float) -> int:
    asked = len(waiting)
    if asked:
        await store.optimizations.ask_for_all(waiting, tenant=tenant, at=now)
    waiting.clear()
    return asked
