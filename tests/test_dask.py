"""Jobs on a Dask cluster of separate processes, and its faults."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest
from distributed import Client

import service.errors
from benchmarks.serving import served
from benchmarks.tiny_zoo import write_bundle
from models.registry import Registry
from service.api.schemas.validation import read_parameters
from service.errors import ForbiddenReference, PIMCError, UnreachableReference
from service.grid import Window
from service.infer.engine import Engine, load_models
from service.jobs.s3 import storage_for
from service.jobs.shared import SharedJobFiles
from service.jobs.storage import FolderStorage
from service.read.geotiff import SourceFile
from service.run import worker as tasks
from service.run.collect import spread
from service.run.pixels import PixelPass
from service.run.plan import RasterRun, plan_request
from service.run.worker import Computed, ModelReference, PassFile, Refused, Workplace, packed
from service.settings import SettingsError, project_version, read_settings
from tests.kits.client import Reply, serving
from tests.kits.cluster import Fleet, joined, outcome, ready
from tests.kits.gate import HELD, zoo_with_a_held_model
from tests.kits.jobs import FIELD, Files, finished, stack, submitted
from tests.kits.metrics import metric
from tests.kits.patience import files_below, soon
from tests.kits.spans import PROTOBUF, Spans, attributes

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
WINDOWS = 10
"""Windows of a job with the files of `files`."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The held model has a second file, as which it is loaded where a processor multiplies int8."""
    made = zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))
    card = json.loads((made / HELD / "card.json").read_text())
    model = onnx.load(made / HELD / "model.onnx")
    model.doc_string = "int8"
    onnx.save(model, made / HELD / "int8.onnx")
    content = (made / HELD / "int8.onnx").read_bytes()
    card["variants"].append(
        card["variants"][0]
        | {"name": "int8", "file": "int8.onnx", "bytes": len(content)}
        | {"sha256": hashlib.sha256(content).hexdigest(), "loss": {"accuracy": 0.0}}
    )
    (made / HELD / "card.json").write_text(json.dumps(card))
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return stack(tmp_path_factory.mktemp("stack"), 150, 230)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A stack of four windows."""
    return stack(tmp_path_factory.mktemp("small"), 90, 130)


@pytest.fixture(scope="module")
def local(zoo: Path) -> Iterator[httpx.Client]:
    with served(model_dir=zoo) as api:
        yield api


@pytest.fixture(scope="module")
def expected(local: httpx.Client, files: Files) -> bytes:
    """The result of the held model in one process."""
    return finished(local, submitted(local, "/classify-pixels", files=files, data={"model": HELD}))


@pytest.fixture
def fleet(tmp_path: Path, zoo: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(tmp_path, zoo, stack)


def held_job(api: httpx.Client, files: Files) -> str:
    return submitted(api, "/classify-pixels", files=files, data={"model": HELD})


# The result -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_jobs_on_a_cluster_have_the_bytes_of_one_process(
    fleet: Fleet, local: httpx.Client, small: Files
) -> None:
    fields = ("fields", ("fields.geojson", FIELD, "application/geo+json"))
    cases: list[tuple[str, Files, dict[str, str]]] = [
        ("/classify-pixels", small, {"outputs": "class,confidence,attribution"}),
        ("/classify-pixels", small, {"smooth": "2"}),
        ("/classify-pixels", [*small, fields], {}),
        ("/forecast", [*small, fields], {}),
        ("/landcover", small, {"stride": "16"}),
        ("/embed", small, {"modality": "patch", "stride": "32"}),
    ]
    workers = [fleet.cluster.join() for _ in range(2)]
    with served(**fleet.settings) as api:
        joined(api, 2)
        for path, sent, data in cases:
            found = [
                finished(one, submitted(one, path, files=sent, data=data)) for one in (api, local)
            ]
            assert found[0] == found[1], (path, data)
        assert all(fleet.begun(worker) for worker in workers)
        assert not files_below(fleet.state, "*.pass")
        # Synchronous requests are computed in the service.
        before = fleet.begun()
        response = api.post("/classify-pixels", files=small)
        assert response.status_code == 200
        assert fleet.begun() == before


# Faults ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_only_its_own_window(
    fleet: Fleet, files: Files, expected: bytes
) -> None:
    first, second = fleet.cluster.join(held_after=0), fleet.cluster.join(held_after=0)
    with served(**fleet.settings) as api:
        joined(api, 2)
        job = held_job(api, files)
        assert soon(lambda: bool(first.windows and second.windows))
        # Windows in flight are bounded: three for each thread.
        assert soon(lambda: metric(api, "pimc_windows_in_flight") == 6)
        first.process.kill()
        second.gate.open()
        assert finished(api, job) == expected
        assert outcome(api, "written") == WINDOWS
        assert len(first.windows) == 1
        # A slow machine may lose the connection, which costs the windows in flight.
        assert fleet.begun(second).total() <= WINDOWS + outcome(api, "lost")
        joined(api, 1)


@pytest.mark.slow
def test_after_the_scheduler_has_restarted_only_windows_that_were_not_kept_are_computed(
    fleet: Fleet, files: Files, expected: bytes
) -> None:
    worker = fleet.cluster.join(held_after=4)
    with served(**fleet.settings) as api:
        joined(api, 1)
        job = held_job(api, files)
        assert soon(lambda: outcome(api, "written") == 4)
        kept = set(worker.windows[:4])
        fleet.cluster.kill_scheduler()
        assert soon(lambda: "no connection" in (ready(api)["fault"] or ""))
        worker.process.kill()  # one that loses its scheduler ends when its window ends
        fleet.cluster.start_scheduler()
        other = fleet.cluster.join()
        assert finished(api, job) == expected
        assert outcome(api, "written") == WINDOWS
        assert len(set(other.windows)) == WINDOWS - 4
        assert not kept & set(other.windows)


@pytest.mark.slow
def test_windows_of_a_worker_that_hangs_are_given_to_another(
    tmp_path: Path, zoo: Path, files: Files, expected: bytes
) -> None:
    with ExitStack() as stack:
        fleet = Fleet(tmp_path, zoo, stack, dask_window_seconds=2)
        hanging, other = fleet.cluster.join(held_after=0), fleet.cluster.join()
        api = stack.enter_context(served(**fleet.settings))
        joined(api, 2)
        job = held_job(api, files)
        assert soon(lambda: bool(hanging.windows))
        hanging.stop()
        assert finished(api, job) == expected
        assert outcome(api, "late") >= 1
        assert outcome(api, "written") == WINDOWS  # each result is taken once
        assert set(hanging.windows) <= set(other.windows)


@pytest.mark.slow
def test_a_job_waits_for_a_scheduler_and_for_workers_like_the_service(
    fleet: Fleet,
    tmp_path: Path,
    zoo: Path,
    files: Files,
    expected: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    fleet.cluster.variables["PIMC_PRECISION"] = "float32"
    fleet.cluster.kill_scheduler()
    with served(**fleet.settings, precision="float32") as api:
        assert "no connection" in ready(api)["fault"]
        job = held_job(api, files)
        assert api.post("/classify-pixels", files=files).status_code == 200
        fleet.cluster.start_scheduler()
        assert soon(lambda: "no worker has joined" in (ready(api)["fault"] or ""))
        waiting = [r for r in caplog.records if r.message == "job waits for workers"]
        assert waiting
        assert metric(api, "pimc_cluster_workers") == 0
        others = tmp_path / "other-models"
        write_bundle(others, HELD, "classify-pixels", "pixel", version="0.0.2", default=False)
        model = fleet.cluster.join(PIMC_MODEL_DIR=str(others))
        version = fleet.cluster.join(version="9.9.9")
        precision = fleet.cluster.join(int8=True, PIMC_PRECISION="auto")
        assert soon(lambda: len(ready(api)["refused"]) == 3)
        assert metric(api, "pimc_cluster_workers_refused") == 3
        refused = ready(api)["refused"]
        of_model = refused[model.process.address()]
        assert f"{HELD}@0.0.2 with sha256" in of_model
        assert f"the service has {HELD}@0.0.1 with sha256" in of_model
        of_version = refused[version.process.address()]
        assert "has version 9.9.9 of this project" in of_version
        assert project_version() in of_version
        of_precision = refused[precision.process.address()]
        for variant, file in (("int8", "int8.onnx"), ("float32", "model.onnx")):
            sha256 = hashlib.sha256((zoo / HELD / file).read_bytes()).hexdigest()
            assert f"as {variant} with sha256 {sha256}" in of_precision
        assert "PIMC_PRECISION" in of_precision
        for address, reason in refused.items():
            assert f"worker {address} " in reason
            assert reason in ready(api)["fault"]
        assert api.get(f"/jobs/{job}").json()["status"] == "running"
        good = fleet.cluster.join()
        assert finished(api, job) == expected
        assert len(set(good.windows)) == WINDOWS
        assert not model.windows
        assert not version.windows
        assert not precision.windows
        assert ready(api)["fault"] is None


@pytest.mark.slow
def test_a_dismissed_job_leaves_nothing_with_the_scheduler(fleet: Fleet, files: Files) -> None:
    worker = fleet.cluster.join(held_after=0)
    with served(**fleet.settings) as api:
        joined(api, 1)
        job = held_job(api, files)
        assert soon(lambda: bool(worker.windows))
        with Client(fleet.cluster.address, set_as_default=False) as client:

            def tasks() -> int:
                count = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
                return int(count)

            assert soon(lambda: tasks() == 3)
            assert api.delete(f"/jobs/{job}").status_code == 200
            assert soon(lambda: tasks() == 0)
        worker.gate.open()
        assert soon(lambda: metric(api, "pimc_windows_in_flight") == 0)
        assert not files_below(fleet.state, "*.pass")


@pytest.mark.slow
def test_a_job_that_resumes_skips_the_windows_that_were_kept(
    fleet: Fleet, files: Files, expected: bytes
) -> None:
    worker = fleet.cluster.join(held_after=3)
    with served(**fleet.settings) as api:
        joined(api, 1)
        job = held_job(api, files)
        assert soon(lambda: outcome(api, "written") == 3)
    kept = set(worker.windows[:3])
    worker.gate.open()
    with served(**fleet.settings) as api:
        assert finished(api, job) == expected
        assert outcome(api, "written") == WINDOWS - 3
    times = fleet.begun()
    assert {times[window] for window in kept} == {1}


# A worker by itself ---------------------------------------------------------------------------


@pytest.fixture
def run(zoo: Path, tmp_path: Path) -> Iterator[RasterRun]:
    """A run on a file outside the state directory."""
    folder = tmp_path / "stack"
    folder.mkdir()
    stack(folder, 20, 30)
    paths = sorted(folder.iterdir())
    files = tuple(SourceFile(name=path.name, path=path) for path in paths)
    request = read_parameters("classify-pixels", {"model": (HELD,)}).request(
        "classify-pixels", files
    )
    with Engine(Registry.load(zoo), providers="cpu") as engine:
        plan = plan_request(request, engine, max_raster_bytes=2**30, rasters=True)
        assert isinstance(plan.run, RasterRun)
        yield plan.run


class Case:
    """A worker in this process, and a pass that it can compute."""

    def __init__(self, run: RasterRun, zoo: Path, folder: Path) -> None:
        self.zoo = zoo
        self.state = folder / "state"
        (self.state / "jobs").mkdir(parents=True)
        files = SharedJobFiles(state=self.state, storage=FolderStorage(self.state))
        self._pass = files.new_pass(self.state / "jobs")
        self._content = packed(PixelPass(run=run, to_arrays=spread), self._pass.key)
        self._window = Window(0, 0, run.stack.grid.width, run.stack.grid.height)

    def compute(
        self, *, place: Workplace | None = None, trace: str | None = None, **changed: Any
    ) -> Computed:
        """Compute the window, with other values of the `PassFile` than those of the service."""
        given: dict[str, Any] = {
            "key": self._pass.store(self._content),
            "sha256": hashlib.sha256(self._content).hexdigest(),
            "storage": str(self.state),
            "opener": storage_for,
            "version": project_version(),
        }
        place = place or Workplace("tcp://here:1", 1)
        return place.compute(PassFile(**{**given, **changed}), self._window, trace)


@pytest.fixture
def case(run: RasterRun, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    made = Case(run, zoo, tmp_path)
    monkeypatch.setattr(tasks, "load_models", partial(load_models, built_in=None))
    monkeypatch.setenv("PIMC_STATE_DIR", str(made.state))
    monkeypatch.setenv("PIMC_MODEL_DIR", str(zoo))
    monkeypatch.setenv("PIMC_PROVIDERS", "cpu")
    monkeypatch.setenv("PIMC_ALLOWED_ROOTS", str(tmp_path / "stack"))
    return made


def test_a_worker_computes_what_the_service_would(case: Case, run: RasterRun) -> None:
    computed = case.compute()
    assert computed.worker == "tcp://here:1"
    assert computed.arrays["values"].shape == (3, 20, 30)


def test_a_window_is_in_the_trace_of_its_job(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda _: Reply(body=b"", headers=PROTOBUF)) as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("PIMC_TRACING", "1")
        place = Workplace("tcp://here:1", 1)
        case.compute(place=place)
        place.flush()
        assert not received
        case.compute(place=place, trace=f"00-{TRACE}-{PARENT}-01")
        place.flush()
        spans = Spans(received)
    window = spans.one("window")
    assert (window.trace_id.hex(), window.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(window)["pimc.worker"] == "tcp://here:1"
    for name in ("read", "infer"):
        assert spans.one(name, window).trace_id == window.trace_id


def test_a_worker_refuses_what_it_does_not_have_as_the_service_has_it(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match=r"tcp://here:1 has version .* the service has 7\.0"):
        case.compute(version="7.0")
    with pytest.raises(Refused, match=r"files of jobs in .*, and the service in /elsewhere: .*DIR"):
        case.compute(storage="/elsewhere")
    with pytest.raises(Refused, match=r"cannot read jobs/a\.pass in .*state \(No such file"):
        case.compute(key="jobs/a.pass")
    with pytest.raises(Refused, match="other bytes"):
        case.compute(sha256="0" * 64)
    monkeypatch.setenv("PIMC_PRECISION", "anything")
    with pytest.raises(Refused, match="cannot load its models: PIMC_PRECISION"):
        case.compute()


def test_a_worker_reads_only_files_that_its_own_settings_allow(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIMC_ALLOWED_ROOTS", "")
    with pytest.raises(Refused, match=r"under its allowed roots \(none\)") as caught:
        case.compute()
    # If no worker finds the file, this is the error of the job.
    assert isinstance(caught.value.error, ForbiddenReference)


def test_a_worker_refuses_another_bundle_of_the_same_name(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    # Of the same version, with other weights.
    write_bundle(other, HELD, "classify-pixels", "pixel", brittle=True, default=False)
    monkeypatch.setenv("PIMC_MODEL_DIR", str(other))
    own, ours = (
        load.card.sha256
        for load in (Registry.load(other).bundles[HELD], Registry.load(case.zoo).bundles[HELD])
    )
    with pytest.raises(Refused) as caught:
        case.compute()
    assert own in caught.value.detail
    assert ours in caught.value.detail
    monkeypatch.setenv("PIMC_MODEL_DIR", "")
    with pytest.raises(Refused, match=f"does not have model {HELD}@0.0.1"):
        case.compute()


def test_a_model_in_another_precision_is_another_model(run: RasterRun) -> None:
    reference = ModelReference.of(run.model)
    assert reference.same(ModelReference.of(run.model))
    # A CPU with int8 instructions has loaded int8.
    for change in (
        {"variant": "float32" if reference.variant == "int8" else "int8"},
        {"variant_sha256": "0" * 64},
        {"provider": "CUDAExecutionProvider"},
    ):
        assert not reference.same(ModelReference(**{**vars(reference), **change}))


def copied(error: Any) -> Any:
    return pickle.loads(pickle.dumps(error))  # noqa: S301 - ours


def test_errors_of_workers_reach_the_service_unchanged() -> None:
    kinds = [
        kind
        for kind in vars(service.errors).values()
        if isinstance(kind, type) and issubclass(kind, PIMCError)
    ]
    assert len(kinds) > 20
    for kind in kinds:
        error = kind("a detail")
        copy = copied(error)
        assert type(copy) is kind
        assert vars(copy) == vars(error)
    assert copied(UnreachableReference("away", later=True)).later
    refused = copied(Refused("why", "tcp://a:1", ForbiddenReference("no")))
    assert (refused.detail, refused.worker) == ("why", "tcp://a:1")
    assert refused.error.detail == "no"


# Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["scheduler:8786", "http://scheduler:8786", "tcp://scheduler"])
def test_the_scheduler_is_an_address_of_dask(address: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"PIMC_DASK_SCHEDULER: .* such as tcp://"):
        read_settings(state_dir=tmp_path, dask_scheduler=address)


def test_a_cluster_needs_a_folder_or_a_bucket_in_common() -> None:
    with pytest.raises(SettingsError, match="PIMC_STATE_DIR must name the folder"):
        read_settings(state_dir=None, dask_scheduler="tcp://scheduler:8786")
    shared = read_settings(
        state_dir=None,
        storage_url="s3://bucket",
        database_url="postgresql:///pimc",
        dask_scheduler="tcp://scheduler:8786",
    )
    assert not shared.workers_fetch  # by default the service does
