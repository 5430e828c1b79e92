"""Arbitrary execute requests, made of the process descriptions: each is a result or a problem.

schemathesis (`test_openapi_fuzz.py`) tests the paths, but not what only process descriptions state.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from tests.kits.jobs import SERIES, stack, waited

pytestmark = pytest.mark.slow

CASES = 300
INTERNALS = re.compile(r"Traceback|site-packages|\.py\b|numpy|rasterio|pydantic|0x[0-9a-f]{6,}")
POINT = {
    "type": "FeatureCollection",
    "features": [
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [3.001, 50.551]}}
    ],
}
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 10**30, 1e308, "", "a", "\x00", "ü" * 300, "2021-02-30", [],
    [[]], [None], {}, {"value": None}, {"value": {"value": {}}}, {"href": 7},
    {"href": "/etc/passwd"}, {"href": "http://127.0.0.1/"},
    {"value": "AAAA", "mediaType": "text/x"}, {"type": "Feature"},
)  # fmt: skip


class Cases:
    """Execute requests of a seed.

    Args:
        known: descriptions of the processes.
        files: values of the input `files`.
    """

    def __init__(self, known: list[dict[str, Any]], files: list[dict[str, str]]) -> None:
        self.known, self.files = known, files

    def case(self, seed: int) -> tuple[str, dict[str, Any], dict[str, str]]:
        """A process, a body and headers."""
        draw = random.Random(seed)  # noqa: S311 - cases that repeat
        process = draw.choice(self.known)
        body: dict[str, Any] = {"inputs": self._inputs(process, draw)}
        if draw.random() < 0.6:
            body["outputs"] = self._outputs(process, draw)
        if draw.random() < 0.5:
            body["response"] = draw.choice(["raw", "document", *ODD[:4]])
        if draw.random() < 0.05:
            body[draw.choice(["inputs", "outputs", "subscriber", "mode"])] = draw.choice(ODD)
        headers = {"Prefer": "respond-async"} if draw.random() < 0.2 else {}
        return process["id"], body, headers

    def _inputs(self, process: dict[str, Any], draw: random.Random) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        source = draw.random()
        if source < 0.8 or "series" not in process["inputs"]:
            inputs["files"] = self.files
        elif source < 0.95:
            inputs["series"] = SERIES["series"]
        if process["id"] == "similar" or draw.random() < 0.2:
            inputs["points"] = POINT
        names = [name for name in process["inputs"] if name not in {"files", "series"}]
        for name in draw.sample(names, draw.choice([0, 0, 1, 1, 2, 3])):
            inputs[name] = value(process["inputs"][name]["schema"], draw)
        if draw.random() < 0.1:
            inputs[draw.choice([*process["inputs"], "else"])] = draw.choice(ODD)
        return inputs

    def _outputs(self, process: dict[str, Any], draw: random.Random) -> Any:
        names = list(process["outputs"])
        outputs: dict[str, Any] = {
            name: self._output(process["outputs"][name]["schema"], draw)
            for name in draw.sample(names, draw.choice([0, 1, 1, 2]))
        }
        if draw.random() < 0.1:
            outputs[draw.choice([*names, "else"])] = draw.choice(ODD)
        return draw.choice(ODD) if draw.random() < 0.05 else outputs

    def _output(self, schema: dict[str, Any], draw: random.Random) -> dict[str, Any]:
        kinds = [one.get("contentMediaType", "text/x") for one in schema.get("oneOf", [schema])]
        output: dict[str, Any] = {}
        if draw.random() < 0.3:
            output["format"] = {"mediaType": draw.choice([*kinds, "image/png"])}
        if draw.random() < 0.4:
            output["transmissionMode"] = draw.choice(["value", "reference", "reference"])
        return output


def value(schema: dict[str, Any], draw: random.Random) -> Any:
    """A value near what a schema allows."""
    if draw.random() < 0.25:
        return draw.choice(ODD)
    if "oneOf" in schema:
        return value(draw.choice(schema["oneOf"]), draw)
    if "enum" in schema:
        return draw.choice(schema["enum"])
    kind = schema.get("type")
    if kind in {"integer", "number"}:
        low, high = schema.get("minimum", -2), schema.get("maximum", 9)
        return draw.choice([low, high, low - 1, high + 1, (low + high) // 2])
    if kind == "boolean":
        return draw.random() < 0.5
    if kind == "array":
        return [value(schema.get("items", {}), draw) for _ in range(draw.choice([0, 1, 4]))]
    if kind == "object":
        known = schema.get("properties", {})
        return {name: value(one, draw) for name, one in known.items() if draw.random() < 0.8}
    return draw.choice(["2021-01-01", "none", "EPSG:32631@20", "B04", "pixels-landcover"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[httpx.Client]:
    zoo = write_zoo(tmp_path_factory.mktemp("zoo"))
    with served(model_dir=zoo, allowed_roots=(folder,)) as client:
        yield client


def check(answer: httpx.Response, what: str) -> None:
    """A response is a result, or a problem that discloses no internals."""
    assert answer.status_code < 500, (what, answer.text)
    if answer.status_code < 400:
        return
    assert answer.headers["content-type"] == "application/problem+json", what
    problem = answer.json()
    assert problem["status"] == answer.status_code, what
    assert problem["code"] != "internal_error", what
    assert problem["detail"], what
    assert not INTERNALS.search(answer.text), (what, answer.text)


def test_each_execute_request_is_a_result_or_a_problem(api: httpx.Client, folder: Path) -> None:
    files = stack(folder, 64, 65, dates=4)
    names = [{"href": str(folder / name)} for _, (name, *_) in files]
    listed = api.get("/processes").json()["processes"]
    cases = Cases([api.get(f"/processes/{one['id']}").json() for one in listed], names)
    statuses: Counter[int] = Counter()
    results: Counter[str] = Counter()
    jobs = []
    for seed in range(CASES):
        process, body, headers = cases.case(seed)
        what = f"seed {seed}: {process} {body}"
        answer = api.post(f"/processes/{process}/execution", json=body, headers=headers)
        check(answer, what)
        statuses[answer.status_code] += 1
        if answer.status_code == 200:
            results[process] += 1
        if answer.status_code == 201:
            jobs.append((what, answer.json()["jobID"]))
    # The cases reach results of every process, in every form.
    assert set(results) == {one["id"] for one in listed}, results
    assert min(statuses[status] for status in (200, 201, 204, 403, 422)) >= 2, statuses
    for number, (what, job) in enumerate(jobs):
        status = waited(api, job)
        results_of = api.get(f"/jobs/{job}/results")
        check(results_of, what)
        succeeded = status["status"] == "successful"
        assert (results_of.status_code < 400) == succeeded, (what, status, results_of.text)
        for output in ("class", "summary", "features", "else", "%00", "..%2f..", "ü" * 300):
            check(api.get(f"/jobs/{job}/results/{output}"), what)
        if number % 2:
            check(api.delete(f"/jobs/{job}"), what)
            check(api.get(f"/jobs/{job}/results"), what)


@pytest.mark.parametrize("path", ["/processes", "/jobs"])
def test_each_query_of_a_list_is_a_list_or_a_problem(api: httpx.Client, path: str) -> None:
    draw = random.Random(7)  # noqa: S311 - as above
    known = api.get("/openapi.json").json()["paths"][path]["get"]["parameters"]
    statuses: Counter[int] = Counter()
    for number in range(100):
        chosen = draw.sample(known, min(len(known), draw.choice([1, 1, 2, 3])))
        query = {one["name"]: value(one.get("schema", {}), draw) for one in chosen}
        answer = api.get(path, params={name: str(given) for name, given in query.items()})
        check(answer, f"{number}: {path} {query}")
        statuses[answer.status_code] += 1
    assert min(statuses[status] for status in (200, 422)) >= 2, statuses


@pytest.mark.parametrize(
    "name", ["%00", "..%2f..%2fetc", "ü" * 400, "similar%20", "SIMILAR", "a;b"]
)
def test_each_name_of_a_process_or_job_is_found_or_not(api: httpx.Client, name: str) -> None:
    for path in (f"/processes/{name}", f"/jobs/{name}", f"/jobs/{name}/results"):
        answer = api.get(path)
        check(answer, path)
        assert answer.status_code == 404, path
    answer = api.post(f"/processes/{name}/execution", json={"inputs": {}})
    check(answer, name)
    assert answer.status_code == 404
