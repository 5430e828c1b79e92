"""Files of fields that hold far more than their bytes, and damaged ones."""

from __future__ import annotations

import json
import sqlite3
import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from service.errors import NotAVectorFile, TooManyFields
from service.read import vector_guard, vectors
from service.read.geotiff import SourceFile
from service.read.vectors import Fields, read_fields
from tests.kits.forks import ran

COUNT = 300
CASES = 100
GEO = {
    "version": "1.1.0",
    "primary_column": "geometry",
    "columns": {"geometry": {"encoding": "WKB", "geometry_types": []}},
}


def frame(count: int = COUNT) -> geopandas.GeoDataFrame:
    shapes = [shapely.box(n, 0, n + 0.9, 1).segmentize(0.05) for n in range(count)]
    return geopandas.GeoDataFrame(
        {"name": [f"field {n}" for n in range(count)], "n": range(count)},
        geometry=shapes,
        crs="EPSG:32631",
    )


def read(path: Path, most: int = 1000) -> Fields:
    return read_fields(SourceFile(name=path.name, path=path), most)


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    table = pa.table(columns).replace_schema_metadata({"geo": json.dumps(GEO)})
    pq.write_table(table, path, **options)
    return path


def squares(count: int) -> list[bytes]:
    return [shapely.to_wkb(shapely.box(n, 0, n + 1, 1)) for n in range(count)]


# GeoPackage -----------------------------------------------------------------------------------


@pytest.fixture
def geopackage(tmp_path: Path) -> Path:
    path = tmp_path / "fields.gpkg"
    frame().to_file(path, driver="GPKG", layer="fields")
    return path


def changed(path: Path, *statements: str) -> Path:
    with closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
    return path


ENDLESS = (
    "CREATE VIEW endless AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
    "SELECT x, geom FROM c, fields"
)


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        (ENDLESS, "view 'endless'"),
        ("ALTER TABLE fields ADD COLUMN big AS (zeroblob(1000000)) VIRTUAL", "column 'big'"),
        (f"ALTER TABLE fields ADD COLUMN big TEXT DEFAULT '{'x' * 2000}'", "default"),
        ("CREATE VIRTUAL TABLE words USING fts5(word)", "virtual table 'words'"),
    ],
)
def test_what_gdal_would_compute_is_rejected_by_name(
    geopackage: Path, statement: str, what: str
) -> None:
    assert len(read(geopackage)) == COUNT
    with pytest.raises(NotAVectorFile, match=f"'fields.gpkg' holds .*{what}.*export the layer"):
        read(changed(geopackage, statement))


def test_a_page_in_two_places_is_rejected(geopackage: Path) -> None:
    """Pages that refer to each other make a table of a few kilobytes endless."""
    with closing(sqlite3.connect(geopackage)) as database:
        (size,) = database.execute("PRAGMA page_size").fetchone()
        (root,) = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'fields'"
        ).fetchone()
    content = bytearray(geopackage.read_bytes())
    page = (root - 1) * size
    assert content[page] == 5  # an interior page, whose cells begin with the number of a page
    one, two = struct.unpack_from(">HH", content, page + 12)
    content[page + two : page + two + 4] = content[page + one : page + one + 4]
    geopackage.write_bytes(content)
    with pytest.raises(NotAVectorFile, match="damaged GeoPackage"):
        read(geopackage)


def test_a_schema_that_takes_too_long_is_rejected(
    geopackage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_guard, "_MAX_STEPS", 100)
    monkeypatch.setattr(vector_guard, "_STEPS_AT_ONCE", 10)
    with pytest.raises(NotAVectorFile, match="cannot be read as a GeoPackage"):
        read(geopackage)


# GeoParquet -----------------------------------------------------------------------------------

WRITERS: list[dict[str, Any]] = [
    {},
    {"compression": "none", "data_page_version": "2.0"},
    {"compression": "zstd", "use_dictionary": False, "data_page_size": 512},
    {"row_group_size": 70, "write_page_index": True, "write_page_checksum": True},
    {"use_dictionary": False, "column_encoding": {"name": "DELTA_BYTE_ARRAY"}},
]


@pytest.mark.parametrize("options", WRITERS, ids=lambda options: "-".join(options) or "default")
def test_pages_are_followed_as_the_writer_made_them(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    names = [f"field {n % 7}" for n in range(COUNT)]
    lists = [[n] * (n % 4) for n in range(COUNT)]
    path = parquet(
        tmp_path / "fields.parquet",
        {"geometry": squares(COUNT), "name": names, "list": lists},
        **options,
    )
    with pq.ParquetFile(path) as file, path.open("rb") as opened:
        data = vector_guard.mmap.mmap(opened.fileno(), 0, access=vector_guard.mmap.ACCESS_READ)
        for group in range(file.metadata.num_row_groups):
            for number in range(file.metadata.num_columns):
                column = file.metadata.row_group(group).column(number)
                chunk = vector_guard._chunk(data, column, "x")
                assert chunk.values == column.num_values
                # The footer counts the headers of the pages as well.
                assert 0.3 * column.total_uncompressed_size < chunk.size
                assert chunk.size < column.total_uncompressed_size
        data.close()
    fields = read(path)
    assert [one["name"] for one in fields.properties] == names
    assert [one["list"] for one in fields.properties] == lists


@pytest.mark.parametrize("kind", ["text", "category", "delta", "list", "geometry"])
def test_a_value_that_every_row_repeats_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """100 kB in the file would be 30 MB of text."""
    long = "x" * 100_000
    options: dict[str, Any] = {}
    columns: dict[str, Any] = {"geometry": squares(COUNT)}
    repeated = pa.DictionaryArray.from_arrays(np.zeros(COUNT, np.int32), [long])
    if kind == "category":
        columns["name"] = repeated
    elif kind == "geometry":
        large = shapely.to_wkb(shapely.box(0, 0, 1, 1).segmentize(1 / 1_600))
        columns["geometry"] = pa.DictionaryArray.from_arrays(np.zeros(COUNT, np.int32), [large])
    elif kind == "list":
        columns["name"] = pa.ListArray.from_arrays(np.arange(COUNT + 1, dtype=np.int32), repeated)
    else:
        columns["name"] = repeated.cast(pa.string())
    if kind == "delta":
        options = {"use_dictionary": False, "column_encoding": {"name": "DELTA_BYTE_ARRAY"}}
    else:
        options = {"dictionary_pagesize_limit": 2**23}
    path = parquet(tmp_path / "fields.parquet", columns, **options)
    assert path.stat().st_size < 200_000
    with monkeypatch.context() as patched:
        for module in (vector_guard, vectors):
            patched.setattr(module, "MAX_DECODED_BYTES", 20 * 2**20)
        patched.setattr(vector_guard, "_BATCH_BYTES", 4 * 2**20)
        peaks = []
        decoded = vectors._decoded

        def watched(batch: pa.RecordBatch) -> pa.RecordBatch:
            found = decoded(batch)
            peaks.append(found.nbytes)
            return found

        patched.setattr(vectors, "_decoded", watched)
        with pytest.raises(NotAVectorFile, match="decodes to"):
            read(path)
    assert max(peaks, default=0) < 5 * 2**20


def test_the_decoded_size_is_that_of_the_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "fields.parquet", {"geometry": squares(COUNT)}, compression="zstd")
    monkeypatch.setattr(vector_guard, "MAX_DECODED_BYTES", 10_000)
    with pytest.raises(NotAVectorFile, match=r"decodes to [0-9]+ bytes, and the limit is 10000"):
        read(path)


def test_a_list_that_repeats_in_a_few_bytes_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(
        tmp_path / "fields.parquet", {"geometry": squares(10), "list": [[7] * 100_000] * 10}
    )
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(vector_guard, "_MAX_VALUES", 2**19)
    with pytest.raises(NotAVectorFile, match="decodes to 1000010 values"):
        read(path)


# Shapes ---------------------------------------------------------------------------------------


def nested(levels: int) -> bytes:
    """A MultiPolygon whose only part is a MultiPolygon, and so on."""
    head = struct.pack("<BII", 1, 6, 1)
    return head * levels + shapely.to_wkb(shapely.box(0, 0, 1, 1))


def test_parts_that_nest_do_not_end_the_process(tmp_path: Path) -> None:
    shapes = [*squares(3), nested(1), nested(300_000)]
    fields = read(parquet(tmp_path / "fields.parquet", {"geometry": shapes}))
    assert [shape is None for shape in fields.shapes] == [False, False, False, False, True]
    assert [one.code for one in fields.warnings] == ["invalid_fields"]


def test_a_shape_with_a_coordinate_that_is_not_a_number_is_invalid(tmp_path: Path) -> None:
    """The bounds of a shape leave it out, and repairing the shape is an error of GEOS."""
    bow = shapely.to_wkb(shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)]))
    at = 1 + 4 + 4 + 4 + 2 * 16
    damaged = bow[:at] + struct.pack("<d", float("nan")) + bow[at + 8 :]
    fields = read(parquet(tmp_path / "fields.parquet", {"geometry": [*squares(1), bow, damaged]}))
    assert [shape is None for shape in fields.shapes] == [False, False, True]
    assert [one.code for one in fields.warnings] == ["fields_repaired", "invalid_fields"]


@pytest.mark.parametrize("has_z", [False, True])
@pytest.mark.parametrize("flavor", ["iso", "extended"])
@pytest.mark.parametrize("byte_order", [0, 1])
def test_every_form_of_well_known_binary_is_read(
    tmp_path: Path, has_z: bool, flavor: str, byte_order: int
) -> None:
    hole = shapely.Polygon(shapely.box(0, 0, 9, 9).exterior, [shapely.box(2, 2, 3, 3).exterior])
    shapes = [hole, shapely.MultiPolygon([hole, shapely.box(20, 20, 21, 21)])]
    if has_z:
        shapes = [shapely.force_3d(shape, 5.0) for shape in shapes]
    wkb = [shapely.to_wkb(s, flavor=flavor, byte_order=byte_order) for s in shapes]
    wkb.append(shapely.to_wkb(shapely.set_srid(shapes[1], 4326), include_srid=True))
    fields = read(parquet(tmp_path / "fields.parquet", {"geometry": wkb}))
    assert [shape.area for shape in fields.shapes] == [80, 81, 81]
    assert fields.warnings == ()


# GeoJSON --------------------------------------------------------------------------------------


def geojson(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


SQUARE = json.dumps(shapely.geometry.mapping(shapely.box(0, 0, 1, 1)))


@pytest.mark.parametrize(
    "text",
    [
        '{"type": "FeatureCollection", "features": [{"geometry": %s},]}',
        '{"type": "FeatureCollection", "features": [{"geometry": %s} {}]}',
        '{"type": "FeatureCollection", "features": [{"geometry": %s}}',
        '{"type": "FeatureCollection", "features": [{"geometry": %s}',
        '{"type": "FeatureCollection" "features": [{"geometry": %s}]}',
        '{"type": "FeatureCollection", "features": [{"geometry": %s}]} 1',
        '{"type": "FeatureCollection", "features": [{"geometry": %s}], }',
        '{1: 2, "type": "FeatureCollection", "features": [{"geometry": %s}]}',
        '{"type": "FeatureCollection", "features": [{"geometry": %s}, null]}',
    ],
)
def test_text_that_is_not_json_is_rejected(tmp_path: Path, text: str) -> None:
    """The features are read one by one, so the document around them is checked too."""
    with pytest.raises(
        NotAVectorFile, match=r"'x\.geojson' (is not valid JSON|has a feature that is not)"
    ):
        read(geojson(tmp_path / "x.geojson", text % SQUARE))


def test_members_come_in_any_order_with_any_spaces(tmp_path: Path) -> None:
    text = (
        '\n{ "crs" : {"properties": {"name": "EPSG:3857"}} ,"features"\t: [ {"id" : "a",'
        f'"geometry": {SQUARE} , "properties": null}} , {{"geometry": null}} ] , "type":'
        '"FeatureCollection"}\n'
    )
    fields = read(geojson(tmp_path / "x.geojson", text))
    assert fields.ids == ("a", 2)
    assert fields.crs.to_epsg() == 3857
    assert [shape is None for shape in fields.shapes] == [False, True]


def test_properties_are_what_json_can_hold(tmp_path: Path) -> None:
    own = '{"half": "\\ud800", "\\udc00": 1, "nan": NaN, "large": 123456789012345678901234567890}'
    text = f'{{"type": "Feature", "id": ["\\ud800"], "geometry": {SQUARE}, "properties": {own}}}'
    fields = read(geojson(tmp_path / "x.geojson", text))
    assert fields.ids == (["?"],)
    assert fields.properties[0] == {
        "half": "?",
        "?": 1,
        "nan": None,
        "large": 123456789012345678901234567890,
    }


def test_limits_of_geojson_are_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.geojson"
    text = '{"type": "FeatureCollection", "features": [%s]}'
    feature = f'{{"geometry": {SQUARE}, "properties": {{"a": %s}}}}'
    deep = "[" * 40 + "]" * 40
    with pytest.raises(NotAVectorFile, match="nests deeper than 32 levels"):
        read(geojson(path, text % (feature % deep)))
    assert len(read(geojson(path, text % (feature % "[[[1]]]")))) == 1
    with pytest.raises(TooManyFields, match=r"more features than the limit of 2 .PIMC_MAX_FIELDS"):
        read(geojson(path, text % ",".join([feature % 1] * 3)), most=2)
    with monkeypatch.context() as patched:
        patched.setattr(vectors, "_MAX_LISTS", 5)
        with pytest.raises(TooManyFields, match=r"vertices.*the limit is 5: send GeoPackage"):
            read(path)
    monkeypatch.setattr(vectors, "_MAX_TEXT_BYTES", 50)
    with pytest.raises(TooManyFields, match="bytes, and the limit is 50: send GeoPackage"):
        read(path)


# Damage ---------------------------------------------------------------------------------------

# In a process of its own, because a fault of GDAL, GEOS or Arrow may end it.
_FUZZ = """
import json, random, sys
from pathlib import Path
from service.errors import PIMCError
from service.read.geotiff import SourceFile
from service.read.vectors import read_fields

sound, damaged = Path({sound!r}), Path({damaged!r})
content = sound.read_bytes()
counts = {{"read": 0}}
for seed in range({cases}):
    print(seed, file=sys.stderr, flush=True)
    chance = random.Random(seed)
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        at = chance.randrange(len(changed))
        kind = chance.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at : at + 4] = chance.choice((b"\\xff" * 4, bytes(4), b"\\x7f\\xff\\xff\\xff"))
        elif kind == 2:
            other, length = chance.randrange(len(changed)), chance.randrange(1, 64)
            changed[at : at + length] = changed[other : other + length]
        else:
            del changed[at : at + chance.choice((1, 8, 512))]
    damaged.write_bytes(changed)
    try:
        read_fields(SourceFile(name="damaged", path=damaged), 1000)
        code = "read"
    except PIMCError as error:
        code = error.code
    counts[code] = counts.get(code, 0) + 1
print(json.dumps(counts))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["gpkg", "parquet", "geojson"])
def test_no_damaged_file_crashes_or_raises_another_error(tmp_path: Path, ending: str) -> None:
    sound = tmp_path / f"sound.{ending}"
    few = frame(30)
    if ending == "parquet":
        few.to_parquet(sound)
    else:
        few.to_file(sound, driver={"gpkg": "GPKG", "geojson": "GeoJSON"}[ending])
    program = _FUZZ.format(sound=str(sound), damaged=str(tmp_path / "damaged"), cases=CASES)
    child = ran("tests.kits.code", program, variables={})
    assert child.returncode == 0, child.stderr[-2000:]
    counts = json.loads(child.stdout)
    assert sum(counts.values()) == CASES
    # Damage reaches the readers: some files are still read, others rejected.
    assert counts["read"] >= 5
    assert counts["not_a_vector_file"] >= 5
