"""A stack's pixels, window by window: reflectance, and which of it is usable.

A `StackReader` decodes each block of each file once for a window of whole blocks, and keeps no
more in memory than the window asks for.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from types import TracebackType
from typing import Any, Self

import numpy as np
import rasterio
from numpy.typing import ArrayLike, NDArray
from rasterio.errors import RasterioError
from rasterio.windows import Window

from service.errors import CorruptRaster
from service.geotiff import SourceFile, for_each, gdal_options, open_geotiff
from service.grid import Grid
from service.layout import Layout, MaskRule
from service.radiometry import StackWarning

CLEAR_CLASSES = range(4, 8)
"""SCL classes that count as clear: 4 vegetation, 5 bare ground, 6 water, 7 unclassified."""

# Float rasters mark missing pixels by -3.4e38 and its like, with a nodata tag or without.
_NO_VALUE = 1e30
_MAX_OPEN = 256
# An open file keeps the block that it decoded last; together they may take this much memory.
_MAX_HELD_BYTES = 256 * 2**20
# Points are read in windows of about this many pixels a side,
_CELL = 256
# and of no more than these bytes, however large a block is.
_CELL_BYTES = 64 * 2**20
_CACHE_LINE = 64


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One band of one date: where it lies, and how its numbers become reflectance."""

    source: SourceFile
    number: int
    """Band number in the file, from 1."""
    scale: float
    offset: float
    nodata: int | float | None
    """In the file's own number type, None where no number of that type is meant."""
    integer: bool
    masked: bool
    """Whether the file's internal mask marks missing pixels."""
    block_bytes: int

    @property
    def may_be_beyond(self) -> bool:
        """Whether a number of it may be none, or become too large for reflectance."""
        # 64 bits hold less than 1e20. A scale or offset of NaN compares as false.
        return not (self.integer and abs(self.scale) * 1e20 + abs(self.offset) < _NO_VALUE / 2)


@dataclass(frozen=True, kw_only=True)
class Look:
    """One granule of one observation."""

    observation: int
    """Position of the observation on the stack's T axis."""
    planes: tuple[Plane, ...]
    """The needed bands (C)."""
    scl: Plane | None

    @property
    def zero_is_missing(self) -> bool:
        """Whether zeros in all bands mean no data, and no nodata tag says so already."""
        return all(plane.integer and plane.nodata != 0 for plane in self.planes)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Files understood as T observations of C bands on one grid; no pixel read yet."""

    grid: Grid
    layout: Layout
    dates: tuple[date, ...]
    """Acquisition dates (T), unique and ascending; empty for undated imagery."""
    bands: tuple[str, ...]
    """The needed bands (C), in the order asked for."""
    scale: float
    offset: float
    """reflectance = value x scale + offset; files may differ, this is the first one's."""
    offset_known: bool
    """Whether the caller or any file said an offset."""
    mask: MaskRule
    block: tuple[int, int]
    """Rows and columns of the largest block on disk: windows of whole blocks decode none twice."""
    looks: tuple[Look, ...]
    """By observation; those of one observation in the order given, the first clear value wins."""
    files: tuple[str, ...]
    """Names of the files that hold a needed band; the others are left out."""
    warnings: tuple[StackWarning, ...]

    @property
    def observations(self) -> int:
        """T: the dates, or for undated imagery the images."""
        return self.looks[-1].observation + 1


@dataclass(frozen=True, kw_only=True)
class Sits:
    """A part of a time series in memory. The last axes are (h, w) of a window or (N) of points."""

    values: NDArray[np.float32]
    """(T, C, h, w) or (T, C, N) float32 reflectance, each band of a date in one block of memory;
    NaN in all bands of a date where one of them is missing. Clouds keep their values."""
    valid: NDArray[np.bool_]
    """(T, h, w) or (T, N): True where the observation is there and clear."""


@dataclass(frozen=True, kw_only=True)
class _FileRead:
    """All that one layer needs of one file, for a single call."""

    source: SourceFile
    planes: list[Plane]
    targets: list[tuple[int, int]]
    """For each plane its position on the T axis, and on the C axis; C stands for the SCL."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """At most one look of each observation."""

    positions: list[int]
    """Where on the reader's T axis the layer's looks belong."""
    looks: list[Look]
    reads: list[_FileRead]

    @property
    def apart(self) -> bool:
        """Whether no two files hold the same look, so that two threads touch no array at once."""
        return sum(len({t for t, _ in read.targets}) for read in self.reads) == len(self.looks)


class StackReader:
    """Reads windows of a stack. For one thread at a time; close it, or use it in `with`.

    Files stay open from window to window, up to a limit.
    """

    def __init__(self, stack: Stack, used: Sequence[int] | None = None) -> None:
        """Plan the reads.

        Args:
            stack: what to read.
            used: positions on the stack's T axis to read, which become T in this order;
                None reads all.
        """
        self._stack = stack
        self._used = tuple(range(stack.observations) if used is None else used)
        self._layers = _layers(stack, self._used)
        planes = [p for layer in self._layers for read in layer.reads for p in read.planes]
        self._block_bytes = max((plane.block_bytes for plane in planes), default=0)
        self._open: dict[SourceFile, rasterio.DatasetReader] = {}
        self._held_bytes = 0
        self._spare: dict[type[np.generic], list[NDArray[Any]]] = defaultdict(list)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._open:
            _, dataset = self._open.popitem()
            dataset.close()
        self._held_bytes = 0
        self._spare.clear()

    def read(self, window: Window) -> Sits:
        """Decode a window.

        Args:
            window: whole pixels inside the grid.

        Returns:
            values (T, C, h, w) and valid (T, h, w).

        Raises:
            CorruptRaster: a file does not decode.
        """
        grid = self._stack.grid
        (top, bottom), (left, right) = window.toranges()
        if not (0 <= top < bottom <= grid.height and 0 <= left < right <= grid.width):
            raise ValueError(f"{window} is not inside {grid.height} rows x {grid.width} columns")
        merged = self._read_layer(self._layers[0], window)
        for layer in self._layers[1:]:
            more = self._read_layer(layer, window)
            for t, values, valid in zip(layer.positions, more.values, more.valid, strict=True):
                better = valid & ~merged.valid[t]
                np.copyto(merged.values[t], values, where=better)
                merged.valid[t] |= better
            self.recycle(more)
        return merged

    def recycle(self, sits: Sits) -> None:
        """Give back the memory of a window that was read, from any thread; a later one takes it.

        New memory comes as pages of zeros, which cost as much as scaling the pixels does.

        Args:
            sits: from `read`; nobody looks at it, or at a part of it, any more.
        """
        self._put_back(sits.values)
        self._put_back(sits.valid)

    def _put_back(self, array: NDArray[Any]) -> None:
        with self._lock:
            # What it is a part of: an edge window leaves its memory as large as it took it.
            self._spare[array.dtype.type].append(array if array.base is None else array.base)

    def _array(
        self, planes: tuple[int, ...], plane: tuple[int, ...], kind: type[np.generic]
    ) -> NDArray[Any]:
        """As `spaced` makes it; in memory put back before, where that is large enough."""
        with self._lock:
            spare = self._spare[kind].pop() if self._spare[kind] else None
        return spaced(planes, plane, kind, spare)

    def read_pixels(self, rows: ArrayLike, columns: ArrayLike) -> Sits:
        """Decode single pixels, in small windows where they stand together.

        Args:
            rows: row of each pixel (N), inside the grid.
            columns: column of each pixel (N), inside the grid.

        Returns:
            values (T, C, N) and valid (T, N), in the order given.

        Raises:
            CorruptRaster: a file does not decode.
        """
        row, column = np.asarray(rows, dtype=np.intp), np.asarray(columns, dtype=np.intp)
        shape = (len(self._used), len(self._stack.bands), row.size)
        values = np.empty(shape, dtype=np.float32)
        valid = np.empty((shape[0], shape[2]), dtype=np.bool_)
        height, width = (max(1, _CELL // side) * side for side in self._stack.block)
        most = max(1, _CELL_BYTES // (4 * shape[0] * shape[1]))
        width = min(width, most)
        height = min(height, max(1, most // width))
        cells = defaultdict(list)
        for n, cell in enumerate(zip(row // height, column // width, strict=True)):
            cells[cell].append(n)
        for _, points in sorted(cells.items()):
            r, c = row[points], column[points]
            top, left = int(r.min()), int(c.min())
            window = Window(left, top, int(c.max()) - left + 1, int(r.max()) - top + 1)
            part = self.read(window)
            values[:, :, points] = part.values[:, :, r - top, c - left]
            valid[:, points] = part.valid[:, r - top, c - left]
            self.recycle(part)
        return Sits(values=values, valid=valid)

    def _read_layer(self, layer: _Layer, window: Window) -> Sits:
        T, C = len(layer.looks), len(self._stack.bands)
        h, w = int(window.height), int(window.width)
        values = self._array((T, C), (h, w), np.float32)
        present = self._array((T,), (h, w), np.bool_)
        clear = self._array((T,), (h, w), np.bool_)
        told = [not look.zero_is_missing for look in layer.looks]

        def fill(read: _FileRead) -> None:
            raw, mask = self._decode(read, window)
            # What float32 cannot hold becomes infinite.
            with np.errstate(over="ignore", invalid="ignore"):
                for data, plane, (t, c) in zip(raw, read.planes, read.targets, strict=True):
                    if c == C:
                        clear[t] &= (data >= CLEAR_CLASSES[0]) & (data <= CLEAR_CLASSES[-1])
                        continue
                    _reflectance(data, plane, values[t, c])
                    if plane.may_be_beyond:
                        present[t] &= np.abs(values[t, c]) < _NO_VALUE  # False for NaN, too
                    if plane.nodata is not None:
                        present[t] &= data != plane.nodata
                    if mask is not None:
                        present[t] &= mask != 0
                    if not told[t]:
                        something[t] |= data != 0

        present.fill(True)
        clear.fill(True)
        # Whether some band is not zero, where zeros in all of them are no values.
        something = {t: np.zeros((h, w), np.bool_) for t in range(T) if not told[t]}
        if layer.apart:
            for_each(layer.reads, fill, block_bytes=self._block_bytes)
        else:
            with gdal_options(block_bytes=self._block_bytes):
                for read in layer.reads:
                    fill(read)
        for t in range(T):
            if not told[t]:
                present[t] &= something[t]
            if not present[t].all():  # few dates lack anything
                np.copyto(values[t], np.float32(np.nan), where=~present[t])
        np.logical_and(present, clear, out=clear)
        self._put_back(present)
        return Sits(values=values, valid=clear)

    def _decode(
        self, read: _FileRead, window: Window
    ) -> tuple[NDArray[np.generic], NDArray[np.uint8] | None]:
        """Bands of one file (n, h, w) in its own number type, and its mask (h, w)."""
        numbers = [plane.number for plane in read.planes]
        try:
            with self._dataset(read) as dataset:
                raw = dataset.read(numbers, window=window)
                masked = read.planes[0].masked
                return raw, dataset.read_masks(numbers[0], window=window) if masked else None
        except RasterioError as error:
            (top, bottom), (left, right) = window.toranges()
            raise CorruptRaster(
                f"'{read.source.name}': the header opens, but rows {top} to {bottom - 1}, "
                f"columns {left} to {right - 1} do not decode"
            ) from error

    @contextmanager
    def _dataset(self, read: _FileRead) -> Iterator[rasterio.DatasetReader]:
        """The file, open. The first ones opened stay so, and the rest come and go.

        Windows visit the files in the same order each time, so closing the file used longest
        ago would always close the one needed next.
        """
        dataset = self._open.get(read.source)
        if dataset is not None:
            yield dataset
            return
        block_bytes = read.planes[0].block_bytes
        # Windows count in pixels; where they lie was settled by the headers.
        dataset = open_geotiff(read.source.path, block_bytes=block_bytes, georeferenced=False)
        if self._stays(read.source, dataset, block_bytes):
            yield dataset
            return
        with dataset:
            yield dataset

    def _stays(self, source: SourceFile, dataset: rasterio.DatasetReader, block_bytes: int) -> bool:
        """Keep a file open where there is room for it."""
        with self._lock:
            room = len(self._open) < _MAX_OPEN and self._held_bytes + block_bytes <= _MAX_HELD_BYTES
            if room:
                self._open[source] = dataset
                self._held_bytes += block_bytes
            return room


def _layers(stack: Stack, used: Sequence[int]) -> list[_Layer]:
    """The looks to read, so that a layer has one of each observation at most.

    One layer, unless files share a date. The first holds every observation used.
    """
    by_observation = defaultdict(list)
    for look in stack.looks:
        by_observation[look.observation].append(look)
    depth = max((len(by_observation[t]) for t in used), default=1)
    layers = []
    for level in range(depth):
        positions = [i for i, t in enumerate(used) if len(by_observation[t]) > level]
        looks = [by_observation[used[i]][level] for i in positions]
        layers.append(_Layer(positions=positions, looks=looks, reads=_reads(looks)))
    return layers


def _reads(looks: Sequence[Look]) -> list[_FileRead]:
    by_file: dict[SourceFile, _FileRead] = {}
    for t, look in enumerate(looks):
        planes = [*look.planes, look.scl] if look.scl else look.planes
        for c, plane in enumerate(planes):
            read = by_file.setdefault(
                plane.source, _FileRead(source=plane.source, planes=[], targets=[])
            )
            read.planes.append(plane)
            read.targets.append((t, c))
    return list(by_file.values())


def _reflectance(data: NDArray[np.generic], plane: Plane, out: NDArray[np.float32]) -> None:
    """`data` x scale + offset into `out`."""
    np.multiply(data, np.float32(plane.scale), out=out, dtype=np.float32, casting="same_kind")
    if plane.offset:
        out += np.float32(plane.offset)


def spaced(
    planes: tuple[int, ...],
    plane: tuple[int, ...],
    kind: type[np.generic],
    memory: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """An array, of anything, whose planes lie an odd number of cache lines apart.

    A pixel has a value in each plane. Where those lie a power of two bytes apart, as with windows
    of 256 x 256 pixels, a cache has the same few places for all of them, and turning planes into
    pixels' rows takes two to ten times as long.

    Args:
        planes: the first axes, as (T, C).
        plane: the others, as (h, w); each plane is one block of memory.
        kind: of the numbers.
        memory: flat, of that kind; used where it is large enough. Without, it is new.

    Returns:
        The array; `base` is its memory.
    """
    pixels, line = math.prod(plane), _CACHE_LINE // np.dtype(kind).itemsize
    pitch = line * (-(-pixels // line) | 1)
    size = math.prod(planes) * pitch
    flat = memory if memory is not None and memory.size >= size else np.empty(size, kind)
    return flat[:size].reshape(-1, pitch)[:, :pixels].reshape(*planes, *plane)


def median_composite(sits: Sits) -> NDArray[np.float32]:
    """The per-pixel median of the clear observations, NaN where there is none.

    Args:
        sits: values (T, C, h, w) and valid (T, h, w).

    Returns:
        (C, h, w) float32 reflectance.
    """
    # Sorted with the unclear ones last, the median is at a place known from the count alone;
    # numpy's nanmedian is an order of magnitude slower along a short axis.
    ordered = np.sort(np.where(sits.valid[:, None], sits.values, np.float32(np.inf)), axis=0)
    count = sits.valid.sum(axis=0)[None, None]
    low = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, axis=0)
    high = np.take_along_axis(ordered, np.minimum(count // 2, len(ordered) - 1), axis=0)
    median: NDArray[np.float32] = np.where(count > 0, (low + high) / 2, np.float32(np.nan))[0]
    return median
