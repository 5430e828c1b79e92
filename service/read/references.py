"""Requests by reference: hrefs to files, read only from allowed roots and hosts.

    href ─┬─ a path, file:///… ──▶ every link followed ──▶ inside a root? ──▶ read where it lies
          └─ http(s)://host/… ──▶ host allowed? ──▶ its addresses allowed? ──▶ connect to one of
                  ▲                                                            them ──▶ NNNN.tif
                  └────────────────── redirected: all of it again ─────────────────┘

A host's name is resolved once, and the connection goes to the checked address, so that a name
server cannot return different addresses for the check and the connection. The message for a
forbidden path is the same whether the path exists or not.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import anyio
import httpx
from anyio import to_thread

from service.errors import BodyTooLarge, ForbiddenReference, UnreachableReference
from service.read.geotiff import SourceFile, label
from service.settings import HostRule, Settings

MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}
_CHUNK_BYTES = 2**20
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# IPv6 networks that lead on to IPv4 ones, public or not: NAT64, 6to4 and Teredo.
_LEADS_ON = tuple(ipaddress.ip_network(text) for text in ("64:ff9b::/32", "2002::/16", "2001::/32"))


class Item(Protocol):
    """A reference in a request."""

    @property
    def href(self) -> str:
        """An absolute path, a `file:` URL or an `http(s):` URL."""
        ...


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Time limits of downloads."""

    idle_seconds: float = 20.0
    """Seconds until a connection is open, and between two chunks of data."""
    total_seconds: float = 300.0
    """Seconds for all files of a request together."""


Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Resolves a host name and a port to addresses; OSError if there are none."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """A host's addresses by the system's resolver."""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


async def fetch_items(
    items: Sequence[Item],
    folder: Path,
    settings: Settings,
    *,
    patience: Patience | None = None,
    resolver: Resolver = resolve,
    tls: ssl.SSLContext | None = None,
) -> tuple[SourceFile, ...]:
    """The files of references: local ones in place, others downloaded into a folder.

    Args:
        items: references of a request, in order.
        folder: the request's folder; the caller removes only this folder.
        settings: allowed roots and hosts, and the largest number of bytes.
        patience: time limits.
        resolver: resolves host names.
        tls: trusted certificates; None uses httpx's own.

    Raises:
        ForbiddenReference: an href is outside the allowed roots and hosts; if the href itself shows
            this, nothing is downloaded.
        UnreachableReference: an allowed host does not return the file in time.
        BodyTooLarge: the files have more bytes than an upload may have.
    """
    if not (settings.allowed_roots or settings.allowed_hosts):
        raise ForbiddenReference("'items' is not allowed: this server reads no files by reference")
    patience = patience or Patience()
    places = [_place(item.href, f"items.{n}.href", settings) for n, item in enumerate(items)]
    fetch = _Fetch(settings, patience, resolver)
    files: list[SourceFile] = []
    with anyio.move_on_after(patience.total_seconds) as waiting:
        async with _client(patience, tls) as client:
            for n, place in enumerate(places):
                if isinstance(place, _Local):
                    path = await to_thread.run_sync(place.find, settings.allowed_roots)
                else:
                    path = await fetch.download(client, place, folder / f"{n:04d}.tif")
                files.append(SourceFile(name=label(unquote(place.last), n), path=path))
    if waiting.cancelled_caught:
        raise UnreachableReference(
            f"only {len(files)} of {len(items)} files arrived within {patience.total_seconds:g} s"
        )
    return tuple(files)


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
            place = _Local(field=f"items.{n}.href", last=file.name, path=file.path)
            place.find(roots)


@dataclass(frozen=True, kw_only=True)
class _Local:
    """An href to a file of this machine."""

    field: str
    last: str
    """The path of the href, as a name to show."""
    path: Path

    def find(self, roots: Sequence[Path]) -> Path:
        """The path of the file, with every link resolved.

        Raises:
            ForbiddenReference: the path lies outside the roots, is not a file, or does not exist;
                the message is the same.
        """
        refused = ForbiddenReference(f"{self.field}: there is no such file under the allowed roots")
        real_roots = [Path(os.path.realpath(root)) for root in roots]
        # The written path first: a path outside the roots is not accessed at all.
        written = ".." not in self.path.parts and any(
            self.path.is_relative_to(root) for root in (*roots, *real_roots)
        )
        if not written:
            raise refused
        try:
            real = Path(os.path.realpath(self.path, strict=True))
            if any(real.is_relative_to(root) for root in real_roots) and _is_file(real):
                return real
        except (OSError, ValueError):
            pass  # the same error as below, without a cause, which would name the path
        raise refused


def _is_file(path: Path) -> bool:
    """Whether the path is a file, not a device, a pipe or a link created since the lookup."""
    # Without NONBLOCK, opening a pipe waits for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return stat.S_ISREG(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


@dataclass(frozen=True, kw_only=True)
class _Remote:
    """An href to an allowed host."""

    field: str
    last: str
    """The path of the href, as a name to show."""
    url: httpx.URL

    @property
    def host(self) -> str:
        """The host as rules name it: lower case, ASCII, without a final dot."""
        return self.url.raw_host.decode("ascii").lower().removesuffix(".")

    @property
    def port(self) -> int:
        """The port that a connection goes to."""
        return self.url.port or _PORTS[self.url.scheme]

    def redirected(self, location: str, settings: Settings) -> _Remote:
        """The target of a redirect.

        Raises:
            ForbiddenReference: the target is not allowed, or leaves TLS.
        """
        refused = ForbiddenReference(f"{self.field}: '{self.host}' redirects to a forbidden target")
        try:
            url = self.url.join(location)
        except httpx.InvalidURL:
            raise refused from None
        to = replace(self, url=url)
        if not _is_allowed(to, settings.allowed_hosts) or (self.url.scheme, url.scheme) == (
            "https",
            "http",
        ):
            raise refused
        return to


def _place(href: str, field: str, settings: Settings) -> _Local | _Remote:
    """Parse an href and check its host by name.

    Raises:
        ForbiddenReference: the href is neither a path nor a URL of an allowed host.
    """
    try:
        parts = urlsplit(href)
        if parts.scheme in {"", "file"}:
            return _local(href, field)
        url = httpx.URL(href)
    except (ValueError, httpx.InvalidURL):
        raise ForbiddenReference(f"{field}: neither a path nor a URL that is allowed") from None
    place = _Remote(field=field, last=parts.path, url=url)
    if not _is_allowed(place, settings.allowed_hosts):
        raise ForbiddenReference(f"{field}: '{label(url.host, 0)}' is not an allowed host")
    return place


def _local(href: str, field: str) -> _Local:
    path = href
    if not href.startswith("/"):
        parts = urlsplit(href)
        if parts.netloc not in {"", "localhost"} or parts.query or parts.fragment:
            raise ValueError("a file: URL must hold a path of this machine and nothing else")
        path = unquote(parts.path)
    if not path.startswith("/") or "\0" in path:
        raise ValueError("a path must be absolute")
    return _Local(field=field, last=path, path=Path(path))


def _is_allowed(place: _Remote, rules: Sequence[HostRule]) -> bool:
    """Whether a rule names the host, checked before it is resolved."""
    if place.url.scheme not in _PORTS or place.url.userinfo or not place.host:
        return False
    address = _address(place.host)
    return any(
        rule.port in {None, place.port}
        and (rule.name == place.host if address is None else _holds(rule, address))
        for rule in rules
    )


def _may_connect(address: str, port: int, rules: Sequence[HostRule]) -> bool:
    """Whether an address is public or allowed by a rule."""
    there = _address(address)
    if there is None:
        return False
    named = any(rule.port in {None, port} and _holds(rule, there) for rule in rules)
    return named or _is_public(there)


def _holds(rule: HostRule, address: _Address) -> bool:
    return rule.network is not None and address in rule.network


def _is_public(address: _Address) -> bool:
    if any(address in network for network in _LEADS_ON):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _address(text: str) -> _Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    # ::ffff:127.0.0.1 is 127.0.0.1.
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def _client(patience: Patience, tls: ssl.SSLContext | None) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        verify=tls or True,
        # No proxy and no .netrc of the environment: a proxy would connect elsewhere, .netrc would
        # send a password.
        trust_env=False,
        timeout=httpx.Timeout(patience.idle_seconds),
        # A kept connection could be used for another host at the same address, whose certificate
        # was not checked.
        limits=httpx.Limits(max_keepalive_connections=0),
        headers={"User-Agent": "pimc", "Accept-Encoding": "identity"},
    )


class _Fetch:
    """The downloads of one request, with one limit for the bytes of all files."""

    def __init__(self, settings: Settings, patience: Patience, resolver: Resolver) -> None:
        self._settings = settings
        self._patience = patience
        self._resolver = resolver
        self._left = int(settings.max_body_bytes)

    async def download(self, client: httpx.AsyncClient, place: _Remote, target: Path) -> Path:
        """Download one file.

        Raises:
            ForbiddenReference: an address, or the target of a redirect, is not allowed.
            UnreachableReference: the host does not return the file.
            BodyTooLarge: the files are larger than the limit.
        """
        first = place
        for _ in range(MAX_REDIRECTS + 1):
            async with self._ask(client, place) as answer:
                if answer.status_code in _REDIRECTS and "location" in answer.headers:
                    place = place.redirected(answer.headers["location"], self._settings)
                    continue
                if answer.status_code != HTTPStatus.OK:
                    raise _unreachable(first, f"returned status {answer.status_code}")
                await self._save(answer, target, first)
                return target
        raise _unreachable(first, f"redirected more than {MAX_REDIRECTS} times")

    @asynccontextmanager
    async def _ask(
        self, client: httpx.AsyncClient, place: _Remote
    ) -> AsyncIterator[httpx.Response]:
        """The response of the first address that accepts the connection."""
        addresses = await self._addresses(place)
        for n, address in enumerate(addresses):
            request = client.build_request(
                "GET",
                place.url.copy_with(host=address, fragment=None),
                headers={"Host": place.url.netloc.decode("ascii")},
                # The name that the certificate must have, whatever the address.
                extensions={"sni_hostname": place.host},
            )
            try:
                answer = await client.send(request, stream=True)
            except httpx.ConnectError as error:
                if n + 1 < len(addresses):
                    continue
                raise _unreachable(place, "accepts no connection") from error
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise _unreachable(place, "does not respond") from error
            try:
                yield answer
            except httpx.HTTPError as error:
                raise _unreachable(place, "closed the connection or stalled") from error
            finally:
                await answer.aclose()
            return

    async def _addresses(self, place: _Remote) -> Sequence[str]:
        """The host's addresses, resolved once; all of them must be allowed.

        Raises:
            ForbiddenReference: an address is not allowed; the message does not name it.
            UnreachableReference: the host has no address.
        """
        rules = self._settings.allowed_hosts
        if _address(place.host) is not None:
            return [place.host]  # allowed by name already
        try:
            with anyio.fail_after(self._patience.idle_seconds):
                found = list(dict.fromkeys(await self._resolver(place.host, place.port)))
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            raise _unreachable(place, "is not known") from error
        if not found:
            raise _unreachable(place, "is not known")
        if not all(_may_connect(address, place.port, rules) for address in found):
            raise ForbiddenReference(
                f"{place.field}: '{place.host}' has an address that is not allowed"
            )
        return found

    async def _save(self, answer: httpx.Response, target: Path, place: _Remote) -> None:
        announced = answer.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._left:
            raise self._too_large(place)
        async with await anyio.open_file(target, "xb") as file:
            # Raw bytes: a compressed body is not decoded, and so is not a TIFF.
            async for chunk in answer.aiter_raw(_CHUNK_BYTES):
                self._left -= len(chunk)
                if self._left < 0:
                    raise self._too_large(place)
                await file.write(chunk)

    def _too_large(self, place: _Remote) -> BodyTooLarge:
        return BodyTooLarge(
            f"{place.field}: the named files have more than "
            f"{int(self._settings.max_body_bytes)} bytes together, the largest allowed size"
        )


def _unreachable(place: _Remote, what: str) -> UnreachableReference:
    return UnreachableReference(f"{place.field}: '{place.host}' {what}")
