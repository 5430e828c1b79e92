"""What the service tells its operator: one log line and a few counts for each request.

Metrics live in a registry of their own for each application, so that two in one process do not
meet. `RequestRecord` is the outermost ring: it names the request, and whatever goes wrong inside
leaves it as an answer.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.executors import Answer, Item, Read, ThreadExecutor, Timing
from service.settings import LogLevel, SettingsError

METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LOG = logging.getLogger(__name__)
_REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
_JOB_ID: ContextVar[str | None] = ContextVar("job_id", default=None)
# What a caller may choose as an id: it goes into headers and logs.
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_STAGE_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800)
# The fields that every LogRecord has; the others came with `extra`.
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class Metrics:
    """The counts of one application, in Prometheus' terms."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._requests = self._counter(
            "pimc_requests", "Requests answered", ["route", "method", "status"]
        )
        self._seconds = Histogram(
            "pimc_request_seconds",
            "From the first byte of a request to the last of its answer",
            ["route"],
            buckets=_STAGE_BUCKETS,
            registry=self._registry,
        )
        self._pixels = self._counter("pimc_pixels", "Pixels or series answered", ["task"])
        self._stages = Histogram(
            "pimc_stage_seconds",
            "Seconds that one run spent in each stage",
            ["task", "stage"],
            buckets=_STAGE_BUCKETS,
            registry=self._registry,
        )
        self._running = Gauge("pimc_runs_in_flight", "Runs going on", registry=self._registry)
        self._windows = Gauge(
            "pimc_windows_in_flight", "Windows read and not yet written", registry=self._registry
        )
        self._provider = Gauge(
            "pimc_provider_info",
            "1 for the execution provider in use",
            ["provider"],
            registry=self._registry,
        )
        self._jobs = Gauge("pimc_jobs", "Jobs kept, by status", ["status"], registry=self._registry)
        self._job_seconds = Histogram(
            "pimc_job_seconds",
            "From the beginning of a job's last run to its success",
            ["task"],
            buckets=_STAGE_BUCKETS,
            registry=self._registry,
        )

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def provider(self, name: str) -> None:
        """Note the execution provider really in use."""
        self._provider.labels(name).set(1)

    def answered(self, *, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request."""
        known = method if method in _METHODS else "OTHER"
        self._requests.labels(route, known, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def ran(self, *, task: str, pixels: int, timing: Timing) -> None:
        """Count one finished run: its pixels, and its seconds by stage."""
        self._pixels.labels(task).inc(pixels)
        for stage, spent in asdict(timing).items():
            self._stages.labels(task, stage).observe(spent)

    def jobs(self, counts: Mapping[str, int]) -> None:
        """Note how many jobs there are, by status."""
        for status, count in counts.items():
            self._jobs.labels(status).set(count)

    def job_ran(self, *, task: str, seconds: float) -> None:
        """Count one job that succeeded."""
        self._job_seconds.labels(task).observe(seconds)

    @contextmanager
    def run(self) -> Iterator[None]:
        """Count a run while it goes on."""
        with self._running.track_inprogress():
            yield

    def windows(self, change: int) -> None:
        """Count windows in (above 0) or out (below 0)."""
        self._windows.inc(change)

    def text(self) -> bytes:
        """Everything counted, as Prometheus reads it."""
        return bytes(generate_latest(self._registry))


class CountedExecutor:
    """Runs windows as `ThreadExecutor` does, and counts those read and not yet written."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def run(
        self,
        items: Sequence[Item],
        *,
        read: Callable[[Item], Read],
        infer: Callable[[Read], Answer],
        write: Callable[[Item, Answer], None],
        cancelled: threading.Event | None = None,
    ) -> Timing:
        """See `Executor.run`."""
        begun: list[None] = []
        ended: list[None] = []  # lists, as two threads add to them

        def read_counted(item: Item) -> Read:
            begun.append(None)
            self._metrics.windows(1)
            return read(item)

        def write_counted(item: Item, answer: Answer) -> None:
            write(item, answer)
            ended.append(None)
            self._metrics.windows(-1)

        try:
            return ThreadExecutor().run(
                items, read=read_counted, infer=infer, write=write_counted, cancelled=cancelled
            )
        finally:
            # Windows of a run that failed half way are in flight no more.
            self._metrics.windows(len(ended) - len(begun))


@contextmanager
def job_named(job_id: str) -> Iterator[None]:
    """Every log line from inside names the job."""
    token = _JOB_ID.set(job_id)
    try:
        yield
    finally:
        _JOB_ID.reset(token)


class RequestRecord:
    """ASGI middleware: names each request, logs and counts it, answers what nobody foresaw."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        on_fault: Callable[[Request], Response],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._on_fault = on_fault

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on, with a name and an eye on its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, _in_short(send))
            return
        begin = time.perf_counter()
        request_id = sane_request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        recorded = False

        def record() -> None:
            nonlocal recorded
            if not recorded:
                recorded = True
                self._record(scope, status, time.perf_counter() - begin)

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            elif not message.get("more_body", False):
                record()  # before its end is sent: who has the answer finds it counted
            await send(message)

        token = _REQUEST_ID.set(request_id)
        try:
            await self._app(scope, receive, send_named)
        except Exception:
            _LOG.exception("unforeseen fault")
            if status:  # an answer half sent cannot be taken back; the server must cut it off
                raise
            await self._on_fault(Request(scope))(scope, receive, send_named)
        finally:
            record()
            _REQUEST_ID.reset(token)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"]
        self._metrics.answered(route=route, method=method, status=status, seconds=seconds)
        _LOG.info(
            "request",
            extra={
                "method": method,
                "route": route,
                "path": scope["path"],
                "status": status,
                "ms": round(seconds * 1000, 1),
            },
        )


def _in_short(send: Send) -> Send:
    """Sends a start that failed on, as a sentence where an administrator can mend it."""

    async def send_short(message: Message) -> None:
        error = sys.exception()  # Starlette sends from its handler, and the whole stack
        if message["type"] == "lifespan.startup.failed" and isinstance(error, SettingsError):
            message = {**message, "message": str(error)}
        await send(message)

    return send_short


def sane_request_id(given: str | None) -> str:
    """The caller's id where it is one that may be echoed, else a new one."""
    return given if given and _SANE_ID.fullmatch(given) else uuid.uuid4().hex


class JsonFormatter(logging.Formatter):
    """A log record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, message, request id, whatever came as `extra`, and the stack."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = _REQUEST_ID.get()
        if request_id is not None:
            entry["request_id"] = request_id
        job_id = _JOB_ID.get()
        if job_id is not None:
            entry["job_id"] = job_id
        entry |= {k: v for k, v in vars(record).items() if k not in _RECORD_FIELDS}
        entry.pop("color_message", None)  # uvicorn's own, for terminals
        if record.exc_info:
            entry["stack"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def log_config(level: LogLevel) -> dict[str, Any]:
    """The configuration for `logging.config.dictConfig`: JSON lines on stderr, uvicorn's too."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "root": {"level": level.upper(), "handlers": ["stderr"]},
        "loggers": {
            # Its access log would say again what each request's own line says.
            "uvicorn.access": {"level": "WARNING"},
            # It notes each guess at a part's edge.
            "python_multipart": {"level": "WARNING"},
            "rasterio": {"level": "WARNING"},
            # It names each URL fetched, and a signed one is a secret.
            "httpx": {"level": "WARNING"},
            "httpcore": {"level": "WARNING"},
        },
    }
