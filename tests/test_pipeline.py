"""Whole runs: rasters, summaries and points against plain numpy and rasterio."""

from __future__ import annotations

import itertools
import json
import threading
import time
from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.warp import transform as reproject
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from benchmarks.tiny_zoo import CLASSES, PIXEL_BANDS, SHARPNESS, SPREAD, STEP, write_zoo
from models.registry import Registry
from service.errors import (
    Cancelled,
    CorruptRaster,
    InternalError,
    InvalidRequest,
    MissingDates,
    TooFewDates,
)
from service.grid import Grid
from service.infer.engine import Engine
from service.read.layouts import StackOptions
from service.read.reader import StackReader
from service.read.stack import open_stack
from service.run.plan import plan_raster
from service.run.points import run_points
from service.run.raster import make_work, run_raster
from service.run.windows import windows
from tests.kits import rasters
from tests.kits.marks import in_all_tests

DATES = [date(2021, 1, 10) + timedelta(days=30 * n) for n in range(6)]
TINY = 20_000
"""A budget of some hundred pixels a window."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    registry = Registry.load(write_zoo(tmp_path_factory.mktemp("zoo")))
    with Engine(registry, providers="cpu", threads=2) as engine:
        yield engine


def softmax(mean):
    powers = np.exp(SHARPNESS * (mean - mean.max(axis=0)))
    return powers / powers.sum(axis=0)


class Scene:
    """A stack on disk, and its reflectance (T, C, H, W) and validity as numpy holds them."""

    def __init__(self, folder, height, width, *, dates=DATES, bands=PIXEL_BANDS, **profile):
        random = np.random.default_rng(height * width)
        shape = (len(dates), len(bands), height, width)
        # Smooth enough that neighbouring patches differ in their mean.
        slope = np.linspace(0, 0.2, height * width).reshape(height, width)
        numbers = (random.uniform(200, 3000, shape) + 1e4 * slope).astype(np.uint16)
        numbers[:, 0] += (3000 * np.linspace(0, 1, width)).astype(np.uint16)
        # Clouds here and there, and one corner never seen.
        self.valid = random.random((shape[0], height, width)) < 0.8
        self.valid[:, :5, :7] = False
        self.valid[1:, :5, 7:9] = False  # one observation, and two are needed
        numbers[~np.repeat(self.valid[:, None], len(bands), axis=1)] = 0
        self.values = np.where(self.valid[:, None], numbers * 1e-4, np.nan)
        self.files = [
            rasters.write(
                folder / f"{day}.tif",
                numbers[t],
                descriptions=bands,
                tags={"datetime": day.isoformat()},
                nodata=0,
                **profile,
            )
            for t, day in enumerate(dates)
        ]
        self.bands = bands

    def stack(self, **more):
        options = StackOptions()
        return open_stack(self.files, options, bands=self.bands, max_bytes=2**40, **more)

    def mean(self, used=slice(None)):
        """Mean over the clear dates (C, H, W), NaN with fewer than two."""
        count = self.valid[used].sum(axis=0)
        total = np.nansum(self.values[used], axis=0)
        return np.where(count >= 2, total / np.maximum(count, 1), np.nan)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    tiles = {"tiled": True, "blockxsize": 32, "blockysize": 16, "compress": "deflate"}
    return Scene(tmp_path_factory.mktemp("scene"), 90, 110, **tiles)


def read(path):
    with rasterio.open(path) as file:
        return file.read()


# Windows ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.tuples(st.integers(1, 64), st.integers(1, 120)),
    st.integers(1, 5000),
    st.integers(1, 1_000_000),
)
def test_windows_cover_every_pixel_once_within_the_budget(height, width, block, size, budget):
    grid = Grid(crs=CRS.from_epsg(32631), transform=Affine.identity(), width=width, height=height)
    seen = np.zeros((height, width), int)
    parts = windows(grid, block, size, budget)
    for part in parts:
        (top, bottom), (left, right) = part.toranges()
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
        seen[top:bottom, left:right] += 1
        pixels, complete = part.width * part.height, min(block[0], height) * min(block[1], width)
        assert pixels * size <= max(budget, size) or (
            pixels <= complete and pixels * size <= 1.25 * (budget + size)
        )
    assert (seen == 1).all()
    if min(block[0], height) * min(block[1], width) * size <= budget:
        assert all(p.row_off % block[0] == 0 and p.col_off % block[1] == 0 for p in parts)


def test_a_larger_raster_is_cut_so_that_the_stages_overlap_and_a_small_one_is_not():
    def count(side, block):
        grid = Grid(crs=CRS.from_epsg(32631), transform=Affine.identity(), width=side, height=side)
        return len(windows(grid, block, 100))

    assert count(60, (60, 60)) == 1
    assert (
        count(64, (12, 64)) == 1
    )  # not 60 rows and a rest of 4, for which each file is read again
    assert count(1000, (128, 128)) >= 4
    assert count(1000, (1, 1000)) >= 8


# Pixels -------------------------------------------------------------------------------------


def test_classes_as_worked_out_by_hand(engine, scene, tmp_path):
    run = plan_raster(
        engine.models["pixels-landcover"],
        scene.stack(),
        outputs=("class", "confidence", "entropy", "probabilities"),
    )
    outcome = run_raster(make_work(run, tmp_path))
    assert set(outcome.files) == {"class", "confidence", "entropy", "probabilities"}
    expected = softmax(scene.mean())
    there = ~np.isnan(expected[0])
    np.testing.assert_allclose(read(outcome.files["probabilities"]), expected, atol=1e-4)
    classes = read(outcome.files["class"])[0]
    assert (classes[~there] == 255).all()
    ordered = np.sort(expected[:, there], axis=0)
    sure = ordered[-1] - ordered[-2] > 1e-3
    assert sure.mean() > 0.9
    assert (classes[there] == expected[:, there].argmax(axis=0))[sure].all()
    np.testing.assert_allclose(
        read(outcome.files["confidence"])[0], expected.max(axis=0), atol=1e-4
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(expected * np.log(expected), axis=0)
    found = read(outcome.files["entropy"])[0]
    assert np.isnan(found[~there]).all()
    np.testing.assert_allclose(found[there], entropy[there], atol=1e-3)
    for path in outcome.files.values():
        assert cog_validate(path, strict=True) == (True, [], [])
    with rasterio.open(outcome.files["probabilities"]) as file:
        assert file.descriptions == CLASSES
        assert file.crs == CRS.from_string(rasters.UTM)
        assert file.transform == rasters.NORTH_UP
        tags = file.tags()
    assert tags["PIMC_MODEL"] == "pixels-landcover@0.0.1"
    assert tags["PIMC_WINDOW_START"] == "2021-01-01"
    assert tags["PIMC_DATES"].split(",") == [day.isoformat() for day in DATES]


@pytest.mark.parametrize("name", ["pixels-landcover", "embed-pixel", *in_all_tests("forecast-vi")])
def test_windows_do_not_show(engine, scene, tmp_path, name):
    run = plan_raster(engine.models[name], scene.stack())
    complete, parts = tmp_path / "whole", tmp_path / "parts"
    complete.mkdir()
    parts.mkdir()
    one = run_raster(make_work(run, complete, window_bytes=2**40))
    many = run_raster(make_work(run, parts, window_bytes=TINY))
    assert len(windows(run.stack.grid, run.stack.block, run.pixel_bytes, TINY)) > 20
    for output, path in one.files.items():
        np.testing.assert_allclose(read(many.files[output]), read(path), atol=1e-5)
    assert many.summary["valid_share"] == one.summary["valid_share"]


def test_the_summary_adds_up_to_the_map(engine, scene, tmp_path):
    run = plan_raster(
        engine.models["pixels-landcover"], scene.stack(), outputs=("class", "confidence")
    )
    outcome = run_raster(make_work(run, tmp_path, window_bytes=TINY))
    classes, confidence = read(outcome.files["class"])[0], read(outcome.files["confidence"])[0]
    summary = json.loads(json.dumps(outcome.summary, allow_nan=False))
    assert summary["model"] == "pixels-landcover@0.0.1"
    assert summary["provider"] == "CPUExecutionProvider"
    assert summary["start"] == "2021-01-01"
    assert summary["dates_used"] == [day.isoformat() for day in DATES]
    assert summary["layout"] == "file-per-date"
    assert summary["pixels"] == 90 * 110
    assert summary["valid_share"] == pytest.approx((classes != 255).mean())
    for row in summary["classes"]:
        mine = classes == row["value"]
        assert row["pixels"] == mine.sum()
        assert row["hectares"] == pytest.approx(mine.sum() * 0.01)  # 10 m x 10 m
        if mine.any():
            assert row["mean_confidence"] == pytest.approx(confidence[mine].mean(), rel=1e-4)


def test_without_rasters_the_summary_is_the_same(engine, scene, tmp_path):
    stack, model = scene.stack(), engine.models["pixels-landcover"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    none = run_raster(make_work(plan_raster(model, stack, rasters=False), tmp_path / "a"))
    some = run_raster(make_work(plan_raster(model, stack), tmp_path / "b"))
    assert none.files == {}
    assert list((tmp_path / "a").iterdir()) == []
    assert none.summary == some.summary


def test_a_geographic_raster_has_rows_of_different_area(engine, tmp_path):
    (tmp_path / "in").mkdir()
    degrees = {"crs": "EPSG:4326", "transform": Affine(0.01, 0, 4, 0, -0.01, 60)}
    scene = Scene(tmp_path / "in", 60, 40, **degrees)
    run = plan_raster(engine.models["pixels-landcover"], scene.stack())
    outcome = run_raster(make_work(run, tmp_path, window_bytes=TINY))
    classes = read(outcome.files["class"])[0]
    hectares = run.stack.grid.hectares(Window(0, 0, 1, 60))[:, 0]
    assert hectares[-1] > hectares[0] * 1.01
    for row in outcome.summary["classes"]:
        expected = ((classes == row["value"]).sum(axis=1) * hectares).sum()
        assert row["hectares"] == pytest.approx(expected)


def test_a_forecast_names_and_orders_its_bands(engine, scene, tmp_path):
    run = plan_raster(
        engine.models["forecast-vi"], scene.stack(), outputs=("q10", "q90"), horizon=2
    )
    outcome = run_raster(make_work(run, tmp_path))
    days = [(DATES[-1] + timedelta(days=10 * k)).isoformat() for k in (1, 2)]
    with rasterio.open(outcome.files["forecast"]) as file:
        assert file.descriptions == tuple(
            f"{i}_{d}_{q}" for i in ("NDVI", "EVI", "SAVI") for d in days for q in ("q10", "q90")
        )
        assert np.isnan(file.nodata)
        found = file.read().reshape(3, 2, 2, 90, 110)
    # The card's window is 350 days before the last date: every date is in it.
    mean = scene.mean()
    for k in range(2):
        for q, away in enumerate((-SPREAD, SPREAD)):
            np.testing.assert_allclose(found[:, k, q], mean + STEP * (k + 1) + away, atol=1e-4)
    summary = outcome.summary
    assert summary["dates"] == days
    assert summary["EVI"]["q10"] == pytest.approx(np.nanmean(found[1, :, 0], axis=(1, 2)), rel=1e-4)
    assert set(summary["EVI"]) == {"mean", "q10", "q90"}


def test_an_embedding_has_a_band_a_dimension(engine, scene, tmp_path):
    outcome = run_raster(
        make_work(plan_raster(engine.models["embed-pixel"], scene.stack()), tmp_path)
    )
    with rasterio.open(outcome.files["embedding"]) as file:
        assert file.descriptions == ("embedding_0", "embedding_1", "embedding_2")
    found, mean = read(outcome.files["embedding"]), scene.mean()
    np.testing.assert_allclose(found, mean, atol=1e-5)
    expected = np.nanmean(np.linalg.norm(mean, axis=0))
    assert outcome.summary["embedding"]["mean_norm"] == pytest.approx(expected, rel=1e-4)


def test_only_dates_in_the_window_are_used(engine, scene, tmp_path):
    run = plan_raster(engine.models["embed-pixel"], scene.stack(), start=date(2021, 3, 1))
    outcome = run_raster(make_work(run, tmp_path))
    assert run.used == (2, 3, 4, 5)
    np.testing.assert_allclose(
        read(outcome.files["embedding"]), scene.mean(slice(2, None)), atol=1e-5
    )
    codes = {warning.code: warning for warning in outcome.warnings}
    assert codes.keys() == {"dates_outside_window", "no_cloud_mask", "partial_season"}
    assert "2 of 6 dates are outside" in codes["dates_outside_window"].detail
    assert outcome.summary["warnings"] == [
        {"code": warning.code, "detail": warning.detail} for warning in outcome.warnings
    ]


def test_one_pixel_is_a_raster_too(engine, tmp_path):
    (tmp_path / "in").mkdir()
    numbers = np.full((3, 1, 1), 1000, np.uint16)
    files = [
        rasters.write(tmp_path / "in" / f"{day}.tif", numbers, descriptions=PIXEL_BANDS)
        for day in DATES
    ]
    stack = open_stack(files, StackOptions(), bands=PIXEL_BANDS, max_bytes=2**40)
    outcome = run_raster(make_work(plan_raster(engine.models["embed-pixel"], stack), tmp_path))
    np.testing.assert_allclose(read(outcome.files["embedding"]).ravel(), 0.1, rtol=1e-5)


# Patches ------------------------------------------------------------------------------------

PATCH_BANDS = ("B04", "B03", "B02")


@pytest.fixture(scope="module")
def imagery(tmp_path_factory):
    tiles = {"tiled": True, "blockxsize": 48, "blockysize": 48}
    folder = tmp_path_factory.mktemp("imagery")
    return Scene(folder, 150, 170, dates=DATES[:3], bands=PATCH_BANDS, **tiles)


@pytest.fixture(scope="module")
def cloudy(tmp_path_factory):
    """Imagery with one large hole, so that some patches have no prediction."""
    folder = tmp_path_factory.mktemp("cloudy")
    scene = Scene(folder, 140, 150, dates=DATES[:1], bands=PATCH_BANDS)
    scene.valid[:, 20:90, :70] = False
    scene.values[:, :, 20:90, :70] = np.nan
    with rasterio.open(scene.files[0].path, "r+") as file:
        numbers = file.read()
        numbers[:, 20:90, :70] = 0
        file.write(numbers)
    return scene


def composite_of(scene):
    """The median of the clear dates (C, H, W), NaN without one."""
    composite = np.full(scene.values.shape[1:], np.nan)
    seen = scene.valid.any(axis=0)
    composite[:, seen] = np.nanmedian(scene.values[:, :, seen], axis=0)
    return composite


def patch_mean(patch):
    """The mean of a patch (C, 64, 64), its gaps filled, NaN where most of it is missing."""
    patch, gaps = patch.copy(), np.isnan(patch[0])
    if gaps.mean() > 0.5:
        return np.full(len(patch), np.nan)
    for band in patch:
        band[gaps] = np.median(band[~gaps])
    return patch.mean(axis=(1, 2))


def patch_answers(scene, stride):
    """For every patch the mean of its bands (C, R, C), and the probabilities (K, R, C)."""
    composite = composite_of(scene)
    height, width = composite.shape[1:]
    rows, cols = (height - 64) // stride + 1, (width - 64) // stride + 1
    means = np.full((3, rows, cols), np.nan)
    for r in range(rows):
        for c in range(cols):
            patch = composite[:, r * stride : r * stride + 64, c * stride : c * stride + 64]
            means[:, r, c] = patch_mean(patch)
    return means, softmax(means)


@pytest.mark.parametrize("stride", [64, 16, *in_all_tests(40, 5)])
@pytest.mark.parametrize("which", ["imagery", "cloudy"])
def test_landcover_averages_the_patches_that_hold_a_cell(engine, request, tmp_path, which, stride):
    scene = request.getfixturevalue(which)
    run = plan_raster(
        engine.models["landcover-eurosat"],
        scene.stack(dated=False),
        outputs=("class", "probabilities"),
        stride=stride,
    )
    outcome = run_raster(make_work(run, tmp_path, window_bytes=TINY))
    _, raw = patch_answers(scene, stride)
    expected = np.full(raw.shape, np.nan)
    for r in range(raw.shape[1]):
        for c in range(raw.shape[2]):
            # Patches that hold all of the cell's stride x stride pixels.
            holds = [
                raw[:, i, j]
                for i in range(raw.shape[1])
                for j in range(raw.shape[2])
                if 0 <= (r - i) * stride <= 64 - stride and 0 <= (c - j) * stride <= 64 - stride
            ]
            predicted = [p for p in holds if not np.isnan(p[0])]
            if predicted:
                expected[:, r, c] = np.mean(predicted, axis=0)
    with rasterio.open(outcome.files["probabilities"]) as file:
        assert (file.height, file.width) == raw.shape[1:]
        assert file.transform == rasters.NORTH_UP @ Affine.scale(stride)
        np.testing.assert_allclose(file.read(), expected, atol=1e-4)
    classes = read(outcome.files["class"])[0]
    assert ((classes == 255) == np.isnan(expected[0])).all()
    if which == "cloudy" and stride == 16:
        assert (classes == 255).any()
    for row in outcome.summary["classes"]:
        mine = classes == row["value"]
        assert row["pixels"] == mine.sum()
        assert row["hectares"] == pytest.approx(mine.sum() * (stride * 10) ** 2 / 1e4)
    assert outcome.summary["stride"] == stride
    assert cog_validate(outcome.files["class"], strict=True) == (True, [], [])


def test_patch_windows_do_not_show(engine, cloudy, tmp_path):
    run = plan_raster(
        engine.models["landcover-eurosat"],
        cloudy.stack(dated=False),
        outputs=("probabilities",),
        stride=4,
    )
    found = []
    for name, budget in (("whole", 2**40), ("parts", TINY)):
        (tmp_path / name).mkdir()
        outcome = run_raster(make_work(run, tmp_path / name, window_bytes=budget))
        found.append(read(outcome.files["probabilities"]))
        written = {p.name for p in (tmp_path / name).iterdir()}
        assert written == {"probabilities.tif", "probabilities.qml", "item.json"}
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


@pytest.mark.parametrize("stride", [64, 20])
def test_patch_embeddings_are_not_averaged(engine, imagery, tmp_path, stride):
    run = plan_raster(engine.models["embed-patch"], imagery.stack(dated=False), stride=stride)
    outcome = run_raster(make_work(run, tmp_path, window_bytes=TINY))
    means, _ = patch_answers(imagery, stride)
    np.testing.assert_allclose(read(outcome.files["embedding"]), means, atol=1e-5)


def test_a_raster_smaller_than_a_patch_names_both_sizes(engine, tmp_path):
    (tmp_path / "in").mkdir()
    scene = Scene(tmp_path / "in", 40, 50, dates=DATES[:1], bands=PATCH_BANDS)
    with pytest.raises(InvalidRequest, match="files: the raster has 50 x 40 pixels, and the"):
        plan_raster(engine.models["landcover-eurosat"], scene.stack(dated=False))


# Points -------------------------------------------------------------------------------------


def lonlat(rows, cols, crs=rasters.UTM, transform=rasters.NORTH_UP):
    """The centres of pixels in degrees."""
    xs, ys = transform @ (np.asarray(cols) + 0.5, np.asarray(rows) + 0.5)
    return list(zip(*reproject(crs, "EPSG:4326", xs, ys), strict=True))


def test_points_answer_as_the_raster_does_in_their_order(engine, scene):
    run = plan_raster(engine.models["pixels-landcover"], scene.stack())
    rows, cols = [60, 0, 12, 3, 89, 60], [20, 0, 100, 8, 109, 20]
    points = lonlat(rows, cols)
    points[1:1] = [(0.0, 0.0), (179.0, -89.9)]
    outcome = run_points(run, points)
    assert [r["status"] for r in outcome.results] == [
        "ok", "outside", "outside", "no_data", "ok", "no_data", "ok", "ok",
    ]  # fmt: skip
    expected = softmax(scene.mean())
    places = [(60, 20), None, None, None, (12, 100), None, (89, 109), (60, 20)]
    for result, place in zip(outcome.results, places, strict=True):
        if place is None:
            assert set(result) == {"status"}
        else:
            assert list(result["probabilities"].values()) == pytest.approx(
                expected[:, *place], abs=1e-4
            )
    json.dumps(outcome.results, allow_nan=False)


def test_points_of_a_forecast_hold_every_quantile(engine, scene):
    run = plan_raster(engine.models["forecast-vi"], scene.stack(), horizon=1)
    (result,) = run_points(run, lonlat([50], [50])).results
    expected = scene.mean()[:, 50, 50] + STEP
    assert result["dates"] == [(DATES[-1] + timedelta(days=10)).isoformat()]
    assert result["SAVI"]["q90"] == pytest.approx([expected[2] + SPREAD], abs=1e-4)


def test_all_points_outside(engine, scene):
    run = plan_raster(engine.models["embed-pixel"], scene.stack())
    # Off the raster, beyond the projection, at the poles.
    places = [(0, 0), (90, 0), (3, 90), (-177, -90), (91, 1)]
    assert run_points(run, places).results == ({"status": "outside"},) * 5


def test_a_point_beyond_the_projection_does_not_spoil_the_others(engine, scene):
    run = plan_raster(engine.models["embed-pixel"], scene.stack())
    (good,) = lonlat([50], [50])
    statuses = [r["status"] for r in run_points(run, [(90, 0), good, (91, 0), good]).results]
    assert statuses == ["outside", "ok", "outside", "ok"]


@pytest.mark.parametrize(
    ("row", "col", "corner"), [(70, 90, (38, 58)), (0, 0, (0, 0)), (149, 169, (86, 106))]
)
def test_a_point_in_imagery_gets_the_patch_around_it(engine, imagery, row, col, corner):
    run = plan_raster(engine.models["embed-patch"], imagery.stack(dated=False))
    (result,) = run_points(run, lonlat([row], [col])).results
    top, left = corner
    expected = patch_mean(composite_of(imagery)[:, top : top + 64, left : left + 64])
    assert result["embedding"] == pytest.approx(expected, abs=1e-5)


def test_a_point_in_a_hole_of_the_imagery_has_no_data(engine, cloudy):
    run = plan_raster(engine.models["landcover-eurosat"], cloudy.stack(dated=False))
    statuses = [r["status"] for r in run_points(run, lonlat([55, 110], [32, 110])).results]
    assert statuses == ["no_data", "ok"]


# What cannot be ------------------------------------------------------------------------------


def test_too_few_dates_names_both_numbers_and_the_windows_ends(engine, scene):
    with pytest.raises(
        TooFewDates, match=r"1 of its 6 dates in the time window from 2021-06-01 to 2022-05-26.* 2"
    ):
        plan_raster(engine.models["pixels-landcover"], scene.stack(), start=date(2021, 6, 1))


def test_a_pixel_model_needs_dates(engine, scene):
    undated = replace(scene.stack(), dates=())
    with pytest.raises(MissingDates, match="no dates"):
        plan_raster(engine.models["pixels-landcover"], undated)


def torn(scene, folder):
    """The same stack, one block of one file not what deflate writes."""
    files = []
    for file in scene.files:
        data = file.path.read_bytes()
        path = folder / file.name
        path.write_bytes(data)
        files.append(rasters.SourceFile(name=file.name, path=path))
    with rasterio.open(files[-1].path) as opened:
        offset = int(opened.get_tag_item("BLOCK_OFFSET_1_2", "TIFF", bidx=1))
    with files[-1].path.open("r+b") as opened:
        opened.seek(offset)
        opened.write(b"\xff" * 64)
    return files


def test_pixels_that_do_not_decode_stop_the_run_and_leave_nothing(engine, scene, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    files = torn(scene, tmp_path / "in")
    stack = open_stack(files, StackOptions(), bands=PIXEL_BANDS, max_bytes=2**40)
    run = plan_raster(engine.models["pixels-landcover"], stack)
    with pytest.raises(CorruptRaster, match=files[-1].name):
        run_raster(make_work(run, tmp_path / "out", window_bytes=TINY))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_graph_that_fails_stops_the_run_and_leaves_nothing(engine, scene, tmp_path):
    run = plan_raster(engine.models["pixels-brittle"], scene.stack())
    with pytest.raises(InternalError):
        run_raster(make_work(run, tmp_path, window_bytes=TINY))
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_answering_is_told_of_one_window_too(engine, scene, tmp_path, monkeypatch):
    model = engine.models["pixels-landcover"]
    predict = model.pixels

    def pixels(*given, **more):
        time.sleep(0.2)
        return predict(*given, **more)

    monkeypatch.setattr(model, "pixels", pixels)
    timing = run_raster(make_work(plan_raster(model, scene.stack()), tmp_path)).timing
    assert timing.infer > 0.2


def test_points_stop_when_the_run_is_cancelled(engine, scene, monkeypatch):
    cancelled, reads = threading.Event(), []
    read = StackReader._read_layer

    def counted(self, *given):
        reads.append(given)
        cancelled.set()
        return read(self, *given)

    monkeypatch.setattr(StackReader, "_read_layer", counted)
    monkeypatch.setattr("service.read.reader._CELL", 1)  # a window for each block
    run = plan_raster(engine.models["pixels-landcover"], scene.stack())
    places = lonlat([1, 40, 90], [1, 20, 60])
    with pytest.raises(Cancelled):
        run_points(run, places, cancelled=cancelled)
    assert len(reads) == 1


@pytest.mark.parametrize("failing", ["first", "last"])
def test_a_fault_in_one_window_stops_the_run(engine, scene, tmp_path, monkeypatch, failing):
    model = engine.models["pixels-landcover"]
    predict, numbers = model.pixels, itertools.count(1)
    run = plan_raster(model, scene.stack())
    parts = windows(scene.stack().grid, (16, 32), run.pixel_bytes + run.prediction_bytes, TINY)
    wrong = 1 if failing == "first" else len(parts)

    def pixels(*given, **more):
        if next(numbers) == wrong:  # two threads never get the same number
            raise InternalError("this one fails")
        return predict(*given, **more)

    monkeypatch.setattr(model, "pixels", pixels)
    with pytest.raises(InternalError, match="this one fails"):
        run_raster(make_work(run, tmp_path, window_bytes=TINY))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "which", "after"),
    [
        ("pixels-landcover", "scene", 0.2),
        ("landcover-eurosat", "imagery", 0.4),
        *in_all_tests(
            ("landcover-eurosat", "imagery", 0.1),
            ("landcover-eurosat", "imagery", 0.85),
            names=True,
        ),
    ],
)
def test_a_cancelled_run_leaves_nothing(engine, request, tmp_path, name, which, after):
    scene = request.getfixturevalue(which)
    stack = scene.stack(dated=name.startswith("pixels"))
    run = plan_raster(engine.models[name], stack, stride=64 if which == "scene" else 8)
    cancelled, shares = threading.Event(), []

    def progress(share):
        shares.append(share)
        if share >= after:
            cancelled.set()

    with pytest.raises(Cancelled):
        run_raster(
            make_work(run, tmp_path, progress=progress, cancelled=cancelled, window_bytes=TINY)
        )
    assert after <= max(shares) < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "which", "stride"),
    [("pixels-landcover", "scene", 64), ("landcover-eurosat", "imagery", 16)],
)
def test_progress_goes_from_nothing_to_all(engine, request, tmp_path, name, which, stride):
    scene = request.getfixturevalue(which)
    stack = scene.stack(dated=name.startswith("pixels"))
    run = plan_raster(engine.models[name], stack, stride=stride)
    shares = []
    outcome = run_raster(make_work(run, tmp_path, progress=shares.append, window_bytes=TINY))
    assert shares == sorted(shares)
    assert shares[0] < 0.5
    assert shares[-1] == 1
    assert len(shares) > 5
    assert all(0 <= share <= 1 for share in shares)
    assert min(outcome.timing.read, outcome.timing.infer, outcome.timing.write) > 0


# Real data ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_stack_without_an_epsg_code(engine, shared_data, tmp_path):
    folder = shared_data / "mato_grosso_modis"
    dates = tuple(date.fromisoformat(d) for d in (folder / "dates.txt").read_text().split())
    names = {"B02": "blue.tif", "B04": "red.tif", "B08": "nir.tif"}
    stack = open_stack(
        [rasters.SourceFile(name=name, path=folder / name) for name in names.values()],
        StackOptions(dates=dates),
        bands=PIXEL_BANDS,
        max_bytes=2**40,
    )
    run = plan_raster(engine.models["embed-pixel"], stack, start=date(2010, 1, 1))
    outcome = run_raster(make_work(run, tmp_path))
    inside = [t for t, day in enumerate(dates) if date(2010, 1, 1) <= day < date(2010, 12, 27)]
    assert outcome.summary["dates_used"] == [dates[t].isoformat() for t in inside]
    path = outcome.files["embedding"]
    assert cog_validate(path, strict=True) == (True, [], [])
    with rasterio.open(path) as file, rasterio.open(folder / "red.tif") as source:
        assert file.crs == source.crs
        assert file.crs.to_epsg() is None
        assert file.transform == source.transform
    bands = []
    for name in names.values():
        with rasterio.open(folder / name) as source:
            bands.append(source.read([t + 1 for t in inside], masked=True).filled(np.nan))
    values = np.stack(bands)
    values[:, np.isnan(values).any(axis=0)] = np.nan  # a date counts where all bands are there
    np.testing.assert_allclose(read(path), np.nanmean(values, axis=1), rtol=1e-4)
