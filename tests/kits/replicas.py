"""Jobs of replicas: what their stores and processes do in tests of a folder and of a bucket."""

from __future__ import annotations

import httpx
import pytest

from service.grid import Window
from service.jobs.job import Job
from service.jobs.store import JobStore
from service.run.execute import Result
from service.run.executors import Timing
from service.run.windows import Step
from service.settings import SettingsError
from tests.kits.gate import HELD
from tests.kits.jobs import Backend, Files, submitted

STEPS = [Step(stage="predictions", number=n, window=Window(0, 2 * n, 4, 2)) for n in range(3)]
"""Windows that a job may keep."""


def expire(shared: Backend) -> None:
    """Let all leases end now, as if their replicas had not been heard of for long."""
    shared.rows("UPDATE jobs SET expires = 0 WHERE expires IS NOT NULL")


def windows(shared: Backend) -> dict[int, int]:
    """Leases of the finished windows by number."""
    return dict(shared.rows("SELECT number, lease FROM windows"))


def taken(store: JobStore) -> Job:
    """The job that a replica runs next, with its uploads at hand."""
    job = store.take()
    assert job is not None
    store.files.prepare(job)
    return job


def publish(store: JobStore, job: Job, content: str | bytes, task: str = "embed") -> None:
    """Publish a result whose class map has this content."""
    work = store.files.work(job)
    work.mkdir(parents=True)
    path = work / "class.tif"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    result = Result(
        task=task, model="m@1", provider="CPU", document={}, pixels=1,
        files={"class": path}, timing=Timing(read=0, infer=0, write=0), warnings=(),
    )  # fmt: skip
    store.results.publish(job, work, result)


def refusal(backend: Backend) -> str:
    """The one line with which a replica does not start."""
    with pytest.raises(SettingsError) as caught, backend.opened():
        pytest.fail("it was opened")
    said = str(caught.value)
    assert "\n" not in said
    return said


def submitted_held(api: httpx.Client, files: Files, **headers: str) -> str:
    """The id of a job whose windows wait at the gate."""
    data = {"model": HELD, "outputs": "class,probabilities"}
    return submitted(api, "/classify-pixels", files=files, data=data, headers=headers)
