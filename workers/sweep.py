"""The sweep: which scopes are due, and which jobs lost their worker, packed into tasks. Runs every few minutes on the control queue."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from service.domain.feedback import BASE
from service.domain.policy import is_due
from service.domain.slow_weights import Scope
from service.jobs import Jobs
from service.settings import Settings
from service.store import Store
from service.store.jobs import Job
from workers.undone import sparing_others

log = logging.getLogger(__name__)

RISKY_ATTEMPTS = 2

Pending = Mapping[tuple[str, Scope], list[tuple[int, float]]]
"""(tenant, scope) -> per user, the feedbacks that no consolidation has looked at and the time of the oldest."""


async def sweep(store: Store, jobs: Jobs, settings: Settings, *, now: float, unique: Callable[[], str]) -> list[str]:
    """Queue what is due and what was left behind, scopes with similar amounts of feedback in one task.

    What is wrong with one user, scope or job is told and counted at every sweep, and the others are swept.

    Returns:
        The ids of the jobs that were queued.

    Raises:
        StoreUnavailable: Redis is away.
    """
    found = await _left_behind(store, settings, now=now)
    waiting = await _pending(store, settings, now=now)
    for (tenant, scope), users in waiting.items():
        async with _sparing_others(store, scope, tenant=tenant):
            if await _is_due(store, settings, scope, users, tenant=tenant, now=now):
                job, opened = await store.jobs.open(scope, tenant=tenant, unique=unique(), now=now)
                if opened:
                    log.info("%s of %s is due with %d feedbacks: job %s", scope, tenant, _amount(users), job.id)
                    found.append(job)
    amounts = {job.id: _amount(waiting.get((job.tenant, Scope.parse(job.scope)), [])) for job in found}
    # What two workers have died at may be what kills them: it takes no others along.
    alone = [job.id for job in found if job.attempts >= RISKY_ATTEMPTS]
    sturdy = {job_id: amount for job_id, amount in amounts.items() if job_id not in alone}
    packs = packed(sturdy, most=settings.scopes_per_job) + [[job_id] for job_id in alone]
    for pack in packs:
        await jobs.consolidate(pack)
    await store.counts.set_all({("sweep", ""): now})
    return [job_id for pack in packs for job_id in pack]


def _sparing_others(store: Store, scope: Scope, *, tenant: str) -> AbstractAsyncContextManager[None]:
    return sparing_others(store, "sweep", "%s of %s is not swept", scope, tenant)


def packed(amounts: Mapping[str, int], *, most: int) -> list[list[str]]:
    """Jobs in groups of at most `most`, by how much feedback each has: who trains side by side waits for the slowest."""
    order = sorted(amounts, key=lambda job_id: (-amounts[job_id], job_id))
    return [order[start : start + most] for start in range(0, len(order), most)]


def _amount(users: Sequence[tuple[int, float]]) -> int:
    return sum(count for count, _ in users)


async def _is_due(
    store: Store, settings: Settings, scope: Scope, users: Sequence[tuple[int, float]], *, tenant: str, now: float
) -> bool:
    pending = total = _amount(users)
    own = scope.kind == "user"
    if own and pending < settings.user_min_feedbacks:
        total = (await store.users.fast_weights(tenant=tenant, user=scope.name)).clock
    return is_due(
        pending=pending,
        total=total,
        oldest_age_seconds=now - min(since for _, since in users),
        due_feedbacks=settings.due_feedbacks,
        due_age_seconds=settings.due_age_seconds,
        min_feedbacks=settings.min_feedbacks,
        min_total=settings.user_min_feedbacks if own else settings.min_feedbacks,
    )


async def _left_behind(store: Store, settings: Settings, *, now: float) -> list[Job]:
    """Open jobs that no worker holds and that have not moved for a lease: their worker, or their message, is gone.

    While workers are busy, one that none has taken up yet is in the queue behind theirs, unless it has been there for too long.
    """
    unfinished, left = await store.jobs.unfinished(), []
    busy = any(held for _, held in unfinished)
    for job, held in unfinished:
        waits = busy and job.state == "queued"
        if not held and now - job.updated > (settings.job_limit_seconds if waits else settings.lease_seconds):
            log.warning("job %s of %s is %s and no worker holds it: queued again", job.id, job.scope, job.state)
            left.append(job)
    return left


async def _pending(store: Store, settings: Settings, *, now: float) -> Pending:
    found: dict[tuple[str, Scope], list[tuple[int, float]]] = {}
    # A shared scope names all its users, so it is not read again for each of them; None where it can't be read.
    known: dict[tuple[str, Scope], Mapping[str, int] | None] = {}
    for tenant, user, since in await store.jobs.due():
        async with _sparing_others(store, Scope(kind="user", name=user), tenant=tenant):
            head = await store.jobs.head(tenant=tenant, user=user)
            settled = True
            for scope in await _scopes(store, settings, tenant=tenant, user=user):
                if (tenant, scope) not in known:
                    known[tenant, scope] = None
                    async with _sparing_others(store, scope, tenant=tenant):
                        known[tenant, scope] = await looked_at_revisions(store, scope, tenant=tenant)
                revisions = known[tenant, scope]
                looked_at = revisions.get(user, 0) if revisions is not None else head
                new = await store.users.feedback_after(looked_at, tenant=tenant, user=user) if head > looked_at else 0
                if new:
                    found.setdefault((tenant, scope), []).append((new, since))
                settled = settled and revisions is not None and not new
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


async def looked_at_revisions(store: Store, scope: Scope, *, tenant: str) -> Mapping[str, int]:
    """User id -> revision of the log up to which the scope's version in use, or its last attempt, has looked."""
    state = await store.scopes.state(scope, tenant=tenant)
    if state.active == BASE:
        return state.attempted
    consolidated = (await store.scopes.version(state.active, scope, tenant=tenant)).watermark
    users = consolidated.keys() | state.attempted.keys()
    return {user: max(consolidated.get(user, 0), state.attempted.get(user, 0)) for user in users}
