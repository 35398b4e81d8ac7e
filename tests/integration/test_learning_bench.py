"""The learning benchmark over a real gateway: every arm, the consolidations too. vLLM and the training are small fakes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from rich.console import Console

from service.engine import VllmEngine
from service.settings import Settings
from service.store import Store
from tests.benchmarks.learning.arms import CHANNELS, PLAIN
from tests.benchmarks.learning.client import Refused, Service
from tests.benchmarks.learning.folder import open_run
from tests.benchmarks.learning.plan import plan
from tests.benchmarks.learning.session import execute
from tests.conftest import ADMIN_KEY, CLIENT_KEY, KEYS
from tests.factories import outcome_of
from tests.fakes import MODEL, FakeVllm
from tests.gateway import gateway_process
from workers.consolidation.work import OnProgress, Outcome, Work
from workers.runner import run_job


@pytest.fixture
async def service(settings: Settings) -> AsyncIterator[Service]:
    async with gateway_process(settings, KEYS) as url:
        service = Service(url, model=MODEL, client_key=CLIENT_KEY, admin_key=ADMIN_KEY)
        yield service
        await service.close()


@asynccontextmanager
async def worker(store: Store, settings: Settings, vllm: FakeVllm) -> AsyncIterator[None]:
    """Ends every job that is opened, with a version of its own."""

    def train(work: Work, _: OnProgress) -> Outcome:
        outcome = outcome_of(work, content=f"{len(vllm.adapters):02d}")
        assert outcome.version is not None
        vllm.adapters.add(outcome.version.name)
        return outcome

    async def work() -> None:
        while True:
            for job, _ in await store.jobs.unfinished():
                await run_job(job.id, store=store, engine=engine, settings=settings, consolidate=train)
            await asyncio.sleep(0.05)

    engine = VllmEngine(settings)
    task = asyncio.create_task(work())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await engine.close()


async def test_every_arm_is_served_by_what_it_is_named_after(
    service: Service, store: Store, settings: Settings, vllm: FakeVllm, tmp_path: Path
) -> None:
    chosen = plan(
        "smoke",
        seed=0,
        arms=(*PLAIN, *CHANNELS),
        users=2,
        tests=2,
        points=(0, 6),
        shuffled=1,
        # Nobody optimizes here.
        settle_seconds=0.0,
    )
    run = open_run(tmp_path / "run", chosen, where="here")
    async with worker(store, settings, vllm):
        text = await execute(run, chosen, service, concurrency=4, console=Console(quiet=True))

    line = json.loads(text)
    assert line["arms"].keys() == {*PLAIN, *CHANNELS}
    assert [list(line["arms"][arm]) for arm in ("fast", "pooled", "slow", "both")] == [["0", "6"], ["6"], ["6"], ["6"]]
    assert (line["adapters"], line["over_budget"], line["kl_text_max_nats"]) == (3, 0, 0.005)
    versions = {version["scope"]: version for version in await service.adapters()}
    assert not versions["global"]["in_use"], "the shared adapter is taken back before the users' own are measured"
    for record in run.records.under("reply"):
        _, arm, user, point, _ = record["key"]
        scope = f"user:{run.prefix}-{user}" if arm in ("slow", "both") else "global"
        served = versions[scope]["name"] if arm in ("slow", "both", "pooled") else "base"
        assert record["reply"]["adapter"] == served, record["key"]
        if arm in ("base", "pooled", "slow") or point == 0:
            assert record["reply"]["context_tokens"] == 0, record["key"]


async def test_an_endpoint_that_refuses_is_quoted(service: Service) -> None:
    with pytest.raises(Refused, match=r"404 .*no interaction"):
        await service.feedback("nobody", {"interaction_id": "x", "rating": True}, key="k")
