"""Answers to files: windows into plain GeoTIFFs, which GDAL then turns into COGs.

    bands of a window → temporary GeoTIFF (uncompressed, tiled) → COG, with its legend inside

How a class map carries its legend, as GDAL 3.10 (of rasterio's wheels) and 3.12 really do it:

- The GTiff driver keeps category names (`SetCategoryNames`) only in a side file, `.aux.xml`.
  No tag of the TIFF can hold them, so an answer of one file cannot have them.
- From 3.12 on the same driver reads a raster attribute table from the `GDAL_METADATA` tag, as an
  item of role `rat`; `gdalinfo` and QGIS then show value, name and colour from the one file.
  GDAL before 3.12 passes the item over, and cannot write it: `SetMetadata` takes text, not
  elements. So a placeholder of the same length goes through the COG driver, and the table is put
  in its place afterwards; no offset moves and the file stays a valid COG.
- For everything older the band's tags name each class (`CLASS_0=Tree cover`), the dataset's tag
  `PIMC_LEGEND` holds the legend as JSON, and the colour table is TIFF's own.
- A zip carries `class.tif.aux.xml` beside `class.tif`: category names for every GDAL, which
  QGIS shows without a style file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # `shutil.copy` raises it, and `errors` lacks it
from rasterio.errors import RasterioError
from rasterio.windows import Window

from models.card import LegendClass
from service.answers import NO_CLASS, Layer
from service.errors import InsufficientStorage, no_room
from service.geotiff import BLOCK_CACHE
from service.stack import Grid

SIDECAR = ".aux.xml"

_TEMPORARY_BLOCK = 256
_BLOCK_BYTES = 8 * 2**20
_LARGE = 1024
"""From this side on, blocks of 512: fewer requests a map; below, 256 reads less too much."""
_BLOCK_STEP = 16
"""Sides of a TIFF's tiles are multiples of this."""
_PLACEHOLDER = "PIMC_RAT"
# A COG's header lies at its front, before any pixel.
_HEADER_BYTES = 8 * 2**20
_COPY_BYTES = 2**20
_OVERVIEW_BYTES = 2_000_000
"""What GDAL makes overviews from at once: its 10 MB, in several threads, are no faster."""
_MOST_CACHED = 256 * 2**20
"""Of blocks while overviews are made, however wide and deep a raster is."""


class RasterWriter:
    """Writes layers window by window; a context manager.

    Files appear under their names only once they are whole, in `finish`. Leaving the context
    removes everything else, so that a run which fails or is cancelled leaves nothing.

    Args:
        folder: where the finished files go; it exists.
        grid: of every layer.
        layers: what to write.
        tags: of every file.
    """

    def __init__(
        self, folder: Path, grid: Grid, layers: Sequence[Layer], tags: Mapping[str, str]
    ) -> None:
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
            Each layer's file, by name. A class map's side file lies beside it.

        Raises:
            InsufficientStorage: the disk takes no more.
        """
        with stored():
            return {name: self._finish(layer) for name, layer in self._layers.items()}

    def _create(self, layer: Layer) -> Any:  # noqa: ANN401 - rasterio has no types
        """The layer's temporary file, with all but its pixels: GDAL wants those last."""
        file = create_raster(self._part(layer.name), self._grid, layer)
        file.update_tags(**self._tags)
        if layer.legend:
            _write_legend(file, layer.legend, len(attribute_table(layer.legend)))
        return file

    def _part(self, name: str) -> Path:
        return self._parts / f"{name}.part.tif"

    def _finish(self, layer: Layer) -> Path:
        self._open.pop(layer.name).close()
        check_whole(self._part(layer.name))
        whole = self._parts / f"{layer.name}.tif"
        block = _block(layer, self._grid)
        deep = block * len(layer.bands) * np.dtype(layer.dtype).itemsize
        # Overviews are made piece by piece along rows of blocks, of this raster and of the overview
        # before. A row that does not fit is decoded again for each piece, and a block for each of
        # its pieces: 512 x 512 pixels of 256 bands then take 102 s of processor time, and so 11.
        with (
            BLOCK_CACHE.of(min(2 * deep * self._grid.width, _MOST_CACHED)),
            rasterio.Env(GDAL_OVR_CHUNK_MAX_SIZE=max(_OVERVIEW_BYTES, deep * block)),
        ):
            rasterio.shutil.copy(
                self._part(layer.name), whole, driver="COG", **cog_options(layer, self._grid)
            )
        check_whole(whole)
        self._part(layer.name).unlink()
        target = self._folder / whole.name
        if layer.legend:
            _put_in_place(whole, attribute_table(layer.legend))
            sidecar = sidecar_of(target)
            self._finished.append(sidecar)
            sidecar.write_text(category_names(layer), encoding="utf-8")
        self._finished.append(target)
        whole.replace(target)
        return target


@contextmanager
def stored() -> Iterator[None]:
    """Says in our terms that a write failed: what is written is ours, so the disk is at fault.

    Raises:
        InsufficientStorage: GDAL or the system could not write.
    """
    try:
        yield
    except (RasterioError, CPLE_BaseError) as error:
        raise InsufficientStorage(
            "the answer cannot be written: the service's disk is full, or it fails"
        ) from error
    except OSError as error:
        raise no_room(error) or error from error


def check_whole(path: Path) -> None:
    """See that each block of a GeoTIFF lies in the file: GDAL closes a file cut short in silence.

    Raises:
        InsufficientStorage: one does not.
    """
    size = path.stat().st_size
    with rasterio.open(path, driver="GTiff") as file:
        # Bands of a pixel lie together, so the first band's blocks are everybody's.
        for _, window in file.block_windows(1):
            row = window.row_off // file.block_shapes[0][0]
            col = window.col_off // file.block_shapes[0][1]
            place = [
                file.get_tag_item(f"BLOCK_{what}_{col}_{row}", "TIFF", bidx=1)
                for what in ("OFFSET", "SIZE")
            ]
            if None in place or sum(map(int, place)) > size:
                raise InsufficientStorage(
                    "the answer was cut short: the service's disk is full, or it fails"
                )


def create_raster(path: Path, grid: Grid, layer: Layer) -> Any:  # noqa: ANN401 - rasterio has no types
    """A new GeoTIFF for windows in any order: tiled, so that none is written twice in full."""
    around = -(-max(grid.width, grid.height) // _BLOCK_STEP) * _BLOCK_STEP
    # A block is held whole, also where it is mostly outside the raster: with blocks of 256, an
    # embedding of 7 x 7 pixels took 240 MB to write and to turn into a COG, and so takes 50.
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
        # Windows end inside blocks. Compressed, such a block would be written anew each time
        # and leave a hole in the file.
        compress="NONE",
        # The driver's own order of bands; the same here saves the copy a shuffle.
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
        # On float answers level 1 takes 60 % of level 6's time for 1 to 2 % more room; on a class
        # map it takes a third more room.
        "LEVEL": "6" if layer.legend else "1",
        # Floats split by byte significance come out 14 % smaller. Classes have no order, so
        # their differences say nothing, and make the file larger.
        "PREDICTOR": "NO" if layer.legend else "YES",
        "BLOCKSIZE": str(_block(layer, grid)),
        # A mean of class numbers is another class. The most frequent one is a true overview.
        "OVERVIEW_RESAMPLING": "MODE" if layer.legend else "AVERAGE",
        # Compression is all of the work. A few threads, as other callers are served meanwhile. A
        # class map is done soon: 8192 x 8192 pixels take one thread 1.2 s, and several 70 MB more.
        "NUM_THREADS": "1" if layer.legend else "4",
        "BIGTIFF": "IF_SAFER",
    }


def _block(layer: Layer, grid: Grid) -> int:
    """Side of a block: all bands of a block are held in memory at once, by readers too."""
    side = 512 if max(grid.width, grid.height) >= _LARGE else 256
    depth = len(layer.bands) * np.dtype(layer.dtype).itemsize
    while side > 128 and side * side * depth > _BLOCK_BYTES:
        side //= 2
    return side


def sidecar_of(path: Path) -> Path:
    """Where GDAL looks for what a TIFF cannot hold."""
    return path.with_name(path.name + SIDECAR)


def zip_files(files: Mapping[str, Path], path: Path) -> Path:
    """Put finished files into one zip, each as `<output>.tif`, with its side file if it has one.

    Args:
        files: finished files by output name.
        path: of the zip to write.

    Returns:
        The path.
    """
    # Stored: a COG is compressed already, and a stored one can still be read by ranges.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, file in files.items():
            _add(archive, file, f"{name}.tif")
            if sidecar_of(file).exists():
                _add(archive, sidecar_of(file), f"{name}.tif{SIDECAR}")
    return path


def _add(archive: zipfile.ZipFile, file: Path, name: str) -> None:
    # Without the file's own date: the same answer is the same bytes.
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o644 << 16
    entry.file_size = file.stat().st_size  # decides on ZIP64 before a byte is written
    with file.open("rb") as source, archive.open(entry, "w") as target:
        shutil.copyfileobj(source, target, _COPY_BYTES)


# The legend -----------------------------------------------------------------------------------


def category_names(layer: Layer) -> str:
    """GDAL's side file (PAM) that names the classes of a layer's first band."""
    names = "".join(f"<Category>{escape(c.name)}</Category>" for c in layer.legend)
    return (
        f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames>'
        "</PAMRasterBand></PAMDataset>\n"
    )


def attribute_table(legend: Sequence[LegendClass]) -> bytes:
    """A legend as the XML item that GDAL 3.12 and later read from the TIFF itself."""
    # Name, then GDAL's numbers: type 0 integer, 2 string; usage 5 value, 2 name, 6 to 8 colours,
    # 0 anything else.
    fields = (
        ("Value", 0, 5),
        ("Class", 2, 2),
        ("Red", 0, 6),
        ("Green", 0, 7),
        ("Blue", 0, 8),
        ("Code", 2, 0),
    )
    heads = "".join(
        f'<FieldDefn index="{i}"><Name>{name}</Name><Type>{kind}</Type><Usage>{usage}</Usage>'
        "</FieldDefn>"
        for i, (name, kind, usage) in enumerate(fields)
    )
    rows = "".join(f'<Row index="{c.value}">{_cells(c)}</Row>' for c in legend)
    return (
        '<Item name="DEFAULT_RASTER_ATTRIBUTE_TABLE" sample="0" role="rat">'
        f'<GDALRasterAttributeTable tableType="thematic">{heads}{rows}'
        "</GDALRasterAttributeTable></Item>"
    ).encode()


def _cells(c: LegendClass) -> str:
    code = "" if c.code is None else c.code
    return "".join(f"<F>{cell}</F>" for cell in (c.value, escape(c.name), *_rgb(c), code))


def legend_json(legend: Sequence[LegendClass]) -> str:
    """A legend as the dataset's tag holds it."""
    return json.dumps([c.model_dump() for c in legend], ensure_ascii=False)


def _write_legend(
    file: Any,  # noqa: ANN401 - rasterio has no types
    legend: Sequence[LegendClass],
    room: int,
) -> None:
    colors = {c.value: (*_rgb(c), 255) for c in legend}
    file.write_colormap(1, {**colors, NO_CLASS: (0, 0, 0, 0)})
    file.update_tags(PIMC_LEGEND=legend_json(legend))
    names = {f"CLASS_{c.value}": c.name for c in legend}
    file.update_tags(1, **names, **{_PLACEHOLDER: "x" * room})


def _rgb(c: LegendClass) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(c.color.removeprefix("#"))
    return red, green, blue


def _put_in_place(path: Path, table: bytes) -> None:
    """Write the attribute table over its placeholder, filled up with blanks, which XML ignores."""
    room = b'<Item name="%s" sample="0">%s</Item>' % (_PLACEHOLDER.encode(), b"x" * len(table))
    with path.open("r+b") as file:
        at = file.read(_HEADER_BYTES).find(room)
        if at < 0:
            raise RuntimeError(f"{path.name}: GDAL wrote the metadata in a form not known here")
        file.seek(at)
        file.write(table.ljust(len(room)))
