"""Redis's memory runs out: interactions give way first, then they are not kept, and what users say is always kept."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from redis import Redis

from service.domain.feedback import Interaction, Message, VersionTuple
from service.settings import Settings
from service.store import Store
from service.store.keys import UserKeys
from service.tokens import Tokens
from tests.conftest import gateway_client
from tests.fakes import MODEL, RecordedJobs
from tests.folds import lose_fold
from tests.waiting import until

TURNS = [
    {"role": "system", "content": "You teach."},
    {"role": "user", "content": "What is a verb?"},
    {"role": "assistant", "content": "A doing word."},
    {"role": "user", "content": "What is a noun?"},
]
CHAT: dict[str, Any] = {"model": MODEL, "messages": TURNS}
KEYS = UserKeys(tenant="acme", user="alice")


@contextmanager
def memory_limit(redis_url: str, *, percent_used: float) -> Iterator[None]:
    """What Redis uses now is this much of what it may use, inside the block."""
    with Redis.from_url(redis_url) as redis:
        limit = int(redis.info("memory")["used_memory"] * 100 / percent_used)
        redis.config_set("maxmemory", limit)
        try:
            yield
        finally:
            redis.config_set("maxmemory", 0)


async def chat(client: httpx.AsyncClient, **more: Any) -> httpx.Response:
    reply = await client.post("/v1/chat/completions", json=CHAT | more)
    assert reply.status_code == 200, reply.text
    return reply


async def give(client: httpx.AsyncClient, interaction: str, **signals: Any) -> httpx.Response:
    headers = {"Idempotency-Key": signals.pop("key")} if "key" in signals else {}
    return await client.post("/v1/feedback", json={"interaction_id": interaction} | signals, headers=headers)


async def stored(store: Store, interaction_id: str) -> Interaction:
    inputs = await store.users.feedback_inputs(
        interaction_id, tenant="acme", user="alice", other_id=None, idempotency_key=None
    )
    assert inputs.interaction is not None
    return inputs.interaction


@pytest.fixture
async def client(settings: Settings, tokens: Tokens, jobs: RecordedJobs) -> AsyncIterator[httpx.AsyncClient]:
    """Of a gateway that takes Redis for short of memory when half of it is used."""
    # On a busy machine a second is soon over, and that is not what is looked at here.
    short = settings.model_copy(update={"interactions_brief_share": 0.5})
    async with gateway_client(short, tokens, jobs) as http:
        yield http


async def test_past_all_memory_chats_are_answered_and_feedback_on_what_was_kept_is_taken(
    client: httpx.AsyncClient, redis_url: str
) -> None:
    kept = (await chat(client)).json()["id"]
    with memory_limit(redis_url, percent_used=150):
        unkept = await chat(client)
        streamed = await chat(client, stream=True)
        given = await give(client, kept, comment="Be brief.", rating=-1)
        again = await give(client, kept, comment="Be brief.", key="k1")
        retried = await give(client, kept, comment="Be brief.", key="k1")
        other = await give(client, kept, rating=1, key="k1")
        lost = await give(client, unkept.json()["id"], rating=1)
        after = await chat(client, personalization={"dry_run": True})

    assert unkept.headers["x-fastslow-degraded"] == "interaction-not-recorded"
    assert ": x-fastslow-degraded: interaction-not-recorded\n\n" in streamed.text
    assert (given.status_code, given.json()["context_revision"], given.json()["changed"]) == (200, 1, True)
    assert (again.status_code, again.json()["changed"], retried.json()) == (200, False, again.json())
    assert other.status_code == 409
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "unknown_interaction")
    assert after.json()["context_revision"] == 1
    assert len(after.json()["items"]) == 1
    assert 'fastslow_degraded_total{reason="interaction-not-recorded"} 2.0' in (await client.get("/metrics")).text


async def test_a_user_whose_cache_is_gone_is_served_personalized_from_the_log(
    client: httpx.AsyncClient, redis_url: str
) -> None:
    await give(client, (await chat(client)).json()["id"], comment="Be brief.")
    kept = (await chat(client)).json()["id"]
    lose_fold(redis_url)
    with memory_limit(redis_url, percent_used=150):
        reply = await chat(client)
        given = await give(client, kept, rating=1)
    assert reply.headers["x-fastslow-context-revision"] == "1"
    assert reply.headers["x-fastslow-degraded"] == "interaction-not-recorded"
    assert (given.status_code, given.json()["context_revision"]) == (200, 2)


async def test_while_memory_is_short_interactions_are_kept_in_brief_and_not_for_long(
    client: httpx.AsyncClient, redis_url: str, store: Store, settings: Settings
) -> None:
    whole = (await chat(client)).json()["id"]
    with memory_limit(redis_url, percent_used=75):

        async def in_brief() -> httpx.Response | None:
            reply = await chat(client)
            return reply if reply.headers.get("x-fastslow-degraded") == "interaction-in-brief" else None

        brief = (await until(in_brief, what="a look at Redis's memory")).json()["id"]
        streamed = await chat(client, stream=True)
        given = await give(client, brief, correction="A naming word.")

    assert [m.content for m in (await stored(store, whole)).messages] == [turn["content"] for turn in TURNS]
    assert [m.content for m in (await stored(store, brief)).messages] == ["You teach.", "What is a noun?"]
    assert ": x-fastslow-degraded: interaction-in-brief\n\n" in streamed.text
    assert given.status_code == 200
    with Redis.from_url(redis_url) as redis:
        left = {name: redis.ttl(KEYS.interaction(name)) for name in (whole, brief)}
    assert 0 < left[brief] <= settings.brief_retention_seconds < left[whole]


@pytest.mark.parametrize(
    ("roles", "kept"), [("us", "us"), ("suau", "su"), ("uaua", "ua"), ("a", "a"), ("ssuat", "ssuat"), ("uauat", "uat")]
)
def test_in_brief_is_from_the_last_user_message_on_and_what_the_system_says(roles: str, kept: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = tuple(Message(role=names[role], content=f"{n}") for n, role in enumerate(roles))
    interaction = Interaction(
        id="x", tenant="t", user="u", created=0.0, messages=messages, reply="r", version=VersionTuple(model="m")
    )
    brief = interaction.in_brief().messages
    assert "".join(message.role[0] for message in brief) == kept
    assert brief[-1] == messages[-1]
