"""Files of the job store: locks, durable moves, fsync."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from service.settings import SettingsError


def lock(folder: Path, *, shared: bool = False) -> int:
    """Lock a state directory; the lock lasts as long as the returned file descriptor is open.

    Args:
        folder: the state directory.
        shared: whether other shared locks may be held at the same time.

    Raises:
        SettingsError: another service holds the lock.
        OSError: the directory is not writable.
    """
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        # The system releases the lock however the process ends.
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if not shared:
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(file, 32, 0).decode().strip() or "unknown"
        os.close(file)
        raise SettingsError(
            f"PIMC_STATE_DIR: {folder} is in use by another service (process {holder}); set "
            "PIMC_STATE_DIR to a different directory for each service, or PIMC_DATABASE_URL for "
            "several that share it"
        ) from error
    except BaseException:
        os.close(file)
        raise
    return file


def take_over(paths: list[Path], source: Path, target: Path) -> None:
    """Move a request's files into a job's folder, synced to disk.

    Args:
        paths: files that the request uses; those outside `source` stay where they are.
        source: folder of the request.
        target: folder to create for the moved files.
    """
    target.mkdir(parents=True)
    for path in paths:
        if path.is_relative_to(source):
            moved = target / path.relative_to(source)
            shutil.move(path, moved)  # copies the file if the request is on another disk
            sync_file(moved)
    sync_folder(target)
    sync_folder(target.parent)


def keep_only(folder: Path, *names: str) -> None:
    """Remove everything in a folder except the entries with the given names."""
    with suppress(FileNotFoundError):  # another process removes the folder
        for path in folder.iterdir():
            if path.name not in names:
                remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def size_of(folder: Path) -> int:
    """Total size of a file, or of all files in a folder and its subfolders, bytes."""
    files = [folder] if folder.is_file() else folder.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def sync_file(path: Path) -> None:
    """Sync a file's content to disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Sync a folder's entries to disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(path: Path) -> None:
    """Sync a file, or a folder with everything in it, to disk."""
    for one in [*path.rglob("*"), path]:
        (sync_folder if one.is_dir() else sync_file)(one)


def _sync(path: Path, flags: int) -> None:
    file = os.open(path, flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)
