"""One worker's hold on one consolidation job: the lease, the progress that people see, and the one end."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

from service.domain.slow_weights import AdapterVersion, Scope, TrainReport
from service.errors import JobFailed, StoreUnavailable
from service.settings import Settings
from service.store import Store
from service.store.jobs import Job, State
from service.store.scopes import AuditEntry
from workers.consolidation.work import LeaseLost, Progress, Work
from workers.stages import Stages

log = logging.getLogger(__name__)

# How often progress is shown; the lease is renewed with it, so never more than a third of it.
SHOW_SECONDS = 1.0
# How often a job of a task with a single one says in the worker's log where it is; of n, each says it so many times less often.
LOG_SECONDS = 15.0
BAR_CHARS = 20
MEASURED = {"loss", "kl_text", "kl_chat", "beta"}
"""Of a progress: what stays shown until it is measured anew."""

Written = Literal["ok", "moved", "barred"]


class JobRun:
    """One worker's hold on one job.

    Args:
        log_seconds: how often it says in the worker's log where it is.
    """

    def __init__(self, job: Job, *, store: Store, settings: Settings, log_seconds: float = LOG_SECONDS) -> None:
        self.job = job
        self.token = uuid.uuid4().hex
        self._store = store
        self._settings = settings
        self._log_seconds = log_seconds
        self._started = self._logged = time.monotonic()
        self._lost = False
        self._stages = Stages(job)

    @property
    def scope(self) -> Scope:
        return Scope.parse(self.job.scope)

    async def take_up(self) -> bool:
        """Whether this worker has the job from now on: it has not ended, and no other worker is at it."""
        lease = self._settings.lease_seconds
        if not await self._store.jobs.acquire(self.job, token=self.token, lease_seconds=lease):
            log.info("job %s: another worker holds %s", self.job.id, self.job.scope)
            return False
        # The record may have moved on between the first look and the lease.
        self.job = await self._store.jobs.load(self.job.id) or self.job
        if self.job.ended:
            await self._store.jobs.release(self.job, token=self.token)
            return False
        self.update(state="running", stage="data", reasons=(), attempts=self.job.attempts + 1)
        return True

    def show(self, progress: Progress) -> None:
        """Called by the training thread at every step.

        Raises:
            LeaseLost: stop, somebody else does this job now.
            JobFailed: the job has run for longer than it may.
        """
        if self._lost:
            raise LeaseLost(self.job.id)
        now, limit = time.monotonic(), self._settings.job_limit_seconds
        if now - self._started > limit:
            raise JobFailed(
                f"stopped at {progress.stage} {progress.step}/{progress.steps}: over the limit of {limit} s"
            )
        shown = {"stage": progress.stage, "step": progress.step, "steps": progress.steps}
        self.update(**shown, **progress.model_dump(include=MEASURED, exclude_none=True))
        if now - self._logged > self._log_seconds:
            self._logged = now
            log.info("job %s of %s: %s", self.job.id, self.job.scope, line_of(progress))

    def update(self, **fields: Any) -> None:
        if "stage" in fields:
            self._stages.enter(fields["stage"])
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
            self._stages.close(self.job.state)

    async def _keep(self) -> None:
        while not self._lost:
            try:
                kept = await self._store.jobs.renew(
                    self.job, token=self.token, lease_seconds=self._settings.lease_seconds
                )
                self._lost = not kept
            except StoreUnavailable as error:
                # Once Redis is back the next renewal says whether another worker was faster.
                log.warning("job %s can't renew its lease: %s", self.job.id, error)
            await asyncio.sleep(self._pause_seconds)

    @property
    def _pause_seconds(self) -> float:
        return min(SHOW_SECONDS, self._settings.lease_seconds / 3)

    async def end(
        self,
        work: Work | None,
        state: State,
        *,
        reasons: tuple[str, ...] = (),
        report: TrainReport | None = None,
        promoted: AdapterVersion | None = None,
    ) -> Written:
        """Write the job's end, and with `promoted` put that version in use in the same step; the store's word on it.

        While Redis is away it is tried again for the length of a lease.

        Raises:
            LeaseLost: another worker holds the job.
            StoreUnavailable: Redis stayed away; the job is left for the sweep.
        """
        facts = {"state": state, "stage": "ended", "reasons": reasons, "report": report}
        version = promoted.name if promoted else None
        # Not this run's record until it is written: the keeper must not show an end that has not come.
        ended = self.job.model_copy(update={**facts, "version": version, "updated": time.time()})
        attempted = {user: user_log.head for user, user_log in work.users.items()} if work else None
        audit = _audit(ended, promoted) if promoted else None
        written = await self._finish(ended, attempted=attempted, version=promoted, audit=audit)
        if written == "ok":
            self.job = ended
            await self._count(promoted)
        return written

    async def leave(self, reason: str) -> None:
        """Leave the job open for its next worker, and show why: the sweep queues it once the lease has run out.

        Raises:
            StoreUnavailable: Redis is away; the job is open all the same.
        """
        self.update(reasons=(reason,))
        await self._store.jobs.renew(self.job, token=self.token, lease_seconds=self._settings.lease_seconds)

    async def _count(self, promoted: AdapterVersion | None) -> None:
        """For the gateways' metrics."""
        counts = self._store.counts
        await counts.add_all({("consolidate", self.job.state): 1, **self._stages.counts()})
        if promoted is not None:
            await counts.add("move", "promote")
            measured = {"text": promoted.report.kl_text, "chat": promoted.report.kl_chat}
            kind = self.scope.kind
            bounds = {("kl", f"{kind}/{anchors}"): kl.upper95_nats for anchors, kl in measured.items()}
            budgets = {("kl_budget", f"{kind}/{anchors}"): kl.budget_nats for anchors, kl in measured.items()}
            await counts.set_all(bounds | budgets)

    async def _finish(self, ended: Job, **what: Any) -> Written:
        deadline = time.monotonic() + self._settings.lease_seconds
        while True:
            try:
                written = await self._store.jobs.finish(ended, token=self.token, **what)
                if written != "lost":
                    return written
                # It is this run's own end where Redis died between the script and its reply.
                if await self._store.jobs.load(ended.id) == ended:
                    return "ok"
                raise LeaseLost(ended.id)
            except StoreUnavailable as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("job %s can't be ended yet: %s", ended.id, error)
                await asyncio.sleep(self._pause_seconds)


def line_of(progress: Progress) -> str:
    """`train ██████░░░░░░░░░░░░░░ 12/40, loss 0.412, KL text 0.0081 chat 0.0240 nats, beta 0.5`."""
    words = [str(progress.stage)]
    if progress.steps:
        done = min(BAR_CHARS, BAR_CHARS * progress.step // progress.steps)
        words.append(f"{'█' * done}{'░' * (BAR_CHARS - done)} {progress.step}/{progress.steps}")
    elif progress.step:
        words.append(str(progress.step))
    measured = []
    if progress.loss is not None:
        measured.append(f"loss {progress.loss:.3f}")
    if progress.kl_text is not None and progress.kl_chat is not None:
        measured.append(f"KL text {progress.kl_text:.4f} chat {progress.kl_chat:.4f} nats")
    if progress.beta is not None:
        measured.append(f"beta {progress.beta:.3g}")
    return ", ".join([" ".join(words), *measured])


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
