"""Request bodies: streamed to disk in any chunks, bounded, and removed afterwards."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.api import uploads as intake
from service.api.admission import Admission
from service.api.disconnect import run_watched
from service.api.schemas.parameter_types import Offset, listed
from service.api.schemas.validation import read_items, read_parameters
from service.api.uploads import Form, Limits, media_type, read_form, read_json
from service.errors import (
    BodyStalled,
    BodyTooLarge,
    Cancelled,
    InvalidRequest,
    PIMCError,
    UnsupportedMedia,
)
from service.read.geotiff import label
from service.run.executors import check
from tests.kits.clock import JumpingClock
from tests.kits.patience import PATIENCE, soon
from tests.kits.rasters import write

BOUNDARY = "edge"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def request_of(
    pieces: list[bytes], kind: str = f"multipart/form-data; boundary={BOUNDARY}", **headers: str
) -> Request:
    """A request whose body comes in these pieces; after the last, silence."""
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        if not left:
            await anyio.sleep_forever()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    named = {"content-type": kind, **{k.replace("_", "-"): v for k, v in headers.items()}}
    raw = [(name.encode(), value.encode()) for name, value in named.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    called = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{called}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def body_of(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def taken(pieces: list[bytes], folder: Path, limits: Limits | None = None, **how: str) -> Form:
    bounds = limits or Limits(body_bytes=10**7)
    return anyio.run(form_of, request_of(pieces, **how), folder, bounds)


async def form_of(request: Request, folder: Path, limits: Limits) -> Form:
    admission = Admission(1, upload_rate=limits.rate, spool_bytes=10**10, memory_bytes=10**10)
    async with admission.admit("") as admitted:
        return await read_form(request, folder, limits, admitted)


async def json_of(request: Request, limits: Limits) -> bytes:
    admission = Admission(1, upload_rate=limits.rate, spool_bytes=10**10, memory_bytes=10**10)
    async with admission.admit("") as admitted:
        return await read_json(request, limits, admitted)


CONTENTS = [bytes(range(256)) * 40, b"--edge", b"\r\n--edge-no\r\n", b"\r\n" * 50]


@given(st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_form_is_parsed_the_same_in_any_chunks(data: Any) -> None:
    body = body_of(
        part("dates", b"2021-01-01"),
        *(part("files", content, f"f{n}.tif") for n, content in enumerate(CONTENTS)),
        part("dates", "2021-02-01, é".encode()),
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=30)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        form = taken(pieces, Path(folder))
        assert [file.name for file in form.files] == ["f0.tif", "f1.tif", "f2.tif", "f3.tif"]
        assert [file.path.read_bytes() for file in form.files] == CONTENTS
        assert form.fields == {"dates": ("2021-01-01", "2021-02-01, é")}


def test_single_bytes_are_not_accumulated_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[int] = []

    class Reader(intake._FormReader):
        def feed(self, chunks: Any) -> None:
            handed.append(len(chunks))
            super().feed(chunks)

    monkeypatch.setattr(intake, "_FormReader", Reader)
    body = body_of(part("files", b"x" * 5000, "a.tif"))
    form = taken([body[at : at + 1] for at in range(len(body))], tmp_path)
    assert form.files[0].path.read_bytes() == b"x" * 5000
    assert max(handed) <= 1024


def test_a_file_name_is_never_used_as_a_path(tmp_path: Path) -> None:
    names = ["../../up.tif", "/etc/passwd", "..", "", "a\\b.tif", "C:\\x\\y.tif", "n\x01ul.tif"]
    form = taken([body_of(*(part("files", b"x", name) for name in names))], tmp_path)
    assert {file.path.parent for file in form.files} == {tmp_path}
    assert [file.path.name for file in form.files] == [f"{n:04d}.tif" for n in range(len(names))]
    assert [file.name for file in form.files] == [
        "up.tif", "etc/passwd", "file 3", "file 4", "a/b.tif", "y.tif", "nul.tif",
    ]  # fmt: skip


def test_a_label_keeps_the_folders_that_may_hold_the_date() -> None:
    assert label("S2B_31UES_20210105_0_L2A/B04.tif", 0) == "S2B_31UES_20210105_0_L2A/B04.tif"
    assert label("/./a//b/../c.tif", 0) == "a/b/c.tif"
    assert label("1/2/3/4/5/6/7/8/x.tif", 0) == "3/4/5/6/7/8/x.tif"


@pytest.mark.parametrize("name", ["x" * 500 + "_2021-01-01.tif", "é.tif", "../..", "\n\r"])
def test_a_label_is_short_and_shows_the_end(name: str) -> None:
    shown = label(name, 6)
    assert 0 < len(shown) <= 250
    assert ".." not in shown
    assert shown.isprintable()
    if name.endswith("2021-01-01.tif"):
        assert shown.endswith("_2021-01-01.tif")


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ("filename*=utf-8''S2_n%C2%BA7.tif", "S2_nº7.tif"),
        ("filename=\"=?utf-8?B?UzI=?=\"; filename*=utf-8'en'S2_n%C2%BA7.tif", "S2_nº7.tif"),
        ("filename*=iso-8859-1''n%BA7.tif; filename=n7.tif", "nº7.tif"),
        ("filename*=UTF-8''a%2Fb.tif", "a/b.tif"),
        ("filename*=no-such''n%C2%BA7.tif", "nº7.tif"),
        # Codecs of Python that are not character sets.
        ("filename*=undefined''n%C2%BA7.tif", "nº7.tif"),
        ("filename*=idna''xn--a.tif", "xn--a.tif"),
        ("filename*=unicode_escape''n%5Cud8007.tif", "n7.tif"),
        ('filename="=?undefined?Q?n7.tif?="', "=?undefined?Q?n7.tif?="),
        ('filename="=?unicode_escape?Q?n=5Cud8007.tif?="', "n7.tif"),
        ('filename="=?utf-8?B?UzJfbsK6Ny50aWY=?="', "S2_nº7.tif"),
        ('filename="=?utf-8?Q?n=C2=BA7.tif?="', "nº7.tif"),
        ('filename="=?odd?="', "=?odd?="),
        ('filename="S2B_20210105/B04.tif"', "S2B_20210105/B04.tif"),
    ],
)
def test_a_file_name_in_any_encoding(tmp_path: Path, disposition: str, name: str) -> None:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; {disposition}\r\n\r\n'
    form = taken([body_of(head.encode() + b"x\r\n")], tmp_path)
    assert [file.name for file in form.files] == [name]


@pytest.mark.parametrize(
    ("name", "filename"),
    [("file", "a.tif"), ("files[]", "a.tif"), ("image", "a"), ("x", "a.TIFF"), ("files[0]", "a")],
)
def test_a_raster_under_another_parameter_is_an_error_that_names_files(
    tmp_path: Path, name: str, filename: str
) -> None:
    with pytest.raises(InvalidRequest, match="go into the parameter 'files'") as caught:
        taken([body_of(part(name, b"x" * 10, filename))], tmp_path)
    assert caught.value.errors[0]["field"] == name
    # A text sent as a file is still a text.
    assert taken([body_of(part("points", b"{}", "p.geojson"))], tmp_path).fields == {
        "points": ("{}",)
    }


@pytest.mark.parametrize(
    ("given", "meant"),
    [("horizn", "horizon"), ("Dates", "dates"), ("aoi", "area"), ("output", "outputs"),
     ("bands[]", "bands"), ("start_date", "start"), ("resolution", "grid")],
)  # fmt: skip
def test_an_unknown_parameter_is_an_error_with_a_suggestion(given: str, meant: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"unknown parameter \(did you mean '{meant}'\?\)"):
        read_parameters("forecast", {given: ("x",)})


@pytest.mark.parametrize(
    ("body", "limits", "kind"),
    [
        (body_of(part("files", b"x" * 200, "a.tif")), {"body_bytes": 100}, BodyTooLarge),
        (body_of(part("a", b"x" * 200)), {"field_bytes": 100}, InvalidRequest),
        (body_of(*[part("a", b"x" * 20)] * 6), {"field_bytes": 100}, InvalidRequest),
        (body_of(*[part("a", b"x")] * 4), {"fields": 3}, InvalidRequest),
        (body_of(*[part("files", b"x", "a.tif")] * 4), {"files": 3}, InvalidRequest),
        (body_of(part("files", b"", "a.tif")), {}, InvalidRequest),
        (body_of(part("files", b"x")), {}, InvalidRequest),
        (body_of(part("files", b"x" * 200, "a.tif"))[:-60], {}, InvalidRequest),
        (part("a", b"x"), {}, InvalidRequest),
        (b"", {}, InvalidRequest),
        (b"no form at all", {}, InvalidRequest),
        (f"--{BOUNDARY}\r\nX-Else: 1\r\n\r\nx\r\n--{BOUNDARY}--".encode(), {}, InvalidRequest),
        (f"--{BOUNDARY}\r\n{'X' * 9000}: 1\r\n\r\nx".encode(), {}, InvalidRequest),
    ],
)
def test_a_malformed_or_too_large_form_is_rejected(
    tmp_path: Path, body: bytes, limits: dict[str, int], kind: type[PIMCError]
) -> None:
    with pytest.raises(kind) as caught:
        taken([body], tmp_path, Limits(**{"body_bytes": 10**6, **limits}))
    assert caught.value.detail


def test_the_body_limit_does_not_depend_on_content_length(tmp_path: Path) -> None:
    pieces = [part("files", b"x" * 500, "a.tif")] * 10
    for declared in ("10", "0", "nonsense"):
        with pytest.raises(BodyTooLarge):
            taken(list(pieces), tmp_path / declared, Limits(body_bytes=50), content_length=declared)
    with pytest.raises(BodyTooLarge, match="5000"):
        taken([b""], tmp_path, Limits(body_bytes=50), content_length="5000")


def test_a_form_needs_a_boundary(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="boundary"):
        taken([b""], tmp_path, kind="multipart/form-data")
    with pytest.raises(InvalidRequest, match="form"):
        taken([b""], tmp_path, kind=f"multipart/form-data; boundary={'x' * 500}")


def test_an_upload_that_stops_is_ended(tmp_path: Path) -> None:
    async def receive() -> dict[str, Any]:
        if begun:
            await anyio.sleep_forever()
        begun.append(True)
        return {"type": "http.request", "body": part("files", b"x", "a.tif"), "more_body": True}

    begun: list[bool] = []
    request = Request(request_of([]).scope, receive)
    limits = Limits(body_bytes=10**6, seconds=0.05, rate=10**6)
    with pytest.raises(BodyStalled):
        anyio.run(form_of, request, tmp_path, limits)
    begun.clear()
    with pytest.raises(BodyStalled):
        anyio.run(json_of, Request(request_of([]).scope, receive), limits)


def sent(pieces: int, size: int, *, every: float) -> Request:
    """A request whose body comes in equal pieces, one after each pause in seconds."""
    left = pieces

    async def receive() -> dict[str, Any]:
        nonlocal left
        await anyio.sleep(every)
        left -= 1
        return {"type": "http.request", "body": bytes(size), "more_body": left > 0}

    return Request(request_of([]).scope, receive)


def test_a_slow_but_steady_upload_is_accepted() -> None:
    """However long all of it takes, each interval has enough bytes."""
    limits = Limits(body_bytes=10**6, seconds=3, rate=1000)
    how = {"backend_options": {"loop_factory": JumpingClock}}
    for size, every in ((3000, 2.9), (1500, 1.4), (30, 0.02)):
        body = anyio.run(json_of, sent(100, size, every=every), limits, **how)
        assert body == bytes(100 * size)
    for size, every in ((3000, 3.1), (1500, 1.6), (30, 0.04)):
        with pytest.raises(BodyStalled):
            anyio.run(json_of, sent(100, size, every=every), limits, **how)
    # One byte is missing at the end of the first interval.
    with pytest.raises(BodyStalled):
        anyio.run(json_of, sent(100, 2999, every=2), limits, **how)


def test_json_has_a_smaller_limit_because_it_is_in_memory() -> None:
    limits = Limits(body_bytes=10**9, json_bytes=10)
    assert anyio.run(json_of, request_of([b'{"a"', b": 1}"]), limits) == b'{"a": 1}'
    with pytest.raises(BodyTooLarge, match="10"):
        anyio.run(json_of, request_of([b"x" * 6, b"x" * 6]), limits)


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("multipart/form-data; boundary=x", "multipart/form-data"),
        ("Application/JSON; charset=utf-8", "application/json"),
    ],
)
def test_two_kinds_of_body_are_read(kind: str, read: str) -> None:
    assert media_type(request_of([], kind=kind)) == read


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "image/tiff"]
)
def test_any_other_media_type_is_rejected(kind: str) -> None:
    with pytest.raises(UnsupportedMedia):
        media_type(request_of([], kind=kind))


# Disconnects ----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_run_is_cancelled_when_its_client_disconnects() -> None:
    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    def run(*, cancelled: Any) -> None:
        assert cancelled.wait(PATIENCE)
        check(cancelled)

    with pytest.raises(Cancelled):
        await run_watched(Request(request_of([]).scope, receive), run, slot=nullcontext())


# Leftovers ----------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def api(tmp_path: Path, scratch: Path) -> Iterator[httpx.Client]:
    with served(model_dir=write_zoo(tmp_path / "zoo"), state_dir=tmp_path / "state") as client:
        yield client


def emptied(scratch: Path) -> bool:
    """Whether no request has files, soon: a response is sent before its folder is gone."""
    return soon(lambda: not any(scratch.glob("pimc-*/request-*")))


def files_in(folder: Path) -> list[tuple[str, Any]]:
    found = []
    for month in (1, 2, 3):
        values = np.full((3, 8, 8), 2000, np.uint16)
        name = f"s_2021-0{month}-01.tif"
        source = write(folder / name, values, descriptions=("B02", "B04", "B08"), nodata=0)
        found.append(("files", (name, source.path.read_bytes())))
    return found


def test_a_request_leaves_no_files(api: httpx.Client, tmp_path: Path, scratch: Path) -> None:
    files = files_in(tmp_path)
    outputs = {"outputs": "class,confidence"}
    assert api.post("/classify-pixels", files=files, data=outputs).status_code == 200
    assert api.post("/classify-pixels", files=files, data={"scale": "x"}).status_code == 422
    assert api.post("/classify-pixels", files=files, data={"scale": "9"}).status_code == 422
    brittle = {"model": "pixels-brittle"}
    assert api.post("/classify-pixels", files=files, data=brittle).status_code == 500
    assert emptied(scratch)


def responded(connection: socket.socket) -> bool:
    connection.setblocking(False)
    with suppress(BlockingIOError):
        return bool(connection.recv(1))
    return False


def test_a_disconnected_client_leaves_no_files(
    api: httpx.Client, tmp_path: Path, scratch: Path
) -> None:
    where = (api.base_url.host, api.base_url.port or 80)
    form = body_of(*(part("files", f[1][1], f[1][0]) for f in files_in(tmp_path)))
    head = (
        "POST /classify-pixels HTTP/1.1\r\nHost: here\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        f"Content-Length: {len(form)}\r\n\r\n"
    ).encode()
    for sent in (head + form[: len(form) // 2], head + form):
        with socket.create_connection(where) as connection:
            connection.sendall(sent)
            # Whichever comes first: its files, or the end of a request that was served in no time.
            soon(
                lambda: any(scratch.glob("pimc-*/request-*")) or responded(connection), pause=0.001
            )
        assert emptied(scratch)
    assert api.get("/health/live").status_code == 200


def test_a_chunked_upload_is_read_like_any_other(api: httpx.Client, tmp_path: Path) -> None:
    form = body_of(*(part("files", f[1][1], f[1][0]) for f in files_in(tmp_path)))

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(form), 100):
            yield form[at : at + 100]

    response = api.post(
        "/classify-pixels",
        content=pieces(),
        headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"},
    )
    assert response.status_code == 200, response.text
    assert json.loads(api.get("/health/ready").text)["status"] == "ready"


def test_null_is_the_default_of_a_mask_in_json() -> None:
    body = json.dumps({"items": [{"href": "a.tif"}], "mask": None}).encode()
    named = read_items("classify-pixels", body, allowed=True)
    assert named is not None
    assert named[1].stack.mask is None
    long = json.dumps({"items": [{"href": "a.tif"}], "mask": "scl," * 60}).encode()
    with pytest.raises(InvalidRequest):
        read_items("classify-pixels", long, allowed=True)


@pytest.mark.parametrize("kind", [[], {}, [["Polygon"]], None, 7])
def test_a_type_of_geojson_that_is_not_text_is_rejected(kind: Any) -> None:
    area = {"type": kind, "coordinates": []}
    body = json.dumps({"items": [{"href": "a.tif"}], "area": area}).encode()
    with pytest.raises(InvalidRequest) as caught:
        read_items("classify-pixels", body, allowed=True)
    assert {error["field"] for error in caught.value.errors} >= {"area.type"}


@pytest.mark.parametrize("kind", ["Point", "GeometryCollection", "Topology"])
def test_an_area_that_is_not_a_polygon_is_named(kind: str) -> None:
    feature = {"type": "Feature", "properties": {}, "geometry": {"type": kind, "coordinates": []}}
    body = json.dumps({"items": [{"href": "a.tif"}], "area": feature}).encode()
    with pytest.raises(InvalidRequest, match=rf"a GeoJSON {kind} is not a polygon: send a Polygon"):
        read_items("classify-pixels", body, allowed=True)


@pytest.mark.parametrize(
    "text",
    ["2021-01-05,2021-01-15", "2021-01-05; 2021-01-15", '["2021-01-05", "2021-01-15"]',
     "2021-01-05\n2021-01-15\n", "2021-01-05,\n2021-01-15"],
)  # fmt: skip
def test_lists_in_forms_may_be_written_in_several_ways(text: str) -> None:
    assert listed(text) == listed([text]) == ["2021-01-05", "2021-01-15"]
    assert listed("2021-01-05,,") == ["2021-01-05", "", ""]  # rejected later


def test_a_decimal_comma_is_named() -> None:
    with pytest.raises(ValidationError, match=r"'0,0001' has a decimal comma: give 0\.0001"):
        TypeAdapter(Offset).validate_python(["0,0001"])
