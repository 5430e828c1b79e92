"""An S3 server of the tests: a process on loopback, and a way to it that can be cut."""

from __future__ import annotations

import re
import selectors
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx

from tests.kits.patience import PATIENCE
from tests.kits.process import Process

# Moto checks no signature, but requests are signed as for any server.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_REGION": "us-east-1",
}


@dataclass(frozen=True)
class S3:
    """A server with the interface of S3.

    Args:
        endpoint: its address.
    """

    endpoint: str

    def bucket(self) -> str:
        """Make an empty bucket; returns its name."""
        name = f"test-{uuid.uuid4()}"
        httpx.put(f"{self.endpoint}/{name}", timeout=PATIENCE).raise_for_status()
        return name

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Keys of a bucket, as the server lists them."""
        asked = {"list-type": "2", "prefix": prefix}
        return self._found(bucket, asked, r"<Key>([^<]*)</Key>")

    def unfinished(self, bucket: str) -> list[str]:
        """Keys of the uploads that were neither completed nor aborted."""
        return self._found(bucket, {"uploads": ""}, r"<Key>([^<]*)</Key>")

    def _found(self, bucket: str, asked: dict[str, str], pattern: str) -> list[str]:
        response = httpx.get(f"{self.endpoint}/{bucket}", params=asked, timeout=PATIENCE)
        response.raise_for_status()
        return sorted(re.findall(pattern, response.text))

    def read(self, bucket: str, key: str) -> bytes:
        """An object."""
        response = httpx.get(f"{self.endpoint}/{bucket}/{key}", timeout=PATIENCE)
        response.raise_for_status()
        return response.content


@contextmanager
def server() -> Iterator[S3]:
    """A running server, which ends with the tests, however they end."""
    command = ["setpriv", "--pdeathsig=KILL", sys.executable, "-m", "moto.server"]
    program = Process.program([*command, "-H", "127.0.0.1", "-p", "0"])
    process = Process(program, r"Running on (http://127\.0\.0\.1:\d+)")
    try:
        yield S3(process.address())
    finally:
        process.kill()


class Way:
    """A way to a server: connections to `endpoint` are passed on, unless it is cut.

    Args:
        endpoint: address of the server.
    """

    def __init__(self, endpoint: str) -> None:
        self._target = endpoint.removeprefix("http://").split(":")
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._cut = False
        self._pass = -1
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, after: int = 0) -> None:
        """Close all connections, and each new one.

        Args:
            after: bytes towards the server that still pass before.
        """
        with self._lock:
            if after:
                self._pass = after
            else:
                self._close()

    def mend(self) -> None:
        """Pass connections on again."""
        with self._lock:
            self._cut, self._pass = False, -1

    @property
    def is_cut(self) -> bool:
        """Whether no connection passes."""
        with self._lock:
            return self._cut

    def close(self) -> None:
        """End it."""
        self.cut()
        self._listener.close()

    def _close(self) -> None:
        self._cut = True
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            with self._lock:
                if self._cut:
                    return
                host, port = self._target
                server = socket.create_connection((host, int(port)))
                self._open |= {client, server}
            try:
                with server, selectors.DefaultSelector() as ready:
                    ready.register(client, selectors.EVENT_READ, server)
                    ready.register(server, selectors.EVENT_READ, client)
                    while self._carried(ready, client):
                        pass
            finally:
                with self._lock:
                    self._open -= {client, server}

    def _carried(self, ready: Any, client: socket.socket) -> bool:
        for key, _ in ready.select():
            content = key.fileobj.recv(2**16)
            if not content:
                return False
            if key.fileobj is client:
                with self._lock:
                    if 0 <= self._pass < len(content):
                        self._close()
                        return False
                    if self._pass >= 0:
                        self._pass -= len(content)
            key.data.sendall(content)
        return True


@contextmanager
def way(endpoint: str) -> Iterator[Way]:
    """A way to a server that can be cut."""
    made = Way(endpoint)
    try:
        yield made
    finally:
        made.close()
