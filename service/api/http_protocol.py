"""HTTP connections: bounded heads, bounded time to send one and to read, bounded connections.

    accept → room for a connection? → head, in time and within its size? → application → sent, read
                  │                          │                                             │
        an idle one is closed        408, 414, 431 or 400                     unread: closed at once

uvicorn parses HTTP with httptools, which bounds nothing: a head of 300 MB took 1.2 GB of memory,
and half a head kept its socket for ever. This protocol counts the bytes of a head as they come. It
subclasses uvicorn's (tested with 0.54.0), whose other parser, h11, has bounds built in but
takes 1.6 to 2.8 times the processor time per megabyte uploaded
(`docs/decisions/request-heads.md`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import resource
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.middleware import ABORT, SLOWEST_BYTES, STALL_SECONDS
from service.api.problems import PROBLEM, problem_document
from service.errors import (
    STATUS,
    HeaderTooLarge,
    HeadStalled,
    MalformedRequest,
    Overloaded,
    PIMCError,
    UriTooLong,
)
from service.settings import Settings

_LOG = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 2**10
"""Of a request's line and headers together."""
MAX_TARGET_BYTES = 8 * 2**10
"""Of a request's target: path and query."""
_RESERVED_DESCRIPTORS = 256
"""At least so many are kept for files of runs and jobs, the database, health and the log."""
_RESERVED_SHARE = 7 / 16
"""At least this share: five runs may keep a sixteenth each open (`service/read/reader.py`)."""
_FEWEST_CONNECTIONS = 16
_LOOK_SECONDS = 5.0
"""How often it is looked for connections whose clients do not read."""
_REASONS = {400: "Bad Request", 408: "Request Timeout", 414: "URI Too Long",
            431: "Request Header Fields Too Large", 503: "Service Unavailable"}  # fmt: skip


class Connections:
    """The open connections of a service: bounded in all and for each address.

    At the bound, the connection that has waited longest without a request makes room; only if each
    has a request under way is the new one rejected. On one event loop.

    Args:
        most: open connections.
        most_per_address: open connections of one client address.
        send_seconds: how long a client may read nothing of what it was sent.
        changed: called with the number of open connections.
        given_up: called with a reason for each connection closed or rejected by a bound.
    """

    def __init__(
        self,
        *,
        most: int,
        most_per_address: int,
        send_seconds: float = STALL_SECONDS,
        changed: Callable[[int], None] = lambda _: None,
        given_up: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._most = most
        self._most_per_address = most_per_address
        self._send_seconds = send_seconds
        self._look_seconds = min(_LOOK_SECONDS, send_seconds / 4)
        self._looking: asyncio.TimerHandle | None = None
        self._changed = changed
        self.given_up = given_up
        self._open: dict[BoundedProtocol, str] = {}
        self._idle: dict[BoundedProtocol, None] = {}  # in the order in which they became idle

    def enter(self, connection: BoundedProtocol, address: str) -> bool:
        """Count a new connection, which is idle.

        Returns:
            Whether there is room for it.
        """
        of_address = [one for one, its in self._open.items() if its == address]
        if len(of_address) >= self._most_per_address and not self._make_room(set(of_address)):
            return False
        if len(self._open) >= self._most and not self._make_room(set(self._open)):
            return False
        self._open[connection] = address
        self._idle[connection] = None
        self._changed(len(self._open))
        if self._looking is None:
            self._look_later()
        return True

    def _look_later(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(self._look_seconds, self._look)

    def _look(self) -> None:
        """Close the connections whose clients have not read for too long."""
        for connection in list(self._open):
            if connection.is_unread(self._send_seconds):
                self.given_up("unread")
                connection.abort()
        self._looking = None
        if self._open:
            self._look_later()

    def _make_room(self, among: set[BoundedProtocol]) -> bool:
        oldest = next((one for one in self._idle if one in among), None)
        if oldest is None:
            return False
        self.leave(oldest)
        self.given_up("idle")
        oldest.close()
        return True

    def busy(self, connection: BoundedProtocol) -> None:
        """A connection's request begins."""
        self._idle.pop(connection, None)

    def idle(self, connection: BoundedProtocol) -> None:
        """A connection waits for its next request."""
        if connection in self._open:
            self._idle[connection] = None

    def leave(self, connection: BoundedProtocol) -> None:
        """A connection is closed."""
        self._idle.pop(connection, None)
        if self._open.pop(connection, None) is not None:
            self._changed(len(self._open))


@dataclass(frozen=True, kw_only=True)
class ProtocolFactory:
    """Makes a protocol for each connection, as uvicorn's `http` option."""

    connections: Connections
    head_seconds: float
    """How long a request's head may take to come."""

    def __call__(self, *arguments: Any, **options: Any) -> BoundedProtocol:  # noqa: ANN401 - uvicorn's
        """A protocol for a new connection."""
        return BoundedProtocol(
            *arguments, connections=self.connections, head_seconds=self.head_seconds, **options
        )


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with bounds on heads, their time, and connections."""

    def __init__(
        self,
        *arguments: Any,  # noqa: ANN401 - uvicorn's
        connections: Connections,
        head_seconds: float,
        **options: Any,  # noqa: ANN401 - uvicorn's
    ) -> None:
        super().__init__(*arguments, **options)
        self._book = connections
        self._head_seconds = head_seconds
        self._head_timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._heads = 0  # that have ended
        self._came = 0  # bytes of a head that has not ended
        self._parsed = 0  # bytes of the target and the headers parsed so far
        self._read_by: float | None = None  # when what was sent must have been read
        self._fault: PIMCError | None = None
        self._repeating = False  # a head is parsed whose request has begun already

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection if there is room."""
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        if self._book.enter(self, address):
            self._await_head()
            return
        self._book.given_up("full")
        self._reject(
            Overloaded(
                "server at capacity: too many connections have requests under way; retry after 5 s"
            )
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._stop_timer()
        self._book.leave(self)
        super().connection_lost(exc)

    def close(self) -> None:
        """Close a connection that waits for a request."""
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.close()

    def abort(self) -> None:
        """Close at once: what was not read yet is dropped."""
        self._stop_timer()
        self.transport.abort()

    def resume_writing(self) -> None:
        """The client has read most of what it was sent."""
        self._read_by = None
        super().resume_writing()

    def is_unread(self, seconds: float) -> bool:
        """Whether the client has had its time to read what it was sent, and has not.

        uvicorn waits for ever: for a client that reads nothing, and for the last bytes before it
        closes.

        Args:
            seconds: for which a client may read nothing.
        """
        if not (self.flow.write_paused or self.transport.is_closing()):
            self._read_by = None
            return False
        now = self.loop.time()
        if self._read_by is None:
            unread = self.transport.get_write_buffer_size()
            self._read_by = now + seconds + unread / SLOWEST_BYTES
        return now > self._read_by

    def data_received(self, data: bytes) -> None:
        """Parse what came; reject a head that is too long."""
        if self._fault is not None:
            return
        waited, heads = self._in_head, self._heads
        if waited and self._head_timer is None:
            self._await_head()
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._in_head and self._fault is None and not self.transport.is_closing():
            # A request within these bytes cannot be separated from the body before it, so it is not
            # counted: a head is bounded by this and what one read brings (256 KiB).
            self._came = self._came + len(data) if waited and heads == self._heads else 0
            if self._came > MAX_HEAD_BYTES:
                self._reject(_too_large(self._came))

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """Ignore an upgrade to a protocol that is not spoken (RFC 9110, 7.8), and read the body.

        Java's HttpClient and `curl --http2` offer `h2c` with every request. At an upgrade the
        parser stops and takes the body for another protocol, so a new one is told, by a head of the
        same length without callbacks, what is to come.
        """
        length = [
            name + b": " + value
            for name, value in self.headers
            if name in {b"content-length", b"transfer-encoding"}
        ]
        self.parser = httptools.HttpRequestParser(self)
        self._repeating = True
        self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *length, b"", b""]))
        if rest:
            self.parser.feed_data(rest)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._head_seconds, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing() or not self._in_head:
            return
        self._book.given_up("late_head")
        if self._came == 0:
            self.close()
            return
        self._reject(
            HeadStalled(
                f"the request's headers did not come within {self._head_seconds:g} s; "
                f"{self._came} bytes came"
            )
        )

    # The parser's callbacks ------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A head begins."""
        if self._repeating:
            return
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: {"call": self._abort_unread}}
        self._parsed = 0

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        if self._repeating:
            return
        super().on_url(url)
        self._parsed += len(url)
        if self._parsed > MAX_TARGET_BYTES:
            self._fault = UriTooLong(
                f"the request's path and query take more than {MAX_TARGET_BYTES} bytes; parameters "
                "belong in the body"
            )
            raise self._fault

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        if self._repeating:
            return
        super().on_header(name, value)
        self._parsed += len(name) + len(value)
        if self._parsed > MAX_HEAD_BYTES:
            self._fault = _too_large(self._parsed)
            raise self._fault

    def on_headers_complete(self) -> None:
        """A head ended: its request begins."""
        if self._repeating:
            self._repeating = False
            return
        self._in_head = False
        self._heads += 1
        self._came = 0
        self._stop_timer()
        self._book.busy(self)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A body ended: what comes next is a head."""
        if self.parser.should_upgrade():  # the body is yet to come
            return
        super().on_message_complete()
        self._in_head = True

    def on_response_complete(self) -> None:
        """A response was sent."""
        super().on_response_complete()
        if self._in_head and not self.pipeline:
            self._book.idle(self)

    def _abort_unread(self) -> None:
        self._book.given_up("unread")
        self.abort()

    # Rejections ------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Reject what is not HTTP, or what a callback found at fault."""
        del msg
        self._reject(self._fault or MalformedRequest("the request is not valid HTTP/1.1"))

    def _reject(self, fault: PIMCError) -> None:
        """Send a problem and close the connection."""
        self._fault = fault
        self._stop_timer()
        self._book.given_up(fault.code)
        request_id = uuid.uuid4().hex
        status = STATUS[fault.code]
        body = json.dumps(problem_document(fault, request_id)).encode()
        _LOG.info(
            "request rejected",
            extra={"code": fault.code, "status": status, "client": self.client and self.client[0]},
        )
        lines = [
            f"HTTP/1.1 {status} {_REASONS[status]}",
            f"Content-Type: {PROBLEM}",
            f"Content-Length: {len(body)}",
            f"X-Request-ID: {request_id}",
            "X-Content-Type-Options: nosniff",
            "Cache-Control: no-store",
            "Connection: close",
        ]
        if isinstance(fault, Overloaded):
            lines.append(f"Retry-After: {fault.retry_after}")
        if not self.transport.is_closing():
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
            self.transport.close()


def _too_large(size: int) -> HeaderTooLarge:
    return HeaderTooLarge(
        f"the request's headers take {size} bytes or more, the limit is {MAX_HEAD_BYTES}"
    )


def bounded_connections(most: int) -> int:
    """Raise the limit of open files as far as the system allows, and fit the connections to it.

    Args:
        most: largest number of connections.

    Returns:
        Connections that leave enough descriptors for files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = most + 4 * _RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        soft = limit
    if soft == resource.RLIM_INFINITY:
        return most
    reserved = max(_RESERVED_DESCRIPTORS, math.ceil(_RESERVED_SHARE * soft))
    fitting = max(_FEWEST_CONNECTIONS, min(most, soft - reserved))
    if fitting < most:
        _LOG.warning(
            "PIMC_MAX_CONNECTIONS is %d, but at most %d files may be open: %d connections are "
            "accepted; raise the limit (ulimit -n, LimitNOFILE)", most, soft, fitting,
        )  # fmt: skip
    return fitting


def server_config(app: FastAPI, settings: Settings, **options: Any) -> uvicorn.Config:  # noqa: ANN401 - uvicorn's
    """Uvicorn's configuration with bounded connections.

    Args:
        app: made by `create_app`.
        settings: the service's.
        options: further options of uvicorn, which win.
    """
    metrics = app.state.metrics
    connections = Connections(
        most=bounded_connections(settings.max_connections),
        most_per_address=settings.max_connections_per_address,
        send_seconds=settings.send_seconds,
        changed=metrics.connections,
        given_up=metrics.connection_given_up,
    )
    factory: Any = ProtocolFactory(connections=connections, head_seconds=settings.head_seconds)
    return uvicorn.Config(
        app,
        **{
            "host": settings.host,
            "port": settings.port,
            "http": factory,
            "ws": "none",
            "access_log": False,  # each request has its own line, with its id
            "server_header": False,
            "proxy_headers": False,  # the application has its own, with PIMC_TRUSTED_PROXIES
            **options,
        },
    )
