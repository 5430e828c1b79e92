"""Results of jobs over sockets: ranges, HEAD, files made once, bounded readers, ownership."""

from __future__ import annotations

import io
import json
import socket
import threading
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from benchmarks.process import served as served_alone
from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.api.http_protocol import Connections, ProtocolFactory
from service.api.responses import COG, CSV, PARQUET
from service.api.sending import chosen_range
from service.errors import InvalidRange
from service.jobs.job import Job
from service.jobs.job_requests import JobRequests
from tests.kits.jobs import ASYNC, SERIES, Files, stack, waited
from tests.kits.metrics import metric
from tests.kits.patience import PATIENCE, soon

FIELDS = {
    "type": "FeatureCollection",
    "features": [
        {
            "type": "Feature",
            "properties": {"owner": "Ana"},
            "geometry": {
                "type": "Polygon",
                "coordinates": [
                    [[3.0, 50.5], [3.01, 50.5], [3.01, 50.53], [3.0, 50.53], [3.0, 50.5]]
                ],
            },
        }
    ],
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def api(zoo: Path, state: Path) -> Iterator[httpx.Client]:
    with served(model_dir=zoo, state_dir=state) as client:
        yield client


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return stack(tmp_path_factory.mktemp("stack"), 20, 30)


@pytest.fixture(scope="module")
def job(api: httpx.Client, files: Files) -> str:
    """A finished job with two rasters."""
    return done(api, files, outputs="class,confidence")


def done(api: httpx.Client, files: Files, **data: str) -> str:
    response = api.post("/classify-pixels", files=files, data=data, headers=ASYNC)
    assert waited(api, response.json()["jobID"])["status"] == "successful"
    return str(response.json()["jobID"])


# Ranges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=10-19", (10, 20)),
        ("BYTES = 10 - 19", (10, 20)),
        ("bytes=90-", (90, 100)),
        ("bytes=90-1000", (90, 100)),
        ("bytes=-7", (93, 100)),
        ("bytes=-1000", (0, 100)),
        # One range only; the whole is a valid response to several, and to other units.
        ("bytes=0-1,5-6", None),
        ("pages=1-2", None),
        ("", None),
        (None, None),
    ],
)
def test_a_range_is_read_as_the_standard_has_it(
    header: str | None, expected: tuple[int, int] | None
) -> None:
    assert chosen_range(header, 100) == expected


MALFORMED = ["bytes=", "bytes=-", "bytes=a-b", "bytes=5-2", "bytes=1-2-3", "bytes=1,2", "bytes"]
OUTSIDE = ["bytes=100-", "bytes=100-101", "bytes=-0", "bytes=99999999999999999999-"]


@pytest.mark.parametrize("header", [*MALFORMED, *OUTSIDE, "bytes=²-3", "bytes=0-1,x"])
def test_a_range_outside_the_file_is_an_error(header: str) -> None:
    with pytest.raises(InvalidRange):
        chosen_range(header, 100)


@pytest.mark.parametrize("path", ["", "/class", "/confidence"])
def test_a_part_of_a_result_can_be_read(api: httpx.Client, job: str, path: str) -> None:
    url = f"/jobs/{job}/result{path}"
    complete = api.get(url)
    assert complete.headers["Accept-Ranges"] == "bytes"
    size = len(complete.content)
    for header, part in (("bytes=3-9", slice(3, 10)), ("bytes=-5", slice(size - 5, size))):
        response = api.get(url, headers={"Range": header})
        assert (response.status_code, response.content) == (206, complete.content[part])
        span = f"bytes {part.start}-{part.stop - 1}/{size}"
        assert response.headers["Content-Range"] == span
        assert response.headers["ETag"] == complete.headers["ETag"]


@pytest.mark.parametrize("header", ["bytes=a-b", "bytes=9-2", "junk", "bytes=999999999-"])
def test_a_malformed_range_is_a_problem_like_any_other(
    api: httpx.Client, job: str, header: str
) -> None:
    for url in (f"/jobs/{job}/result", f"/jobs/{job}/result/class", "/docs/swagger-ui.css"):
        size = len(api.get(url).content)
        response = api.get(url, headers={"Range": header})
        assert response.headers["Content-Type"] == "application/problem+json"
        assert (response.status_code, response.json()["code"]) == (416, "invalid_range")
        assert response.headers["Content-Range"] == f"bytes */{size}"


def test_conditions_decide_whether_and_how_much_is_sent(api: httpx.Client, job: str) -> None:
    url = f"/jobs/{job}/result/class"
    complete = api.get(url)
    tag, modified = complete.headers["ETag"], complete.headers["Last-Modified"]
    for name in (tag, modified):
        part = api.get(url, headers={"Range": "bytes=0-3", "If-Range": name})
        assert (part.status_code, part.content) == (206, complete.content[:4])
    stale = api.get(url, headers={"Range": "bytes=0-3", "If-Range": '"other"'})
    assert (stale.status_code, stale.content) == (200, complete.content)
    for name in (tag, f'"other", W/{tag}', "*"):
        known = api.get(url, headers={"If-None-Match": name})
        assert (known.status_code, known.content, known.headers["ETag"]) == (304, b"", tag)
    assert api.get(url, headers={"If-None-Match": '"other"'}).status_code == 200


# HEAD -----------------------------------------------------------------------------------------


def test_head_is_get_without_the_body(api: httpx.Client, job: str) -> None:
    paths = ["", "/result", "/result/class"]
    for url in [*(f"/jobs/{job}{path}" for path in paths), "/jobs", "/models", "/health/live", "/"]:
        got, head = api.get(url), api.head(url)
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert set(head.headers) == set(got.headers)
        for name in ("Content-Type", "Content-Length", "ETag", "PIMC-Model"):
            assert head.headers.get(name) == got.headers.get(name)
    part = api.head(f"/jobs/{job}/result/class", headers={"Range": "bytes=0-3"})
    assert (part.status_code, part.headers["Content-Length"]) == (206, "4")


def test_after_a_head_the_connection_serves_the_next_request(api: httpx.Client, job: str) -> None:
    """A body in spite of all would be taken for the next response."""
    with socket.create_connection(
        (api.base_url.host, api.base_url.port), timeout=PATIENCE
    ) as connection:
        head = f"HEAD /jobs/{job}/result HTTP/1.1\r\nHost: a\r\n\r\n"
        last = "GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        connection.sendall((head + last).encode())
        responses = b""
        while part := connection.recv(2**16):
            responses += part
    first, _, second = responses.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200")
    assert second.startswith(b"HTTP/1.1 200")


def test_a_path_without_get_has_no_head(api: httpx.Client) -> None:
    response = api.head("/forecast")
    assert (response.status_code, response.headers["Allow"]) == (405, "POST")
    assert "HEAD" in api.post("/models").headers["Allow"]


# Made once ------------------------------------------------------------------------------------


def test_a_zip_is_made_once_and_for_all(
    api: httpx.Client, state: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = done(api, files, outputs="class,entropy")
    made: list[Path] = []
    from service.api import responses

    plain = responses.zip_files
    everybody = threading.Barrier(8)

    def counted(rasters: object, path: Path) -> Path:
        made.append(path)
        return plain(rasters, path)  # type: ignore[arg-type]

    monkeypatch.setattr(responses, "zip_files", counted)
    found: list[bytes] = []

    def ask() -> None:
        everybody.wait()
        found.append(api.get(f"/jobs/{job}/result").content)

    readers = [threading.Thread(target=ask) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(made) == 1
    assert len(found) == 8
    assert len(set(found)) == 1
    with zipfile.ZipFile(io.BytesIO(found[0])) as archive:
        assert archive.testzip() is None
    assert [p.name for p in (state / "jobs" / job / "ready").iterdir()] == ["classify-pixels.zip"]
    api.delete(f"/jobs/{job}")
    assert not (state / "jobs" / job).exists()


def test_a_zip_that_cannot_be_written_leaves_nothing_and_is_made_later(
    api: httpx.Client, state: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = done(api, files, outputs="class,entropy")
    from service.api import responses

    def full(rasters: object, path: Path) -> Path:
        path.write_bytes(b"PK and then no room")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(responses, "zip_files", full)
        response = api.get(f"/jobs/{job}/result")
        assert (response.status_code, response.json()["code"]) == (507, "insufficient_storage")
    assert list((state / "jobs" / job / "ready").iterdir()) == []
    assert zipfile.ZipFile(io.BytesIO(api.get(f"/jobs/{job}/result").content)).testzip() is None


@pytest.mark.parametrize("accept", [CSV, PARQUET, "application/geo+json"])
def test_fields_of_a_job_are_the_synchronous_response(
    api: httpx.Client, files: Files, accept: str
) -> None:
    data, headers = {"fields": json.dumps(FIELDS)}, {"Accept": accept}
    at_once = api.post("/classify-pixels", files=files, data=data, headers=headers)
    assert at_once.status_code == 200, at_once.text
    job = done(api, files, **data)
    for _ in range(2):
        later = api.get(f"/jobs/{job}/result", headers=headers)
        assert later.content == at_once.content
        assert later.headers["Content-Type"] == at_once.headers["Content-Type"]
        assert later.headers.get("Content-Disposition") == at_once.headers.get(
            "Content-Disposition"
        )


def test_a_long_document_is_a_file_also_at_once(api: httpx.Client) -> None:
    many = {"series": [{**SERIES["series"][0], "id": f"field-{n:05d}"} for n in range(400)]}
    at_once = api.post("/classify-pixels", json=many)
    assert len(at_once.content) > 2**16
    assert [entry["id"] for entry in at_once.json()["results"]] == [s["id"] for s in many["series"]]
    job = api.post("/classify-pixels", json=many, headers=ASYNC).json()["jobID"]
    assert waited(api, job)["status"] == "successful"
    assert api.get(f"/jobs/{job}/result").content == at_once.content


@pytest.mark.slow
def test_half_a_zip_of_a_killed_service_is_removed(zoo: Path, files: Files, tmp_path: Path) -> None:
    with served(model_dir=zoo, state_dir=tmp_path) as api:
        job = done(api, files, outputs="class,entropy")
        complete = api.get(f"/jobs/{job}/result").content
    ready = tmp_path / "jobs" / job / "ready"
    (ready / "half-classify-pixels.zip").write_bytes(complete[:100])
    with served(model_dir=zoo, state_dir=tmp_path) as api:
        assert [path.name for path in ready.iterdir()] == ["classify-pixels.zip"]
        assert api.get(f"/jobs/{job}/result").content == complete


@pytest.mark.slow
def test_a_result_of_the_release_before_is_served(zoo: Path, files: Files, tmp_path: Path) -> None:
    """Its document stood in the same file as all else."""
    with served(model_dir=zoo, state_dir=tmp_path) as api:
        job = done(api, files)
        document = api.get(f"/jobs/{job}/result", headers={"Accept": "application/json"}).content
    result = tmp_path / "jobs" / job / "result-1"
    head = json.loads((result / "reply.json").read_text())
    (result / "reply.json").write_text(json.dumps({**head, "document": json.loads(document)}))
    (result / "document.json").unlink()
    with served(model_dir=zoo, state_dir=tmp_path) as api:
        again = api.get(f"/jobs/{job}/result", headers={"Accept": "application/json"})
        assert again.content == document
        assert again.headers["PIMC-Model"] == head["model"]
        assert api.get(f"/jobs/{job}/result").headers["Content-Type"] == COG
    assert "document" not in json.loads((result / "reply.json").read_text())


# Readers who do not read ----------------------------------------------------------------------


def deaf(host: str, port: int, path: str, **headers: str) -> socket.socket:
    """A reader with a tiny buffer that sends a request and never reads."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
    connection.settimeout(PATIENCE)
    connection.connect((host, port))
    lines = [f"GET {path} HTTP/1.1", "Host: a", *(f"{k}: {v}" for k, v in headers.items())]
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    return connection


@pytest.mark.slow
def test_the_number_of_readers_is_bounded_per_caller_and_in_total(
    zoo: Path, files: Files, tmp_path: Path
) -> None:
    with served(
        model_dir=zoo,
        state_dir=tmp_path,
        api_keys=("anna", "ben", "carla"),
        max_downloads=2,
        max_downloads_per_caller=1,
    ) as api:
        urls = {}
        for key in ("anna", "ben", "carla"):
            api.headers["X-API-Key"] = key
            job = done(api, files)
            urls[key] = f"/jobs/{job}/result"
            enlarge(tmp_path / "jobs" / job / "result-1" / "class.tif")
        where = api.base_url.host, api.base_url.port
        with ExitStack() as held:
            held.enter_context(deaf(*where, urls["anna"], **{"X-API-Key": "anna"}))
            assert soon(lambda: metric(api, "pimc_downloads") == 1)
            api.headers["X-API-Key"] = "anna"
            refused = api.get(urls["anna"])
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            assert "PIMC_MAX_DOWNLOADS_PER_CALLER" in refused.json()["detail"]
            assert int(refused.headers["Retry-After"]) > 0
            held.enter_context(deaf(*where, urls["ben"], **{"X-API-Key": "ben"}))
            assert soon(lambda: metric(api, "pimc_downloads") == 2)
            api.headers["X-API-Key"] = "carla"
            refused = api.get(urls["carla"])
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            for bound in ("caller", "all"):
                assert metric(api, f'pimc_downloads_rejected_total{{bound="{bound}"}}') == 1
        assert soon(lambda: metric(api, "pimc_downloads") == 0)
        assert api.get(urls["carla"], headers={"Range": "bytes=0-3"}).status_code == 206


MEGABYTES = 48


def enlarge(path: Path) -> None:
    """Append more bytes than the buffers of a connection hold."""
    with path.open("ab") as file:
        for _ in range(MEGABYTES):
            file.write(bytes(2**20))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class.tif", "document.json"])
def test_clients_that_never_read_cost_neither_memory_nor_disk(
    zoo: Path, files: Files, tmp_path: Path, name: str
) -> None:
    """As copies, or in memory, what sixteen readers are owed would be 768 MB."""
    settings = {"PIMC_MODEL_DIR": str(zoo), "PIMC_STATE_DIR": str(tmp_path)}
    with (
        served_alone(PIMC_PROVIDERS="cpu", **settings) as service,
        httpx.Client(base_url=service.url, timeout=PATIENCE) as api,
        ExitStack() as held,
    ):
        job = done(api, files)
        enlarge(tmp_path / "jobs" / job / "result-1" / name)
        accept = {"Accept": "application/json" if name == "document.json" else "image/tiff"}
        before, on_disk = service.resident(), stored(tmp_path)
        for _ in range(16):
            path = f"/jobs/{job}/result"
            held.enter_context(deaf(service.host, service.port, path, **accept))
        assert soon(lambda: service.metric("pimc_downloads") == 16)
        assert api.get(f"/jobs/{job}/result", headers=accept).status_code == 503
        assert api.get("/health/live").status_code == 200
        assert service.resident() - before < MEGABYTES * 2**20
        assert stored(tmp_path) - on_disk < MEGABYTES * 2**20
        assert service.leftovers() == []
        held.close()
        assert soon(lambda: service.metric("pimc_downloads") == 0)
        assert len(api.get(f"/jobs/{job}/result", headers=accept).content) > MEGABYTES * 2**20


@pytest.mark.parametrize("kind", ["series", "points", "execution", "map"])
def test_many_readers_of_a_result_parse_its_request_once(
    api: httpx.Client, files: Files, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A request may have 31 MB, which take a second and hundreds of megabytes to parse."""
    if kind == "execution":
        sent = {"inputs": {"series": [{"value": one} for one in SERIES["series"]]}}
        job = api.post("/processes/embed/execution", json=sent, headers=ASYNC).json()["jobID"]
        paths = [f"/jobs/{job}/results", f"/jobs/{job}/result"]
    elif kind == "series":
        job = api.post("/embed", json=SERIES, headers=ASYNC).json()["jobID"]
        paths = [f"/jobs/{job}/result", f"/jobs/{job}/results"]
    else:
        point = {"type": "Point", "coordinates": [3.0001, 50.5499]}
        feature = {"type": "Feature", "properties": {}, "geometry": point}
        points = json.dumps({"type": "FeatureCollection", "features": [feature]})
        job = done(api, files, **({"points": points} if kind == "points" else {}))
        paths = [f"/jobs/{job}/result", f"/jobs/{job}/results"]
    assert waited(api, job)["status"] == "successful"
    parsed = []
    whole = JobRequests._document

    def counted(requests: JobRequests, one: Job) -> Any:
        parsed.append(one.id)
        return whole(requests, one)

    monkeypatch.setattr(JobRequests, "_document", counted)
    for path in paths * 5:
        assert api.get(path).status_code == 200, path
    assert len(parsed) <= 1


@pytest.mark.slow
def test_a_client_that_never_reads_is_disconnected(
    zoo: Path, files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(model_dir=zoo, state_dir=tmp_path, send_seconds=0.3) as api:
        job = done(api, files)
        enlarge(tmp_path / "jobs" / job / "result-1" / "class.tif")
        with deaf(api.base_url.host, api.base_url.port, f"/jobs/{job}/result"):
            assert soon(lambda: metric(api, UNREAD) == 1)
            # Its place and its socket are free, while the reader still holds its own end.
            assert soon(lambda: metric(api, "pimc_downloads") == 0)
            assert soon(lambda: metric(api, "pimc_connections") == 1)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


UNREAD = 'pimc_connections_given_up_total{reason="unread"}'


@pytest.mark.parametrize("close", [False, True])
def test_a_body_that_was_sent_at_once_and_is_not_read_is_dropped(close: bool) -> None:
    """The response has ended for the application; what is left of it lies in the server."""
    given_up: list[str] = []
    left = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        head = [(b"content-length", b"%d" % 2**26)] + [(b"connection", b"close")] * close
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": bytes(2**26)})

    connections = Connections(
        most=10,
        most_per_address=10,
        send_seconds=0.3,
        changed=lambda count: None if count else left.set(),
        given_up=given_up.append,
    )
    factory: Any = ProtocolFactory(connections=connections, head_seconds=60)
    config = uvicorn.Config(app, port=0, http=factory, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert soon(lambda: server.started)
    try:
        with (
            pytest.MonkeyPatch.context() as patched,
            socket.socket() as reader,
        ):
            # Unread bytes add to the time in which they must be read: here, next to nothing.
            patched.setattr("service.api.http_protocol.SLOWEST_BYTES", 2.0**40)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
            reader.connect(server.servers[0].sockets[0].getsockname()[:2])
            reader.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert left.wait(PATIENCE)
            assert given_up == ["unread"]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(PATIENCE)


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
