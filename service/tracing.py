"""Traces: spans of requests, jobs, stages and windows, sent by OTLP; off without `PIMC_TRACING`.

    request ─┬─ receive ── fetch            job ╌╌ link to the request that submitted it
             ├─ queue                        └─ plan, run, as below
             ├─ plan
             ├─ run ─┬─ read ── window …
             │       ├─ infer ── window …
             │       ├─ write ── window …
             │       └─ cluster ── window … of a worker ── read, infer
             └─ respond

`span` makes a child of the current span, and does nothing without one. So a request that is not
traced costs a look-up of a context variable per span, and only an application that traces imports
OpenTelemetry's SDK. The standard variables `OTEL_*` configure it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from service.settings import SettingsError
from service.telemetry import TRACE_ID

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Link, Span, SpanKind, Tracer

Attribute = str | bool | int | float
MOST_WINDOWS = 64
"""Largest number of windows of one stage that have a span; of more, every n-th has one."""
_SERVICE = "pimc"
_TRACER: ContextVar[Tracer | None] = ContextVar("tracer", default=None)


class Traces:
    """The traces of one application.

    Args:
        enabled: whether spans are made; if not, OpenTelemetry's SDK is not imported.
        version: version of the service.

    Raises:
        SettingsError: OpenTelemetry is not installed, or a variable `OTEL_*` is not valid.
    """

    def __init__(self, *, enabled: bool, version: str) -> None:
        self._provider = _provider(version) if enabled else None
        self._tracer: Tracer | None = None
        if self._provider is not None:
            self._tracer = self._provider.get_tracer(_SERVICE, version)

    @property
    def enabled(self) -> bool:
        """Whether spans are made."""
        return self._tracer is not None

    def close(self) -> None:
        """Send the spans that have ended, and stop."""
        if self._provider is not None:
            self._provider.shutdown()

    @contextmanager
    def request(self, headers: Mapping[str, str], name: str) -> Iterator[Span | None]:
        """The span of a request, which continues the trace that its `traceparent` names.

        Args:
            headers: the request's headers.
            name: name of the span until the route is known.

        Yields:
            The span; None if the application does not trace.
        """
        if self._tracer is None:
            yield None
            return
        from opentelemetry.trace import SpanKind

        with self._root(name, SpanKind.SERVER, parent=_extracted(headers)) as span:
            yield span

    @contextmanager
    def job(
        self, name: str, submitted: str | None, attributes: Mapping[str, Attribute]
    ) -> Iterator[None]:
        """The span of one run of a job: a trace of its own, linked to the request's.

        Args:
            name: name of the span.
            submitted: result of `traceparent` in the request that submitted the job; None if that
                request was not traced.
            attributes: attributes of the span.
        """
        if self._tracer is None:
            yield
            return
        from opentelemetry.trace import Link, SpanKind, get_current_span

        before = get_current_span(_extracted({"traceparent": submitted or ""})).get_span_context()
        links = [Link(before)] if before.is_valid else []
        with self._root(name, SpanKind.CONSUMER, links=links, attributes=attributes):
            yield

    @contextmanager
    def continued(
        self, name: str, parent: str, attributes: Mapping[str, Attribute]
    ) -> Iterator[None]:
        """The span of work that another process has submitted, in the trace of that process.

        Args:
            name: name of the span.
            parent: result of `traceparent` in that process.
            attributes: attributes of the span.
        """
        if self._tracer is None:
            yield
            return
        from opentelemetry.trace import SpanKind

        above = _extracted({"traceparent": parent})
        with self._root(name, SpanKind.CONSUMER, parent=above, attributes=attributes):
            yield

    def flush(self) -> None:
        """Send the spans that have ended."""
        if self._provider is not None:
            self._provider.force_flush()

    @contextmanager
    def _root(
        self,
        name: str,
        kind: SpanKind,
        *,
        parent: Context | None = None,
        links: Sequence[Link] = (),
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Iterator[Span]:
        from opentelemetry.context import Context

        if self._tracer is None:
            raise TypeError("the application does not trace")
        with self._tracer.start_as_current_span(
            name,
            # An empty context: without it, the current span of the thread would be the parent.
            context=Context() if parent is None else parent,
            kind=kind,
            links=links,
            attributes=attributes,
        ) as span:
            trace = f"{span.get_span_context().trace_id:032x}"
            tokens = _TRACER.set(self._tracer), TRACE_ID.set(trace)
            try:
                yield span
            finally:
                _TRACER.reset(tokens[0])
                TRACE_ID.reset(tokens[1])


@contextmanager
def span(name: str, **attributes: Attribute) -> Iterator[None]:
    """A child of the current span, for as long as the context is open; nothing without a trace.

    Args:
        name: name of the span.
        attributes: attributes of the span, whose names begin with `pimc.`.
    """
    tracer = _TRACER.get()
    if tracer is None:
        yield
        return
    with tracer.start_as_current_span(name, attributes=_named(attributes)):
        yield


def annotate(**attributes: Attribute) -> None:
    """Set attributes of the current span, whose names begin with `pimc.`; nothing without a trace.

    Args:
        attributes: the attributes.
    """
    if _TRACER.get() is None:
        return
    from opentelemetry.trace import get_current_span

    get_current_span().set_attributes(_named(attributes))


def describe_request(
    span: Span,
    *,
    method: str,
    route: str,
    path: str,
    status: int,
    code: str | None,
    request_id: str,
    model: str | None,
) -> None:
    """Set name, attributes and status of a request's span, by OpenTelemetry's conventions.

    Args:
        span: the span.
        method: HTTP method.
        route: path of the route, with the names of its parameters.
        path: path of the request, without the query.
        status: status of the response; 0 if none was sent.
        code: error code of the response; None if it was not an error.
        request_id: id of the request.
        model: model that computed the response; None if no model did.
    """
    from opentelemetry.trace import Status, StatusCode

    span.update_name(f"{method} {route}")
    span.set_attributes(
        {
            "http.request.method": method,
            "http.route": route,
            "url.path": path,
            "http.response.status_code": status,
            "pimc.request_id": request_id,
            **({} if model is None else {"pimc.model": model}),
            **({} if code is None else {"error.type": code}),
        }
    )
    if status >= 500 or not status:
        span.set_status(Status(StatusCode.ERROR))


def traceparent() -> str | None:
    """The current span as the value of a header `traceparent`; None without a trace."""
    if _TRACER.get() is None:
        return None
    from opentelemetry.trace import get_current_span

    context = get_current_span().get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def stage_spans(name: str, windows: int) -> StageSpans | None:
    """The spans of one stage of a run, below the current span; None without a trace.

    Args:
        name: name of the stage.
        windows: number of windows that the stage processes.
    """
    tracer = _TRACER.get()
    return None if tracer is None else StageSpans(tracer, name, windows)


class StageSpans:
    """One stage of a run: a span from its first window to its last, and one for some windows.

    Thread-safe.

    Args:
        tracer: makes the spans.
        name: name of the stage.
        windows: number of windows that the stage processes.
    """

    def __init__(self, tracer: Tracer, name: str, windows: int) -> None:
        from opentelemetry.context import get_current

        self._tracer = tracer
        self._name = name
        self._windows = windows
        self._every = -(-windows // MOST_WINDOWS) or 1
        self._parent = get_current()
        self._lock = threading.Lock()
        self._span: Span | None = None
        self._last = 0

    @contextmanager
    def window(self, number: int) -> Iterator[None]:
        """Process one window.

        Args:
            number: the window's number, from 0.
        """
        from opentelemetry.trace import set_span_in_context

        with self._lock:
            if self._span is None:
                self._span = self._tracer.start_span(
                    self._name,
                    context=self._parent,
                    attributes=_named({"windows": self._windows, "every": self._every}),
                )
            stage = set_span_in_context(self._span)
        try:
            if number % self._every:
                yield
                return
            with self._tracer.start_as_current_span(
                "window", context=stage, attributes=_named({"window": number})
            ):
                yield
        finally:
            with self._lock:
                self._last = time.time_ns()

    def end(self, busy: float) -> None:
        """End the stage's span with its last window.

        Args:
            busy: seconds in which at least one window was processed.
        """
        if self._span is not None:
            self._span.set_attributes(_named({"busy_seconds": busy}))
            self._span.end(self._last)


def _named(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {f"pimc.{name}": value for name, value in attributes.items()}


def _extracted(headers: Mapping[str, str]) -> Context:
    """The context that the headers `traceparent` and `tracestate` name; empty without one."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    names = ("traceparent", "tracestate")
    carrier = {name: headers[name] for name in names if headers.get(name)}
    return TraceContextTextMapPropagator().extract(carrier, context=Context())


def _provider(version: str) -> TracerProvider:
    """A provider that exports by OTLP over HTTP, configured by `OTEL_*`."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(
            f"PIMC_TRACING: the package '{error.name}' is not installed; install the extra "
            "`tracing` (pip install '.[service,tracing]'), or set PIMC_TRACING=0"
        ) from error
    about = {"service.version": version}
    named = "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if not (named or os.environ.get("OTEL_SERVICE_NAME")):
        about["service.name"] = _SERVICE
    try:
        provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:
        raise SettingsError(f"PIMC_TRACING: a variable OTEL_* is not valid: {error}") from error
    return provider
