"""GeoJSON of requests, EPSG:4326: the points to predict for, the polygon to read."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from service.api.schemas.parameter_types import LooseModel, Number
from service.errors import shown

MAX_POINTS = 10_000
MAX_RINGS = 1_000
MAX_VERTICES = 10_000


def _only_finite(value: object) -> object:
    """Reject NaN and infinities: properties are returned as JSON, which cannot hold them."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"{one} is not a finite number, and JSON cannot hold it: send null")
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return value


class Point(LooseModel):
    """A GeoJSON Point, EPSG:4326."""

    type: Literal["Point"]
    coordinates: Annotated[list[Number], Field(min_length=2, max_length=4, fail_fast=True)]

    @model_validator(mode="after")
    def _on_earth(self) -> Self:
        lon, lat = self.coordinates[:2]
        if not (-180 <= lon <= 180 and -90 <= lat <= 90):
            raise ValueError(
                f"({lon}, {lat}) is not a valid longitude and latitude in degrees: send EPSG:4326, "
                "longitude first"
            )
        return self


class PointFeature(LooseModel):
    """A GeoJSON Feature that is a Point."""

    type: Literal["Feature"]
    geometry: Point
    id: Annotated[str, Field(max_length=200)] | int | Number | None = None
    properties: Annotated[dict[str, Any] | None, AfterValidator(_only_finite)] = None


class PointCollection(LooseModel):
    """Points to predict for: a GeoJSON FeatureCollection of Points, EPSG:4326."""

    type: Literal["FeatureCollection"]
    features: Annotated[
        list[PointFeature], Field(min_length=1, max_length=MAX_POINTS, fail_fast=True)
    ]

    @model_validator(mode="before")
    @classmethod
    def _in_degrees(cls, value: object) -> object:
        # GeoJSON of 2008 could state a CRS; RFC 7946 allows only degrees.
        crs = value.get("crs") if isinstance(value, Mapping) else None
        name = str((crs.get("properties") or {}).get("name", "")) if isinstance(crs, dict) else ""
        if name and not name.endswith(("CRS84", ":4326")):
            raise ValueError(
                f"points must be in EPSG:4326, but 'crs' is {shown(name)}: convert them to degrees"
            )
        return value

    @property
    def lonlat(self) -> tuple[tuple[float, float], ...]:
        """Longitude and latitude of each point, in degrees."""
        return tuple((p.geometry.coordinates[0], p.geometry.coordinates[1]) for p in self.features)


_Position = Annotated[list[Number], Field(min_length=2, max_length=4, fail_fast=True)]
_Ring = Annotated[list[_Position], Field(min_length=4, max_length=MAX_VERTICES, fail_fast=True)]
_Rings = Annotated[list[_Ring], Field(min_length=1, max_length=MAX_RINGS, fail_fast=True)]


class Area(LooseModel):
    """A GeoJSON Polygon or MultiPolygon, also as a Feature or a collection of one, EPSG:4326."""

    type: Literal["Polygon", "MultiPolygon"]
    coordinates: (
        _Rings | Annotated[list[_Rings], Field(min_length=1, max_length=MAX_RINGS, fail_fast=True)]
    )

    @model_validator(mode="before")
    @classmethod
    def _geometry(cls, value: object) -> object:
        # Not a set, because a value of JSON may not be hashable.
        wrapped = ("FeatureCollection", "Feature")
        while isinstance(value, Mapping) and value.get("type") in wrapped:
            if value["type"] == "Feature":
                value = value.get("geometry")
                continue
            features = value.get("features")
            if not isinstance(features, list) or len(features) != 1:
                count = len(features) if isinstance(features, list) else "no"
                raise ValueError(
                    f"the collection holds {count} features, and one polygon is required: combine "
                    "them to a MultiPolygon"
                )
            value = features[0]
        kind = value.get("type") if isinstance(value, Mapping) else None
        if isinstance(kind, str) and kind not in {"Polygon", "MultiPolygon"}:
            raise ValueError(
                f"a GeoJSON {shown(kind)} is not a polygon: send a Polygon, a MultiPolygon or a "
                "Feature of one"
            )
        return value

    @model_validator(mode="after")
    def _is_a_polygon(self) -> Self:
        depth = _depth(self.coordinates)
        if depth != {"Polygon": 3, "MultiPolygon": 4}[self.type]:
            raise ValueError(
                f"the coordinates of a {self.type} must be nested as GeoJSON has them (RFC 7946)"
            )
        for ring in self._every_ring():
            if ring[0][:2] != ring[-1][:2]:
                raise ValueError(
                    f"a ring begins at {ring[0][:2]} but ends at {ring[-1][:2]}: repeat the first "
                    "position at the end"
                )
            for lon, lat, *_ in ring:
                if not (-180 <= lon <= 180 and -90 <= lat <= 90):
                    raise ValueError(
                        f"({lon}, {lat}) is not a valid longitude and latitude in degrees: send "
                        "EPSG:4326, longitude first"
                    )
        return self

    def _every_ring(self) -> list[Any]:
        polygons: list[Any] = self.coordinates
        return [
            ring for rings in ([polygons] if self.type == "Polygon" else polygons) for ring in rings
        ]

    @property
    def polygon(self) -> dict[str, Any]:
        """The geometry as a GeoJSON object."""
        return {"type": self.type, "coordinates": self.coordinates}


def extent_of_geojson(geometry: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """West, south, east, north of a GeoJSON geometry; None if it is not valid or not in degrees."""
    parts = geometry.get("geometries", [geometry])
    positions: list[Any] = [
        position
        for part in (parts if isinstance(parts, list) else [])
        for position in _positions(part.get("coordinates") if isinstance(part, Mapping) else None)
    ]
    if not positions:
        return None
    west, east = min(p[0] for p in positions), max(p[0] for p in positions)
    south, north = min(p[1] for p in positions), max(p[1] for p in positions)
    if west < -180 or east > 180 or south < -90 or north > 90:
        return None
    return float(west), float(south), float(east), float(north)


def _positions(value: object) -> list[list[float]]:
    """The positions within nested coordinates; other values are left out."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, list):
            continue
        numbers = [n for n in one[:2] if isinstance(n, int | float) and not isinstance(n, bool)]
        if len(numbers) == 2:
            found.append([float(n) for n in numbers])
        else:
            waiting += one
    return found


def _depth(value: object) -> int:
    """Number of nested lists around the first number of coordinates."""
    return 1 + _depth(value[0]) if isinstance(value, list) and value else 0
