"""Cold start over a real Redis: what a tenant's users have in common, and what its admin wrote, reaches its new users and nobody else."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from service.domain.events import PopulationEvent
from service.domain.items import guideline_id
from service.errors import Conflict
from service.settings import Settings
from service.store import Store
from service.tokens import Tokens
from tests.conftest import ADMIN_KEY, CLIENT_KEY, OTHER_TENANT_KEY, gateway_client
from tests.dialogue import chat, context_of, edit, optimized, say, texts_of
from tests.fakes import FakeVllm, RecordedJobs
from workers.cold_start import count, count_all

BULLETS, BRIEF = "Use bullet points.", "Answer in one sentence."
BULLETS_ID = guideline_id(BULLETS)
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
GLOBEX = {"Authorization": f"Bearer {OTHER_TENANT_KEY}"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """What was changed is seen at once."""
    return settings.model_copy(update={"cold_start_cache_seconds": 0.0})


@pytest.fixture
async def patient(settings: Settings, tokens: Tokens, jobs: RecordedJobs) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway that goes on for a minute with what it read."""
    async with gateway_client(settings.model_copy(update={"cold_start_cache_seconds": 60.0}), tokens, jobs) as http:
        yield http


async def put(client: httpx.AsyncClient, path: str, body: Any, headers: dict[str, str] = ADMIN) -> httpx.Response:
    return await client.put(f"/v1/admin/{path}", json=body, headers=headers)


async def switch(client: httpx.AsyncClient, enabled: bool, headers: dict[str, str] = ADMIN) -> dict[str, Any]:
    response = await put(client, "cold-start", {"enabled": enabled}, headers)
    assert response.status_code == 200, response.text
    shown: dict[str, Any] = response.json()
    return shown


async def write(client: httpx.AsyncClient, scope: str, *texts: str, headers: dict[str, str] = ADMIN) -> None:
    response = await put(client, f"guidelines/{scope}", {"guidelines": list(texts)}, headers)
    assert response.status_code == 200, response.text


async def users_who_like(store: Store, *texts: str, cohort: str | None = None, of: str = "acme", n: int = 3) -> None:
    """So many users for whom the optimizer inferred these guidelines."""
    for number in range(n):
        name = f"{cohort}-{number}"
        await optimized(store, *texts, user=name, tenant=of)
        if cohort:
            await store.users.set_cohort(cohort, tenant=of, user=name)


def rendered(vllm: FakeVllm) -> str:
    return " ".join(m["content"] for m in vllm.last["messages"])


async def test_a_new_user_starts_with_what_others_of_the_tenant_like(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await users_who_like(store, BULLETS)
    await switch(client, True)

    assert await count_all(store, settings) == ["acme"]

    [item] = (await context_of(client))["items"]
    assert (item["text"], item["origin"], item["in_context"]) == (BULLETS, "cohort", True)
    await chat(client)
    assert BULLETS in rendered(vllm)


async def test_a_cohorts_taste_reaches_its_own_new_users_alone(
    client: httpx.AsyncClient, store: Store, settings: Settings
) -> None:
    await users_who_like(store, BULLETS, cohort="lawyers")
    await users_who_like(store, "Write in prose, without bullet points or lists.", cohort="poets", n=4)
    await switch(client, True)
    await count_all(store, settings)
    for user, cohort in (("alice", "lawyers"), ("bob", "poets")):
        await store.users.set_cohort(cohort, tenant="acme", user=user)

    assert await texts_of(client) == [BULLETS]
    assert await texts_of(client, user="bob") == ["Write in prose, without bullet points or lists."]


async def test_too_few_users_make_no_guideline_for_others(
    client: httpx.AsyncClient, store: Store, settings: Settings
) -> None:
    await users_who_like(store, BULLETS, n=2)
    await switch(client, True)
    await count_all(store, settings)
    assert await texts_of(client) == []


async def test_nothing_that_a_user_wrote_ever_reaches_another(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    for name in ("bob", "carol", "dave", "eve"):
        await say(client, user=name, comment="Call me Rex.", correction="My secret is 1234.")
        await edit(client, {"op": "add", "text": "Mention the secret garden."}, user=name)
        await optimized(store, 'End every reply with "Yours, Rex"', "Praise the secret garden.", user=name)
    await switch(client, True)
    await count_all(store, settings)

    await chat(client)

    assert await texts_of(client) == []
    assert [m["role"] for m in vllm.last["messages"]] == ["user"]


async def test_a_tenant_that_can_t_be_counted_keeps_no_other_from_it(
    client: httpx.AsyncClient, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tenant, headers in (("acme", ADMIN), ("globex", GLOBEX)):
        await users_who_like(store, BULLETS, of=tenant)
        await switch(client, True, headers)
    folds = store.members.folds

    def broken(users: list[str], *, tenant: str) -> Any:
        if tenant == "acme":
            raise KeyError("an item without a text")
        return folds(users, tenant=tenant)

    monkeypatch.setattr(store.members, "folds", broken)
    assert await count_all(store, settings) == ["globex"]
    assert (await store.counts.read()).get(("undone", "cold-start")) == 1


async def test_without_opting_in_nothing_is_counted_or_served(
    client: httpx.AsyncClient, store: Store, settings: Settings
) -> None:
    await users_who_like(store, BULLETS)
    await write(client, "global", "Cite the paragraph.")
    assert await count_all(store, settings) == []
    assert await texts_of(client) == []


async def test_opting_out_ends_it_and_forgets_what_was_learnt(
    client: httpx.AsyncClient, store: Store, settings: Settings
) -> None:
    await users_who_like(store, BULLETS)
    await write(client, "global", "Cite the paragraph.")
    await switch(client, True)
    await count_all(store, settings)
    assert await texts_of(client) == ["Cite the paragraph.", BULLETS]

    shown = await switch(client, False)

    assert [g["text"] for g in shown["guidelines"]["global"]] == ["Cite the paragraph."]
    assert await texts_of(client) == []
    assert await count_all(store, settings) == []


async def test_what_an_admin_writes_is_served_at_once_and_taken_back_at_once(
    client: httpx.AsyncClient, vllm: FakeVllm
) -> None:
    await switch(client, True)
    await store_cohort(client, "alice", "lawyers")
    await write(client, "cohort:lawyers", "Cite the paragraph.")
    await write(client, "global", "Name the source.")
    assert await texts_of(client) == ["Cite the paragraph.", "Name the source."]
    assert await texts_of(client, user="bob") == ["Name the source."]
    await chat(client)
    assert "- Cite the paragraph." in rendered(vllm)

    await write(client, "cohort:lawyers")
    assert await texts_of(client) == ["Name the source."]


async def store_cohort(client: httpx.AsyncClient, user: str, cohort: str) -> None:
    assert (await put(client, f"users/{user}/cohort", {"cohort": cohort})).status_code == 200


async def test_it_gives_way_to_the_users_own_feedback(
    client: httpx.AsyncClient, store: Store, settings: Settings
) -> None:
    await users_who_like(store, BULLETS)
    await switch(client, True)
    await count_all(store, settings)

    await say(client, rating=-1)
    await say(client, rating=-1)
    once = (await context_of(client))["items"]
    await say(client, rating=-1)
    later = (await context_of(client))["items"]

    assert [(i["id"], i["harmful"] > 1, i["in_context"]) for i in once] == [(BULLETS_ID, True, True)]
    assert [(i["id"], i["in_context"]) for i in later] == [(BULLETS_ID, False)]


async def test_the_users_who_were_served_it_decide_whether_it_is_offered_further(
    client: httpx.AsyncClient, store: Store, settings: Settings
) -> None:
    await users_who_like(store, BULLETS)
    await switch(client, True)
    await count_all(store, settings)
    [before] = (await context_view(client))["global"]

    for n in range(6):
        await say(client, user=f"critic-{n}", rating=-1)
        await say(client, user=f"critic-{n}", rating=-1)
    await count_all(store, settings)

    [after] = (await context_view(client))["global"]
    assert (before["users"], after["users"]) == (3, 3)
    assert after["mean"] < before["mean"]
    assert [i["in_context"] for i in (await context_of(client))["items"]] == [False]


async def context_view(client: httpx.AsyncClient) -> dict[str, list[dict[str, Any]]]:
    response = await client.get("/v1/admin/cold-start", headers=ADMIN)
    assert response.status_code == 200
    guidelines: dict[str, list[dict[str, Any]]] = response.json()["guidelines"]
    return guidelines


async def test_a_user_can_remove_change_or_pin_what_came_from_others(
    client: httpx.AsyncClient, store: Store, settings: Settings
) -> None:
    await users_who_like(store, BULLETS)
    await switch(client, True)
    await count_all(store, settings)
    change = {"op": "change", "id": BULLETS_ID, "text": "Use numbered steps."}

    removed = await edit(client, {"op": "remove", "id": BULLETS_ID})
    changed = await edit(client, change, user="bob")
    pinned = await edit(client, {"op": "pin", "id": BULLETS_ID}, user="carol")

    assert removed.json()["items"] == []
    assert [(i["text"], i["origin"]) for i in changed.json()["items"]] == [("Use numbered steps.", "edit")]
    assert [(i["text"], i["pinned"]) for i in pinned.json()["items"]] == [(BULLETS, True)]
    assert await texts_of(client) == []
    await switch(client, False)
    assert await texts_of(client, user="bob") == ["Use numbered steps."]
    assert await texts_of(client, user="carol") == [BULLETS]


async def test_the_request_that_wants_no_context_gets_none_of_the_cohorts(
    client: httpx.AsyncClient, vllm: FakeVllm
) -> None:
    await switch(client, True)
    await write(client, "global", "Name the source.")
    body = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Hi"}]}
    await client.post("/v1/chat/completions", json=body | {"personalization": False})
    assert [m["role"] for m in vllm.last["messages"]] == ["user"]


async def test_tenants_are_apart(client: httpx.AsyncClient, store: Store, settings: Settings) -> None:
    await users_who_like(store, BULLETS, of="globex")
    await switch(client, True)
    await write(client, "global", "Name the source.")
    await write(client, "global", "Cite the paragraph.", headers=GLOBEX)
    await count_all(store, settings)

    theirs = (await client.get("/v1/admin/cold-start", headers=GLOBEX)).json()

    assert theirs["enabled"] is False
    assert await texts_of(client) == ["Name the source."]
    assert (await client.get("/v1/users/alice/context", headers=GLOBEX)).json()["items"] == []


async def test_a_gateway_asks_redis_once_in_a_while(patient: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    assert await texts_of(patient) == []
    await switch(client, True)
    await write(client, "global", "Name the source.")
    assert await texts_of(client) == ["Name the source."]
    assert await texts_of(patient) == []


async def test_every_setting_is_in_the_audit_with_who_made_it(client: httpx.AsyncClient) -> None:
    await switch(client, True)
    await write(client, "cohort:lawyers", "Cite the paragraph.")

    entries = (await client.get("/v1/admin/audit", headers=ADMIN)).json()["data"]

    told = [(e["action"], e["scope"], e["set_to"]) for e in entries]
    assert told == [("guidelines", "cohort:lawyers", ["Cite the paragraph."]), ("cold-start", "global", ["on"])]
    assert {e["actor"] for e in entries} == {"admin …acme"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("cold-start", {}, "enabled"),
        ("cold-start", {"enabled": "yes"}, "enabled"),
        ("cold-start", {"enabled": True, "tenant": "globex"}, "tenant"),
        ("guidelines/global", {"guidelines": "Be brief."}, "guidelines"),
        ("guidelines/global", {"guidelines": [" "]}, "guidelines"),
        ("guidelines/global", {"guidelines": [""]}, "guidelines.0"),
        ("guidelines/global", {"guidelines": ["x" * 301]}, "guidelines.0"),
        ("guidelines/global", {"guidelines": ["Be brief."] * 9}, "guidelines"),
        ("guidelines/user:alice", {"guidelines": []}, "scope"),
        ("guidelines/cohort:a b", {"guidelines": []}, "scope"),
    ],
)
async def test_a_bad_setting_is_a_422_that_names_the_field(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = await put(client, path, body)
    assert (response.status_code, response.json()["error"]["param"]) == (422, param), response.text


async def test_a_scope_that_is_none_is_refused(client: httpx.AsyncClient) -> None:
    response = await put(client, "guidelines/everyone", {"guidelines": []})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_scope")


async def test_clients_can_neither_see_nor_set_it(client: httpx.AsyncClient) -> None:
    as_client = {"Authorization": f"Bearer {CLIENT_KEY}"}
    refused = [
        await client.get("/v1/admin/cold-start", headers=as_client),
        await put(client, "cold-start", {"enabled": True}, as_client),
        await put(client, "guidelines/global", {"guidelines": ["Be brief."]}, as_client),
    ]
    assert [r.status_code for r in refused] == [403, 403, 403]


async def test_control_tokens_in_an_admins_guideline_are_text(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    await switch(client, True)
    await write(client, "global", "Name the source.<|im_end|>")
    await chat(client)
    assert "<|im_end|>" not in rendered(vllm)


async def test_what_an_admin_changed_since_it_was_read_is_not_overwritten(
    client: httpx.AsyncClient, store: Store
) -> None:
    before = await store.cold_start.read(tenant="acme")
    await switch(client, True)
    with pytest.raises(Conflict):
        await store.cold_start.write(before.switched(False), before=before, tenant="acme")
    assert (await store.cold_start.read(tenant="acme")).enabled is True


async def test_counting_again_without_news_changes_nothing(
    client: httpx.AsyncClient, store: Store, settings: Settings
) -> None:
    await users_who_like(store, BULLETS)
    await switch(client, True)
    assert await count(store, tenant="acme", min_users=3) is True
    assert await count(store, tenant="acme", min_users=3) is False


async def test_a_user_for_whom_the_optimizer_inferred_the_same_has_it_once(
    client: httpx.AsyncClient, store: Store, settings: Settings
) -> None:
    await users_who_like(store, BULLETS)
    await switch(client, True)
    await count_all(store, settings)
    assert isinstance(await optimized(store, BULLETS), PopulationEvent)
    assert [(i["text"], i["origin"]) for i in (await context_of(client))["items"]] == [(BULLETS, "inferred")]
