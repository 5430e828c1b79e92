"""The SDK's jobs against the service itself, over a real socket; sync and async alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving import served
from pimc_client import (
    InternalError,
    JobDismissed,
    MissingBands,
    Raster,
    Rasters,
    ResultNotReady,
    Summary,
    UnknownJob,
)
from tests.kits.client import connected, without_pauses
from tests.kits.gate import HELD, zoo_with_a_held_model
from tests.kits.jobs import stack

KINDS = pytest.mark.parametrize("kind", ["sync", "async"])


@pytest.fixture(autouse=True)
def soon_again() -> Iterator[None]:
    with without_pauses(poll=0.01):
        yield


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    zoo = zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))
    with served(model_dir=zoo, sync_max_pixels=70 * 90) as http:
        yield str(http.base_url)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return made(tmp_path_factory.mktemp("stack"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A stack with more pixels than a synchronous request may have."""
    return made(tmp_path_factory.mktemp("large"), 128, 256)


def made(folder, *size) -> list[Path]:
    stack(folder, *size)
    return sorted(folder.iterdir())


@KINDS
def test_submit_wait_and_result(url, kind, paths):
    reported = []
    with connected(kind, url) as client:
        at_once = client.classify_pixels(paths)
        job = client.submit("classify-pixels", paths)
        raster = job.wait(progress=reported.append)
        assert isinstance(raster, Raster)
        np.testing.assert_array_equal(raster.array, at_once.array)
        assert raster.content == at_once.content
        assert raster.legend == at_once.legend
        assert reported == sorted(reported)
        assert reported[-1] == 100
        assert (job.status, job.progress, job.done) == ("successful", 100, True)
        assert job.state.created <= job.state.started <= job.state.finished
        found = client.job(job.id)
        assert (found.task, found.status) == ("classify-pixels", "successful")
        assert found.result().content == raster.content
        assert job.id in [other.id for other in client.jobs()]


@KINDS
def test_several_outputs_and_one_of_them(url, kind, paths):
    with connected(kind, url) as client:
        job = client.submit("classify-pixels", paths, outputs=["class", "confidence"])
        both = job.wait()
        assert isinstance(both, Rasters)
        np.testing.assert_array_equal(job.result("confidence").array, both["confidence"].array)
        summary = client.submit("classify-pixels", paths, answer="summary").wait()
        assert isinstance(summary, Summary)


@KINDS
def test_a_result_too_large_for_a_synchronous_response_is_returned_by_a_job(url, kind, large):
    with connected(kind, url) as client:
        before = len(client.jobs())
        raster = client.classify_pixels(large)
        assert raster.array.shape == (128, 256)
        assert len(client.jobs()) == before + 1


@KINDS
def test_cancel(url, kind, gate, large):
    with connected(kind, url) as client, gate.held():
        job = client.submit("classify-pixels", large, model=HELD)
        with pytest.raises(ResultNotReady):
            job.result()
        job.cancel()
        assert (job.status, job.done) == ("dismissed", True)
        with pytest.raises(JobDismissed):
            job.wait()


@KINDS
def test_a_repeated_request_returns_the_first_job(url, kind, paths):
    with connected(kind, url) as client:
        first = client.submit("embed", paths, idempotency_key=f"mine-{kind}")
        assert client.submit("embed", paths, idempotency_key=f"mine-{kind}").id == first.id
        assert client.submit("embed", paths).id != first.id


@KINDS
def test_errors_of_jobs_are_raised(url, kind, paths):
    with connected(kind, url) as client:
        with pytest.raises(MissingBands):
            client.submit("classify-pixels", paths, bands=["B02", "B03", "B04", "B05"])
        with pytest.raises(UnknownJob):
            client.job("00000000-0000-4000-8000-000000000000")
        job = client.submit("classify-pixels", paths[:3], model="pixels-brittle")
        with pytest.raises(InternalError):
            job.wait()
        assert job.status == "failed"
