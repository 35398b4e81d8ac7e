"""Limits and overload over real Redis and a fake vLLM: who is refused, with what, and who is let in all the same."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from redis import Redis

from service.domain.feedback import Message
from service.domain.rate_limits import RateLimits
from service.engine import BACKGROUND_PRIORITY
from service.settings import Settings
from service.tokens import Tokens
from service.vllm import VllmEngine
from tests.conftest import KEYS, OTHER_TENANT_KEY, gateway_client
from tests.fakes import MODEL, FakeVllm, RecordedJobs
from tests.waiting import PATIENCE_SECONDS, until
from workers.context_search.world import OnVllm

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "What is a noun?"}], "max_tokens": 50}
GLOBEX = {"Authorization": f"Bearer {OTHER_TENANT_KEY}"}

Gateway = Callable[..., Any]


@pytest.fixture
def gateway(settings: Settings, tokens: Tokens, jobs: RecordedJobs) -> Gateway:
    """Makes clients of gateways with other settings; all share Redis and vLLM."""

    def make(keys: Any = KEYS, **changes: Any) -> Any:
        return gateway_client(settings.model_copy(update=changes), tokens, jobs, keys=keys)

    return make


async def chat(client: httpx.AsyncClient, user: str = "alice", **more: Any) -> httpx.Response:
    headers = more.pop("headers", {}) | {"X-User-ID": user}
    return await client.post("/v1/chat/completions", json=CHAT | more, headers=headers)


async def metric(client: httpx.AsyncClient, name: str) -> float:
    """A counter with its labels, as it is scraped; 0 if it is not there."""
    lines = (await client.get("/metrics")).text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)


def error(response: httpx.Response) -> tuple[int, str, str]:
    body = response.json()["error"]
    return response.status_code, body["type"], body["code"]


# -- rate limits ------------------------------------------------------------------------------------------------------


async def test_a_burst_over_a_users_limit_is_refused_as_openai_does(gateway: Gateway, vllm: FakeVllm) -> None:
    async with gateway(user_chats_per_minute=3) as client:
        replies = await asyncio.gather(*(chat(client) for _ in range(8)))
        served = [reply for reply in replies if reply.status_code == 200]
        refused = next(reply for reply in replies if reply.status_code == 429)
        other = await chat(client, "bob")

        assert len(served) == 3
        assert len(vllm.bodies) == 4
        assert sorted(int(reply.headers["x-ratelimit-remaining-requests"]) for reply in served) == [0, 1, 2]
        assert {reply.headers["x-ratelimit-limit-requests"] for reply in replies} == {"3"}
        assert error(refused) == (429, "requests", "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert (other.status_code, other.headers["x-ratelimit-remaining-requests"]) == (200, "2")
        assert "x-ratelimit-limit-tokens" not in other.headers
        assert await metric(client, 'fastslow_refused_total{reason="user-chats"}') == 5


async def test_openais_client_takes_it_for_its_own_rate_limit(gateway: Gateway) -> None:
    async with gateway(user_chats_per_minute=1) as client:
        await chat(client)
        ours = openai.AsyncOpenAI(
            api_key=KEYS.api_keys[0].key, base_url="http://gateway/v1", http_client=client, max_retries=0
        )
        with pytest.raises(openai.RateLimitError) as caught:
            await ours.chat.completions.create(model=MODEL, messages=CHAT["messages"])
    assert caught.value.code == "rate_limit_exceeded"


async def test_gateways_share_the_buckets_and_tenants_do_not(gateway: Gateway) -> None:
    async with gateway(tenant_chats_per_minute=2) as one, gateway(tenant_chats_per_minute=2) as two:
        assert [(await chat(client, user)).status_code for client, user in ((one, "a"), (two, "b"), (one, "c"))] == [
            200, 200, 429,
        ]  # fmt: skip
        assert (await chat(two, headers=GLOBEX)).status_code == 200


async def test_what_is_refused_costs_the_tenant_nothing(gateway: Gateway) -> None:
    async with gateway(tenant_chats_per_minute=3, user_chats_per_minute=1) as client:
        refused = [(await chat(client, "mallory")).status_code for _ in range(6)]
        others = [(await chat(client, user)).status_code for user in ("bob", "carol", "dave")]
    assert refused == [200] + [429] * 5
    assert others == [200, 200, 429]


async def test_tokens_are_counted_of_the_prompt_and_the_longest_reply(gateway: Gateway, tokens: Tokens) -> None:
    async with gateway(user_tokens_per_minute=1000, user_chats_per_minute=100) as client:
        first = await chat(client, max_tokens=300)
        prompt = 1000 - 300 - int(first.headers["x-ratelimit-remaining-tokens"])
        assert tokens.count("What is a noun?") <= prompt <= tokens.count("What is a noun?") + 20
        assert first.headers["x-ratelimit-remaining-requests"] == "99"

        refused = await chat(client, max_tokens=900)
        assert error(refused) == (429, "tokens", "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        # What was refused is not counted, as a request neither.
        after = await chat(client, max_tokens=300)
        assert (after.status_code, after.headers["x-ratelimit-remaining-requests"]) == (200, "98")


async def test_a_chat_larger_than_the_whole_limit_is_told_so_and_not_to_come_again(gateway: Gateway) -> None:
    async with gateway(user_tokens_per_minute=100) as client:
        reply = await chat(client, max_tokens=2000)
    assert error(reply) == (429, "tokens", "rate_limit_exceeded")
    assert reply.headers["x-should-retry"] == "false"
    assert "retry-after" not in reply.headers


async def test_who_chatted_too_much_can_still_say_what_was_wrong(gateway: Gateway) -> None:
    async with gateway(user_chats_per_minute=1, user_feedback_per_minute=2) as client:
        interaction = (await chat(client)).json()["id"]
        assert (await chat(client)).status_code == 429
        given = [
            await client.post("/v1/feedback", json={"interaction_id": interaction, "rating": rating / 10})
            for rating in range(3)
        ]
    assert [reply.status_code for reply in given] == [200, 200, 429]
    assert error(given[2]) == (429, "requests", "rate_limit_exceeded")


async def test_a_tenants_own_limits_are_in_the_keys_file(gateway: Gateway) -> None:
    keys = KEYS.model_copy(update={"limits": {"globex": RateLimits(user_chats_per_minute=1)}})
    async with gateway(keys, user_chats_per_minute=2) as client:
        ours = [(await chat(client)).status_code for _ in range(3)]
        theirs = [(await chat(client, headers=GLOBEX)).status_code for _ in range(2)]
    assert (ours, theirs) == ([200, 200, 429], [200, 429])


async def test_a_bucket_expires_when_it_is_full(gateway: Gateway, redis_url: str) -> None:
    async with gateway(user_chats_per_minute=3, tenant_tokens_per_minute=600) as client:
        await chat(client, max_tokens=50)
    redis = Redis.from_url(redis_url)
    seconds = [redis.ttl(key) for key in redis.scan_iter("fs:limits:*")]
    assert len(seconds) == 2
    assert all(0 < left <= 20 for left in seconds)
    redis.close()


async def test_limits_that_are_off_ask_nothing_of_redis(gateway: Gateway, redis_url: str) -> None:
    redis = Redis.from_url(redis_url)

    def scripts() -> int:
        calls: int = redis.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)
        return calls

    async def asked(**limits: int) -> int:
        async with gateway(**limits) as client:
            await chat(client)
            before = scripts()
            reply = await chat(client)
            assert ("x-ratelimit-limit-requests" in reply.headers) == bool(limits)
            return scripts() - before

    assert await asked() == 0
    assert await asked(user_chats_per_minute=10, tenant_tokens_per_minute=5000) == 2
    redis.close()


async def test_without_redis_nobody_is_refused_and_that_is_told(gateway: Gateway, vllm: FakeVllm) -> None:
    async with gateway(redis_url="redis://127.0.0.1:1/0", user_chats_per_minute=1) as client:
        replies = [await chat(client) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200] * 3
        assert {reply.headers["x-fastslow-limits"] for reply in replies} == {"unchecked"}
        assert await metric(client, "fastslow_limits_unchecked_total") == 3


# -- load -------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def busy(client: httpx.AsyncClient, vllm: FakeVllm, *, users: tuple[str, ...]) -> AsyncIterator[list[Any]]:
    """Chats that are at vLLM until the block ends."""
    seen = len(vllm.bodies)
    vllm.free.clear()
    tasks = [asyncio.ensure_future(chat(client, user)) for user in users]

    async def arrived() -> bool:
        return len(vllm.bodies) == seen + len(users)

    await until(arrived, what="the chats' arrival at vLLM")
    try:
        yield tasks
    finally:
        vllm.free.set()


async def in_line(client: httpx.AsyncClient, count: int) -> None:
    async def waiting() -> bool:
        return await metric(client, "fastslow_chats_waiting") == count

    await until(waiting, what=f"a line of {count}")


async def test_more_chats_than_there_are_places_wait_and_more_than_may_wait_are_refused(
    gateway: Gateway, vllm: FakeVllm
) -> None:
    async with gateway(chats_at_once=2, chats_waiting=1) as client:
        async with busy(client, vllm, users=("alice", "bob")) as held:
            waiting = asyncio.ensure_future(chat(client, "carol"))
            await in_line(client, 1)
            refused = await chat(client, "dave")
            assert await metric(client, "fastslow_chats_in_flight") == 2
            assert len(vllm.bodies) == 2
        replies = await asyncio.gather(*held, waiting)
        assert error(refused) == (503, "service_unavailable_error", "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert [reply.status_code for reply in replies] == [200] * 3
        assert await metric(client, "fastslow_chats_in_flight") == 0
        assert await metric(client, 'fastslow_refused_total{reason="gate"}') == 1


async def test_a_wait_for_a_place_ends(gateway: Gateway, vllm: FakeVllm) -> None:
    async with gateway(chats_at_once=1, chat_wait_seconds=0.05) as client, busy(client, vllm, users=("alice",)):
        assert error(await chat(client, "bob"))[2] == "overloaded"


async def test_one_user_who_floods_the_line_does_not_keep_others_out(gateway: Gateway, vllm: FakeVllm) -> None:
    async with gateway(chats_at_once=1, chats_waiting=3) as client:
        async with busy(client, vllm, users=("alice",)) as held:
            flood = [asyncio.ensure_future(chat(client, "mallory")) for _ in range(3)]
            await in_line(client, 3)
            bob = asyncio.ensure_future(chat(client, "bob"))
            done, _ = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_SECONDS)
            assert [task.result().status_code for task in done] == [503]
        replies = await asyncio.gather(*held, *flood, bob)
    assert sorted(reply.status_code for reply in replies) == [200, 200, 200, 200, 503]
    assert bob.result().status_code == 200


@pytest.mark.parametrize("way", ["whole", "streamed", "refused by vLLM", "stream broken", "dry run", "too long"])
async def test_every_way_that_a_chat_ends_gives_its_place_up(gateway: Gateway, vllm: FakeVllm, way: str) -> None:
    more: dict[str, Any] = {"stream": way.startswith("stream")}
    if way == "refused by vLLM":
        vllm.refuse = (503, {"message": "queue full"})
    elif way == "stream broken":
        vllm.cut_stream_after = 2
    elif way == "dry run":
        more["personalization"] = {"dry_run": True}
    elif way == "too long":
        more["messages"] = [{"role": "user", "content": "word " * 5000}]
    async with gateway(chats_at_once=1, chats_waiting=0) as client:
        await chat(client, **more)
        vllm.refuse = vllm.cut_stream_after = None
        assert (await chat(client)).status_code == 200
        assert await metric(client, "fastslow_chats_in_flight") == 0


async def test_a_long_queue_at_vllm_refuses_chats_until_it_is_short(gateway: Gateway, vllm: FakeVllm) -> None:
    vllm.waiting = 9
    async with gateway(vllm_most_waiting=4, replica_probe_seconds=0.05) as client:

        async def status(wanted: int) -> httpx.Response | None:
            reply = await chat(client)
            return reply if reply.status_code == wanted else None

        refused = await until(lambda: status(503), what="a refusal")
        assert error(refused)[2] == "overloaded"
        assert await metric(client, 'fastslow_refused_total{reason="engine-queue"}') >= 1
        vllm.waiting = 2
        assert await until(lambda: status(200), what="a reply")


async def test_a_stream_that_takes_too_long_in_all_ends_with_an_error_and_gives_its_place_up(
    gateway: Gateway, vllm: FakeVllm
) -> None:
    vllm.reply, vllm.piece_seconds = lambda _: "word " * 2000, 0.02
    async with gateway(upstream_total_seconds=0.3, chats_at_once=1, chats_waiting=0) as client:
        streamed = await chat(client, stream=True)
        vllm.reply, vllm.piece_seconds = lambda _: "A naming word.", 0.0
        assert (await chat(client)).status_code == 200
    *pieces, last = [event for event in streamed.text.split("\n\n") if event]
    assert len(pieces) > 1
    assert "engine_unavailable" in last


async def test_what_workers_have_generated_comes_after_chats(
    client: httpx.AsyncClient, settings: Settings, vllm: FakeVllm
) -> None:
    engine = VllmEngine(settings)
    on_vllm = OnVllm(engine, cache_salt="salt", neutralize=str)
    await on_vllm.reply(MODEL, [Message(role="user", content="What is a noun?")], max_tokens=8)
    await engine.close()
    assert vllm.last["priority"] == BACKGROUND_PRIORITY > 0
    await chat(client)
    # vLLM's default, 0, is the first of all that may be sent.
    assert "priority" not in vllm.last
