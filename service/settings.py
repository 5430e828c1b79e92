"""Settings: environment variables `PIMC_*`, read once, at start.

`docs/reference/settings.md` has a row for each field; a test compares them.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    ByteSize,
    Field,
    SecretBytes,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "PIMC_"
KEY_HASH = "sha256:"
"""Prefix of a hashed API key; the service keeps every key in this form."""
SHORT_KEY = 16
"""Characters below which the log warns of an API key: an unsalted hash does not protect it."""
_SHA256 = re.compile(KEY_HASH + r"[0-9a-fA-F]{64}")
_HOST = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<host>[^:\[\]/@\s]+))(?::(?P<port>\d{1,5}))?")
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")
_TILES = re.compile(
    r"(?P<origin>https?://[A-Za-z0-9.-]+(?::\d{1,5})?)(?P<path>/[A-Za-z0-9/._~?&=%@+{}-]*)"
)
_NAME = re.compile(r"(?=.{1,253}\.?$)[a-zA-Z0-9_-]{1,63}(\.[a-zA-Z0-9_-]{1,63})*\.?")
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_.~-]+)*")
_ENDPOINT = re.compile(r"https?://[^/@?#\s]+")
LogLevel = Literal["debug", "info", "warning", "error", "critical"]


class SettingsError(Exception):
    """The settings or the state directory cannot be used; the message names each variable."""


@dataclass(frozen=True, kw_only=True)
class HostRule:
    """One entry of `PIMC_ALLOWED_HOSTS`: a name or a network, optionally with a port."""

    name: str | None = None
    """Host name in lower-case ASCII; None if the entry is a network."""
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
    """Addresses that may be read from even if they are not public; None if the entry is a name."""
    port: int | None = None
    """The only allowed port; None allows all ports."""

    @classmethod
    def read(cls, text: str) -> HostRule:
        """Parse an entry.

        Args:
            text: the entry: `name`, `name:port`, an address or a network.

        Raises:
            ValueError: the entry is not a name, address or network.
        """
        network = _network(text)
        if network is not None:  # checked before a port: the end of 2001:db8::1 is not a port
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
            raise ValueError(
                f"'{host}' is not a valid host name; write an international name as xn--…"
            )
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
    """Port that `python -m service` binds; 0 chooses a free port, which the log states."""
    allow_anonymous: bool | None = None
    """Whether clients may use the service without API keys: True over every address, False over
    none; None over loopback addresses only."""
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """API keys, comma-separated, each plain or as `sha256:` and its hex SHA-256; with at least one,
    tasks, jobs and models need a key. The service keeps only the hashes."""
    api_keys_file: Path | None = None
    """File of further API keys, each with a name and optionally an expiry and quotas; read again
    when it changes."""
    private: bool = False
    """Whether metrics, documentation and the details of readiness need an API key as well."""
    model_dir: Path | None = None
    """Folder of additional bundles; a bundle replaces the built-in one of the same name."""
    model_checksums: Path | None = None
    """File of sha256 checksums as `sha256sum` writes it; if set, a bundle is served only if the
    file lists each of its files."""
    providers: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` uses CUDA if it works, else the CPU; `cuda` stops the start if CUDA does not work;
    `cpu` uses the CPU."""
    precision: Literal["auto", "float32"] = "auto"
    """`auto` uses a bundle's float16 file on CUDA and its int8 file on a CPU with int8 products,
    if the card's measured loss is below 0.3 points; `float32` never does, so that predictions are
    the same on every machine up to rounding."""
    max_body_bytes: Annotated[ByteSize, Field(ge=1)] = ByteSize(2 * 2**30)
    """Largest upload, in bytes or as `500MB`, `2GiB`; also the largest size of its unpacked zips
    together."""
    jp2: bool = True
    """Whether JPEG 2000 files (`.jp2`) are read, by GDAL's OpenJPEG."""
    upload_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds over which an upload must keep `upload_rate`."""
    upload_rate: Annotated[ByteSize, Field(ge=1)] = ByteSize(16 * 2**10)
    """Bytes per second that an upload must keep; a slower upload holds no queue slot."""
    max_spool_bytes: ByteSize | None = None
    """Largest size on disk of all bodies of requests in flight, in bytes or as `500MB`, `2GiB`;
    one caller may take half. At least twice `max_body_bytes`; None is eight times
    `max_body_bytes`."""
    root_path: Annotated[str | None, Field(max_length=200)] = None
    """Path under which a proxy serves the service, such as `/pimc`; links begin with it."""
    trusted_proxies: Annotated[
        tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...], NoDecode
    ] = ()
    """Addresses and networks, comma-separated, of proxies whose `X-Forwarded-For` and
    `X-Forwarded-Proto` the service trusts."""
    max_connections: Annotated[int, Field(ge=16)] = 1024
    """Largest number of open connections. At the limit, the service closes the connection that has
    waited longest without a request. It raises the limit of open files for them as far as the
    system allows."""
    max_connections_per_address: Annotated[int, Field(ge=1)] = 256
    """Largest number of open connections of one client address, or IPv6 /64 network; behind a proxy
    set it to `PIMC_MAX_CONNECTIONS`."""
    head_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    """Seconds within which a request's line and headers must arrive."""
    send_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds for which a client may read nothing of a response before it is disconnected."""
    max_downloads: Annotated[int, Field(ge=1)] = 64
    """Largest number of job results that are sent at once; a further request for a result is
    rejected with `overloaded`."""
    max_downloads_per_caller: Annotated[int, Field(ge=1)] = 16
    """Largest number of job results that are sent at once to one API key, or without keys to one
    address."""
    max_fields: Annotated[int, Field(ge=1)] = 100_000
    """Largest number of polygons of one request."""
    max_raster_bytes: Annotated[ByteSize, Field(ge=1)] = ByteSize(16 * 2**30)
    """Largest decoded stack, in bytes or as `500MB`, `2GiB`, computed from the headers."""
    memory_budget: Annotated[ByteSize, Field(ge=2**26)] | None = None
    """Memory that all runs together may take for decoded data, in bytes or as `500MB`, `2GiB`; None
    is half of the container's limit, or without a limit half of the machine's memory."""
    sync_max_pixels: Annotated[int, Field(ge=1)] = 2048 * 2048
    """Pixels of the largest raster that is processed synchronously; a larger one becomes a job."""
    max_concurrency: Annotated[int, Field(ge=1)] = 4
    """Run slots. A caller has twice as many queue slots; without a free queue slot a request is
    rejected with `overloaded`."""
    max_items: Annotated[int, Field(ge=1)] = 500
    """Largest number of STAC items of one request."""
    allowed_roots: Annotated[tuple[Path, ...], NoDecode] = ()
    """Folders, comma-separated, whose files a request may name instead of sending them."""
    allowed_hosts: Annotated[tuple[HostRule, ...], NoDecode] = ()
    """Hosts, comma-separated, from which a request may have files downloaded: `name`, `name:port`,
    an address or a network; only public addresses unless the address or its network is listed."""
    callback_hosts: Annotated[tuple[HostRule, ...], NoDecode] = ()
    """Hosts, comma-separated, that jobs may call when they end, as for `allowed_hosts`; with none
    the service sends no callbacks."""
    callback_secrets: Annotated[
        tuple[SecretBytes, ...], NoDecode, Field(validate_default=True)
    ] = ()
    """Secrets, comma-separated, from which each caller's secret for signed callbacks is derived:
    `whsec_` and 24 to 64 random bytes in base64. The first is in use; callbacks are also signed
    with the others, so that one can be replaced."""
    state_dir: Path | None = None
    """Folder of jobs and their results; None uses `state/<port>` in the checkout."""
    storage_url: str | None = None
    """Bucket of uploads, results and models of own classes, as `s3://bucket/prefix`, for replicas
    with `database_url`, each with a `state_dir` of its own; None is `state_dir`. Credentials and
    region come from the variables `AWS_*`."""
    storage_endpoint: str | None = None
    """Address of the S3 server of `storage_url`, as `https://minio.example.org:9000`; None is that
    of AWS."""
    database_url: SecretStr | None = None
    """PostgreSQL database of the jobs, as `postgresql://user:password@host/name`, for several
    replicas that share it and `state_dir` or `storage_url`; None is SQLite in `state_dir`, for one
    service."""
    dask_scheduler: str | None = None
    """Dask scheduler on whose workers the windows of jobs are computed, as `tcp://host:port` or
    `tls://host:port`; None computes them in this process."""
    dask_fetch: Literal["service", "workers"] = "service"
    """Which process fetches the remote files of jobs on the cluster: the service, when it accepts
    the job, or the workers, window by window. Files without a strong ETag are fetched by the
    service."""
    dask_window_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """Seconds after which a window that a worker has not returned is given to another worker."""
    min_free_bytes: Annotated[ByteSize, Field(ge=0)] = ByteSize(32 * 2**20)
    """Bytes that must be free on the disks of jobs and of temporary files; with fewer,
    `/health/ready` reports the service as not ready."""
    demo_dir: Path | None = None
    """Folder of GeoTIFFs that the explorer offers to every user as its demo; None for no demo."""
    explorer_tiles: str | None = None
    """URL of Web Mercator tiles with `{z}`, `{x}` and `{y}`, which the explorer shows as the
    background map; None for none, so that the page loads nothing from other hosts."""
    explorer_attribution: Annotated[str | None, Field(max_length=200, validate_default=True)] = None
    """Attribution that the explorer shows with these tiles; required by `explorer_tiles`."""
    job_workers: Annotated[int, Field(ge=1)] = 1
    """Number of jobs that run at once, in addition to synchronous runs."""
    job_turn_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds that a job computes before it makes way for a waiting job of a caller with fewer
    running jobs; it continues later, after its last finished window."""
    max_jobs: Annotated[int, Field(ge=1)] = 100
    """Largest number of waiting jobs; a further job is rejected with `overloaded`."""
    max_requests_per_caller: Annotated[int, Field(ge=1)] | None = None
    """Largest number of requests of one caller at once; None limits them by its queue slots only.
    A caller is an API key's name or, without keys, an address. A request over this quota or over
    `max_jobs_per_caller`, `max_pixels_per_day` or `max_storage_per_caller` is rejected with
    `too_many_requests`."""
    max_jobs_per_caller: Annotated[int, Field(ge=1)] | None = None
    """Largest number of jobs of one caller that wait or run; None is half of `max_jobs` if there
    are keys of several callers, and unlimited otherwise."""
    max_pixels_per_day: Annotated[int, Field(ge=1)] | None = None
    """Largest number of pixels, series and points of one caller per day (UTC); None is
    unlimited."""
    max_storage_per_caller: Annotated[ByteSize, Field(ge=1)] | None = None
    """Largest size of the files of one caller's jobs, in bytes or as `500MB`, `2GiB`; None is
    unlimited."""
    max_heads: Annotated[int, Field(ge=1)] = 100
    """Largest number of models of own classes of one caller."""
    job_ttl: Annotated[int, Field(ge=1)] = 7 * 24 * 3600
    """Seconds for which a finished job and its result are kept."""
    grace_seconds: Annotated[int, Field(ge=0)] = 30
    """Seconds that running requests have to end after SIGTERM."""
    tracing: bool = False
    """Whether requests and jobs are traced: spans are sent by OTLP over HTTP, as the standard
    variables `OTEL_*` configure it. Needs the extra `tracing`."""
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
    def workers_fetch(self) -> bool:
        """Whether the workers of a cluster fetch the remote files of jobs."""
        return self.dask_scheduler is not None and self.dask_fetch == "workers"

    @property
    def explorer_origin(self) -> str | None:
        """Scheme, host and port of `explorer_tiles`; None without them."""
        found = _TILES.fullmatch(self.explorer_tiles or "")
        return found["origin"] if found else None

    @property
    def spool_bytes(self) -> int:
        """Largest size on disk of all bodies of requests in flight, bytes."""
        return self.max_spool_bytes or 8 * self.max_body_bytes

    @field_validator("max_spool_bytes")
    @classmethod
    def _holds_two_bodies(cls, value: ByteSize | None, info: ValidationInfo) -> ByteSize | None:
        body = info.data.get("max_body_bytes")  # missing if that setting itself is not valid
        if value is not None and body is not None and value < 2 * body:
            raise ValueError(
                f"{value} bytes are less than twice PIMC_MAX_BODY_BYTES ({body}). One caller may "
                "take half of this space, which must hold one body: raise PIMC_MAX_SPOOL_BYTES or "
                "lower PIMC_MAX_BODY_BYTES"
            )
        return value

    @field_validator("callback_secrets", mode="before")
    @classmethod
    def _decoded(cls, value: object) -> object:
        parts = _parts(value)
        if not isinstance(parts, tuple | list):
            return value
        return tuple(_secret_bytes(part) if isinstance(part, str) else part for part in parts)

    @field_validator("callback_secrets")
    @classmethod
    def _signs(
        cls, value: tuple[SecretBytes, ...], info: ValidationInfo
    ) -> tuple[SecretBytes, ...]:
        if info.data.get("callback_hosts") and not value:
            raise ValueError(
                "PIMC_CALLBACK_HOSTS is set, so callbacks need a secret that signs them: give at "
                "least one"
            )
        return value

    @field_validator("api_keys", "allowed_roots", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _parts(value)

    @field_validator("allowed_hosts", "callback_hosts", mode="before")
    @classmethod
    def _read_rules(cls, value: object) -> object:
        parts = _parts(value)
        if not isinstance(parts, tuple | list):
            return value
        return tuple(HostRule.read(part) if isinstance(part, str) else part for part in parts)

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is None:
            return None
        # No message repeats the URL, which may contain a password.
        scheme, mark, rest = value.get_secret_value().partition("://")
        if scheme not in {"postgresql", "postgres"} or not mark:
            raise ValueError("the value is not a URL such as postgresql://user:password@host/name")
        if rest.partition("/")[0].count("@") > 1:
            raise ValueError("a password's characters @ : / must be written as %40 %3A %2F")
        if info.data.get("state_dir") is None and info.data.get("storage_url") is None:
            raise ValueError(
                "PIMC_STATE_DIR must name the folder that all replicas share, or PIMC_STORAGE_URL "
                "a bucket"
            )
        return value

    @field_validator("storage_url")
    @classmethod
    def _is_a_bucket(cls, value: str | None) -> str | None:
        if value is not None and not _BUCKET.fullmatch(value):
            raise ValueError("the value is not a URL such as s3://bucket or s3://bucket/prefix")
        return value

    @field_validator("storage_endpoint")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not _ENDPOINT.fullmatch(value):
            raise ValueError(
                "the value is not an address such as https://minio.example.org:9000, without a "
                "path, user or password"
            )
        return value

    @field_validator("dask_scheduler")
    @classmethod
    def _is_a_scheduler(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        scheme, mark, place = value.partition("://")
        found = _HOST.fullmatch(place)
        if scheme not in {"tcp", "tls"} or not mark or found is None or found["port"] is None:
            raise ValueError(f"'{value}' is not an address such as tcp://scheduler:8786")
        if info.data.get("state_dir") is None and info.data.get("storage_url") is None:
            raise ValueError(
                "PIMC_STATE_DIR must name the folder that all workers share, or PIMC_STORAGE_URL "
                "a bucket"
            )
        return value

    @field_validator("root_path")
    @classmethod
    def _is_a_path(cls, value: str | None) -> str | None:
        if value and not _ROOT_PATH.fullmatch(value):
            raise ValueError(
                f"'{value}' is not a valid path: it must begin with a slash and not end with one, "
                "such as /pimc"
            )
        return value

    @field_validator("explorer_tiles")
    @classmethod
    def _is_a_tile_url(cls, value: str | None) -> str | None:
        if not value:
            return None
        found = _TILES.fullmatch(value)
        if found is None or not all(f"{{{name}}}" in found["path"] for name in "zxy"):
            raise ValueError(
                f"'{value}' is not a valid URL of tiles: give http:// or https://, a host, and a "
                "path with {z}, {x} and {y}, such as https://tiles.example.org/{z}/{x}/{y}.png"
            )
        return value

    @field_validator("explorer_attribution")
    @classmethod
    def _is_attributed(cls, value: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("explorer_tiles") and not (value or "").strip():
            raise ValueError(
                "PIMC_EXPLORER_TILES is set: give the attribution that the tiles' provider "
                "requires, such as '© OpenStreetMap contributors'"
            )
        return value

    @field_validator("demo_dir", "model_dir")
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


def _secret_bytes(text: str) -> bytes:
    """The bytes of a secret of Standard Webhooks.

    Raises:
        ValueError: the text is not such a secret; the message does not contain the text.
    """
    try:
        secret = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except ValueError:
        secret = b""
    if not (text.startswith("whsec_") and 24 <= len(secret) <= 64):
        raise ValueError(
            "a value is not a secret: each must be whsec_ and 24 to 64 random bytes in base64"
        )
    return secret


def _parts(value: object) -> object:
    """The parts of a comma-separated text; other values unchanged."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def key_hash(key: str) -> str:
    """An API key in the form `sha256:…`.

    Args:
        key: the key, or `sha256:` and its hexadecimal SHA-256.

    Raises:
        ValueError: the key is neither such a hash nor printable ASCII without spaces.
    """
    if key.startswith(KEY_HASH):
        if not _SHA256.fullmatch(key):
            raise ValueError(f"a key that begins with {KEY_HASH} must have 64 hex digits after it")
        return key.lower()
    if not (key.isascii() and key.isprintable() and " " not in key and key):
        raise ValueError("a key must be printable ASCII without spaces, because a header holds it")
    return KEY_HASH + hashlib.sha256(key.encode()).hexdigest()


def read_settings(**overrides: Any) -> Settings:  # noqa: ANN401 - whatever a field takes
    """Read the settings from the environment.

    Args:
        overrides: values of fields that replace those of the environment.

    Raises:
        SettingsError: a variable has an invalid value; the message lists each such variable.
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
    """Number of plain keys in `PIMC_API_KEYS` that are short enough to be guessed."""
    parts = environment.get(f"{PREFIX}API_KEYS", "").split(",")
    keys = [key.strip() for key in parts if not key.strip().startswith(KEY_HASH)]
    return sum(0 < len(key) < SHORT_KEY for key in keys)


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Environment variables that begin with `PIMC_` but are not settings, such as misspelt ones."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(n for n in environment if n.upper().startswith(PREFIX) and n.upper() not in known)


@cache
def project_version() -> str:
    """The project's version, from its installed metadata; `0+checkout` if it is not installed."""
    try:
        return version("pimc-client")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0+checkout"
