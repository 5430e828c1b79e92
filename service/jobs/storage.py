"""Storage of the jobs' files: a folder, or an S3 bucket that replicas share.

    key                             what it is
    jobs/<id>/request.json          a file
    jobs/<id>/input                 a tree: all files whose keys begin with it and a slash
    jobs/<id>/windows-<n>           a log: bytes that a run appends

A file that was put is durable when the call returns, and is never seen in part. Neither kind of
storage decides what a job is: its row in the database does, and names the files.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from service.errors import Overloaded
from service.jobs.files import keep_only, remove, size_of, sync_folder, sync_tree

MARK = "database"
"""Key of the id of the database to which a storage belongs."""


class StorageUnreachable(Overloaded):
    """The storage cannot be reached, or refuses requests: jobs wait until it can be used.

    Args:
        reason: for the log and the administrator; names no credentials.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            "the storage of uploads and results cannot be reached; retry later", retry_after=10
        )
        self.reason = reason


class RemoteFile(Protocol):
    """A file in a bucket, which may not exist; has the members of `Path` that are used.

    Each method raises Overloaded if the bucket cannot be reached.
    """

    @property
    def key(self) -> str:
        """Its key."""
        ...

    @property
    def name(self) -> str:
        """The last part of its key."""
        ...

    @property
    def suffix(self) -> str:
        """From the last dot of its name."""
        ...

    def with_name(self, name: str) -> RemoteFile:
        """The file of this name beside it."""
        ...

    def exists(self) -> bool:
        """Whether it is there."""
        ...

    def opened(self) -> Opened:
        """Open it to send it.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def open(self, mode: str = "rb") -> IO[bytes]:
        """A reader of its content; raises as `opened`."""
        ...

    def read_bytes(self) -> bytes:
        """Its content; raises as `opened`."""
        ...


class Storage(Protocol):
    """Where the jobs' files are. Thread-safe.

    Each method raises Overloaded if the storage cannot be reached.
    """

    name: str
    """For messages; without credentials."""
    local: bool
    """Whether the files are in this machine's file system, where runs use them in place."""

    def file(self, key: str) -> Path | RemoteFile:
        """A file, whether or not it exists."""
        ...

    def put(self, key: str, path: Path, *, last: str = "") -> None:
        """Store a file or a tree, and remove it from where it was.

        Args:
            key: the new key; a tree must not exist there.
            path: the file, or the folder.
            last: name of the file that is there only if the whole tree is; empty for none.
        """
        ...

    def write(self, key: str, content: bytes) -> None:
        """Store a file's content."""
        ...

    def read(self, key: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def fetch(self, key: str, target: Path) -> None:
        """Copy a file or a tree to a path that does not exist; nothing if there is none."""
        ...

    def move(self, key: str, to: str, *, last: str = "") -> None:
        """Give a tree another key.

        Args:
            key: the tree.
            to: the new key; must not exist.
            last: as for `put`.

        Raises:
            FileNotFoundError: there is no such tree, or it is not complete.
        """
        ...

    def append(self, key: str, offset: int, content: memoryview) -> None:
        """Append bytes to a log.

        Args:
            key: the log.
            offset: its length until now.
            content: the bytes.
        """
        ...

    def read_part(self, key: str, offset: int, length: int) -> bytes:
        """Bytes of a log that were appended at once.

        Raises:
            FileNotFoundError: they are not there.
        """
        ...

    def length(self, key: str) -> int:
        """Length of a log, bytes; 0 if there is none."""
        ...

    def names(self, key: str) -> list[str]:
        """Names of the files and trees directly in a tree, sorted."""
        ...

    def modified(self, key: str) -> float:
        """When a tree was last changed, seconds since 1970; 0 if there is none."""
        ...

    def size(self, *keys: str) -> int:
        """Size of files and trees together, bytes."""
        ...

    def remove(self, key: str) -> None:
        """Remove a file, a tree or a log, if it exists."""
        ...

    def keep_only(self, key: str, *names: str) -> None:
        """Remove everything in a tree but the files and trees with these names."""
        ...

    def fault(self) -> str | None:
        """Reason why the storage cannot be used; None if it works. Takes at most two seconds."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class FolderStorage:
    """A folder of this machine, which replicas may share over a network.

    Args:
        root: an existing folder.
    """

    local = True

    def __init__(self, root: Path) -> None:
        self._root = root
        self.name = str(root)

    def file(self, key: str) -> Path:
        """See `Storage`."""
        return self._root / key

    def put(self, key: str, path: Path, *, last: str = "") -> None:  # noqa: ARG002 - one rename
        """See `Storage`."""
        sync_tree(path)
        target = self._root / key
        path.rename(target)
        sync_folder(target.parent)

    def write(self, key: str, content: bytes) -> None:
        """See `Storage`."""
        target = self._root / key
        half = target.with_name(f".half-{os.urandom(8).hex()}-{target.name}")
        half.write_bytes(content)
        self.put(key, half)

    def read(self, key: str) -> bytes:
        """See `Storage`."""
        return (self._root / key).read_bytes()

    def fetch(self, key: str, target: Path) -> None:
        """See `Storage`."""
        source = self._root / key
        with suppress(FileNotFoundError):
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copyfile(source, target)

    def move(self, key: str, to: str, *, last: str = "") -> None:  # noqa: ARG002 - one rename
        """See `Storage`."""
        (self._root / key).rename(self._root / to)
        sync_folder((self._root / to).parent)

    def append(self, key: str, offset: int, content: memoryview) -> None:
        """See `Storage`."""
        path = self._root / key
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            at = 0
            while at < len(content):
                at += os.pwrite(file, content[at:], offset + at)
            os.fsync(file)
        finally:
            os.close(file)
        if offset == 0:
            sync_folder(path.parent)

    def read_part(self, key: str, offset: int, length: int) -> bytes:
        """See `Storage`."""
        with (self._root / key).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def length(self, key: str) -> int:
        """See `Storage`."""
        with suppress(FileNotFoundError):
            return (self._root / key).stat().st_size
        return 0

    def names(self, key: str) -> list[str]:
        """See `Storage`."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return sorted(path.name for path in (self._root / key).iterdir())
        return []

    def modified(self, key: str) -> float:
        """See `Storage`."""
        with suppress(FileNotFoundError):
            return (self._root / key).stat().st_mtime
        return 0.0

    def size(self, *keys: str) -> int:
        """See `Storage`."""
        return sum(size_of(self._root / key) for key in keys)

    def remove(self, key: str) -> None:
        """See `Storage`."""
        remove(self._root / key)

    def keep_only(self, key: str, *names: str) -> None:
        """See `Storage`."""
        keep_only(self._root / key, *names)

    def fault(self) -> str | None:
        """See `Storage`; the database and the free space are checked apart."""
        return None

    def close(self) -> None:
        """See `Storage`."""


class Opened(Protocol):
    """A stored file that is being sent."""

    size: int
    """Bytes."""
    tag: str
    """Differs if the file is replaced."""
    modified: float
    """When it was stored, seconds since 1970."""
    block: int
    """Bytes to read at once."""

    def read(self, start: int, size: int) -> bytes:
        """Bytes from a position; fewer at the end of the file."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class OpenedPath:
    """A file of this machine that is being sent; it may be removed meanwhile.

    Args:
        path: of the file.
        block: bytes to read at once.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: Path, block: int) -> None:
        self._file = os.open(path, os.O_RDONLY)
        stat = os.fstat(self._file)
        self.size, self.modified, self.block = stat.st_size, stat.st_mtime, block
        self.tag = f"{stat.st_mtime_ns:x}-{stat.st_size:x}"

    def read(self, start: int, size: int) -> bytes:
        """See `Opened`."""
        return os.pread(self._file, size, start)

    def close(self) -> None:
        """See `Opened`."""
        os.close(self._file)


def opened(file: Path | RemoteFile, block: int) -> Opened:
    """Open a stored file to send it.

    Args:
        file: the file.
        block: bytes to read at once from a disk; a bucket has larger blocks of its own.

    Raises:
        FileNotFoundError: there is no such file.
        Overloaded: the storage cannot be reached.
    """
    return OpenedPath(file, block) if isinstance(file, Path) else file.opened()
