"""Norms of a scope over a real Redis: what an admin sets is kept, audited, refused with reasons, and counted on the replies served."""

import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from service.domain.norms import Norm
from service.domain.slow_weights import Scope
from service.settings import Settings
from service.store import Store
from service.store.norms import MAX_SCOPES
from service.store.scopes import AuditEntry
from service.tokens import Tokens
from service.verifiers.norms import adherence
from tests.conftest import ADMIN_KEY, CLIENT_KEY, OTHER_TENANT_KEY, gateway_client
from tests.dialogue import CHAT, chat
from tests.fakes import FakeVllm, RecordedJobs
from tests.gateway import free_port
from tests.waiting import until

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
GLOBEX = {"Authorization": f"Bearer {OTHER_TENANT_KEY}"}
BRIEF = {"name": "brief", "checker": "max_words", "arguments": {"words": 5}}
QUOTED = {"name": "quoted", "checker": "quoted"}
GLOBAL = Scope(kind="global")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """What was changed is seen at once."""
    return settings.model_copy(update={"norms_cache_seconds": 0.0})


async def put(
    client: httpx.AsyncClient, *norms: Any, scope: str = "global", headers: dict[str, str] = ADMIN
) -> httpx.Response:
    return await client.put(f"/v1/admin/scopes/{scope}/norms", json={"norms": list(norms)}, headers=headers)


async def hold(client: httpx.AsyncClient, *norms: Any, scope: str = "global", headers: dict[str, str] = ADMIN) -> None:
    """Set a scope's norms."""
    response = await put(client, *norms, scope=scope, headers=headers)
    assert response.status_code == 200, response.text


async def shown(client: httpx.AsyncClient, scope: str = "global", headers: dict[str, str] = ADMIN) -> list[str]:
    """Names of a scope's norms."""
    response = await client.get(f"/v1/admin/scopes/{scope}/norms", headers=headers)
    assert response.status_code == 200, response.text
    assert response.json()["scope"] == scope
    return [norm["name"] for norm in response.json()["norms"]]


async def counted(client: httpx.AsyncClient, kind: str = "norm_checks") -> dict[str, float]:
    """The samples of one of the metrics, by their labels."""
    lines = (await client.get("/metrics")).text.splitlines()
    samples = [
        line.removeprefix(f"fastslow_{kind}_total").rsplit(" ", 1)
        for line in lines
        if f"fastslow_{kind}_total{{" in line
    ]
    return {labels: float(times) for labels, times in samples}


async def test_what_an_admin_sets_is_what_the_scope_has_until_it_is_replaced_or_removed(
    client: httpx.AsyncClient,
) -> None:
    set_to = await put(client, BRIEF, QUOTED)
    assert set_to.status_code == 200, set_to.text
    assert set_to.json()["norms"][0] == BRIEF | {"text": "At most 5 words.", "weight": 1.0}
    assert set_to.json() == (await client.get("/v1/admin/scopes/global/norms", headers=ADMIN)).json()

    await hold(client, QUOTED | {"weight": 2.5, "text": "As we cite."})
    assert await shown(client) == ["quoted"]
    await hold(client)
    assert await shown(client) == []


async def test_scopes_and_tenants_are_apart(client: httpx.AsyncClient) -> None:
    await hold(client, BRIEF, scope="cohort:lawyers")
    await hold(client, QUOTED, scope="user:alice")
    await hold(client, QUOTED, BRIEF, headers=GLOBEX)
    assert [await shown(client, s) for s in ("global", "cohort:lawyers", "user:alice")] == [[], ["brief"], ["quoted"]]

    overview = (await client.get("/v1/admin/norms", headers=ADMIN)).json()
    assert {s: [n["name"] for n in ns] for s, ns in overview["scopes"].items()} == {
        "cohort:lawyers": ["brief"],
        "user:alice": ["quoted"],
    }
    assert overview["checkers"]["max_words"]["required"] == ["words"]


async def test_every_setting_is_in_the_audit_with_who_made_it(client: httpx.AsyncClient) -> None:
    await hold(client, BRIEF, scope="cohort:lawyers")
    await hold(client, scope="cohort:lawyers")
    entries = (await client.get("/v1/admin/audit", headers=ADMIN)).json()["data"]
    told = [(e["action"], e["scope"], e["actor"], e["set_to"]) for e in entries]
    assert told == [
        ("norms", "cohort:lawyers", "admin …acme", []),
        ("norms", "cohort:lawyers", "admin …acme", ["brief: At most 5 words."]),
    ]
    assert (await client.get("/v1/admin/audit", headers=GLOBEX)).json()["data"] == []


@pytest.mark.parametrize(
    ("norms", "param", "told"),
    [
        ([{"name": "x", "checker": "rhymes"}], "norms.0.checker", "use one of max_words"),
        ([{"name": "x"}], "norms.0.checker", "required"),
        ([QUOTED, {"name": "x", "checker": "max_words"}], "norms.1", "words: Field required (max_words takes words)"),
        ([BRIEF | {"arguments": {"words": "five"}}], "norms.0.arguments", "valid integer"),
        ([BRIEF | {"colour": "red"}], "norms.0.colour", "not a parameter"),
        ([BRIEF | {"weight": -1}], "norms.0.weight", "greater than 0"),
        ([BRIEF | {"name": "Be Brief"}], "norms.0.name", "pattern"),
        ([BRIEF, BRIEF], "norms", "'brief' is given 2 times"),
        (
            [{"name": "l", "checker": "lowercase"}, {"name": "u", "checker": "uppercase"}],
            "norms",
            "no reply can hold both",
        ),
        ([QUOTED | {"name": f"n{n}"} for n in range(17)], "norms", "17 norms are over the limit of 16"),
        (["brief"], "norms.0", "dictionary"),
    ],
)
async def test_a_bad_norm_is_a_422_that_says_where_and_what_to_do(
    client: httpx.AsyncClient, norms: list[Any], param: str, told: str
) -> None:
    response = await put(client, *norms)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (422, param), response.text
    assert told in error["message"]
    assert await shown(client) == []


@pytest.mark.parametrize(
    ("scope", "status", "param"),
    [("everyone", 400, "scope"), ("cohort:a b", 422, "scope"), ("user:" + "x" * 300, 400, "scope")],
)
async def test_a_scope_that_nobody_can_have_is_refused(
    client: httpx.AsyncClient, scope: str, status: int, param: str
) -> None:
    response = await put(client, BRIEF, scope=scope)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


async def test_clients_can_neither_see_nor_set_norms(client: httpx.AsyncClient) -> None:
    as_client = {"Authorization": f"Bearer {CLIENT_KEY}"}
    refused = [
        await put(client, BRIEF, headers=as_client),
        await client.get("/v1/admin/scopes/global/norms", headers=as_client),
        await client.get("/v1/admin/norms", headers=as_client),
    ]
    assert [r.status_code for r in refused] == [403, 403, 403]


async def test_a_worker_reads_the_norms_of_a_users_scopes_as_one_list(client: httpx.AsyncClient, store: Store) -> None:
    await hold(client, BRIEF | {"arguments": {"words": 3}}, scope="user:alice")
    await hold(client, BRIEF, QUOTED, scope="cohort:lawyers")
    scopes = [Scope(kind="user", name="alice"), Scope(kind="cohort", name="lawyers"), GLOBAL]

    norms = await store.norms.of(tenant="acme", scopes=scopes)

    assert [(n.name, n.arguments) for n in norms] == [("brief", {"words": 3}), ("quoted", {})]
    assert await store.norms.of(tenant="acme", scopes=[GLOBAL]) == ()
    assert await store.norms.of(tenant="acme", scopes=[]) == ()
    assert adherence(norms, "Hi", '"Four words are many."').reward == 0.5


async def test_replies_are_counted_by_the_norms_of_their_users_scopes(
    client: httpx.AsyncClient, store: Store, vllm: FakeVllm
) -> None:
    await store.users.set_cohort("lawyers", tenant="acme", user="alice")
    await hold(client, BRIEF)
    await hold(client, QUOTED, scope="cohort:lawyers")
    await hold(client, {"name": "calm", "checker": "lowercase"}, scope="user:bob")
    vllm.reply = lambda body: '"Yes."' if len(vllm.bodies) == 1 else "I think so."

    await chat(client)
    await chat(client)
    await chat(client, user="bob")

    expected = {
        '{held="yes",norm="max_words"}': 3.0,
        '{held="yes",norm="quoted"}': 1.0,
        '{held="no",norm="quoted"}': 1.0,
        '{held="no",norm="lowercase"}': 1.0,
    }

    async def all_there() -> bool:
        return await counted(client) == expected

    await until(all_there, what="the count of all norms")


async def test_a_streamed_reply_is_checked_as_a_whole(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    await hold(client, BRIEF)
    vllm.reply = lambda _: "One two three four five six."
    response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert response.text.endswith("data: [DONE]\n\n")

    await until(lambda: counted(client), what="the check")
    assert await counted(client) == {'{held="no",norm="max_words"}': 1.0}


async def test_nothing_is_counted_without_norms_for_a_dry_run_or_for_nobody(
    client: httpx.AsyncClient, vllm: FakeVllm
) -> None:
    await hold(client, BRIEF)
    # Of a tenant without norms.
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=GLOBEX)).status_code == 200
    await client.post("/v1/chat/completions", json=CHAT | {"personalization": {"dry_run": True}})
    of_nobody = client.build_request("POST", "/v1/chat/completions", json=CHAT)
    del of_nobody.headers["X-User-ID"]
    assert (await client.send(of_nobody)).headers["x-fastslow-degraded"] == "no-user"
    vllm.reply = lambda _: "The last reply of all has more words than five."
    await chat(client)
    await until(lambda: counted(client), what="the check")
    assert await counted(client) == {'{held="no",norm="max_words"}': 1.0}


async def test_with_redis_away_replies_go_out_and_are_counted_as_unchecked(
    settings: Settings, tokens: Tokens, jobs: RecordedJobs
) -> None:
    nowhere = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0"})
    async with gateway_client(nowhere, tokens, jobs) as client:
        await chat(client)
        await until(lambda: counted(client, "norms_unchecked"), what="the count")
        assert await counted(client, "norms_unchecked") == {'{reason="store"}': 1.0}


async def test_a_reply_over_the_limit_is_counted_as_unchecked(
    settings: Settings, tokens: Tokens, jobs: RecordedJobs, vllm: FakeVllm
) -> None:
    async with gateway_client(settings.model_copy(update={"norm_checks_max_chars": 5}), tokens, jobs) as client:
        await hold(client, BRIEF)
        vllm.reply = lambda _: "Too long."
        await chat(client)
        await until(lambda: counted(client, "norms_unchecked"), what="the count")
        assert await counted(client, "norms_unchecked") == {'{reason="long"}': 1.0}
        assert await counted(client) == {}


@pytest.fixture
async def patient(settings: Settings, tokens: Tokens, jobs: RecordedJobs) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway that goes on for a minute with what it read."""
    async with gateway_client(settings.model_copy(update={"norms_cache_seconds": 60.0}), tokens, jobs) as http:
        yield http


async def test_a_gateway_asks_redis_for_norms_once_in_a_while(
    patient: httpx.AsyncClient, client: httpx.AsyncClient
) -> None:
    await hold(client, BRIEF)
    await chat(patient)
    await until(lambda: counted(patient), what="the first check")
    await hold(client)
    await chat(patient)

    async def twice() -> bool:
        return await counted(patient) == {'{held="yes",norm="max_words"}': 2.0}

    await until(twice, what="the second check")


async def test_a_share_of_replies_is_checked(
    settings: Settings, tokens: Tokens, jobs: RecordedJobs, client: httpx.AsyncClient
) -> None:
    async with gateway_client(settings.model_copy(update={"norm_checks_share": 0.0}), tokens, jobs) as none:
        await hold(client, BRIEF)
        await chat(none)
        await chat(client)
        await until(lambda: counted(client), what="the check of the other gateway")
        assert await counted(none) == {}


async def test_too_many_scopes_with_norms_are_refused_and_the_ones_there_can_be_changed(
    client: httpx.AsyncClient, store: Store
) -> None:
    entry = AuditEntry(at=0.0, action="norms", tenant="acme", scope="global", actor="test")
    for n in range(MAX_SCOPES):
        scope = Scope(kind="cohort", name=f"c{n}")
        await store.norms.write([Norm.model_validate(BRIEF)], scope=scope, tenant="acme", audit=entry)

    refused = await put(client, BRIEF)

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "too_many_scopes")
    assert (await put(client, QUOTED, scope="cohort:c7")).status_code == 200
    assert (await put(client, scope="cohort:c8")).status_code == 200
    assert (await put(client, BRIEF)).status_code == 200


async def test_what_this_gateway_has_no_packages_for_is_not_promised(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which this one imports at its first check.
    monkeypatch.setitem(sys.modules, "langdetect", None)
    response = await put(client, {"name": "german", "checker": "language", "arguments": {"language": "de"}})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "verifiers_missing")
    assert await shown(client) == []
