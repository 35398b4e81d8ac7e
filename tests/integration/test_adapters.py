"""Serving adapter versions and moving between them, through the HTTP interface."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from service.domain.slow_weights import AdapterVersion, Scope
from service.settings import Settings
from service.store import Store
from tests.conftest import OTHER_TENANT_KEY
from tests.factories import ALICE, outcome_of
from tests.fakes import MODEL, FakeVllm, RecordedJobs
from tests.jobs import Trainer, opened, run
from tests.waiting import until

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "What is a noun?"}]}


async def teach(client: httpx.AsyncClient, comment: str) -> str:
    """Give feedback; the id of the guideline it made."""
    completion = (await client.post("/v1/chat/completions", json=CHAT)).json()
    await client.post("/v1/feedback", json={"interaction_id": completion["id"], "comment": comment})
    items = (await client.get("/v1/users/alice/context")).json()["items"]
    return next(i["id"] for i in items if i["text"] == comment)


async def consolidate(
    store: Store,
    settings: Settings,
    vllm: FakeVllm,
    *,
    content: str,
    absorbed: tuple[str, ...] = (),
    scope: Scope = ALICE,
) -> AdapterVersion:
    """A promoted version, by the job's real path with a stand-in for the training alone."""

    trainer = Trainer(vllm, lambda work: outcome_of(work, content=content, absorbed=absorbed))
    ended = await run(await opened(store, scope), store, settings, trainer)
    assert ended.version is not None, ended.reasons
    return await store.scopes.version(ended.version, scope, tenant="acme")


def rendered(vllm: FakeVllm) -> str:
    return " ".join(m["content"] for m in vllm.last["messages"])


async def test_the_version_in_use_serves_and_what_it_absorbed_leaves_the_context(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    absorbed = await teach(client, "Be brief.")
    await teach(client, "Rhyme.")
    version = await consolidate(store, settings, vllm, content="ab", absorbed=(absorbed,))

    response = await client.post("/v1/chat/completions", json=CHAT)

    assert response.headers["x-fastslow-adapter"] == vllm.last["model"] == version.name
    assert response.json()["model"] == MODEL
    assert "Rhyme." in rendered(vllm)
    assert "Be brief." not in rendered(vllm)
    items = (await client.get("/v1/users/alice/context")).json()["items"]
    assert [(i["text"], i["absorbed"], i["in_context"]) for i in items] == [
        ("Be brief.", True, False),
        ("Rhyme.", False, True),
    ]


async def test_what_the_adapter_absorbed_comes_back_when_the_user_says_it_again(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    brief, rhyme = await teach(client, "Be brief."), await teach(client, "Rhyme.")
    await consolidate(store, settings, vllm, content="ab", absorbed=(brief, rhyme))
    await client.post("/v1/chat/completions", json=CHAT)
    assert "Be brief." not in rendered(vllm)

    await teach(client, "Be brief.")

    await client.post("/v1/chat/completions", json=CHAT)
    assert "Be brief." in rendered(vllm)
    assert "Rhyme." not in rendered(vllm)
    items = (await client.get("/v1/users/alice/context")).json()["items"]
    assert [(i["text"], i["absorbed"], i["in_context"]) for i in items] == [
        ("Be brief.", False, True),
        ("Rhyme.", True, False),
    ]
    # A later version, which has seen that too, may absorb it for good.
    await consolidate(store, settings, vllm, content="cd", absorbed=(brief, rhyme))
    await client.post("/v1/chat/completions", json=CHAT)
    assert "Be brief." not in rendered(vllm)


async def test_a_rollback_is_in_force_for_the_next_request_and_brings_the_items_back(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    first_item = await teach(client, "Be brief.")
    first = await consolidate(store, settings, vllm, content="ab")
    second = await consolidate(store, settings, vllm, content="cd", absorbed=(first_item,))
    await client.post("/v1/chat/completions", json=CHAT)
    assert "Be brief." not in rendered(vllm)

    moved = await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "too terse"}, headers=as_admin)
    response = await client.post("/v1/chat/completions", json=CHAT)

    assert moved.status_code == 200
    assert (moved.json()["from_version"], moved.json()["to_version"]) == (second.name, first.name)
    assert response.headers["x-fastslow-adapter"] == first.name
    assert "Be brief." in rendered(vllm)


async def test_a_rollback_through_one_gateway_is_in_force_on_every_other(
    client: httpx.AsyncClient,
    second_client: httpx.AsyncClient,
    as_admin: dict[str, str],
    store: Store,
    settings: Settings,
    vllm: FakeVllm,
) -> None:
    await teach(client, "Be brief.")
    version = await consolidate(store, settings, vllm, content="ab")
    before = await second_client.post("/v1/chat/completions", json=CHAT)
    await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "r"}, headers=as_admin)
    after = await second_client.post("/v1/chat/completions", json=CHAT)
    assert [r.headers["x-fastslow-adapter"] for r in (before, after)] == [version.name, "base"]


async def test_a_stream_in_flight_finishes_on_the_version_that_it_began_with(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await teach(client, "Be brief.")
    version = await consolidate(store, settings, vllm, content="ab")
    vllm.reply = lambda _: "one two three four five"
    vllm.piece_seconds = 0.05
    asked = len(vllm.bodies)
    stream = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": True}))

    async def begun() -> bool:
        return len(vllm.bodies) > asked

    await until(begun, every=0.005)
    moved = await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "r"}, headers=as_admin)
    assert not stream.done()
    response = await stream
    after = await client.post("/v1/chat/completions", json=CHAT)

    assert moved.status_code == 200
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == "one two three four five"
    inputs = await store.users.feedback_inputs(
        chunks[0]["id"], tenant="acme", user="alice", other_id=None, idempotency_key=None
    )
    assert inputs.interaction is not None
    assert inputs.interaction.version.adapter == version.name
    assert after.headers["x-fastslow-adapter"] == "base"


async def test_rolling_back_to_the_base_makes_the_feedback_due_again(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await teach(client, "Be brief.")
    await consolidate(store, settings, vllm, content="ab")

    await client.post("/v1/admin/scopes/user:alice/rollback", json={"to": "base", "reason": "worse"}, headers=as_admin)
    response = await client.post("/v1/chat/completions", json=CHAT)

    assert response.headers["x-fastslow-adapter"] == "base"
    assert [(tenant, user) for tenant, user, _ in await store.jobs.due()] == [("acme", "alice")]


async def test_two_rollbacks_go_back_two_versions_and_a_third_is_a_409(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await teach(client, "Be brief.")
    await consolidate(store, settings, vllm, content="ab")
    await consolidate(store, settings, vllm, content="cd")
    statuses = [
        (await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "r"}, headers=as_admin)).status_code
        for _ in range(3)
    ]
    assert statuses == [200, 200, 409]


async def test_a_rollback_passes_over_ancestors_that_are_barred(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await teach(client, "Be brief.")
    first = await consolidate(store, settings, vllm, content="ab")
    second = await consolidate(store, settings, vllm, content="cd")
    third = await consolidate(store, settings, vllm, content="ef")
    path = "/v1/admin/scopes/user:alice"

    await client.post(f"{path}/rollback", json={"reason": "r"}, headers=as_admin)
    await client.post(f"{path}/rollback", json={"reason": "r"}, headers=as_admin)
    await client.post(f"{path}/promote", json={"version": third.name, "reason": "it was right"}, headers=as_admin)
    back = await client.post(f"{path}/rollback", json={"reason": "no"}, headers=as_admin)

    assert third.parent == second.name
    assert back.json()["to_version"] == first.name


@pytest.mark.parametrize(
    ("call", "body", "status", "code"),
    [
        ("rollback", {"reason": "r", "to": "fs-0123456789ab-0001-0123456789ab"}, 404, "unknown_version"),
        ("rollback", {"reason": "r", "to": "IN_USE"}, 409, "already_in_use"),
        ("promote", {"reason": "r", "version": "IN_USE"}, 409, "already_in_use"),
        ("promote", {"reason": "r", "version": "nonsense"}, 404, "unknown_version"),
        ("rollback", {}, 422, "invalid_value"),
        ("rollback", {"reason": ""}, 422, "invalid_value"),
    ],
)
async def test_a_move_that_can_not_be_made_says_why(
    client: httpx.AsyncClient,
    as_admin: dict[str, str],
    store: Store,
    settings: Settings,
    vllm: FakeVllm,
    call: str,
    body: dict[str, str],
    status: int,
    code: str,
) -> None:
    await teach(client, "Be brief.")
    version = await consolidate(store, settings, vllm, content="ab")
    body = {k: version.name if v == "IN_USE" else v for k, v in body.items()}
    response = await client.post(f"/v1/admin/scopes/user:alice/{call}", json=body, headers=as_admin)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert (await store.scopes.state(ALICE, tenant="acme")).active == version.name


async def test_rolling_back_what_is_served_by_the_base_is_a_409(
    client: httpx.AsyncClient, as_admin: dict[str, str]
) -> None:
    response = await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "r"}, headers=as_admin)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "nothing_to_roll_back")


async def test_a_scope_that_is_none_is_a_400(client: httpx.AsyncClient, as_admin: dict[str, str]) -> None:
    response = await client.post("/v1/admin/scopes/team:x/rollback", json={"reason": "r"}, headers=as_admin)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_scope")


async def test_a_users_id_with_a_slash_can_be_rolled_back(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    client.headers["X-User-ID"] = "org/alice"
    completion = (await client.post("/v1/chat/completions", json=CHAT)).json()
    await client.post("/v1/feedback", json={"interaction_id": completion["id"], "comment": "Be brief."})
    await consolidate(store, settings, vllm, content="ab", scope=Scope(kind="user", name="org/alice"))
    response = await client.post("/v1/admin/scopes/user:org/alice/rollback", json={"reason": "r"}, headers=as_admin)
    assert response.status_code == 200
    assert (await client.get("/v1/users/org/alice/context")).json()["revision"] == 1


async def test_an_admin_may_promote_a_version_that_was_rolled_back(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await teach(client, "Be brief.")
    version = await consolidate(store, settings, vllm, content="ab")
    await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "worse"}, headers=as_admin)
    listed = (await client.get("/v1/admin/adapters", headers=as_admin)).json()["data"]
    assert [(v["name"], v["in_use"], v["barred"]) for v in listed] == [(version.name, False, True)]

    body = {"version": version.name, "reason": "it was right"}
    await client.post("/v1/admin/scopes/user:alice/promote", json=body, headers=as_admin)

    response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.headers["x-fastslow-adapter"] == version.name
    actions = [e["action"] for e in (await client.get("/v1/admin/audit", headers=as_admin)).json()["data"]]
    assert actions == ["promote", "rollback", "promote"]


async def test_the_audit_tells_who_when_and_why(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await teach(client, "Be brief.")
    version = await consolidate(store, settings, vllm, content="ab")
    await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "too terse"}, headers=as_admin)
    latest = (await client.get("/v1/admin/audit?limit=1", headers=as_admin)).json()["data"][0]
    assert latest["at"] > 0
    assert (latest["reason"], latest["from_version"], latest["to_version"]) == ("too terse", version.name, "base")
    assert latest["actor"].startswith("admin …")


async def test_an_adapters_page_has_its_lineage_and_report(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await teach(client, "Be brief.")
    first = await consolidate(store, settings, vllm, content="ab")
    second = await consolidate(store, settings, vllm, content="cd")
    page = (await client.get(f"/v1/admin/adapters/{second.name}", headers=as_admin)).json()
    assert page["lineage"] == [second.name, first.name, "base"]
    assert page["report"]["kl_text"]["budget_nats"] == 0.02
    assert (page["in_use"], page["watermark"]) == (True, {"alice": 1})


async def test_admin_calls_are_closed_to_clients_and_to_other_tenants(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await teach(client, "Be brief.")
    version = await consolidate(store, settings, vllm, content="ab")
    globex = {"Authorization": f"Bearer {OTHER_TENANT_KEY}"}
    path = f"/v1/admin/adapters/{version.name}"

    assert (await client.get(path)).status_code == 403
    assert (await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "r"})).status_code == 403
    assert (await client.get(path, headers=globex)).status_code == 404
    assert (await client.get("/v1/admin/adapters", headers=globex)).json()["data"] == []
    assert (await client.get("/v1/admin/audit", headers=globex)).json()["data"] == []
    assert (
        await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "r"}, headers=globex)
    ).status_code == 409
    assert (await store.scopes.state(ALICE, tenant="acme")).active == version.name


@pytest.mark.parametrize("stream", [False, True])
async def test_an_adapter_that_vllm_can_not_load_is_replaced_by_the_base_with_the_whole_context(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm, stream: bool
) -> None:
    item = await teach(client, "Be brief.")
    await consolidate(store, settings, vllm, content="ab", absorbed=(item,))
    vllm.adapters.clear()

    response = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    asked = len(vllm.bodies)
    again = await client.post("/v1/chat/completions", json=CHAT)

    for reply in (response, again):
        assert reply.status_code == 200
        assert reply.headers["x-fastslow-adapter"] == "base"
        assert reply.headers["x-fastslow-degraded"] == "adapter-unavailable"
    assert "Be brief." in rendered(vllm)
    assert len(vllm.bodies) == asked + 1, "a failed adapter is not tried at every request"
    assert "fastslow_adapter_failures_total 1.0" in (await client.get("/metrics")).text


async def test_a_request_that_the_base_refuses_too_does_not_blame_the_adapter(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await teach(client, "Be brief.")
    version = await consolidate(store, settings, vllm, content="ab")
    vllm.refuse = (400, {"message": "bad logit_bias"})
    refused = await client.post("/v1/chat/completions", json=CHAT)
    vllm.refuse = None
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert refused.status_code == 400
    assert response.headers["x-fastslow-adapter"] == version.name


async def test_the_most_specific_adapter_serves(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await teach(client, "Be brief.")
    put = await client.put("/v1/admin/users/alice/cohort", json={"cohort": "legal"}, headers=as_admin)
    assert put.status_code == 200
    served = []
    for content, scope in (("ab", "global"), ("cd", "cohort:legal"), ("ef", "user:alice")):
        version = await consolidate(store, settings, vllm, content=content, scope=Scope.parse(scope))
        response = await client.post("/v1/chat/completions", json=CHAT)
        assert response.headers["x-fastslow-adapter"] == version.name
        served.append(version.name)
    for scope in ("user:alice", "cohort:legal", "global"):
        assert (await client.post("/v1/chat/completions", json=CHAT)).headers["x-fastslow-adapter"] == served.pop()
        await client.post(f"/v1/admin/scopes/{scope}/rollback", json={"reason": "r"}, headers=as_admin)
    assert (await client.post("/v1/chat/completions", json=CHAT)).headers["x-fastslow-adapter"] == "base"


async def test_a_consolidation_is_started_once_and_can_be_watched(
    client: httpx.AsyncClient, as_admin: dict[str, str], jobs: RecordedJobs
) -> None:
    started = await client.post("/v1/admin/consolidations", json={"scope": "user:alice"}, headers=as_admin)
    again = await client.post("/v1/admin/consolidations", json={"scope": "user:alice"}, headers=as_admin)
    job_id = started.json()["id"]
    watched = await client.get(f"/v1/admin/consolidations/{job_id}", headers=as_admin)

    assert (started.status_code, again.status_code) == (202, 409)
    assert job_id in again.json()["error"]["message"]
    assert jobs.sent == [[job_id]]
    assert (watched.json()["state"], watched.json()["scope"]) == ("queued", "user:alice")


@pytest.mark.parametrize("job_id", ["nothing", "con-001-abc", "con-999-abc", "con-xyz", "con-001-a:b"])
async def test_an_unknown_consolidation_is_a_404(
    client: httpx.AsyncClient, as_admin: dict[str, str], job_id: str
) -> None:
    response = await client.get(f"/v1/admin/consolidations/{job_id}", headers=as_admin)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_consolidation")
