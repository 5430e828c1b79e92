"""Uploads over a real socket: rejections reach the client, slow uploads end, slots are freed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from pimc_client import Client, PIMCError
from service.api.middleware import LingeringCloseMiddleware
from service.api.uploads import _FormReader
from tests.kits.clock import JumpingClock
from tests.kits.marks import in_all_tests
from tests.kits.metrics import metric
from tests.kits.patience import PATIENCE, soon
from tests.kits.sockets import response_of

LARGE = 24 * 2**20  # more than the buffers of both sockets
FORM = {"Content-Type": "multipart/form-data; boundary=edge"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def api(zoo: Path) -> Iterator[httpx.Client]:
    with (
        pytest.MonkeyPatch.context() as patch,
        served(model_dir=zoo, api_keys=("key",), max_body_bytes=300_000) as client,
    ):
        patch.setattr("service.api.middleware._EARLY_RATE", 2**40)  # these tests send many bodies
        yield client


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.tif"
    with path.open("wb") as file:
        file.truncate(LARGE)
    return path


def chunks() -> Iterator[bytes]:
    yield b"--edge\r\n"
    for _ in range(LARGE // 2**16):
        yield bytes(2**16)


@pytest.mark.parametrize(("key", "status"), [("", 401), ("key", 413)])
@pytest.mark.parametrize("connection", ["keep-alive", *in_all_tests("close")])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_early_rejection_of_a_large_body_reaches_the_client(
    api: httpx.Client, large: Path, key: str, status: int, connection: str, chunked: bool
) -> None:
    headers = {"X-API-Key": key, "Connection": connection}
    for _ in range(3):
        if chunked:
            response = api.post("/embed", content=chunks(), headers={**headers, **FORM})
        else:
            with large.open("rb") as file:
                response = api.post("/embed", files=[("files", file)], headers=headers)
        assert response.status_code == status
        assert response.json()["status"] == status


def test_an_early_rejection_reaches_the_sdk(api: httpx.Client, large: Path) -> None:
    for key, code in (("wrong", "unauthorized"), ("key", "body_too_large")):
        with Client(str(api.base_url), api_key=key) as pimc, pytest.raises(PIMCError) as caught:
            pimc.classify_pixels([large])
        assert code in f"{getattr(caught.value, 'code', '')} {caught.value}"


def connected(api: httpx.Client) -> socket.socket:
    where = (api.base_url.host, api.base_url.port or 80)
    return socket.create_connection(where, timeout=PATIENCE)


def received(connection: socket.socket) -> bytes:
    """All bytes until the server closes the connection."""
    found = b""
    while more := connection.recv(65536):
        found += more
    return found


def test_a_response_is_sent_before_the_body_is_complete_and_the_rest_is_read(
    api: httpx.Client,
) -> None:
    head = "POST /embed HTTP/1.1\r\nHost: here\r\nContent-Length: {}\r\nX-API-Key: {}\r\n\r\n"
    with connected(api) as connection:
        connection.sendall(head.format(LARGE, "wrong").encode())
        connection.sendall(bytes(2**16))
        first = response_of(connection)
        assert first.startswith(b"HTTP/1.1 401 ")
        assert b"connection: close" in first.lower()
        connection.sendall(bytes(LARGE - 2**16))  # the server does not reset the connection
        assert b"HTTP/1.1" not in received(connection)


def test_a_short_unread_body_keeps_the_connection_open(api: httpx.Client) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n"
    with connected(api) as connection:
        for _ in range(3):
            connection.sendall(head + bytes(1000))
            response = response_of(connection)
            assert response.startswith(b"HTTP/1.1 404 ")
            assert b"connection: close" not in response.lower()


def test_the_rest_of_a_body_is_read_up_to_a_limit() -> None:
    """The rest of an endless body is read up to a number of bytes and of seconds."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    async def run(pause: float, **bounds: float) -> tuple[int, list[dict[str, Any]]]:
        read, sent = 0, []

        async def receive() -> dict[str, Any]:
            nonlocal read
            await anyio.sleep(pause if read else 0)  # the first bytes arrive at once
            read += 1000
            return {"type": "http.request", "body": bytes(1000), "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "headers": [(b"content-length", b"999999999")]}
        with anyio.fail_after(PATIENCE):
            await LingeringCloseMiddleware(app, **bounds)(scope, receive, send)
        return read, sent

    def ran(pause: float, **bounds: float) -> tuple[int, list[dict[str, Any]]]:
        options = {"loop_factory": JumpingClock}
        return anyio.run(lambda: run(pause, **bounds), backend_options=options)

    read, sent = ran(0, size=5000, seconds=60)
    assert read <= 2**20 + 6000
    assert [message.get("body") for message in sent[1:]] == [b"no", b""]
    assert (b"connection", b"close") in sent[0]["headers"]
    read, sent = ran(0.7, size=10**9, seconds=3)
    assert read == 5000  # at once, and after 0.7, 1.4, 2.1 and 2.8 s
    assert sent[-1].get("more_body", False) is False


def test_early_responses_to_a_caller_with_many_bodies_are_delayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise a few clients that repeat a rejected upload keep the event loop busy."""
    monkeypatch.setattr("service.api.middleware._EARLY_RATE", 2**25)  # `api` may have changed it
    responses: list[tuple[str, float]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 429, "headers": []})
        responses.append((scope["state"]["caller"], anyio.current_time()))
        await send({"type": "http.response.body", "body": b"no"})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def ignore(_: Any) -> None: ...

    lingering = LingeringCloseMiddleware(app)

    async def reject(caller: str, length: int) -> None:
        headers = [(b"content-length", str(length).encode())]
        scope = {"type": "http", "headers": headers, "state": {"caller": caller}}
        await lingering(scope, receive, ignore)

    async def run() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(reject, "hog", 2**24)
            group.start_soon(reject, "other", 2**24)
            for _ in range(1000):
                group.start_soon(reject, "small", 100)

    anyio.run(run, backend_options={"loop_factory": JumpingClock})
    begun = min(at for _, at in responses)

    def times(caller: str) -> list[float]:
        return [round(at - begun, 2) for name, at in responses if name == caller]

    # 128 MiB at once, and then 32 MiB per second, but none waits for more than three seconds.
    delays = [0.0] * 8 + [min(0.5 * n, 3.0) for n in range(1, 13)]
    assert times("hog") == pytest.approx(delays, abs=0.1)
    assert times("other") == [0.0]
    assert times("small") == [0.0] * 1000


def test_a_few_threads_receive_all_bodies(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop, and with it health, waits behind every thread that runs Python."""
    inside: list[int] = []
    opened = threading.Event()
    feed = _FormReader.feed

    def held(reader: _FormReader, batch: Any) -> None:
        inside.append(1)
        assert opened.wait(PATIENCE)
        feed(reader, batch)

    monkeypatch.setattr(_FormReader, "feed", held)
    with served(model_dir=zoo, max_concurrency=4) as client, ThreadPoolExecutor(6) as pool:
        form = {"files": ("a.tif", b"no raster")}
        sent = [pool.submit(client.post, "/embed", files=form) for _ in range(6)]
        try:
            # The request for the metrics is the seventh.
            assert soon(lambda: metric(client, "pimc_requests_in_flight") == 7)
            assert soon(lambda: len(inside) >= 2)
            assert client.get("/health/live").status_code == 200
            assert len(inside) == 2
        finally:
            opened.set()
        assert [one.result().json()["code"] for one in sent] == ["not_a_geotiff"] * 6


# Slow uploads -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(zoo: Path) -> Iterator[httpx.Client]:
    """A service that ends uploads that are too slow for a fifth of a second."""
    with served(model_dir=zoo, max_concurrency=1, upload_seconds=0.2) as client:
        yield client


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=edge", "application/json"])
def test_a_drip_feed_times_out(impatient: httpx.Client, kind: str) -> None:
    """An upload must send enough bytes per interval: single bytes do not keep it alive."""
    head = (
        "POST /embed HTTP/1.1\r\nHost: here\r\n"
        f"Content-Type: {kind}\r\nContent-Length: 90000\r\n\r\n--edge\r\n"
    ).encode()
    response = b""
    with connected(impatient) as connection:
        connection.sendall(head)
        connection.settimeout(0.1)
        while not response:
            connection.sendall(b"x")
            with suppress(TimeoutError):
                response = connection.recv(65536)
        connection.settimeout(PATIENCE)
        response = response_of(connection, response)
        assert response.startswith(b"HTTP/1.1 408 ")
        assert b"application/problem+json" in response
        assert b'"code":"body_stalled"' in response


def test_a_stalled_upload_times_out_and_frees_its_slot(impatient: httpx.Client) -> None:
    idle = [connected(impatient) for _ in range(2)]
    for connection in idle:
        connection.sendall(
            b"POST /embed HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
    for connection in idle:
        assert response_of(connection).startswith(b"HTTP/1.1 408 ")
        connection.close()
    # Both slots are free: this request takes one, and has no body that could stall.
    rejected = impatient.post("/embed", headers={"Content-Type": "application/json"})
    assert rejected.json()["code"] == "invalid_request"
