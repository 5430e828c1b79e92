"""Retry policy: which responses are retried, and after how long; the transports send and wait."""

from __future__ import annotations

from dataclasses import dataclass

RETRIED = frozenset({429, 503})
"""Statuses that are retried: with `too_many_requests`, `overloaded` or `not_ready` the server
started nothing. A 502 by a gateway, without a problem document, is retried as well."""


def seconds_to_wait(retry_after: str | None) -> float | None:
    """Read a `Retry-After` header: seconds or an HTTP date; None if it is missing or neither."""
    if not retry_after:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    # Imported here: a date in Retry-After is rare, and these imports are slow.
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    try:
        moment = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often a request is sent again, and the pauses in between."""

    retries: int = 3
    """Tries after the first one; 0 never retries."""
    first_pause: float = 0.5
    """Upper bound of the first pause, in seconds; it doubles with each try."""
    longest_pause: float = 60.0
    """The longest pause in seconds. If the server's `Retry-After` is longer, the error is raised at
    once, because an earlier retry would fail."""

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, not {self.retries}")

    def pause(self, tries: int, retry_after: float | None = None) -> float | None:
        """Seconds to wait before the next try.

        Args:
            tries: number of times that the request was sent, at least 1.
            retry_after: seconds of the server's `Retry-After`, None without one.

        Returns:
            The pause, with jitter so that clients that were rejected at the same time do not all
            retry at the same time; None if there is no next try.
        """
        if tries > self.retries:
            return None
        import random  # slow to import, and most requests are not retried

        backoff = min(self.longest_pause, self.first_pause * 2.0 ** (tries - 1))
        jitter = random.uniform(0.5, 1.0)  # noqa: S311 (spreads load; no secret depends on it)
        if retry_after is None:
            return backoff * jitter
        if retry_after > self.longest_pause:
            return None
        return min(self.longest_pause, retry_after + self.first_pause * jitter)
