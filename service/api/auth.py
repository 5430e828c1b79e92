"""Access: API keys with names and expiry, refused keys, and bind-address checks."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

import anyio
from anyio import sleep, to_thread
from pydantic import ByteSize, TypeAdapter
from starlette.datastructures import Headers
from starlette.types import Scope

from service.errors import PIMCError, Unauthorized
from service.settings import KEY_HASH, Settings, SettingsError, key_hash

_LOG = logging.getLogger(__name__)
_FILE_BYTES = 2**20
_LOOK_SECONDS = 1.0
"""Seconds between two checks whether the key file has changed."""
_EXPIRES = "expires"
UNLIMITED = "unlimited"
QUOTAS = ("requests", "jobs", "pixels", "storage")
"""Names of the quotas that a line of a key file may state."""
_OPTIONS = {_EXPIRES, *QUOTAS}
_SIZE = TypeAdapter(ByteSize)
_NAME = re.compile(r"(?![0-9a-f]{16}$)[a-z0-9][a-z0-9._@-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Key:
    """One API key."""

    owner: str
    """Id of the caller: the name in the key file, or an id derived from the key's hash."""
    digest: bytes
    """SHA-256 of the key."""
    expires: datetime | None = None
    """Time from which the key is no longer valid; None if it does not expire."""
    quotas: Mapping[str, int | None] = field(default_factory=dict)
    """The caller's own quotas by name, among `QUOTAS`; None is unlimited, and a quota that is not
    stated is that of the settings."""

    @classmethod
    def of_hash(cls, text: str) -> Key:
        """A key without a name, from `sha256:` and the hex SHA-256."""
        return cls(owner=_unnamed(text), digest=bytes.fromhex(text.removeprefix(KEY_HASH)))


def read_keys(text: str) -> tuple[Key, ...]:
    """Parse a key file: a name, a key, and options per line; `#` begins a comment.

    Lines with the same name belong to one caller, so that a key can be replaced. Quotas belong to
    the caller, so that those of one line hold for all of its lines.

    Args:
        text: content of the file.

    Raises:
        ValueError: a line is not valid, two lines hold the same key, or lines of one name state
            different quotas; no message holds a key.
    """
    keys: dict[bytes, Key] = {}
    quotas: dict[str, dict[str, int | None]] = defaultdict(dict)
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            key = _read_key(words)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None  # the cause may hold a key
        if key.digest in keys:
            raise ValueError(f"line {number}: an earlier line holds the same key; remove one")
        keys[key.digest] = key
        own = quotas[key.owner]
        for name, quota in key.quotas.items():
            if own.setdefault(name, quota) != quota:
                raise ValueError(
                    f"line {number}: an earlier line of '{key.owner}' states another {name}=; "
                    "state it once"
                )
    return tuple(replace(key, quotas=quotas[key.owner]) for key in keys.values())


def _read_key(words: list[str]) -> Key:
    options = dict(word.partition("=")[::2] for word in words[2:])
    if len(words) < 2 or len(options) < len(words) - 2 or not set(options) <= _OPTIONS:
        raise ValueError(
            "a line must be 'NAME KEY', and may add expires=2027-01-31, requests=4, jobs=20, "
            "pixels=500000000 and storage=50GiB, each once"
        )
    name = words[0]
    if not _NAME.fullmatch(name):
        raise ValueError(
            "the name must be 1 to 64 lower-case letters, digits, '.', '_', '@' or '-', begin with "
            "a letter or a digit, and not be 16 hex digits"
        )
    digest = bytes.fromhex(key_hash(words[1]).removeprefix(KEY_HASH))
    expires = _end_of_validity(options.pop(_EXPIRES)) if _EXPIRES in options else None
    quotas = {quota: _quota(quota, text) for quota, text in options.items()}
    return Key(owner=name, digest=digest, expires=expires, quotas=quotas)


def _quota(name: str, text: str) -> int | None:
    """A quota of a key file; None if it is unlimited."""
    if text == UNLIMITED:
        return None
    try:
        number = int(_SIZE.validate_python(text)) if name == "storage" else int(text)
    except ValueError:
        number = 0
    if not 0 < number < 2**63:
        example = "50GiB" if name == "storage" else "20"
        raise ValueError(
            f"{name}={text} is not a positive number such as {name}={example}, or "
            f"{name}={UNLIMITED}"
        )
    return number


def _end_of_validity(text: str) -> datetime:
    """The end of the given day in UTC, or the given time with its zone."""
    try:
        if len(text) == len("2027-01-31"):
            return datetime.combine(date.fromisoformat(text) + timedelta(days=1), time(), UTC)
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ValueError(
            f"'{text}' is not a date such as 2027-01-31 or a time such as 2027-01-31T12:00:00Z"
        ) from None
    if moment.tzinfo is None:
        raise ValueError(f"'{text}' has no time zone; write {text}Z")
    return moment


class ApiKeys:
    """API keys, kept only as hashes; without any key, every caller is admitted.

    Args:
        hashes: hashes of keys without a name, in the form `sha256:…` of `Settings.api_keys`.
        file: file of keys with a name, read again when it changes; None if there is no such file.
        adopt: called with the name of each key of the file, by the id that the key has without a
            name, so that the key's jobs and models move to the name.
    """

    def __init__(
        self,
        hashes: Iterable[str] = (),
        *,
        file: Path | None = None,
        adopt: Callable[[Mapping[str, str]], None] = lambda _: None,
    ) -> None:
        self._unnamed = {key.digest: key for key in map(Key.of_hash, hashes)}
        self._keys = self._unnamed
        self._quotas: Mapping[str, Mapping[str, int | None]] = {}
        self._file = file
        self._adopt = adopt
        self._seen: tuple[int, ...] = ()
        self._fault: str | None = None
        self._look_at = 0.0

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._keys) or self._file is not None

    def quotas_of(self, caller: str) -> Mapping[str, int | None]:
        """A caller's own quotas by name; empty if the key file states none for it."""
        return self._quotas.get(caller, {})

    @property
    def callers(self) -> int:
        """Number of callers to whom the keys belong."""
        return len({key.owner for key in self._keys.values()})

    def valid(self) -> int:
        """Number of keys that have not expired."""
        now = datetime.now(UTC)
        return sum(key.expires is None or now < key.expires for key in self._keys.values())

    def load(self) -> None:
        """Read the key file if it has changed. After an error the previous keys stay valid.

        Raises:
            ValueError: the file cannot be read, or a line is not valid.
            PIMCError: jobs or models cannot be moved to the names of their keys.
        """
        if self._file is None:
            return
        try:
            found = self._file.stat()
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen == self._seen:
                return
            if found.st_size > _FILE_BYTES:
                raise ValueError(
                    f"the file has {found.st_size} bytes, and at most {_FILE_BYTES} are allowed: "
                    "remove lines of expired keys"
                )
            named = read_keys(self._file.read_text("utf-8"))
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from error
        except UnicodeDecodeError:
            raise ValueError("the file is not valid UTF-8 text: save it as UTF-8") from None
        self._adopt({_unnamed(KEY_HASH + key.digest.hex()): key.owner for key in named})
        self._keys = self._unnamed | {key.digest: key for key in named}
        self._quotas = {key.owner: key.quotas for key in named}
        self._seen = seen
        _LOG.info("API keys read", extra={"keys": len(named), "valid": self.valid()})

    async def refresh(self) -> None:
        """Read the key file if it has changed, at most once a second; log an invalid file."""
        now = anyio.current_time()
        if self._file is None or now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        try:
            await to_thread.run_sync(self.load)
        except (ValueError, PIMCError, OSError) as error:
            if str(error) != self._fault:  # logged once, not every second
                _LOG.error(
                    "PIMC_API_KEYS_FILE has changed but is not valid; the previous keys stay: %s",
                    error,
                )
            self._fault = str(error)
        else:
            self._fault = None

    def check(self, headers: Headers) -> str | None:
        """Check the key in `Authorization: Bearer` or `X-API-Key`.

        Args:
            headers: headers of the request.

        Returns:
            The caller's id: the key's name, or 16 hex digits that are stable for a key and do not
            reveal it; None if no keys are set.

        Raises:
            Unauthorized: keys are set, and the request's key is missing, wrong or expired.
        """
        if not self.required:
            return None
        given = given_key(headers)
        if not given:
            raise Unauthorized(
                "the request has no API key: send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            )
        digest = hashlib.sha256(given.encode()).digest()
        # Compare every hash, each in constant time, so that the duration reveals nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        found = [key for key, match in zip(self._keys.values(), matches, strict=True) if match]
        if not found:
            raise Unauthorized("the API key is not valid on this server: check the key and the URL")
        (key,) = found
        if key.expires is not None and datetime.now(UTC) >= key.expires:
            raise Unauthorized(
                f"the API key of '{key.owner}' expired at {key.expires.isoformat()}: request "
                "a new one from the server's administrator"
            )
        return key.owner


def given_key(headers: Headers) -> str | None:
    """The API key in a request's headers; None or empty if there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key")


def _unnamed(key_hash: str) -> str:
    # A hash of the hash instead of a part of it: the id in a job does not reveal the key's hash.
    return hashlib.sha256(f"caller {key_hash}".encode()).hexdigest()[:16]


_FREE_REJECTIONS = 10
"""Rejections of one address that are not delayed."""
_FORGET_SECONDS = 300.0
"""Seconds without a rejection after which an address's count restarts."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_MOST_ADDRESSES = 4096


class Delays:
    """Seconds by which rejections of one address are delayed, beyond ten within five minutes.

    Only rejections are delayed, not responses to other clients at the same address.
    """

    def __init__(self) -> None:
        # By address, the most recent one last: count, and time of the last by the loop's clock.
        self._by_address: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def pause(self, address: str, now: float) -> tuple[float, int]:
        """Count a rejection.

        Args:
            address: address of the client.
            now: time in seconds, by a monotonic clock.

        Returns:
            Seconds to wait before the response (0 for the first ten, then 0.1, doubling up to 5),
            and the number of the address's rejections.
        """
        number, last = self._by_address.pop(address, (0, now))
        number = 1 if now - last > _FORGET_SECONDS else number + 1
        self._by_address[address] = (number, now)
        if len(self._by_address) > _MOST_ADDRESSES:
            self._by_address.popitem(last=False)
        beyond = number - _FREE_REJECTIONS - 1
        pause = 0.0 if beyond < 0 else min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(beyond, 10))
        return pause, number


class Refusals:
    """Refused keys by address: logged, and delayed beyond ten of them within five minutes.

    Args:
        counted: called for each refused key.
    """

    def __init__(self, counted: Callable[[], None] = lambda: None) -> None:
        self._counted = counted
        self._delays = Delays()

    async def refused(self, address: str) -> None:
        """Record a refused key, and wait before the response is sent.

        Args:
            address: address of the client.
        """
        pause, number = self._delays.pause(address, anyio.current_time())
        self._counted()
        fields = {"client": address, "refused": number, "pause": round(pause, 1)}
        _LOG.warning("API key refused", extra=fields)
        if pause:
            await sleep(pause)


def share_of(caller: str | None, scope: Scope) -> str:
    """The id for whose quotas a request counts: the caller's, or without keys its address.

    Args:
        caller: the caller's id; None if no keys are set.
        scope: ASGI scope of the request.
    """
    return address_of(scope) if caller is None else caller


def address_of(scope: Scope) -> str:
    """The client's address; for IPv6 its /64 network, because a client can use all of it.

    Args:
        scope: ASGI scope of the request.
    """
    return network_of((scope.get("client") or ("", None))[0])


def network_of(host: str) -> str:
    """An address as clients are counted: an IPv4 address, or the /64 network of an IPv6 address.

    Args:
        host: address of a client; returned unchanged if it is not an IP address.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket, or a test without a network
        return str(host)
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))


def check_binding(settings: Settings) -> None:
    """Reject settings that expose a service without API keys to other machines.

    Raises:
        SettingsError: no key is set, and `PIMC_ALLOW_ANONYMOUS` is 0, or it is not set and the
            address is not a loopback address.
    """
    if settings.needs_key or settings.allow_anonymous:
        return
    if settings.allow_anonymous is not None:
        raise SettingsError(
            "PIMC_ALLOW_ANONYMOUS is 0, but neither PIMC_API_KEYS nor PIMC_API_KEYS_FILE is set: "
            "set keys, or PIMC_ALLOW_ANONYMOUS=1 to let every client use the service without a key"
        )
    if _is_loopback(settings.host):
        return
    raise SettingsError(
        f"PIMC_HOST is {settings.host}, which other machines can reach, but PIMC_API_KEYS is not "
        "set: set keys, or PIMC_ALLOW_ANONYMOUS=1 to let every client use the service without a key"
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

    `check_binding` checks this at the start of `python -m service`. If another server, such as
    `uvicorn`, binds the address, the application learns the address only from a request.

    Args:
        scope: ASGI scope of the request.
        settings: the settings.

    Raises:
        Unauthorized: no key is set, and `PIMC_ALLOW_ANONYMOUS` is 0, or it is not set and the
            address is not a loopback address.
    """
    if settings.needs_key or settings.allow_anonymous:
        return
    if settings.allow_anonymous is not None:
        raise Unauthorized(
            "the server has no API keys, and PIMC_ALLOW_ANONYMOUS=0 rejects requests without a "
            "key: its administrator must set PIMC_API_KEYS or PIMC_API_KEYS_FILE"
        )
    host = (scope.get("server") or ("", None))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket, or a test without a network
        return
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    if not (mapped or address).is_loopback:
        raise Unauthorized(
            "other machines can reach the server's address, but the server has no API keys: its "
            "administrator must set PIMC_API_KEYS, or PIMC_ALLOW_ANONYMOUS=1"
        )
