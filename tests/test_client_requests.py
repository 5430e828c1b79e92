"""What goes over the wire, for every method and both clients; an independent parser reads it."""

from __future__ import annotations

import email
import email.policy
import io
import json
from datetime import UTC, date, datetime
from pathlib import Path

import httpx
import numpy as np
import pytest
from client_kit import connected

from pimc_client import Reference, Series, UnexpectedAnswer

KINDS = pytest.mark.parametrize("kind", ["sync", "async"])
URL = "http://test/prefix"
COG = "image/tiff; application=geotiff; profile=cloud-optimized"
CARD = {
    "name": "forecast-vi", "version": "1.2.0", "task": "forecast", "description": "d",
    "bands": ["B02", "B04", "B08"], "window": {"steps": 36, "step_days": 10, "start": "last-steps"},
    "min_observations": 6, "horizon": 10, "metrics": {"rmse": 0.1}, "training_data": [],
    "classes": [], "licence": "MIT", "variants": [{"name": "float32"}], "sha256": "0" * 64,
}  # fmt: skip


class Recorder:
    """A transport that keeps each request and answers with one JSON document."""

    def __init__(self, document=None, status=200, headers=None):
        self.requests = []
        self.document = {} if document is None else document
        self.status, self.headers = status, headers or {}
        self.transport = httpx.MockTransport(self.handle)

    def handle(self, request):
        self.requests.append(request)
        return httpx.Response(self.status, json=self.document, headers=self.headers)

    @property
    def request(self):
        (request,) = self.requests
        return request


def parts_of(request):
    """(name, filename, content type, content) of each part, as the standard library reads them."""
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


def fields_of(request):
    return {name: data.decode() for name, file, _, data in parts_of(request) if file is None}


def sent(kind, method, *args, document=None, **options):
    recorder = Recorder(document)
    with connected(kind, URL, transport=recorder.transport, api_key="secret") as client:
        getattr(client, method)(*args, **options)
    return recorder.request


@KINDS
def test_headers_of_every_request(kind):
    request = sent(kind, "models", document={"models": [], "defaults": {}})
    assert str(request.url) == "http://test/prefix/models"
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["user-agent"].startswith("pimc-client/")
    assert request.headers["accept"] == "application/json"


@KINDS
def test_files_of_every_kind_in_order(kind, tmp_path):
    names = ["2021-01-05.tif", "été 2021.tif", 'a"b.tif']
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    files = [
        str(tmp_path / names[0]),
        tmp_path / names[1],
        (tmp_path / names[2]).open("rb"),
        ("memory.tif", b"\r\n--not a boundary\r\n"),
        io.BytesIO(b"stream"),
    ]
    with files[2]:
        request = sent(kind, "classify_pixels", files, answer="summary")
    found = [(file, mime, data) for name, file, mime, data in parts_of(request) if name == "files"]
    assert [data for _, _, data in found] == [
        names[0].encode(),
        names[1].encode(),
        names[2].encode(),
        b"\r\n--not a boundary\r\n",
        b"stream",
    ]
    assert all(mime == "image/tiff" for _, mime, _ in found)
    assert found[0][0] == names[0]
    assert f'filename="{names[1]}"'.encode() in request.content
    assert b'filename="a%22b.tif"' in request.content
    assert found[4][0] == "file-5.tif"


@KINDS
@pytest.mark.parametrize("one", ["text", "path", "pair", "stream"])
def test_one_file_needs_no_list(kind, tmp_path, one):
    path = tmp_path / "scene.tif"
    path.write_bytes(b"scene")
    file = {
        "text": str(path),
        "path": path,
        "pair": ("scene.tif", b"scene"),
        "stream": io.BytesIO(b"scene"),
    }[one]
    request = sent(kind, "landcover", file, answer="summary")
    (part,) = [part for part in parts_of(request) if part[0] == "files"]
    assert part[3] == b"scene"


@KINDS
def test_a_generator_of_paths(kind, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.tif").write_bytes(name.encode())
    request = sent(kind, "embed", tmp_path.glob("*.tif"), answer="summary")
    assert len([p for p in parts_of(request) if p[0] == "files"]) == 2


ALL_OPTIONS = {
    "model": "m@1.0.0",
    "layout": "single-file",
    "dates": ["2021-01-05", date(2021, 1, 15), datetime(2021, 1, 25, 10, tzinfo=UTC)],
    "bands": ["B02", "B04", "B08"],
    "scale": 1e-4,
    "offset": -0.1,
    "mask": "none",
}
ALL_FIELDS = {
    "model": "m@1.0.0",
    "layout": "single-file",
    "dates": "2021-01-05,2021-01-15,2021-01-25",
    "bands": "B02,B04,B08",
    "scale": "0.0001",
    "offset": "-0.1",
    "mask": "none",
}


@KINDS
@pytest.mark.parametrize(
    ("method", "options", "fields"),
    [
        (
            "classify_pixels",
            {"outputs": ["class", "entropy"], "start": date(2021, 1, 1)},
            {"outputs": "class,entropy", "start": "2021-01-01"},
        ),
        (
            "forecast",
            {"outputs": ["q10", "q90"], "horizon": 3, "start": "2021-01-01"},
            {"outputs": "q10,q90", "horizon": "3", "start": "2021-01-01"},
        ),
        ("landcover", {"outputs": "confidence", "stride": 16}, None),
        ("embed", {"modality": "patch", "stride": 32}, {"modality": "patch", "stride": "32"}),
    ],
)
def test_every_option_is_a_field(kind, method, options, fields):
    fields = fields or {"outputs": "confidence", "stride": "16"}
    request = sent(kind, method, ("a.tif", b"x"), answer="summary", **ALL_OPTIONS, **options)
    found = fields_of(request)
    assert {**found, "scale": str(float(found["scale"]))} == {**ALL_FIELDS, **fields}
    assert request.url.path.endswith(method.replace("_", "-"))


@KINDS
def test_nothing_said_is_nothing_sent(kind):
    assert fields_of(sent(kind, "forecast", ("a.tif", b"x"), answer="summary")) == {}


@KINDS
@pytest.mark.parametrize(
    ("method", "options", "accept"),
    [
        ("classify_pixels", {}, COG),
        ("classify_pixels", {"outputs": "confidence"}, COG),
        ("classify_pixels", {"outputs": ["class", "confidence"]}, "application/zip"),
        ("classify_pixels", {"outputs": ["class"]}, "application/zip"),
        ("classify_pixels", {"answer": "summary"}, "application/json"),
        (
            "classify_pixels",
            {"points": [(4.0, 50.0)]},
            "application/geo+json, application/json;q=0.9",
        ),
        ("forecast", {"outputs": ["q10", "q50"]}, COG),
        ("landcover", {"outputs": ["class", "confidence"]}, "application/zip"),
        ("embed", {}, COG),
    ],
)
def test_accept_says_what_is_wanted(kind, method, options, accept):
    assert sent(kind, method, ("a.tif", b"x"), **options).headers["accept"] == accept


@KINDS
@pytest.mark.parametrize(
    "points",
    [
        [(4.5, 50.25), (5, 51)],
        np.array([[4.5, 50.25], [5, 51]]),
        {
            "type": "FeatureCollection",
            "features": [
                {
                    "type": "Feature",
                    "geometry": {"type": "Point", "coordinates": xy},
                    "properties": {},
                }
                for xy in ([4.5, 50.25], [5.0, 51.0])
            ],
        },
    ],
)
def test_points(kind, points):
    found = json.loads(fields_of(sent(kind, "forecast", ("a.tif", b"x"), points=points))["points"])
    assert found["type"] == "FeatureCollection"
    assert [f["geometry"]["coordinates"] for f in found["features"]] == [[4.5, 50.25], [5.0, 51.0]]


@KINDS
def test_references_are_named_and_not_read(kind):
    items = [Reference(href="/data/a.tif", date=date(2021, 1, 5)), Reference(href="s3://b/c.tif")]
    request = sent(
        kind, "classify_pixels", items, answer="summary", bands="B02, B04,B08", scale=0.1
    )
    assert json.loads(request.content) == {
        "items": [{"href": "/data/a.tif", "date": "2021-01-05"}, {"href": "s3://b/c.tif"}],
        "bands": ["B02", "B04", "B08"],
        "scale": 0.1,
    }
    assert request.headers["content-type"] == "application/json"


@KINDS
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("classify_series", "classify-pixels"),
        ("forecast_series", "forecast"),
        ("embed_series", "embed"),
    ],
)
def test_series(kind, method, path):
    series = Series(
        id="field-7",
        dates=["2021-01-05", date(2021, 1, 15), "2021-01-25"],
        B02=[0.05, None, float("nan")],
        B04=np.array([0.07, 0.06, np.nan], np.float32),
        B08=(0, 1, 0.5),
    )
    options = {"horizon": 4} if method == "forecast_series" else {}
    request = sent(
        kind,
        method,
        [series],
        model="m",
        start=date(2021, 1, 1),
        document={"results": []},
        **options,
    )
    document = json.loads(request.content)
    (found,) = document.pop("series")
    assert document == {"model": "m", "start": "2021-01-01", **options}
    assert found["B04"] == [pytest.approx(0.07), pytest.approx(0.06), None]
    del found["B04"]
    assert found == {
        "id": "field-7",
        "dates": ["2021-01-05", "2021-01-15", "2021-01-25"],
        "B02": [0.05, None, None],
        "B08": [0, 1, 0.5],
    }
    assert request.url.path.endswith(path)


def test_a_series_of_uneven_lengths_names_both():
    with pytest.raises(ValueError, match=r"2 values of B08 but 1 dates"):
        Series(id="a", dates=["2021-01-01"], B02=[1], B04=[1], B08=[1, 2])


@KINDS
@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ([], ValueError, "no files"),
        (b"II*", TypeError, "need a name"),
        ([3], TypeError, "file 1 is a int"),
        ([io.StringIO("text")], TypeError, "mode 'rb'"),
        (["nowhere/at-all.tif"], FileNotFoundError, "nowhere"),
        ([Path(__file__).parent], IsADirectoryError, "folder"),
        ([Reference(href="/a.tif"), ("b.tif", b"x")], TypeError, "1 of 2"),
    ],
)
def test_what_is_no_file_is_refused_before_anything_is_sent(kind, files, error, message):
    recorder = Recorder()
    with (
        connected(kind, URL, transport=recorder.transport) as client,
        pytest.raises(error, match=message),
    ):
        client.classify_pixels(files)
    assert recorder.requests == []


@KINDS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": [(1.0, 2.0, 3.0)]}, "3 numbers"),
        ({"points": [(1.0, 2.0)], "answer": "summary"}, "one by one"),
        ({"answer": "sumary"}, "'sumary'"),
    ],
)
def test_what_cannot_be_asked_is_refused(kind, options, message):
    with (
        connected(kind, URL, transport=Recorder().transport) as client,
        pytest.raises(ValueError, match=message),
    ):
        client.classify_pixels(("a.tif", b"x"), **options)


@KINDS
def test_a_misspelt_option_is_a_type_error(kind):
    with (
        connected(kind, URL, transport=Recorder().transport) as client,
        pytest.raises(TypeError, match="strid"),
    ):
        client.landcover(("a.tif", b"x"), strid=3)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x"])
@KINDS
def test_a_base_url_that_is_none(kind, url):
    with pytest.raises(ValueError, match="base URL"), connected(kind, url):
        pass


@KINDS
def test_a_redirect_is_explained(kind):
    recorder = Recorder(status=301, headers={"location": "https://test/"})
    with (
        connected(kind, URL, transport=recorder.transport) as client,
        pytest.raises(UnexpectedAnswer, match="https://test/"),
    ):
        client.models()


@KINDS
def test_the_upload_reports_how_far_it_is(kind, tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(bytes(600_000))
    heard = []
    request = sent(
        kind,
        "classify_pixels",
        path,
        answer="summary",
        progress=lambda sent, total: heard.append((sent, total)),
    )
    length = int(request.headers["content-length"])
    assert heard == sorted(heard)
    assert heard[-1] == (length, length)
    assert len(heard) > 3


@KINDS
def test_names_in_paths_are_quoted(kind):
    request = sent(kind, "model", "a/b@1 0", document=CARD)
    assert request.url.raw_path == b"/prefix/models/a%2Fb@1%200"
