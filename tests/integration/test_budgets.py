"""KL budgets of tenants and scopes, through the HTTP interface and into the work of a consolidation."""

from typing import Any

import httpx
import pytest

from service.domain.slow_weights import Scope
from service.settings import Settings
from service.store import Store
from tests.conftest import OTHER_TENANT_KEY
from tests.factories import ALICE, give_feedback
from tests.jobs import opened, user
from workers.runner import gather

DEFAULTS = {"kl_text_nats": 0.02, "kl_chat_nats": 0.10}
NONE = {"kl_text_nats": None, "kl_chat_nats": None}
TENANT, OWN = "/v1/admin/budgets", "/v1/admin/scopes/user:alice/budgets"


async def put(client: httpx.AsyncClient, path: str, headers: dict[str, str], **budgets: Any) -> dict[str, Any]:
    reply = await client.put(path, json=budgets, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def get(client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> dict[str, Any]:
    return (await client.get(path, headers=headers)).json()


async def test_a_scopes_own_budget_goes_before_the_tenants_and_that_before_the_settings(
    client: httpx.AsyncClient, as_admin: dict[str, str]
) -> None:
    assert await get(client, OWN, as_admin) == {
        "object": "budgets", "scope": "user:alice", "own": NONE, "in_force": DEFAULTS,
    }  # fmt: skip
    await put(client, TENANT, as_admin, kl_text_nats=0.01, kl_chat_nats=0.05)
    mine = await put(client, OWN, as_admin, kl_chat_nats=0.2)

    assert mine["own"] == {"kl_text_nats": None, "kl_chat_nats": 0.2}
    assert mine["in_force"] == {"kl_text_nats": 0.01, "kl_chat_nats": 0.2}
    tenants = await get(client, TENANT, as_admin)
    assert (tenants["scope"], tenants["in_force"]) == (None, {"kl_text_nats": 0.01, "kl_chat_nats": 0.05})
    # The global scope is a scope like others; it is not the tenant's default.
    await put(client, "/v1/admin/scopes/global/budgets", as_admin, kl_text_nats=0.001)
    assert (await get(client, OWN, as_admin))["in_force"]["kl_text_nats"] == 0.01


async def test_what_is_left_out_stays_and_null_goes_back(client: httpx.AsyncClient, as_admin: dict[str, str]) -> None:
    await put(client, OWN, as_admin, kl_text_nats=0.005, kl_chat_nats=0.2)
    await put(client, OWN, as_admin, kl_text_nats=0.004)
    assert (await get(client, OWN, as_admin))["own"] == {"kl_text_nats": 0.004, "kl_chat_nats": 0.2}
    after = await put(client, OWN, as_admin, kl_chat_nats=None)
    assert (after["own"], after["in_force"]["kl_chat_nats"]) == ({"kl_text_nats": 0.004, "kl_chat_nats": None}, 0.10)


async def test_a_consolidation_is_given_the_budgets_that_admins_have_set(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings
) -> None:
    for name in ("alice", "bob"):
        await give_feedback(store, 1, user=name)
    alice, bob = await opened(store, ALICE), await opened(store, user("bob"))

    async def given() -> list[tuple[float | None, float | None]]:
        works = [await gather(job, store) for job in (alice, bob)]
        return [(work.kl_text_budget_nats, work.kl_chat_budget_nats) for work in works]

    assert await given() == [(None, None)] * 2
    await put(client, TENANT, as_admin, kl_chat_nats=0.05)
    await put(client, OWN, as_admin, kl_text_nats=1 / 300)
    assert await given() == [(1 / 300, 0.05), (None, 0.05)]


async def test_a_budget_outlives_rollbacks_and_is_not_another_tenants(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store
) -> None:
    await put(client, OWN, as_admin, kl_text_nats=0.004)
    await put(client, TENANT, as_admin, kl_text_nats=0.01)
    globex = {"Authorization": f"Bearer {OTHER_TENANT_KEY}"}
    assert (await get(client, OWN, globex))["in_force"] == DEFAULTS
    assert (await get(client, TENANT, globex))["in_force"] == DEFAULTS
    state = await store.scopes.state(ALICE, tenant="acme")
    assert (state.active, state.number, state.barred, state.retired) == ("base", 0, frozenset(), frozenset())


async def test_the_audit_tells_who_set_what(client: httpx.AsyncClient, as_admin: dict[str, str]) -> None:
    await put(client, TENANT, as_admin, kl_text_nats=0.01)
    await put(client, OWN, as_admin, kl_text_nats=None, kl_chat_nats=0.2)
    entries = (await client.get("/v1/admin/audit", headers=as_admin)).json()["data"]
    assert [(e["action"], e["scope"], e["set_to"]) for e in entries] == [
        ("budgets", "user:alice", ["kl_text_nats=default", "kl_chat_nats=0.2"]),
        ("budgets", "", ["kl_text_nats=0.01"]),
    ]
    assert all(e["actor"].startswith("admin …") for e in entries)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"kl_text_nats": 0}, "kl_text_nats"),
        ({"kl_text_nats": -0.1}, "kl_text_nats"),
        ({"kl_chat_nats": 1.5}, "kl_chat_nats"),
        ({"kl_chat_nats": "0.1"}, "kl_chat_nats"),
        ({"kl_chat_nats": True}, "kl_chat_nats"),
        ({"kl": 0.1}, "kl"),
        ({}, None),
    ],
)
@pytest.mark.parametrize("path", [TENANT, OWN])
async def test_a_budget_that_is_none_is_refused_with_the_reason(
    client: httpx.AsyncClient, as_admin: dict[str, str], path: str, body: dict[str, Any], param: str | None
) -> None:
    reply = await client.put(path, json=body, headers=as_admin)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, param)
    assert (await get(client, path, as_admin))["own"] == NONE


@pytest.mark.parametrize(("path", "status"), [("/v1/admin/scopes/team:x/budgets", 400), (OWN, 403), (TENANT, 403)])
async def test_budgets_are_an_admins_and_a_real_scopes(
    client: httpx.AsyncClient, as_admin: dict[str, str], path: str, status: int
) -> None:
    headers = as_admin if status == 400 else {}
    assert (await client.get(path, headers=headers)).status_code == status
    assert (await client.put(path, json={"kl_text_nats": 0.01}, headers=headers)).status_code == status


async def test_a_users_id_with_a_slash_has_budgets_too(client: httpx.AsyncClient, as_admin: dict[str, str]) -> None:
    after = await put(client, "/v1/admin/scopes/user:org/alice/budgets", as_admin, kl_text_nats=0.01)
    assert after["scope"] == str(Scope(kind="user", name="org/alice"))
