"""Patches: positions, gap filling and overlap averaging, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS
from rasterio.windows import Window

from service.errors import InvalidRequest
from service.grid import Grid
from service.infer.patches import PatchGrid, box_mean, fill_gaps

IMAGERY = Grid(
    crs=CRS.from_epsg(32631),
    transform=Affine(10, 0, 600_000, 0, -10, 5_600_000),
    width=150,
    height=130,
)


@pytest.mark.parametrize("stride", [1, 7, 16, 33, 64])
def test_the_grid_of_answers(stride):
    patches = PatchGrid.over(IMAGERY, side=64, stride=stride)
    assert patches.grid.height == (130 - 64) // stride + 1
    assert patches.grid.width == (150 - 64) // stride + 1
    assert patches.grid.transform @ (0, 0) == IMAGERY.transform @ (0, 0)
    assert patches.grid.transform @ (2, 1) == IMAGERY.transform @ (2 * stride, stride)


@pytest.mark.parametrize("stride", [1, 7, 16, 32, 33, 64])
def test_reach_is_how_far_back_a_patch_still_holds_the_cell(stride):
    patches = PatchGrid.over(IMAGERY, side=64, stride=stride)
    back = [k for k in range(65) if 64 - k * stride >= stride]  # cell 0 in the patch k before
    assert patches.reach == max(back)


def test_patches_are_cut_where_they_start():
    imagery = np.random.default_rng(0).random((3, 130, 150), np.float32)
    patches = PatchGrid.over(IMAGERY, side=64, stride=20)
    cut = patches.cut(imagery)
    assert cut.shape == (4, 5, 3, 64, 64)
    for r in range(4):
        for c in range(5):
            expected = imagery[:, 20 * r : 20 * r + 64, 20 * c : 20 * c + 64]
            np.testing.assert_array_equal(cut[r, c], expected)


def test_a_window_of_cells_covers_its_patches_and_those_behind():
    patches = PatchGrid.over(IMAGERY, side=64, stride=16)
    assert patches.pixels(Window(1, 2, 3, 2)) == Window(16, 32, 2 * 16 + 64, 16 + 64)
    assert patches.behind(Window(0, 4, 6, 1)) == Window(0, 1, 6, 4)
    assert patches.behind(Window(5, 1, 1, 4)) == Window(2, 0, 4, 5)


@pytest.mark.parametrize(
    ("row", "column", "corner"),
    [(70, 80, (38, 48)), (0, 0, (0, 0)), (129, 149, (66, 86)), (10, 149, (0, 86))],
)
def test_the_patch_around_a_pixel_lies_inside(row, column, corner):
    window = PatchGrid.over(IMAGERY, side=64, stride=64).centred(IMAGERY, row, column)
    assert (window.row_off, window.col_off) == corner
    assert (window.height, window.width) == (64, 64)


def test_imagery_smaller_than_a_patch_names_both_sizes():
    small = Grid(crs=IMAGERY.crs, transform=IMAGERY.transform, width=50, height=80)
    with pytest.raises(InvalidRequest, match=r"50 x 80 pixels, .* one patch of 64 x 64"):
        PatchGrid.over(small, side=64, stride=64)


@pytest.mark.parametrize("stride", [0, 65])
def test_a_stride_out_of_range_names_the_range(stride):
    with pytest.raises(InvalidRequest, match=f"{stride} is not a number of pixels from 1 to 64"):
        PatchGrid.over(IMAGERY, side=64, stride=stride)


def test_gaps_take_the_median_of_their_patch_and_band():
    patches = np.random.default_rng(0).random((4, 3, 8, 8), np.float32)
    patches[1, 1, :4] = np.nan  # half, in one band only
    patches[2, :, :4] = np.nan
    patches[2, :, 4, 0] = np.nan  # one more than half
    patches[3] = np.nan
    clear, filled = fill_gaps(patches.copy())
    assert clear.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(filled[0], patches[0])
    np.testing.assert_array_equal(filled[1, :, 4:], patches[1, :, 4:])
    for band in range(3):
        expected = np.median(patches[1, band, 4:])
        np.testing.assert_array_equal(filled[1, band, :4], np.full((4, 8), expected))


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_box_mean_as_a_loop_has_it(size):
    values = np.random.default_rng(0).random((2, 13, 17), np.float32)
    values[:, np.random.default_rng(1).random((13, 17)) < 0.4] = np.nan
    values[:, :3, :3] = np.nan
    found = box_mean(values, size)
    for r in range(13):
        for c in range(17):
            box = values[:, max(0, r - size + 1) : r + 1, max(0, c - size + 1) : c + 1]
            there = box.reshape(2, -1)[:, ~np.isnan(box[0]).ravel()]
            expected = there.mean(axis=1) if there.size else [np.nan] * 2
            np.testing.assert_allclose(found[:, r, c], expected, rtol=1e-5)
