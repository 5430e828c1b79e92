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
from typing import Any, Literal

from service.jobs.database import Session
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


def due(db: Session, now: float, most: int) -> list[Any]:
    """Rows of the callbacks that are due, first attempts before retries."""
    return db.execute(
        "SELECT * FROM callbacks WHERE due <= ? ORDER BY attempts, due, number LIMIT ?",
        (now, most),
    ).fetchall()


def claim(db: Session, number: int, until: float) -> None:
    """Reserve a callback for this replica until a time, in seconds since 1970."""
    db.execute("UPDATE callbacks SET due = ? WHERE number = ?", (until, number))


def next_due(db: Session) -> float | None:
    """Time at which the next callback is due, in seconds since 1970; None if there is none."""
    (when,) = db.execute("SELECT min(due) FROM callbacks").fetchone()
    return None if when is None else float(when)


def postpone(db: Session, number: int, until: float) -> None:
    """Count a failed attempt, and schedule the next one."""
    db.execute(
        "UPDATE callbacks SET attempts = attempts + 1, due = ? WHERE number = ?", (until, number)
    )


def settle(db: Session, number: int) -> None:
    """Remove a callback that was delivered or given up."""
    db.execute("DELETE FROM callbacks WHERE number = ?", (number,))


def count(db: Session) -> int:
    """Number of queued callbacks."""
    (waiting,) = db.execute("SELECT count(*) FROM callbacks").fetchone()
    return int(waiting)
