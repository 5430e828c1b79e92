"""Files on a Dask cluster without a shared folder: a bucket, remote files; traces, and TLS."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import dask.config
import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from rasterio.windows import Window

from benchmarks.remote import degrees, write_cog
from benchmarks.remote import stack as tile_stack
from benchmarks.serving import served
from service.jobs import runner
from tests.kits.client import Reply, serving
from tests.kits.cluster import BY_WORKER, Fleet, dask_cluster, joined, outcome, ready
from tests.kits.gate import HELD, zoo_with_a_held_model
from tests.kits.jobs import (
    ASYNC,
    FIELD,
    Backend,
    Files,
    finished,
    stack,
    submitted,
    taught,
    waited,
)
from tests.kits.patience import PATIENCE, files_below, soon
from tests.kits.postgres import Postgres
from tests.kits.programs import self_signed
from tests.kits.ranges import RangeServer, range_server
from tests.kits.s3 import S3
from tests.kits.spans import PROTOBUF, Spans, attributes

pytestmark = pytest.mark.slow

WINDOWS = 4
"""Windows of a job with the files of `files`."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A stack of `WINDOWS` windows."""
    return stack(tmp_path_factory.mktemp("stack"), 90, 130)


# A bucket -------------------------------------------------------------------------------------


def test_workers_read_uploads_from_a_bucket(
    zoo: Path, files: Files, s3: S3, postgres: Postgres, tmp_path: Path
) -> None:
    bucket = s3.bucket()
    shared = Backend(tmp_path / "state", postgres.database(), f"s3://{bucket}/pimc", s3.endpoint)
    fields = ("fields", ("fields.geojson", FIELD, "application/geo+json"))
    cases: list[tuple[str, Files, dict[str, str]]] = [
        ("/classify-pixels", files, {"outputs": "class,confidence", "smooth": "2"}),
        ("/classify-pixels", [*files, fields], {}),
        ("/landcover", files, {"stride": "16"}),
        ("/classify-pixels", files, {"model": "crops"}),  # a caller's own
    ]
    (tmp_path / "workers").mkdir()
    with ExitStack() as stack:
        cluster = stack.enter_context(
            dask_cluster(
                tmp_path / "workers",
                PIMC_MODEL_DIR=str(zoo),
                PIMC_PROVIDERS="cpu",
                PIMC_STORAGE_URL=shared.storage or "",
                PIMC_STORAGE_ENDPOINT=s3.endpoint,
            )
        )
        cluster.join()
        settings = {"model_dir": zoo, "dask_scheduler": cluster.address}
        api = stack.enter_context(served(**settings, **shared.settings))
        joined(api, 1)
        assert api.post("/heads", json=taught("crops")).status_code == 201
        for path, sent, data in cases:
            # Synchronous requests are computed in the service.
            expected = api.post(path, files=sent, data=data)
            assert expected.status_code == 200, expected.text
            before = outcome(api, "written")
            found = finished(api, submitted(api, path, files=sent, data=data))
            assert found == expected.content, (path, data)
            assert outcome(api, "written") > before
        assert not [key for key in s3.keys(bucket) if "/pass-" in key]
        assert ready(api)["refused"] == {}


def test_a_worker_of_another_bucket_is_refused(
    zoo: Path, files: Files, s3: S3, postgres: Postgres, tmp_path: Path
) -> None:
    shared = Backend(
        tmp_path / "state", postgres.database(), f"s3://{s3.bucket()}/pimc", s3.endpoint
    )
    own = {"PIMC_STORAGE_URL": shared.storage or "", "PIMC_STORAGE_ENDPOINT": s3.endpoint}
    (tmp_path / "workers").mkdir()
    with ExitStack() as stack:
        cluster = stack.enter_context(
            dask_cluster(tmp_path / "workers", PIMC_MODEL_DIR=str(zoo), PIMC_PROVIDERS="cpu", **own)
        )
        other = cluster.join(PIMC_STORAGE_URL=f"s3://{s3.bucket()}/pimc")
        away = cluster.join(PIMC_STORAGE_ENDPOINT="http://127.0.0.1:9")
        settings = {"model_dir": zoo, "dask_scheduler": cluster.address}
        api = stack.enter_context(served(**settings, **shared.settings))
        joined(api, 2)
        job = submitted(api, "/classify-pixels", files=files)

        def refused() -> dict[str, str]:
            return dict(ready(api)["refused"])

        assert soon(lambda: len(refused()) == 2)
        assert f"and the service in {shared.storage}" in refused()[other.process.address()]
        assert "cannot read jobs/" in refused()[away.process.address()]
        assert api.get(f"/jobs/{job}").json()["status"] == "running"
        cluster.join()
        finished(api, job)


# Remote files ---------------------------------------------------------------------------------

SIDE, BLOCK = 1024, 128
PART = Window(200, 200, 160, 120)
"""What jobs read of each file: several windows in few blocks."""


class Tile:
    """A web server of COGs, which records who reads what."""

    def __init__(self, server: RangeServer) -> None:
        self.server = server
        server.tag = '"1"'
        server.before = self._record
        (server.folder / "tile").mkdir()
        write_cog(server.folder / "tile.tif", SIDE, BLOCK, Window(0, 0, SIDE, SIDE))
        self.names = tile_stack(server.folder, server.folder / "tile.tif", 2)
        self.by_workers = 0
        self.by_others = 0
        self._bodies = 0

    def _record(self, request: BaseHTTPRequestHandler) -> bool:
        if request.headers[BY_WORKER]:
            self.by_workers += 1
        else:
            self.by_others += 1
        return False

    def body(self, **options: Any) -> dict[str, Any]:
        self._bodies += 1  # URLs of their own, so that nothing is in a cache
        items = [{"href": f"{self.server.url}/{name}?{self._bodies}"} for name in self.names]
        return {"items": items, "mask": "none", **options}


@pytest.fixture
def tile(tmp_path: Path) -> Iterator[Tile]:
    (tmp_path / "web").mkdir()
    with range_server(tmp_path / "web") as server:
        yield Tile(server)


def fetching(folder: Path, zoo: Path, stack: ExitStack, **settings: Any) -> Fleet:
    """A service and a cluster whose workers fetch remote files; they share a folder."""
    hosts = {"PIMC_ALLOWED_HOSTS": "127.0.0.1"}
    return Fleet(
        folder, zoo, stack, hosts, dask_fetch="workers", allowed_hosts="127.0.0.1", **settings
    )


def posted(api: httpx.Client, path: str, body: Mapping[str, Any]) -> str:
    response = api.post(path, json=body, headers=ASYNC)
    assert response.status_code == 202, response.text
    return str(response.json()["jobID"])


def test_workers_fetch_the_blocks_of_their_windows(zoo: Path, tile: Tile, tmp_path: Path) -> None:
    part = degrees(PART)
    cases: Sequence[tuple[str, dict[str, Any]]] = [
        ("/classify-pixels", {"bbox": part}),
        ("/embed", {"bbox": part}),
        ("/classify-pixels", {"bbox": part, "grid": "EPSG:32631@20"}),
    ]
    with ExitStack() as stack:
        fleet = fetching(tmp_path, zoo, stack)
        fleet.cluster.join()
        api = stack.enter_context(served(**fleet.settings))
        joined(api, 1)
        for path, options in cases:
            expected = api.post(path, json=tile.body(**options))
            assert expected.status_code == 200, expected.text
            tile.by_workers = tile.by_others = 0
            assert finished(api, posted(api, path, tile.body(**options))) == expected.content
            # The service reads directories and a sample, once to accept the job and once to run it.
            assert tile.by_workers > 0
            assert tile.by_others < 6 * len(tile.names)
        # Nothing that a worker has fetched is in the folder that all share.
        shared = sum(p.stat().st_size for p in files_below(fleet.state, "*.tif"))
        assert shared < (tile.server.folder / "tile.tif").stat().st_size * len(tile.names)


def test_a_file_that_is_replaced_while_a_job_waits_fails_it(
    zoo: Path, tile: Tile, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        fleet = fetching(tmp_path, zoo, stack)
        api = stack.enter_context(served(**fleet.settings))
        body = tile.body(bbox=degrees(PART))
        job = posted(api, "/classify-pixels", body)
        # Without a worker it waits, once the service has read its sample again.
        assert soon(lambda: files_below(fleet.state, "*.pass") != [])
        tile.server.tag = '"2"'
        fleet.cluster.join()
        info = waited(api, job)
        assert info["status"] == "failed"
        problem = api.get(f"/jobs/{job}/result").json()
        assert problem["code"] == "unreachable_reference"
        assert "replaced the file" in problem["detail"]


def test_a_job_waits_for_a_host_that_its_workers_cannot_reach(
    zoo: Path, tile: Tile, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(runner, "_REST_SECONDS", 0.01)
    caplog.set_level(logging.WARNING)

    def waited_for() -> list[Any]:
        return [r for r in caplog.records if r.getMessage() == "job waits for a host"]

    def away(request: BaseHTTPRequestHandler) -> bool:
        if waited_for():
            return False
        request.close_connection = True
        return True

    with ExitStack() as stack:
        fleet = fetching(tmp_path, zoo, stack)
        api = stack.enter_context(served(**fleet.settings))
        part = degrees(PART)
        expected = api.post("/classify-pixels", json=tile.body(bbox=part))
        job = posted(api, "/classify-pixels", tile.body(bbox=part))
        # Without a worker it waits, once the service has read its sample again.
        assert soon(lambda: files_below(fleet.state, "*.pass") != [])
        tile.server.before = away
        fleet.cluster.join()
        assert finished(api, job) == expected.content
        assert "'127.0.0.1'" in vars(waited_for()[0])["reason"]


def test_a_worker_that_may_not_read_from_the_host_is_refused(
    zoo: Path, tile: Tile, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        fleet = fetching(tmp_path, zoo, stack)
        closed = fleet.cluster.join(PIMC_ALLOWED_HOSTS="data.example.org")
        api = stack.enter_context(served(**fleet.settings))
        joined(api, 1)
        body = tile.body(bbox=degrees(PART))
        job = posted(api, "/classify-pixels", body)
        # No other worker could read it either.
        info = waited(api, job)
        assert info["status"] == "failed"
        problem = api.get(f"/jobs/{job}/result").json()
        assert problem["code"] == "forbidden_reference"
        refused = ready(api)["refused"]
        assert "but only from data.example.org" in refused[closed.process.address()]
        assert tile.by_workers == 0


# Traces ---------------------------------------------------------------------------------------


def test_the_windows_of_workers_are_in_the_trace_of_the_job(
    zoo: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        reply = Reply(body=b"", headers=PROTOBUF)
        url, received = stack.enter_context(serving(lambda _: reply))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        fleet = fetching(tmp_path, zoo, stack, tracing=True)
        worker = fleet.cluster.join(PIMC_TRACING="1")
        with served(**fleet.settings) as api:
            joined(api, 1)
            job = submitted(api, "/classify-pixels", files=files, data={"model": HELD})
            finished(api, job)
        count = len(worker.windows)

        def windows() -> list[Span]:
            spans = Spans(received)
            run = spans.one("run", spans.one("job classify-pixels"))
            return spans.named("window", spans.one("cluster", run))

        assert count == WINDOWS
        assert soon(lambda: len(windows()) == count), [one.name for one in Spans(received).all]
        spans = Spans(received)
        of_job = spans.one("job classify-pixels")
        address = worker.process.address()
        for window in windows():
            assert window.trace_id == of_job.trace_id
            assert attributes(window)["pimc.worker"] == address
            for name in ("read", "infer"):
                assert spans.one(name, window)


# TLS ------------------------------------------------------------------------------------------


def test_a_cluster_with_tls_computes_and_lets_nobody_in_without_a_certificate(
    zoo: Path, files: Files, tmp_path: Path
) -> None:
    folder = tmp_path / "certificates"
    folder.mkdir()
    self_signed(folder, "pimc-dask")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    section = "DASK_DISTRIBUTED__COMM__"
    variables = {f"{section}REQUIRE_ENCRYPTION": "true", f"{section}TLS__CA_FILE": cert}
    settings = {"require-encryption": True, "tls.ca-file": cert}
    for role in ("client", "scheduler", "worker"):
        variables |= {
            f"{section}TLS__{role.upper()}__CERT": cert,
            f"{section}TLS__{role.upper()}__KEY": key,
        }
        settings |= {f"tls.{role}.cert": cert, f"tls.{role}.key": key}
    (tmp_path / "workers").mkdir()
    state = tmp_path / "state"
    with ExitStack() as stack:
        cluster = stack.enter_context(
            dask_cluster(
                tmp_path / "workers",
                protocol="tls",
                PIMC_STATE_DIR=str(state),
                PIMC_MODEL_DIR=str(zoo),
                PIMC_PROVIDERS="cpu",
                **variables,
            )
        )
        assert cluster.address.startswith("tls://")
        worker = cluster.join()
        stack.enter_context(
            dask.config.set({f"distributed.comm.{name}": v for name, v in settings.items()})
        )
        api = stack.enter_context(
            served(model_dir=zoo, state_dir=state, dask_scheduler=cluster.address)
        )
        joined(api, 1)
        data = {"model": HELD}
        expected = api.post("/classify-pixels", files=files, data=data)
        assert expected.status_code == 200, expected.text
        found = finished(api, submitted(api, "/classify-pixels", files=files, data=data))
        assert found == expected.content
        assert worker.windows
        for address in (cluster.address, worker.process.address()):
            host, _, port = address.removeprefix("tls://").partition(":")
            # One with the authority's certificate, and none of its own.
            context = ssl.create_default_context(cafile=cert)
            context.check_hostname = False
            with (
                socket.create_connection((host, int(port)), PATIENCE) as plain,
                pytest.raises((ssl.SSLError, ConnectionError)),
                context.wrap_socket(plain) as stranger,
            ):
                stranger.recv(1)
            # One that speaks no TLS.
            with socket.create_connection((host, int(port)), PATIENCE) as plain:
                plain.sendall(b"\0" * 64)
                with suppress(ConnectionError):
                    assert plain.recv(1) == b""
