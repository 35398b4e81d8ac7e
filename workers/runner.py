"""Does consolidation jobs, several side by side: under a lease each, with its progress shown, each ended exactly once whatever dies."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from service.domain.absorption import absorbed
from service.domain.affinity import affinity_of_scope
from service.domain.feedback import BASE
from service.domain.slow_weights import AdapterVersion, Reject, Scope
from service.engine import BACKGROUND_PRIORITY, Engine
from service.errors import EngineUnavailable, FastslowError, JobFailed, StoreUnavailable, UpstreamRejected
from service.rescoring import score_again
from service.settings import Settings
from service.store import Store
from service.store.jobs import Job
from workers.consolidation.work import Consolidate, Ends, LeaseLost, NotNow, Outcome, Progress, UserLog, Work
from workers.lease import LOG_SECONDS, JobRun
from workers.quarantine import LoadedBase, quarantine

log = logging.getLogger(__name__)

# What vLLM must generate with a new version before anybody is served by it.
PROBE_TOKENS = 4
# So many workers may die of a job, be killed in its time, or find away what its end needs, before it is given up.
MOST_ATTEMPTS = 4


async def run_jobs(
    job_ids: Sequence[str],
    *,
    store: Store,
    engine: Engine,
    settings: Settings,
    consolidate: Consolidate,
    base: Callable[[], LoadedBase],
    forget: Callable[[str], None],
) -> None:
    """Do jobs to their ends, but for those that have ended and those that another worker is at.

    Args:
        base: loads the base model, where it is not loaded yet; called in a thread, as `consolidate` is.
        forget: removes what is kept of a job's training for its next worker; called in a thread once the job has ended.
    """
    async with AsyncExitStack() as held:
        runs: dict[str, JobRun] = {}
        ids = dict.fromkeys(job_ids)
        for job_id in ids:
            if job := await _unfinished(job_id, store=store, settings=settings):
                run = JobRun(job, store=store, settings=settings, log_seconds=LOG_SECONDS * len(ids))
                if await run.take_up():
                    runs[job_id] = run
                    await held.enter_async_context(run.held())
        works = await _gathered(runs, store=store, settings=settings, base=base) if runs else {}
        ends = await _consolidated(runs, works, consolidate) if works else {}
        for job_id, end in ends.items():
            await _end(runs[job_id], works[job_id], end, engine=engine)
    for run in runs.values():
        if run.job.state == "promoted":
            await score_again(store, settings, run.scope, tenant=run.job.tenant, now=time.time())
    for run in runs.values():
        if run.job.ended:
            await asyncio.to_thread(forget, run.job.id)


async def _unfinished(job_id: str, *, store: Store, settings: Settings) -> Job | None:
    job = await store.jobs.load(job_id)
    if job is None or job.ended:
        log.info("job %s needs nothing: %s", job_id, "it has ended" if job else "it is not known")
        if job and job.state == "promoted":
            # The message came again: its worker may have died before it got to this.
            await score_again(store, settings, Scope.parse(job.scope), tenant=job.tenant, now=time.time())
        return None
    return job


async def _gathered(
    runs: Mapping[str, JobRun], *, store: Store, settings: Settings, base: Callable[[], LoadedBase]
) -> dict[str, Work]:
    """Each job's work; a job that has none, or whose work can't be read, is ended here."""
    works: dict[str, Work] = {}
    try:
        loaded = await asyncio.to_thread(base)
        await store.scopes.note_base(loaded.name, loaded.sha256)
    except Exception as error:
        for run in runs.values():
            async with ending(run):
                raise error
        return {}
    for job_id, run in runs.items():
        async with ending(run):
            for scope in await scopes_of(run.job, store):
                await quarantine(store, settings, scope, tenant=run.job.tenant, now=time.time())
            work = await gather(run.job, store)
            async with ending(run, work):
                if run.job.attempts > MOST_ATTEMPTS:
                    raise JobFailed(f"given up after {MOST_ATTEMPTS} workers died, were killed, or could not end it")
                works[job_id] = work
    return works


async def _consolidated(runs: Mapping[str, JobRun], works: Mapping[str, Work], consolidate: Consolidate) -> Ends:
    """How each job ended; all of them by the same error, where the process as a whole could not go on."""

    def show(job_id: str, progress: Progress) -> None:
        runs[job_id].show(progress)

    try:
        ends = await asyncio.to_thread(consolidate, list(works.values()), show)
    except LeaseLost as lost:
        return dict.fromkeys(works, lost)
    except FastslowError as failed:
        return dict.fromkeys(works, failed)
    except Exception as error:
        log.exception("jobs %s failed unexpectedly", ", ".join(works))
        return dict.fromkeys(works, JobFailed(_unexpected(error)))
    silent = JobFailed("the training handed back no end for this job")
    return {job_id: ends.get(job_id, silent) for job_id in works}


async def _end(run: JobRun, work: Work, end: Outcome | FastslowError | LeaseLost, *, engine: Engine) -> None:
    async with ending(run, work):
        if not isinstance(end, Outcome):
            raise end
        if end.version is None:
            reasons = end.decision.reasons if isinstance(end.decision, Reject) else ()
            await run.end(work, "rejected", reasons=reasons, report=end.report)
            return
        run.update(stage="probe", step=0, steps=0)
        await probe(engine, end.version)
        await _promote(run, work, end.version)


@asynccontextmanager
async def ending(run: JobRun, work: Work | None = None) -> AsyncIterator[None]:
    """Around a job's own part: an error there ends this job as failed and goes no further, for the others have ends of their own.

    A job whose lease is gone, or that can't be ended because Redis stays away, is left for the sweep; and so is one that can't be ended
    now for other reasons, a few times: it must not wait for new feedback because vLLM was restarted.
    """
    try:
        try:
            yield
        except LeaseLost:
            raise
        except FastslowError as error:
            if isinstance(error, NotNow) and run.job.attempts < MOST_ATTEMPTS:
                log.warning("job %s is left for its next worker: %s", run.job.id, error)
                await run.leave(error.message)
                return
            log.error("job %s failed: %s", run.job.id, error)
            await run.end(work, "failed", reasons=(error.message,))
        except Exception as error:
            log.exception("job %s failed unexpectedly", run.job.id)
            await run.end(work, "failed", reasons=(_unexpected(error),))
    except LeaseLost:
        log.warning("job %s: the lease is gone, its next worker will end it", run.job.id)
    except StoreUnavailable as error:
        log.error("job %s is left as it is, its next worker will end it: %s", run.job.id, error)


def _unexpected(error: Exception) -> str:
    return f"unexpected {type(error).__name__}: {str(error)[:500]} (the worker's log has the trace)"


async def _promote(run: JobRun, work: Work, version: AdapterVersion) -> None:
    outcome = await run.end(work, "promoted", report=version.report, promoted=version)
    refusals = {
        "moved": "the version in use was changed while this one was trained against it",
        "barred": "these very weights were rolled back before",
    }
    if outcome != "ok":
        await run.end(work, "rejected", reasons=(refusals[outcome],), report=version.report)


async def scopes_of(job: Job, store: Store) -> list[Scope]:
    """The scopes whose versions in use a job works with: its own and, of a user's, those that serve the user without one."""
    own = Scope.parse(job.scope)
    if own.kind != "user":
        return [own]
    cohort = await store.users.cohort(tenant=job.tenant, user=own.name)
    return [own, *([Scope(kind="cohort", name=cohort)] if cohort else []), Scope(kind="global")]


async def gather(job: Job, store: Store) -> Work:
    """All that a consolidation of the job's scope works on.

    Raises:
        JobFailed: nobody in the scope has given feedback.
    """
    scope, *wider = await scopes_of(job, store)
    state = await store.scopes.state(scope, tenant=job.tenant)
    current = await store.scopes.version(state.active, scope, tenant=job.tenant) if state.active != BASE else None
    serving = [(await store.scopes.state(other, tenant=job.tenant)).active for other in wider]
    pooled = next((name for name in serving if name != BASE), BASE)
    users: dict[str, UserLog] = {}
    for user in await store.members.of(scope, tenant=job.tenant):
        history = await store.users.log(tenant=job.tenant, user=user)
        if history.events:
            fast_weights = history.fold()
            if scope.kind == "user":
                # The newest population may be of a version that was rolled back.
                fast_weights = fast_weights.under(pooled if current is None else current.name)
            users[user] = UserLog.of(
                history.events,
                watermark=current.watermark.get(user, 0) if current else 0,
                fast_weights=fast_weights,
                absorbed=absorbed(current, fast_weights, user=user) if current else frozenset(),
            )
    if not users:
        raise JobFailed(f"there is no feedback in {scope}")
    budgets = await store.budgets.in_force(scope, tenant=job.tenant)
    return Work(
        tenant=job.tenant,
        scope=scope,
        job=job.id,
        number=state.number + 1,
        parent=state.active,
        pooled=pooled,
        kl_text_budget_nats=budgets.kl_text_nats,
        kl_chat_budget_nats=budgets.kl_chat_nats,
        norms=await store.norms.of(tenant=job.tenant, scopes=[scope, *wider]),
        created=job.created,
        users=users,
    )


async def probe(engine: Engine, version: AdapterVersion) -> None:
    """Have vLLM load and use the version before anybody is served by it: the user's replica, or one, and the others load it.

    Raises:
        JobFailed: vLLM refuses it, or says nothing with it.
        NotNow: vLLM is away.
    """
    body = {
        "model": version.name,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": PROBE_TOKENS,
        "temperature": 0,
        "priority": BACKGROUND_PRIORITY,
    }
    affinity = affinity_of_scope(Scope.parse(version.scope), tenant=version.tenant)
    try:
        reply = await engine.complete(body, request_id=f"probe-{version.name}", affinity=affinity)
    except UpstreamRejected as error:
        raise JobFailed(f"vLLM could not serve {version.name}: {error.message}") from error
    except EngineUnavailable as error:
        raise NotNow(f"vLLM could not serve {version.name}: {error.message}") from error
    if reply["usage"]["completion_tokens"] == 0:
        raise JobFailed(f"vLLM generated nothing with {version.name}")
    if not affinity:
        await engine.preload(version.name)
