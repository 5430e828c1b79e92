"""Settings: environment variables `PIMC_*`, read once, at start.

`docs/reference/settings.md` has a row for each field; a test compares them.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "PIMC_"
KEY_HASH = "sha256:"
"""Prefix of a hashed API key; every key is kept in this form."""
SHORT_KEY = 16
"""A shorter API key is logged as a warning: an unsalted hash does not protect it."""
_SHA256 = re.compile(KEY_HASH + r"[0-9a-fA-F]{64}")
_HOST = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<host>[^:\[\]/@\s]+))(?::(?P<port>\d{1,5}))?")
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")
_NAME = re.compile(r"(?=.{1,253}\.?$)[a-zA-Z0-9_-]{1,63}(\.[a-zA-Z0-9_-]{1,63})*\.?")
LogLevel = Literal["debug", "info", "warning", "error", "critical"]


class SettingsError(Exception):
    """The environment holds invalid settings; the message names each variable."""


@dataclass(frozen=True, kw_only=True)
class HostRule:
    """One entry of `PIMC_ALLOWED_HOSTS`: a name or a network, optionally with a port."""

    name: str | None = None
    """A host's name, lower case, ASCII; None for addresses."""
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
    """Addresses that may be read from even if they are not public; None for a name."""
    port: int | None = None
    """The only port allowed; None for all."""

    @classmethod
    def read(cls, text: str) -> HostRule:
        """Parse an entry.

        Raises:
            ValueError: it is not a name, address or network.
        """
        network = _network(text)
        if network is not None:  # before the port: 2001:db8::1 has none
            return cls(network=network)
        found = _HOST.fullmatch(text)
        if found is None:
            raise ValueError(f"'{text}' is not a name, name:port, address or network (10.0.0.0/8)")
        port = int(found["port"]) if found["port"] else None
        host = found["bracketed"] or found["host"]
        network = _network(host)
        if network is not None:
            return cls(network=network, port=port)
        if not _NAME.fullmatch(host) or host.rpartition(".")[2].isdecimal():
            raise ValueError(f"'{host}' is not a host name; write one beyond ASCII as xn--…")
        return cls(name=host.lower().removesuffix("."), port=port)

    def __str__(self) -> str:
        host = self.name or str(self.network)
        return host if self.port is None else f"{host}:{self.port}"


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None


class Settings(BaseSettings):
    """All settings with their defaults."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address that `python -m service` binds."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port that `python -m service` binds; 0 takes any free one, which the log names."""
    allow_anonymous: bool | None = None
    """Whether the service may be used without API keys: True over every address, False over none;
    None over loopback addresses only."""
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """API keys, comma-separated, each plain or as `sha256:` and its hex SHA-256; with at least one,
    tasks, jobs and models need a key. Kept as hashes only."""
    api_keys_file: Path | None = None
    """File of further API keys, each with a name and optionally an expiry, read again when it
    changes."""
    private: bool = False
    """Whether metrics, documentation and the details of readiness need an API key as well."""
    model_dir: Path | None = None
    """Folder of additional bundles; a bundle replaces the built-in one of the same name."""
    model_checksums: Path | None = None
    """File of sha256 checksums as `sha256sum` writes it; with it, a bundle is served only if each
    of its files is listed."""
    providers: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` uses CUDA if it works, else the CPU; `cuda` stops the start if CUDA does not work;
    `cpu` uses the CPU."""
    precision: Literal["auto", "float32"] = "auto"
    """`auto` uses a bundle's float16 file on CUDA and its int8 file on a CPU with int8 products,
    if the card's measured loss is below 0.3 points; `float32` never does, so that predictions are
    the same on every machine up to rounding."""
    max_body_bytes: Annotated[ByteSize, Field(ge=1)] = ByteSize(2 * 2**30)
    """Largest upload, in bytes or as `500MB`, `2GiB`; also what the zips in it hold together."""
    jp2: bool = True
    """Whether JPEG 2000 files (`.jp2`) are read, by GDAL's OpenJPEG."""
    upload_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds over which an upload must keep `upload_rate`."""
    upload_rate: Annotated[ByteSize, Field(ge=1)] = ByteSize(16 * 2**10)
    """Bytes per second that an upload must keep; a slower one holds no queue slot."""
    max_spool_bytes: ByteSize | None = None
    """Bodies of requests in flight on disk, in bytes or as `500MB`, `2GiB`; one caller may take
    half. At least twice `max_body_bytes`; None is eight times that."""
    root_path: Annotated[str | None, Field(max_length=200)] = None
    """Path under which a proxy serves the service, such as `/pimc`; links begin with it."""
    trusted_proxies: Annotated[
        tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...], NoDecode
    ] = ()
    """Addresses and networks, comma-separated, of proxies whose `X-Forwarded-For` and
    `X-Forwarded-Proto` are believed."""
    max_connections: Annotated[int, Field(ge=16)] = 1024
    """Open connections. At the bound, the one that has waited longest without a request is closed.
    The limit of open files is raised for them as far as the system allows."""
    max_connections_per_address: Annotated[int, Field(ge=1)] = 256
    """Open connections of one client address; set it to `PIMC_MAX_CONNECTIONS` behind a proxy."""
    head_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    """Seconds within which a request's line and headers must arrive."""
    send_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds for which a client may read nothing of a response before it is disconnected."""
    max_downloads: Annotated[int, Field(ge=1)] = 64
    """Results of jobs that are sent at once; a further reader is `overloaded`."""
    max_downloads_per_caller: Annotated[int, Field(ge=1)] = 16
    """Results of jobs that are sent at once to one key, or to one address without keys."""
    max_fields: Annotated[int, Field(ge=1)] = 100_000
    """Polygons of one request."""
    max_raster_bytes: Annotated[ByteSize, Field(ge=1)] = ByteSize(16 * 2**30)
    """Largest decoded stack, in bytes or as `500MB`, `2GiB`, computed from the headers."""
    memory_budget: Annotated[ByteSize, Field(ge=2**26)] | None = None
    """Memory that runs may take together for what they decode, in bytes or as `500MB`, `2GiB`; None
    is half of the container's limit, or without one of the machine's memory."""
    sync_max_pixels: Annotated[int, Field(ge=1)] = 2048 * 2048
    """Pixels of the largest raster that is processed synchronously; a larger one becomes a job."""
    max_concurrency: Annotated[int, Field(ge=1)] = 4
    """Run slots. There are twice as many queue slots; without one a request is `overloaded`."""
    max_items: Annotated[int, Field(ge=1)] = 500
    """STAC items of one request."""
    allowed_roots: Annotated[tuple[Path, ...], NoDecode] = ()
    """Folders, comma-separated, whose files a request may name instead of sending them."""
    allowed_hosts: Annotated[tuple[HostRule, ...], NoDecode] = ()
    """Hosts, comma-separated, from which a request may have files downloaded: `name`, `name:port`,
    an address or a network; only public addresses unless the address or its network is listed."""
    state_dir: Path | None = None
    """Folder of jobs and their results; None uses `state/<port>` in the checkout."""
    min_free_bytes: Annotated[ByteSize, Field(ge=0)] = ByteSize(32 * 2**20)
    """Bytes that must be free for jobs and for requests; with fewer the service is not ready."""
    demo_dir: Path | None = None
    """Folder of GeoTIFFs that the explorer offers everybody as its demo; None for no demo."""
    job_workers: Annotated[int, Field(ge=1)] = 1
    """Jobs that run at once, in addition to synchronous runs."""
    max_jobs: Annotated[int, Field(ge=1)] = 100
    """Jobs that may wait; a further one is `overloaded`."""
    max_requests_per_caller: Annotated[int, Field(ge=1)] | None = None
    """Requests of one caller at once; None bounds them by its queue slots alone. A caller is an API
    key's name, without keys an address. Beyond this and the three below: `too_many_requests`."""
    max_jobs_per_caller: Annotated[int, Field(ge=1)] | None = None
    """Jobs of one caller that wait or run; None is half of `max_jobs` if there are several keys,
    and no bound otherwise."""
    max_pixels_per_day: Annotated[int, Field(ge=1)] | None = None
    """Pixels, series and points of one caller per day (UTC); None is no bound."""
    max_storage_per_caller: Annotated[ByteSize, Field(ge=1)] | None = None
    """Files of one caller's jobs, in bytes or as `500MB`, `2GiB`; None is no bound."""
    max_heads: Annotated[int, Field(ge=1)] = 100
    """Models of its own classes that one caller may have."""
    job_ttl: Annotated[int, Field(ge=1)] = 7 * 24 * 3600
    """Seconds for which a finished job and its result are kept."""
    grace_seconds: Annotated[int, Field(ge=0)] = 30
    """Seconds that running requests have to end after SIGTERM."""
    log_level: LogLevel = "info"
    """Least severe level that is logged."""

    @property
    def state_folder(self) -> Path:
        """State directory; services on different ports have different ones."""
        return self.state_dir or Path(__file__).parents[1] / "state" / str(self.port)

    @property
    def needs_key(self) -> bool:
        """Whether requests need an API key."""
        return bool(self.api_keys) or self.api_keys_file is not None

    @property
    def spool_bytes(self) -> int:
        """Bytes of bodies of requests in flight on disk."""
        return self.max_spool_bytes or 8 * self.max_body_bytes

    @field_validator("max_spool_bytes")
    @classmethod
    def _holds_two_bodies(cls, value: ByteSize | None, info: ValidationInfo) -> ByteSize | None:
        body = info.data.get("max_body_bytes")  # not there if it is not valid itself
        if value is not None and body is not None and value < 2 * body:
            raise ValueError(
                f"{value} bytes are less than twice PIMC_MAX_BODY_BYTES ({body}): one caller may "
                "take half, and one body must fit"
            )
        return value

    @field_validator("api_keys", "allowed_roots", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _parts(value)

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _read_rules(cls, value: object) -> object:
        parts = _parts(value)
        if not isinstance(parts, tuple | list):
            return value
        return tuple(HostRule.read(part) if isinstance(part, str) else part for part in parts)

    @field_validator("root_path")
    @classmethod
    def _is_a_path(cls, value: str | None) -> str | None:
        if value and not _ROOT_PATH.fullmatch(value):
            raise ValueError(f"'{value}' is not a path such as /pimc, without a slash at its end")
        return value

    @field_validator("demo_dir")
    @classmethod
    def _is_folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"{value} is not an existing directory")
        return value

    @field_validator("allowed_roots")
    @classmethod
    def _are_folders(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        for root in value:
            if not root.is_absolute() or not root.is_dir():
                raise ValueError(f"{root} is not an absolute path to an existing directory")
        return value

    @field_validator("api_keys")
    @classmethod
    def _hashed(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        return tuple(SecretStr(key_hash(key.get_secret_value())) for key in value)

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower_level(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("model_dir")
    @classmethod
    def _is_a_folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"{value} is not an existing directory")
        return value


def _parts(value: object) -> object:
    """The parts of a comma-separated variable."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def key_hash(key: str) -> str:
    """`sha256:…` of a key; a hash is returned as it is.

    Raises:
        ValueError: it is neither a hash nor a key that a header can hold.
    """
    if key.startswith(KEY_HASH):
        if not _SHA256.fullmatch(key):
            raise ValueError(f"a key that begins with {KEY_HASH} must have 64 hex digits after it")
        return key.lower()
    if not (key.isascii() and key.isprintable() and " " not in key and key):
        raise ValueError("a key must be printable ASCII without spaces, as headers are")
    return KEY_HASH + hashlib.sha256(key.encode()).hexdigest()


def read_settings(**overrides: Any) -> Settings:  # noqa: ANN401 - whatever a field takes
    """Settings from the environment, with some fields set by the caller.

    Raises:
        SettingsError: a variable has an invalid value; the message lists each.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = [
            f"{PREFIX}{str(e['loc'][0]).upper()}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors(include_input=False)  # a key must not appear in a log
        ]
        raise SettingsError("\n".join(lines)) from error


def short_keys(environment: Mapping[str, str] = os.environ) -> int:
    """Number of plain API keys that are short enough to be guessed."""
    parts = environment.get(f"{PREFIX}API_KEYS", "").split(",")
    keys = [key.strip() for key in parts if not key.strip().startswith(KEY_HASH)]
    return sum(0 < len(key) < SHORT_KEY for key in keys)


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names that begin with `PIMC_` but are not settings, such as misspelt ones."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(n for n in environment if n.upper().startswith(PREFIX) and n.upper() not in known)


def project_version() -> str:
    """The version of the project, by its installed metadata."""
    try:
        return version("pimc-client")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0+checkout"
