"""Fields: polygons with ids and properties, from GeoJSON, GeoPackage or GeoParquet.

The first bytes determine the reader: GeoJSON is read as JSON, one feature at a time, GeoPackage
only by GDAL's GPKG driver (pyogrio), GeoParquet by Apache Arrow. Counts and sizes are checked
before a feature is read (`vector_guard`).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS

from service.errors import (
    InvalidFields,
    NotAVectorFile,
    StackWarning,
    TooManyFields,
    first_names,
    shown,
)
from service.grid import CRSError, crs_of, transformed
from service.read.drivers import keep_needed_vector_drivers
from service.read.geotiff import SourceFile
from service.read.vector_guard import (
    MAX_DECODED_BYTES,
    check_geopackage,
    polygons_or_points,
    rows_at_once,
)

_DEGREES = CRS.from_epsg(4326)
_GEOPACKAGES = frozenset({b"GPKG", b"GP10", b"GP11", b"GP12"})
_APPLICATION_ID = slice(68, 72)
_MAX_TEXT_BYTES = 128 * 2**20
"""Largest GeoJSON file, bytes: 100,000 polygons of 50 vertices of 25 bytes."""
_MAX_LISTS = 2**23
"""Largest number of lists and objects of a GeoJSON file, each of which takes about 100 bytes while
its feature is read; a vertex is a list."""
_MAX_DEPTH = 32
"""Largest depth to which a property may nest."""
_MAX_REPAIRED = 2_000
"""Most vertices of a shape that is repaired: n edges can cross each other n x n / 2 times."""
_NAMED_AT_MOST = 5
POLYGON_TYPES = (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)
_POLYGONS = frozenset(POLYGON_TYPES)
_POINTS = frozenset({shapely.GeometryType.POINT, shapely.GeometryType.MULTIPOINT})


@dataclass(frozen=True, kw_only=True)
class Fields:
    """N agricultural parcels or other polygons, in the order of their file."""

    ids: tuple[Any, ...]
    """Ids (N) in the file: of GeoJSON the member `id`, else the property `id`; of GeoPackage that
    of the row; of GeoParquet the column `id`. The id of a feature without one is its position, from
    1."""
    properties: tuple[Mapping[str, Any], ...]
    """Properties (N), JSON values."""
    shapes: NDArray[np.object_]
    """Shapely polygons (N) of two dimensions in the file's CRS, and points if `read_labels` has
    returned them; None for a feature without a usable shape."""
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

        places, numbers = shapely.get_coordinates(self.shapes, return_index=True)
        projected = np.stack(transformed(self.crs, crs, places[:, 0], places[:, 1]), axis=1)
        known = np.array([shape is not None for shape in self.shapes], np.bool_)
        known[numbers[~np.isfinite(projected).all(axis=1)]] = False
        shapes = np.full(len(self), None, np.object_)
        # A ring with a coordinate that is not a number is an error of the library.
        shapes[known] = shapely.set_coordinates(self.shapes[known], projected[known[numbers]])
        return shapes


def read_fields(
    source: SourceFile, most: int, before_each: Callable[[], None] = lambda: None
) -> Fields:
    """Read polygons from a file.

    Args:
        source: the file.
        most: largest number of features.
        before_each: called before each feature; an error of it ends the reading.

    Returns:
        The fields; `warnings` name repaired and unusable features and repeated ids.

    Raises:
        NotAVectorFile: the file has none of the three formats, or cannot be read.
        TooManyFields: the file has more features than `most`.
        InvalidFields: no feature has a polygon.
    """
    return _read_vectors(source, most, before_each, points=False)


def read_labels(
    source: SourceFile, most: int, before_each: Callable[[], None] = lambda: None
) -> Fields:
    """Read points and polygons from a file.

    Args:
        source: the file.
        most: largest number of features.
        before_each: called before each feature; an error of it ends the reading.

    Returns:
        The features; `warnings` name repaired and unusable features and repeated ids.

    Raises:
        NotAVectorFile: the file has none of the three formats, or cannot be read.
        TooManyFields: the file has more features than `most`.
        InvalidFields: no feature has a point or a polygon.
    """
    return _read_vectors(source, most, before_each, points=True)


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


def _read_vectors(
    source: SourceFile, most: int, before_each: Callable[[], None], *, points: bool
) -> Fields:
    with source.path.open("rb") as file:
        head = file.read(100)
    if head.startswith(b"SQLite format 3\0") and head[_APPLICATION_ID] in _GEOPACKAGES:
        ids, properties, shapes, crs = _read_geopackage(source, most)
    elif head.startswith(b"PAR1"):
        ids, properties, shapes, crs = _read_geoparquet(source, most, before_each)
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        ids, properties, shapes, crs = _read_geojson(source, most, before_each)
    else:
        raise NotAVectorFile(
            f"'{source.name}' is not GeoJSON, GeoPackage or GeoParquet (it starts with "
            f"{head[:8]!r}): export the features as one of these"
        )
    flat = shapely.force_2d(shapes)
    shapes, warnings = _usable(source.name, ids, flat, before_each, points=points)
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
            f"'{name}' has {count} features, and the limit is {most} (PIMC_MAX_FIELDS): send them "
            "in several requests"
        )


def _read_geojson(source: SourceFile, most: int, before_each: Callable[[], None]) -> _Read:
    remedy = "send GeoPackage or GeoParquet, or the features in several requests"
    size = source.path.stat().st_size
    if size > _MAX_TEXT_BYTES:
        raise TooManyFields(
            f"'{source.name}' is GeoJSON of {size} bytes, and the limit is {_MAX_TEXT_BYTES}: "
            f"{remedy}"
        )
    content = source.path.read_bytes()
    lists = content.count(b"[") + content.count(b"{")
    if lists > _MAX_LISTS:
        raise TooManyFields(
            f"'{source.name}' holds about {lists} vertices and other lists, and the limit is "
            f"{_MAX_LISTS}: {remedy}"
        )
    found = _Features(source.name, most, before_each)
    try:
        text = content.decode("utf-8-sig")
        del content
        document = found.read(text)
        kind = document.get("type")
        if kind == "Feature":
            found.add(document)
        elif kind in ("Polygon", "MultiPolygon"):  # not a set: a list has no hash
            found.add({"geometry": document})
    except (ValueError, RecursionError) as error:
        raise NotAVectorFile(
            f"'{source.name}' is not valid JSON in UTF-8, or nests deeper than {_MAX_DEPTH} "
            "levels: export it again as GeoJSON"
        ) from error
    if kind not in ("Feature", "Polygon", "MultiPolygon", "FeatureCollection"):
        raise NotAVectorFile(
            f"'{source.name}' is JSON of type {shown(kind)!r}: send a GeoJSON FeatureCollection"
        )
    if kind == "FeatureCollection" and not found.has_list:
        raise NotAVectorFile(
            f"'{source.name}' has no list `features`: send a GeoJSON FeatureCollection"
        )
    shapes = np.full(len(found.shapes), None, np.object_)
    shapes[:] = found.shapes
    return found.ids, found.properties, shapes, _named_crs(source.name, document.get("crs"))


class _Features:
    """Reader of a GeoJSON document that keeps one feature at a time as Python objects.

    A coordinate takes 24 bytes as a Python float, and a vertex 130 as a list; as a shape, a vertex
    takes 16.

    Args:
        name: name of the file.
        most: largest number of features.
        before_each: called before each feature.
    """

    def __init__(self, name: str, most: int, before_each: Callable[[], None]) -> None:
        self._name = name
        self._most = most
        self._before_each = before_each
        self.ids: list[Any] = []
        self.properties: list[dict[str, Any]] = []
        self.shapes: list[Any] = []
        self.has_list = False

    def read(self, text: str) -> dict[str, Any]:
        """Add the features of a document.

        Args:
            text: the document, a JSON object.

        Returns:
            Its other members.

        Raises:
            ValueError: the text is not valid JSON.
            RecursionError: it nests too deep.
            NotAVectorFile: a feature is not an object, or its properties are not.
            TooManyFields: there are more features than are allowed.
        """
        document: dict[str, Any] = {}
        at = _after(text, 0, "{")
        if text[at : at + 1] == "}":
            return document
        while True:
            key, at = _DECODER.raw_decode(text, at)
            if not isinstance(key, str):
                raise ValueError("a key that is not text")  # noqa: TRY004 - as json raises
            at = _after(text, at, ":")
            if key == "features" and text[at : at + 1] == "[":
                self.has_list = True
                at = self._add_list(text, at)
            else:
                document[key], at = _DECODER.raw_decode(text, at)
            at = _spaces(text, at)
            if text[at : at + 1] == "}":
                break
            at = _after(text, at, ",")
        if _spaces(text, at + 1) != len(text):
            raise ValueError("text behind the document")
        return document

    def _add_list(self, text: str, at: int) -> int:
        """Add the features of a JSON list. Returns the position behind it."""
        at = _after(text, at, "[")
        if text[at : at + 1] == "]":
            return at + 1
        while True:
            feature, at = _DECODER.raw_decode(text, at)
            self.add(feature)
            at = _spaces(text, at)
            if text[at : at + 1] == "]":
                return at + 1
            at = _after(text, at, ",")

    def add(self, feature: object) -> None:
        """Add a feature.

        Raises:
            NotAVectorFile: the feature is not an object, or its properties are not.
            TooManyFields: there are as many features as allowed already.
            ValueError: a property nests too deep.
        """
        self._before_each()
        if not isinstance(feature, dict):
            raise NotAVectorFile(
                f"'{self._name}' has a feature that is not an object: send a GeoJSON "
                "FeatureCollection"
            )
        if len(self.ids) == self._most:
            raise TooManyFields(
                f"'{self._name}' has more features than the limit of {self._most} "
                "(PIMC_MAX_FIELDS): send them in several requests"
            )
        properties = feature.get("properties") or {}
        if not isinstance(properties, dict):
            raise NotAVectorFile(
                f"'{self._name}' has a feature whose `properties` are not an object: export it "
                "again as GeoJSON"
            )
        own = properties.get("id") if feature.get("id") is None else feature["id"]
        self.ids.append(_json_value(len(self.ids) + 1 if own is None else own))
        self.properties.append(_json_object(properties))
        geometry = feature.get("geometry")
        with np.errstate(over="ignore"):  # a shape with such a number is named as invalid
            self.shapes.append(
                shapely.from_geojson(json.dumps(geometry), on_invalid="ignore")
                if isinstance(geometry, dict)
                else None
            )


_DECODER = json.JSONDecoder()
_SPACES = re.compile(r"[ \t\n\r]*")


def _spaces(text: str, at: int) -> int:
    """The position behind white space."""
    found = _SPACES.match(text, at)
    return found.end() if found else at


def _after(text: str, at: int, mark: str) -> int:
    """The position of what follows a mark, with white space around it.

    Raises:
        ValueError: something else stands there.
    """
    at = _spaces(text, at)
    if text[at : at + 1] != mark:
        raise ValueError(f"no {mark} at {at}")
    return _spaces(text, at + 1)


def _named_crs(name: str, crs: object) -> CRS:
    """The CRS of GeoJSON: longitude and latitude, or the CRS named as in GeoJSON of 2008."""
    if crs is None:
        return _DEGREES
    try:
        text = crs["properties"]["name"]  # type: ignore[index]
        return _DEGREES if "CRS84" in text else crs_of(text)
    except (TypeError, KeyError, AttributeError, CRSError) as error:
        raise NotAVectorFile(
            f"'{name}' names a CRS that is not known: leave out `crs` and give longitude and "
            "latitude (EPSG:4326), or name a CRS such as EPSG:32631"
        ) from error


def _read_geopackage(source: SourceFile, most: int) -> _Read:
    import pyogrio  # imported here, because it imports pandas if installed, which takes long
    from pyogrio import _io
    from pyogrio.errors import DataLayerError, DataSourceError

    check_geopackage(source.path, source.name)
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
                f"({', '.join(spatial[:_NAMED_AT_MOST])}): send a file with one such layer"
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
        raise NotAVectorFile(
            f"'{source.name}' cannot be read as a GeoPackage: export the layer to a new file"
        ) from error
    finally:
        path.unlink(missing_ok=True)
    names = [str(name) for name in meta["fields"]]
    rows = zip(*columns, strict=True) if columns else ((),) * len(fids)
    properties = [_json_object(dict(zip(names, row, strict=True))) for row in rows]
    shapes = _shapes_of(geometry)
    return [int(fid) for fid in fids], properties, shapes, crs


def _shapes_of(wkb: Sequence[bytes | None]) -> NDArray[np.object_]:
    """The shapes of well-known binary; None for any that is not a point or a polygon."""
    with np.errstate(invalid="ignore"):  # coordinates that are not a number: `_usable` finds them
        shapes = shapely.from_wkb([*polygons_or_points(wkb)], on_invalid="ignore")
    return np.asarray(shapes, np.object_)


def _read_geoparquet(source: SourceFile, most: int, before_each: Callable[[], None]) -> _Read:
    try:
        with pyarrow.parquet.ParquetFile(source.path, thrift_string_size_limit=2**26) as file:
            _check_count(source.name, file.metadata.num_rows, most)
            at_once = rows_at_once(source.path, source.name, file)
            geo = json.loads((file.schema_arrow.metadata or {}).get(b"geo", b"null"))
            if not isinstance(geo, dict):
                raise NotAVectorFile(
                    f"'{source.name}' is Parquet without the metadata of GeoParquet: export it as "
                    "GeoParquet"
                )
            main = geo["primary_column"]
            stated = geo["columns"][main].get("crs", "OGC:CRS84")
            encoding = geo["columns"][main].get("encoding", "WKB")
            if encoding != "WKB":
                raise NotAVectorFile(
                    f"'{source.name}' holds geometry in the encoding {shown(encoding)}: "
                    "write it as WKB, the default of GeoPandas"
                )
            if stated is None:
                raise NotAVectorFile(
                    f"'{source.name}' states no CRS (`crs` is null): set one, or send GeoJSON in "
                    "EPSG:4326"
                )
            rows = _rows(source.name, file, at_once, before_each)
        is_degrees = stated == "OGC:CRS84" or stated.get("id", {}).get("code") == "CRS84"
        crs = _DEGREES if is_degrees else crs_of(json.dumps(stated))
        shapes = _shapes_of([row.pop(main) for row in rows])
        properties = [_json_object(row) for row in rows]
    except (pyarrow.ArrowException, CRSError, KeyError, TypeError, ValueError, OSError) as error:
        raise NotAVectorFile(
            f"'{source.name}' cannot be read as GeoParquet: export the layer to a new file"
        ) from error
    ids = [row.get("id", n) for n, row in enumerate(properties, start=1)]
    return ids, properties, shapes, crs


def _rows(
    name: str, file: pyarrow.parquet.ParquetFile, at_once: int, before_each: Callable[[], None]
) -> list[dict[str, Any]]:
    """The rows of a GeoParquet file, decoded in parts of some rows.

    Raises:
        NotAVectorFile: they decode to more than `MAX_DECODED_BYTES`.
    """
    rows: list[dict[str, Any]] = []
    size = 0
    for batch in map(_decoded, file.iter_batches(batch_size=at_once, use_threads=False)):
        before_each()
        size += batch.nbytes
        if size > MAX_DECODED_BYTES:
            raise NotAVectorFile(
                f"'{name}' decodes to more bytes than the limit of {MAX_DECODED_BYTES}: leave out "
                "properties, or send the features in several requests"
            )
        rows += batch.to_pylist()
    return rows


def _decoded(batch: Any) -> Any:  # noqa: ANN401 - pyarrow has no types
    """A batch whose columns of categories hold the value of each row, so that its size is known."""
    columns = [
        one.dictionary_decode() if isinstance(one, pyarrow.DictionaryArray) else one
        for one in batch.columns
    ]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _json_object(values: Mapping[Any, Any], depth: int = 0) -> dict[str, Any]:
    return {_text(str(name)): _json_value(value, depth) for name, value in values.items()}


def _text(text: str) -> str:
    """Text that UTF-8 can hold: JSON may state half of a surrogate pair."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _json_value(value: Any, depth: int = 0) -> Any:  # noqa: ANN401 - whatever a file holds
    """A value for JSON: dates as text, without NaN and bytes.

    Raises:
        ValueError: it nests deeper than `_MAX_DEPTH`.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"a property that nests more than {_MAX_DEPTH} levels deep")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int | bool):
        return value
    if isinstance(value, Mapping):
        return _json_object(value, depth + 1)
    if isinstance(value, list | tuple | np.ndarray):
        return [_json_value(one, depth + 1) for one in value]
    return None if isinstance(value, bytes) else _text(str(value))


def _usable(
    name: str,
    ids: Sequence[Any],
    shapes: NDArray[np.object_],
    before_each: Callable[[], None],
    *,
    points: bool,
) -> tuple[NDArray[np.object_], list[StackWarning]]:
    """The valid shapes, None for features without one, and warnings about the others.

    Args:
        name: name of the file.
        ids: ids of its features (N).
        shapes: shapes of its features (N).
        before_each: called before each feature.
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
        before_each()
        if kind not in kept or shapely.is_empty(shape):
            unusable.append(ids[n])
            continue
        if not np.isfinite(shapely.get_coordinates(shape)).all():
            unusable.append(ids[n])
            continue
        if shapely.is_valid(shape):
            found[n] = shape
            continue
        simple = shapely.get_num_coordinates(shape) <= _MAX_REPAIRED
        valid = _polygons_of(shapely.make_valid(shape)) if simple else None
        if valid is None:
            unusable.append(ids[n])
        else:
            found[n] = valid
            repaired.append(ids[n])
    if len(unusable) == len(shapes):
        raise InvalidFields(
            f"none of the {len(shapes)} features of '{name}' is {required} ({_named(unusable)}): "
            f"send features with a valid {noun}"
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
            f"{len(unusable)} of {len(shapes)} features of '{name}' have no valid {noun}, so their "
            f"results have the status 'invalid': {_named(unusable)}"
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
        f"{len(twice)} ids belong to several fields ({_named(twice)}): identify the results by "
        "their order, which is that of the fields"
    )
    return (StackWarning(code="duplicate_ids", detail=detail),)


def _named(ids: Sequence[Any]) -> str:
    return first_names(ids, _NAMED_AT_MOST)
