"""HTTP connections: limits on the size of heads, on the time to send and read, on connections.

    accept → below the limits? → head, in time and within its size? → application → response read?
                  │                        │                                              │
       close an idle connection   408, 414, 431 or 400, delayed             not in time: abort
                                      if many are rejected

The *head* of a request is its line and headers. uvicorn parses HTTP with httptools, which has no
limits: it buffers a head of any size, and half a head keeps its socket open. This protocol counts
the bytes of a head as they arrive. It subclasses uvicorn's protocol (tested with 0.54.0).
`docs/decisions/request-heads.md` compares uvicorn's other parser, h11, which has limits built in.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import resource
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.auth import Delays, network_of
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
"""Largest size of a request's line and headers together."""
MAX_TARGET_BYTES = 8 * 2**10
"""Largest size of a request's target: path and query."""
_RESERVED_DESCRIPTORS = 256
"""Smallest number of descriptors reserved for files of runs and jobs, the database and the log."""
_RESERVED_SHARE = 7 / 16
"""Smallest reserved share of all descriptors: each of five runs may use a sixteenth
(`service/read/reader.py`)."""
_FEWEST_CONNECTIONS = 16
_LOOK_SECONDS = 5.0
"""Seconds between two searches for connections whose clients do not read."""
_REASONS = {400: "Bad Request", 408: "Request Timeout", 414: "URI Too Long",
            431: "Request Header Fields Too Large", 503: "Service Unavailable"}  # fmt: skip


class Connections:
    """The open connections of a service, limited in all and for each address.

    At the limit, the connection that has waited longest without a request is closed; if every
    connection has a request in flight, the new one is rejected. Used on one event loop.

    Args:
        most: largest number of open connections.
        most_per_address: largest number of open connections of one client address.
        send_seconds: seconds for which a client may read nothing of a response.
        changed: called with the number of open connections when it changes.
        given_up: called with the reason for each connection that is closed or rejected because of
            a limit.
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
        self._check_seconds = min(_LOOK_SECONDS, send_seconds / 4)
        self._next_check: asyncio.TimerHandle | None = None
        self._changed = changed
        self.given_up = given_up
        self.delays = Delays()
        """Delays of rejected heads."""
        self._open: dict[BoundedProtocol, str] = {}
        self._of_address: Counter[str] = Counter()
        self._idle: dict[BoundedProtocol, None] = {}  # in the order in which they became idle

    def enter(self, connection: BoundedProtocol, address: str) -> bool:
        """Count a new connection, which is idle.

        Args:
            connection: the new connection.
            address: address of its client.

        Returns:
            Whether the connection is accepted.
        """
        if self._of_address[address] >= self._most_per_address and not self._make_room(address):
            return False
        if len(self._open) >= self._most and not self._make_room():
            return False
        self._open[connection] = address
        self._of_address[address] += 1
        self._idle[connection] = None
        self._changed(len(self._open))
        if self._next_check is None:
            self._schedule_check()
        return True

    def _schedule_check(self) -> None:
        loop = asyncio.get_running_loop()
        self._next_check = loop.call_later(self._check_seconds, self._close_unread)

    def _close_unread(self) -> None:
        """Close the connections whose clients have not read for too long."""
        for connection in list(self._open):
            if connection.is_unread(self._send_seconds):
                self.given_up("unread")
                connection.abort()
        self._next_check = None
        if self._open:
            self._schedule_check()

    def _make_room(self, address: str | None = None) -> bool:
        """Close the connection that has been idle longest; False if none is idle.

        Args:
            address: whose connection is closed; None if that of any address may be closed.
        """
        of_these = (one for one in self._idle if address in {None, self._open[one]})
        oldest = next(of_these, None)
        if oldest is None:
            return False
        self.leave(oldest)
        self.given_up("idle")
        oldest.close()
        return True

    def busy(self, connection: BoundedProtocol) -> None:
        """Record that a connection's request begins."""
        self._idle.pop(connection, None)

    def idle(self, connection: BoundedProtocol) -> None:
        """Record that a connection waits for its next request."""
        if connection in self._open:
            self._idle[connection] = None

    def leave(self, connection: BoundedProtocol) -> None:
        """Record that a connection is closed."""
        self._idle.pop(connection, None)
        address = self._open.pop(connection, None)
        if address is not None:
            self._of_address[address] -= 1
            if not self._of_address[address]:
                del self._of_address[address]
            self._changed(len(self._open))


@dataclass(frozen=True, kw_only=True)
class ProtocolFactory:
    """Makes a protocol for each connection; the value of uvicorn's `http` option."""

    connections: Connections
    """The open connections of the service."""
    head_seconds: float
    """Seconds within which a request's head must arrive."""

    def __call__(self, *arguments: Any, **options: Any) -> BoundedProtocol:  # noqa: ANN401 - uvicorn's
        """Make the protocol of a new connection."""
        return BoundedProtocol(
            *arguments, connections=self.connections, head_seconds=self.head_seconds, **options
        )


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits on the size and time of heads, and on connections.

    Args:
        arguments: positional arguments of uvicorn's protocol.
        connections: the open connections of the service.
        head_seconds: seconds within which a request's head must arrive.
        options: named arguments of uvicorn's protocol.
    """

    def __init__(
        self,
        *arguments: Any,  # noqa: ANN401 - uvicorn's
        connections: Connections,
        head_seconds: float,
        **options: Any,  # noqa: ANN401 - uvicorn's
    ) -> None:
        super().__init__(*arguments, **options)
        self._connections = connections
        self._head_seconds = head_seconds
        self._head_timer: asyncio.TimerHandle | None = None  # also that of a delayed rejection
        self._in_head = True
        self._heads = 0  # number of heads that have ended
        self._arrived = 0  # bytes of a head that has not ended
        self._parsed = 0  # bytes of the target and the headers parsed so far
        self._read_by: float | None = None  # time by which the client must have read
        self._fault: PIMCError | None = None
        self._repeating = False  # the parser receives a second head of a request that has begun

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection within the limits; reject it otherwise."""
        super().connection_made(transport)
        if self._connections.enter(self, self._address):
            self._await_head()
            return
        self._connections.given_up("full")
        self._reject(
            Overloaded(
                "server at capacity: every connection that the server accepts has a request in "
                "flight (PIMC_MAX_CONNECTIONS, PIMC_MAX_CONNECTIONS_PER_ADDRESS); retry after 5 s"
            )
        )

    @property
    def _address(self) -> str:
        return network_of(self.client[0]) if self.client else ""

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection from those that are counted."""
        self._stop_timer()
        self._connections.leave(self)
        super().connection_lost(exc)

    def close(self) -> None:
        """Close a connection that waits for a request."""
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.close()

    def abort(self) -> None:
        """Close at once and discard the bytes that the client has not read."""
        self._stop_timer()
        self.transport.abort()

    def resume_writing(self) -> None:
        """Continue to send: the client has read most of the buffered bytes."""
        self._read_by = None
        super().resume_writing()

    def is_unread(self, seconds: float) -> bool:
        """Whether the client has not read the response within its time.

        uvicorn itself has no such limit, neither during a response nor for the last bytes before
        it closes the connection.

        Args:
            seconds: seconds for which a client may read nothing.
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
        """Parse the bytes that arrived; reject a head that is too long."""
        if self._fault is not None:
            return
        waited, heads = self._in_head, self._heads
        if waited and self._head_timer is None:
            self._await_head()
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._in_head and self._fault is None and not self.transport.is_closing():
            # If these bytes also hold the end of an earlier body, the head's own bytes are unknown
            # and not counted: a head may exceed its limit by the size of one read (256 KiB).
            self._arrived = self._arrived + len(data) if waited and heads == self._heads else 0
            if self._arrived > MAX_HEAD_BYTES:
                self._reject(_too_large(self._arrived))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Ignore an upgrade to an unsupported protocol (RFC 9110, 7.8), and parse the body.

        Java's HttpClient and `curl --http2` offer `h2c` with every request. At an upgrade the
        parser stops, because it expects another protocol instead of the body. So a new parser
        first receives a head with the same length headers, whose callbacks are ignored, and then
        the body.

        Args:
            rest: the bytes after the head.
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
        self._connections.given_up("late_head")
        if self._arrived == 0:
            self.close()
            return
        self._reject(
            HeadStalled(
                f"the request's line and headers must arrive within {self._head_seconds:g} s "
                f"(PIMC_HEAD_SECONDS), but only {self._arrived} bytes of them arrived; retry"
            )
        )

    # The parser's callbacks ------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Handle the begin of a head."""
        if self._repeating:
            return
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: {"call": self._abort_unread}}
        self._parsed = 0

    def on_url(self, url: bytes) -> None:
        """Handle a part of the target."""
        if self._repeating:
            return
        super().on_url(url)
        self._parsed += len(url)
        if self._parsed > MAX_TARGET_BYTES:
            self._fault = UriTooLong(
                f"the request's path and query have {self._parsed} bytes or more, and at most "
                f"{MAX_TARGET_BYTES} are allowed: send parameters in the body"
            )
            raise self._fault

    def on_header(self, name: bytes, value: bytes) -> None:
        """Handle a header."""
        if self._repeating:
            return
        super().on_header(name, value)
        self._parsed += len(name) + len(value)
        if self._parsed > MAX_HEAD_BYTES:
            self._fault = _too_large(self._parsed)
            raise self._fault

    def on_headers_complete(self) -> None:
        """Handle the end of a head: the request begins."""
        if self._repeating:
            self._repeating = False
            return
        self._in_head = False
        self._heads += 1
        self._arrived = 0
        self._stop_timer()
        self._connections.busy(self)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Handle the end of a body: the next bytes are a head."""
        if self.parser.should_upgrade():  # the parser stopped before the body
            return
        super().on_message_complete()
        self._in_head = True

    def on_response_complete(self) -> None:
        """Handle the end of a response."""
        super().on_response_complete()
        if self._in_head and not self.pipeline:
            self._connections.idle(self)

    def _abort_unread(self) -> None:
        self._connections.given_up("unread")
        self.abort()

    # Rejections ------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Reject a request that is not valid HTTP, or in which a callback found a fault."""
        del msg
        malformed = MalformedRequest(
            "the request is not valid HTTP/1.1: check that the client does not send HTTPS to this "
            "port"
        )
        self._reject(self._fault or malformed)

    def _reject(self, fault: PIMCError) -> None:
        """Send a problem and close the connection, after a delay if the address has many.

        A client that opens connections in a loop and sends such heads on them would otherwise keep
        the event loop busy. During the delay nothing is read, and the connection counts.
        """
        self._fault = fault
        self._stop_timer()
        self._connections.given_up(fault.code)
        if self._in_head and not isinstance(fault, Overloaded):
            pause, _ = self._connections.delays.pause(self._address, self.loop.time())
            if pause and not self.transport.is_closing():
                self.flow.pause_reading()
                self._head_timer = self.loop.call_later(pause, self._send_problem, fault)
                return
        self._send_problem(fault)

    def _send_problem(self, fault: PIMCError) -> None:
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
        f"the request's line and headers have {size} bytes or more, and at most {MAX_HEAD_BYTES} "
        "are allowed: send fewer or shorter headers"
    )


def bounded_connections(most: int) -> int:
    """Raise the limit of open files as far as the system allows, and limit the connections to it.

    Args:
        most: largest number of connections, from the settings.

    Returns:
        Largest number of connections, up to `most`, that leaves enough descriptors for files.
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
    """Uvicorn's configuration with limited connections.

    Args:
        app: application made by `create_app`.
        settings: the settings.
        options: further options of uvicorn, which replace those of the settings.
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
            "access_log": False,  # RequestRecordMiddleware logs each request, with its id
            "server_header": False,
            "proxy_headers": False,  # the application handles them, by PIMC_TRUSTED_PROXIES
            **options,
        },
    )
