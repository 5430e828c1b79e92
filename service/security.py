"""Who may ask: API keys, the address bound, and the headers that protect a browser."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Unauthorized
from service.settings import KEY_HASH, Settings, SettingsError

# For what a browser is not meant to show: nothing may be loaded, run or framed.
_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# Of these a route may know better.
_DEFAULTS: Mapping[str, str] = {
    "Content-Security-Policy": _NOTHING,
    # Answers are made of somebody's data, and may be of one key alone.
    "Cache-Control": "no-store",
}


class Keys:
    """The API keys, kept only as hashes; without any, everybody may ask.

    Args:
        hashes: each `sha256:` and the hex SHA-256 of a key, as `Settings.api_keys` holds them.
    """

    def __init__(self, hashes: Iterable[str]) -> None:
        self._callers = {
            bytes.fromhex(text.removeprefix(KEY_HASH)): _caller(text) for text in hashes
        }

    def check(self, headers: Headers) -> str | None:
        """Let a request pass whose `Authorization: Bearer` or `X-API-Key` is a key.

        Returns:
            The caller's id: 16 hex digits that stay the same for a key and do not tell it; None
            where no keys are set.

        Raises:
            Unauthorized: keys are required, and none or a wrong one came.
        """
        if not self._callers:
            return None
        given = _given(headers)
        if given is None:
            raise Unauthorized("a key is needed, as 'Authorization: Bearer …' or 'X-API-Key: …'")
        digest = hashlib.sha256(given.encode()).digest()
        # Every hash is compared, each in constant time: the time taken tells nothing of the keys.
        matches = [hmac.compare_digest(digest, known) for known in self._callers]
        found = [who for who, match in zip(self._callers.values(), matches, strict=True) if match]
        if not found:
            raise Unauthorized("the key given is not known here")
        return found[0]


def _given(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key")


def _caller(key_hash: str) -> str:
    # Of the hash, not a part of it: what stands with a job helps nobody to know the hash.
    return hashlib.sha256(f"caller {key_hash}".encode()).hexdigest()[:16]


def check_binding(settings: Settings) -> None:
    """Refuse to open to others a service that asks nobody for a key.

    Raises:
        SettingsError: the address is not this machine's own, no key is set, and nobody said that
            this is meant.
    """
    if _is_loopback(settings.host) or settings.api_keys or settings.allow_anonymous:
        return
    raise SettingsError(
        f"PIMC_HOST is {settings.host}, which others can reach, and PIMC_API_KEYS is not set: set "
        "keys, or set PIMC_ALLOW_ANONYMOUS=1 if everybody there may use the service"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_reached(scope: Scope, settings: Settings) -> None:
    """Serve nobody who came by an address that others can reach, where nobody is asked for a key.

    `check_binding` says so at the start; this holds where another server than `python -m service`
    binds the address, and the application never learns which.

    Raises:
        Unauthorized: no key is set, and nobody said that this is meant.
    """
    if settings.api_keys or settings.allow_anonymous:
        return
    host = (scope.get("server") or ("", None))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a socket in the file system, or a test without a network
        return
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    if not (mapped or address).is_loopback:
        raise Unauthorized(
            "the service is reached by an address that is open to others, and has no keys: its "
            "administrator sets PIMC_API_KEYS, or PIMC_ALLOW_ANONYMOUS=1"
        )


def page_policy(html: str, *, styles: str = "", images: str = "'self' data:", cdn: str = "") -> str:
    """The Content-Security-Policy of a page: its own scripts and styles, and what it says.

    Args:
        html: the page; the scripts and styles written into it may run as they are now, by hash.
        styles: further sources of styles.
        images: sources of images.
        cdn: a host of scripts and styles.
    """
    scripts = [cdn, *_hashes(html, "script")]
    sheets = [cdn, styles, *([] if styles else _hashes(html, "style"))]
    rules = {
        "default-src": ["'none'"],
        "script-src": ["'self'", *scripts],
        "style-src": ["'self'", *sheets],
        "img-src": [images],
        "font-src": ["'self'"],
        "connect-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
    return "; ".join(" ".join([rule, *filter(None, said)]) for rule, said in rules.items())


def _hashes(html: str, tag: str) -> list[str]:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in found)
    return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]


class SecurityHeaders:
    """ASGI middleware: the headers that keep a browser from guessing, leaking and framing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on; add the headers to its answer."""

        async def send_protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                for name, value in _DEFAULTS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_protected)
