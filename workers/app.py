"""The Celery application of workers and beat. Imports no torch: a control worker and beat run anywhere.

celery -A workers.app worker -Q control,consolidate
celery -A workers.app beat
"""

from typing import Any

from celery.signals import worker_ready

from service.jobs import ARCHIVE, CONTROL_QUEUE, COUNT_COLD_START, SEND_OPTIMIZATIONS, SWEEP, celery_app
from service.settings import Settings

settings = Settings()
app = celery_app(settings)
app.conf.update(
    imports=("workers.tasks",),
    beat_schedule={
        task.rpartition(".")[2]: {
            "task": task,
            "schedule": seconds,
            # One that waited until the next is due has nothing of its own to do.
            "options": {"queue": CONTROL_QUEUE, "expires": seconds},
        }
        for task, seconds in (
            (SWEEP, settings.sweep_seconds),
            (ARCHIVE, settings.archive_seconds),
            (SEND_OPTIMIZATIONS, settings.optimize_tick_seconds),
            (COUNT_COLD_START, settings.cold_start_seconds),
        )
    },
)


@worker_ready.connect
def _sweep_at_start(**_: Any) -> None:
    """What an earlier worker left behind is taken up at once, not at the next tick."""
    app.send_task(SWEEP, queue=CONTROL_QUEUE)
