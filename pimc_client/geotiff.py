"""Reader for the GeoTIFFs that the server writes, with only NumPy and the standard library.

    file → IFD (tags) → GeoTIFF (the header's contents) → tiles → (bands, rows, columns)

The server writes Cloud Optimized GeoTIFFs by GDAL's COG driver: little-endian, classic or BigTIFF,
tiled, the bands of a pixel side by side, DEFLATE with predictor 1, 2 or 3, pixels of uint8, int8 or
float32. This module reads exactly this form, and only the first image, not its overviews. Any other
TIFF raises `GeoTIFFError`; rasterio can read it. Sources: TIFF 6.0; BigTIFF; Adobe's technical note
3 (predictor 3); OGC GeoTIFF 1.1; GDAL's `GDAL_METADATA` and `GDAL_NODATA` tags.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from pimc_client.errors import GeoTIFFError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Transform = tuple[float, float, float, float, float, float]
"""`(a, b, c, d, e, f)` as affine and rasterio order them: x = a col + b row + c, y = d col + e row
+ f, of the upper left corner of a pixel."""

# TIFF tags.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _PLANAR = 256, 257, 258, 259, 277, 284
_PREDICTOR, _COLORMAP, _SAMPLE_FORMAT = 317, 320, 339
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_SIZES = 322, 323, 324, 325
_PIXEL_SCALE, _TIEPOINT, _TRANSFORMATION = 33550, 33922, 34264
_GEO_KEYS, _GDAL_METADATA, _GDAL_NODATA = 34735, 42112, 42113
# GeoKeys.
_MODEL_TYPE, _GEOGRAPHIC, _PROJECTED = 1024, 2048, 3072
_MODEL_GEOGRAPHIC, _USER_DEFINED = 2, 32767

# Type code of a tag → `struct` letter: bytes, text, and integers of 16, 32 and 64 bits, doubles.
_TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 12: "d", 16: "Q"}
# Sample format → kind of number.
_KINDS = {1: "uint", 2: "int", 3: "float"}
_DTYPES = {"uint8", "int8", "float32"}
_DEFLATE, _INTERLEAVED = 8, 1

Tags = Mapping[int, Any]
"""Tag number → bytes for text, else a tuple of numbers."""


@dataclass(frozen=True, kw_only=True)
class GeoTIFF:
    """The contents of a GeoTIFF's header, for its first image."""

    width: int
    """Columns."""
    height: int
    """Rows."""
    count: int
    """Bands."""
    dtype: str
    """Number type of the pixels, by its name in NumPy."""
    nodata: float | None
    """The value of pixels without a prediction, None if the file names none."""
    scale: float | None
    """Scale of integers: value = pixel x scale; None if pixels are the values."""
    descriptions: tuple[str | None, ...]
    """Name of each band."""
    tags: Mapping[str, str]
    """The data set's own metadata, by name."""
    band_tags: tuple[Mapping[str, str], ...]
    """The metadata of each band, by name."""
    colors: Mapping[int, str]
    """Pixel value to `#rrggbb`; empty without a colour table."""
    epsg: int | None
    """EPSG code of the CRS, None if it has none."""
    transform: Transform | None
    """Pixel to CRS, None if the file is not georeferenced."""
    ifd: Tags = field(repr=False)
    """Every tag, by number."""


def read_header(file: BinaryIO) -> GeoTIFF:
    """Read the header of the first image of a TIFF.

    The header of a file in another form than the server's is read as well, so that the file can be
    saved.

    Raises:
        GeoTIFFError: the file is not a little-endian TIFF, or its header is damaged.
    """
    try:
        return _header(_first_ifd(file))
    except (struct.error, KeyError, IndexError, UnicodeDecodeError) as error:
        raise GeoTIFFError(
            f"the TIFF header is damaged ({error!r}): request the file again"
        ) from error


def read_array(file: BinaryIO, header: GeoTIFF) -> NDArray[Any]:
    """Decode the first image.

    Returns:
        (bands, rows, columns), of `header.dtype`.

    Raises:
        GeoTIFFError: the file has another form than the server's, or a tile cannot be decoded.
    """
    import numpy as np

    tiles = _Tiles.of(header)
    pixels = np.empty((header.count, header.height, header.width), header.dtype)
    for number, (rows, columns) in enumerate(tiles.places()):
        tile = tiles.decode(file, number)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        pixels[:, rows, columns] = tile[:height, :width].transpose(2, 0, 1)
    return pixels


# --- header ---------------------------------------------------------------------------------------


def _exactly(file: BinaryIO, offset: int, count: int) -> bytes:
    # Checked before reading: a damaged count may exceed the memory.
    length = file.seek(0, os.SEEK_END)
    if offset + count > length:
        raise GeoTIFFError(
            f"the file ends at byte {length}, but its header points to byte {offset + count}: "
            "it is incomplete, so request it again"
        )
    file.seek(offset)
    return file.read(count)


def _first_ifd(file: BinaryIO) -> Tags:
    file.seek(0)
    start = file.read(16)
    if start[:4] not in {b"II*\0", b"II+\0"}:
        raise GeoTIFFError(
            f"not a little-endian TIFF, as the server writes: the file starts with {start[:4]!r}; "
            "open it with rasterio"
        )
    big = start[2:3] == b"+"
    # Sizes of: the number of entries, one entry, and the value that fits inside an entry.
    counter, entry_size, inline = ("<Q", 20, 8) if big else ("<H", 12, 4)
    entry = "<HHQ" if big else "<HHI"
    pointer = "<Q" if big else "<I"
    (offset,) = struct.unpack_from(pointer, start, 8 if big else 4)
    (entries,) = struct.unpack(counter, _exactly(file, offset, struct.calcsize(counter)))
    table = _exactly(file, offset + struct.calcsize(counter), entries * entry_size)
    tags: dict[int, Any] = {}
    for at in range(0, len(table), entry_size):
        tag, kind, count = struct.unpack_from(entry, table, at)
        if kind not in _TYPES:
            continue
        size = struct.calcsize(f"<{_TYPES[kind]}") * count
        value_at = at + struct.calcsize(entry)
        if size > inline:
            (elsewhere,) = struct.unpack_from(pointer, table, value_at)
            tags[tag] = _values(kind, count, _exactly(file, elsewhere, size))
        else:
            tags[tag] = _values(kind, count, table[value_at : value_at + size])
    return tags


def _values(kind: int, count: int, data: bytes) -> bytes | tuple[Any, ...]:
    return data if _TYPES[kind] == "s" else struct.unpack(f"<{count}{_TYPES[kind]}", data)


def _header(ifd: Tags) -> GeoTIFF:
    width, height, count = ifd[_WIDTH][0], ifd[_HEIGHT][0], ifd.get(_SAMPLES, (1,))[0]
    tags, band_tags, descriptions, scale = _metadata(ifd.get(_GDAL_METADATA, b""), count)
    return GeoTIFF(
        width=width,
        height=height,
        count=count,
        dtype=_dtype(ifd),
        nodata=_number(_text(ifd.get(_GDAL_NODATA, b""))),
        scale=scale,
        descriptions=descriptions,
        tags=tags,
        band_tags=band_tags,
        colors=_colors(ifd.get(_COLORMAP, ())),
        epsg=_epsg(ifd.get(_GEO_KEYS, ())),
        transform=_transform(ifd),
        ifd=ifd,
    )


def _dtype(ifd: Tags) -> str:
    # Bands of several types are not a NumPy array, and no writer known makes them.
    return f"{_KINDS.get(ifd.get(_SAMPLE_FORMAT, (1,))[0], 'other')}{ifd.get(_BITS, (1,))[0]}"


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8").strip()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _colors(table: tuple[int, ...]) -> dict[int, str]:
    size = len(table) // 3
    channels = [table[i * size : (i + 1) * size] for i in range(3)]
    # 16 bits per channel in TIFF, of which the upper 8 are GDAL's.
    return {
        value: "#" + "".join(f"{channel >> 8:02x}" for channel in color)
        for value, color in enumerate(zip(*channels, strict=True))
    }


def _metadata(
    data: bytes, count: int
) -> tuple[dict[str, str], tuple[dict[str, str], ...], tuple[str | None, ...], float | None]:
    """GDAL's metadata: of the data set, of each band, each band's description, and the scale.

    The server gives all bands of a file the same scale, and never an offset.
    """
    tags: dict[str, str] = {}
    scale: float | None = None
    band_tags: tuple[dict[str, str], ...] = tuple({} for _ in range(count))
    descriptions: list[str | None] = [None] * count
    for name, text, place in _metadata_items(_text(data)):
        sample = place.get("sample", "")
        if "domain" in place or (sample and not (sample.isdecimal() and int(sample) < count)):
            continue
        if place.get("role") == "description" and sample:
            descriptions[int(sample)] = text
        elif place.get("role") == "scale" and sample:
            scale = _number(text)
        elif "role" not in place:  # A role is GDAL's own use, such as an attribute table.
            (band_tags[int(sample)] if sample else tags)[name] = text
    return tags, band_tags, tuple(descriptions), scale


def _metadata_items(xml: str) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    if not xml:
        return
    from xml.etree import ElementTree as ET
    from xml.sax.saxutils import unescape

    try:
        # Python's expat refuses entity bombs and never fetches external entities.
        root = ET.fromstring(xml)  # noqa: S314 (see above)
    except ET.ParseError as error:
        raise GeoTIFFError(
            f"the GDAL metadata in the TIFF header is not valid XML ({error}): request the file "
            "again"
        ) from error
    for item in root.iter("Item"):
        # GDAL escapes the text, and once more when it writes it as XML.
        text = unescape(item.text or "", {"&quot;": '"', "&apos;": "'"})
        yield item.get("name", ""), text, item.attrib


def _epsg(directory: tuple[int, ...]) -> int | None:
    entries = (directory[i : i + 4] for i in range(4, len(directory) - 3, 4))
    # Where the location is 0, the value is in the directory itself.
    keys = {key: value for key, location, _, value in entries if location == 0}
    key = _GEOGRAPHIC if keys.get(_MODEL_TYPE) == _MODEL_GEOGRAPHIC else _PROJECTED
    code = keys.get(key, 0)
    return code if 0 < code < _USER_DEFINED else None


def _transform(ifd: Tags) -> Transform | None:
    if _TRANSFORMATION in ifd:  # a rotated grid
        a, b, _, c, d, e, _, f = ifd[_TRANSFORMATION][:8]
        return (a, b, c, d, e, f)
    if _PIXEL_SCALE not in ifd or _TIEPOINT not in ifd:
        return None
    scale_x, scale_y = ifd[_PIXEL_SCALE][:2]
    column, row, _, x, y, _ = ifd[_TIEPOINT][:6]
    return (scale_x, 0.0, x - column * scale_x, 0.0, -scale_y, y + row * scale_y)


# --- pixels ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Tiles:
    """The tiles of an image: their places in the file, and how to decode one."""

    header: GeoTIFF
    offsets: tuple[int, ...]
    """First byte of each tile, row by row."""
    sizes: tuple[int, ...]
    """Bytes of each tile."""
    rows: int
    """Rows of a tile."""
    columns: int
    """Columns of a tile."""
    predictor: int

    @classmethod
    def of(cls, header: GeoTIFF) -> _Tiles:
        """The tiles of an image.

        Raises:
            GeoTIFFError: the file has another form than the server's, or its lists of tiles do not
                fit the image.
        """
        ifd = header.ifd
        compression, planar = ifd.get(_COMPRESSION, (1,))[0], ifd.get(_PLANAR, (_INTERLEAVED,))[0]
        predictor = ifd.get(_PREDICTOR, (1,))[0]
        known = (
            header.dtype in _DTYPES
            and (compression, planar) == (_DEFLATE, _INTERLEAVED)
            and predictor in {1, 2, 3 if header.dtype == "float32" else 1}
        )
        if not known or _TILE_OFFSETS not in ifd:
            raise GeoTIFFError(
                "pixels are read from DEFLATE tiles of uint8, int8 or float32, bands side by side; "
                f"this file has {'tiles' if _TILE_OFFSETS in ifd else 'strips'} of {header.dtype}, "
                f"compression {compression}, predictor {predictor}, planar configuration {planar}: "
                "save it and open it with rasterio"
            )
        tiles = cls(
            header=header,
            offsets=ifd[_TILE_OFFSETS],
            sizes=ifd.get(_TILE_SIZES, ()),
            rows=ifd.get(_TILE_HEIGHT, (0,))[0],
            columns=ifd.get(_TILE_WIDTH, (0,))[0],
            predictor=predictor,
        )
        expected = (
            -(-header.width // tiles.columns) * -(-header.height // tiles.rows)
            if tiles.rows and tiles.columns
            else 0
        )
        if not len(tiles.offsets) == len(tiles.sizes) == expected:
            raise GeoTIFFError(
                f"the image has {expected} tiles, but its header lists {len(tiles.offsets)} "
                f"offsets and {len(tiles.sizes)} sizes: request the file again"
            )
        return tiles

    def places(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each tile, without the padding of those at the edges."""
        for row in range(0, self.header.height, self.rows):
            for column in range(0, self.header.width, self.columns):
                yield (
                    slice(row, min(row + self.rows, self.header.height)),
                    slice(column, min(column + self.columns, self.header.width)),
                )

    def decode(self, file: BinaryIO, number: int) -> NDArray[Any]:
        """One whole tile: (rows, columns, bands)."""
        import numpy as np

        count, dtype = self.header.count, np.dtype(self.header.dtype).newbyteorder("<")
        size = self.rows * self.columns * count * dtype.itemsize
        packed = _exactly(file, self.offsets[number], self.sizes[number])
        try:
            data = zlib.decompressobj().decompress(packed, size)
        except zlib.error as error:
            raise GeoTIFFError(
                f"tile {number} cannot be decoded ({error}): request the file again"
            ) from error
        if len(data) < size:
            raise GeoTIFFError(
                f"tile {number} decodes to {len(data)} bytes instead of {size}: request the file "
                "again"
            )
        raw = np.frombuffer(data, np.uint8, size).reshape(self.rows, -1)
        pixels = _unpredict(raw, self.predictor, dtype, count)
        return pixels.reshape(self.rows, self.columns, count)


def _unpredict(
    raw: NDArray[np.uint8], predictor: int, dtype: np.dtype[Any], samples: int
) -> NDArray[Any]:
    """Undo a predictor.

    Args:
        raw: the decompressed bytes of a tile (rows, bytes of a row).
        predictor: 1 none; 2 each value less the one to its left; 3 the bytes of a row's floats
            sorted by significance, each byte less the one to its left.
        dtype: of the values.
        samples: values of one pixel; "left" is the same sample of the pixel before.

    Returns:
        (rows, columns x samples) of `dtype`.
    """
    import numpy as np

    rows = raw.shape[0]
    if predictor == 1:
        return raw.view(dtype)
    if predictor == 2:
        # Summed as unsigned integers, which wrap around; this also holds for the bits of floats.
        unsigned = np.dtype(f"<u{dtype.itemsize}")
        steps = raw.view(unsigned).reshape(rows, -1, samples)
        return np.cumsum(steps, axis=1, dtype=unsigned).reshape(rows, -1).view(dtype)
    steps = raw.reshape(rows, -1, samples)
    planes = np.cumsum(steps, axis=1, dtype=np.uint8).reshape(rows, dtype.itemsize, -1)
    # Planes run from the most to the least significant byte; little-endian values in reverse order.
    ordered = np.ascontiguousarray(planes[:, ::-1].transpose(0, 2, 1))
    return ordered.reshape(rows, -1).view(dtype)
