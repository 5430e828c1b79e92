"""File descriptors: some are kept for files, and a lack of them is named and waited for."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from service.api import http_protocol
from service.api.http_protocol import bounded_connections
from service.errors import no_descriptors, no_room
from service.read import reader
from tests.kits.patience import PATIENCE

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_a_lack_of_descriptors_is_not_a_full_disk(number: int) -> None:
    error = OSError(number, "x")
    assert no_room(error) is None
    found = no_descriptors(error)
    assert found is not None
    assert (found.code, "file descriptors" in found.detail) == ("overloaded", True)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), OSError(errno.ENOENT, "x")])
def test_other_errors_of_the_system_are_no_lack_of_descriptors(error: OSError) -> None:
    assert no_descriptors(error) is None


def test_an_error_of_a_library_is_a_lack_of_descriptors_only_where_there_is_one() -> None:
    assert no_descriptors(RuntimeError("unable to open database file")) is None
    assert no_descriptors(RuntimeError("0000.tif: Too many open files")) is not None


@pytest.mark.parametrize(
    ("soft", "hard", "connections"), [(1024, 1024, 576), (4096, 4096, 1024), (600, 600, 337)]
)
def test_descriptors_are_kept_for_five_runs_beside_all_connections(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, connections: int
) -> None:
    limits = {"setrlimit": lambda *_: None, "getrlimit": lambda _: (soft, hard)}
    for name, function in limits.items():
        monkeypatch.setattr(http_protocol.resource, name, function)
    fitting = bounded_connections(1024)
    assert fitting == connections
    assert fitting + 5 * reader._files_kept_open() + 64 <= soft


_CHILD = """
import json, logging, resource, sys, threading, time
from pathlib import Path
sys.path[:0] = [{root!r}]
from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.run.pixels import PixelStages
from tests.kits.jobs import stack

folder = Path({folder!r})
held, goes = threading.Event(), threading.Event()
read = PixelStages.read

def waits(stages, window):
    held.set()
    goes.wait()
    return read(stages, window)

PixelStages.read = waits
waiting = threading.Event()

class Listener(logging.Handler):
    def emit(self, record):
        if record.getMessage() == "job waits":
            said["reason"] = record.reason
            waiting.set()

said = {{}}
logging.getLogger("service").addHandler(Listener())
files = stack(folder)
with served(model_dir=write_zoo(folder / "zoo")) as api:
    job = api.post("/classify-pixels", files=files, headers={{"Prefer": "respond-async"}}).json()
    path = "/jobs/" + job["jobID"]
    held.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # what is open stays open
    goes.set()
    waiting.wait()
    said["while"] = api.get(path).json()["status"]
    said["live"] = api.get("/health/live").status_code
    refused = api.post("/classify-pixels", files=files)
    said["refused"] = [refused.status_code, refused.json()["code"], refused.json()["detail"]]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    while (status := api.get(path).json()["status"]) in ("accepted", "running"):
        time.sleep(0.02)
    said["after"] = status
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_job_waits_for_descriptors_and_a_request_is_told(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", _CHILD.format(root=str(ROOT), folder=str(tmp_path))],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    report = json.loads(child.stdout.splitlines()[-1])
    assert "no free file descriptors" in report["reason"]
    assert report["while"] in {"accepted", "running"}
    assert report["live"] == 200
    assert report["refused"][:2] == [503, "overloaded"]
    assert "no free file descriptors" in report["refused"][2]
    assert report["after"] == "successful"
