"""What the tests of jobs share: a slow bundle, stacks, waiting, and a service as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rasters import write
from tiny_zoo import write_bundle, write_zoo

ROOT = Path(__file__).parents[1]
SLOW = "pixels-slow"
ASYNC = {"Prefer": "respond-async"}
BANDS = ("B02", "B03", "B04", "B08")
ENDED = {"successful", "failed", "dismissed"}

Files = list[tuple[str, Any]]


def zoo_with_a_slow_one(root: Path) -> Path:
    """The tiny zoo, and `pixels-slow`, which works at some thousand pixels a second."""
    write_zoo(root)
    write_bundle(root, SLOW, "classify-pixels", "pixel", slow=True, default=False)
    return root


def stack(folder: Path, height: int = 70, width: int = 90, dates: int = 4, **how: Any) -> Files:
    """A stack with a file a date, as a form's files; noise, so that no two pixels are alike."""
    random = np.random.default_rng(height * width + dates)
    files: Files = []
    for month in range(1, dates + 1):
        name = f"scene_2021-{month:02d}-01.tif"
        pixels = random.integers(300, 4000, (len(BANDS), height, width)).astype(np.uint16)
        path = write(folder / name, pixels, descriptions=BANDS, nodata=0, **how).path
        files.append(("files", (name, path.read_bytes(), "image/tiff")))
    return files


def waited(api: httpx.Client, job_id: str, *, seconds: float = 60) -> dict[str, Any]:
    """A job's status document once it has ended."""
    end = time.monotonic() + seconds
    while (info := api.get(f"/jobs/{job_id}").json())["status"] not in ENDED:
        assert time.monotonic() < end, info
        time.sleep(0.02)
    return info


def until(api: httpx.Client, job_id: str, *, progress: int) -> dict[str, Any]:
    """A running job's status document once it has come so far."""
    end = time.monotonic() + 60
    while (info := api.get(f"/jobs/{job_id}").json())["progress"] < progress:
        assert info["status"] not in ENDED, info
        assert time.monotonic() < end, info
        time.sleep(0.01)
    return info


class Service:
    """`python -m service`, as a process that may be killed."""

    def __init__(self, state: Path, zoo: Path, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            cwd=ROOT,
            env={
                **os.environ,
                "PIMC_PORT": "0",
                "PIMC_PROVIDERS": "cpu",
                "PIMC_MODEL_DIR": str(zoo),
                "PIMC_STATE_DIR": str(state),
                **variables,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self.api = httpx.Client(base_url=self._address(), timeout=60)

    def _address(self) -> str:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            self.lines.append(json.loads(text))
            running = re.search(r"running on (http://127\.0\.0\.1:\d+)", self.lines[-1]["message"])
            if running:
                return running[1]
        raise RuntimeError(f"it ended with {self.process.wait()}: {self.lines}")

    def kill(self) -> None:
        """As the power would."""
        self.process.kill()
        self.end()

    def stop(self) -> None:
        """As an orchestrator does."""
        self.process.send_signal(signal.SIGTERM)
        self.end()

    def end(self) -> None:
        """Wait for its end, and hear the rest of its log."""
        _, rest = self.process.communicate(timeout=60)
        self.lines += [json.loads(text) for text in rest.splitlines()]
        self.api.close()


@contextmanager
def running(state: Path, zoo: Path, **variables: str) -> Iterator[Service]:
    """A service that does not outlive the test."""
    service = Service(state, zoo, **variables)
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.kill()
