"""Admission control: slots, `overloaded`, slow clients and disconnects, over sockets."""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from starlette.responses import StreamingResponse

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.api import disconnect, sending
from service.api.admission import Admission, FairSlots
from service.api.middleware import SlowClientMiddleware
from service.api.routes import tasks
from service.api.sending import Downloads
from service.errors import Overloaded
from service.read import containers
from service.run.execute import execute
from service.run.plan import Plan
from service.run.request import SeriesRequest
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import stack
from tests.kits.patience import PATIENCE, soon
from tests.kits.sockets import response_of

BOUNDARY = "b0undary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# Slots in one process ---------------------------------------------------------------------------


RATE = 2**14
ROOM = 2**30


@pytest.mark.anyio
async def test_slots_are_released_after_an_error() -> None:
    admission = Admission(1, upload_rate=RATE, spool_bytes=ROOM, memory_bytes=ROOM)

    async def fail() -> None:
        async with admission.admit("a") as admitted, admission.runs.slot("a"):
            admitted.received(1000)
            raise ValueError("inside")

    for _ in range(5):
        with pytest.raises(ValueError, match="inside"):
            await fail()
    assert (admission.held, admission.spooled, admission.runs.held) == (0, 0, 0)
    async with admission.admit("a"), admission.admit("a"):
        with pytest.raises(Overloaded) as caught:
            await admission.admit("a").__aenter__()
        assert caught.value.retry_after > 0
        async with admission.admit("b"):
            assert admission.held == 3


@pytest.mark.anyio
async def test_the_slots_of_all_callers_together_are_limited() -> None:
    admission = Admission(1, upload_rate=RATE, spool_bytes=ROOM, memory_bytes=ROOM)
    async with AsyncExitStack() as stack:
        for caller in range(16):
            admitted = await stack.enter_async_context(admission.admit(str(caller)))
            admitted.uploaded()
        with pytest.raises(Overloaded, match="16 of 16"):
            await stack.enter_async_context(admission.admit("another"))


@pytest.mark.anyio
async def test_one_caller_may_use_half_of_the_space_for_bodies() -> None:
    admission = Admission(1, upload_rate=RATE, spool_bytes=1000, memory_bytes=1000)
    async with admission.admit("a") as first:
        first.received(300)
        first.received(200)
        async with admission.admit("b") as second:
            second.received(500)
            with pytest.raises(Overloaded, match="PIMC_MAX_SPOOL_BYTES"):
                first.received(1)
        with pytest.raises(Overloaded, match="half"):
            first.received(1)
        assert admission.spooled == 500


@pytest.mark.anyio
async def test_a_run_slot_goes_to_the_caller_with_the_fewest_slots() -> None:
    slots = FairSlots(2)
    order: list[str] = []
    held = {name: anyio.Event() for name in ("many", "few")}

    async def run(caller: str) -> None:
        async with slots.slot(caller):
            order.append(caller)
            await held[caller].wait()

    async with anyio.create_task_group() as group:
        for caller in ("many",) * 5 + ("few",) * 2:
            group.start_soon(run, caller)
            await anyio.wait_all_tasks_blocked()
        assert (order, slots.held, slots.awaited) == (["many", "many"], 2, 5)
        held["many"].set()  # both of its runs end; then one of each caller holds a slot
        await anyio.wait_all_tasks_blocked()
        assert order[2:4] == ["few", "many"]
        held["few"].set()
    assert sorted(order) == ["few"] * 2 + ["many"] * 5
    assert (slots.held, slots.awaited) == (0, 0)


@pytest.mark.anyio
async def test_callers_take_turns_if_there_is_one_slot() -> None:
    slots = FairSlots(1)
    order: list[str] = []

    async def run(caller: str) -> None:
        async with slots.slot(caller):
            order.append(caller)

    async with anyio.create_task_group() as group, slots.slot("a"):
        for caller in ("a", "a", "a", "b", "b", "c"):
            group.start_soon(run, caller)
            await anyio.wait_all_tasks_blocked()
    assert order == ["b", "c", "a", "b", "a", "a"]


@pytest.mark.anyio
async def test_slots_are_assigned_in_the_order_of_requests_and_a_cancelled_wait_takes_none() -> (
    None
):
    slots = FairSlots(1)
    order: list[int] = []

    async def run(number: int) -> None:
        async with slots.slot("a"):
            order.append(number)

    async with anyio.create_task_group() as group, slots.slot("a"):
        for number in range(3):
            group.start_soon(run, number)
            await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(0.01) as waiting:
            await run(3)
        assert waiting.cancelled_caught
        assert order == []
    assert order == [0, 1, 2]
    with anyio.fail_after(PATIENCE):
        await run(4)


@pytest.mark.anyio
async def test_callers_take_turns_to_have_files_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_MAKERS", 1)
    downloads = Downloads(most=9, most_per_caller=9)
    order: list[str] = []
    opened = threading.Event()

    def make(caller: str) -> None:
        order.append(caller)
        assert opened.wait(PATIENCE)

    async with anyio.create_task_group() as group:
        for caller in ("a", "a", "a", "b"):
            group.start_soon(downloads.made, caller, partial(make, caller))
            await anyio.wait_all_tasks_blocked()
        opened.set()
    assert order == ["a", "b", "a", "a"]


def test_callers_take_turns_to_have_long_bodies_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disconnect, "SHORT_BODY", 0)
    order: list[str] = []
    waits, reached, opened = threading.Semaphore(0), threading.Event(), threading.Event()
    unless_gone, read_series = disconnect.unless_gone, tasks.read_series

    async def waiting(*arguments: Any) -> Any:
        waits.release()
        return await unless_gone(*arguments)

    def reads(task: Any, body: bytes) -> Any:
        order.append(json.loads(body)["series"][0]["id"])
        reached.set()
        assert opened.wait(PATIENCE)
        return read_series(task, body)

    monkeypatch.setattr(disconnect, "unless_gone", waiting)
    monkeypatch.setattr(tasks, "read_series", reads)
    keys = {"a": "the-first-caller", "b": "the-second-caller"}
    with (
        served(model_dir=write_zoo(tmp_path / "zoo"), api_keys=",".join(keys.values())) as api,
        ThreadPoolExecutor() as threads,
    ):

        def post(name: str) -> int:
            body = {"series": [{**SERIES, "id": name}]}
            return api.post("/embed", json=body, headers={"X-API-Key": keys[name[0]]}).status_code

        calls = []
        for name in ("a1", "a2", "a3", "b1"):
            calls.append(threads.submit(post, name))
            assert waits.acquire(timeout=PATIENCE)
        assert reached.wait(PATIENCE)
        opened.set()
        assert [call.result() for call in calls] == [200] * 4
    assert order == ["a1", "b1", "a2", "a3"]


# Runs that wait at a gate until they are cancelled ---------------------------------------------


@pytest.fixture(scope="module")
def held_upload(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A request for the model whose runs wait at the gate, as bytes of HTTP."""
    request = httpx.Request(
        "POST",
        "http://here/classify-pixels",
        files=stack(tmp_path_factory.mktemp("held"), 160, 256),
        data={"model": HELD},
    )
    head = "POST /classify-pixels HTTP/1.1\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in request.headers.items()
    )
    return f"{head}\r\n".encode() + request.read()


@pytest.fixture
def narrow(scratch: Path, tmp_path: Path, gate: Gate) -> Iterator[httpx.Client]:
    """A service with one run slot and two queue slots; its state is not in the scratch folder."""
    zoo = zoo_with_a_held_model(tmp_path / "zoo")
    with (
        gate.held(),
        served(model_dir=zoo, max_concurrency=1, state_dir=tmp_path / "state") as client,
    ):
        yield client


def connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 80), PATIENCE)


def metric(client: httpx.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return sum(map(float, lines))


def test_a_disconnect_cancels_the_run_and_frees_its_slot(
    narrow: httpx.Client, held_upload: bytes, scratch: Path
) -> None:
    for _ in range(2):  # the second iteration needs the slot of the first
        with connected(narrow) as caller:
            caller.sendall(held_upload)
            assert soon(lambda: metric(narrow, "pimc_runs_in_flight") == 1)
        assert soon(lambda: metric(narrow, "pimc_runs_in_flight") == 0)
        assert soon(lambda: not any(scratch.glob("pimc-*/request-*")))
    assert metric(narrow, "pimc_windows_in_flight") == 0
    # The run was cancelled before it finished.
    assert metric(narrow, "pimc_pixels_total") == 0


def test_a_disconnect_of_a_waiting_request_frees_its_queue_slot(
    narrow: httpx.Client, held_upload: bytes, scratch: Path
) -> None:
    with connected(narrow) as runs:
        runs.sendall(held_upload)
        assert soon(lambda: metric(narrow, "pimc_runs_in_flight") == 1)
        for _ in range(2):
            with connected(narrow) as waits:
                waits.sendall(held_upload)
                assert soon(lambda: metric(narrow, "pimc_run_slots_awaited") == 1)
                assert metric(narrow, "pimc_run_slots_held") == 1
                # Both queue slots are taken: the next request is rejected while the first runs.
                refused = narrow.post("/classify-pixels", json={"series": []})
                assert refused.status_code == 503
                assert refused.json()["code"] == "overloaded"
                assert int(refused.headers["Retry-After"]) > 0
                assert metric(narrow, "pimc_runs_in_flight") == 1
            # The waiting request is removed, although no run slot became free.
            assert soon(lambda: len(list(scratch.glob("pimc-*/request-*"))) == 1)
            assert metric(narrow, "pimc_runs_in_flight") == 1
        # A queue slot is free again: this request is validated, and rejected as invalid.
        assert narrow.post("/classify-pixels", json={"series": 3}).status_code == 422
    assert soon(lambda: metric(narrow, "pimc_runs_in_flight") == 0)
    assert metric(narrow, "pimc_pixels_total") == 0


# Slow uploads, and callers with many requests ---------------------------------------

SERIES = {
    "id": "a", "dates": ["2021-01-01", "2021-02-01"],
    "B02": [0.1, 0.2], "B04": [0.1, 0.2], "B08": [0.1, 0.2],
}  # fmt: skip
ANNA, BEN = {"X-API-Key": "anna"}, {"X-API-Key": "ben"}
LENGTH = 10**9


def embed(client: httpx.Client, count: int, headers: dict[str, str]) -> httpx.Response:
    return client.post("/embed", json={"series": [SERIES] * count}, headers=headers)


def dripping(client: httpx.Client, key: str, uploads: int, length: int = LENGTH) -> socket.socket:
    """A connection with an upload of which one byte has arrived; `uploads` are then in flight."""
    while True:
        connection = connected(client)
        connection.sendall(
            f"POST /embed HTTP/1.1\r\nHost: here\r\nX-API-Key: {key}\r\n"
            f"Content-Type: {FORM}\r\nContent-Length: {length}\r\n\r\n-".encode()
        )
        connection.setblocking(False)
        rejected = False
        while not rejected:
            if metric(client, "pimc_uploads_in_flight") == uploads:
                connection.settimeout(PATIENCE)
                return connection
            with suppress(BlockingIOError):
                # Earlier uploads still occupy their slots: they are too slow only after a second.
                rejected = connection.recv(2**16).startswith(b"HTTP/1.1 503 ")
                assert rejected
        connection.close()


def test_slow_uploads_do_not_block_other_callers(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    with (
        served(
            model_dir=zoo, max_concurrency=1, upload_seconds=600, api_keys=("anna", "ben")
        ) as client,
        ExitStack() as stack,
    ):
        drips = [stack.enter_context(dripping(client, "anna", n)) for n in (1, 2)]
        # The two uploads take both slots of their key, and none of another key's.
        assert embed(client, 1, BEN).status_code == 200
        # After a second the two uploads are too slow to keep their slots.
        assert soon(lambda: embed(client, 1, ANNA).status_code == 200)
        assert metric(client, "pimc_uploads_in_flight") == 2
        drips += [stack.enter_context(dripping(client, "anna", n)) for n in (3, 4)]
        assert metric(client, "pimc_uploads_given_up_total") == 0
        # The caller has as many uploads as allowed: each further request ends the slowest.
        assert soon(lambda: embed(client, 1, ANNA).status_code == 200)
        response = response_of(drips[0]).decode()
        assert response.startswith("HTTP/1.1 408 ")
        assert '"body_stalled"' in response
        assert "16384 bytes per second" in response
        assert metric(client, "pimc_uploads_in_flight") == 3
        assert metric(client, "pimc_uploads_given_up_total") == 1
        for _ in range(3):
            assert embed(client, 1, ANNA).status_code == embed(client, 1, BEN).status_code == 200


def test_a_caller_with_many_requests_delays_another_by_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate starts one run after the other; the number of series identifies the caller."""
    zoo = write_zoo(tmp_path / "zoo")
    gate, began = threading.Semaphore(0), Queue[int]()

    def held(plan: Plan, *arguments: Any, **options: Any) -> Any:
        assert isinstance(plan.request, SeriesRequest)
        began.put(len(plan.request.series))
        assert gate.acquire(timeout=PATIENCE)
        return execute(plan, *arguments, **options)

    monkeypatch.setattr(tasks, "execute", held)
    with (
        served(model_dir=zoo, max_concurrency=2, api_keys=("anna", "ben")) as client,
        ThreadPoolExecutor(5) as pool,
    ):
        try:
            many = []
            for number in range(4):
                many.append(pool.submit(embed, client, 1, ANNA))
                waiting = max(0, number - 1)
                assert soon(lambda n=waiting: metric(client, "pimc_run_slots_awaited") == n)
                assert soon(lambda n=number + 1: began.qsize() == min(2, n))
            few = pool.submit(embed, client, 7, BEN)
            assert soon(lambda: metric(client, "pimc_run_slots_awaited") == 3)
            assert metric(client, "pimc_run_slots") == metric(client, "pimc_run_slots_held") == 2
            assert [began.get(timeout=PATIENCE) for _ in range(2)] == [1, 1]
            gate.release()
            assert (
                began.get(timeout=PATIENCE) == 7
            )  # before two earlier requests of the other caller
        finally:
            gate.release(9)
        assert {one.result(PATIENCE).status_code for one in [*many, few]} == {200}


def test_bodies_that_exceed_the_space_are_rejected(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    form = [("files", ("a.tif", bytes(50_000)))]
    with served(model_dir=zoo, max_body_bytes=100_000, max_spool_bytes=200_000) as client:
        with dripping(client, "none", 1, length=90_000) as half:
            half.sendall(bytes(80_000))
            assert soon(lambda: metric(client, "pimc_spooled_bytes") == 80_001)
            refused = client.post("/embed", files=form)
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            assert "PIMC_MAX_SPOOL_BYTES" in refused.json()["detail"]
            assert int(refused.headers["Retry-After"]) > 0
        assert soon(lambda: metric(client, "pimc_spooled_bytes") == 0)
        assert client.post("/embed", files=form).json()["code"] == "not_a_geotiff"


def test_the_members_of_zips_count_as_bodies_and_are_measured_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = write_zoo(tmp_path / "zoo")

    def zipped(*sizes: int) -> tuple[str, tuple[str, bytes]]:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for number, size in enumerate(sizes):
                archive.writestr(f"{number}.tif", bytes(size))
        return ("files", ("a.zip", buffer.getvalue()))

    began: list[float] = []
    with served(model_dir=zoo, max_body_bytes=100_000, max_spool_bytes=200_000) as client:
        write = containers._write

        def watched(*arguments: Any) -> int:
            began.append(metric(client, "pimc_spooled_bytes"))
            return write(*arguments)

        monkeypatch.setattr(containers, "_write", watched)
        refused = client.post("/embed", files=[zipped(60_000, 60_000)])
        assert (refused.status_code, refused.json()["code"]) == (413, "body_too_large")
        assert not began
        # What no caller may ever use is refused, too: a zip that is kept beside its members.
        noise = ("files", ("b.tif", bytes(60_000)))
        refused = client.post("/embed", files=[zipped(60_000), noise])
        assert (refused.status_code, refused.json()["code"]) == (413, "body_too_large")
        assert "PIMC_MAX_SPOOL_BYTES" in refused.json()["detail"]
        assert not began
        sent = zipped(40_000, 30_000)
        assert client.post("/embed", files=[sent]).json()["code"] == "not_a_geotiff"
        assert [number > 70_000 for number in began] == [True, True]
        assert soon(lambda: metric(client, "pimc_spooled_bytes") == 0)


# Clients that do not read the response ----------------------------------------------------------


@contextmanager
def paced(**pace: float) -> Iterator[tuple[tuple[str, int], threading.Event, list[str]]]:
    """A server with a long and a short response and limits on slow clients.

    Yields its address, an event that is set at the end of a response, and a list with one entry per
    complete response.
    """
    closed = threading.Event()
    completed: list[str] = []

    async def chunks(count: int) -> Any:
        for _ in range(count):
            yield b"y" * 2**16

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            long = scope["path"] == "/long"
            await StreamingResponse(chunks(10**6 if long else 16))(scope, receive, send)
            completed.append("complete")
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
        yield server.servers[0].sockets[0].getsockname()[:2], closed, completed
    finally:
        server.should_exit = server.force_exit = True
        thread.join(PATIENCE)


def test_a_response_that_the_client_does_not_read_is_aborted() -> None:
    with (
        paced(stall_seconds=0.2) as (where, closed, completed),
        socket.create_connection(where, PATIENCE) as caller,
    ):
        caller.sendall(b"GET /long HTTP/1.1\r\nHost: here\r\n\r\n")
        assert closed.wait(PATIENCE)
        assert completed == []


def test_a_response_that_the_client_reads_too_slowly_is_aborted() -> None:
    """The client reads each chunk in time, but the whole response would take too long."""
    with (
        paced(stall_seconds=0.5, slowest=2.0**40) as (where, closed, completed),
        socket.create_connection(where, PATIENCE) as caller,
    ):
        caller.sendall(b"GET /long HTTP/1.1\r\nHost: here\r\n\r\n")
        while not closed.wait(0.01):
            caller.recv(2**16)
        assert completed == []


def test_a_response_that_the_client_reads_is_complete() -> None:
    with paced(stall_seconds=PATIENCE) as (where, _, completed):
        connection = http.client.HTTPConnection(*where, timeout=PATIENCE)
        connection.request("GET", "/short")
        assert connection.getresponse().read() == b"y" * 2**20
        connection.close()
        assert soon(lambda: completed == ["complete"])
