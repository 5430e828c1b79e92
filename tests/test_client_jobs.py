"""Jobs of both clients, against a small server that follows the API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from pimc_client import (
    CorruptRaster,
    JobDismissed,
    JobFailed,
    Raster,
    Rasters,
    ResultNotReady,
    UnexpectedAnswer,
    UnknownJob,
    WaitTimedOut,
    operations,
)
from tests.kits.client import cog, connected, without_pauses, zipped

KINDS = pytest.mark.parametrize("kind", ["sync", "async"])
COG = "image/tiff; application=geotiff; profile=cloud-optimized"
FILE = ("a.tif", b"x")
VALUES = np.array([[[0, 1], [1, 255]]], np.uint8)


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    with without_pauses():
        yield


class JobServer:
    """Runs jobs that advance by one step each time their state is requested.

    Args:
        steps: percentages, one for each request; the job ends after the last.
        fails: the problem document of a failed job, or "" for a failure without a reason.
    """

    def __init__(self, steps=(10, 60), fails=None, zips=False, over_limit=False):
        self.steps, self.fails, self.zips, self.over_limit = steps, fails, zips, over_limit
        self.jobs = {}
        self.keys = {}
        self.seen = []
        self.transport = httpx.MockTransport(self.handle)

    def handle(self, request):
        self.seen.append(request)
        path = request.url.path.strip("/").split("/")
        if request.method == "POST":
            return self.create(request, path[0])
        if path == ["jobs"]:
            return httpx.Response(200, json={"jobs": [self.state(j) for j in self.jobs]})
        if path[1] not in self.jobs:
            return problem("unknown_job", 404)
        if request.method == "DELETE":
            self.jobs[path[1]]["dismissed"] = True
            return httpx.Response(200, json=self.state(path[1]))
        return self.result(path[1], *path[3:]) if "result" in path else self.look(path[1])

    def create(self, request, task):
        asynchronous = request.headers.get("prefer") == "respond-async"
        if not asynchronous and not self.over_limit:
            return httpx.Response(200, json={})
        key = request.headers.get("idempotency-key")
        name = self.keys.get(key) or f"job-{len(self.jobs)}"
        if key:
            self.keys[key] = name
        self.jobs.setdefault(name, {"task": task, "looks": 0, "dismissed": False})
        location = {"Location": f"/jobs/{name}"}
        return httpx.Response(202, json=self.state(name), headers=location)

    def look(self, name):
        self.jobs[name]["looks"] += 1
        return httpx.Response(200, json=self.state(name))

    def state(self, name):
        job = self.jobs[name]
        looks = job["looks"]
        if job["dismissed"]:
            status = "dismissed"
        elif looks > len(self.steps):
            status = "successful" if self.fails is None else "failed"
        else:
            status = "running" if looks else "accepted"
        return {
            "jobID": name,
            "type": "process",
            "processID": job["task"],
            "status": status,
            "progress": 100 if looks > len(self.steps) else [0, *self.steps][looks],
            "created": "2026-01-05T10:00:00Z",
            "started": "2026-01-05T10:00:01+00:00" if looks else None,
            "finished": None,
            "links": [],
        }

    def result(self, name, output=None):
        status = self.state(name)["status"]
        if status == "failed" and self.fails:
            return httpx.Response(self.fails["status"], json=self.fails)
        if status != "successful":
            return problem("result_not_ready", 409)
        tiff = cog(VALUES, descriptions=["class"], nodata=255)
        if self.zips and output is None:
            body = zipped(class__tif=tiff, confidence__tif=tiff)
            return httpx.Response(200, content=body, headers={"Content-Type": "application/zip"})
        return httpx.Response(200, content=tiff, headers={"Content-Type": COG})


def problem(code, status):
    return httpx.Response(status, json={"code": code, "status": status, "detail": "no"})


@KINDS
def test_a_job_is_submitted_and_its_result_awaited(kind):
    server, reported = JobServer(), []
    with connected(kind, "http://test", transport=server.transport) as client:
        job = client.submit("classify-pixels", FILE, start="2021-01-01")
        assert (job.id, job.status, job.task, job.done) == (
            "job-0",
            "accepted",
            "classify-pixels",
            False,
        )
        raster = job.wait(progress=reported.append)
        assert isinstance(raster, Raster)
        np.testing.assert_array_equal(raster.array, VALUES[0])
        assert reported == [0, 10, 60, 100]
        assert job.done
        assert job.state.started.tzinfo is not None
        assert job.state.finished is None
        assert isinstance(job.result(), Raster)
    posted = server.seen[0]
    assert posted.headers["prefer"] == "respond-async"
    assert posted.headers["accept"] == COG
    assert len(posted.headers["idempotency-key"]) >= 16


@KINDS
def test_a_job_returns_several_outputs_or_one_of_them(kind):
    server = JobServer(steps=(), zips=True)
    with connected(kind, "http://test", transport=server.transport) as client:
        job = client.submit("landcover", FILE, outputs=["class", "confidence"], stride=16)
        both = job.wait()
        assert isinstance(both, Rasters)
        assert set(both) == {"class", "confidence"}
        one = job.result("confidence")
        assert isinstance(one, Raster)
        assert one.name == "confidence"
    assert server.seen[-1].url.path.endswith("/jobs/job-0/result/confidence")
    assert server.seen[0].headers["accept"] == "application/zip"


@KINDS
def test_calls_with_one_key_create_one_job_and_others_one_each(kind):
    server = JobServer()
    with connected(kind, "http://test", transport=server.transport) as client:
        ids = [client.submit("embed", FILE, idempotency_key="mine").id for _ in range(2)]
        assert ids == ["job-0", "job-0"]
        assert client.submit("embed", FILE).id == "job-1"
        assert client.submit("embed", FILE).id == "job-2"


@KINDS
def test_a_job_is_found_by_its_id(kind):
    server = JobServer(steps=())
    with connected(kind, "http://test", transport=server.transport) as client:
        client.submit("forecast", FILE)
        assert [job.id for job in client.jobs()] == ["job-0"]
        job = client.job("job-0")
        assert job.status == "successful"
        assert job.result().name == "forecast"
        with pytest.raises(UnknownJob):
            client.job("job-9")


@KINDS
def test_a_result_that_is_not_ready_is_an_error(kind):
    server = JobServer(steps=(10, 20, 30))
    with connected(kind, "http://test", transport=server.transport) as client:
        job = client.submit("embed", FILE)
        with pytest.raises(ResultNotReady):
            job.result()
        assert job.refresh() is not None
        assert (job.status, job.progress) == ("running", 10)


@KINDS
def test_waiting_has_a_time_limit_and_may_be_repeated(kind, monkeypatch):
    server = JobServer(steps=(10,) * 3)
    with connected(kind, "http://test", transport=server.transport) as client:
        job = client.submit("embed", FILE)
        with monkeypatch.context() as patched:
            # The time limit begins, has not passed, and has passed.
            clock = SimpleNamespace(monotonic=iter([100.0, 100.2, 100.4]).__next__)
            patched.setattr(operations, "time", clock)
            with pytest.raises(WaitTimedOut, match="job-0 is running at 10 %") as caught:
                job.wait(timeout=0.3)
        assert caught.value.job_id == "job-0"
        assert isinstance(job.wait(), Raster)


@KINDS
def test_a_cancelled_job_has_no_result(kind):
    with connected(kind, "http://test", transport=JobServer().transport) as client:
        job = client.submit("embed", FILE)
        job.cancel()
        assert (job.status, job.done) == ("dismissed", True)
        with pytest.raises(JobDismissed, match="job-0 was cancelled"):
            job.wait()


@KINDS
def test_a_failed_job_raises_its_error(kind):
    document = {
        "code": "corrupt_raster",
        "status": 422,
        "detail": "a.tif: block 7",
        "request_id": "r",
    }
    server = JobServer(steps=(), fails=document)
    with connected(kind, "http://test", transport=server.transport) as client:
        job = client.submit("embed", FILE)
        with pytest.raises(CorruptRaster, match="block 7"):
            job.wait()
        assert job.status == "failed"


@KINDS
def test_a_job_that_failed_without_a_reason_raises_job_failed(kind):
    server = JobServer(steps=(), fails="")
    with (
        connected(kind, "http://test", transport=server.transport) as client,
        pytest.raises(JobFailed, match="job-0 failed"),
    ):
        client.submit("embed", FILE).wait()


@KINDS
def test_a_request_that_the_server_runs_as_a_job_returns_its_result(kind):
    server = JobServer(over_limit=True)
    with connected(kind, "http://test", transport=server.transport) as client:
        raster = client.classify_pixels(FILE)
    np.testing.assert_array_equal(raster.array, VALUES[0])
    assert [r.method for r in server.seen].count("POST") == 1
    results = [r for r in server.seen if r.url.path.endswith("/result")]
    assert [r.headers["accept"] for r in results] == [COG]


@KINDS
def test_a_server_without_jobs_is_an_error(kind):
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={}))
    with (
        connected(kind, "http://test", transport=transport) as client,
        pytest.raises(UnexpectedAnswer, match="instead of 202 with a job"),
    ):
        client.submit("embed", FILE)


@KINDS
def test_a_cancellation_may_have_no_body(kind):
    def handle(request):
        return httpx.Response(204) if request.method == "DELETE" else server.handle(request)

    server = JobServer()
    with connected(kind, "http://test", transport=httpx.MockTransport(handle)) as client:
        job = client.submit("embed", FILE)
        job.cancel()
        assert job.status == "dismissed"
        assert json.loads(json.dumps(job.state.document))["jobID"] == "job-0"
