"""Requests of every method of both clients, read by an independent parser."""

from __future__ import annotations

import io
import json
import os
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path

import geopandas
import httpx
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pimc_client import Reference, Series, StacItems, StacSearch, UnexpectedAnswer
from tests.kits.client import connected, parts_of

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
    """A transport that records each request and responds with one JSON document."""

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


def fields_of(request):
    return {name: data.decode() for name, file, _, data in parts_of(request) if file is None}


def sent(kind, method, *args, document=None, **options):
    recorder = Recorder(document)
    with connected(kind, URL, transport=recorder.transport, api_key="secret") as client:
        getattr(client, method)(*args, **options)
    return recorder.request


@KINDS
def test_every_request_has_the_headers(kind):
    request = sent(kind, "models", document={"models": [], "defaults": {}})
    assert str(request.url) == "http://test/prefix/models"
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["user-agent"].startswith("pimc-client/")
    assert request.headers["accept"] == "application/json"


@KINDS
def test_files_of_every_kind_are_sent_in_order(kind, tmp_path):
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
    folder = tmp_path.name
    assert found[0][0] == f"{folder}/{names[0]}"
    assert f'filename="{folder}/{names[1]}"'.encode() in request.content
    assert f'filename="{folder}/a%22b.tif"'.encode() in request.content
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
def test_a_generator_of_paths_is_accepted(kind, tmp_path):
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
    "mask": ["scl", "cldprb:40"],
    "sensor": "sentinel-2",
    "grid": "EPSG:32631@10",
    "bbox": (4.1, 50.9, 4.2, 51),
    "area": {"type": "Polygon", "coordinates": []},
}
ALL_FIELDS = {
    "model": "m@1.0.0",
    "layout": "single-file",
    "dates": "2021-01-05,2021-01-15,2021-01-25",
    "bands": "B02,B04,B08",
    "scale": "0.0001",
    "offset": "-0.1",
    "mask": "scl,cldprb:40",
    "sensor": "sentinel-2",
    "grid": "EPSG:32631@10",
    "bbox": "4.1,50.9,4.2,51.0",
    "area": '{"type": "Polygon", "coordinates": []}',
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
def test_every_option_is_sent_as_a_parameter(kind, method, options, fields):
    fields = fields or {"outputs": "confidence", "stride": "16"}
    request = sent(kind, method, ("a.tif", b"x"), answer="summary", **ALL_OPTIONS, **options)
    found = fields_of(request)
    assert {**found, "scale": str(float(found["scale"]))} == {**ALL_FIELDS, **fields}
    assert request.url.path.endswith(method.replace("_", "-"))


@KINDS
def test_options_that_are_not_given_are_not_sent(kind):
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
def test_accept_has_the_media_type_of_the_result(kind, method, options, accept):
    assert sent(kind, method, ("a.tif", b"x"), **options).headers["accept"] == accept


@KINDS
@pytest.mark.parametrize(
    "points",
    [
        [(4.5, 50.25), (5, 51)],
        np.array([[4.5, 50.25], [5, 51]]),
        geopandas.GeoSeries.from_xy([4.5, 5], [50.25, 51], crs="EPSG:4326"),
        geopandas.GeoSeries.from_xy([4.5, 5], [50.25, 51], crs="EPSG:4326").to_crs("EPSG:32631"),
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
def test_points_are_sent_as_geojson(kind, points):
    found = json.loads(fields_of(sent(kind, "forecast", ("a.tif", b"x"), points=points))["points"])
    assert found["type"] == "FeatureCollection"
    places = [f["geometry"]["coordinates"] for f in found["features"]]
    np.testing.assert_allclose(places, [[4.5, 50.25], [5.0, 51.0]], atol=1e-9)


@KINDS
def test_references_are_sent_without_reading_files(kind):
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
def test_stac_items_and_searches_are_sent_as_they_are(kind):
    items = {"type": "FeatureCollection", "features": [{"type": "Feature", "id": "a"}]}
    request = sent(kind, "classify_pixels", StacItems(items=items), answer="summary", scale=0.1)
    assert json.loads(request.content) == {"stac": items, "scale": 0.1}
    search = StacSearch(
        url="https://stac.example.org/v1",
        collections=["sentinel-2-l2a"],
        bbox=(4.1, 50.9, 4.2, 51.0),
        datetime="2021-01-01/2021-12-31",
        max_cloud_cover=0,
    )
    request = sent(kind, "classify_pixels", search, answer="summary")
    assert json.loads(request.content) == {
        "stac": {
            "url": "https://stac.example.org/v1",
            "collections": ["sentinel-2-l2a"],
            "bbox": [4.1, 50.9, 4.2, 51.0],
            "datetime": "2021-01-01/2021-12-31",
            "max_cloud_cover": 0,
        }
    }


@KINDS
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("classify_series", "classify-pixels"),
        ("forecast_series", "forecast"),
        ("embed_series", "embed"),
    ],
)
def test_series_are_sent_as_json(kind, method, path):
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


@KINDS
def test_a_series_may_have_a_place(kind):
    series = Series(id="a", dates=["2021-01-05"], B02=[0.1], lon=5, lat=np.float32(50.5))
    assert series.lonlat == (5.0, 50.5)
    assert Series(id="a", dates=["2021-01-05"], B02=[0.1], lon=np.nan, lat=pd.NA).lonlat is None
    request = sent(kind, "embed_series", [series], document={"results": []})
    (found,) = json.loads(request.content)["series"]
    assert found == {"id": "a", "dates": ["2021-01-05"], "lon": 5.0, "lat": 50.5, "B02": [0.1]}


@KINDS
def test_a_series_may_have_any_bands(kind):
    series = Series(id="a", dates="2021-01-05, 2021-01-15", B05=[0.1, 0.2], B8A=[None, 0.3])
    request = sent(kind, "embed_series", [series], document={"results": []})
    assert json.loads(request.content)["series"] == [
        {"id": "a", "dates": ["2021-01-05", "2021-01-15"], "B05": [0.1, 0.2], "B8A": [None, 0.3]}
    ]


@KINDS
@pytest.mark.parametrize(
    "dates",
    [
        np.array(["2021-01-05", "2021-01-15"], "datetime64[D]"),
        np.array(["2021-01-05T10:30", "2021-01-15T23:59"], "datetime64[ns]"),
        [np.datetime64("2021-01-05"), np.array("2021-01-15", "datetime64[us]")],
        [pd.Timestamp(2021, 1, 5, 10), datetime(2021, 1, 15, tzinfo=UTC)],
        pd.to_datetime(["2021-01-05T23:00Z", "2021-01-15T00:00Z"]),
        pd.Series(pd.to_datetime(["2021-01-05", "2021-01-15"])),
        xr.DataArray(np.array(["2021-01-05", "2021-01-15"], "datetime64[ns]"), dims="time"),
    ],
)
def test_dates_of_numpy_and_pandas_are_accepted(kind, dates):
    series = Series(id="a", dates=dates, B02=[0.1, 0.2])
    request = sent(kind, "embed_series", [series], document={"results": []}, start=dates[0])
    found = json.loads(request.content)
    assert found["series"][0]["dates"] == ["2021-01-05", "2021-01-15"]
    assert found["start"] == "2021-01-05"
    files = [("a.tif", b"x"), ("b.tif", b"x")]
    request = sent(kind, "forecast", files, answer="summary", dates=dates)
    assert fields_of(request)["dates"] == "2021-01-05,2021-01-15"


@pytest.mark.parametrize(
    "values",
    [
        np.ma.masked_less(np.array([0.1, 0.0, 0.3]), 0.05),
        np.ma.masked_array([1, 2, 3], mask=[False, True, False]),
        [0.1, np.ma.masked, 0.3],
        [0.1, pd.NA, 0.3],
        pd.Series([0.1, None, 0.3]),
        pd.Series([0.1, None, 0.3], dtype="Float64"),
        xr.DataArray([0.1, np.nan, 0.3]),
        np.array([0.1, None, 0.3], object),
    ],
)
def test_a_missing_value_is_sent_as_null(values):
    found = Series(id="a", dates=["2021-01-05"] * 3, B02=values).to_json()["B02"]
    assert found[1] is None
    assert None not in (found[0], found[2])


@pytest.mark.parametrize(
    ("bands", "error", "message"),
    [
        ({"B08": [1, 2]}, ValueError, r"series 'a': 2 values of B08 but 1 dates"),
        ({"B04": [np.inf]}, ValueError, r"series 'a': B04\[0\] is inf: give a finite"),
        ({"B04": np.array([-np.inf])}, ValueError, r"series 'a': B04\[0\] is -inf"),
        ({"B04": ["0.1"]}, TypeError, r"series 'a': B04\[0\] is '0.1': give a number"),
        ({"B04": np.ones((1, 1))}, TypeError, r"series 'a': B04\[0\] is \[1.0\]"),
        ({}, ValueError, r"series 'a' has no band"),
        ({"B02": [1], "lon": 5.0}, ValueError, r"series 'a': give both lon and lat"),
        ({"B02": [1], "lon": 5e5, "lat": 50}, ValueError, r"series 'a': lon 500000 and lat 50 are"),
        ({"B02": [1], "lon": "5", "lat": 50}, TypeError, r"series 'a': lon is '5': give a number"),
        (
            {"dates": [np.datetime64("NaT")], "B02": [1]},
            ValueError,
            r"series 'a': dates\[0\] is miss",
        ),
        ({"dates": [pd.NaT], "B02": [1]}, ValueError, r"dates\[0\] is missing \(NaT\)"),
        ({"dates": [xr.DataArray(np.datetime64("NaT", "ns"))], "B02": [1]}, ValueError, "NaT"),
        ({"dates": [20210105], "B02": [1]}, TypeError, r"dates\[0\] is 20210105, a int"),
    ],
)
def test_an_invalid_series_is_named_in_the_error(bands, error, message):
    with pytest.raises(error, match=message):
        Series(**{"id": "a", "dates": ["2021-01-01"], **bands})


@KINDS
@pytest.mark.parametrize(
    "day", [date(2021, 1, 5), pd.Timestamp(2021, 1, 5), np.datetime64("2021-01-05"), "2021-01-05"]
)
def test_one_date_needs_no_list(kind, day):
    request = sent(kind, "landcover", ("a.tif", b"x"), answer="summary", dates=day)
    assert fields_of(request) == {"dates": "2021-01-05"}


@KINDS
def test_numbers_of_numpy_are_accepted_as_options(kind):
    series = [Series(id="a", dates=["2021-01-05"], B02=[0.1])]
    request = sent(kind, "forecast_series", series, horizon=np.int64(3), document={"results": []})
    assert json.loads(request.content)["horizon"] == 3


def names_of(request):
    return [file for name, file, _, _ in parts_of(request) if name == "files"]


def stack_folder(folder):
    """Two dates of two bands, one folder per date, with other files that such folders hold."""
    for day in ("20210105", "20210115"):
        inside = folder / f"S2B_31UES_{day}_0_L2A"
        inside.mkdir(parents=True)
        others = ("._B04.tif", "metadata.xml", "B04.tif.aux.xml", ".MTD_MSIL2A.xml")
        for name in ("B08.tif", "B04.TIFF", *others):
            (inside / name).write_bytes(f"{day} {name}".encode())
    return folder


EXPECTED = [
    f"stack/S2B_31UES_{day}_0_L2A/{band}"
    for day in ("20210105", "20210115")
    for band in ("B04.TIFF", "B08.tif")
]


@KINDS
def test_the_rasters_of_a_folder_are_sent_with_the_folders_in_their_names(
    kind, tmp_path, monkeypatch
):
    folder = stack_folder(tmp_path / "stack")
    request = sent(kind, "classify_pixels", folder, answer="summary")
    assert names_of(request) == EXPECTED
    assert parts_of(request)[0][3] == b"20210105 B04.TIFF"
    monkeypatch.chdir(folder)
    assert names_of(sent(kind, "classify_pixels", ".", answer="summary")) == EXPECTED
    one = min(folder.iterdir())
    assert names_of(sent(kind, "landcover", [one], answer="summary")) == [
        name.removeprefix("stack/") for name in EXPECTED[:2]
    ]


@KINDS
def test_the_metadata_of_a_product_is_sent_with_its_rasters(kind, tmp_path):
    product = tmp_path / "S2A_MSIL2A_20180826T104021.SAFE"
    (product / "GRANULE").mkdir(parents=True)
    for name in ("MTD_MSIL2A.xml", "manifest.safe", "GRANULE/B02_10m.jp2", "GRANULE/MTD_TL.xml"):
        (product / name).write_bytes(b"x")
    request = sent(kind, "landcover", product, answer="summary")
    found = {file: mime for name, file, mime, _ in parts_of(request) if name == "files"}
    assert found == {
        f"{product.name}/GRANULE/B02_10m.jp2": "image/jp2",
        f"{product.name}/MTD_MSIL2A.xml": "application/xml",
    }


@KINDS
def test_names_of_files_keep_the_folders_that_differ(kind, tmp_path, monkeypatch):
    folder = stack_folder(tmp_path / "stack")
    pattern = f"{folder}/*/B08.tif"
    expected = [name for name in EXPECTED if name.endswith("B08.tif")]
    assert names_of(sent(kind, "embed", pattern, answer="summary")) == expected
    paths = sorted(folder.glob("*/B08.tif"))
    assert names_of(sent(kind, "embed", paths, answer="summary")) == expected
    monkeypatch.chdir(folder)
    relative = [path.relative_to(folder) for path in paths]
    assert names_of(sent(kind, "embed", relative, answer="summary")) == expected
    # The names of files of one folder hold the folder, whose name may hold the date.
    assert names_of(sent(kind, "embed", relative[0], answer="summary")) == [
        expected[0].removeprefix("stack/")
    ]


@KINDS
@pytest.mark.parametrize("inside", ["", "stack/"])
def test_the_rasters_of_a_zip_are_sent(kind, tmp_path, inside):
    path = tmp_path / "stack.zip"
    folder = stack_folder(tmp_path / "stack")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*.*"):
            if file.is_file():
                archive.write(file, f"{inside}{file.relative_to(folder)}")
        archive.writestr("__MACOSX/._B04.tif", b"no image")
    request = sent(kind, "classify_pixels", [path, ("one.tif", b"more")], answer="summary")
    assert names_of(request) == [*EXPECTED, "one.tif"]
    content = [data for name, _, _, data in parts_of(request) if name == "files"]
    assert content[1] == b"20210105 B08.tif"
    assert request.headers["content-length"] == str(len(request.content))


@KINDS
def test_zips_in_a_folder_count_as_folders(kind, tmp_path):
    folder = tmp_path / "stack"
    (folder / "2021" / "S2_20210125.SAFE").mkdir(parents=True)
    for name, member in (
        ("2021/S2_20210105.zip", "B04.tif"),
        ("2021/S2_20210115.zip", "B04.gtiff"),
        ("2021/S2_20210125.zip", "B04.tif"),  # unpacked beside it
        ("notes.zip", "read.me"),
        (".hidden.zip", "B04.tif"),
    ):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(member, name)
    (folder / "2021" / "S2_20210125.SAFE" / "B04.jp2").write_bytes(b"x")
    request = sent(kind, "classify_pixels", folder, answer="summary")
    assert names_of(request) == [
        "stack/2021/S2_20210105/B04.tif",
        "stack/2021/S2_20210115/B04.gtiff",
        "stack/2021/S2_20210125.SAFE/B04.jp2",
    ]


def test_a_zip_that_cannot_be_read_is_named_in_the_error(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK no zip")
    with connected("sync", URL, transport=Recorder().transport) as client:
        with pytest.raises(ValueError, match=r"a\.zip is not a readable zip"):
            client.embed(path)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("read.me", b"")
        with pytest.raises(ValueError, match=r"a\.zip contains no raster \(.*\.tif, \.tiff\)"):
            client.embed(path)


@KINDS
def test_a_file_name_that_is_not_utf_8_is_sent_decoded(kind, tmp_path):
    folder = os.fsencode(tmp_path / "été")
    Path(os.fsdecode(folder)).mkdir()
    path = folder + b"/caf\xe9.tif"
    with open(path, "wb") as file:  # noqa: PTH123 (a name of bytes)
        file.write(b"pixels")
    request = sent(kind, "classify_pixels", Path(os.fsdecode(path)), answer="summary")
    assert 'filename="été/café.tif"'.encode() in request.content
    request = sent(kind, "classify_pixels", Path(os.fsdecode(folder)), answer="summary")
    assert 'filename="été/café.tif"'.encode() in request.content


@KINDS
@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ([], ValueError, "at least one file"),
        (b"II*", TypeError, "without a name"),
        ([3], TypeError, "file 1 is a int"),
        ([io.StringIO("text")], TypeError, "mode 'rb'"),
        (["nowhere/at-all.tif"], FileNotFoundError, "nowhere"),
        (["nowhere/*.tif"], FileNotFoundError, "no file matches"),
        ([Path(__file__).parent], ValueError, "contains no raster"),
        ([Reference(href="/a.tif"), ("b.tif", b"x")], TypeError, "1 of 2"),
    ],
)
def test_a_value_that_is_not_a_file_is_an_error_before_anything_is_sent(
    kind, files, error, message
):
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
        ({"points": [(3.0, 50.0), (50.0, 103.0)]}, r"point 2 is \(50, 103\): give longitude and"),
        ({"points": [(float("nan"), 50.0)]}, "point 1 is"),
        ({"points": [(1.0, 2.0)], "answer": "summary"}, "exclude each other"),
        ({"answer": "sumary"}, "'sumary'"),
        ({"bbox": "4,50,5"}, "is not west, south, east and north"),
    ],
)
def test_invalid_options_are_errors(kind, options, message):
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
def test_an_invalid_base_url_is_an_error(kind, url):
    with pytest.raises(ValueError, match="not a valid base URL"), connected(kind, url):
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
def test_the_upload_reports_its_progress(kind, tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(bytes(600_000))
    reported = []
    request = sent(
        kind,
        "classify_pixels",
        path,
        answer="summary",
        progress=lambda sent, total: reported.append((sent, total)),
    )
    length = int(request.headers["content-length"])
    assert reported == sorted(reported)
    assert reported[-1] == (length, length)
    assert len(reported) > 3


@KINDS
def test_names_in_paths_are_quoted(kind):
    request = sent(kind, "model", "a/b@1 0", document=CARD)
    assert request.url.raw_path == b"/prefix/models/a%2Fb@1%200"
