"""Labelled patches of level 2A imagery in all seasons, in the classes of EuroSAT.

EuroSAT is level 1C. The areas here are few and small, and were labelled by parcels, by a raster of
tree cover, or by eye. Patches of an area overlap and its dates are alike, so an area is worth as
much as a few independent patches: it is trained on or left out as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from training.datasets import Scene
from training.datasets.eurosat import CLASSES, RGB
from training.datasets.stacks import read_romania, read_safe_folders, read_stack

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Window = tuple[int, int]
"""Row and column of a patch's north-west corner, pixels."""
SIDE = 64
"""Side of a patch, pixels."""
TREE_COVER = "tree_cover_density_2018_romania.tif"
"""The raster of tree cover in the wheel nrt 0.2.1, beside the Romania cube."""
# Largest share of a patch that may be cloudy or missing; it is filled with the band's median.
_MOST_CLOUDY = 0.02
# Dates of a season that a median needs, and the share of the patch that each must show.
_FEWEST_DATES = 3
_LEAST_CLEAR = 0.3
# Share of a patch with a tree cover of 50 % and more from which it is a forest.
_FOREST = 0.75
# Reflectance in B02 of the darkest pixels of a patch that is all cloud or snow, unnoticed by masks.
_WHITE = 0.1
SEASONS = ("winter", "spring", "summer", "autumn")


@dataclass(frozen=True, kw_only=True)
class LabelledArea:
    """Patches of one area."""

    name: str
    sources: Mapping[str, int]
    """Number of patches of each data set."""
    values: Floats
    """Reflectance (N, 3, P, P) of B04, B03, B02."""
    labels: Ints
    """Positions in `CLASSES` (N)."""
    places: Ints
    """Number of each patch's window within the area (N)."""
    seasons: Ints
    """Positions in `SEASONS` (N); the year has twelve months, and winter begins with December."""
    dates: Ints
    """Number of dates in each patch (N): 1, or more for a season's median."""


# Patches of `south_tyrol_2022` (row and column of 64 x 64 pixels, from the north-west) that one
# class fills or characterises. Labelled by eye, before a model was run on them, with what is known
# of the area: Bolzano, its industrial zone, the rivers, the wooded slopes, and the orchards and
# vineyards of the Adige valley.
SOUTH_TYROL: Mapping[str, tuple[tuple[int, int], ...]] = {
    "Forest": (
        *((1, 4), (1, 5), (1, 10), (2, 1), (6, 10), (6, 11), (7, 9)),
        *((7, 11), (8, 8), (8, 9), (9, 9), (9, 11), (10, 11)),
    ),
    "Residential": ((3, 7), (4, 7), (4, 8), (5, 6)),
    "Industrial": ((7, 6), (8, 5), (8, 6), (9, 5)),
    "PermanentCrop": ((4, 0), (4, 1), (4, 2), (5, 1), (5, 2), (6, 0), (7, 0), (9, 1)),
    "River": ((6, 1), (7, 3), (9, 3), (10, 3)),
}


# Windows of `herault_safe_2018`, on a grid of 24 pixels, at least half covered by parcels of one
# class: vineyards; wheat, other cereals and fallow land.
HERAULT: Mapping[str, tuple[Window, ...]] = {
    "PermanentCrop": (
        *((96, 96), (120, 72), (120, 96), (144, 24)),
        *((144, 48), (144, 72), (168, 24), (168, 48)),
    ),
    "AnnualCrop": ((192, 72), (192, 96), (216, 48), (216, 72), (216, 96)),
}


def labelled_areas(data: Path, romania: Path | None = None) -> list[LabelledArea]:
    """The areas whose imagery is there.

    Args:
        data: folder of the data sets.
        romania: the Romania cube of the wheel nrt 0.2.1, with its raster of tree cover beside it;
            None leaves it out.
    """
    found = [
        _area(name, folder, *read(data / folder))
        for name, (folder, read) in _AREAS.items()
        if (data / folder).is_dir()
    ]
    if romania is not None:
        windows = {"Forest": _forests(romania.parent / TREE_COVER)}
        found.append(_area("romania", "romania", read_romania(romania), windows))
    return found


def joined(areas: Sequence[LabelledArea]) -> LabelledArea:
    """Several areas as one; places are numbered on."""
    starts = np.cumsum([0, *(area.places.max() + 1 for area in areas)])
    sources: dict[str, int] = {}
    for area in areas:
        sources |= area.sources
    return LabelledArea(
        name=" and ".join(area.name for area in areas),
        sources=sources,
        values=np.concatenate([area.values for area in areas]),
        labels=np.concatenate([area.labels for area in areas]),
        places=np.concatenate([a.places + n for a, n in zip(areas, starts, strict=False)]),
        seasons=np.concatenate([area.seasons for area in areas]),
        dates=np.concatenate([area.dates for area in areas]),
    )


def draw_weights(areas: Sequence[LabelledArea]) -> NDArray[np.float64]:
    """Probability that each patch of the joined areas is drawn (N).

    The classes of the areas are drawn equally often, and the places within one.
    """
    weights = []
    for area in areas:
        places = np.bincount(area.places)[area.places]
        several = [len(np.unique(area.places[area.labels == label])) for label in area.labels]
        weights.append(1.0 / (places * np.array(several)))
    together = np.concatenate(weights)
    return np.asarray(together / together.sum())


def _area(
    name: str, source: str, scene: Scene, windows: Mapping[str, Sequence[Window]]
) -> LabelledArea:
    """Patches of the windows of a scene, by class."""
    patches: list[Floats] = []
    facts: list[tuple[int, int, int, int]] = []
    labelled = ((label, corner) for label, corners in windows.items() for corner in corners)
    for place, (label, corner) in enumerate(labelled):
        for season, several, patch in observed(scene, corner):
            patches.append(patch)
            facts.append((CLASSES.index(label), place, season, several))
    labels, numbers, seasons, dates = np.array(facts, dtype=np.int64).reshape(-1, 4).T
    return LabelledArea(
        name=name,
        sources={source: len(patches)},
        values=np.stack(patches),
        labels=labels,
        # A window without a clear date has no number.
        places=np.unique(numbers, return_inverse=True)[1],
        seasons=seasons,
        dates=dates,
    )


def observed(scene: Scene, corner: Window) -> Iterator[tuple[int, int, Floats]]:
    """The patches of a window: each clear date, and the median of each season with several.

    Yields:
        the season (position in `SEASONS`), the number of dates, and the patch (3, P, P).
    """
    row, col = corner
    values, valid = scene.read(RGB, slice(row, row + SIDE), slice(col, col + SIDE))
    several: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, day in enumerate(scene.dates):
        if (~valid[i]).mean() <= _MOST_CLOUDY and not _is_white(values[i]):
            yield season_of(day), 1, _filled(values[i])
        if valid[i].mean() >= _LEAST_CLEAR and not _is_white(values[i]):
            several[day.year + (day.month == 12), season_of(day)].append(i)
    for (_, season), dates in several.items():
        seen = valid[dates].any(axis=0)
        if len(dates) >= _FEWEST_DATES and (~seen).mean() <= _MOST_CLOUDY:
            shown = np.where(seen, values[dates], np.float32(0.0))
            median = np.where(seen, np.nanmedian(shown, axis=0), np.float32(np.nan))
            yield season, len(dates), _filled(median)


def _is_white(patch: Floats) -> bool:
    """Whether a patch (C, P, P) is cloud or snow throughout."""
    return bool(np.nanquantile(patch[RGB.index("B02")], 0.05) > _WHITE)


def season_of(day: date) -> int:
    """Position of a date's season in `SEASONS`."""
    return day.month % 12 // 3


def _filled(patch: Floats) -> Floats:
    """The patch (C, P, P) with its single missing pixels as their band's median."""
    medians = np.nanmedian(patch, axis=(1, 2), keepdims=True)
    return np.where(np.isnan(patch), medians, patch).astype(np.float32)


def _grid(shape: tuple[int, int], across: int) -> tuple[Window, ...]:
    """Overlapping windows that reach from edge to edge, `across` on a side."""
    rows, cols = (np.linspace(0, length - SIDE, across).round().astype(int) for length in shape)
    return tuple((int(row), int(col)) for row in rows for col in cols)


def _forests(cover: Path) -> tuple[Window, ...]:
    """Windows of the Romania cube that trees cover by a clear majority."""
    with rasterio.open(cover) as file:
        # The cover has 20 m pixels, the cube 10 m ones; both start at the same corner.
        trees = np.kron(file.read(1) >= 50, np.ones((2, 2), dtype=bool))
    return _windows_of(trees, _FOREST, step=12)


def _south_tyrol(folder: Path) -> tuple[Scene, Mapping[str, Sequence[Window]]]:
    windows = {
        name: tuple((row * SIDE, col * SIDE) for row, col in places)
        for name, places in SOUTH_TYROL.items()
    }
    return read_stack(folder), windows


def _hesbaye(folder: Path) -> tuple[Scene, Mapping[str, Sequence[Window]]]:
    scene = read_stack(folder)
    return scene, {"AnnualCrop": _grid(scene.shape, 3)}


def _herault(folder: Path) -> tuple[Scene, Mapping[str, Sequence[Window]]]:
    return read_safe_folders(folder), HERAULT


def _windows_of(inside: NDArray[np.bool_], least: float, step: int) -> tuple[Window, ...]:
    """Windows of which at least a share is inside (H, W)."""
    rows, cols = (range(0, length - SIDE + 1, step) for length in inside.shape)
    return tuple(
        (row, col)
        for row in rows
        for col in cols
        if inside[row : row + SIDE, col : col + SIDE].mean() >= least
    )


# The folder of each area, and how it is read and its windows are labelled.
_AREAS: Mapping[str, tuple[str, Callable[[Path], tuple[Scene, Mapping[str, Sequence[Window]]]]]] = {
    "south_tyrol": ("south_tyrol_2022", _south_tyrol),
    "hesbaye": ("hesbaye_a_monthly", _hesbaye),
    "herault": ("herault_safe_2018", _herault),
}
