"""The service on a Redis Cluster of six real nodes: each step of a user's life, and a primary that dies."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
from redis import RedisCluster
from redis.cluster import ClusterNode
from redis.crc import key_slot

from service.domain.slow_weights import Scope
from service.settings import Settings
from service.stack.probes import redis_answers
from service.store import Store, open_store
from service.store.keys import UserKeys
from service.tokens import Tokens
from tests.conftest import gateway_client
from tests.dialogue import CHAT, chat, context_of, edit, optimized, say, texts_of
from tests.factories import ALICE, give_feedback
from tests.fakes import FakeVllm, RecordedJobs

# The newcomer's tour again, over a cluster.
from tests.fundamentals.test_tour import (  # noqa: F401
    test_feedback_changes_the_very_next_chat,
    test_retracting_a_comment_takes_it_out_of_the_context,
    test_what_one_user_taught_reaches_no_other,
)
from tests.jobs import Trainer, active, opened, run
from tests.redis_servers import SLOTS, cluster, replicated
from tests.waiting import until
from workers.archive import archive_logs
from workers.cold_start import count_all
from workers.context_search.due import send_due
from workers.sweep import sweep

USERS = [f"user-{n}" for n in range(8)]


def url_of(ports: list[int]) -> str:
    return "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)


@pytest.fixture(scope="module")
def cluster_ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """Of a cluster's nodes, for this file's tests."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        nodes = runner.run(stack.enter_async_context(cluster(tmp_path_factory.mktemp("cluster"))))
        yield [node.port for node in nodes]
        runner.run(stack.aclose())


@pytest.fixture
def redis_url(cluster_ports: list[int]) -> Iterator[str]:
    """An empty cluster; everything that has a Redis in these tests has this one."""
    client = RedisCluster(startup_nodes=[ClusterNode("127.0.0.1", port) for port in cluster_ports])
    client.flushall(target_nodes=RedisCluster.PRIMARIES)
    yield url_of(cluster_ports)
    client.close()


async def answered(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=CHAT)


async def test_chats_feedback_and_edits_of_many_users_are_kept_on_every_node(
    client: httpx.AsyncClient, cluster_ports: list[int], redis_url: str
) -> None:
    for user in USERS:
        await say(client, user=user, comment=f"Speak of {user}.")
        await edit(client, {"op": "add", "text": "Use rhymes."}, user=user)
    for user in USERS:
        assert await texts_of(client, user=user) == [f"Speak of {user}.", "Use rhymes."]
    holders = {key_slot(UserKeys(tenant="acme", user=user).log.encode()) * 3 // SLOTS for user in USERS}
    assert holders == {0, 1, 2}
    assert (await client.get("/health/ready")).json()["checks"]["redis"] == "ok"


async def test_a_retried_feedback_is_one_event_and_another_body_a_conflict(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "once"}
    body = {"interaction_id": await chat(client), "comment": "Be brief."}
    first, again = [await client.post("/v1/feedback", json=body, headers=headers) for _ in range(2)]
    assert first.json() == again.json()
    other = await client.post("/v1/feedback", json=body | {"comment": "Be long."}, headers=headers)
    assert other.status_code == 409
    assert (await context_of(client))["revision"] == 1


async def test_a_version_is_promoted_serves_and_is_rolled_back(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm, as_admin: dict[str, str]
) -> None:
    for scope in (ALICE, Scope(kind="global")):
        if scope == ALICE:
            await give_feedback(store, 1)
        ended = await run(await opened(store, scope), store, settings, Trainer(vllm))
        assert (ended.state, await active(store, scope)) == ("promoted", ended.version)
        assert (await answered(client)).headers["x-fastslow-adapter"] == (await active(store))
    versions = (await client.get("/v1/admin/adapters", headers=as_admin)).json()["data"]
    assert [version["scope"] for version in versions] == ["global", "user:alice"]
    back = await client.post(
        "/v1/admin/scopes/user:alice/rollback", json={"reason": "It rhymes too much."}, headers=as_admin
    )
    assert back.json()["to_version"] == "base"
    assert (await answered(client)).headers["x-fastslow-adapter"] == await active(store, Scope(kind="global"))
    entries = (await client.get("/v1/admin/audit", headers=as_admin)).json()["data"]
    assert [entry["action"] for entry in entries] == ["rollback", "promote", "promote"]


async def test_what_is_due_is_found_over_all_nodes(store: Store, settings: Settings) -> None:
    few = settings.model_copy(update={"due_feedbacks": 1, "user_min_feedbacks": 2, "min_feedbacks": 2})
    jobs = RecordedJobs()
    for user in USERS:
        for n in (1, 2):
            await give_feedback(store, n, user=user)
    ids = iter(f"id{n}" for n in range(100))
    sent = await sweep(store, jobs, few, now=time.time(), unique=lambda: next(ids))
    assert {(await store.jobs.get(job, tenant="acme")).scope for job in sent} == {f"user:{user}" for user in USERS}
    await send_due(store, jobs, now=time.time())
    assert sorted(user for _, user in jobs.optimized) == USERS
    assert await store.users.users(tenant="acme") != []


async def test_a_long_log_goes_to_the_archive_and_the_fold_stays(store: Store, settings: Settings) -> None:
    short = settings.model_copy(update={"log_keep_events": 5})
    few = open_store(short)
    for n in range(1, 12):
        await give_feedback(few, n)
    before = await few.users.fast_weights(tenant="acme", user="alice")
    assert await archive_logs(few, short, now=time.time()) == 1
    assert await few.archives.length(tenant="acme", user="alice") == 6
    await few.connection.call("DEL", UserKeys(tenant="acme", user="alice").state)
    await few.close()
    # This one knows nothing of her yet.
    assert await store.users.fast_weights(tenant="acme", user="alice") == before


async def test_new_users_start_with_what_others_like(
    client: httpx.AsyncClient, store: Store, settings: Settings, as_admin: dict[str, str]
) -> None:
    for user in USERS:
        await optimized(store, "Use bullet points.", user=user)
    assert (await client.put("/v1/admin/cold-start", json={"enabled": True}, headers=as_admin)).status_code == 200
    assert await count_all(store, settings) == ["acme"]
    assert await texts_of(client, user="newcomer") == ["Use bullet points."]


async def test_a_dead_primarys_replica_takes_over_with_all_that_was_acknowledged(
    settings: Settings, tokens: Tokens, jobs: RecordedJobs, tmp_path: Path
) -> None:
    async with cluster(tmp_path) as nodes:
        slot = key_slot(UserKeys(tenant="acme", user="alice").log.encode())
        primary, replica = (nodes[slot * 3 // SLOTS + offset] for offset in (0, 3))
        over = settings.model_copy(update={"redis_url": url_of([node.port for node in nodes])})
        async with gateway_client(over, tokens, jobs) as client:
            await say(client, comment="Use rhymes.")
            await say(client, comment="Be brief.")

            await replicated(primary, replica)
            primary.process.kill()
            assert (await answered(client)).headers[
                "x-fastslow-degraded"
            ] == "store-unavailable,interaction-not-recorded"

            async def personalized() -> bool:
                return "x-fastslow-degraded" not in (await answered(client)).headers

            await until(personalized, what="a chat from the replica")
            assert await texts_of(client) == ["Use rhymes.", "Be brief."]
            await say(client, comment="Be kind.")
            assert await texts_of(client) == ["Use rhymes.", "Be brief.", "Be kind."]


async def test_gateways_share_the_rate_limits_of_users_on_every_node(
    settings: Settings, tokens: Tokens, jobs: RecordedJobs
) -> None:
    limited = settings.model_copy(update={"user_chats_per_minute": 1, "tenant_tokens_per_minute": 100_000})
    async with gateway_client(limited, tokens, jobs) as one, gateway_client(limited, tokens, jobs) as two:
        replies = [
            await client.post("/v1/chat/completions", json=CHAT, headers={"X-User-ID": user})
            for user in USERS
            for client in (one, two)
        ]
    assert [reply.status_code for reply in replies] == [200, 429] * len(USERS)
    assert all(int(reply.headers["x-ratelimit-remaining-tokens"]) < 100_000 for reply in replies)


async def test_a_cluster_that_can_not_be_reached_is_redis_away(
    settings: Settings, tokens: Tokens, jobs: RecordedJobs
) -> None:
    away = settings.model_copy(update={"redis_url": "redis+cluster://127.0.0.1:1", "redis_timeout_seconds": 5.0})
    async with gateway_client(away, tokens, jobs) as http:
        served = await answered(http)
        assert (served.status_code, served.headers["x-fastslow-degraded"].split(",")[0]) == (200, "store-unavailable")
        refused = await http.post("/v1/feedback", json={"interaction_id": served.json()["id"], "rating": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert (await http.get("/health/ready")).status_code == 503
    assert await redis_answers(away.redis_url)()
