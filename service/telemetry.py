"""Telemetry: JSON log lines and Prometheus metrics.

Each application has its own metrics registry, so that two applications in one process count apart.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from service.errors import shown
from service.settings import LogLevel

METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
TRACE_ID: ContextVar[str | None] = ContextVar("trace_id", default=None)
_JOB_ID: ContextVar[str | None] = ContextVar("job_id", default=None)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_MOST_MODELS = 64
"""Largest number of models that metrics count under their own name; the rest count as `other`."""
_MOST_KEYS = 64
"""Largest number of API keys that metrics count under their own name; the rest count as `other`."""
_PACES = 20
"""Number of last runs of a task that an estimate uses."""
_STAGE_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800)
"""Upper bounds of the histograms' buckets, seconds."""
_BATCH_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
"""Upper bounds of the buckets of the time of one batch, seconds."""
_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of the buckets of the size of a batch: batches are padded to powers of two."""
_LINE_LENGTH = 4_000
"""Largest number of characters of one text of a log line."""
_STACK_LENGTH = 32_000
"""Largest number of characters of a stack trace in the log."""
# The fields that every LogRecord has; all others came with `extra`.
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Estimate of a run's duration."""

    shortest: float
    """Lower end of the range, seconds."""
    longest: float
    """Upper end of the range, seconds."""
    runs: int
    """Number of past runs that the range is taken from."""


class Metrics:
    """The Prometheus metrics of one application.

    Args:
        per_key: whether use is also counted by API key; the metrics then contain the names of the
            keys.
    """

    def __init__(self, *, per_key: bool = False) -> None:
        self._per_key = per_key
        self._registry = CollectorRegistry()
        self._paces: dict[tuple[str, str], deque[tuple[float, float, int]]] = defaultdict(
            lambda: deque(maxlen=_PACES)
        )
        self._pacing = threading.Lock()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no type for it
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._requests = self._counter(
            "pimc_requests", "Requests completed", ["route", "method", "status"]
        )
        self._seconds = Histogram(
            "pimc_request_seconds",
            "Seconds from the first byte of a request to the last byte of its response",
            ["route"],
            buckets=_STAGE_BUCKETS,
            registry=self._registry,
        )
        self._pixels = self._counter("pimc_pixels", "Pixels or series predicted", ["task"])
        self._stages = Histogram(
            "pimc_stage_seconds",
            "Seconds that one run spent in each stage",
            ["task", "stage"],
            buckets=_STAGE_BUCKETS,
            registry=self._registry,
        )
        self._running = Gauge("pimc_runs_in_flight", "Current runs", registry=self._registry)
        self._windows = Gauge(
            "pimc_windows_in_flight", "Windows read and not yet written", registry=self._registry
        )
        self._cluster_windows = self._counter(
            "pimc_cluster_windows", "Windows given to the cluster, by outcome", ["outcome"]
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
            "Seconds from the start of a job's last run to its success",
            ["task"],
            buckets=_STAGE_BUCKETS,
            registry=self._registry,
        )

        self._oldest: float | None = None
        self._watch(
            "pimc_oldest_job_seconds",
            "Seconds since the job that waits longest was accepted; 0 if none waits",
            lambda: 0 if self._oldest is None else max(0, time.time() - self._oldest),
        )
        self._callbacks = self._counter(
            "pimc_callbacks",
            "Attempts to call the receivers of jobs",
            ["event", "outcome"],
        )
        self._callbacks_waiting = Gauge(
            "pimc_callbacks_waiting",
            "Callbacks that no receiver has accepted yet",
            registry=self._registry,
        )
        self._sweeps = self._counter("pimc_sweeps", "Searches for expired jobs", ["outcome"])
        self._problems = self._counter("pimc_problems", "Error responses by code", ["code"])
        self._bytes = self._counter(
            "pimc_body_bytes",
            "Bytes of bodies: requests (in), responses (out)",
            ["direction"],
        )
        self._requests_in_flight = Gauge(
            "pimc_requests_in_flight",
            "Requests whose response has not been sent to its end",
            registry=self._registry,
        )
        self._models: set[str] = set()
        self._keys: set[str] = set()
        self._batch_seconds = Histogram(
            "pimc_batch_seconds",
            "Seconds of one batch in a model's session",
            ["model"],
            buckets=_BATCH_BUCKETS,
            registry=self._registry,
        )
        self._batch_sizes = Histogram(
            "pimc_batch_size",
            "Pixels or patches of one batch, without padding",
            ["model"],
            buckets=_SIZE_BUCKETS,
            registry=self._registry,
        )
        self._read_bytes = self._counter(
            "pimc_read_bytes",
            "Bytes read: decoded pixels of files (decoded), bytes received from hosts (fetched)",
            ["source"],
        )
        self._model_seconds = Histogram(
            "pimc_model_seconds",
            "Seconds of requests as in pimc_request_seconds, by the model that was run",
            ["model"],
            buckets=_STAGE_BUCKETS,
            registry=self._registry,
        )
        self._connections = Gauge("pimc_connections", "Open connections", registry=self._registry)
        self._given_up = self._counter(
            "pimc_connections_given_up",
            "Connections closed or rejected because of a limit, by reason",
            ["reason"],
        )
        self._downloads = Gauge(
            "pimc_downloads", "Results of jobs being sent", registry=self._registry
        )
        self._downloads_rejected = self._counter(
            "pimc_downloads_rejected",
            "Requests for results rejected because of a limit: for one caller, or for all",
            ["bound"],
        )

        self._ranges = self._counter(
            "pimc_ranges", "Ranges of remote files that were looked for in the cache", ["outcome"]
        )
        if per_key:
            self._key_requests = self._counter(
                "pimc_key_requests", "Requests completed, by the name of the API key", ["key"]
            )
            self._key_pixels = self._counter(
                "pimc_key_pixels", "Pixels or series predicted, by the name of the API key", ["key"]
            )
        self._keys_refused = Counter(
            "pimc_api_keys_refused", "Wrong or expired API keys", registry=self._registry
        )
        self._quotas = self._counter(
            "pimc_quota_exceeded",
            "Requests rejected because a caller's quota is used up",
            ["quota"],
        )
        self._uploads_given_up = Counter(
            "pimc_uploads_given_up",
            "Slow uploads ended because other requests needed their capacity",
            registry=self._registry,
        )

    def watch_admission(
        self,
        *,
        run_slots: int,
        held: Callable[[], int],
        awaited: Callable[[], int],
        uploads: Callable[[], int],
        spooled: Callable[[], int],
        parsed: Callable[[], int],
    ) -> None:
        """Add gauges of admission; they are read whenever a client reads the metrics.

        Args:
            run_slots: number of requests that may run at once.
            held: returns the number of run slots in use.
            awaited: returns the number of requests that wait for a run slot.
            uploads: returns the number of uploads in flight.
            spooled: returns the bytes of bodies on disk.
            parsed: returns the bytes of memory that are reserved for JSON bodies.
        """
        for name, text, read in (
            ("pimc_run_slots", "Requests that may run at once", lambda: run_slots),
            ("pimc_run_slots_held", "Run slots in use", held),
            ("pimc_run_slots_awaited", "Requests that wait for a run slot", awaited),
            ("pimc_uploads_in_flight", "Uploads that have not ended", uploads),
            ("pimc_spooled_bytes", "Bytes of request bodies on disk", spooled),
            (
                "pimc_json_bytes",
                "Bytes of memory that JSON bodies hold, as text and parsed",
                parsed,
            ),
        ):
            self._watch(name, text, read)

    def watch_memory(
        self, *, limit: int, taken: Callable[[], int], awaited: Callable[[], int]
    ) -> None:
        """Add gauges of the memory budget; they are read whenever a client reads the metrics.

        Args:
            limit: bytes that runs may take together.
            taken: returns the bytes that runs hold.
            awaited: returns the number of runs that wait for memory.
        """
        for name, text, read in (
            ("pimc_memory_budget_bytes", "Bytes of memory that runs may take", lambda: limit),
            ("pimc_memory_taken_bytes", "Bytes of memory that runs hold", taken),
            ("pimc_memory_awaited", "Runs that wait for memory", awaited),
        ):
            self._watch(name, text, read)

    def watch_cache(self, size: Callable[[], int], ranges: Callable[[], int]) -> None:
        """Add gauges of the caches; they are read whenever a client reads the metrics.

        Args:
            size: returns the size of GDAL's cache of decoded blocks, bytes.
            ranges: returns the bytes of ranges of remote files that are kept.
        """
        self._watch(
            "pimc_range_cache_bytes", "Ranges of remote files that are kept in memory", ranges
        )
        self._watch(
            "pimc_block_cache_bytes",
            "Size of the cache of decoded blocks, which grows for runs with large blocks",
            size,
        )

    def watch_cluster(
        self,
        *,
        workers: Callable[[], int],
        threads: Callable[[], int],
        refused: Callable[[], int],
    ) -> None:
        """Add gauges of the cluster that runs jobs; they are read with the metrics.

        Args:
            workers: returns the number of workers that compute windows.
            threads: returns the number of their threads.
            refused: returns the number of workers that are refused.
        """
        for name, text, read in (
            ("pimc_cluster_workers", "Workers that compute windows of jobs", workers),
            ("pimc_cluster_threads", "Threads of these workers", threads),
            ("pimc_cluster_workers_refused", "Workers that differ from the service", refused),
        ):
            self._watch(name, text, read)

    def cluster_window(self, outcome: str) -> None:
        """Count a window that was given to the cluster.

        Args:
            outcome: `written`, `late`, `lost` or `refused`.
        """
        self._cluster_windows.labels(outcome).inc()

    def watch_keys(self, valid: Callable[[], int]) -> None:
        """Add a gauge of the API keys that have not expired.

        Args:
            valid: returns the number of keys; called whenever a client reads the metrics.
        """
        self._watch("pimc_api_keys", "API keys that are valid", valid)

    def key_refused(self) -> None:
        """Count a wrong or expired API key."""
        self._keys_refused.inc()

    def quota_exceeded(self, quota: str) -> None:
        """Count a request that was rejected because its caller's quota is used up."""
        self._quotas.labels(quota).inc()

    def upload_given_up(self) -> None:
        """Count a slow upload that was ended for the benefit of other requests."""
        self._uploads_given_up.inc()

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge that calls `read` whenever a client reads the metrics."""
        Gauge(name, text, registry=self._registry).set_function(read)

    def provider(self, name: str) -> None:
        """Set the execution provider in use."""
        self._provider.labels(name).set(1)

    def connections(self, count: int) -> None:
        """Set the number of open connections."""
        self._connections.set(count)

    def connection_given_up(self, reason: str) -> None:
        """Count a connection that was closed or rejected because of a limit."""
        self._given_up.labels(reason).inc()

    def downloads(self, count: int) -> None:
        """Set the number of results that are being sent."""
        self._downloads.set(count)

    def download_rejected(self, bound: str) -> None:
        """Count a request for a result that was rejected because of a limit.

        Args:
            bound: `caller` or `all`, whichever limit was reached.
        """
        self._downloads_rejected.labels(bound).inc()

    def request_completed(
        self,
        *,
        route: str,
        method: str,
        status: int,
        seconds: float,
        code: str | None = None,
        model: str | None = None,
        bytes_in: int = 0,
        bytes_out: int = 0,
        key: str | None = None,
    ) -> None:
        """Count one completed request.

        Args:
            route: path of the route, with the names of its parameters.
            method: HTTP method.
            status: status of the response.
            seconds: seconds from the head of the request to the end of the response.
            code: error code of the response; None if it was not an error.
            model: model that computed the response; None if no model did.
            bytes_in: bytes of the request's body.
            bytes_out: bytes of the response's body.
            key: name of the API key; None without one.
        """
        known = method if method in _METHODS else "OTHER"
        self._requests.labels(route, known, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        self._bytes.labels("in").inc(bytes_in)
        self._bytes.labels("out").inc(bytes_out)
        if code is not None:
            self._problems.labels(code).inc()
        if model is not None:
            self._model_seconds.labels(self._model_label(model)).observe(seconds)
        if self._per_key and key:
            self._key_requests.labels(_bounded(key, self._keys, _MOST_KEYS)).inc()

    def _model_label(self, model: str) -> str:
        """The label of a model. Callers can make any number of models; labels are bounded."""
        return _bounded(model, self._models, _MOST_MODELS)

    def batch(self, model: str, size: int, seconds: float) -> None:
        """Count one batch that a model's session has run.

        Args:
            model: the model, as `name@version`.
            size: pixels or patches of the batch, without padding.
            seconds: seconds in the session.
        """
        label = self._model_label(model)
        self._batch_seconds.labels(label).observe(seconds)
        self._batch_sizes.labels(label).observe(size)

    def decoded(self, count: int) -> None:
        """Count bytes of pixels that were decoded from files."""
        self._read_bytes.labels("decoded").inc(count)

    def range_looked_up(self, outcome: str) -> None:
        """Count a range of a remote file that was looked for in the cache: `hit` or `miss`."""
        self._ranges.labels(outcome).inc()

    def fetched(self, count: int) -> None:
        """Count bytes that were received from other hosts."""
        self._read_bytes.labels("fetched").inc(count)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request as in flight until its response is sent."""
        with self._requests_in_flight.track_inprogress():
            yield

    def build(self, version: str) -> None:
        """Set the service's version. The versions of its libraries are not published."""
        info = Gauge(
            "pimc_build_info", "1 for the running version", ["version"], registry=self._registry
        )
        info.labels(version).set(1)

    def watch_disk(self, **folders: Path) -> None:
        """Add a gauge of free disk space; it is read whenever a client reads the metrics.

        Args:
            folders: a folder on each disk, by the value of the label `place`.
        """
        free = Gauge(
            "pimc_disk_free_bytes",
            "Bytes free on the disk of jobs (state) and of temporary files (scratch)",
            ["place"],
            registry=self._registry,
        )
        for place, folder in folders.items():
            free.labels(place).set_function(partial(free_bytes, folder))

    def callback(self, event: str, outcome: Literal["delivered", "failed", "given_up"]) -> None:
        """Count one attempt to call a job's receiver."""
        self._callbacks.labels(event, outcome).inc()

    def callbacks_waiting(self, count: int) -> None:
        """Set the number of callbacks that were not accepted yet."""
        self._callbacks_waiting.set(count)

    def swept(self, outcome: Literal["done", "failed"]) -> None:
        """Count one search for expired jobs."""
        self._sweeps.labels(outcome).inc()

    def ran(
        self,
        *,
        task: str,
        pixels: int,
        stages: Mapping[str, float],
        key: str | None = None,
        of: str = "raster",
    ) -> None:
        """Count one finished run.

        Args:
            task: task of the run.
            pixels: number of pixels, points or series that were predicted.
            stages: seconds that each stage was busy, by name.
            key: name of the API key; None or empty without one.
            of: kind of input, such as `raster`.
        """
        self._pixels.labels(task).inc(pixels)
        if self._per_key and key:
            self._key_pixels.labels(_bounded(key, self._keys, _MOST_KEYS)).inc(pixels)
        for stage, spent in stages.items():
            self._stages.labels(task, stage).observe(spent)
        if pixels and stages:
            with self._pacing:
                self._paces[task, of].append((max(stages.values()), sum(stages.values()), pixels))

    def pace(self, task: str, pixels: int, *, of: str = "raster") -> Pace | None:
        """Estimate the duration of a run from the last runs of its task for the same kind.

        Stages overlap, so a run takes at least as long as its longest stage and at most as long as
        the sum of its stages. The range spans the last runs, scaled by pixels. Its upper end is
        not scaled down, because part of a run's duration does not depend on its pixels.

        Args:
            task: task of the run.
            pixels: number of pixels, points or series to predict.
            of: kind of input, such as `raster`; a point takes longer than a pixel of a raster.

        Returns:
            The estimate; None if there was no such run since the start of the server.
        """
        with self._pacing:
            last = list(self._paces[task, of])
        if not last:
            return None
        return Pace(
            shortest=min(least * pixels / count for least, _, count in last),
            longest=max(most * max(1.0, pixels / count) for _, most, count in last),
            runs=len(last),
        )

    def jobs(self, counts: Mapping[str, int], oldest: float | None = None) -> None:
        """Set the number of jobs by status.

        Args:
            counts: number of jobs by status.
            oldest: time of acceptance of the job that has waited longest, seconds since 1970; None
                if no job waits.
        """
        self._oldest = oldest
        for status, count in counts.items():
            self._jobs.labels(status).set(count)

    def job_ran(self, *, task: str, seconds: float) -> None:
        """Count one job that succeeded."""
        self._job_seconds.labels(task).observe(seconds)

    @contextmanager
    def run(self) -> Iterator[None]:
        """Count a run as in flight while the context is open."""
        with self._running.track_inprogress():
            yield

    def windows(self, change: int) -> None:
        """Add to the number of windows in flight: positive when read, negative when written."""
        self._windows.inc(change)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format, without the times at which they were made."""
        return bytes(generate_latest(self._registry))


def _bounded(name: str, known: set[str], most: int) -> str:
    """A name as a label: `other` once there are `most` others."""
    if name not in known and len(known) < most:
        known.add(name)
    return name if name in known else "other"


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder; 0 if the folder does not exist."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


@contextmanager
def job_named(job_id: str) -> Iterator[None]:
    """Add the job's id to every log line in this context."""
    token = _JOB_ID.set(job_id)
    try:
        yield
    finally:
        _JOB_ID.reset(token)


class JsonFormatter(logging.Formatter):
    """A log record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, message, ids, the fields of `extra`, and the stack trace."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = REQUEST_ID.get()
        if request_id is not None:
            entry["request_id"] = request_id
        trace_id = TRACE_ID.get()
        if trace_id is not None:
            entry["trace_id"] = trace_id
        job_id = _JOB_ID.get()
        if job_id is not None:
            entry["job_id"] = job_id
        entry |= {k: v for k, v in vars(record).items() if k not in _RECORD_FIELDS}
        entry = {k: shown(v, _LINE_LENGTH) if isinstance(v, str) else v for k, v in entry.items()}
        entry.pop("color_message", None)  # uvicorn's copy of the message for terminals
        if record.exc_info:
            entry["stack"] = shown(self.formatException(record.exc_info), _STACK_LENGTH)
        return json.dumps(entry, default=str)


def log_config(level: LogLevel) -> dict[str, Any]:
    """Configuration for `logging.config.dictConfig`: JSON lines on stderr, also for uvicorn.

    Args:
        level: least severe level that is logged.
    """
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "root": {"level": level.upper(), "handlers": ["stderr"]},
        "loggers": {
            # uvicorn's access log would repeat the line that the service writes per request.
            "uvicorn.access": {"level": "WARNING"},
            # python_multipart logs each candidate for a boundary between parts.
            "python_multipart": {"level": "WARNING"},
            "rasterio": {"level": "WARNING"},
            # httpx logs each downloaded URL, and a signed URL is a secret.
            "httpx": {"level": "WARNING"},
            "httpcore": {"level": "WARNING"},
        },
    }
