"""Requests by reference: hrefs to files, read only from allowed roots and hosts.

    href ─┬─ a path, file:///… ──▶ every link resolved ──▶ inside a root? ──▶ read in place
          ├─ http(s)://host/… ──▶ `connect` ──▶ NNNN.tif, or with an area the needed `blocks` of it
          └─ s3://bucket/… ──▶ https://bucket.s3.amazonaws.com/…

The message for a forbidden path is the same whether the path exists or not.
"""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import anyio
from anyio import to_thread

from service.errors import (
    ForbiddenReference,
    GridMismatch,
    NoGeoreference,
    NotAGeoTIFF,
    UnreachableReference,
)
from service.grid import Window
from service.read.blocks import RemoteFile, fetch_windows, side_by_side
from service.read.connect import Connections, Patience, Remote, Remotes, Resolver, resolve
from service.read.geotiff import SourceFile, gdal_options, label
from service.read.placement import Place, needed_windows
from service.read.stack import read_headers
from service.settings import Settings

_SIGN = "send a signed URL"


class Item(Protocol):
    """A reference in a request."""

    @property
    def href(self) -> str:
        """An absolute path, a `file:` URL or an `http(s):` URL."""
        ...


async def fetch_items(
    items: Sequence[Item],
    folder: Path,
    settings: Settings,
    *,
    fields: Sequence[str] = (),
    patience: Patience | None = None,
    resolver: Resolver = resolve,
    tls: ssl.SSLContext | None = None,
    place: Place | None = None,
    on_demand: bool = False,
    remotes: Remotes | None = None,
) -> tuple[SourceFile, ...]:
    """The files of references: local ones in place, others downloaded into a folder.

    Args:
        items: references of a request, in order.
        folder: the request's folder; the caller removes only this folder.
        settings: allowed roots and hosts, and the largest number of bytes.
        fields: name of each reference, for messages; empty for `items.0.href` and so on.
        patience: time limits.
        resolver: resolves host names.
        tls: trusted certificates; None uses httpx's own.
        place: the part of the files that is read: of TIFFs only its blocks are fetched. None
            downloads the files whole.
        on_demand: whether only the directories of TIFFs with a strong ETag are fetched, and their
            blocks when they are read; other files are fetched as for `place`.
        remotes: limits and caches that all requests share; None for own ones.

    Raises:
        ForbiddenReference: an href is outside the allowed roots and hosts; if the href itself shows
            this, nothing is downloaded.
        UnreachableReference: an allowed host does not return the file in time.
        BodyTooLarge: the files have more bytes than an upload may have.
    """
    if not (settings.allowed_roots or settings.allowed_hosts):
        named = fields[0] if fields else "items"
        raise ForbiddenReference(
            f"'{named}' is not allowed, because this server reads no files by reference: send the "
            "files themselves, or have the server's administrator set PIMC_ALLOWED_ROOTS or "
            "PIMC_ALLOWED_HOSTS"
        )
    patience = patience or Patience()
    fields = fields or [f"items.{n}.href" for n in range(len(items))]
    locations = [
        location_of(i.href, field, settings) for i, field in zip(items, fields, strict=True)
    ]
    found: dict[int, SourceFile] = {}
    parts: list[RemoteFile] = []
    with anyio.move_on_after(patience.total_seconds) as waiting:
        async with Connections(
            settings, patience=patience, resolver=resolver, tls=tls, remotes=remotes
        ) as web:

            async def fetch(n: int) -> None:
                at, path = locations[n], folder / f"{n:04d}.tif"
                description = None
                if isinstance(at, Local):
                    path = await to_thread.run_sync(at.find, settings.allowed_roots)
                elif place is None and not on_demand:
                    path = await download(web, at, path)
                else:
                    remote = RemoteFile(remote=at, path=path, hint=_SIGN)
                    await remote.open(web)
                    if on_demand and remote.can_wait:
                        description = await to_thread.run_sync(remote.save)
                    elif not remote.whole:
                        parts.append(remote)
                found[n] = SourceFile(
                    name=label(unquote(_path(items[n].href)), n), path=path, remote=description
                )

            await side_by_side([partial(fetch, n) for n in range(len(items))])
            files = tuple(found[n] for n in range(len(items)))
            if parts:
                windows = await to_thread.run_sync(_windows, files, parts, place or Place())
                await fetch_windows(windows, web, fields[0].partition(".")[0])
    if waiting.cancelled_caught:
        raise UnreachableReference(
            f"only {len(found)} of {len(items)} files arrived within {patience.total_seconds:g} s: "
            "name fewer files, or give a smaller `bbox` or `area`"
        )
    return files


def _windows(
    files: Sequence[SourceFile], parts: Sequence[RemoteFile], place: Place
) -> list[tuple[RemoteFile, Window]]:
    """The window of each file that the requested part needs; the whole file if that is not known.

    Files that do not fit together are for the plan of the request to reject or to leave out.
    """
    whole = [(remote, remote.window) for remote in parts]
    try:
        headers = read_headers(files).headers
        with gdal_options():
            needed = needed_windows(headers, place)
    except (NotAGeoTIFF, NoGeoreference, GridMismatch):
        return whole
    by_path = {header.source.path: window for header, window in zip(headers, needed, strict=True)}
    found = [(remote, by_path.get(remote.path, remote.window)) for remote in parts]
    return [(remote, window) for remote, window in found if window is not None]


def check_again(files: Iterable[SourceFile], folder: Path, roots: Sequence[Path]) -> None:
    """Check that files read in place are still allowed: roots and links may have changed.

    Args:
        files: files of an earlier request.
        folder: folder of that request; files in it were downloaded or uploaded.
        roots: the roots that are allowed now.

    Raises:
        ForbiddenReference: a file is no longer allowed, or no longer exists.
    """
    for n, file in enumerate(files):
        if not file.path.is_relative_to(folder):
            location = Local(field=f"items.{n}.href", path=file.path)
            location.find(roots)


@dataclass(frozen=True, kw_only=True)
class Local:
    """An href to a file of this machine."""

    field: str
    path: Path

    def find(self, roots: Sequence[Path]) -> Path:
        """The path of the file, with every link resolved.

        Raises:
            ForbiddenReference: the path is outside the roots, is not a file, or does not exist;
                the message is the same.
        """
        forbidden = ForbiddenReference(
            f"{self.field}: the path does not name a file in the folders of PIMC_ALLOWED_ROOTS: "
            "check the path on the server's machine, or send the file"
        )
        real_roots = [Path(os.path.realpath(root)) for root in roots]
        # Check the path as written first, so that a path outside the roots is never accessed.
        written = ".." not in self.path.parts and any(
            self.path.is_relative_to(root) for root in (*roots, *real_roots)
        )
        if not written:
            raise forbidden
        try:
            real = Path(os.path.realpath(self.path, strict=True))
            if any(real.is_relative_to(root) for root in real_roots) and _is_file(real):
                return real
        except (OSError, ValueError):
            pass  # the same error as below, without a cause, which would name the path
        raise forbidden


def _is_file(path: Path) -> bool:
    """Whether the path is a file, not a device, a pipe or a link created since the lookup."""
    # Without NONBLOCK, opening a pipe waits for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return stat.S_ISREG(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def location_of(href: str, field: str, settings: Settings) -> Local | Remote:
    """Parse an href and check its host by name.

    Args:
        href: an absolute path, a `file:` URL, an `http(s):` URL or an `s3:` URL.
        field: the parameter that contains the href, for messages.
        settings: allowed hosts.

    Raises:
        ForbiddenReference: the href is neither a path nor a URL of an allowed host.
    """
    href = _over_http(href)
    try:
        if urlsplit(href).scheme in {"", "file"}:
            return _local(href, field)
    except ValueError:
        raise ForbiddenReference(
            f"{field}: the value is neither a path nor a URL that the server may read: give an "
            "absolute path, or a URL that begins with https://, http:// or s3://"
        ) from None
    return Remote.of(href, field, settings.allowed_hosts)


def _over_http(href: str) -> str:
    """The HTTPS URL of an object in a public S3 bucket; any other href unchanged."""
    try:
        parts = urlsplit(href)
    except ValueError:
        return href
    if parts.scheme != "s3" or not parts.netloc:
        return href
    return f"https://{parts.netloc}.s3.amazonaws.com{parts.path}"


def _local(href: str, field: str) -> Local:
    path = href
    if not href.startswith("/"):
        parts = urlsplit(href)
        if parts.netloc not in {"", "localhost"} or parts.query or parts.fragment:
            raise ValueError("a file: URL must hold a path of this machine and nothing else")
        path = unquote(parts.path)
    if not path.startswith("/") or "\0" in path:
        raise ValueError("a path must be absolute")
    return Local(field=field, path=Path(path))


def _path(href: str) -> str:
    """The path of an href, as a name to show."""
    return href if href.startswith("/") else urlsplit(href).path


async def download(web: Connections, remote: Remote, target: Path) -> Path:
    """Download a whole file.

    Args:
        web: the request's connections.
        remote: the URL.
        target: path of the new file, which must not exist.

    Raises:
        ForbiddenReference: an address, or the target of a redirect, is not allowed.
        UnreachableReference: the host does not return the file.
        BodyTooLarge: the files are larger than the limit.
    """
    async with web.response(remote) as response:
        if response.status_code != HTTPStatus.OK:
            raise remote.unreachable(
                f"returned status {response.status_code} and not the file: check the URL, or retry "
                "later"
            )
        async with await anyio.open_file(target, "xb") as file:
            async for chunk in web.body(response, remote):
                await file.write(chunk)
    return target
