"""COG output: windows written to temporary GeoTIFFs, which GDAL converts to COGs.

bands of a window → temporary GeoTIFF (uncompressed, tiled) → COG with legend and overviews
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
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
    qgis_style,
    sidecar_of,
    style_of,
    write_attribute_table,
    write_legend,
)
from service.write.predictions import Layer

_TEMPORARY_BLOCK = 256
_BLOCK_BYTES = 8 * 2**20
_LARGE = 1024
"""Side in pixels from which a raster has blocks of 512 pixels, so that viewing it takes fewer HTTP
requests; smaller rasters have blocks of 256, so that a request reads fewer pixels in excess."""
_BLOCK_STEP = 16
"""The sides of a TIFF's blocks are multiples of this, pixels."""
_OVERVIEW_BYTES = 2_000_000
"""Bytes that GDAL makes overviews from at once; its default of 10 MB is not faster."""
USE_TAG = "PIMC_INTENDED_USE"
"""Tag of a raster: what the model's results are good for."""
_THREADS = 4
"""Number of threads that compress a COG's blocks."""
_MAX_CACHE_BYTES = 256 * 2**20
"""Largest block cache while overviews are made, bytes."""


class RasterWriter:
    """Writes layers window by window; a context manager.

    `finish` gives the files their names once they are complete. The end of the context removes all
    other files, so that a failed or cancelled run leaves no file.

    Args:
        folder: existing folder of the finished files.
        grid: grid of every layer.
        layers: the layers to write.
        tags: tags of every file.
        room: returns a context in which GDAL's block cache has at least the given number of bytes;
            the default does not change the cache.
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
            window: a window of the grid.
            bands: arrays (B, h, w) of the layer's dtype, by layer name.

        Raises:
            InsufficientStorage: the disk is full.
        """
        with stored():
            for name, values in bands.items():
                layer = self._layers[name]
                if name not in self._open:
                    self._open[name] = self._create(layer)
                self._open[name].write(values.astype(layer.dtype, copy=False), window=window)

    def finish(self) -> dict[str, Path]:
        """Convert every layer to a COG, with a QGIS style beside it.

        Returns:
            Path of each layer's COG, by layer name. A class map also has a side file (`.aux.xml`)
            in the same folder.

        Raises:
            InsufficientStorage: the disk is full.
        """
        with stored():
            return {name: self._finish(layer) for name, layer in self._layers.items()}

    def _create(self, layer: Layer) -> Any:  # noqa: ANN401 - rasterio has no types
        """The layer's temporary file with its tags and legend: GDAL requires the pixels last."""
        file = create_raster(self._part(layer.name), self._grid, layer)
        file.update_tags(**self._tags)
        if layer.legend:
            write_legend(file, layer.legend, len(attribute_table(layer.legend)))
        return file

    def _part(self, name: str) -> Path:
        return self._parts / f"{name}.part.tif"

    def _finish(self, layer: Layer) -> Path:
        self._open.pop(layer.name).close()
        check_complete(self._part(layer.name))
        cog = self._parts / f"{layer.name}.tif"
        cached, chunk = _overview_memory(layer, self._grid)
        with self._room(cached), rasterio.Env(GDAL_OVR_CHUNK_MAX_SIZE=chunk):
            rasterio.shutil.copy(
                self._part(layer.name), cog, driver="COG", **cog_options(layer, self._grid)
            )
        check_complete(cog)
        self._part(layer.name).unlink()
        target = self._folder / cog.name
        if layer.legend:
            write_attribute_table(cog, attribute_table(layer.legend))
            sidecar = sidecar_of(target)
            self._finished.append(sidecar)
            sidecar.write_text(category_names(layer), encoding="utf-8")
        style = style_of(target)
        self._finished.append(style)
        style.write_text(qgis_style(layer), encoding="utf-8")
        self._finished.append(target)
        cog.replace(target)
        return target


def finishing_bytes(layer: Layer, grid: Grid) -> int:
    """Memory that the conversion of a layer to a COG takes, bytes."""
    cached, chunk = _overview_memory(layer, grid)
    block = _block(layer, grid) ** 2 * len(layer.bands) * np.dtype(layer.dtype).itemsize
    return cached + 2 * chunk + 2 * _THREADS * block


def _overview_memory(layer: Layer, grid: Grid) -> tuple[int, int]:
    """Bytes of GDAL's block cache, and bytes that GDAL makes overviews from at once.

    GDAL makes overviews in pieces along rows of blocks, first from the raster, then from the
    previous overview. If a row of blocks does not fit into the cache, GDAL decodes it again for
    each piece, and if a piece is smaller than a block, GDAL decodes the block for each of its
    pieces: 512 x 512 pixels of 256 bands then take 102 s of processor time instead of 11 s.
    """
    block = _block(layer, grid)
    deep = block * len(layer.bands) * np.dtype(layer.dtype).itemsize
    return min(2 * deep * grid.width, _MAX_CACHE_BYTES), max(_OVERVIEW_BYTES, deep * block)


class ScratchRaster:
    """A temporary float32 raster between two passes of a run; a context manager that removes it.

    Args:
        path: path of its file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> ScratchRaster:
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)

    @contextmanager
    def create(self, grid: Grid, bands: int) -> Iterator[OpenScratch]:
        """Create the raster and open it for writing; it is complete at the end of the context.

        Args:
            grid: grid of the raster.
            bands: number of bands (K).

        Raises:
            InsufficientStorage: the disk is full.
        """
        layer = Layer(name="scratch", bands=tuple(str(b) for b in range(bands)))
        with stored():
            file = create_raster(self.path, grid, layer)
        with file:
            yield OpenScratch(file)
        check_complete(self.path)

    @contextmanager
    def open(self) -> Iterator[OpenScratch]:
        """The raster, open for reading; another thread may end the context."""
        # Not `with rasterio.open(...)`, which must end in the thread where it begins.
        with closing(rasterio.open(self.path)) as file:
            yield OpenScratch(file)


class OpenScratch:
    """An open scratch raster of K bands."""

    def __init__(self, file: Any) -> None:  # noqa: ANN401 - rasterio has no types
        self._file = file

    def read(self, window: Window) -> NDArray[Any]:
        """The values (K, h, w) of a window, in the raster's dtype."""
        return np.asarray(self._file.read(window=window))

    def write(self, window: Window, values: NDArray[np.float32]) -> None:
        """Write the values (K, h, w) of a window.

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
    """Classes of a class map; empty for other rasters."""
    tags: Mapping[str, str]
    """Tags of the file, as passed to `RasterWriter`."""


@contextmanager
def open_stored(path: Path) -> Iterator[StoredRaster]:
    """Open a raster that `RasterWriter` wrote, for reading."""
    with rasterio.open(path) as file:
        tags = file.tags()
        legend = json.loads(tags.get("PIMC_LEGEND", "[]"))
        kept = {name for name in tags if name.startswith("PIMC_")} - {"PIMC_LEGEND"}
        yield StoredRaster(
            pixels=OpenScratch(file),
            grid=Grid(crs=file.crs, transform=file.transform, width=file.width, height=file.height),
            legend=tuple(LegendClass(**one) for one in legend),
            tags={name: tags[name] for name in (*sorted(kept), "TIFFTAG_SOFTWARE")},
        )


@contextmanager
def stored() -> Iterator[None]:
    """Translate errors of writing within the context: their cause is the disk, not the request.

    Raises:
        InsufficientStorage: GDAL or the operating system could not write.
        Overloaded: the process has no free file descriptor.
    """
    try:
        yield
    except (RasterioError, GDALError) as error:
        if busy := no_descriptors(error):
            raise busy from error
        raise InsufficientStorage(
            "the result cannot be written: the server's disk is full or failing; the administrator "
            "must free space or check the disk"
        ) from error
    except OSError as error:
        raise no_room(error) or no_descriptors(error) or error from error


def check_complete(path: Path) -> None:
    """Check that a GeoTIFF contains each of its blocks: GDAL closes a truncated file silently.

    Raises:
        InsufficientStorage: a block is missing or ends after the end of the file.
    """
    size = path.stat().st_size
    with rasterio.open(path, driver="GTiff") as file:
        # Bands are interleaved by pixel, so the first band's blocks are those of all bands.
        for _, window in file.block_windows(1):
            row = window.row_off // file.block_shapes[0][0]
            col = window.col_off // file.block_shapes[0][1]
            offset_and_size = [
                file.get_tag_item(f"BLOCK_{item}_{col}_{row}", "TIFF", bidx=1)
                for item in ("OFFSET", "SIZE")
            ]
            if None in offset_and_size or sum(map(int, offset_and_size)) > size:
                raise InsufficientStorage(
                    "the result was truncated: the server's disk is full or failing; the "
                    "administrator must free space or check the disk"
                )


def create_raster(path: Path, grid: Grid, layer: Layer) -> Any:  # noqa: ANN401 - rasterio has no types
    """A new GeoTIFF in blocks, open for writing windows in any order."""
    side = -(-max(grid.width, grid.height) // _BLOCK_STEP) * _BLOCK_STEP
    # GDAL allocates whole blocks, also for a raster smaller than a block: an embedding of 7 x 7
    # pixels took 240 MB to write and convert to a COG with blocks of 256 pixels, and 50 MB with
    # smaller blocks.
    block = min(_TEMPORARY_BLOCK, _block(layer, grid), side)
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
        # A window may end inside a block. GDAL would append a compressed block again after each
        # change, and its previous copy would remain in the file.
        compress="NONE",
        # The COG driver's interleaving, so that the conversion does not reorder values.
        interleave="PIXEL",
        bigtiff="IF_NEEDED",
    )
    for position, name in enumerate(layer.bands, start=1):
        file.set_band_description(position, name)
    if layer.scale is not None:
        file.scales = [layer.scale] * len(layer.bands)
        file.offsets = [0.0] * len(layer.bands)
    return file


def cog_options(layer: Layer, grid: Grid) -> dict[str, str]:
    """Creation options of the COG driver for one layer."""
    return {
        "COMPRESS": "DEFLATE",
        # Compared with level 6, level 1 takes 60 % of the time. Its files are 1 to 2 % larger for
        # floats and a third larger for class maps.
        "LEVEL": "6" if layer.legend else "1",
        # The predictor for floats orders bytes by significance, which makes files 14 % smaller.
        # The one for integers stores differences, which for class values make files larger.
        "PREDICTOR": "NO" if layer.legend else "YES",
        "BLOCKSIZE": str(_block(layer, grid)),
        # The mean of class numbers is another class; the most frequent one is a valid overview.
        "OVERVIEW_RESAMPLING": "MODE" if layer.legend else "AVERAGE",
        # Compression takes nearly all of the time. Few threads, because other requests run at the
        # same time. A class map of 8192 x 8192 pixels takes one thread 1.2 s; several threads take
        # 70 MB more memory.
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
