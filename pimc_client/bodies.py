"""What a request carries: bytes and files, sent piece by piece and, where possible, again.

A file is opened when its turn comes and closed after, so that a stack of hundreds of files needs
one handle and one piece of memory.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

PIECE = 256 * 1024
"""Bytes read and sent at once."""

Progress = Callable[[int, int | None], object]
"""Called with the bytes sent so far and the bytes in all (None where nobody knows)."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file to send."""

    name: str
    """What the service is told; dates and bands may be read from it."""
    open: Callable[[], AbstractContextManager[BinaryIO]]
    """Gives the file at its first byte; each call starts anew where `replayable`."""
    length: int | None
    """Bytes, None where only reading tells."""
    replayable: bool
    """Whether `open` may be called again."""


def source_of_path(path: Path) -> Source:
    """A file on disk.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the files in it")
    return Source(
        name=path.name,
        open=lambda: path.open("rb"),
        length=path.stat().st_size,
        replayable=True,
    )


def source_of_bytes(name: str, data: bytes) -> Source:
    """A file in memory."""
    return Source(
        name=name,
        open=lambda: nullcontext(io.BytesIO(data)),
        length=len(data),
        replayable=True,
    )


def source_of_file(file: BinaryIO, default_name: str) -> Source:
    """An open binary file, from where it stands; it is left open.

    Raises:
        TypeError: a file opened as text.
    """
    if isinstance(file, io.TextIOBase):
        raise TypeError(f"{file!r} is open as text: open it with mode 'rb'")
    named = getattr(file, "name", None)
    name = Path(os.fsdecode(named)).name if isinstance(named, str | bytes) else default_name
    if not file.seekable():
        return Source(name=name, open=lambda: nullcontext(file), length=None, replayable=False)
    start = file.tell()
    length = file.seek(0, os.SEEK_END) - start
    file.seek(start)

    def rewound() -> AbstractContextManager[BinaryIO]:
        file.seek(start)
        return nullcontext(file)

    return Source(name=name, open=rewound, length=length, replayable=True)


@dataclass(frozen=True, kw_only=True)
class Body:
    """The body of a request; iterating twice gives the same bytes twice."""

    content_type: str
    segments: Sequence[bytes | Source]
    progress: Progress | None = None

    @property
    def length(self) -> int | None:
        """Bytes in all, None where a file does not know its own."""
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
        """Tell the caller how many bytes are out."""
        if self.progress is not None:
            self.progress(sent, self.length)

    def pieces(self) -> Iterator[bytes]:
        """The bytes, from the first, without a report."""
        for segment in self.segments:
            if isinstance(segment, bytes):
                yield segment
                continue
            with segment.open() as file:
                while piece := file.read(PIECE):
                    yield piece


def json_body(document: Any) -> Body:  # noqa: ANN401 (whatever JSON can say)
    """A JSON document.

    Raises:
        ValueError: a number that JSON cannot say, such as NaN.
    """
    text = json.dumps(document, allow_nan=False, ensure_ascii=False)
    return Body(content_type="application/json", segments=[text.encode()])


def multipart_body(
    files: Sequence[Source], fields: Mapping[str, str], progress: Progress | None = None
) -> Body:
    """A form (RFC 7578): the fields first, so that a wrong one can be refused early, then files."""
    boundary = os.urandom(16).hex()
    segments: list[bytes | Source] = [
        _part_head(boundary, f'name="{name}"') + value.encode() + b"\r\n"
        for name, value in fields.items()
    ]
    for file in files:
        named = f'name="files"; filename="{_quoted(file.name)}"'
        segments += [_part_head(boundary, named, "image/tiff"), file, b"\r\n"]
    segments.append(f"--{boundary}--\r\n".encode())
    return Body(
        content_type=f"multipart/form-data; boundary={boundary}",
        segments=segments,
        progress=progress,
    )


def _part_head(boundary: str, disposition: str, content_type: str | None = None) -> bytes:
    lines = [f"--{boundary}", f"Content-Disposition: form-data; {disposition}"]
    if content_type:
        lines.append(f"Content-Type: {content_type}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _quoted(name: str) -> str:
    # As browsers escape a file's name, which servers undo.
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
