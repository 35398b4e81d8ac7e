"""Traces as a collector gets them: from the client through the gateway to vLLM, and through Celery into a worker."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from service.jobs import CeleryJobs
from service.logs import request_id
from service.settings import Settings
from service.store import Store
from service.tokens import Tokens
from service.tracing import open_tracing
from tests.collector import Collector, collecting
from tests.conftest import gateway_client
from tests.factories import give_feedback
from tests.fakes import MODEL, FakeVllm, RecordedJobs
from tests.gateway import environment
from tests.jobs import Trainer, opened, run_all
from tests.waiting import until

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAID = "Where do puffins sleep?"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": SAID}]}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@pytest.fixture
def traced(settings: Settings, collector: Collector) -> Settings:
    return settings.model_copy(update={"otlp_endpoint": collector.url})


@asynccontextmanager
async def traced_client(settings: Settings, tokens: Tokens) -> AsyncIterator[httpx.AsyncClient]:
    """Of a gateway whose spans are with the collector once the block has ended."""
    tracing = open_tracing(settings, service="fastslow-gateway")
    async with gateway_client(settings, tokens, RecordedJobs(), tracing=tracing) as http:
        yield http


def traceparent(flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{TRACE}-{CALLER}-{flags}"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_is_one_trace_from_the_client_to_vllm(
    traced: Settings, tokens: Tokens, collector: Collector, vllm: FakeVllm, stream: bool
) -> None:
    async with traced_client(traced, tokens) as client:
        await client.get("/health/live")
        reply = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream}, headers=traceparent())
        assert reply.status_code == 200

    whole = collector.named("POST /v1/chat/completions")
    assert (whole.service, whole.kind, whole.trace_id) == ("fastslow-gateway", "server", TRACE)
    assert whole.parent_id == CALLER
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.attributes["fastslow.request_id"] == reply.headers["x-request-id"]
    parts = [span for span in collector.spans if span.parent_id == whole.span_id]
    assert [span.name for span in sorted(parts, key=lambda span: span.started)] == [
        "admit",
        "read state",
        "choose context",
        "vllm",
        "record",
    ]
    assert collector.spans == [*parts, whole]
    asked = collector.named("vllm")
    assert vllm.headers[-1]["traceparent"] == f"00-{TRACE}-{asked.span_id}-01"
    assert (asked.kind, asked.attributes["gen_ai.request.model"]) == ("client", MODEL)
    assert whole.started < asked.started < asked.ended < whole.ended
    if stream:
        # It lasts to the stream's end, before which the interaction is stored.
        assert asked.ended > collector.named("record").ended


async def test_no_span_holds_what_a_user_said_or_who_it_is(
    traced: Settings, tokens: Tokens, collector: Collector, vllm: FakeVllm
) -> None:
    async with traced_client(traced, tokens) as client:
        await client.post("/v1/chat/completions", json=CHAT)
        await client.get("/v1/users/alice/context")
        vllm.refuse = (400, {"message": f"I can't digest '{SAID}'"})
        await client.post("/v1/chat/completions", json=CHAT)
    assert collector.named("GET /v1/users/{user:path}/context").attributes["http.response.status_code"] == 200
    assert [span.failed for span in collector.spans if span.name == "vllm"] == [None, "UpstreamRejected"]
    everything = repr(collector.spans)
    assert "puffins" not in everything
    assert "alice" not in everything


async def test_a_vllm_that_is_away_fails_its_span_by_the_error_that_the_client_gets(
    traced: Settings, tokens: Tokens, collector: Collector
) -> None:
    away = traced.model_copy(update={"vllm_url": "http://127.0.0.1:1"})
    async with traced_client(away, tokens) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503
    assert collector.named("vllm").failed == "EngineUnavailable"


async def test_a_trace_that_the_client_does_not_record_is_passed_on_and_not_recorded(
    traced: Settings, tokens: Tokens, collector: Collector, vllm: FakeVllm
) -> None:
    async with traced_client(traced, tokens) as client:
        await client.post("/v1/chat/completions", json=CHAT, headers=traceparent("00"))
    assert vllm.headers[-1]["traceparent"].split("-")[1::2] == [TRACE, "00"]
    assert collector.spans == []


async def test_a_share_of_the_traces_that_begin_here_is_recorded(
    traced: Settings, tokens: Tokens, collector: Collector
) -> None:
    none = traced.model_copy(update={"otlp_share": 0.0})
    async with traced_client(none, tokens) as client:
        await client.post("/v1/chat/completions", json=CHAT)
        await client.post("/v1/chat/completions", json=CHAT, headers=traceparent())
    assert {span.trace_id for span in collector.spans} == {TRACE}


async def test_a_collector_that_is_away_costs_no_chat(settings: Settings, tokens: Tokens) -> None:
    away = settings.model_copy(update={"otlp_endpoint": "http://127.0.0.1:9"})
    async with traced_client(away, tokens) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_a_consolidation_has_a_span_for_each_stage_of_each_job(
    traced: Settings, store: Store, vllm: FakeVllm, collector: Collector
) -> None:
    await give_feedback(store, 1)
    job = await opened(store)
    tracing = open_tracing(traced, service="fastslow-worker")
    assert tracing is not None
    with tracing.begin("consolidate", kind="consumer", carrier=traceparent()):
        [ended] = await run_all([job], store, traced, Trainer(vllm))
    tracing.close()

    assert ended.state == "promoted"
    task, whole = collector.named("consolidate"), collector.named("job")
    assert (task.trace_id, whole.parent_id) == (TRACE, task.span_id)
    assert whole.attributes["fastslow.job"] == job.id
    assert whole.attributes["fastslow.state"] == "promoted"
    assert whole.attributes["fastslow.scope_kind"] == "user"
    stages = [span.name for span in collector.spans if span.parent_id == whole.span_id]
    assert stages == ["data", "train", "probe"]
    # The version is tried in vLLM before anybody is served by it.
    assert vllm.headers[-1]["traceparent"].split("-")[2] == collector.named("vllm").span_id


@pytest.mark.timeout(300)
async def test_the_trace_and_the_request_go_on_in_a_workers_process(
    traced: Settings, collector: Collector, tmp_path: Path
) -> None:
    tracing = open_tracing(traced, service="fastslow-gateway")
    assert tracing is not None
    request_id.set("request-of-this-test")
    with tracing.begin("POST", kind="server", carrier=traceparent()):
        await CeleryJobs(traced).optimize("acme", "alice")
    tracing.close()

    command = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-Q", "control", "--concurrency", "1"]
    spoken = traced.model_copy(update={"log_format": "json", "model_name": MODEL})
    log = tmp_path / "worker.log"
    with log.open("wb") as output:
        worker = await asyncio.create_subprocess_exec(
            *command,
            "--without-mingle",
            "--without-gossip",
            "--loglevel",
            "INFO",
            env=environment(spoken),
            stdout=output,
            stderr=output,
        )

    async def done() -> bool:
        return "optimize_context" in log.read_text() and "succeeded" in log.read_text()

    try:
        await until(done, seconds=200, what="the task")
    finally:
        worker.terminate()
        await asyncio.wait_for(worker.wait(), 30)

    task = collector.named("optimize_context")
    assert (task.service, task.kind, task.trace_id) == ("fastslow-worker", "consumer", TRACE)
    assert task.parent_id == collector.named("send").span_id
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    [succeeded] = [line for line in lines if "optimize_context" in line["message"] and "succeeded" in line["message"]]
    assert (succeeded["level"], succeeded["trace_id"]) == ("INFO", TRACE)
    assert succeeded["request_id"] == "request-of-this-test"
