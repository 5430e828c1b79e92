"""Fields: polygons with ids and properties, from GeoJSON, GeoPackage or GeoParquet.

The first bytes determine the reader: GeoJSON is read as JSON, GeoPackage only by GDAL's GPKG driver
(pyogrio), GeoParquet by Apache Arrow. Counts and sizes are checked before a feature is read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS

from service.errors import InvalidFields, NotAVectorFile, StackWarning, TooManyFields, first_names
from service.grid import CRSError, crs_of, transformed
from service.read.drivers import keep_needed_vector_drivers
from service.read.geotiff import SourceFile

_DEGREES = CRS.from_epsg(4326)
_GEOPACKAGES = frozenset({b"GPKG", b"GP10", b"GP11", b"GP12"})
_APPLICATION_ID = slice(68, 72)
_MAX_DECODED_BYTES = 512 * 2**20
"""Largest decoded size of a GeoParquet file, bytes: columns may be compressed a thousandfold."""
_MAX_PROPERTIES = 500
_NAMED_AT_MOST = 5
_NAME_LENGTH = 64
"""Largest number of characters of a client's text in a message."""
_POLYGONS = frozenset({shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON})
_POINTS = frozenset({shapely.GeometryType.POINT, shapely.GeometryType.MULTIPOINT})


@dataclass(frozen=True, kw_only=True)
class Fields:
    """N agricultural parcels or other polygons, in the order of their file."""

    ids: tuple[Any, ...]
    """Ids (N) in the file; the id of a feature without one is its position, from 1."""
    properties: tuple[Mapping[str, Any], ...]
    """Properties (N), JSON values."""
    shapes: NDArray[np.object_]
    """Shapely polygons (N) in the file's CRS, and points if `read_labels` returned them; None for a
    feature without a usable shape."""
    crs: CRS
    warnings: tuple[StackWarning, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def extent(self) -> tuple[float, float, float, float] | None:
        """West, south, east and north in degrees; None if no feature has a usable shape."""
        shapes = [shape for shape in self.in_crs(_DEGREES) if shape is not None]
        if not shapes:
            return None
        west, south, east, north = (float(number) for number in shapely.total_bounds(shapes))
        return west, south, east, north

    @property
    def geojson(self) -> list[dict[str, Any] | None]:
        """GeoJSON geometries (N) in EPSG:4326."""
        shapes = self.in_crs(_DEGREES)
        return [None if s is None else json.loads(shapely.to_geojson(s)) for s in shapes]

    def part(self, chosen: NDArray[np.intp]) -> Fields:
        """The fields at some positions, without the file's warnings."""
        return Fields(
            ids=tuple(self.ids[n] for n in chosen),
            properties=tuple(self.properties[n] for n in chosen),
            shapes=self.shapes[chosen],
            crs=self.crs,
            warnings=(),
        )

    def in_crs(self, crs: CRS) -> NDArray[np.object_]:
        """The shapes (N) in another CRS; None for a shape outside the area of that CRS."""
        if crs == self.crs:
            return self.shapes

        def project(places: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.stack(transformed(self.crs, crs, places[:, 0], places[:, 1]), axis=1)

        present = np.array([shape is not None for shape in self.shapes], np.bool_)
        shapes = np.full(len(self), None, np.object_)
        if present.any():
            projected = shapely.transform(self.shapes[present], project)
            finite = np.isfinite(shapely.bounds(projected)).all(axis=1)
            shapes[np.flatnonzero(present)[finite]] = projected[finite]
        return shapes


def read_fields(source: SourceFile, most: int) -> Fields:
    """Read polygons from a file.

    Args:
        source: the file.
        most: largest number of features.

    Returns:
        The fields; `warnings` name repaired and unusable features and repeated ids.

    Raises:
        NotAVectorFile: the file has none of the three formats, or cannot be read.
        TooManyFields: the file has more features than `most`.
        InvalidFields: no feature has a polygon.
    """
    return _read_vectors(source, most, points=False)


def read_labels(source: SourceFile, most: int) -> Fields:
    """Read points and polygons from a file.

    Args:
        source: the file.
        most: largest number of features.

    Returns:
        The features; `warnings` name repaired and unusable features and repeated ids.

    Raises:
        NotAVectorFile: the file has none of the three formats, or cannot be read.
        TooManyFields: the file has more features than `most`.
        InvalidFields: no feature has a point or a polygon.
    """
    return _read_vectors(source, most, points=True)


def points_in_degrees(lonlat: Sequence[tuple[float, float]], ids: Sequence[Any]) -> Fields:
    """Points (N) as features without properties, as `read_labels` returns those of a file.

    Args:
        lonlat: longitude and latitude of each, degrees.
        ids: their ids.
    """
    return Fields(
        ids=tuple(ids),
        properties=tuple({} for _ in ids),
        shapes=np.array(shapely.points(np.asarray(lonlat, float).reshape(-1, 2)), np.object_),
        crs=_DEGREES,
        warnings=(),
    )


def _read_vectors(source: SourceFile, most: int, *, points: bool) -> Fields:
    with source.path.open("rb") as file:
        head = file.read(100)
    if head.startswith(b"SQLite format 3\0") and head[_APPLICATION_ID] in _GEOPACKAGES:
        ids, properties, shapes, crs = _read_geopackage(source, most)
    elif head.startswith(b"PAR1"):
        ids, properties, shapes, crs = _read_geoparquet(source, most)
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        ids, properties, shapes, crs = _read_geojson(source, most)
    else:
        raise NotAVectorFile(
            f"'{source.name}' is not GeoJSON, GeoPackage or GeoParquet: it starts with {head[:8]!r}"
        )
    shapes, warnings = _usable(source.name, ids, shapes, points=points)
    return Fields(
        ids=tuple(ids),
        properties=tuple(properties),
        shapes=shapes,
        crs=crs,
        warnings=(*warnings, *_repeated(ids)),
    )


_Read = tuple[list[Any], list[dict[str, Any]], NDArray[np.object_], CRS]


def _check_count(name: str, count: int, most: int) -> None:
    if count > most:
        raise TooManyFields(
            f"'{name}' has {count} features, the limit is {most} (PIMC_MAX_FIELDS); send them in "
            "several requests"
        )


def _read_geojson(source: SourceFile, most: int) -> _Read:
    try:
        document = json.loads(source.path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise NotAVectorFile(f"'{source.name}' is not valid JSON in UTF-8") from error
    kind = document.get("type") if isinstance(document, dict) else None
    if kind == "Feature":
        document = {"features": [document]}
    elif kind in ("Polygon", "MultiPolygon"):  # not a set: a list has no hash
        document = {"features": [{"type": "Feature", "geometry": document}]}
    elif kind != "FeatureCollection":
        raise NotAVectorFile(
            f"'{source.name}' is JSON of type {str(kind)[:_NAME_LENGTH]!r}, not a GeoJSON "
            "FeatureCollection"
        )
    features = document.get("features")
    if not isinstance(features, list) or not all(isinstance(one, dict) for one in features):
        raise NotAVectorFile(f"'{source.name}' has no list of GeoJSON features")
    _check_count(source.name, len(features), most)
    ids = [one.get("id") for one in features]
    ids = [_json_value(n if one is None else one) for n, one in enumerate(ids, start=1)]
    properties = [one.get("properties") or {} for one in features]
    if not all(isinstance(one, dict) for one in properties):
        raise NotAVectorFile(f"'{source.name}' has a feature whose properties are not an object")
    shapes = np.full(len(features), None, np.object_)
    for n, one in enumerate(features):
        if isinstance(one.get("geometry"), dict):
            shapes[n] = shapely.from_geojson(json.dumps(one["geometry"]), on_invalid="ignore")
    crs = _named_crs(source.name, document.get("crs"))
    return ids, [_json_object(one) for one in properties], shapes, crs


def _named_crs(name: str, crs: object) -> CRS:
    """The CRS of GeoJSON: longitude and latitude, or the CRS named as in GeoJSON of 2008."""
    if crs is None:
        return _DEGREES
    try:
        text = crs["properties"]["name"]  # type: ignore[index]
        return _DEGREES if "CRS84" in text else crs_of(text)
    except (TypeError, KeyError, AttributeError, CRSError) as error:
        raise NotAVectorFile(f"'{name}' names a CRS that is not known") from error


def _read_geopackage(source: SourceFile, most: int) -> _Read:
    import pyogrio  # imported here, because it imports pandas if installed, which takes long
    from pyogrio import _io
    from pyogrio.errors import DataLayerError, DataSourceError

    keep_needed_vector_drivers(_io.__file__)

    # GDAL chooses the driver by the file's suffix; its first bytes have been checked.
    path = source.path.with_name(f"{source.path.name}.gpkg")
    path.hardlink_to(source.path)
    try:
        layers = pyogrio.list_layers(path)
        spatial = [name for name, kind in layers if kind is not None]
        if len(spatial) != 1:
            raise NotAVectorFile(
                f"'{source.name}' holds {len(spatial)} layers with geometry "
                f"({', '.join(spatial[:_NAMED_AT_MOST])}); send a file with one"
            )
        info = pyogrio.read_info(path, layer=spatial[0], force_feature_count=True)
        _check_count(source.name, info["features"], most)
        if not info["crs"]:
            raise NotAVectorFile(
                f"'{source.name}' states no CRS: set one, or send GeoJSON in EPSG:4326"
            )
        meta, fids, geometry, columns = pyogrio.raw.read(
            path, layer=spatial[0], return_fids=True, force_2d=True
        )
        crs = crs_of(info["crs"])
    except (DataSourceError, DataLayerError, CRSError, ValueError) as error:
        raise NotAVectorFile(f"'{source.name}' cannot be read as a GeoPackage") from error
    finally:
        path.unlink(missing_ok=True)
    names = [str(name) for name in meta["fields"]]
    rows = zip(*columns, strict=True) if columns else ((),) * len(fids)
    properties = [_json_object(dict(zip(names, row, strict=True))) for row in rows]
    shapes = shapely.from_wkb(geometry, on_invalid="ignore")
    return [int(fid) for fid in fids], properties, np.asarray(shapes, np.object_), crs


def _read_geoparquet(source: SourceFile, most: int) -> _Read:
    try:
        with pyarrow.parquet.ParquetFile(source.path, thrift_string_size_limit=2**26) as file:
            _check_count(source.name, file.metadata.num_rows, most)
            groups = range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(n).total_byte_size for n in groups)
            if size > _MAX_DECODED_BYTES or file.metadata.num_columns > _MAX_PROPERTIES:
                raise NotAVectorFile(
                    f"'{source.name}' decodes to {size} bytes of {file.metadata.num_columns} "
                    f"columns, the limits are {_MAX_DECODED_BYTES} and {_MAX_PROPERTIES}"
                )
            geo = json.loads((file.schema_arrow.metadata or {}).get(b"geo", b"null"))
            if not isinstance(geo, dict):
                raise NotAVectorFile(f"'{source.name}' is Parquet without the GeoParquet metadata")
            main = geo["primary_column"]
            stated = geo["columns"][main].get("crs", "OGC:CRS84")
            rows = file.read().to_pylist()
        is_degrees = stated == "OGC:CRS84" or (stated or {}).get("id", {}).get("code") == "CRS84"
        crs = _DEGREES if is_degrees else crs_of(json.dumps(stated))
        shapes = shapely.from_wkb([row.pop(main) for row in rows], on_invalid="ignore")
    except (pyarrow.ArrowException, CRSError, KeyError, TypeError, ValueError, OSError) as error:
        raise NotAVectorFile(f"'{source.name}' cannot be read as GeoParquet") from error
    properties = [_json_object(row) for row in rows]
    ids = [row.get("id", n) for n, row in enumerate(properties, start=1)]
    return ids, properties, np.asarray(shapes, np.object_), crs


def _json_object(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): _json_value(value) for name, value in values.items()}


def _json_value(value: Any) -> Any:  # noqa: ANN401 - whatever a file holds
    """A value for JSON: dates as text, without NaN and bytes."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, Mapping):
        return _json_object(value)
    if isinstance(value, list | tuple | np.ndarray):
        return [_json_value(one) for one in value]
    return None if isinstance(value, bytes) else str(value)


def _usable(
    name: str, ids: Sequence[Any], shapes: NDArray[np.object_], *, points: bool
) -> tuple[NDArray[np.object_], list[StackWarning]]:
    """The valid shapes, None for features without one, and warnings about the others.

    Args:
        name: name of the file.
        ids: ids of its features (N).
        shapes: shapes of its features (N).
        points: whether points are allowed as well as polygons.

    Raises:
        InvalidFields: no feature has a usable shape.
    """
    kept = _POLYGONS | _POINTS if points else _POLYGONS
    required = (
        "a Point, MultiPoint, Polygon or MultiPolygon"
        if points
        else "a Polygon or MultiPolygon with an area"
    )
    noun = "point or polygon" if points else "polygon"
    kinds = shapely.get_type_id(shapes)
    found = np.full(len(shapes), None, np.object_)
    repaired, unusable = [], []
    for n, (shape, kind) in enumerate(zip(shapes, kinds, strict=True)):
        if kind not in kept or shapely.is_empty(shape):
            unusable.append(ids[n])
            continue
        if not np.isfinite(shapely.bounds(shape)).all():
            unusable.append(ids[n])
            continue
        if shapely.is_valid(shape):
            found[n] = shape
            continue
        valid = _polygons_of(shapely.make_valid(shape))
        if valid is None:
            unusable.append(ids[n])
        else:
            found[n] = valid
            repaired.append(ids[n])
    if len(unusable) == len(shapes):
        raise InvalidFields(
            f"none of the {len(shapes)} features of '{name}' is {required} ({_named(unusable)})"
        )
    warnings = []
    if repaired:
        detail = (
            f"{len(repaired)} of {len(shapes)} fields of '{name}' have rings that cross or touch "
            f"themselves and were repaired: {_named(repaired)}"
        )
        warnings.append(StackWarning(code="fields_repaired", detail=detail))
    if unusable:
        detail = (
            f"{len(unusable)} of {len(shapes)} features of '{name}' have no valid {noun} and get "
            f"the status 'invalid': {_named(unusable)}"
        )
        warnings.append(StackWarning(code="invalid_fields", detail=detail))
    return found, warnings


def _polygons_of(shape: Any) -> Any:  # noqa: ANN401 - shapely has no types
    """The polygons of a repaired shape; None if nothing with an area is left."""
    parts = [
        part
        for part in shapely.get_parts(shapely.get_parts(shape))
        if shapely.get_type_id(part) in _POLYGONS
    ]
    return shapely.union_all(parts) if parts else None


def _repeated(ids: Sequence[Any]) -> tuple[StackWarning, ...]:
    times = Counter(map(str, ids))
    twice = [name for name, n in times.items() if n > 1]
    if not twice:
        return ()
    detail = (
        f"{len(twice)} ids belong to several fields: {_named(twice)}; results are in the order of "
        "the fields"
    )
    return (StackWarning(code="duplicate_ids", detail=detail),)


def _named(ids: Sequence[Any]) -> str:
    return first_names([str(one)[:60] for one in ids], _NAMED_AT_MOST)
