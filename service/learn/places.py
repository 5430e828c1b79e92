"""Places and folds: labels that are left out together, so that neighbours never sit on both sides.

A place is one the caller names, or else a block of the raster, joined with every other block that
has a label close to one of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

FOLDS = 5
_BLOCKS = 10
"""Blocks along the longer side of the labels' extent."""
_NEAR = 10.0
"""Pixels within which labels are neighbours, if that leaves several places."""
_NEAREST = 1.5
"""Pixels within which they always are: those that touch."""
_LARGEST = 0.5
"""Share of the labels that one place may hold before neighbours must be closer than `_NEAR`."""


def spatial_places(
    xy: NDArray[np.float64], labels: NDArray[np.intp]
) -> tuple[NDArray[np.intp], float]:
    """Places of pixels by where they lie.

    Args:
        xy: column and row of each pixel (n, 2), in pixels.
        labels: the label of each pixel (n); pixels of one label are never split.

    Returns:
        The place of each pixel (n), counting from 0; and the pixels that lie between any two
        pixels of different places, at least.
    """
    low = xy.min(axis=0)
    side = max(float((xy.max(axis=0) - low).max()) / _BLOCKS, 1.0)
    cells = np.floor((xy - low) / side).astype(np.intp)
    blocks = cells[:, 0] * (_BLOCKS + 2) + cells[:, 1]
    tree = shapely.STRtree(shapely.points(xy))
    near = _NEAR
    while True:
        pairs = tree.query(tree.geometries, predicate="dwithin", distance=near)
        places = _joined([blocks, labels], pairs)
        if np.bincount(places).max() <= _LARGEST * len(xy) or near <= _NEAREST:
            return places, near
        near = max(near / 2, _NEAREST)


def named_places(names: Sequence[Hashable], labels: NDArray[np.intp]) -> NDArray[np.intp]:
    """Places of pixels by the names that the caller gives them."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return _joined([np.array([numbers[n] for n in names], np.intp), labels], None)


def _joined(groups: Sequence[NDArray[np.intp]], pairs: NDArray[np.intp] | None) -> NDArray[np.intp]:
    """Numbers of the connected parts of n nodes that share a group or are a pair."""
    count = len(groups[0])
    part = np.arange(count)
    while True:
        before = part.copy()
        for group in groups:
            _, which = np.unique(group, return_inverse=True)
            least = np.full(which.max() + 1, count, np.intp)
            np.minimum.at(least, which, part)
            part = least[which]
        if pairs is not None:
            low = np.minimum(part[pairs[0]], part[pairs[1]])
            np.minimum.at(part, pairs[0], low)
            np.minimum.at(part, pairs[1], low)
        if (part == before).all():
            return np.asarray(np.unique(part, return_inverse=True)[1], np.intp)


def folds_of(places: NDArray[np.intp], classes: NDArray[np.intp]) -> NDArray[np.intp]:
    """Folds of labels: whole places, with the classes spread over them as evenly as they let.

    Args:
        places: of each label (n), counting from 0.
        classes: of each label (n), counting from 0.

    Returns:
        Numbers from 0 (n); as many as there are places, at most `FOLDS`.
    """
    counts = np.zeros((places.max() + 1, classes.max() + 1))
    np.add.at(counts, (places, classes), 1)
    # A label of a rare class weighs more, so that rare classes are spread first.
    counts /= counts.sum(axis=0)
    folds = min(FOLDS, len(counts))
    filled = np.zeros((folds, counts.shape[1]))
    of_place = np.empty(len(counts), np.intp)
    for place in np.argsort(-counts.sum(axis=1), kind="stable"):
        crowded = ((filled + counts[place]) ** 2 - filled**2).sum(axis=1)
        of_place[place] = int(np.lexsort((filled.sum(axis=1), crowded))[0])
        filled[of_place[place]] += counts[place]
    return np.asarray(np.unique(of_place[places], return_inverse=True)[1], np.intp)
