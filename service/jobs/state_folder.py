"""State directory: checks at the start that directory, database and storage belong together.

    PIMC_STATE_DIR/
        lock           locked by the one service that uses the directory, or by replicas together
        jobs.sqlite    every job, and which of its windows are finished; replicas use PostgreSQL
        database       id of the replicas' database
        requests/      files of requests in flight; emptied at each start; replicas have none here
        jobs/          files of the jobs (`job_files`)
        heads/         the callers' own models (`heads`)

With a storage elsewhere (`storage`) the jobs' files are there, and the state directory is one
replica's own:

    PIMC_STATE_DIR/
        jobs/<id>-<n>/     input/ and work-<n>/ of a run here; emptied at each start
        copies/            results from which files are derived; emptied at each start
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import PIMCError
from service.jobs.database import Database, UnusableDatabase
from service.jobs.job_files import JOBS_FOLDER
from service.jobs.storage import MARK, Storage, StorageUnreachable
from service.settings import SettingsError

DATABASE = "jobs.sqlite"


def check_kind(folder: Path, *, shared: bool, own: bool) -> None:
    """Check that a state directory is not one of the other kind of service.

    Args:
        folder: the state directory.
        shared: whether replicas share the database.
        own: whether their files are in another storage.

    Raises:
        SettingsError: it is.
    """
    if shared and (folder / DATABASE).exists():
        raise SettingsError(
            f"PIMC_STATE_DIR: {folder} has the jobs of a service without PIMC_DATABASE_URL "
            f"({DATABASE}): name a new folder, and move the jobs there with `python -m service "
            "backup` and `restore`"
        )
    if not shared and (folder / MARK).exists():
        raise SettingsError(
            f"PIMC_STATE_DIR: {folder} has the jobs of replicas with PIMC_DATABASE_URL: set "
            "PIMC_DATABASE_URL, or name another folder"
        )
    if own and (folder / MARK).exists():
        raise SettingsError(
            f"PIMC_STATE_DIR: {folder} has the files of replicas without PIMC_STORAGE_URL: name a "
            "new folder for each replica, and move the jobs to the storage with `python -m service "
            "backup` and `restore`"
        )


def check_owner(database: Database, storage: Storage, folder: Path) -> None:
    """Check that the storage belongs to the database; mark a new one.

    Raises:
        SettingsError: the storage belongs to another database.
    """
    with database.read() as db:
        (ident,) = db.execute("SELECT id FROM store").fetchone()
        (jobs,) = db.execute("SELECT count(*) FROM jobs").fetchone()
    what = f"PIMC_STATE_DIR: {folder}" if storage.local else "PIMC_STORAGE_URL: the bucket"
    kind = "folder" if storage.local else "prefix"
    try:
        known = storage.read(MARK).decode().strip()
    except FileNotFoundError:
        if storage.names(JOBS_FOLDER):
            raise SettingsError(
                f"{what} has jobs of another database; name a new {kind}, or restore a backup"
            ) from None
        if jobs and not storage.local:
            raise SettingsError(
                f"{what} has no files of the database's {jobs} jobs: name the storage that has "
                "them, or move the jobs with `python -m service backup` and `restore`"
            ) from None
        mark_owner(storage, ident)
        return
    if known != ident:
        raise SettingsError(
            f"{what} belongs to the database {known}, but PIMC_DATABASE_URL names the database "
            f"{ident}; set the two that belong together, or name a new {kind}"
        )


def mark_owner(storage: Storage, ident: str) -> None:
    """Let a storage belong to a database.

    Args:
        storage: the storage.
        ident: id of the database.
    """
    storage.write(MARK, f"{ident}\n".encode())


@contextmanager
def translate_start_errors(folder: Path, name: str) -> Iterator[None]:
    """Raise `SettingsError` where the directory, the database or the storage cannot be used.

    Args:
        folder: the state directory.
        name: of the database, for messages.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(f"PIMC_STATE_DIR: {folder} cannot be used: {reason}") from error
    except StorageUnreachable as error:
        message = f"PIMC_STORAGE_URL: the bucket cannot be used: {error.reason}"
        raise SettingsError(message) from error
    except (UnusableDatabase, PIMCError) as error:
        sqlite = name == DATABASE
        what = f"PIMC_STATE_DIR: {folder}" if sqlite else "PIMC_DATABASE_URL: the database"
        raise SettingsError(f"{what} cannot be used: {error} ({name})") from error
