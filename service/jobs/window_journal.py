"""Window journal: the finished windows of a job, in one append-only log per lease."""

from __future__ import annotations

import io
import logging
import math
import threading
import time
import zipfile
from collections.abc import Callable

import numpy as np

from service.errors import Cancelled
from service.jobs.job import Job
from service.jobs.store import JobStore
from service.run.windows import Arrays, Step

_LOG = logging.getLogger(__name__)


class WindowFile:
    """A job's `Journal`: finished windows in one log; the store records which are finished.

    A run writes only the log of its lease, and reads those of the leases before.

    Args:
        store: store that holds the job.
        job: a running job.
        progress: returns the share of the job that is done, per cent.
        turn_seconds: seconds after the first window that the run finishes, from which on it makes
            way for jobs of other callers; infinite if it never does.
        cancelled: the event that ends the run, set at the end of its turn.
    """

    def __init__(
        self,
        store: JobStore,
        job: Job,
        progress: Callable[[], int],
        *,
        turn_seconds: float = math.inf,
        cancelled: threading.Event | None = None,
    ) -> None:
        self._turn_seconds = turn_seconds
        self._cancelled = cancelled
        self._begun: float | None = None
        self._store = store
        self._job = job
        self._progress = progress
        self._log = store.files.windows(job)
        self._end = store.storage.length(self._log)

    def load(self, step: Step) -> Arrays | None:
        """See `Journal`; also returns None if the stored bytes are corrupted."""
        found = self._store.window(self._job, step)
        if found is None:
            return None
        lease, offset, length = found
        log = self._store.files.windows(self._job, lease)
        try:
            # NumPy's archive is a zip, which holds a checksum of each array.
            content = self._store.storage.read_part(log, offset, length)
            with np.load(io.BytesIO(content)) as archive:
                return dict(archive)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile):
            return None

    def save(self, step: Step, arrays: Arrays) -> None:
        """See `Journal`.

        Raises:
            Cancelled: the window is stored, and it is another caller's turn.
        """
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        content = buffer.getbuffer()
        self._store.storage.append(self._log, self._end, content)
        self._store.count_window(
            self._job, step, offset=self._end, length=len(content), progress=self._progress()
        )
        self._end += len(content)
        # Counted from here, so that a run which recalls many windows does more than recall them.
        now = time.monotonic()
        self._begun = now if self._begun is None else self._begun
        if now - self._begun >= self._turn_seconds and self._store.others_wait(self._job):
            _LOG.info("job makes way for another caller", extra={"seconds": now - self._begun})
            if self._cancelled is not None:
                self._cancelled.set()
            raise Cancelled("it is another caller's turn")
