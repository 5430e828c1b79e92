"""Sockets: an HTTP server, a listener that counts connections, one HTTP response."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer


class HTTPServer(ThreadingHTTPServer):
    """A server of HTTP; a client that closes its connection causes no error and no output."""

    daemon_threads = True
    request_queue_size = 128  # of more connections at once than these, one waits for seconds

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that closes a connection does not fail the test."""


@contextmanager
def listening() -> Iterator[socket.socket]:
    """A server to which clients can connect, and which never responds."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        yield server


def connections(server: socket.socket) -> int:
    """Number of connections since the last call."""
    count = 0
    while True:
        try:
            server.accept()[0].close()
        except TimeoutError:
            return count
        count += 1


def response_of(connection: socket.socket, begun: bytes = b"") -> bytes:
    """The next whole HTTP response: one read may return a part of it.

    Args:
        connection: blocking, with a timeout.
        begun: bytes of the response that were read already.
    """
    found = begun
    while b"\r\n\r\n" not in found and (more := connection.recv(2**16)):
        found += more
    head, _, body = found.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    missing = (int(length[1]) if length else 0) - len(body)
    while missing > 0 and (more := connection.recv(missing)):
        found += more
        missing -= len(more)
    return found
