"""API-key authentication and bind-address checks."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import Scope

from service.errors import Unauthorized
from service.settings import KEY_HASH, Settings, SettingsError


class ApiKeys:
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


def check_reached_address(scope: Scope, settings: Settings) -> None:
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
