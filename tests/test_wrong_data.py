"""Misleading data through HTTP, against NumPy, pyproj and rasterio.

`/embed` with the tiny bundle returns the mean over the valid dates of each pixel, band by band, so
that the response shows which values counted as valid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyproj
import pytest
import rasterio
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS

from benchmarks.serving import served
from benchmarks.tiny_zoo import HORIZON, write_zoo
from tests.kits.rasters import NORTH_UP, write

pytestmark = pytest.mark.slow

BANDS = ("B02", "B04", "B08")
SHAPE = (11, 13)  # no block divides it
CLOUD, CLEAR = 9, 4

Files = list[tuple[str, Any]]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(model_dir=write_zoo(tmp_path_factory.mktemp("zoo"))) as client:
        yield client


def days(n: int, first: date = date(2021, 3, 1)) -> list[str]:
    return [(first + timedelta(days=20 * k)).isoformat() for k in range(n)]


def noise(dates: int, shape: tuple[int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """Stored numbers (T, 3, H, W) of vegetation, near infrared above red."""
    rng = np.random.default_rng(seed)
    levels = np.array([400, 600, 3000])[None, :, None, None]
    return (levels * rng.uniform(0.8, 1.2, (dates, 3, *shape))).astype(np.uint16)


def stack(
    folder: Path, values: np.ndarray, when: Sequence[str] | None = None, *,
    bands: Sequence[str] = BANDS, **how: Any,
) -> Files:  # fmt: skip
    """A file a date, named after it."""
    files = []
    for number, (day, pixels) in enumerate(zip(when or days(len(values)), values, strict=True)):
        path = folder / f"{number}_{day}.tif"
        write(path, pixels, descriptions=bands, **how)
        files.append(("files", (path.name, path.read_bytes(), "image/tiff")))
    return files


def raster(response: httpx.Response) -> tuple[np.ndarray, dict[str, Any]]:
    assert response.status_code == 200, response.text
    with rasterio.MemoryFile(response.content) as file, file.open() as opened:
        return opened.read(), opened.profile


def means(api: httpx.Client, files: Files, **fields: str) -> np.ndarray:
    """(3, H, W): of each band the mean over the valid dates, NaN under two."""
    return raster(api.post("/embed", files=files, data=fields))[0]


def expected(values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """The same of reflectance (T, 3, H, W) and validity (T, H, W), with numpy alone."""
    usable = np.ones(values.shape[::2] + values.shape[3:], bool) if valid is None else valid
    usable = np.broadcast_to(usable, (len(values), *values.shape[2:]))
    kept = np.where(usable[:, None], values, 0).astype(np.float64)
    count = usable.sum(axis=0)
    return np.where(count >= 2, kept.sum(axis=0) / np.maximum(count, 1), np.nan)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)


def warned(response: httpx.Response) -> set[str]:
    """The codes of all warnings but two, which most of these short stacks without a mask have."""
    assert response.status_code == 200, response.text
    codes = {line.partition(";")[0] for line in response.headers.get_list("PIMC-Warning")}
    return codes - {"no_cloud_mask", "partial_season"}


def refused(response: httpx.Response, code: str) -> str:
    assert response.json()["code"] == code, response.text
    return str(response.json()["detail"])


# Missing pixels -----------------------------------------------------------------------------


def test_nan_nodata_and_infinities_are_missing_in_every_band(
    api: httpx.Client, tmp_path: Path
) -> None:
    values = (noise(5) / 1e4).astype(np.float32)
    broken = values.copy()
    valid = np.ones((5, *SHAPE), bool)
    marks = [np.nan, np.inf, -np.inf, -9999.0, -3.4e38, 1e38]
    for number, mark in enumerate(marks):
        t, band, row, column = number % 5, number % 3, number, 2 * number
        broken[t, band, row, column] = mark
        valid[t, row, column] = False
    broken[:4, 0, 10, 12] = np.nan  # one date is left here
    valid[:4, 10, 12] = False
    found = means(api, stack(tmp_path, broken, nodata=-9999.0))
    same(found, expected(values, valid))
    assert np.isnan(found[:, 10, 12]).all()
    assert np.isfinite(found).sum() == 3 * (11 * 13 - 1)


@pytest.mark.parametrize(("dtype", "nodata"), [("int16", -9999), ("int16", -32768), ("uint16", 0),
                                               ("uint16", 65535), ("int32", -1)])  # fmt: skip
def test_nodata_of_integers(api: httpx.Client, tmp_path: Path, dtype: str, nodata: int) -> None:
    values = noise(4).astype(dtype)
    valid = np.random.default_rng(1).uniform(size=(4, *SHAPE)) > 0.4
    broken = np.where(valid[:, None], values, np.asarray(nodata, dtype))
    same(means(api, stack(tmp_path, broken, nodata=nodata)), expected(values * 1e-4, valid))


def test_a_stack_of_clouds_has_no_prediction(api: httpx.Client, tmp_path: Path) -> None:
    values = np.concatenate([noise(4, (70, 66)), np.full((4, 1, 70, 66), CLOUD, np.uint16)], axis=1)
    files = stack(tmp_path, values, bands=(*BANDS, "SCL"))
    classes, profile = raster(api.post("/classify-pixels", files=files))
    assert profile["nodata"] == 255
    assert (classes == 255).all()
    assert np.isnan(means(api, files)).all()
    forecast, _ = raster(api.post("/forecast", files=files))
    assert forecast.shape == (3 * HORIZON, 70, 66)
    assert np.isnan(forecast).all()
    summary = api.post("/classify-pixels", files=files, headers={"Accept": "application/json"})
    body = summary.json()
    assert [row["pixels"] for row in body["classes"]] == [0, 0, 0]
    assert body["valid_share"] == 0
    assert "NaN" not in summary.text
    imagery = stack(tmp_path, values, bands=("B02", "B04", "B03", "SCL"))
    cover, _ = raster(api.post("/landcover", files=imagery, data={"stride": "2"}))
    assert (cover == 255).all()


def test_one_clear_date_is_too_few_for_series_and_enough_for_imagery(
    api: httpx.Client, tmp_path: Path
) -> None:
    values = np.concatenate([noise(4, (70, 66)), np.full((4, 1, 70, 66), CLOUD, np.uint16)], axis=1)
    values[2, 3] = CLEAR
    values[1, 3, :9] = CLEAR  # two clear dates here
    found = means(api, stack(tmp_path, values, bands=(*BANDS, "SCL")))
    valid = values[:, 3] == CLEAR
    same(found, expected(values[:, :3] * 1e-4, valid))
    assert np.isnan(found[:, 9:]).all()
    imagery = stack(tmp_path, values[2:3], bands=("B02", "B04", "B03", "SCL"))
    cover, _ = raster(api.post("/landcover", files=imagery))
    assert (cover != 255).all()


# Dates --------------------------------------------------------------------------------------


def test_dates_out_of_order_or_doubled_are_the_same_stack(
    api: httpx.Client, tmp_path: Path
) -> None:
    values = noise(5)
    values[3, :, 0] = 0  # nothing on this date in the first row, but for its double
    files = stack(tmp_path, values, nodata=0)
    ordered = api.post("/embed", files=files)
    shuffled = api.post("/embed", files=[files[n] for n in (3, 0, 4, 2, 1)])
    np.testing.assert_array_equal(raster(shuffled)[0], raster(ordered)[0])
    assert warned(shuffled) == set()
    double = noise(1, seed=9)
    again = stack(tmp_path, double, [days(5)[3]], nodata=0)
    doubled = api.post("/embed", files=[*again, *files])
    assert warned(doubled) == {"merged_dates"}
    merged = values.copy()
    merged[3] = double[0]  # the first clear value counts
    same(raster(doubled)[0], expected(merged * 1e-4))
    other_way = means(api, [*files, *again])
    filled = values.copy()
    filled[3, :, 0] = double[0, :, 0]
    same(other_way, expected(filled * 1e-4))


@pytest.mark.parametrize(
    "text", ["2021-05-01T23:30:00-05:00", "2021-05-01T10:50:31.024Z", "2021-05-01 23:59:59+0200"]
)
def test_a_date_with_a_time_zone_is_the_day_as_written(
    api: httpx.Client, tmp_path: Path, text: str
) -> None:
    files = stack(tmp_path, noise(2), ["2021-03-01", "2021-04-01"])
    path = tmp_path / "late.tif"
    write(path, noise(1)[0], descriptions=BANDS, tags={"datetime": text})
    files.append(("files", ("late.tif", path.read_bytes())))
    response = api.post("/classify-pixels", files=files, headers={"Accept": "application/json"})
    assert response.json()["dates_used"] == ["2021-03-01", "2021-04-01", "2021-05-01"]
    given = api.post("/embed", files=files, data={"dates": f"2021-03-01,2021-04-01,{text}"})
    assert "dates.2" in refused(given, "invalid_request")


# Radiometry ---------------------------------------------------------------------------------


def test_a_stack_across_the_change_of_baseline_gives_a_warning(
    api: httpx.Client, tmp_path: Path
) -> None:
    when = days(8, date(2021, 11, 1))
    late = np.array([day >= "2022-01-25" for day in when])
    assert 0 < late.sum() < 8
    values = noise(8) + (1000 * late[:, None, None, None]).astype(np.uint16)
    right = expected(values * 1e-4 - 0.1 * late[:, None, None, None])
    response = api.post("/embed", files=stack(tmp_path, values, when), data={"start": "2021-09-01"})
    assert warned(response) == {"offset_applied"}
    same(raster(response)[0], right)
    summary = api.post(
        "/embed",
        files=stack(tmp_path, values, when),
        data={"start": "2021-09-01"},
        headers={"Accept": "application/json"},
    ).json()
    assert "offset_applied" in {w["code"] for w in summary["warnings"]}
    early, later = summary["reflectance"]
    assert (early["offset"], early["offset_source"]) == (0, None)
    assert (later["offset"], later["dates"]) == (-0.1, [d for d in when if d >= "2022-01-25"])
    # Also where the window holds dates of the later side alone.
    part = api.post("/embed", files=stack(tmp_path, values, when), data={"start": "2022-01-26"})
    assert "offset_applied" in warned(part)
    # The caller decides, for all dates or from one on.
    given = {"start": "2021-09-01", "offset": "0, 2022-01-25:-0.1"}
    response = api.post("/embed", files=stack(tmp_path, values, when), data=given)
    assert warned(response) == set()
    same(raster(response)[0], right)
    given = {"start": "2021-09-01", "offset": "0"}
    response = api.post("/embed", files=stack(tmp_path, values, when), data=given)
    assert warned(response) == set()
    same(raster(response)[0], expected(values * 1e-4))
    # Each file states its own offset: the values are right.
    files = []
    for number, day in enumerate(when):
        tags = {"offsets": (-0.1,) * 3, "scales": (1e-4,) * 3} if late[number] else {}
        files += stack(tmp_path, values[number : number + 1], [day], **tags)
    response = api.post("/embed", files=files, data={"start": "2021-09-01"})
    assert warned(response) == {"offset_applied"}
    same(raster(response)[0], right)


def test_the_parameter_scale_precedes_gdals_scale_and_the_tag(
    api: httpx.Client, tmp_path: Path
) -> None:
    values = noise(3)
    tag = stack(tmp_path, values, tags={"scale": "0.0003"})
    same(means(api, tag), expected(values * 3e-4))
    both = stack(tmp_path, values, tags={"scale": "0.0003"}, scales=(2e-4,) * 3)
    same(means(api, both), expected(values * 2e-4))
    same(means(api, both, scale="0.0001"), expected(values * 1e-4))
    detail = refused(api.post("/embed", files=both, data={"scale": "1"}), "implausible_reflectance")
    assert "scale=0.0001" in detail


def test_a_scale_that_was_already_applied_gives_a_warning(
    api: httpx.Client, tmp_path: Path
) -> None:
    values = (noise(3) / 1e4).astype(np.float32)
    files = stack(tmp_path, values, scales=(1e-4,) * 3)
    response = api.post("/embed", files=files)
    assert warned(response) == {"scale_suspected"}
    same(raster(response)[0], expected(values.astype(np.float64)))
    assert warned(api.post("/embed", files=files, data={"scale": "1"})) == set()
    same(means(api, files, scale="1"), expected(values.astype(np.float64)))


def test_percent_is_rejected_with_the_needed_scale(api: httpx.Client, tmp_path: Path) -> None:
    values = (noise(3) / 100).astype(np.float32)
    files = stack(tmp_path, values)
    assert "scale=0.01" in refused(api.post("/embed", files=files), "implausible_reflectance")
    same(means(api, files, scale="0.01"), expected(values / 100.0))


def test_8_bits_are_reflectance_with_a_given_scale(api: httpx.Client, tmp_path: Path) -> None:
    values = (noise(3) / 40).astype(np.uint8)
    files = stack(tmp_path, values)
    assert warned(api.post("/embed", files=files)) == {"scale_suspected"}
    response = api.post("/embed", files=files, data={"scale": "0.004"})
    assert warned(response) == set()
    same(raster(response)[0], expected(values * 0.004))


def test_swapped_red_and_near_infrared_give_a_warning(api: httpx.Client, tmp_path: Path) -> None:
    files = stack(tmp_path, noise(3))
    assert warned(api.post("/embed", files=files)) == set()
    swapped = api.post("/embed", files=files, data={"bands": "B02,B08,B04"})
    assert warned(swapped) == {"bands_suspected_swapped", "bands_contradicted"}


# Grids --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "both"),
    [
        ({"transform": NORTH_UP * Affine.translation(0.5, 0)}, ("500000", "500005")),
        ({"crs": "EPSG:32632"}, ("EPSG:32631", "EPSG:32632")),
        ({"transform": Affine(20, 0, 500_000, 0, -20, 5_600_000)}, ("(10,", "(20,")),
    ],
)
def test_mixed_grids_are_rejected_with_both_sides(
    api: httpx.Client, tmp_path: Path, other: dict[str, Any], both: tuple[str, str]
) -> None:
    files = stack(tmp_path, noise(2)) + stack(tmp_path, noise(1), ["2021-09-01"], **other)
    detail = refused(api.post("/embed", files=files), "grid_mismatch")
    assert all(side in detail for side in both)
    assert "0_2021-09-01.tif" in detail


GRIDS: Mapping[str, dict[str, Any]] = {
    "north up": {},
    "south up": {"transform": Affine(10, 0, 500_000, 0, 10, 5_600_000)},
    "rotated": {"transform": NORTH_UP * Affine.rotation(30)},
    "sheared": {"transform": NORTH_UP * Affine.shear(15, 0)},
    "geographic": {"crs": "EPSG:4326", "transform": Affine(2e-3, 0, 4.5, 0, -1e-3, 60.6)},
    "geographic, rotated": {
        "crs": "EPSG:4326",
        "transform": Affine(2e-3, 0, 4.5, 0, -1e-3, 60.6) * Affine.rotation(20),
    },
    "feet": {"crs": "EPSG:2263", "transform": Affine(30, 0, 980_000, 0, -30, 190_000)},
    "ESRI's words": {
        "crs": CRS.from_wkt(CRS.from_epsg(32631).to_wkt(version="WKT1_ESRI")),
    },
}


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_keeps_its_place_and_its_hectares(
    api: httpx.Client, tmp_path: Path, name: str
) -> None:
    values = noise(3)
    files = stack(tmp_path, values, **GRIDS[name])
    with rasterio.MemoryFile(files[0][1][1]) as file, file.open() as opened:
        given = opened.profile
    found, profile = raster(api.post("/embed", files=files))
    same(found, expected(values * 1e-4))
    assert profile["crs"] == given["crs"]
    assert profile["transform"].almost_equals(given["transform"])
    # A point at the middle of a pixel is that pixel, by pyproj's own way there.
    row, column = 7, 3
    to_degrees = pyproj.Transformer.from_crs(given["crs"].to_wkt(), "EPSG:4326", always_xy=True)
    place = to_degrees.transform(*(given["transform"] * (column + 0.5, row + 0.5)))
    feature = {"type": "Feature", "geometry": {"type": "Point", "coordinates": place}}
    points = json.dumps({"type": "FeatureCollection", "features": [feature]})
    (response,) = api.post("/embed", files=files, data={"points": points}).json()["features"]
    same(np.array(response["properties"]["embedding"]), found[:, row, column])
    summary = api.post(
        "/classify-pixels", files=files, headers={"Accept": "application/json"}
    ).json()
    hectares = sum(entry["hectares"] for entry in summary["classes"])
    assert hectares == pytest.approx(geodesic_hectares(given), rel=2e-3)
    if given["crs"].is_geographic:  # a projection's own distortion does not count here
        assert hectares == pytest.approx(geodesic_hectares(given), rel=1e-5)


@pytest.mark.parametrize("task", ["classify-pixels", "forecast", "embed"])
@pytest.mark.parametrize(
    "fields",
    [{"start": "9999-12-31"}, {"start": "0001-01-01"}, {"start": "2099-12-31"}]
    + [{"dates": f"{a},{b}"} for a, b in [("0001-01-01", "9999-12-31"), ("2021-02-30", "2021-1-1")]]
    + [{"dates": "1970-01-01,2099-12-31", "start": "1970-01-01"}],
)  # fmt: skip
def test_extreme_dates_never_cause_an_internal_error(
    api: httpx.Client, tmp_path: Path, task: str, fields: dict[str, str]
) -> None:
    response = api.post(f"/{task}", files=stack(tmp_path, noise(2)), data=fields)
    assert response.status_code == 422, response.text
    assert response.json()["code"] in {"invalid_request", "too_few_dates"}


@pytest.mark.parametrize("day", ["0001-01-01", "9999-12-31"])
def test_extreme_dates_of_a_series_are_rejected(api: httpx.Client, day: str) -> None:
    one = {"id": "a", "dates": [day] * 4, "B02": [0.1] * 4, "B04": [0.1] * 4, "B08": [0.3] * 4}
    for body in (
        {"series": [one]},
        {"series": [{**one, "dates": ["2021-01-01"] * 4}], "start": day},
    ):
        response = api.post("/forecast", json=body)
        assert response.status_code == 422, response.text
        assert "1970-01-01 to 2099-12-31" in json.dumps(response.json())


def test_hectares_in_web_mercator_are_those_on_the_ground(
    api: httpx.Client, tmp_path: Path
) -> None:
    place = {"crs": "EPSG:3857", "transform": Affine(16, 0, 480_000, 0, -16, 6_650_000)}
    files = stack(tmp_path, noise(4), **place)
    response = api.post("/classify-pixels", files=files, headers={"Accept": "application/json"})
    hectares = sum(entry["hectares"] for entry in response.json()["classes"])
    grid = {**place, "crs": CRS.from_string(place["crs"]), "height": SHAPE[0], "width": SHAPE[1]}
    assert hectares == pytest.approx(geodesic_hectares(grid), rel=1e-4)
    assert hectares < 0.5 * np.prod(SHAPE) * 16**2 / 1e4


def geodesic_hectares(profile: Mapping[str, Any]) -> float:
    """Area of the raster's outline on the ellipsoid, its sides drawn as they run in the CRS."""
    height, width = profile["height"], profile["width"]
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height), (0, 0)], float)
    steps = np.linspace(0, 1, 200, endpoint=False)[:, None]
    outline = np.concatenate([a + (b - a) * steps for a, b in pairwise(corners)])
    x, y = profile["transform"] * outline.T
    crs = pyproj.CRS(profile["crs"].to_wkt())
    lon, lat = pyproj.Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True).transform(x, y)
    area, _ = crs.get_geod().polygon_area_perimeter(lon, lat)
    return abs(area) / 1e4


def test_a_raster_of_one_pixel(api: httpx.Client, tmp_path: Path) -> None:
    values = noise(3, (1, 1))
    files = stack(tmp_path, values)
    same(means(api, files), expected(values * 1e-4))
    assert raster(api.post("/classify-pixels", files=files))[0].shape == (1, 1, 1)
    assert raster(api.post("/forecast", files=files))[0].shape == (3 * HORIZON, 1, 1)
    imagery = stack(tmp_path, values, bands=("B02", "B04", "B03"))
    response = api.post("/landcover", files=imagery)
    assert response.status_code == 422
    assert "64" in response.json()["detail"]


@pytest.mark.parametrize("shape", [(67, 131), (1, 257), (257, 1), (15, 17)])
@pytest.mark.parametrize("how", [{}, {"tiled": True, "blockxsize": 16, "blockysize": 32}])
def test_sizes_that_no_block_divides(
    api: httpx.Client, tmp_path: Path, shape: tuple[int, int], how: dict[str, Any]
) -> None:
    values = noise(2, shape)
    same(means(api, stack(tmp_path, values, compress="deflate", **how)), expected(values * 1e-4))


# Makes of files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"ENDIANNESS": "BIG"},
        {"BIGTIFF": "YES"},
        {"NBITS": 12},
        {"interleave": "pixel"},
        {"compress": "lzw", "predictor": 2},
        {"photometric": "rgb"},
    ],
)
def test_the_same_numbers_in_another_format_give_the_same_result(
    api: httpx.Client, tmp_path: Path, how: dict[str, Any]
) -> None:
    values = noise(2)
    same(means(api, stack(tmp_path, values, **how)), expected(values * 1e-4))


def test_an_internal_mask_is_used_and_an_unnamed_alpha_band_is_not(
    api: httpx.Client, tmp_path: Path
) -> None:
    values = noise(3)
    alpha = np.zeros((3, 1, *SHAPE), np.uint16)
    with_alpha = stack(tmp_path, np.concatenate([values, alpha], axis=1), bands=(*BANDS, None),
                       alpha="yes")  # fmt: skip
    same(means(api, with_alpha), expected(values * 1e-4))
    mask = np.random.default_rng(2).uniform(size=SHAPE) > 0.3
    files = stack(tmp_path, values, mask=mask)
    same(means(api, files), expected(values * 1e-4, mask[None]))


def test_complex_numbers_are_rejected(api: httpx.Client, tmp_path: Path) -> None:
    files = stack(tmp_path, noise(2).astype(np.complex64))
    assert "complex64" in refused(api.post("/embed", files=files), "not_a_geotiff")


def test_a_palette_is_rejected(api: httpx.Client, tmp_path: Path) -> None:
    """A picture in colours by number names no band."""
    path = tmp_path / "map_2021-01-01.tif"
    write(path, np.full((1, *SHAPE), 3, np.uint8), photometric="palette")
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {3: (0, 200, 0, 255)})
    refused(api.post("/embed", files=[("files", path.read_bytes())]), "missing_bands")


@pytest.mark.parametrize("how", ["gcps", "rpcs"])
def test_ground_control_points_are_not_a_georeference(
    api: httpx.Client, tmp_path: Path, how: str
) -> None:
    files = []
    for day in days(2):
        path = tmp_path / f"{day}.tif"
        write(path, noise(1)[0], descriptions=BANDS, crs=None, transform=Affine.identity())
        with rasterio.open(path, "r+") as file:
            if how == "gcps":
                corners = [(0, 0), (0, 13), (11, 0), (11, 13)]
                file.gcps = (
                    [GroundControlPoint(r, c, 5e5 + 10 * c, 5.6e6 - 10 * r) for r, c in corners],
                    CRS.from_epsg(32631),
                )
            else:
                file.update_tags(ns="RPC", LINE_OFF="1", SAMP_OFF="1")
        files.append(("files", (path.name, path.read_bytes())))
    detail = refused(api.post("/embed", files=files), "no_georeference")
    if how == "gcps":
        assert "has ground control points in place of a CRS" in detail
        assert "gdalwarp" in detail
