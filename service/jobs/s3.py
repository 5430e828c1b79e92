"""Storage of the jobs' files in a bucket of S3, or of a server with its interface.

    tree    keys below a prefix; the file that makes it complete is written last
    log     an object per piece, named by its offset
    put     one request, or a multipart upload, which shows nothing before it is complete

Requests are small: parts and blocks of a few MiB. So none lasts long, each is repeated by itself,
and a file of any size passes through little memory.
"""

from __future__ import annotations

import errno
import io
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from service.errors import shown
from service.jobs.files import remove
from service.jobs.storage import MARK, FolderStorage, Storage, StorageUnreachable
from service.settings import Settings, SettingsError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3Store

_LOG = logging.getLogger(__name__)
_PART_BYTES = 8 * 2**20
"""Size of an upload's parts, of which S3 allows 10,000: of a file up to 78 GiB."""
_MOST_PARTS = 9_000
_PARTS_AT_ONCE = 4
_FILES_AT_ONCE = 4
_BLOCK_BYTES = 2**20
"""Bytes that one request reads for a response."""
_FETCH_BYTES = 8 * 2**20
"""Bytes that one request reads for a copy on disk."""
_COPY_BYTES = 5 * 2**30
"""Size up to which S3 copies an object by itself."""
_RETRY = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=3),
        "base": 2,
    },
}
"""A short outage passes unnoticed; after a longer one jobs are put back, and clients retry."""
_TIMES = {"connect_timeout": "5s", "timeout": "30s"}
_PROBE_TIMES = {"connect_timeout": "1500ms", "timeout": "1500ms"}
_CODE = re.compile(r"<Code>(\w+)</Code>")


@dataclass(frozen=True)
class S3File:
    """A `RemoteFile`.

    Args:
        storage: of the bucket.
        key: of the file.
    """

    storage: S3Storage
    key: str

    @property
    def name(self) -> str:
        """See `RemoteFile`."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """See `RemoteFile`."""
        return PurePosixPath(self.key).suffix

    def with_name(self, name: str) -> S3File:
        """See `RemoteFile`."""
        return S3File(self.storage, str(PurePosixPath(self.key).with_name(name)))

    def exists(self) -> bool:
        """See `RemoteFile`."""
        try:
            self.storage.about(self.key)
        except FileNotFoundError:
            return False
        return True

    def opened(self) -> OpenedObject:
        """See `RemoteFile`."""
        return OpenedObject(self.storage, self.key)

    def open(self, mode: str = "rb") -> IO[bytes]:  # noqa: ARG002 - as of a path
        """See `RemoteFile`."""
        return io.BufferedReader(_Reader(self.opened()), _BLOCK_BYTES)

    def read_bytes(self) -> bytes:
        """See `RemoteFile`."""
        return self.storage.read(self.key)


class OpenedObject:
    """A file in the bucket that is being sent.

    Args:
        storage: of the bucket.
        key: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        Overloaded: the bucket cannot be reached.
    """

    block = _BLOCK_BYTES

    def __init__(self, storage: S3Storage, key: str) -> None:
        self._storage, self._key = storage, key
        about = storage.about(key)
        self.size: int = about["size"]
        self.modified: float = about["last_modified"].timestamp()
        self.tag = (about["e_tag"] or f"{self.modified:.0f}-{self.size:x}").strip('"')

    def read(self, start: int, size: int) -> bytes:
        """See `Opened`."""
        return self._storage.read_range(self._key, start, min(size, self.size - start))

    def close(self) -> None:
        """See `Opened`."""


class _Reader(io.RawIOBase):
    """A file in the bucket as a reader, one request per block."""

    def __init__(self, file: OpenedObject) -> None:
        self._opened = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 - any buffer
        found = self._opened.read(self._at, len(buffer)) if self._at < self._opened.size else b""
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def readall(self) -> bytes:
        # That of the class above reads 8 KiB at a time, each by a request.
        blocks = []
        while block := self.read(_BLOCK_BYTES):
            blocks.append(block)
        return b"".join(blocks)


class S3Storage:
    """A bucket, or a part of it. Credentials come from the variables `AWS_*`, as for its tools.

    Args:
        url: `s3://bucket/prefix`.
        endpoint: address of the server; None is that of AWS.

    Raises:
        SettingsError: obstore is not installed, or the settings are not valid.
    """

    local = False

    def __init__(self, url: str, *, endpoint: str | None = None) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import S3Store
        except ImportError as error:
            raise SettingsError(
                "PIMC_STORAGE_URL needs obstore, which is not installed: "
                "pip install --editable '.[service,cluster]'"
            ) from error
        self.name = url
        self._library, self._fault = obstore, BaseError
        bucket, _, prefix = url.removeprefix("s3://").partition("/")

        def connected(retry: RetryConfig, times: ClientConfig) -> S3Store:
            config: S3Config = {} if endpoint is None else {"endpoint": endpoint}
            if endpoint is not None and endpoint.startswith("http://"):
                times = {**times, "allow_http": True}
            return S3Store(
                bucket, prefix=prefix or None, config=config, client_options=times,
                retry_config=retry,
            )  # fmt: skip

        try:
            self._store = connected(_RETRY, _TIMES)  # type: ignore[arg-type]
            self._probe = connected({"max_retries": 0}, _PROBE_TIMES)  # type: ignore[arg-type]
        except (ValueError, BaseError) as error:
            raise SettingsError(f"PIMC_STORAGE_URL: {_reason(error)}") from error
        self._threads = ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="storage")

    def close(self) -> None:
        """See `Storage`."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Translate the library's errors.

        Raises:
            FileNotFoundError: there is no such object.
            StorageUnreachable: anything else.
        """
        try:
            yield
        except FileNotFoundError as error:
            if _CODE.findall(str(error)) == ["NoSuchBucket"]:
                raise self._unreachable(error) from error
            # Its own message is a page long, and names the address.
            raise FileNotFoundError(errno.ENOENT, "not in the storage") from error
        except self._fault as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> StorageUnreachable:
        _LOG.warning("storage fails", extra={"storage": self.name, "reason": _reason(error)})
        return StorageUnreachable(_reason(error))

    def file(self, key: str) -> S3File:
        """See `Storage`."""
        return S3File(self, key)

    def about(self, key: str) -> Any:  # noqa: ANN401 - obstore's, which is not there at run time
        """Size, tag and time of an object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        with self._translated():
            return self._library.head(self._store, key)

    def read_range(self, key: str, start: int, size: int) -> bytes:
        """Bytes of an object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        if size <= 0:
            return b""
        with self._translated():
            return bytes(self._library.get_range(self._store, key, start=start, length=size))

    def read(self, key: str) -> bytes:
        """See `Storage`."""
        with self._translated():
            return bytes(self._library.get(self._store, key).bytes())

    def write(self, key: str, content: bytes | memoryview) -> None:
        """See `Storage`."""
        self._upload(key, content)

    def _upload(self, key: str, content: Any, size: int = 0) -> None:  # noqa: ANN401 - see obstore
        part = max(_PART_BYTES, -(-size // _MOST_PARTS))
        try:
            with self._translated():
                self._library.put(
                    self._store, key, content, chunk_size=part, max_concurrency=_PARTS_AT_ONCE
                )
        except FileNotFoundError as error:  # of a server without this bucket or upload
            raise self._unreachable(error) from error

    def put(self, key: str, path: Path, *, last: str = "") -> None:
        """See `Storage`."""
        if path.is_dir():
            files = [one for one in sorted(path.rglob("*")) if one.is_file()]
            ends = [one for one in files if last and one == path / last]
            self._each(
                lambda one: self._put_file(f"{key}/{one.relative_to(path).as_posix()}", one),
                [one for one in files if one not in ends],
            )
            for one in ends:
                self._put_file(f"{key}/{last}", one)
        else:
            self._put_file(key, path)
        remove(path)

    def _put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as file:
            self._upload(key, file, path.stat().st_size)

    def _each(self, call: Callable[[Any], None], items: list[Any]) -> None:
        """Call for several items at once; the first error is raised once no call runs any more."""
        calls = [self._threads.submit(call, item) for item in items]
        errors = [one.exception() for one in calls]
        for error in errors:
            if error is not None:
                raise error

    def fetch(self, key: str, target: Path) -> None:
        """See `Storage`."""
        found = self._below(key)
        if not found:
            try:
                size = self.about(key)["size"]
            except FileNotFoundError:
                return
            self._fetch_file(key, target, size)
            return
        for one in found:
            (target / one["path"].removeprefix(f"{key}/")).parent.mkdir(parents=True, exist_ok=True)
        self._each(
            lambda one: self._fetch_file(
                one["path"], target / one["path"].removeprefix(f"{key}/"), one["size"]
            ),
            found,
        )

    def _fetch_file(self, key: str, target: Path, size: int) -> None:
        with target.open("wb") as file:
            for block in self._blocks(key, size):
                file.write(block)

    def _blocks(self, key: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, _FETCH_BYTES):
            yield self.read_range(key, start, min(_FETCH_BYTES, size - start))

    def move(self, key: str, to: str, *, last: str = "") -> None:
        """See `Storage`."""
        found = self._below(key)
        ends = [one for one in found if one["path"] == f"{key}/{last}"]
        if not found or (last and not ends):
            raise FileNotFoundError(errno.ENOENT, "not in the storage")
        for one in [*(one for one in found if one not in ends), *ends]:
            target = f"{to}{one['path'].removeprefix(key)}"
            if one["size"] <= _COPY_BYTES:
                with self._translated():
                    self._library.copy(self._store, one["path"], target)
            else:
                self._upload(target, self._blocks(one["path"], one["size"]), one["size"])
        self.remove(key)

    def append(self, key: str, offset: int, content: memoryview) -> None:
        """See `Storage`."""
        self.write(f"{key}/{offset:020d}", content)

    def read_part(self, key: str, offset: int, length: int) -> bytes:  # noqa: ARG002 - all of it
        """See `Storage`."""
        return self.read(f"{key}/{offset:020d}")

    def length(self, key: str) -> int:
        """See `Storage`."""
        found = self._below(key)
        return max((int(_name(one["path"])) + one["size"] for one in found), default=0)

    def names(self, key: str) -> list[str]:
        """See `Storage`."""
        with self._translated():
            found = self._library.list_with_delimiter(self._store, key)
        paths = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
        return sorted(map(_name, paths))

    def modified(self, key: str) -> float:
        """See `Storage`."""
        times = [one["last_modified"].timestamp() for one in self._below(key)]
        return max(times, default=0.0)

    def size(self, *keys: str) -> int:
        """See `Storage`."""
        total = 0
        for key in keys:
            found = self._below(key)
            total += sum(one["size"] for one in found) if found else self.about(key)["size"]
        return total

    def remove(self, key: str) -> None:
        """See `Storage`."""
        self._delete([*(one["path"] for one in self._below(key)), key])

    def keep_only(self, key: str, *names: str) -> None:
        """See `Storage`."""
        kept = tuple(f"{key}/{name}" for name in names)
        self._delete(
            one["path"]
            for one in self._below(key)
            if one["path"] not in kept and not one["path"].startswith(tuple(f"{k}/" for k in kept))
        )

    def _delete(self, keys: Any) -> None:  # noqa: ANN401 - an iterable
        paths = list(keys)
        if paths:
            with self._translated():
                self._library.delete(self._store, paths)

    def _below(self, key: str) -> list[Any]:
        """The objects of a tree or a log."""
        with self._translated():
            return [one for batch in self._library.list(self._store, key) for one in batch]

    def fault(self) -> str | None:
        """See `Storage`."""
        try:
            self._library.head(self._probe, MARK)
        except FileNotFoundError:
            return f"the storage {self.name} no longer has the jobs of this service"
        except self._fault as error:
            return f"the storage {self.name} cannot be reached: {_reason(error)}"
        return None


def storage_of(state: Path, url: str | None, endpoint: str | None) -> Storage:
    """The storage that the settings name.

    Args:
        state: the state directory, the storage if there is no URL.
        url: `s3://bucket/prefix`; None is the state directory.
        endpoint: address of an S3 server; None is that of AWS.

    Raises:
        SettingsError: obstore is not installed, or the URL or a variable is not valid.
    """
    if url is None:
        return FolderStorage(state)
    return S3Storage(url, endpoint=endpoint)


def storage_for(settings: Settings) -> Storage:
    """The storage of the jobs' files, for the service and for its workers.

    Raises:
        SettingsError: see `storage_of`.
    """
    return storage_of(settings.state_folder, settings.storage_url, settings.storage_endpoint)


def _name(path: str) -> str:
    return PurePosixPath(path).name


def _reason(error: BaseException) -> str:
    """The reason of an error of obstore in one line, without the response's text."""
    text = str(error)
    codes = _CODE.findall(text)
    line = text.partition("\n")[0].partition("<?xml")[0].strip(" :")
    return shown(f"{line}: {codes[0]}" if codes else line, 300)
