"""The tasks that Celery runs, each a few lines around plain code; torch is imported inside the one that trains."""

import asyncio
import time
import uuid
from functools import lru_cache
from typing import TYPE_CHECKING

from service.engine import VllmEngine
from service.jobs import CONSOLIDATE, SWEEP, CeleryJobs
from service.store import open_store
from workers.app import app, settings
from workers.consolidation.work import OnProgress, Outcome, Work
from workers.runner import run_job
from workers.sweep import sweep as run_sweep

if TYPE_CHECKING:
    from workers.consolidation.base import Base


# A worker reads whole logs and asks every bucket, and nobody waits for it as for a chat.
PATIENT = settings.model_copy(update={"redis_timeout_seconds": 30.0})


@app.task(name=SWEEP)
def sweep() -> None:
    """Find due scopes and dead workers' jobs, and queue them."""

    async def run() -> None:
        store = open_store(PATIENT)
        try:
            await run_sweep(store, CeleryJobs(settings), settings, now=time.time(), unique=lambda: uuid.uuid4().hex)
        finally:
            await store.close()

    asyncio.run(run())


@app.task(name=CONSOLIDATE)
def consolidate(job_id: str) -> None:
    """Do one consolidation job to its end."""

    async def run() -> None:
        store, engine = open_store(PATIENT), VllmEngine(settings)
        try:
            await run_job(job_id, store=store, engine=engine, settings=settings, consolidate=_consolidate)
        finally:
            await engine.close()
            await store.close()

    asyncio.run(run())


def _consolidate(work: Work, progress: OnProgress) -> Outcome:
    from workers.consolidation.job import consolidate as train

    return train(work, base=_base(), settings=settings, progress=progress)


@lru_cache(1)
def _base() -> "Base":
    """The base model, loaded once per worker process."""
    from workers.consolidation.base import load_base

    return load_base(settings)
