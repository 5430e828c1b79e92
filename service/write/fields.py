"""Field results as GeoJSON, CSV and GeoParquet: one row per field, in the request's order."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import shapely

from service.errors import InvalidFields, StackWarning, first_names

_MAX_CELLS = 10**8
"""Largest number of cells of a table: 100,000 fields with 1,000 columns."""
_MEASURED = frozenset({"ok", "no_data"})
"""Statuses of places with a measured series."""
_NAMED_AT_MOST = 5
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


def replaced_properties(
    properties: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]
) -> tuple[StackWarning, ...]:
    """The warning that results replace properties of the request; none if they do not.

    Args:
        properties: properties of each point or field, as the request has them.
        results: result of each.
    """
    names = dict.fromkeys(
        name
        for own, found in zip(properties, results, strict=True)
        for name in own
        if name in found
    )
    if not names:
        return ()
    shown = first_names(list(names), _NAMED_AT_MOST)
    detail = (
        f"the results replace {len(names)} properties of the same name ({shown}): rename them in "
        "the request to keep both"
    )
    return (StackWarning(code="properties_replaced", detail=detail),)


def table_rows(features: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """GeoJSON features as flat rows: `id`, and one column per property or nested value.

    A nested value has a dotted name (`probabilities.Maize`). A list with one number per date
    becomes one column per date (`NDVI_2021-11-05_q50`), any other list of numbers one column per
    position (`embedding_0`). The rows are made one at a time: all of 100,000 forecasts would take
    more memory than the forecasts.
    """
    return (_row(one["id"], one["properties"]) for one in features)


def _row(ident: Any, properties: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """A feature as a row.

    A property `geometry`, or `id` if it is not the feature's id, is `properties.geometry` or
    `properties.id`.
    """
    row = {"id": ident}
    for name, value in _flat(properties).items():
        taken = name == "geometry" or (name == "id" and value != ident)
        row[f"properties.{name}" if taken else name] = value
    return row


def _flat(properties: Mapping[str, Any]) -> dict[str, Any]:
    given = properties.get("dates")
    dates: list[Any] = given if isinstance(given, list) else []
    by_date = {
        name for name, value in properties.items() if dates and _is_by_date(value, len(dates))
    }
    row: dict[str, Any] = {}
    for name, value in properties.items():
        if name == "dates" and by_date:
            continue  # they are in the names of the columns
        if name in by_date:
            for inner, found in value.items():
                row |= {f"{name}_{day}_{inner}": v for day, v in zip(dates, found, strict=True)}
        elif isinstance(value, Mapping) and value:
            row |= {f"{name}.{inner}": _cell(found) for inner, found in value.items()}
        elif isinstance(value, list) and value and all(isinstance(v, float | int) for v in value):
            row |= {f"{name}_{n}": v for n, v in enumerate(value)}
        else:
            row[name] = _cell(value)
    return row


def _is_by_date(value: object, dates: int) -> bool:
    """Whether a value is an object of lists with one value per date."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(found, list) and len(found) == dates for found in value.values())
    )


def _cell(value: Any) -> Any:  # noqa: ANN401 - JSON
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _columns(features: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of all rows, in order.

    Raises:
        InvalidFields: the table has too many cells, because features have unequal properties or
            long lists.
    """
    columns = list(dict.fromkeys(name for row in table_rows(features) for name in row))
    if len(features) * len(columns) > _MAX_CELLS:
        raise InvalidFields(
            f"a table of {len(features)} features has {len(columns)} columns, one for each "
            f"property, and {_MAX_CELLS} cells are allowed: request GeoJSON, or send fewer "
            "properties"
        )
    return columns


def write_csv(features: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write features as CSV (RFC 4180) in UTF-8.

    Args:
        features: GeoJSON features, whose geometry is left out; columns as in `table_rows`.
        path: the file to write.

    Raises:
        InvalidFields: the table has too many cells.
    """
    columns = _columns(features)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(table_rows(features))


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
        if found["status"] in _MEASURED:
            rows = zip(found["dates"], *(found[column] for column in columns), strict=True)
            writer.writerows((name, found["status"], *row) for row in rows)
        else:  # a property of the request may be named `dates`, too
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
    return _write_geoparquet(features, _arrays(features), path)


def write_series_geoparquet(
    features: Sequence[Mapping[str, Any]], lists: Sequence[str], path: Path
) -> Path:
    """Write measured series as GeoParquet 1.1 in longitude and latitude: one row per place.

    Args:
        features: GeoJSON features whose properties contain lists with one value per date.
        lists: names of these lists, such as `B04` and `NDVI`.
        path: the file to write; its columns are those of `table_rows`, `dates` and `lists` as
            lists, null for a place without dates, and `geometry`.

    Returns:
        The path.

    Raises:
        InvalidFields: the table has too many cells.
    """
    by_date = {"dates", *lists}
    places = [
        {
            "id": one.get("id", number),
            "properties": {k: v for k, v in one["properties"].items() if k not in by_date},
        }
        for number, one in enumerate(features, start=1)
    ]
    # A place without a series may have properties of the request with the names of the lists.
    series = [p if p["status"] in _MEASURED else {} for p in (f["properties"] for f in features)]
    columns = _arrays(places)
    days = [
        None if "dates" not in one else [date.fromisoformat(day) for day in one["dates"]]
        for one in series
    ]
    columns["dates"] = pa.array(days, pa.list_(pa.date32()))
    for name in lists:
        columns[name] = pa.array([one.get(name) for one in series], pa.list_(pa.float64()))
    return _write_geoparquet(features, columns, path)


def _arrays(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of `table_rows`, by name.

    Raises:
        InvalidFields: the table has too many cells.
    """
    values: dict[str, list[Any]] = {name: [None] * len(features) for name in _columns(features)}
    for number, row in enumerate(table_rows(features)):
        for name, value in row.items():
            values[name][number] = value
    return {name: _array(values.pop(name)) for name in list(values)}


def _write_geoparquet(
    features: Sequence[Mapping[str, Any]], columns: dict[str, Any], path: Path
) -> Path:
    """Write columns, and the geometries of the features as the last one."""
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
