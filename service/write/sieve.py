"""Connected areas of a class map: their labels, and the removal of small ones.

    class map → runs of rows → 4-connected areas → areas below a size join a neighbour

Both work on the whole map at once, because an area may extend over several windows; `sieve_bytes`
returns the memory that this takes.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest
from service.write.predictions import NO_CLASS

MAX_AREAS = 1_000_000
"""Largest number of areas of a map that is sieved: noise with that many takes about 90 s."""
_PIXEL_BYTES = 26
_AREA_BYTES = 650
_JOINS_PER_CHECK = 4096
"""Number of joins after which the caller's `check` is called again."""
_CM2_PER_HECTARE = 1e8
"""Areas are summed in square centimetres."""
_ROWS = 256
"""Number of rows whose edges are counted at once."""


def areas_of(classes: NDArray[np.uint8]) -> tuple[NDArray[np.int32], int]:
    """4-connected areas of equal class.

    Args:
        classes: the map (H, W) uint8; pixels of 255 (no class) also form areas.

    Returns:
        The number of each pixel's area (H, W) int32, from 0 in the order of the areas' first pixels
        by rows; and the number of areas.
    """
    height, width = classes.shape
    begins = np.ones(classes.shape, np.bool_)
    np.not_equal(classes[:, 1:], classes[:, :-1], out=begins[:, 1:])
    runs = (np.cumsum(begins.ravel(), dtype=np.int32) - 1).reshape(height, width)
    count = int(runs[-1, -1]) + 1
    upper, lower = [], []
    for top in range(0, height - 1, _ROWS):
        end = min(top + _ROWS, height - 1)
        one, other = classes[top:end], classes[top + 1 : end + 1]
        same = one == other
        # Two runs that touch along several pixels need one edge, at the first of these pixels.
        same[:, 1:] &= begins[top:end, 1:] | begins[top + 1 : end + 1, 1:] | ~same[:, :-1]
        upper.append(runs[top:end][same])
        lower.append(runs[top + 1 : end + 1][same])
    root = _joined(count, np.concatenate([*upper, []]).astype(np.int32),
                   np.concatenate([*lower, []]).astype(np.int32))  # fmt: skip
    first = np.flatnonzero(root == np.arange(count, dtype=np.int32))
    number = np.empty(count, np.int32)
    number[first] = np.arange(len(first), dtype=np.int32)
    return number[root][runs], len(first)


def _joined(count: int, one: NDArray[np.int32], other: NDArray[np.int32]) -> NDArray[np.int32]:
    """The smallest node of each node's component (count), by the edges between nodes (E)."""
    root = np.arange(count, dtype=np.int32)
    while len(one):
        a, b = root[one], root[other]
        apart = a != b
        if not apart.any():
            break
        one, other, a, b = one[apart], other[apart], a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while True:
            grandparent = root[root]
            if np.array_equal(grandparent, root):
                break
            root = grandparent
    return root


def labelling_bytes(pixels: int) -> int:
    """Upper limit of the memory of `areas_of` for a map of `pixels` pixels, bytes.

    Measured on noise of five classes: 25.2 bytes per pixel.
    """
    return _PIXEL_BYTES * pixels


def sieve_bytes(pixels: int) -> int:
    """Upper limit of the memory of `sieved` for a map of `pixels` pixels, bytes.

    Measured on noise of five classes: 392 bytes per pixel.
    """
    return labelling_bytes(pixels) + _AREA_BYTES * min(pixels, MAX_AREAS)


def sieved(
    classes: NDArray[np.uint8],
    hectares: NDArray[np.float64],
    least: float,
    *,
    check: Callable[[], None] = lambda: None,
) -> NDArray[np.uint8]:
    """A class map whose small areas have joined a neighbouring area.

    Areas are processed in ascending order of size; of two equal areas, the one whose first pixel by
    rows comes first is processed first. Each area takes the class of the neighbour with which it
    shares the longest edge (of equal edges: the larger neighbour, then the one whose first pixel
    comes first) and joins all areas of that class that it touches. Pixels without a class join no
    area, and no area joins them.

    Args:
        classes: the map (H, W) uint8, 255 for no class.
        hectares: area of each pixel (H, W) float64, hectares.
        least: smallest area that is not joined to another, hectares.
        check: called regularly; an exception that it raises ends the work.

    Returns:
        The map (H, W) uint8.

    Raises:
        InvalidRequest: the map has more than `MAX_AREAS` areas.
    """
    labels, count = areas_of(classes)
    if count > MAX_AREAS:
        raise InvalidRequest.of(
            "min_area",
            f"the map has {count} connected areas, and `min_area` processes at most {MAX_AREAS}: "
            "set `smooth` as well, or request a part of the raster (`bbox`)",
        )
    # Integers have exact sums, so that areas of equal size compare as equal in any order of sums.
    size, value = np.zeros(count), np.empty(count, np.uint8)
    for top in range(0, len(classes), _ROWS):
        rows = slice(top, top + _ROWS)
        own = np.rint(hectares[rows] * _CM2_PER_HECTARE)
        size += np.bincount(labels[rows].ravel(), own.ravel(), minlength=count)
        value[labels[rows].ravel()] = classes[rows].ravel()
    least *= _CM2_PER_HECTARE
    small = (size < least) & (value != NO_CLASS)
    if not small.any():
        return classes.copy()
    graph = _Areas(size, value, _edges(labels, small, value))
    graph.join_below(least, np.flatnonzero(small), check)
    return graph.classes()[labels]


def _edges(
    labels: NDArray[np.int32], small: NDArray[np.bool_], value: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of areas that share an edge, the smaller number first, and its length in pixel sides.

    Only pairs in which both areas have a class and at least one is small: no other edge decides
    which areas are joined.
    """
    height = len(labels)
    count = len(value)
    keys, lengths = [], []
    for top in range(0, height, _ROWS):
        block = labels[top : top + _ROWS + 1]
        rows = min(_ROWS, height - top)
        across = (block[:rows, :-1].ravel(), block[:rows, 1:].ravel())
        down = (block[:-1][:rows].ravel(), block[1:][:rows].ravel())
        for a, b in (across, down):
            apart = a != b
            low, high = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
            some = (value[low] != NO_CLASS) & (value[high] != NO_CLASS)
            some &= small[low] | small[high]
            key, length = np.unique(
                low[some].astype(np.int64) * count + high[some], return_counts=True
            )
            keys.append(key)
            lengths.append(length)
    key, which = np.unique(np.concatenate(keys), return_inverse=True)
    total = np.bincount(which, np.concatenate(lengths), minlength=len(key)).astype(np.int64)
    return key // count, key % count, total


class _Areas:
    """Areas of a map as a graph, in which small areas are joined to neighbours."""

    def __init__(
        self,
        size: NDArray[np.float64],
        value: NDArray[np.uint8],
        edges: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    ) -> None:
        self._size = size.tolist()
        self._value = value.tolist()
        self._root = list(range(len(size)))
        self._near: dict[int, dict[int, int]] = defaultdict(dict)
        for a, b, length in zip(*(part.tolist() for part in edges), strict=True):
            self._near[a][b] = self._near[b][a] = length

    def join_below(self, least: float, small: NDArray[np.intp], check: Callable[[], None]) -> None:
        """Join each area below a size to a neighbour, the smallest first; see `sieved`."""
        waiting = [(self._size[area], area) for area in small.tolist()]
        heapq.heapify(waiting)
        for step in itertools.count():
            if not waiting:
                return
            if step % _JOINS_PER_CHECK == 0:
                check()
            size, area = heapq.heappop(waiting)
            if self._root[area] != area or self._size[area] != size:
                continue  # it has joined another area, or has grown and is in the heap again
            near = self._near[area]
            if not near:
                continue
            to = max(near, key=lambda other: (near[other], self._size[other], -other))
            value = self._value[to]
            joined = [area, *(other for other in near if self._value[other] == value)]
            into = min(joined)  # areas are numbered in the order of their first pixels
            for other in joined:
                if other != into:
                    self._merge(other, into)
            self._value[into] = value
            if self._size[into] < least:
                heapq.heappush(waiting, (self._size[into], into))

    def _merge(self, area: int, into: int) -> None:
        self._root[area] = into
        self._size[into] += self._size[area]
        mine = self._near.pop(area)
        theirs = self._near[into]
        for other, length in mine.items():
            del self._near[other][area]
            if other != into:
                theirs[other] = self._near[other][into] = theirs.get(other, 0) + length

    def classes(self) -> NDArray[np.uint8]:
        """The class of each area."""
        for area in range(len(self._root)):
            root = area
            while self._root[root] != root:
                root = self._root[root]
            at = area
            while self._root[at] != root:  # path compression: no chain is followed twice
                self._root[at], at = root, self._root[at]
        return np.array([self._value[root] for root in self._root], np.uint8)
