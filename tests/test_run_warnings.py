"""Warnings of runs about input that a map should not be trusted for, over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import httpx
import numpy as np
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray
from pyproj import Geod
from rasterio.warp import transform

from benchmarks.serving import served
from benchmarks.tiny_zoo import ELSEWHERE, write_bundle
from service.api.schemas.validation import read_items, read_parameters
from service.errors import InvalidRequest
from service.jobs.serialise import request_document, request_of
from service.read.geotiff import SourceFile
from tests.kits.jobs import waited
from tests.kits.rasters import UTM, write

YEAR = [date(2021, 1, 5) + timedelta(days=30 * n) for n in range(12)]
CARD = {"sensors": ("sentinel-2",), "pixel_size": (10.0, 10.0)}
SUMMARY = {"Accept": "application/json"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    root = tmp_path_factory.mktemp("zoo")
    write_bundle(root, "pixels-landcover", "classify-pixels", "pixel", **CARD)
    write_bundle(root, "forecast-vi", "forecast", "pixel", **CARD)
    write_bundle(root, "landcover-eurosat", "landcover", "patch", **CARD)
    write_bundle(root, "embed-pixel", "embed", "pixel", **CARD)
    write_bundle(root, "embed-patch", "embed", "patch", **CARD)
    window = {"steps": 36, "step_days": 10, "start": "every-date"}
    write_bundle(
        root, "every-date", "classify-pixels", "pixel", default=False, window=window, **CARD
    )
    with served(model_dir=root) as client:
        yield client


def stack(
    folder: Path, days: Sequence[date] = YEAR, *, side: int = 8, scl: int | None = None, **how: Any
) -> list[tuple[str, Any]]:
    """A plain field, one file per date; each date differs a little from the others."""
    names = ["B02", "B03", "B04", "B08"]
    spread = np.random.default_rng(0).uniform(0.8, 1.2, (4, side, side))
    pixels = (np.array([400, 500, 600, 3000])[:, None, None] * spread).astype(np.uint16)
    if scl is not None:
        names.append("SCL")
        pixels = np.concatenate([pixels, np.full((1, side, side), scl, np.uint16)])
    files = []
    for n, day in enumerate(days):
        own = pixels.copy()
        own[:4] += np.uint16(n)
        path = write(folder / f"{day}.tif", own, descriptions=names, **how).path
        files.append(("files", (path.name, path.read_bytes(), "image/tiff")))
    return files


def warnings_of(response: httpx.Response) -> dict[str, str]:
    """Warnings by code; whether clouds are masked is not the subject."""
    assert response.status_code == 200, response.text
    warnings = {one["code"]: one["detail"] for one in response.json()["warnings"]}
    warnings.pop("no_cloud_mask", None)
    return warnings


def ask(api: httpx.Client, task: str, files: list[tuple[str, Any]], **data: str) -> httpx.Response:
    return api.post(f"/{task}", files=files, data=data, headers=SUMMARY)


# partial_season -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["pixels-landcover", "every-date"])
@pytest.mark.parametrize(
    ("months", "partial"),
    [
        ([6, 6, 6, 6, 6, 6], True),
        ([1, 2, 3, 4, 5], True),
        ([4, 5, 6, 7, 8, 9, 10], False),
        ([1, 3, 5, 7, 9, 11], False),
    ],
)
def test_dates_of_only_a_part_of_the_year_give_a_warning(
    api: httpx.Client, tmp_path: Path, model: str, months: list[int], partial: bool
) -> None:
    days = [date(2021, month, 1 + 4 * n) for n, month in enumerate(months)]
    warnings = warnings_of(ask(api, "classify-pixels", stack(tmp_path, days), model=model))
    assert ("partial_season" in warnings) is partial
    if partial:
        assert f"{len(days)} dates used, from {days[0]} to {days[-1]}" in warnings["partial_season"]


def test_the_seasons_of_several_years_count_together(api: httpx.Client, tmp_path: Path) -> None:
    days = [date(2018, 11, 1), date(2018, 12, 20), date(2019, 2, 1), date(2020, 5, 1)]
    days += [date(2021, 8, 1)]
    assert warnings_of(ask(api, "classify-pixels", stack(tmp_path, days), model="every-date")) == {}


def test_series_have_warnings_too(api: httpx.Client) -> None:
    days = [f"2021-06-{day:02d}" for day in range(1, 9)]
    one = {"id": "field-7", "dates": days, "B02": [0.04] * 8, "B04": [0.05] * 8, "B08": [0.3] * 8}
    warnings = warnings_of(api.post("/classify-pixels", json={"series": [one]}))
    assert "series 'field-7'" in warnings["partial_season"]


# resolution_suspected -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "suspected"),
    [(3, True), (5, False), (10, False), (20, False), (30, True), (100, True)],
)
def test_pixels_of_another_size_than_the_models_give_a_warning(
    api: httpx.Client, tmp_path: Path, size: float, suspected: bool
) -> None:
    place = Affine(size, 0, 500_000, 0, -size, 5_600_000)
    warnings = warnings_of(ask(api, "classify-pixels", stack(tmp_path, transform=place)))
    assert ("resolution_suspected" in warnings) is suspected
    if suspected:
        assert f"{size} m on the ground" in warnings["resolution_suspected"]
        assert "10 m" in warnings["resolution_suspected"]


@pytest.mark.parametrize(
    ("crs", "size", "place"),
    [("EPSG:4326", 1.1e-4, (4.0, 51.0)), ("EPSG:3857", 16, (480_000, 6_621_293))],
)
def test_the_size_of_a_pixel_is_that_on_the_ground(
    api: httpx.Client, tmp_path: Path, crs: str, size: float, place: tuple[float, float]
) -> None:
    how = {"crs": crs, "transform": Affine(size, 0, place[0], 0, -size, place[1])}
    assert warnings_of(ask(api, "classify-pixels", stack(tmp_path, **how))) == {}


# all_missing --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classify-pixels", "forecast", "embed"])
def test_a_raster_without_a_prediction_has_a_warning_with_the_reason(
    api: httpx.Client, tmp_path: Path, task: str
) -> None:
    detail = warnings_of(ask(api, task, stack(tmp_path, scl=9)))["all_missing"]
    assert "needs 2 clear observations" in detail
    assert "clear on 0 (mask: scl)" in detail
    assert "mask=none" in detail
    raster = api.post(f"/{task}", files=stack(tmp_path, scl=9))
    assert any(line.startswith("all_missing;") for line in raster.headers.get_list("PIMC-Warning"))
    assert "all_missing" not in warnings_of(ask(api, task, stack(tmp_path, scl=4)))


def test_patches_without_a_prediction_have_a_warning_with_the_reason(
    api: httpx.Client, tmp_path: Path
) -> None:
    days = [date(2021, 6, 1)]
    detail = warnings_of(ask(api, "landcover", stack(tmp_path, days, side=64, scl=9)))[
        "all_missing"
    ]
    assert detail.startswith("no patch has a prediction")


def test_missing_values_and_clouds_give_different_reasons(
    api: httpx.Client, tmp_path: Path
) -> None:
    pixels = np.zeros((3, 8, 8), np.float32)
    files = []
    for day in YEAR:
        path = write(tmp_path / f"{day}.tif", pixels, descriptions=("B02", "B04", "B08")).path
        files.append(("files", (path.name, path.read_bytes(), "image/tiff")))
    detail = warnings_of(ask(api, "classify-pixels", files))["all_missing"]
    assert "values on 0" in detail
    assert "check nodata" in detail


def test_points_fields_and_series_without_a_prediction_have_a_warning(
    api: httpx.Client, tmp_path: Path
) -> None:
    outside = {"type": "Point", "coordinates": [0.0, 0.0]}
    lon, lat = transform(UTM, "EPSG:4326", [500_035], [5_599_965])
    inside = {"type": "Point", "coordinates": [lon[0], lat[0]]}

    def points(*places: dict[str, Any]) -> str:
        features = [{"type": "Feature", "geometry": place} for place in places]
        return json.dumps({"type": "FeatureCollection", "features": features})

    files = stack(tmp_path, scl=9)
    response = api.post("/classify-pixels", files=files, data={"points": points(outside)})
    assert "outside the raster" in warnings_of(response)["all_missing"]
    response = api.post("/classify-pixels", files=files, data={"points": points(inside, outside)})
    assert "clear on 0" in warnings_of(response)["all_missing"]
    square = {"type": "Polygon", "coordinates": [[(0, 0), (0, 0.01), (0.01, 0.01), (0, 0)]]}
    away = {"type": "Feature", "geometry": square, "properties": {}}
    away_file = json.dumps({"type": "FeatureCollection", "features": [away]})
    field = ("fields", ("fields.geojson", away_file, "application/geo+json"))
    response = api.post("/classify-pixels", files=[*files, field])
    assert "outside the raster" in warnings_of(response)["all_missing"]
    empty = [None] * 12
    one = {"id": "a", "dates": [str(d) for d in YEAR], "B02": empty, "B04": empty, "B08": empty}
    assert "all_missing" in warnings_of(api.post("/classify-pixels", json={"series": [one]}))


# area_not_covered ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "stride", "share"),
    [(100, 64, 0.4096), (100, 16, 0.2304), (100, 4, 0.16), (128, 64, 1.0), (64, 64, 1.0)],
)
def test_a_warning_states_how_much_the_patches_cover(
    api: httpx.Client, tmp_path: Path, side: int, stride: int, share: float
) -> None:
    files = stack(tmp_path, [date(2021, 6, 1)], side=side)
    response = ask(api, "landcover", files, stride=str(stride))
    body = response.json()
    assert body["covered_share"] == pytest.approx(share)
    hectares = sum(entry["hectares"] for entry in body["classes"])
    assert hectares == pytest.approx(share * side**2 / 100)
    assert ("area_not_covered" in warnings_of(response)) is (share < 0.95)


# outside_training -----------------------------------------------------------------------------

USE = "A first look."
REGIONS = {
    "here": {"accuracy": [0.61, 0.5, 0.7]},
    "there": {"accuracy": 0.454},
}
# The stacks are at 3.0 degrees east and 50.5 degrees north.
EXTENTS = {
    "around": [(2.0, 50.0, 4.0, 51.0)],
    "beside": [(-100.0, 30.0, -90.0, 40.0), (4.0, 50.0, 5.0, 51.0)],
    "away": [(-100.0, 30.0, -90.0, 40.0), (6.0, 50.0, 7.0, 51.0)],
}


NDVI = "NDVI_2021-12-11_q50"
"""The first step of the forecasts."""
CORNERS = [(-0.1, -0.1), (-0.1, 0.1), (0.1, 0.1), (0.1, -0.1), (-0.1, -0.1)]


def collection(geometry: dict[str, Any]) -> str:
    feature = {"type": "Feature", "geometry": geometry, "properties": {}}
    return json.dumps({"type": "FeatureCollection", "features": [feature]})


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Models that were trained around, beside and away from the stacks' place."""
    root = tmp_path_factory.mktemp("placed")
    for name, extent in EXTENTS.items():
        card = {"extent": extent, "intended_use": USE, "regions": REGIONS, "default": False}
        write_bundle(root, name, "classify-pixels", "pixel", **CARD, **card)
    scores = {"here": {"rmse": 0.1, "coverage": 0.9}, "there": {"rmse": 0.226, "coverage": 0.671}}
    for name in ("around", "away"):
        card = {"extent": EXTENTS[name], "regions": scores, "default": False}
        write_bundle(root, f"forecast-{name}", "forecast", "pixel", elsewhere=True, **CARD, **card)
    with served(model_dir=root) as client:
        yield client


@pytest.mark.parametrize(("model", "warned"), [("around", 0), ("beside", 0), ("away", 1)])
def test_a_raster_far_from_the_training_places_has_a_warning(
    placed: httpx.Client, tmp_path: Path, model: str, warned: bool
) -> None:
    response = ask(placed, "classify-pixels", stack(tmp_path), model=model)
    warnings = warnings_of(response)
    assert ("outside_training" in warnings) is bool(warned)
    if warned:
        # From the stack, at 3.0 degrees east, to the box at 6.0 degrees.
        kilometres = re.search(r"about (\d+) km", warnings["outside_training"])[1]
        geodesic = Geod(ellps="WGS84").inv(3.001, 50.549, 6.0, 50.549)[2] / 1000
        assert float(kilometres) == pytest.approx(geodesic, abs=6)  # rounded to tens
        assert warnings["outside_training"] == (
            f"the raster is about {kilometres} km from the nearest place that 'away@0.0.1' was "
            "trained on; where a region was left out of its training, as few as 45 % of the pixels "
            "were right. A first look."
        )


def test_a_raster_that_is_partly_far_from_the_training_places_has_a_warning(
    placed: httpx.Client, tmp_path: Path
) -> None:
    """Pixels of fifty kilometres: the raster goes from 3.0 degrees east to about 9 degrees."""
    how = {"transform": Affine(50_000, 0, 500_000, 0, -50_000, 5_600_000)}
    response = ask(placed, "classify-pixels", stack(tmp_path, **how), model="around")
    detail = warnings_of(response)["outside_training"]
    share = int(re.match(r"about (\d+)% of the raster is more than 110 km from", detail)[1])
    assert 60 < share < 95
    small = {"transform": Affine(5_000, 0, 500_000, 0, -5_000, 5_600_000)}
    near = warnings_of(ask(placed, "classify-pixels", stack(tmp_path, **small), model="around"))
    assert "outside_training" not in near


def test_the_warning_of_a_forecast_has_the_errors_of_forecasts(
    placed: httpx.Client, tmp_path: Path
) -> None:
    response = ask(placed, "forecast", stack(tmp_path), model="forecast-away")
    assert "intended_use" not in response.json()
    assert warnings_of(response)["outside_training"].endswith(
        "the RMSE was up to 0.23, and as few as 67 % of the values were in the 80 % prediction "
        "interval."
    )


def test_a_forecast_knows_whether_the_raster_is_far(placed: httpx.Client, tmp_path: Path) -> None:
    """The graph receives the place for rasters, points, fields, and the hindcasts of a backtest."""
    files = stack(tmp_path)
    lon, lat = transform(UTM, "EPSG:4326", [500_035], [5_599_965])
    point = {"type": "Point", "coordinates": [lon[0], lat[0]]}
    ring = [(lon[0] + x, lat[0] + y) for x, y in CORNERS]
    polygon = {"type": "Polygon", "coordinates": [ring]}
    found: dict[str, list[float]] = {}
    for model in ("forecast-around", "forecast-away"):
        data = {"model": model, "backtest": "false"}
        raster = ask(placed, "forecast", files, **data).json()
        own = [raster["NDVI"]["mean"][0]]
        given = {**data, "points": collection(point)}
        at = placed.post("/forecast", files=files, data=given).json()["features"][0]["properties"]
        own.append(at["NDVI"]["q50"][0])
        fields = [*files, ("fields", ("f.geojson", collection(polygon), "application/geo+json"))]
        of = placed.post("/forecast", files=fields, data=data).json()["features"][0]["properties"]
        own.append(of["NDVI"]["q50"][0])
        tested = ask(placed, "forecast", files, model=model, backtest="true").json()["backtest"]
        own.append(tested["rmse"]["model"])
        found[model] = own
    *values, error = np.subtract(found["forecast-away"], found["forecast-around"])
    np.testing.assert_allclose(values, ELSEWHERE, atol=1e-6)
    # The field's indices, and the tiny forecast of them: the mean of blue, red and near infrared,
    # and 0.02 on average over the steps.
    off = np.array([0.667, 0.441, 0.419]) - np.array([0.04, 0.06, 0.30]) - 0.02
    assert error == pytest.approx(np.mean(np.abs(off - ELSEWHERE) - np.abs(off)), abs=0.03)


def test_each_pixel_point_and_field_of_a_large_raster_counts_by_its_own_place(
    placed: httpx.Client, tmp_path: Path
) -> None:
    """Pixels of fifty kilometres, some beside the box of the training data and others far."""
    data = {"model": "forecast-around", "backtest": "false"}
    large = Affine(50_000, 0, 400_000, 0, -50_000, 5_800_000)

    def first_step(files: list[tuple[str, Any]]) -> NDArray[np.float32]:
        response = placed.post("/forecast", files=files, data=data)
        with rasterio.MemoryFile(response.content) as file, file.open() as raster:
            return np.asarray(raster.read(1 + raster.descriptions.index(NDVI)))

    files = stack(tmp_path, transform=large)
    here, there = first_step(stack(tmp_path)), first_step(stack(tmp_path, transform=large))
    far = np.zeros((8, 8), bool)
    west, south, east, north = EXTENTS["around"][0]
    places = []
    for row, column in np.ndindex(far.shape):
        x, y = large @ (column + 0.5, row + 0.5)
        (lon,), (lat,) = transform(UTM, "EPSG:4326", [x], [y])
        nearest = min(max(lon, west), east), min(max(lat, south), north)
        far[row, column] = Geod(ellps="WGS84").inv(lon, lat, *nearest)[2] > 110_000
        places.append((lon, lat))
    assert 10 < far.sum() < 54
    np.testing.assert_allclose(there - here, ELSEWHERE * far, atol=1e-6)
    features = [
        {"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": place}}
        for place in places
    ]
    given = {**data, "points": json.dumps({"type": "FeatureCollection", "features": features})}
    found = placed.post("/forecast", files=files, data=given).json()["features"]
    at = [one["properties"]["NDVI"]["q50"][0] for one in found]
    np.testing.assert_allclose(at, there.ravel(), atol=1e-6)
    for feature, (lon, lat) in zip(features, places, strict=True):
        ring = [(lon + x, lat + y) for x, y in CORNERS]
        feature["geometry"] = {"type": "Polygon", "coordinates": [ring]}
    text = json.dumps({"type": "FeatureCollection", "features": features})
    fields = [*files, ("fields", ("f.geojson", text, "application/geo+json"))]
    found = placed.post("/forecast", files=fields, data=data).json()["features"]
    of = [one["properties"]["NDVI"]["q50"][0] for one in found]
    np.testing.assert_allclose(of, there.ravel(), atol=1e-6)


def test_a_series_may_have_a_place(placed: httpx.Client) -> None:
    values = {"B02": [0.04] * 12, "B04": [0.05] * 12, "B08": [0.3] * 12}
    one = {"dates": [str(d) for d in YEAR], **values}
    near, far = {"lon": 6.5, "lat": 50.5}, {"lon": 3.0, "lat": 50.5}
    body = {
        "series": [{"id": "a", **one, **near}, {"id": "b", **one}, {"id": "c", **one, **far}],
        "model": "forecast-away",
        "backtest": False,
    }
    response = placed.post("/forecast", json=body)
    a, b, c = (result["NDVI"]["q50"][0] for result in response.json()["results"])
    assert (b, c) == pytest.approx((a, a + ELSEWHERE))
    detail = warnings_of(response)["outside_training"]
    assert detail.startswith("series 'c' is about 2")
    assert "'a'" not in detail
    assert "'b'" not in detail
    # The same in a job, which stores the request.
    job = placed.post("/forecast", json=body, headers={"Prefer": "respond-async"})
    assert waited(placed, job.json()["jobID"])["status"] == "successful"
    later = placed.get(f"/jobs/{job.json()['jobID']}/result").json()
    assert later["results"] == response.json()["results"]
    # The warning names the farthest, and states the scores once.
    farther = {"lon": -40.0, "lat": 10.0}
    listed = [{"id": "c", **one, **far}, {"id": "d", **one, **farther}, {"id": "a", **one, **near}]
    several = placed.post("/forecast", json={**body, "series": listed})
    detail = warnings_of(several)["outside_training"]
    assert detail.startswith("series 'd', the farthest of 2, is about ")
    assert detail.count("where a region") == 1
    lacking = {**body, "series": [{"id": "a", **one, "lon": 3.0}]}
    problem = placed.post("/forecast", json=lacking).json()
    assert problem["status"] == 422
    assert "lon is given without lat: give both or none" in problem["detail"]


def test_every_answer_states_what_it_is_good_for(placed: httpx.Client, tmp_path: Path) -> None:
    files, data = stack(tmp_path), {"model": "away"}
    lon, lat = transform(UTM, "EPSG:4326", [500_035], [5_599_965])
    points = collection({"type": "Point", "coordinates": [lon[0], lat[0]]})
    ring = [(lon[0] + x, lat[0] + y) for x, y in CORNERS]
    text = collection({"type": "Polygon", "coordinates": [ring]})
    fields = [*files, ("fields", ("fields.geojson", text, "application/geo+json"))]
    answers = [
        ask(placed, "classify-pixels", files, **data),
        placed.post("/classify-pixels", files=files, data={**data, "points": points}),
        placed.post("/classify-pixels", files=fields, data=data),
        placed.post(
            "/classify-pixels",
            files=files,
            data={**data, "outputs": "polygons"},
            headers={"Accept": "application/geo+json"},
        ),
    ]
    for answer in answers:
        assert answer.json()["intended_use"] == USE
        assert "outside_training" in warnings_of(answer)
    values = dict.fromkeys(("B02", "B04", "B08"), [0.1] * 12)
    one = {"id": "a", "dates": [str(d) for d in YEAR], **values}
    series = placed.post("/classify-pixels", json={"series": [one], **data})
    assert series.status_code == 200, series.text
    assert series.json()["intended_use"] == USE
    assert "outside_training" not in warnings_of(series)
    archive = placed.post(
        "/classify-pixels", files=files, data=data, headers={"Accept": "application/zip"}
    )
    assert "outside_training" in archive.headers["PIMC-Warning"]
    with ZipFile(BytesIO(archive.content)) as members:
        item = json.loads(members.read("item.json"))
        with rasterio.MemoryFile(members.read("class.tif")) as file, file.open() as raster:
            assert raster.tags()["PIMC_INTENDED_USE"] == USE
    assert item["properties"]["pimc:intended_use"] == USE


# Sensors and dated numbers ------------------------------------------------------------------


def test_another_sensor_is_rejected(api: httpx.Client, tmp_path: Path) -> None:
    files = [
        ("files", (f"LC08_L2SP_198024_{name[:4]}{name[5:7]}{name[8:10]}_02_T1.tif", data, kind))
        for _, (name, data, kind) in stack(tmp_path)
    ]
    response = ask(api, "classify-pixels", files)
    assert (response.status_code, response.json()["code"]) == (422, "wrong_sensor")
    assert warnings_of(ask(api, "classify-pixels", files, sensor="sentinel-2")) == {}
    assert (
        ask(api, "classify-pixels", files, sensor="landsat-8").json()["code"] == "invalid_request"
    )


def test_numbers_from_a_date_on_survive_a_job(tmp_path: Path) -> None:
    file = SourceFile(name="a.tif", path=tmp_path / "a.tif")
    raw = {"offset": ["0, 2022-01-25:-0.1"], "scale": ["0.0001"], "sensor": ["hls"]}
    request = read_parameters("classify-pixels", raw).request("classify-pixels", (file,))
    assert request.stack.offset == ((date.min, 0), (date(2022, 1, 25), -0.1))
    assert (request.stack.scale, request.stack.sensor) == (0.0001, "hls")
    document = json.loads(json.dumps(request_document(request, tmp_path)))
    assert request_of(document, tmp_path).stack == request.stack


@pytest.mark.parametrize(
    "offset",
    [
        [[1, 2], ["a", 1]],
        [["2022-01-25", -0.1]],
        [[{}, 1]],
        {"2022-01-25": -0.1},
        [None],
        "0,0",
        [[]],
        ["2022-01-25:" + "9" * 5000],
    ],
)
def test_no_json_number_causes_an_internal_error(offset: Any) -> None:
    body = {"items": [{"href": "/data/a.tif"}], "offset": offset}
    with pytest.raises(InvalidRequest):
        read_items("classify-pixels", json.dumps(body).encode(), allowed=True)


def test_json_takes_numbers_and_texts() -> None:
    for offset, expected in [
        (-0.1, -0.1),
        ("-0.1", -0.1),
        ([-0.1], -0.1),
        ("2022-01-25:-0.1", ((date(2022, 1, 25), -0.1),)),
        (["0", "2022-01-25:-0.1"], ((date.min, 0.0), (date(2022, 1, 25), -0.1))),
    ]:
        body = {"items": [{"href": "/data/a.tif"}], "offset": offset}
        found = read_items("classify-pixels", json.dumps(body).encode(), allowed=True)
        assert found is not None
        assert found[1].offset == expected


@pytest.mark.parametrize(
    "raw",
    [
        {"offset": ["2022-01-25"]},
        {"offset": ["2022-01-25:x"]},
        {"offset": ["-0.1,-0.2"]},
        {"offset": ["nan"]},
        {"offset": ["2022-01-25:inf"]},
        {"offset": ["2022-13-25:1"]},
        {"scale": ["0"]},
        {"scale": ["2022-01-25:-1"]},
    ],
)
def test_numbers_that_are_not_understood_are_rejected(raw: dict[str, list[str]]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(raw))):
        read_parameters("classify-pixels", raw)
