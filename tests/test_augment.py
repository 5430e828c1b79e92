"""Augmentation of series and patches."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from training.augment import (
    NO_PATCH_AUGMENTATION,
    NO_PIXEL_AUGMENTATION,
    PatchAugmentation,
    PixelAugmentation,
    add_haze,
    augment_patches,
    augment_pixels,
    clear_atmosphere,
    crop,
    disturb,
    drop_dates,
    flip,
    jitter_dates,
    shift_season,
    smooth,
    soften,
    through_air,
    to_surface,
    to_top,
    zoom,
)


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_dropping_keeps_the_least_and_never_adds():
    valid = chance().random((200, 36)) < np.linspace(0.02, 1.0, 200)[:, None]
    kept = drop_dates(valid, chance(1), most=0.9, least=4)
    assert not (kept & ~valid).any()
    assert (kept.sum(1) >= np.minimum(valid.sum(1), 4)).all()
    assert kept.sum() < 0.75 * valid.sum()


def test_dropping_nothing_changes_nothing():
    valid = chance().random((20, 10)) < 0.5
    np.testing.assert_array_equal(drop_dates(valid, chance(), most=0.0, least=0), valid)


def test_share_dropped_is_drawn_for_each_pixel():
    kept = drop_dates(np.ones((4000, 100), bool), chance(), most=0.6, least=0).mean(1)
    assert kept.mean() == pytest.approx(0.7, abs=0.01)
    assert kept.min() < 0.45
    assert kept.max() > 0.97


def test_jitter_moves_dates_apart_and_season_moves_them_together():
    days = np.arange(0, 3600, 10, dtype=np.float32)
    jittered = jitter_dates(days, chance(), deviation=2.0) - days
    assert jittered.std() == pytest.approx(2.0, rel=0.15)
    shifts = [shift_season(days, chance(i), most=15.0) - days for i in range(200)]
    assert all(np.allclose(s, s[0], atol=1e-3) for s in shifts)
    firsts = np.array([s[0] for s in shifts])
    assert np.abs(firsts).max() <= 15.0
    assert firsts.std() == pytest.approx(15.0 / np.sqrt(3.0), rel=0.15)


def test_gain_differs_by_pixel_and_missing_values_stay_missing():
    values = np.full((500, 6, 3), 0.2, np.float32)
    values[:, 2] = np.nan
    out = disturb(values, chance(), noise=0.0, gain=0.05)
    assert np.isnan(out[:, 2]).all()
    ratio = np.delete(out, 2, axis=1) / 0.2
    assert np.ptp(ratio, axis=(1, 2)).max() < 1e-5
    assert np.log(ratio[:, 0, 0]).std() == pytest.approx(0.05, rel=0.15)


def test_no_augmentation_is_the_identity():
    values = chance().random((5, 7, 3)).astype(np.float32)
    valid = np.ones((5, 7), bool)
    days = np.arange(7, dtype=np.float32)
    out = augment_pixels(values, valid, days, NO_PIXEL_AUGMENTATION, chance())
    for got, expected in zip(out, (values, valid, days), strict=True):
        np.testing.assert_array_equal(got, expected)
    patches = chance().random((3, 3, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(
        augment_patches(patches, NO_PATCH_AUGMENTATION, chance()), patches
    )


def test_inputs_are_unchanged_and_a_seed_repeats_the_result():
    values = chance().random((5, 7, 3)).astype(np.float32)
    valid, days = np.ones((5, 7), bool), np.arange(7, dtype=np.float32)
    patches = chance().random((4, 3, 16, 16)).astype(np.float32)
    before = [a.copy() for a in (values, valid, days, patches)]
    first = augment_pixels(values, valid, days, PixelAugmentation(), chance(3))
    second = augment_pixels(values, valid, days, PixelAugmentation(), chance(3))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        augment_patches(patches, PatchAugmentation(wider=0.2), chance(3)),
        augment_patches(patches, PatchAugmentation(wider=0.2), chance(3)),
    )
    for now, then in zip((values, valid, days, patches), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_flips_are_the_eight_symmetries():
    patch = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    seen = {flip(patch, chance(seed)).tobytes() for seed in range(200)}
    expected = {
        np.ascontiguousarray(turned).tobytes()
        for k in range(4)
        for turned in (np.rot90(patch[0, 0], k), np.rot90(patch[0, 0], k)[:, ::-1])
    }
    assert seen == expected


def test_a_crop_is_a_part_of_the_patch_scaled_back():
    rows, cols = np.meshgrid(np.arange(32.0), np.arange(32.0), indexing="ij")
    patch = np.stack([rows, cols])[None].repeat(50, axis=0).astype(np.float32)
    out = crop(patch, chance(), most=0.5)
    assert out.shape == patch.shape
    for got_rows, got_cols in out:
        # Axes stay apart, in order, and cover at least half of the side.
        assert (got_rows == got_rows[:, :1]).all()
        assert (got_cols == got_cols[:1]).all()
        assert (np.diff(got_rows[:, 0]) >= 0).all()
        assert got_rows[-1, 0] - got_rows[0, 0] >= 14


@pytest.mark.parametrize(("closer", "wider"), [(0.4, 0.0), (0.0, 0.5), (0.3, 0.3)])
def test_a_zoom_interpolates_as_scipy_does_and_mirrors_what_lies_outside(closer, wider):
    rows, cols = np.meshgrid(np.arange(32.0), np.arange(32.0), indexing="ij")
    image = chance().random((32, 32))
    patch = np.stack([rows, cols, image])[None].repeat(50, axis=0).astype(np.float32)
    out = zoom(patch, chance(1), closer=closer, wider=wider)
    assert out.dtype == np.float32
    for got_rows, got_cols, got in out:
        # The first two bands hold the position of each pixel.
        expected = map_coordinates(image, [got_rows, got_cols], order=1)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    steps = np.diff(out[:, 0, :, 0], axis=1)
    scale = np.median(np.abs(steps), axis=1)
    assert (scale > 1 - closer - 1e-3).all()
    assert (scale < 1 + wider + 1e-3).all()
    assert scale.max() - scale.min() > 0.5 * (closer + wider)
    assert (steps.min() < 0) == (wider > 0)  # turned back at an edge


def test_a_zoom_of_nothing_changes_nothing():
    patch = chance().random((4, 3, 16, 16)).astype(np.float32)
    np.testing.assert_allclose(zoom(patch, chance(), closer=0.0, wider=0.0), patch, atol=1e-6)


def test_clearing_the_atmosphere_takes_most_from_blue_and_spares_the_rest() -> None:
    """Dark forest at the top of the atmosphere, 0.05 to 0.1, is near 0.03 on the ground."""
    patches = np.full((200, 3, 4, 4), 1.0, np.float32) * [[[[0.045]], [[0.07]], [[0.085]]]]
    out = clear_atmosphere(patches.astype(np.float32), chance(), share=0.5)
    changed = (out != patches.astype(np.float32)).any(axis=(1, 2, 3))
    assert 0.3 < changed.mean() < 0.7
    taken = (patches - out)[changed].mean(axis=(0, 2, 3))
    assert taken[0] < taken[1] < taken[2]
    assert 0.0 <= out[changed].mean() < 0.05
    bright = np.full((50, 3, 2, 2), 0.25, np.float32)
    assert abs(clear_atmosphere(bright, chance(), share=1.0).mean() - 0.25) < 0.03


def test_scattering_that_is_added_and_removed_changes_nothing() -> None:
    ground = chance().uniform(0.0, 0.3, (5, 3, 4, 4)).astype(np.float32)
    top = to_top(ground, 0.7)
    np.testing.assert_allclose(to_surface(top, 0.7), ground, atol=1e-6)
    # Of black ground the air alone is seen: at 490 nm and a sun 45 degrees high about 0.055.
    air = to_top(np.zeros((1, 3, 1, 1), np.float32), np.sqrt(0.5)).ravel()
    assert air[0] < air[1] < air[2]
    assert air[2] == pytest.approx(0.055, abs=0.002)
    # The lower the sun, the longer its way through the air.
    assert (to_top(np.zeros((1, 3, 1, 1), np.float32), 0.4).ravel() > air).all()


def test_series_through_the_air_are_brighter_in_blue_than_in_red_and_infrared() -> None:
    bands = ("B08", "B02", "B04")
    dark = np.full((200, 6, 3), 0.02, np.float32)
    near, blue, red = (through_air(dark, bands, chance()) - dark).transpose(2, 0, 1)
    assert (near < red).all()
    assert (red < blue).all()
    # Molecules alone add 0.043 to 0.078 at 490 nm; the aerosol adds some and differs by date.
    assert 0.04 < blue.min() < blue.max() < 0.12
    assert np.ptp(blue, axis=1).min() > 0.0
    bright = through_air(np.full((200, 6, 3), 0.6, np.float32), bands, chance())
    assert (bright < 0.6).all()


def test_haze_brightens_dark_ground_and_dims_bright_ground() -> None:
    dark, bright = (np.full((1, 3, 2, 2), value, np.float32) for value in (0.02, 0.9))
    np.testing.assert_allclose(add_haze(bright, 0.0, 0.7), bright)
    thin, thick = (add_haze(dark, depth, 0.7) - dark for depth in (0.3, 0.6))
    assert (thin > 0).all()
    assert (thin < thick).all()
    assert (thick < 0.05).all()
    red, green, blue = thick[0, :, 0, 0]
    assert red < green < blue
    assert (add_haze(bright, 0.6, 0.7) < bright).all()


def test_smoothing_is_a_mean_of_neighbours_that_keeps_the_mean() -> None:
    patch = chance().random((1, 2, 7, 7)).astype(np.float32)
    kernel = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])
    expected = (patch[0, 1, 2:5, 3:6] * kernel).sum()
    assert smooth(patch, 0.25)[0, 1, 3, 4] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(smooth(patch, 0.0), patch)
    np.testing.assert_allclose(smooth(np.ones_like(patch), 1 / 3), 1.0, rtol=1e-6)


def test_a_share_of_the_patches_is_smoothed_each_by_its_own_weight() -> None:
    patches = np.zeros((400, 1, 9, 9), np.float32)
    patches[:, :, 4, 4] = 1.0
    left = soften(patches, chance(), share=0.5)[:, 0, 4, 4]
    changed = left != 1.0
    assert 0.4 < changed.mean() < 0.6
    assert left[changed].min() > 1 / 9
    assert np.ptp(left[changed]) > 0.7
    assert (soften(patches, chance(), share=1.0)[:, 0, 4, 4] < 1.0).all()
