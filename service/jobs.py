"""Sends a named task to Celery for an admin: the one module of the gateway that knows Celery."""

from collections.abc import Sequence
from typing import Protocol

import anyio.to_thread
from celery import Celery
from kombu.exceptions import OperationalError

from service.errors import StoreUnavailable
from service.settings import Settings

CONSOLIDATE = "workers.tasks.consolidate"
SWEEP = "workers.tasks.sweep"
ARCHIVE = "workers.tasks.archive"
SEND_OPTIMIZATIONS = "workers.tasks.send_optimizations"
OPTIMIZE = "workers.tasks.optimize_context"
COUNT_COLD_START = "workers.tasks.count_cold_start"
RETIRE = "workers.tasks.retire"
QUARANTINE = "workers.tasks.quarantine"
FAST_SLOW = "workers.tasks.fast_slow"
CONSOLIDATE_QUEUE = "consolidate"
CONTROL_QUEUE = "control"


class Jobs(Protocol):
    """Where long work is sent. Raises StoreUnavailable if the broker is away."""

    async def consolidate(self, job_ids: Sequence[str]) -> None:
        """Queue open jobs, to be trained side by side."""
        ...

    async def optimize(self, tenant: str, user: str) -> None:
        """Queue an optimization of a user's contexts."""
        ...


def celery_app(settings: Settings) -> Celery:
    """The Celery application, the same for those who send and those who work."""
    app = Celery("fastslow", broker=settings.effective_redis_url)
    app.conf.update(
        # Jobs report to our own store, which outlives the broker's results.
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue=CONTROL_QUEUE,
        task_routes={
            **{name: {"queue": CONSOLIDATE_QUEUE} for name in (CONSOLIDATE, QUARANTINE, FAST_SLOW)},
            **{
                name: {"queue": CONTROL_QUEUE}
                for name in (SWEEP, ARCHIVE, SEND_OPTIMIZATIONS, OPTIMIZE, COUNT_COLD_START, RETIRE)
            },
        },
        # A worker takes one job at a time and gives it back when it dies.
        worker_prefetch_multiplier=1,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "global_keyprefix": "fs:celery:",
            "visibility_timeout": settings.job_limit_seconds * 2,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
        },
        worker_hijack_root_logger=False,
        enable_utc=True,
    )
    return app


class CeleryJobs:
    """`Jobs` over Celery."""

    def __init__(self, settings: Settings) -> None:
        self._app = celery_app(settings)

    async def consolidate(self, job_ids: Sequence[str]) -> None:
        # Celery's client blocks, so it stays off the event loop.
        await anyio.to_thread.run_sync(self._send, CONSOLIDATE, list(job_ids))

    async def optimize(self, tenant: str, user: str) -> None:
        await anyio.to_thread.run_sync(self._send, OPTIMIZE, tenant, user)

    async def fast_slow(self, plan: dict[str, object], out: str) -> None:
        """Queue a run of Fast-Slow Training in a folder that the worker sees too."""
        await anyio.to_thread.run_sync(self._send, FAST_SLOW, plan, out)

    def _send(self, task: str, *args: object) -> None:
        try:
            self._app.send_task(task, args=args, retry=False)
        except OperationalError as error:
            raise StoreUnavailable(f"The job queue can't be reached: {error}") from error
