"""Window journal: the finished windows of a job, in one append-only log per lease."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

import numpy as np

from service.jobs.store import Job, JobStore
from service.run.windows import Arrays, Step


class WindowFile:
    """A job's `Journal`: finished windows in one log; the store records which are finished.

    A run writes only the log of its lease, and reads those of the leases before.

    Args:
        store: store that holds the job.
        job: a running job.
        progress: returns the share of the job that is done, per cent.
    """

    def __init__(self, store: JobStore, job: Job, progress: Callable[[], int]) -> None:
        self._store = store
        self._job = job
        self._progress = progress
        self._log = store.windows(job)
        self._end = store.storage.length(self._log)

    def load(self, step: Step) -> Arrays | None:
        """See `Journal`; also returns None if the stored bytes are corrupted."""
        found = self._store.window(self._job, step)
        if found is None:
            return None
        lease, offset, length = found
        log = self._store.windows(self._job, lease)
        try:
            # NumPy's archive is a zip, which holds a checksum of each array.
            content = self._store.storage.read_part(log, offset, length)
            with np.load(io.BytesIO(content)) as archive:
                return dict(archive)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile):
            return None

    def save(self, step: Step, arrays: Arrays) -> None:
        """See `Journal`."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        content = buffer.getbuffer()
        self._store.storage.append(self._log, self._end, content)
        self._store.count_window(
            self._job, step, offset=self._end, length=len(content), progress=self._progress()
        )
        self._end += len(content)
