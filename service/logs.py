"""Logs of all processes: lines for people or JSON for machines, with the request and the trace that they belong to.

What a user said stays out of them (`log_texts` lifts that): our own lines name ids and figures, and of an error that they show only those
messages are printed that we word ourselves or that speak of the machine. A message of another error may quote what it could not digest.
"""

import json
import logging
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime

from service.errors import FastslowError, UpstreamRejected
from service.settings import Settings
from service.tracing import trace_id

request_id: ContextVar[str] = ContextVar("fastslow_request_id", default="")
"""Of the request or task that this context serves."""

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
OWN_WORDS = (FastslowError, OSError, RuntimeError, MemoryError, ImportError)
# vLLM's refusal may quote the request.
OTHERS_WORDS = (UpstreamRejected,)
# Servers that hang their own handlers on their loggers.
SERVERS = ("uvicorn", "uvicorn.error", "uvicorn.access")


def configure(settings: Settings, *, level: int | str = logging.INFO) -> None:
    """Make this process log so, the servers in it too."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(settings))
    handler.addFilter(Quiet(texts=settings.log_texts))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for server in map(logging.getLogger, SERVERS):
        # One that was silenced has none, and stays so.
        if server.handlers:
            server.handlers.clear()
            server.propagate = True


def formatter(settings: Settings) -> logging.Formatter:
    """By the settings."""
    return (JsonFormatter if settings.log_format == "json" else TextFormatter)(texts=settings.log_texts)


def told(error: BaseException) -> str:
    """An error in a line of the log, without words that may be a user's."""
    words = isinstance(error, OWN_WORDS) and not isinstance(error, OTHERS_WORDS)
    status = f" {error.status}" if isinstance(error, UpstreamRejected) else ""
    return str(error) if words and str(error) else f"{type(error).__name__}{status}"


class Quiet(logging.Filter):
    """Puts `told(error)` in the place of errors among a line's arguments, and takes out what others have made of an error."""

    def __init__(self, *, texts: bool) -> None:
        super().__init__()
        self._texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        if self._texts:
            return True
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(record.args, tuple):
            record.args = tuple(told(arg) if isinstance(arg, BaseException) else arg for arg in record.args)
        elif record.args and error is not None:
            # Celery has the error's own form among the facts of a task that failed.
            record.args = {**record.args, "exc": told(error)}
        if record.name == "asyncio":
            # Its further lines show the task, and in it the error.
            record.msg, record.args = record.getMessage().partition("\n")[0], ()
        return True


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,000 WARNING service.serving: a chat is served unpersonalized: … [request 3f2a…]`."""

    def __init__(self, *, texts: bool) -> None:
        super().__init__(TEXT)
        self._texts = texts

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's own name
        line = super().formatMessage(record)
        return f"{line} [request {now}]" if (now := request_id.get()) else line

    def formatException(self, ei: object) -> str:  # noqa: N802
        # A record without an error of its own has (None, None, None).
        error = ei[1] if isinstance(ei, tuple) else None
        return shown(error, texts=self._texts) if error is not None else ""


class JsonFormatter(TextFormatter):
    """One object a line: time, level, logger, message; request_id, trace_id and error where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get() or None,
            "trace_id": trace_id(),
            "error": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps({name: value for name, value in fields.items() if value is not None}, ensure_ascii=False)


def shown(error: BaseException, *, texts: bool) -> str:
    """An error with its causes, each with its stack, the first cause first; the messages as `told` has them."""
    if texts:
        return "".join(traceback.format_exception(error)).rstrip()
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = [shown(cause, texts=False), "which led to:"] if cause is not None else []
    named = type(error).__name__
    words = told(error)
    last = named if words.startswith(named) else f"{named}: {words}"
    return "\n".join([*before, *(frame.rstrip() for frame in traceback.format_tb(error.__traceback__)), last])
