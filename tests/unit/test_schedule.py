"""What beat sends is what workers know, on the queue that never waits for a training."""

from typing import Any

import workers.tasks  # noqa: F401  registers them
from service.jobs import ARCHIVE, CONSOLIDATE, CONSOLIDATE_QUEUE, CONTROL_QUEUE, QUARANTINE, RETIRE, SWEEP
from workers.app import REDIS_PATIENCE_SECONDS, app


def test_beat_sends_tasks_that_exist_to_the_control_queue_and_lets_none_pile_up() -> None:
    entries: list[dict[str, Any]] = list(app.conf.beat_schedule.values())
    assert {SWEEP, ARCHIVE, RETIRE} <= {entry["task"] for entry in entries} <= set(app.tasks)
    assert {entry["options"]["queue"] for entry in entries} == {CONTROL_QUEUE}
    assert all(entry["options"]["expires"] == entry["schedule"] for entry in entries)
    assert all(app.conf.task_routes[entry["task"]] == {"queue": CONTROL_QUEUE} for entry in entries)


def test_what_needs_the_base_model_goes_to_the_workers_that_have_it() -> None:
    assert {CONSOLIDATE, QUARANTINE} <= set(app.tasks)
    assert all(app.conf.task_routes[task] == {"queue": CONSOLIDATE_QUEUE} for task in (CONSOLIDATE, QUARANTINE))


def test_a_dead_schedulers_lock_is_free_within_a_minute_and_outlasts_a_redis_that_restarts() -> None:
    assert app.conf.redbeat_lock_timeout + app.conf.beat_max_loop_interval <= 60
    assert app.conf.redbeat_lock_timeout > REDIS_PATIENCE_SECONDS + app.conf.beat_max_loop_interval
    assert app.conf.redbeat_key_prefix.startswith(app.conf.broker_transport_options["global_keyprefix"])
