"""Batches for pretraining: pairs of a pixel's series and the imagery around it, and views.

A batch is a function of the seed and the step only. No state is kept between batches, so a resumed
run uses exactly the batches of an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from training.augment import (
    NO_PATCH_AUGMENTATION,
    NO_PIXEL_AUGMENTATION,
    PatchAugmentation,
    PixelAugmentation,
    augment_patches,
    augment_pixels,
)
from training.datasets import PatchSet, PixelSet, Scene
from training.errors import TrainingError

# A date is used as an image only if at least this share of the area is clear.
_CLEAR_SHARE = 0.9
# Single-date images per group, in addition to the median of all dates.
_SINGLE_IMAGES = 3
# Number of clear dates in the median: more would cost time and change little.
_MEDIAN_DATES = 7
# Number of windows drawn; the best of them is used.
_ATTEMPTS = 6


@dataclass(frozen=True, kw_only=True)
class SeriesGroup:
    """Series that share their dates: the input of `PixelGraph.regular`."""

    values: Tensor
    """Reflectance (n, T, C), NaN where missing."""
    valid: Tensor
    """(n, T)."""
    days: Tensor
    """Days since the window's first day (T)."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pixels and the imagery around them: row i of one is the positive of row i of the other."""

    groups: tuple[SeriesGroup, ...]
    """The series, group after group (N in total)."""
    patches: Tensor
    """Imagery (N, C, P, P), reflectance, the pixel at row and column P // 2."""
    scenes: Tensor
    """Number of the scene (N)."""
    positions: Tensor
    """Row and column in the scene (N, 2)."""
    fields: Tensor
    """Number of the field among all scenes (N), -1 where unknown."""


@dataclass(frozen=True, kw_only=True)
class SeriesViews:
    """Two augmented views of the same pixels."""

    first: tuple[SeriesGroup, ...]
    second: tuple[SeriesGroup, ...]


@dataclass(frozen=True, kw_only=True)
class ImageryViews:
    """Two augmented views of the same patches, (N, C, P, P) each."""

    first: Tensor
    second: Tensor


def hilbert_curve(rows: int, cols: int) -> NDArray[np.int64]:
    """Positions of an area in the order of a Hilbert curve: (rows * cols, 2), row and column.

    Neighbours on the curve are neighbours on the ground, so equal stretches of the curve are
    compact pieces of the area. The curve is that of the smallest enclosing square of a power of
    two, without the positions outside the area (Hilbert 1891, doi:10.1007/BF01199431).
    """
    order = max(rows, cols, 1) - 1
    levels = order.bit_length()
    rest = np.arange(4**levels, dtype=np.int64)
    row = np.zeros_like(rest)
    col = np.zeros_like(rest)
    for level in range(levels):
        side = 1 << level
        right = (rest >> 1) & 1
        lower = (rest ^ right) & 1
        # The first and last quarter of a curve are turned; the last also mirrored.
        mirrored = (lower == 0) & (right == 1)
        row, col = (
            np.where(mirrored, side - 1 - row, row),
            np.where(mirrored, side - 1 - col, col),
        )
        turned = lower == 0
        row, col = np.where(turned, col, row), np.where(turned, row, col)
        row = row + side * right
        col = col + side * lower
        rest >>= 2
    inside = (row < rows) & (col < cols)
    return np.stack([row[inside], col[inside]], axis=1)


def spread_along(positions: NDArray[np.int64], n: int, rng: Generator) -> NDArray[np.int64]:
    """Draw n positions, one from each of n equal stretches of a curve; repeats if too few.

    Args:
        positions: in the order of the curve (L, 2), L at least 1.
        n: number of positions.
        rng: random generator.
    """
    places = np.floor((np.arange(n) + rng.random(n)) * len(positions) / n).astype(np.int64)
    return np.asarray(positions[np.minimum(places, len(positions) - 1)])


def patches_around(
    image: NDArray[np.float32], positions: NDArray[np.int64], side: int
) -> NDArray[np.float32]:
    """Patches of an image around positions, mirrored at its borders.

    Args:
        image: (C, H, W).
        positions: row and column (n, 2).
        side: P.

    Returns:
        (n, C, P, P), the position at row and column P // 2.
    """
    before, after = side // 2, side - side // 2
    padded = np.pad(image, ((0, 0), (before, after), (before, after)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2))
    return np.ascontiguousarray(windows[:, positions[:, 0], positions[:, 1]].swapaxes(0, 1))


@dataclass(frozen=True, kw_only=True)
class PairSampler:
    """Draws pairs from scenes."""

    scenes: Sequence[Scene]
    weights: Sequence[float]
    """How often each scene is drawn, relative to the others."""
    pixel_bands: tuple[str, ...]
    patch_bands: tuple[str, ...]
    side: int
    """P, pixels."""
    window_days: int
    """Length of the time window."""
    min_observations: int
    """Usable dates in the window that a pixel needs."""
    groups: int
    """Groups in a batch; each group is of one scene, one area and one time window."""
    per_group: int
    """Pixels in a group."""
    area: int = 128
    """Largest side of the area read from a scene at once, in pixels; it bounds memory."""
    pixel_augmentation: PixelAugmentation
    patch_augmentation: PatchAugmentation
    single_dates: float = 0.6
    """Share of the patches that show one date; the others show the median of the clear ones."""

    def batch(self, seed: int, step: int) -> Pairs:
        """The batch of a step."""
        rng = np.random.default_rng([seed, step])
        weights = np.asarray(self.weights, dtype=np.float64)
        drawn = rng.choice(len(self.scenes), size=self.groups, p=weights / weights.sum())
        parts = [self._group(int(number), rng) for number in drawn]
        return Pairs(
            groups=tuple(part.groups[0] for part in parts),
            patches=torch.cat([part.patches for part in parts]),
            scenes=torch.cat([part.scenes for part in parts]),
            positions=torch.cat([part.positions for part in parts]),
            fields=torch.cat([part.fields for part in parts]),
        )

    def _group(self, number: int, rng: Generator) -> Pairs:
        full = self.scenes[number]
        corner = [int(rng.integers(max(1, side - self.area + 1))) for side in full.shape]
        rows, cols = (slice(c, c + self.area) for c in corner)
        scene = full.crop(rows, cols)
        bands = tuple(dict.fromkeys((*self.pixel_bands, *self.patch_bands)))
        values, valid, days = self._window(scene, bands, rng)
        position = self._positions(valid, rng)
        series, usable = _series(values, valid, position, _places(bands, self.pixel_bands))
        series, usable, days = augment_pixels(series, usable, days, self.pixel_augmentation, rng)
        imagery = values[:, _places(bands, self.patch_bands)]
        patches = self._patches(imagery, valid, position, rng)
        fields = np.full(len(position), -1)
        if scene.fields is not None:
            field = scene.fields[position[:, 0], position[:, 1]]
            fields = np.where(field >= 0, field + (number << 32), -1)
        return Pairs(
            groups=(_group_of(series, usable, days),),
            patches=torch.from_numpy(augment_patches(patches, self.patch_augmentation, rng)),
            scenes=torch.full((len(position),), number),
            positions=torch.from_numpy(position + np.array(corner)),
            fields=torch.from_numpy(fields),
        )

    def _window(
        self, scene: Scene, bands: tuple[str, ...], rng: Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32]]:
        """Values, valid and days of a time window in which most pixels have enough observations."""
        best: tuple[float, date, NDArray[np.float32], NDArray[np.bool_], list[date]] | None = None
        starts = window_starts(scene.dates, self.window_days)
        for _ in range(_ATTEMPTS):
            start = starts[int(rng.integers(len(starts)))]
            times = _inside(scene.dates, start, self.window_days)
            values, valid = scene.read(bands, times=times)
            enough = float((valid.sum(axis=0) >= self.min_observations).mean())
            if best is None or enough > best[0]:
                best = (enough, start, values, valid, [scene.dates[t] for t in times])
            if enough > 0.5:
                break
        if best is None or best[0] == 0.0:
            raise TrainingError(
                f"{scene.source}: no pixel has {self.min_observations} usable dates in a time "
                f"window of {self.window_days} days: give a stack with more clear dates, or a "
                "smaller --set min_observations"
            )
        _, start, values, valid, dates = best
        days = np.array([(d - start).days for d in dates], dtype=np.float32)
        return values, valid, days

    def _positions(self, valid: NDArray[np.bool_], rng: Generator) -> NDArray[np.int64]:
        curve = hilbert_curve(valid.shape[1], valid.shape[2])
        enough = valid.sum(axis=0) >= self.min_observations
        return spread_along(curve[enough[curve[:, 0], curve[:, 1]]], self.per_group, rng)

    def _patches(
        self,
        values: NDArray[np.float32],
        valid: NDArray[np.bool_],
        position: NDArray[np.int64],
        rng: Generator,
    ) -> NDArray[np.float32]:
        """Patches (n, C, P, P), each from the median image or from one clear date."""
        clear = valid.mean(axis=(1, 2))
        dates = np.flatnonzero(clear >= min(_CLEAR_SHARE, float(clear.max())))
        shuffled = rng.permutation(dates)
        median = _median(values[shuffled[:_MEDIAN_DATES]])
        alone = [values[t] for t in shuffled[:_SINGLE_IMAGES]]
        images = [median, *(np.where(np.isnan(image), median, image) for image in alone)]
        single = rng.random(len(position)) < self.single_dates
        which = np.where(single, rng.integers(1, len(images), len(position)), 0)
        out = np.empty((len(position), values.shape[1], self.side, self.side), dtype=np.float32)
        for i, image in enumerate(images):
            out[which == i] = patches_around(image, position[which == i], self.side)
        return out


def plain(sampler: PairSampler) -> PairSampler:
    """The same sampler without augmentation, on the median image: for measuring."""
    return replace(
        sampler,
        pixel_augmentation=NO_PIXEL_AUGMENTATION,
        patch_augmentation=NO_PATCH_AUGMENTATION,
        single_dates=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class SeriesViewSampler:
    """Draws two views of pixels that have no imagery."""

    sets: Sequence[PixelSet]
    """With the bands of the graph; validation places must have been taken out."""
    window_days: int
    groups: int
    per_group: int
    augmentation: PixelAugmentation

    def batch(self, seed: int, step: int) -> SeriesViews:
        """The batch of a step."""
        # The last number keeps these draws apart from those of the pairs.
        rng = np.random.default_rng([seed, step, 1])
        sizes = np.sqrt([len(s.values) for s in self.sets])
        drawn = rng.choice(len(self.sets), size=self.groups, p=sizes / sizes.sum())
        both = [self._views(self.sets[int(i)], rng) for i in drawn]
        return SeriesViews(first=tuple(a for a, _ in both), second=tuple(b for _, b in both))

    def _views(self, pixels: PixelSet, rng: Generator) -> tuple[SeriesGroup, SeriesGroup]:
        starts = window_starts(pixels.dates, self.window_days)
        start = starts[int(rng.integers(len(starts)))]
        times = _inside(pixels.dates, start, self.window_days)
        days = np.array([(pixels.dates[t] - start).days for t in times], dtype=np.float32)
        usable = pixels.valid[:, times].sum(axis=1) >= self.augmentation.least
        choices = np.flatnonzero(usable)
        if len(choices) == 0:
            choices = np.arange(len(pixels.values))
        chosen = rng.choice(choices, size=self.per_group, replace=len(choices) < self.per_group)
        values, valid = pixels.values[chosen][:, times], pixels.valid[chosen][:, times]
        first, second = (
            _group_of(*augment_pixels(values, valid, days, self.augmentation, rng))
            for _ in range(2)
        )
        return first, second


@dataclass(frozen=True, kw_only=True)
class ImageryViewSampler:
    """Draws two augmented views of patches that have no series, at two positions of each patch."""

    patches: PatchSet
    """The patches; must not include validation places."""
    side: int
    """Side of a view, at most that of the patches."""
    size: int
    """Patches in a batch (N)."""
    augmentation: PatchAugmentation

    def batch(self, seed: int, step: int) -> ImageryViews:
        """The batch of a step."""
        rng = np.random.default_rng([seed, step, 2])
        total = len(self.patches.values)
        chosen = rng.choice(total, size=self.size, replace=total < self.size)
        patches = self.patches.values[chosen].astype(np.float32) * np.float32(self.patches.scale)
        first, second = (
            augment_patches(self._cut(patches, rng), self.augmentation, rng) for _ in range(2)
        )
        return ImageryViews(first=torch.from_numpy(first), second=torch.from_numpy(second))

    def _cut(self, patches: NDArray[np.float32], rng: Generator) -> NDArray[np.float32]:
        corners = rng.integers(patches.shape[-1] - self.side + 1, size=(len(patches), 2))
        return np.stack(
            [
                patch[:, r : r + self.side, c : c + self.side]
                for patch, (r, c) in zip(patches, corners, strict=True)
            ]
        )


def window_starts(dates: Sequence[date], window_days: int) -> list[date]:
    """First days of the months from which a window is within the dates; at least one."""
    first, last = min(dates), max(dates)
    latest = last - timedelta(days=window_days - 31)
    month = first.replace(day=1)
    starts = [month]
    while (month := (month + timedelta(days=32)).replace(day=1)) <= latest:
        starts.append(month)
    return starts


def _inside(dates: Sequence[date], start: date, window_days: int) -> NDArray[np.int64]:
    return np.array([t for t, d in enumerate(dates) if 0 <= (d - start).days < window_days])


def _places(bands: tuple[str, ...], requested: tuple[str, ...]) -> list[int]:
    return [bands.index(b) for b in requested]


def _series(
    values: NDArray[np.float32],
    valid: NDArray[np.bool_],
    position: NDArray[np.int64],
    places: list[int],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    rows, cols = position.T
    series = values[:, places][:, :, rows, cols].transpose(2, 0, 1)
    return np.asarray(series), np.asarray(valid[:, rows, cols].T)


def _group_of(
    values: NDArray[np.float32], valid: NDArray[np.bool_], days: NDArray[np.float32]
) -> SeriesGroup:
    return SeriesGroup(
        values=torch.from_numpy(np.ascontiguousarray(values)),
        valid=torch.from_numpy(np.ascontiguousarray(valid)),
        days=torch.from_numpy(days),
    )


def _median(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Median over dates (C, H, W); a pixel without a clear date gets the band's median."""
    ordered = np.sort(values, axis=0)  # NaN last
    count = np.isfinite(values).sum(axis=0)
    middle = np.take_along_axis(ordered, np.maximum(count - 1, 0)[None] // 2, axis=0)[0]
    band = np.nanmedian(middle, axis=(1, 2), keepdims=True)
    return np.asarray(np.where(count > 0, middle, band), dtype=np.float32)
