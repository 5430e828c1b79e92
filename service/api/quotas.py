"""Quotas of one caller, and the `RateLimit` headers that state them.

The headers follow draft-ietf-httpapi-ratelimit-headers-11: `RateLimit-Policy` states each quota,
`RateLimit` what remains of it.

A request over a quota is rejected with `too_many_requests` (429), by the module that counts: for
requests at once `service.api.admission`, for jobs, pixels of a day and storage
`service.jobs.usage`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from anyio import to_thread

from service.api.admission import REQUESTS, Admission
from service.api.auth import ApiKeys
from service.errors import Overloaded, PIMCError
from service.jobs.usage import JOBS, PIXELS, STORAGE, CallerUsage, Share
from service.run.plan import Plan
from service.run.request import RasterRequest
from service.settings import Settings

_DAY = 24 * 3600
# Units that the draft registers, and `pimc-pixels`, which only this service uses.
_CONCURRENT, _BYTES, _PIXELS = "concurrent-requests", "content-bytes", "pimc-pixels"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One quota of a caller, and what remains of it."""

    policy: str
    """Name of the quota."""
    quota: int
    """Largest allowed amount."""
    unit: str
    """Unit of `quota` and `left`."""
    left: int
    """Amount that remains, at least 0."""
    window: int | None = None
    """Seconds to which the quota applies; None if it limits the amount at any one time."""
    seconds: int | None = None
    """Seconds until the quota is available again; None without a window."""


class Rate:
    """A burst of work at once, then spaced by its cost: generic cell rate algorithm, ITU-T I.371.

    Args:
        burst: cost of the work that may be done at once, seconds.
    """

    def __init__(self, burst: float) -> None:
        self._burst = burst
        self._due = 0.0

    def wait(self, cost: float, now: float) -> float:
        """Count work, and return the seconds to wait before it is done.

        Args:
            cost: time that the work takes at the limited rate, seconds.
            now: time by a monotonic clock, seconds.
        """
        self._due = max(self._due, now) + cost
        return max(0.0, self._due - now - self._burst)


class Allowances:
    """Quotas of each caller: those of the key file, or else those of the settings.

    Args:
        settings: settings that hold the quotas of all callers.
        keys: API keys of the callers, with their own quotas.
    """

    def __init__(self, settings: Settings, keys: ApiKeys) -> None:
        self._settings = settings
        self._keys = keys

    def requests(self, caller: str) -> int | None:
        """Largest number of requests of a caller at once; None is unlimited."""
        return self._keys.quotas_of(caller).get("requests", self._settings.max_requests_per_caller)

    def share(self, caller: str) -> Share:
        """The quotas of a caller for jobs, pixels and storage."""
        settings, own = self._settings, self._keys.quotas_of(caller)
        jobs = settings.max_jobs_per_caller
        if jobs is None and self._keys.callers > 1:
            jobs = max(1, settings.max_jobs // 2)
        return Share(
            jobs=own.get("jobs", jobs),
            pixels=own.get("pixels", settings.max_pixels_per_day),
            bytes=own.get("storage", settings.max_storage_per_caller),
        )


class Quotas:
    """The quotas of each caller, and what remains of them.

    Args:
        allowances: each caller's quotas.
        usage: what callers have used of jobs, pixels and bytes.
        admission: admission control, which counts requests by caller.
    """

    def __init__(self, allowances: Allowances, usage: CallerUsage, admission: Admission) -> None:
        self._allowances = allowances
        self._usage = usage
        self._admission = admission

    def share(self, caller: str) -> Share:
        """The quotas of a caller for jobs, pixels and storage."""
        return self._allowances.share(caller)

    @contextmanager
    def charged(self, caller: str, pixels: int) -> Iterator[None]:
        """Count a run's pixels for its caller; undo that if the run is rejected as `overloaded`.

        Args:
            caller: the caller's id, or the client's address without API keys.
            pixels: pixels, points or series of the run.

        Raises:
            TooManyRequests: the caller's pixels of the day are used up.
            RasterTooLarge: the run has more pixels than the caller's quota of a day.
        """
        share = self.share(caller)
        self._usage.charge(caller, pixels, share)
        try:
            yield
        except Overloaded:
            self._usage.charge(caller, -pixels, share)
            raise

    async def limits(self, caller: str) -> list[Limit]:
        """The quotas that are set, and what remains of them for a caller."""
        share = self.share(caller)
        requests = self._allowances.requests(caller)
        found = []
        if requests is not None:
            left = requests - self._admission.requests_of(caller)
            found.append(_limit(REQUESTS, requests, _CONCURRENT, left))
        if share == Share():
            return found
        try:
            used = await to_thread.run_sync(self._usage.of, caller)
        except PIMCError:  # the disk fails: the response is sent without these headers
            return found
        if share.jobs is not None:
            found.append(_limit(JOBS, share.jobs, _CONCURRENT, share.jobs - used.jobs))
        if share.pixels is not None:
            left = share.pixels - used.pixels
            found.append(_limit(PIXELS, share.pixels, _PIXELS, left, seconds=used.day_left))
        if share.bytes is not None:
            found.append(_limit(STORAGE, share.bytes, _BYTES, share.bytes - used.bytes))
        return found


def _limit(policy: str, quota: int, unit: str, left: int, *, seconds: int | None = None) -> Limit:
    return Limit(
        policy=policy,
        quota=quota,
        unit=unit,
        left=max(0, left),
        window=None if seconds is None else _DAY,
        seconds=seconds,
    )


def headers(limits: Sequence[Limit], *, status: int, violated: str | None) -> dict[str, str]:
    """The `RateLimit` headers of a response.

    Args:
        limits: the caller's quotas.
        status: status of the response.
        violated: name of the quota that the request exceeded; None if it exceeded none.
    """
    if not limits:
        return {}
    found = {"RateLimit-Policy": ", ".join(map(_policy, limits))}
    # `Retry-After` must not be before the end of a window that the same response states, so a
    # rejection states only the quota that caused it.
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
    """Number of pixels, points or series for which a plan counts in the quota of a day."""
    request = plan.request
    if not isinstance(request, RasterRequest):
        return len(request.series)
    return plan.pixels if request.points is None else len(request.points)
