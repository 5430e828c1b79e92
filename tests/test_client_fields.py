"""Fields: the requests for polygons of every form, and the table of results."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import geopandas
import httpx
import numpy as np
import pytest
from shapely.geometry import box

from pimc_client import Reference, Table
from tests.kits.client import connected, parts_of
from tests.kits.marks import in_all_tests

KINDS = pytest.mark.parametrize("kind", ["sync", "async"])
ROOT = Path(__file__).parents[1]
FILE = ("2021-01-05.tif", b"x")


def polygon(west):
    return json.loads(json.dumps(box(west, 50, west + 1, 51).__geo_interface__))


FIELDS = {
    "type": "FeatureCollection",
    "features": [
        {"type": "Feature", "id": "a", "geometry": polygon(3), "properties": {"owner": "é"}},
        {"type": "Feature", "id": "b", "geometry": polygon(4), "properties": {"owner": None}},
    ],
}
CLASSES = [
    {
        "owner": "é", "status": "ok", "class": "Maize", "value": 1, "confidence": 0.9,
        "share": {"Maize": 0.8, "Rye": 0.2}, "pixels": 120.5, "hectares": 1.2, "clear_dates": 9,
    },
    {"owner": None, "status": "outside"},
]  # fmt: skip


def collection(properties):
    features = [
        {**field, "properties": found}
        for field, found in zip(FIELDS["features"], properties, strict=True)
    ]
    return {"type": "FeatureCollection", "model": "m@1.0.0", "warnings": [], "features": features}


def run(kind, properties=CLASSES, method="classify_pixels", files=FILE, **options):
    """The request and the result of one call."""
    seen = []

    def handle(request):
        seen.append(request)
        kind = {"Content-Type": "application/geo+json"}
        return httpx.Response(200, content=json.dumps(collection(properties)), headers=kind)

    with connected(kind, "http://test", transport=httpx.MockTransport(handle)) as client:
        return seen, getattr(client, method)(files, **options)


def frame():
    return geopandas.GeoDataFrame.from_features(FIELDS, crs="EPSG:4326")


@KINDS
@pytest.mark.parametrize("suffix", [".geojson", ".gpkg", ".parquet"])
def test_a_file_is_sent_unchanged(kind, tmp_path, suffix):
    path = tmp_path / f"parcels{suffix}"
    path.write_bytes(b"polygons")
    (request,), table = run(kind, fields=path)
    assert isinstance(table, Table)
    fields, stack = parts_of(request)
    kinds = {
        ".geojson": "application/geo+json",
        ".gpkg": "application/geopackage+sqlite3",
        ".parquet": "application/vnd.apache.parquet",
    }
    name = f"{tmp_path.name}/parcels{suffix}"
    assert fields == ("fields", name, kinds[suffix], b"polygons")
    assert stack == ("files", "2021-01-05.tif", "image/tiff", b"x")
    assert request.headers["accept"] == "application/geo+json, application/json;q=0.9"


@KINDS
@pytest.mark.parametrize("form", ["document", "frame", "projected", "bytes"])
def test_polygons_in_memory_are_geojson_in_degrees(kind, form):
    given = {
        "document": FIELDS,
        "frame": frame(),
        "projected": frame().to_crs("EPSG:32631"),
        "bytes": ("fields.geojson", json.dumps(FIELDS).encode()),
    }[form]
    (request,), _ = run(kind, fields=given)
    name, filename, mime, content = parts_of(request)[0]
    assert (name, filename, mime) == ("fields", "fields.geojson", "application/geo+json")
    found = geopandas.GeoDataFrame.from_features(json.loads(content), crs="EPSG:4326")
    assert json.loads(content)["features"][1]["properties"] == {"owner": None}
    assert found["owner"][0] == "é"
    for shape, expected in zip(found.geometry, frame().geometry, strict=True):
        np.testing.assert_allclose(shape.bounds, expected.bounds, atol=1e-9)


@KINDS
def test_with_references_the_polygons_are_in_the_json(kind, tmp_path):
    path = tmp_path / "parcels.geojson"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(FIELDS).encode())
    (request,), _ = run(kind, files=Reference(href="/a.tif"), fields=path)
    assert json.loads(request.content) == {"items": [{"href": "/a.tif"}], "fields": FIELDS}
    path = tmp_path / "parcels.gpkg"
    path.write_bytes(b"SQLite format 3\0")
    with pytest.raises(ValueError, match=r"parcels\.gpkg is not GeoJSON"):
        run(kind, files=Reference(href="/a.tif"), fields=path)


@KINDS
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fields": FIELDS, "points": [(3, 50)]}, ValueError, "points and fields exclude each"),
        ({"fields": FIELDS, "answer": "summary"}, ValueError, "fields and answer='summary' excl"),
        ({"fields": "nowhere.gpkg"}, FileNotFoundError, "nowhere.gpkg does not exist"),
        ({"fields": "a.shp"}, ValueError, "read it with GeoPandas"),
        ({"fields": 3}, TypeError, "polygons are given as a int"),
    ],
)
def test_invalid_fields_are_an_error_before_anything_is_sent(kind, options, error, message):
    with pytest.raises(error, match=message):
        run(kind, **options)


@KINDS
def test_classes_of_fields_are_a_table(kind, tmp_path):
    _, table = run(kind, fields=FIELDS)
    assert table.model == "m@1.0.0"
    assert len(table) == 2
    assert table[0]["id"] == "a"
    assert table[0]["class"] == "Maize"
    assert table[0]["share.Rye"] == 0.2
    assert table[1] == {"id": "b", "owner": None, "status": "outside"}
    data = table.to_pandas()
    assert data["owner"].isna().tolist() == [False, True]
    assert data["hectares"].tolist()[0] == 1.2
    shapes = table.to_geopandas()
    assert shapes.crs == "EPSG:4326"
    assert shapes.geometry[1].equals(box(4, 50, 5, 51))
    with table.save(tmp_path / "a.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["a", "b"]
    assert rows[0]["share.Maize"] == "0.8"
    assert json.loads(table.save(tmp_path / "a.geojson").read_text()) == table.document
    found = geopandas.read_parquet(table.save(tmp_path / "a.parquet"))
    assert list(found["id"]) == ["a", "b"]
    found = geopandas.read_file(table.save(tmp_path / "a.gpkg"))
    assert found["class"].isna().tolist() == [False, True]


@KINDS
def test_forecasts_and_embeddings_of_fields_are_tables(kind):
    properties = [
        {"status": "ok", "dates": ["2021-11-05"], "NDVI": {"q10": [0.1], "q50": [0.2]}},
        {"status": "no_data"},
    ]
    _, table = run(kind, properties, "forecast", fields=FIELDS, horizon=1)
    assert table[0] == {
        "id": "a", "status": "ok", "NDVI_2021-11-05_q10": 0.1, "NDVI_2021-11-05_q50": 0.2,
    }  # fmt: skip
    properties = [{"status": "ok", "embedding": [1.0, 2.0]}, {"status": "no_data"}]
    _, table = run(kind, properties, "embed", fields=FIELDS)
    assert table[0] == {"id": "a", "status": "ok", "embedding_0": 1.0, "embedding_1": 2.0}


@pytest.mark.parametrize(
    ("name", "hidden", "message"),
    [
        ("out.foo", "", "out.foo cannot be written, because '.foo' is not the suffix of a table: "),
        *in_all_tests(
            ("out", "", "out cannot be written, because '' is not the suffix of a table"),
            ("out.gpkg", "geopandas", "a table as .gpkg needs geopandas, which is not installed"),
            names=True,
        ),
    ],
)
def test_a_table_that_cannot_be_written_is_named_before_anything_is_sent(
    tmp_path, name, hidden, message
):
    (tmp_path / "parcels.geojson").write_text(json.dumps(FIELDS))
    (tmp_path / "2021-01-05.tif").write_bytes(b"x")
    program = (
        f"import sys; sys.modules[{hidden!r}] = None; from pimc_client.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--url", "http://127.0.0.1:9", "fields", "2021-01-05.tif",
         "parcels.geojson", "-o", name],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize("suffix", ["csv", *in_all_tests("geojson", None)])
def test_the_command_writes_the_table(tmp_path, suffix):
    from tests.kits.client import Reply, serving

    parcels = tmp_path / "parcels.geojson"
    parcels.write_text(json.dumps(FIELDS))
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "2021-01-05.tif").write_bytes(b"x")
    out = [] if suffix is None else ["-o", f"out.{suffix}"]
    content = json.dumps(collection(CLASSES)).encode()
    reply = Reply(body=content, headers={"Content-Type": "application/geo+json"})
    with serving(lambda _: reply) as (url, received):
        done = subprocess.run(
            [sys.executable, "-m", "pimc_client.cli", "--url", url, "fields", "stack",
             "parcels.geojson", *out],
            capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
            check=True,
        )  # fmt: skip
    assert received[0].path == "/classify-pixels"
    assert b'filename="stack/2021-01-05.tif"' in received[0].body
    text = done.stdout if suffix is None else (tmp_path / f"out.{suffix}").read_text()
    if suffix == "csv":
        assert text.splitlines()[0].startswith("id,owner,status,class,")
        assert text.count("\n") == 3
    else:
        assert json.loads(text) == collection(CLASSES)
