"""Use of quotas by each caller: jobs that wait or run, pixels of the day, bytes of files.

`service.api.quotas` has the quotas of each caller; this module counts what callers have used. The
rows of jobs give jobs and bytes, and a table of its own gives pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from service.errors import BodyTooLarge, RasterTooLarge, TooManyRequests
from service.jobs.database import Database, Session

JOBS, PIXELS, STORAGE = "jobs", "pixels", "storage"
"""Names of the quotas of waiting and running jobs, of pixels per day, and of bytes."""
_DAY = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Share:
    """Quotas of one caller; None is unlimited."""

    jobs: int | None = None
    """Largest number of jobs that wait or run."""
    pixels: int | None = None
    """Largest number of pixels, series and points per day (UTC)."""
    bytes: int | None = None
    """Largest size of the files of all jobs."""


UNBOUNDED = Share()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Current use of one caller's quotas."""

    jobs: int
    """Number of jobs that wait or run."""
    pixels: int
    """Number of pixels, series and points on this day (UTC)."""
    bytes: int
    """Size of the files of all jobs."""
    day: int = field(default=0, compare=False)
    """Number of this day since 1970 (UTC), by the database's clock."""
    day_left: int = field(default=_DAY, compare=False)
    """Seconds until the next day begins (UTC), by the database's clock."""


class CallerUsage:
    """What callers have used of their quotas. Thread-safe.

    Args:
        database: of the job store.
        ttl: seconds for which a finished job is kept.
    """

    def __init__(self, database: Database, *, ttl: float) -> None:
        self._db = database
        self._ttl = ttl

    def of(self, caller: str) -> Usage:
        """Current use of a caller's quotas."""
        with self._db.read() as db:
            return _usage(db, caller)

    def charge(self, caller: str, pixels: int, share: Share) -> None:
        """Count the pixels of a request for its caller's quota of the day.

        Args:
            caller: the caller.
            pixels: pixels, series and points of the request; negative if it was not run after all.
            share: the caller's share.

        Raises:
            TooManyRequests: the request exceeds what is left of the day's quota; its pixels are
                not counted.
            RasterTooLarge: the request has more pixels than the quota of a day.
        """
        if share.pixels is not None:
            with self._db.transaction(serial=True) as db:
                self.count(db, caller, pixels, share)

    def check(self, db: Session, caller: str, share: Share, size: int) -> None:
        """Check that a caller may have one more job.

        Args:
            db: in the transaction that adds the job.
            caller: the caller.
            share: the caller's share.
            size: size of the job's files, bytes.

        Raises:
            TooManyRequests: the caller has as many jobs or bytes as are allowed.
            BodyTooLarge: the files alone are larger than the quota.
        """
        if share == UNBOUNDED:
            return
        used = _usage(db, caller)
        if share.jobs is not None and used.jobs >= share.jobs:
            raise TooManyRequests(
                f"{used.jobs} jobs of this caller wait or run, and at most {share.jobs} are "
                "allowed (PIMC_MAX_JOBS_PER_CALLER, or `jobs` of its key): wait until one "
                "finishes, or dismiss one; nothing was started",
                policy=JOBS,
            )
        if share.bytes is not None and size >= share.bytes:
            raise BodyTooLarge(
                f"the files of the job have {size} bytes, and the jobs of this caller may keep "
                f"{share.bytes} (PIMC_MAX_STORAGE_PER_CALLER, or `storage` of its key), so it "
                "would be rejected at any time: send a smaller area, or have the administrator "
                "raise the quota; nothing was started"
            )
        if share.bytes is not None and used.bytes + size >= share.bytes:
            (age,) = db.execute(
                "SELECT coalesce(max(age), 0) FROM jobs WHERE caller = ? AND bytes > 0", (caller,)
            ).fetchone()
            raise TooManyRequests(
                f"the jobs of this caller keep {used.bytes} bytes, this one would add {size}, and "
                f"at most {share.bytes} are allowed (PIMC_MAX_STORAGE_PER_CALLER, or `storage` of "
                "its key): dismiss finished jobs, or wait until the oldest one expires",
                policy=STORAGE,
                retry_after=max(1, math.ceil(self._ttl - age)),
            )

    @staticmethod
    def count(db: Session, caller: str, pixels: int, share: Share) -> None:
        """`charge` within a transaction.

        Args:
            db: in the transaction.
            caller: the caller.
            pixels: as for `charge`.
            share: the caller's share.

        Raises:
            TooManyRequests: as `charge`.
            RasterTooLarge: as `charge`.
        """
        if share.pixels is None:
            return
        if pixels > share.pixels:
            raise RasterTooLarge(
                f"the request has {pixels} pixels, and this caller may use {share.pixels} a day "
                "(PIMC_MAX_PIXELS_PER_DAY, or `pixels` of its key), so it would be rejected on "
                "every day: send a smaller area or fewer series, or have the administrator raise "
                "the quota; nothing was started"
            )
        used = _usage(db, caller)
        if used.pixels + pixels > share.pixels:
            raise TooManyRequests(
                f"this caller has used {used.pixels} of its {share.pixels} pixels of this day "
                "(UTC; PIMC_MAX_PIXELS_PER_DAY, or `pixels` of its key), and the request has "
                f"{pixels} pixels: send a smaller area, or wait until the next day; nothing was "
                "started",
                policy=PIXELS,
                retry_after=used.day_left,
            )
        db.execute(
            "INSERT INTO usage VALUES (?, ?, ?) "
            "ON CONFLICT (caller, day) DO UPDATE SET pixels = usage.pixels + excluded.pixels",
            (caller, used.day, pixels),
        )

    @staticmethod
    def adopt(db: Session, former: str, owner: str) -> None:
        """Add what a former caller has used on each day to a caller's use."""
        db.execute(
            "INSERT INTO usage SELECT ?, day, pixels FROM usage WHERE caller = ? "
            "ON CONFLICT (caller, day) "
            "DO UPDATE SET pixels = usage.pixels + excluded.pixels",
            (owner, former),
        )
        db.execute("DELETE FROM usage WHERE caller = ?", (former,))

    @staticmethod
    def forget(db: Session) -> None:
        """Remove the counts of days that have passed."""
        db.execute("DELETE FROM usage WHERE day < ?", (_day(db)[0],))


def _usage(db: Session, caller: str) -> Usage:
    jobs, size = db.execute(
        "SELECT count(*) FILTER (WHERE status IN ('accepted', 'running')), "
        "CAST(coalesce(sum(bytes), 0) AS BIGINT) "
        "FROM jobs WHERE caller = ?",
        (caller,),
    ).fetchone()
    today, left = _day(db)
    row = db.execute(
        "SELECT pixels FROM usage WHERE caller = ? AND day = ?", (caller, today)
    ).fetchone()
    pixels = row["pixels"] if row else 0
    return Usage(jobs=jobs, pixels=pixels, bytes=size, day=today, day_left=left)


def _day(db: Session) -> tuple[int, int]:
    """The day since 1970 (UTC), and the seconds until the next one, by the database's clock.

    Replicas, whose own clocks may differ, so begin a day together.
    """
    (now,) = db.execute("SELECT {now}").fetchone()
    return int(now // _DAY), math.ceil(_DAY - now % _DAY)
