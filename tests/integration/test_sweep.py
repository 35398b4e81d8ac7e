"""The sweep over real Redis: what is due, what was left behind, and how both are packed into tasks."""

import itertools
import time
from collections import Counter
from typing import Any

import httpx
import pytest
from hypothesis import given as given_to_hypothesis
from hypothesis import strategies as st
from redis import Redis

from service.domain.slow_weights import Scope
from service.settings import Settings
from service.store import Store, open_store
from service.store.connection import Connection
from service.store.keys import ScopeKeys, UserKeys, job_by_id
from tests.factories import ALICE, give_feedback, rejected
from tests.fakes import FakeVllm, RecordedJobs
from tests.jobs import Trainer, opened, run
from tests.waiting import until
from workers.sweep import packed, sweep

numbers = itertools.count(1)


def new_id() -> str:
    return f"s{next(numbers)}"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    few = {"due_feedbacks": 3, "user_min_feedbacks": 3, "due_age_seconds": 1000.0}
    return settings.model_copy(update={"lease_seconds": 0.6, **few})


async def test_the_sweep_queues_what_is_due_and_nothing_else(store: Store, settings: Settings) -> None:
    jobs = RecordedJobs()
    for n in (1, 2, 3):
        await give_feedback(store, n)
    await give_feedback(store, 1, user="bob")

    queued = await sweep(store, jobs, settings, now=10.0, unique=new_id)

    assert jobs.sent == [queued]
    [job_id] = queued
    assert (await store.jobs.get(job_id, tenant="acme")).scope == "user:alice"
    assert await sweep(store, jobs, settings, now=10.1, unique=new_id) == []


async def test_old_feedback_is_due_even_when_there_is_little(store: Store, settings: Settings) -> None:
    few = {"min_feedbacks": 2, "user_min_feedbacks": 2}
    patient = settings.model_copy(update={"due_feedbacks": 100, **few})
    await give_feedback(store, 1)
    await give_feedback(store, 2)
    assert await sweep(store, RecordedJobs(), patient, now=900.0, unique=new_id) == []
    assert len(await sweep(store, RecordedJobs(), patient, now=1100.0, unique=new_id)) == 1


async def test_after_a_consolidation_only_new_feedback_counts(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    for n in (1, 2, 3):
        await give_feedback(store, n)
    await run(await opened(store), store, settings, Trainer(vllm))
    assert await sweep(store, RecordedJobs(), settings, now=10.0, unique=new_id) == []
    assert await store.jobs.due() == []
    for n in (4, 5, 6):
        await give_feedback(store, n)
    assert len(await sweep(store, RecordedJobs(), settings, now=10.0, unique=new_id)) == 1


async def test_a_version_in_use_without_a_record_keeps_no_other_scope_waiting(
    store: Store, settings: Settings, vllm: FakeVllm, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    for n in (1, 2, 3):
        await give_feedback(store, n)
    await run(await opened(store), store, settings, Trainer(vllm))
    with Redis.from_url(redis_url) as redis:
        redis.delete(ScopeKeys(ALICE, tenant="acme").versions)
    for user, first in (("alice", 4), ("bob", 1)):
        for n in range(first, first + 3):
            await give_feedback(store, n, user=user)
    fresh = open_store(settings)

    [job] = await sweep(fresh, RecordedJobs(), settings, now=10.0, unique=new_id)

    assert (await fresh.jobs.get(job, tenant="acme")).scope == "user:bob"
    assert "user:alice of acme is not swept" in caplog.text
    await fresh.close()


@pytest.mark.parametrize(
    "record", ["{", '{"id": "x"}', '{"id":"x","tenant":"acme","scope":"team","created":0,"updated":0}']
)
async def test_a_job_whose_record_can_not_be_read_keeps_its_own_scope_waiting_alone(
    store: Store, settings: Settings, redis_url: str, caplog: pytest.LogCaptureFixture, record: str
) -> None:
    spoilt, left_behind = await opened(store), await opened(store, Scope(kind="user", name="bob"))
    with Redis.from_url(redis_url) as redis:
        redis.set(ScopeKeys(ALICE, tenant="acme").job(spoilt.id), record)
    for name in ("alice", "carol"):
        await given(store, name, 3)
    later = 100.0 + settings.job_limit_seconds + 1

    queued = await sweep(store, RecordedJobs(), settings, now=later, unique=new_id)

    scopes = {(await store.jobs.get(job, tenant="acme")).scope for job in queued}
    assert (left_behind.id in queued, scopes) == (True, {"user:bob", "user:carol"})
    assert f"job {spoilt.id} can't be done" in caplog.text
    # As an open job, and as alice's, whose feedback is due.
    assert (await store.counts.read())["undone", "sweep"] == 2


async def test_an_open_job_whose_record_can_not_be_read_is_a_conflict_until_it_is_deleted(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, redis_url: str
) -> None:
    spoilt = await opened(store)
    key = ScopeKeys(ALICE, tenant="acme").job(spoilt.id)

    async def start() -> httpx.Response:
        return await client.post("/v1/admin/consolidations", json={"scope": str(ALICE)}, headers=as_admin)

    with Redis.from_url(redis_url) as redis:
        redis.set(key, "{")
        refused = await start()
        redis.delete(key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "unreadable_consolidation")
    assert spoilt.id in refused.json()["error"]["message"]
    assert (await start()).status_code == 202


async def test_what_can_not_be_read_of_one_scope_keeps_no_other_waiting(
    store: Store, settings: Settings, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("alice", "bob", "carol"):
        await given(store, name, 3)
    with Redis.from_url(redis_url) as redis:
        redis.hset(ScopeKeys(ALICE, tenant="acme").scope, "attempted", "{")
        # Nothing in bob's log is an event of his, so nobody can tell what is due.
        log = UserKeys(tenant="acme", user="bob").log
        redis.xtrim(log, maxlen=0, approximate=False)
        redis.xadd(log, {"event": "{"}, id="4-0")

    [job] = await sweep(store, RecordedJobs(), settings, now=2000.0, unique=new_id)

    assert (await store.jobs.get(job, tenant="acme")).scope == "user:carol"
    assert all(f"user:{name} of acme is not swept" in caplog.text for name in ("alice", "bob"))
    assert {user for _, user, _ in await store.jobs.due()} == {"alice", "bob", "carol"}


async def test_a_rejected_attempt_waits_for_new_feedback(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    for n in (1, 2, 3):
        await give_feedback(store, n)
    await run(await opened(store), store, settings, Trainer(vllm, lambda _: rejected("no better")))
    assert await sweep(store, RecordedJobs(), settings, now=10.0, unique=new_id) == []


async def test_a_dead_workers_job_is_queued_again_once_its_lease_is_gone(store: Store, settings: Settings) -> None:
    await give_feedback(store, 1)
    job = await opened(store)
    await store.jobs.acquire(job, token="dead", lease_seconds=0.2)
    jobs = RecordedJobs()
    later = 100.0 + settings.lease_seconds + 1

    assert await sweep(store, jobs, settings, now=later, unique=lambda: "x") == []
    await until(lambda: sweep(store, jobs, settings, now=later, unique=lambda: "x"))
    assert jobs.sent == [[job.id]]


async def given(store: Store, user: str, count: int, *, first: int = 1) -> None:
    for n in range(first, first + count):
        await give_feedback(store, n, user=user)


async def test_a_users_own_adapter_waits_for_enough_feedback_in_all(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    strict = settings.model_copy(
        update={"user_min_feedbacks": 5, "min_feedbacks": 2, "sweep_scopes": ("user", "global")}
    )
    await given(store, "alice", 4)
    [first] = await sweep(store, RecordedJobs(), strict, now=10.0, unique=new_id)
    job = await store.jobs.get(first, tenant="acme")
    assert job.scope == "global"
    await run(job, store, strict, Trainer(vllm))

    # The fifth is enough for a first adapter of alice's own, and after that three new ones are for the next.
    await given(store, "alice", 1, first=5)
    [second] = await sweep(store, RecordedJobs(), strict, now=10.0, unique=new_id)
    job = await store.jobs.get(second, tenant="acme")
    assert job.scope == "user:alice"
    await run(job, store, strict, Trainer(vllm))
    await given(store, "alice", 2, first=6)
    assert {
        (await store.jobs.get(found, tenant="acme")).scope
        for found in await sweep(store, RecordedJobs(), strict, now=10.0, unique=new_id)
    } <= {"global"}
    await given(store, "alice", 1, first=8)
    due = await sweep(store, RecordedJobs(), strict, now=10.0, unique=new_id)
    assert "user:alice" in [(await store.jobs.get(found, tenant="acme")).scope for found in due]


async def test_due_scopes_are_packed_with_those_that_have_as_much_feedback(store: Store, settings: Settings) -> None:
    few_at_once = settings.model_copy(update={"scopes_per_job": 2})
    amounts = {"alice": 3, "bob": 9, "carol": 4, "dave": 8, "erin": 3}
    for user, count in amounts.items():
        await given(store, user, count)
    jobs = RecordedJobs()
    queued = await sweep(store, jobs, few_at_once, now=10.0, unique=new_id)

    users = {name: (await store.jobs.get(name, tenant="acme")).scope.removeprefix("user:") for name in queued}
    packs = [[amounts[users[name]] for name in pack] for pack in jobs.sent]
    assert packs == [[9, 8], [4, 3], [3]]
    assert [name for pack in jobs.sent for name in pack] == queued


async def test_jobs_that_were_left_behind_are_packed_again_with_what_is_new(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    few_at_once = settings.model_copy(update={"scopes_per_job": 3})
    for user in ("alice", "bob", "carol"):
        await given(store, user, 3)
    first, second = RecordedJobs(), RecordedJobs()
    now = time.time()
    await sweep(store, first, few_at_once, now=now, unique=new_id)
    [pack] = first.sent
    # Its worker ended one of them before it died.
    await run(await store.jobs.get(pack[1], tenant="acme"), store, few_at_once, Trainer(vllm))
    await given(store, "dave", 4)

    later = now + settings.lease_seconds + 1
    queued = await sweep(store, second, few_at_once, now=later, unique=new_id)
    assert sorted(queued[1:]) == sorted([pack[0], pack[2]])
    assert (await store.jobs.get(queued[0], tenant="acme")).scope == "user:dave"
    assert second.sent == [queued]


async def test_a_job_that_waits_behind_a_busy_worker_is_not_queued_twice(store: Store, settings: Settings) -> None:
    for user in ("alice", "bob"):
        await given(store, user, 3)
    now = time.time()
    alice, _ = sorted(await sweep(store, RecordedJobs(), settings, now=now, unique=new_id))
    busy = await store.jobs.get(alice, tenant="acme")
    assert await store.jobs.acquire(busy, token="a worker", lease_seconds=60)

    later = now + settings.lease_seconds + 1
    assert await sweep(store, RecordedJobs(), settings, now=later, unique=new_id) == []
    much_later = now + settings.job_limit_seconds + 1
    assert len(await sweep(store, RecordedJobs(), settings, now=much_later, unique=new_id)) == 1


async def test_a_job_whose_record_is_gone_stops_no_sweep_and_is_open_no_more(
    store: Store, settings: Settings, redis_url: str
) -> None:
    for user in ("alice", "bob"):
        await given(store, user, 3)
    await sweep(store, RecordedJobs(), settings, now=10.0, unique=new_id)
    with Redis.from_url(redis_url) as redis:
        gone = {job.id for job, _ in await store.jobs.unfinished()}
        assert redis.delete(*(job_by_id(name) or "" for name in gone)) == 2
    # Of bob nothing is due any more.
    await store.jobs.settle(tenant="acme", user="bob", revision=3, now=11.0)
    await given(store, "carol", 3)
    jobs = RecordedJobs()

    queued = await sweep(store, jobs, settings, now=12.0, unique=new_id)

    assert jobs.sent == [queued]
    assert {(await store.jobs.get(name, tenant="acme")).scope for name in queued} == {"user:alice", "user:carol"}
    assert (await store.backlog.queues(now=time.time()))["consolidations"].waiting == 2


class Counting(Connection):
    """A connection that counts how often each hash is read whole."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.effective_redis_url, timeout_seconds=settings.redis_timeout_seconds)
        self.reads: Counter[str | bytes | int | float] = Counter()

    async def call(self, *command: str | bytes | int | float) -> Any:
        if command[0] == "HGETALL":
            self.reads[command[1]] += 1
        return await super().call(*command)


async def test_a_sweep_reads_each_scope_once_however_many_users_it_has(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    every_kind = settings.model_copy(update={"sweep_scopes": ("user", "cohort", "global")})
    everybody = Scope(kind="global")
    for name in ("alice", "bob", "carol"):
        await given(store, name, 2)
        await store.users.set_cohort("legal", tenant="acme", user=name)
    await run(await opened(store, everybody), store, every_kind, Trainer(vllm))
    for name in ("alice", "bob", "carol"):
        await given(store, name, 1, first=3)
    await give_feedback(store, 1, user="alice", tenant="globex")
    counting = Counting(every_kind)
    counted = Store(counting, every_kind)

    queued = await sweep(counted, RecordedJobs(), every_kind, now=10.0, unique=new_id)
    await counted.close()

    # Three of the feedbacks are new to the global scope, which is too few.
    due = {(await store.jobs.get(name, tenant="acme")).scope for name in queued}
    assert due == {"user:alice", "user:bob", "user:carol", "cohort:legal"}
    shared = (("acme", everybody), ("acme", Scope(kind="cohort", name="legal")), ("globex", everybody))
    assert [counting.reads[ScopeKeys(scope, tenant=tenant).scope] for tenant, scope in shared] == [1, 1, 1]


@given_to_hypothesis(st.dictionaries(st.text(min_size=1), st.integers(0, 100)), st.integers(1, 32))
def test_packing_loses_and_doubles_nothing(amounts: dict[str, int], most: int) -> None:
    packs = packed(amounts, most=most)
    assert sorted(name for pack in packs for name in pack) == sorted(amounts)
    assert all(len(pack) == most for pack in packs[:-1])
    order = [amounts[name] for pack in packs for name in pack]
    assert order == sorted(order, reverse=True)
