"""Kit of the SDK's tests: both clients through one interface, a server, and its responses."""

from __future__ import annotations

import asyncio
import email
import email.policy
import inspect
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import rasterio.shutil
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from pimc_client import AsyncClient, AsyncJob, Client, operations
from pimc_client.retry import RetryPolicy
from tests.kits.sockets import HTTPServer

TRANSFORM = Affine(10.0, 0.0, 600_000.0, 0.0, -10.0, 5_600_000.0)
LEGEND = [
    {"value": 0, "name": "Tree cover", "color": "#006400", "code": 10},
    {"value": 1, "name": "Grass & herbs", "color": "#ffff4c", "code": None},
]
CARD = {
    "name": "pixels-landcover", "version": "1.0.0", "task": "classify-pixels", "description": "d",
    "bands": ["B02", "B04", "B08"], "min_observations": 6,
    "window": {"steps": 36, "step_days": 10, "start": "calendar-year"},
    "classes": LEGEND, "metrics": {"accuracy": 0.9}, "training_data": [{"name": "s2"}],
    "licence": "MIT", "variants": [{"name": "float32"}], "sha256": "0" * 64, "horizon": None,
}  # fmt: skip


class Awaited:
    """An `AsyncClient` or `AsyncJob` whose methods are called without `await`."""

    def __init__(self, thing, runner: asyncio.Runner) -> None:
        self._thing = thing
        self._runner = runner

    def __getattr__(self, name):
        value = getattr(self._thing, name)
        if not inspect.iscoroutinefunction(value):
            return value

        def call(*args, **options):
            found = self._runner.run(value(*args, **options))
            if isinstance(found, list) and found and isinstance(found[0], AsyncJob):
                return [Awaited(job, self._runner) for job in found]
            return Awaited(found, self._runner) if isinstance(found, AsyncJob) else found

        return call


@contextmanager
def connected(kind: str, base_url: str, **options) -> Iterator[Client | Awaited]:
    """A client of one kind, `sync` or `async`, closed afterwards."""
    if kind == "sync":
        with Client(base_url, **options) as client:
            yield client
        return
    with asyncio.Runner() as runner:
        client = AsyncClient(base_url, **options)
        try:
            yield Awaited(client, runner)
        finally:
            runner.run(client.aclose())


@contextmanager
def without_pauses(poll: float = 0.0) -> Iterator[None]:
    """A context in which clients retry at once; `RetryPolicy.pause` still decides whether.

    Args:
        poll: seconds before the first repeated look at a job; a server in this process needs some.
    """
    pause = RetryPolicy.pause

    def at_once(policy: RetryPolicy, *sent: Any) -> float | None:
        return None if pause(policy, *sent) is None else 0.0

    with (
        patch.object(RetryPolicy, "pause", at_once),
        patch.object(operations, "_FIRST_PAUSE", poll),
    ):
        yield


@dataclass
class Received:
    """A request that the server received."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Reply:
    """A response of the server; with `drop` the server closes the connection instead."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    drop: bool = False


@contextmanager
def serving(response: Callable[[Received], Reply]) -> Iterator[tuple[str, list[Received]]]:
    """A server on a free port; yields its URL and a growing list of the received requests."""
    received: list[Received] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            request = Received(
                self.command,
                self.path,
                {k.lower(): v for k, v in self.headers.items()},
                self._body(),
            )
            received.append(request)
            reply = response(request)
            if reply.drop:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):  # The client may have closed the connection.
                self.wfile.write(reply.body)

        do_GET = do_POST = do_DELETE = _any  # noqa: N815 (the names that http.server calls)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, *args) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def cog(
    values,
    *,
    descriptions=(),
    nodata=None,
    crs="EPSG:32631",
    colors=None,
    transform=TRANSFORM,
    **tags,
):
    """Bytes of a COG."""
    plain, finished = MemoryFile(), MemoryFile()
    with plain, finished:
        shape = {"count": values.shape[0], "height": values.shape[1], "width": values.shape[2]}
        with plain.open(
            driver="GTiff", dtype=values.dtype, crs=crs, transform=transform, nodata=nodata, **shape
        ) as file:
            file.write(values)
            file.update_tags(**tags)
            for band, text in enumerate(descriptions, 1):
                file.set_band_description(band, text)
            if colors:
                file.write_colormap(1, colors)
        with plain.open() as file:
            rasterio.shutil.copy(file, finished.name, driver="COG", compress="deflate")
        finished.seek(0)
        return finished.read()


def classes(**tags):
    values = np.array([[[0, 1, 255], [1, 1, 0]]], np.uint8)
    return cog(
        values,
        descriptions=["class"],
        nodata=255,
        colors={0: (0, 100, 0), 1: (255, 255, 76)},
        **tags,
    )


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)
    return file.getvalue()


def parts_of(request: httpx.Request) -> list[tuple[Any, str | None, str, Any]]:
    """(name, filename, content type, content) of each part, by the standard library's parser."""
    head = b"Content-Type: " + request.headers["content-type"].encode() + b"\r\n\r\n"
    message = email.message_from_bytes(head + request.content, policy=email.policy.HTTP)
    return [
        (
            part.get_param("name", header="content-disposition"),
            part.get_filename(),
            part.get_content_type(),
            part.get_payload(decode=True),
        )
        for part in message.iter_parts()
    ]
