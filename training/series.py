"""Pixel series of several sources in one table, and their augmentation.

Sources differ in their dates, so in a table each pixel has its own dates: series are padded to one
length T, and `days` is (N, T).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from models.card import TimeWindow
from models.formulas import YEAR
from models.indices import SpectralIndices
from training.augment import disturb, drop_dates, jitter_dates
from training.config import BANDS, INDICES
from training.datasets import PixelSet
from training.task import Inputs

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
# Number of pixels that calibrate an int8 variant: in total, and at most with the same dates.
_TYPICAL = 4096
_TYPICAL_ALIKE = 1024
# Series that a graph processes at once.
_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class SeriesTable:
    """Pixel series, each with its own dates."""

    values: Floats
    """Reflectance of the model's bands (N, T, C), unitless; 0 where not valid."""
    indices: Floats
    """The model's spectral indices (N, T, S); 0 where not valid."""
    valid: Bools
    """True where all indices can be computed (N, T)."""
    days: Floats
    """Days from `first_day` to each date (N, T); 0 where padded."""
    present: Bools
    """True for a date that the series has, clear or not; False for padding (N, T)."""
    first_day: Ints
    """Proleptic ordinal of the first day of each pixel's window (N), by the card's rule."""
    labels: Ints
    """Class (N), -1 where unknown."""
    places: Ints
    """Place (N), distinct between sources."""
    validation: Bools
    """True for the pixels of the validation places (N)."""
    source: Ints
    """Position of each pixel's source in `sources` (N)."""
    sources: tuple[str, ...]
    region: Ints
    """Position of each pixel's region in `regions` (N)."""
    regions: tuple[str, ...]
    """Names of regions; a source without one is its own."""

    def __len__(self) -> int:
        return len(self.places)

    def in_regions(self, names: Sequence[str]) -> Bools:
        """True for the pixels of the regions named (N)."""
        return np.isin(self.region, [self.regions.index(n) for n in names if n in self.regions])

    def take(self, chosen: Bools | Ints) -> SeriesTable:
        """The pixels chosen by a mask or by positions."""
        fields = {
            name: getattr(self, name)[chosen]
            for name in self.__dataclass_fields__
            if name not in {"sources", "regions"}
        }
        return replace(self, **fields)


def tabulate(
    sets: Sequence[PixelSet],
    window: TimeWindow,
    *,
    least: int,
    spectral: SpectralIndices | None = None,
) -> SeriesTable:
    """Put sets into one table, leaving out pixels with fewer than `least` usable dates.

    Args:
        sets: sets that hold the bands of `spectral`.
        window: the model's time window.
        least: usable dates that a pixel needs.
        spectral: the indices to compute, and the bands to keep; None uses the default ones.
    """
    spectral = spectral or SpectralIndices(INDICES, BANDS)
    names = sorted({s.source.partition("/")[0] for s in sets})
    regions = sorted({_region(s) for s in sets})
    longest = max(len(s.dates) for s in sets)
    parts = [_tabulate(s, window, longest, names, regions, spectral) for s in sets]
    fields = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    _, fields["places"] = np.unique(
        np.column_stack([fields["source"], fields["places"]]), axis=0, return_inverse=True
    )
    table = SeriesTable(sources=tuple(names), regions=tuple(regions), **fields)
    return table.take(table.valid.sum(axis=1) >= least)


def _tabulate(
    pixels: PixelSet,
    window: TimeWindow,
    longest: int,
    names: Sequence[str],
    regions: Sequence[str],
    spectral: SpectralIndices,
) -> dict[str, NDArray[np.generic]]:
    n, dates = len(pixels.places), len(pixels.dates)
    values = np.asarray(pixels.select(spectral.bands).values, dtype=np.float32)
    indices = spectral(torch.from_numpy(values)).numpy()
    valid = pixels.valid & np.isfinite(indices).all(axis=-1)
    first_day = window.resolve(pixels.dates).first_day
    days = np.array([(day - first_day).days for day in pixels.dates], dtype=np.float32)

    def padded(array: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.pad(array, [(0, 0), (0, longest - dates), *[(0, 0)] * (array.ndim - 2)])

    return {
        "values": padded(np.where(valid[..., None], values, np.float32(0))),
        "indices": padded(np.where(valid[..., None], indices, np.float32(0))),
        "valid": padded(valid),
        "days": padded(np.broadcast_to(days, (n, dates))),
        "present": padded(np.ones((n, dates), dtype=bool)),
        "first_day": np.full(n, first_day.toordinal()),
        "labels": np.full(n, -1) if pixels.labels is None else pixels.labels,
        "places": pixels.places,
        "validation": pixels.validation,
        "source": np.full(n, names.index(pixels.source.partition("/")[0])),
        "region": np.full(n, regions.index(_region(pixels))),
    }


def _region(pixels: PixelSet) -> str:
    return pixels.region or pixels.source.partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class SeriesAugmentation:
    """Augmentation of series in training; 0 switches each part off."""

    drop: float = 0.4
    """Largest share of a pixel's dates dropped."""
    gap: float = 0.0
    """Share of the pixels that lose all dates of one part of the year."""
    least: int = 4
    """Usable dates that always remain."""
    jitter: float = 2.0
    """Standard deviation of each date's shift, in days."""
    season: float = 6.0
    """Standard deviation of the shift of a pixel's whole season, in days."""
    noise: float = 0.005
    """Standard deviation of the noise of each value, reflectance."""
    gain: float = 0.05
    """Standard deviation of a pixel's gain."""
    haze: float = 0.0
    """Share of the dates that are brightened, as by thin cloud that no mask finds."""


def augment_series(
    values: Floats, valid: Bools, days: Floats, how: SeriesAugmentation, rng: Generator
) -> tuple[Floats, Bools, Floats]:
    """Augment series with dates of their own.

    Args:
        values: reflectance (N, T, C).
        valid: True where usable (N, T).
        days: (N, T).
        how: strength of each part.
        rng: random generator.

    Returns:
        values, valid and days, augmented; all new arrays.
    """
    n = len(values)
    values = disturb(values, rng, noise=how.noise, gain=how.gain)
    if how.haze:
        hazy = rng.random(valid.shape) < how.haze
        values = values + (hazy * rng.exponential(0.06, valid.shape))[..., None].astype(np.float32)
    valid = drop_dates(valid, rng, most=how.drop, least=how.least)
    if how.gap:
        start, length = rng.uniform(0, YEAR, (n, 1)), rng.uniform(30, 150, (n, 1))
        outside = valid & ~((days >= start) & (days < start + length))
        gapped = (rng.random(n) < how.gap) & (outside.sum(axis=1) >= how.least)
        valid = np.where(gapped[:, None], outside, valid)
    shift = rng.normal(0.0, how.season, (n, 1)).astype(np.float32)
    return values, valid, jitter_dates(days, rng, deviation=how.jitter) + shift


def computable(values: Floats, valid: Bools, spectral: SpectralIndices) -> Bools:
    """True for series with a usable date on which all indices can be computed (N).

    Augmentation may leave a series without such a date. Its indices would be NaN, which would
    spread to the whole batch.
    """
    indices = spectral(torch.from_numpy(values)).numpy()
    return np.asarray((valid & np.isfinite(indices).all(axis=-1)).any(axis=1))


def usable_first(values: Floats, valid: Bools, days: Floats) -> tuple[Floats, Bools, Floats]:
    """Series with their usable dates first, cut to the largest number of usable dates.

    A graph accepts dates in any order. Most dates of a stack of many years are outside the time
    window, and a batch would spend most of its time on them.

    Args:
        values: (N, T, C).
        valid: True where usable (N, T).
        days: (N, T).
    """
    length = max(int(valid.sum(axis=1).max(initial=0)), 1)
    order = np.argsort(~valid, axis=1, kind="stable")[:, :length]
    return (
        np.take_along_axis(values, order[..., None], axis=1),
        np.take_along_axis(valid, order, axis=1),
        np.take_along_axis(days, order, axis=1),
    )


def any_year(valid: Bools, days: Floats, rng: Generator, *, least: int) -> tuple[Bools, Floats]:
    """One year of each series, starting on a random day, so that a network learns no calendar.

    If a series is longer than a year, a random year of it is chosen. Its days are then rotated by a
    random number of days: dates beyond the end of the year are moved to its start.

    Args:
        valid: True where usable (N, T).
        days: days since the window's first day (N, T).
        rng: random generator.
        least: if the chosen year has fewer usable dates, the first year of the series is used.

    Returns:
        valid within the year, and days from its new start, 0 to a year.
    """
    n = len(valid)
    first = np.where(valid, days, np.inf).min(axis=1, initial=np.inf, keepdims=True)
    last = np.where(valid, days, -np.inf).max(axis=1, initial=-np.inf, keepdims=True)
    start = first + rng.random((n, 1)) * np.maximum(last - first - YEAR + 20, 0)
    inside = valid & (days >= start) & (days < start + YEAR)
    few = inside.sum(axis=1, keepdims=True) < least
    start = np.where(few, first, start)
    inside = np.where(few, valid & (days < first + YEAR), inside)
    turn = rng.random((n, 1)) * YEAR
    return inside, ((days - start + turn) % YEAR).astype(np.float32)


def other_hemisphere(days: Floats, share: float, rng: Generator) -> Floats:
    """Shift a share of the pixels by half a year: the seasons of the other hemisphere.

    For graphs that place the dates of all years on one, which begins on 1 January in both
    hemispheres.

    Args:
        days: days since the window's first day (N, T).
        share: share of the pixels that are shifted, 0 to 1.
        rng: random generator.

    Returns:
        Days (N, T), a new array.
    """
    chosen = rng.random((len(days), 1)) < share
    return (days + chosen * (YEAR / 2)).astype(np.float32)


def ordinal_day_of_year(ordinals: Ints) -> Floats:
    """Day of the year, 1 to 366, of proleptic ordinals (N)."""
    unique, where = np.unique(ordinals, return_inverse=True)
    days = [date.fromordinal(o).timetuple().tm_yday for o in unique.tolist()]
    return np.array(days, dtype=np.float32)[where]


def shared_dates(table: SeriesTable) -> Inputs:
    """Up to 256 pixels with the dates of the first pixel, in the form that the service sends."""
    rows = np.flatnonzero((table.days == table.days[0]).all(axis=1))[:256]
    part = table.take(rows)
    return {
        "values": np.where(part.valid[..., None], part.values, np.float32(np.nan)),
        "valid": part.valid,
        "days": part.days[0],
        "day_of_year": np.ones(len(part), dtype=np.float32),
        "elsewhere": np.zeros(len(part), dtype=np.float32),
    }


def typical_dates(table: SeriesTable) -> list[Inputs]:
    """Some thousand pixels in sets that share their dates, the largest sets first."""
    rng = np.random.default_rng(0)
    kind = np.unique(table.days, axis=0, return_inverse=True)[1].ravel()
    found: list[Inputs] = []
    taken = 0
    # The largest sets first, because they are typical of most input.
    for k in np.argsort(-np.bincount(kind), kind="stable"):
        rows = rng.permutation(np.flatnonzero(kind == k))[:_TYPICAL_ALIKE]
        part = table.take(rows)
        seen = part.present.any(axis=0)
        found.append(
            {
                "values": np.where(part.valid[..., None], part.values, np.float32(np.nan))[:, seen],
                "valid": part.valid[:, seen],
                "days": part.days[0, seen],
                "day_of_year": rng.integers(1, 367, len(part)).astype(np.float32),
                "elsewhere": np.zeros(len(part), dtype=np.float32),
            }
        )
        taken += len(part)
        if taken >= _TYPICAL:
            break
    return found


def series_outputs(
    graph: Any,  # noqa: ANN401  # a graph, or its file in its place
    values: Floats,
    valid: Bools,
    days: Floats,
    *others: Floats,
) -> Floats:
    """Outputs of a graph for series, in evaluation mode, batch by batch.

    Args:
        graph: the trained graph, or its ONNX file.
        values: reflectance (N, T, C); N at least 1.
        valid: True where usable (N, T).
        days: days since the window's first day (N, T).
        others: further inputs (N), such as the day of the year.

    Returns:
        The graph's raw outputs (N, …).
    """
    graph.eval()
    parts = []
    with torch.inference_mode():
        for i in range(0, len(valid), _BATCH):
            rows = slice(i, i + _BATCH)
            arrays = usable_first(values[rows], valid[rows], days[rows])
            inputs = (*arrays, *(other[rows] for other in others))
            parts.append(graph.raw(*(torch.from_numpy(a) for a in inputs)).numpy())
    return np.concatenate(parts)


def samples_by_source(tables: Mapping[str, SeriesTable]) -> list[dict[str, Any]]:
    """Name, use and number of samples of each source, for a card.

    Args:
        tables: tables by their use, such as `labels` and `validation`.
    """
    return [
        {"name": source, "use": use, "n": n}
        for use, table in tables.items()
        for i, source in enumerate(table.sources)
        if (n := int((table.source == i).sum()))
    ]
