"""Upload parsing: multipart forms streamed to disk, JSON bodies, size and idle limits."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

import anyio
from anyio import to_thread
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from service.api.admission import Admitted
from service.errors import BodyTooLarge, InvalidRequest, UnsupportedMedia, shown
from service.json_memory import parsed_bytes
from service.read.geotiff import SourceFile, label, side_file

FORM = "multipart/form-data"
JSON = "application/json"
FILES = "files"
FIELDS = "fields"
"""The part that holds polygons: a file, or text."""
LABELS = "labels"
"""The part that holds labels: a file, or text."""
_BATCH_BYTES = 2**21
"""Bytes that are read before they are parsed: each switch to the parsing thread takes 0.2 ms."""
_CHUNK_BYTES = 2**11
"""Smallest size for which a chunk counts: a chunk of one byte takes 40 bytes of memory."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request body."""

    body_bytes: int
    """Largest size of a body of any type, bytes."""
    json_bytes: int = 32 * 2**20
    """Largest size of a JSON body, which is kept in memory, bytes."""
    field_bytes: int = 8 * 2**20
    """Largest size of all parameters of a form together, which are kept in memory, bytes."""
    fields: int = 2_000
    """Largest number of parameters of a form, counting each repetition."""
    files: int = 2_000
    """Largest number of GeoTIFFs."""
    seconds: float = 60.0
    """Seconds over which an upload must keep `rate`: a body of n bytes takes at most
    `seconds + n / rate`."""
    rate: float = 2.0**14
    """Bytes per second that an upload must keep."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A parsed multipart body."""

    files: tuple[SourceFile, ...]
    """The parts named `files`, in the order of the body, each a file on disk."""
    fields: Mapping[str, tuple[str, ...]]
    """Values of every other part, by name, in the order of the body."""
    vectors: Mapping[str, SourceFile] = field(default_factory=dict)
    """Parts with points or polygons that were sent as files, by name."""

    @property
    def text_size(self) -> int:
        """Number of characters of all values."""
        return sum(len(text) for texts in self.fields.values() for text in texts)


def media_type(request: Request) -> str:
    """The body's media type without parameters: `FORM` or `JSON`.

    Raises:
        UnsupportedMedia: the body has another type or no type, or is compressed.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMedia(
            f"the body has Content-Encoding '{shown(encoding)}', but only 'identity' is supported: "
            "send the body without compression"
        )
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind not in {FORM, JSON}:
        found = f"Content-Type '{shown(kind)}'" if kind else "no Content-Type"
        raise UnsupportedMedia(f"the body has {found}: send {FORM} or {JSON}")
    return kind


async def read_json(request: Request, limits: Limits, admitted: Admitted) -> bytes:
    """Read a JSON body without parsing it.

    Args:
        request: the request, whose body has not been read.
        limits: limits of the body.
        admitted: the admitted request, which counts the bytes.

    Raises:
        BodyTooLarge: the body exceeds the limit for JSON or for any body, or needs more memory
            once parsed than a caller may use.
        BodyStalled: the upload was too slow.
        Overloaded: the body exceeds the space for bodies.
    """
    limit = min(limits.json_bytes, limits.body_bytes)
    body = bytearray()
    async for batch in _batches(request, limit, limits, admitted, in_memory=True):
        for chunk in batch:
            body += chunk
    text = bytes(body)
    await reserve_parsed(text, admitted)
    return text


async def reserve_parsed(text: bytes, admitted: Admitted) -> None:
    """Reserve the memory that a JSON text takes once parsed.

    Args:
        text: the text.
        admitted: the admitted request.

    Raises:
        BodyTooLarge: it takes more memory than a caller may use.
        Overloaded: it exceeds the space for bodies.
    """
    admitted.reserve(await to_thread.run_sync(parsed_bytes, text, limiter=admitted.intake))


async def read_form(
    request: Request, folder: Path, limits: Limits, admitted: Admitted, vector: str = FIELDS
) -> Form:
    """Stream a multipart body to files in `folder`.

    Args:
        request: the request, of type multipart/form-data, whose body has not been read.
        folder: an empty folder, which the calling function removes.
        limits: limits of the body.
        admitted: the admitted request, which counts the bytes.
        vector: name of the part that may be a file of points or polygons.

    Raises:
        BodyTooLarge: the body exceeds the limit, whatever `Content-Length` states, or its
            parameters need more memory once parsed than a caller may use.
        BodyStalled: the upload was too slow.
        Overloaded: the body exceeds the space for bodies.
        InvalidRequest: the form is not valid, or has too many parts or an empty file.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if not boundary:
        raise InvalidRequest(
            f"Content-Type is {FORM} without a boundary: let the HTTP client set the header itself"
        )
    reader = _FormReader(boundary, folder, limits, vector)
    try:
        async for batch in _batches(request, limits.body_bytes, limits, admitted):
            await to_thread.run_sync(reader.feed, batch, limiter=admitted.intake)
        form = await to_thread.run_sync(reader.finish, limiter=admitted.intake)
        parsed = {name: texts for name, texts in form.fields.items() if name != vector}
        size = await to_thread.run_sync(_parsed_fields, parsed, limiter=admitted.intake)
        admitted.reserve(size)
        return form
    finally:
        reader.close()


def _parsed_fields(fields: Mapping[str, Sequence[str]]) -> int:
    """Memory that the parameters of a form take once parsed, bytes; some are JSON."""
    return sum(parsed_bytes(text.encode()) for values in fields.values() for text in values)


async def _batches(
    request: Request, limit: int, limits: Limits, admitted: Admitted, *, in_memory: bool = False
) -> AsyncIterator[list[bytes]]:
    """Read the body in batches of about `_BATCH_BYTES`; check its size and rate."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(announced, limit)
    chunks = request.stream()
    batch: list[bytes] = []  # not joined: copying would take as long as parsing
    total = held = 0
    enough = 0.0
    until = anyio.current_time()
    while True:
        if total >= enough:
            enough = total + limits.rate * limits.seconds
            until = anyio.current_time() + limits.seconds
        if admitted.given_up:
            raise admitted.too_slow(limits.seconds)
        with anyio.CancelScope(deadline=until) as admitted.waiting:
            chunk = await anext(chunks, None)
        if admitted.waiting.cancelled_caught:
            raise admitted.too_slow(limits.seconds)
        if chunk is None:
            break
        total += len(chunk)
        if total > limit:
            raise _too_large(f"more than {limit}", limit)
        admitted.received(len(chunk), in_memory=in_memory)
        batch.append(chunk)
        held += max(len(chunk), _CHUNK_BYTES)
        if held >= _BATCH_BYTES:
            paused = anyio.current_time()
            yield batch
            batch, held = [], 0
            # The time that the server takes to write does not count for the client's rate.
            until += anyio.current_time() - paused
            admitted.paused(anyio.current_time() - paused)
    admitted.uploaded()
    if batch:
        yield batch


def _too_large(size: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body has {size} bytes, and at most {limit} are allowed: send a smaller area or fewer "
        "files, or name the files with 'items'"
    )


@dataclass(kw_only=True)
class _Part:
    """The part that is being read."""

    name: str = ""
    value: bytearray = field(default_factory=bytearray)
    file: BinaryIO | None = None
    """File on disk to which the part is written; None for a parameter."""
    size: int = 0
    """Bytes of the file so far."""


class _FormReader:
    """Parses a multipart body; the parser calls a method at each boundary.

    Args:
        boundary: boundary of the parts, from `Content-Type`.
        folder: folder for files.
        limits: limits of the body.
        vector: name of the part that may be a file of points or polygons.
    """

    def __init__(self, boundary: bytes, folder: Path, limits: Limits, vector: str) -> None:
        self._folder = folder
        self._limits = limits
        self._vector = vector
        self._files: list[SourceFile] = []
        self._vectors: dict[str, SourceFile] = {}
        self._fields: dict[str, list[str]] = {}
        self._field_count = self._field_bytes = 0
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._part = _Part()
        self._ended = False
        with _well_formed():
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._open_part,
                    "on_part_data": self._data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )

    def feed(self, chunks: Iterable[bytes]) -> None:
        """Parse the next bytes."""
        with _well_formed():
            for chunk in chunks:
                self._parser.write(chunk)

    def finish(self) -> Form:
        """The form, after every byte has been parsed.

        Raises:
            InvalidRequest: the body is incomplete.
        """
        with _well_formed():
            self._parser.finalize()
        if not self._ended:
            raise InvalidRequest(
                "the body ends before the closing boundary of the form: the upload was cut off, or "
                "Content-Type states another boundary than the body"
            )
        fields = {name: tuple(values) for name, values in self._fields.items()}
        return Form(files=tuple(self._files), fields=fields, vectors=self._vectors)

    def close(self) -> None:
        """Close an unfinished file."""
        if self._part.file is not None:
            self._part.file.close()

    def _begin_part(self) -> None:
        self._part = _Part()
        self._disposition = b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _end_header(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def _open_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidRequest(
                "a part of the form has no name in its Content-Disposition: give each part a name, "
                f"'{FILES}' for GeoTIFFs"
            )
        self._part.name = _decoded(options[b"name"])
        filename = _filename(self._disposition, options)
        if self._part.name == FILES:
            self._open_file(filename)
            return
        if self._part.name == self._vector and filename is not None:
            self._open_vector(filename)
            return
        if filename is not None and names_a_raster(self._part.name, filename):
            raise InvalidRequest.of(
                label(self._part.name, 0),
                f"unknown parameter; '{label(filename, 0)}' and every other raster go into the "
                f"parameter '{FILES}', repeated for each file",
            )
        self._field_count += 1
        if self._field_count > self._limits.fields:
            raise InvalidRequest(
                f"the form has more than {self._limits.fields} parameters, the largest allowed "
                "number; GeoTIFFs do not count, but must be sent as files"
            )

    def _open_file(self, filename: str | None) -> None:
        if filename is None:
            raise InvalidRequest.of(
                FILES, "a part has no file name: send each GeoTIFF as a file with its name"
            )
        position = len(self._files)
        if position >= self._limits.files:
            raise InvalidRequest.of(
                FILES,
                f"more than {self._limits.files} files, the largest allowed number: send several "
                "bands or dates in one file, or a shorter series",
            )
        path = self._folder / f"{position:04d}.tif"
        self._files.append(SourceFile(name=label(filename, position), path=path))
        self._part.file = path.open("xb")

    def _open_vector(self, filename: str) -> None:
        if self._vector in self._vectors:
            raise InvalidRequest.of(
                self._vector, "sent as a file twice: send one file with all points or polygons"
            )
        path = self._folder / f"{self._vector}.bin"
        self._vectors[self._vector] = SourceFile(name=label(filename, 0), path=path)
        self._part.file = path.open("xb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.file is not None:
            part.size += end - start
            part.file.write(memoryview(data)[start:end])
            return
        self._field_bytes += end - start
        if self._field_bytes > self._limits.field_bytes:
            raise InvalidRequest.of(
                label(part.name, 0),
                f"all parameters together have more than {self._limits.field_bytes} bytes, the "
                f"largest allowed size: send GeoTIFFs as '{FILES}', and polygons as a file",
            )
        part.value += data[start:end]

    def _end_part(self) -> None:
        part = self._part
        if part.file is None:
            self._fields.setdefault(part.name, []).append(_decoded(bytes(part.value)))
            return
        part.file.close()
        last = self._files[-1] if part.name == FILES else self._vectors[part.name]
        if part.size == 0 and (part.name != FILES or side_file(last) is None):
            raise InvalidRequest.of(
                part.name, f"'{last.name}' is empty (0 bytes): export the file again"
            )

    def _end(self) -> None:
        self._ended = True


@contextmanager
def _well_formed() -> Iterator[None]:
    """Translate the parser's errors to `InvalidRequest`."""
    try:
        yield
    except FormParserError as error:
        raise InvalidRequest(f"the body is not a well-formed multipart form: {error}") from error


# RFC 8187 (obsoletes RFC 5987): charset'language'percent-encoded.
_EXTENDED = re.compile(
    rb"""filename\*\s*=\s*"?([A-Za-z0-9!#$%&+^_`{}~-]+)'[^']*'([^;"\s]*)""", re.IGNORECASE
)
_RASTER_NAME = re.compile(r"\.(tiff?|jp2|zip|img|nc|vrt|safe)$", re.IGNORECASE)
_MEANS_FILES = re.compile(
    r"(files?|images?|rasters?|tiffs?|geotiffs?|uploads?|data|stack|scenes?)(\[\d*\])?",
    re.IGNORECASE,
)


def names_a_raster(name: str, filename: str) -> bool:
    """Whether a part that is not named `files` is probably meant to be one of the files."""
    return bool(_RASTER_NAME.search(filename) or _MEANS_FILES.fullmatch(name))


def _filename(disposition: bytes, options: Mapping[bytes, bytes]) -> str | None:
    """The name of a part's file: `filename*` (RFC 8187) before `filename`; None for a text part.

    Some clients write `filename` as an encoded word (RFC 2047), which is decoded too.
    """
    extended = _EXTENDED.search(disposition)
    if extended:
        charset, value = extended[1].decode("ascii"), unquote_to_bytes(extended[2])
        try:
            return value.decode(charset)
        except (LookupError, UnicodeError):  # Python's own codecs raise the latter as well
            return _decoded(value)
    plain = options.get(b"filename")
    if plain is None:
        return None
    text = _decoded(plain)
    if text.startswith("=?") and text.endswith("?="):
        try:
            return str(make_header(decode_header(text)))
        except (HeaderParseError, LookupError, ValueError):
            return text
    return text


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")
