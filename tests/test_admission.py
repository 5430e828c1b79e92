"""Admission control, `overloaded` and disconnects, over sockets."""

from __future__ import annotations

import http.client
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
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
from service.api.admission import Admission, FairSlots
from service.api.middleware import SlowClientMiddleware
from service.api.routes import tasks
from service.errors import Overloaded
from service.run.execute import execute
from service.run.plan import Plan
from service.run.request import SeriesRequest
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import stack
from tests.kits.patience import PATIENCE, soon

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


# The count itself ---------------------------------------------------------------------------


RATE = 2**14
ROOM = 2**30


@pytest.mark.anyio
async def test_slots_are_given_back_also_after_a_fault() -> None:
    admission = Admission(1, upload_rate=RATE, spool_bytes=ROOM)

    async def fail() -> None:
        async with admission.place("a") as place, admission.runs.slot("a"):
            place.received(1000)
            raise ValueError("inside")

    for _ in range(5):
        with pytest.raises(ValueError, match="inside"):
            await fail()
    assert (admission.held, admission.spooled, admission.runs.held) == (0, 0, 0)
    async with admission.place("a"), admission.place("a"):
        with pytest.raises(Overloaded) as caught:
            await admission.place("a").__aenter__()
        assert caught.value.retry_after > 0
        async with admission.place("b"):
            assert admission.held == 3


@pytest.mark.anyio
async def test_all_callers_together_are_bounded_too() -> None:
    admission = Admission(1, upload_rate=RATE, spool_bytes=ROOM)
    async with AsyncExitStack() as stack:
        for caller in range(16):
            place = await stack.enter_async_context(admission.place(str(caller)))
            place.uploaded()
        with pytest.raises(Overloaded, match="16 of 16"):
            await stack.enter_async_context(admission.place("another"))


@pytest.mark.anyio
async def test_one_caller_may_fill_half_of_the_room_for_bodies() -> None:
    admission = Admission(1, upload_rate=RATE, spool_bytes=1000)
    async with admission.place("a") as first:
        first.received(300)
        first.received(200)
        async with admission.place("b") as second:
            second.received(500)
            with pytest.raises(Overloaded, match="PIMC_MAX_SPOOL_BYTES"):
                first.received(1)
        with pytest.raises(Overloaded, match="half"):
            first.received(1)
        assert admission.spooled == 500


@pytest.mark.anyio
async def test_run_slots_go_to_the_caller_who_holds_fewest_and_then_in_turn() -> None:
    slots = FairSlots(2)
    order: list[str] = []
    held = {name: anyio.Event() for name in ("many", "few")}

    async def ask(caller: str) -> None:
        async with slots.slot(caller):
            order.append(caller)
            await held[caller].wait()

    async with anyio.create_task_group() as group:
        for caller in ("many",) * 5 + ("few",) * 2:
            group.start_soon(ask, caller)
            await anyio.wait_all_tasks_blocked()
        assert (order, slots.held, slots.awaited) == (["many", "many"], 2, 5)
        held["many"].set()  # both of its runs end; then one of each caller holds a slot
        await anyio.wait_all_tasks_blocked()
        assert order[2:4] == ["few", "many"]
        held["few"].set()
    assert sorted(order) == ["few"] * 2 + ["many"] * 5
    assert (slots.held, slots.awaited) == (0, 0)


@pytest.mark.anyio
async def test_callers_with_one_slot_among_them_take_turns() -> None:
    slots = FairSlots(1)
    order: list[str] = []

    async def ask(caller: str) -> None:
        async with slots.slot(caller):
            order.append(caller)

    async with anyio.create_task_group() as group, slots.slot("a"):
        for caller in ("a", "a", "a", "b", "b", "c"):
            group.start_soon(ask, caller)
            await anyio.wait_all_tasks_blocked()
    assert order == ["b", "c", "a", "b", "a", "a"]


@pytest.mark.anyio
async def test_places_come_in_the_order_of_asking_and_a_cancelled_wait_takes_none() -> None:
    slots = FairSlots(1)
    order: list[int] = []

    async def ask(number: int) -> None:
        async with slots.slot("a"):
            order.append(number)

    async with anyio.create_task_group() as group, slots.slot("a"):
        for number in range(3):
            group.start_soon(ask, number)
            await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(0.01) as waiting:
            await ask(3)
        assert waiting.cancelled_caught
        assert order == []
    assert order == [0, 1, 2]
    with anyio.fail_after(PATIENCE):
        await ask(4)


# A service whose runs wait at a gate, unless they are stopped ---------------------------------


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
    """One place, so two seats; its state lies elsewhere than what a request leaves."""
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


def test_a_caller_who_leaves_stops_the_work_and_frees_the_place(
    narrow: httpx.Client, held_upload: bytes, scratch: Path
) -> None:
    for _ in range(2):  # the second time needs what the first gave back
        with connected(narrow) as caller:
            caller.sendall(held_upload)
            assert soon(lambda: metric(narrow, "pimc_runs_in_flight") == 1)
        assert soon(lambda: metric(narrow, "pimc_runs_in_flight") == 0)
        assert soon(lambda: not any(scratch.glob("pimc-*/request-*")))
    assert metric(narrow, "pimc_windows_in_flight") == 0
    # It was stopped, not finished.
    assert metric(narrow, "pimc_pixels_total") == 0


def test_a_caller_who_leaves_the_queue_frees_its_seat(
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
                # Both seats are taken: the next is told at once, while the first still runs.
                refused = narrow.post("/classify-pixels", json={"series": []})
                assert refused.status_code == 503
                assert refused.json()["code"] == "overloaded"
                assert int(refused.headers["Retry-After"]) > 0
                assert metric(narrow, "pimc_runs_in_flight") == 1
            # Gone from the queue, though no place came free.
            assert soon(lambda: len(list(scratch.glob("pimc-*/request-*"))) == 1)
            assert metric(narrow, "pimc_runs_in_flight") == 1
        # The seat is there again: this one is looked at, and refused for what it says.
        assert narrow.post("/classify-pixels", json={"series": 3}).status_code == 422
    assert soon(lambda: metric(narrow, "pimc_runs_in_flight") == 0)
    assert metric(narrow, "pimc_pixels_total") == 0


# Callers who send slowly, and callers with many requests ---------------------------------------

SERIES = {
    "id": "a", "dates": ["2021-01-01", "2021-02-01"],
    "B02": [0.1, 0.2], "B04": [0.1, 0.2], "B08": [0.1, 0.2],
}  # fmt: skip
ANNA, BEN = {"X-API-Key": "anna"}, {"X-API-Key": "ben"}
LENGTH = 10**9


def embed(client: httpx.Client, count: int, headers: dict[str, str]) -> httpx.Response:
    return client.post("/embed", json={"series": [SERIES] * count}, headers=headers)


def dripping(client: httpx.Client, key: str, uploads: int, length: int = LENGTH) -> socket.socket:
    """The next upload that has sent one byte of many."""
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
                # The ones before still count: they are behind only after a second.
                rejected = connection.recv(2**16).startswith(b"HTTP/1.1 503 ")
                assert rejected
        connection.close()


def test_uploads_that_drip_shut_nobody_out(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    with (
        served(
            model_dir=zoo, max_concurrency=1, upload_seconds=600, api_keys=("anna", "ben")
        ) as client,
        ExitStack() as stack,
    ):
        drips = [stack.enter_context(dripping(client, "anna", n)) for n in (1, 2)]
        # Both of the key's slots, and none of another's.
        assert embed(client, 1, BEN).status_code == 200
        # Not for long: they are too slow to hold a slot.
        assert soon(lambda: embed(client, 1, ANNA).status_code == 200)
        assert metric(client, "pimc_uploads_in_flight") == 2
        drips += [stack.enter_context(dripping(client, "anna", n)) for n in (3, 4)]
        assert metric(client, "pimc_uploads_given_up_total") == 0
        # As many uploads as a caller may have: each further request ends the slowest of them.
        assert soon(lambda: embed(client, 1, ANNA).status_code == 200)
        told = drips[0].recv(2**16).decode()
        assert told.startswith("HTTP/1.1 408 ")
        assert '"body_stalled"' in told
        assert "16384 bytes per second" in told
        assert metric(client, "pimc_uploads_in_flight") == 3
        assert metric(client, "pimc_uploads_given_up_total") == 1
        for _ in range(3):
            assert embed(client, 1, ANNA).status_code == embed(client, 1, BEN).status_code == 200


def test_a_caller_with_many_requests_delays_another_by_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate lets one run after the other through; the number of series tells whose it is."""
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
            assert began.get(timeout=PATIENCE) == 7  # before two that came earlier
        finally:
            gate.release(9)
        assert {one.result(PATIENCE).status_code for one in [*many, few]} == {200}


def test_bodies_that_fill_their_room_are_refused(tmp_path: Path) -> None:
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
