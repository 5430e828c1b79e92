"""COG output: windows into plain GeoTIFFs, which GDAL then turns into COGs.

bands of a window → temporary GeoTIFF (uncompressed, tiled) → COG, with its legend inside
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.errors import RasterioError

from models.card import LegendClass
from service.errors import InsufficientStorage, no_descriptors, no_room
from service.grid import GDALError, Grid, Window
from service.write.legend import (
    attribute_table,
    category_names,
    put_in_place,
    qgis_style,
    sidecar_of,
    style_of,
    write_legend,
)
from service.write.predictions import Layer

_TEMPORARY_BLOCK = 256
_BLOCK_BYTES = 8 * 2**20
_LARGE = 1024
"""Side from which blocks are 512: fewer requests per map; below it 256 reads less in excess."""
_BLOCK_STEP = 16
"""Sides of a TIFF's tiles are multiples of this."""
_OVERVIEW_BYTES = 2_000_000
"""Bytes that GDAL makes overviews from at once: its default of 10 MB is not faster."""
_THREADS = 4
"""Threads that compress a COG's blocks."""
_MOST_CACHED = 256 * 2**20
"""Bytes of cached blocks while overviews are made, for rasters of any width and depth."""


class RasterWriter:
    """Writes layers window by window; a context manager.

    Files appear under their names only once they are complete, in `finish`. Leaving the context
    removes everything else, so that a failed or cancelled run leaves nothing.

    Args:
        folder: existing folder of the finished files.
        grid: of every layer.
        layers: the layers to write.
        tags: of every file.
        room: a context in which GDAL's block cache has room for at least that many bytes; by
            default the cache stays unchanged.
    """

    def __init__(
        self,
        folder: Path,
        grid: Grid,
        layers: Sequence[Layer],
        tags: Mapping[str, str],
        *,
        room: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self._room = room
        self._folder = folder
        self._grid = grid
        self._layers = {layer.name: layer for layer in layers}
        self._tags = tags
        self._parts = Path(tempfile.mkdtemp(prefix="parts-", dir=folder))
        self._open: dict[str, Any] = {}
        self._finished: list[Path] = []

    def __enter__(self) -> RasterWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()
        shutil.rmtree(self._parts, ignore_errors=True)
        if kind is not None:
            for path in self._finished:
                path.unlink(missing_ok=True)

    def write(self, window: Window, bands: Mapping[str, NDArray[Any]]) -> None:
        """Write one window of every layer.

        Args:
            window: whole pixels inside the grid.
            bands: arrays (B, h, w) by layer name.

        Raises:
            InsufficientStorage: the disk takes no more.
        """
        with stored():
            for name, values in bands.items():
                layer = self._layers[name]
                if name not in self._open:
                    self._open[name] = self._create(layer)
                self._open[name].write(values.astype(layer.dtype, copy=False), window=window)

    def finish(self) -> dict[str, Path]:
        """Turn every layer into a COG.

        Returns:
            Each layer's file, by name. A class map has a side file in the same folder.

        Raises:
            InsufficientStorage: the disk takes no more.
        """
        with stored():
            return {name: self._finish(layer) for name, layer in self._layers.items()}

    def _create(self, layer: Layer) -> Any:  # noqa: ANN401 - rasterio has no types
        """The layer's temporary file with everything but its pixels, which GDAL requires last."""
        file = create_raster(self._part(layer.name), self._grid, layer)
        file.update_tags(**self._tags)
        if layer.legend:
            write_legend(file, layer.legend, len(attribute_table(layer.legend)))
        return file

    def _part(self, name: str) -> Path:
        return self._parts / f"{name}.part.tif"

    def _finish(self, layer: Layer) -> Path:
        self._open.pop(layer.name).close()
        check_whole(self._part(layer.name))
        whole = self._parts / f"{layer.name}.tif"
        cached, chunk = _overview_memory(layer, self._grid)
        with self._room(cached), rasterio.Env(GDAL_OVR_CHUNK_MAX_SIZE=chunk):
            rasterio.shutil.copy(
                self._part(layer.name), whole, driver="COG", **cog_options(layer, self._grid)
            )
        check_whole(whole)
        self._part(layer.name).unlink()
        target = self._folder / whole.name
        if layer.legend:
            put_in_place(whole, attribute_table(layer.legend))
            sidecar = sidecar_of(target)
            self._finished.append(sidecar)
            sidecar.write_text(category_names(layer), encoding="utf-8")
        style = style_of(target)
        self._finished.append(style)
        style.write_text(qgis_style(layer), encoding="utf-8")
        self._finished.append(target)
        whole.replace(target)
        return target


def finishing_bytes(layer: Layer, grid: Grid) -> int:
    """Memory that turning a layer into a COG takes, bytes."""
    cached, chunk = _overview_memory(layer, grid)
    block = _block(layer, grid) ** 2 * len(layer.bands) * np.dtype(layer.dtype).itemsize
    return cached + 2 * chunk + 2 * _THREADS * block


def _overview_memory(layer: Layer, grid: Grid) -> tuple[int, int]:
    """Bytes of GDAL's block cache, and of a piece, while overviews are made.

    They are made piece by piece along rows of blocks, of this raster and of the previous overview.
    A row that does not fit is decoded again for each piece, and a block for each of its pieces:
    512 x 512 pixels of 256 bands then take 102 s of processor time, else 11 s.
    """
    block = _block(layer, grid)
    deep = block * len(layer.bands) * np.dtype(layer.dtype).itemsize
    return min(2 * deep * grid.width, _MOST_CACHED), max(_OVERVIEW_BYTES, deep * block)


class ScratchRaster:
    """A float raster between two passes; a context manager that removes it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> ScratchRaster:
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)

    @contextmanager
    def create(self, grid: Grid, bands: int) -> Iterator[OpenScratch]:
        """The raster, open for writing; complete once the context is left.

        Raises:
            InsufficientStorage: the disk is full.
        """
        layer = Layer(name="scratch", bands=tuple(str(b) for b in range(bands)))
        with stored():
            file = create_raster(self._path, grid, layer)
        with file:
            yield OpenScratch(file)
        check_whole(self._path)

    @contextmanager
    def open(self) -> Iterator[OpenScratch]:
        """The raster, open for reading."""
        with rasterio.open(self._path) as file:
            yield OpenScratch(file)


class OpenScratch:
    """An open scratch raster of K bands."""

    def __init__(self, file: Any) -> None:  # noqa: ANN401 - rasterio has no types
        self._file = file

    def read(self, window: Window) -> NDArray[np.float32]:
        """A window's values (K, h, w)."""
        return np.asarray(self._file.read(window=window))

    def write(self, window: Window, values: NDArray[np.float32]) -> None:
        """Write a window's values (K, h, w).

        Raises:
            InsufficientStorage: the disk is full.
        """
        with stored():
            self._file.write(values, window=window)


@dataclass(frozen=True, kw_only=True)
class StoredRaster:
    """A finished raster of a result, open for reading."""

    pixels: OpenScratch
    grid: Grid
    legend: tuple[LegendClass, ...]
    """Of a class map; empty for other rasters."""
    tags: Mapping[str, str]
    """As `RasterWriter` takes them."""


@contextmanager
def open_stored(path: Path) -> Iterator[StoredRaster]:
    """A raster that `RasterWriter` wrote."""
    with rasterio.open(path) as file:
        found = file.tags()
        legend = json.loads(found.get("PIMC_LEGEND", "[]"))
        kept = {name for name in found if name.startswith("PIMC_")} - {"PIMC_LEGEND"}
        yield StoredRaster(
            pixels=OpenScratch(file),
            grid=Grid(crs=file.crs, transform=file.transform, width=file.width, height=file.height),
            legend=tuple(LegendClass(**one) for one in legend),
            tags={name: found[name] for name in (*sorted(kept), "TIFFTAG_SOFTWARE")},
        )


@contextmanager
def stored() -> Iterator[None]:
    """Translate write errors: the content is valid, so the disk is at fault.

    Raises:
        InsufficientStorage: GDAL or the system could not write.
        Overloaded: no file descriptor is free.
    """
    try:
        yield
    except (RasterioError, GDALError) as error:
        if busy := no_descriptors(error):
            raise busy from error
        raise InsufficientStorage(
            "the result cannot be written: the server's disk is full or failing"
        ) from error
    except OSError as error:
        raise no_room(error) or no_descriptors(error) or error from error


def check_whole(path: Path) -> None:
    """Check that each block of a GeoTIFF lies in the file: GDAL closes a truncated file silently.

    Raises:
        InsufficientStorage: a block does not.
    """
    size = path.stat().st_size
    with rasterio.open(path, driver="GTiff") as file:
        # Bands are interleaved by pixel, so the first band's blocks are those of all bands.
        for _, window in file.block_windows(1):
            row = window.row_off // file.block_shapes[0][0]
            col = window.col_off // file.block_shapes[0][1]
            place = [
                file.get_tag_item(f"BLOCK_{what}_{col}_{row}", "TIFF", bidx=1)
                for what in ("OFFSET", "SIZE")
            ]
            if None in place or sum(map(int, place)) > size:
                raise InsufficientStorage(
                    "the result was truncated: the server's disk is full or failing"
                )


def create_raster(path: Path, grid: Grid, layer: Layer) -> Any:  # noqa: ANN401 - rasterio has no types
    """A new GeoTIFF for windows in any order, tiled so that no window rewrites whole rows."""
    around = -(-max(grid.width, grid.height) // _BLOCK_STEP) * _BLOCK_STEP
    # A block is held as a whole, also if it lies mostly outside the raster: with blocks of 256, an
    # embedding of 7 x 7 pixels took 240 MB to write and convert to a COG, with smaller ones 50 MB.
    block = min(_TEMPORARY_BLOCK, _block(layer, grid), around)
    file = rasterio.open(
        path,
        "w",
        driver="GTiff",
        crs=grid.crs,
        transform=grid.transform,
        width=grid.width,
        height=grid.height,
        count=len(layer.bands),
        dtype=layer.dtype,
        nodata=layer.nodata,
        tiled=True,
        blockxsize=block,
        blockysize=block,
        # Windows end inside blocks. A compressed block would be rewritten each time and leave a
        # hole in the file.
        compress="NONE",
        # The COG driver's own interleaving, so that the copy does not reorder.
        interleave="PIXEL",
        bigtiff="IF_NEEDED",
    )
    for position, name in enumerate(layer.bands, start=1):
        file.set_band_description(position, name)
    return file


def cog_options(layer: Layer, grid: Grid) -> dict[str, str]:
    """Creation options of the COG driver for one layer."""
    return {
        "COMPRESS": "DEFLATE",
        # For floats level 1 takes 60 % of level 6's time and 1 to 2 % more space; for a class map
        # a third more space.
        "LEVEL": "6" if layer.legend else "1",
        # Floats split by byte significance are 14 % smaller. Classes have no order, so their
        # differences only make the file larger.
        "PREDICTOR": "NO" if layer.legend else "YES",
        "BLOCKSIZE": str(_block(layer, grid)),
        # The mean of class numbers is another class; the most frequent one is a valid overview.
        "OVERVIEW_RESAMPLING": "MODE" if layer.legend else "AVERAGE",
        # Compression is all of the work. Few threads, because other requests run meanwhile. A
        # class map is fast: 8192 x 8192 pixels take one thread 1.2 s, and several 70 MB more.
        "NUM_THREADS": "1" if layer.legend else str(_THREADS),
        "BIGTIFF": "IF_SAFER",
    }


def _block(layer: Layer, grid: Grid) -> int:
    """Side of a block in pixels, limited because readers hold all bands of a block in memory."""
    side = 512 if max(grid.width, grid.height) >= _LARGE else 256
    depth = len(layer.bands) * np.dtype(layer.dtype).itemsize
    while side > 128 and side * side * depth > _BLOCK_BYTES:
        side //= 2
    return side
