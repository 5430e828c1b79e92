"""Responses from files: sent in chunks; ranges, HEAD, conditional requests, admission.

    file → open → whole or one range? → blocks, each read once the last one was sent
             │              │
        ResultNotReady   InvalidRange

A response that its client does not read holds one block in memory: 64 KiB and a file descriptor,
or 1 MiB if the file is in a bucket, which then has no open request. `Downloads` limits the number
of such responses; the middleware and the protocol limit their duration.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import TypeVar

import anyio
from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.admission import FairSlots
from service.errors import InvalidRange, Overloaded, PIMCError, shown
from service.jobs.storage import Opened, RemoteFile, opened

HEAD_ONLY = "pimc.head_only"
"""Key of the ASGI scope: true if the response has no body, as for HEAD."""
READERS = "pimc.readers"
"""Key of the ASGI scope: limiter of the threads that read files; None is that of all threads."""
CHUNK_BYTES = 64 * 2**10
_Made = TypeVar("_Made")
_RETRY_SECONDS = 5
_READERS = 16
"""Largest number of results that are read at once: a storage that hangs must not take the threads
of other requests."""
_MAKERS = 4
"""Largest number of files that are derived from results at once."""
_BYTES = re.compile(r"\s*bytes\s*=(.*)", re.IGNORECASE | re.DOTALL)
_SPEC = re.compile(r"([0-9]{0,18})\s*-\s*([0-9]{0,18})")


class StoredFile(Response):
    """A file as a response, whole or one range of it.

    A file of this machine is opened once and may be removed while it is sent.

    Args:
        path: the file.
        media_type: media type of its content.
        filename: name under which a browser saves the file; None lets the browser show it.
        missing: error to raise if the file does not exist.
    """

    def __init__(
        self,
        path: Path | RemoteFile,
        *,
        media_type: str,
        filename: str | None = None,
        missing: PIMCError | None = None,
    ) -> None:
        # Like Starlette's FileResponse, this does not call its base, which requires the content.
        self.path = path
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self._missing = missing
        self.init_headers()
        if filename is not None:
            self.headers["Content-Disposition"] = f'attachment; filename="{filename}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file.

        Raises:
            InvalidRange: the requested range is not valid, or not within the file.
            Overloaded: the storage cannot be reached.
            PIMCError: `missing`.
        """
        file = await to_thread.run_sync(self._open, limiter=scope.get(READERS))
        try:
            span = (0, file.size)
            if scope["method"] in {"GET", "HEAD"}:
                span = self._choose(Headers(scope=scope), file)
            self.headers["Content-Length"] = str(span[1] - span[0])
            if self.status_code == 304:
                del self.headers["Content-Length"]
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            if self.status_code == 304 or scope.get(HEAD_ONLY):
                await send({"type": "http.response.body", "body": b""})
            else:
                await _send_blocks(file, *span, scope.get(READERS), receive, send)
        finally:
            file.close()

    def _open(self) -> Opened:
        try:
            return opened(self.path, CHUNK_BYTES)
        except FileNotFoundError:
            if self._missing is not None:
                raise self._missing from None
            raise

    def _choose(self, headers: Headers, file: Opened) -> tuple[int, int]:
        """Position of the first byte and after the last one, by conditions and range."""
        etag = f'"{file.tag}"'
        modified = formatdate(file.modified, usegmt=True)
        self.headers["Accept-Ranges"] = "bytes"
        self.headers["ETag"] = etag
        self.headers["Last-Modified"] = modified
        known = headers.get("if-none-match")
        if known is not None and _names(known, etag):
            self.status_code = 304
            return 0, 0
        span = None
        if headers.get("if-range", etag) in {etag, modified}:
            span = chosen_range(headers.get("range"), file.size)
        if span is None:
            return 0, file.size
        self.status_code = 206
        self.headers["Content-Range"] = f"bytes {span[0]}-{span[1] - 1}/{file.size}"
        return span


def _names(tags: str, etag: str) -> bool:
    """Whether `If-None-Match` names an entity tag (weak comparison)."""
    return tags.strip() == "*" or etag in {
        tag.strip().removeprefix("W/") for tag in tags.split(",")
    }


def chosen_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The bytes that a `Range` header requests (RFC 9110, 14).

    Args:
        header: value of the header; None without one.
        size: size of the file, bytes.

    Returns:
        Position of the first byte and after the last one. None for the whole file: without a
        range, with a range in another unit than bytes, or with several ranges.

    Raises:
        InvalidRange: the value is not a range, or the range has no byte within the file.
    """
    unit = _BYTES.fullmatch(header) if header else None
    if header is None or unit is None:
        if header and "=" not in header:
            raise InvalidRange(f"'{shown(header)}' is not a range such as bytes=0-1023", size)
        return None
    spans = [_span(spec.strip(), size) for spec in unit[1].split(",")]
    return spans[0] if len(spans) == 1 else None


def _span(spec: str, size: int) -> tuple[int, int]:
    found = _SPEC.fullmatch(spec)
    if found is None or found[1] == found[2] == "":
        raise InvalidRange(f"'{shown(spec)}' is not a range of bytes such as 0-1023 or -1024", size)
    if found[1] == "":
        start, end = max(0, size - int(found[2])), size
    else:
        start = int(found[1])
        last = int(found[2]) if found[2] else size - 1
        if found[2] and last < start:
            raise InvalidRange(f"range {spec}: the last byte is before the first: swap them", size)
        end = min(size, last + 1)
    if start >= size:
        raise InvalidRange(
            f"range {spec} is not within the file of {size} bytes: begin below {size}", size
        )
    return start, end


async def _send_blocks(
    file: Opened,
    start: int,
    end: int,
    readers: anyio.CapacityLimiter | None,
    receive: Receive,
    send: Send,
) -> None:
    """Send bytes of a file; stop once the client has disconnected."""
    gone = asyncio.Event()
    watcher = asyncio.create_task(_watch(receive, gone))
    try:
        while start < end:
            size = min(file.block, end - start)
            block = await to_thread.run_sync(file.read, start, size, limiter=readers)
            if len(block) < size:
                raise OSError(f"{end - start - len(block)} bytes of the file are missing")
            for at in range(0, size, CHUNK_BYTES):
                if gone.is_set():
                    return
                chunk = block[at : at + CHUNK_BYTES]
                start += len(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": start < end})
    finally:
        watcher.cancel()


async def _watch(receive: Receive, gone: asyncio.Event) -> None:
    # uvicorn discards what is sent after a disconnect, and reports the disconnect only here.
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()


class Downloads:
    """Admission of requests for results; used on one event loop.

    Args:
        most: largest number of open responses.
        most_per_caller: largest number of open responses of one caller.
        changed: called with the number of open responses when it changes.
        rejected: called for each rejected request, with `caller` or `all`, whichever limit applied.
    """

    def __init__(
        self,
        *,
        most: int,
        most_per_caller: int,
        changed: Callable[[int], None] = lambda _: None,
        rejected: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._most = most
        self._most_per_caller = most_per_caller
        self._changed = changed
        self._rejected = rejected
        self._open: Counter[str] = Counter()
        self.readers = anyio.CapacityLimiter(_READERS)
        """Limiter of the threads that read results."""
        self._makers = FairSlots(_MAKERS)

    async def made(self, caller: str, make: Callable[[], _Made]) -> _Made:
        """Derive a file from a result in a thread, in turn: other requests need threads too.

        Args:
            caller: the caller's id, or the client's address without API keys.
            make: makes the file, if it does not exist, and returns the response.
        """
        async with self._makers.slot(caller):
            return await to_thread.run_sync(make)

    @contextmanager
    def slot(self, caller: str) -> Iterator[None]:
        """Count a response as open until the context ends.

        Args:
            caller: the caller's id, or the client's address without API keys.

        Raises:
            Overloaded: the caller, or all callers together, have too many responses open.
        """
        for bound, count, most, variable in (
            ("caller", self._open[caller], self._most_per_caller, "_PER_CALLER"),
            ("all", self._open.total(), self._most, ""),
        ):
            if count >= most:
                self._rejected(bound)
                whose = "this caller reads" if bound == "caller" else "callers read"
                raise Overloaded(
                    f"server at capacity: {whose} {count} of {most} results at once "
                    f"(PIMC_MAX_DOWNLOADS{variable}); retry after {_RETRY_SECONDS} s",
                    retry_after=_RETRY_SECONDS,
                )
        self._open[caller] += 1
        self._changed(self._open.total())
        try:
            yield
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]
            self._changed(self._open.total())
