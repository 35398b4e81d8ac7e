"""The Celery application of workers and beat. Imports no torch: a control worker and beat run anywhere.

celery -A workers.app worker -Q control,consolidate
celery -A workers.app beat
"""

from typing import Any

from celery.signals import worker_ready
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from service.broker import broker
from service.jobs import (
    ARCHIVE,
    CONSOLIDATE_QUEUE,
    CONTROL_QUEUE,
    COUNT_COLD_START,
    QUARANTINE,
    RETIRE,
    SEND_OPTIMIZATIONS,
    SWEEP,
    celery_app,
)
from service.settings import Settings
from workers.signals import connect

# How long a scheduler waits for a Redis that restarts; well within its lock, which nobody takes meanwhile.
REDIS_PATIENCE_SECONDS = 20
# How often a second scheduler looks whether the first has gone, and how often the first says that it has not.
LOOK_SECONDS = 5.0

settings = Settings()
app = celery_app(settings)
connect(settings)
app.conf.update(
    imports=("workers.tasks",),
    # The schedule and a lock lie in Redis: of several schedulers one fires, and goes on where a dead one stopped.
    beat_scheduler="redbeat.RedBeatScheduler",
    beat_max_loop_interval=min(LOOK_SECONDS, settings.beat_lock_seconds / 3),
    # `celery inspect ping -d celerybeat@HOST` answers while it ticks.
    beat_enable_remote_control=True,
    redbeat_redis_url=broker(settings).schedule_url,
    redbeat_key_prefix="fs:celery:redbeat:",
    redbeat_lock_timeout=settings.beat_lock_seconds,
    redbeat_redis_options={
        "socket_timeout": 5,
        "socket_connect_timeout": 5,
        "retry": Retry(ConstantBackoff(1), REDIS_PATIENCE_SECONDS),
    },
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
            (RETIRE, settings.retire_seconds),
        )
    },
)


@worker_ready.connect
def _look_around(**_: Any) -> None:
    """What an earlier worker left behind is taken up at once, not at the next tick; what another base model left is looked for."""
    app.send_task(SWEEP, queue=CONTROL_QUEUE)
    if CONSOLIDATE_QUEUE in app.amqp.queues.consume_from:
        app.send_task(QUARANTINE, queue=CONSOLIDATE_QUEUE)
