"""Jobs over real Redis: what each works on, and its one end. Training is a small function here."""

import asyncio
import time
from collections.abc import Sequence

import httpx
import pytest
from redis import Redis

from service.domain.feedback import BASE
from service.domain.slow_weights import Scope
from service.errors import JobFailed, VerifiersMissing
from service.settings import Settings
from service.store import Store
from service.store.keys import ScopeKeys
from tests.dialogue import optimized
from tests.factories import ALICE, give_feedback, one_by_one, outcome_of, rejected
from tests.fakes import FakeVllm
from tests.jobs import Trainer, active, opened, run, run_all, user
from workers.consolidation.work import Ends, OnProgress, Outcome, Progress, Work
from workers.lease import line_of

COHORT, EVERYBODY = Scope(kind="cohort", name="legal"), Scope(kind="global")


async def test_a_job_that_succeeds_promotes_its_version(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    for n in (1, 2, 3):
        await give_feedback(store, n)
    trainer = Trainer(vllm)

    ended = await run(await opened(store), store, settings, trainer)

    assert (ended.state, ended.attempts, ended.loss, ended.beta) == ("promoted", 1, 0.5, 0.7)
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
        (JobFailed("the loss is not a number at step 7"), "the loss is not a number"),
        (VerifiersMissing("install the extra"), "install the extra"),
        (RuntimeError("boom"), "unexpected RuntimeError: boom"),
    ],
)
async def test_a_job_that_fails_says_why_and_frees_the_scope(
    store: Store, settings: Settings, error: Exception, reason: str
) -> None:
    def fail(works: Sequence[Work], progress: OnProgress) -> Ends:
        raise error

    await give_feedback(store, 1)
    ended = await run(await opened(store), store, settings, fail)
    assert ended.state == "failed"
    assert ended.reasons[0].startswith(reason)
    assert await active(store) == BASE
    await opened(store)


async def test_a_scope_without_feedback_fails_with_the_reason(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    ended = await run(await opened(store), store, settings, Trainer(vllm))
    assert (ended.state, ended.reasons) == ("failed", ("there is no feedback in user:alice",))


async def test_a_version_that_vllm_can_not_serve_is_not_promoted(store: Store, settings: Settings) -> None:
    await give_feedback(store, 1)
    ended = await run(await opened(store), store, settings, one_by_one(lambda work, _: outcome_of(work)))
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


async def test_a_job_expires_only_after_its_end(store: Store, settings: Settings, redis_url: str) -> None:
    job = await opened(store)
    key = ScopeKeys(ALICE, tenant="acme").job(job.id)
    with Redis.from_url(redis_url) as redis:
        assert redis.ttl(key) == -1
        assert await store.jobs.acquire(job, token="worker", lease_seconds=60)
        assert await store.jobs.renew(job, token="worker", lease_seconds=60)
        assert redis.ttl(key) == -1
        failed = job.model_copy(update={"state": "failed"})
        assert await store.jobs.finish(failed, token="worker", attempted=None) == "ok"
        assert 0 < redis.ttl(key) <= settings.job_retention_seconds


async def test_a_job_whose_record_is_gone_keeps_no_scope_from_a_new_one(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, redis_url: str
) -> None:
    gone = await opened(store)
    with Redis.from_url(redis_url) as redis:
        assert redis.delete(ScopeKeys(ALICE, tenant="acme").job(gone.id)) == 1

    reply = await client.post("/v1/admin/consolidations", json={"scope": str(ALICE)}, headers=as_admin)

    assert reply.status_code == 202, reply.text
    assert [job.id for job, _ in await store.jobs.unfinished()] == [reply.json()["id"]]
    assert (await store.backlog.queues(now=time.time()))["consolidations"].waiting == 1


async def test_a_cohorts_job_works_on_all_its_members_and_serves_them(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    for name in ("alice", "bob", "carol"):
        await give_feedback(store, 1, user=name)
    for name in ("alice", "bob", "newcomer"):
        await store.users.set_cohort("legal", tenant="acme", user=name)
    trainer = Trainer(vllm)

    ended = await run(await opened(store, COHORT), store, settings, trainer)

    assert set(trainer.works[0].users) == {"alice", "bob"}
    served = await store.users.chat_state(tenant="acme", user="newcomer")
    assert served.adapters == ((COHORT, ended.version),)
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


async def test_after_a_rollback_a_candidate_is_judged_with_the_contexts_that_serve_again(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await give_feedback(store, 1)

    async def contexts() -> tuple[str, ...]:
        trainer = Trainer(vllm, lambda _: rejected("no better"))
        await run(await opened(store), store, settings, trainer)
        return tuple(member.id for member in trainer.works[-1].users["alice"].fast_weights.population.members)

    of_base = await optimized(store, "Be brief.", user="alice")
    assert await contexts() == tuple(member.id for member in of_base.members)
    await run(await opened(store), store, settings, Trainer(vllm))
    # Nothing was optimized under the new version yet, so it serves without a member.
    version = await active(store)
    assert await contexts() == ()
    under_it = await optimized(store, "Be long.", user="alice", adapter=version)
    assert await contexts() == tuple(member.id for member in under_it.members)
    await store.scopes.rollback(ALICE, tenant="acme", to=BASE, actor="admin", reason="worse", now=5.0)
    assert await contexts() == tuple(member.id for member in of_base.members)


async def test_several_scopes_are_trained_by_one_call_and_each_has_its_own_end(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    for name in ("alice", "bob", "carol", "dave"):
        await give_feedback(store, 1, user=name)
    jobs = [await opened(store, user(name)) for name in ("alice", "bob", "carol", "dave", "nobody")]
    calls = []

    def train(work: Work, progress: OnProgress) -> Outcome:
        if work.scope.name == "bob":
            raise JobFailed("too little data")
        if work.scope.name == "dave":
            # Published, as it says, but vLLM does not know it.
            return outcome_of(work)
        return trainer.train(work, progress)

    def consolidate(works: Sequence[Work], progress: OnProgress) -> Ends:
        calls.append([work.scope.name for work in works])
        return one_by_one(train)(works, progress)

    trainer = Trainer(vllm, lambda work: rejected("no better") if work.scope.name == "carol" else outcome_of(work))
    ended = await run_all([*jobs, jobs[0]], store, settings, consolidate)

    assert calls == [["alice", "bob", "carol", "dave"]]
    assert [job.state for job in ended] == ["promoted", "failed", "rejected", "failed", "failed", "promoted"]
    reasons = [" ".join(job.reasons) for job in ended[1:5]]
    assert reasons[:2] == ["too little data", "no better"]
    assert "vLLM could not serve" in reasons[2]
    assert "no feedback in user:nobody" in reasons[3]
    assert await store.jobs.unfinished() == []


async def test_an_error_that_nobody_foresaw_fails_all_that_had_not_ended(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await give_feedback(store, 1)
    await give_feedback(store, 1, user="bob")
    jobs = [await opened(store, user(name)) for name in ("alice", "bob", "nobody")]

    def explode(works: Sequence[Work], progress: OnProgress) -> Ends:
        raise MemoryError("no room")

    ended = await run_all(jobs, store, settings, explode)
    assert [job.state for job in ended] == ["failed"] * 3
    assert [("MemoryError: no room" in job.reasons[0]) for job in ended] == [True, True, False]
    assert await store.jobs.unfinished() == []


async def test_a_job_that_the_training_forgets_fails_and_says_so(store: Store, settings: Settings) -> None:
    await give_feedback(store, 1)
    ended = await run(await opened(store), store, settings, lambda works, progress: {})
    assert (ended.state, ended.reasons) == ("failed", ("the training handed back no end for this job",))


async def test_a_base_that_can_not_be_loaded_fails_all_jobs_with_its_reason(store: Store, settings: Settings) -> None:
    await give_feedback(store, 1)
    loads = []

    def broken() -> Work:
        loads.append(1)
        raise JobFailed("the base model is not there")

    jobs = [await opened(store, user(name)) for name in ("alice", "bob")]
    ended = await run_all(jobs, store, settings, one_by_one(lambda work, _: outcome_of(work)), base=broken)
    assert {(job.state, job.reasons) for job in ended} == {("failed", ("the base model is not there",))}
    assert len(loads) == 1


async def test_a_users_work_names_what_would_serve_them_without_an_adapter_of_their_own(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await give_feedback(store, 1)
    await store.users.set_cohort("legal", tenant="acme", user="alice")
    trainer, found = Trainer(vllm, lambda work: outcome_of(work, content=str(work.scope.kind).encode().hex())), []
    for scope in (user("alice"), EVERYBODY, user("alice"), COHORT, user("alice")):
        await run(await opened(store, scope), store, settings, trainer)
        found.append(trainer.works[-1].pooled)
    everybodys, cohorts = await active(store, EVERYBODY), await active(store, COHORT)
    assert found == [BASE, BASE, everybodys, BASE, cohorts]


async def test_a_lease_that_ran_out_is_still_its_workers_until_another_has_the_job_or_has_ended_it(
    store: Store, redis_url: str
) -> None:
    job = await opened(store)

    async def renewed(token: str) -> bool:
        return await store.jobs.renew(job, token=token, lease_seconds=60)

    def run_out() -> None:
        with Redis.from_url(redis_url) as redis:
            assert redis.delete(ScopeKeys(ALICE, tenant="acme").lease) == 1

    assert await store.jobs.acquire(job, token="first", lease_seconds=60)
    run_out()
    assert await renewed("first")
    run_out()
    assert await store.jobs.acquire(job, token="second", lease_seconds=60)
    assert not await renewed("first")
    failed = job.model_copy(update={"state": "failed"})
    assert await store.jobs.finish(failed, token="first", attempted=None) == "lost"
    run_out()
    assert await store.jobs.finish(failed, token="second", attempted=None) == "ok"
    assert not await renewed("first")
    assert await store.jobs.finish(job, token="first", attempted=None) == "lost"
    assert await store.jobs.get(job.id, tenant="acme") == failed


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (Progress(stage="data"), "data"),
        (Progress(stage="measure", step=3), "measure 3"),
        (
            Progress(stage="train", step=10, steps=40, loss=0.4123, kl_text=0.0081, kl_chat=0.024, beta=0.5),
            "train █████░░░░░░░░░░░░░░░ 10/40, loss 0.412, KL text 0.0081 chat 0.0240 nats, beta 0.5",
        ),
    ],
)
def test_the_workers_log_says_where_a_job_is(progress: Progress, line: str) -> None:
    assert line_of(progress) == line
