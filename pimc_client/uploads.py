"""Uploads: the files of a request, and bodies that are sent in pieces and can be sent again.

    paths, folders, zips, open files, bytes → Source → Body → pieces on the wire

Each file is opened only while it is sent, so that a stack of hundreds of files needs one open file
and the memory of one piece.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, cast

PIECE = 256 * 1024
"""Bytes read and sent at once."""
RASTER_SUFFIXES = frozenset({".tif", ".tiff", ".gtif", ".gtiff", ".geotiff", ".cog", ".jp2"})
"""Endings, in lower case, of the files that are taken from a folder or a zip."""

_PRODUCT_METADATA = re.compile(r"(MTD_MSIL(1C|2A)|S2[ABC]_[A-Z]{4}_MTD_[A-Z0-9]+_.*)\.xml")
"""Name of the file of a Sentinel-2 product (SAFE) that holds its scale, offsets and date."""
_MEDIA_TYPES = {
    ".jp2": "image/jp2",
    ".xml": "application/xml",
    ".json": "application/geo+json",
    ".geojson": "application/geo+json",
    ".parquet": "application/vnd.apache.parquet",
    ".geoparquet": "application/vnd.apache.parquet",
    ".gpkg": "application/geopackage+sqlite3",
}

Progress = Callable[[int, int | None], object]
"""Called with the bytes sent so far and the total number of bytes (None if it is unknown)."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file to send."""

    name: str
    """The file's name in the request; the server may read its date and band from it."""
    open: Callable[[], AbstractContextManager[BinaryIO]]
    """Returns the file at its first byte; may be called again if `replayable`."""
    length: int | None
    """Size in bytes; None if it is known only after reading to the end."""
    replayable: bool
    """Whether `open` may be called again."""


def sources_of_paths(paths: Sequence[Path]) -> list[list[Source]]:
    """The files at each path, which is a file, a folder, a zip or a glob pattern.

    Zips in a folder count as folders.

    The folder is part of each name, because it may hold the date: `B04.tif` in the folder
    `S2B_31UES_20210105_0_L2A` is sent as `S2B_31UES_20210105_0_L2A/B04.tif`. Files from several
    folders keep the folders below the one that they have in common.

    Args:
        paths: files, folders, zips or patterns. All are given in one call, because the names of
            single files depend on the folders of the others.

    Returns:
        The files at each path, in the order of `paths`; those of one path are sorted by name.

    Raises:
        FileNotFoundError: a path does not exist, or a pattern matches no file.
        ValueError: a folder or zip holds no raster, or a zip cannot be read.
    """
    expanded = [_expand(path) for path in paths]
    files = [file for found in expanded for file in found if not _is_container(file)]
    top = _common_folder(files)
    return [[source for file in found for source in _sources_at(file, top)] for found in expanded]


def source_of_bytes(name: str, data: bytes) -> Source:
    """A file in memory."""
    return Source(
        name=name,
        open=lambda: nullcontext(io.BytesIO(data)),
        length=len(data),
        replayable=True,
    )


def source_of_file(file: BinaryIO, default_name: str) -> Source:
    """An open binary file, from its current position; the file is left open.

    Raises:
        TypeError: the file is open as text.
    """
    if isinstance(file, io.TextIOBase):
        raise TypeError(f"{file!r} is open as text: open it with mode 'rb'")
    named = getattr(file, "name", None)
    path = Path(os.fsdecode(named)).absolute() if isinstance(named, str | bytes) else None
    name = default_name if path is None else _name_below(path, path.parent.parent)
    if not file.seekable():
        return Source(name=name, open=lambda: nullcontext(file), length=None, replayable=False)
    start = file.tell()
    length = file.seek(0, os.SEEK_END) - start
    file.seek(start)

    def rewound() -> AbstractContextManager[BinaryIO]:
        file.seek(start)
        return nullcontext(file)

    return Source(name=name, open=rewound, length=length, replayable=True)


# --- paths ----------------------------------------------------------------------------------------


def _expand(path: Path) -> list[Path]:
    """The path itself, or the sorted paths that a pattern matches."""
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise FileNotFoundError(f"{path} does not exist: give an existing file, folder or pattern")
    # `Path.glob` does not accept absolute patterns, `glob.glob` does.
    found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    if not found:
        raise FileNotFoundError(f"no file matches the pattern {path}")
    return [Path(text) for text in found]


def _is_container(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() == ".zip"


def _sources_at(path: Path, top: Path) -> list[Source]:
    if path.is_dir():
        return _sources_in_folder(path)
    return _sources_in_zip(path) if _is_container(path) else [_source(path, top)]


def _source(path: Path, top: Path) -> Source:
    return Source(
        name=_name_below(path.absolute(), top),
        open=lambda: path.open("rb"),
        length=path.stat().st_size,
        replayable=True,
    )


def _common_folder(files: Iterable[Path]) -> Path:
    """The parent of the files' common folder, so that every name has at least one folder."""
    folders = {os.path.abspath(file.parent) for file in files}  # noqa: PTH100 (resolves `..`, not links)
    try:
        return Path(os.path.commonpath(folders)).parent
    except ValueError:  # no file, or files on several drives of Windows
        return Path()


def _name_below(path: Path, top: Path) -> str:
    path = Path(os.path.abspath(path))  # noqa: PTH100 (resolves `..`, not links)
    below = path.relative_to(top) if path.is_relative_to(top) else Path(path.parent.name, path.name)
    return below.as_posix()


def _sources_in_folder(folder: Path) -> list[Source]:
    absolute = Path(os.path.abspath(folder))  # noqa: PTH100 (keeps the name of a link)
    top = absolute.parent
    inside = [Path(at, name) for at, _, names in os.walk(absolute) for name in names]
    sources: list[Source] = []
    for file in sorted(inside):
        name = file.relative_to(top)
        if _is_raster(name):
            sources.append(_source(file, top))
        elif file.suffix.lower() == ".zip" and not _is_hidden(name) and not _is_unpacked(file):
            at = name.parent.parts
            sources += (
                replace(source, name=str(PurePosixPath(*at, source.name)))
                for source in _sources_in_zip(file, required=False)
            )
    if not sources:
        raise ValueError(f"the folder {folder} contains no raster ({_suffixes()}, or zips of them)")
    return sources


def _is_unpacked(file: Path) -> bool:
    """Whether a folder with the name of a zip lies beside it, so that the zip would count twice."""
    return file.with_suffix("").is_dir() or file.with_suffix(".SAFE").is_dir()


def _sources_in_zip(path: Path, *, required: bool = True) -> list[Source]:
    try:
        with zipfile.ZipFile(path) as archive:
            found = sorted(
                (m for m in archive.infolist() if _is_raster(PurePosixPath(m.filename))),
                key=lambda member: member.filename,
            )
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a readable zip archive: {error}") from error
    if not found and required:
        raise ValueError(f"the zip {path} contains no raster ({_suffixes()})")
    locked = [member.filename for member in found if member.flag_bits & 1]
    if locked:
        raise ValueError(f"the zip {path} is encrypted ({locked[0]}): extract it first")
    return [_source_in_zip(path, member) for member in found]


def _source_in_zip(path: Path, member: zipfile.ZipInfo) -> Source:
    @contextmanager
    def opened() -> Iterator[BinaryIO]:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield cast("BinaryIO", file)

    # A zip of a folder usually holds that folder already.
    inside = PurePosixPath(member.filename)
    named = inside if inside.parts[0] == path.stem else PurePosixPath(path.stem) / inside
    return Source(name=str(named), open=opened, length=member.file_size, replayable=True)


def _is_raster(path: PurePath) -> bool:
    # Hidden files are not images of the stack: macOS writes `._a.tif` beside each `a.tif`.
    raster = path.suffix.lower() in RASTER_SUFFIXES or _PRODUCT_METADATA.fullmatch(path.name)
    return bool(raster) and not _is_hidden(path)


def _is_hidden(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts[1:] or path.parts)


def _suffixes() -> str:
    return ", ".join(sorted(RASTER_SUFFIXES))


# --- bodies ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Body:
    """The body of a request; iterating twice returns the same bytes twice."""

    content_type: str
    segments: Sequence[bytes | Source]
    progress: Progress | None = None

    @property
    def length(self) -> int | None:
        """Size in bytes, None if the size of a file is unknown."""
        lengths = [s.length if isinstance(s, Source) else len(s) for s in self.segments]
        return None if None in lengths else sum(length or 0 for length in lengths)

    @property
    def replayable(self) -> bool:
        """Whether the body can be sent again."""
        return all(s.replayable for s in self.segments if isinstance(s, Source))

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        for piece in self.pieces():
            yield piece
            sent += len(piece)
            self.report(sent)

    def report(self, sent: int) -> None:
        """Call `progress` with the number of bytes sent."""
        if self.progress is not None:
            self.progress(sent, self.length)

    def pieces(self) -> Iterator[bytes]:
        """All bytes, without a report of the progress."""
        for segment in self.segments:
            if isinstance(segment, bytes):
                yield segment
                continue
            with segment.open() as file:
                while piece := file.read(PIECE):
                    yield piece


class AsyncBody:
    """A `Body` for `async for`; threads read its files, so that the event loop is not blocked."""

    def __init__(self, body: Body) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        import asyncio  # slow to import, and `Client` does not need it

        sent = 0
        pieces = self._body.pieces()
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
            sent += len(piece)
            self._body.report(sent)


def json_bytes(document: Any) -> bytes:  # noqa: ANN401 (any JSON)
    """A JSON document as bytes.

    Raises:
        ValueError: a number cannot be written as JSON, such as NaN.
        TypeError: a value cannot be written as JSON.
    """
    text = json.dumps(document, allow_nan=False, ensure_ascii=False, default=_plain)
    return text.encode(errors="replace")


def json_body(document: Any) -> Body:  # noqa: ANN401 (any JSON)
    """A JSON body; raises the errors of `json_bytes`."""
    return Body(content_type="application/json", segments=[json_bytes(document)])


def _plain(value: object) -> Any:  # noqa: ANN401 (any JSON)
    """A scalar of NumPy or pandas as a value of Python."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} is a {type(value).__name__}, which cannot be written as JSON")


def multipart_body(
    files: Sequence[tuple[str, Source]],
    parameters: Mapping[str, str],
    progress: Progress | None = None,
) -> Body:
    """A multipart form (RFC 7578).

    Parameters come first, so that the server can reject an invalid one before the files arrive.

    Args:
        files: the parameter's name and the file, in order.
        parameters: name and value.
        progress: called while the body is sent.
    """
    boundary = os.urandom(16).hex()
    segments: list[bytes | Source] = [
        _part_head(boundary, f'name="{name}"') + value.encode(errors="replace") + b"\r\n"
        for name, value in parameters.items()
    ]
    for parameter, file in files:
        named = f'name="{parameter}"; filename="{_quoted(file.name)}"'
        segments += [_part_head(boundary, named, _media_type(file.name)), file, b"\r\n"]
    segments.append(f"--{boundary}--\r\n".encode())
    return Body(
        content_type=f"multipart/form-data; boundary={boundary}",
        segments=segments,
        progress=progress,
    )


def _media_type(name: str) -> str:
    return _MEDIA_TYPES.get(PurePosixPath(name).suffix.lower(), "image/tiff")


def _part_head(boundary: str, disposition: str, content_type: str | None = None) -> bytes:
    lines = [f"--{boundary}", f"Content-Disposition: form-data; {disposition}"]
    if content_type:
        lines.append(f"Content-Type: {content_type}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _quoted(name: str) -> str:
    # Escaped as browsers do it; servers undo it.
    name = decoded_name(name)
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def decoded_name(name: str) -> str:
    """A file's name as text that can be encoded.

    If the bytes of a name on disk are not valid in the file system's encoding, Python replaces them
    by lone surrogates. Most such names are Latin-1, which decodes any bytes.
    """
    return "/".join(map(_decoded, name.split("/")))


def _decoded(part: str) -> str:
    try:
        part.encode()
    except UnicodeEncodeError:
        # Not a name on disk: the lone surrogates are replaced, the other characters stay.
        try:
            return part.encode(errors="surrogateescape").decode("latin-1")
        except UnicodeEncodeError:
            return part.encode(errors="replace").decode()
    return part
