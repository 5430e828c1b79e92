"""JPEG 2000 guard: limits on the sizes that a file declares, checked before GDAL reads the file.

OpenJPEG allocates the memory that the codestream declares: a tile of all components as 32-bit
numbers, and tables for every precinct, layer and resolution. A file of a few hundred bytes can
declare more than the machine's memory (a decompression bomb), so this module checks the boxes and
the main header first. OpenJPEG rejects files with other faults.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from service.errors import NotAGeoTIFF, RasterTooLarge
from service.read.tiff_guard import MAX_BLOCK_BYTES

SIGNATURE = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_MAX_BOXES = 1000
_MAX_BOX_BYTES = 2**20  # of georeference and metadata; a Sentinel-2 band has 2 kB
_MAX_COMPONENTS = 64
_MAX_BITS = 32
_MAX_TILES = 65_535
_MAX_MARKERS = 1000
_MAX_PRECINCTS = 100_000  # of one tile, times its layers; OpenJPEG takes some 100 bytes for each
_MAX_LEVELS = 32
_SOC, _SIZ, _COD, _SOT = 0xFF4F, 0xFF51, 0xFF52, 0xFF90
_CODESTREAM = b"jp2c"
_CONVERT = "convert it with gdal_translate -of COG"


@dataclass(frozen=True, kw_only=True)
class _Size:
    """Content of the SIZ marker."""

    tile: tuple[int, int]
    """Columns and rows."""
    components: int

    @property
    def decoded(self) -> int:
        """Bytes of one tile; OpenJPEG decodes to 32 bits."""
        return self.tile[0] * self.tile[1] * self.components * 4


def check_jp2(path: Path, name: str) -> int:
    """Reject a JPEG 2000 file that declares sizes beyond the limits.

    Args:
        path: the file; its first bytes are those of a JP2.
        name: the caller's name for the file.

    Returns:
        Decoded size of one tile, bytes.

    Raises:
        RasterTooLarge: a tile, a box, or the number of components, precincts or markers exceeds its
            limit.
        NotAGeoTIFF: the boxes or the main header are cut or inconsistent.
    """
    with path.open("rb") as file:
        _to_codestream(file, name)
        return _check_main_header(file, name)


def _to_codestream(file: BinaryIO, name: str) -> None:
    """Move to the start of the codestream, and check that the boxes before it are small."""
    for boxes, (kind, length) in enumerate(_boxes(file, name)):
        if boxes >= _MAX_BOXES:
            raise RasterTooLarge(
                f"'{name}' has more JPEG 2000 boxes than the limit of {_MAX_BOXES}: {_CONVERT}"
            )
        if kind == _CODESTREAM:
            return
        if length > _MAX_BOX_BYTES:
            raise RasterTooLarge(
                f"'{name}' has a JPEG 2000 box of {length} bytes before its pixels, and the limit "
                f"is {_MAX_BOX_BYTES}: {_CONVERT}"
            )
    raise _damaged(name)


def _boxes(file: BinaryIO, name: str) -> Iterator[tuple[bytes, int]]:
    """Type and content length of each box, with the file positioned at the box's content."""
    while True:
        start = file.tell()
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        used = 8
        if length == 1:
            more = file.read(8)
            if len(more) < 8:
                return
            (length,) = struct.unpack(">Q", more)
            used = 16
        if kind == _CODESTREAM and length == 0:
            yield kind, 0
            return
        if length < used or length >= 2**62:
            raise _damaged(name)
        yield kind, length - used
        file.seek(start + length)


def _check_main_header(file: BinaryIO, name: str) -> int:
    if file.read(2) != struct.pack(">H", _SOC):
        raise _damaged(name)
    size: _Size | None = None
    for _ in range(_MAX_MARKERS):
        head = file.read(4)
        if len(head) < 4:
            raise _damaged(name)
        marker, length = struct.unpack(">HH", head)
        if marker == _SOT:
            if size is None:
                raise _damaged(name)
            return size.decoded
        content = file.read(length - 2) if length >= 2 else b""
        if length < 2 or len(content) < length - 2:
            raise _damaged(name)
        if marker == _SIZ:
            size = _size(content, name)
        elif marker == _COD and size is not None:
            _check_coding(content, size, name)
    raise RasterTooLarge(
        f"'{name}' has more JPEG 2000 markers in its header than the limit of {_MAX_MARKERS}: "
        f"{_CONVERT}"
    )


def _size(content: bytes, name: str) -> _Size:
    if len(content) < 36:
        raise _damaged(name)
    right, bottom, left, top, across, down, tile_left, tile_top, components = struct.unpack_from(
        ">8IH", content, 2
    )
    width, height = right - left, bottom - top
    if min(width, height, across, down, components) < 1 or len(content) < 36 + 3 * components:
        raise _damaged(name)
    if components > _MAX_COMPONENTS:
        raise RasterTooLarge(
            f"'{name}' has {components} components, and the limit is {_MAX_COMPONENTS}: {_CONVERT}"
        )
    for n in range(components):
        bits, dx, dy = content[36 + 3 * n : 39 + 3 * n]
        if (bits & 0x7F) + 1 > _MAX_BITS or (dx, dy) != (1, 1):
            raise NotAGeoTIFF(
                f"'{name}' has components of different sizes or of more than {_MAX_BITS} bits, "
                f"which the service does not read: {_CONVERT}"
            )
    tiles = -(-(right - tile_left) // across) * -(-(bottom - tile_top) // down)
    if tiles > _MAX_TILES:
        raise RasterTooLarge(
            f"'{name}' has {tiles} tiles, and the limit is {_MAX_TILES}: {_CONVERT}"
        )
    tile = min(across, right), min(down, bottom)
    size = _Size(tile=tile, components=components)
    if size.decoded > MAX_BLOCK_BYTES:
        raise RasterTooLarge(
            f"'{name}': one tile of {tile[1]} x {tile[0]} pixels and {components} components "
            f"decodes to {size.decoded} bytes, and the limit is {MAX_BLOCK_BYTES}: write the file "
            "with smaller tiles, as with gdal_translate -of COG"
        )
    return size


def _check_coding(content: bytes, size: _Size, name: str) -> None:
    """Check the number of precincts, layers and resolutions of one tile.

    Raises:
        RasterTooLarge: a tile has too many packets.
        NotAGeoTIFF: the marker is cut or inconsistent.
    """
    if len(content) < 10:
        raise _damaged(name)
    has_precincts = content[0] & 1
    layers, levels = struct.unpack_from(">H", content, 2)[0], content[5]
    if levels > _MAX_LEVELS or layers < 1:
        raise _damaged(name)
    sizes = content[10 : 10 + levels + 1] if has_precincts else bytes([0xFF]) * (levels + 1)
    if len(sizes) < levels + 1:
        raise _damaged(name)
    precincts = 0
    for resolution, both in enumerate(sizes):
        shrunk = levels - resolution
        across, down = both & 0xF, both >> 4
        precincts += (1 + (size.tile[0] >> shrunk >> across)) * (
            1 + (size.tile[1] >> shrunk >> down)
        )
    total = precincts * layers * size.components
    if total > _MAX_PRECINCTS:
        raise RasterTooLarge(
            f"'{name}': one tile has {precincts} precincts in {layers} layers and "
            f"{size.components} components, {total} packets, and the limit is {_MAX_PRECINCTS}: "
            f"{_CONVERT}"
        )


def _damaged(name: str) -> NotAGeoTIFF:
    return NotAGeoTIFF(
        f"'{name}' is an incomplete or damaged JPEG 2000 file: download the file again"
    )
