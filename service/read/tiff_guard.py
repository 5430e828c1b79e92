"""TIFF guard: limits on a file's directories, checked before GDAL reads them.

GDAL does not limit directories. It searches a list of metadata from its start for each item,
follows chains of a million directories, and opens any file that an item of the domain OVERVIEWS
names. This module therefore first checks the declarations that take time or memory or refer to
other files. GDAL rejects files with other faults.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from service.errors import NotAGeoTIFF, RasterTooLarge

MAX_BLOCK_BYTES = 256 * 2**20
"""Largest decoded size of one strip or tile, bytes; a file of a few kB can declare far more."""
_MAX_DIRECTORIES = 1000  # a raster has one, and two for each overview
_MAX_ENTRIES = 4096  # of one directory; TIFF defines some hundred tags
_MAX_VALUE_BYTES = 64 * 2**20  # of one directory, without text; mostly the offsets of blocks
_MAX_TEXT_BYTES = 8 * 2**20  # 20,000 bands with name, scale and offset take 5 MB
_MAX_ITEMS = 1000  # of one band or the whole image: GDAL's time grows with their square
_WIDTH, _HEIGHT, _ROWS = 256, 257, 278
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_SUBFILE, _REDUCED, _MASK = 254, 1, 4
_METADATA = 42112
# ModelPixelScale, Intergraph's matrix, ModelTiepoint, ModelTransformation and the three of GeoKeys.
_PLACE = frozenset({33550, 33920, 33922, 34264, 34735, 34736, 34737})
_MAX_PLACE_BYTES = 2**16
_NUMBERS = frozenset({_WIDTH, _HEIGHT, _ROWS, _TILE_WIDTH, _TILE_HEIGHT, _SUBFILE})
_ASCII = 2
_SIZES: Mapping[int, int] = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8,
    18: 8,
}  # fmt: skip
_CODES: Mapping[int, str] = {1: "B", 3: "H", 4: "I", 16: "Q"}
_ITEM = re.compile(rb"<\s*Item\b([^>]*)", re.IGNORECASE)
_SAMPLE = re.compile(rb"""\bsample\s*=\s*["'](\d{1,6})["']""")
_OUTSIDE = re.compile(rb"""["']\s*(?:OVERVIEWS|ProxyOverviewRequest)\s*["']""", re.IGNORECASE)


_DECLARATION = re.compile(rb"<!\s*(?:DOCTYPE|ENTITY)", re.IGNORECASE)
_REFERENCE = re.compile(rb"&#(?:[xX]([0-9a-fA-F]{1,6})|0*([0-9]{1,7}));?")


@dataclass(frozen=True, kw_only=True)
class Form:
    """Encoding of numbers in one file."""

    order: str
    word: struct.Struct
    """An offset or a count."""
    length: struct.Struct
    """The number of entries of a directory."""
    entry: struct.Struct
    """Tag, type and count, and the value's field."""

    @classmethod
    def of(cls, order: str, *, big: bool) -> Form:
        """The form of a TIFF or BigTIFF in a byte order, as `struct` writes it."""
        word = struct.Struct(order + ("Q" if big else "I"))
        return cls(
            order=order,
            word=word,
            length=struct.Struct(order + ("Q" if big else "H")),
            entry=struct.Struct(f"{order}HH{word.format[1:]}{word.size}s"),
        )


_FORMS: Mapping[tuple[str, bool], Form] = {
    (order, big): Form.of(order, big=big) for order in "<>" for big in (False, True)
}


class Entry(NamedTuple):  # a stack has thousands, and a frozen dataclass takes thrice as long
    """A tag of a directory."""

    tag: int
    kind: int
    length: int
    """Number of values of that type."""
    field: bytes
    """The value if it fits, else its offset."""

    @property
    def size(self) -> int:
        """Bytes of the value."""
        return self.length * _SIZES.get(self.kind, 1)


class Directories(NamedTuple):
    """Properties of a file's directories that GDAL does not report."""

    georeference: bytes
    """Bytes of the georeference in the first directory: equal bytes mean the same position. Empty
    if the file has no georeference, or an unusually long one."""
    mask_block_bytes: int
    """Decoded size of one block of the internal mask, bytes; 0 without an internal mask."""
    images: int
    """Images of the first one's size, without overviews and masks: GDAL reads only the first."""


def check_directories(path: Path, name: str) -> Directories:
    """Reject a TIFF whose directories declare sizes beyond the limits, or name other files.

    Args:
        path: the file; its first bytes are those of a TIFF.
        name: the caller's name for the file.

    Returns:
        The georeference's bytes, the mask's block size and the number of images.

    Raises:
        RasterTooLarge: too many directories, entries, values or items, or too large blocks of a
            mask.
        NotAGeoTIFF: the metadata names another file that GDAL would open, or a tag has a type that
            the TIFF specification does not allow.
    """
    georeference: bytes | None = None
    mask = images = 0
    first: tuple[int | None, int | None] | None = None
    with path.open("rb") as file:
        for _, form, entries in directories(file, name):
            _check_values(entries, name)
            numbers = {e.tag: small(form, e, name) for e in entries if e.tag in _NUMBERS}
            size = numbers.get(_WIDTH), numbers.get(_HEIGHT)
            first = first or size
            images += size == first and not numbers.get(_SUBFILE, 0) & (_REDUCED | _MASK)
            if georeference is None:
                georeference = _georeference(file, form, entries)
            mask = max(mask, _check_mask(numbers, name))
            for entry in entries:
                if entry.tag == _METADATA:
                    _check_metadata(value(file, form, entry), name)
    return Directories(
        georeference=georeference or b"", mask_block_bytes=mask, images=max(images, 1)
    )


def _georeference(file: BinaryIO, form: Form, entries: list[Entry]) -> bytes:
    """The bytes from which GDAL derives CRS and transform, including their byte order."""
    georeference = [entry for entry in entries if entry.tag in _PLACE]
    if sum(entry.size for entry in georeference) > _MAX_PLACE_BYTES:
        return b""
    return b"".join(
        struct.pack("<cHHQ", form.order.encode(), entry.tag, entry.kind, entry.length)
        + value(file, form, entry)
        for entry in georeference
    )


def directories(file: BinaryIO, name: str) -> Iterator[tuple[int, Form, list[Entry]]]:
    """The directories of a file in order, up to the first that cannot be read or that repeats.

    Args:
        file: the file, open for reading.
        name: the caller's name for the file.

    Yields:
        Position of the directory in the file, encoding of its numbers, and its entries.

    Raises:
        RasterTooLarge: the file has too many directories, or a directory too many entries.
    """
    head = file.read(16)
    big = 43 in head[2:4]
    form = _FORMS["<" if head[:2] == b"II" else ">", big]
    at = _number(form.word, head, 8 if big else 4)
    seen: set[int] = set()
    while at and at not in seen:
        seen.add(at)
        if len(seen) > _MAX_DIRECTORIES:
            raise RasterTooLarge(
                f"'{name}' has more TIFF directories than the limit of {_MAX_DIRECTORIES}: write "
                "the file again, as with gdal_translate -of COG"
            )
        file.seek(at)
        n = _number(form.length, file.read(form.length.size), 0)
        if n is None:
            return
        if n > _MAX_ENTRIES:
            raise RasterTooLarge(
                f"'{name}' has a TIFF directory of {n} entries, and the limit is {_MAX_ENTRIES}: "
                "write the file again, as with gdal_translate -of COG"
            )
        size = form.entry.size
        content = file.read(n * size + form.word.size)
        # A truncated file has fewer entries than it declares.
        complete = min(n, len(content) // size) * size
        entries = [Entry._make(each) for each in form.entry.iter_unpack(content[:complete])]
        yield at, form, entries
        at = _number(form.word, content, n * size)


def _number(layout: struct.Struct, data: bytes, at: int) -> int | None:
    """The number at a position of some bytes; None if it is incomplete or out of range."""
    if len(data) < at + layout.size:
        return None
    number = int(layout.unpack_from(data, at)[0])
    return number if number < 2**63 else None


def _check_values(entries: list[Entry], name: str) -> None:
    text = rest = 0
    for entry in entries:
        if entry.kind == _ASCII or entry.tag == _METADATA:
            text += entry.size
        else:
            rest += entry.size
    for what, size, limit in (
        ("text", text, _MAX_TEXT_BYTES),
        ("values", rest, _MAX_VALUE_BYTES),
    ):
        if size > limit:
            raise RasterTooLarge(
                f"'{name}' has a TIFF directory with {size} bytes of {what}, and the limit is "
                f"{limit}: write the file with larger blocks and less metadata, as with "
                "gdal_translate -of COG"
            )


def _check_mask(numbers: Mapping[int, int], name: str) -> int:
    """Check the blocks of an internal mask, which GDAL does not report.

    Args:
        numbers: numbers of a directory by their tags.
        name: the caller's name for the file.

    Returns:
        Decoded size of one block, bytes; 0 for a directory that is not a mask.

    Raises:
        RasterTooLarge: a block is too large.
    """
    if not numbers.get(_SUBFILE, 0) & _MASK:
        return 0
    width, height = numbers.get(_WIDTH, 0), numbers.get(_HEIGHT, 0)
    columns = numbers.get(_TILE_WIDTH, width)
    rows = numbers.get(_TILE_HEIGHT, min(numbers.get(_ROWS, height), height))
    if rows * columns > MAX_BLOCK_BYTES:
        raise RasterTooLarge(
            f"'{name}': one block of its mask, {rows} x {columns} pixels, decodes to "
            f"{rows * columns} bytes, and the limit is {MAX_BLOCK_BYTES}: write the file in tiles, "
            "as with gdal_translate -of COG"
        )
    return rows * columns


def small(form: Form, entry: Entry, name: str) -> int:
    """The one number of an entry.

    Raises:
        NotAGeoTIFF: the entry has a type that the TIFF specification does not allow for the tag.
            libtiff reads further types, so ignoring them here would leave their numbers unchecked.
    """
    code = _CODES.get(entry.kind)
    if code is None or entry.length != 1 or entry.size > len(entry.field):
        raise NotAGeoTIFF(
            f"'{name}' has a TIFF tag {entry.tag} of type {entry.kind} and count {entry.length}; "
            "the TIFF specification requires one unsigned integer: write the file again"
        )
    return int(struct.unpack_from(form.order + code, entry.field)[0])


def value(file: BinaryIO, form: Form, entry: Entry) -> bytes:
    """An entry's value; empty if it is outside the file."""
    if entry.size <= len(entry.field):
        return entry.field[: entry.size]
    at = _number(form.word, entry.field, 0)
    if at is None:
        return b""
    file.seek(at)
    return file.read(entry.size)


def _check_metadata(xml: bytes, name: str) -> None:
    if _DECLARATION.search(xml):
        raise NotAGeoTIFF(
            f"'{name}' has metadata with a document type or an entity declaration, which the "
            "service does not read: write the file without it, as with gdal_translate -of COG"
        )
    # Character references are resolved first, because GDAL resolves them.
    outside = _OUTSIDE.search(_resolved(xml))
    if outside:
        raise NotAGeoTIFF(
            f"'{name}' names another file in its metadata ({outside[0].decode('ascii')}), and the "
            "service reads only pixels inside the file: write it with gdal_translate -of COG"
        )
    times: Counter[int] = Counter()
    for item in _ITEM.finditer(xml):
        sample = _SAMPLE.search(item[1])
        times[int(sample[1]) if sample else -1] += 1
    most = max(times.values(), default=0)
    if most > _MAX_ITEMS:
        raise RasterTooLarge(
            f"'{name}' has {most} metadata items of one band or of the image, and the limit is "
            f"{_MAX_ITEMS}: write the file without them"
        )


def _resolved(xml: bytes) -> bytes:
    """XML whose numeric character references of ASCII characters are replaced by these."""

    def character(found: re.Match[bytes]) -> bytes:
        number = int(found[1], 16) if found[1] else int(found[2])
        return bytes([number]) if number < 128 else found[0]

    return _REFERENCE.sub(character, xml)
