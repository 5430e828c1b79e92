"""Vector guard: limits on GeoPackage and GeoParquet files, checked before GDAL and Arrow read them.

A file of a few kilobytes can hold far more: a view of a GeoPackage that never ends, a generated
column or a default that every row repeats, pages of a Parquet file that decompress a thousandfold,
a dictionary whose longest text every row names, or a geometry whose parts nest until the stack
overflows. This module checks the declarations and the structure; GDAL, Arrow and GEOS reject files
with other faults.
"""

from __future__ import annotations

import mmap
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import pyarrow.parquet

from service.errors import NotAVectorFile, TooManyFields, shown

MAX_DECODED_BYTES = 512 * 2**20
"""Largest size of a GeoPackage, and of the decoded columns of a GeoParquet file, bytes."""
MAX_PROPERTIES = 500
"""Largest number of columns of a GeoParquet file."""
_BATCH_BYTES = 128 * 2**20
"""Memory up to which rows of a GeoParquet file are decoded at once, bytes."""
_MAX_VALUES = 2**24
"""Largest number of values of all columns of a GeoParquet file: a list may repeat in every row."""

_MAX_TABLES = 1_000
_MAX_DEFAULT = 1_000
"""Largest number of characters of a column's default, which every row without a value repeats."""
_MAX_CELL_BYTES = 64 * 2**20
_MAX_STEPS = 10**9
"""Steps of SQLite's virtual machine that a check may take."""
_STEPS_AT_ONCE = 10**6
_GENERATED = frozenset({2, 3})
"""Values of `hidden` in `PRAGMA table_xinfo` of generated columns."""

_MAX_HEADER_BYTES = 2**20
_DICTIONARY_PAGE = 2
_DELTA_BYTE_ARRAY = 7
_VARIABLE_LENGTH = frozenset({"BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"})


def check_geopackage(path: Path, name: str) -> None:
    """Reject a GeoPackage that may expand to more data than the size of its file.

    Every page must belong to one table (`PRAGMA quick_check`), so that the rows that GDAL reads
    take no more than the file.

    Args:
        path: the file, an SQLite database.
        name: the caller's name for the file.

    Raises:
        TooManyFields: the file is too large.
        NotAVectorFile: the database is damaged, or holds what GDAL would compute: a view, a virtual
            table other than a spatial index, a generated column or a long default.
    """
    size = path.stat().st_size
    if size > MAX_DECODED_BYTES:
        raise TooManyFields(
            f"'{name}' is a GeoPackage of {size} bytes, and the limit is {MAX_DECODED_BYTES}: send "
            "its features in several requests"
        )
    try:
        # `immutable`: neither locks nor files beside it.
        uri = f"file:{quote(str(path))}?mode=ro&immutable=1"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            _check_schema(database, name)
    except (sqlite3.Error, OverflowError, ValueError) as error:
        raise NotAVectorFile(
            f"'{name}' cannot be read as a GeoPackage: export the layer to a new file"
        ) from error


def _check_schema(database: sqlite3.Connection, name: str) -> None:
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_CELL_BYTES)
    left = _MAX_STEPS // _STEPS_AT_ONCE

    def stop() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    database.set_progress_handler(stop, _STEPS_AT_ONCE)
    database.execute("PRAGMA trusted_schema = OFF")
    database.execute("PRAGMA ignore_check_constraints = ON")  # they may call any function
    schema = database.execute("SELECT type, name, sql FROM sqlite_master").fetchmany(
        4 * _MAX_TABLES
    )
    tables = []
    for kind, one, sql in schema:
        if kind == "view":
            _reject(name, f"the view '{shown(one)}'")
        if kind != "table":
            continue
        words = str(sql).split(maxsplit=6)
        if [word.upper() for word in words[:2]] != ["CREATE", "VIRTUAL"]:
            tables.append(one)
        elif "RTREE" not in str(sql).upper():
            _reject(name, f"the virtual table '{shown(one)}'")
    if len(tables) > _MAX_TABLES:
        _reject(name, f"more than {_MAX_TABLES} tables")
    for table in tables:
        for column in database.execute("SELECT * FROM pragma_table_xinfo(?)", (table,)):
            _, label, _, _, default, _, hidden = column
            what = f"of the column '{shown(label)}' of the table '{shown(table)}'"
            if hidden in _GENERATED:
                _reject(name, f"the generated values {what}")
            if default is not None and len(str(default)) > _MAX_DEFAULT:
                _reject(name, f"a long default {what}")
    (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise NotAVectorFile(f"'{name}' is a damaged GeoPackage: export the layer to a new file")


def _reject(name: str, what: str) -> NoReturn:
    raise NotAVectorFile(
        f"'{name}' holds {what}, which the service does not read: export the layer to a new file"
    )


def rows_at_once(path: Path, name: str, file: pyarrow.parquet.ParquetFile) -> int:
    """How many rows of a GeoParquet file may be decoded at once, from the headers of its pages.

    The sizes in the file's footer are not trusted: Arrow allocates what the pages state.

    Args:
        path: the file.
        name: the caller's name for the file.
        file: the same file, of which no column has been read.

    Raises:
        NotAVectorFile: the file decodes to too many bytes or values, has too many columns, or its
            pages cannot be followed.
    """
    metadata = file.metadata
    if metadata.num_columns > MAX_PROPERTIES:
        raise NotAVectorFile(
            f"'{name}' has {metadata.num_columns} columns, and the limit is {MAX_PROPERTIES}: "
            "leave out properties"
        )
    if metadata.num_rows == 0:
        return 1
    total = values = 0
    longest = [0] * metadata.num_columns
    nested = 0
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                chunk = _chunk(data, column, name)
                total += chunk.size
                values += chunk.values
                if column.physical_type not in _VARIABLE_LENGTH:
                    continue
                longest[number] = max(longest[number], chunk.longest)
                if file.schema.column(number).max_definition_level > 1:
                    nested += chunk.longest * chunk.values
    for what, found, limit in (
        ("bytes", total, MAX_DECODED_BYTES),
        ("values", values, _MAX_VALUES),
        ("bytes in lists and objects", nested, MAX_DECODED_BYTES),
    ):
        if found > limit:
            raise NotAVectorFile(
                f"'{name}' decodes to {found} {what}, and the limit is {limit}: leave out "
                "properties, or send the features in several requests"
            )
    return max(1, min(int(metadata.num_rows), _BATCH_BYTES // max(1, sum(longest))))


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A column of a row group, as its pages state it."""

    size: int
    """Decompressed bytes of all pages."""
    values: int
    longest: int
    """Upper limit of the length of a value that takes less in the file than decoded, bytes; 0 if
    every value takes its own length."""


def _chunk(data: mmap.mmap, column: Any, name: str) -> _Chunk:  # noqa: ANN401 - has no types
    at = column.data_page_offset
    if column.dictionary_page_offset:
        at = min(at, column.dictionary_page_offset)
    size = values = longest = 0
    try:
        for page in _pages(data, at, at + column.total_compressed_size):
            decoded = page[2]
            size += decoded
            data_page = page.get(5) or page.get(8) or {}
            values += data_page.get(1, 0)
            encoding = data_page.get(2 if 5 in page else 4)
            if page[1] == _DICTIONARY_PAGE or encoding == _DELTA_BYTE_ARRAY:
                longest = max(longest, decoded)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotAVectorFile(
            f"'{name}' cannot be read as GeoParquet: export the layer to a new file"
        ) from error
    return _Chunk(size=size, values=values, longest=longest)


def _pages(data: mmap.mmap, at: int, end: int) -> Iterator[dict[int, Any]]:
    """The headers of the pages between two positions.

    Raises:
        ValueError: they cannot be followed.
        KeyError: a header states no size.
    """
    if not 0 <= at <= end <= len(data):
        raise ValueError("outside the file")
    while at < end:
        page, at = _Thrift(data, at).page()
        if min(page[2], page[3]) < 0:
            raise ValueError("a negative size")
        yield page
        at += page[3]


class _Thrift:
    """Reader of the headers of Parquet's pages, in Thrift's compact protocol.

    Args:
        data: the file.
        at: position of the header.
    """

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self._data = data
        self._at = at
        self._end = min(at + _MAX_HEADER_BYTES, len(data))

    def page(self) -> tuple[dict[int, Any], int]:
        """The fields of the header by number, and the position behind it.

        Raises:
            ValueError: the header is not valid, or too long.
        """
        return self._struct(4), self._at

    def _byte(self) -> int:
        if self._at >= self._end:
            raise ValueError("a header that does not end")
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("a number of more than 64 bits")

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _struct(self, depth: int) -> dict[int, Any]:
        if depth == 0:
            raise ValueError("a header that nests too deep")
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            found[number] = self._value(head & 15, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:  # noqa: ANN401 - by its kind
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (3, 7, 8):  # a byte, a double, bytes
            length = {3: 1, 7: 8}.get(kind) or self._varint()
            self._at += length
            return None
        if kind in (9, 10) and depth:
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            inner = head & 15
            for _ in range(count):
                self._value(3 if inner in (1, 2) else inner, depth - 1)
                if self._at > self._end:
                    raise ValueError("a list that does not end")
            return None
        if kind == 12:
            return self._struct(depth - 1)
        raise ValueError(f"a value of type {kind}")


def polygons_or_points(shapes: Sequence[bytes | None]) -> Iterator[bytes | None]:
    """Well-known binary of points and polygons, single or multiple; None for every other shape.

    GEOS reads the parts of a shape by recursion without a limit, so that parts that nest a hundred
    thousand times would end the process.
    """
    for shape in shapes:
        yield shape if isinstance(shape, bytes) and _is_flat(shape) else None


_POINT, _POLYGON = 1, 3
_PARTS = {4: _POINT, 6: _POLYGON}
_Z, _M, _SRID = 0x80000000, 0x40000000, 0x20000000
_LEAST_POINTS = 4


def _is_flat(shape: bytes) -> bool:
    try:
        kind, _, order, at = _head(shape, 0)
        if kind in (_POINT, _POLYGON):
            return True
        part = _PARTS[kind]
        (count,) = struct.unpack_from(f"{order}I", shape, at)
        at += 4
        for _ in range(count):
            found, dimensions, order, at = _head(shape, at)
            if found != part:
                return False
            if part == _POINT:
                at += 8 * dimensions
                continue
            (rings,) = struct.unpack_from(f"{order}I", shape, at)
            at += 4
            for _ in range(rings):
                (points,) = struct.unpack_from(f"{order}I", shape, at)
                if points < _LEAST_POINTS:
                    return False
                at += 4 + 8 * dimensions * points
    except (struct.error, KeyError, IndexError):
        return False
    return at <= len(shape)


def _head(shape: bytes, at: int) -> tuple[int, int, str, int]:
    """Kind, number of dimensions and byte order of a shape, and the position behind them."""
    order = {0: ">", 1: "<"}[shape[at]]
    (code,) = struct.unpack_from(f"{order}I", shape, at + 1)
    at += 9 if code & _SRID else 5
    thousands, kind = divmod(code & ~(_Z | _M | _SRID), 1000)
    # ISO adds 1000 for Z, 2000 for M and 3000 for both; the extended form has bits.
    z, m = bool(code & _Z) or thousands in (1, 3), bool(code & _M) or thousands in (2, 3)
    return kind, 2 + z + m, order, at
