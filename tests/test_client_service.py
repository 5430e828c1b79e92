"""The SDK against the service itself, over a real socket; sync and async alike.

The models are tiny bundles, whose predictions are known, and the zoo's bundles if available.
Results decoded by the SDK are compared with rasterio, results of one method with those of another.
"""

from __future__ import annotations

import csv
import json
import re
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch
from urllib.parse import urlsplit

import geopandas
import httpx
import numpy as np
import pytest
import rasterio
from rasterio.io import MemoryFile
from rasterio.warp import transform as reproject
from shapely.geometry import box

from benchmarks import tiny_zoo
from benchmarks.serving import served
from models.registry import ZOO, Registry
from pimc_client import (
    BodyTooLarge,
    GridMismatch,
    InvalidRequest,
    NotAGeoTIFF,
    Overloaded,
    Raster,
    Rasters,
    Series,
    Unauthorized,
    UnknownModel,
    WrongTask,
)
from service.api import admission
from tests.kits.client import connected
from tests.kits.forks import ran
from tests.kits.patience import PATIENCE, soon
from tests.kits.rasters import write

pytestmark = pytest.mark.slow

KINDS = pytest.mark.parametrize("kind", ["sync", "async"])
_TINY = [("tiny", "sync"), ("tiny", "async")]
# The clients differ only in how they send, which the tiny bundles show. Only what depends on what a
# bundle describes, such as its bands, classes and horizon, is shown with the zoo's too.
# The scope groups the tests by service: without it, one starts whenever the parameter changes.
SERVICES = pytest.mark.parametrize(
    ("url", "kind"), [*_TINY, ("zoo", "async")], indirect=["url"], scope="module"
)
# Behaviour that does not depend on the models.
TINY = pytest.mark.parametrize(("url", "kind"), _TINY, indirect=["url"], scope="module")
COMMAND = pytest.mark.parametrize("url", ["tiny"], indirect=True)
ROOT = Path(__file__).parents[1]
H, W, T = 70, 90, 12
BANDS = ("B02", "B03", "B04", "B08")
DATES = [date(2021, 1, 5) + timedelta(days=30 * t) for t in range(T)]
DEFAULTS = {"pixels-landcover", "forecast-vi", "landcover-eurosat", "embed-pixel", "embed-patch"}


@pytest.fixture(scope="module")
def url(request, tmp_path_factory):
    """The address of a running service with the bundles of the parameter: `tiny` or `zoo`."""
    if request.param == "zoo":
        lacking = DEFAULTS - set(Registry.load(ZOO).bundles)
        if lacking:
            pytest.skip(f"models/zoo has no {', '.join(sorted(lacking))}")
        with served() as http:
            yield str(http.base_url)
        return
    folder = tiny_zoo.write_zoo(tmp_path_factory.mktemp("zoo"))
    with served(model_dir=folder) as http:
        yield str(http.base_url)


@pytest.fixture(scope="module")
def values():
    """(T, C, H, W) reflectance x 10,000 of a landscape with seasons; one corner has no data."""
    random = np.random.default_rng(7)
    season = 0.5 + 0.4 * np.sin(np.linspace(0, 2 * np.pi, T))[:, None, None]
    green = random.random((H, W)) * season
    stack = np.stack(
        [0.05 + 0 * green, 0.06 + 0.02 * green, 0.12 - 0.08 * green, 0.15 + 0.4 * green], axis=1
    )
    noisy = stack + random.normal(0, 0.003, stack.shape)
    scaled = np.clip(noisy * 10_000, 1, None).astype(np.uint16)
    scaled[:, :, :8, :8] = 0
    return scaled


@pytest.fixture(scope="module")
def paths(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("stack")
    return [
        write(folder / f"{day}.tif", one, descriptions=BANDS, nodata=0).path
        for day, one in zip(DATES, values, strict=True)
    ]


@pytest.fixture(scope="module")
def points(paths):
    """(longitude, latitude, row, column) of three places with data, and of one without."""
    with rasterio.open(paths[0]) as file:
        places = [(20, 30), (69, 89), (40, 12), (2, 2)]
        xy = [file.xy(row, column) for row, column in places]
        lon, lat = reproject(file.crs, "EPSG:4326", *zip(*xy, strict=True))
    return [(x, y, *place) for x, y, place in zip(lon, lat, places, strict=True)]


def read_back(raster):
    with MemoryFile(raster.content) as memory, memory.open() as file:
        return file.read(), file.descriptions, file.crs, file.transform, file.nodata


def agrees_with_rasterio(raster: Raster, path):
    pixels, descriptions, crs, transform, nodata = read_back(raster)
    expected = pixels[0] if len(pixels) == 1 else pixels
    np.testing.assert_array_equal(raster.array, expected)
    assert raster.descriptions == descriptions
    assert raster.crs == str(crs)
    assert raster.transform == pytest.approx(tuple(transform)[:6])
    np.testing.assert_equal(raster.nodata, nodata)
    with rasterio.open(path) as source:
        assert raster.crs == str(source.crs)
        assert raster.transform[2::3] == pytest.approx((source.transform.c, source.transform.f))


@SERVICES
def test_the_service_is_ready_and_lists_its_models(url, kind):
    with connected(kind, url) as client:
        found = client.ready()
        assert found
        assert found.provider == "CPUExecutionProvider"
        models = client.models()
        assert set(models.defaults.values()) >= DEFAULTS
        assert set(found.models) == {model.id for model in models}
        card = client.model("pixels-landcover")
        assert card == models["pixels-landcover"]
        assert card.window.steps > 1
        assert client.model(card.id) == card


@SERVICES
def test_a_class_map_is_decoded_as_by_rasterio(url, kind, paths, tmp_path):
    with connected(kind, url) as client:
        classes = client.classify_pixels(paths)
        card = client.model("pixels-landcover")
    agrees_with_rasterio(classes, paths[0])
    assert classes.array.shape == (H, W)
    assert (classes.array[:8, :8] == 255).all()
    assert (classes.array != 255).any()
    assert classes.legend == card.legend
    assert set(np.unique(classes.array)) <= {*card.legend, 255}
    assert all(classes.header.colors[v] == c.color for v, c in classes.legend.items())
    assert classes.model == card.id
    assert classes.provider == "CPUExecutionProvider"
    assert classes.request_id
    assert set(classes.timing) == {"read", "infer", "write"}
    with rasterio.open(classes.save(tmp_path / "classes.tif")) as file:
        assert file.profile["driver"] == "GTiff"


@TINY
def test_outputs_by_name_are_consistent(url, kind, paths, tmp_path):
    names = ["class", "confidence", "entropy", "probabilities"]
    with connected(kind, url) as client:
        outputs = client.classify_pixels(paths, outputs=names)
        alone = client.classify_pixels(paths, outputs="confidence")
        listed = client.classify_pixels(paths, outputs=["confidence"])
    assert isinstance(outputs, Rasters)
    assert list(outputs) == names
    for raster in outputs.values():
        agrees_with_rasterio(raster, paths[0])
    best = outputs["probabilities"].array
    seen = outputs["class"].array != 255
    np.testing.assert_array_equal(outputs["class"].array[seen], best.argmax(axis=0)[seen])
    np.testing.assert_array_equal(outputs["confidence"].array, best.max(axis=0))
    np.testing.assert_array_equal(alone.array, outputs["confidence"].array)
    assert alone.name == "confidence"
    np.testing.assert_array_equal(listed["confidence"].array, alone.array)
    legend = outputs["class"].legend.values()
    assert outputs["probabilities"].descriptions == tuple(c.name for c in legend)
    saved = outputs.save(tmp_path)
    assert {path.name for path in saved} == {f"{name}.tif" for name in names}


@SERVICES
def test_a_forecast_continues_the_last_date(url, kind, paths):
    with connected(kind, url) as client:
        raster = client.forecast(paths, horizon=2, outputs=["q10", "q50", "q90"])
        card = client.model("forecast-vi")
    agrees_with_rasterio(raster, paths[0])
    step = timedelta(days=card.window.step_days)
    expected = [
        f"{index}_{DATES[-1] + step * ahead}_{quantile}"
        for index in ("NDVI", "EVI", "SAVI")
        for ahead in (1, 2)
        for quantile in ("q10", "q50", "q90")
    ]
    assert list(raster.descriptions) == expected
    assert np.isnan(raster.array[:, :8, :8]).all()
    low, middle, high = raster.array[:3, 20:, 20:]
    assert (low <= middle).all()
    assert (middle <= high).all()


@TINY
@pytest.mark.parametrize("stride", [64, 3])
def test_land_cover_lies_on_a_coarser_grid(url, kind, paths, stride):
    with connected(kind, url) as client:
        cover = client.landcover(paths[3:6], stride=stride)
    rows, columns = (H - 64) // stride + 1, (W - 64) // stride + 1
    assert cover.shape == (1, rows, columns)
    agrees_with_rasterio(cover, paths[0])
    assert cover.transform[0] == pytest.approx(10.0 * stride)
    assert cover.legend


@SERVICES
@pytest.mark.parametrize("modality", ["pixel", "patch"])
def test_embeddings_have_one_band_per_dimension(url, kind, paths, modality):
    with connected(kind, url) as client:
        raster = client.embed(paths, modality=modality)
    agrees_with_rasterio(raster, paths[0])
    assert raster.name == "embedding"
    assert raster.model.startswith(f"embed-{modality}@")


@TINY
def test_points_and_series_agree_with_the_raster(url, kind, paths, points, values):
    places = [(lon, lat) for lon, lat, _, _ in points]
    with connected(kind, url) as client:
        outputs = client.classify_pixels(paths, outputs=["class", "confidence"])
        found = client.classify_pixels(paths, points=[*places, (0.0, 0.0)])
        in_series = client.classify_series(
            [
                Series(
                    id=str(n),
                    dates=DATES,
                    **{
                        band: values[:, BANDS.index(band), row, column] * 1e-4
                        for band in ("B02", "B04", "B08")
                    },
                )
                for n, (_, _, row, column) in enumerate(points[:3])
            ]
        )
    assert [p.status for p in found] == ["ok", "ok", "ok", "no_data", "outside"]
    assert found[3].result.label is None
    for (lon, lat, row, column), point, single in zip(
        points, found, [*in_series, None], strict=False
    ):
        assert (point.lon, point.lat) == pytest.approx((lon, lat))
        if single is None:
            continue
        value = outputs["class"].array[row, column]
        assert point.result.value == single.value == value
        assert point.result.label == single.label == outputs["class"].legend[value].name
        expected = pytest.approx(float(outputs["confidence"].array[row, column]), abs=1e-4)
        assert point.result.confidence == expected
        assert single.confidence == expected
        assert sum(single.probabilities.values()) == pytest.approx(1, abs=1e-4)
    assert [one.id for one in in_series] == ["0", "1", "2"]


@SERVICES
def test_series_are_accepted_with_every_band_of_a_model(url, kind, values, points, tmp_path):
    with connected(kind, url) as client:
        # The tiny zoo has a model that always fails.
        served = [card for card in client.models() if card.name != "pixels-brittle"]
        cards = [card for card in served if card.task == "classify-pixels"]
        for card in cards:
            # The landscape lacks some bands; their reflectance lies between that of the others.
            rest = [
                values[:, n % 4] // 2 + values[:, (n + 1) % 4] // 2 for n in range(len(card.bands))
            ]
            known = dict(zip(BANDS, values.swapaxes(0, 1), strict=True))
            bands = {
                band: known.get(band, other) for band, other in zip(card.bands, rest, strict=True)
            }
            stack = [
                write(
                    tmp_path / f"{day}.tif",
                    np.stack([band[t] for band in bands.values()]),
                    descriptions=tuple(bands),
                    nodata=0,
                ).path
                for t, day in enumerate(DATES)
            ]
            places = [(lon, lat) for lon, lat, *_ in points[:3]]
            expected = client.classify_pixels(stack, points=places, model=card.id)
            series = [
                Series(
                    id=str(n),
                    dates=np.array(DATES, "datetime64[D]"),
                    **{name: band[:, row, column] * 1e-4 for name, band in bands.items()},
                )
                for n, (_, _, row, column) in enumerate(points[:3])
            ]
            found = client.classify_series(series, model=card.id)
            assert [one.value for one in found] == [point.result.value for point in expected]
            for one, point in zip(found, expected, strict=True):
                assert one.confidence == pytest.approx(point.result.confidence, abs=1e-4)


@TINY
def test_forecasts_and_embeddings_of_points_and_series_agree(url, kind, paths, points, values):
    lon, lat, row, column = points[0]
    bands = {
        band: values[:, BANDS.index(band), row, column] * 1e-4 for band in ("B02", "B04", "B08")
    }
    series = [Series(id="one", dates=DATES, **bands)]
    with connected(kind, url) as client:
        raster = client.forecast(paths, backtest=False)  # points are not tested either
        point = client.forecast(paths, points=[(lon, lat)])[0].result
        single = client.forecast_series(series, horizon=2)[0]
        embedded = client.embed_series(series)[0]
        everywhere = client.embed(paths)
    horizon = len(raster.descriptions) // 3
    assert len(point.dates) == horizon
    assert single.dates == point.dates[:2]
    assert all(a < b for a, b in pairwise(point.dates))
    np.testing.assert_allclose(point["NDVI"]["q50"], raster.array[:horizon, row, column], atol=2e-3)
    np.testing.assert_allclose(single["NDVI"]["q50"], point["NDVI"]["q50"][:2], atol=2e-3)
    np.testing.assert_allclose(embedded.values, everywhere.array[:, row, column], atol=2e-3)


@TINY
def test_a_summary_counts_the_classes_of_the_map(url, kind, paths):
    with connected(kind, url) as client:
        summary = client.classify_pixels(paths, answer="summary")
        classes = client.classify_pixels(paths)
    counts = {row["value"]: row["pixels"] for row in summary["classes"]}
    assert sum(counts.values()) == (classes.array != 255).sum()
    assert all((classes.array == value).sum() == n for value, n in counts.items())
    assert summary.model == classes.model
    assert sorted(summary["dates_used"]) == [day.isoformat() for day in DATES]


@TINY
def test_files_are_accepted_in_any_form(url, kind, paths):
    data = [(path.name, path.read_bytes()) for path in paths]
    with connected(kind, url) as client:
        expected = client.classify_pixels(paths).array
        opened = [path.open("rb") for path in paths]
        try:
            np.testing.assert_array_equal(client.classify_pixels(opened).array, expected)
        finally:
            for file in opened:
                file.close()
        np.testing.assert_array_equal(client.classify_pixels(data).array, expected)
        dated = client.classify_pixels(
            [(f"{n}.tif", content) for n, (_, content) in enumerate(data)],
            dates=DATES,
            bands=BANDS,
            layout="file-per-date",
            scale=1e-4,
            offset=0.0,
            mask="none",
            model="pixels-landcover",
            start=date(2021, 1, 1),
        )
        np.testing.assert_array_equal(dated.array, expected)


@TINY
def test_a_folder_a_pattern_and_a_zip_give_the_same_stack(url, kind, paths, tmp_path):
    folder = paths[0].parent
    archive = tmp_path / "stack.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in paths:
            packed.write(path, f"{folder.name}/{path.name}")
    with connected(kind, url) as client:
        expected = client.classify_pixels(paths)
        for stack in (folder, f"{folder}/*.tif", archive):
            found = client.classify_pixels(stack)
            np.testing.assert_array_equal(found.array, expected.array)
        summary = client.classify_pixels(folder, answer="summary", dates=np.array(DATES, "M8[D]"))
        assert summary["dates_used"] == [day.isoformat() for day in DATES]


@TINY
def test_a_result_in_xarray_equals_the_file(url, kind, paths, tmp_path):
    with connected(kind, url) as client:
        raster = client.forecast(paths, horizon=2, outputs=["q10", "q90"])
    array = raster.to_xarray()
    with rasterio.open(raster.save(tmp_path / "a.tif")) as file:
        for number, name in enumerate(file.descriptions, 1):
            index, day, quantile = name.split("_")
            band = array.sel(index=index, time=day, quantile=quantile)
            np.testing.assert_array_equal(band, file.read(number))
        assert array.x.values[0] == file.xy(0, 0)[0]
        assert array.y.values[-1] == file.xy(H - 1, 0)[1]


def pimc(url, *arguments):
    """Runs the command; returns the exit status, standard output and standard error."""
    done = ran("pimc_client.cli", "--url", url, *map(str, arguments), variables={})
    return done.returncode, done.stdout, done.stderr


@COMMAND
def test_the_command_writes_what_the_client_returns(url, paths, values, points, tmp_path):
    folder = paths[0].parent
    with connected("sync", url) as client:
        expected = client.classify_pixels(paths)
    assert pimc(url, "classify-pixels", folder, "-o", tmp_path)[0] == 0
    with rasterio.open(tmp_path / "class.tif") as file:
        np.testing.assert_array_equal(file.read(1), expected.array)
    command = [sys.executable, "-m", "pimc_client.cli", "--url", url]
    done = subprocess.run(
        [*command, "classify-pixels", folder, "-o", "-"], capture_output=True, cwd=ROOT, check=True
    )
    assert done.stdout == (tmp_path / "class.tif").read_bytes()
    table = tmp_path / "points.csv"
    rows = [f"p{n};{lon};{lat}".replace(".", ",") for n, (lon, lat, *_) in enumerate(points)]
    table.write_text("\n".join(["id;lon;lat", *rows]), encoding="utf-8-sig")
    code, printed, _ = pimc(url, "classify-pixels", folder, "--points", table)
    assert code == 0
    found = json.loads(printed)
    assert [one["status"] for one in found] == ["ok", "ok", "ok", "no_data"]
    _, _, row, column = points[0]
    assert found[0]["value"] == expected.array[row, column]
    series = tmp_path / "series.csv"
    bands = [BANDS.index(band) for band in ("B02", "B04", "B08")]
    lines = [
        ",".join(["one", str(day), *(str(values[t, band, row, column] * 1e-4) for band in bands)])
        for t, day in enumerate(DATES)
    ]
    series.write_text("\n".join(["id,date,B02,B04,B08", *lines]))
    out = tmp_path / "results.csv"
    assert pimc(url, "series", "classify-pixels", series, "-o", out)[0] == 0
    (result,) = csv.DictReader(out.read_text().splitlines())
    assert (result["id"], int(result["value"])) == ("one", expected.array[row, column])


@COMMAND
def test_the_command_runs_jobs(url, paths, tmp_path):
    folder = paths[0].parent
    options = ["--output", "class,confidence"]
    code, job, _ = pimc(url, "classify-pixels", folder, "--job", *options)
    assert code == 0
    job = job.strip()
    code, *_ = pimc(url, "jobs", "result", job, "-o", tmp_path / "maps")
    assert code == 0
    assert {path.name for path in (tmp_path / "maps").glob("*.tif")} == {
        "class.tif",
        "confidence.tif",
    }
    code, *_ = pimc(url, "jobs", "result", job, "--output", "confidence", "-o", tmp_path / "a.tif")
    assert code == 0
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "maps/confidence.tif").read_bytes()
    _, table, _ = pimc(url, "jobs")
    assert [job, "classify-pixels", "successful"] in [
        line.split()[:3] for line in table.splitlines()
    ]


@TINY
def test_fields_count_the_classes_of_the_map(url, kind, paths, tmp_path):
    with rasterio.open(paths[0]) as file:
        # Full pixels: rows 20 to 40, columns 30 to 70; a corner without data; outside the raster.
        sides = [(20, 40, 30, 70), (1, 7, 1, 7), (500, 510, 500, 510)]
        corners = [
            (*file.transform * (left, bottom), *file.transform * (right, top))
            for top, bottom, left, right in sides
        ]
        fields = geopandas.GeoDataFrame(
            {"owner": ["a", "b", "c"]}, geometry=[box(*c) for c in corners], crs=file.crs
        )
    fields.to_file(tmp_path / "fields.gpkg")
    with connected(kind, url) as client:
        classes = client.classify_pixels(paths)
        found = client.classify_pixels(paths, fields=tmp_path / "fields.gpkg")
        same = client.submit("classify-pixels", paths, fields=fields).wait()
        forecast = client.forecast(paths, horizon=1, fields=fields)
        embedding = client.embed(paths, fields=fields)
        one = client.classify_pixels(paths, area=fields.iloc[[0]])
    assert [row["owner"] for row in found] == ["a", "b", "c"]
    assert [row["status"] for row in found] == ["ok", "no_data", "outside"]
    inside = classes.array[20:40, 30:70]
    assert found[0]["pixels"] == pytest.approx(inside.size, rel=1e-3)
    for value, entry in classes.legend.items():
        share = found[0].get(f"share.{entry.name}", 0.0)
        assert share == pytest.approx((inside == value).mean(), abs=2e-3)
    assert [row.get("class") for row in same] == [row.get("class") for row in found]
    assert any(name.startswith("NDVI_") for name in forecast[0])
    assert "embedding_0" in embedding[0]
    assert one.shape[1:] == pytest.approx((20, 40), abs=2)
    out = tmp_path / "fields.csv"
    code, *_ = pimc(url, "fields", paths[0].parent, tmp_path / "fields.gpkg", "-o", out)
    assert code == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["status"] for row in rows] == ["ok", "no_data", "outside"]


@TINY
def test_errors_are_raised_as_the_class_of_their_code(url, kind, paths, tmp_path):
    other = write(
        tmp_path / "2021-12-25.tif", np.ones((4, H, W + 1), np.uint16), descriptions=BANDS
    ).path
    with connected(kind, url) as client:
        with pytest.raises(NotAGeoTIFF) as caught:
            client.classify_pixels([*paths, ("2021-12-30.tif", b"no tiff")])
        assert caught.value.status == 422
        assert caught.value.request_id
        assert "2021-12-30.tif" in caught.value.detail
        with pytest.raises(GridMismatch, match=r"2021-12-25\.tif"):
            client.classify_pixels([*paths, other])
        with pytest.raises(UnknownModel, match="nobody"):
            client.classify_pixels(paths, model="nobody")
        with pytest.raises(UnknownModel):
            client.model("nobody")
        with pytest.raises(WrongTask):
            client.classify_pixels(paths, model="forecast-vi")
        with pytest.raises(InvalidRequest) as invalid:
            client.landcover(paths, stride=65)
        assert [error["field"] for error in invalid.value.errors] == ["stride"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A service with a key, a small upload limit, and one run slot."""
    folder = tiny_zoo.write_zoo(tmp_path_factory.mktemp("guarded"))
    with served(
        model_dir=folder, api_keys="right", max_body_bytes=300_000, max_concurrency=1
    ) as http:
        yield str(http.base_url)


@KINDS
def test_a_request_without_the_key_is_unauthorized(guarded, kind):
    for key in (None, "wrong"):
        with connected(kind, guarded, api_key=key) as client, pytest.raises(Unauthorized):
            client.models()
    with connected(kind, guarded, api_key="right") as client:
        assert client.models()


@KINDS
def test_an_upload_over_the_limit_is_rejected(guarded, kind):
    with (
        connected(kind, guarded, api_key="right") as client,
        pytest.raises(BodyTooLarge, match="300000"),
    ):
        client.classify_pixels(("a.tif", bytes(5_000_000)))


@contextmanager
def full(url):
    """Fill both queue slots of a service with one run slot, by uploads that do not continue."""
    place = urlsplit(url)
    head = (
        f"POST /classify-pixels HTTP/1.1\r\nHost: {place.netloc}\r\nX-API-Key: right\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000\r\n\r\n--b"
    )
    with ExitStack() as stack:
        # An upload that does not continue holds its slot only for its first second.
        stack.enter_context(patch.object(admission, "_FRESH_SECONDS", PATIENCE))
        # Closed connections of the test before may hold slots for a moment.
        assert soon(lambda: metric(url, "pimc_uploads_in_flight") == 0)
        for _ in range(2):
            connection = stack.enter_context(socket.create_connection((place.hostname, place.port)))
            connection.sendall(head.encode())
        assert soon(lambda: metric(url, "pimc_uploads_in_flight") == 2)
        yield


def metric(url, name):
    """A metric of a service; 0 if it has none of that name."""
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE).text
    return sum(map(float, re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)))


@KINDS
def test_a_full_service_rejects_at_once(guarded, kind, paths):
    with (
        connected(kind, guarded, api_key="right", retries=0) as client,
        full(guarded),
        pytest.raises(Overloaded) as rejected,
    ):
        client.classify_pixels(paths[:4])
    assert rejected.value.status == 503
    assert rejected.value.retry_after == 5


def test_a_retry_is_served_when_a_queue_slot_becomes_free(guarded, paths):
    rejected = 'pimc_problems_total{code="overloaded"}'
    before = metric(guarded, rejected)
    with (
        connected("sync", guarded, api_key="right", retries=50) as patient,
        ThreadPoolExecutor(1) as pool,
    ):
        with full(guarded):
            response = pool.submit(patient.classify_pixels, paths[:4])
            assert soon(lambda: metric(guarded, rejected) > before)
            assert not response.done()
        assert isinstance(response.result(timeout=PATIENCE), Raster)


@pytest.mark.usefixtures("shared_data")
@pytest.mark.parametrize(("url", "kind"), [("zoo", "async")], indirect=["url"], scope="module")
def test_a_real_stack_is_classified(url, kind, shared_data):
    files = sorted((shared_data / "flanders_2017_2018").glob("*2018*.tif"))[::3]
    with connected(kind, url) as client:
        classes = client.classify_pixels(files)
    agrees_with_rasterio(classes, files[0])
    assert (classes.array != 255).mean() > 0.9
