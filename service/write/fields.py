"""Field results as GeoJSON, CSV and GeoParquet: one row per field, in the request's order."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import shapely

from service.errors import InvalidFields

_MAX_CELLS = 10**8
"""Largest number of cells of a table: 100,000 fields with 1,000 columns."""
_GEO = {
    "version": "1.1.0",
    "primary_column": "geometry",
    # Without a `crs`, GeoParquet's default holds: longitude and latitude (OGC:CRS84).
    "columns": {"geometry": {"encoding": "WKB", "geometry_types": []}},
}


def field_features(
    ids: Sequence[Any],
    properties: Sequence[Mapping[str, Any]],
    geometries: Sequence[Mapping[str, Any] | None],
    results: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """GeoJSON features of fields with their results.

    Args:
        ids: id of each field.
        properties: properties of each field, as the request has them.
        geometries: GeoJSON geometry of each field in degrees (EPSG:4326); None for a field without
            a usable geometry.
        results: result of each field; a result replaces a property of the same name.

    Returns:
        One feature per field, in the order given.
    """
    return [
        {
            "type": "Feature",
            "id": name,
            "geometry": geometry,
            "properties": {**own, **found},
        }
        for name, own, geometry, found in zip(ids, properties, geometries, results, strict=True)
    ]


def table_rows(features: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """GeoJSON features as flat rows: `id`, and one column per property or nested value.

    A nested value has a dotted name (`probabilities.Maize`). A list with one number per date
    becomes one column per date (`NDVI_2021-11-05_q50`), any other list of numbers one column per
    position (`embedding_0`).
    """
    return [{"id": one["id"], **_flat(one["properties"])} for one in features]


def _flat(properties: Mapping[str, Any]) -> dict[str, Any]:
    dates = properties.get("dates") if isinstance(properties.get("dates"), list) else []
    row: dict[str, Any] = {}
    for name, value in properties.items():
        if name == "dates" and dates:
            continue
        if isinstance(value, Mapping):
            for inner, found in value.items():
                if isinstance(found, list) and len(found) == len(dates or ()):
                    row |= {
                        f"{name}_{day}_{inner}": v
                        for day, v in zip(dates or (), found, strict=True)
                    }
                else:
                    row[f"{name}.{inner}"] = _cell(found)
        elif isinstance(value, list) and all(isinstance(v, float | int) for v in value):
            row |= {f"{name}_{n}": v for n, v in enumerate(value)}
        else:
            row[name] = _cell(value)
    return row


def _cell(value: Any) -> Any:  # noqa: ANN401 - JSON
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of all rows, in order.

    Raises:
        InvalidFields: the table has too many cells, because features have unequal properties or
            long lists.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if len(rows) * len(columns) > _MAX_CELLS:
        raise InvalidFields(
            f"a table of {len(rows)} features has {len(columns)} columns, one for each property, "
            f"and {_MAX_CELLS} cells are allowed: request GeoJSON, or send fewer properties"
        )
    return columns


def fields_csv(features: Sequence[Mapping[str, Any]]) -> str:
    """GeoJSON features as CSV (RFC 4180) without their geometry, columns as in `table_rows`.

    Raises:
        InvalidFields: the table has too many cells.
    """
    rows = table_rows(features)
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def observations_csv(features: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Measured series as CSV (RFC 4180): one row per place and date.

    Args:
        features: GeoJSON features whose properties contain lists with one value per date.
        columns: names of these lists, such as `B04` and `NDVI`.

    Returns:
        The text. A place without dates has one row whose other columns are empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(("id", "status", "date", *columns))
    for number, one in enumerate(features, start=1):
        found = one["properties"]
        name = one.get("id", number)
        rows = zip(found.get("dates", ()), *(found.get(c, ()) for c in columns), strict=True)
        writer.writerows((name, found["status"], *row) for row in rows)
        if "dates" not in found:
            writer.writerow((name, found["status"], *[""] * (1 + len(columns))))
    return text.getvalue()


def write_geoparquet(features: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write features as GeoParquet 1.1 in longitude and latitude (OGC:CRS84).

    Args:
        features: GeoJSON features; columns as in `table_rows`, and `geometry`.
        path: the file to write.

    Returns:
        The path.

    Raises:
        InvalidFields: the table has too many cells.
    """
    rows = table_rows(features)
    columns = {name: _array([row.get(name) for row in rows]) for name in _columns(rows)}
    shapes = [
        None if one["geometry"] is None else shapely.from_geojson(json.dumps(one["geometry"]))
        for one in features
    ]
    columns["geometry"] = pa.array(
        [None if shape is None else shapely.to_wkb(shape) for shape in shapes], pa.binary()
    )
    table = pa.table(columns)
    metadata = {**(table.schema.metadata or {}), b"geo": json.dumps(_GEO).encode()}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")
    return path


def _array(values: list[Any]) -> Any:  # noqa: ANN401 - pyarrow has no types
    """A column of one type; text if the values have several types."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
