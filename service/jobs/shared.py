"""Files of a job's passes for the workers of a cluster: in the shared folder, or in the bucket.

a shared folder    everything is there: a key is a path below it
a bucket           `jobs/<id>/input` is there; the pass, scratch rasters and the caller's own
                   model are put into `jobs/<id>/pass-<n>` while the pass runs
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from service.errors import Overloaded
from service.jobs.files import remove
from service.jobs.job_files import INPUT, JOBS_FOLDER, job_of
from service.jobs.s3 import storage_for
from service.jobs.storage import Storage
from service.settings import Settings


@dataclass(frozen=True, kw_only=True)
class SharedJobFiles:
    """The `SharedFiles` of a job store."""

    state: Path
    """The state directory."""
    storage: Storage
    """Storage of the jobs' files."""
    opener: Callable[[Settings], Storage] = storage_for
    """See `SharedFiles`."""

    @property
    def name(self) -> str:
        """See `SharedFiles`."""
        return self.storage.name

    def new_pass(self, folder: Path) -> FolderPass | BucketPass:
        """See `SharedFiles`."""
        kind = FolderPass if self.storage.local else BucketPass
        return kind(state=self.state, storage=self.storage, folder=folder)


@dataclass(kw_only=True)
class _JobPass:
    """One pass of a job's run, and where its files are."""

    state: Path
    """The state directory."""
    storage: Storage
    folder: Path
    """Folder of the run, in the state directory."""


@dataclass(kw_only=True)
class FolderPass(_JobPass):
    """The `SharedPass` of a shared folder."""

    _stored: str = ""
    """Key of the pass once it is stored."""

    def key(self, path: Path) -> str | None:
        """See `SharedPass`."""
        return _below(path, self.state)

    def store(self, content: bytes) -> str:
        """See `SharedPass`."""
        self._stored = f"{_below(self.folder, self.state)}/{uuid.uuid4().hex}.pass"
        self.storage.write(self._stored, content)
        return self._stored

    def remove(self) -> None:
        """See `SharedPass`."""
        if self._stored:
            self.storage.remove(self._stored)


@dataclass(kw_only=True)
class BucketPass(_JobPass):
    """The `SharedPass` of a bucket; the folder of its run is this replica's own."""

    _extra: dict[Path, str] = field(default_factory=dict)
    """Keys of files and folders that only this replica has."""

    @cached_property
    def _job(self) -> str:
        """Key of the job."""
        return f"{JOBS_FOLDER}/{job_of(self.folder.parent)}"

    @cached_property
    def _tree(self) -> str:
        """Key of the pass's files."""
        return f"{self._job}/pass-{uuid.uuid4().hex}"

    def key(self, path: Path) -> str | None:
        """See `SharedPass`."""
        uploaded = _below(path, self.folder.parent / INPUT)
        if uploaded is not None:
            return f"{self._job}/{INPUT}/{uploaded}"
        if not path.is_relative_to(self.state):
            return None
        return self._extra.setdefault(path, f"{self._tree}/{len(self._extra)}{path.suffix}")

    def store(self, content: bytes) -> str:
        """See `SharedPass`."""
        for path, key in self._extra.items():
            copy = self.folder / f"{uuid.uuid4().hex}.copy"  # `put` removes what it stores
            try:
                (shutil.copytree if path.is_dir() else os.link)(path, copy)
                self.storage.put(key, copy)
            finally:
                remove(copy)
        stored = f"{self._tree}/pass"
        self.storage.write(stored, content)
        return stored

    def remove(self) -> None:
        """See `SharedPass`; files that remain after a failure are removed with the job."""
        with suppress(Overloaded):
            self.storage.remove(self._tree)


def _below(path: Path, folder: Path) -> str | None:
    """A path relative to a folder; None if it is not in it."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else None
