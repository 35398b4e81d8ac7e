"""Recall over a real Redis: exemplars are compared with a prompt as far as a worker has embedded them, and what is missing is planned."""

import time
from collections.abc import AsyncIterator

import pytest
from redis import Redis

from service.domain.fast_weights import MAX_EXEMPLARS
from service.domain.items import Exemplar
from service.metrics import Metrics
from service.recall import LOOK_AGAIN_SECONDS, Recall
from service.settings import Settings
from service.store import Store, open_store
from service.store.keys import UserKeys
from service.tokens import Tokens
from tests.conftest import gateway_client
from tests.factories import give_feedback
from tests.fakes import FakeEmbedder, FakeVllm, RecordedJobs
from workers.context_search.embedded import embed_exemplars

ALICE: dict[str, str] = {"tenant": "acme", "user": "alice"}
EGGS, TAXES = "how to boil an egg", "which taxes apply in Spain"


def exemplar(name: str, prompt: str) -> Exemplar:
    return Exemplar(id=name, sources={"i": 1}, prompt=prompt, reply="A reply.", rejected="")


TWO = [exemplar("x1", TAXES), exemplar("x2", EGGS)]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def embedder() -> FakeEmbedder:
    return FakeEmbedder()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recall(store: Store, embedder: FakeEmbedder, settings: Settings, metrics: Metrics, clock: Clock) -> Recall:
    return Recall(store, embedder, settings, metrics, clock)


async def embed(store: Store, embedder: FakeEmbedder, *exemplars: Exemplar, **user: str) -> None:
    rows = FakeEmbedder().embed([e.prompt for e in exemplars])
    vectors = {e.id: row for e, row in zip(exemplars, rows, strict=True)}
    await store.embeddings.put(vectors, **(ALICE | user), model=embedder.name)


def counted(metrics: Metrics) -> dict[str, float]:
    samples = [s for m in metrics.recall.collect() for s in m.samples if s.name.endswith("_total")]
    return {s.labels["outcome"]: s.value for s in samples}


async def test_the_exemplar_like_the_prompt_is_the_nearest(
    recall: Recall, store: Store, embedder: FakeEmbedder, metrics: Metrics
) -> None:
    await embed(store, embedder, *TWO)
    found = await recall.similarities("how to boil water", TWO, **ALICE)
    assert found is not None
    assert found["x2"] > 0.5 > found["x1"]
    assert counted(metrics) == {"ok": 1}
    assert embedder.texts == ["how to boil water"]


async def test_vectors_are_at_hand_while_the_exemplars_stay_the_same(
    recall: Recall, store: Store, embedder: FakeEmbedder, redis_url: str
) -> None:
    await embed(store, embedder, *TWO)
    await embed(store, embedder, exemplar("x1", EGGS), user="bob")
    first = await recall.similarities("boil", TWO, **ALICE)
    with Redis.from_url(redis_url) as client:
        client.delete(UserKeys(**ALICE).embeddings("words"))
    assert await recall.similarities("boil", TWO, **ALICE) == first
    # Another user's with the same names are not taken for hers, nor hers for others that she has by now.
    of_bob = await recall.similarities("boil", TWO, **(ALICE | {"user": "bob"}))
    assert of_bob == {"x1": pytest.approx((first or {})["x2"], abs=1e-3)}
    assert await recall.similarities("boil", TWO[1:], **ALICE) is None


async def test_what_is_not_embedded_is_left_out_planned_once_and_looked_for_again(
    recall: Recall, store: Store, embedder: FakeEmbedder, metrics: Metrics, clock: Clock
) -> None:
    assert await recall.similarities("boil", TWO, **ALICE) is None
    assert counted(metrics) == {"not-embedded": 1}
    assert await store.optimizations.due(now=time.time()) == [("acme", "alice")]
    await store.optimizations.settle(**ALICE, revision=0)

    await embed(store, embedder, TWO[0])
    assert await recall.similarities("boil", TWO, **ALICE) is None
    clock.now += LOOK_AGAIN_SECONDS
    assert list(await recall.similarities("taxes", TWO, **ALICE) or ()) == ["x1"]
    await embed(store, embedder, TWO[1])
    clock.now += LOOK_AGAIN_SECONDS
    assert set(await recall.similarities("taxes", TWO, **ALICE) or ()) == {"x1", "x2"}
    # A worker that can't embed is not asked for the same by every chat.
    assert await store.optimizations.due(now=time.time()) == []


async def test_a_time_that_was_planned_stays(recall: Recall, store: Store) -> None:
    later = time.time() + 1000
    await store.optimizations.ask_for(**ALICE, at=later)
    await recall.similarities("boil", TWO, **ALICE)
    assert await store.optimizations.due(now=later - 1) == []
    assert await store.optimizations.due(now=later) == [("acme", "alice")]


async def test_where_nothing_is_optimized_nothing_is_planned(
    store: Store, embedder: FakeEmbedder, settings: Settings, metrics: Metrics
) -> None:
    recall = Recall(store, embedder, settings.model_copy(update={"optimize": False}), metrics)
    assert await recall.similarities("boil", TWO, **ALICE) is None
    assert await store.optimizations.due(now=time.time()) == []


async def test_models_are_kept_apart_and_vectors_expire_as_a_cache(
    recall: Recall, store: Store, embedder: FakeEmbedder, settings: Settings, metrics: Metrics, redis_url: str
) -> None:
    await embed(store, embedder, *TWO)
    other = Recall(store, FakeEmbedder("other-model"), settings, metrics)
    assert await other.similarities("boil", TWO, **ALICE) is None
    with Redis.from_url(redis_url) as client:
        key = UserKeys(**ALICE).embeddings("words")
        client.expire(key, 10)
        assert client.hstrlen(key, "x1") == 768
        assert await recall.similarities("boil", TWO, **ALICE) is not None
        assert client.ttl(key) > 10


async def test_without_an_encoder_chats_go_on_and_are_counted(
    store: Store, settings: Settings, metrics: Metrics
) -> None:
    without = Recall(store, None, settings, metrics)
    assert await without.similarities("boil", TWO, **ALICE) is None
    assert counted(metrics) == {"unavailable": 1}


async def test_recall_that_is_switched_off_is_not_counted_as_missing(
    store: Store, settings: Settings, metrics: Metrics
) -> None:
    off = Recall(store, None, settings.model_copy(update={"recall": False}), metrics)
    assert await off.similarities("boil", TWO, **ALICE) is None
    assert counted(metrics) == {}


@pytest.fixture
async def away(settings: Settings) -> AsyncIterator[Store]:
    store = open_store(settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"}))
    yield store
    await store.close()


async def test_redis_away_costs_a_chat_its_recall(
    away: Store, embedder: FakeEmbedder, settings: Settings, metrics: Metrics
) -> None:
    recall = Recall(away, embedder, settings, metrics)
    assert await recall.similarities("boil", TWO, **ALICE) is None
    assert counted(metrics) == {"unavailable": 1}


async def test_as_many_users_as_are_kept_at_hand(
    recall: Recall, store: Store, embedder: FakeEmbedder, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.recall.CACHED_USERS", 2)
    for user in ("ann", "ben", "cyd"):
        await embed(store, embedder, *TWO, user=user)
        await recall.similarities("boil", TWO, **(ALICE | {"user": user}))
    with Redis.from_url(redis_url) as client:
        client.flushdb()
    found = {user: await recall.similarities("boil", TWO, **(ALICE | {"user": user})) for user in ("cyd", "ben", "ann")}
    assert found["cyd"] is not None
    assert found["ben"] == found["cyd"]
    assert found["ann"] is None


async def test_a_chat_is_shown_the_exemplar_that_a_worker_embedded_and_that_is_like_it(
    store: Store, settings: Settings, tokens: Tokens, jobs: RecordedJobs, embedder: FakeEmbedder, vllm: FakeVllm
) -> None:
    for n in range(1, MAX_EXEMPLARS + 1):
        await give_feedback(store, n)
    state = await store.users.fast_weights(**ALICE)
    oldest = min(state.exemplars.values(), key=lambda x: x.born)
    body = {"model": settings.model_name, "messages": [{"role": "user", "content": oldest.prompt}]}
    async with gateway_client(settings, tokens, jobs, embedder) as client:
        await client.post("/v1/chat/completions", json=body)
        assert oldest.reply not in said_before(vllm)
        await embed_exemplars(state, store=store.embeddings, embedder=FakeEmbedder(), **ALICE)
    async with gateway_client(settings, tokens, jobs, embedder) as client:
        await client.post("/v1/chat/completions", json=body)
        assert said_before(vllm)[-1] == oldest.reply


def said_before(vllm: FakeVllm) -> list[str]:
    """The exemplars' replies that vLLM was sent last, in order."""
    return [message["content"] for message in vllm.bodies[-1]["messages"] if message["role"] == "assistant"]
