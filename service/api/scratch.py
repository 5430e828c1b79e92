"""Scratch folder: temporary files of requests, one folder per process.

    TMPDIR/pimc-…/       one per process
        lock             locked by the process until it ends; the system releases the lock
        request-…/       one per request

A process that is killed leaves its folder behind. The next start finds the lock free and removes
the folder.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

_LOG = logging.getLogger(__name__)
_PREFIX, _LOCK = "pimc-", "lock"


class Scratch:
    """The scratch folder of this process.

    Args:
        parent: folder for temporary files; None takes the system's folder (`TMPDIR`).
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        _remove_left(parent)
        # The folder receives its final name, for which other processes search, only once locked.
        new = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
        self._lock = os.open(new / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.folder = new.rename(parent / new.name.removeprefix("."))
        """Parent of the folders of requests."""

    def close(self) -> None:
        """Remove the folder and release its lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _remove_left(parent: Path) -> None:
    """Remove the folders of processes that have ended."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            # Neither follow a link nor create the file: folders of other programs have no lock.
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            _LOG.info("temporary files of an ended process removed", extra={"folder": folder.name})
        except OSError:  # the process still runs
            continue
        finally:
            os.close(lock)
