"""Kit of the tests of jobs: stacks, waiting for states, and a service as a process."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psycopg

from models.registry import Registry
from service.api.schemas.validation import read_series
from service.infer.engine import Engine
from service.jobs.s3 import storage_of
from service.jobs.store import JobStore
from service.run.plan import Plan, plan_request
from tests.kits.forks import Forked
from tests.kits.gate import Gate
from tests.kits.marks import in_all_tests
from tests.kits.patience import PATIENCE, files_below, soon
from tests.kits.process import Process
from tests.kits.rasters import write

ASYNC = {"Prefer": "respond-async"}
BANDS = ("B02", "B03", "B04", "B08")
SERIES = {
    "series": [
        {
            "id": "a",
            "dates": ["2021-01-05", "2021-03-05"],
            "B02": [0.05, 0.05],
            "B04": [0.07, 0.06],
            "B08": [0.31, 0.33],
        }
    ]
}
ENDED = {"successful", "failed", "dismissed"}
BACKENDS = ("sqlite", *in_all_tests("postgresql"))
"""Databases of jobs, as parameters; PostgreSQL is a program that `make check` does not need."""

Files = list[tuple[str, Any]]


@contextmanager
def series_plan(zoo: Path) -> Iterator[Plan]:
    """The plan of a small request: the embedding of `SERIES`."""
    with Engine(Registry.load(zoo), providers="cpu") as engine:
        request = read_series("embed", json.dumps(SERIES).encode()).request("embed")
        yield plan_request(request, engine, max_raster_bytes=1, rasters=True)


FIELD = (
    b'{"type":"Polygon","coordinates":[[[3.001,50.551],[3.010,50.551],[3.010,50.545],'
    b"[3.001,50.551]]]}"
)
"""A polygon within the rasters of `stack`, as GeoJSON."""


def stack(folder: Path, height: int = 70, width: int = 90, dates: int = 4, **how: Any) -> Files:
    """A stack with one file per date, as files of a form; noise, so that all pixels differ."""
    random = np.random.default_rng(height * width + dates)
    files: Files = []
    for month in range(1, dates + 1):
        name = f"scene_2021-{month:02d}-01.tif"
        pixels = random.integers(300, 4000, (len(BANDS), height, width)).astype(np.uint16)
        path = write(folder / name, pixels, descriptions=BANDS, nodata=0, **how).path
        files.append(("files", (name, path.read_bytes(), "image/tiff")))
    return files


def submitted(api: httpx.Client, path: str = "/embed", **how: Any) -> str:
    """The id of a job that a request has become; `how` is as for httpx."""
    headers = {**ASYNC, **how.pop("headers", {})}
    response = api.post(path, headers=headers, **how)
    assert response.status_code == 202, response.text
    return str(response.json()["jobID"])


def result(api: httpx.Client, job_id: str) -> bytes:
    """The result of a finished job."""
    response = api.get(f"/jobs/{job_id}/result")
    assert response.status_code == 200, response.text
    return response.content


def taught(name: str, other: str = "Maize") -> dict[str, Any]:
    """A request for a model of two classes."""
    random = np.random.default_rng(5)
    dates = [f"2021-{month:02d}-05" for month in range(1, 13)]
    series = []
    for number in range(40):
        level = 0.2 if number % 2 else 0.45
        nir = (level + random.normal(0, 0.01, len(dates))).round(4).tolist()
        series.append(
            {
                "dates": dates,
                "B02": [0.05] * len(dates),
                "B04": [0.07] * len(dates),
                "B08": nir,
                "class": other if number % 2 else "Wheat",
                "place": f"farm-{number // 4}",
            }
        )
    return {"name": name, "series": series}


def status(api: httpx.Client, job_id: str) -> dict[str, Any]:
    """The status document of a job."""
    return dict(api.get(f"/jobs/{job_id}").json())


def waited(api: httpx.Client, job_id: str) -> dict[str, Any]:
    """Wait for the end of a job, and return its status document."""
    assert soon(lambda: status(api, job_id)["status"] in ENDED), status(api, job_id)
    return status(api, job_id)


def finished(api: httpx.Client, job_id: str) -> bytes:
    """Wait for the success of a job, and return its result."""
    info = waited(api, job_id)
    assert info["status"] == "successful", info
    return result(api, job_id)


def until(api: httpx.Client, job_id: str, *, progress: int) -> dict[str, Any]:
    """Wait until a running job has a progress, and return its status document."""
    end = time.monotonic() + PATIENCE
    while (info := api.get(f"/jobs/{job_id}").json())["progress"] < progress:
        assert info["status"] not in ENDED, info
        assert time.monotonic() < end, info
        time.sleep(0.01)
    return info


def leftovers(state: Path) -> list[str]:
    """Files of a state directory that belong neither to the service nor to a job with a result."""
    return [
        str(path.relative_to(state))
        for folder in ("requests", "jobs")
        for path in files_below(state / folder, "*")
        if not any(part.startswith("result-") for part in path.parts)
        and not (path.name == "request.json" and list(path.parent.glob("result-*")))
    ]


def change(state: Path, statement: str, *values: object) -> None:
    """Change the stored jobs as another clock would have written them."""
    with closing(sqlite3.connect(state / "jobs.sqlite", timeout=PATIENCE)) as db, db:
        db.execute(statement, values)


@dataclass(frozen=True)
class Backend:
    """A state directory, the database of its jobs, and the storage of their files."""

    state: Path
    url: str | None
    """Of PostgreSQL; None is SQLite in the directory."""
    storage: str | None = None
    """`s3://…`; None is the directory. With it, each replica has a directory of its own."""
    endpoint: str | None = None
    """Of the S3 server."""

    def own_state(self) -> Path:
        """The state directory of one more replica."""
        if self.storage is None:
            return self.state
        self.state.mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.state))

    @contextmanager
    def opened(self, **how: Any) -> Iterator[JobStore]:
        """A job store; with PostgreSQL there may be several at once."""
        state = self.own_state()
        made = {
            "ttl": 7 * 24 * 3600.0,
            "max_waiting": 9,
            "database_url": self.url,
            "storage": storage_of(state, self.storage, self.endpoint),
            **how,
        }
        with closing(JobStore(state, **made)) as store:
            yield store

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of one more service for it."""
        return {
            "state_dir": self.own_state(),
            "database_url": self.url,
            "storage_url": self.storage,
            "storage_endpoint": self.endpoint,
        }

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a process for it, without the state directory."""
        return {
            "PIMC_DATABASE_URL": self.url or "",
            "PIMC_STORAGE_URL": self.storage or "",
            "PIMC_STORAGE_ENDPOINT": self.endpoint or "",
        }

    def rows(self, statement: str, *values: object) -> list[Any]:
        """Execute a statement beside the service; `?` is a value."""
        if self.url is None:
            with (
                closing(sqlite3.connect(self.state / "jobs.sqlite", timeout=PATIENCE)) as lite,
                lite,
            ):
                return lite.execute(statement, values).fetchall()
        with psycopg.connect(self.url) as db:
            done = db.execute(statement.replace("?", "%s"), values)  # type: ignore[arg-type]
            return done.fetchall() if done.description else []


def swept(state: Path, times: int = 1) -> None:
    """Wait until the service has looked for expired jobs `times` times."""
    for _ in range(times):
        change(state, "UPDATE clock SET seen = -1")
        assert soon(lambda: _last_sweep(state) != -1)


def _last_sweep(state: Path) -> float:
    with closing(sqlite3.connect(state / "jobs.sqlite", timeout=PATIENCE)) as db:
        return float(db.execute("SELECT seen FROM clock").fetchone()[0])


def check_healthy(api: httpx.Client) -> None:
    """Check that small requests are still processed, synchronously and as jobs."""
    assert api.get("/health/ready").status_code == 200
    assert api.post("/embed", json=SERIES).status_code == 200
    response = api.post("/embed", json=SERIES, headers=ASYNC)
    assert waited(api, response.json()["jobID"])["status"] == "successful"


def check_full(response: httpx.Response) -> dict[str, Any]:
    assert (response.status_code, response.json()["code"]) == (507, "insufficient_storage"), (
        response.text
    )
    assert response.headers["content-type"] == "application/problem+json"
    return dict(response.json())


class Service(Process):
    """`python -m service` as a process that can be killed; a gate can hold its runs."""

    def __init__(
        self,
        state: Path,
        zoo: Path,
        *,
        gate: Gate | None = None,
        file_bytes: int = 0,
        **variables: str,
    ) -> None:
        module = ["tests.kits.gate", str(gate.file)] if gate else ["service"]
        process = Forked(
            *module,
            variables={
                "PIMC_PORT": "0",
                "PIMC_PROVIDERS": "cpu",
                "PIMC_MODEL_DIR": str(zoo),
                "PIMC_STATE_DIR": str(state),
                **variables,
            },
            file_bytes=file_bytes,
        )
        super().__init__(process, r"running on (http://127\.0\.0\.1:\d+)")
        self.api = httpx.Client(base_url=self.address(), timeout=PATIENCE)

    def end(self) -> int:
        """Wait for the end of the process and read the rest of its log; returns its exit code."""
        code = super().end()
        self.api.close()
        return code

    def lines(self, message: str) -> list[dict[str, Any]]:
        """The log records with a message."""
        lines = [json.loads(text) for text in self.log]
        return [line for line in lines if line["message"] == message]


@contextmanager
def running(
    state: Path, zoo: Path, *, gate: Gate | None = None, file_bytes: int = 0, **variables: str
) -> Iterator[Service]:
    """A service as a process, which is killed at the end of the context.

    Args:
        state: its state directory.
        zoo: folder of bundles in addition to the built-in ones.
        gate: gate at which runs of the held model wait; None for none.
        file_bytes: largest size of a file, above which the disk seems full; 0 for no limit.
        variables: further environment variables.
    """
    service = Service(state, zoo, gate=gate, file_bytes=file_bytes, **variables)
    try:
        yield service
    finally:
        service.kill()
