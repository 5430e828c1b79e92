"""Files of jobs, as the service and the workers of a cluster share them.

    service: path ──▶ key in the storage ──▶ in the pass
    worker:  key ──▶ path on the worker: in place in a shared folder, or a copy from a bucket

`service.jobs` has the storages; workers open theirs by a function that the service names.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from service.settings import Settings

_AT_ONCE = 8
"""Number of files that a worker copies at once."""


class ReadStorage(Protocol):
    """A storage, as far as a worker uses it. Each method raises Overloaded if it is unreachable."""

    @property
    def name(self) -> str:
        """The same for the service and its workers; without credentials."""
        ...

    @property
    def local(self) -> bool:
        """Whether the files are in a folder, where they are read in place."""
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


class SharedPass(Protocol):
    """One pass of a job and its files, in the storage."""

    def key(self, path: Path) -> str | None:
        """Key of a file or a folder of this job; None of any other, which is read in place.

        What has no key yet gets one, and is stored by `store`.
        """
        ...

    def store(self, content: bytes) -> str:
        """Store the pass, after every file that `key` was called with.

        Args:
            content: the packed pass.

        Returns:
            The key of the pass.

        Raises:
            Overloaded: the storage cannot be reached.
        """
        ...

    def remove(self) -> None:
        """Remove what `store` has stored."""
        ...


class SharedFiles(Protocol):
    """The storage of the jobs' files, as the service shares it with workers."""

    @property
    def name(self) -> str:
        """See `ReadStorage`."""
        ...

    @property
    def opener(self) -> Callable[[Settings], ReadStorage]:
        """The function by which a worker opens the storage of its settings; `pickle` copies it."""
        ...

    def new_pass(self, folder: Path) -> SharedPass:
        """A pass that is not stored yet.

        Args:
            folder: folder of the run.
        """
        ...


@dataclass(frozen=True)
class Stored:
    """A file or a folder of a job, as a pass names it."""

    key: str


class StoredFiles:
    """The stored files of one pass on a worker. Used by one thread at a time.

    Args:
        storage: the worker's storage.
        root: the folder that the storage is, or None for one that is elsewhere.
        scratch: parent of the folder for copies; None takes the system's folder.
    """

    def __init__(self, storage: ReadStorage, root: Path, scratch: Path | None) -> None:
        self._storage = storage
        self._copied = None if storage.local else Path(tempfile.mkdtemp("", "pimc-", scratch))
        self.root = self._copied or root
        """Folder of all files of jobs on this worker."""

    def path(self, key: str) -> Path:
        """Where a file or a folder is, or will be once `bring` has copied it."""
        return self.root / key

    def bring(self, paths: Iterable[Path]) -> None:
        """Copy files or folders to their paths, if they are not there.

        Args:
            paths: paths on this worker; those that are not in the storage are ignored.

        Raises:
            Overloaded: the storage cannot be reached.
        """
        root = self._copied
        if root is None:
            return
        missing = [p for p in dict.fromkeys(paths) if p.is_relative_to(root) and not p.exists()]

        def copy(path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._storage.fetch(path.relative_to(root).as_posix(), path)

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="copies") as pool:
            list(pool.map(copy, missing))

    def close(self) -> None:
        """Remove the copies."""
        if self._copied is not None:
            shutil.rmtree(self._copied, ignore_errors=True)
