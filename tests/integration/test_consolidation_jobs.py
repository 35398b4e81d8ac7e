"""Jobs over real Redis: the sweep, the lease, progress, the one end of each job whatever dies. Training is a small function here."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable

import pytest
from redis import Redis

from service.domain.feedback import BASE
from service.domain.slow_weights import Scope
from service.engine import VllmEngine
from service.errors import JobFailed
from service.settings import Settings
from service.store import Store
from service.store.jobs import Job
from service.store.keys import ScopeKeys
from tests.factories import ALICE, give_feedback, outcome_of, rejected
from tests.fakes import FakeVllm, RecordedJobs
from tests.waiting import until
from workers.consolidation.work import OnProgress, Outcome, Progress, Work
from workers.runner import Consolidate, run_job
from workers.sweep import sweep

unique = itertools.count(1)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"lease_seconds": 0.6, "due_feedbacks": 3, "due_age_seconds": 1000.0})


class Trainer:
    """Stands for the training: what it makes of the work is given, vLLM then knows the version."""

    def __init__(self, vllm: FakeVllm, make: Callable[[Work], Outcome] = outcome_of) -> None:
        self.works: list[Work] = []
        self._vllm = vllm
        self._make = make

    def __call__(self, work: Work, progress: OnProgress) -> Outcome:
        self.works.append(work)
        progress(Progress(stage="train", step=3, steps=40, loss=0.5, kl_text=0.01, kl_chat=0.02))
        outcome = self._make(work)
        if outcome.version is not None:
            self._vllm.adapters.add(outcome.version.name)
        return outcome


async def opened(store: Store, scope: Scope = ALICE) -> Job:
    job, new = await store.jobs.open(scope, tenant="acme", unique=f"job{next(unique)}", now=100.0)
    assert new
    return job


async def run(job: Job, store: Store, settings: Settings, consolidate: Consolidate) -> Job:
    engine = VllmEngine(settings)
    try:
        await run_job(job.id, store=store, engine=engine, settings=settings, consolidate=consolidate)
    finally:
        await engine.close()
    return await store.jobs.get(job.id, tenant="acme")


async def active(store: Store, scope: Scope = ALICE) -> str:
    return (await store.scopes.state(scope, tenant="acme")).active


async def test_a_job_that_succeeds_promotes_its_version(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    for n in (1, 2, 3):
        await give_feedback(store, n)
    trainer = Trainer(vllm)

    ended = await run(await opened(store), store, settings, trainer)

    assert (ended.state, ended.attempts, ended.loss) == ("promoted", 1, 0.5)
    assert ended.version == await active(store)
    [work] = trainer.works
    assert (work.parent, work.number, work.users["alice"].head) == (BASE, 1, 3)
    assert [i.id for i in work.users["alice"].interactions] == [f"chatcmpl-alice-{n}" for n in (1, 2, 3)]
    assert vllm.last["model"] == ended.version
    [entry] = await store.scopes.audit(tenant="acme", limit=10)
    assert (entry.action, entry.to_version, entry.actor) == ("promote", ended.version, f"job {ended.id}")


async def test_the_next_job_builds_on_the_version_in_use_and_its_watermark(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    trainer = Trainer(vllm)
    await give_feedback(store, 1)
    first = await run(await opened(store), store, settings, trainer)
    await give_feedback(store, 2)
    second = await run(await opened(store), store, settings, trainer)

    assert (trainer.works[1].parent, trainer.works[1].number) == (first.version, 2)
    assert trainer.works[1].users["alice"].watermark == 1
    assert await active(store) == second.version


async def test_a_rejected_candidate_leaves_the_version_in_use_and_says_why(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await give_feedback(store, 1)
    ended = await run(await opened(store), store, settings, Trainer(vllm, lambda _: rejected("no better")))
    assert (ended.state, ended.reasons, await active(store)) == ("rejected", ("no better",), BASE)
    assert ended.report is not None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (JobFailed("the loss is not a number at step 7"), "not a number"),
        (RuntimeError("boom"), "unexpected RuntimeError: boom"),
    ],
)
async def test_a_job_that_fails_says_why_and_frees_the_scope(
    store: Store, settings: Settings, error: Exception, reason: str
) -> None:
    def fail(work: Work, progress: OnProgress) -> Outcome:
        raise error

    await give_feedback(store, 1)
    ended = await run(await opened(store), store, settings, fail)
    assert ended.state == "failed"
    assert reason in ended.reasons[0]
    assert await active(store) == BASE
    await opened(store)


async def test_a_scope_without_feedback_fails_with_the_reason(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    ended = await run(await opened(store), store, settings, Trainer(vllm))
    assert (ended.state, ended.reasons) == ("failed", ("there is no feedback in user:alice",))


async def test_a_version_that_vllm_can_not_serve_is_not_promoted(store: Store, settings: Settings) -> None:
    await give_feedback(store, 1)
    ended = await run(await opened(store), store, settings, lambda work, _: outcome_of(work))
    assert (ended.state, await active(store)) == ("failed", BASE)
    assert "vLLM could not serve" in ended.reasons[0]


async def test_an_ended_job_is_not_done_again(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    trainer = Trainer(vllm)
    await give_feedback(store, 1)
    job = await opened(store)
    await run(job, store, settings, trainer)
    await run(job, store, settings, trainer)
    assert len(trainer.works) == 1
    assert len(await store.scopes.versions(tenant="acme")) == 1


async def test_one_scope_has_one_open_job(store: Store) -> None:
    first = await opened(store)
    second, new = await store.jobs.open(ALICE, tenant="acme", unique="another", now=100.0)
    assert (second.id, new) == (first.id, False)


class SlowTrainer(Trainer):
    """Starts, then waits until the test lets it go on."""

    def __init__(self, vllm: FakeVllm, make: Callable[[Work], Outcome] = outcome_of) -> None:
        super().__init__(vllm, make)
        self.started, self.go_on = threading.Event(), threading.Event()

    def __call__(self, work: Work, progress: OnProgress) -> Outcome:
        self.started.set()
        assert self.go_on.wait(20)
        return super().__call__(work, progress)


async def test_two_workers_for_one_job_end_it_once(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    await give_feedback(store, 1)
    slow, second = SlowTrainer(vllm), Trainer(vllm)
    job = await opened(store)
    first = asyncio.create_task(run(job, store, settings, slow))
    await asyncio.to_thread(slow.started.wait, 10)
    began = time.time()

    async def outlasted_its_first_lease() -> bool:
        [(_, held)] = await store.jobs.unfinished()
        return held and time.time() > began + 2 * settings.lease_seconds

    await until(outlasted_its_first_lease, seconds=10)
    await run(job, store, settings, second)
    assert second.works == []
    slow.go_on.set()
    assert (await first).state == "promoted"
    assert len(await store.scopes.versions(tenant="acme")) == 1


async def test_a_worker_that_lost_its_lease_writes_nothing(
    store: Store, settings: Settings, vllm: FakeVllm, redis_url: str
) -> None:
    """As after a long SIGSTOP: its lease ran out, another worker did the job, then it wakes up."""
    await give_feedback(store, 1)
    job = await opened(store)
    sleeper = SlowTrainer(vllm, lambda work: outcome_of(work, content="ef"))
    first = asyncio.create_task(run(job, store, settings, sleeper))
    await asyncio.to_thread(sleeper.started.wait, 10)
    with Redis.from_url(redis_url) as redis:
        assert redis.delete(ScopeKeys(ALICE, tenant="acme").lease) == 1

    ended = await run(job, store, settings, Trainer(vllm, lambda work: outcome_of(work, content="cd")))
    sleeper.go_on.set()
    await first

    assert ended.state == "promoted"
    assert [v.name for v in await store.scopes.versions(tenant="acme")] == [ended.version]
    assert await store.jobs.get(job.id, tenant="acme") == ended


async def test_the_sweep_queues_what_is_due_and_nothing_else(store: Store, settings: Settings) -> None:
    jobs = RecordedJobs()
    for n in (1, 2, 3):
        await give_feedback(store, n)
    await give_feedback(store, 1, user="bob")

    queued = await sweep(store, jobs, settings, now=10.0, unique=lambda: f"s{next(unique)}")

    assert jobs.sent == queued
    [job_id] = queued
    assert (await store.jobs.get(job_id, tenant="acme")).scope == "user:alice"
    assert await sweep(store, jobs, settings, now=10.1, unique=lambda: f"s{next(unique)}") == []


async def test_old_feedback_is_due_even_when_there_is_little(store: Store, settings: Settings) -> None:
    patient = settings.model_copy(update={"due_feedbacks": 100, "min_feedbacks": 2})
    await give_feedback(store, 1)
    await give_feedback(store, 2)
    assert await sweep(store, RecordedJobs(), patient, now=900.0, unique=lambda: f"s{next(unique)}") == []
    assert len(await sweep(store, RecordedJobs(), patient, now=1100.0, unique=lambda: f"s{next(unique)}")) == 1


async def test_after_a_consolidation_only_new_feedback_counts(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    for n in (1, 2, 3):
        await give_feedback(store, n)
    await run(await opened(store), store, settings, Trainer(vllm))
    assert await sweep(store, RecordedJobs(), settings, now=10.0, unique=lambda: f"s{next(unique)}") == []
    assert await store.jobs.due() == []
    for n in (4, 5, 6):
        await give_feedback(store, n)
    assert len(await sweep(store, RecordedJobs(), settings, now=10.0, unique=lambda: f"s{next(unique)}")) == 1


async def test_a_rejected_attempt_waits_for_new_feedback(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    for n in (1, 2, 3):
        await give_feedback(store, n)
    await run(await opened(store), store, settings, Trainer(vllm, lambda _: rejected("no better")))
    assert await sweep(store, RecordedJobs(), settings, now=10.0, unique=lambda: f"s{next(unique)}") == []


async def test_a_dead_workers_job_is_queued_again_once_its_lease_is_gone(store: Store, settings: Settings) -> None:
    await give_feedback(store, 1)
    job = await opened(store)
    await store.jobs.acquire(job, token="dead", lease_seconds=0.2)
    jobs = RecordedJobs()
    later = 100.0 + settings.lease_seconds + 1

    assert await sweep(store, jobs, settings, now=later, unique=lambda: "x") == []
    await until(lambda: sweep(store, jobs, settings, now=later, unique=lambda: "x"), seconds=5)
    assert jobs.sent == [job.id]


async def test_a_cohorts_job_works_on_all_its_members_and_serves_them(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    cohort = Scope(kind="cohort", name="legal")
    for user in ("alice", "bob", "carol"):
        await give_feedback(store, 1, user=user)
    for user in ("alice", "bob", "newcomer"):
        await store.users.set_cohort("legal", tenant="acme", user=user)
    trainer = Trainer(vllm)

    ended = await run(await opened(store, cohort), store, settings, trainer)

    assert set(trainer.works[0].users) == {"alice", "bob"}
    served = await store.users.chat_state(tenant="acme", user="newcomer")
    assert served.adapters == ((cohort, ended.version),)
    assert (await store.users.chat_state(tenant="acme", user="carol")).adapters == ()
    assert (await store.users.chat_state(tenant="globex", user="newcomer")).adapters == ()


async def test_a_candidate_is_not_promoted_over_a_pointer_that_moved(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await give_feedback(store, 1)
    await run(await opened(store), store, settings, Trainer(vllm))
    await give_feedback(store, 2)
    loop = asyncio.get_running_loop()

    def while_an_admin_rolls_back(work: Work) -> Outcome:
        rollback = store.scopes.rollback(ALICE, tenant="acme", to=None, actor="admin", reason="worse", now=5.0)
        asyncio.run_coroutine_threadsafe(rollback, loop).result(10)
        return outcome_of(work, content="cd")

    ended = await run(await opened(store), store, settings, Trainer(vllm, while_an_admin_rolls_back))
    assert (ended.state, await active(store)) == ("rejected", BASE)
    assert "was changed while" in ended.reasons[0]


async def test_weights_that_were_rolled_back_are_not_promoted_again(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await give_feedback(store, 1)
    first = await run(await opened(store), store, settings, Trainer(vllm))
    await store.scopes.rollback(ALICE, tenant="acme", to=None, actor="admin", reason="worse", now=5.0)
    again = await run(await opened(store), store, settings, Trainer(vllm))
    other = await run(await opened(store), store, settings, Trainer(vllm, lambda work: outcome_of(work, content="cd")))
    assert (again.state, again.reasons) == ("rejected", ("these very weights were rolled back before",))
    assert other.state == "promoted"
    assert other.version != first.version
