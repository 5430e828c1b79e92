"""Who may ask: API keys, the address bound, and the headers that protect a browser."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Unauthorized
from service.settings import Settings, SettingsError

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "frame-ancestors 'none'",
}


class Keys:
    """The API keys, kept only as hashes; without any, everybody may ask."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = tuple(_hash(key) for key in keys)

    def check(self, headers: Headers) -> None:
        """Let a request pass whose `Authorization: Bearer` or `X-API-Key` is a key.

        Raises:
            Unauthorized: keys are required, and none or a wrong one came.
        """
        if not self._hashes:
            return
        given = _given(headers)
        if given is None:
            raise Unauthorized("a key is needed, as 'Authorization: Bearer …' or 'X-API-Key: …'")
        # Every hash is compared, each in constant time: the time taken tells nothing of the keys.
        if not sum(hmac.compare_digest(_hash(given), known) for known in self._hashes):
            raise Unauthorized("the key given is not known here")


def _given(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key")


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


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


class SecurityHeaders:
    """ASGI middleware: the headers that keep a browser from guessing, leaking and framing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on; add the headers to its answer."""

        async def send_protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_protected)
