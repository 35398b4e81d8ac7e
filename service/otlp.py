"""Spans by OpenTelemetry, sent by OTLP over HTTP in the background. Imported where traces are on, and nowhere else."""

import threading
from collections.abc import Mapping
from contextvars import Token
from types import TracebackType
from typing import Self

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.settings import Settings
from service.tracing import Kind, Span, Value, active

KINDS = {kind.name.lower(): kind for kind in SpanKind}
PROPAGATOR = TraceContextTextMapPropagator()
EXPORT_SECONDS = 5
# A collector that is away must not hold the process that ends. The SDK's own timeouts don't bound its retries.
CLOSE_SECONDS = 2.0


class OtlpTracing:
    """`Tracing` with a provider of its own: nothing of OpenTelemetry's is set for the whole process."""

    def __init__(self, settings: Settings, *, service: str) -> None:
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.otlp_share)),
            resource=Resource.create({"service.name": service}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=settings.otlp_traces_url, timeout=EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fastslow")

    def begin(self, name: str, *, kind: Kind, carrier: Mapping[str, str], **attributes: Value) -> Span:
        return OtlpSpan(self._tracer, name, PROPAGATOR.extract(carrier), kind, attributes, begins=True)

    def close(self) -> None:
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


class OtlpSpan(Span):
    """A span that is timed and exported."""

    def __init__(
        self,
        tracer: Tracer,
        name: str,
        parent: Context,
        kind: Kind,
        attributes: Mapping[str, Value],
        *,
        begins: bool = False,
    ) -> None:
        self._tracer = tracer
        self._span = tracer.start_span(name, context=parent, kind=KINDS[kind], attributes=_dotted(attributes))
        self._below = set_span_in_context(self._span, parent)
        self._begins = begins
        self._token: Token[Span | None] | None = None
        self.trace_id = f"{self._span.get_span_context().trace_id:032x}"

    def part(self, name: str, *, kind: Kind = "internal", **attributes: Value) -> Span:
        return OtlpSpan(self._tracer, name, self._below, kind, attributes)

    def set(self, **attributes: Value) -> None:
        self._span.set_attributes(_dotted(attributes))

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def fail(self, what: str) -> None:
        self._span.set_status(Status(StatusCode.ERROR, what))

    def carrier(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        PROPAGATOR.inject(headers, self._below)
        return headers

    def __enter__(self) -> Self:
        if self._begins:
            self._token = active.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            active.reset(self._token)
        # A client that hangs up is no failure of ours.
        if isinstance(error, Exception):
            self.fail(type(error).__name__)
        self._span.end()


def _dotted(attributes: Mapping[str, Value]) -> dict[str, Value]:
    return {name.replace("__", "."): value for name, value in attributes.items()}
