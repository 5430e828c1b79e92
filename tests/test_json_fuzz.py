"""Hostile values at every place of every JSON body: each response is a result or a problem.

Non-finite and huge numbers, deep nesting, extreme dates, huge ids, halves of surrogate pairs and
wrong types. A seed meets each value with some of the bodies, at places that it draws. All bodies
meet all values in as many seeds as there are bodies: `JSON_FUZZ_SEEDS=20 python -m pytest
tests/test_json_fuzz.py`.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from tests.kits.jobs import ASYNC, waited
from tests.kits.rasters import write

pytestmark = pytest.mark.slow

SEEDS = int(os.environ.get("JSON_FUZZ_SEEDS", "1"))
BANDS = ("B02", "B03", "B04", "B08")
DAYS = [f"2021-{month:02}-05" for month in range(1, 7)]
NOWHERE = "http://127.0.0.1:1/"
"""An address at which nothing listens."""

# As text, because not all of it is JSON, and Python would not write the rest of it.
NUMBERS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "-1e308", "5e-324", "-0.0", "0",
    "-1", "1.5", "9" * 19, "-" + "9" * 30, "1" + "0" * 400, "9" * 5000,
)  # fmt: skip
NESTED = (
    "[" * 3000 + "]" * 3000, "[" * 3000, '{"a":' * 3000 + "1" + "}" * 3000,
    # Less than what a parser allows, and more than a function that calls itself may.
    "[" * 180 + "]" * 180, "[" * 450 + "]" * 450, '{"a":' * 450 + "1" + "}" * 450, "[1,[2,[3]]]",
)  # fmt: skip
DATES = tuple(
    f'"{text}"'
    for text in (
        "9999-12-31", "0001-01-01", "-9999-01-01", "10000-01-01", "2021-02-30", "1969-12-31",
        "2021-01-01T99:99:99Z", "9999-12-31T23:59:59-23:59", "0001-01-01/9999-12-31", "../..",
    )
)  # fmt: skip
TEXTS = tuple(
    f'"{text}"'
    for text in (
        "", "x" * 100_000, r"\ud800", r"\u0000", r"\u202e", "ü" * 300, "../../etc/passwd",
        "/etc/passwd", "file:///etc/passwd", "http://[::1", NOWHERE, "NaN", "1e999", "9" * 5000,
    )
)  # fmt: skip
TYPES = ("null", "true", "[]", "{}", "[null]", '{"": 1}', '{"type":"Feature"}', '[[], {}, "a"]')
HOSTILE = (*NUMBERS, *NESTED, *DATES, *TEXTS, *TYPES)
LONGEST_PROBLEM = 20_000
"""Largest size of an error, bytes: it shows only a part of what it rejects."""
TURNS = 2
"""Number of bodies that a seed meets each value with."""
_HERE = "a place that no body has"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the service may read by reference."""
    path = tmp_path_factory.mktemp("stack")
    for day in DAYS:
        write(path / f"s_{day}.tif", np.full((4, 64, 64), 2000, np.uint16), descriptions=BANDS)
    return path


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[httpx.Client]:
    settings: dict[str, Any] = {
        "model_dir": write_zoo(tmp_path_factory.mktemp("zoo")),
        "allowed_roots": (folder,),
        "allowed_hosts": "127.0.0.0/8",
        "callback_hosts": "127.0.0.0/8",
        "callback_secrets": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "max_items": 20,
        "max_jobs": 10_000,
    }
    with served(**settings) as client:
        yield client


def feature(kind: str, coordinates: list[Any]) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": 1,
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"class": "wheat", "place": "a"},
    }


def collection(*features: dict[str, Any]) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


POINT = collection(feature("Point", [3.001, 50.551]))
RING = [[3.0, 50.549], [3.001, 50.549], [3.001, 50.55], [3.0, 50.55], [3.0, 50.549]]
FIELD = collection(feature("Polygon", [RING]))
ONE = {"id": "a", "dates": DAYS, **{band: [0.1] * len(DAYS) for band in BANDS}}
CALLED = {"successUri": f"{NOWHERE}done", "failedUri": f"{NOWHERE}failed"}


def bodies(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Requests by path, each of which reaches another part of what a body can hold."""
    items = [{"href": str(folder / f"s_{day}.tif"), "date": day} for day in DAYS]
    links = [{"href": str(folder / f"s_{day}.tif")} for day in DAYS]
    stac = {
        "type": "Feature", "stac_version": "1.1.0", "id": "a", "bbox": [3, 50, 4, 51], "links": [],
        "geometry": {"type": "Point", "coordinates": [3, 50]},
        "properties": {"datetime": "2021-01-05T00:00:00Z", "proj:code": "EPSG:32631"},
        "assets": {
            "B02": {
                "href": items[0]["href"], "eo:bands": [{"name": "B02"}],
                "raster:bands": [{"scale": 1e-4, "offset": 0, "nodata": 0}],
            }
        },
    }  # fmt: skip
    search = {
        "url": NOWHERE, "collections": ["a"], "bbox": [3, 50, 4, 51],
        "datetime": "2021-01-01/2021-02-01",
    }  # fmt: skip
    reading = {
        "bbox": [3.0, 50.548, 3.002, 50.551], "grid": "EPSG:32631@10", "start": "2021-01-01",
        "scale": 1e-4, "offset": 0, "mask": "none", "model": "pixels-landcover",
    }  # fmt: skip
    return [
        ("/classify-pixels", {"items": items, **reading, "outputs": ["class"], "smooth": 1}),
        ("/classify-pixels", {"items": items, "points": POINT, "subscriber": CALLED}),
        ("/classify-pixels", {"items": items, "fields": FIELD, "area": FIELD["features"][0]}),
        ("/classify-pixels", {"stac": collection(stac), "start": "2021-01-01"}),
        ("/classify-pixels", {"series": [ONE], "start": "2021-01-01", "outputs": ["class"]}),
        ("/forecast", {"series": [ONE], "horizon": 2, "backtest": True}),
        ("/forecast", {"items": items, "fields": FIELD, "horizon": 1, "backtest": False}),
        ("/landcover", {"items": items, "outputs": ["class"], "stride": 16}),
        ("/embed", {"items": items, "points": POINT, "dtype": "int8", "modality": "pixel"}),
        ("/embed", {"series": [ONE], "model": "embed-pixel"}),
        ("/similar", {"items": items, "points": POINT, "outputs": ["similarities"]}),
        ("/similar", {"items": items, "fields": FIELD}),
        ("/series", {"items": items, "fields": FIELD}),
        ("/heads", {"items": items, "name": "a", "labels": FIELD, "description": "d"}),
        ("/heads", {"name": "a", "series": [{**ONE, "class": "x", "place": "p"}]}),
        ("/validate?task=similar", {"items": items, "points": POINT}),
        ("/validate?task=forecast", {"stac": search, "horizon": 1}),
        (
            "/processes/classify-pixels/execution",
            {
                "inputs": {"files": links, "points": POINT, "bbox": {"bbox": [3, 50, 4, 51]}},
                "outputs": {"features": {"transmissionMode": "value"}},
                "response": "document",
                "subscriber": CALLED,
            },
        ),
        ("/processes/embed/execution", {"inputs": {"series": [{"value": ONE}]}}),
    ]


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each part of a JSON value; of lists only to the first and the last entry."""
    yield here
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*here, name))
    elif isinstance(value, list):
        for number in sorted({0, len(value) - 1} if value else ()):
            yield from places(value[number], (*here, number))


def hostile(body: dict[str, Any], value: str, draw: random.Random) -> tuple[str, str]:
    """A body with a hostile value, or a hostile name, at one place.

    Returns:
        The body, and where it is hostile.
    """
    whole = [json.loads(json.dumps(body))]
    *way, last = draw.choice([(0, *place) for place in places(body)])
    holder: Any = whole
    for part in way:
        holder = holder[part]
    if isinstance(last, str) and value.startswith('"') and draw.random() < 0.3:
        holder[_HERE] = holder.pop(last)
        where = f"the name of {last}"
    else:
        holder[last] = _HERE
        where = f"{[*way, last][1:]}"
    return json.dumps(whole[0]).replace(f'"{_HERE}"', value), where


def form_texts() -> list[tuple[str, str, dict[str, Any]]]:
    """Parameters of forms that hold JSON, as text and as a file: path, name and value."""
    return [
        ("/classify-pixels", "points", POINT),
        ("/classify-pixels", "fields", FIELD),
        ("/classify-pixels", "area", FIELD["features"][0]["geometry"]),
        ("/similar", "points", POINT),
        ("/heads", "labels", FIELD),
        ("/validate?task=embed", "subscriber", CALLED),
    ]


def no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def met(count: int, seed: int) -> Iterator[tuple[int, str]]:
    """Numbers of `count` bodies, and the values that each meets: all values, `TURNS` times."""
    for number, value in enumerate(HOSTILE):
        for turn in range(min(TURNS, count)):
            yield (number + seed + turn * count // TURNS) % count, value


def fault(answer: httpx.Response) -> str | None:
    """Why a response is neither a result nor a problem of the request; None if it is."""
    kind = answer.headers["content-type"].partition(";")[0]
    if kind.endswith("json"):
        try:
            json.loads(answer.text, parse_constant=no_constant)
        except ValueError as error:
            return str(error)
    if answer.status_code >= 500:
        return answer.text[:300]
    if answer.status_code >= 400 and kind != "application/problem+json":
        return kind
    lists_problems = answer.status_code >= 400 or answer.url.path == "/validate"
    if lists_problems and len(answer.content) > LONGEST_PROBLEM:
        return f"{len(answer.content)} bytes"
    return None


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_json_is_an_internal_error(api: httpx.Client, folder: Path, seed: int) -> None:
    draw = random.Random(seed)  # noqa: S311 - cases that repeat
    requests = bodies(folder)
    statuses: Counter[int] = Counter()
    faults: dict[str, str | None] = {}
    jobs = []
    for number, value in met(len(requests), seed):
        path, body = requests[number]
        text, where = hostile(body, value, draw)
        headers = {"Content-Type": "application/json"}
        if path.startswith("/processes/") or draw.random() < 0.2:
            headers |= ASYNC
        what = f"seed {seed}: {path}: {value[:40]} as {where}"
        answer = api.post(path, content=text.encode(), headers=headers)
        faults[what] = fault(answer)
        statuses[answer.status_code] += 1
        if answer.status_code in {201, 202} and not path.startswith("/heads"):
            jobs.append((what, answer.json()["jobID"]))
    for what, job in jobs:
        waited(api, job)
        for at in ("", "/result", "/results"):
            faults[f"{what}: job{at}"] = fault(api.get(f"/jobs/{job}{at}"))
    assert {what: why for what, why in faults.items() if why} == {}
    # The values reach the runs: not every one is rejected at the door.
    assert min(statuses[200], statuses[422]) >= 5, statuses
    assert statuses[202], statuses


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_json_in_a_form_is_an_internal_error(api: httpx.Client, folder: Path, seed: int) -> None:
    draw = random.Random(seed)  # noqa: S311 - as above
    stack = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    statuses: Counter[int] = Counter()
    faults: dict[str, str | None] = {}
    forms = form_texts()
    for number, value in met(len(forms), seed):
        path, name, whole = forms[number]
        text, where = hostile(whole, value, draw)
        what = f"seed {seed}: {path}: {name}: {value[:40]} as {where}"
        data = {"name": "a"} if path == "/heads" else {}
        files: list[Any] = list(stack)
        if name in {"fields", "labels"} and draw.random() < 0.5:
            files.append((name, ("a.geojson", text.encode("utf-8", "surrogatepass"))))
        else:
            data[name] = text
        answer = api.post(path, files=files, data=data)
        faults[what] = fault(answer)
        statuses[answer.status_code] += 1
        if answer.status_code == 201:
            assert api.delete("/heads/a").status_code == 204
    assert min(statuses[200], statuses[422]) >= 5, statuses
    assert {what: why for what, why in faults.items() if why} == {}


def test_every_route_that_takes_json_is_met(api: httpx.Client, folder: Path) -> None:
    taking = {
        path
        for path, item in api.get("/openapi.json").json()["paths"].items()
        for operation in item.values()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }
    reached = {path.partition("?")[0] for path, _ in bodies(folder)}
    assert {path.replace("{process_id}", "embed") for path in taking} <= reached


def test_each_body_without_a_hostile_value_is_read(api: httpx.Client, folder: Path) -> None:
    """Otherwise a value would be rejected together with its body."""
    failing = {}
    for path, body in bodies(folder):
        answer = api.post(path, json=body, headers=ASYNC if "subscriber" in body else {})
        if answer.status_code >= 400 and answer.json()["code"] == "invalid_request":
            failing[path, *body] = answer.text
    assert failing == {}


@pytest.mark.parametrize("path", ["/jobs/{}", "/models/{}", "/heads/{}", "/processes/{}"])
@pytest.mark.parametrize("name", ["9" * 5000, "1e999", "NaN", "\0", "ü" * 900, "../x", "-1", "%"])
def test_no_name_in_a_path_is_an_internal_error(api: httpx.Client, path: str, name: str) -> None:
    at = path.format(quote(name, safe=""))
    for method in ("GET", "DELETE"):
        answer = api.request(method, at)
        assert fault(answer) is None
        assert answer.status_code in {404, 405, 422}
