"""Requests whose client leaves: every loop whose length a caller chooses ends. Over sockets.

Each case holds the work at a gate inside one loop, lets the client leave, opens the gate once the
server has noticed, and counts how often the loop goes on.
"""

from __future__ import annotations

import base64
import functools
import importlib
import json
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio.warp

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.api import disconnect, json_pieces, processes
from service.infer.model import LoadedModel
from service.run import windows
from tests.kits.jobs import ASYNC, waited
from tests.kits.patience import PATIENCE, soon
from tests.kits.rasters import NORTH_UP, UTM, write

SIDE, DATES = 48, 12
BANDS = ("B02", "B03", "B04", "B08")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of twelve dates that the service may read by reference."""
    path = tmp_path_factory.mktemp("stack")
    random = np.random.default_rng(1)
    for month in range(1, DATES + 1):
        bands = random.integers(500, 4000, (len(BANDS), SIDE, SIDE), np.uint16)
        write(path / f"s_2021-{month:02}-05.tif", bands, descriptions=BANDS)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in which many patches lie."""
    path = tmp_path_factory.mktemp("large")
    bands = np.random.default_rng(2).integers(500, 4000, (len(BANDS), 96, 96), np.uint16)
    write(path / "s_2021-01-05.tif", bands, descriptions=BANDS)
    return path


@pytest.fixture(scope="module")
def silent() -> Iterator[socket.socket]:
    """A host that accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE)
        yield server


@pytest.fixture(scope="module")
def api(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, large: Path, silent: socket.socket
) -> Iterator[httpx.Client]:
    zoo = write_zoo(tmp_path_factory.mktemp("zoo"))
    settings: dict[str, Any] = {
        "model_dir": zoo,
        "allowed_roots": (folder, large),
        "allowed_hosts": f"127.0.0.1:{silent.getsockname()[1]},127.0.0.0/8",
    }
    with served(**settings) as client:
        yield client


def degrees(row: float, column: float) -> list[float]:
    x, y = NORTH_UP * (column, row)
    (lon,), (lat,) = rasterio.warp.transform(UTM, "EPSG:4326", [x], [y])
    return [lon, lat]


def collection(*geometries: dict[str, Any], **properties: Any) -> dict[str, Any]:
    features = [
        {
            "type": "Feature",
            "geometry": one,
            "properties": {name: values[n] for name, values in properties.items()},
        }
        for n, one in enumerate(geometries)
    ]
    return {"type": "FeatureCollection", "features": features}


def point(row: int, column: int) -> dict[str, Any]:
    return {"type": "Point", "coordinates": degrees(row + 0.5, column + 0.5)}


def square(row: int, column: int, side: int) -> dict[str, Any]:
    corners = [(0, 0), (0, side), (side, side), (side, 0), (0, 0)]
    return {
        "type": "Polygon",
        "coordinates": [[degrees(row + r, column + c) for r, c in corners]],
    }


POINTS = collection(*[point(n, n) for n in range(40)])
CENTRES = collection(*[point(32 + n % 32, 32 + n // 2) for n in range(40)])
FIELDS = collection(*[square(6 * n, 6 * n, 5) for n in range(7)])
LABELS = collection(
    *[square(4 * n, 4 * n, 4) for n in range(12)], **{"class": ["wheat", "maize"] * 6}
)
SERIES = [
    {"id": str(n), "dates": [f"2021-{m:02}-05" for m in range(1, 13)],
     **{band: [0.1 + 0.001 * n] * 12 for band in BANDS}}
    for n in range(64)
]  # fmt: skip
LABELLED = [{**one, "class": f"class {n % 2}"} for n, one in enumerate(SERIES)]


@dataclass
class Gate:
    """Counts the calls of a function; the first one waits until the server notices the client."""

    noticed: threading.Event
    reached: threading.Event = field(default_factory=threading.Event)
    holds: bool = False
    calls: int = 0

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def held(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            self.reached.set()
            if self.holds:
                assert self.noticed.wait(PATIENCE)
            return work(*arguments, **options)

        return held


@pytest.fixture
def noticed(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once the server has noticed that the client has left."""
    event = threading.Event()
    watch = disconnect._watch_disconnect

    async def watched(*arguments: Any) -> None:
        await watch(*arguments)
        event.set()

    monkeypatch.setattr(disconnect, "_watch_disconnect", watched)
    return event


def sent(path: str, body: dict[str, Any]) -> bytes:
    """A request, as bytes of HTTP."""
    return raw(httpx.Request("POST", f"http://here{path}", json=body))


def raw(request: httpx.Request) -> bytes:
    """A request, as bytes of HTTP."""
    head = f"POST {request.url.raw_path.decode()} HTTP/1.1\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in request.headers.items()
    )
    return f"{head}Connection: close\r\n\r\n".encode() + request.read()


def connected(api: httpx.Client) -> socket.socket:
    return socket.create_connection((api.base_url.host, api.base_url.port or 80), PATIENCE)


def in_flight(api: httpx.Client) -> float:
    text = api.get("/metrics").text
    return float(text.split("\npimc_runs_in_flight ")[1].split("\n")[0])


DECODE = "service.read.reader:StackReader._decode"
PREDICT = "service.infer.model:LoadedModel.pixels"
COVER = "service.run.coverage:FieldGrid.coverage"
RECORD = "service.write.predictions:ClassPredictions.record"
OUTLINE = "service.write.polygons:_with_nodes"
FIT = "service.learn.kernel:_left_out"
READ = "service.read.vectors:_json_object"
PATCH = "service.infer.model:LoadedModel.patches"
CHECKED = "service.run.series:_prepare"
RESULT = "service.run.series:_result"
HEADER = "service.read.stack:read_header"

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "map: headers": ("/classify-pixels", {}, HEADER),
    "measured points: headers": ("/series", {"points": POINTS}, HEADER),
    "own classes: headers": ("/heads", {"name": "own", "labels": LABELS}, HEADER),
    "validate: headers": ("/validate?task=classify-pixels", {}, HEADER),
    "map: sample": ("/classify-pixels", {}, DECODE),
    "map: windows": ("/classify-pixels", {}, PREDICT),
    "map of embeddings": ("/embed", {}, PREDICT),
    "map of forecasts": ("/forecast", {}, PREDICT),
    "map of patches": ("/landcover", {"stride": 1}, PATCH),
    "points of patches": ("/landcover", {"points": CENTRES}, PATCH),
    "map: outlines": ("/classify-pixels", {"outputs": ["polygons"]}, OUTLINE),
    "points": ("/classify-pixels", {"points": POINTS}, PREDICT),
    "points: records": ("/classify-pixels", {"points": POINTS}, RECORD),
    "points: attribution": (
        "/classify-pixels", {"points": POINTS, "outputs": ["attribution"]}, PREDICT,
    ),
    "fields": ("/classify-pixels", {"fields": FIELDS}, COVER),
    "fields: reading": ("/classify-pixels", {"fields": FIELDS}, READ),
    "similar: reading": ("/similar", {"fields": FIELDS}, READ),
    "measured fields: reading": ("/series", {"fields": FIELDS}, READ),
    "own classes: reading": ("/heads", {"name": "own", "labels": LABELS}, READ),
    "fields: records": ("/classify-pixels", {"fields": FIELDS}, RECORD),
    "series": ("/classify-pixels", {"series": SERIES}, PREDICT),
    "series: checks": ("/classify-pixels", {"series": SERIES}, CHECKED),
    "series: results": ("/classify-pixels", {"series": SERIES}, RESULT),
    "validate: series": ("/validate?task=classify-pixels", {"series": SERIES}, CHECKED),
    "series: attribution": (
        "/classify-pixels", {"series": SERIES, "outputs": ["attribution"]}, PREDICT,
    ),
    "forecast: backtest of fields": ("/forecast", {"fields": FIELDS, "backtest": True}, PREDICT),
    "forecast: backtest of series": ("/forecast", {"series": SERIES, "backtest": True}, PREDICT),
    "embedding of points": ("/embed", {"points": POINTS}, PREDICT),
    "similar: places": ("/similar", {"fields": FIELDS}, COVER),
    "similar: points": ("/similar", {"points": POINTS}, PREDICT),
    "validate": ("/validate?task=classify-pixels", {}, DECODE),
    "measured points": ("/series", {"points": POINTS}, DECODE),
    "measured fields": ("/series", {"fields": FIELDS}, COVER),
    "own classes: labels": ("/heads", {"name": "own", "labels": LABELS}, COVER),
    "own classes: features": ("/heads", {"name": "own", "labels": LABELS}, PREDICT),
    "own classes: fit": ("/heads", {"name": "own", "labels": LABELS}, FIT),
    "own classes: series": ("/heads", {"name": "own", "series": LABELLED}, CHECKED),
    "own classes: features of series": ("/heads", {"name": "own", "series": LABELLED}, PREDICT),
    "process": (
        "/processes/classify-pixels/execution", {"points": POINTS}, PREDICT,
    ),
}  # fmt: skip


def body_of(path: str, parameters: dict[str, Any], folder: Path) -> dict[str, Any]:
    files = [str(one) for one in sorted(folder.glob("*.tif"))]
    if "series" in parameters:
        return parameters
    if path.startswith("/processes/"):
        links = [{"href": file} for file in files]
        return {"inputs": {"files": links, **parameters}}
    return {"items": [{"href": file} for file in files], **parameters}


def patched(monkeypatch: pytest.MonkeyPatch, where: str, gate: Gate) -> None:
    module, _, name = where.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, last = name.split(".")
    for one in owners:
        owner = getattr(owner, one)
    monkeypatch.setattr(owner, last, gate.around(getattr(owner, last)))


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops of many short turns: batches of eight pixels, windows of few pixels."""
    monkeypatch.setattr(LoadedModel, "chunk", property(lambda _: 8))
    monkeypatch.setattr(windows, "COVERED_CELLS", 40)
    monkeypatch.setattr("service.infer.attribution._ROWS", 1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_loop_ends_once_the_client_has_left(
    api: httpx.Client,
    folder: Path,
    large: Path,
    noticed: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    path, parameters, where = CASES[case]
    body = body_of(path, parameters, large if path == "/landcover" else folder)
    whole, gate = Gate(noticed), Gate(noticed, holds=True)
    with monkeypatch.context() as counting:
        patched(counting, where, whole)
        response = api.post(path, json=body)
        assert response.status_code in {200, 201}, response.text
    api.delete("/heads/own")
    patched(monkeypatch, where, gate)
    with connected(api) as caller:
        caller.sendall(sent(path, body))
        assert gate.reached.wait(PATIENCE)
    assert noticed.wait(PATIENCE)
    assert soon(lambda: in_flight(api) == 0)
    # Threads that read, predict and write at once may each have begun a turn.
    assert gate.calls <= min(4, whole.calls / 2), (gate.calls, whole.calls)
    assert api.get("/health/live").status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body", "parser"),
    [
        ("/classify-pixels", {"series": SERIES}, "service.api.routes.tasks:read_series"),
        (
            "/heads",
            {"name": "own", "series": LABELLED},
            "service.api.routes.heads:read_head_series",
        ),
        (
            "/processes/embed/execution",
            {"inputs": {"series": [{"value": one} for one in SERIES]}},
            "service.api.routes.processes:read_execute",
        ),
    ],
)
def test_one_long_body_is_parsed_at_a_time_and_none_whose_client_has_left(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, body: Any, parser: str
) -> None:
    monkeypatch.setattr(disconnect, "SHORT_BODY", 0)
    waits, gone, opened = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
    watch, unless_gone = disconnect._watch_disconnect, disconnect.unless_gone

    async def watched(*arguments: Any) -> None:
        await watch(*arguments)
        gone.release()

    async def waiting(*arguments: Any) -> Any:
        waits.release()
        return await unless_gone(*arguments)

    monkeypatch.setattr(disconnect, "_watch_disconnect", watched)
    monkeypatch.setattr(disconnect, "unless_gone", waiting)
    gate = Gate(opened, holds=True)
    patched(monkeypatch, parser, gate)
    with connected(api) as first, connected(api) as second:
        first.sendall(sent(path, body))
        assert gate.reached.wait(PATIENCE)
        second.sendall(sent(path, body))
        # Its body has been read to the end, so that its parser is next.
        assert waits.acquire(timeout=PATIENCE)
        assert waits.acquire(timeout=PATIENCE)
    assert gone.acquire(timeout=PATIENCE)
    assert gone.acquire(timeout=PATIENCE)
    opened.set()
    assert soon(lambda: "pimc_requests_in_flight 1.0" in api.get("/metrics").text)
    assert gate.calls == 1


def form(path: str, folder: Path, **parameters: str) -> httpx.Request:
    files = [
        ("files", (one.name, one.read_bytes(), "image/tiff"))
        for one in sorted(folder.glob("*.tif"))
    ]
    return httpx.Request("POST", f"http://here{path}", data=parameters, files=files)


def execution(folder: Path) -> httpx.Request:
    files = [
        {"value": base64.b64encode(one.read_bytes()).decode()}
        for one in sorted(folder.glob("*.tif"))
    ]
    dates = [f"2021-{month:02}-05" for month in range(1, DATES + 1)]
    path = "http://here/processes/classify-pixels/execution"
    return httpx.Request("POST", path, json={"inputs": {"files": files, "dates": dates}})


BODIES: dict[str, tuple[Callable[[Path], httpx.Request], str]] = {
    "series": (
        lambda _: httpx.Request("POST", "http://here/embed", json={"series": SERIES}),
        "service.api.json_pieces:check_connected",
    ),
    "points of a form": (
        lambda folder: form("/classify-pixels", folder, points=json.dumps(POINTS)),
        "service.api.json_pieces:check_connected",
    ),
    "values of an execution": (
        lambda _: httpx.Request(
            "POST",
            "http://here/processes/embed/execution",
            json={"inputs": {"series": [{"value": one} for one in SERIES]}},
        ),
        "service.api.routes.processes:check_connected",
    ),
    "files in base64": (execution, "service.api.processes:check_connected"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BODIES)
def test_a_body_is_no_longer_parsed_once_the_client_has_left(
    api: httpx.Client,
    folder: Path,
    noticed: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    monkeypatch.setattr(disconnect, "SHORT_BODY", 0)
    monkeypatch.setattr(json_pieces, "PIECE_BYTES", 100)
    monkeypatch.setattr(processes, "_CHARACTERS", 1000)
    make, where = BODIES[case]
    request = make(folder)
    content = request.read()
    whole, gate = Gate(noticed), Gate(noticed, holds=True)
    with monkeypatch.context() as counting:
        patched(counting, where, whole)
        kind = {"Content-Type": request.headers["Content-Type"]}
        response = api.post(request.url.path, content=content, headers=kind)
        assert response.status_code == 200, response.text
    patched(monkeypatch, where, gate)
    with connected(api) as caller:
        caller.sendall(raw(request))
        assert gate.reached.wait(PATIENCE)
    assert noticed.wait(PATIENCE)
    assert soon(lambda: "pimc_requests_in_flight 1.0" in api.get("/metrics").text)
    assert gate.calls == 1 < whole.calls / 10, (gate.calls, whole.calls)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["smooth=2", "min_area=0.3"])
def test_a_derived_map_ends_once_the_client_has_left(
    api: httpx.Client,
    folder: Path,
    noticed: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    body = body_of("", {"outputs": ["class", "probabilities"]}, folder)
    job = api.post("/classify-pixels", json=body, headers=ASYNC).json()["jobID"]
    waited(api, job)
    gate = Gate(noticed, holds=True)
    # Smoothing looks before each window; joining areas looks before each thousandth.
    patched(monkeypatch, "service.run.derive:read_around", gate)
    patched(monkeypatch, "service.run.derive:sieved", gate)
    path = f"/jobs/{job}/result/polygons?{how}"
    outlines = Gate(noticed)
    patched(monkeypatch, OUTLINE, outlines)
    with connected(api) as caller:
        caller.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
        assert gate.reached.wait(PATIENCE)
    assert noticed.wait(PATIENCE)
    assert soon(lambda: "pimc_run_slots_held 0.0" in api.get("/metrics").text)
    assert outlines.calls == 0
    # It was not kept half made: the next client receives all of it.
    assert api.get(path).status_code == 200
    assert outlines.calls > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/classify-pixels", "/series", "/heads", "/processes/embed"])
def test_a_zip_is_no_longer_unpacked_once_the_client_has_left(
    api: httpx.Client,
    folder: Path,
    noticed: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    sources = sorted(folder.glob("*.tif"))
    packed = folder / "stack.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for source in sources:
            archive.write(source, source.name)
    if path.startswith("/processes/"):
        path, body = f"{path}/execution", {"inputs": {"files": [{"href": str(packed)}]}}
    else:
        body = {"items": [{"href": str(packed)}]}
        body |= {"name": "own", "labels": LABELS} if path == "/heads" else {"points": POINTS}
    gate = Gate(noticed, holds=True)
    patched(monkeypatch, "service.read.containers:_write", gate)
    with connected(api) as caller:
        caller.sendall(sent(path, body))
        assert gate.reached.wait(PATIENCE)
    assert noticed.wait(PATIENCE)
    # Only this request for the metrics is in flight.
    assert soon(lambda: "pimc_requests_in_flight 1.0" in api.get("/metrics").text)
    assert gate.calls == 1 < len(sources)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/classify-pixels", "/series", "/heads", "/processes/embed"])
def test_files_are_no_longer_fetched_once_the_client_has_left(
    api: httpx.Client, silent: socket.socket, noticed: threading.Event, path: str
) -> None:
    href = f"http://127.0.0.1:{silent.getsockname()[1]}/s_2021-01-05.tif"
    if path.startswith("/processes/"):
        path, body = f"{path}/execution", {"inputs": {"files": [{"href": href}]}}
    else:
        body = {"items": [{"href": href}], "points": POINTS}
        if path == "/heads":
            body = {"items": body["items"], "name": "own", "labels": LABELS}
    with connected(api) as caller:
        caller.sendall(sent(path, body))
        fetched, _ = silent.accept()
    with fetched:
        assert noticed.wait(PATIENCE)
        # The server reads no more from that host: it has closed the connection.
        fetched.settimeout(PATIENCE)
        while fetched.recv(4096):
            pass
        # Only this request for the metrics is in flight.
        assert soon(lambda: "pimc_requests_in_flight 1.0" in api.get("/metrics").text)
