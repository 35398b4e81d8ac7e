"""The tasks that Celery runs, each a few lines around plain code; torch is imported inside the one that trains."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from service.jobs import (
    ARCHIVE,
    CONSOLIDATE,
    COUNT_COLD_START,
    FAST_SLOW,
    OPTIMIZE,
    QUARANTINE,
    RETIRE,
    SEND_OPTIMIZATIONS,
    SWEEP,
    CeleryJobs,
)
from service.settings import Settings
from service.store import Store, open_store
from service.vllm import VllmEngine
from workers.adapter_store import adapter_store
from workers.app import app, settings
from workers.archive import archive_logs
from workers.cold_start import count_all
from workers.consolidation.work import Ends, OnProgress, Work
from workers.context_search.due import send_due
from workers.quarantine import HashedBase, LoadedBase, quarantine_all
from workers.retention import replicas, retire_old
from workers.runner import MOST_ATTEMPTS, run_jobs
from workers.sweep import sweep as run_sweep

if TYPE_CHECKING:
    from service.embedding import Embedder
    from service.tokens import Tokens
    from workers.consolidation.base import Base


# A worker reads whole logs and asks every bucket, and nobody waits for it as for a chat.
PATIENT = settings.model_copy(update={"redis_timeout_seconds": 30.0})
# A search has a time limit, so it waits no longer than that for one reply.
PROMPT = settings.model_copy(update={"upstream_timeout_seconds": float(settings.optimize_limit_seconds)})


@asynccontextmanager
async def opened() -> AsyncIterator[Store]:
    """The store, for one task."""
    store = open_store(PATIENT)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def opened_with_engine(settings: Settings) -> AsyncIterator[tuple[Store, VllmEngine]]:
    """The store and vLLM's client, for one task."""
    engine = VllmEngine(settings)
    async with opened() as store:
        try:
            yield store, engine
        finally:
            await engine.close()


@app.task(name=SWEEP)
def sweep() -> None:
    """Find due scopes and dead workers' jobs, and queue them."""

    async def run() -> None:
        async with opened() as store:
            await run_sweep(store, CeleryJobs(settings), settings, now=time.time(), unique=lambda: uuid.uuid4().hex)

    asyncio.run(run())


@app.task(name=ARCHIVE)
def archive() -> None:
    """Move the oldest events of long logs into files."""

    async def run() -> None:
        async with opened() as store:
            await archive_logs(store, settings, now=time.time())

    asyncio.run(run())


@app.task(name=COUNT_COLD_START)
def count_cold_start() -> None:
    """Count what users have in common, where their tenant has opted in."""

    async def run() -> None:
        async with opened() as store:
            await count_all(store, settings)

    asyncio.run(run())


@app.task(name=SEND_OPTIMIZATIONS)
def send_optimizations() -> None:
    """Queue an optimization for each user whose time has come."""

    async def run() -> None:
        async with opened() as store:
            await send_due(store, CeleryJobs(settings), now=time.time())

    asyncio.run(run())


@app.task(name=OPTIMIZE)
def optimize_context(tenant: str, user: str) -> None:
    """Optimize one user's contexts."""
    from workers.context_search.world import optimizing

    async def run() -> None:
        async with opened_with_engine(PROMPT) as (store, engine):
            optimizer = optimizing(store, engine, tokens=_tokens(), embedder=_embedder, settings=settings)
            await optimizer.optimize(tenant=tenant, user=user)

    asyncio.run(run())


@lru_cache(1)
def _tokens() -> "Tokens":
    from service.tokens import load_tokens

    return load_tokens(settings.model_path)


@lru_cache(1)
def _embedder() -> "Embedder | None":
    """The embedding model, loaded once per worker process."""
    from service.embedding import load_embedder

    return load_embedder(settings)


@app.task(name=RETIRE)
def retire() -> None:
    """Delete adapter versions that newer ones have replaced."""

    async def run() -> None:
        async with opened() as store, replicas(settings) as evict:
            await retire_old(store, settings, evict=evict, now=time.time())

    asyncio.run(run())


@app.task(name=QUARANTINE)
def quarantine() -> None:
    """Take adapters out of use that were trained on another base model than this worker's."""

    async def run() -> None:
        async with opened() as store:
            await quarantine_all(store, settings, base=_hashed_base, now=time.time())

    asyncio.run(run())


def _hashed_base() -> LoadedBase:
    """The base model's hash, which needs none of it in memory; what is fetched from a hub is loaded, as a consolidation would."""
    from workers.consolidation.base import weights_sha256

    folder = Path(settings.model_path)
    return HashedBase(settings.model_name, weights_sha256(folder)) if folder.is_dir() else _base()


@app.task(name=CONSOLIDATE)
def consolidate(job_ids: list[str]) -> None:
    """Do consolidation jobs, side by side, to their ends."""

    async def run() -> None:
        async with opened_with_engine(settings) as (store, engine):
            await run_jobs(
                job_ids,
                store=store,
                engine=engine,
                settings=settings,
                consolidate=_consolidate,
                base=_base,
                forget=_forget,
            )

    asyncio.run(run())


def _consolidate(works: Sequence[Work], progress: OnProgress) -> Ends:
    from workers.consolidation.job import consolidate as train

    return train(works, base=_base(), settings=settings, progress=progress)


def _forget(job: str) -> None:
    from workers.consolidation.checkpoint import Checkpoints

    adapters = adapter_store(settings)
    Checkpoints(adapters.work, elsewhere=adapters).remove(job)


@app.task(name=FAST_SLOW)
def fast_slow(plan: dict[str, object], out: str) -> None:
    """Go on with a run of Fast-Slow Training for as long as a job may take, and queue the rest."""
    from workers.fst.plan import checked_plan
    from workers.fst.run import train

    limit = settings.job_limit_seconds
    # The broker hands out again whatever a worker died of.
    done = train(
        checked_plan(**plan),
        Path(out),
        base=_base,
        settings=settings,
        limit_seconds=limit,
        most_attempts=MOST_ATTEMPTS,
    )
    if done is None:
        app.send_task(FAST_SLOW, args=(plan, out))


@lru_cache(1)
def _base() -> "Base":
    """The base model, loaded once per worker process."""
    from workers.consolidation.base import load_base

    return load_base(settings)
