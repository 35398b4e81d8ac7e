"""What a line of the log holds, and what it never does."""

import asyncio
import gc
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import pytest
from celery import Celery
from pydantic import ValidationError

from service.domain.feedback import Signals
from service.errors import StoreUnavailable, UpstreamRejected
from service.logs import Quiet, configure, formatter, request_id
from service.settings import Settings

SAID = "my landlord is called Egbert"


class Lines(logging.Handler):
    """What a process with these settings would print."""

    def __init__(self, **given: object) -> None:
        super().__init__()
        settings = Settings(_env_file=None, **given)
        self.setFormatter(formatter(settings))
        self.addFilter(Quiet(texts=settings.log_texts))
        self.printed: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.printed.append(self.format(record))


@contextmanager
def named(error: type[Exception], *, by: str, at: str) -> Iterator[None]:
    """What that logger prints meanwhile is one line, which has these words and names the error, but holds none of its words."""
    lines, found = Lines(), logging.getLogger(by)
    found.addHandler(lines)
    try:
        yield
    finally:
        found.removeHandler(lines)
    [line] = lines.printed
    assert at in line
    assert error.__name__ in line
    assert "Egbert" not in line


def logger(lines: Lines) -> logging.Logger:
    found = logging.Logger("service.serving")
    found.addHandler(lines)
    return found


@pytest.fixture
def of_request() -> Iterator[str]:
    token = request_id.set("3f2a")
    yield "3f2a"
    request_id.reset(token)


def bad_message() -> ValidationError:
    """Pydantic's error, which quotes its input."""
    try:
        Signals.model_validate({"comment": {"text": SAID}})
    except ValidationError as error:
        return error
    raise AssertionError("the content is not valid")


def quoting() -> list[Exception]:
    return [bad_message(), ValueError(SAID), KeyError(SAID), UpstreamRejected(SAID, status=400)]


def test_json_has_a_line_an_event_with_the_request_that_it_belongs_to(of_request: str) -> None:
    lines = Lines(log_format="json")
    logger(lines).warning("a chat of %d\ntokens", 7)
    [line] = lines.printed
    fields = json.loads(line)
    assert datetime.fromisoformat(fields.pop("time")).tzinfo is not None
    assert fields == {
        "level": "WARNING",
        "logger": "service.serving",
        "message": "a chat of 7\ntokens",
        "request_id": of_request,
    }
    assert "\n" not in line


def test_text_names_the_request_at_the_end_of_the_line(of_request: str) -> None:
    lines = Lines()
    logger(lines).warning("it is %s", "late")
    assert lines.printed[0].endswith(f"WARNING service.serving: it is late [request {of_request}]")


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("error", quoting(), ids=lambda error: type(error).__name__)
def test_an_error_that_may_quote_a_user_is_named_and_not_quoted(log_format: str, error: Exception) -> None:
    lines = Lines(log_format=log_format)
    try:
        raise RuntimeError("no luck") from error
    except RuntimeError:
        logger(lines).exception("it failed: %s", error)
    [line] = lines.printed
    assert "Egbert" not in line
    assert type(error).__name__ in line
    assert "RuntimeError: no luck" in line
    assert "test_logs.py" in line


def test_an_error_of_our_own_words_is_told_whole() -> None:
    lines = Lines()
    log = logger(lines)
    log.warning("a chat is served unpersonalized: %s", StoreUnavailable("Redis can't be used now: it is full"))
    log.warning("gone: %s", UpstreamRejected(SAID, status=404))
    assert lines.printed[0].endswith("unpersonalized: Redis can't be used now: it is full")
    assert lines.printed[1].endswith("gone: UpstreamRejected 404")


def test_a_task_of_celery_that_fails_is_logged_without_its_errors_words() -> None:
    app = Celery("failing")

    @app.task(name="learn")
    def learn() -> None:
        raise ValueError(SAID)

    with named(ValueError, by="celery.app.trace", at="Task learn"):
        assert isinstance(learn.apply().result, ValueError)


async def test_a_background_task_that_fails_unseen_is_logged_without_its_errors_words() -> None:
    async def fail() -> None:
        raise ValueError(SAID)

    with named(ValueError, by="asyncio", at="Task exception was never retrieved"):
        await asyncio.wait({asyncio.create_task(fail())})
        gc.collect()


def test_texts_are_shown_to_whoever_asks_for_them() -> None:
    lines = Lines(log_texts=True)
    try:
        raise ValueError(SAID)
    except ValueError as error:
        logger(lines).exception("it failed: %s", error)
    assert lines.printed[0].count("Egbert") == 2


def test_the_servers_in_a_process_log_as_it_does(capfd: pytest.CaptureFixture[str]) -> None:
    root, server, silenced = logging.getLogger(), logging.getLogger("uvicorn"), logging.getLogger("uvicorn.access")
    before = root.handlers[:], root.level, server.handlers[:], silenced.handlers[:]
    try:
        server.handlers, server.propagate = [logging.StreamHandler()], False
        silenced.handlers, silenced.propagate = [], False
        configure(Settings(_env_file=None, log_format="json"))
        logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
        silenced.info("GET /v1/users/alice/context")
    finally:
        root.handlers, root.level, server.handlers, silenced.handlers = before
        server.propagate = silenced.propagate = True
    [line] = capfd.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "Started server process [7]"


def test_without_an_endpoint_nothing_sends_spans() -> None:
    code = (
        "import sys, service.api.app; from service.settings import Settings; from service.tracing import open_tracing; "
        "print(open_tracing(Settings(_env_file=None), service='x'), "
        "[m for m in sys.modules if m == 'service.otlp' or m.startswith('opentelemetry.exporter')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None []"
