"""Reads the GeoTIFFs that the service writes, with numpy and the standard library alone.

    file → IFD (tags) → GeoTIFF (what the header says) → blocks → (bands, rows, columns)

Little-endian classic and BigTIFF; tiles and strips; uncompressed, DEFLATE and LZW; predictors 1,
2 and 3; integers and floats of 8 to 64 bits; both planar configurations. Only the first image is
read: overviews and masks are not. Anything else is refused with a `GeoTIFFError`; rasterio reads
it. Sources: TIFF 6.0; Adobe's technical note 3 (predictor 3); OGC GeoTIFF 1.1.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from pimc_client.errors import GeoTIFFError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Transform = tuple[float, float, float, float, float, float]
"""`(a, b, c, d, e, f)` as affine and rasterio order them: x = a col + b row + c, y = d col + e row
+ f, of the upper left corner of a pixel."""

# TIFF tags.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION = 256, 257, 258, 259
_STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_COUNTS = 273, 277, 278, 279
_PLANAR, _PREDICTOR, _COLORMAP = 284, 317, 320
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS = 322, 323, 324, 325
_SAMPLE_FORMAT = 339
_PIXEL_SCALE, _TIEPOINT, _TRANSFORMATION = 33550, 33922, 34264
_GEO_KEYS, _GDAL_METADATA, _GDAL_NODATA = 34735, 42112, 42113
# GeoKeys.
_MODEL_TYPE, _RASTER_TYPE, _GEOGRAPHIC, _PROJECTED = 1024, 1025, 2048, 3072
_MODEL_GEOGRAPHIC, _PIXEL_IS_POINT, _USER_DEFINED = 2, 2, 32767

# Type code of a tag → `struct` letter.
_TYPES = {
    1: "B", 2: "s", 3: "H", 4: "I", 5: "2I", 6: "b", 7: "s", 8: "h", 9: "i", 10: "2i",
    11: "f", 12: "d", 13: "I", 16: "Q", 17: "q", 18: "Q",
}  # fmt: skip
_DTYPES = {
    (1, 8): "<u1", (1, 16): "<u2", (1, 32): "<u4", (1, 64): "<u8",
    (2, 8): "<i1", (2, 16): "<i2", (2, 32): "<i4", (2, 64): "<i8",
    (3, 16): "<f2", (3, 32): "<f4", (3, 64): "<f8",
}  # fmt: skip
_COMPRESSIONS = {
    1: "none", 5: "LZW", 8: "DEFLATE", 32946: "DEFLATE",
    7: "JPEG", 32773: "PackBits", 34887: "LERC", 34925: "LZMA", 50000: "ZSTD", 50001: "WebP",
}  # fmt: skip
_DECODED = {"none", "LZW", "DEFLATE"}
_ASK_RASTERIO = "save it and open it with rasterio"

Tags = Mapping[int, Any]
"""Tag number → bytes for text and opaque data, else a tuple of numbers."""


@dataclass(frozen=True, kw_only=True)
class GeoTIFF:
    """What the header of a GeoTIFF says of its first image."""

    width: int
    """Columns."""
    height: int
    """Rows."""
    count: int
    """Bands."""
    dtype: str
    """Of the pixels, as numpy names it: `uint8`, `float32`, ..."""
    nodata: float | None
    """The value that means no answer, None where the file names none."""
    descriptions: tuple[str | None, ...]
    """Name of each band."""
    tags: Mapping[str, str]
    """The data set's own metadata, by name."""
    band_tags: tuple[Mapping[str, str], ...]
    """The metadata of each band, by name."""
    colors: Mapping[int, str]
    """Pixel value to `#rrggbb`; empty without a colour table."""
    epsg: int | None
    """EPSG code of the CRS, None where it has none."""
    transform: Transform | None
    """Pixel to CRS, None where the file is not georeferenced."""
    ifd: Tags
    """Every tag, by number, as the file has it."""


def read_header(file: BinaryIO) -> GeoTIFF:
    """Read the header of the first image of a TIFF.

    Raises:
        GeoTIFFError: not a little-endian TIFF, or a header that breaks off.
    """
    try:
        return _header(_first_ifd(file))
    except (struct.error, KeyError, IndexError, UnicodeDecodeError) as error:
        raise GeoTIFFError(f"the TIFF header is not readable ({error!r})") from error


def read_array(file: BinaryIO, header: GeoTIFF) -> NDArray[Any]:
    """Decode the first image.

    Returns:
        (bands, rows, columns), of `header.dtype`.

    Raises:
        GeoTIFFError: a compression, predictor or layout that this reader does not know, or a
            block that does not decode.
    """
    import numpy as np

    blocks = _Blocks.of(header)
    shape = (header.count, header.height, header.width)
    pixels = np.empty(shape, np.dtype(header.dtype))
    for place in blocks.places():
        pixels[place.bands, place.rows, place.columns] = blocks.read(file, place)
    return pixels


# --- header ---------------------------------------------------------------------------------------


def _exactly(file: BinaryIO, offset: int, count: int) -> bytes:
    # Before reading: a broken count may ask for more than there is memory.
    length = file.seek(0, os.SEEK_END)
    if offset + count > length:
        raise GeoTIFFError(
            f"the file ends at byte {length} and its header points to byte {offset + count}"
        )
    file.seek(offset)
    return file.read(count)


def _first_ifd(file: BinaryIO) -> Tags:
    file.seek(0)
    start = file.read(16)
    order, version = start[:2], start[2:4]
    if order == b"MM":
        raise GeoTIFFError(f"a big-endian TIFF is not read here; {_ASK_RASTERIO}")
    if order != b"II" or version not in {b"*\0", b"+\0"}:
        raise GeoTIFFError(f"not a TIFF: it starts with {start[:4]!r}")
    big = version == b"+\0"
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
    letter = _TYPES[kind]
    if letter == "s":
        return data
    # A rational is two numbers, so its letters are "2I".
    return struct.unpack(f"<{count * len(letter)}{letter[-1]}", data)


def _header(ifd: Tags) -> GeoTIFF:
    count = ifd.get(_SAMPLES, (1,))[0]
    tags, band_tags, descriptions = _metadata(ifd.get(_GDAL_METADATA, b""), count)
    keys = _geo_keys(ifd.get(_GEO_KEYS, ()))
    return GeoTIFF(
        width=ifd[_WIDTH][0],
        height=ifd[_HEIGHT][0],
        count=count,
        dtype=_dtype(ifd),
        nodata=_nodata(ifd.get(_GDAL_NODATA, b"")),
        descriptions=descriptions,
        tags=tags,
        band_tags=band_tags,
        colors=_colors(ifd.get(_COLORMAP, ())),
        epsg=_epsg(keys),
        transform=_transform(ifd, point=keys.get(_RASTER_TYPE) == _PIXEL_IS_POINT),
        ifd=ifd,
    )


def _dtype(ifd: Tags) -> str:
    import numpy as np

    bits = set(ifd.get(_BITS, (1,)))
    formats = set(ifd.get(_SAMPLE_FORMAT, (1,)))
    kind = (min(formats), min(bits))
    if len(bits) > 1 or len(formats) > 1 or kind not in _DTYPES:
        raise GeoTIFFError(
            f"pixels of {sorted(bits)} bits in sample format {sorted(formats)} are not read here; "
            f"{_ASK_RASTERIO}"
        )
    return np.dtype(_DTYPES[kind]).name


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8").strip()


def _nodata(data: bytes) -> float | None:
    try:
        return float(_text(data))
    except ValueError:
        return None


def _colors(table: tuple[int, ...]) -> dict[int, str]:
    size = len(table) // 3
    channels = [table[i * size : (i + 1) * size] for i in range(3)]
    # 16 bits a channel in TIFF, of which the upper 8 are what GDAL was given.
    return {
        value: "#" + "".join(f"{channel >> 8:02x}" for channel in color)
        for value, color in enumerate(zip(*channels, strict=True))
    }


def _metadata(
    data: bytes, count: int
) -> tuple[dict[str, str], tuple[dict[str, str], ...], tuple[str | None, ...]]:
    """GDAL's metadata: of the data set, of each band, and each band's description."""
    tags: dict[str, str] = {}
    band_tags: tuple[dict[str, str], ...] = tuple({} for _ in range(count))
    descriptions: list[str | None] = [None] * count
    for name, text, place in _metadata_items(_text(data)):
        sample = place.get("sample", "")
        if "domain" in place or (sample and not (sample.isdecimal() and int(sample) < count)):
            continue
        if place.get("role") == "description" and sample:
            descriptions[int(sample)] = text
        elif "role" not in place:  # A role is GDAL's own use: scale, colours, attribute table.
            (band_tags[int(sample)] if sample else tags)[name] = text
    return tags, band_tags, tuple(descriptions)


def _metadata_items(xml: str) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    if not xml:
        return
    from xml.etree import ElementTree as ET
    from xml.sax.saxutils import unescape

    try:
        # Python's expat refuses entity bombs and never fetches external entities.
        root = ET.fromstring(xml)  # noqa: S314 (see above)
    except ET.ParseError as error:
        raise GeoTIFFError(f"the GDAL metadata is not XML ({error})") from error
    for item in root.iter("Item"):
        # GDAL escapes the text, and once more when it writes it as XML.
        text = unescape(item.text or "", {"&quot;": '"', "&apos;": "'"})
        yield item.get("name", ""), text, item.attrib


def _geo_keys(directory: tuple[int, ...]) -> dict[int, int]:
    """The GeoKeys whose value is a number in the directory itself."""
    entries = (directory[i : i + 4] for i in range(4, len(directory) - 3, 4))
    return {key: value for key, location, _, value in entries if location == 0}


def _epsg(keys: Mapping[int, int]) -> int | None:
    key = _GEOGRAPHIC if keys.get(_MODEL_TYPE) == _MODEL_GEOGRAPHIC else _PROJECTED
    code = keys.get(key, 0)
    return code if 0 < code < _USER_DEFINED else None


def _transform(ifd: Tags, *, point: bool) -> Transform | None:
    if _TRANSFORMATION in ifd:
        m = ifd[_TRANSFORMATION]
        a, b, c, d, e, f = m[0], m[1], m[3], m[4], m[5], m[7]
    elif _PIXEL_SCALE in ifd and _TIEPOINT in ifd:
        scale_x, scale_y = ifd[_PIXEL_SCALE][:2]
        column, row, _, x, y, _ = ifd[_TIEPOINT][:6]
        a, b, c = scale_x, 0.0, x - column * scale_x
        d, e, f = 0.0, -scale_y, y + row * scale_y
    else:
        return None
    if point:  # The coordinates are those of pixel centres.
        c, f = c - (a + b) / 2, f - (d + e) / 2
    return (a, b, c, d, e, f)


# --- pixels ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Place:
    """One block: which it is in the file, and what it holds of the image."""

    number: int
    bands: slice
    rows: slice
    columns: slice


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """The tiles or strips of an image, and how to decode one."""

    header: GeoTIFF
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    """Bytes of each block in the file; 0 is a block left out, all nodata."""
    rows: int
    columns: int
    """Of a full block."""
    samples: int
    """Bands that a block holds: all of them, or one where each band has its own blocks."""
    padded: bool
    """Whether blocks at the lower edge are full ones (tiles) or end with the image (strips)."""
    compression: str
    predictor: int

    @classmethod
    def of(cls, header: GeoTIFF) -> _Blocks:
        ifd = header.ifd
        number = ifd.get(_COMPRESSION, (1,))[0]
        compression = _COMPRESSIONS.get(number, f"number {number}")
        if compression not in _DECODED:
            raise GeoTIFFError(
                f"compression {compression} is not decoded here, only none, LZW and DEFLATE; "
                f"{_ASK_RASTERIO}"
            )
        predictor = ifd.get(_PREDICTOR, (1,))[0] if compression != "none" else 1
        if predictor not in {1, 2, 3} or (predictor == 3 and not header.dtype.startswith("float")):
            raise GeoTIFFError(
                f"predictor {predictor} on {header.dtype} is not decoded here; {_ASK_RASTERIO}"
            )
        tiled = _TILE_OFFSETS in ifd
        if not tiled and _STRIP_OFFSETS not in ifd:
            raise GeoTIFFError("the image has neither tiles nor strips")
        rows_per_strip = min(ifd.get(_ROWS_PER_STRIP, (header.height,))[0], header.height)
        blocks = cls(
            header=header,
            offsets=ifd[_TILE_OFFSETS if tiled else _STRIP_OFFSETS],
            sizes=ifd.get(_TILE_COUNTS if tiled else _STRIP_COUNTS, ()),
            rows=ifd[_TILE_HEIGHT][0] if tiled else rows_per_strip,
            columns=ifd[_TILE_WIDTH][0] if tiled else header.width,
            samples=1 if ifd.get(_PLANAR, (1,))[0] == 2 else header.count,
            padded=tiled,
            compression=compression,
            predictor=predictor,
        )
        across = -(-header.width // blocks.columns)
        down = -(-header.height // blocks.rows)
        wanted = across * down * -(-header.count // blocks.samples)
        if not len(blocks.offsets) == len(blocks.sizes) == wanted:
            raise GeoTIFFError(
                f"the image has {wanted} blocks and the header lists {len(blocks.offsets)} "
                f"offsets and {len(blocks.sizes)} sizes"
            )
        return blocks

    def places(self) -> Iterator[_Place]:
        """Every block, in the file's order."""
        header, number = self.header, 0
        for band in range(0, header.count, self.samples):
            for row in range(0, header.height, self.rows):
                for column in range(0, header.width, self.columns):
                    yield _Place(
                        number=number,
                        bands=slice(band, band + self.samples),
                        rows=slice(row, min(row + self.rows, header.height)),
                        columns=slice(column, min(column + self.columns, header.width)),
                    )
                    number += 1

    def read(self, file: BinaryIO, place: _Place) -> NDArray[Any]:
        """Decode one block: (bands, rows, columns), without the padding of tiles at the edges."""
        import numpy as np

        height = place.rows.stop - place.rows.start
        width = place.columns.stop - place.columns.start
        dtype = np.dtype(self.header.dtype).newbyteorder("<")
        if self.sizes[place.number] == 0:
            missing = self.header.nodata if self.header.nodata is not None else 0
            return np.full((self.samples, height, width), missing, dtype)
        rows = self.rows if self.padded else height
        size = rows * self.columns * self.samples * dtype.itemsize
        data = self._decompress(
            _exactly(file, self.offsets[place.number], self.sizes[place.number]), size
        )
        if len(data) < size:
            raise GeoTIFFError(
                f"block {place.number} decodes to {len(data)} bytes and {size} are needed"
            )
        raw = np.frombuffer(data, np.uint8, size).reshape(rows, -1)
        block = _unpredict(raw, self.predictor, dtype, self.samples)
        return block.reshape(rows, self.columns, self.samples)[:height, :width].transpose(2, 0, 1)

    def _decompress(self, data: bytes, size: int) -> bytes:
        if self.compression == "none":
            return data
        if self.compression == "LZW":
            return _lzw(data, size)
        try:
            return zlib.decompressobj().decompress(data, size)
        except zlib.error as error:
            raise GeoTIFFError(f"a DEFLATE block does not decode ({error})") from error


def _unpredict(
    raw: NDArray[np.uint8], predictor: int, dtype: np.dtype[Any], samples: int
) -> NDArray[Any]:
    """Undo a predictor.

    Args:
        raw: the decompressed bytes of a block (rows, bytes of a row).
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
        # On the bits, as unsigned integers, which wrap around: floats are stored so as well.
        unsigned = np.dtype(f"<u{dtype.itemsize}")
        steps = raw.view(unsigned).reshape(rows, -1, samples)
        return np.cumsum(steps, axis=1, dtype=unsigned).reshape(rows, -1).view(dtype)
    steps = raw.reshape(rows, -1, samples)
    planes = np.cumsum(steps, axis=1, dtype=np.uint8).reshape(rows, dtype.itemsize, -1)
    # Planes run from the most significant byte to the least; little-endian values run back.
    ordered = np.ascontiguousarray(planes[:, ::-1].transpose(0, 2, 1))
    return ordered.reshape(rows, -1).view(dtype)


_CLEAR, _END, _WIDEST = 256, 257, 12


def _lzw(data: bytes, size: int) -> bytes:
    """Decode LZW as TIFF has it: codes from the high bit, widened one code early.

    Args:
        data: the block in the file.
        size: bytes to decode at most; what follows is padding.
    """
    out = bytearray()
    table: list[bytes] = []
    previous = b""
    width, held, bits = 9, 0, 0
    for byte in data:
        held, bits = (held << 8) | byte, bits + 8
        if bits < width:
            continue
        bits -= width
        code, held = held >> bits, held & ((1 << bits) - 1)
        if code == _CLEAR:
            table = [bytes((i,)) for i in range(256)] + [b"", b""]
            previous, width = b"", 9
            continue
        if code == _END or len(out) >= size:
            break
        if not table or code > len(table) or (code == len(table) and not previous):
            raise GeoTIFFError(f"an LZW block does not decode (code {code} of {len(table)})")
        word = table[code] if code < len(table) else previous + previous[:1]
        out += word
        if previous:
            table.append(previous + word[:1])
            if len(table) + 1 >= 1 << width and width < _WIDEST:
                width += 1
        previous = word
    return bytes(out)
