"""No key, path or stack trace in a response, and no key in the log, whatever goes wrong.

A service as a process, with marks in its keys and in the names of its folders; every kind of
error is caused, some by removing its folders; then its responses and its log are searched.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.tiny_zoo import write_zoo
from tests.kits import rasters
from tests.kits.patience import PATIENCE, soon
from tests.kits.process import RUNNING

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
KEY = "key-marked-5f2e9c41"
WRONG = "wrong-marked-5f2e9c41"
HERE = "whereabouts-5f2e9c41"
BANDS = ("B02", "B04", "B08")

Ask = Callable[..., httpx.Response]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = tmp_path / HERE
    for name in ("temporary", "state", "models", "root", "files"):
        (base / name).mkdir(parents=True)
    write_zoo(base / "models")
    (base / "models" / "embed-patch" / "model.onnx").write_bytes(b"tampered with")
    return base


def files(base: Path, name: str = "scene_2021-{}-01.tif", **how: Any) -> list[tuple[str, Any]]:
    made = []
    for month in ("03", "05", "07"):
        bands = np.full((3, 6, 7), 2000, np.uint16)
        source = rasters.write(base / "files" / "x.tif", bands, descriptions=BANDS, **how)
        made.append(("files", (name.format(month), source.path.read_bytes())))
    return made


def everything_wrong(ask: Ask, base: Path) -> dict[str, httpx.Response]:
    """A response of each kind, by request."""
    sound = files(base)

    def post(**how: Any) -> httpx.Response:
        return ask("POST", "/classify-pixels", **how)

    responses: dict[str, httpx.Response] = {
        "wrong bearer": ask("GET", "/models", headers={"Authorization": f"Bearer {WRONG}"}),
        "wrong key": ask("GET", "/models", headers={"X-API-Key": WRONG}),
        "basic": ask("GET", "/models", headers={"Authorization": f"Basic {WRONG}"}),
        "key in the query": post(files=sound, params={"api_key": KEY}),
        "unknown model": ask("GET", "/models/none"),
        "unknown job": ask("GET", "/jobs/00000000000000000000000000000000"),
        "unknown path": ask("GET", "/none"),
        "method": ask("DELETE", "/models"),
        "media": post(content=b"x", headers={"Content-Type": "text/plain"}),
        "accept": post(files=sound, headers={"Accept": "image/png"}),
        "broken JSON": post(content=b"{", headers={"Content-Type": "application/json"}),
        "field": post(files=sound, data={"horizon": "3"}),
        "no tiff": post(files=[("files", ("a.tif", b"GIF89a"))]),
        "torn tiff": post(files=[("files", ("a.tif", sound[0][1][1][:200]))]),
        "torn pixels": post(files=[(n, (f, c[:-100])) for n, (f, c) in sound]),
        "no bands": post(files=sound, data={"bands": "B02,B03,B11"}),
        "no date": post(files=files(base, "scene{}.tif")),
        "path for a name": post(files=files(base, "../../up/scene_2021-{}-01.tif")),
        "no place": post(files=files(base, crs=None)),
        "refused bundle": ask("POST", "/embed", files=sound, data={"modality": "patch"}),
        "reference outside": post(json={"items": [{"href": "/etc/passwd"}]}),
        "reference missing": post(json={"items": [{"href": f"{base}/root/none.tif"}]}),
        "reference to a host": post(
            json={"items": [{"href": f"http://u:{KEY}@127.0.0.1:9/a.tif?signature={KEY}"}]}
        ),
        "reference that fails": post(
            json={"items": [{"href": f"http://127.0.0.1:9/a.tif?signature={KEY}"}]}
        ),
        "provider": post(files=sound, data={"model": "pixels-brittle"}),
        "ready": ask("GET", "/health/ready"),
        "metrics": ask("GET", "/metrics"),
        "all well": post(files=sound, headers={"Accept": "application/json"}),
    }
    shutil.rmtree(base / "models")  # loaded already: nothing changes
    responses["bundles gone"] = post(files=sound, headers={"Accept": "application/json"})
    # The service may still remove files after a response, while rmtree runs.
    while (base / "temporary").exists():
        shutil.rmtree(base / "temporary", ignore_errors=True)
    responses["nowhere to put an upload"] = post(files=sound)
    shutil.rmtree(base / "state")
    responses["nowhere to put a job"] = post(files=sound, headers={"Prefer": "respond-async"})
    return responses


EXPECTED = {
    "wrong bearer": 401,
    "unknown path": 404,
    "torn tiff": 422,
    "reference outside": 403,
    "reference missing": 403,
    "reference that fails": 422,
    "provider": 500,
    "all well": 200,
    "bundles gone": 200,
    "nowhere to put an upload": 500,
}


def test_no_response_discloses_internals(base: Path) -> None:
    log = base / "log"
    settings = {
        "PIMC_PORT": "0",
        "PIMC_PROVIDERS": "cpu",
        "PIMC_API_KEYS": KEY,
        "PIMC_MODEL_DIR": str(base / "models"),
        "PIMC_STATE_DIR": str(base / "state"),
        "PIMC_ALLOWED_ROOTS": str(base / "root"),
        "PIMC_ALLOWED_HOSTS": "127.0.0.1",
        "PIMC_LOG_LEVEL": "debug",
        "TMPDIR": str(base / "temporary"),
    }
    with log.open("w") as to:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"], cwd=ROOT, env={**os.environ, **settings}, stderr=to
        )
    try:
        assert soon(lambda: process.poll() is not None or RUNNING.search(log.read_text()))
        found = RUNNING.search(log.read_text())
        assert found, log.read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=PATIENCE) as client:

            def ask(method: str, path: str, **how: Any) -> httpx.Response:
                how["headers"] = {"Authorization": f"Bearer {KEY}", **how.get("headers", {})}
                return client.request(method, path, **how)

            responses = everything_wrong(ask, base)
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)

    assert {name: responses[name].status_code for name in EXPECTED} == EXPECTED
    for name, response in responses.items():
        text = f"{response.headers}{response.text}"
        for secret in (KEY, WRONG, HERE, "Traceback", 'File "', "site-packages", "onnxruntime"):
            assert secret not in text, (name, response.text)
        assert "server" not in response.headers
    lines = log.read_text().splitlines()
    assert len(lines) > len(responses)
    for line in lines:
        entry = json.loads(line)  # every line, that of a library's too
        assert KEY not in line
        assert WRONG not in line
        del entry["time"]
        entry.pop("stack", None)  # of a fault within: an operator needs it, and the log is theirs
        assert HERE not in json.dumps(entry), line
        assert "Traceback" not in json.dumps(entry), line
