"""Real stacks through a real socket, without options, against plain rasterio and ONNX Runtime.

The reference reads the files as anyone would, and runs the bundle's ONNX file on all pixels at
once: neither the reader, nor the windows, nor the writer of the service is in it.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.io import MemoryFile
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from benchmarks.serving import served
from models.card import ModelCard
from models.registry import ZOO, load_bundle
from tests.kits.patience import PATIENCE
from tests.kits.rasters import crop
from training.datasets.level2a import SOUTH_TYROL

pytestmark = pytest.mark.slow

CLEAR = (4, 5, 6, 7)
COG = "image/tiff; application=geotiff; profile=cloud-optimized"


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """The service, as exact as what it is compared with."""
    with served(precision="float32") as client:
        yield client


@pytest.fixture(scope="module")
def romania_stack(
    demo: ModuleType, romania: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    paths: list[Path] = demo.to_geotiffs(romania[0], tmp_path_factory.mktemp("romania"))
    return paths


def post(
    http: httpx.Client, path: str, files: Sequence[Path], accept: str = COG, **fields: str
) -> httpx.Response:
    with ExitStack() as stack:
        parts = [("files", (p.name, stack.enter_context(p.open("rb")))) for p in files]
        response = http.post(
            path, files=parts, data=fields, headers={"Accept": accept}, timeout=PATIENCE
        )
    assert response.status_code == 200, response.text
    return response


def raster(content: bytes) -> tuple[NDArray[Any], dict[str, Any], dict[str, str]]:
    """Pixels, profile and tags; the file must be a COG."""
    with MemoryFile(content) as memory:
        valid, errors, _ = cog_validate(memory.name)
        assert valid, errors
        with memory.open() as file:
            return file.read(), {**file.profile, "descriptions": file.descriptions}, file.tags()


def read_dates(
    paths: Sequence[Path], bands: Sequence[str], scale: float = 1e-4
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Values (T, C, H, W) and validity (T, H, W) of one file a date, by band description."""
    values, valid = [], []
    for path in paths:
        with rasterio.open(path) as file:
            named = dict(zip(file.descriptions, file.read(), strict=True))
        chosen = np.stack([named[b] for b in bands])
        clear = (chosen != 0).all(0)
        if "SCL" in named:
            clear &= np.isin(named["SCL"], CLEAR)
        values.append(chosen * np.float32(scale))
        valid.append(clear)
    return np.stack(values).astype(np.float32), np.stack(valid)


def infer(
    name: str,
    values: NDArray[np.float32],
    valid: NDArray[np.bool_],
    dates: Sequence[date],
    first_day: date,
) -> tuple[ModelCard, NDArray[np.float32]]:
    """The prediction (H, W, ...) for every pixel at once, NaN where too few dates are clear."""
    bundle = load_bundle(ZOO / name)
    t, c, h, w = values.shape
    feed = {
        "values": values.transpose(2, 3, 0, 1).reshape(h * w, t, c),
        "valid": valid.transpose(1, 2, 0).reshape(h * w, t),
        "days": np.array([(d - first_day).days for d in dates], np.float32),
    }
    if bundle.card.day_of_year:
        feed["day_of_year"] = np.full(h * w, first_day.timetuple().tm_yday, np.float32)
    if bundle.card.elsewhere:
        feed["elsewhere"] = np.zeros(h * w, np.float32)
    session = onnxruntime.InferenceSession(bundle.path(), providers=["CPUExecutionProvider"])
    predicted = session.run(None, feed)[0]
    predicted[feed["valid"].sum(1) < bundle.card.min_observations] = np.nan
    return bundle.card, predicted.reshape(h, w, *predicted.shape[1:])


def agrees(classes: NDArray[Any], probabilities: NDArray[np.float32]) -> None:
    """Equal but for pixels whose two best classes are equal to rounding."""
    none = np.isnan(probabilities).any(-1)
    np.testing.assert_array_equal(classes == 255, none)
    best = np.nan_to_num(probabilities).argmax(-1)
    top = np.sort(np.nan_to_num(probabilities), -1)
    sure = ~none & (top[..., -1] - top[..., -2] > 1e-4)
    np.testing.assert_array_equal(classes[sure], best[sure])
    assert sure.mean() > 0.5


Stack = tuple[list[Path], list[date]]


@pytest.fixture(scope="module")
def flanders(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """Every date of the stack, a quarter of its area."""
    folder = tmp_path_factory.mktemp("flanders")
    whole = sorted((shared_data / "flanders_2017_2018").glob("S2_*.tif"))
    paths = [crop(path, Window(16, 16, 32, 32), folder / path.name) for path in whole]
    return paths, [date.fromisoformat(p.name[7:15]) for p in paths]


def within(dates: Sequence[date], first: date, days: int) -> list[int]:
    return [i for i, d in enumerate(dates) if 0 <= (d - first).days < days]


def test_flanders_file_per_date(http: httpx.Client, flanders: Stack) -> None:
    paths, dates = flanders
    response = post(http, "/classify-pixels", paths)
    pixels, profile, tags = raster(response.content)
    with rasterio.open(paths[0]) as source:
        assert (profile["crs"], profile["transform"]) == (source.crs, source.transform)
    assert (profile["dtype"], profile["nodata"], profile["count"]) == ("uint8", 255, 1)
    # Both years count, laid on one.
    start = date.fromisoformat(tags["PIMC_WINDOW_START"])
    assert start == date(2017, 1, 1)
    values, valid = read_dates(paths, ("B02", "B04", "B08"))
    card, want = infer("pixels-landcover", values, valid, dates, start)
    assert response.headers["PIMC-Model"] == card.id
    assert response.headers["PIMC-Provider"] == "CPUExecutionProvider"
    assert "dates_outside_window" not in response.headers.get("PIMC-Warning", "")
    agrees(pixels[0], want)


def test_int8_maps_what_float32_maps(http: httpx.Client, flanders: Stack) -> None:
    """Whatever variant this machine takes by itself."""
    paths, _ = flanders
    exact, *_ = raster(post(http, "/classify-pixels", paths).content)
    with served() as usual:
        mapped, *_ = raster(post(usual, "/classify-pixels", paths).content)
    np.testing.assert_array_equal(mapped == 255, exact == 255)
    assert (mapped == exact).mean() > 0.97


def test_a_start_keeps_to_one_year(http: httpx.Client, flanders: Stack) -> None:
    paths, dates = flanders
    start = date(2018, 1, 1)
    response = post(http, "/classify-pixels", paths, start=str(start))
    pixels, _, tags = raster(response.content)
    used = within(dates, start, 360)
    assert tags["PIMC_DATES"] == ",".join(str(dates[i]) for i in used)
    values, valid = read_dates([paths[i] for i in used], ("B02", "B04", "B08"))
    _, want = infer("pixels-landcover", values, valid, [dates[i] for i in used], start)
    assert "dates_outside_window" in response.headers["PIMC-Warning"]
    agrees(pixels[0], want)


def test_flanders_every_output_and_the_summary(http: httpx.Client, flanders: Stack) -> None:
    paths, dates = flanders
    names = "class,confidence,entropy,probabilities"
    response = post(http, "/classify-pixels", paths, outputs=names, model="pixels-crops-us")
    assert response.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        maps = {name: raster(archive.read(f"{name}.tif"))[0] for name in names.split(",")}
    start = date(2018, 1, 1)
    used = within(dates, start, 360)
    values, valid = read_dates([paths[i] for i in used], ("B02", "B04", "B08"))
    card, want = infer("pixels-crops-us", values, valid, [dates[i] for i in used], start)
    np.testing.assert_allclose(maps["probabilities"], want.transpose(2, 0, 1), atol=1e-5)
    np.testing.assert_allclose(maps["confidence"][0], want.max(-1), atol=1e-5)
    entropy = -(want * np.log(np.maximum(want, 1e-30))).sum(-1)
    np.testing.assert_allclose(maps["entropy"][0], entropy, atol=1e-4)
    summary = post(
        http, "/classify-pixels", paths, "application/json", model="pixels-crops-us"
    ).json()
    counts = {c["name"]: c["pixels"] for c in summary["classes"]}
    for entry in card.classes:
        assert counts.get(entry.name, 0) == (maps["class"][0] == entry.value).sum()
    hectares = sum(c["hectares"] for c in summary["classes"])
    assert hectares == pytest.approx((maps["class"][0] != 255).sum() * 0.01)


@pytest.mark.parametrize(
    "name", ["pixels-crops-us", "pixels-crops-us-20m", "pixels-crops-us-small"]
)
def test_us_crops_as_a_raster(
    http: httpx.Client, shared_data: Path, tmp_path: Path, name: str
) -> None:
    """Labelled pixels of the archive, laid out as a raster of 10 bands a date."""
    side = 24
    with np.load(shared_data / "crops_us_2021" / "crops_us_2021_dev.npz") as archive:
        bands, dates = archive["bands"].tolist(), archive["dates"].tolist()
        chosen = np.flatnonzero(archive["is_val"])[: side * side]
        stored = archive["reflectance"][chosen].transpose(1, 2, 0).reshape(36, -1, side, side)
        labels = archive["label"][chosen].reshape(side, side)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": len(bands)}
    place = {"crs": "EPSG:32610", "transform": Affine(10, 0, 600_000, 0, -10, 4_300_000)}
    paths = [tmp_path / f"S2_{day}.tif" for day in dates]
    for path, layers in zip(paths, stored, strict=True):
        with rasterio.open(path, "w", dtype="uint16", nodata=0, **profile, **place) as file:
            file.write(layers.astype(np.uint16))
            file.descriptions = tuple(bands)
    response = post(http, "/classify-pixels", paths, model=name)
    pixels, _, _ = raster(response.content)
    card = load_bundle(ZOO / name).card
    used = [i for i, day in enumerate(dates) if date.fromisoformat(day) < date(2021, 12, 27)]
    values, valid = read_dates([paths[i] for i in used], card.bands)
    days = [date.fromisoformat(dates[i]) for i in used]
    _, want = infer(name, values, valid, days, date(2021, 1, 1))
    agrees(pixels[0], want)
    codes = np.array([c.code for c in card.classes] + [-1] * (256 - len(card.classes)))
    known = np.isin(labels, codes)
    # Right, and not merely equal to itself: a swapped band or date would cost far more than this.
    assert (codes[pixels[0]] == labels)[known].mean() > 0.8


def test_a_date_split_over_two_granules_is_one_observation(
    http: httpx.Client, flanders: Stack, tmp_path: Path
) -> None:
    """Each granule holds half of the chip; merged, the result is that of the whole files."""
    paths, _ = flanders
    split = []
    for path in paths[30:90]:
        with rasterio.open(path) as source:
            pixels, profile, tags = source.read(), source.profile, source.tags()
            descriptions = source.descriptions
        for half, rows in (("a", slice(0, 16)), ("b", slice(16, 32))):
            part = np.zeros_like(pixels)
            part[:, rows] = pixels[:, rows]
            with rasterio.open(tmp_path / f"{path.stem}_{half}.tif", "w", **profile) as file:
                file.write(part)
                file.descriptions = descriptions
                file.update_tags(**tags)
            split.append(tmp_path / f"{path.stem}_{half}.tif")
    whole, *_ = raster(post(http, "/classify-pixels", paths[30:90]).content)
    response = post(http, "/classify-pixels", split)
    merged, *_ = raster(response.content)
    assert "merged_dates" in response.headers["PIMC-Warning"]
    np.testing.assert_array_equal(merged, whole)


def test_flanders_forecast(http: httpx.Client, flanders: Stack) -> None:
    paths, dates = flanders
    response = post(http, "/forecast", paths, outputs="q10,q50,q90", horizon="3", backtest="false")
    pixels, profile, _ = raster(response.content)
    last = max(dates)
    first_day = date.fromordinal(last.toordinal() - 310)
    used = within(dates, first_day, 311)
    values, valid = read_dates([paths[i] for i in used], ("B02", "B04", "B08"))
    _, want = infer("forecast-vi", values, valid, [dates[i] for i in used], first_day)
    expected = [
        (f"{index}_{date.fromordinal(last.toordinal() + 10 * (h + 1))}_{q}", want[..., h, s, k])
        for s, index in enumerate(("NDVI", "EVI", "SAVI"))
        for h in range(3)
        for k, q in enumerate(("q10", "q50", "q90"))
    ]
    assert profile["descriptions"] == tuple(name for name, _ in expected)
    np.testing.assert_allclose(pixels, np.stack([v for _, v in expected]), atol=1e-5)


def test_mato_grosso_file_per_band(http: httpx.Client, shared_data: Path) -> None:
    folder = shared_data / "mato_grosso_modis"
    dates = [date.fromisoformat(d) for d in (folder / "dates.txt").read_text().split()]
    paths = [folder / f"{name}.tif" for name in ("blue", "red", "nir", "ndvi", "evi", "doy")]
    start = date(2011, 9, 1)
    response = post(
        http,
        "/classify-pixels",
        paths,
        dates=",".join(map(str, dates)),
        start=str(start),
    )
    pixels, profile, _ = raster(response.content)
    bands = []
    for path in paths[:3]:
        with rasterio.open(path) as source:
            bands.append(source.read(masked=True).filled(np.nan).astype(np.float32))
            assert profile["crs"].to_wkt() == source.crs.to_wkt()
            assert source.crs.to_epsg() is None
    used = within(dates, start, 360)
    values = np.stack(bands, 1)[used]
    valid = np.isfinite(values).all(1)
    # The grid of a model of every date begins with the year.
    _, want = infer("pixels-landcover", values, valid, [dates[i] for i in used], date(2011, 1, 1))
    agrees(pixels[0], want)


def test_romania(http: httpx.Client, romania_stack: list[Path]) -> None:
    romania = romania_stack
    dates = [date.fromisoformat(p.stem[3:]) for p in romania]
    start = date(2018, 1, 1)
    pixels, profile, _ = raster(post(http, "/classify-pixels", romania, start=str(start)).content)
    assert profile["crs"].to_epsg() == 3035
    used = within(dates, start, 360)
    values, valid = read_dates([romania[i] for i in used], ("B02", "B04", "B08"))
    _, want = infer("pixels-landcover", values, valid, [dates[i] for i in used], start)
    agrees(pixels[0], want)


def test_single_file_stack(http: httpx.Client, shared_data: Path, tmp_path: Path) -> None:
    """Twelve months of a stack in one file return the same as the twelve files do."""
    paths = sorted((shared_data / "hesbaye_b_monthly").glob("*.tif"))
    layers, names = [], []
    for path in paths:
        with rasterio.open(path) as source:
            profile = source.profile
            layers.append(source.read())
            day = date.fromisoformat(path.stem[-8:])
            names += [f"{band}_{day}" for band in source.descriptions]
    profile.update(count=len(names))
    with rasterio.open(tmp_path / "stack.tif", "w", **profile) as file:
        file.write(np.concatenate(layers))
        file.descriptions = tuple(names)
    one, *_ = raster(post(http, "/classify-pixels", [tmp_path / "stack.tif"]).content)
    many, *_ = raster(post(http, "/classify-pixels", paths).content)
    np.testing.assert_array_equal(one, many)
    assert (one != 255).mean() > 0.9


def test_a_eurosat_product_to_landcover(http: httpx.Client, shared_data: Path) -> None:
    """One 13-band GeoTIFF, no descriptions, no date: one label, as ONNX Runtime gives it."""
    bundle = load_bundle(ZOO / "landcover-eurosat")
    session = onnxruntime.InferenceSession(bundle.path(), providers=["CPUExecutionProvider"])
    right = 0
    paths = sorted((shared_data / "eurosat" / "ms_sample").glob("*.tif"))[::18]
    names = [c.name for c in bundle.card.classes]
    for path in paths:
        pixels, profile, _ = raster(post(http, "/landcover", [path]).content)
        assert pixels.shape == (1, 1, 1)
        with rasterio.open(path) as source:
            patch = source.read([4, 3, 2]).astype(np.float32) * np.float32(1e-4)
            assert profile["transform"].a == pytest.approx(source.transform.a * 64)
        order = [("B04", "B03", "B02").index(b) for b in bundle.card.bands]
        want = session.run(None, {"patches": patch[None, order]})[0][0]
        assert pixels[0, 0, 0] == want.argmax()
        right += names[pixels[0, 0, 0]].replace(" ", "").lower() == path.stem.split("_")[0].lower()
    # A sanity check of units and band order, not the model's score: chance is a tenth.
    assert right >= 0.6 * len(paths)


def test_level_2a_imagery_of_a_town_its_orchards_and_woods_to_landcover(
    http: httpx.Client, shared_data: Path
) -> None:
    """Patches that were labelled by eye: the model learned from level 1C, most stacks are 2A."""
    path = shared_data / "south_tyrol_2022" / "S2_L2A_2022-06-15.tif"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in {shared_data}")
    names = [c.name for c in load_bundle(ZOO / "landcover-eurosat").card.classes]
    found = raster(post(http, "/landcover", [path]).content)[0][0]
    assert found.shape == (11, 14)
    right = [
        names[found[cell]] == name
        for name, cells in SOUTH_TYROL.items()
        for cell in cells
        if found[cell] != 255
    ]
    assert len(right) > 25
    assert sum(right) > 0.8 * len(right)
