"""Who may ask: API keys, the address bound, and the headers that protect a browser."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Unauthorized
from service.settings import KEY_HASH, Settings, SettingsError

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "frame-ancestors 'none'",
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
