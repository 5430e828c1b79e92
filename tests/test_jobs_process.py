"""Jobs of a service that is killed, stopped, or out of disk: a real process, real signals."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import rasterio
import shapely
from rasterio.warp import transform_bounds

from tests.kits.forks import ran
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import (
    ASYNC,
    SERIES,
    Files,
    Service,
    check_full,
    check_healthy,
    leftovers,
    running,
    stack,
    submitted,
    until,
    waited,
)
from tests.kits.patience import PATIENCE, soon

pytestmark = pytest.mark.slow

KILLS = 3


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state directory of `serving`."""
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def serving(state: Path, zoo: Path) -> Iterator[Service]:
    with running(state, zoo) as service:
        yield service


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A stack that is read in eight windows."""
    return stack(tmp_path_factory.mktemp("large"), 160, 256)


def submitted_map(api: httpx.Client, files: Files, **data: str) -> str:
    return submitted(api, "/classify-pixels", files=files, data=data)


def windows_counted(state: Path) -> int:
    with closing(sqlite3.connect(state / "jobs.sqlite")) as db:
        return int(db.execute("SELECT count(*) FROM windows").fetchone()[0])


# kill -9 --------------------------------------------------------------------------------------


def test_a_job_survives_any_number_of_kills(zoo: Path, large: Files, tmp_path: Path) -> None:
    moments = random.Random(4)  # noqa: S311 - no secret
    how = {"model": HELD, "outputs": "class,probabilities"}
    gate = Gate(tmp_path / "gate")
    gate.hold()
    service = Service(tmp_path, zoo, gate=gate)
    job = submitted_map(service.api, large, **how)
    second = submitted_map(service.api, large, **how)
    seen, counted = [0], [0]
    try:
        for kill in range(KILLS):
            # The first kill follows the response at once; every second kill waits for progress.
            if kill % 2:
                assert soon(lambda: windows_counted(tmp_path) > counted[-1])
            time.sleep(moments.uniform(0, 0.5) if kill else 0)
            info = service.api.get(f"/jobs/{job}").json()
            assert info["status"] in {"accepted", "running"}
            seen.append(info["progress"])
            service.kill()
            counted.append(windows_counted(tmp_path))
            gate.hold(after=3)  # one more window of the eight is finished
            service = Service(tmp_path, zoo, gate=gate)
            seen.append(service.api.get(f"/jobs/{job}").json()["progress"])
        gate.open()
        assert waited(service.api, job)["status"] == "successful"
        # No kill happened while the second job ran.
        assert waited(service.api, second)["status"] == "successful"
        for output in ("class", "probabilities"):
            killed = service.api.get(f"/jobs/{job}/result/{output}").content
            undisturbed = service.api.get(f"/jobs/{second}/result/{output}").content
            assert killed == undisturbed
        accept = {"Accept": "application/json"}
        results = [
            service.api.get(f"/jobs/{name}/result", headers=accept).content
            for name in (job, second)
        ]
        assert results[0] == results[1]
        assert seen == sorted(seen)
        assert counted == sorted(counted)  # a finished window is never computed again
        assert counted[-1] > 0
        (line,) = service.lines("job ends")[:1]
        assert line["job_id"] == job
    finally:
        service.kill()


# SIGTERM --------------------------------------------------------------------------------------


def test_a_stopping_service_finishes_requests_and_resumes_jobs_later(
    zoo: Path, large: Files, tmp_path: Path
) -> None:
    responses: list[httpx.Response] = []
    gate = Gate(tmp_path / "gate")
    gate.hold(after=4)
    with running(tmp_path, zoo, gate=gate, PIMC_GRACE_SECONDS=str(PATIENCE)) as service:
        job = submitted_map(service.api, large, model=HELD)
        until(service.api, job, progress=1)

        def classify() -> None:
            responses.append(
                httpx.post(
                    f"{service.api.base_url}/classify-pixels",
                    files=large,
                    data={"model": HELD},
                    timeout=PATIENCE,
                )
            )

        caller = threading.Thread(target=classify)
        caller.start()
        assert soon(lambda: "pimc_runs_in_flight 2.0" in service.api.get("/metrics").text)
        service.process.send_signal(signal.SIGTERM)
        refused = service.api.post("/embed", json=SERIES)
        assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
        assert int(refused.headers["Retry-After"]) > 0
        assert service.api.get("/health/ready").status_code == 503
        assert service.api.get("/health/live").status_code == 200
        progress = service.api.get(f"/jobs/{job}").json()["progress"]
        gate.open()
        assert service.end() == 0
        caller.join()
        assert [response.status_code for response in responses] == [200]
        assert service.lines("job stops")[0]["stopping"] is True
    gate.hold()
    with running(tmp_path, zoo, gate=gate) as service:
        again = service.api.get(f"/jobs/{job}").json()
        assert again["status"] in {"accepted", "running"}
        assert again["progress"] >= progress > 0
        gate.open()
        assert waited(service.api, job)["status"] == "successful"
        assert service.api.get(f"/jobs/{job}/result").content == responses[0].content


def test_a_stopping_service_waits_for_the_grace_period_only(
    zoo: Path, large: Files, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    gate.hold()
    with running(tmp_path, zoo, gate=gate, PIMC_GRACE_SECONDS="1") as service:
        responses: list[httpx.Response] = []

        def classify() -> None:
            url = f"{service.api.base_url}/classify-pixels"
            responses.append(httpx.post(url, files=large, data={"model": HELD}, timeout=PATIENCE))

        caller = threading.Thread(target=classify)
        caller.start()
        assert soon(lambda: "pimc_runs_in_flight 1.0" in service.api.get("/metrics").text)
        service.process.send_signal(signal.SIGTERM)
        assert service.end() == 0
        caller.join()
        assert (responses[0].status_code, responses[0].json()["code"]) == (503, "not_ready")


# The state directory --------------------------------------------------------------------------


def start_error(state: Path, zoo: Path) -> str:
    """The error of a service that does not start: one line without a traceback."""
    settings = {"PIMC_PORT": "0", "PIMC_MODEL_DIR": str(zoo), "PIMC_STATE_DIR": str(state)}
    ended = ran("service", variables=settings)
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"PIMC_STATE_DIR: {state} ")
    return line


def test_a_second_service_with_the_same_state_does_not_start(
    serving: Service, state: Path, zoo: Path
) -> None:
    line = start_error(state, zoo)
    assert "in use by another service" in line
    assert str(serving.process.pid) in line
    assert serving.api.get("/health/ready").status_code == 200


# A full disk ----------------------------------------------------------------------------------


def test_a_limit_on_the_size_of_files_is_reported_as_full_disk(zoo: Path, tmp_path: Path) -> None:
    """Uploads fit into the limit, and results do not."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    files = stack(tmp_path, 256, 256)
    state = tmp_path / "state"
    with running(state, zoo, file_bytes=700_000, TMPDIR=str(temporary)) as service:
        api = service.api
        check_healthy(api)
        check_full(api.post("/embed", files=files))
        response = api.post("/embed", files=files, headers=ASYNC)
        job = response.json()["jobID"]
        info = waited(api, job)
        assert info["status"] == "failed"
        assert check_full(api.get(f"/jobs/{job}/result"))["detail"] == info["message"]
        assert "disk" in info["message"]
        # Uploads that exceed the limit.
        wide = stack(tmp_path, 300, 320)
        check_full(api.post("/embed", files=wide))
        check_full(api.post("/embed", files=wide, headers=ASYNC))
        check_healthy(api)
        assert leftovers(state) == []
        assert list(temporary.glob("pimc-*/request-*")) == []


# Results ---------------------------------------------------------------------------------------

ZIP = "application/zip"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return stack(tmp_path_factory.mktemp("small"), 40, 40)


def square(files: Files) -> str:
    """A field in the middle of a stack, as GeoJSON."""
    with rasterio.MemoryFile(files[0][1][1]) as memory, memory.open() as file:
        left, bottom, right, top = transform_bounds(file.crs, "EPSG:4326", *file.bounds)
    width, height = (right - left) / 4, (top - bottom) / 4
    box = shapely.box(left + width, bottom + height, right - width, top - height)
    geometry = shapely.geometry.mapping(box)
    field = {"type": "Feature", "id": "a", "properties": {}, "geometry": geometry}
    return json.dumps({"type": "FeatureCollection", "features": [field]})


@pytest.mark.parametrize(
    ("options", "accept"),
    [
        ({"outputs": "polygons"}, "application/geo+json"),
        ({"outputs": "polygons"}, "application/vnd.apache.parquet"),
        ({"outputs": "class,polygons,confidence", "min_area": "0.05", "smooth": "1"}, ZIP),
        ({"fields": "square"}, "application/geo+json"),
        ({"fields": "square"}, "application/vnd.apache.parquet"),
        ({"fields": "square"}, "text/csv"),
        ({"grid": "EPSG:3035@20"}, "image/tiff"),
    ],
)
def test_a_service_process_makes_every_kind_of_result(
    serving: Service, small: Files, options: dict[str, str], accept: str
) -> None:
    """The process keeps few of GDAL's drivers; services within the tests keep all of them."""
    data = {name: value if name != "fields" else square(small) for name, value in options.items()}
    response = serving.api.post(
        "/classify-pixels", files=small, data=data, headers={"Accept": accept}
    )
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"].partition(";")[0] == accept
