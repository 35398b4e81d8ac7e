"""What Celery's signals set up in workers and beat: the logs, and a span around each task of note."""

from typing import Any

from celery import Task
from celery.signals import setup_logging, task_postrun, task_prerun, worker_process_shutdown, worker_shutdown

from service import logs
from service.jobs import CONSOLIDATE, FAST_SLOW, OPTIMIZE
from service.settings import Settings
from service.tracing import PROPAGATED, Span, Tracing, open_tracing

TRACED = (CONSOLIDATE, OPTIMIZE, FAST_SLOW)
"""What has a span of its own even if no request began it; ticks of the schedule have none."""


def connect(settings: Settings) -> None:
    """Have the workers of this process log and trace by the settings."""

    def configure_logs(loglevel: int | str = "INFO", **_: Any) -> None:
        logs.configure(settings, level=loglevel)

    setup_logging.connect(configure_logs, weak=False)
    tasks = Tasks(settings)
    task_prerun.connect(tasks.begin, weak=False)
    task_postrun.connect(tasks.end, weak=False)
    worker_process_shutdown.connect(tasks.close, weak=False)
    worker_shutdown.connect(tasks.close, weak=False)


class Tasks:
    """Around the tasks of one process, which runs one at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tracing: Tracing | None = None
        self._open: dict[str, Span] = {}

    def begin(self, task_id: str, task: "Task[Any, Any]", **_: Any) -> None:
        """Take up the request and the trace that the message carries."""
        logs.request_id.set(getattr(task.request, "request_id", None) or task_id)
        carrier = {name: value for name in PROPAGATED if (value := getattr(task.request, name, None))}
        if task.name not in TRACED and not carrier:
            return
        # Not before this process was forked: the thread that sends spans would have stayed behind.
        self._tracing = self._tracing or open_tracing(self._settings, service="fastslow-worker")
        if self._tracing is not None:
            name = task.name.rpartition(".")[2]
            span = self._tracing.begin(name, kind="consumer", carrier=carrier, fastslow__task_id=task_id)
            self._open[task_id] = span.__enter__()

    def end(self, task_id: str, state: str | None = None, **_: Any) -> None:
        """The task has ended, well or not."""
        span = self._open.pop(task_id, None)
        if span is not None:
            if state != "SUCCESS":
                span.fail(state or "unknown")
            span.__exit__(None, None, None)

    def close(self, **_: Any) -> None:
        """Send the last spans."""
        if self._tracing is not None:
            self._tracing.close()
