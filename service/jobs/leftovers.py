"""Files that services left in the storage when they ended: without a job, or of ended runs."""

from __future__ import annotations

import time

from service.jobs.database import Database
from service.jobs.head_rows import HEADS
from service.jobs.job_files import JOBS_FOLDER, READY, REQUEST, UNFINISHED, key_of, result_name
from service.jobs.storage import Storage

_ORPHAN_SECONDS = 24 * 3600.0
"""Age at which a folder without a job is removed: a younger one may be about to be accepted."""


def remove_orphans(database: Database, storage: Storage) -> None:
    """Remove files without a job, and models without a record.

    They are left by a replica that ended before it accepted the job, and by removals while the
    storage could not be reached.
    """
    owned = {JOBS_FOLDER: "SELECT id FROM jobs"}
    if not storage.local:  # models in a folder have no rows
        owned[HEADS] = "SELECT version FROM heads"
    for kind, query in owned.items():
        # Names first: a job that is accepted meanwhile is in neither.
        names = storage.names(kind)
        with database.read() as db:
            kept = {name for (name,) in db.execute(query).fetchall()}
        for name in set(names) - kept:
            key = f"{kind}/{name}"
            if time.time() - storage.modified(key) > _ORPHAN_SECONDS:
                storage.remove(key)


def remove_leftovers(database: Database, storage: Storage) -> None:
    """Remove the files of services that have ended: no other service uses the folder."""
    with database.read() as db:
        rows = db.execute("SELECT id, status, lease FROM jobs").fetchall()
    kept = {row["id"]: row for row in rows}
    for name in storage.names(JOBS_FOLDER):
        row = kept.get(name)
        if row is None or row["status"] in {"failed", "dismissed"}:
            storage.remove(key_of(name))
        elif row["status"] == "successful":
            storage.keep_only(key_of(name), result_name(row["lease"]), REQUEST, READY)
            ready = storage.names(key_of(name, READY))
            for half in (one for one in ready if one.startswith(UNFINISHED)):
                storage.remove(key_of(name, READY, half))
