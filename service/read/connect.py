"""Checked connections: HTTP to allowed hosts only, at addresses that were checked.

    URL ──▶ host allowed? ──▶ its addresses allowed? ──▶ connect to one of them ──▶ response
     ▲                                                                                │
     └──────────────────────── redirect: the same checks again ───────────────────────┘

A host's name is resolved once, and the connection goes to the checked address. A name server
therefore cannot return one address for the check and another for the connection.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
import ssl
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Self

import anyio
import httpx

from service.errors import (
    BodyTooLarge,
    ForbiddenReference,
    InvalidRequest,
    UnreachableReference,
    shown,
)
from service.json_memory import parsed_bytes
from service.read.geotiff import label
from service.settings import HostRule, Settings

MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_WITH_BODY = frozenset({307, 308})
"""Redirects that repeat the body of a POST."""
_PORTS = {"http": 80, "https": 443}
_KEPT = 16
"""Idle connections kept to one address of one host."""
MOST_AT_ONCE = 64
"""Largest number of HTTP requests in flight, of all requests to the service together."""
_MAX_DOCUMENT_BYTES = 32 * 2**20
_MAX_PARSED_BYTES = 512 * 2**20
"""Largest memory of a JSON document once parsed."""
_LOGIN = frozenset({401, 403})
_WRONG = frozenset({400, 422})
_SHOWN = 200
"""Largest number of characters of a host's error text in a message."""
_HAVE_ALLOWED = (
    "the server's administrator can allow it with PIMC_ALLOWED_HOSTS (for callbacks with "
    "PIMC_CALLBACK_HOSTS)"
)
CHUNK_BYTES = 2**20
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# IPv6 networks through which IPv4 addresses can be reached, public or private: NAT64, 6to4, Teredo.
_IPV4_GATEWAYS = tuple(
    ipaddress.ip_network(text) for text in ("64:ff9b::/32", "2002::/16", "2001::/32")
)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Time limits of downloads."""

    idle_seconds: float = 20.0
    """Seconds until a connection is open, and between two chunks of data."""
    total_seconds: float = 300.0
    """Seconds for all files of a request together."""


class RangeCache:
    """Ranges of remote files in memory; the least recently used are dropped first. Thread-safe.

    The key has the file's strong ETag, which each request learns from the host before it looks
    here: a file that was replaced, or that the host does not return to this URL, is never found.

    Args:
        most: largest number of bytes; 0 keeps none.
        looked_up: called with `hit` or `miss` for each range that is looked up.
    """

    def __init__(self, most: int = 0, *, looked_up: Callable[[str], None] = lambda _: None) -> None:
        self._most = most
        self._looked_up = looked_up
        self._kept: OrderedDict[tuple[object, ...], bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.size = 0
        """Bytes kept."""

    @property
    def largest(self) -> int:
        """Largest size of a range that is kept, bytes."""
        return self._most // 8

    def get(self, key: tuple[object, ...]) -> bytes | None:
        """The bytes of a range; None if they are not kept."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
        self._looked_up("miss" if found is None else "hit")
        return found

    def put(self, key: tuple[object, ...], data: bytes) -> None:
        """Keep a range; one that is larger than `largest` is not kept."""
        with self._lock:
            if len(data) > self.largest or key in self._kept:
                return
            self._kept[key] = data
            self.size += len(data)
            while self.size > self._most:
                _, dropped = self._kept.popitem(last=False)
                self.size -= len(dropped)


class Remotes:
    """State that the requests which read from other hosts share; used on one event loop.

    Args:
        cache: ranges that were received; None keeps none.
        received: called with the bytes of each chunk received.
    """

    def __init__(
        self, *, cache: RangeCache | None = None, received: Callable[[int], None] = lambda _: None
    ) -> None:
        self.cache = cache or RangeCache()
        self.received = received
        self.limiter = anyio.CapacityLimiter(MOST_AT_ONCE)
        """Bounds the HTTP requests of all requests to the service together."""


Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Resolves a host name and a port to addresses; OSError if there are none."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """A host's addresses by the system's resolver."""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A URL of an allowed host."""

    field: str
    """The parameter, or the item and asset, that contains the URL, for messages."""
    url: httpx.URL

    @classmethod
    def of(cls, href: str, field: str, rules: Sequence[HostRule]) -> Remote:
        """Parse a URL and check its host by name.

        Raises:
            ForbiddenReference: the text is not a URL of an allowed host.
        """
        try:
            url = httpx.URL(href)
        except httpx.InvalidURL:
            raise ForbiddenReference(
                f"{field}: the value is neither a path nor a URL that the server may read: give an "
                "absolute path, or a URL that begins with https://, http:// or s3://"
            ) from None
        remote = cls(field=field, url=url)
        if not _is_allowed(remote, rules):
            raise ForbiddenReference(
                f"{field}: '{label(url.host, 0)}' is not an allowed host: {_HAVE_ALLOWED}"
            )
        return remote

    @property
    def host(self) -> str:
        """The host as rules name it: lower case, ASCII, without a final dot."""
        return self.url.raw_host.decode("ascii").lower().removesuffix(".")

    @property
    def port(self) -> int:
        """The port that a connection goes to."""
        return self.url.port or _PORTS[self.url.scheme]

    def redirected(self, location: str, rules: Sequence[HostRule]) -> Remote:
        """The target of a redirect.

        Raises:
            ForbiddenReference: the target is not allowed, or leaves TLS.
        """
        forbidden = ForbiddenReference(
            f"{self.field}: '{self.host}' redirects to a URL that the server may not read: give "
            "the final URL, on an allowed host"
        )
        try:
            url = self.url.join(location)
        except httpx.InvalidURL:
            raise forbidden from None
        target = replace(self, url=url)
        if not _is_allowed(target, rules) or (self.url.scheme, url.scheme) == ("https", "http"):
            raise forbidden
        return target

    def unreachable(self, what: str, *, later: bool = False) -> UnreachableReference:
        """The error for a host that does not return the requested file or document.

        Args:
            what: predicate of the message, such as "does not respond".
            later: whether the host may return it later.
        """
        return UnreachableReference(f"{self.field}: '{self.host}' {what}", later=later)


class Connections:
    """The outgoing HTTP requests of one request to the service, which share a budget of bytes.

    An async context manager that closes the connections.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        rules: Sequence[HostRule] | None = None,
        patience: Patience | None = None,
        resolver: Resolver = resolve,
        tls: ssl.SSLContext | None = None,
        remotes: Remotes | None = None,
    ) -> None:
        """Create the connections without opening any.

        Args:
            settings: allowed hosts, and the largest number of bytes.
            rules: allowed hosts; None takes those of references.
            patience: time limits.
            resolver: resolves host names.
            tls: trusted certificates; None uses httpx's own.
            remotes: limits and caches that all requests share; None for own ones.
        """
        self._remotes = remotes or Remotes()
        self._rules = settings.allowed_hosts if rules is None else rules
        self._limit = int(settings.max_body_bytes)
        self._left = self._limit
        self._patience = patience or Patience()
        self._resolver = resolver
        self._tls = tls
        self._addresses: dict[tuple[str, int], Sequence[str]] = {}
        self._clients: dict[tuple[str, str, int, str], httpx.AsyncClient] = {}
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    @property
    def rules(self) -> Sequence[HostRule]:
        """The allowed hosts."""
        return self._rules

    @property
    def cache(self) -> RangeCache:
        """Ranges that were received, also by other requests."""
        return self._remotes.cache

    @property
    def left(self) -> int:
        """Bytes that may still be received."""
        return self._left

    @asynccontextmanager
    async def response(
        self,
        remote: Remote,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        redirects: bool = True,
    ) -> AsyncIterator[httpx.Response]:
        """The response to a request, redirects followed; its body is not read yet.

        Args:
            remote: the URL.
            method: GET or POST.
            headers: further headers.
            content: the body of a POST.
            redirects: whether redirects are followed; if not, one is a response like any other.

        Raises:
            ForbiddenReference: an address, or the target of a redirect, is not allowed.
            UnreachableReference: the host does not respond.
        """
        first = remote
        for _ in range(MAX_REDIRECTS + 1):
            async with (
                self._remotes.limiter,
                self._send(remote, method, headers or {}, content) as response,
            ):
                redirected = response.status_code in _REDIRECTS and "location" in response.headers
                if not (redirects and redirected):
                    yield response
                    return
                remote = remote.redirected(response.headers["location"], self._rules)
                if response.status_code not in _WITH_BODY:
                    method, content = "GET", None
        raise first.unreachable(
            f"redirected more than {MAX_REDIRECTS} times: give the URL that the redirects lead to"
        )

    async def body(
        self, response: httpx.Response, remote: Remote, *, most: int | None = None
    ) -> AsyncIterator[bytes]:
        """The chunks of a response's body, counted against the budget.

        Args:
            response: the response, whose body has not been read.
            remote: the URL of the response.
            most: largest size of this body, bytes; None limits it by the budget only.

        Raises:
            BodyTooLarge: the body exceeds the budget, or its declared length does.
        """
        bound = self._left if most is None else min(most, self._left)
        announced = response.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > bound:
            raise self.too_large(remote)
        # Raw chunks, so that a compressed body is counted by the bytes received.
        async for chunk in response.aiter_raw(CHUNK_BYTES):
            self._left -= len(chunk)
            self._remotes.received(len(chunk))
            bound -= len(chunk)
            if bound < 0:
                raise self.too_large(remote)
            yield chunk

    async def document(
        self, remote: Remote, *, method: str = "GET", content: bytes | None = None
    ) -> str:
        """The text of a JSON document.

        Args:
            remote: the URL.
            method: GET or POST.
            content: the body of a POST, JSON.

        Raises:
            ForbiddenReference: an address or the target of a redirect is not allowed.
            UnreachableReference: the host does not return a document.
            BodyTooLarge: the document is too large.
            InvalidRequest: the host rejects the request (status 400 or 422).
        """
        headers = {"Accept": "application/geo+json, application/json"}
        if content is not None:
            headers["Content-Type"] = "application/json"
        async with self.response(
            remote, method=method, headers=headers, content=content
        ) as response:
            chunks = [c async for c in self.body(response, remote, most=_MAX_DOCUMENT_BYTES)]
        data, status = b"".join(chunks), response.status_code
        if status in _LOGIN:
            raise remote.unreachable(
                f"requires a login (status {status}), and this server sends no credentials: give "
                "a public URL"
            )
        if status in _WRONG:
            text = "".join(c for c in data.decode("utf-8", "replace") if c.isprintable())
            raise InvalidRequest.of(
                remote.field,
                f"'{remote.host}' rejected the server's request (status {status}): "
                f"{shown(text, _SHOWN)}",
            )
        if status != HTTPStatus.OK:
            raise remote.unreachable(
                f"returned status {status} and not a document: check the URL, or retry later"
            )
        if parsed_bytes(data) > _MAX_PARSED_BYTES:
            raise BodyTooLarge(
                f"{remote.field}: '{remote.host}' returned a document that needs "
                f"{parsed_bytes(data)} bytes of memory, and the limit is {_MAX_PARSED_BYTES}: "
                "request fewer items"
            )
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise remote.unreachable(
                "returned a document that is not UTF-8: check the URL"
            ) from error

    def too_large(self, remote: Remote) -> BodyTooLarge:
        """The error for files that exceed the budget of bytes."""
        return BodyTooLarge(
            f"{remote.field}: the named files have more than {self._limit} bytes together, which "
            "is the largest allowed size (PIMC_MAX_BODY_BYTES): name fewer files, or give a "
            "smaller `bbox` or `area`"
        )

    @asynccontextmanager
    async def _send(
        self, remote: Remote, method: str, headers: Mapping[str, str], content: bytes | None
    ) -> AsyncIterator[httpx.Response]:
        """The response of the first address that accepts the connection."""
        addresses = await self._checked(remote)
        for n, address in enumerate(addresses):
            client = self._client(remote, address)
            request = client.build_request(
                method,
                remote.url.copy_with(host=address, fragment=None),
                headers={**headers, "Host": remote.url.netloc.decode("ascii")},
                content=content,
                # The name that the certificate must have, whatever the address.
                extensions={"sni_hostname": remote.host},
            )
            try:
                response = await client.send(request, stream=True)
            except httpx.ConnectError as error:
                if n + 1 < len(addresses):
                    continue
                raise remote.unreachable(
                    "accepts no connection: retry later", later=True
                ) from error
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise remote.unreachable("does not respond: retry later", later=True) from error
            try:
                yield response
            except httpx.HTTPError as error:
                raise remote.unreachable(
                    "closed the connection or sent nothing for too long: retry later", later=True
                ) from error
            finally:
                await response.aclose()
            return

    def _client(self, remote: Remote, address: str) -> httpx.AsyncClient:
        """The client for one address of one host.

        Idle connections are reused only for the same host. If they were reused for the same
        address, a request to another host there could use a connection whose certificate was
        checked for the first host.
        """
        key = (remote.url.scheme, remote.host, remote.port, address)
        if key not in self._clients:
            client = httpx.AsyncClient(
                verify=self._tls or _trusted(),
                # Ignore the environment's proxy and .netrc: a proxy would connect to addresses that
                # were not checked, and .netrc would send a password.
                trust_env=False,
                timeout=httpx.Timeout(self._patience.idle_seconds),
                limits=httpx.Limits(max_keepalive_connections=_KEPT),
                headers={"User-Agent": "pimc", "Accept-Encoding": "identity"},
            )
            self._clients[key] = client
            self._open.push_async_callback(client.aclose)
        return self._clients[key]

    async def _checked(self, remote: Remote) -> Sequence[str]:
        """The host's addresses, resolved once; all of them must be allowed.

        Raises:
            ForbiddenReference: an address is not allowed; the message does not name it.
            UnreachableReference: the host has no address.
        """
        if _address(remote.host) is not None:
            return [remote.host]  # allowed by name already
        key = (remote.host, remote.port)
        if key not in self._addresses:
            self._addresses[key] = await self._resolved(remote)
        return self._addresses[key]

    async def _resolved(self, remote: Remote) -> Sequence[str]:
        try:
            with anyio.fail_after(self._patience.idle_seconds):
                found = list(dict.fromkeys(await self._resolver(remote.host, remote.port)))
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            raise remote.unreachable(
                "has no address: check the name of the host", later=True
            ) from error
        if not found:
            raise remote.unreachable("has no address: check the name of the host")
        if not all(_may_connect(address, remote.port, self._rules) for address in found):
            raise ForbiddenReference(
                f"{remote.field}: '{remote.host}' has an address that is neither public nor "
                f"allowed: {_HAVE_ALLOWED}"
            )
        return found


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The trusted certificates of httpx, loaded once: that takes a tenth of a second."""
    return httpx.create_ssl_context(trust_env=False)


def _is_allowed(remote: Remote, rules: Sequence[HostRule]) -> bool:
    """Whether a rule names the host, checked before it is resolved."""
    if remote.url.scheme not in _PORTS or remote.url.userinfo or not remote.host:
        return False
    address = _address(remote.host)
    return any(
        rule.port in {None, remote.port}
        and (rule.name == remote.host if address is None else _holds(rule, address))
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
    if any(address in network for network in _IPV4_GATEWAYS):
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
