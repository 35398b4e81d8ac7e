"""What beat sends is what workers know, on the queue that never waits for a training."""

from typing import Any

import workers.tasks  # noqa: F401  registers them
from service.jobs import ARCHIVE, CONTROL_QUEUE, SWEEP
from workers.app import app


def test_beat_sends_tasks_that_exist_to_the_control_queue_and_lets_none_pile_up() -> None:
    entries: list[dict[str, Any]] = list(app.conf.beat_schedule.values())
    assert {SWEEP, ARCHIVE} <= {entry["task"] for entry in entries} <= set(app.tasks)
    assert {entry["options"]["queue"] for entry in entries} == {CONTROL_QUEUE}
    assert all(entry["options"]["expires"] == entry["schedule"] for entry in entries)
    assert all(app.conf.task_routes[entry["task"]] == {"queue": CONTROL_QUEUE} for entry in entries)
