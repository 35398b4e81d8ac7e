"""Recall over a real Redis: what is stored, what is computed, and that a chat never waits for either."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis import Redis

from service.domain.fast_weights import MAX_EXEMPLARS
from service.domain.items import Exemplar
from service.errors import EmbedderUnavailable
from service.metrics import Metrics
from service.recall import MAX_COMPUTED, MAX_PENDING, Recall
from service.settings import Settings
from service.store import Store, open_store
from service.store.keys import UserKeys
from service.tokens import Tokens
from tests.conftest import gateway_client
from tests.factories import give_feedback
from tests.fakes import FakeEmbedder, RecordedJobs
from tests.waiting import PATIENCE_SECONDS, until

ALICE: dict[str, str] = {"tenant": "acme", "user": "alice"}
EGGS, TAXES = "how to boil an egg", "which taxes apply in Spain"


def exemplar(name: str, prompt: str) -> Exemplar:
    return Exemplar(id=name, sources={"i": 1}, prompt=prompt, reply="A reply.", rejected="")


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def embedder() -> FakeEmbedder:
    return FakeEmbedder()


@pytest.fixture
async def recall(store: Store, embedder: FakeEmbedder, settings: Settings, metrics: Metrics) -> AsyncIterator[Recall]:
    recall = Recall(store.embeddings, embedder, settings.model_copy(update={"recall_timeout_seconds": 5.0}), metrics)
    yield recall
    embedder.free.set()
    await recall.aclose()


@pytest.fixture
async def hasty(store: Store, embedder: FakeEmbedder, settings: Settings, metrics: Metrics) -> AsyncIterator[Recall]:
    """Recall that does not wait for an embedder that is held."""
    recall = Recall(store.embeddings, embedder, settings.model_copy(update={"recall_timeout_seconds": 0.01}), metrics)
    yield recall
    embedder.free.set()
    await recall.aclose()


def counted(metrics: Metrics) -> dict[str, float]:
    samples = [s for m in metrics.recall.collect() for s in m.samples if s.name.endswith("_total")]
    return {s.labels["outcome"]: s.value for s in samples}


async def eventually(holds: Callable[[], bool]) -> None:
    async def look() -> bool:
        return holds()

    await until(look, every=0.01)


def stored(redis_url: str, *, model: str = "words", **user: str) -> set[str]:
    with Redis.from_url(redis_url) as client:
        fields: Any = client.hkeys(UserKeys(**(ALICE | user)).embeddings(model))
        return {field.decode() for field in fields}


async def test_the_exemplar_like_the_prompt_is_the_nearest(recall: Recall, metrics: Metrics) -> None:
    found = await recall.similarities("how to boil water", [exemplar("x1", TAXES), exemplar("x2", EGGS)], **ALICE)
    assert found is not None
    assert found["x2"] > 0.5 > found["x1"]
    assert counted(metrics) == {"ok": 1}


async def test_an_exemplar_is_embedded_once_and_expires_as_a_cache(
    recall: Recall, embedder: FakeEmbedder, redis_url: str
) -> None:
    first = await recall.similarities("boil", [exemplar("x1", EGGS)], **ALICE)
    again = await recall.similarities("boil", [exemplar("x1", EGGS)], **ALICE)
    assert embedder.texts.count(EGGS) == 1
    assert first == pytest.approx(again, abs=1e-3)
    with Redis.from_url(redis_url) as client:
        key = UserKeys(**ALICE).embeddings("words")
        assert client.ttl(key) > 0
        assert client.hstrlen(key, "x1") == 768


async def test_vectors_are_at_hand_while_the_exemplars_stay_the_same(
    recall: Recall, embedder: FakeEmbedder, redis_url: str
) -> None:
    two = [exemplar("x1", EGGS), exemplar("x2", TAXES)]
    first = await recall.similarities("boil", two, **ALICE)
    with Redis.from_url(redis_url) as client:
        client.delete(UserKeys(**ALICE).embeddings("words"))
    assert await recall.similarities("boil", two, **ALICE) == first
    assert embedder.texts.count(EGGS) == 1
    # Another user's with the same names are not taken for hers, nor hers for others that she has by now.
    assert await recall.similarities("boil", two, **(ALICE | {"user": "bob"})) == pytest.approx(first, abs=1e-3)
    fewer = await recall.similarities("boil", two[1:], **ALICE)
    assert list(fewer or ()) == ["x2"]
    assert embedder.texts.count(TAXES) == 3


async def test_feedback_leaves_the_embeddings_of_what_the_user_has_now(
    recall: Recall, embedder: FakeEmbedder, redis_url: str
) -> None:
    recall.remember([exemplar("x1", EGGS)], **ALICE)
    await eventually(lambda: stored(redis_url) == {"x1"})
    recall.remember([exemplar("x2", TAXES)], **ALICE)
    await eventually(lambda: stored(redis_url) == {"x2"})
    assert await recall.similarities(TAXES, [exemplar("x2", TAXES)], **ALICE) == {"x2": pytest.approx(1.0, abs=1e-3)}
    assert embedder.texts == [EGGS, TAXES, TAXES]


async def test_users_tenants_and_models_are_kept_apart(
    recall: Recall, store: Store, settings: Settings, metrics: Metrics, redis_url: str
) -> None:
    other_model = FakeEmbedder("other-model")
    other = Recall(store.embeddings, other_model, settings, metrics)
    await recall.similarities("boil", [exemplar("x1", EGGS)], tenant="acme", user="alice")
    await recall.similarities("boil", [exemplar("x1", TAXES)], tenant="globex", user="alice")
    await other.similarities("boil", [exemplar("x1", EGGS)], tenant="acme", user="alice")
    assert other_model.texts == ["boil", EGGS]
    found = await recall.similarities("boil", [exemplar("x1", EGGS)], tenant="acme", user="alice")
    assert found is not None
    assert found["x1"] > 0
    assert stored(redis_url, user="bob") == set()
    await other.aclose()


async def test_no_chat_pays_for_a_long_history_at_once(recall: Recall, embedder: FakeEmbedder) -> None:
    many = [exemplar(f"x{n}", f"prompt {n}") for n in range(MAX_COMPUTED + 10)]
    found = await recall.similarities("prompt", many, **ALICE)
    assert found is not None
    assert set(found) == {x.id for x in many[10:]}
    assert set(await recall.similarities("prompt", many, **ALICE) or {}) == {x.id for x in many}


async def test_a_slow_model_costs_a_chat_its_recall_and_serves_the_next(
    hasty: Recall, recall: Recall, embedder: FakeEmbedder, metrics: Metrics, redis_url: str
) -> None:
    embedder.free.clear()
    assert await hasty.similarities("boil", [exemplar("x1", EGGS)], **ALICE) is None
    assert counted(metrics) == {"timeout": 1}
    embedder.free.set()
    await eventually(lambda: stored(redis_url) == {"x1"})
    assert await recall.similarities("boil", [exemplar("x1", EGGS)], **ALICE) is not None
    assert embedder.texts.count(EGGS) == 1


async def test_a_model_that_fails_or_is_not_installed_costs_a_chat_its_recall(
    recall: Recall, embedder: FakeEmbedder, store: Store, settings: Settings, metrics: Metrics
) -> None:
    embedder.broken = EmbedderUnavailable("broken")
    assert await recall.similarities("boil", [exemplar("x1", EGGS)], **ALICE) is None
    without = Recall(store.embeddings, None, settings, metrics)
    assert await without.similarities("boil", [exemplar("x1", EGGS)], **ALICE) is None
    without.remember([exemplar("x1", EGGS)], **ALICE)
    await without.aclose()
    assert counted(metrics) == {"unavailable": 2}


async def test_recall_that_is_switched_off_is_not_counted_as_missing(
    store: Store, settings: Settings, metrics: Metrics
) -> None:
    off = Recall(store.embeddings, None, settings.model_copy(update={"recall": False}), metrics)
    assert await off.similarities("boil", [exemplar("x1", EGGS)], **ALICE) is None
    assert counted(metrics) == {}


async def test_redis_away_costs_a_chat_its_recall_and_a_feedback_its_embeddings(
    embedder: FakeEmbedder, settings: Settings, metrics: Metrics
) -> None:
    away = open_store(settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"}))
    recall = Recall(away.embeddings, embedder, settings.model_copy(update={"recall_timeout_seconds": 5.0}), metrics)
    assert await recall.similarities("boil", [exemplar("x1", EGGS)], **ALICE) is None
    recall.remember([exemplar("x1", EGGS)], **ALICE)
    await eventually(lambda: counted(metrics) == {"unavailable": 1, "not-remembered": 1})
    await recall.aclose()
    await away.close()


async def test_what_waits_for_the_model_is_bounded(hasty: Recall, embedder: FakeEmbedder, metrics: Metrics) -> None:
    embedder.free.clear()
    for n in range(MAX_PENDING + 5):
        hasty.remember([exemplar(f"x{n}", EGGS)], **ALICE)
    assert counted(metrics) == {"not-remembered": 5}
    assert await hasty.similarities("boil", [exemplar("x1", EGGS)], **ALICE) is None
    assert counted(metrics)["unavailable"] == 1


async def test_closing_drops_what_is_under_way(
    store: Store, embedder: FakeEmbedder, settings: Settings, metrics: Metrics, redis_url: str
) -> None:
    embedder.free.clear()
    recall = Recall(store.embeddings, embedder, settings, metrics)
    recall.remember([exemplar("x1", EGGS)], **ALICE)
    await asyncio.wait_for(recall.aclose(), PATIENCE_SECONDS)
    assert embedder.closed
    assert stored(redis_url) == set()


async def test_a_chat_that_is_given_up_leaves_its_embedding_to_finish(
    recall: Recall, embedder: FakeEmbedder, redis_url: str
) -> None:
    embedder.free.clear()
    chat = asyncio.create_task(recall.similarities("boil", [exemplar("x1", EGGS)], **ALICE))
    await asyncio.sleep(0)
    chat.cancel()
    with pytest.raises(asyncio.CancelledError):
        await chat
    embedder.free.set()
    await eventually(lambda: stored(redis_url) == {"x1"})


async def test_a_correction_that_takes_an_older_ones_place_is_embedded_too(
    store: Store, settings: Settings, tokens: Tokens, jobs: RecordedJobs, embedder: FakeEmbedder, redis_url: str
) -> None:
    for n in range(1, MAX_EXEMPLARS + 1):
        await give_feedback(store, n)
    body = {"model": settings.model_name, "messages": [{"role": "user", "content": EGGS}]}
    async with gateway_client(settings, tokens, jobs, embedder) as client:
        interaction = (await client.post("/v1/chat/completions", json=body)).json()["id"]
        given = await client.post("/v1/feedback", json={"interaction_id": interaction, "correction": "Four minutes."})
        assert given.status_code == 200
        state = await store.users.fast_weights(**ALICE)
        [newest] = [x.id for x in state.exemplars.values() if x.reply == "Four minutes."]
        assert len(state.exemplars) == MAX_EXEMPLARS
        await eventually(lambda: newest in stored(redis_url))
