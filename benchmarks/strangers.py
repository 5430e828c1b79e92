"""Further clients of the load test, which use up connections, memory and readers, not run slots.

Each function runs at least one round and until an event is set, from a separate address, and counts
the outcomes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

import numpy as np
import rasterio
from affine import Affine

from benchmarks.landscape import FORM, days, form
from benchmarks.process import Served

_PATIENCE = 600.0
_IDLE = 300
_READERS = 24
_LEAVERS = 8
_HEAD_PIECE = b"X-Filler: " + b"a" * 2**14 + b"\r\n"
_HEAD_BYTES = 2**24
_BLOCK = 4096
"""Side of the one block of each file, pixels: 32 MiB decoded per band, some kilobytes sent."""


@contextmanager
def _connected(service: Served, address: str, buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(_PATIENCE)
        connection.bind((address, 0))
        connection.connect((service.host, service.port))
        yield connection


def idle(service: Served, over: threading.Event, counts: Counter[str], *, key: str) -> None:
    """Three hundred sockets that send nothing; one that the server closes is opened again."""
    del key
    with contextlib.ExitStack() as held:
        sockets: list[socket.socket] = []
        while not over.is_set():
            for _ in range(_IDLE - len(sockets)):
                try:
                    sockets.append(held.enter_context(_connected(service, "127.0.0.3")))
                    counts["opened"] += 1
                except OSError:
                    counts["not opened"] += 1
                    break
            time.sleep(0.5)
            closed, _, _ = select.select(sockets, [], [], 0)
            for connection in closed:
                counts["closed"] += 1
                sockets.remove(connection)
                connection.close()


def unread(service: Served, over: threading.Event, counts: Counter[str], *, key: str) -> None:
    """Twenty-four readers of a job's result of some megabytes who never read it."""
    job = _job(service, "127.0.0.4", key, over)
    if job is None:
        counts["no job accepted"] += 1
        return
    request = f"GET /jobs/{job}/result HTTP/1.1\r\nHost: here\r\nX-API-Key: {key}\r\n\r\n".encode()
    with contextlib.ExitStack() as held:
        sockets: list[socket.socket] = []
        while True:
            for _ in range(_READERS - len(sockets)):
                with contextlib.suppress(OSError):
                    connection = held.enter_context(_connected(service, "127.0.0.4", 2**12))
                    connection.sendall(request)
                    sockets.append(connection)
            time.sleep(1)
            for connection in list(sockets):
                status = _status(connection)
                if status != "200":
                    counts[status] += 1
                    sockets.remove(connection)
                    connection.close()
            counts["unread at once"] = max(counts["unread at once"], len(sockets))
            if over.is_set():
                return


def _status(connection: socket.socket) -> str:
    """The status at the begin of a response, left in the socket; `closed` after its end."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    try:
        # Bytes that a server sent before it closed the connection can still be read.
        if poll.poll(0):
            return "closed"
        line = connection.recv(12, socket.MSG_PEEK)
    except OSError:
        return "closed"
    return line[9:12].decode() or "closed"


def _job(service: Served, address: str, key: str, over: threading.Event) -> str | None:
    """A finished job whose result is larger than the buffers of a socket; None if none runs."""
    body = form(_files(128, noise=True))
    headers = {"Content-Type": FORM, "Prefer": "respond-async", "X-API-Key": key}
    connection = http.client.HTTPConnection(
        service.host, service.port, timeout=_PATIENCE, source_address=(address, 0)
    )
    try:
        while not over.is_set():
            try:
                connection.request("POST", "/embed", body, headers)
                response = connection.getresponse()
                accepted = json.loads(response.read())
            except (OSError, http.client.HTTPException):  # ended, as the others need the uploads
                connection.close()
                time.sleep(0.2)
                continue
            if response.status == HTTPStatus.ACCEPTED:
                break
            time.sleep(float(response.headers["Retry-After"]))  # others use the run slots
        while not over.is_set():
            connection.request("GET", f"/jobs/{accepted['jobID']}", headers={"X-API-Key": key})
            status = json.loads(connection.getresponse().read())["status"]
            if status == "successful":
                return str(accepted["jobID"])
            time.sleep(0.2)
        return None
    finally:
        connection.close()


def leaving(service: Served, over: threading.Event, counts: Counter[str], *, key: str) -> None:
    """Requests for maps whose clients leave once they have sent them, sixteen per second."""
    body = form(_files(128, noise=True))
    head = (
        f"POST /classify-pixels HTTP/1.1\r\nHost: here\r\nContent-Type: {FORM}\r\n"
        f"X-API-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    rounds = 0
    while rounds == 0 or not over.is_set():
        rounds += 1
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for _ in range(_LEAVERS):
                connection = held.enter_context(_connected(service, "127.0.0.5"))
                connection.sendall(head + body)
                counts["left"] += 1
            time.sleep(0.5)


def heads(service: Served, over: threading.Event, counts: Counter[str], *, key: str) -> None:
    """Heads of 16 MiB, piece by piece, one after the other."""
    del key
    rounds = 0
    while rounds == 0 or not over.is_set():
        rounds += 1
        with contextlib.suppress(OSError), _connected(service, "127.0.0.6") as connection:
            sent = 0
            try:
                connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: here\r\n")
                while sent < _HEAD_BYTES:
                    connection.sendall(_HEAD_PIECE)
                    sent += len(_HEAD_PIECE)
            except OSError:
                counts["cut off"] += 1
            else:
                counts["taken whole"] += 1


def blocks(service: Served, over: threading.Event, counts: Counter[str], *, key: str) -> None:
    """Points in files of some kilobytes whose one block decodes to 32 MiB in each band."""
    point = {"type": "Point", "coordinates": [3.0005, 50.54]}
    points = {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": point}]}
    fields = {"points": json.dumps(points)}
    body = form(_files(_BLOCK, noise=False), fields)
    headers = {"Content-Type": FORM, "X-API-Key": key}
    rounds = 0
    while rounds == 0 or not over.is_set():
        rounds += 1
        connection = http.client.HTTPConnection(
            service.host, service.port, timeout=_PATIENCE, source_address=("127.0.0.7", 0)
        )
        try:
            connection.request("POST", "/classify-pixels", body, headers)
            response = connection.getresponse()
            response.read()
            counts[str(response.status)] += 1
        except (OSError, http.client.HTTPException):
            counts["broken"] += 1
        finally:
            connection.close()


def _files(side: int, *, noise: bool) -> dict[str, bytes]:
    """Four dates of three bands, each file one block; of noise, or of one value."""
    rng = np.random.default_rng(side)
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for day in days(12)[::3]:
            shape = (3, side, side)
            values = rng.integers(300, 4000, shape) if noise else np.full(shape, 800)
            path = Path(folder) / f"block_{day}.tif"
            with rasterio.open(
                path, "w", driver="GTiff", width=side, height=side, count=3, dtype="uint16",
                crs="EPSG:32631", transform=Affine(10, 0, 500_000, 0, -10, 5_600_000), nodata=0,
                tiled=True, blockxsize=side, blockysize=side, compress="deflate", interleave="band",
            ) as file:  # fmt: skip
                file.write(values.astype(np.uint16))
                for band, name in enumerate(("B02", "B04", "B08"), 1):
                    file.set_band_description(band, name)
            made[path.name] = path.read_bytes()
    return made


class Stranger(Protocol):
    """Uses up what it can until the event is set, and counts the outcomes."""

    def __call__(
        self, service: Served, over: threading.Event, counts: Counter[str], *, key: str
    ) -> None:
        """Run, with an API key to send."""
        ...


STRANGERS: Mapping[str, Stranger] = {
    "idle": idle, "unread": unread, "leaving": leaving, "heads": heads, "blocks": blocks,
}  # fmt: skip
