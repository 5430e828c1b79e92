"""Windowed reads: a stack's pixels as reflectance and validity.

A pixel of a date is valid unless it is missing, cloudy or outside `area`. It is missing if the mask
of a file, the nodata number, NaN or the quality band marks it so, or if all its bands are 0 and no
nodata tag names 0. `radiometry` finds numbers that mean missing pixels and that no tag names.

For a window of whole blocks, a `StackReader` decodes each block of each file once, and has only the
window in memory.
"""

from __future__ import annotations

import resource
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import ArrayLike, NDArray
from rasterio.errors import RasterioError
from rasterio.features import geometry_mask

from service.errors import CorruptRaster, no_descriptors
from service.grid import GDALError, Grid, Window
from service.read import clouds
from service.read.buffers import BufferPool
from service.read.geotiff import (
    CACHE_BYTES,
    SIDE_BY_SIDE,
    THREADS_PAY_FROM,
    BlockCache,
    Copies,
    FileMemory,
    SourceFile,
    for_each,
    gdal_options,
    open_geotiff,
    read_header,
)
from service.read.placement import Position, Resampling, warped_part
from service.read.stack import KEPT_BYTES, NO_VALUE, Acquisition, Decoded, Plane, Sits, Stack
from service.read.warp import WARP_BYTES, fill_of, has_alpha, warped

# A reader keeps at most this number of files open, or this share of the descriptors if that is
# less, but never fewer than the second number.
_MAX_OPEN, _FEWEST_OPEN, _SHARE_OPEN = 256, 16, 16
# An open file keeps its last decoded block and a table of all blocks in memory. All open files of a
# reader together take at most this memory, bytes.
_MAX_HELD_BYTES = 256 * 2**20
# Points are read in windows of about this side in pixels, and of at most this memory in bytes.
_CELL = 256
CELL_BYTES = 64 * 2**20


_Key = tuple[SourceFile, Position, Resampling]
"""Key of an open file: one file may be warped in two ways."""


@dataclass(frozen=True, kw_only=True)
class _FileRead:
    """The part of one file that one layer needs, read by a single call."""

    source: SourceFile
    position: Position
    resampling: Resampling
    planes: list[Plane]
    targets: list[tuple[int, int]]
    """Position of each plane on the T axis and on the C axis; masks follow the bands on C."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """At most one granule of each observation."""

    positions: list[int]
    """Positions of the layer's granules on the reader's T axis."""
    acquisitions: list[Acquisition]
    reads: list[_FileRead]

    @property
    def apart(self) -> bool:
        """Whether each acquisition is in one file, so that two threads never share an array."""
        return sum(len({t for t, _ in read.targets}) for read in self.reads) == len(
            self.acquisitions
        )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The arrays of one window of a layer, while its files are read."""

    window: Window
    values: NDArray[np.float32]
    """(T, C, h, w) reflectance."""
    present: NDArray[np.bool_]
    """(T, h, w): whether a pixel has a value."""
    clear: NDArray[np.bool_]
    """(T, h, w): whether a mask leaves it."""
    something: dict[int, NDArray[np.bool_]]
    """(h, w) by date on which zeros in all bands mean no data: whether some band is not zero."""


class StackReader:
    """Reads windows of a stack, for one thread at a time; close it, or use it in `with`.

    Files stay open between windows, up to a limit.
    """

    def __init__(
        self,
        stack: Stack,
        used: Sequence[int] | None = None,
        *,
        cache: BlockCache | None = None,
        buffers: BufferPool | None = None,
        before_read: Callable[[], None] = lambda: None,
    ) -> None:
        """Plan the reads.

        Args:
            stack: the stack to read.
            used: positions on the stack's T axis to read, which become the T axis in this order;
                None reads all.
            cache: GDAL's block cache, enlarged for the stack's blocks until the reader is closed;
                None does not change it.
            buffers: pool of the windows' memory; None creates one for this reader.
            before_read: called before a part of a file is read; an exception that it raises ends
                the read.
        """
        self._stack = stack
        self._used = tuple(range(stack.observations) if used is None else used)
        self._layers = _layers(stack, self._used)
        planes = [p for layer in self._layers for read in layer.reads for p in read.planes]
        self._block_bytes = max((plane.memory.block for plane in planes), default=0)
        self._before_read = before_read
        self._buffers = BufferPool() if buffers is None else buffers
        self._context = ExitStack()
        self._cache = cache
        if cache is not None:
            self._context.enter_context(cache.room(CACHE_BYTES + _cached(planes)))
        self._most_open = _files_kept_open()
        self._open: dict[_Key, rasterio.DatasetReader] = {}
        self._warped = ExitStack()
        self._held_bytes = 0
        self._lock = threading.Lock()
        self._copies = self._context.enter_context(self._copied([p.source for p in planes]))
        self._own_grids: dict[SourceFile, Grid] = {}

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
        self._close_files()
        self._context.close()

    def _close_files(self) -> None:
        while self._open:
            _, dataset = self._open.popitem()
            dataset.close()
        self._warped.close()
        self._held_bytes = 0

    def _copied(self, sources: Sequence[SourceFile]) -> AbstractContextManager[Copies | None]:
        """The local copies of remote files; None if there are none."""
        if all(source.remote is None for source in sources):
            return nullcontext()
        if self._cache is None or self._cache.remote is None:
            raise TypeError("a stack with remote files needs a cache that fetches their blocks")
        return self._cache.remote.copies(sources, self._before_read)

    def _bring(self, windows: Sequence[Window]) -> None:
        """Fetch the blocks of windows, of all remote files together."""
        if self._copies is None:
            return
        reads = [read for layer in self._layers for read in layer.reads if read.source.remote]
        with gdal_options():
            parts = [(read.source, self._part(read, w)) for read in reads for w in windows]
        if self._copies.bring((source, part) for source, part in parts if part is not None):
            self._close_files()  # GDAL has read the positions of the blocks

    def _part(self, read: _FileRead, window: Window) -> Window | None:
        """The pixels of a file that a window needs; None if it needs none."""
        warp = read.position.warp
        if warp is None:
            return _shifted(window, read.position)
        if read.source not in self._own_grids:
            header = read_header(read.source)
            self._own_grids[read.source] = Grid.of(
                header.name,
                crs=header.crs,
                transform=header.transform,
                width=header.width,
                height=header.height,
            )
        return warped_part(self._own_grids[read.source], warp, window)

    def read(self, window: Window) -> Sits:
        """Decode a window.

        Args:
            window: a window of the stack's grid.

        Returns:
            `values` (T, C, h, w) float32 and `valid` (T, h, w).

        Raises:
            ValueError: the window is not inside the grid.
            CorruptRaster: a file does not decode.
            Overloaded: the process has no free file descriptor.
        """
        (sits,) = self.read_together([window])
        return sits

    def read_together(self, windows: Sequence[Window]) -> list[Sits]:
        """Decode several windows file by file, so that a block that they share is decoded once.

        Args:
            windows: windows of the stack's grid; all of them are in memory at once.

        Returns:
            The values and validity of each window, as `read` returns them.

        Raises:
            ValueError: a window is not inside the grid.
            CorruptRaster: a file does not decode.
            Overloaded: the process has no free file descriptor.
        """
        grid = self._stack.grid
        for window in windows:
            (top, bottom), (left, right) = window.toranges()
            if not (0 <= top < bottom <= grid.height and 0 <= left < right <= grid.width):
                raise ValueError(
                    f"{window} is not inside {grid.height} rows x {grid.width} columns"
                )
        self._bring(windows)
        read: Iterator[Sequence[Sits]] = (
            self._read_layer(layer, windows) for layer in self._layers
        )
        if self._stack.cloud_bands is not None:
            by_window = [self._without_clouds(own) for own in zip(*read, strict=True)]
            read = iter(list(zip(*by_window, strict=True)))
        merged = next(read)
        for layer, more in zip(self._layers[1:], read, strict=True):
            for whole, part in zip(merged, more, strict=True):
                self._fill_gaps(whole, part, layer.positions)
        bands = len(self._stack.bands)
        return [Sits(values=whole.values[:, :bands], valid=whole.valid) for whole in merged]

    def _fill_gaps(self, whole: Sits, part: Sits, positions: Sequence[int]) -> None:
        """Take the clear pixels of a layer where the layers before it are not clear."""
        for t, values, valid in zip(positions, part.values, part.valid, strict=True):
            better = valid & ~whole.valid[t]
            np.copyto(whole.values[t], values, where=better)
            whole.valid[t] |= better
        self._buffers.give_back(part.values, part.valid)

    def _without_clouds(self, layers: Sequence[Sits]) -> Sequence[Sits]:
        """All layers, their `valid` restricted to pixels that the estimated mask finds clear.

        The mask takes every granule as a date of one series.
        """
        bands = [self._stack.bands_read.index(band) for band in clouds.BANDS]
        blue, red, nir = (_together([layer.values[:, c] for layer in layers]) for c in bands)
        clear = clouds.clear(blue, red, nir, _together([layer.valid for layer in layers]))
        begin = 0
        for layer in layers:
            layer.valid[...] = clear[begin : begin + len(layer.valid)]
            begin += len(layer.valid)
        return layers

    def read_pixels(self, rows: ArrayLike, columns: ArrayLike) -> Sits:
        """Decode single pixels; neighbouring pixels are read in one small window.

        Args:
            rows: row of each pixel (N), inside the grid.
            columns: column of each pixel (N), inside the grid.

        Returns:
            `values` (T, C, N) float32 and `valid` (T, N), in the order given.

        Raises:
            CorruptRaster: a file does not decode.
        """
        row, column = np.asarray(rows, dtype=np.intp), np.asarray(columns, dtype=np.intp)
        shape = (len(self._used), len(self._stack.bands), row.size)
        values = np.empty(shape, dtype=np.float32)
        valid = np.empty((shape[0], shape[2]), dtype=np.bool_)
        height, width = (max(1, _CELL // side) * side for side in self._stack.block)
        most = max(1, CELL_BYTES // (4 * shape[0] * len(self._stack.bands_read)))
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
            self._buffers.give_back(part.values, part.valid)
        return Sits(values=values, valid=valid)

    def _read_layer(self, layer: _Layer, windows: Sequence[Window]) -> list[Sits]:
        parts = [self._blank(layer, window) for window in windows]

        def fill(read: _FileRead) -> None:
            for part in parts:
                self._before_read()
                self._fill(part, layer, read)

        if layer.apart:
            for_each(layer.reads, fill, block_bytes=self._block_bytes)
        else:
            with gdal_options():
                for read in layer.reads:
                    fill(read)
        return [self._filled(part) for part in parts]

    def _blank(self, layer: _Layer, window: Window) -> _Part:
        T, C = len(layer.acquisitions), len(self._stack.bands_read)
        h, w = int(window.height), int(window.width)
        present = self._buffers.take((T,), (h, w), np.bool_)
        clear = self._buffers.take((T,), (h, w), np.bool_)
        present.fill(True)
        clear.fill(True)
        zero_is_missing = [t for t, one in enumerate(layer.acquisitions) if one.zero_is_missing]
        return _Part(
            window=window,
            values=self._buffers.take((T, C), (h, w), np.float32),
            present=present,
            clear=clear,
            something={t: np.zeros((h, w), np.bool_) for t in zero_is_missing},
        )

    def _fill(self, part: _Part, layer: _Layer, read: _FileRead) -> None:
        """Write one file's pixels of a window to the window's arrays."""
        values, present, clear = part.values, part.present, part.clear
        C = values.shape[1]
        raw, mask = self._decode(read, part.window)
        # Values beyond the range of float32 become infinite.
        with np.errstate(over="ignore", invalid="ignore"):
            for data, plane, (t, c) in zip(raw, read.planes, read.targets, strict=True):
                if c >= C:
                    mask_plane = layer.acquisitions[t].masks[c - C]
                    into = present if mask_plane.missing else clear
                    into[t] &= mask_plane.clear(data)
                    if mask is not None:
                        into[t] &= mask != 0
                    continue
                _reflectance(data, plane, values[t, c])
                if plane.may_be_beyond:
                    present[t] &= np.abs(values[t, c]) < NO_VALUE  # False for NaN, too
                nodata = fill_of(plane) if read.position.warp else plane.nodata
                if nodata is not None:
                    present[t] &= data != nodata
                if mask is not None:
                    present[t] &= mask != 0
                if t in part.something:
                    part.something[t] |= data != 0

    def _filled(self, part: _Part) -> Sits:
        """The values and validity of a window of which all files have been read."""
        values, present, clear = part.values, part.present, part.clear
        for t in range(len(values)):
            if t in part.something:
                present[t] &= part.something[t]
            if not present[t].all():  # most dates are complete
                np.copyto(values[t], np.float32(np.nan), where=~present[t])
        if self._stack.area is not None:
            clear &= self._inside(part.window)
        np.logical_and(present, clear, out=clear)
        self._buffers.give_back(present)
        return Sits(values=values, valid=clear)

    def _inside(self, window: Window) -> NDArray[np.bool_]:
        """True for pixels of a window (h, w) whose centre is inside the requested area."""
        inside: NDArray[np.bool_] = geometry_mask(
            [self._stack.area],
            out_shape=(int(window.height), int(window.width)),
            transform=self._stack.grid.transform
            @ Affine.translation(window.col_off, window.row_off),
            invert=True,
        )
        return inside

    def _decode(self, read: _FileRead, window: Window) -> Decoded:
        """Bands of one file and its mask, decoded or as another reader kept them."""
        numbers = [plane.number for plane in read.planes]
        window = _shifted(window, read.position)
        if not self._stack.small or read.position.warp is not None:
            return self._decode_window(read, numbers, window)
        key = (read.source, tuple(numbers), window.flatten())
        decoded = self._stack.kept.find(key)
        if decoded is None:
            decoded = self._decode_window(read, numbers, window)
            self._stack.kept.keep(key, decoded)
        return decoded

    def _decode_window(self, read: _FileRead, numbers: list[int], window: Window) -> Decoded:
        try:
            with self._dataset(read) as dataset:
                raw = dataset.read(numbers, window=window)
                if self._cache is not None:
                    self._cache.decoded(raw.nbytes)
                if read.position.warp is not None and has_alpha(read.planes[0]):
                    return raw, dataset.read(dataset.count, window=window)
                masked = read.planes[0].masked
                return raw, dataset.read_masks(numbers[0], window=window) if masked else None
        except (RasterioError, GDALError) as error:
            if busy := no_descriptors(error):
                raise busy from error
            (top, bottom), (left, right) = window.toranges()
            raise CorruptRaster(
                f"'{read.source.name}': the header can be read, but the pixels of rows {top} to "
                f"{bottom - 1} and columns {left} to {right - 1} cannot be decoded: download or "
                "export the file again"
            ) from error

    @contextmanager
    def _dataset(self, read: _FileRead) -> Iterator[rasterio.DatasetReader]:
        """The open file. The first files stay open; all others are closed after each read.

        Closing the least recently used file would always close the file that is needed next,
        because every window reads the files in the same order.
        """
        key = (read.source, read.position, read.resampling)
        dataset = self._open.get(key)
        if dataset is not None:
            yield dataset
            return
        memory = read.planes[0].memory
        warp = read.position.warp
        if warp is not None:
            with ExitStack() as stack:
                source = stack.enter_context(
                    open_geotiff(
                        self._path(read.source),
                        block_bytes=memory.block,
                        driver=read.planes[0].driver,
                    )
                )
                dataset = stack.enter_context(warped(source, read.planes[0], warp))
                if self._stays(key, dataset, memory):
                    with self._lock:
                        self._warped.push(stack.pop_all())
                yield dataset
            return
        # Windows are in pixels, and the headers have determined the file's position on the grid.
        dataset = open_geotiff(
            self._path(read.source),
            block_bytes=memory.block,
            georeferenced=False,
            driver=read.planes[0].driver,
        )
        if self._stays(key, dataset, memory):
            yield dataset
            return
        with dataset:
            yield dataset

    def _path(self, source: SourceFile) -> Path:
        return source.path if self._copies is None else self._copies.path(source)

    def _stays(self, key: _Key, dataset: rasterio.DatasetReader, memory: FileMemory) -> bool:
        """Keep a file open if the limits allow it; returns whether it stays open."""
        with self._lock:
            held = self._held_bytes + memory.open
            stays = len(self._open) < self._most_open and held <= _MAX_HELD_BYTES
            if stays:
                self._open[key] = dataset
                self._held_bytes = held
            return stays


def _shifted(window: Window, position: Position) -> Window:
    """A window of the stack in the pixels of a file that is not warped."""
    row, column = position.row, position.column
    if not (row or column):
        return window
    return Window(window.col_off + column, window.row_off + row, window.width, window.height)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory that reading windows of a stack takes in addition to their arrays, bytes.

    Computed from the headers: the blocks that GDAL decodes at once, and the memory of open files.
    """

    cached: int
    """Blocks in GDAL's cache, in addition to its usual size."""
    held: int
    """Files that stay open."""
    decoding: int
    """Files that are open for one read, encoded blocks, codecs and warps."""
    kept: int
    """Numbers of a small raster that the stack keeps for its next reader."""
    raw: int
    """Numbers of one file as stored, per pixel of a window."""
    layers: int
    """Layers of granules in memory at once: 1, 2, or all for a mask estimated from the series."""
    heaviest: Plane
    """A plane of the file that takes the most memory."""

    @property
    def total(self) -> int:
        """The memory that does not grow with the window."""
        return self.cached + self.held + self.decoding + self.kept


def footprint(stack: Stack, used: Sequence[int]) -> Footprint:
    """The memory that a `StackReader` with the same arguments takes.

    Args:
        stack: the stack.
        used: positions on the stack's T axis that are read.
    """
    layers = _layers(stack, used)
    reads = [read for layer in layers for read in layer.reads]
    planes = [plane for read in reads for plane in read.planes]
    files = {(r.source, r.position, r.resampling): r.planes[0].memory.open for r in reads}
    all_open = sum(files.values())
    stays = len(files) <= _files_kept_open() and all_open <= _MAX_HELD_BYTES
    largest = max(plane.memory.block for plane in planes)
    at_once = SIDE_BY_SIDE if largest < THREADS_PAY_FROM else 1
    return Footprint(
        cached=_cached(planes),
        held=min(all_open, _MAX_HELD_BYTES),
        decoding=(0 if stays else max(files.values()))
        + at_once * max(plane.memory.encoded for plane in planes)
        + at_once * WARP_BYTES * any(read.position.warp is not None for read in reads),
        kept=min(KEPT_BYTES, stack.grid.width * stack.grid.height * sum(map(_raw_bytes, reads)))
        if stack.small
        else 0,
        raw=at_once * max(map(_raw_bytes, reads)),
        layers=len(layers) if stack.cloud_bands is not None else min(2, len(layers)),
        heaviest=max(planes, key=lambda plane: plane.memory.open + plane.memory.encoded),
    )


def _raw_bytes(read: _FileRead) -> int:
    """Bytes of one pixel of a file as stored, with its mask."""
    return sum(plane.itemsize for plane in read.planes) + read.planes[0].masked


def _files_kept_open() -> int:
    """Number of files that one reader keeps open.

    Only a share of the descriptors, because several readers and many connections need them.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MAX_OPEN
    return max(_FEWEST_OPEN, min(_MAX_OPEN, soft // _SHARE_OPEN))


def _cached(planes: Sequence[Plane]) -> int:
    """Bytes of one block and its mask, which must fit into the cache to be decoded only once."""
    return max((plane.memory.block + plane.memory.mask for plane in planes), default=0)


def _together(parts: Sequence[NDArray[np.generic]]) -> NDArray[Any]:
    """Arrays concatenated; a single array is returned without a copy."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _layers(stack: Stack, used: Sequence[int]) -> list[_Layer]:
    """The granules to read in layers, so that a layer has at most one of each observation.

    There is one layer unless several granules share a date. The first layer has every used
    observation.
    """
    by_observation = defaultdict(list)
    for acquisition in stack.acquisitions:
        by_observation[acquisition.observation].append(acquisition)
    depth = max((len(by_observation[t]) for t in used), default=1)
    layers = []
    for level in range(depth):
        positions = [i for i, t in enumerate(used) if len(by_observation[t]) > level]
        acquisitions = [by_observation[used[i]][level] for i in positions]
        layers.append(
            _Layer(positions=positions, acquisitions=acquisitions, reads=_reads(acquisitions))
        )
    return layers


def _reads(acquisitions: Sequence[Acquisition]) -> list[_FileRead]:
    by_file: dict[tuple[object, ...], _FileRead] = {}
    for t, acquisition in enumerate(acquisitions):
        C = len(acquisition.planes)
        planes = [*acquisition.planes, *(mask.plane for mask in acquisition.masks)]
        for c, plane in enumerate(planes):
            # A warped file is read twice: for interpolated bands, and for those with the nearest
            # pixel.
            key: tuple[object, ...] = (plane.source,)
            if plane.position.warp is not None:
                key = (plane.source, plane.resampling, fill_of(plane), c >= C)
            read = by_file.get(key)
            if read is None:
                read = by_file[key] = _FileRead(
                    source=plane.source,
                    position=plane.position,
                    resampling=plane.resampling,
                    planes=[],
                    targets=[],
                )
            read.planes.append(plane)
            read.targets.append((t, c))
    return list(by_file.values())


def _reflectance(data: NDArray[np.generic], plane: Plane, out: NDArray[np.float32]) -> None:
    """Write `data` x scale + offset to `out`."""
    np.multiply(data, np.float32(plane.scale), out=out, dtype=np.float32, casting="same_kind")
    if plane.offset:
        out += np.float32(plane.offset)
