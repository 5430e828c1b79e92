"""Places and folds: groups of labels that are left out together, so that scores are by place.

Neighbouring labels are never in both training and scoring. A place is one that the caller names;
otherwise it is a block of the raster, joined with all blocks that have labels near its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

FOLDS = 5
_BLOCKS = 10
"""Number of blocks along the longer side of the labels' extent."""
_NEAR = 10.0
"""Distance in pixels within which labels are neighbours, if several places remain."""
_NEAREST = 1.5
"""Smallest value to which that distance is reduced: pixels that touch."""
_LARGEST = 0.5
"""Share of the labels that one place may have; if a place has more, the distance is halved."""


def spatial_places(
    xy: NDArray[np.float64], labels: NDArray[np.intp]
) -> tuple[NDArray[np.intp], float]:
    """Places of pixels by their positions.

    Args:
        xy: column and row of each pixel (n, 2).
        labels: the label of each pixel (n); pixels of one label are in one place.

    Returns:
        The place of each pixel (n), counting from 0; and the smallest distance in pixels between
        pixels of different places.
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
    """Places of pixels by the names in the request.

    Args:
        names: name of each pixel's place (n).
        labels: the label of each pixel (n); pixels of one label are in one place.

    Returns:
        The place of each pixel (n), counting from 0.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return _joined([np.array([numbers[n] for n in names], np.intp), labels], None)


def _joined(groups: Sequence[NDArray[np.intp]], pairs: NDArray[np.intp] | None) -> NDArray[np.intp]:
    """The component of each node (n): nodes that share a group or form a pair are connected.

    Args:
        groups: each the group of every node (n).
        pairs: two connected nodes per column (2, E); None for none.
    """
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
    """Folds of labels: groups of whole places, in which classes are spread as evenly as possible.

    Args:
        places: place of each label (n), counting from 0.
        classes: class of each label (n), counting from 0.

    Returns:
        Fold of each label (n), counting from 0; there are as many folds as places, at most `FOLDS`.
    """
    counts = np.zeros((places.max() + 1, classes.max() + 1))
    np.add.at(counts, (places, classes), 1)
    # Labels of rare classes have a larger weight, so that rare classes are spread first.
    counts /= counts.sum(axis=0)
    folds = min(FOLDS, len(counts))
    filled = np.zeros((folds, counts.shape[1]))
    of_place = np.empty(len(counts), np.intp)
    for place in np.argsort(-counts.sum(axis=1), kind="stable"):
        crowded = ((filled + counts[place]) ** 2 - filled**2).sum(axis=1)
        of_place[place] = int(np.lexsort((filled.sum(axis=1), crowded))[0])
        filled[of_place[place]] += counts[place]
    return np.asarray(np.unique(of_place[places], return_inverse=True)[1], np.intp)
