"""Callbacks: signed requests to a job's subscriber URLs, retried until they are accepted.

    outbox → due → sign → check host and addresses → POST ─┬─ 2xx ─▶ delivered
                                                           ├─ else ─▶ retried, for up to two days
                                                           └─ 410, or last attempt ─▶ given up

Signed as Standard Webhooks 1.0 describes (https://www.standardwebhooks.com): `webhook-id`,
`webhook-timestamp`, and in `webhook-signature` an HMAC-SHA256 of id, timestamp and body.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal

import anyio

from service.errors import ForbiddenReference, PIMCError
from service.jobs.job import Job
from service.jobs.outbox import Callback, Event, Outbox
from service.read.connect import Connections, Patience, Remote, Resolver, resolve
from service.run.request import Subscriber
from service.settings import Settings
from service.telemetry import Metrics

_LOG = logging.getLogger(__name__)
SECRET_PREFIX = "whsec_"  # noqa: S105 - public
"""Prefix of a secret in the form that Standard Webhooks libraries accept."""
PAUSES = (5.0, 60.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 57600.0)
"""Seconds from each failed attempt to the next; after the last one the callback is given up."""
_JITTER = 0.1
"""Largest random lengthening of a pause, as a share of it: spreads the retries of callbacks that
failed together."""
_AT_ONCE = 16
_RESPONSE_SECONDS = 15.0
"""Seconds in which a receiver must accept a callback."""
_LONGEST_WAIT = 5.0
"""Longest time between two reads of the outbox, in seconds, without a notification."""
_POLL_SECONDS = 0.1
"""Seconds between two checks, during a delivery, whether the service stops."""
FIELDS: Mapping[Event, str] = {
    "success": "successUri",
    "failed": "failedUri",
    "progress": "inProgressUri",
}
"""The parameter of each event's address, as OGC API - Processes names it."""
Document = Callable[[Job, Event], Mapping[str, Any]]
"""Makes the body of a callback, JSON."""


def check_subscriber(subscriber: Subscriber, settings: Settings) -> None:
    """Check that the hosts of a job's subscriber URLs are allowed.

    Host names are checked here; each delivery checks the name again, and its addresses.

    Raises:
        ForbiddenReference: a subscriber URL is not on an allowed host.
    """
    if not settings.callback_hosts:
        raise ForbiddenReference(
            "'subscriber' is not allowed, because this server sends no callbacks: leave it out, or "
            "have the server's administrator set PIMC_CALLBACK_HOSTS"
        )
    for event, name in FIELDS.items():
        url = subscriber.url(event)
        if url is not None:
            Remote.of(url, f"subscriber.{name}", settings.callback_hosts)


def caller_secret(secret: bytes, owner: str) -> bytes:
    """The secret that signs the callbacks of one caller.

    Each caller has its own, so that no caller can forge callbacks to another.

    Args:
        secret: the server's.
        owner: the caller; empty if no keys are set.
    """
    return hmac.digest(secret, b"pimc-callbacks:" + owner.encode(), hashlib.sha256)


def secret_text(secret: bytes) -> str:
    """A secret in the form that Standard Webhooks libraries accept."""
    return SECRET_PREFIX + base64.b64encode(secret).decode()


def signed(body: bytes, *, message: str, seconds: int, secrets: Sequence[bytes]) -> dict[str, str]:
    """The headers that identify a message and prove its origin.

    Args:
        body: of the request.
        message: its id, the same in every attempt.
        seconds: time of the attempt, since 1970.
        secrets: several while a secret is replaced: a signature of each is sent.
    """
    content = f"{message}.{seconds}.".encode() + body
    signatures = (
        base64.b64encode(hmac.digest(secret, content, hashlib.sha256)).decode()
        for secret in secrets
    )
    return {
        "webhook-id": message,
        "webhook-timestamp": str(seconds),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


class CallbackSender:
    """Sends the callbacks of the outbox, in its own thread.

    Args:
        outbox: the callbacks to send.
        settings: allowed hosts and the secret.
        document: makes the body of a callback.
        metrics: counts attempts.
        closing: set when the service stops.
        clock: seconds since 1970.
        pauses: seconds after each failed attempt.
        jitter: a number from 0 to 1, at random.
        resolver: resolves host names.
        tls: trusted certificates; None uses httpx's own.
    """

    def __init__(
        self,
        outbox: Outbox,
        settings: Settings,
        *,
        document: Document,
        metrics: Metrics,
        closing: threading.Event,
        clock: Callable[[], float] = time.time,
        pauses: Sequence[float] = PAUSES,
        jitter: Callable[[], float] = random.random,
        resolver: Resolver = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._outbox = outbox
        self._settings = settings
        self._document = document
        self._metrics = metrics
        self._closing = closing
        self._clock = clock
        self._pauses = pauses
        self._jitter = jitter
        self._resolver = resolver
        self._tls = tls
        self._changed = threading.Event()

    def notify(self) -> None:
        """Wake the sender: a job has changed, or the service stops."""
        self._changed.set()

    def run(self) -> None:
        """Send what is due until the service stops."""
        while not self._closing.is_set():
            self._changed.clear()
            if self.send_due() == 0:
                self._changed.wait(self._pause())

    def _pause(self) -> float:
        """Seconds until there may be something to send."""
        due = self._outbox.next_due()
        wait = _LONGEST_WAIT if due is None else due - self._clock()
        return min(max(wait, 0.0), _LONGEST_WAIT)

    def send_due(self) -> int:
        """Send the callbacks that are due, several at once.

        Returns:
            Their number.
        """
        due = self._outbox.due(self._clock(), _AT_ONCE)
        if due:
            anyio.run(self._send_all, due)
        self._metrics.callbacks_waiting(self._outbox.count())
        return len(due)

    async def _send_all(self, callbacks: Sequence[Callback]) -> None:
        async with (
            Connections(
                self._settings,
                rules=self._settings.callback_hosts,
                patience=Patience(idle_seconds=_RESPONSE_SECONDS),
                resolver=self._resolver,
                tls=self._tls,
            ) as web,
            anyio.create_task_group() as group,
        ):
            async with anyio.create_task_group() as sending:
                group.start_soon(self._cancel_when_closing, sending.cancel_scope)
                for callback in callbacks:
                    sending.start_soon(self._send, web, callback)
            group.cancel_scope.cancel()

    async def _cancel_when_closing(self, scope: anyio.CancelScope) -> None:
        """Cancel deliveries when the service stops; the next start sends them again."""
        while not self._closing.is_set():
            await anyio.sleep(_POLL_SECONDS)
        scope.cancel()

    async def _send(self, web: Connections, callback: Callback) -> None:
        status, reason = None, f"no response within {_RESPONSE_SECONDS:g} s"
        with anyio.move_on_after(_RESPONSE_SECONDS):
            try:
                status = await self._post(web, callback)
                reason = f"status {status}"
            except PIMCError as error:
                reason = error.detail
        # No await from here on, so that a stop does not separate an attempt from its record.
        if status is not None and HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            self._outbox.delivered(callback)
            self._record(callback, "delivered", reason)
        elif status == HTTPStatus.GONE or callback.attempts >= len(self._pauses):
            self._outbox.failed(callback, until=None)
            self._record(callback, "given_up", reason)
        else:
            pause = self._pauses[callback.attempts] * (1 + _JITTER * self._jitter())
            self._outbox.failed(callback, until=self._clock() + pause)
            self._record(callback, "failed", reason)

    async def _post(self, web: Connections, callback: Callback) -> int:
        """Status of one attempt.

        Raises:
            PIMCError: the address is no longer allowed, or does not respond.
        """
        job = callback.job
        if job.subscriber is None:
            raise TypeError("only a job with a subscriber has callbacks")
        url = job.subscriber.url(callback.event)
        remote = Remote.of(
            url or "", f"subscriber.{FIELDS[callback.event]}", self._settings.callback_hosts
        )
        body = json.dumps(self._document(job, callback.event), separators=(",", ":")).encode()
        secrets = [
            caller_secret(secret.get_secret_value(), job.owner)
            for secret in self._settings.callback_secrets
        ]
        headers = {
            "Content-Type": "application/json",
            **signed(body, message=callback.message, seconds=int(self._clock()), secrets=secrets),
        }
        async with web.response(
            remote, method="POST", headers=headers, content=body, redirects=False
        ) as response:
            return response.status_code

    def _record(
        self,
        callback: Callback,
        outcome: Literal["delivered", "failed", "given_up"],
        reason: str,
    ) -> None:
        self._metrics.callback(callback.event, outcome)
        _LOG.log(
            logging.INFO if outcome == "delivered" else logging.WARNING,
            "callback",
            extra={
                "job": callback.job.id,
                "event": callback.event,
                "outcome": outcome,
                "attempt": callback.attempts + 1,
                "reason": reason,
            },
        )
