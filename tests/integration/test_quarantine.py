"""Adapters under a base model that is not theirs, over real Redis: none serves, and the next consolidation starts anew."""

import json
from collections.abc import Callable

import httpx
import pytest
from redis import Redis

from service.domain.feedback import BASE
from service.domain.slow_weights import Scope
from service.settings import Settings
from service.store import Store, open_store
from service.store.keys import ScopeKeys
from service.store.scopes import ScopeState, ScopeStore
from tests.factories import ALICE, LOADED_BASE, give_feedback, outcome_of
from tests.fakes import MODEL, FakeVllm, RecordedJobs
from tests.integration.test_retention import publishing
from tests.jobs import Trainer, active, opened, run, run_all, user
from workers.consolidation.work import Outcome, Work
from workers.quarantine import HashedBase, quarantine_all
from workers.sweep import sweep

OTHER_BASE = HashedBase(MODEL, "1" * 64)


def on_other_base(work: Work) -> Outcome:
    outcome = outcome_of(work, content="ef")
    assert outcome.version is not None
    version = outcome.version.model_copy(update={"base_sha256": OTHER_BASE.sha256})
    return outcome.model_copy(update={"version": version})


async def test_a_version_of_another_base_is_barred_and_the_base_serves_at_the_next_job(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await give_feedback(store, 1)
    first = await run(await opened(store), store, settings, Trainer(vllm))
    trainer = Trainer(vllm, on_other_base)

    [second] = await run_all([await opened(store)], store, settings, trainer, base=lambda: OTHER_BASE)

    assert [(work.parent, work.users["alice"].watermark) for work in trainer.works] == [(BASE, 0)]
    assert await active(store) == second.version
    state = await store.scopes.state(ALICE, tenant="acme")
    assert state.barred == {first.version}
    entry = (await store.scopes.audit(tenant="acme", limit=10))[1]
    assert (entry.action, entry.from_version, entry.to_version) == ("quarantine", first.version, BASE)
    assert "SHA-256 000000000000…" in entry.reason
    assert "111111111111…" in entry.reason


async def test_a_shared_version_of_another_base_is_no_start_for_a_users_own(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    everybody = Scope(kind="global")
    await give_feedback(store, 1)
    await run(await opened(store, everybody), store, settings, Trainer(vllm))
    trainer = Trainer(vllm, on_other_base)
    await run_all([await opened(store)], store, settings, trainer, base=lambda: OTHER_BASE)
    assert trainer.works[0].pooled == BASE
    assert await active(store, everybody) == BASE


async def test_at_a_workers_start_every_scope_is_looked_at(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    for name in ("alice", "bob"):
        await give_feedback(store, 1, user=name)
    make: Callable[[Work], Outcome] = publishing(settings)
    for scope in (user("alice"), user("bob"), Scope(kind="global")):
        await run(await opened(store, scope), store, settings, Trainer(vllm, make))

    assert await quarantine_all(store, settings, base=lambda: LOADED_BASE, now=1.0) == 0
    assert await quarantine_all(store, settings, base=lambda: OTHER_BASE, now=2.0) == 3
    assert await quarantine_all(store, settings, base=lambda: OTHER_BASE, now=3.0) == 0

    chat = {"model": MODEL, "messages": [{"role": "user", "content": "What is a noun?"}]}
    reply = await client.post("/v1/chat/completions", json=chat)
    assert (reply.headers["x-fastslow-adapter"], vllm.last["model"]) == (BASE, MODEL)


async def in_use_by(names: tuple[str, ...], store: Store, settings: Settings, vllm: FakeVllm) -> None:
    """Each of the users has a version of their own in use."""
    trainer = Trainer(vllm, publishing(settings))
    for name in names:
        await give_feedback(store, 1, user=name)
        await run(await opened(store, user(name)), store, settings, trainer)


class Moving(ScopeStore):
    """A store whose pointer of one scope an admin moves back as soon as it was read."""

    moved: Scope | None = None

    async def state(self, scope: Scope, *, tenant: str) -> ScopeState:
        found = await super().state(scope, tenant=tenant)
        if self.moved is None and found.active != BASE:
            self.moved = scope
            await self.rollback(scope, tenant=tenant, to=BASE, actor="admin", reason="worse", now=1.0)
        return found


async def test_a_pointer_that_moves_meanwhile_keeps_no_other_scope_on_another_base(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    names = ("alice", "bob", "carol")
    await in_use_by(names, store, settings, vllm)
    store.scopes = Moving(store.connection)

    assert await quarantine_all(store, settings, base=lambda: OTHER_BASE, now=2.0) == 2

    assert [await active(store, user(name)) for name in names] == [BASE] * 3


async def test_a_scope_that_can_not_be_looked_at_is_told_and_keeps_no_other_on_another_base(
    store: Store, settings: Settings, vllm: FakeVllm, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("alice", "bob", "carol")
    await in_use_by(names, store, settings, vllm)
    for name in names[:2]:
        with Redis.from_url(redis_url) as redis:
            redis.delete(ScopeKeys(user(name), tenant="acme").versions)
    fresh = open_store(settings)

    assert await quarantine_all(fresh, settings, base=lambda: OTHER_BASE, now=2.0) == 1

    await fresh.close()
    assert await active(store, user("carol")) == BASE
    assert all(f"user:{name}" in caplog.text for name in names[:2])
    assert (await store.counts.read())["undone", "quarantine"] == 2


async def test_where_there_are_no_adapters_no_base_is_read(store: Store, settings: Settings) -> None:
    def read() -> HashedBase:
        raise AssertionError("gigabytes are hashed for nothing")

    assert await quarantine_all(store, settings, base=read, now=1.0) == 0


@pytest.mark.parametrize("base", [OTHER_BASE, HashedBase("another-name", LOADED_BASE.sha256)])
async def test_an_admin_can_not_move_to_a_version_of_another_base(
    client: httpx.AsyncClient,
    as_admin: dict[str, str],
    store: Store,
    settings: Settings,
    vllm: FakeVllm,
    base: HashedBase,
) -> None:
    await give_feedback(store, 1)
    first = await run(await opened(store), store, settings, Trainer(vllm))
    await store.scopes.note_base(base.name, base.sha256)
    await store.scopes.quarantine(ALICE, tenant="acme", actor="worker", now=1.0)
    body = {"version": first.version, "reason": "I want it"}

    refused = await client.post("/v1/admin/scopes/user:alice/promote", json=body, headers=as_admin)
    await store.scopes.note_base(LOADED_BASE.name, LOADED_BASE.sha256)
    allowed = await client.post("/v1/admin/scopes/user:alice/promote", json=body, headers=as_admin)

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "other_base")
    assert "start a consolidation instead" in json.dumps(refused.json())
    assert (allowed.status_code, await active(store)) == (200, first.version)


async def test_a_rollback_passes_over_versions_of_another_base(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await give_feedback(store, 1)
    first = await run(await opened(store), store, settings, Trainer(vllm))
    [second] = await run_all(
        [await opened(store)], store, settings, Trainer(vllm, on_other_base), base=lambda: LOADED_BASE
    )
    await store.scopes.note_base(OTHER_BASE.name, OTHER_BASE.sha256)
    assert (await store.scopes.version(second.version, ALICE, tenant="acme")).parent == first.version
    entry = await store.scopes.rollback(ALICE, tenant="acme", to=None, actor="a", reason="r", now=1.0)
    assert entry.to_version == BASE


async def test_the_feedback_that_a_quarantined_version_had_consolidated_is_due_again(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    few = settings.model_copy(update={"due_feedbacks": 3, "user_min_feedbacks": 3})
    for n in (1, 2, 3):
        await give_feedback(store, n)
    await run(await opened(store), store, few, Trainer(vllm))
    assert await sweep(store, RecordedJobs(), few, now=10.0, unique=lambda: "a") == []
    await store.scopes.note_base(OTHER_BASE.name, OTHER_BASE.sha256)
    await store.scopes.quarantine(ALICE, tenant="acme", actor="worker", now=11.0)
    assert len(await sweep(store, RecordedJobs(), few, now=12.0, unique=lambda: "b")) == 1
