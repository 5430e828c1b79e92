"""ASGI middleware: request records, HEAD, security headers, slow clients, lingering close."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import share_of
from service.api.quotas import Limit, Rate, headers
from service.api.sending import HEAD_ONLY
from service.settings import SettingsError
from service.telemetry import REQUEST_ID, TRACE_ID, Metrics
from service.tracing import Traces, describe_request

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_LOG = logging.getLogger(__name__)

_LONGEST_PATH = 256
_PROBES = ("/health/live", "/health/ready", "/metrics")
"""Paths that are requested every few seconds, and not traced."""
_STAGE = re.compile(r"([a-z]+);dur=([0-9.]+)")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")

# Request ids that a client may choose; the service writes them to headers and logs.
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RequestRecordMiddleware:
    """ASGI middleware: an id and an access record per request, a problem for unexpected errors.

    Args:
        app: the inner application.
        metrics: metrics that count the requests.
        on_fault: makes the response to an unexpected error.
        traces: traces of the requests; None makes none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        on_fault: Callable[[Request], Response],
        traces: Traces | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._traces = traces
        self._on_fault = on_fault

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application and record the response."""
        if scope["type"] != "http":
            await self._app(scope, receive, _without_trace(send))
            return
        headers = Headers(scope=scope)
        request_id = sane_request_id(headers.get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        access = _Access(begun=time.perf_counter())
        traced: AbstractContextManager[Span | None] = nullcontext()
        if self._traces is not None and not scope["path"].endswith(_PROBES):
            traced = self._traces.request(headers, scope["method"])

        def record() -> None:
            if not access.recorded:
                access.recorded = True
                self._record(scope, access)

        async def receive_counted() -> Message:
            message = await receive()
            access.bytes_in += len(message.get("body", b""))
            return message

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                access.status = message["status"]
                access.headers = Headers(raw=message["headers"])
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
                await send(message)
                return
            last = not message.get("more_body", False)
            access.bytes_out += len(message.get("body", b""))
            access.complete = last
            if last:
                record()  # first: a client that has the whole response finds it in the metrics
            await send(message)

        with traced as access.span:
            trace = TRACE_ID.get() if access.span else trace_id(headers.get("traceparent"))
            ids = REQUEST_ID.set(request_id), TRACE_ID.set(trace)
            try:
                with self._metrics.request():
                    await self._app(scope, receive_counted, send_named)
            except Exception:
                _LOG.exception("unexpected error")
                if access.status:  # the response has begun: the server must abort the connection
                    raise
                await self._on_fault(Request(scope))(scope, receive, send_named)
            finally:
                record()
                REQUEST_ID.reset(ids[0])
                TRACE_ID.reset(ids[1])

    def _record(self, scope: Scope, access: _Access) -> None:
        seconds = time.perf_counter() - access.begun
        route = getattr(scope.get("route"), "path", "unmatched")
        state, client = scope["state"], scope.get("client")
        model = access.headers.get("pimc-model") if scope["method"] == "POST" else None
        self._metrics.request_completed(
            route=route,
            method=scope["method"],
            status=access.status,
            seconds=seconds,
            code=state.get("code"),
            model=model,
            bytes_in=access.bytes_in,
            bytes_out=access.bytes_out,
            key=state.get("caller"),
        )
        record: dict[str, object] = {
            "request_id": state["request_id"],
            "client": client[0] if client else None,
            "key": state.get("caller"),
            "agent": Headers(scope=scope).get("user-agent", "")[:_LONGEST_PATH] or None,
            "method": scope["method"],
            "route": route,
            "path": scope["path"][:_LONGEST_PATH],
            "status": access.status,
            "code": state.get("code"),
            "bytes_in": access.bytes_in,
            "bytes_out": access.bytes_out,
            "ms": round(seconds * 1000, 1),
            "stages": stage_times(access.headers.get("server-timing")),
            "model": model,
            "complete": access.complete,
        }
        fields = {name: value for name, value in record.items() if value is not None}
        _LOG.info("request", extra=fields)
        if access.span is not None:
            describe_request(
                access.span,
                method=scope["method"],
                route=route,
                path=scope["path"][:_LONGEST_PATH],
                status=access.status,
                code=state.get("code"),
                request_id=state["request_id"],
                model=model,
            )


@dataclass
class _Access:
    """The access record of a request in progress."""

    begun: float
    """Time of the request's begin, by `time.perf_counter`."""
    status: int = 0
    """Status of the response; 0 until it begins."""
    headers: Headers = field(default_factory=lambda: Headers(raw=[]))
    """Headers of the response."""
    bytes_in: int = 0
    """Bytes of the request's body so far."""
    bytes_out: int = 0
    """Bytes of the response's body so far."""
    complete: bool = False
    """Whether the response was sent to its end."""
    recorded: bool = False
    """Whether the record was written to the log."""
    span: Span | None = None
    """The request's span; None if it is not traced."""


def stage_times(header: str | None) -> dict[str, float] | None:
    """Milliseconds by stage from a `Server-Timing` header; None without one."""
    return {name: float(ms) for name, ms in _STAGE.findall(header)} if header else None


def trace_id(header: str | None) -> str | None:
    """The trace id of a `traceparent` header (W3C Trace Context); None without a valid one."""
    found = _TRACEPARENT.fullmatch(header or "")
    return found[1] if found and int(found[1], 16) else None


class RootPathMiddleware:
    """ASGI middleware: the path under which a proxy serves the application.

    The application accepts paths with and without the prefix: a proxy may leave it in the path or
    remove it, and a health check on the same machine sends none.

    Args:
        app: the inner application.
        root_path: the prefix, such as `/pimc`.
    """

    def __init__(self, app: ASGIApp, *, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application with `root_path` and a path that begins with it, as in ASGI."""
        if scope["type"] == "http":
            root, path = self._root_path, scope["path"]
            if path != root and not path.startswith(f"{root}/"):
                path = root + path
            scope = {**scope, "root_path": root, "path": path}
        await self._app(scope, receive, send)


class HeadMiddleware:
    """ASGI middleware: the response to HEAD is that to GET without the body (RFC 9110, 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application with the method GET and leave out the body."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        ended = False

        async def send_head(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                await send(message)
            elif not ended:
                ended = True
                await send({"type": "http.response.body", "body": b""})

        # The application receives a copy. Its additions to the copy, such as the route, are copied
        # back, because RequestRecordMiddleware reads it from the original.
        get = {**scope, "method": "GET", HEAD_ONLY: True}
        try:
            await self._app(get, receive, send_head)
        finally:
            scope.update({key: value for key, value in get.items() if key not in scope})


def _without_trace(send: Send) -> Send:
    """Replace the stack trace of a failed start by the message if a setting is the cause."""

    async def send_short(message: Message) -> None:
        error = sys.exception()  # Starlette calls `send` from its exception handler
        if message["type"] == "lifespan.startup.failed" and isinstance(error, SettingsError):
            message = {**message, "message": str(error)}
        await send(message)

    return send_short


def sane_request_id(given: str | None) -> str:
    """The client's request id if it is valid; otherwise a new one."""
    return given if given and _SANE_ID.fullmatch(given) else uuid.uuid4().hex


# Policy of every response that is not a page: it may not load, run or frame anything.
_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# Defaults that a route may override.
_DEFAULTS: Mapping[str, str] = {
    "Content-Security-Policy": _NOTHING,
    # A response may hold one caller's data, so that no cache may keep it.
    "Cache-Control": "no-store",
}


def page_policy(html: str, *, styles: str = "", images: str = "'self' data:") -> str:
    """The Content-Security-Policy of a page: scripts and styles of this server, and some sources.

    Args:
        html: the page; its inline scripts and styles are allowed by the hash of their text.
        styles: source of styles to allow instead of the inline styles.
        images: sources of images.
    """
    scripts = _hashes(html, "script")
    sheets = [styles, *([] if styles else _hashes(html, "style"))]
    rules = {
        "default-src": ["'none'"],
        "script-src": ["'self'", *scripts],
        "style-src": ["'self'", *sheets],
        "img-src": [images],
        "font-src": ["'self'"],
        "connect-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
    return "; ".join(" ".join([rule, *filter(None, sources)]) for rule, sources in rules.items())


def _hashes(html: str, tag: str) -> list[str]:
    """Policy sources with the hashes of a page's inline scripts or styles."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in found)
    return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]


class SecurityHeadersMiddleware:
    """ASGI middleware: headers against MIME sniffing, referrer leaks and framing.

    Args:
        app: the inner application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application and add the headers to its response."""

        async def send_protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                for name, value in _DEFAULTS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_protected)


class RateLimitMiddleware:
    """ASGI middleware: states a caller's quotas in `RateLimit` headers, and counts rejections.

    A route that is subject to quotas sets `request.state.limits`.

    Args:
        app: the inner application.
        exceeded: called with the name of each quota that a request exceeded.
    """

    def __init__(self, app: ASGIApp, *, exceeded: Callable[[str], None]) -> None:
        self._app = app
        self._exceeded = exceeded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application and add the headers to its response."""

        async def send_limited(message: Message) -> None:
            state = scope.get("state", {})
            if message["type"] == "http.response.start" and "limits" in state:
                limits: Callable[[], Awaitable[Sequence[Limit]]] = state["limits"]
                violated = state.get("violated")
                if violated is not None:
                    self._exceeded(violated)
                MutableHeaders(scope=message).update(
                    headers(await limits(), status=message["status"], violated=violated)
                )
            await send(message)

        await self._app(scope, receive, send_limited)


ABORT = "pimc.abort"
"""ASGI extension: `call` closes the connection at once and discards bytes not yet sent."""
STALL_SECONDS = 60.0
"""Seconds for which a client may read nothing of a response."""
SLOWEST_BYTES = 16 * 2**10
"""Bytes per second that a client must read on average, after the first `STALL_SECONDS`."""


class SlowClientMiddleware:
    """ASGI middleware: ends a response whose client reads nothing, or too slowly.

    Without it, a client that never reads keeps the files of its response as long as the socket
    stays open, and many such clients fill the disk. `BoundedProtocol` aborts the connection;
    another server closes it because the response is incomplete.

    Args:
        app: the inner application.
        stall_seconds: seconds for which a client may read nothing.
        slowest: bytes per second that a client must read on average, after `stall_seconds`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        stall_seconds: float = STALL_SECONDS,
        slowest: float = SLOWEST_BYTES,
    ) -> None:
        self._app = app
        self._stall_seconds = stall_seconds
        self._slowest = slowest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application and check how fast the client reads its response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun: float | None = None
        sent = 0
        # The scope is cancelled from inside, so that the application closes what it has opened for
        # the response; the server then finds the response incomplete and closes the connection.
        responding = anyio.CancelScope()

        async def send_in_time(message: Message) -> None:
            nonlocal begun, sent
            begun = begun or time.monotonic()
            left = begun + self._stall_seconds + sent / self._slowest - time.monotonic()
            with anyio.move_on_after(min(left, self._stall_seconds)) as sending:
                await send(message)
                sent += len(message.get("body", b""))
            if sending.cancelled_caught:
                if ABORT in scope.get("extensions", {}):
                    scope["extensions"][ABORT]["call"]()
                responding.cancel()
                await anyio.lowlevel.checkpoint()

        with responding:
            await self._app(scope, receive, send_in_time)
        if responding.cancelled_caught and ABORT in scope.get("extensions", {}):
            # Wait until the server has closed the connection: before that, it would log an
            # incomplete response as an error.
            with anyio.move_on_after(1):
                while (await receive())["type"] != "http.disconnect":
                    pass


_SHORT_REST = 2**20
"""Largest unread rest of a body that is read before an early response is sent, bytes."""
_EARLY_RATE = 2**25
"""Bytes per second of a caller's bodies whose responses may be sent before they arrive. One MiB of
them takes about 2 ms of the event loop: a few clients that repeat a rejected upload without a pause
would otherwise keep it busy."""
_EARLY_BURST = 2**27
"""Bytes of such bodies whose responses are not delayed."""
_EARLY_LEAST = 2**16
"""Bytes as which a shorter body counts, as its response takes time too."""
_EARLY_SECONDS = 3.0
"""Longest delay of such a response."""
_MOST_CALLERS = 4096


class LingeringCloseMiddleware:
    """ASGI middleware: a response sent before the end of the request's body reaches the client.

    A server that closes a connection with unread bytes resets it, and the reset may overtake the
    response. So a short rest of the body is read before the response, and the connection stays
    open. A long rest is read after the response for a limited time, and then the connection is
    closed. Responses to a caller that sends many such bodies are delayed.
    """

    def __init__(
        self, app: ASGIApp, *, seconds: float = 5.0, size: int = 2**26, before_seconds: float = 0.1
    ) -> None:
        """Set the limits.

        Args:
            app: the inner application.
            seconds: longest time for which the rest of a body is read after a response.
            size: largest number of bytes that are read after a response.
            before_seconds: longest time for which a response waits for a short rest of the body.
        """
        self._app = app
        self._seconds = seconds
        self._size = size
        self._before_seconds = before_seconds
        # Rate of such bodies by caller or address, the most recent one last.
        self._rates: OrderedDict[str, Rate] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application; read the rest of the body if the application did not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body = _Rest(receive, headers)
        closing = False

        async def send_lingering(message: Message) -> None:
            nonlocal closing
            if message["type"] == "http.response.start":
                if not body.ended:
                    caller = share_of(scope.get("state", {}).get("caller"), scope)
                    await anyio.sleep(self._delay(caller, headers.get("content-length", "")))
                await body.read_on(_SHORT_REST, self._before_seconds)
                closing = not body.ended
                if closing:
                    MutableHeaders(scope=message)["Connection"] = "close"
            if closing and message["type"] == "http.response.body" and not message.get("more_body"):
                await send({**message, "more_body": True})
                await body.read_on(self._size, self._seconds)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self._app(scope, body.receive, send_lingering)

    def _delay(self, caller: str, length: str) -> float:
        """Count a body whose response is sent before the body has arrived.

        Args:
            caller: the caller's id, or the client's address without API keys.
            length: the request's `Content-Length`; empty if it has none.

        Returns:
            Seconds to wait before the response.
        """
        size = int(length) if length.isdecimal() else self._size
        rate = self._rates.pop(caller, None) or Rate(_EARLY_BURST / _EARLY_RATE)
        self._rates[caller] = rate
        if len(self._rates) > _MOST_CALLERS:
            self._rates.popitem(last=False)
        cost = min(max(size, _EARLY_LEAST), self._size) / _EARLY_RATE
        return min(rate.wait(cost, anyio.current_time()), _EARLY_SECONDS)


class _Rest:
    """The part of a request's body that the server has not read yet."""

    def __init__(self, receive: Receive, headers: Headers) -> None:
        self._receive = receive
        self.ended = headers.get("content-length", "0") == "0" and (
            "transfer-encoding" not in headers
        )

    async def receive(self) -> Message:
        """Receive the next message for the application."""
        message = await self._receive()
        if not message.get("more_body"):  # the last part of the body, or a disconnect
            self.ended = True
        return message

    async def read_on(self, size: int, seconds: float) -> None:
        """Read and discard the rest of the body, at most `size` bytes within `seconds`."""
        with anyio.move_on_after(seconds):
            while size > 0 and not self.ended:
                size -= len((await self.receive()).get("body", b""))
