"""Several vLLM replicas behind one gateway: whose request goes where, and what happens when one of them does not answer."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest

from service.domain.affinity import affinity_of, ranked
from service.domain.slow_weights import Scope
from service.errors import EngineUnavailable, UpstreamRejected
from service.replicas import addresses, waiting
from service.settings import Settings
from service.store import Store
from service.tokens import Tokens
from service.vllm import VllmEngine
from tests.conftest import gateway_client
from tests.factories import give_feedback, outcome_of
from tests.fakes import MODEL, FakeVllm, RecordedJobs
from tests.gateway import free_port
from tests.jobs import Trainer, opened, run
from tests.waiting import until

BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
async def replicas() -> AsyncIterator[list[FakeVllm]]:
    """Three of them."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(running()) for _ in range(3)]


@asynccontextmanager
async def running() -> AsyncIterator[FakeVllm]:
    fake = FakeVllm()
    await fake.start()
    yield fake
    fake.answering.set()
    await fake.stop()


@pytest.fixture
def settings(settings: Settings, replicas: list[FakeVllm]) -> Settings:
    return over(settings, *(replica.url for replica in replicas))


def over(settings: Settings, *urls: str) -> Settings:
    # On a busy machine a probe that is answered late must not pass for one that is not.
    patient = {"replica_probe_seconds": 0.05, "replica_probe_timeout_seconds": 60.0}
    return settings.model_copy(update={"vllm_url": "", "vllm_replica_urls": urls, **patient})


@pytest.fixture
async def engine(settings: Settings) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(settings)
    yield engine
    await engine.close()


@pytest.fixture
async def impatient(settings: Settings) -> AsyncIterator[VllmEngine]:
    """An engine that soon takes a replica for hanging."""
    engine = VllmEngine(settings.model_copy(update={"replica_probe_timeout_seconds": 0.4}))
    yield engine
    await engine.close()


def in_order(replicas: list[FakeVllm], user: str) -> list[FakeVllm]:
    """The user's own replica first."""
    return [replicas[n] for n in ranked(key(user), [replica.url for replica in replicas])]


def key(user: str) -> str:
    return affinity_of(tenant="acme", user=user)


async def ask(engine: VllmEngine, user: str = "alice", **body: Any) -> dict[str, Any]:
    return await engine.complete(BODY | body, request_id="one", affinity=key(user))


async def stream(engine: VllmEngine, user: str = "alice") -> list[bytes]:
    async with engine.stream(BODY | {"stream": True}, request_id="one", affinity=key(user)) as events:
        return [event async for piece in events for event in piece]


async def drained(events: AsyncIterator[list[bytes]]) -> None:
    async for _ in events:
        pass


def asked(replicas: list[FakeVllm]) -> list[int]:
    return [len(replica.bodies) for replica in replicas]


async def seen(engine: VllmEngine, look: Callable[[VllmEngine], bool]) -> None:
    async def looked() -> bool:
        return look(engine)

    await until(looked)


async def test_each_users_chats_go_to_one_replica_and_users_to_all(
    settings: Settings, tokens: Tokens, jobs: RecordedJobs, replicas: list[FakeVllm]
) -> None:
    users = [f"user-{n}" for n in range(12)]
    expected = [sum(in_order(replicas, user)[0] is replica for user in users) for replica in replicas]
    async with gateway_client(settings, tokens, jobs) as client, gateway_client(settings, tokens, jobs) as second:
        for user in users:
            for gateway in (client, second):
                reply = await gateway.post("/v1/chat/completions", json=BODY, headers={"X-User-ID": user})
                assert reply.status_code == 200
    assert asked(replicas) == [2 * count for count in expected]
    assert all(expected)


async def test_chats_of_nobody_are_spread(engine: VllmEngine, replicas: list[FakeVllm]) -> None:
    for n in range(30):
        await engine.complete(BODY, request_id=f"request-{n}")
    assert all(asked(replicas))


@pytest.mark.parametrize("serve", [ask, stream])
async def test_a_dead_replicas_request_goes_to_the_next_in_order_once(
    engine: VllmEngine, replicas: list[FakeVllm], serve: Callable[..., Any]
) -> None:
    own, following, last = in_order(replicas, "alice")
    await own.stop()
    await serve(engine)
    await serve(engine)
    assert (len(following.bodies), len(last.bodies)) == (2, 0)
    await following.stop()
    await serve(engine)
    assert len(last.bodies) == 1


async def test_with_two_of_three_dead_at_once_a_request_fails_after_two_tries_and_the_next_finds_the_third(
    engine: VllmEngine, replicas: list[FakeVllm]
) -> None:
    own, following, last = in_order(replicas, "alice")
    await own.stop()
    await following.stop()
    with pytest.raises(EngineUnavailable):
        await ask(engine)
    assert last.bodies == []
    await ask(engine)


async def test_a_replica_that_comes_back_gets_its_users_again(engine: VllmEngine, replicas: list[FakeVllm]) -> None:
    own, following, _ = in_order(replicas, "alice")
    await own.stop()
    await ask(engine)
    await own.start()
    await seen(engine, lambda engine: not any(replica.failures for replica in engine.replicas.all))
    await ask(engine)
    assert (len(own.bodies), len(following.bodies)) == (1, 1)


@pytest.mark.parametrize("serve", [ask, stream])
async def test_what_waits_for_a_replica_that_hangs_is_served_by_another(
    impatient: VllmEngine, replicas: list[FakeVllm], serve: Callable[..., Any]
) -> None:
    own, following, _ = in_order(replicas, "alice")
    own.answering.clear()
    await asyncio.wait_for(serve(impatient), 30)
    assert (len(own.bodies), len(following.bodies)) == (0, 1)


async def test_a_stream_that_began_breaks_off_with_its_replica_and_is_not_begun_again(
    impatient: VllmEngine, replicas: list[FakeVllm]
) -> None:
    own, following, last = in_order(replicas, "alice")
    own.piece_seconds = 0.02
    own.reply = lambda body: " ".join(["word"] * 5000)
    async with impatient.stream(BODY | {"stream": True}, request_id="one", affinity=key("alice")) as events:
        assert await anext(events)
        # From here on it answers no probe, and sends no word more.
        own.answering.clear()
        own.piece_seconds = 3600.0
        with pytest.raises(EngineUnavailable):
            await asyncio.wait_for(drained(events), 30)
    assert asked([following, last]) == [0, 0]


async def test_a_gateways_client_is_told_that_its_stream_broke_off(
    settings: Settings, tokens: Tokens, jobs: RecordedJobs, replicas: list[FakeVllm]
) -> None:
    own = in_order(replicas, "alice")[0]
    own.cut_stream_after = 2
    own.reply = lambda body: "One two three"
    async with gateway_client(settings, tokens, jobs) as client:
        reply = await client.post("/v1/chat/completions", json=BODY | {"stream": True})
    *_, told = [line.removeprefix("data: ") for line in reply.text.split("\n") if line]
    assert json.loads(told)["error"]["code"] == "engine_unavailable"
    assert sum(asked(replicas)) == 1


async def test_a_stream_cut_before_its_first_word_is_begun_elsewhere(
    engine: VllmEngine, replicas: list[FakeVllm]
) -> None:
    own, following, _ = in_order(replicas, "alice")
    own.cut_stream_after = 0
    assert (await stream(engine))[-1] == b"data: [DONE]"
    assert asked([own, following]) == [1, 1]


async def test_a_long_queue_sends_users_to_the_next_and_no_further(
    engine: VllmEngine, replicas: list[FakeVllm], settings: Settings
) -> None:
    own, following, last = in_order(replicas, "alice")
    own.waiting = settings.replica_spill_waiting
    engine.waiting()
    await seen(engine, lambda engine: any(replica.waiting for replica in engine.replicas.all))
    await ask(engine)
    assert asked([own, following, last]) == [0, 1, 0]
    # Where all are as busy, nothing is gained by leaving one's own.
    following.waiting = last.waiting = settings.replica_spill_waiting
    await seen(engine, lambda engine: all(replica.waiting for replica in engine.replicas.all))
    await ask(engine)
    assert asked([own, following, last]) == [1, 1, 0]


async def test_a_replica_that_refuses_for_overload_is_relieved(engine: VllmEngine, replicas: list[FakeVllm]) -> None:
    own, following, _ = in_order(replicas, "alice")
    own.refuse = 503, {"message": "The queue is full."}
    await ask(engine)
    assert asked([own, following]) == [1, 1]


async def test_a_request_that_is_at_fault_itself_is_not_sent_twice(
    engine: VllmEngine, replicas: list[FakeVllm]
) -> None:
    own = in_order(replicas, "alice")[0]
    own.refuse = 400, {"message": "This model's maximum context length is 2048 tokens.", "param": "input_tokens"}
    with pytest.raises(Exception, match="maximum context length"):
        await ask(engine)
    assert sum(asked(replicas)) == 1


async def test_an_adapter_that_a_replica_lacks_is_asked_of_the_next_for_a_while(
    engine: VllmEngine, replicas: list[FakeVllm]
) -> None:
    own, following, last = in_order(replicas, "alice")
    following.adapters.add("fs-1")
    for _ in range(2):
        await ask(engine, model="fs-1")
    await ask(engine)
    # Once for the adapter, once for the base.
    assert asked([own, following, last]) == [2, 2, 0]


async def test_an_adapter_that_nobody_has_is_a_404(engine: VllmEngine, replicas: list[FakeVllm]) -> None:
    with pytest.raises(UpstreamRejected) as refused:
        await ask(engine, model="fs-unknown")
    assert refused.value.status == 404
    assert sum(asked(replicas)) == 2


async def test_a_users_adapter_is_loaded_where_the_user_is_and_a_shared_one_everywhere(
    engine: VllmEngine, replicas: list[FakeVllm]
) -> None:
    for replica in replicas:
        replica.adapters |= {"fs-own", "fs-shared"}
    await engine.preload("fs-own", affinity=key("alice"))
    assert [replica.loaded for replica in in_order(replicas, "alice")] == [["fs-own"], [], []]
    await replicas[0].stop()
    await engine.preload("fs-shared")
    assert [replica.loaded[-1:] for replica in replicas[1:]] == [["fs-shared"], ["fs-shared"]]


async def test_a_promotion_tries_a_version_where_its_user_is_and_loads_a_shared_one_everywhere(
    settings: Settings, store: Store, replicas: list[FakeVllm]
) -> None:
    for replica in replicas:
        replica.adapters = replicas[0].adapters
    await give_feedback(store, 1)
    own = (await run(await opened(store), store, settings, Trainer(replicas[0]))).version
    assert [[body["model"] for body in replica.bodies] for replica in in_order(replicas, "alice")] == [[own], [], []]
    shared = (await run(await opened(store, Scope(kind="global")), store, settings, Trainer(replicas[0]))).version
    assert [replica.loaded for replica in replicas] == [[shared]] * 3
    assert sum(asked(replicas)) == 2


async def test_a_version_that_an_admin_puts_in_use_is_loaded_where_its_user_is(
    settings: Settings,
    store: Store,
    tokens: Tokens,
    jobs: RecordedJobs,
    replicas: list[FakeVllm],
    as_admin: dict[str, str],
) -> None:
    for replica in replicas:
        replica.adapters = replicas[0].adapters
    await give_feedback(store, 1)
    first, _ = [
        (
            await run(await opened(store), store, settings, Trainer(replicas[0], partial(outcome_of, content=content)))
        ).version
        for content in ("ab", "cd")
    ]
    async with gateway_client(settings, tokens, jobs) as client:
        back = await client.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "Worse."}, headers=as_admin)
        assert back.json()["to_version"] == first
    assert [replica.loaded for replica in in_order(replicas, "alice")] == [[first], [], []]


async def test_a_gateway_is_ready_while_one_replica_is_and_metrics_say_which_is_not(
    settings: Settings, tokens: Tokens, jobs: RecordedJobs, replicas: list[FakeVllm]
) -> None:
    await replicas[1].stop()
    replicas[2].waiting = 3
    async with gateway_client(settings, tokens, jobs) as client:
        assert (await client.get("/health/ready")).json()["checks"]["vllm"] == "ok"

        async def told() -> bool:
            text = (await client.get("/metrics")).text
            return (
                'fastslow_replica_up{replica="1"} 0.0' in text and 'fastslow_replica_waiting{replica="2"} 3.0' in text
            )

        await until(told)
        assert 'fastslow_replica_up{replica="0"} 1.0' in (await client.get("/metrics")).text
        for replica in replicas:
            await replica.stop()
        assert (await client.get("/health/ready")).status_code == 503


async def test_a_name_stands_for_each_of_its_addresses_and_one_that_joins_is_found(
    settings: Settings, vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(vllm.url.rpartition(":")[2])
    assert await addresses(f"dns+http://127.0.0.1:{port}") == [vllm.url]
    assert await addresses("http://vllm:8000/") == ["http://vllm:8000"]
    known: list[str] = []
    # The name server is not ours: its answers are what changes.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers(known, port))
    engine = VllmEngine(over(settings, f"dns+http://vllm:{port}"))
    with pytest.raises(EngineUnavailable, match="looked up"):
        await ask(engine)
    known.append("127.0.0.2")
    with pytest.raises(EngineUnavailable):
        await ask(engine)
    known.append("127.0.0.1")
    await seen(engine, lambda engine: len(engine.replicas.all) == 2)
    await ask(engine)
    known.remove("127.0.0.2")
    await seen(engine, lambda engine: [replica.url for replica in engine.replicas.all] == [vllm.url])
    # While the name server is away, those that were there stay.
    known.clear()
    await ask(engine)
    assert len(vllm.bodies) == 2
    await engine.close()


def answers(hosts: list[str], port: int) -> list[tuple[Any, ...]]:
    if not hosts:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in hosts]


async def test_one_vllm_is_asked_once_and_not_looked_after(settings: Settings, vllm: FakeVllm) -> None:
    engine = VllmEngine(settings.model_copy(update={"vllm_url": vllm.url}))
    vllm.refuse = 500, {"message": "Dead."}
    with pytest.raises(EngineUnavailable):
        await ask(engine)
    assert len(vllm.bodies) == 1
    vllm.waiting = 7
    assert engine.waiting() is None

    async def told() -> bool:
        return engine.waiting() == 7

    await until(told)
    await engine.close()


def test_queues_are_summed_over_engines_and_unknown_where_nothing_tells() -> None:
    page = b'# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{engine="0",model_name="m"} 2.0\n'
    page += b'vllm:num_requests_waiting_by_reason{engine="0"} 9.0\nvllm:num_requests_waiting{engine="1",model_name="m"} 1.0\n'
    assert waiting(page) == 3
    assert waiting(b"process_cpu_seconds_total 1.0\n") is None


async def test_a_port_where_nobody_listens_is_not_ready(settings: Settings) -> None:
    engine = VllmEngine(over(settings, *(f"http://127.0.0.1:{free_port()}" for _ in range(2))))
    with pytest.raises(EngineUnavailable):
        await engine.ready()
    await engine.close()
