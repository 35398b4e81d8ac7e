"""The learning benchmark over a real gateway: every arm, the consolidations too. vLLM and the training are small fakes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from service.settings import Settings
from service.store import Store
from service.vllm import VllmEngine
from tests.benchmarks.learning.arms import CHANNELS, PLAIN, SLOW, stage_of
from tests.benchmarks.learning.client import Refused, Service
from tests.benchmarks.learning.folder import open_run
from tests.benchmarks.learning.plan import plan
from tests.benchmarks.learning.session import execute
from tests.conftest import ADMIN_KEY, CLIENT_KEY, KEYS
from tests.factories import LOADED_BASE, one_by_one, outcome_of
from tests.fakes import MODEL, FakeVllm, RecordedJobs
from tests.gateway import gateway_process
from workers.consolidation.work import OnProgress, Outcome, Work
from workers.runner import run_jobs


@pytest.fixture
async def service(settings: Settings) -> AsyncIterator[Service]:
    async with gateway_process(settings, KEYS) as url:
        service = Service(url, model=MODEL, client_key=CLIENT_KEY, admin_key=ADMIN_KEY)
        yield service
        await service.close()


@asynccontextmanager
async def worker(store: Store, settings: Settings, vllm: FakeVllm) -> AsyncIterator[list[tuple[str, float | None]]]:
    """Ends every job that is opened, with a version of its own; the scopes with the chat budgets that admins have set for them."""
    done: list[tuple[str, float | None]] = []

    def train(work: Work, _: OnProgress) -> Outcome:
        done.append((str(work.scope), work.kl_chat_budget_nats))
        outcome = outcome_of(work, content=f"{len(vllm.adapters):02d}")
        assert outcome.version is not None
        vllm.adapters.add(outcome.version.name)
        return outcome

    async def work() -> None:
        while True:
            for job, _ in await store.jobs.unfinished():
                await run_jobs(
                    [job.id],
                    store=store,
                    engine=engine,
                    settings=settings,
                    consolidate=one_by_one(train),
                    base=lambda: LOADED_BASE,
                    forget=lambda job: None,
                )
            await asyncio.sleep(0.05)

    engine = VllmEngine(settings)
    task = asyncio.create_task(work())
    try:
        yield done
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
        settle_adapters_seconds=0.0,
    )
    run = open_run(tmp_path / "run", chosen, where="here")
    async with worker(store, settings, vllm) as done:
        text = await execute(run, chosen, service, concurrency=4, console=Console(quiet=True))

    line = json.loads(text)
    assert line["arms"].keys() == {*PLAIN, *CHANNELS}
    assert [list(line["arms"][arm]) for arm in ("fast", *SLOW)] == [["0", "6"], *([["6"]] * len(SLOW))]
    assert (line["adapters"], line["over_budget"], line["kl_text_max_nats"]) == (5, 0, 0.005)
    own = [f"user:{run.prefix}-00{half}" for half in "ab"]
    budgets = {(scope, budget): done.count((scope, budget)) for scope, budget in done}
    assert budgets == dict.fromkeys([("global", None), *((scope, nats) for scope in own for nats in (None, 0.02))], 1)
    versions = await service.adapters()
    assert not any(version["in_use"] for version in versions), "each stage's adapters are taken back before the next"
    made = {version["job"]: version["name"] for version in versions}
    for record in run.records.under("reply"):
        _, arm, user, point, _ = record["key"]
        scope = "global" if arm == "pooled" else f"user:{run.prefix}-{user}"
        started = run.records.get("consolidating", stage_of(arm), scope)
        assert record["reply"]["adapter"] == (made[started["id"]] if started else "base"), record["key"]
        if arm in ("base", "pooled", "slow") or point == 0:
            assert record["reply"]["context_tokens"] == 0, record["key"]


async def test_scopes_are_sent_to_be_trained_side_by_side_and_an_open_one_keeps_its_job(
    client: httpx.AsyncClient, as_admin: dict[str, str], jobs: RecordedJobs, settings: Settings
) -> None:
    async def start(*scopes: str) -> list[tuple[str, str]]:
        response = await client.post("/v1/admin/consolidations/batch", json={"scopes": scopes}, headers=as_admin)
        assert response.status_code == 202, response.text
        return [(job["scope"], job["id"]) for job in response.json()["data"]]

    [(_, open_job)] = await start("user:u3")
    scopes = [f"user:u{n}" for n in range(settings.scopes_per_job + 3)]
    found = await start(*scopes, "user:u0")
    assert [scope for scope, _ in found] == scopes
    ids = [job_id for _, job_id in found]
    assert ids[3] == open_job
    new = [job_id for job_id in ids if job_id != open_job]
    assert jobs.sent == [[open_job], new[: settings.scopes_per_job], new[settings.scopes_per_job :]]


@pytest.mark.parametrize(
    ("scopes", "status"), [([], 422), (["team:x"], 400), (["user:u"] * 257, 422), (["user:" + "u" * 600], 422)]
)
async def test_a_batch_with_anything_that_is_no_scope_starts_nothing(
    client: httpx.AsyncClient,
    as_admin: dict[str, str],
    jobs: RecordedJobs,
    store: Store,
    scopes: list[str],
    status: int,
) -> None:
    body = {"scopes": [*(["user:alice"] if status == 400 else []), *scopes]}
    response = await client.post("/v1/admin/consolidations/batch", json=body, headers=as_admin)
    assert (response.status_code, jobs.sent, await store.jobs.unfinished()) == (status, [], [])


async def test_an_endpoint_that_refuses_is_quoted(service: Service) -> None:
    with pytest.raises(Refused, match=r"404 .*no interaction"):
        await service.feedback("nobody", {"interaction_id": "x", "rating": True}, key="k")
