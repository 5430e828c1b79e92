"""Every error code, reached over HTTP, as a problem document."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from affine import Affine
from pydantic import ValidationError

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.api.schemas.geojson import MAX_RINGS, MAX_VERTICES, Area
from service.api.schemas.validation import read_items
from service.errors import STATUS, InvalidRequest
from tests.kits.patience import PATIENCE, soon
from tests.kits.rasters import NORTH_UP, write

BANDS = ("B02", "B04", "B08")
# Codes that need a specially prepared service; other tests reach each of them over HTTP.
ELSEWHERE = {
    "unauthorized",
    "overloaded",
    "too_many_requests",
    "not_ready",
    "result_not_ready",
    "results_not_ready",
    "unknown_process",
    "invalid_range",
    "body_stalled",
    "insufficient_storage",
    "unreachable_reference",
    "malformed_request",
    "not_a_vector_file",
    "invalid_fields",
    "too_many_fields",
    "head_stalled",
    "uri_too_long",
    "header_too_large",
    "wrong_sensor",
    "too_few_labels",
    "name_taken",
}
BODY_LIMIT, RASTER_LIMIT, PIXEL_LIMIT = 200_000, 100_000, 4_000

Files = list[tuple[str, Any]]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def api(zoo: Path) -> Iterator[httpx.Client]:
    with served(
        model_dir=zoo,
        max_body_bytes=BODY_LIMIT,
        max_raster_bytes=RASTER_LIMIT,
        sync_max_pixels=PIXEL_LIMIT,
    ) as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def tiff(
    folder: Path,
    day: str | None = "2021-03-01",
    *,
    shape: tuple[int, int] = (8, 8),
    level: int = 2000,
    bands: tuple[str, ...] = BANDS,
    **profile: Any,
) -> tuple[str, Any]:
    name = f"scene_{day}.tif" if day else "scene.tif"
    values = np.full((len(bands), *shape), level, np.uint16)
    source = write(folder / name, values, descriptions=bands, nodata=0, **profile)
    return ("files", (name, source.path.read_bytes(), "image/tiff"))


def stack(folder: Path, dates: int = 3, **how: Any) -> Files:
    return [tiff(folder, f"2021-0{month}-01", **how) for month in range(1, dates + 1)]


def corrupt(folder: Path) -> Files:
    """A TIFF whose header opens and whose pixels do not decode."""
    # Random numbers hardly compress, so most of the file is pixels.
    noise = np.random.default_rng(1).integers(1, 4000, (3, 64, 32)).astype(np.uint16)
    source = write(
        folder / "scene_2021-04-01.tif", noise, descriptions=BANDS, compress="deflate", nodata=0
    )
    sound = stack(folder, shape=(64, 32))
    content = bytearray(source.path.read_bytes())
    content[1000:6000] = bytes(5000)
    return [*sound, ("files", ("scene_2021-04-01.tif", bytes(content)))]


def posted(
    api: httpx.Client, files: Files, task: str = "classify-pixels", **how: Any
) -> httpx.Response:
    return api.post(f"/{task}", files=files, **how)


# A request for each error code.
CASES: dict[str, list[Callable[[httpx.Client, Path], httpx.Response]]] = {
    "not_a_geotiff": [
        lambda api, f: posted(api, [("files", ("a.tif", b"GIF89a and no TIFF"))]),
        lambda api, f: posted(api, [("files", ("a.tif", b'<VRTDataset rasterXSize="5"/>'))]),
    ],
    "corrupt_raster": [lambda api, f: posted(api, corrupt(f))],
    "no_georeference": [
        lambda api, f: posted(api, stack(f, crs=None)),
        lambda api, f: posted(api, stack(f, transform=Affine.identity())),
    ],
    "grid_mismatch": [
        lambda api, f: posted(api, [*stack(f), tiff(f, "2021-05-01", shape=(8, 9))]),
        lambda api, f: posted(
            api, [*stack(f), tiff(f, "2021-05-01", transform=NORTH_UP * Affine.translation(1, 0))]
        ),
    ],
    "missing_bands": [
        lambda api, f: posted(api, stack(f, bands=("B02", "B03", "B04"))),
        lambda api, f: api.post(
            "/embed", json={"series": [{"id": "a", "dates": ["2021-01-01"], "B04": [0.1]}]}
        ),
    ],
    "missing_dates": [lambda api, f: posted(api, [tiff(f, None)])],
    "too_few_dates": [
        lambda api, f: posted(api, stack(f, 1)),
        lambda api, f: posted(api, stack(f), data={"start": "1999-01-01"}),
    ],
    "implausible_reflectance": [
        lambda api, f: posted(api, stack(f), data={"scale": "1"}),
    ],
    "raster_too_large": [
        lambda api, f: posted(api, stack(f, shape=(60, 100), compress="deflate")),
    ],
    "body_too_large": [
        lambda api, f: posted(api, [("files", ("a.tif", bytes(BODY_LIMIT)))]),
        # Without a Content-Length, so that the size is known only while the body arrives.
        lambda api, f: api.post(
            "/embed",
            content=(bytes(1000) for _ in range(BODY_LIMIT // 500)),
            headers={"Content-Type": "application/json"},
        ),
    ],
    "unknown_model": [
        lambda api, f: api.get("/models/nobody"),
        lambda api, f: posted(api, stack(f), data={"model": "nobody"}),
        lambda api, f: posted(api, stack(f), data={"model": "pixels-landcover@9.0.0"}),
    ],
    "wrong_task": [
        lambda api, f: posted(api, stack(f), data={"model": "forecast-vi"}),
        lambda api, f: posted(
            api, stack(f), "embed", data={"model": "embed-pixel", "modality": "patch"}
        ),
    ],
    "not_found": [
        lambda api, f: api.get("/nowhere"),
        lambda api, f: api.post("/jobs/nobody/what"),
    ],
    "method_not_allowed": [
        lambda api, f: api.get("/classify-pixels"),
        lambda api, f: api.delete("/models"),
    ],
    "not_acceptable": [
        lambda api, f: posted(api, stack(f), headers={"Accept": "text/html"}),
    ],
    "unsupported_media_type": [
        lambda api, f: api.post("/embed", content=b"x", headers={"Content-Type": "text/plain"}),
        lambda api, f: api.post("/embed", data={"model": "a"}),
        lambda api, f: api.post("/embed"),
        lambda api, f: api.post("/embed", json=series(), headers={"Content-Encoding": "gzip"}),
    ],
    "forbidden_reference": [
        lambda api, f: api.post(
            "/classify-pixels", json={"items": [{"href": "file:///etc/passwd"}]}
        ),
        lambda api, f: api.post("/landcover", json={"items": []}),
    ],
    "unknown_job": [
        lambda api, f: api.get("/jobs/00000000-0000-4000-8000-000000000000"),
        lambda api, f: api.delete("/jobs/00000000-0000-4000-8000-000000000000"),
    ],
    "internal_error": [
        # This model fails for any other number of dates than the four of its warm-up.
        lambda api, f: posted(api, stack(f), data={"model": "pixels-brittle"}),
    ],
    "invalid_request": [lambda api, f: posted(api, stack(f), data={"horizon": "3"})],
}


def points(*places: tuple[float, float]) -> dict[str, Any]:
    features = [
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": place}, "properties": {}}
        for place in places
    ]
    return {"type": "FeatureCollection", "features": features}


def series(**change: Any) -> dict[str, Any]:
    one: dict[str, Any] = {"id": "a", "dates": ["2021-01-01", "2021-02-01"]}
    one |= {band: [0.1, 0.2] for band in BANDS}
    return {"series": [one | change]}


def check_problem(response: httpx.Response, code: str) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json", response.text
    body: dict[str, Any] = response.json()
    assert body["code"] == code, body
    assert body["status"] == response.status_code == STATUS[code]
    assert {"type", "title", "status", "detail", "code", "request_id"} <= set(body)
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert body["detail"]
    assert "/tmp" not in response.text  # noqa: S108 - where files lie is nobody's business
    assert "Traceback" not in response.text
    return body


def test_there_is_a_case_for_every_code() -> None:
    assert set(CASES) | ELSEWHERE == set(STATUS)
    assert all(CASES.values())


@pytest.mark.parametrize(
    ("code", "number"), [(code, n) for code, cases in CASES.items() for n in range(len(cases))]
)
def test_each_error_has_its_code_and_status(
    api: httpx.Client, folder: Path, code: str, number: int
) -> None:
    check_problem(CASES[code][number](api, folder), code)


def test_internal_details_are_not_in_the_response(api: httpx.Client, folder: Path) -> None:
    response = posted(api, stack(folder), data={"model": "pixels-brittle"})
    detail = check_problem(response, "internal_error")["detail"]
    assert "brittle" not in detail
    assert "Reshape" not in detail


def test_a_rejected_method_lists_the_allowed_methods(api: httpx.Client) -> None:
    response = api.get("/embed")
    assert response.headers["Allow"] == "POST"


def test_points_of_a_large_raster_are_predicted_synchronously(
    api: httpx.Client, folder: Path
) -> None:
    files = stack(folder, 2, shape=(1, PIXEL_LIMIT + 1), compress="deflate")
    response = posted(api, files, data={"points": json.dumps(points((0, 0)))})
    assert response.status_code == 200, response.text
    assert response.json()["features"][0]["properties"]["status"] == "outside"


# Validation ---------------------------------------------------------------------------------

UTM_CRS = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32631"}}
LONG = points(*[(0.0, 0.0)] * 10_001)


@pytest.mark.parametrize(
    ("task", "fields", "failing"),
    [
        ("classify-pixels", {"nonsense": "1"}, {"nonsense"}),
        (
            "classify-pixels",
            {"horizon": "3", "stride": "2", "scale": "x"},
            {"horizon", "stride", "scale"},
        ),
        ("classify-pixels", {"layout": "cube"}, {"layout"}),
        ("classify-pixels", {"dates": "2021-01-01,yesterday"}, {"dates.1"}),
        ("classify-pixels", {"dates": "20210101"}, {"dates.0"}),
        ("classify-pixels", {"dates": "2021-02-30"}, {"dates.0"}),
        ("classify-pixels", {"bands": "B02,,B04"}, {"bands.1"}),
        ("classify-pixels", {"scale": "nan"}, {"scale"}),
        ("classify-pixels", {"scale": "0"}, {"scale"}),
        ("classify-pixels", {"offset": "inf"}, {"offset"}),
        ("classify-pixels", {"mask": "clouds"}, {"mask"}),
        ("classify-pixels", {"start": "1.1.2021"}, {"start"}),
        ("classify-pixels", {"outputs": "class,q50"}, {"outputs.1"}),
        ("classify-pixels", {"points": "{"}, {"points"}),
        ("embed", {"points": json.dumps(points((0, 91)))}, {"points.features.0.geometry"}),
        ("classify-pixels", {"points": json.dumps(points())}, {"points.features"}),
        ("embed", {"points": json.dumps({"type": "Point", "coordinates": [0, 0]})}, None),
        ("embed", {"points": json.dumps({**points((0, 0)), "crs": UTM_CRS})}, {"points"}),
        ("classify-pixels", {"model": ["a", "b"]}, {"model"}),
        ("forecast", {"horizon": "0"}, {"horizon"}),
        ("forecast", {"horizon": "99"}, {"horizon"}),
        ("forecast", {"outputs": "class"}, {"outputs.0"}),
        ("landcover", {"stride": "65"}, {"stride"}),
        ("landcover", {"stride": "0"}, {"stride"}),
        ("landcover", {"start": "2021-01-01"}, {"start"}),
        ("embed", {"modality": "both"}, {"modality"}),
        ("embed", {"stride": "8"}, {"stride"}),
        ("embed", {"modality": "patch", "start": "2021-01-01"}, {"start"}),
    ],
)  # fmt: skip
def test_each_failing_field_is_listed(
    api: httpx.Client, folder: Path, task: str, fields: dict[str, Any], failing: set[str] | None
) -> None:
    files = stack(folder, bands=("B02", "B03", "B04", "B08"))
    body = check_problem(posted(api, files, task, data=fields), "invalid_request")
    found = {error["field"] for error in body["errors"]}
    assert all(error["detail"] for error in body["errors"])
    if failing is None:
        assert found
    else:
        assert found == failing


@pytest.mark.slow
def test_too_many_points_are_rejected(zoo: Path, folder: Path) -> None:
    with served(model_dir=zoo) as client:
        response = posted(client, stack(folder), data={"points": json.dumps(LONG)})
        body = check_problem(response, "invalid_request")
    assert body["errors"][0]["field"] == "points.features"


_RING = [[3.0, 50.0], [3.1, 50.0], [3.1, 50.1], [3.0, 50.0]]


@pytest.mark.parametrize(
    ("kind", "coordinates", "most"),
    [
        ("Polygon", [[*_RING[:1] * MAX_VERTICES, *_RING]], MAX_VERTICES),
        ("Polygon", [_RING] * (MAX_RINGS + 1), MAX_RINGS),
        ("MultiPolygon", [[_RING] * (MAX_RINGS + 1)], MAX_RINGS),
        ("MultiPolygon", [[_RING]] * (MAX_RINGS + 1), MAX_RINGS),
    ],
)
def test_an_area_of_too_many_parts_is_rejected(kind: str, coordinates: Any, most: int) -> None:
    with pytest.raises(ValidationError, match=f"at most {most} items"):
        Area.model_validate({"type": kind, "coordinates": coordinates})


@pytest.mark.parametrize(
    ("task", "body", "failing"),
    [
        ("embed", series(B04=[0.1]), "series.0"),
        ("embed", series(dates=["2021-01-01", 20210201]), "series.0.dates.1"),
        ("embed", series(B08=["0.1", "lots"]), "series.0.B08.1"),
        ("embed", series(ndvi=[0.1, 0.2]), "series.0.ndvi"),
        ("embed", series(id=None), "series.0.id"),
        ("embed", {"series": []}, "series"),
        ("embed", {}, "series"),
        ("embed", {**series(), "modality": "patch"}, "modality"),
        ("embed", {**series(), "horizon": 3}, "horizon"),
        ("embed", [1, 2], "body"),
        ("forecast", {**series(), "horizon": 99}, "horizon"),
        ("landcover", series(), "series"),
    ],
)
def test_each_failing_field_of_a_series_is_listed(
    api: httpx.Client, task: str, body: Any, failing: str
) -> None:
    response = api.post(f"/{task}", json=body)
    assert failing in {e["field"] for e in check_problem(response, "invalid_request")["errors"]}


def test_a_patch_embedding_of_a_series_is_rejected(api: httpx.Client) -> None:
    response = api.post("/embed", params={"modality": "patch"}, json=series())
    assert check_problem(response, "invalid_request")["errors"][0]["field"] == "modality"


def test_a_parameter_in_the_query_is_not_ignored(api: httpx.Client, folder: Path) -> None:
    response = posted(api, stack(folder), params={"outputs": "confidence", "model": "x"})
    body = check_problem(response, "invalid_request")
    assert [error["field"] for error in body["errors"]] == ["model", "outputs"]


def test_the_query_and_the_form_must_agree(api: httpx.Client, folder: Path) -> None:
    how = {"params": {"modality": "patch"}, "data": {"modality": "pixel"}}
    body = check_problem(posted(api, stack(folder), "embed", **how), "invalid_request")
    assert body["errors"][0]["field"] == "modality"
    query = posted(api, stack(folder), "embed", params={"modality": "both"})
    assert check_problem(query, "invalid_request")["errors"][0]["field"] == "modality"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"series": NaN}', b"null"])
def test_invalid_json_is_named_in_the_error(api: httpx.Client, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    check_problem(api.post("/forecast", content=content, headers=headers), "invalid_request")


def test_a_long_list_of_errors_is_shortened(api: httpx.Client) -> None:
    flood = {"series": [{"id": "a"} for _ in range(500)]}
    body = check_problem(api.post("/embed", json=flood), "invalid_request")
    assert len(body["errors"]) == 20
    assert "500" in body["detail"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"series": [' + b"[]," * 600_000 + b"[]]}",
        b'{"series": [' + b"{}," * 600_000 + b"{}]}",
        b'{"series": [{' + b",".join(b'"k%d":0' % n for n in range(600_000)) + b"}]}",
    ],
    ids=["lists", "objects", "keys"],
)
def test_json_of_brackets_only_is_rejected_before_parsing(zoo: Path, content: bytes) -> None:
    """Parsing it would take a hundred times its size in memory."""
    with served(model_dir=zoo) as client:
        headers = {"Content-Type": "application/json"}
        response = client.post("/embed", content=content, headers=headers)
        assert "500000" in check_problem(response, "invalid_request")["detail"]


def test_the_first_wrong_value_of_a_list_is_named(api: httpx.Client) -> None:
    flood = {**series()["series"][0], "dates": [0] * 20_000}
    body = check_problem(api.post("/embed", json={"series": [flood]}), "invalid_request")
    assert [error["field"] for error in body["errors"]] == ["series.0.dates.0"]


@pytest.mark.parametrize(
    ("files", "field"),
    [
        ([("files", ("empty.tif", b""))], "files"),
        ([("file", ("a.tif", b"II*\0"))], "file"),
        ([("model", (None, "pixels-landcover"))], "files"),
        ([("files", (None, "text"))], "files"),
    ],
)
def test_missing_files_are_an_error(api: httpx.Client, files: Files, field: str) -> None:
    body = check_problem(api.post("/classify-pixels", files=files), "invalid_request")
    assert [error["field"] for error in body["errors"]] == [field]


def test_an_empty_file_that_lies_beside_rasters_is_left_out(
    api: httpx.Client, tmp_path: Path
) -> None:
    scene = write(tmp_path / "a.tif", np.full((3, 64, 64), 900, np.uint16),
                  descriptions=("B02", "B03", "B04"))  # fmt: skip
    files = [("files", ("a.tif", scene.path.read_bytes())), ("files", (".gitkeep", b""))]
    answer = api.post("/validate", params={"task": "landcover"}, files=files)
    assert answer.status_code == 200, answer.text
    (warning,) = [one for one in answer.json()["warnings"] if one["code"] == "files_unused"]
    assert "'.gitkeep'" in warning["detail"]


TEXT = "x" * 20_000


@pytest.mark.parametrize(
    "ask",
    [
        lambda api, f: api.get(f"/models/{TEXT[:4_000]}"),
        lambda api, f: api.get(f"/{TEXT[:4_000]}"),
        lambda api, f: posted(api, f, params={f"p{n}": "" for n in range(1_000)}),
        lambda api, f: api.post("/embed", content=b"x", headers={"Content-Type": TEXT}),
        lambda api, f: api.post("/embed", content=b"x", headers={"Content-Encoding": TEXT}),
        lambda api, f: posted(api, f, headers={"Accept": f"text/{TEXT}"}),
        lambda api, f: posted(api, f, data={TEXT: "1"}),
        lambda api, f: posted(api, f, data={"mask": TEXT}),
        lambda api, f: posted(api, f, data={"scale": TEXT}),
        lambda api, f: posted(api, f, data={"dates": TEXT}),
        lambda api, f: posted(api, f, data={"dates": ",".join(TEXT)}),
        lambda api, f: posted(api, f, data={"outputs": ",".join(TEXT)}),
        lambda api, f: posted(api, f, data={"fields": json.dumps({"type": TEXT})}),
        lambda api, f: posted(api, f, "validate", data={"mask": TEXT}, params={"task": "embed"}),
        lambda api, f: api.post("/embed", json=series(dates=[TEXT, "2021-01-01"])),
        lambda api, f: api.post("/embed", json=series(**{TEXT: 1})),
        lambda api, f: api.post("/processes/embed/execution", json={"inputs": {TEXT: 1}}),
    ],
)
def test_an_error_shows_only_a_part_of_a_long_text(
    api: httpx.Client, folder: Path, ask: Callable[[httpx.Client, Files], httpx.Response]
) -> None:
    response = ask(api, stack(folder))
    assert response.status_code >= 400
    assert len(response.content) < 5_000, response.text


# API keys ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(zoo: Path) -> Iterator[httpx.Client]:
    with served(model_dir=zoo, api_keys=("first-key", "second-key")) as client:
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first-key"},
        {"Authorization": "bearer first-key"},
        {"X-API-Key": "first-key"},
    ],
)
def test_a_valid_key_is_accepted(keyed: httpx.Client, headers: dict[str, str]) -> None:
    assert keyed.get("/models", headers=headers).status_code == 200
    assert keyed.post("/embed", json=series(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic first-key"},
        {"X-API-Key": ""},
        {"X-API-Key": "first-key2"},
    ],
)
def test_any_other_key_is_rejected(keyed: httpx.Client, headers: dict[str, str]) -> None:
    for response in (
        keyed.get("/models", headers=headers),
        keyed.get("/models/embed-pixel", headers=headers),
        keyed.post("/embed", json=series(), headers=headers),
        keyed.post("/classify-pixels", content=b"", headers=headers),
    ):
        body = check_problem(response, "unauthorized")
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
        assert "first-key" not in body["detail"]


def test_health_and_documentation_need_no_key(keyed: httpx.Client) -> None:
    for path in ("/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json", "/"):
        assert keyed.get(path).status_code == 200


# Capacity ---------------------------------------------------------------------------------------


def started_upload(client: httpx.Client) -> socket.socket:
    """An upload that has started and continues while the socket is open."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 80))
    connection.sendall(
        b"POST /classify-pixels HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    )
    return connection


def test_a_request_without_a_free_slot_is_rejected_at_once(zoo: Path, folder: Path) -> None:
    with served(model_dir=zoo, max_concurrency=1) as client:
        uploads = [started_upload(client) for _ in range(2)]
        assert soon(lambda: "pimc_uploads_in_flight 2.0" in client.get("/metrics").text)
        response = posted(client, stack(folder))
        check_problem(response, "overloaded")
        assert int(response.headers["Retry-After"]) > 0
        for upload in uploads:
            upload.close()
        # Their slots become free, and no file remains.
        assert soon(lambda: posted(client, stack(folder)).status_code == 200)


def test_a_request_rejected_by_its_length_is_not_uploaded(api: httpx.Client) -> None:
    where = (api.base_url.host, api.base_url.port or 80)
    with socket.create_connection(where, timeout=PATIENCE) as connection:
        connection.sendall(
            b"POST /classify-pixels HTTP/1.1\r\nHost: here\r\nContent-Length: 99999999999\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_more_simultaneous_requests_than_slots(zoo: Path, folder: Path) -> None:
    """Each gets a complete result or the error `overloaded`; none is lost."""
    files = stack(folder, 4, shape=(60, 60))
    found: list[httpx.Response] = []
    with served(model_dir=zoo, max_concurrency=1) as client:
        ready = threading.Barrier(8)

        def ask() -> None:
            ready.wait()
            found.append(posted(client, files))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 8
    good = [response for response in found if response.status_code == 200]
    assert good, [(a.status_code, a.text[:300]) for a in found]
    assert len({response.content for response in good}) == 1
    for response in found:
        if response.status_code != 200:
            check_problem(response, "overloaded")


# Readiness ----------------------------------------------------------------------------------


def test_a_service_whose_default_model_does_not_load_is_not_ready(
    tmp_path: Path, folder: Path
) -> None:
    zoo = write_zoo(tmp_path)
    card = json.loads((zoo / "forecast-vi" / "card.json").read_text())
    (zoo / "forecast-vi" / "model.onnx").write_bytes(b"no graph")
    card["sha256"] = card["variants"][0]["sha256"] = hashlib.sha256(b"no graph").hexdigest()
    (zoo / "forecast-vi" / "card.json").write_text(json.dumps(card))
    with served(model_dir=zoo) as client:
        response = client.get("/health/ready")
        assert "forecast-vi" in check_problem(response, "not_ready")["detail"]
        assert int(response.headers["Retry-After"]) > 0
        # The other models are served.
        assert client.get("/health/live").status_code == 200
        assert posted(client, stack(folder)).status_code == 200
        check_problem(posted(client, stack(folder), "forecast"), "unknown_model")
        assert "forecast" not in client.get("/models").json()["defaults"]
        check_problem(client.get("/models/forecast-vi"), "unknown_model")


def test_readiness_lists_a_rejected_bundle_with_the_reason(zoo: Path, tmp_path: Path) -> None:
    own = write_zoo(tmp_path)
    (own / "pixels-brittle" / "model.onnx").write_bytes(b"tampered with")
    with served(model_dir=own) as client:
        ready = client.get("/health/ready")
        assert ready.status_code == 200
        assert "sha256" in ready.json()["refused"]["pixels-brittle"]


# Numbers that JSON cannot hold ---------------------------------------------------------------

HARD_JSON = {
    "NaN": "NaN",
    "infinity": "1e999",
    "minus infinity": "-Infinity",
    "NaN within": '{"b": [1, {"c": NaN}]}',
    "a huge number": "9" * 5000,
    "deep": "[" * 5000 + "]" * 5000,
    "half a character": '"\\ud800"',
}


@pytest.mark.parametrize("where", ["properties", "id"])
@pytest.mark.parametrize("value", HARD_JSON.values(), ids=HARD_JSON.keys())
def test_no_number_in_a_point_is_an_internal_error(
    api: httpx.Client, folder: Path, where: str, value: str
) -> None:
    member = f'"properties": {{"a": {value}}}' if where == "properties" else f'"id": {value}'
    feature = (
        f'{{"type": "Feature", "geometry": {{"type": "Point", "coordinates": [3, 51]}}, {member}}}'
    )
    points = f'{{"type": "FeatureCollection", "features": [{feature}]}}'
    response = posted(api, stack(folder), data={"points": points})
    check_problem(response, "invalid_request")
    assert "points" in response.json()["detail"]


@pytest.mark.parametrize("task", ["classify-pixels", "forecast", "embed"])
@pytest.mark.parametrize(
    "changes",
    [
        {"B02": "[NaN, 0.1, 0.1]"},
        {"B02": "[1e999, 0.1, 0.1]"},
        {"B02": "[" + "9" * 5000 + ", 0.1, 0.1]"},
        {"dates": '["9999-12-31", "9999-12-30", "9999-12-29"]'},
        {"dates": '["0001-01-01", "0001-01-02", "0001-01-03"]'},
        {"id": '"' + "a" * 10**5 + '"'},
        {"id": "[" * 50_000 + "]" * 50_000},
    ],
    ids=lambda changes: next(f"{name}={value[:12]}" for name, value in changes.items()),
)
def test_no_series_is_an_internal_error(
    api: httpx.Client, task: str, changes: dict[str, str]
) -> None:
    members = {
        "id": '"a"',
        "dates": '["2021-01-05", "2021-02-05", "2021-03-05"]',
        **dict.fromkeys(BANDS, "[0.1, 0.1, 0.1]"),
        **changes,
    }
    one = ", ".join(f'"{name}": {value}' for name, value in members.items())
    response = api.post(
        f"/{task}",
        content=f'{{"series": [{{{one}}}]}}',
        headers={"Content-Type": "application/json"},
    )
    check_problem(response, "invalid_request")


@pytest.mark.parametrize("task", ["classify-pixels", "forecast", "landcover", "similar"])
@pytest.mark.parametrize("outputs", [[[None]], [{}], [["class"], "class"], [1e999]])
def test_outputs_of_json_that_are_not_texts_are_named(task: Any, outputs: list[Any]) -> None:
    body = {"items": [{"href": "/data/s_2021-01-05.tif"}], "outputs": outputs}
    with pytest.raises(InvalidRequest) as caught:
        read_items(task, json.dumps(body).encode(), allowed=True)
    assert "outputs.0" in {error["field"] for error in caught.value.errors}
