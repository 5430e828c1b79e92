"""Window journal: the finished windows of a job, in one append-only file per lease."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable

import numpy as np

from service.jobs.files import sync_folder
from service.jobs.store import Job, JobStore
from service.run.windows import Arrays, Step


class WindowFile:
    """A job's `Journal`: finished windows in one file; the store records which are finished.

    A run writes only the file of its lease, and reads those of the leases before.

    A context manager that closes the files.

    Args:
        store: store that holds the job.
        job: a running job.
        progress: returns the share of the job that is done, per cent.
    """

    def __init__(self, store: JobStore, job: Job, progress: Callable[[], int]) -> None:
        self._store = store
        self._job = job
        self._progress = progress
        self._file = os.open(store.windows(job), os.O_RDWR | os.O_CREAT, 0o600)
        self._files = {job.lease: self._file}
        self._end = os.lseek(self._file, 0, os.SEEK_END)
        sync_folder(store.folder(job))

    def __enter__(self) -> WindowFile:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)

    def load(self, step: Step) -> Arrays | None:
        """See `Journal`; also returns None if the stored bytes are corrupted."""
        found = self._store.window(self._job, step)
        if found is None:
            return None
        lease, offset, length = found
        try:
            if lease not in self._files:
                self._files[lease] = os.open(self._store.windows(self._job, lease), os.O_RDONLY)
            # NumPy's archive is a zip, which holds a checksum of each array.
            with np.load(io.BytesIO(os.pread(self._files[lease], length, offset))) as archive:
                return dict(archive)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile):
            return None

    def save(self, step: Step, arrays: Arrays) -> None:
        """See `Journal`."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        content = buffer.getbuffer()
        offset, at = self._end, 0
        while at < len(content):
            at += os.pwrite(self._file, content[at:], offset + at)
        os.fsync(self._file)
        self._store.count_window(
            self._job, step, offset=offset, length=at, progress=self._progress()
        )
        self._end += at
