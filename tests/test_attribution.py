"""Attribution: how much each date mattered, against every subset of the dates by hand."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio

from benchmarks.serving import served
from benchmarks.tiny_zoo import CLASSES, SHARPNESS, write_zoo
from models.registry import ZOO, Registry
from service.infer.attribution import date_attribution, subsets
from service.infer.engine import Engine
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.stack import open_stack
from service.run.plan import plan_raster
from service.run.raster import make_work, run_raster
from tests.kits.marks import in_all_tests
from tests.kits.rasters import NORTH_UP, UTM, write

H, W = 40, 50
DATES = ("2021-01-10", "2021-03-10", "2021-06-10", "2021-09-10")
BANDS = ("B02", "B04", "B08")
HOLE = (slice(3, 9), slice(5, 20))
"""Pixels without an observation on the second date."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> list[SourceFile]:
    folder, random = tmp_path_factory.mktemp("stack"), np.random.default_rng(5)
    files = []
    for day in DATES:
        pixels = random.integers(300, 6000, (len(BANDS), H, W)).astype(np.uint16)
        if day == DATES[1]:
            pixels[:, *HOLE] = 0
        files.append(write(folder / f"{day}.tif", pixels, descriptions=BANDS, nodata=0))
    return files


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def api(zoo: Path) -> Iterator[httpx.Client]:
    with served(model_dir=zoo) as client:
        yield client


def post(api: httpx.Client, stack: list[SourceFile], **fields: Any) -> httpx.Response:
    files = [("files", (file.name, file.path.read_bytes(), "image/tiff")) for file in stack]
    return api.post("/classify-pixels", files=files, data=fields)


def raster(response: httpx.Response) -> tuple[np.ndarray, tuple[str, ...]]:
    assert response.status_code == 200, response.text
    with rasterio.open(io.BytesIO(response.content)) as file:
        assert (file.crs, file.transform) == (rasterio.CRS.from_string(UTM), NORTH_UP)
        return file.read(), file.descriptions


@pytest.fixture(scope="module")
def expected(stack: list[SourceFile]) -> np.ndarray:
    """Attributions (T, H, W) by hand: the tiny model is a softmax of the mean over clear dates."""
    layers = []
    for file in stack:
        with rasterio.open(file.path) as plain:
            layers.append(plain.read(masked=True).filled(0))
    values = np.stack(layers) / 10_000
    clear = values[:, :1] > 0
    every = list(itertools.product([False, True], repeat=len(stack)))
    probability = []
    for kept in every:
        used = clear & np.reshape(kept, (-1, 1, 1, 1))
        count = used.sum(axis=0)
        weight = np.exp(SHARPNESS * (values * used).sum(axis=0) / np.maximum(count, 1))
        probability.append(np.where(count > 0, weight / weight.sum(axis=0), 1 / len(CLASSES)))
    best = probability[-1].argmax(axis=0)[None]
    sure = [np.take_along_axis(p, best, axis=0)[0] for p in probability]
    dates = []
    for t in range(len(stack)):
        with_it = np.mean([p for p, kept in zip(sure, every, strict=True) if kept[t]], axis=0)
        without = np.mean([p for p, kept in zip(sure, every, strict=True) if not kept[t]], axis=0)
        dates.append(np.where(clear[t, 0], with_it - without, np.nan))
    return np.stack(dates)


def test_a_date_has_the_mean_probability_with_it_less_that_without_it(
    api: httpx.Client, stack: list[SourceFile], expected: np.ndarray
) -> None:
    found, names = raster(post(api, stack, outputs="attribution"))
    assert names == DATES
    assert np.nanmax(np.abs(expected)) > 0.1
    assert np.isnan(expected).sum() == np.isnan(expected[1][HOLE]).sum() > 0
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_points_have_the_attributions_of_their_pixels(
    api: httpx.Client, stack: list[SourceFile], expected: np.ndarray
) -> None:
    places = [(5, 6), (30, 40)]
    with rasterio.open(stack[0].path) as file:
        xs, ys = rasterio.transform.xy(file.transform, *zip(*places, strict=True))
        lon, lat = rasterio.warp.transform(file.crs, "EPSG:4326", xs, ys)
    points = {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "properties": {},
                "geometry": {"type": "Point", "coordinates": place},
            }
            for place in zip(lon, lat, strict=True)
        ],
    }
    response = post(api, stack, outputs="attribution", points=json.dumps(points))
    for place, feature in zip(places, response.json()["features"], strict=True):
        found = feature["properties"]["attribution"]
        assert tuple(found) == DATES
        values = [np.nan if value is None else value for value in found.values()]
        np.testing.assert_allclose(values, expected[:, *place], atol=2e-6)


def test_a_series_has_the_attributions_of_its_pixel(
    api: httpx.Client, stack: list[SourceFile], expected: np.ndarray
) -> None:
    row, col = 5, 6  # not clear on the second date
    values = []
    for file in stack:
        with rasterio.open(file.path) as plain:
            values.append(plain.read()[:, row, col] / 10_000)
    bands = {band: [float(v[b]) if v[b] else None for v in values] for b, band in enumerate(BANDS)}
    series = {"id": "pixel", "dates": DATES, **bands}
    body = {"series": [series, {**series, "id": "twin"}], "outputs": ["attribution"]}
    results = api.post("/classify-pixels", json=body).json()["results"]
    for result in results:
        found = result["attribution"]
        assert tuple(found) == DATES
        values = [np.nan if value is None else value for value in found.values()]
        np.testing.assert_allclose(values, expected[:, row, col], atol=2e-6)
    plain = api.post("/classify-pixels", json={"series": [series]}).json()["results"]
    assert "attribution" not in plain[0]


@pytest.mark.slow
def test_windows_give_the_attributions_of_the_whole(
    zoo: Path, stack: list[SourceFile], tmp_path: Path
) -> None:
    found = []
    with Engine(Registry.load(zoo), providers="cpu") as engine:
        model = engine.models["pixels-landcover"]
        opened = open_stack(stack, StackOptions(), bands=model.card.bands, max_bytes=2**30)
        run = plan_raster(model, opened, outputs=("class", "attribution"))
        for name, window_bytes in (("windows", 20_000), ("whole", 2**30)):
            folder = tmp_path / name
            folder.mkdir()
            files = run_raster(make_work(run, folder, window_bytes=window_bytes)).files
            with rasterio.open(files["attribution"]) as file:
                found.append(file.read())
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("dates", [1, 5, 6, 7, 31, 36, 73])
def test_dates_and_pairs_of_dates_are_tried_equally_often(dates: int) -> None:
    signs = np.where(subsets(dates), 1, -1)
    count = len(signs)
    assert (signs.sum(axis=0) == 0).all()
    assert (signs.T @ signs == count * np.eye(dates)).all()
    # No pair of dates acts together as a single date does.
    pairs = signs[:, :, None] * signs[:, None, :]
    assert (np.einsum("rt,rij->tij", signs, pairs) == 0).all()


@pytest.fixture(scope="module")
def built_in() -> Iterator[Engine]:
    with Engine(Registry.load(ZOO), providers="cpu") as engine:
        yield engine


@pytest.mark.parametrize("pulse", [9, *in_all_tests(3, 12, 15)])
def test_the_one_date_that_differs_matters_most(built_in: Engine, pulse: int) -> None:
    """Bare soil all year but for one green date: the other dates stand in for one another."""
    soil = {"B02": 0.08, "B04": 0.15, "B08": 0.22}
    green = {"B02": 0.03, "B04": 0.03, "B08": 0.5}
    days = np.arange(0, 360, 18, dtype=np.float32)
    model = built_in.models["pixels-landcover"]
    bands = model.card.bands
    values = np.tile(np.float32([soil[b] for b in bands]), (1, len(days), 1))
    values[0, pulse] = [green[b] for b in bands]
    valid = np.ones((1, len(days)), np.bool_)
    valid[0, 7] = False
    probabilities = model.pixels(values, valid, days, 1)
    found = date_attribution(model, values, valid, days, 1, probabilities)[0]
    assert np.isnan(found[7])
    assert np.nanargmax(np.abs(found)) == pulse
    assert np.isfinite(np.delete(found, 7)).all()


@pytest.mark.parametrize("other", [{"smooth": "1"}, {"min_area": "0.5"}])
def test_a_cleaned_map_has_no_attribution(
    api: httpx.Client, stack: list[SourceFile], other: dict[str, str]
) -> None:
    response = post(api, stack, outputs="attribution", **other)
    assert response.status_code == 422
    assert f"cannot be combined with {next(iter(other))}" in response.json()["detail"]
