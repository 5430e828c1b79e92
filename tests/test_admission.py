"""Admission control, `overloaded` and disconnects, over sockets."""

from __future__ import annotations

import http.client
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
import uvicorn
from starlette.responses import StreamingResponse

from benchmarks.serving import served
from service.api.admission import Admission
from service.api.middleware import SlowClientMiddleware
from service.errors import Overloaded
from tests.kits.rasters import write

PATIENCE = 30.0
BOUNDARY = "b0undary"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def soon(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + PATIENCE
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


# The count itself ---------------------------------------------------------------------------


@pytest.mark.anyio
async def test_seats_are_given_back_also_after_a_fault() -> None:
    admission = Admission(1)
    for _ in range(5):
        with pytest.raises(ValueError, match="inside"):
            async with admission.queue_slot(), admission.run_slot():
                raise ValueError("inside")
    async with admission.queue_slot(), admission.queue_slot():
        with pytest.raises(Overloaded) as caught:
            async with admission.queue_slot():
                pytest.fail("there are only two seats")
        assert caught.value.retry_after > 0


@pytest.mark.anyio
async def test_places_come_in_the_order_of_asking_and_a_cancelled_wait_takes_none() -> None:
    admission = Admission(1)
    order: list[int] = []

    async def ask(number: int) -> None:
        async with admission.run_slot():
            order.append(number)

    async with anyio.create_task_group() as group, admission.run_slot():
        for number in range(3):
            group.start_soon(ask, number)
            await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(0.01) as waiting:
            await ask(3)
        assert waiting.cancelled_caught
        assert order == []
    assert order == [0, 1, 2]
    with anyio.fail_after(1):
        await ask(4)


# A service whose runs last for minutes, unless they are stopped -------------------------------


@pytest.fixture(scope="module")
def long_upload(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A request of 2048 x 2048 pixels for the real classifier: small to send, long to answer."""
    folder = tmp_path_factory.mktemp("long")
    parts = []
    for month in (1, 4, 7, 10):
        bands = (
            np.ones((3, 2048, 2048), np.uint16) * np.array([500, 600, 3000 + month])[:, None, None]
        )
        name = f"s_2021-{month:02d}-01.tif"
        source = write(
            folder / name,
            bands.astype(np.uint16),
            descriptions=("B02", "B04", "B08"),
            nodata=0,
            tiled=True,
            blockxsize=256,
            blockysize=256,
            compress="deflate",
        )
        parts.append(
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; '
            f'filename="{name}"\r\n\r\n'.encode()
            + source.path.read_bytes()
            + b"\r\n"
        )
    form = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    head = (
        "POST /classify-pixels HTTP/1.1\r\nHost: here\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        f"Content-Length: {len(form)}\r\n\r\n"
    )
    return head.encode() + form


@pytest.fixture
def narrow(scratch: Path, tmp_path: Path) -> Iterator[httpx.Client]:
    """One place, so two seats; its state lies elsewhere than what a request leaves."""
    with served(max_concurrency=1, state_dir=tmp_path / "state") as client:
        yield client


def connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 80), PATIENCE)


def metric(client: httpx.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return sum(map(float, lines))


def test_a_caller_who_leaves_stops_the_work_and_frees_the_place(
    narrow: httpx.Client, long_upload: bytes, scratch: Path
) -> None:
    for _ in range(2):  # the second time needs what the first gave back
        with connected(narrow) as caller:
            caller.sendall(long_upload)
            assert soon(lambda: metric(narrow, "pimc_windows_in_flight") > 0)
        assert soon(lambda: metric(narrow, "pimc_runs_in_flight") == 0)
        assert soon(lambda: not any(scratch.iterdir()))
    assert metric(narrow, "pimc_windows_in_flight") == 0
    # It was stopped, not finished.
    assert metric(narrow, "pimc_pixels_total") == 0


def test_a_caller_who_leaves_the_queue_frees_its_seat(
    narrow: httpx.Client, long_upload: bytes, scratch: Path
) -> None:
    with connected(narrow) as runs:
        runs.sendall(long_upload)
        assert soon(lambda: metric(narrow, "pimc_runs_in_flight") == 1)
        for _ in range(2):
            with connected(narrow) as waits:
                waits.sendall(long_upload)
                assert soon(lambda: len(list(scratch.iterdir())) == 2)
                # Both seats are taken: the next is told at once, while the first still runs.
                refused = narrow.post("/classify-pixels", json={"series": []})
                assert refused.status_code == 503
                assert refused.json()["code"] == "overloaded"
                assert int(refused.headers["Retry-After"]) > 0
                assert metric(narrow, "pimc_runs_in_flight") == 1
            # Gone from the queue, though no place came free.
            assert soon(lambda: len(list(scratch.iterdir())) == 1)
            assert metric(narrow, "pimc_runs_in_flight") == 1
        # The seat is there again: this one is looked at, and refused for what it says.
        assert narrow.post("/classify-pixels", json={"series": 3}).status_code == 422
    assert soon(lambda: metric(narrow, "pimc_runs_in_flight") == 0)
    assert metric(narrow, "pimc_pixels_total") == 0


# Callers who do not read ----------------------------------------------------------------------


@contextmanager
def paced(**pace: float) -> Iterator[tuple[tuple[str, int], threading.Event, list[str]]]:
    """An application with a long and a short answer, under a pace.

    Its address, an event that is set once an answer has ended, and the answers that were whole.
    """
    closed = threading.Event()
    said: list[str] = []

    async def chunks(count: int) -> Any:
        for _ in range(count):
            yield b"y" * 2**16

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            long = scope["path"] == "/long"
            await StreamingResponse(chunks(10**6 if long else 16))(scope, receive, send)
            said.append("whole")
        finally:
            closed.set()

    config = uvicorn.Config(
        SlowClientMiddleware(app, **pace), port=0, log_config=None, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert soon(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[:2], closed, said
    finally:
        server.should_exit = server.force_exit = True
        thread.join(PATIENCE)


def test_an_answer_that_nobody_reads_is_given_up() -> None:
    with (
        paced(stall_seconds=0.2) as (where, closed, said),
        socket.create_connection(where, PATIENCE) as caller,
    ):
        caller.sendall(b"GET /long HTTP/1.1\r\nHost: here\r\n\r\n")
        assert closed.wait(PATIENCE)
        assert said == []


def test_an_answer_that_is_read_too_slowly_is_given_up() -> None:
    """Each chunk is taken in time, and yet it would take for ever."""
    with (
        paced(stall_seconds=0.5, slowest=2.0**40) as (where, closed, said),
        socket.create_connection(where, PATIENCE) as caller,
    ):
        caller.sendall(b"GET /long HTTP/1.1\r\nHost: here\r\n\r\n")
        while not closed.wait(0.01):
            caller.recv(2**16)
        assert said == []


def test_an_answer_that_is_read_comes_whole() -> None:
    with paced(stall_seconds=20.0) as (where, _, said):
        connection = http.client.HTTPConnection(*where, timeout=PATIENCE)
        connection.request("GET", "/short")
        assert connection.getresponse().read() == b"y" * 2**20
        connection.close()
        assert soon(lambda: said == ["whole"])
