"""Quotas of one caller, and the `RateLimit` headers that state them.

The headers follow draft-ietf-httpapi-ratelimit-headers-11: `RateLimit-Policy` states each quota,
`RateLimit` what is left of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from anyio import to_thread

from service.api.admission import REQUESTS, Admission
from service.api.auth import ApiKeys
from service.errors import Overloaded, PIMCError
from service.jobs.store import JOBS, PIXELS, STORAGE, JobStore, Share, seconds_of_day_left
from service.run.plan import Plan
from service.run.request import RasterRequest
from service.settings import Settings

_DAY = 24 * 3600
# Units of the draft's registry, and one of this service's own.
_CONCURRENT, _BYTES, _PIXELS = "concurrent-requests", "content-bytes", "pimc-pixels"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One quota of a caller, and what is left of it."""

    policy: str
    """Its name."""
    quota: int
    unit: str
    left: int
    window: int | None = None
    """Seconds for which the quota is; None if it is for what there is at once."""
    seconds: int | None = None
    """Seconds until more is left; None without a window."""


class Quotas:
    """The quotas of each caller.

    Args:
        settings: the quotas.
        keys: of the callers.
        jobs: count what callers use.
        admission: counts requests.
    """

    def __init__(
        self, settings: Settings, keys: ApiKeys, jobs: JobStore, admission: Admission
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._jobs = jobs
        self._admission = admission

    @property
    def share(self) -> Share:
        """The share of one caller of jobs, pixels and storage."""
        settings = self._settings
        jobs = settings.max_jobs_per_caller
        if jobs is None and self._keys.callers > 1:
            jobs = max(1, settings.max_jobs // 2)
        return Share(
            jobs=jobs,
            pixels=settings.max_pixels_per_day,
            bytes=settings.max_storage_per_caller,
        )

    @contextmanager
    def charged(self, caller: str, plan: Plan) -> Iterator[None]:
        """Charge a run to its caller; if the run is not started for lack of room, give it back.

        Raises:
            TooManyRequests: the day's pixels are used up.
        """
        pixels, share = cost(plan), self.share
        self._jobs.charge(caller, pixels, share)
        try:
            yield
        except Overloaded:
            self._jobs.charge(caller, -pixels, share)
            raise

    async def limits(self, caller: str) -> list[Limit]:
        """The quotas that are set, and what a caller has left of them."""
        share = self.share
        requests = self._settings.max_requests_per_caller
        found = []
        if requests is not None:
            left = requests - self._admission.requests_of(caller)
            found.append(_limit(REQUESTS, requests, _CONCURRENT, left))
        if share == Share():
            return found
        try:
            used = await to_thread.run_sync(self._jobs.usage, caller)
        except PIMCError:  # a failing disk: the response goes out without these headers
            return found
        if share.jobs is not None:
            found.append(_limit(JOBS, share.jobs, _CONCURRENT, share.jobs - used.jobs))
        if share.pixels is not None:
            left = share.pixels - used.pixels
            found.append(_limit(PIXELS, share.pixels, _PIXELS, left, daily=True))
        if share.bytes is not None:
            found.append(_limit(STORAGE, share.bytes, _BYTES, share.bytes - used.bytes))
        return found


def _limit(policy: str, quota: int, unit: str, left: int, *, daily: bool = False) -> Limit:
    return Limit(
        policy=policy,
        quota=quota,
        unit=unit,
        left=max(0, left),
        window=_DAY if daily else None,
        seconds=seconds_of_day_left() if daily else None,
    )


def headers(limits: Sequence[Limit], *, status: int, violated: str | None) -> dict[str, str]:
    """The `RateLimit` headers of a response.

    Args:
        limits: the caller's quotas.
        status: of the response.
        violated: the quota that the request exceeded; None if it exceeded none.
    """
    if not limits:
        return {}
    found = {"RateLimit-Policy": ", ".join(map(_policy, limits))}
    # `Retry-After` must not lie before the end of a window that the same response names, so a
    # rejection names only the quota that it is for.
    rejected = violated is not None or status == 503
    shown = [one for one in limits if one.policy == violated] if rejected else limits
    if shown:
        found["RateLimit"] = ", ".join(map(_left, shown))
    return found


def _policy(limit: Limit) -> str:
    window = "" if limit.window is None else f";w={limit.window}"
    return f'"{limit.policy}";q={limit.quota};qu="{limit.unit}"{window}'


def _left(limit: Limit) -> str:
    seconds = "" if limit.seconds is None else f";t={limit.seconds}"
    return f'"{limit.policy}";r={limit.left}{seconds}'


def cost(plan: Plan) -> int:
    """What a plan takes of the pixels of a day: its pixels, points or series."""
    request = plan.request
    if not isinstance(request, RasterRequest):
        return len(request.series)
    return plan.pixels if request.points is None else len(request.points)
