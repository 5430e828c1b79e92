"""Remote TIFFs in part: the directories, and the blocks that a window needs, by HTTP ranges.

    first bytes → directories and their values → a local file without blocks → its header
    window → blocks → fetched, appended to the local file, their offsets corrected in it

The local file is a TIFF of the same size, grid and tags, which GDAL reads like the remote file. A
block that was not fetched has an offset after the end of the file, so that reading it is an error
and never returns missing values. The local file has no overviews. Files of other formats are
fetched as a whole.
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
"""Bytes of the first range, which contains the directories of most cloud-optimized GeoTIFFs."""
_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAX_HEADER_BYTES = 32 * 2**20
_MAX_RANGES = 64
"""Largest number of ranges that are fetched for the directories of one file."""
_MAX_BLOCKS = 2**20
_ATTEMPTS = 3
_PAUSE_SECONDS = 0.5
_AGAIN = frozenset({429, 500, 502, 503, 504})
"""Statuses after which a range is requested again; S3 returns 503 after too many requests."""
_SIGNED = frozenset({401, 403, 409})
"""Statuses of a file that is not public; 409 is Azure's."""
# GDAL reads the 4 bytes before a block of a COG, which are its size, and the 4 bytes after it.
_MARGIN = 4
_SUBFILE, _MASK, _REDUCED = 254, 4, 1
_WIDTH, _HEIGHT, _SAMPLES, _PLANAR = 256, 257, 277, 284
_STRIPS, _ROWS, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 322, 323, 324, 325
_ARRAYS = frozenset({_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES})
_CODES = {4: "I", 16: "Q"}
"""`struct` codes of the types of offsets, by TIFF type; sizes of blocks may also have 16 bits."""
_SIZE_CODES = {3: "H", **_CODES}


@dataclass(frozen=True, kw_only=True)
class _Array:
    """Numbers of one tag, one per block."""

    at: int
    """Position of the first number in the file, bytes."""
    code: str
    """Byte order and type of a number, as a format of `struct`."""
    numbers: tuple[int, ...]

    def position(self, index: int) -> int:
        """Position of a number in the file, bytes."""
        return self.at + index * struct.calcsize(self.code)


@dataclass(frozen=True, kw_only=True)
class _Image:
    """The blocks of one directory."""

    at: int
    """Position of the directory in the file, bytes."""
    link: int
    """Position of the next directory's offset in the file, bytes."""
    word: struct.Struct
    """Format of an offset of a directory."""
    width: int
    height: int
    rows: int
    """Rows of a block."""
    columns: int
    """Columns of a block."""
    planes: int
    """1 if a block contains all bands, else the number of bands."""
    offsets: _Array
    """Offset of each block in the remote file, bytes."""
    counts: _Array
    """Size of each block, bytes."""

    def needed(self, window: Window) -> Iterator[int]:
        """The numbers of the blocks that a window intersects."""
        across, down = -(-self.width // self.columns), -(-self.height // self.rows)
        (top, bottom), (left, right) = window.toranges()
        for plane in range(self.planes):
            for row in range(top // self.rows, -(-bottom // self.rows)):
                for column in range(left // self.columns, -(-right // self.columns)):
                    yield plane * across * down + row * across + column


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A range of bytes that is fetched by one request, and the blocks in it."""

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
    """The fetched bytes of a remote file, as a file that can be read."""

    size: int
    parts: list[tuple[int, bytes]] = field(default_factory=list)
    """Position and content of each fetched range."""
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
        """The next `size` bytes, or all bytes to the end if it is negative.

        Raises:
            _Missing: some of these bytes have not been fetched.
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
    """A file of an allowed host, fetched in part or as a whole."""

    remote: Remote
    path: Path
    """The local file."""
    hint: str
    """Advice if the host does not return the file, for messages."""
    images: tuple[_Image, ...] = ()
    """The full resolution and its mask; empty if the file was fetched as a whole."""
    _end: int = 0
    """Size of the local file, bytes."""
    _tag: str = ""
    """The remote file's ETag; empty if the server sends none."""

    @property
    def whole(self) -> bool:
        """Whether the local file is a copy of the whole remote file."""
        return not self.images

    async def open(self, web: Connections) -> None:
        """Fetch the directories, and write them to the local file.

        Args:
            web: the request's connections.

        Raises:
            ForbiddenReference: an address or the target of a redirect is not allowed.
            UnreachableReference: the host does not return the file.
            BodyTooLarge: the request's files are larger than allowed.
            RasterTooLarge: the directories declare sizes beyond the limits.
            NotAGeoTIFF: the directories contradict the TIFF specification.
        """
        known = await self._begin(web)
        if known is None:
            return
        images: tuple[_Image, ...] | None = None
        for _ in range(_MAX_RANGES):
            try:
                images = _images(known, self.remote.field)
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
        """Number of bytes that `fetch` requests for a window."""
        return sum(run.end - run.begin for run in self._runs(window))

    def _runs(self, window: Window) -> list[_Run]:
        """The ranges with a window's blocks; adjacent blocks are in one range."""
        needed = []
        for image in self.images:
            for index in image.needed(window):
                offset, count = image.offsets.numbers[index], image.counts.numbers[index]
                if offset and count:
                    needed.append(
                        (max(0, offset - _MARGIN), offset + count + _MARGIN, image, index)
                    )
        runs: list[_Run] = []
        for begin, end, image, index in sorted(needed, key=lambda block: block[:2]):
            if runs and begin <= runs[-1].end:
                last = runs.pop()
                blocks = (*last.blocks, (image, index))
                runs.append(_Run(begin=last.begin, end=max(end, last.end), blocks=blocks))
            else:
                runs.append(_Run(begin=begin, end=end, blocks=((image, index),)))
        return runs

    async def fetch(self, web: Connections, window: Window) -> None:
        """Fetch the blocks of a window, and append them to the local file.

        Args:
            web: the request's connections.
            window: a window of the image.

        Raises:
            ForbiddenReference: an address or the target of a redirect is not allowed.
            UnreachableReference: the host does not return the blocks.
            BodyTooLarge: the request's files are larger than allowed.
        """
        for run in self._runs(window):
            async with self._range_response(web, run.begin, run.end) as response:
                self._checked(response, run.begin)
                begin, size = self._end, 0
                async with await anyio.open_file(self.path, "r+b") as file:
                    await file.seek(begin)
                    async for chunk in web.body(response, self.remote, most=run.end - run.begin):
                        await file.write(chunk)
                        size += len(chunk)
            self._check_length(size, run.end - run.begin - _MARGIN)
            self._end += size
            await anyio.to_thread.run_sync(self._correct, run, begin)

    def _correct(self, run: _Run, begin: int) -> None:
        """Write the blocks' offsets in the local file to its directory."""
        with self.path.open("r+b") as file:
            for image, index in run.blocks:
                offset = begin + image.offsets.numbers[index] - run.begin
                file.seek(image.offsets.position(index))
                file.write(struct.pack(image.offsets.code, offset))

    def _check_length(self, size: int, least: int) -> None:
        if size < least:
            raise self.remote.unreachable(f"returned {size} of {least} requested bytes")

    # HTTP ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _range_response(
        self, web: Connections, begin: int, end: int
    ) -> AsyncIterator[httpx.Response]:
        """The response to a request for a range, which is retried if the server is busy."""
        kept = AsyncExitStack()
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            headers = {"Range": f"bytes={begin}-{end - 1}"}
            try:
                async with AsyncExitStack() as stack:
                    response = await stack.enter_async_context(
                        web.response(self.remote, headers=headers)
                    )
                    if last or response.status_code not in _AGAIN:
                        kept = stack.pop_all()
                        break
            except UnreachableReference:
                if last:
                    raise
            await anyio.sleep(_PAUSE_SECONDS * 2**attempt)
        async with kept:
            yield response

    async def _begin(self, web: Connections) -> _Known | None:
        """The first bytes; None if the server returned the whole file, which is then stored."""
        async with self._range_response(web, 0, FIRST_BYTES) as response:
            if response.status_code == HTTPStatus.OK:  # a server without ranges
                await self._save(web, response)
                return None
            known = _Known(size=self._checked(response, 0))
            self._tag = response.headers.get("etag", "")
            most = min(FIRST_BYTES, known.size)
            first = b"".join([c async for c in web.body(response, self.remote, most=most)])
        known.add(0, first)
        if first[:4] not in _MAGICS or len(first) >= known.size:
            await self._rest(web, known)
            return None
        return known

    async def _rest(self, web: Connections, known: _Known) -> None:
        """Fetch the whole file."""
        first = known.parts[0][1]
        if known.size > len(first) + web.left:
            raise web.too_large(self.remote)
        async with AsyncExitStack() as stack:
            response = None
            if len(first) < known.size:
                response = await stack.enter_async_context(
                    self._range_response(web, len(first), known.size)
                )
                self._checked(response, len(first))
            await self._save(web, response, first)

    async def _save(
        self, web: Connections, response: httpx.Response | None, first: bytes = b""
    ) -> None:
        async with await anyio.open_file(self.path, "wb") as file:
            await file.write(first)
            if response is not None:
                async for chunk in web.body(response, self.remote):
                    await file.write(chunk)

    async def _range(self, web: Connections, begin: int, end: int) -> bytes:
        """The bytes of a range of the file."""
        async with self._range_response(web, begin, end) as response:
            self._checked(response, begin)
            chunks = [c async for c in web.body(response, self.remote, most=end - begin)]
        data = b"".join(chunks)
        self._check_length(len(data), end - begin)
        return data

    def _checked(self, response: httpx.Response, begin: int) -> int:
        """Check that a response is the requested range, and return the size of the whole file.

        Raises:
            UnreachableReference: the response is another range, or an error, or the file changed.
        """
        status = response.status_code
        if status in _SIGNED:
            raise self.remote.unreachable(
                f"returned status {status}: the file is not public, and its URL needs a signature "
                f"or a login; {self.hint}"
            )
        if status != HTTPStatus.PARTIAL_CONTENT:
            raise self.remote.unreachable(f"returned status {status}")
        unit, _, rest = response.headers.get("content-range", "").partition(" ")
        span, _, size = rest.partition("/")
        if unit != "bytes" or span.partition("-")[0] != str(begin) or not size.isdecimal():
            raise self.remote.unreachable("returned another range than the requested one")
        tag = response.headers.get("etag", "")
        if self._tag and tag and tag != self._tag:
            raise self.remote.unreachable(
                "replaced the file while it was read; send the request again"
            )
        return int(size)


# Directories ------------------------------------------------------------------------------------


def _images(known: _Known, name: str) -> tuple[_Image, ...] | None:
    """The full resolution and its mask, and every value that their directories point to.

    Returns:
        None if the file is a TIFF of a kind that is fetched as a whole.

    Raises:
        _Missing: bytes of a directory have not been fetched.
        RasterTooLarge: a directory declares sizes beyond the limits.
        NotAGeoTIFF: a directory contradicts the TIFF specification.
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
    start = at + form.length.size + (position + 1) * form.entry.size - form.word.size
    data = value(file, form, entry)
    if len(data) != entry.size:
        return None
    if entry.size > form.word.size:
        (start,) = form.word.unpack(entry.field)
    numbers = struct.unpack(f"{form.order}{entry.length}{code}", data)
    return _Array(at=start, code=form.order + code, numbers=numbers)


def _write(
    path: Path, parts: Sequence[tuple[int, bytes]], images: Sequence[_Image], end: int
) -> None:
    """Write a file with the directories only, whose blocks have offsets after its end."""
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
            # Skip the directories of overviews, whose blocks are never fetched.
            file.seek(image.link)
            file.write(image.word.pack(following.at if following else 0))
        file.truncate(end)
