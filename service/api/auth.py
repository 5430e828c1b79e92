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
    """API keys, kept only as hashes; without any, every caller is admitted.

    Args:
        hashes: each `sha256:` and the hex SHA-256 of a key, as `Settings.api_keys` holds them.
    """

    def __init__(self, hashes: Iterable[str]) -> None:
        self._callers = {
            bytes.fromhex(text.removeprefix(KEY_HASH)): _caller(text) for text in hashes
        }

    def check(self, headers: Headers) -> str | None:
        """Check the key in `Authorization: Bearer` or `X-API-Key`.

        Returns:
            The caller's id: 16 hex digits that are stable for a key and do not reveal it; None if
            no keys are set.

        Raises:
            Unauthorized: keys are set, and the request has none or a wrong one.
        """
        if not self._callers:
            return None
        given = _given(headers)
        if given is None:
            raise Unauthorized("no API key: send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
        digest = hashlib.sha256(given.encode()).digest()
        # Every hash is compared, each in constant time, so that the time reveals nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._callers]
        found = [who for who, match in zip(self._callers.values(), matches, strict=True) if match]
        if not found:
            raise Unauthorized("the API key is not valid")
        return found[0]


def share_of(caller: str | None, scope: Scope) -> str:
    """Whose share of the service a request takes: its key's, or its address's without keys.

    An IPv6 client chooses among 2^64 addresses, so its network of 64 bits counts as one.

    Args:
        caller: the caller's id; None if no keys are set.
        scope: of the request.
    """
    if caller is not None:
        return caller
    host = (scope.get("client") or ("", None))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a socket in the file system, or a test without a network
        return str(host)
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))


def _given(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key")


def _caller(key_hash: str) -> str:
    # A hash of the hash, not a part of it: the id stored with a job does not reveal the key's hash.
    return hashlib.sha256(f"caller {key_hash}".encode()).hexdigest()[:16]


def check_binding(settings: Settings) -> None:
    """Reject settings that expose a service without API keys to other machines.

    Raises:
        SettingsError: the address is not a loopback address, no key is set, and
            `PIMC_ALLOW_ANONYMOUS` is not set.
    """
    if _is_loopback(settings.host) or settings.api_keys or settings.allow_anonymous:
        return
    raise SettingsError(
        f"PIMC_HOST is {settings.host}, which other machines can reach, but PIMC_API_KEYS is not "
        "set: set keys, or PIMC_ALLOW_ANONYMOUS=1 if everybody may use the service without one"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_reached_address(scope: Scope, settings: Settings) -> None:
    """Reject requests over an address that other machines can reach if no API keys are set.

    `check_binding` checks this at the start; this check also holds if another server than
    `python -m service` binds the address, which the application does not know.

    Raises:
        Unauthorized: no key is set, and neither is `PIMC_ALLOW_ANONYMOUS`.
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
            "the server's address is reachable from other machines, but it has no API keys: its "
            "administrator must set PIMC_API_KEYS, or PIMC_ALLOW_ANONYMOUS=1"
        )
