"""What an administrator may set: environment variables `PIMC_*`, read once, at start.

`docs/configuration.md` has a row for each field here; a test keeps the two together.
"""

# No `from __future__ import annotations` here: pydantic needs the types at run time.
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "PIMC_"
KEY_HASH = "sha256:"
"""How an API key begins that came hashed, and that every key is kept as."""
_SHA256 = re.compile(KEY_HASH + r"[0-9a-fA-F]{64}")

LogLevel = Literal["debug", "info", "warning", "error", "critical"]


class SettingsError(Exception):
    """The environment does not make usable settings; the message names each variable."""


class Settings(BaseSettings):
    """Everything that can be set, with the value used where nothing is set."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address that `python -m service` binds."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port that `python -m service` binds; 0 takes any free one, which the log names."""
    allow_anonymous: bool = False
    """Whether an address that others can reach may be bound although no key is needed."""
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Keys, comma-separated, each plain or as `sha256:` and its hex SHA-256; with one or more, the
    tasks, the jobs and the models need one of them. Kept as hashes, whichever way they came."""
    model_dir: Path | None = None
    """Folder of further bundles; a bundle here replaces the built-in one of the same name."""
    providers: Literal["auto", "cuda", "cpu"] = "auto"
    """What computes: `auto` takes CUDA where it works; `cuda` fails at start rather than fall
    back to the CPU."""
    max_body_bytes: Annotated[ByteSize, Field(ge=1)] = ByteSize(2 * 2**30)
    """Largest upload, in bytes or as `500MB`, `2GiB`."""
    max_raster_bytes: Annotated[ByteSize, Field(ge=1)] = ByteSize(16 * 2**30)
    """Largest decoded stack, in bytes or as `500MB`, `2GiB`, judged from the headers."""
    sync_max_pixels: Annotated[int, Field(ge=1)] = 10980 * 10980
    """Pixels of the largest raster that is answered while the caller waits; a Sentinel-2 tile."""
    max_concurrency: Annotated[int, Field(ge=1)] = 4
    """Runs at once. As many again may upload or wait; the next is refused as overloaded."""
    log_level: LogLevel = "info"
    """Least severe level that is logged."""

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(key.strip() for key in value.split(",") if key.strip())
        return value

    @field_validator("api_keys")
    @classmethod
    def _hashed(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        return tuple(SecretStr(_key_hash(key.get_secret_value())) for key in value)

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower_level(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("model_dir")
    @classmethod
    def _is_a_folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"{value} is no folder")
        return value


def _key_hash(key: str) -> str:
    """`sha256:…` of a key, or of what is that already."""
    if key.startswith(KEY_HASH):
        if not _SHA256.fullmatch(key):
            raise ValueError(f"what begins with {KEY_HASH} needs 64 hex digits after it")
        return key.lower()
    if not (key.isascii() and key.isprintable() and " " not in key and key):
        raise ValueError("a key must be printable ASCII without spaces, as headers are")
    return KEY_HASH + hashlib.sha256(key.encode()).hexdigest()


def read_settings(**overrides: Any) -> Settings:  # noqa: ANN401 - whatever a field takes
    """Settings from the environment, with some fields set by the caller.

    Raises:
        SettingsError: a variable has a value that cannot be used; the message lists each.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = [
            f"{PREFIX}{str(e['loc'][0]).upper()}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors(include_input=False)  # a key must not end in a log
        ]
        raise SettingsError("\n".join(lines)) from error


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names that begin with `PIMC_` but set nothing, as a misspelt one would."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(n for n in environment if n.upper().startswith(PREFIX) and n.upper() not in known)
