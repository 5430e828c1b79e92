"""Batches for pretraining: Hilbert curve, pairs, and reproducibility from seed and step."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import numpy as np
import pytest
import torch

from training.augment import PatchAugmentation, PixelAugmentation
from training.datasets import PatchSet, Scene
from training.datasets.synthetic import make_dates, make_pixels, make_scene
from training.errors import TrainingError
from training.pairs import (
    ImageryViewSampler,
    PairSampler,
    SeriesViewSampler,
    hilbert_curve,
    patches_around,
    plain,
    spread_along,
    window_starts,
)

DATES = make_dates(date(2021, 1, 1), days=500)
PIXEL, PATCH = ("B02", "B04", "B08"), ("B04", "B03", "B02")


def scenes(count: int = 3, size: int = 40) -> list[Scene]:
    return [make_scene(size=size, dates=DATES, seed=s) for s in range(count)]


def sampler(chosen: list[Scene] | None = None, **changes) -> PairSampler:
    chosen = chosen or scenes()
    made = PairSampler(
        scenes=chosen,
        weights=[1.0] * len(chosen),
        pixel_bands=PIXEL,
        patch_bands=PATCH,
        side=16,
        window_days=360,
        min_observations=4,
        groups=3,
        per_group=10,
        pixel_augmentation=PixelAugmentation(),
        patch_augmentation=PatchAugmentation(),
    )
    return replace(made, **changes)


@pytest.mark.parametrize("side", [1, 2, 4, 16, 64])
def test_the_curve_visits_each_pixel_once_in_unit_steps(side):
    curve = hilbert_curve(side, side)
    assert len({tuple(p) for p in curve}) == side * side
    assert (np.abs(np.diff(curve, axis=0)).sum(axis=1) == 1).all()


def test_the_first_curves_are_hilberts():
    assert hilbert_curve(2, 2).tolist() == [[0, 0], [0, 1], [1, 1], [1, 0]]
    # Every quarter of the curve is a quarter of the square.
    quarters = hilbert_curve(8, 8).reshape(4, 16, 2) // 4
    assert all(len({tuple(p) for p in quarter}) == 1 for quarter in quarters)


@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (64, 48), (101, 101), (1, 9)])
def test_the_curve_covers_areas_of_any_size(rows, cols):
    curve = hilbert_curve(rows, cols)
    assert {tuple(p) for p in curve} == {(r, c) for r in range(rows) for c in range(cols)}
    assert len(curve) == rows * cols


def test_draws_are_spread_over_the_area():
    curve = hilbert_curve(32, 32)
    rng = np.random.default_rng(0)
    drawn = spread_along(curve, 16, rng)
    # 16 stretches of the curve are 16 squares of 8 x 8: one draw in each.
    assert len({tuple(p) for p in drawn // 8}) == 16
    assert len(spread_along(curve[:3], 10, rng)) == 10


def test_a_patch_has_its_pixel_at_the_centre_and_mirrors_at_borders():
    image = np.arange(2 * 9 * 9, dtype=np.float32).reshape(2, 9, 9)
    positions = np.array([[0, 0], [4, 5], [8, 8]])
    patches = patches_around(image, positions, 6)
    for patch, (row, col) in zip(patches, positions, strict=True):
        np.testing.assert_array_equal(patch[:, 3, 3], image[:, row, col])
    np.testing.assert_array_equal(patches[1], image[:, 1:7, 2:8])
    np.testing.assert_array_equal(patches[0][:, 2], patches[0][:, 4])


def test_a_pair_is_one_place():
    chosen = scenes()
    batch = plain(sampler(chosen)).batch(seed=0, step=0)
    series = torch.cat([g.values.nanmedian(dim=1).values for g in batch.groups])
    for i in range(30):
        scene = chosen[int(batch.scenes[i])]
        row, col = batch.positions[i].tolist()
        group = batch.groups[i // 10]
        values, valid = scene.read(PIXEL, slice(row, row + 1), slice(col, col + 1))
        seen = group.values[i % 10][group.valid[i % 10]]
        clear = torch.from_numpy(values[valid[:, 0, 0], :, 0, 0])
        # Every date of the group is one of the scene's, with this pixel's own values.
        assert all((clear - v).abs().amax(dim=1).min() == 0 for v in seen)
        assert scene.fields is not None
        assert batch.fields[i] == scene.fields[row, col] + (int(batch.scenes[i]) << 32)
    centre = batch.patches[:, 0, 8, 8]
    correlation = np.corrcoef(centre.numpy(), series[:, 1].numpy())[0, 1]
    assert correlation > 0.8


def test_a_batch_follows_from_seed_and_step():
    one, two = sampler(), sampler()
    two.batch(seed=0, step=3)  # what was drawn before must not matter
    a, b = one.batch(seed=0, step=5), two.batch(seed=0, step=5)
    assert torch.equal(a.patches, b.patches)
    assert all(
        torch.equal(g.valid, h.valid) and torch.equal(g.days, h.days)
        for g, h in zip(a.groups, b.groups, strict=True)
    )
    assert not torch.equal(a.patches, one.batch(seed=0, step=6).patches)
    assert not torch.equal(a.patches, one.batch(seed=1, step=5).patches)


def test_pixels_with_too_few_dates_are_not_drawn():
    scene = scenes(1)[0]
    assert scene.valid is not None
    scene.valid[:, :, :20] = False
    batch = sampler([scene]).batch(seed=0, step=0)
    assert (batch.positions[:, 1] >= 20).all()
    assert all((g.valid.sum(dim=1) >= 4).all() for g in batch.groups)
    scene.valid[:] = False
    with pytest.raises(TrainingError, match="no pixel has 4 usable dates"):
        sampler([scene]).batch(seed=0, step=0)


def test_a_large_scene_is_read_in_part():
    read: list[tuple[int, int]] = []

    class Watched(Scene):
        def read(self, bands, rows=slice(None), cols=slice(None), times=slice(None)):
            read.append(self.shape)
            return super().read(bands, rows, cols, times)

    scene = scenes(1)[0]
    watched = Watched(**{name: getattr(scene, name) for name in Scene.__dataclass_fields__})
    batches = [sampler([watched], area=24).batch(seed=0, step=s) for s in range(8)]
    assert set(read) == {(24, 24)}
    positions = torch.cat([b.positions for b in batches])
    assert positions.min() >= 0
    assert positions.amax(dim=0).tolist() > [30, 30]


def test_windows_start_on_months_and_lie_within_the_dates():
    starts = window_starts(DATES, 360)
    assert starts[0] == date(2021, 1, 1)
    assert all(s.day == 1 for s in starts)
    assert (DATES[-1] - starts[-1]).days >= 329
    assert window_starts(DATES[:5], 360) == [date(2021, 1, 1)]


def test_series_views_are_two_views_of_the_same_pixels():
    pixels = make_pixels(scenes(1)[0]).select(PIXEL)
    how = PixelAugmentation(drop=0.5, noise=0.0, gain=0.0)
    views = SeriesViewSampler(
        sets=[pixels], window_days=360, groups=2, per_group=12, augmentation=how
    ).batch(seed=0, step=0)
    for a, b in zip(views.first, views.second, strict=True):
        both = a.valid & b.valid
        assert both.any()
        assert torch.equal(a.values[both], b.values[both])
        assert not torch.equal(a.valid, b.valid)
        assert not torch.equal(a.days, b.days)


def test_imagery_views_are_two_parts_of_the_same_patch():
    values = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 64, 64), np.uint8)
    patches = PatchSet(
        source="x",
        bands=PATCH,
        values=values,
        scale=0.01,
        places=np.arange(5),
        validation=np.zeros(5, bool),
    )
    how = PatchAugmentation(gain=0.0, band_gain=0.0, offset=0.0, noise=0.0)
    views = ImageryViewSampler(patches=patches, side=32, size=5, augmentation=how).batch(0, 0)
    assert views.first.shape == (5, 3, 32, 32)
    assert torch.equal(views.first, views.second)
    assert sorted(views.first[:, 0, 0, 0].tolist()) == pytest.approx([0, 0.01, 0.02, 0.03, 0.04])
