"""Sends a named task to Celery for an admin: the one module of the gateway that knows Celery."""

from collections.abc import Sequence
from typing import Protocol

import anyio.to_thread
from celery import Celery
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError

from service.broker import broker
from service.errors import StoreUnavailable
from service.logs import request_id
from service.settings import Settings
from service.tracing import span

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
    place = broker(settings)
    app = Celery("fastslow", broker=place.url, backend=settings.result_url or None)
    app.conf.update(
        # Jobs report to our own store, which outlives the broker's results.
        task_ignore_result=not settings.result_url,
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
        broker_transport_options=place.transport,
        task_queues=[
            Queue(name, Exchange(name), routing_key=name, queue_arguments=place.queue)
            for name in (CONTROL_QUEUE, CONSOLIDATE_QUEUE)
        ],
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
            with span("send", kind="producer", fastslow__task=task) as part:
                # A worker's logs and spans go on with the request that began the work.
                headers = {"request_id": request_id.get(), **part.carrier()}
                self._app.send_task(task, args=args, headers=headers, retry=False)
        except OperationalError as error:
            raise StoreUnavailable(f"The job queue can't be reached: {error}") from error
