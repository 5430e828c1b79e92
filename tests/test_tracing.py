"""Traces, as a real receiver of OTLP over HTTP gets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.run.executors import ThreadExecutor
from service.tracing import MOST_WINDOWS, Traces, span
from tests.kits.client import Received, Reply, serving
from tests.kits.jobs import ASYNC, SERIES, waited
from tests.kits.patience import PATIENCE
from tests.kits.rasters import write
from tests.kits.spans import PROTOBUF, Spans, attributes

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@contextmanager
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Received]]:
    with serving(lambda _: Reply(body=b"", headers=PROTOBUF)) as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        yield received


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def stack(tmp_path: Path) -> list[tuple[str, Any]]:
    parts = []
    for month in range(1, 9):
        bands = np.full((3, 96, 96), 2000, np.uint16)
        names = ("B02", "B04", "B08")
        path = write(tmp_path / f"2021-{month:02d}-15.tif", bands, descriptions=names).path
        parts.append(("files", (path.name, path.read_bytes(), "image/tiff")))
    return parts


def test_a_request_and_its_job_as_a_receiver_gets_them(
    zoo: Path, stack: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiver(monkeypatch) as received:
        with served(model_dir=zoo, tracing=True) as api:  # its end sends what is left
            response = api.post("/classify-pixels", files=stack, headers=CALLED)
            assert response.status_code == 200, response.text
            accepted = api.post("/classify-pixels", files=stack, headers={**CALLED, **ASYNC})
            job = accepted.json()["jobID"]
            waited(api, job)
            problem = api.post("/embed", json={"series": []}, headers=CALLED).json()
            own = api.post("/embed", json={"series": []}).json()
            api.get("/health/ready", headers=CALLED)
            api.get("/metrics")
        spans = Spans(received)
    assert spans.paths == {"/v1/traces"}
    assert {r["service.name"] for r in spans.resources} == {"pimc"}
    direct, submitted = spans.named("POST /classify-pixels")
    for request, status in ((direct, 200), (submitted, 202)):
        assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
        assert request.kind == Span.SPAN_KIND_SERVER
        assert attributes(request)["http.response.status_code"] == status
        assert attributes(request)["http.route"] == "/classify-pixels"
    request_id = response.headers["X-Request-ID"]
    assert attributes(direct)["pimc.request_id"] == request_id
    assert attributes(direct)["pimc.model"] == response.headers["PIMC-Model"]
    for name in ("receive", "queue", "plan", "run", "respond"):
        assert spans.one(name, direct).trace_id == direct.trace_id

    # A job is a trace of its own, which names the request that submitted it.
    run_of_job = spans.one("job classify-pixels")
    assert run_of_job.trace_id.hex() not in {TRACE, "0" * 32}
    assert not run_of_job.parent_span_id
    (link,) = run_of_job.links
    assert (link.trace_id, link.span_id) == (submitted.trace_id, submitted.span_id)
    assert attributes(run_of_job)["pimc.job"] == job

    for above in (direct, run_of_job):
        run = spans.one("run", above)
        assert attributes(run)["pimc.pixels"] == 96 * 96
        for name in ("read", "infer", "write"):
            stage = spans.one(name, run)
            windows = spans.named("window", stage)
            numbers = sorted(attributes(one)["pimc.window"] for one in windows)
            assert numbers == list(range(attributes(stage)["pimc.windows"]))
            begun, ended = (
                min(one.start_time_unix_nano for one in windows),
                max(one.end_time_unix_nano for one in windows),
            )
            assert run.start_time_unix_nano <= stage.start_time_unix_nano <= begun
            assert begun <= ended <= run.end_time_unix_nano
        assert spans.one("finish", run)

    assert problem["trace_id"] == TRACE
    failed, another = spans.named("POST /embed")
    assert attributes(failed)["error.type"] == "invalid_request"
    assert failed.status.code == Status.STATUS_CODE_UNSET  # the client's mistake
    assert another.trace_id.hex() == own["trace_id"] != TRACE
    assert not another.parent_span_id
    assert not [one for one in spans.all if "/health" in one.name or "/metrics" in one.name]


def test_points_and_series_have_their_stages(
    zoo: Path, stack: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = {"type": "Point", "coordinates": [0.0, 0.0]}
    feature = {"type": "Feature", "geometry": nowhere, "properties": {}}
    points = json.dumps({"type": "FeatureCollection", "features": [feature]})
    with receiver(monkeypatch) as received:
        with served(model_dir=zoo, tracing=True) as api:
            assert api.post("/embed", json=SERIES).status_code == 200
            sent = api.post("/classify-pixels", files=stack, data={"points": points})
            assert sent.status_code == 200, sent.text
        spans = Spans(received)
    by_series = spans.one("run", spans.one("POST /embed"))
    assert spans.one("infer", by_series)
    at_points = spans.one("run", spans.one("POST /classify-pixels"))
    assert spans.one("read", at_points)
    assert spans.one("infer", at_points)


def test_a_fault_is_an_error_and_no_trace_of_the_caller_is_invented(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the inside")

    monkeypatch.setattr("service.api.routes.tasks.execute", broken)
    with receiver(monkeypatch) as received:
        with served(model_dir=zoo, tracing=True) as api:
            bad = {"traceparent": f"00-{'0' * 32}-{PARENT}-01"}
            problem = api.post("/embed", json=SERIES, headers=bad)
            assert problem.status_code == 500
        request = Spans(received).one("POST /embed")
    assert request.status.code == Status.STATUS_CODE_ERROR
    assert attributes(request)["error.type"] == "internal_error"
    assert request.trace_id.hex() == problem.json()["trace_id"]
    assert not request.parent_span_id


def test_the_windows_of_a_large_run_have_a_bounded_number_of_spans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 10 * MOST_WINDOWS + 3
    with receiver(monkeypatch) as received:
        traces = Traces(enabled=True, version="1")
        with traces.job("job", None, {}):
            ThreadExecutor().run(
                range(count), read=lambda n: n, infer=lambda n: n, write=lambda n, _: None
            )
        traces.close()
        spans = Spans(received)
    job = spans.one("job")
    assert not job.links
    for name in ("read", "infer", "write"):
        stage = spans.one(name, job)
        assert attributes(stage)["pimc.windows"] == count
        windows = spans.named("window", stage)
        assert MOST_WINDOWS // 2 < len(windows) <= MOST_WINDOWS
        assert {attributes(one)["pimc.window"] % 11 for one in windows} == {0}


def test_the_sampler_of_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with receiver(monkeypatch) as received:
        traces = Traces(enabled=True, version="1")
        with traces.request({}, "unsampled"):
            pass
        with traces.request(CALLED, "sampled by the caller"):
            pass
        traces.close()
        assert [one.name for one in Spans(received).all] == ["sampled by the caller"]


@pytest.mark.parametrize("reply", [Reply(status=400), Reply(drop=True)])
def test_a_receiver_that_fails_fails_no_request(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, reply: Reply
) -> None:
    asked = threading.Event()

    def response(_: Received) -> Reply:
        asked.set()
        return reply

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with serving(response) as (url, _):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        with served(model_dir=zoo, tracing=True) as api:
            assert api.post("/embed", json=SERIES).status_code == 200
        assert asked.is_set()


@pytest.mark.slow
def test_without_tracing_nothing_is_made_or_imported(zoo: Path) -> None:
    with served(model_dir=zoo) as api:
        problem = api.post("/embed", json={"series": []})
        assert "trace_id" not in problem.json()
        assert api.post("/embed", json={"series": []}, headers=CALLED).json()["trace_id"] == TRACE
    with Traces(enabled=False, version="1").request({}, "a") as made, span("b"):
        assert made is None
    code = (
        "import sys; from service.settings import Settings; from service.api.app import create_app;"
        "create_app(Settings()); from service.tracing import span\n"
        "with span('x'): pass\n"
        "kinds = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "print([name for name in sys.modules if name.startswith(kinds)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=PATIENCE, check=True,
        cwd=Path(__file__).parents[1],
        env={k: v for k, v in os.environ.items() if not k.startswith(("PIMC_", "OTEL_"))},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.settings import SettingsError

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"PIMC_TRACING: .*\[service,tracing\]"):
        Traces(enabled=True, version="1")
