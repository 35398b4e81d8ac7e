"""The tasks that Celery runs, each a few lines around plain code; torch is imported inside the one that trains."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

from service.engine import VllmEngine
from service.jobs import ARCHIVE, CONSOLIDATE, COUNT_COLD_START, OPTIMIZE, SEND_OPTIMIZATIONS, SWEEP, CeleryJobs
from service.settings import Settings
from service.store import Store, open_store
from workers.app import app, settings
from workers.archive import archive_logs
from workers.cold_start import count_all
from workers.consolidation.work import OnProgress, Outcome, Work
from workers.context_search.due import send_due
from workers.runner import run_job
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
            await archive_logs(store, settings)

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


@app.task(name=CONSOLIDATE)
def consolidate(job_id: str) -> None:
    """Do one consolidation job to its end."""

    async def run() -> None:
        async with opened_with_engine(settings) as (store, engine):
            await run_job(job_id, store=store, engine=engine, settings=settings, consolidate=_consolidate)

    asyncio.run(run())


def _consolidate(work: Work, progress: OnProgress) -> Outcome:
    from workers.consolidation.job import consolidate as train

    return train(work, base=_base(), settings=settings, progress=progress)


@lru_cache(1)
def _base() -> "Base":
    """The base model, loaded once per worker process."""
    from workers.consolidation.base import load_base

    return load_base(settings)
