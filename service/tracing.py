"""Traces, where `otlp_endpoint` is set (`service/otlp.py`). Elsewhere nothing of OpenTelemetry is imported, and a span is a look at a
context variable.

A trace begins in this process with a request or a task (`Tracing.begin`); whatever runs in its context adds parts to it (`span`), each
right below it. None of them is made current in OpenTelemetry's sense: a stream's part begins in one task and ends in another. Attributes
and statuses hold names, numbers and ids, never what a user said.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Literal, Protocol, Self

from service.settings import Settings

Kind = Literal["internal", "server", "client", "producer", "consumer"]
Value = str | int | float

PROPAGATED = ("traceparent", "tracestate")
"""The headers of a carrier, by https://www.w3.org/TR/trace-context/."""


class Span:
    """Where traces are off: takes everything, does nothing. `a__b` stands for the attribute `a.b`."""

    trace_id: str | None = None
    """32 hex digits."""

    def part(self, name: str, *, kind: Kind = "internal", **attributes: Value) -> "Span":
        """A span below this one; it ends with its block."""
        return self

    def set(self, **attributes: Value) -> None:
        """Add attributes."""

    def rename(self, name: str) -> None:
        """Give it the name that was not known yet when it began."""

    def fail(self, what: str) -> None:
        """Mark it as failed, by the name of an error or a status."""

    def carrier(self) -> dict[str, str]:
        """Headers by which another process goes on below this span."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


NOTHING = Span()
active: ContextVar[Span | None] = ContextVar("fastslow_span", default=None)
"""What began the trace that this context belongs to."""


def span(name: str, *, kind: Kind = "internal", **attributes: Value) -> Span:
    """A part of the request or task that this context serves."""
    whole = active.get()
    return NOTHING if whole is None else whole.part(name, kind=kind, **attributes)


def trace_id() -> str | None:
    """The trace that this context belongs to, for the logs."""
    return (active.get() or NOTHING).trace_id


class Tracing(Protocol):
    """One process's spans, on their way to the collector."""

    def begin(self, name: str, *, kind: Kind, carrier: Mapping[str, str], **attributes: Value) -> Span:
        """The span of a request or a task, which goes on with the trace in its headers if there is one. It ends with its block.

        Whatever runs in the block's context and its copies adds its spans below this one.
        """
        ...

    def close(self) -> None:
        """Send what has not left yet, within some seconds, and stop."""
        ...


def open_tracing(settings: Settings, *, service: str) -> Tracing | None:
    """Under the process's name in a trace; None where traces are off."""
    if not settings.otlp_endpoint:
        return None
    from service.otlp import OtlpTracing

    return OtlpTracing(settings, service=service)
