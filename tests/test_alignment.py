"""Alignment of a stack's images: what is mirrored, turned or shifted is named, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio

from service.read import alignment
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.radiometry import calibrate
from service.read.stack import open_stack
from tests.kits.rasters import write

BANDS = ("B02", "B04", "B08")


def land(seed: int, side: int = 80) -> np.ndarray:
    """Fields of 4 to 12 pixels a side, each with its own reflectance (3, side, side)."""
    rng = np.random.default_rng(seed)
    edges = [np.cumsum(rng.integers(4, 13, side)) for _ in range(2)]
    rows, columns = (np.searchsorted(own, np.arange(side), side="right") for own in edges)
    levels = rng.uniform(0.02, 0.12, (side, side)), rng.uniform(0.2, 0.5, (side, side))
    red, nir = (level[rows][:, columns] for level in levels)
    return np.stack([red * 0.7, red, nir])


def stack_of(folder: Path, images: list[np.ndarray]) -> list[SourceFile]:
    rng = np.random.default_rng(1)
    files = []
    for n, image in enumerate(images):
        pixels = (image * rng.uniform(0.8, 1.2) + rng.normal(0, 0.005, image.shape)) * 10_000
        path = folder / f"2021{n + 1:02d}05.tif"
        files.append(write(path, pixels.clip(1).astype(np.uint16), descriptions=BANDS))
    return files


def said(files: list[SourceFile], **options: str) -> list[str]:
    stack = open_stack(files, StackOptions(**options), bands=BANDS, max_bytes=2**32)
    return [w.detail for w in calibrate(stack).warnings if w.code == "shift_suspected"]


@pytest.mark.parametrize(
    ("move", "how"),
    [
        (lambda one: one[:, :, ::-1], "mirrored left to right"),
        (lambda one: one[:, ::-1], "mirrored top to bottom"),
        (lambda one: one[:, ::-1, ::-1], "turned by 180 degrees"),
        (lambda one: one.swapaxes(1, 2), "with rows and columns exchanged"),
        (
            lambda one: np.roll(one, (3, -5), (1, 2)),
            "shifted by 3 pixels down and 5 pixels to the left",
        ),
        (
            lambda one: np.roll(one, (-2, 1), (1, 2)),
            "shifted by 2 pixels up and 1 pixel to the right",
        ),
        (lambda one: np.roll(one, 4, 1), "shifted by 4 pixels down relative"),
        (lambda one: one, None),
        (lambda one: land(9), None),  # another place: nothing brings it back
    ],
)
@pytest.mark.parametrize("side", [80, 81])
def test_one_image_that_is_moved_is_named(
    tmp_path: Path, move: Callable[[np.ndarray], np.ndarray], how: str | None, side: int
) -> None:
    images = [land(0, side) for _ in range(6)]
    images[3] = move(images[3])[:, :side, :side]
    if images[3].shape != images[0].shape:
        images[3] = np.pad(images[3], ((0, 0), (0, 1), (0, 1)), "edge")
    details = said(stack_of(tmp_path, images))
    assert len(details) == (how is not None)
    for detail in details:
        assert str(how) in detail
        assert detail.startswith("'20210405.tif' (2021-04-05) seems to be ")
        assert "dates do not lie as the others" not in detail
    assert not said(stack_of(tmp_path, images)[:4])  # too few to compare with


def test_an_area_whose_mirror_image_does_not_overlap_it_is_not_suspected() -> None:
    """Images that share too few pixels once they are moved have no correlation."""
    rng = np.random.default_rng(5)
    pictures = rng.normal(0.2, 0.05, (6, 3, 64, 64)).astype(np.float32)  # nothing is alike
    rows, columns = np.mgrid[:64, :64]
    pictures[:, :, rows > columns - 16] = np.nan
    assert np.isfinite(pictures[0, 0]).sum() > 64 * 64 / 4
    assert alignment.find_moved(pictures, [10 * t for t in range(6)]) == []


def test_several_moved_images_are_counted(tmp_path: Path) -> None:
    images = [land(0) for _ in range(9)]
    for n in (2, 6):
        images[n] = images[n][:, ::-1]
    (detail,) = said(stack_of(tmp_path, images))
    assert "(2 dates do not lie as the others: 2021-03-05, 2021-07-05)" in detail


@pytest.mark.parametrize("diagonal", [False, True])
def test_stripes_that_change_with_the_season_are_not_suspected(
    tmp_path: Path, diagonal: bool
) -> None:
    """Three crops in stripes, green one after the other: many shifts would bring them together."""
    rows, columns = np.mgrid[:48, :48] // 8
    crop = (rows * diagonal + columns) % 3
    images = []
    for n in range(6):
        green = np.roll([0.1, 0.5, 0.9], n % 3)[crop]
        images.append(np.stack([0.1 - 0.05 * green, 0.2 - 0.16 * green, 0.2 + 0.25 * green]))
    assert not said(stack_of(tmp_path, images))


def test_parts_of_large_rasters_are_compared(tmp_path: Path) -> None:
    """A shift shows in every part; of many dates, each is compared where others are as well."""
    images = [land(0, 400) for _ in range(12)]
    images[7] = np.roll(images[7], 6, 2)
    (detail,) = said(stack_of(tmp_path, images))
    assert "'20210805.tif' (2021-08-05) seems to be shifted by 6 pixels to the right" in detail


def test_the_best_shift_is_that_of_plain_correlations() -> None:
    rng = np.random.default_rng(2)
    one, other = (rng.normal(size=(2, 24, 30)).astype(np.float32) for _ in range(2))
    other[:, 5:, 7:] += 2 * one[:, :-5, :-7]
    for image in (one, other):
        image[np.broadcast_to(rng.random((24, 30)) < 0.2, image.shape)] = np.nan
    best = (-2.0, 0, 0)
    for down in range(-8, 9):
        for right in range(-8, 9):
            rows = slice(max(down, 0), 24 + min(down, 0)), slice(max(-down, 0), 24 + min(-down, 0))
            columns = (
                slice(max(right, 0), 30 + min(right, 0)),
                slice(max(-right, 0), 30 + min(-right, 0)),
            )
            found = []
            for band in range(2):
                x, y = other[band, rows[0], columns[0]], one[band, rows[1], columns[1]]
                both = ~np.isnan(x) & ~np.isnan(y)
                if both.sum() >= 200:
                    found.append(np.corrcoef(x[both], y[both])[0, 1])
            if len(found) == 2:
                best = max(best, (float(np.mean(found)), down, right))
    after, down, right, elsewhere = alignment._best_shift(other, one)
    assert elsewhere < after
    assert (down, right) == best[1:] == (5, 7)
    assert after == pytest.approx(best[0], abs=1e-6)


@pytest.mark.parametrize(
    ("folder", "pattern", "mask"),
    [
        ("flanders_2017_2018", "S2_L2A_2018*.tif", "scl"),
        ("flanders_2017_2018", "S2_L2A_2018*.tif", "none"),
        ("south_tyrol_2022", "S2_L2A_2022-*.tif", "scl"),
        ("south_tyrol_2022", "S2_L2A_2022-*.tif", "none"),
        ("hesbaye_a_monthly", "*.tif", "none"),
        ("hesbaye_b_monthly", "*.tif", "none"),
    ],
)
def test_no_real_date_is_suspected(
    shared_data: Path, tmp_path: Path, folder: str, pattern: str, mask: str
) -> None:
    paths = sorted((shared_data / folder).glob(pattern))
    assert said([SourceFile(name=path.name, path=path) for path in paths], mask=mask) == []
    if folder != "south_tyrol_2022":
        return
    with rasterio.open(paths[2]) as file:
        pixels, profile, names = file.read(), file.profile, file.descriptions
    files = [SourceFile(name=path.name, path=path) for path in paths]
    kept = {key: profile[key] for key in ("crs", "transform", "nodata")}
    moved = np.roll(pixels, (4, -3), (1, 2))
    files[2] = write(tmp_path / paths[2].name, moved, descriptions=names, **kept)
    (detail,) = said(files, mask=mask)
    assert f"'{paths[2].name}'" in detail
    assert "shifted by 4 pixels down and 3 pixels to the left" in detail
