"""Every move of a pointer has the populations of its scope scored again, over a real Redis."""

import time

import httpx
import pytest

from service.domain.slow_weights import Scope
from service.settings import Settings
from service.store import Store
from tests.dialogue import optimized, say
from tests.fakes import FakeVllm
from tests.integration.test_adapters import consolidate

LAWYERS, GLOBAL = Scope(kind="cohort", name="lawyers"), Scope(kind="global")


async def asked_for(store: Store) -> list[str]:
    """Users whose contexts are to be optimized now."""
    return sorted(user for _, user in await store.optimizations.due(now=time.time()))


async def with_populations(client: httpx.AsyncClient, store: Store, *users: str) -> None:
    for user in users:
        await say(client, user=user, comment="Use rhymes.")
        await optimized(store, user=user)


async def settled(store: Store, *users: str) -> None:
    for user in users:
        state = await store.users.fast_weights(tenant="acme", user=user)
        await store.optimizations.settle(tenant="acme", user=user, revision=state.revision)


async def test_a_promotion_by_a_job_asks_for_its_user_alone(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await with_populations(client, store, "alice", "bob")
    assert await asked_for(store) == []

    await consolidate(store, settings, vllm, content="ab")

    assert await asked_for(store) == ["alice"]


async def test_rollback_and_promotion_by_an_admin_ask_again(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm, as_admin: dict[str, str]
) -> None:
    await with_populations(client, store, "alice")
    version = await consolidate(store, settings, vllm, content="ab")
    await settled(store, "alice")

    await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "worse"}, headers=as_admin)
    assert await asked_for(store) == ["alice"]
    await settled(store, "alice")
    body = {"version": version.name, "reason": "better after all"}
    await client.post("/v1/admin/scopes/user:alice/promote", json=body, headers=as_admin)
    assert await asked_for(store) == ["alice"]


async def test_a_refused_move_asks_for_nothing(
    client: httpx.AsyncClient, store: Store, as_admin: dict[str, str]
) -> None:
    await with_populations(client, store, "alice")
    refused = await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "worse"}, headers=as_admin)
    assert refused.status_code == 409
    assert await asked_for(store) == []


@pytest.mark.parametrize(("scope", "users"), [(LAWYERS, ["bob", "carol"]), (GLOBAL, ["alice", "bob", "carol"])])
async def test_a_shared_pointer_asks_for_its_members_who_have_a_population(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm, scope: Scope, users: list[str]
) -> None:
    for user in ("bob", "carol", "dave"):
        await store.users.set_cohort("lawyers", tenant="acme", user=user)
    await with_populations(client, store, "alice", "bob", "carol")
    await say(client, user="dave", comment="Use rhymes.")

    await consolidate(store, settings, vllm, content="ab", scope=scope)

    assert await asked_for(store) == users


async def test_where_contexts_are_not_optimized_nothing_is_asked_for(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await with_populations(client, store, "alice")
    await consolidate(store, settings.model_copy(update={"optimize": False}), vllm, content="ab")
    assert await asked_for(store) == []
