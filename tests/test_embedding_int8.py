"""Embeddings as int8: what comes back through GDAL, rioxarray and the SDK, beside float32."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio
import rioxarray
import xarray
from typer.testing import CliRunner

from benchmarks.serving import served
from benchmarks.tiny_zoo import INT8_SCALE, write_bundle, write_zoo
from models.card import ModelCard
from pimc_client import Client
from pimc_client.cli import app
from service.read.geotiff import SourceFile
from service.write.predictions import NO_EMBEDDING, EmbeddingPredictions, quantised
from tests.kits.jobs import ASYNC, waited
from tests.kits.rasters import NORTH_UP, write

H, W, DATES = 40, 60, 4
BANDS = ("B02", "B04", "B08")
LARGEST = 127 * INT8_SCALE


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> list[SourceFile]:
    """Noise around a level per pixel, up to 0.4, with a hole that is never seen."""
    folder, random = tmp_path_factory.mktemp("stack"), np.random.default_rng(5)
    level = random.uniform(300, 3500, (3, H, W))
    files = []
    for month in range(1, DATES + 1):
        values = (level * random.uniform(0.9, 1.1, (3, H, W))).astype(np.uint16)
        values[:, 10:15, 20:30] = 0
        files.append(
            write(folder / f"s_2021-0{month}-01.tif", values, descriptions=BANDS, nodata=0)
        )
    return files


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    zoo = write_zoo(tmp_path_factory.mktemp("zoo"))
    write_bundle(zoo, "embed-plain", "embed", "pixel", default=False, embedding_int8=None)
    with served(model_dir=zoo) as client:
        yield client


def posted(
    api: httpx.Client, stack: list[SourceFile], headers: dict[str, str] | None = None, **data: Any
) -> httpx.Response:
    files = [("files", (s.name, s.path.read_bytes())) for s in stack]
    return api.post("/embed", files=files, data=data, headers=headers)


@pytest.fixture(scope="module")
def plain(api: httpx.Client, stack: list[SourceFile]) -> np.ndarray:
    """The float32 embeddings (3, H, W)."""
    with rasterio.MemoryFile(posted(api, stack).content) as memory, memory.open() as file:
        return file.read()


@pytest.fixture(scope="module")
def small(
    api: httpx.Client, stack: list[SourceFile], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The COG of int8."""
    path = tmp_path_factory.mktemp("int8") / "embedding.tif"
    path.write_bytes(posted(api, stack, dtype="int8").content)
    return path


def check_near(found: np.ndarray, plain: np.ndarray) -> None:
    """Within half a step of the values, clipped at the largest; missing where these are."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(plain))
    np.testing.assert_allclose(found, np.minimum(plain, LARGEST), atol=0.501 * INT8_SCALE)


def test_the_file_says_how_its_int8_become_values(small: Path, plain: np.ndarray) -> None:
    with rasterio.open(small) as file:
        assert file.dtypes == ("int8",) * 3
        assert file.scales == (INT8_SCALE,) * 3
        assert file.offsets == (0.0,) * 3
        assert file.nodata == NO_EMBEDDING
        pixels = file.read(masked=True)
        values = (pixels * file.scales[0] + file.offsets[0]).filled(np.nan)
    check_near(values, plain)
    assert (plain > LARGEST).any()  # some are clipped
    assert np.isnan(plain).any()  # some are missing


def test_rioxarray_reads_the_values(small: Path, plain: np.ndarray) -> None:
    with rioxarray.open_rasterio(small, mask_and_scale=True) as array:
        check_near(array.to_numpy(), plain)


@pytest.mark.slow
def test_overviews_are_means_of_values_that_are_there(api: httpx.Client, tmp_path: Path) -> None:
    values = np.full((3, 512, 512), 1000, np.uint16)
    values[:, :, 1::2] = 0
    stack = [
        write(tmp_path / f"s_2021-0{n}-01.tif", values, descriptions=BANDS, nodata=0)
        for n in (1, 2)
    ]
    path = tmp_path / "embedding.tif"
    path.write_bytes(posted(api, stack, dtype="int8").content)
    with rasterio.open(path, overview_level=0) as file:
        assert set(np.unique(file.read())) == {round(0.1 / INT8_SCALE)}


def test_the_sdk_reads_the_values(
    api: httpx.Client, stack: list[SourceFile], plain: np.ndarray
) -> None:
    paths = [source.path for source in stack]
    with Client(str(api.base_url)) as pimc:
        raster = pimc.embed(paths, dtype="int8")
        assert raster.array.dtype == np.int8
        assert raster.scale == INT8_SCALE
        check_near(raster.values, plain)
        decoded = xarray.decode_cf(raster.to_xarray().to_dataset(name="embedding"))
        check_near(decoded["embedding"].to_numpy(), plain)
        whole = pimc.embed(paths)
        assert whole.scale is None
        np.testing.assert_array_equal(whole.values, plain)
        points = [NORTH_UP @ (5.5, 6.5)]
        lonlat = rasterio.warp.transform(
            "EPSG:32631", "EPSG:4326", *map(list, zip(*points, strict=True))
        )
        place = list(zip(*lonlat, strict=True))
        (exact,) = pimc.embed(paths, points=place)
        (rounded,) = pimc.embed(paths, points=place, dtype="int8")
        assert rounded.properties["scale"] == INT8_SCALE
        check_near(rounded.result.values, exact.result.values)


def test_means_of_fields_are_rounded_once(api: httpx.Client, stack: list[SourceFile]) -> None:
    corners = [(2.5, 3.5), (12.5, 3.5), (12.5, 20.5), (2.5, 20.5), (2.5, 3.5)]
    xs, ys = zip(*(NORTH_UP @ corner for corner in corners), strict=True)
    ring = list(zip(*rasterio.warp.transform("EPSG:32631", "EPSG:4326", xs, ys), strict=True))
    fields = json.dumps({"type": "Polygon", "coordinates": [ring]})
    exact = posted(api, stack, fields=fields).json()["features"][0]["properties"]
    rounded = posted(api, stack, fields=fields, dtype="int8").json()["features"][0]["properties"]
    assert all(isinstance(value, int) for value in rounded["embedding"])
    check_near(np.array(rounded["embedding"]) * rounded["scale"], np.array(exact["embedding"]))
    table = posted(api, stack, {"Accept": "text/csv"}, fields=fields, dtype="int8").text
    (row,) = csv.DictReader(io.StringIO(table))
    assert [int(row[f"embedding_{d}"]) for d in range(3)] == rounded["embedding"]
    assert float(row["scale"]) == INT8_SCALE


def test_a_job_has_the_same_file(api: httpx.Client, stack: list[SourceFile], small: Path) -> None:
    job = posted(api, stack, ASYNC, dtype="int8").json()["jobID"]
    assert waited(api, job)["status"] == "successful"
    assert api.get(f"/jobs/{job}/result").content == small.read_bytes()


def test_the_summary_states_scale_and_clipped_share(
    api: httpx.Client, stack: list[SourceFile], plain: np.ndarray
) -> None:
    found = posted(api, stack, {"Accept": "application/json"}, dtype="int8").json()["embedding"]
    there = plain[~np.isnan(plain)]
    assert (found["dtype"], found["scale"]) == ("int8", INT8_SCALE)
    assert found["clipped_share"] == pytest.approx((there > 127.5 * INT8_SCALE).mean())


def test_a_model_without_a_scale_rejects_int8(api: httpx.Client, stack: list[SourceFile]) -> None:
    response = posted(api, stack, model="embed-plain", dtype="int8")
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert response.json()["errors"][0]["field"] == "dtype"
    assert "embed-plain@0.0.1" in response.json()["detail"]


@pytest.mark.parametrize("task", ["classify-pixels", "forecast", "landcover"])
def test_int8_is_for_embeddings_only(api: httpx.Client, stack: list[SourceFile], task: str) -> None:
    files = [("files", (s.name, s.path.read_bytes())) for s in stack]
    response = api.post(f"/{task}", files=files, data={"dtype": "int8"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "dtype"


def test_every_float_becomes_the_nearest_step() -> None:
    embeddings = np.array([[0.0, 0.3, -0.3, 126.4, 127.6, -500.0, np.nan, np.inf]], np.float32)
    found = quantised(embeddings * 0.5, 0.5)
    assert found.dtype == np.int8
    assert found[0].tolist() == [0, 0, 0, 126, 127, -127, -128, 127]
    many = np.random.default_rng(0).normal(size=(9000, 3)).astype(np.float32)
    apart = np.concatenate([quantised(row[None], 0.02) for row in many])
    np.testing.assert_array_equal(quantised(many, 0.02), apart)


def test_a_window_without_an_embedding_has_no_bands() -> None:
    predictions = EmbeddingPredictions(size=3, scale=0.5)
    assert predictions.bands(np.zeros((0, 3), np.float32))["embedding"].shape == (3, 0)


def test_only_cards_of_embeddings_may_state_a_scale(tmp_path: Path) -> None:
    path = write_bundle(tmp_path, "x", "forecast", "pixel") / "card.json"
    card = json.loads(path.read_text()) | {"embedding_int8": {"scale": 0.1}}
    with pytest.raises(ValueError, match="embedding_int8"):
        ModelCard.model_validate(card)


def test_the_command_writes_int8(
    api: httpx.Client, stack: list[SourceFile], small: Path, tmp_path: Path
) -> None:
    files, out = [str(source.path) for source in stack], tmp_path / "embedding.tif"
    words = ["--url", str(api.base_url), "embed", *files, "--dtype", "int8", "-o", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert out.read_bytes() == small.read_bytes()
