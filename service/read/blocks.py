"""Remote TIFFs in part: the directory, and the blocks that a window needs, by HTTP ranges.

    first bytes → directories, and what they point to → a local file without blocks → its header
    window → blocks → fetched, appended to the local file, their offsets corrected in it

The local file is a TIFF of the same size, grid and tags, which GDAL reads as it reads the whole
one. A block that was not fetched has an offset behind the end of the file: reading it is an error,
never a missing value. Overviews are left out. Any other file is fetched whole.
"""

from __future__ import annotations

import io
import struct
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

import anyio
import httpx

from service.errors import UnreachableReference
from service.grid import Window
from service.read.connect import Connections, Remote
from service.read.tiff_guard import Entry, Form, directories, small, value

FIRST_BYTES = 16 * 2**10
"""Bytes of the first range, which hold the directories of most cloud-optimized GeoTIFFs."""
_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAX_HEADER_BYTES = 32 * 2**20
_MAX_RANGES = 64
"""Ranges in which the directories of one file must be found."""
_MAX_BLOCKS = 2**20
_ATTEMPTS = 3
_PAUSE_SECONDS = 0.5
_AGAIN = frozenset({429, 500, 502, 503, 504})
"""Statuses after which a range is requested again: S3 returns 503 to too many requests."""
_SIGNED = frozenset({401, 403, 409})
"""Statuses of a file that is not public; 409 is Azure's."""
# GDAL reads the size that stands before a block of a COG, and four bytes behind it.
_MARGIN = 4
_SUBFILE, _MASK, _REDUCED = 254, 4, 1
_WIDTH, _HEIGHT, _SAMPLES, _PLANAR = 256, 257, 277, 284
_STRIPS, _ROWS, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 322, 323, 324, 325
_ARRAYS = frozenset({_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES})
_CODES = {4: "I", 16: "Q"}
"""Types of offsets and sizes of blocks; 16 bits are enough for small files alone."""
_SIZE_CODES = {3: "H", **_CODES}


@dataclass(frozen=True, kw_only=True)
class _Array:
    """Numbers of one tag, one per block."""

    at: int
    """Where they stand in the file."""
    code: str
    """The type of one, as `struct` writes it, byte order included."""
    numbers: tuple[int, ...]

    def place(self, index: int) -> int:
        """Where one number stands in the file."""
        return self.at + index * struct.calcsize(self.code)


@dataclass(frozen=True, kw_only=True)
class _Image:
    """The blocks of one directory."""

    at: int
    """Where the directory begins in the file."""
    link: int
    """Where the place of the next directory stands in it."""
    word: struct.Struct
    """How that place is written."""
    width: int
    height: int
    rows: int
    columns: int
    """Of one block."""
    planes: int
    """1 where a block holds all bands, else the number of bands."""
    offsets: _Array
    counts: _Array

    def needed(self, window: Window) -> Iterator[int]:
        """The positions of the blocks that a window touches."""
        across, down = -(-self.width // self.columns), -(-self.height // self.rows)
        (top, bottom), (left, right) = window.toranges()
        for plane in range(self.planes):
            for row in range(top // self.rows, -(-bottom // self.rows)):
                for column in range(left // self.columns, -(-right // self.columns)):
                    yield plane * across * down + row * across + column


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Bytes that are fetched at once."""

    begin: int
    end: int
    blocks: tuple[tuple[_Image, int], ...]


class _Missing(Exception):
    """Bytes that have not been fetched yet."""

    def __init__(self, begin: int, end: int) -> None:
        super().__init__(begin, end)
        self.begin, self.end = begin, end


@dataclass(kw_only=True)
class _Known(io.RawIOBase):
    """What is known of a remote file, as a file that can be read."""

    size: int
    parts: list[tuple[int, bytes]] = field(default_factory=list)
    """Where each begins, and its bytes."""
    at: int = 0

    def add(self, begin: int, data: bytes) -> None:
        """Add bytes that were fetched."""
        self.parts.append((begin, data))

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to an offset from the beginning."""
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("only from the beginning")
        self.at = offset
        return offset

    def read(self, size: int = -1, /) -> bytes:
        """Bytes from here on.

        Raises:
            _Missing: some of them have not been fetched.
        """
        end = self.size if size < 0 else min(self.at + size, self.size)
        if end <= self.at:
            return b""
        found = bytearray()
        while self.at + len(found) < end:
            here = self.at + len(found)
            part = next((p for p in self.parts if p[0] <= here < p[0] + len(p[1])), None)
            if part is None:
                raise _Missing(here, end)
            begin, data = part
            found += data[here - begin : end - begin]
        self.at = end
        return bytes(found)


@dataclass(kw_only=True)
class RemoteFile:
    """A file of an allowed host, fetched in part or whole."""

    place: Remote
    path: Path
    """The local file."""
    hint: str
    """What to do if the file cannot be had, for messages."""
    images: tuple[_Image, ...] = ()
    """The full resolution and its mask; empty if the local file is the whole one."""
    _end: int = 0
    """Size of the local file."""
    _tag: str = ""
    """The version of the remote file, as its server names it."""

    @property
    def whole(self) -> bool:
        """Whether the local file is the remote one."""
        return not self.images

    async def open(self, web: Connections) -> None:
        """Fetch the directories, and write them into the local file.

        Args:
            web: the request's connections.

        Raises:
            ForbiddenReference, UnreachableReference, BodyTooLarge: the file cannot be had.
            RasterTooLarge, NotAGeoTIFF: its directories claim what no raster needs.
        """
        known = await self._begin(web)
        if known is None:
            return
        images: tuple[_Image, ...] | None = None
        for _ in range(_MAX_RANGES):
            try:
                images = _images(known, self.place.field)
                break
            except _Missing as missing:
                end = min(max(missing.end, missing.begin + FIRST_BYTES), known.size)
                if end - missing.begin > _MAX_HEADER_BYTES:
                    break
                known.add(missing.begin, await self._range(web, missing.begin, end))
        if not images:
            await self._rest(web, known)
            return
        self.images = images
        self._end = max(begin + len(data) for begin, data in known.parts)
        await anyio.to_thread.run_sync(_write, self.path, known.parts, images, self._end)

    def cost(self, window: Window) -> int:
        """Bytes that the blocks of a window have."""
        return sum(run.end - run.begin for run in self._runs(window))

    def _runs(self, window: Window) -> list[_Run]:
        """The ranges that hold a window's blocks; neighbours in one."""
        wanted = []
        for image in self.images:
            for index in image.needed(window):
                offset, count = image.offsets.numbers[index], image.counts.numbers[index]
                if offset and count:
                    wanted.append(
                        (max(0, offset - _MARGIN), offset + count + _MARGIN, image, index)
                    )
        runs: list[_Run] = []
        for begin, end, image, index in sorted(wanted, key=lambda one: one[:2]):
            if runs and begin <= runs[-1].end:
                last = runs.pop()
                blocks = (*last.blocks, (image, index))
                runs.append(_Run(begin=last.begin, end=max(end, last.end), blocks=blocks))
            else:
                runs.append(_Run(begin=begin, end=end, blocks=((image, index),)))
        return runs

    async def fetch(self, web: Connections, window: Window) -> None:
        """Fetch the blocks that a window needs, and put them into the local file.

        Args:
            web: the request's connections.
            window: whole pixels inside the image.

        Raises:
            ForbiddenReference, UnreachableReference, BodyTooLarge: the blocks cannot be had.
        """
        for run in self._runs(window):
            async with self._answer(web, run.begin, run.end) as answer:
                self._checked(answer, run.begin)
                begin, size = self._end, 0
                async with await anyio.open_file(self.path, "r+b") as file:
                    await file.seek(begin)
                    async for chunk in web.body(answer, self.place, most=run.end - run.begin):
                        await file.write(chunk)
                        size += len(chunk)
            self._check_length(size, run.end - run.begin - _MARGIN)
            self._end += size
            await anyio.to_thread.run_sync(self._correct, run, begin)

    def _correct(self, run: _Run, begin: int) -> None:
        """Write where the blocks of a run lie in the local file."""
        with self.path.open("r+b") as file:
            for image, index in run.blocks:
                offset = begin + image.offsets.numbers[index] - run.begin
                file.seek(image.offsets.place(index))
                file.write(struct.pack(image.offsets.code, offset))

    def _check_length(self, size: int, least: int) -> None:
        if size < least:
            raise self.place.unreachable(f"returned {size} of {least} bytes asked for")

    # HTTP ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _answer(
        self, web: Connections, begin: int, end: int
    ) -> AsyncIterator[httpx.Response]:
        """The response to a range; asked for again if the server is busy."""
        kept = AsyncExitStack()
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            headers = {"Range": f"bytes={begin}-{end - 1}"}
            try:
                async with AsyncExitStack() as stack:
                    answer = await stack.enter_async_context(
                        web.response(self.place, headers=headers)
                    )
                    if last or answer.status_code not in _AGAIN:
                        kept = stack.pop_all()
                        break
            except UnreachableReference:
                if last:
                    raise
            await anyio.sleep(_PAUSE_SECONDS * 2**attempt)
        async with kept:
            yield answer

    async def _begin(self, web: Connections) -> _Known | None:
        """The first bytes; None if the file was written whole."""
        async with self._answer(web, 0, FIRST_BYTES) as answer:
            if answer.status_code == HTTPStatus.OK:  # a server without ranges
                await self._save(web, answer)
                return None
            known = _Known(size=self._checked(answer, 0))
            self._tag = answer.headers.get("etag", "")
            most = min(FIRST_BYTES, known.size)
            first = b"".join([c async for c in web.body(answer, self.place, most=most)])
        known.add(0, first)
        if first[:4] not in _MAGICS or len(first) >= known.size:
            await self._rest(web, known)
            return None
        return known

    async def _rest(self, web: Connections, known: _Known) -> None:
        """Fetch the whole file."""
        first = known.parts[0][1]
        if known.size > len(first) + web.left:
            raise web.too_large(self.place)
        async with AsyncExitStack() as stack:
            answer = None
            if len(first) < known.size:
                answer = await stack.enter_async_context(self._answer(web, len(first), known.size))
                self._checked(answer, len(first))
            await self._save(web, answer, first)

    async def _save(
        self, web: Connections, answer: httpx.Response | None, first: bytes = b""
    ) -> None:
        async with await anyio.open_file(self.path, "wb") as file:
            await file.write(first)
            if answer is not None:
                async for chunk in web.body(answer, self.place):
                    await file.write(chunk)

    async def _range(self, web: Connections, begin: int, end: int) -> bytes:
        """Some bytes of the file."""
        async with self._answer(web, begin, end) as answer:
            self._checked(answer, begin)
            chunks = [c async for c in web.body(answer, self.place, most=end - begin)]
        data = b"".join(chunks)
        self._check_length(len(data), end - begin)
        return data

    def _checked(self, answer: httpx.Response, begin: int) -> int:
        """The size of the file, if the answer is the range asked for.

        Raises:
            UnreachableReference: it is not.
        """
        status = answer.status_code
        if status in _SIGNED:
            raise self.place.unreachable(
                f"does not give this file to everybody (status {status}): its URL needs a "
                f"signature or a login; {self.hint}"
            )
        if status != HTTPStatus.PARTIAL_CONTENT:
            raise self.place.unreachable(f"returned status {status}")
        unit, _, rest = answer.headers.get("content-range", "").partition(" ")
        span, _, size = rest.partition("/")
        if unit != "bytes" or span.partition("-")[0] != str(begin) or not size.isdecimal():
            raise self.place.unreachable("returned another range than the one asked for")
        tag = answer.headers.get("etag", "")
        if self._tag and tag and tag != self._tag:
            raise self.place.unreachable(
                "replaced the file while it was read; send the request again"
            )
        return int(size)


# Directories ------------------------------------------------------------------------------------


def _images(known: _Known, name: str) -> tuple[_Image, ...] | None:
    """The full resolution and its mask, and every value that their directories point to.

    Returns:
        None if the file is a TIFF of a kind that is fetched whole.

    Raises:
        _Missing: bytes of a directory have not been fetched.
        RasterTooLarge, NotAGeoTIFF: a directory claims what no raster needs.
    """
    known.seek(0)
    images: list[_Image] = []
    file: BinaryIO = known  # type: ignore[assignment] # it reads and seeks, which is all
    for at, form, entries in directories(file, name):
        kinds = [small(form, entry, name) for entry in entries if entry.tag == _SUBFILE]
        kind = kinds[0] if kinds else 0
        if (images and not kind & _MASK) or kind & _REDUCED:
            continue
        image = _image(file, at, form, entries, name)
        if image is None:
            return None
        images.append(image)
        for entry in entries:
            if entry.tag not in _ARRAYS:
                value(file, form, entry)
    return tuple(images) or None


def _image(
    file: BinaryIO, at: int, form: Form, entries: Sequence[Entry], name: str
) -> _Image | None:
    by_tag = {entry.tag: (n, entry) for n, entry in enumerate(entries)}

    def number(tag: int, default: int = 0) -> int:
        return small(form, by_tag[tag][1], name) if tag in by_tag else default

    tiled = _TILES in by_tag
    width, height = number(_WIDTH), number(_HEIGHT)
    rows = number(_TILE_HEIGHT) if tiled else min(number(_ROWS, height), height)
    columns = number(_TILE_WIDTH) if tiled else width
    if not (width and height and rows and columns):
        return None
    planes = number(_SAMPLES, 1) if number(_PLANAR, 1) == 2 else 1
    found = [
        _array(file, at, form, by_tag.get(tag), codes)
        for tag, codes in (
            (_TILES if tiled else _STRIPS, _CODES),
            (_TILE_BYTES if tiled else _STRIP_BYTES, _SIZE_CODES),
        )
    ]
    blocks = -(-width // columns) * -(-height // rows) * planes
    offsets, counts = found
    if offsets is None or counts is None:
        return None
    if min(len(offsets.numbers), len(counts.numbers)) < blocks:
        return None
    return _Image(
        at=at,
        link=at + form.length.size + len(entries) * form.entry.size,
        word=form.word,
        width=width,
        height=height,
        rows=rows,
        columns=columns,
        planes=planes,
        offsets=offsets,
        counts=counts,
    )


def _array(
    file: BinaryIO,
    at: int,
    form: Form,
    found: tuple[int, Entry] | None,
    codes: Mapping[int, str],
) -> _Array | None:
    position, entry = found or (0, None)
    code = codes.get(entry.kind) if entry else None
    if entry is None or code is None or entry.length > _MAX_BLOCKS:
        return None
    # The value's field is the last of an entry.
    place = at + form.length.size + (position + 1) * form.entry.size - form.word.size
    data = value(file, form, entry)
    if len(data) != entry.size:
        return None
    if entry.size > form.word.size:
        (place,) = form.word.unpack(entry.field)
    numbers = struct.unpack(f"{form.order}{entry.length}{code}", data)
    return _Array(at=place, code=form.order + code, numbers=numbers)


def _write(
    path: Path, parts: Sequence[tuple[int, bytes]], images: Sequence[_Image], end: int
) -> None:
    """Write a file of directories alone, whose blocks lie behind its end."""
    with path.open("wb") as file:
        for begin, data in parts:
            file.seek(begin)
            file.write(data)
        for image, following in zip(images, [*images[1:], None], strict=True):
            code = image.offsets.code
            nowhere = 2**32 - 2 if struct.calcsize(code) == 4 else 2**62
            numbers = [
                nowhere if offset and count else 0
                for offset, count in zip(image.offsets.numbers, image.counts.numbers, strict=False)
            ]
            file.seek(image.offsets.at)
            file.write(struct.pack(f"{code[0]}{len(numbers)}{code[1]}", *numbers))
            # Overviews are left out: their blocks are not there.
            file.seek(image.link)
            file.write(image.word.pack(following.at if following else 0))
        file.truncate(end)
