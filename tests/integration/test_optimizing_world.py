"""Optimizing over real HTTP and Redis: what is asked of vLLM, the embedder and the reflection endpoint, and what if they are away."""

from dataclasses import replace
from typing import Any

import pytest
from redis import Redis

from service.domain.feedback import BASE, Message
from service.engine import MAX_SCORED_REPLIES
from service.errors import EmbedderUnavailable
from service.settings import Settings
from service.store import Store
from service.store.keys import UserKeys
from service.tokens import Tokens
from service.vllm import VllmEngine
from tests.context_search_data import corrections
from tests.fakes import MODEL, FakeEmbedder, FakeVllm
from tests.gateway import free_port
from tests.integration.test_optimizing import KEY, counted, said, say
from workers.context_search.world import OnVllm, optimizing


@pytest.fixture
async def engine(settings: Settings):
    engine = VllmEngine(settings)
    yield engine
    await engine.close()


def over(store, engine, tokens, settings, embedder=None):
    return optimizing(store, engine, tokens=tokens, embedder=lambda: embedder, settings=settings)


async def test_a_population_comes_out_of_likelihoods_that_vllm_tells(
    store: Store, engine: VllmEngine, tokens: Tokens, settings: Settings, vllm: FakeVllm
) -> None:
    # Replies are likelier after words that were said before: exemplars raise what is wanted, as all wanted replies share a word.
    vllm.reply = lambda body: "Wanted."
    await said(store, 8)
    assert await over(store, engine, tokens, settings).optimize(**KEY) in ("improved", "kept")
    state = await store.users.fast_weights(**KEY)
    best = state.population_under(BASE).members[0]
    assert best.score > 0
    events = await store.users.events(**KEY)
    assert events[-1].report.margin_after == best.score
    assert {body["model"] for body in vllm.scored} == {MODEL}
    assert len({body["cache_salt"] for body in vllm.scored}) == 1
    assert all(sum(len(item["replies"]) for item in body["items"]) <= MAX_SCORED_REPLIES for body in vllm.scored)


async def test_users_do_not_share_a_salt(
    store: Store, engine: VllmEngine, tokens: Tokens, settings: Settings, vllm: FakeVllm
) -> None:
    await said(store, 4)
    for event in corrections(4):
        alike = replace(event.interaction, user="bob", id=f"bob-{event.revision}")
        await say(store, event.model_copy(update={"interaction": alike}), user="bob")
    for user in ("alice", "bob"):
        await over(store, engine, tokens, settings).optimize(tenant="acme", user=user)
    assert len({body["cache_salt"] for body in vllm.scored}) == 2


async def test_replies_are_scored_with_their_end_only_where_they_have_one(engine: VllmEngine, vllm: FakeVllm) -> None:
    asked = Message(role="user", content="What is a comet?")
    on_vllm = OnVllm(engine, cache_salt="salt", neutralize=lambda text: text.replace("<|im_end|>", "< |im_end|>"))
    vllm.likelihood = lambda conversation, reply: -float(len(reply.split()))
    items = [
        ([asked], [("one two", True), ("one two three", False)]),
        ([asked], [("one <|im_end|>", True)]),
        ([asked], [("one two three four", True), ("one", True)]),
    ]
    assert await on_vllm.score(MODEL, items) == [[-2.0, -3.0], [-3.0], [-4.0, -1.0]]
    sent = [(item["replies"], item["ended"]) for body in vllm.scored for item in body["items"]]
    assert sent == [
        (["one two"], True),
        (["one two three"], False),
        (["one < |im_end|>"], True),
        (["one two three four", "one"], True),
    ]


async def test_many_replies_go_in_several_requests_and_come_back_in_order(engine: VllmEngine, vllm: FakeVllm) -> None:
    asked = Message(role="user", content="Count.")
    on_vllm = OnVllm(engine, cache_salt="salt", neutralize=str)
    vllm.likelihood = lambda conversation, reply: -float(reply)
    many = MAX_SCORED_REPLIES + 10
    found = await on_vllm.score(MODEL, [([asked], [(str(n), True)]) for n in range(many)])
    assert found == [[-float(n)] for n in range(many)]
    assert len(vllm.scored) > 1


async def test_vllm_away_leaves_everything_as_it_is(store: Store, tokens: Tokens, settings: Settings) -> None:
    state = await said(store, 6)
    engine = VllmEngine(settings.model_copy(update={"vllm_url": f"http://127.0.0.1:{free_port()}"}))
    assert await over(store, engine, tokens, settings).optimize(**KEY) == "scorer-away"
    await engine.close()
    assert await store.users.fast_weights(**KEY) == state


class Broken:
    """An embedder that has failed."""

    name = "broken"

    def embed(self, texts):
        raise EmbedderUnavailable("no model")


@pytest.mark.parametrize("embedder", [None, Broken()])
async def test_without_an_embedder_nothing_is_merged_and_it_is_counted(
    store: Store, engine: VllmEngine, tokens: Tokens, settings: Settings, embedder: Broken | None
) -> None:
    for event in corrections(6, comments={1: "Always shout", 2: "Always shout please", 3: "Be kind to me"}):
        await say(store, event)
    outcome = await over(store, engine, tokens, settings, embedder).optimize(**KEY)
    assert outcome in ("improved", "kept")
    assert (await counted(store))["optimize_without", "embedder"] == 1


async def test_without_the_reflection_endpoint_the_search_goes_on_and_it_is_counted(
    store: Store, engine: VllmEngine, tokens: Tokens, settings: Settings
) -> None:
    await said(store, 12)
    away = settings.model_copy(update={"reflection_url": f"http://127.0.0.1:{free_port()}/v1", "reflection_model": "m"})
    assert await over(store, engine, tokens, away).optimize(**KEY) in ("improved", "kept")
    assert (await counted(store))["optimize_without", "reflection"] > 0


def embedded(redis_url: str, model: str = "words") -> set[str]:
    with Redis.from_url(redis_url) as client:
        fields: Any = client.hkeys(UserKeys(**KEY).embeddings(model))
        return {field.decode() for field in fields}


async def test_exemplars_that_do_not_all_fit_are_embedded_and_what_is_gone_is_dropped(
    store: Store, engine: VllmEngine, tokens: Tokens, settings: Settings, redis_url: str
) -> None:
    embedder = FakeEmbedder()
    await said(store, 12)
    await store.embeddings.put({"gone": FakeEmbedder().encode("gone")}, **KEY, model=embedder.name)
    await over(store, engine, tokens, settings, embedder).optimize(**KEY)
    state = await store.users.fast_weights(**KEY)
    assert embedded(redis_url) == set(state.exemplars)
    assert {x.prompt for x in state.exemplars.values()} <= set(embedder.texts)

    # The next time only what is new is computed, and a search that can't be made leaves that to do.
    embedder.texts.clear()
    event = corrections(13)[-1]
    state = await say(store, event.model_copy(update={"revision": state.revision + 1}))
    away = VllmEngine(settings.model_copy(update={"vllm_url": f"http://127.0.0.1:{free_port()}"}))
    assert await over(store, away, tokens, settings, embedder).optimize(**KEY) == "scorer-away"
    await away.close()
    assert embedded(redis_url) == set(state.exemplars)
    assert "Question 13?" in embedder.texts
    assert "Question 1?" not in embedder.texts


async def test_exemplars_that_all_chats_have_are_not_embedded(
    store: Store, engine: VllmEngine, tokens: Tokens, settings: Settings, redis_url: str
) -> None:
    await said(store, 2)
    assert await over(store, engine, tokens, settings, FakeEmbedder()).optimize(**KEY) == "too-little"
    assert embedded(redis_url) == set()


@pytest.mark.parametrize("embedder", [None, Broken()])
async def test_exemplars_that_can_not_be_embedded_are_counted(
    store: Store, engine: VllmEngine, tokens: Tokens, settings: Settings, embedder: Broken | None
) -> None:
    await said(store, 12)
    await over(store, engine, tokens, settings, embedder).optimize(**KEY)
    assert (await counted(store))["optimize_without", "recall"] == 1
    without = settings.model_copy(update={"recall": False})
    await over(store, engine, tokens, without, embedder).optimize(**KEY)
    assert (await counted(store))["optimize_without", "recall"] == 1
