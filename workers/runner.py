"""Does one consolidation job: under a lease, with its progress shown, ended exactly once whatever dies in between."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

from service.domain.feedback import BASE
from service.domain.slow_weights import AdapterVersion, Reject, Scope, TrainReport
from service.engine import Engine
from service.errors import EngineUnavailable, JobFailed, StoreUnavailable, UpstreamRejected
from service.rescoring import score_again
from service.settings import Settings
from service.store import Store
from service.store.jobs import Job, State
from service.store.scopes import AuditEntry
from workers.consolidation.work import OnProgress, Outcome, Progress, UserLog, Work

log = logging.getLogger(__name__)

Consolidate = Callable[[Work, OnProgress], Outcome]

# How often progress is shown; the lease is renewed with it, so never more than a third of it.
SHOW_SECONDS = 1.0
# What vLLM must generate with a new version before anybody is served by it.
PROBE_TOKENS = 4


class LeaseLost(Exception):
    """Another worker has taken the job over, or Redis was away for longer than the lease: this one must write nothing more."""


class JobRun:
    """One worker's hold on one job."""

    def __init__(self, job: Job, *, store: Store, settings: Settings) -> None:
        self.job = job
        self.token = uuid.uuid4().hex
        self._store = store
        self._settings = settings
        self._started = time.monotonic()
        self._lost = False

    def show(self, progress: Progress) -> None:
        """Called by the training thread at every step.

        Raises:
            LeaseLost: stop, somebody else does this job now.
            JobFailed: the job has run for longer than it may.
        """
        if self._lost:
            raise LeaseLost(self.job.id)
        limit = self._settings.job_limit_seconds
        if time.monotonic() - self._started > limit:
            raise JobFailed(
                f"stopped at {progress.stage} {progress.step}/{progress.steps}: over the limit of {limit} s"
            )
        shown = {"stage": progress.stage, "step": progress.step, "steps": progress.steps}
        measured = {"loss": progress.loss, "kl_text": progress.kl_text, "kl_chat": progress.kl_chat}
        self.update(**shown, **{name: value for name, value in measured.items() if value is not None})

    def update(self, **fields: Any) -> None:
        self.job = self.job.model_copy(update={**fields, "updated": time.time()})

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Keeps the lease alive and the job's record fresh while the body runs."""
        keeper = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            keeper.cancel()
            with suppress(asyncio.CancelledError):
                await keeper

    async def _keep(self) -> None:
        lease = self._settings.lease_seconds
        while not self._lost:
            try:
                self._lost = not await self._store.jobs.renew(self.job, token=self.token, lease_seconds=lease)
            except StoreUnavailable as error:
                # The lease may outlast the outage; if it does not, the next renewal says so.
                log.warning("job %s can't renew its lease: %s", self.job.id, error)
            await asyncio.sleep(min(SHOW_SECONDS, lease / 3))

    async def end(
        self,
        work: Work | None,
        state: State,
        *,
        reasons: tuple[str, ...] = (),
        report: TrainReport | None = None,
        promoted: AdapterVersion | None = None,
    ) -> Literal["ok", "moved", "barred"]:
        """Write the job's end, and with `promoted` put that version in use in the same step; the store's word on it.

        Raises:
            LeaseLost: another worker holds the job.
        """
        version = promoted.name if promoted else None
        self.update(state=state, stage="ended", reasons=reasons, report=report, version=version)
        outcome = await self._store.jobs.finish(
            self.job,
            token=self.token,
            attempted={user: user_log.head for user, user_log in work.users.items()} if work else None,
            version=promoted,
            audit=_audit(self.job, promoted) if promoted else None,
        )
        if outcome == "lost":
            raise LeaseLost(self.job.id)
        return outcome


def _audit(job: Job, version: AdapterVersion) -> AuditEntry:
    return AuditEntry(
        at=time.time(),
        action="promote",
        tenant=version.tenant,
        scope=version.scope,
        from_version=version.parent,
        to_version=version.name,
        actor=f"job {job.id}",
        reason="within the KL budget and better than the version in use on held-out feedback",
    )


async def run_job(job_id: str, *, store: Store, engine: Engine, settings: Settings, consolidate: Consolidate) -> None:
    """Do a job to its end, unless it has ended or another worker is at it."""
    job = await store.jobs.load(job_id)
    if job is None or job.ended:
        log.info("job %s needs nothing: %s", job_id, "it has ended" if job else "it is not known")
        return
    run = JobRun(job, store=store, settings=settings)
    if not await store.jobs.acquire(job, token=run.token, lease_seconds=settings.lease_seconds):
        log.info("job %s: another worker holds %s", job_id, job.scope)
        return
    # The record may have moved on between the first look and the lease.
    run.job = await store.jobs.load(job_id) or job
    if run.job.ended:
        await store.jobs.release(job, token=run.token)
        return
    run.update(state="running", stage="data", attempts=run.job.attempts + 1)
    try:
        async with run.held():
            await _consolidate(run, store=store, engine=engine, consolidate=consolidate)
    except LeaseLost:
        log.warning("job %s: the lease is gone, its next worker will end it", job_id)
        return
    if run.job.state == "promoted":
        await score_again(store, settings, Scope.parse(job.scope), tenant=job.tenant, now=time.time())


async def _consolidate(run: JobRun, *, store: Store, engine: Engine, consolidate: Consolidate) -> None:
    work: Work | None = None
    try:
        work = await gather(run.job, store)
        outcome = await asyncio.to_thread(consolidate, work, run.show)
        if outcome.version is None:
            reasons = outcome.decision.reasons if isinstance(outcome.decision, Reject) else ()
            await run.end(work, "rejected", reasons=reasons, report=outcome.report)
            return
        run.update(stage="probe", step=0, steps=0)
        await probe(engine, outcome.version)
        await _promote(run, work, outcome.version)
    except (JobFailed, StoreUnavailable) as error:
        log.error("job %s failed: %s", run.job.id, error)
        await run.end(work, "failed", reasons=(error.message,))
    except LeaseLost:
        raise
    except Exception as error:
        log.exception("job %s failed unexpectedly", run.job.id)
        reason = f"unexpected {type(error).__name__}: {str(error)[:500]} (the worker's log has the trace)"
        await run.end(work, "failed", reasons=(reason,))


async def _promote(run: JobRun, work: Work, version: AdapterVersion) -> None:
    outcome = await run.end(work, "promoted", report=version.report, promoted=version)
    refusals = {
        "moved": "the version in use was changed while this one was trained against it",
        "barred": "these very weights were rolled back before",
    }
    if outcome != "ok":
        await run.end(work, "rejected", reasons=(refusals[outcome],), report=version.report)


async def gather(job: Job, store: Store) -> Work:
    """All that a consolidation of the job's scope works on.

    Raises:
        JobFailed: nobody in the scope has given feedback.
    """
    scope = Scope.parse(job.scope)
    state = await store.scopes.state(scope, tenant=job.tenant)
    watermark: dict[str, int] = {}
    if state.active != BASE:
        watermark = (await store.scopes.version(state.active, scope, tenant=job.tenant)).watermark
    users: dict[str, UserLog] = {}
    for user in await store.members.of(scope, tenant=job.tenant):
        history = await store.users.log(tenant=job.tenant, user=user)
        if history.events:
            users[user] = UserLog.of(history.events, watermark=watermark.get(user, 0), fast_weights=history.fold())
    if not users:
        raise JobFailed(f"there is no feedback in {scope}")
    return Work(
        tenant=job.tenant,
        scope=scope,
        job=job.id,
        number=state.number + 1,
        parent=state.active,
        created=job.created,
        users=users,
    )


async def probe(engine: Engine, version: AdapterVersion) -> None:
    """Have vLLM load and use the version before anybody is served by it.

    Raises:
        JobFailed: vLLM is away, refuses it, or says nothing with it.
    """
    body = {
        "model": version.name,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": PROBE_TOKENS,
        "temperature": 0,
    }
    try:
        reply = await engine.complete(body, request_id=f"probe-{version.name}")
    except (UpstreamRejected, EngineUnavailable) as error:
        raise JobFailed(f"vLLM could not serve {version.name}: {error.message}") from error
    if reply["usage"]["completion_tokens"] == 0:
        raise JobFailed(f"vLLM generated nothing with {version.name}")
