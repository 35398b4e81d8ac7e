"""Counts what the users of each scope have in common, for those who come new. Runs every few minutes on the control queue."""

import logging

from service.domain.cold_start import ColdStart, Evidence
from service.domain.inference import is_shareable
from service.errors import Conflict
from service.settings import Settings
from service.store import Store
from workers.undone import sparing_others

log = logging.getLogger(__name__)

EVERYBODY = "global"


async def count_all(store: Store, settings: Settings) -> list[str]:
    """Count for every tenant that has opted in; those whose new users start from something else now.

    Raises:
        StoreUnavailable: Redis is away.
    """
    changed = []
    for tenant in await store.cold_start.opted_in():
        async with sparing_others(store, "cold-start", "what new users of %s start from stays", tenant):
            if await count(store, tenant=tenant, min_users=settings.cold_start_min_users):
                changed.append(tenant)
    return changed


async def count(store: Store, *, tenant: str, min_users: int) -> bool:
    """Count for one tenant, by the users' cached folds; whether anything has changed."""
    known = {prior.id for priors in (await store.cold_start.read(tenant=tenant)).priors.values() for prior in priors}
    evidence: dict[str, Evidence] = {}
    users = await store.users.users(tenant=tenant)
    cohorts = dict(zip(users, await store.members.cohorts(users, tenant=tenant), strict=True))
    async for user, state in store.members.folds(users, tenant=tenant):
        cohort = cohorts[user]
        for scope in (EVERYBODY, *([f"cohort:{cohort}"] if cohort else [])):
            evidence.setdefault(scope, Evidence(known, shareable=is_shareable)).add(state)
    # What an admin changed while this was counted stands.
    before = await store.cold_start.read(tenant=tenant)
    after = _counted(before, evidence, min_users=min_users)
    if not before.enabled or after == before:
        return False
    try:
        await store.cold_start.write(after, before=before, tenant=tenant)
    except Conflict:
        log.warning("cold start of %s was changed while it was counted: the next count will do", tenant)
        return False
    return True


def _counted(before: ColdStart, evidence: dict[str, Evidence], *, min_users: int) -> ColdStart:
    nobody = Evidence((), shareable=is_shareable)
    priors = {
        scope: evidence.get(scope, nobody).priors(before.priors.get(scope, ()), min_users=min_users)
        for scope in evidence.keys() | before.priors.keys()
    }
    return before.model_copy(update={"priors": {scope: found for scope, found in priors.items() if found}})
