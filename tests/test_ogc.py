"""OGC API - Processes 1.0 (18-062r2): every requirement of the declared classes, and its clients.

A test named `test_req_<class>_<requirement>` is for the requirement of that name.
"""

from __future__ import annotations

import base64
import email
import io
import json
import re
import time
import zipfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from queue import Queue
from typing import Any, get_args

import geopandas
import httpx
import numpy as np
import pytest
import rasterio
import shapely
from owslib.ogcapi.processes import Processes
from standardwebhooks import Webhook

from benchmarks.serving import served
from models.card import Task
from service.api.processes import conformance_classes
from service.api.schemas.request_bodies import ITEMS, SERIES
from tests.kits.client import Received, Reply, serving
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import ASYNC, ENDED, Files, change, stack, waited
from tests.kits.jobs import SERIES as BODY
from tests.kits.json_schema import json_schema
from tests.kits.patience import PATIENCE
from tests.kits.rasters import UTM

pytestmark = pytest.mark.slow

COG = "image/tiff; application=geotiff; profile=cloud-optimized"
OGC = "http://www.opengis.net/def"
EXCEPTIONS = f"{OGC}/exceptions/ogcapi-processes-1/1.0"
PROCESSES = (*get_args(Task), "similar")
HEIGHT, WIDTH = 66, 67
ENTRY = BODY["series"][0]
MAPS = ("class", "confidence", "entropy", "probabilities")
CLASSES = {
    "core": """
        http landingpage-op landingpage-success api-definition-op api-definition-success
        conformance-op conformance-success process-list pl-limit-definition process-list-success
        pl-limit-response pl-links process process-success process-exception/no-such-process
        process-execute-op process-execute-request process-execute-inputs
        process-execute-input-array process-execute-input-inline-object
        process-execute-input-mixed-type process-execute-input-inline-binary
        process-execute-input-inline-bbox process-execute-input-validation
        process-execute-default-execution-mode process-execute-auto-execution-mode
        process-execute-default-outputs process-execute-sync-raw-value-one
        process-execute-sync-raw-value-multi process-execute-sync-raw-ref
        process-execute-sync-raw-mixed-multi process-execute-sync-document
        job-results-success-sync process-execute-success-async job job-success
        job-exception-no-such-job job-results job-results-async-raw-value-one
        job-results-async-raw-value-multi job-results-async-raw-ref
        job-results-async-raw-mixed-multi job-results-async-document
        job-results-exception/no-such-job job-results-exception/results-not-ready
        job-results-failed test-process""",
    "ogc-process-description": """
        json-encoding inputs-def input-def input-binary input-mixed-type outputs-def output-def
        output-mixed-type""",
    "json": "definition",
    "job-list": """
        job-list-op type-definition type-response processID-mandatory processID-definition
        processid-response status-definition status-response datetime-definition datetime-response
        duration-definition duration-response limit-definition limit-response job-list-success
        links""",
    "dismiss": "job-dismiss-op job-dismiss-success",
    "callback": "job-callback",
}
"""Names of the requirements of the declared classes. Of two that the standard gives one name
(`status-response`), the one about durations is `duration-response` here."""

# The standard's schemas, as far as they bind: what is required, and of which type.
TEXT = {"type": "string"}
LINK = {
    "type": "object",
    "required": ["href"],
    "properties": dict.fromkeys(("href", "rel", "type", "hreflang", "title"), TEXT),
}
LINKS = {"type": "array", "items": LINK}
MOMENT = {"type": "string", "format": "date-time"}
STATUS = {
    "type": "object",
    "required": ["jobID", "status", "type", "processID"],
    "properties": {
        "processID": TEXT,
        "jobID": TEXT,
        "message": TEXT,
        "type": {"enum": ["process"]},
        "status": {"enum": ["accepted", "running", "successful", "failed", "dismissed"]},
        "progress": {"type": "integer", "minimum": 0, "maximum": 100},
        **dict.fromkeys(("created", "started", "finished", "updated"), MOMENT),
        "links": LINKS,
    },
}
SUMMARY = {
    "type": "object",
    "required": ["id", "version"],
    "properties": {
        "id": TEXT,
        "version": TEXT,
        "title": TEXT,
        "description": TEXT,
        "keywords": {"type": "array", "items": TEXT},
        "jobControlOptions": {
            "type": "array",
            "items": {"enum": ["sync-execute", "async-execute", "dismiss"]},
        },
        "outputTransmission": {"type": "array", "items": {"enum": ["value", "reference"]}},
        "links": LINKS,
    },
}
EXCEPTION = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": TEXT, "title": TEXT, "detail": TEXT, "status": {"type": "integer"}},
}
RESULTS = {
    "type": "object",
    "additionalProperties": {
        "oneOf": [
            LINK,
            {
                "type": "object",
                "required": ["value"],
                "not": {"required": ["href"]},
                "properties": {"mediaType": TEXT, "encoding": TEXT},
            },
        ]
    },
}
KEYWORDS = {
    "title", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum",
    "maxLength", "minLength", "pattern", "maxItems", "minItems", "uniqueItems", "maxProperties",
    "minProperties", "required", "enum", "type", "not", "allOf", "oneOf", "anyOf", "items",
    "properties", "additionalProperties", "description", "format", "default", "nullable",
    "readOnly", "writeOnly", "example", "deprecated", "contentMediaType", "contentEncoding",
    "contentSchema",
}  # fmt: skip
"""Keywords of a schema in a process description; no others are allowed."""


def conforms(document: Any, schema: dict[str, Any]) -> Any:
    checker = json_schema().Draft202012Validator.FORMAT_CHECKER
    json_schema().Draft202012Validator(schema, format_checker=checker).validate(document)
    return document


def each_schema(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and those within it."""
    yield schema
    inner = [*schema.get("oneOf", ()), *schema.get("anyOf", ())]
    inner += schema.get("properties", {}).values()
    inner += [schema[key] for key in ("items", "additionalProperties") if key in schema]
    for one in inner:
        if isinstance(one, dict):
            yield from each_schema(one)


# Fixtures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def files(folder: Path) -> Files:
    return stack(folder, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def links(folder: Path, files: Files) -> list[dict[str, str]]:
    return [{"href": str(folder / name), "type": "image/tiff"} for _, (name, *_) in files]


@pytest.fixture(scope="module")
def values(files: Files) -> list[dict[str, str]]:
    """The files by value, which have no names and so no dates."""
    return [
        {"value": base64.b64encode(content).decode(), "mediaType": "image/tiff"}
        for _, (_, content, _) in files
    ]


@pytest.fixture(scope="module")
def dates(files: Files) -> list[str]:
    return [name[len("scene_") :][:10] for _, (name, *_) in files]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with Gate(tmp_path_factory.mktemp("gate") / "held").installed() as gate:
        yield gate


@pytest.fixture(scope="module")
def api(
    tmp_path_factory: pytest.TempPathFactory, state: Path, folder: Path
) -> Iterator[httpx.Client]:
    zoo = zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))
    with served(
        model_dir=zoo, state_dir=state, allowed_roots=(folder,), sync_max_pixels=HEIGHT * WIDTH
    ) as client:
        yield client


def execute(
    api: httpx.Client, task: str = "classify-pixels", *, headers: Any = (), **body: Any
) -> httpx.Response:
    return api.post(f"/processes/{task}/execution", json=body, headers=dict(headers))


def job_of(response: httpx.Response) -> str:
    assert response.status_code == 201, response.text
    return str(response.json()["jobID"])


def problem_of(response: httpx.Response, status: int, kind: str | None = None) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json"
    assert response.status_code == status, response.text
    document = conforms(response.json(), EXCEPTION)
    if kind is not None:
        assert document["type"] == f"{EXCEPTIONS}/{kind}"
    return dict(document)


def plain(api: httpx.Client, files: Files, accept: str = "", **data: Any) -> httpx.Response:
    """The response of the task's own path."""
    response = api.post("/classify-pixels", files=files, data=data, headers={"Accept": accept})
    assert response.status_code == 200, response.text
    return response


def raster(content: bytes) -> np.ndarray:
    with rasterio.MemoryFile(content) as memory, memory.open() as file:
        return np.asarray(file.read())


def parts_of(response: httpx.Response) -> dict[str, email.message.Message]:
    """The parts of a multipart response by Content-ID, by the standard library's parser."""
    head = b"Content-Type: " + response.headers["content-type"].encode() + b"\r\n\r\n"
    message = email.message_from_bytes(head + response.content)
    assert message.get_content_type() == "multipart/related"
    assert not message.defects
    return {str(part["Content-ID"]): part for part in message.get_payload()}  # type: ignore[union-attr,misc]


def linked(response: httpx.Response, rel: str) -> dict[str, str]:
    """Targets of `Link` headers of a relation, by title."""
    found = re.findall(r'<([^>]*)>; rel="([^"]*)"(?:; title="([^"]*)")?', response.headers["link"])
    return {title: target for target, relation, title in found if relation == rel}


# The declaration -----------------------------------------------------------------------------


def test_every_requirement_of_a_declared_class_has_a_test() -> None:
    prefix = "http://www.opengis.net/spec/ogcapi-processes-1/1.0/conf/"
    declared = {uri.removeprefix(prefix) for uri in conformance_classes(callbacks=True)}
    assert declared == set(CLASSES)
    for name, requirements in CLASSES.items():
        for requirement in requirements.split():
            test = re.sub("[-/]", "_", f"test_req_{name}_{requirement}")
            assert test in globals(), test


# Core: what the API is -----------------------------------------------------------------------


def test_req_core_http(api: httpx.Client) -> None:
    response = api.get("/conformance")
    assert response.http_version == "HTTP/1.1"
    assert api.head("/processes").headers["content-type"] == "application/json"
    assert api.put("/processes").headers["allow"] == "GET, HEAD"


def test_req_core_landingpage_op(api: httpx.Client) -> None:
    assert api.get("/").status_code == 200


def test_req_core_landingpage_success(api: httpx.Client) -> None:
    page = api.get("/").json()
    relations = {link["rel"] for link in conforms(page["links"], LINKS)}
    assert relations >= {
        "service-desc",
        "service-doc",
        f"{OGC}/rel/ogc/1.0/conformance",
        f"{OGC}/rel/ogc/1.0/processes",
        f"{OGC}/rel/ogc/1.0/job-list",
    }
    for link in page["links"]:
        response = api.get(link["href"], headers={"Accept": link["type"]})
        assert (response.status_code, response.headers["content-type"].partition(";")[0]) == (
            200,
            link["type"],
        )


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html"),
        ("text/html", "text/html"),
    ],
)
def test_a_browser_gets_the_explorer_and_a_program_the_landing_page(
    api: httpx.Client, accept: str, kind: str
) -> None:
    response = api.get("/", headers={"Accept": accept})
    assert response.headers["content-type"].partition(";")[0] == kind
    assert response.headers["vary"] == "Accept"


def test_req_core_api_definition_op(api: httpx.Client) -> None:
    for link in api.get("/").json()["links"]:
        if link["rel"].startswith("service-"):
            assert api.get(link["href"]).status_code == 200


def test_req_core_api_definition_success(api: httpx.Client) -> None:
    document = api.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert set(document["paths"]) >= {
        "/conformance",
        "/processes",
        "/processes/{process_id}",
        "/processes/{process_id}/execution",
        "/jobs",
        "/jobs/{job_id}",
        "/jobs/{job_id}/results",
    }


def test_req_core_conformance_op(api: httpx.Client) -> None:
    assert api.get("/conformance").status_code == 200


def test_req_core_conformance_success(api: httpx.Client) -> None:
    assert api.get("/conformance").json() == {"conformsTo": conformance_classes(callbacks=False)}


# Core: processes -----------------------------------------------------------------------------


def test_req_core_process_list(api: httpx.Client) -> None:
    assert api.get("/processes").status_code == 200


def test_req_core_process_list_success(api: httpx.Client) -> None:
    document = api.get("/processes").json()
    assert [conforms(one, SUMMARY)["id"] for one in document["processes"]] == list(PROCESSES)
    conforms(document["links"], LINKS)


def parameter(api: httpx.Client, path: str, name: str) -> dict[str, Any]:
    found = api.get("/openapi.json").json()["paths"][path]["get"]["parameters"]
    one = next(p for p in found if p["name"] == name)
    assert (one["in"], one.get("required", False)) == ("query", False)
    return dict(one["schema"])


def test_req_core_pl_limit_definition(api: httpx.Client) -> None:
    schema = parameter(api, "/processes", "limit")
    assert (schema["type"], schema["minimum"], schema["maximum"]) == ("integer", 1, 10_000)
    assert schema["default"] == 10
    assert api.get("/processes", params={"limit": 0}).status_code == 422


def test_req_core_pl_limit_response(api: httpx.Client) -> None:
    found, url = [], "/processes?limit=3"
    while url:
        page = api.get(url).json()
        assert len(page["processes"]) <= 3
        found += [one["id"] for one in page["processes"]]
        url = next((link["href"] for link in page["links"] if link["rel"] == "next"), "")
    assert found == list(PROCESSES)


def test_req_core_pl_links(api: httpx.Client) -> None:
    rels = [link["rel"] for link in api.get("/processes").json()["links"]]
    assert rels == ["self"]  # JSON is the only type


def test_req_core_process(api: httpx.Client) -> None:
    for one in api.get("/processes").json()["processes"]:
        own = next(link["href"] for link in one["links"] if link["rel"] == "self")
        assert api.get(own).json()["id"] == one["id"]


def test_req_core_process_success(api: httpx.Client) -> None:
    for task in PROCESSES:
        conforms(api.get(f"/processes/{task}").json(), SUMMARY)


def test_req_core_process_exception_no_such_process(api: httpx.Client) -> None:
    problem_of(api.get("/processes/nothing"), 404, "no-such-process")
    problem_of(execute(api, "nothing", inputs={}), 404, "no-such-process")
    problem_of(api.get("/jobs", params={"processID": "nothing"}), 404, "no-such-process")


# Core: execution, inputs ---------------------------------------------------------------------


def test_req_core_process_execute_op(api: httpx.Client, links: Any) -> None:
    for task in PROCESSES:
        places = {"points": POINTS} if task == "similar" else {}
        response = execute(api, task, inputs={"files": links, **places}, outputs=NUMBERS)
        assert response.json()["task"] == task


NUMBERS: dict[str, Any] = {"summary": {}}


def test_req_core_process_execute_request(api: httpx.Client, links: Any) -> None:
    whole = {
        "inputs": {"files": links},
        "outputs": {
            "class": {"format": {"mediaType": "image/tiff"}, "transmissionMode": "value"},
            "summary": {},
        },
        "response": "document",
    }
    assert api.post("/processes/classify-pixels/execution", json=whole).status_code == 200
    for wrong in (
        {"inputs": []},
        {"outputs": {"class": {"transmissionMode": "carrier pigeon"}}},
        {"outputs": {"class": {"format": {"mediaType": "image/png"}}}},
        {"outputs": {"features": {}}},
        {"outputs": {"nothing": {}}},
        {"response": "cooked"},
        {"mode": "async"},
        {"subscriber": {"successUri": "http://127.0.0.1/"}},  # the client waits
        {"subscriber": {"failedUri": "http://127.0.0.1/"}},
    ):
        found = problem_of(execute(api, **{"inputs": {"files": links}, **wrong}), 422)
        assert found["errors"][0]["field"].partition(".")[0] == next(iter(wrong)), found
    form = api.post("/processes/classify-pixels/execution", data={"inputs": "{}"})
    assert problem_of(form, 415)["code"] == "unsupported_media_type"


def test_req_core_process_execute_inputs(
    api: httpx.Client, files: Files, links: Any, values: Any, dates: list[str]
) -> None:
    expected = plain(api, files).content
    for inputs in ({"files": links}, {"files": values, "dates": dates}):
        response = execute(api, inputs=inputs, outputs={"class": {}})
        assert response.status_code == 200, response.text
        assert response.content == expected
    mixed = execute(
        api, inputs={"files": [*links[:2], *values[2:]], "dates": dates}, outputs={"class": {}}
    )
    assert mixed.content == expected


def test_a_reference_is_checked_as_everywhere(api: httpx.Client, links: Any, folder: Path) -> None:
    for href in ("/etc/passwd", f"{folder}/nothing.tif", "http://127.0.0.1/a.tif", "ftp://a/b"):
        response = execute(api, inputs={"files": [links[0], {"href": href}]})
        found = problem_of(response, 403)
        assert found["code"] == "forbidden_reference"
        assert "inputs.files.1.href" in found["detail"]


def test_any_input_may_be_a_reference(api: httpx.Client, links: Any, folder: Path) -> None:
    where = folder / "points.json"
    where.write_text(json.dumps(POINTS))
    inline = execute(api, inputs={"files": links, "points": POINTS})
    assert inline.headers["content-type"] == "application/geo+json"
    there = execute(api, inputs={"files": links, "points": {"href": str(where)}})
    assert there.json() == inline.json()
    where.write_text("[" * 100_000)
    nested = execute(api, inputs={"files": links, "points": {"href": str(where)}})
    assert problem_of(nested, 422)["errors"][0]["field"] == "inputs.points.href"


POINTS = {
    "type": "FeatureCollection",
    "features": [
        {"type": "Feature", "id": 7, "geometry": {"type": "Point", "coordinates": [3.001, 50.551]}}
    ],
}


def test_req_core_process_execute_input_array(api: httpx.Client, links: Any) -> None:
    known = api.get("/processes/classify-pixels").json()["inputs"]
    assert {n for n, i in known.items() if i["maxOccurs"] != 1} == {
        "files",
        "series",
        "dates",
        "bands",
    }
    for given in (links, links[:1], links[0]):
        response = execute(api, "landcover", inputs={"files": given}, outputs=NUMBERS)
        assert len(response.json()["dates_used"]) == (1 if given != links else len(links))
    for given in (ENTRY, [ENTRY], {"value": ENTRY}, [{"value": ENTRY}]):
        response = execute(api, inputs={"series": given})
        assert [found["id"] for found in response.json()["results"]] == ["a"], response.text


def test_req_core_process_execute_input_inline_object(api: httpx.Client, links: Any) -> None:
    plainly = execute(api, inputs={"files": links, "points": POINTS})
    qualified = {"value": POINTS, "mediaType": "application/geo+json"}
    assert execute(api, inputs={"files": links, "points": qualified}).json() == plainly.json()
    wrong = execute(api, inputs={"files": links, "points": {**qualified, "mediaType": "text/xml"}})
    assert problem_of(wrong, 422)["errors"][0]["field"] == "inputs.points.mediaType"


def fields_of() -> geopandas.GeoDataFrame:
    boxes = [shapely.box(500_010, 5_599_850, 500_100, 5_599_990)]
    return geopandas.GeoDataFrame({"name": ["a"]}, geometry=boxes, crs=UTM)


def test_req_core_process_execute_input_mixed_type(
    api: httpx.Client, links: Any, tmp_path: Path, folder: Path
) -> None:
    frame = fields_of()
    geojson = json.loads(frame.to_crs(4326).to_json())
    frame.to_file(tmp_path / "a.gpkg")
    frame.to_parquet(folder / "a.parquet")
    package = base64.b64encode((tmp_path / "a.gpkg").read_bytes()).decode()
    found = [
        execute(api, inputs={"files": links, "fields": given}).json()["features"][0]["properties"]
        for given in (
            {"value": geojson, "mediaType": "application/geo+json"},
            {"value": package, "mediaType": "application/geopackage+sqlite3"},
            {"href": str(folder / "a.parquet"), "type": "application/vnd.apache.parquet"},
        )
    ]
    assert [one["pixels"] for one in found] == pytest.approx([found[1]["pixels"]] * 3, rel=1e-3)
    assert {one["class"] for one in found} == {found[0]["class"]}
    other = {"value": package, "mediaType": "application/x-shapefile"}
    response = execute(api, inputs={"files": links, "fields": other})
    assert problem_of(response, 422)["errors"][0]["field"] == "inputs.fields.mediaType"


def test_req_core_process_execute_input_inline_binary(
    api: httpx.Client, files: Files, values: Any, dates: list[str]
) -> None:
    texts = [value["value"] for value in values]  # without what qualifies them
    response = execute(api, inputs={"files": texts, "dates": dates}, outputs={"class": {}})
    assert response.content == plain(api, files).content
    for wrong, why in (("%%%", "not valid base64"), ("", "empty"), (7, "base64 value is required")):
        found = problem_of(execute(api, inputs={"files": [texts[0], wrong]}), 422)
        assert found["errors"][0]["field"] == "inputs.files.1"
        assert why in found["errors"][0]["detail"]
    odd = {"value": texts[0], "encoding": "hex"}
    assert problem_of(execute(api, inputs={"files": odd}), 422)["code"] == "invalid_request"


def test_req_core_process_execute_input_inline_bbox(
    api: httpx.Client, files: Files, links: Any
) -> None:
    west, south, east, north = 3.0005, 50.551, 3.002, 50.5515
    flat = plain(api, files, bbox=f"{west},{south},{east},{north}")
    assert raster(flat.content).shape < (1, HEIGHT, WIDTH)
    for numbers, crs in (
        ([west, south, east, north], {}),
        ([west, south, east, north], {"crs": f"{OGC}/crs/OGC/1.3/CRS84"}),
        ([west, south, -5, east, north, 5], {"crs": f"{OGC}/crs/OGC/0/CRS84h"}),
    ):
        box = {"bbox": numbers, **crs}
        response = execute(api, inputs={"files": links, "bbox": box}, outputs={"class": {}})
        assert response.content == flat.content
    box = {"bbox": [0, 0, 1, 1], "crs": f"{OGC}/crs/EPSG/0/32631"}
    found = problem_of(execute(api, inputs={"files": links, "bbox": box}), 422)
    assert found["errors"][0]["field"] == "inputs.bbox.crs"


def test_req_core_process_execute_input_validation(
    api: httpx.Client, links: Any, folder: Path
) -> None:
    for wrong, fields in (
        ({"smooth": 99}, ["smooth"]),
        ({"smooth": "two"}, ["smooth"]),
        ({"start": "yesterday", "min_area": -1}, ["start", "min_area"]),
        ({"points": {"type": "Point"}}, ["points.type", "points.features"]),
        ({"area": {"type": "Polygon", "coordinates": []}}, None),
        ({"strat": "2021-01-01"}, ["strat"]),
        ({"outputs": ["class"]}, ["outputs"]),
        ({"items": links}, ["items"]),
    ):
        found = problem_of(execute(api, inputs={"files": links, **wrong}), 422)
        named = [error["field"] for error in found["errors"]]
        assert all(name.startswith("inputs.") for name in named)
        if fields is not None:
            assert sorted(named) == sorted(f"inputs.{field}" for field in fields)
    (folder / "smooth.json").write_text("99")  # by reference as in line
    there = {"href": str(folder / "smooth.json")}
    found = problem_of(execute(api, inputs={"files": links, "smooth": there}), 422)
    assert found["errors"][0]["field"] == "inputs.smooth"
    for sources in ({}, {"files": links, "series": []}, {"files": []}):
        assert problem_of(execute(api, inputs=sources), 422)["errors"]


# Core: execution, modes and outputs ----------------------------------------------------------


def test_req_core_process_execute_default_execution_mode(
    api: httpx.Client, links: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    options = api.get("/processes/classify-pixels").json()["jobControlOptions"]
    assert options == ["sync-execute", "async-execute", "dismiss"]
    assert execute(api, inputs={"files": links}, outputs=NUMBERS).status_code == 200


def test_a_request_over_the_limit_is_not_made_a_job_unasked(
    api: httpx.Client, folder: Path
) -> None:
    (folder / "large").mkdir()
    stack(folder / "large", HEIGHT + 1, WIDTH)
    large = [{"href": str(path)} for path in sorted((folder / "large").iterdir())]
    before = len(api.get("/jobs").json()["jobs"])
    found = problem_of(execute(api, inputs={"files": large}, outputs=NUMBERS), 422)
    assert found["errors"][0]["field"] == "Prefer"
    assert "respond-async" in found["detail"]
    assert len(api.get("/jobs").json()["jobs"]) == before
    job = job_of(execute(api, inputs={"files": large}, outputs=NUMBERS, headers=ASYNC))
    assert waited(api, job)["status"] == "successful"


def test_req_core_process_execute_auto_execution_mode(api: httpx.Client, links: Any) -> None:
    response = execute(api, inputs={"files": links}, outputs=NUMBERS, headers=ASYNC)
    assert (response.status_code, response.headers["preference-applied"]) == (201, "respond-async")
    waited(api, job_of(response))


def test_req_core_process_execute_default_outputs(
    api: httpx.Client, links: Any, files: Files
) -> None:
    parts = parts_of(execute(api, inputs={"files": links}))
    assert list(parts) == [*MAPS, "polygons", "summary"]
    summary = json.loads(parts["summary"].get_payload(decode=True))
    own = plain(api, files, "application/json", outputs=",".join((*MAPS, "polygons"))).json()
    assert summary["classes"] == own["classes"]


def test_req_core_process_execute_sync_raw_value_one(
    api: httpx.Client, links: Any, files: Files
) -> None:
    for output, media, accept in (
        ("class", COG, ""),
        ("summary", "application/json", "application/json"),
    ):
        response = execute(api, inputs={"files": links}, outputs={output: {}}, response="raw")
        assert (response.status_code, response.headers["content-type"]) == (200, media)
        own = plain(api, files, accept)
        assert response.content == own.content
        assert response.headers["pimc-model"] == own.headers["pimc-model"]
    wanted = {"polygons": {"format": {"mediaType": "application/geo+json"}}}
    response = execute(api, inputs={"files": links}, outputs=wanted)
    assert response.headers["content-type"] == "application/geo+json"
    own = plain(api, files, "application/geo+json", outputs="polygons")
    assert response.json()["features"] == own.json()["features"]


def test_req_core_process_execute_sync_raw_value_multi(
    api: httpx.Client, links: Any, files: Files
) -> None:
    response = execute(api, inputs={"files": links}, outputs={"class": {}, "confidence": {}})
    parts = parts_of(response)
    assert list(parts) == ["class", "confidence"]
    for name, part in parts.items():
        assert part["Content-Type"] == COG
        assert part.get_payload(decode=True) == plain(api, files, outputs=name).content


def test_req_core_process_execute_sync_raw_ref(api: httpx.Client, links: Any, files: Files) -> None:
    by_reference = {"transmissionMode": "reference"}
    wanted = {"class": by_reference, "summary": by_reference}
    response = execute(api, inputs={"files": links}, outputs=wanted)
    assert (response.status_code, response.content) == (204, b"")
    found = linked(response, "item")
    assert list(found) == ["class", "summary"]
    assert api.get(found["class"]).content == plain(api, files).content
    assert api.get(found["summary"]).json()["task"] == "classify-pixels"
    assert problem_of(api.get(f"{found['class']}ified"), 404)["code"] == "not_found"


def test_req_core_process_execute_sync_raw_mixed_multi(
    api: httpx.Client, links: Any, files: Files
) -> None:
    response = execute(
        api,
        inputs={"files": links},
        outputs={"class": {"transmissionMode": "reference"}, "confidence": {}},
    )
    parts = parts_of(response)
    assert parts["class"].get_payload(decode=True).strip() == b""
    assert api.get(parts["class"]["Content-Location"]).content == plain(api, files).content
    own = plain(api, files, outputs="confidence").content
    assert parts["confidence"].get_payload(decode=True) == own


def test_req_core_process_execute_sync_document(
    api: httpx.Client, links: Any, files: Files
) -> None:
    response = execute(
        api,
        inputs={"files": links},
        outputs={
            "class": {},
            "confidence": {"transmissionMode": "reference"},
            "summary": {},
        },
        response="document",
    )
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    document = conforms(response.json(), RESULTS)
    assert base64.b64decode(document["class"]["value"]) == plain(api, files).content
    assert document["class"]["mediaType"] == COG
    assert document["summary"]["value"]["task"] == "classify-pixels"
    own = plain(api, files, outputs="confidence").content
    assert api.get(document["confidence"]["href"]).content == own


def test_tables_are_values_too(api: httpx.Client, links: Any) -> None:
    fields = json.loads(fields_of().to_crs(4326).to_json())
    wanted = {"features": {"format": {"mediaType": "text/csv"}}}
    inputs = {"files": links, "fields": fields}
    raw = execute(api, inputs=inputs, outputs=wanted)
    assert raw.headers["content-type"].startswith("text/csv")
    held = execute(api, inputs=inputs, outputs=wanted, response="document").json()
    assert held["features"]["value"].encode() == raw.content
    wanted["features"]["format"]["mediaType"] = "application/vnd.apache.parquet"
    table = geopandas.read_parquet(io.BytesIO(execute(api, inputs=inputs, outputs=wanted).content))
    assert list(table["name"]) == ["a"]


def test_a_forecast_has_quantiles_as_input(api: httpx.Client, links: Any, files: Files) -> None:
    data = {"outputs": "q10,q90", "horizon": "2"}
    own = api.post("/forecast", files=files, data=data)
    inputs = {"files": links, "quantiles": ["q10", "q90"], "horizon": 2}
    response = execute(api, "forecast", inputs=inputs, outputs={"forecast": {}})
    assert response.content == own.content
    found = problem_of(execute(api, "forecast", inputs={**inputs, "quantiles": ["q50", "q1"]}), 422)
    assert found["errors"][0]["field"] == "inputs.quantiles.1"


def test_stac_items_are_an_input(api: httpx.Client, folder: Path, links: Any) -> None:
    nothing = execute(api, inputs={"stac": {"href": "http://127.0.0.1:9/items.json"}})
    assert problem_of(nothing, 403)["code"] == "forbidden_reference"
    document = {"value": {"type": "FeatureCollection", "features": []}}
    assert problem_of(execute(api, inputs={"stac": document}), 422)["errors"]


def test_req_core_job_results_success_sync(api: httpx.Client, links: Any) -> None:
    """Only a run whose response links to its outputs is kept as a job."""
    before = len(api.get("/jobs").json()["jobs"])
    assert "link" not in execute(api, inputs={"files": links}, outputs=NUMBERS).headers
    assert len(api.get("/jobs").json()["jobs"]) == before
    wanted = {"summary": {"transmissionMode": "reference"}}
    response = execute(api, inputs={"files": links}, outputs=wanted, response="document")
    (monitor,) = linked(response, "monitor").values()
    done = conforms(api.get(monitor).json(), STATUS)
    assert (done["status"], done["progress"]) == ("successful", 100)
    assert api.get(f"{monitor}/results").json() == response.json()
    assert api.get(f"{monitor}/result").headers["content-type"] == COG


def test_a_kept_run_takes_the_callers_share(tmp_path: Path, folder: Path, links: Any) -> None:
    zoo = zoo_with_a_held_model(tmp_path)
    wanted = {"summary": {"transmissionMode": "reference"}}
    with served(
        model_dir=zoo,
        allowed_roots=(folder,),
        api_keys=("one", "two"),
        max_pixels_per_day=HEIGHT * WIDTH * 3 // 2,
        max_storage_per_caller=3000,
    ) as api:
        own, other = {"X-API-Key": "one"}, {"X-API-Key": "two"}
        assert problem_of(execute(api, inputs={"files": links}), 401)["code"] == "unauthorized"
        once = execute(api, inputs={"files": links}, outputs=wanted, headers=own)
        assert once.status_code == 204
        (monitor,) = linked(once, "monitor").values()
        problem_of(api.get(f"{monitor}/results", headers=other), 404, "no-such-job")
        again = execute(api, inputs={"files": links}, outputs=wanted, headers=own)
        assert problem_of(again, 429)["violated-policies"] == ["storage"]
        assert len(api.get("/jobs", headers=own).json()["jobs"]) == 1
        plainly = execute(api, inputs={"files": links}, outputs=NUMBERS, headers=own)
        assert problem_of(plainly, 429)["violated-policies"] == ["pixels"]
        assert (
            execute(api, inputs={"files": links}, outputs=NUMBERS, headers=other).status_code == 200
        )


# Core: jobs ----------------------------------------------------------------------------------


def test_req_core_process_execute_success_async(api: httpx.Client, links: Any) -> None:
    response = execute(api, inputs={"files": links}, outputs=NUMBERS, headers=ASYNC)
    assert response.status_code == 201
    status = conforms(response.json(), STATUS)
    assert response.headers["location"] == f"/jobs/{status['jobID']}"
    assert status["status"] == "accepted"
    waited(api, status["jobID"])


def test_a_repeat_with_the_same_key_is_the_same_job(api: httpx.Client, links: Any) -> None:
    headers = {**ASYNC, "Idempotency-Key": "once"}
    body = {"inputs": {"files": links}, "outputs": NUMBERS}
    first = job_of(execute(api, **body, headers=headers))
    assert job_of(execute(api, **body, headers=headers)) == first
    other = execute(api, **body, response="document", headers=headers)
    assert problem_of(other, 422)["errors"][0]["field"] == "Idempotency-Key"
    waited(api, first)


def test_req_core_job(api: httpx.Client, links: Any) -> None:
    response = execute(api, inputs={"files": links}, outputs=NUMBERS, headers=ASYNC)
    assert api.get(response.headers["location"]).status_code == 200
    waited(api, job_of(response))


def test_req_core_job_success(api: httpx.Client, links: Any, gate: Gate) -> None:
    inputs = {"files": links, "model": HELD}
    with gate.held():
        job = job_of(execute(api, inputs=inputs, outputs={"class": {}}, headers=ASYNC))
        conforms(api.get(f"/jobs/{job}").json(), STATUS)
    done = conforms(waited(api, job), STATUS)
    assert done["status"] == "successful"
    targets = [k["href"] for k in done["links"] if k["rel"] == f"{OGC}/rel/ogc/1.0/results"]
    assert targets[0] == f"/jobs/{job}/results"


def test_req_core_job_exception_no_such_job(api: httpx.Client) -> None:
    problem_of(api.get("/jobs/nothing"), 404, "no-such-job")


def finished(api: httpx.Client, links: Any, **body: Any) -> httpx.Response:
    """The results of an execution as a job."""
    job = job_of(execute(api, inputs={"files": links}, headers=ASYNC, **body))
    assert waited(api, job)["status"] == "successful"
    return api.get(f"/jobs/{job}/results")


def test_req_core_job_results(api: httpx.Client, links: Any) -> None:
    assert finished(api, links, outputs=NUMBERS).status_code == 200


def test_a_job_of_another_path_has_links_as_results(api: httpx.Client, files: Files) -> None:
    data = {"outputs": "class,confidence"}
    job = api.post("/classify-pixels", files=files, data=data, headers=ASYNC).json()["jobID"]
    waited(api, job)
    document = conforms(api.get(f"/jobs/{job}/results").json(), RESULTS)
    assert list(document) == ["class", "confidence", "summary"]
    assert api.get(document["class"]["href"]).content == plain(api, files).content
    assert api.get(document["summary"]["href"]).json()["task"] == "classify-pixels"


def test_req_core_job_results_async_raw_value_one(
    api: httpx.Client, links: Any, files: Files
) -> None:
    response = finished(api, links, outputs={"class": {}})
    assert (response.status_code, response.headers["content-type"]) == (200, COG)
    assert response.content == plain(api, files).content


def test_req_core_job_results_async_raw_value_multi(
    api: httpx.Client, links: Any, files: Files
) -> None:
    response = finished(api, links)
    parts = parts_of(response)
    assert list(parts) == [*MAPS, "polygons", "summary"]
    assert parts["class"].get_payload(decode=True) == plain(api, files).content
    again = api.get(str(response.url), headers={"Range": "bytes=0-9"})
    assert (again.status_code, again.content) == (206, response.content[:10])


def test_req_core_job_results_async_raw_ref(api: httpx.Client, links: Any, files: Files) -> None:
    response = finished(api, links, outputs={"class": {"transmissionMode": "reference"}})
    assert (response.status_code, response.content) == (204, b"")
    assert api.get(linked(response, "item")["class"]).content == plain(api, files).content


def test_req_core_job_results_async_raw_mixed_multi(
    api: httpx.Client, links: Any, files: Files
) -> None:
    wanted = {"class": {"transmissionMode": "reference"}, "summary": {}}
    parts = parts_of(finished(api, links, outputs=wanted))
    assert api.get(parts["class"]["Content-Location"]).content == plain(api, files).content
    assert json.loads(parts["summary"].get_payload(decode=True))["task"] == "classify-pixels"


def test_req_core_job_results_async_document(api: httpx.Client, links: Any, files: Files) -> None:
    wanted = {"class": {}, "summary": {"transmissionMode": "reference"}}
    response = finished(api, links, outputs=wanted, response="document")
    document = conforms(response.json(), RESULTS)
    assert base64.b64decode(document["class"]["value"]) == plain(api, files).content
    assert api.get(document["summary"]["href"]).json()["task"] == "classify-pixels"


def test_req_core_job_results_exception_no_such_job(api: httpx.Client) -> None:
    problem_of(api.get("/jobs/nothing/results"), 404, "no-such-job")
    problem_of(api.get("/jobs/nothing/results/class"), 404, "no-such-job")


def test_req_core_job_results_exception_results_not_ready(
    api: httpx.Client, links: Any, gate: Gate
) -> None:
    inputs = {"files": links, "model": HELD}
    with gate.held():
        job = job_of(execute(api, inputs=inputs, outputs={"class": {}}, headers=ASYNC))
        problem_of(api.get(f"/jobs/{job}/results"), 404, "result-not-ready")
        problem_of(api.get(f"/jobs/{job}/results/class"), 404, "result-not-ready")
        # The service's own path keeps its status.
        problem_of(api.get(f"/jobs/{job}/result"), 409, "result-not-ready")
    waited(api, job)
    assert api.get(f"/jobs/{job}/results").status_code == 200


def test_req_core_job_results_failed(
    api: httpx.Client, folder: Path, files: Files, gate: Gate
) -> None:
    """A file by reference that is gone when its job runs."""
    (folder / "short").mkdir()
    stack(folder / "short", HEIGHT, WIDTH)
    paths = sorted((folder / "short").iterdir())
    inputs = {"files": [{"href": str(path)} for path in paths]}
    whole = [{"href": str(folder / name)} for _, (name, *_) in files]
    with gate.held():
        # The workers are busy, so that the files can go while the job waits.
        before = [
            job_of(
                execute(
                    api, inputs={"files": whole, "model": HELD}, outputs={"class": {}},
                    headers=ASYNC,
                )
            )
            for _ in range(api.get("/health/ready").json()["workers"])
        ]  # fmt: skip
        job = job_of(execute(api, inputs=inputs, outputs={"class": {}}, headers=ASYNC))
        for path in paths:
            path.unlink()
    done = waited(api, job)
    assert (done["status"], "does not name a file" in done["message"]) == ("failed", True)
    found = problem_of(api.get(f"/jobs/{job}/results"), 403)
    assert found["code"] == "forbidden_reference"
    problem_of(api.get(f"/jobs/{job}/results/class"), 403)
    for one in before:
        waited(api, one)


def test_req_core_test_process(api: httpx.Client) -> None:
    """A process that can be executed from its description alone."""
    known = api.get("/processes/embed").json()["inputs"]["series"]["schema"]
    conforms(ENTRY, known)
    assert execute(api, "embed", inputs={"series": [ENTRY]}).json()["results"][0]["status"] == "ok"


# Process descriptions ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def descriptions(api: httpx.Client) -> list[dict[str, Any]]:
    return [api.get(f"/processes/{task}").json() for task in PROCESSES]


def schemas_of(descriptions: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [one["schema"] for process in descriptions for one in process[part].values()]


def check_schemas(schemas: list[dict[str, Any]]) -> None:
    for schema in schemas:
        for one in each_schema(schema):
            assert set(one) <= KEYWORDS, one
            assert one.get("type", "object") in {
                "array", "boolean", "integer", "number", "object", "string",
            }  # fmt: skip
            for key in ("exclusiveMinimum", "exclusiveMaximum", "nullable"):
                assert isinstance(one.get(key, False), bool)
            assert one.get("required", ["x"])
        json_schema().Draft4Validator.check_schema(schema)


def test_req_ogc_process_description_json_encoding(descriptions: list[dict[str, Any]]) -> None:
    part = {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {
            "type": "object",
            "required": ["schema"],
            "properties": {
                "title": TEXT,
                "description": TEXT,
                "schema": {"type": "object"},
                "minOccurs": {"type": "integer"},
                "maxOccurs": {"oneOf": [{"type": "integer"}, {"enum": ["unbounded"]}]},
            },
        },
    }
    process = {"allOf": [SUMMARY, {"properties": {"inputs": part, "outputs": part}}]}
    for one in descriptions:
        conforms(one, process)


def test_req_ogc_process_description_inputs_def(descriptions: list[dict[str, Any]]) -> None:
    for one in descriptions:
        fields = set(ITEMS[one["id"]].model_fields) - {"items", "outputs", "subscriber"}
        more = {"files", "stac"} | ({"series"} if one["id"] in SERIES else set())
        more |= {"quantiles"} if one["id"] == "forecast" else set()
        more |= {"attribution"} if one["id"] == "classify-pixels" else set()
        assert set(one["inputs"]) == fields | more


def test_req_ogc_process_description_input_def(
    api: httpx.Client, links: Any, descriptions: list[dict[str, Any]]
) -> None:
    check_schemas(schemas_of(descriptions, "inputs"))
    known = descriptions[0]["inputs"]
    # Two outputs of all: polygons of noise would take longer than the rest.
    maps: dict[str, Any] = {"class": {}, "probabilities": {}}
    for name, good, bad in (
        ("smooth", [0, 10], [-1, 11, 1.5, "a"]),
        ("min_area", [0, 2.5], [-1, "a"]),
        ("layout", ["file-per-date"], ["sideways", 1]),
        ("model", ["pixels-landcover"], ["", 1]),
        ("mask", ["none"], [1]),
        ("scale", [0.0001, "2020-01-01:0.0001"], [{"a": 1}]),
        ("attribution", [False], ["a", 1]),
        ("dtype", ["uint8"], ["int8", 1]),
        ("points", [POINTS], [{"type": "Feature"}, {**POINTS, "features": []}]),
        ("bbox", [{"bbox": [3, 50, 4, 51]}], [{"bbox": [3, 50, 4]}, {"bbox": ["a"] * 4}]),
    ):
        validator = json_schema().Draft4Validator(known[name]["schema"])
        for value in good:
            assert validator.is_valid(value), (name, value)
            inputs = {"files": links, name: value}
            response = execute(api, inputs=inputs, outputs={} if name == "points" else maps)
            assert response.status_code == 200, response.text
        for value in bad:
            assert not validator.is_valid(value), (name, value)
            found = problem_of(execute(api, inputs={"files": links, name: value}), 422)
            assert found["errors"][0]["field"].split(".")[1] == name


def test_req_ogc_process_description_input_binary(descriptions: list[dict[str, Any]]) -> None:
    for one in descriptions:
        kinds = one["inputs"]["files"]["schema"]["oneOf"]
        assert all((kind["type"], kind["format"]) == ("string", "byte") for kind in kinds)


def test_req_ogc_process_description_input_mixed_type(descriptions: list[dict[str, Any]]) -> None:
    for one in descriptions:
        assert not any("anyOf" in schema for schema in schemas_of([one], "inputs"))
        for name in ("files", "fields", "stac", "scale"):
            assert len(one["inputs"][name]["schema"]["oneOf"]) > 1
        first = one["inputs"]["files"]["schema"]["oneOf"][0]
        assert first["contentMediaType"].startswith("image/tiff")


def test_req_ogc_process_description_outputs_def(descriptions: list[dict[str, Any]]) -> None:
    names = [set(one["outputs"]) for one in descriptions]
    maps = {*MAPS, "polygons", "summary", "features"}
    assert names == [
        maps | {"attribution", "series"},
        {"forecast", "summary", "features", "series"},
        maps,
        {"embedding", "summary", "features", "series"},
        {"similarity", "similarities", "summary"},
    ]


def test_req_ogc_process_description_output_def(
    api: httpx.Client, links: Any, descriptions: list[dict[str, Any]]
) -> None:
    check_schemas(schemas_of(descriptions, "outputs"))
    known = descriptions[0]["outputs"]
    summary = execute(api, inputs={"files": links}, outputs=NUMBERS).json()
    json_schema().Draft4Validator(known["summary"]["schema"]).validate(summary)
    features = execute(api, inputs={"files": links, "points": POINTS}).json()
    json_schema().Draft4Validator(known["features"]["schema"]["oneOf"][0]).validate(features)
    assert known["class"]["schema"]["contentMediaType"] == COG


def test_req_ogc_process_description_output_mixed_type(
    api: httpx.Client, links: Any, descriptions: list[dict[str, Any]]
) -> None:
    kinds = descriptions[0]["outputs"]["polygons"]["schema"]["oneOf"]
    for kind in kinds:
        wanted = {"polygons": {"format": {"mediaType": kind["contentMediaType"]}}}
        response = execute(api, inputs={"files": links}, outputs=wanted)
        assert response.headers["content-type"] == kind["contentMediaType"]
    response = execute(api, inputs={"files": links}, outputs={"polygons": {}})
    assert response.headers["content-type"] == kinds[0]["contentMediaType"]


# JSON ----------------------------------------------------------------------------------------


def test_req_json_definition(api: httpx.Client, links: Any) -> None:
    job = execute(api, inputs={"files": links}, outputs=NUMBERS, headers=ASYNC)
    held = execute(api, inputs={"files": links}, outputs=NUMBERS, response="document")
    paths = ("/", "/conformance", "/processes", "/processes/embed", f"/jobs/{job_of(job)}")
    found = [api.get(path, headers={"Accept": "application/json"}) for path in paths]
    for response in (*found, job, held):
        assert response.headers["content-type"] == "application/json"
        json.loads(response.content)
    waited(api, job_of(job))


# The list of jobs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, list[str]]]:
    """A service and its jobs, the newest first, which began at known times."""
    state = tmp_path_factory.mktemp("listed")
    zoo = zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))
    with served(model_dir=zoo, state_dir=state) as api:
        jobs = []
        for number, task in enumerate(("embed", "forecast", "embed")):
            job = job_of(execute(api, task, inputs={"series": ENTRY}, headers=ASYNC))
            waited(api, job)
            begun = datetime(2021, 5, 1 + number).astimezone().timestamp()
            change(
                state, "UPDATE jobs SET created = ?, started = ?, finished = ? WHERE id = ?",
                begun, begun, begun + 10 * (number + 1), job,
            )  # fmt: skip
            jobs.insert(0, job)
        api.delete(f"/jobs/{jobs[0]}")
        yield api, jobs


def ids(api: httpx.Client, **params: Any) -> list[str]:
    response = api.get("/jobs", params=params)
    assert response.status_code == 200, response.text
    return [job["jobID"] for job in response.json()["jobs"]]


def test_req_job_list_job_list_op(api: httpx.Client) -> None:
    assert api.get("/jobs").status_code == 200


def test_req_job_list_job_list_success(listed: tuple[httpx.Client, list[str]]) -> None:
    api, jobs = listed
    document = api.get("/jobs").json()
    assert [conforms(job, STATUS)["jobID"] for job in document["jobs"]] == jobs
    conforms(document["links"], LINKS)


def test_req_job_list_type_definition(api: httpx.Client) -> None:
    schema = parameter(api, "/jobs", "type")
    assert (schema["type"], schema["items"]["type"]) == ("array", "string")


def test_req_job_list_type_response(listed: tuple[httpx.Client, list[str]]) -> None:
    api, jobs = listed
    assert ids(api, type="process") == ids(api) == jobs
    assert ids(api, type="openEO") == []
    assert ids(api, type=["openEO", "process"]) == jobs


def test_req_job_list_processID_mandatory(  # noqa: N802 - the requirement's name
    listed: tuple[httpx.Client, list[str]],
) -> None:
    found = listed[0].get("/jobs").json()["jobs"]
    assert [job["processID"] for job in found] == ["embed", "forecast", "embed"]


def test_req_job_list_processID_definition(api: httpx.Client) -> None:  # noqa: N802
    schema = parameter(api, "/jobs", "processID")
    assert (schema["type"], schema["items"]["type"]) == ("array", "string")


def test_req_job_list_processid_response(listed: tuple[httpx.Client, list[str]]) -> None:
    api, jobs = listed
    assert ids(api, processID="forecast") == [jobs[1]]
    assert ids(api, processID=["forecast", "embed"]) == jobs
    assert ids(api, processID="forecast,embed") == jobs
    assert ids(api, processID="landcover") == []


def test_req_job_list_status_definition(api: httpx.Client) -> None:
    schema = parameter(api, "/jobs", "status")
    assert (schema["type"], schema["items"]["type"]) == ("array", "string")


def test_req_job_list_status_response(listed: tuple[httpx.Client, list[str]]) -> None:
    api, jobs = listed
    assert ids(api, status="dismissed") == [jobs[0]]
    assert ids(api, status="successful") == jobs[1:]
    assert ids(api, status=["successful", "dismissed"]) == jobs
    assert ids(api, status="running") == []
    assert api.get("/jobs", params={"status": "lost"}).status_code == 422


def test_req_job_list_datetime_definition(api: httpx.Client) -> None:
    schema = parameter(api, "/jobs", "datetime")
    assert {"type": "string"} in [{"type": one["type"]} for one in schema["anyOf"]]
    for wrong in ("yesterday", "../..", "2021-05-01/2021-06-01/2021-07-01", "2021-02-30"):
        assert problem_of(api.get("/jobs", params={"datetime": wrong}), 422)["errors"]


def test_req_job_list_datetime_response(listed: tuple[httpx.Client, list[str]]) -> None:
    api, jobs = listed
    moments = [datetime.fromisoformat(j["created"]) for j in api.get("/jobs").json()["jobs"]]
    second = moments[1].strftime("%Y-%m-%dT%H:%M:%SZ")
    before = (moments[1] - timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert ids(api, datetime=second) == [jobs[1]]
    assert ids(api, datetime=before) == []
    for interval, expected in (
        (f"{second}/..", jobs[:2]),
        (f"{second}/", jobs[:2]),
        (f"../{second}", jobs[1:]),
        (f"/{second}", jobs[1:]),
        (f"{before}/{second}", [jobs[1]]),
        ("2020-01-01T00:00:00Z/2020-12-31T00:00:00Z", []),
        ("2021", jobs),
        ("2021-04/2021-06", jobs),
        ("9999", []),
    ):
        assert ids(api, datetime=interval) == expected, interval


def test_req_job_list_duration_definition(api: httpx.Client) -> None:
    assert api.get("/jobs", params={"minDuration": 10**30}).status_code == 422
    for name in ("minDuration", "maxDuration"):
        schema = parameter(api, "/jobs", name)
        assert (schema["type"], schema["items"]["type"]) == ("array", "integer")


def test_req_job_list_duration_response(
    listed: tuple[httpx.Client, list[str]], api: httpx.Client, links: Any, gate: Gate, state: Path
) -> None:
    other, jobs = listed
    assert ids(other, minDuration=20) == jobs[:2]
    assert ids(other, maxDuration=20) == jobs[1:]
    assert ids(other, minDuration=15, maxDuration=25) == [jobs[1]]
    assert ids(other, minDuration=15, status="dismissed") == [jobs[0]]
    assert ids(other, minDuration=31) == []
    inputs = {"files": links, "model": HELD}
    with gate.held():
        job = job_of(execute(api, inputs=inputs, outputs={"class": {}}, headers=ASYNC))
        end = time.monotonic() + PATIENCE
        while api.get(f"/jobs/{job}").json()["status"] != "running":
            assert time.monotonic() < end
            time.sleep(0.01)
        assert ids(api, status="running", minDuration=3000) == []
        change(state, "UPDATE jobs SET started = started - 3600 WHERE id = ?", job)
        assert ids(api, status="running", minDuration=3000) == [job]
    waited(api, job)


def test_req_job_list_limit_definition(api: httpx.Client) -> None:
    schema = parameter(api, "/jobs", "limit")
    assert (schema["type"], schema["minimum"]) == ("integer", 1)
    assert schema["default"] <= schema["maximum"]


def test_req_job_list_limit_response(listed: tuple[httpx.Client, list[str]]) -> None:
    api, jobs = listed
    assert ids(api, limit=2) == jobs[:2]
    found, url = [], "/jobs?limit=1&processID=embed"
    while url:
        page = api.get(url).json()
        assert len(page["jobs"]) <= 1
        found += [job["jobID"] for job in page["jobs"]]
        url = next((link["href"] for link in page["links"] if link["rel"] == "next"), "")
    assert found == [jobs[0], jobs[2]]


def test_req_job_list_links(api: httpx.Client) -> None:
    for accept, other in (("application/json", "application/geo+json"),
                          ("application/geo+json", "application/json")):  # fmt: skip
        found = api.get("/jobs", headers={"Accept": accept}).json()["links"]
        kinds = {link["rel"]: link["type"] for link in found}
        assert (kinds["self"], kinds["alternate"]) == (accept, other)


# Dismissal -----------------------------------------------------------------------------------


def test_req_dismiss_job_dismiss_op(api: httpx.Client, links: Any) -> None:
    job = job_of(execute(api, inputs={"files": links}, outputs=NUMBERS, headers=ASYNC))
    assert api.delete(f"/jobs/{job}").status_code == 200
    problem_of(api.delete("/jobs/nothing"), 404, "no-such-job")


def test_req_dismiss_job_dismiss_success(api: httpx.Client, links: Any, gate: Gate) -> None:
    inputs = {"files": links, "model": HELD}
    with gate.held():
        job = job_of(execute(api, inputs=inputs, outputs={"class": {}}, headers=ASYNC))
        dismissed = conforms(api.delete(f"/jobs/{job}").json(), STATUS)
        assert dismissed["status"] == "dismissed"
        problem_of(api.get(f"/jobs/{job}/results"), 404, "result-not-ready")
    assert api.get(f"/jobs/{job}").json()["status"] == "dismissed"


# Callbacks -----------------------------------------------------------------------------------


def test_req_callback_job_callback(tmp_path: Path, folder: Path, links: Any, files: Files) -> None:
    """The results are sent when the job has them, signed; its status on the way."""
    zoo = zoo_with_a_held_model(tmp_path)
    secret = "whsec_" + base64.b64encode(bytes(range(32))).decode()
    arrived: Queue[Received] = Queue()

    def reply(request: Received) -> Reply:
        arrived.put(request)
        return Reply()

    with (
        serving(reply) as (url, _),
        served(
            model_dir=zoo,
            allowed_roots=(folder,),
            callback_hosts=url.removeprefix("http://"),
            callback_secrets=secret,
        ) as api,
    ):
        assert api.get("/conformance").json()["conformsTo"] == conformance_classes(callbacks=True)
        whom = {"successUri": f"{url}/done", "inProgressUri": f"{url}/progress"}
        response = execute(
            api,
            inputs={"files": links},
            outputs={"class": {}, "summary": {}},
            subscriber=whom,
            headers=ASYNC,
        )
        job, got = job_of(response), []
        while not got or got[-1].path != "/done":
            got.append(arrived.get(timeout=PATIENCE))
        (own,) = api.get("/callbacks").json()["secrets"]
        found = Webhook(own).verify(got[-1].body, got[-1].headers)
        conforms(found, RESULTS)
        assert list(found) == ["class", "summary"]
        assert found["class"]["href"] == f"/jobs/{job}/results/class"
        assert api.get(found["class"]["href"]).content == plain(api, files).content
        for status in got[:-1]:
            assert conforms(json.loads(status.body), STATUS)["jobID"] == job


# Similar pixels, and the attribution of dates -------------------------------------------------


def test_similar_pixels_are_a_process(api: httpx.Client, files: Files, links: Any) -> None:
    data = {"points": json.dumps(POINTS), "outputs": "similarity,similarities"}
    own = api.post("/similar", files=files, data=data, headers={"Accept": "application/zip"})
    with zipfile.ZipFile(io.BytesIO(own.content)) as archive:
        expected = {name: archive.read(f"{name}.tif") for name in ("similarity", "similarities")}
    inputs = {"files": links, "points": POINTS}
    parts = parts_of(execute(api, "similar", inputs=inputs))
    assert list(parts) == [*expected, "summary"]
    for name, content in expected.items():
        assert parts[name].get_payload(decode=True) == content
    fields = json.loads(fields_of().to_crs(4326).to_json())
    polygons = {"files": links, "fields": {"value": fields}}
    answer = execute(api, "similar", inputs=polygons, outputs={"similarity": {}})
    assert raster(answer.content).shape == (1, HEIGHT, WIDTH)
    assert answer.content != expected["similarity"]

    job = job_of(execute(api, "similar", inputs=inputs, outputs={"similarity": {}}, headers=ASYNC))
    assert waited(api, job)["processID"] == "similar"
    assert api.get(f"/jobs/{job}/results").content == expected["similarity"]
    listed = api.get("/jobs", params={"processID": "similar"}).json()["jobs"]
    assert job in [one["jobID"] for one in listed]  # other tests have jobs in the same service
    assert {one["processID"] for one in listed} == {"similar"}


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({}, "inputs.points"),
        ({"points": POINTS, "fields": POINTS}, "inputs.fields"),
        ({"points": POINTS, "series": [ENTRY]}, "inputs.series"),
        ({"points": POINTS, "horizon": 2}, "inputs.horizon"),
        ({"points": {**POINTS, "features": POINTS["features"] * 101}}, "points"),
    ],
)
def test_inputs_of_similar_are_checked(
    api: httpx.Client, links: Any, inputs: dict[str, Any], field: str
) -> None:
    found = problem_of(execute(api, "similar", inputs={"files": links, **inputs}), 422)
    assert found["errors"][0]["field"] == field


def test_the_attribution_is_made_only_if_it_is_asked_for(
    api: httpx.Client, files: Files, links: Any
) -> None:
    own = plain(api, files, outputs="attribution")
    named = execute(api, inputs={"files": links}, outputs={"attribution": {}})
    assert named.content == own.content
    parts = parts_of(execute(api, inputs={"files": links, "attribution": True}))
    assert list(parts) == [*MAPS, "polygons", "attribution", "summary"]
    assert parts["attribution"].get_payload(decode=True) == own.content
    assert "attribution" not in parts_of(
        execute(api, inputs={"files": links, "attribution": False})
    )
    for wrong in ({"attribution": True}, {"attribution": 1}):
        answer = execute(api, inputs={"files": links, **wrong}, outputs={"class": {}})
        assert problem_of(answer, 422)["errors"][0]["field"] == "inputs.attribution"


def test_points_and_series_have_an_attribution(api: httpx.Client, links: Any) -> None:
    for given in ({"files": links, "points": POINTS}, {"series": ENTRY}):
        for attribution in (False, True):
            found = execute(api, inputs={**given, "attribution": attribution}).json()
            (one,) = found.get("features") or found["results"]
            assert ("attribution" in one.get("properties", one)) == attribution


def test_results_of_a_job_of_another_path_include_the_attribution(
    api: httpx.Client, files: Files
) -> None:
    data = {"outputs": "class,attribution"}
    job = api.post("/classify-pixels", files=files, data=data, headers=ASYNC).json()["jobID"]
    assert waited(api, job)["status"] == "successful"
    found = conforms(api.get(f"/jobs/{job}/results").json(), RESULTS)
    assert list(found) == ["class", "attribution", "summary"]
    content = api.get(found["attribution"]["href"]).content
    assert content == plain(api, files, outputs="attribution").content


# A real client -------------------------------------------------------------------------------


def test_owslib_executes_a_process_and_waits(
    api: httpx.Client, files: Files, values: Any, dates: list[str]
) -> None:
    client = Processes(str(api.base_url))
    assert client.conformance()["conformsTo"] == conformance_classes(callbacks=False)
    assert [one["id"] for one in client.processes()] == list(PROCESSES)
    known = client.process("classify-pixels")
    assert {"files", "dates"} <= set(known["inputs"])
    found = client.execute("classify-pixels", inputs={"files": values, "dates": dates})
    assert set(found) == {*MAPS, "polygons", "summary"}
    assert base64.b64decode(found["class"]["value"]) == plain(api, files).content


def test_owslib_executes_a_process_as_a_job(api: httpx.Client, files: Files, links: Any) -> None:
    client = Processes(str(api.base_url))
    status = client.execute(
        "classify-pixels",
        inputs={"files": links},
        outputs={"class": {"transmissionMode": "reference"}, "summary": {}},
        async_=True,
    )
    where = client.response_headers["Location"]
    end = time.monotonic() + PATIENCE
    while status["status"] not in ENDED:
        assert time.monotonic() < end
        time.sleep(0.02)
        status = client._request(path=where.removeprefix("/"))
    assert status["status"] == "successful"
    document = client._request(path=f"{where.removeprefix('/')}/results")
    assert document["summary"]["value"]["task"] == "classify-pixels"
    content = client._request(path=document["class"]["href"].removeprefix("/"), as_dict=False)
    assert content == plain(api, files).content
