"""Schema of the job store's database, and the upgrades to it from each earlier version.

PostgreSQL is supported from version 5 on, so earlier versions exist in SQLite only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from service.jobs import outbox
from service.jobs.database import Database, Session, UnusableDatabase
from service.jobs.files import size_of, sync_folder
from service.jobs.job_files import result_name, windows_name, write_request

SCHEMA_VERSION = 6
_SCHEMA = """
CREATE TABLE jobs (
    number {number},  -- the order of acceptance
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    idempotency_key TEXT,
    fingerprint TEXT,
    task TEXT NOT NULL,
    model TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'accepted',
    progress INTEGER NOT NULL DEFAULT 0,
    problem TEXT,
    computed_by TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,  -- starts since the last finished window
    created DOUBLE PRECISION NOT NULL,
    started DOUBLE PRECISION,
    finished DOUBLE PRECISION,
    updated DOUBLE PRECISION NOT NULL,
    age DOUBLE PRECISION NOT NULL DEFAULT 0,  -- seconds since the job ended, as `sweep` counts
    caller TEXT NOT NULL DEFAULT '',  -- counted for the quotas: the owner, or an address
    bytes BIGINT NOT NULL DEFAULT 0,  -- size of the job's files
    subscriber TEXT,  -- addresses that the job calls, JSON
    lease INTEGER NOT NULL DEFAULT 0,  -- number of times that it was taken
    expires DOUBLE PRECISION,  -- end of the lease or of a rest, null once its files are in order
    UNIQUE (owner, idempotency_key)
);
CREATE INDEX by_status ON jobs (status);
CREATE INDEX by_owner ON jobs (owner, number);
CREATE INDEX by_caller ON jobs (caller, status);
CREATE TABLE windows (
    job BIGINT NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
    stage TEXT NOT NULL,
    number INTEGER NOT NULL,
    place TEXT NOT NULL,
    "offset" BIGINT NOT NULL,
    length BIGINT NOT NULL,
    lease INTEGER NOT NULL,  -- under which it was finished, and so in which file it is
    PRIMARY KEY (job, stage, number)
);
CREATE TABLE clock (seen DOUBLE PRECISION NOT NULL);
INSERT INTO clock VALUES ({now});
CREATE TABLE turns (caller TEXT PRIMARY KEY, turn BIGINT NOT NULL);
CREATE TABLE usage (
    caller TEXT NOT NULL,
    day INTEGER NOT NULL,  -- since 1970, UTC
    pixels BIGINT NOT NULL,
    PRIMARY KEY (caller, day)
);
"""
_HEADS = """
CREATE TABLE heads (  -- models of own classes in a bucket, while those in a folder have no rows
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    version TEXT NOT NULL,  -- another for each model of the name
    PRIMARY KEY (owner, name)
)"""
_SHARES = """
ALTER TABLE jobs ADD COLUMN caller TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
UPDATE jobs SET caller = owner;
CREATE INDEX by_caller ON jobs (caller, status);
CREATE TABLE turns (caller TEXT PRIMARY KEY, turn INTEGER NOT NULL);
CREATE TABLE usage (
    caller TEXT NOT NULL, day INTEGER NOT NULL, pixels INTEGER NOT NULL, PRIMARY KEY (caller, day)
)"""
_LEASES = """
ALTER TABLE jobs ADD COLUMN lease INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN expires DOUBLE PRECISION;
ALTER TABLE windows ADD COLUMN lease INTEGER NOT NULL DEFAULT 0"""


def upgrade(database: Database, jobs: Path) -> None:
    """Create the schema, or bring it to this version.

    Each step commits together with its version number, so that an interrupted upgrade resumes at
    the interrupted step.

    Args:
        database: open.
        jobs: folder of the jobs.

    Raises:
        UnusableDatabase: a later release wrote the database.
    """
    dialect = database.dialect
    while (version := _version(database)) != SCHEMA_VERSION:
        if version not in range(SCHEMA_VERSION):
            raise UnusableDatabase(
                f"its schema has version {version}, but this release reads versions up to "
                f"{SCHEMA_VERSION}; use the release that wrote it, or another directory"
            )
        if version == 1:
            _move_requests(database, jobs)
        with database.transaction(serial=True) as db:
            if dialect.version(db) != version:
                continue  # another replica has done this step
            if version == 0:
                _execute(db, f"{_SCHEMA}{_HEADS};{outbox.TABLE}")
                dialect.set_version(db, SCHEMA_VERSION)
            else:
                _STEPS[version](db, jobs)
                dialect.set_version(db, version + 1)
        if version == 1:
            with database.read() as db:
                db.execute("VACUUM")
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _version(database: Database) -> int:
    with database.read() as db:
        return database.dialect.version(db)


def _execute(db: Session, statements: str) -> None:
    for statement in statements.split(";"):
        db.execute(statement)


def _move_requests(database: Database, jobs: Path) -> None:
    """Write the requests, which schema 1 kept in the database, into files."""
    with database.read() as db:
        kept = "SELECT id, document FROM jobs WHERE status IN ('accepted', 'running', 'successful')"
        for name, document in db.execute(kept).fetchall():
            if (jobs / name).is_dir():
                write_request(jobs / name, document)


def _drop_requests(db: Session, jobs: Path) -> None:  # noqa: ARG001 - as the other steps
    db.execute("ALTER TABLE jobs DROP COLUMN document")
    db.execute("CREATE INDEX by_owner ON jobs (owner, number)")


def _add_shares(db: Session, jobs: Path) -> None:
    """Add the columns that count each caller's use."""
    names = [name for (name,) in db.execute("SELECT id FROM jobs").fetchall()]
    _execute(db, _SHARES)
    for name in names:
        db.execute("UPDATE jobs SET bytes = ? WHERE id = ?", (size_of(jobs / name), name))


def _add_callbacks(db: Session, jobs: Path) -> None:  # noqa: ARG001 - as the other steps
    """Add subscribers and the outbox."""
    _execute(db, f"ALTER TABLE jobs ADD COLUMN subscriber TEXT;{outbox.TABLE}")


def _add_leases(db: Session, jobs: Path) -> None:
    """Add leases; existing windows and results get the lease 0."""
    for folder in filter(Path.is_dir, jobs.iterdir()):
        for before, name in (("windows", windows_name(0)), ("result", result_name(0))):
            if (folder / before).exists():
                (folder / before).rename(folder / name)
        sync_folder(folder)
    _execute(db, _LEASES)


def _add_heads(db: Session, jobs: Path) -> None:  # noqa: ARG001 - as the other steps
    """Let models of own classes be in a bucket."""
    _execute(db, _HEADS)


_STEPS: Mapping[int, Callable[[Session, Path], None]] = {
    1: _drop_requests,
    2: _add_shares,
    3: _add_callbacks,
    4: _add_leases,
    5: _add_heads,
}
"""Upgrades from each version to the next, within its transaction."""
