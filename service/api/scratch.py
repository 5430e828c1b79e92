"""Scratch folder: temporary files of requests, which carry the process that they belong to.

    TMPDIR/pimc-…/       one per process
        lock             held by the process for as long as it lives, however it ends
        request-…/       one per request

A process that is killed leaves its folder; the next start finds its lock free and removes it.
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
        parent: folder for temporary files; None takes the system's (`TMPDIR`).
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        _remove_left(parent)
        # It gets the name that others look for only once its lock is held.
        new = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
        self._lock = os.open(new / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.folder = new.rename(parent / new.name.removeprefix("."))
        """Where folders of requests lie."""

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _remove_left(parent: Path) -> None:
    """Remove the folders of processes that have ended."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            # Without following a link, and never creating: a folder of another kind has no lock.
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            _LOG.info("temporary files of an ended process removed", extra={"folder": folder.name})
        except OSError:  # its process lives
            continue
        finally:
            os.close(lock)
