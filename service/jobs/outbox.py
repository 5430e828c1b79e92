"""Outbox of callbacks: rows of the job store, written with the change that they report.

    job changes ─┬─ one transaction ─▶ jobs
                 └────────────────────▶ callbacks ──▶ delivered, or given up: removed

A row exists until its receiver has accepted the callback, so that killing the process between the
end of a job and its callback loses none. A receiver may get a callback twice: the message id is the
same.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from service.jobs.database import Database, Session
from service.jobs.job import Job, job_of_row
from service.run.request import Subscriber

Event = Literal["success", "failed", "progress"]
TABLE = """
CREATE TABLE callbacks (
    number {number},
    job BIGINT NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
    event TEXT NOT NULL,
    message TEXT NOT NULL UNIQUE,  -- its id, the same in every attempt
    attempts INTEGER NOT NULL DEFAULT 0,
    due DOUBLE PRECISION NOT NULL  -- seconds since 1970
);
CREATE INDEX by_due ON callbacks (attempts, due);
CREATE INDEX callbacks_by_job ON callbacks (job)
"""
PROGRESS_STEP = 10
"""Progress, in per cent, between two progress callbacks."""
_CLAIM_SECONDS = 60.0
"""Seconds in which a replica sends a callback before another may send it."""
_ENDS: Mapping[str, Event] = {"successful": "success", "failed": "failed"}


def queue_end(
    db: Session, job: int, subscriber: Subscriber | None, status: str, now: float
) -> None:
    """Queue the callback for a job's end; a queued progress callback is dropped."""
    if subscriber is not None:
        drop(db, job)
        if status in _ENDS:
            _queue(db, job, subscriber, _ENDS[status], now)


def queue_progress(db: Session, job: int, subscriber: Subscriber | None, now: float) -> None:
    """Queue a progress callback; it replaces one that has not been delivered yet."""
    if subscriber is not None:
        db.execute("DELETE FROM callbacks WHERE job = ? AND event = 'progress'", (job,))
        _queue(db, job, subscriber, "progress", now)


def drop(db: Session, job: int) -> None:
    """Drop the queued callbacks of a job."""
    db.execute("DELETE FROM callbacks WHERE job = ?", (job,))


def _queue(db: Session, job: int, subscriber: Subscriber, event: Event, now: float) -> None:
    if subscriber.url(event) is not None:
        db.execute(
            "INSERT INTO callbacks (job, event, message, due) VALUES (?, ?, ?, ?)",
            (job, event, f"msg_{uuid.uuid4().hex}", now),
        )


@dataclass(frozen=True, kw_only=True)
class Callback:
    """A callback to send."""

    number: int
    job: Job
    event: Event
    message: str
    """Its id, the same in every attempt."""
    attempts: int
    """That have failed."""


class Outbox:
    """The queued callbacks. Thread-safe.

    Args:
        database: of the job store.
        shared: whether replicas share it.
    """

    def __init__(self, database: Database, *, shared: bool) -> None:
        self._db = database
        self._shared = shared

    def due(self, now: float, most: int) -> list[Callback]:
        """Callbacks to send now, first attempts before repeated ones.

        Args:
            now: seconds since 1970.
            most: largest number of callbacks.
        """
        with self._db.transaction(serial=True) as db:
            rows = db.execute(
                "SELECT * FROM callbacks WHERE due <= ? ORDER BY attempts, due, number LIMIT ?",
                (now, most),
            ).fetchall()
            if self._shared:
                for row in rows:
                    db.execute(
                        "UPDATE callbacks SET due = ? WHERE number = ?",
                        (now + _CLAIM_SECONDS, row["number"]),
                    )
            numbers = {row["job"] for row in rows}
            marks = ", ".join("?" * len(numbers))
            jobs = {
                row["number"]: job_of_row(row)
                for row in db.execute(
                    f"SELECT * FROM jobs WHERE number IN ({marks or 'NULL'})",  # noqa: S608 - marks
                    (*numbers,),
                ).fetchall()
            }
        return [
            Callback(
                number=row["number"],
                job=jobs[row["job"]],
                event=row["event"],
                message=row["message"],
                attempts=row["attempts"],
            )
            for row in rows
        ]

    def next_due(self) -> float | None:
        """When the next callback is due, seconds since 1970; None if there is none."""
        with self._db.read() as db:
            (when,) = db.execute("SELECT min(due) FROM callbacks").fetchone()
        return None if when is None else float(when)

    def count(self) -> int:
        """Number of callbacks that were not delivered yet."""
        with self._db.read() as db:
            (waiting,) = db.execute("SELECT count(*) FROM callbacks").fetchone()
        return int(waiting)

    def failed(self, callback: Callback, *, until: float | None) -> None:
        """Record an attempt that failed.

        Args:
            callback: the callback.
            until: when it is sent again, seconds since 1970; None gives it up.
        """
        with self._db.transaction() as db:
            if until is None:
                _settle(db, callback.number)
            else:
                db.execute(
                    "UPDATE callbacks SET attempts = attempts + 1, due = ? WHERE number = ?",
                    (until, callback.number),
                )

    def delivered(self, callback: Callback) -> None:
        """Record that the receiver has accepted a callback."""
        with self._db.transaction() as db:
            _settle(db, callback.number)


def _settle(db: Session, number: int) -> None:
    """Remove a callback that was delivered or given up."""
    db.execute("DELETE FROM callbacks WHERE number = ?", (number,))
