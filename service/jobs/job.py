"""A job: the value that callers of the store receive, and conditions on jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from service.errors import PIMCError, ResultNotReady
from service.run.request import Runnable, Subscriber

JobStatus = Literal["accepted", "running", "successful", "failed", "dismissed"]
STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job's state when it was read. Times are seconds since 1970 by the wall clock."""

    number: int
    """Position in the order of acceptance."""
    id: str
    owner: str
    """The caller that the job belongs to; empty if no API keys are set."""
    caller: str
    """The caller whose share the job counts for: the owner, or an address without API keys."""
    fingerprint: str | None
    """Fingerprint of the request; None if the request had no idempotency key."""
    task: Runnable
    model: str
    """As `name@version`."""
    sha256: str
    """The sha256 in the model's card, hexadecimal."""
    status: JobStatus
    progress: int
    """Progress in per cent, 0 to 100; never decreases."""
    problem: Mapping[str, Any] | None
    """`code`, `detail` and `errors` of a failed job; None otherwise."""
    computed_by: str | None
    """Provider and variant that computed the finished windows; None before the first run."""
    attempts: int
    """Number of starts since a window was last finished."""
    lease: int
    """Number of times that the job was taken; identifies the run that may change it."""
    created: float
    started: float | None
    finished: float | None
    updated: float
    subscriber: Subscriber | None
    """URLs that the job calls."""

    @property
    def error(self) -> PIMCError:
        """The error of a failed job."""
        problem = self.problem or {}
        return PIMCError.of_code(problem["code"], problem["detail"], problem.get("errors", ()))


@dataclass(frozen=True, kw_only=True)
class JobFilter:
    """Conditions on jobs; those that are None or empty hold for every job."""

    tasks: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ()
    since: float | None = None
    """Created at or after this moment, seconds since 1970."""
    until: float | None = None
    """Created before this moment."""
    shortest: float | None = None
    """Seconds that the job has run at least; with a bound, jobs that have not begun are left out,
    and those that wait to go on."""
    longest: float | None = None
    """Seconds that it has run at most."""

    def sql(self, now: float) -> tuple[str, tuple[object, ...]]:
        """The conditions as `AND …`, and their values.

        Args:
            now: seconds since 1970, until which a running job has run.
        """
        ran = (
            "(CASE WHEN status = 'running' THEN ? "
            "WHEN status != 'accepted' THEN finished END - started)"
        )
        conditions: list[tuple[str, tuple[object, ...]]] = [
            (f"{column} IN ({', '.join('?' * len(values))})", values)
            for column, values in (("task", self.tasks), ("status", self.statuses))
            if values
        ]
        for condition, bound in (("created >= ?", self.since), ("created < ?", self.until)):
            if bound is not None:
                conditions.append((condition, (bound,)))
        for sign, bound in ((">=", self.shortest), ("<=", self.longest)):
            if bound is not None:
                conditions.append((f"{ran} {sign} ?", (now, bound)))
        return (
            "".join(f" AND {condition}" for condition, _ in conditions),
            tuple(value for _, values in conditions for value in values),
        )


def job_of_row(row: Any) -> Job:  # noqa: ANN401 - of either library
    """The job of a row of the table `jobs`."""
    found: dict[str, Any] = {name: row[name] for name in Job.__dataclass_fields__}
    if found["problem"]:
        found["problem"] = json.loads(found["problem"])
    if found["subscriber"]:
        found["subscriber"] = Subscriber(**json.loads(found["subscriber"]))
    return Job(**found)


def removed(job: Job) -> ResultNotReady:
    """The error for a result whose files have been removed."""
    return ResultNotReady(
        f"the result of job {job.id} has been removed: the job was dismissed or has expired; send "
        "the request again"
    )
