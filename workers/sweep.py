"""The sweep: which scopes are due, and which jobs lost their worker. Runs every few minutes on the control queue."""

import logging
from collections.abc import Callable

from service.domain.feedback import BASE
from service.domain.policy import is_due
from service.domain.slow_weights import Scope
from service.jobs import Jobs
from service.settings import Settings
from service.store import Store

log = logging.getLogger(__name__)


async def sweep(store: Store, jobs: Jobs, settings: Settings, *, now: float, unique: Callable[[], str]) -> list[str]:
    """Queue what is due and what was left behind.

    Returns:
        The ids of the jobs that were queued.
    """
    queued = await _left_behind(store, settings, now=now)
    for (tenant, scope), users in (await _pending(store, settings, now=now)).items():
        pending, oldest = sum(count for count, _ in users), min(since for _, since in users)
        if is_due(
            pending=pending,
            oldest_age_seconds=now - oldest,
            due_feedbacks=settings.due_feedbacks,
            due_age_seconds=settings.due_age_seconds,
            min_feedbacks=settings.min_feedbacks,
        ):
            job, opened = await store.jobs.open(scope, tenant=tenant, unique=unique(), now=now)
            if opened:
                log.info("%s of %s is due with %d feedbacks: job %s", scope, tenant, pending, job.id)
                queued.append(job.id)
    for job_id in queued:
        await jobs.consolidate(job_id)
    return queued


async def _left_behind(store: Store, settings: Settings, *, now: float) -> list[str]:
    """Open jobs that no worker holds and that have not moved for a lease: their worker, or their message, is gone."""
    left = []
    for job, held in await store.jobs.unfinished():
        if not held and now - job.updated > settings.lease_seconds:
            log.warning("job %s of %s is %s and no worker holds it: queued again", job.id, job.scope, job.state)
            left.append(job.id)
    return left


async def _pending(store: Store, settings: Settings, *, now: float) -> dict[tuple[str, Scope], list[tuple[int, float]]]:
    """(tenant, scope) -> per user, the feedbacks that no consolidation has looked at and the time of the oldest."""
    found: dict[tuple[str, Scope], list[tuple[int, float]]] = {}
    for tenant, user, since in await store.jobs.due():
        head = await store.jobs.head(tenant=tenant, user=user)
        settled = True
        for scope in await _scopes(store, settings, tenant=tenant, user=user):
            looked_at = await looked_at_revision(store, scope, tenant=tenant, user=user)
            new = await store.users.feedback_after(looked_at, tenant=tenant, user=user) if head > looked_at else 0
            if new:
                settled = False
                found.setdefault((tenant, scope), []).append((new, since))
        if settled:
            await store.jobs.settle(tenant=tenant, user=user, revision=head, now=now)
    return found


async def _scopes(store: Store, settings: Settings, *, tenant: str, user: str) -> list[Scope]:
    """The scopes that a user's feedback counts towards, of the kinds that the sweep consolidates."""
    cohort = await store.users.cohort(tenant=tenant, user=user) if "cohort" in settings.sweep_scopes else None
    scopes = [Scope(kind="user", name=user), Scope(kind="global")]
    if cohort:
        scopes.append(Scope(kind="cohort", name=cohort))
    return [scope for scope in scopes if scope.kind in settings.sweep_scopes]


async def looked_at_revision(store: Store, scope: Scope, *, tenant: str, user: str) -> int:
    """The revision of a user's log up to which the scope's version in use, or its last attempt, has looked."""
    state = await store.scopes.state(scope, tenant=tenant)
    consolidated = 0
    if state.active != BASE:
        consolidated = (await store.scopes.version(state.active, scope, tenant=tenant)).watermark.get(user, 0)
    return max(consolidated, state.attempted.get(user, 0))
