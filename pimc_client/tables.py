"""Points and series from files: CSV, as spreadsheets write it, GeoJSON and JSON.

A byte order mark is skipped. CSV may be separated by commas, semicolons or tabs; with semicolons
or tabs, numbers may have a decimal comma.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGITUDE = ("lon", "longitude", "lng", "long", "x")
"""Names of the column of longitudes, in lower case."""
LATITUDE = ("lat", "latitude", "y")
"""Names of the column of latitudes, in lower case."""
ID = ("id", "name", "fid")
"""Names of the column that identifies points or series, in lower case."""
DATE = ("date", "datetime", "time")
"""Names of the column of dates, in lower case."""


@dataclass(frozen=True, kw_only=True)
class SeriesRows:
    """The rows of one series, in the file's order."""

    id: str
    dates: list[str]
    bands: dict[str, list[float | None]]
    """Band name to values; None for an empty cell."""
    lonlat: tuple[float | None, float | None] = (None, None)
    """Longitude and latitude in degrees, of JSON as they are; None if the file has none."""


def points_of_file(path: Path) -> dict[str, Any]:
    """Points of a GeoJSON or CSV file as a GeoJSON FeatureCollection.

    A CSV has a column of longitudes and one of latitudes, in degrees; further columns become the
    points' properties, and a column `id` their ids.

    Raises:
        ValueError: the file is not of this form; the message names the row or what is missing.
        FileNotFoundError: the file does not exist.
    """
    text = _text(path)
    if not text.lstrip().startswith(("{", "[")):
        return _points_of_csv(path, text)
    document = _json(path, text)
    if not isinstance(document, dict) or document.get("type") != "FeatureCollection":
        raise ValueError(
            f"{path} is JSON but not a GeoJSON FeatureCollection: give one, or a CSV file of points"
        )
    return document


def json_of_file(path: Path, kind: str) -> dict[str, Any]:
    """The JSON object of a file.

    Args:
        path: the file.
        kind: the expected content, for the message.

    Raises:
        ValueError: the file does not hold a JSON object.
        FileNotFoundError: the file does not exist.
    """
    try:
        document = json.loads(_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not {kind}, because it is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not {kind}, because its JSON is not an object")  # noqa: TRY004 (a file's content)
    return document


def series_of_file(path: Path) -> list[SeriesRows]:
    """Series of a CSV or JSON file.

    A CSV has one row per observation: a column `date`, one column per band (`B02`), and a column
    `id` if it holds more than one series. An empty cell is a missing observation. Columns of a
    longitude and a latitude are the place of the series, empty for one without. A JSON file holds a
    list of series, or the body of a series request: `{"series": [{"id", "dates", "B02", …}]}`.

    Raises:
        ValueError: the file is not of this form; the message names the row or what is missing.
        FileNotFoundError: the file does not exist.
    """
    text = _text(path)
    if not text.lstrip().startswith(("{", "[")):
        return _series_of_csv(path, text)
    document = _json(path, text)
    listed = document.get("series") if isinstance(document, dict) else document
    if not isinstance(listed, list):
        raise ValueError(  # noqa: TRY004 (the content of a file, not an argument)
            f'{path} is JSON without series: give a list of series, or {{"series": […]}}'
        )
    return [_series_of_json(path, one, number) for number, one in enumerate(listed, 1)]


_NOT_CP1252 = frozenset(b"\x81\x8d\x8f\x90\x9d")
"""Bytes that Windows's code page 1252 does not define."""


def _text(path: Path) -> str:
    data = path.read_bytes()
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError:
        # Windows's code page is Latin-1 with letters in place of some control characters.
        return data.decode("cp1252" if not _NOT_CP1252 & set(data) else "latin-1")


def _json(path: Path, text: str) -> Any:  # noqa: ANN401 (any JSON)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{path} starts like JSON, but is not valid JSON ({error}): give valid JSON, or a "
            "CSV file"
        ) from error


def _points_of_csv(path: Path, text: str) -> dict[str, Any]:
    table = _Table.of(path, text)
    lon, lat = table.column(LONGITUDE, "longitudes"), table.column(LATITUDE, "latitudes")
    name = table.find(ID)
    features = []
    for label, row in table.rows():
        feature: dict[str, Any] = {
            "type": "Feature",
            "geometry": {
                "type": "Point",
                "coordinates": list(_place(table, row, label, lon, lat)),
            },
            "properties": {key: value for key, value in row.items() if key not in {lon, lat}},
        }
        if name is not None:
            feature["id"] = row[name]
        features.append(feature)
    if not features:
        raise ValueError(f"{path} has a header but no points: give one row per point")
    return {"type": "FeatureCollection", "features": features}


def _series_of_csv(path: Path, text: str) -> list[SeriesRows]:
    table = _Table.of(path, text)
    date, name = table.column(DATE, "dates"), table.find(ID)
    lon, lat = table.find(LONGITUDE), table.find(LATITUDE)
    if (lon is None) != (lat is None):
        given, lacking = (lon, "latitudes") if lat is None else (lat, "longitudes")
        raise ValueError(f"{path} has a column {given}, but none of {lacking}: give both or none")
    bands = [column for column in table.header if column not in {date, name, lon, lat}]
    if not bands:
        raise ValueError(f"{path} has no column of a band: give one column per band, such as B02")
    found: dict[str, SeriesRows] = {}
    for label, row in table.rows():
        key = path.stem if name is None else row[name]
        series = found.get(key)
        lonlat: tuple[float | None, float | None] = (None, None)
        if lon and lat and (row[lon].strip() or row[lat].strip()):
            lonlat = _place(table, row, label, lon, lat)
        if series is None:
            series = SeriesRows(id=key, dates=[], bands={b: [] for b in bands}, lonlat=lonlat)
            found[key] = series
        elif series.lonlat != lonlat:
            raise ValueError(
                f"{path}: {label}: series '{key}' has another place than in its first row; give "
                "one place for a series"
            )
        series.dates.append(row[date])
        for band in bands:
            cell = row[band].strip()
            missing = not cell or cell.lower() in {"na", "nan", "null", "none"}
            series.bands[band].append(
                None if missing else table.number(cell, f"{label}, column {band}")
            )
    if not found:
        raise ValueError(f"{path} has a header but no observations: give one row per observation")
    return list(found.values())


def _place(
    table: _Table, row: Mapping[str, str], label: str, lon: str, lat: str
) -> tuple[float, float]:
    """Longitude and latitude of a row, in degrees."""
    return (
        table.degrees(row[lon], 180, f"{label}, column {lon}"),
        table.degrees(row[lat], 90, f"{label}, column {lat}"),
    )


def _series_of_json(path: Path, one: object, number: int) -> SeriesRows:
    if not isinstance(one, Mapping) or not isinstance(one.get("dates"), list):
        raise ValueError(  # noqa: TRY004 (the content of a file, not an argument)
            f'{path}: series {number} is not {{"id", "dates": […], "B02": […], …}}'
        )
    others = {"id", "dates", "lon", "lat"}
    bands = {name: value for name, value in one.items() if name not in others}
    lonlat = one.get("lon"), one.get("lat")
    return SeriesRows(id=str(one.get("id", number)), dates=one["dates"], bands=bands, lonlat=lonlat)


_SEPARATOR_LINE = re.compile(r"sep=([,;\t])")


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A CSV with a header."""

    path: Path
    header: list[str]
    lines: list[list[str]]
    decimal_comma: bool

    @classmethod
    def of(cls, path: Path, text: str) -> _Table:
        first, _, rest = text.lstrip().partition("\n")
        if stated := _SEPARATOR_LINE.fullmatch(first.strip()):  # Excel's first line
            text, separator = rest, stated[1]
        else:
            separator = max(",;\t", key=first.count)
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
        lines = [line for line in lines if any(cell.strip() for cell in line)]
        if not lines:
            raise ValueError(f"{path} is empty: give a CSV with a header, or JSON")
        header = [cell.strip() for cell in lines[0]]
        twice = next((cell for cell in header if cell and header.count(cell) > 1), None)
        if twice is not None:
            raise ValueError(f"{path} has two columns {twice}: leave one of them out, or rename it")
        return cls(path=path, header=header, lines=lines[1:], decimal_comma=separator != ",")

    def find(self, names: tuple[str, ...]) -> str | None:
        """The header's own spelling of the first of these columns that it has."""
        spelled = {column.lower(): column for column in reversed(self.header)}
        return next((spelled[name] for name in names if name in spelled), None)

    def column(self, names: tuple[str, ...], content: str) -> str:
        """The column of `find`, which must exist.

        Raises:
            ValueError: the header has none of the names.
        """
        found = self.find(names)
        if found is None:
            raise ValueError(
                f"{self.path} has no column of {content}, only {', '.join(self.header)}: name "
                f"one of its columns {', '.join(names[:-1])} or {names[-1]}"
            )
        return found

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Each row, with a label for messages."""
        for number, line in enumerate(self.lines, 1):
            if len(line) != len(self.header):
                raise ValueError(
                    f"{self.path}, row {number}: {len(line)} cells but {len(self.header)} "
                    "columns: give one cell per column"
                )
            yield f"{self.path}, row {number}", dict(zip(self.header, line, strict=True))

    def number(self, text: str, label: str) -> float:
        """A finite number.

        Raises:
            ValueError: the text is not a finite number.
        """
        plain = text.strip().replace(",", ".") if self.decimal_comma else text.strip()
        try:
            value = float(plain)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{label}: '{text}' is not a finite number")
        return value

    def degrees(self, text: str, largest: float, label: str) -> float:
        """A longitude or latitude in degrees.

        Raises:
            ValueError: the text is not such a number; it may be a coordinate in metres.
        """
        value = self.number(text, label)
        if abs(value) > largest:
            raise ValueError(
                f"{label}: {text} is not from -{largest:g} to {largest:g}; points are longitude "
                "and latitude in degrees (EPSG:4326)"
            )
        return value


def flat_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A result of one place as one row.

    Values of a forecast are named like the bands of a forecast raster (`NDVI_2021-11-05_q50`).
    Values of other lists are named by their date (`NDVI_2021-11-05`) or, without dates, by their
    number (`embedding_0`); members of an object by both names (`probabilities.Maize`).
    """
    dates = record.get("dates")
    days: Sequence[Any] = dates if isinstance(dates, list) else []
    row: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            for inner, values in value.items():
                if isinstance(values, list) and len(values) == len(days):
                    row |= {f"{name}_{day}_{inner}": v for day, v in zip(days, values, strict=True)}
                else:
                    row[f"{name}.{inner}"] = values
        elif isinstance(value, list):
            if name != "dates":
                labels = days if len(days) == len(value) else range(len(value))
                row |= {f"{name}_{label}": v for label, v in zip(labels, value, strict=True)}
        else:
            row[name] = value
    return row


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header; a row may lack columns of the others."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
