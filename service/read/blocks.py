"""Remote TIFFs in part: the directories, and the blocks that a window needs, by HTTP ranges.

    first bytes → directories and their values → a local file without blocks → its header
    window → blocks → fetched, appended to the local file, their offsets corrected in it

The local file is a TIFF of the same size, grid and tags, which GDAL reads like the remote file. A
block that was not fetched has an offset after the end of the file, so that reading it is an error
and never returns missing values. The local file has no overviews. Files of other formats are
fetched as a whole.

Several ranges are fetched at once, also of one file. A range that a busy server or a lost
connection did not return is requested again after a pause.

`save` writes what is known of a remote file beside it, from which `load` continues in another
process: its blocks are then fetched when a window is read (`service.read.on_demand`).
"""

from __future__ import annotations

import base64
import io
import json
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO, TypeVar

import anyio
import httpx

from service.errors import BodyTooLarge, PIMCError, UnreachableReference
from service.grid import Window
from service.read.connect import Connections, Remote
from service.read.jp2_guard import SIGNATURE as JP2_SIGNATURE
from service.read.tiff_guard import Entry, Form, directories, small, value
from service.settings import HostRule

FIRST_BYTES = 16 * 2**10
"""Bytes of the first range, which contains the directories of most cloud-optimized GeoTIFFs."""
DESCRIBED = ".remote"
"""Suffix of the description of a remote file, which is stored beside the local file."""
AT_ONCE = 16
"""Number of files and ranges of one request that are fetched at the same time."""
_MAX_RANGE_BYTES = 8 * 2**20
"""Size from which a range takes no further block: parts of a large file are fetched at once."""
_WRITE_BYTES = 2**20
"""Bytes of a range that are received before they are written to the local file."""
_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAX_HEADER_BYTES = 32 * 2**20
_MAX_RANGES = 64
"""Largest number of ranges that are fetched for the directories of one file."""
_MAX_BLOCKS = 2**20
_ATTEMPTS = 3
_PAUSE_SECONDS = 0.5
"""Longest pause before the first repetition; each further pause is twice as long."""
_LONGEST_PAUSE = 10.0
"""Longest pause that `Retry-After` may request, seconds."""
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
Received = TypeVar("Received")


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


class _Busy(UnreachableReference):
    """A server that may return the range later.

    Args:
        detail: message for the client.
        after: value of `Retry-After`; empty without one.
    """

    def __init__(self, detail: str, after: str = "") -> None:
        super().__init__(detail, later=True)
        self.after = float(after) if after.isdecimal() else 0.0


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
    _known: _Known | None = None
    """The bytes of the directories; None if the file was fetched as a whole."""
    _here: set[tuple[int, int]] = field(default_factory=set)
    """Directory and number of each block that is in the local file."""

    @classmethod
    def load(cls, description: Path, path: Path, rules: Sequence[HostRule]) -> RemoteFile:
        """A remote file that was opened before, with a new local file without blocks.

        Args:
            description: file that `save` wrote.
            path: the local file, which is created, or replaced.
            rules: hosts that are allowed now.

        Raises:
            ForbiddenReference: the host is no longer allowed.
            OSError: the description is not there.
        """
        found = json.loads(description.read_bytes())
        known = _Known(
            size=found["size"],
            parts=[(begin, base64.b64decode(data)) for begin, data in found["parts"]],
        )
        remote = Remote.of(found["url"], found["field"], rules)
        opened = cls(
            remote=remote,
            path=path,
            hint=found["hint"],
            images=_images(known, remote.field) or (),
            _tag=found["etag"],
            _known=known,
        )
        opened.empty()
        return opened

    def save(self) -> Path:
        """Write what `load` needs beside the local file; it `can_wait`.

        Returns:
            The description.
        """
        if self._known is None:
            raise TypeError("a file that was fetched as a whole has no description")
        document = {
            "url": str(self.remote.url),
            "field": self.remote.field,
            "hint": self.hint,
            "etag": self._tag,
            "size": self._known.size,
            "parts": [
                (begin, base64.b64encode(data).decode("ascii")) for begin, data in self._known.parts
            ],
        }
        description = self.path.with_suffix(DESCRIBED)
        description.write_text(json.dumps(document), encoding="utf-8")
        return description

    def empty(self) -> None:
        """Write the local file without blocks; open datasets of it must be closed."""
        if self._known is None:
            raise TypeError("a file that was fetched as a whole has no blocks to fetch")
        self._here.clear()
        self._end = max(begin + len(data) for begin, data in self._known.parts)
        _write(self.path, self._known.parts, self.images, self._end)

    @property
    def can_wait(self) -> bool:
        """Whether its blocks may be fetched later.

        It was opened in part, and by its strong ETag a later request finds out that it was
        replaced.
        """
        return not self.whole and _is_strong(self._tag)

    @property
    def whole(self) -> bool:
        """Whether the local file is a copy of the whole remote file."""
        return not self.images

    @property
    def window(self) -> Window:
        """The window of the whole image."""
        return Window(0, 0, self.images[0].width, self.images[0].height)

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
        self.images, self._known = images, known
        await anyio.to_thread.run_sync(self.empty)

    def runs(self, *windows: Window) -> list[_Run]:
        """The ranges with the blocks of windows that are not in the local file yet.

        Adjacent blocks are in one range.
        """
        needed = []
        for image in self.images:
            for index in sorted({n for window in windows for n in image.needed(window)}):
                offset, count = image.offsets.numbers[index], image.counts.numbers[index]
                if offset and count and (image.at, index) not in self._here:
                    needed.append(
                        (max(0, offset - _MARGIN), offset + count + _MARGIN, image, index)
                    )
        runs: list[_Run] = []
        for begin, end, image, index in sorted(needed, key=lambda block: block[:2]):
            joins = runs and begin <= runs[-1].end
            if joins and runs[-1].end - runs[-1].begin < _MAX_RANGE_BYTES:
                last = runs.pop()
                blocks = (*last.blocks, (image, index))
                runs.append(_Run(begin=last.begin, end=max(end, last.end), blocks=blocks))
            else:
                runs.append(_Run(begin=begin, end=end, blocks=((image, index),)))
        return runs

    def fetches(
        self, web: Connections, runs: Sequence[_Run]
    ) -> list[Callable[[], Awaitable[None]]]:
        """Calls that each fetch one range and append it to the local file; see `fetch_windows`.

        They may be awaited at once.
        """
        calls: list[Callable[[], Awaitable[None]]] = []
        for run in runs:
            calls.append(partial(self._fetch, web, run, self._end))
            self._end += run.end - run.begin
        return calls

    async def _fetch(self, web: Connections, run: _Run, begin: int) -> None:
        """Fetch one range and write it to the local file from `begin` on."""
        key = (str(self.remote.url), self._tag, run.begin, run.end)
        kept = web.cache.get(key) if _is_strong(self._tag) else None
        if kept is None:
            await self._retried(partial(self._receive, web, run, begin, key))
        else:
            await anyio.to_thread.run_sync(self._write, [kept], begin)
        await anyio.to_thread.run_sync(self._correct, run, begin)

    async def _receive(
        self, web: Connections, run: _Run, begin: int, key: tuple[object, ...]
    ) -> None:
        size, most = 0, run.end - run.begin
        keeps = _is_strong(self._tag) and most <= web.cache.largest
        whole: list[bytes] = []
        waiting: list[bytes] = []
        async with self._range_response(web, run.begin, run.end) as response:
            self._checked(response, run.begin)
            async for chunk in web.body(response, self.remote, most=most):
                waiting.append(chunk)
                if keeps:
                    whole.append(chunk)
                if sum(map(len, waiting)) >= _WRITE_BYTES:
                    size += await anyio.to_thread.run_sync(self._write, waiting, begin + size)
                    waiting = []
        size += await anyio.to_thread.run_sync(self._write, waiting, begin + size)
        self._check_length(size, most - _MARGIN)
        if keeps:
            web.cache.put(key, b"".join(whole))

    def _write(self, chunks: Sequence[bytes], begin: int) -> int:
        """Write to the local file from `begin` on, and return the number of bytes."""
        with self.path.open("r+b") as file:
            file.seek(begin)
            file.writelines(chunks)
            return file.tell() - begin

    def _correct(self, run: _Run, begin: int) -> None:
        """Write the blocks' offsets in the local file to its directory."""
        with self.path.open("r+b") as file:
            for image, index in run.blocks:
                offset = begin + image.offsets.numbers[index] - run.begin
                file.seek(image.offsets.position(index))
                file.write(struct.pack(image.offsets.code, offset))
                self._here.add((image.at, index))

    def _check_length(self, size: int, least: int) -> None:
        if size < least:
            raise self.remote.unreachable(
                f"returned {size} of {least} requested bytes: send the request again"
            )

    # HTTP ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _range_response(
        self, web: Connections, begin: int, end: int
    ) -> AsyncIterator[httpx.Response]:
        """The response to a request for a range.

        Raises:
            _Busy: the server is busy; see `_retried`.
            UnreachableReference: the host does not respond.
        """
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        async with web.response(self.remote, headers=headers) as response:
            if response.status_code in _AGAIN:
                raise _Busy(
                    self.remote.unreachable(f"returned status {response.status_code}").detail,
                    response.headers.get("retry-after", ""),
                )
            yield response

    async def _retried(self, receive: Callable[[], Awaitable[Received]]) -> Received:
        """What `receive` returns, called again if the server is busy or a connection is lost.

        Raises:
            UnreachableReference: the host does not return it.
        """
        for attempt in range(1, _ATTEMPTS):
            try:
                return await receive()
            except UnreachableReference as error:
                # Another response of the server would be the same.
                if not isinstance(error, _Busy) and not isinstance(
                    error.__cause__, httpx.HTTPError
                ):
                    raise
                pause = _PAUSE_SECONDS * 2 ** (attempt - 1)
                asked = getattr(error, "after", 0.0)
            # A random length, so that the requests that a busy server rejected do not all return
            # at once.
            share = random.uniform(0.5, 1)  # noqa: S311 - no secret
            await anyio.sleep(max(pause * share, min(asked, _LONGEST_PAUSE)))
        return await receive()

    async def _begin(self, web: Connections) -> _Known | None:
        """The first bytes; None if the server returned the whole file, which is then stored."""
        return await self._retried(partial(self._first, web))

    async def _first(self, web: Connections) -> _Known | None:
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
        await self._retried(partial(self._receive_rest, web, known))

    async def _receive_rest(self, web: Connections, known: _Known) -> None:
        first = known.parts[0][1]
        if known.size > len(first) + web.left:
            if not first.startswith(JP2_SIGNATURE):
                raise web.too_large(self.remote)
            raise BodyTooLarge(
                f"{self.remote.field}: '{self.remote.host}' has this file as JPEG 2000, which the "
                f"server can only fetch as a whole ({known.size} bytes), and only {web.left} bytes "
                "of the largest allowed size are left: name the same image as a GeoTIFF, of which "
                "only the area is read (Earth Search and Planetary Computer have Sentinel-2 as "
                "COGs), or request fewer dates"
            )
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
        return await self._retried(partial(self._bytes, web, begin, end))

    async def _bytes(self, web: Connections, begin: int, end: int) -> bytes:
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
            raise self.remote.unreachable(
                f"returned status {status} and not the file: check the URL, or retry later"
            )
        unit, _, rest = response.headers.get("content-range", "").partition(" ")
        span, _, size = rest.partition("/")
        if unit != "bytes" or span.partition("-")[0] != str(begin) or not size.isdecimal():
            raise self.remote.unreachable(
                f"returned a range other than the requested bytes from {begin} on: name a host "
                "that supports ranges"
            )
        tag = response.headers.get("etag", "")
        if self._tag and tag and tag != self._tag:
            raise self.remote.unreachable(
                "replaced the file while it was read; send the request again"
            )
        return int(size)


async def fetch_windows(
    windows: Sequence[tuple[RemoteFile, Window]], web: Connections, field: str
) -> None:
    """Fetch the blocks of windows of several files.

    Args:
        windows: files fetched in part, each with a window of it.
        web: the request's connections.
        field: the parameter that names the files, for messages.

    Raises:
        BodyTooLarge: the blocks have more bytes than may still be received.
        ForbiddenReference: an address or the target of a redirect is not allowed.
        UnreachableReference: a host does not return the blocks.
    """
    needed = [(remote, remote.runs(window)) for remote, window in windows]
    size = size_of(needed)
    if size > web.left:
        raise BodyTooLarge(
            f"{field}: the needed blocks of {len(windows)} files have {size} bytes, and the server "
            f"receives at most {web.left} more (PIMC_MAX_BODY_BYTES): give a smaller bbox or area, "
            "or fewer dates"
        )
    await side_by_side([call for remote, runs in needed for call in remote.fetches(web, runs)])


def size_of(needed: Sequence[tuple[RemoteFile, Sequence[_Run]]]) -> int:
    """Bytes of ranges together."""
    return sum(run.end - run.begin for _, runs in needed for run in runs)


async def side_by_side(works: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Await several calls, at most `AT_ONCE` of them at the same time.

    Raises:
        PIMCError: the error of the first call that fails; the others are cancelled.
    """
    limiter = anyio.CapacityLimiter(AT_ONCE)
    failed: list[PIMCError] = []
    async with anyio.create_task_group() as group:

        async def one(work: Callable[[], Awaitable[None]]) -> None:
            try:
                async with limiter:
                    await work()
            except PIMCError as error:
                failed.append(error)
                group.cancel_scope.cancel()

        for work in works:
            group.start_soon(one, work)
    if failed:
        raise failed[0]


def _is_strong(tag: str) -> bool:
    """Whether an ETag changes with every byte of the file (RFC 9110, 8.8.1)."""
    return bool(tag) and not tag.startswith("W/")


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
