"""Request and response types: form parameters, JSON bodies, responses.

The same models validate a request and describe it in the OpenAPI document. The `description` of a
parameter completes "NAME: …"; "default" states what holds if the parameter is left out.
"""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Json,
    Tag,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from models.card import Modality, ModelCard, Task
from service.api.json_pieces import (
    MOST_FAULTS,
    MOST_VALUES,
    Faults,
    LongList,
    is_long,
    members,
    too_many,
    validate,
)
from service.errors import MOST_ERRORS, ForbiddenReference, InvalidRequest, shown
from service.infer.smooth import MAX_RADIUS
from service.read.geotiff import SourceFile
from service.read.layouts import Layout, StackOptions
from service.read.masks import RULES, parse_mask
from service.read.reflectance import DatedNumber
from service.run.request import (
    HeadRequest,
    LabelledSeries,
    MeasureRequest,
    PointQuery,
    RasterRequest,
    Runnable,
    SeriesInput,
    SeriesRequest,
    SimilarRequest,
    Subscriber,
)
from service.write.predictions import EmbeddingType, ProbabilityType

Operation = Literal[Runnable, "series"]
"""The operation that a body requests: a run, or measured series."""
SimilarOutput = Literal["similarity", "similarities"]
MAX_POINTS = 10_000
MAX_RINGS = 1_000
MAX_VERTICES = 10_000
ClassOutput = Literal["class", "confidence", "entropy", "probabilities", "polygons"]
DatedOutput = Literal[ClassOutput, "attribution"]
"""Outputs of a class of a time series."""
SeriesOutput = Literal["class", "confidence", "entropy", "probabilities", "attribution"]
SensorName = Literal["sentinel-2", "hls", "landsat", "modis", "planetscope"]
QuantileOutput = Literal["q10", "q50", "q90"]
# The parameters that take several values.
_LISTED = frozenset({"dates", "bands", "bbox", "outputs", "scale", "offset"})
_VECTORS = frozenset({"fields", "labels"})
"""Parameters that are read as files of features, with limits of their own."""
_LONGEST_NAME = 100
"""Longest name for which a parameter with a similar name is looked for, characters."""
_MAX_STRUCTURE = 500_000
_MOST_DATED = 1_000
PLAUSIBLE_DATES = (date(1970, 1, 1), date(2099, 12, 31))
_ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_BASELINE = re.compile(r"N?(\d{1,2})\.(\d{2})")
_Model = TypeVar("_Model", bound=BaseModel)
_Form = TypeVar("_Form", bound="StackForm")


def _iso_date(value: object) -> object:
    # By default pydantic reads "20210105" as seconds since 1970.
    if isinstance(value, str) and not _ISO_DATE.fullmatch(value):
        raise ValueError(f"'{shown(value)}' is not an ISO date such as 2021-01-05")
    if not isinstance(value, str | date):
        raise ValueError(  # noqa: TRY004 - pydantic reports a ValueError
            f"a date must be a text such as 2021-01-05, and is of type {type(value).__name__}"
        )
    return value


def _plausible_date(day: date) -> date:
    """Reject a date outside the years in which dates are read from files."""
    first, last = PLAUSIBLE_DATES
    if not first <= day <= last:
        raise ValueError(f"{day} is not a date from {first} to {last}")
    return day


def _only_finite(value: object) -> object:
    """Reject NaN and infinities: properties are returned as JSON, which cannot hold them."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"{one} is not a finite number, and JSON cannot hold it: send null")
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return value


def listed(value: object) -> object:
    """Split values: "a,b", ["a", "b"] and ["a,b", "c"] become lists."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple):
        return value
    parts: list[object] = []
    for item in values:
        parts += item.split(",") if isinstance(item, str) else [item]
    return [part.strip() if isinstance(part, str) else part for part in parts]


def _mask(value: object) -> object:
    """Join one or several rules of a mask to one text, and check that each rule exists."""
    text = ",".join(value) if isinstance(value, list) and all(map(_is_text, value)) else value
    if isinstance(text, str):
        try:
            parse_mask(text)
        except InvalidRequest as error:
            raise ValueError(error.errors[0]["detail"]) from error
    return text


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _dated(value: object) -> object:
    """Parse a number, or pairs of a date or baseline and the number that holds from then on.

    Raises:
        ValueError: a part is neither of them, or two parts have the same date or baseline.
    """
    parts = listed(value)
    if not isinstance(parts, list):
        return value
    if len(parts) > _MOST_DATED:
        raise ValueError(f"{len(parts)} numbers; at most {_MOST_DATED} are allowed")
    pairs = [_dated_number(part) for part in parts]
    if len({since for since, _ in pairs}) < len(pairs):
        raise ValueError(
            f"'{shown(value)}' has several numbers for one date or processing baseline: give one "
            "for each"
        )
    if len(pairs) == 1 and pairs[0][0] == date.min:
        return pairs[0][1]
    return tuple(sorted(pairs, key=lambda pair: (isinstance(pair[0], date), str(pair[0]))))


def _dated_number(part: object) -> tuple[date | str, float]:
    if not isinstance(part, str | int | float):
        raise ValueError("a number is required, or a text such as 2022-01-25:-0.1")  # noqa: TRY004 - as above
    text, colon, number = str(part).rpartition(":")
    baseline = _BASELINE.fullmatch(text.strip())
    try:
        if baseline:
            return f"{int(baseline[1]):02d}.{baseline[2]}", _finite(number)
        return date.fromisoformat(text.strip()) if colon else date.min, _finite(number)
    except ValueError as error:
        raise ValueError(
            f"'{shown(part)}' is not a number such as -0.1, a number from a date on such as "
            "2022-01-25:-0.1, or a number from a processing baseline on such as 04.00:-0.1"
        ) from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)} is not a finite number")
    return number


def _positive(value: DatedNumber | None) -> DatedNumber | None:
    numbers = [value] if isinstance(value, int | float) else [n for _, n in value or ()]
    if any(number <= 0 for number in numbers):
        raise ValueError(f"the scale must be greater than 0, and is {min(numbers):g}")
    return value


def _once(value: object) -> object:
    """Remove repetitions from a list and keep its order."""
    # A list may hold values without a hash, which validation rejects.
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return list(dict.fromkeys(value))
    return value


_IsoDate = Annotated[
    date,
    BeforeValidator(_iso_date),
    AfterValidator(_plausible_date),
    WithJsonSchema({"type": "string", "format": "date", "examples": ["2021-01-05"]}),
]
_Split = BeforeValidator(listed)
_SplitOnce = BeforeValidator(lambda value: _once(listed(value)))
_DATED_SCHEMA = WithJsonSchema(
    {
        "anyOf": [{"type": "number"}, {"type": "string"}],
        "examples": [-0.1, "2022-01-25:-0.1", "04.00:-0.1"],
    }
)
# With fail_fast, because a list of millions of invalid values would make as many errors.
_AtLeastOne = Field(min_length=1, fail_fast=True)
_Band = Annotated[str, Field(min_length=1, max_length=64)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_ModelName = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=200,
        description="`name` or `name@version` from `GET /models`; default: the task's default "
        "model",
    ),
]
_Start = Annotated[
    _IsoDate | None,
    Field(description="first day of the model's time window; default: by the card's rule"),
]
_Horizon = Annotated[
    int | None,
    Field(
        ge=1,
        description="number of steps to forecast, 1 to the card's maximum; default: the maximum",
    ),
]
_Backtest = Annotated[
    bool | None,
    Field(
        description="true: forecast from earlier dates of the same input as well, report the "
        "errors, and correct the forecast by them; false: do not; else rasters and fields with "
        "enough history are backtested, points and series are not"
    ),
]
_Stride = Annotated[
    int | None,
    Field(
        ge=1,
        le=64,
        description="pixels between patches; patches overlap if it is below 64; default: 64",
    ),
]
_ProbabilityType = Annotated[
    ProbabilityType,
    Field(
        description="number type of the raster `probabilities`; `uint8` takes a quarter of the "
        "space or less, and the file has the scale: probability = uint8 / 254, nodata 255"
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class _Loose(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class Point(_Loose):
    """A GeoJSON Point, EPSG:4326."""

    type: Literal["Point"]
    coordinates: Annotated[list[_Number], Field(min_length=2, max_length=4, fail_fast=True)]

    @model_validator(mode="after")
    def _on_earth(self) -> Self:
        lon, lat = self.coordinates[:2]
        if not (-180 <= lon <= 180 and -90 <= lat <= 90):
            raise ValueError(
                f"({lon}, {lat}) is not a valid longitude and latitude in degrees: send EPSG:4326, "
                "longitude first"
            )
        return self


class PointFeature(_Loose):
    """A GeoJSON Feature that is a Point."""

    type: Literal["Feature"]
    geometry: Point
    id: Annotated[str, Field(max_length=200)] | int | _Number | None = None
    properties: Annotated[dict[str, Any] | None, AfterValidator(_only_finite)] = None


class PointCollection(_Loose):
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


_Position = Annotated[list[_Number], Field(min_length=2, max_length=4, fail_fast=True)]
_Ring = Annotated[list[_Position], Field(min_length=4, max_length=MAX_VERTICES, fail_fast=True)]
_Rings = Annotated[list[_Ring], Field(min_length=1, max_length=MAX_RINGS, fail_fast=True)]


class Area(_Loose):
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


def _box(
    value: tuple[float, float, float, float] | None,
) -> tuple[float, float, float, float] | None:
    if value is not None:
        west, south, east, north = value
        if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south < north <= 90):
            raise ValueError(
                f"{west:g}, {south:g}, {east:g}, {north:g} is not a valid box: give west, south, "
                "east, north in degrees, with south less than north"
            )
        if west == east:
            raise ValueError(
                f"west and east are both {west:g}, so the box is empty: give an east that differs"
            )
    return value


class StackForm(_Strict):
    """Parameters that describe the files of a stack; common to all requests with files."""

    layout: Annotated[
        Layout | None,
        Field(description="content of each file; default: determined from the files"),
    ] = None
    dates: Annotated[
        Annotated[tuple[_IsoDate, ...], _AtLeastOne] | None,
        _Split,
        Field(
            description="ISO dates, comma-separated or repeated: one per file, per band of a "
            "`file-per-band` file, or per date of a `single-file` stack; default: read from the "
            "files",
        ),
    ] = None
    bands: Annotated[
        Annotated[tuple[_Band, ...], _AtLeastOne] | None,
        _Split,
        Field(
            description="Sentinel-2 band names in band order, comma-separated or repeated; "
            "default: read from the files",
        ),
    ] = None
    scale: Annotated[
        DatedNumber | None,
        BeforeValidator(_dated),
        AfterValidator(_positive),
        _DATED_SCHEMA,
        Field(
            description="factor in reflectance = value x scale + offset; from a date on as in "
            "`2022-01-25:0.0001`, or from a processing baseline on as in `04.00:0.0001`, several "
            "comma-separated; default: read from the files",
        ),
    ] = None
    offset: Annotated[
        DatedNumber | None,
        BeforeValidator(_dated),
        _DATED_SCHEMA,
        Field(
            description="summand in reflectance = value x scale + offset; from a date on as in "
            "`2022-01-25:-0.1`, or from a processing baseline on as in `04.00:-0.1`, several "
            "comma-separated; default: read from the files",
        ),
    ] = None
    sensor: Annotated[
        SensorName | None,
        Field(description="sensor of the images; default: determined from the files"),
    ] = None
    mask: Annotated[
        Annotated[str, Field(max_length=200)] | None,
        BeforeValidator(_mask),
        Field(
            description="cloud masks: `auto` uses what the files hold; `none` only nodata and NaN; "
            f"or any of {', '.join(RULES)}, comma-separated, all of which a clear pixel must pass; "
            "`cldprb:40` rejects cloud probabilities of 40 per cent and more; `cloud` estimates a "
            "mask from the series if no file holds one; default: `auto`",
            examples=["auto", "scl,cldprb:40", "cloud"],
        ),
    ] = None
    grid: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=300,
            description="the output grid: `strict`, `finest`, a CRS and pixel size such as "
            "`EPSG:32631@10`, or the name of a file whose grid is taken; default: the files' own "
            "grid, or the finest of them if the others are whole multiples of it",
        ),
    ] = None
    bbox: Annotated[
        tuple[_Number, _Number, _Number, _Number] | None,
        _Split,
        AfterValidator(_box),
        Field(
            description="west, south, east, north in degrees: only this part is read and returned; "
            "west is greater than east if the box crosses the antimeridian; default: the whole "
            "extent",
            examples=["4.1,50.9,4.2,51.0"],
        ),
    ] = None
    area: Annotated[
        Json[Area] | None,
        Field(
            description="GeoJSON polygon, EPSG:4326: only this part is read and returned; "
            "default: the whole extent"
        ),
    ] = None

    @property
    def stack(self) -> StackOptions:
        """The parameters as a value that is independent of HTTP."""
        return StackOptions(
            layout=self.layout,
            dates=self.dates,
            bands=self.bands,
            scale=self.scale,
            offset=self.offset,
            mask=self.mask,
            grid=self.grid,
            bbox=self.bbox,
            area=None if self.area is None else self.area.polygon,
            sensor=self.sensor,
        )


_Address = Annotated[str, Field(min_length=1, max_length=2048)]


class SubscriberBody(_Strict):
    """URLs that a job calls, with the names of OGC API - Processes."""

    successUri: Annotated[_Address, Field(description="called when the job has a result")]  # noqa: N815 - the standard's names
    failedUri: Annotated[_Address | None, Field(description="called when the job failed")] = None  # noqa: N815
    inProgressUri: Annotated[  # noqa: N815
        _Address | None,
        Field(description="called when the job begins, and after each further 10 per cent"),
    ] = None

    @property
    def subscriber(self) -> Subscriber:
        """The URLs as a value that is independent of HTTP."""
        return Subscriber(
            success=self.successUri, failed=self.failedUri, progress=self.inProgressUri
        )


_CALLED = (
    "URLs that a job calls when it ends, on hosts that the server allows; requires `Prefer: "
    "respond-async`"
)


def _called(body: SubscriberBody | None) -> Subscriber | None:
    return None if body is None else body.subscriber


class RasterForm(StackForm):
    """Parameters of all tasks, in addition to the files."""

    model: _ModelName = None
    subscriber: Annotated[
        Json[SubscriberBody] | None, Field(description=f"JSON object: {_CALLED}")
    ] = None
    points: Annotated[
        Json[PointCollection] | None,
        Field(description="GeoJSON FeatureCollection of Points, EPSG:4326: predict only for these"),
    ] = None

    fields: Annotated[
        Any,
        Field(
            description="a file of polygons (GeoJSON, GeoPackage or GeoParquet; any CRS), or "
            "GeoJSON as text: predict per polygon"
        ),
    ] = None

    def request(
        self, task: Operation, files: tuple[SourceFile, ...], polygons: SourceFile | None = None
    ) -> RasterRequest:
        """The parameters as a request that is independent of HTTP.

        Args:
            task: the requested task.
            files: the files of the stack.
            polygons: the file of `fields`; None if it was not sent.

        Raises:
            InvalidRequest: the request has both points and fields.
        """
        if task in {"series", "similar"}:
            raise TypeError(f"another form makes the requests of /{task}")
        if polygons is not None and self.points is not None:
            raise InvalidRequest.of("fields", "cannot be combined with points: send one of them")
        points = None
        if self.points is not None:
            points = tuple(
                PointQuery.of(feature.model_dump(exclude_none=True))
                for feature in self.points.features
            )
        of_some_tasks = (
            "modality", "start", "outputs", "horizon", "backtest", "stride", "smooth",
            "min_area", "dtype",
        )  # fmt: skip
        return RasterRequest(
            task=cast(Task, task),
            files=files,
            stack=self.stack,
            model=self.model,
            points=points,
            fields=polygons,
            subscriber=_called(self.subscriber),
            **cast(Any, {name: getattr(self, name, None) for name in of_some_tasks}),
        )


class ClassifyForm(RasterForm):
    """Parameters of `POST /classify-pixels`."""

    start: _Start = None
    outputs: Annotated[tuple[DatedOutput, ...], _AtLeastOne, _SplitOnce] = ("class",)
    smooth: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_RADIUS,
            description="radius in pixels of Bayesian smoothing: the probabilities of neighbours "
            "count before the class is taken; default: 0, no smoothing",
        ),
    ] = None
    min_area: Annotated[
        _Number | None,
        Field(
            ge=0,
            description="hectares: smaller areas of the map join the neighbour with the longest "
            "shared edge; default: 0, none",
        ),
    ] = None
    dtype: _ProbabilityType = "float32"


class ForecastForm(RasterForm):
    """Parameters of `POST /forecast`."""

    start: _Start = None
    outputs: Annotated[tuple[QuantileOutput, ...], _AtLeastOne, _SplitOnce] = ("q50",)
    horizon: _Horizon = None
    backtest: _Backtest = None


class LandcoverForm(RasterForm):
    """Parameters of `POST /landcover`."""

    outputs: Annotated[tuple[ClassOutput, ...], _AtLeastOne, _SplitOnce] = ("class",)
    stride: _Stride = None
    dtype: _ProbabilityType = "float32"


class EmbedForm(RasterForm):
    """Parameters of `POST /embed`."""

    modality: Annotated[
        Modality | None,
        Field(
            description="`pixel`: embeddings of pixels from recurrence plots; `patch`: of patches "
            "from imagery; default: the modality of `model`, or `pixel` without it"
        ),
    ] = None
    start: _Start = None
    stride: _Stride = None
    dtype: Annotated[
        EmbeddingType,
        Field(
            description="number type of the embedding; `int8` takes a quarter of the space, and "
            "the file has the scale: value = int8 x scale, nodata -128"
        ),
    ] = "float32"


class SimilarForm(RasterForm):
    """Parameters of `POST /similar`."""

    points: Annotated[
        Json[PointCollection] | None,
        Field(
            description="GeoJSON FeatureCollection of Points, EPSG:4326, with which every pixel is "
            "compared"
        ),
    ] = None
    fields: Annotated[
        Any,
        Field(
            description="a file of points or polygons (GeoJSON, GeoPackage or GeoParquet; any "
            "CRS), or GeoJSON as text, with which every pixel is compared"
        ),
    ] = None
    start: _Start = None
    outputs: Annotated[tuple[SimilarOutput, ...], _AtLeastOne, _SplitOnce] = ("similarity",)

    def request(
        self, task: Operation, files: tuple[SourceFile, ...], polygons: SourceFile | None = None
    ) -> SimilarRequest:
        """See `RasterForm.request`; every pixel is compared with the points or fields.

        Raises:
            InvalidRequest: the request has both points and fields, or neither.
        """
        del task
        plain = super().request("embed", files, polygons)
        if (plain.points is None) == (plain.fields is None):
            raise InvalidRequest.of(
                "points",
                "missing: send either 'points' or 'fields', with which every pixel is compared",
            )
        given = {**vars(plain), "points": None, "fields": None}
        return SimilarRequest(**given, place_points=plain.points, place_file=plain.fields)


class MeasureForm(RasterForm):
    """Parameters of `POST /series`."""

    model: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=200,
            description="with `plots`: the model whose recurrence plots are computed, `name` or "
            "`name@version`; default: the default model of `/embed`",
        ),
    ] = None
    start: Annotated[
        _IsoDate | None,
        Field(
            description="with `plots`: first day of the model's time window; default: by the "
            "card's rule"
        ),
    ] = None
    plots: Annotated[
        bool,
        Field(
            description="add the recurrence plots of each point or field, as the model receives "
            "them; default: false"
        ),
    ] = False

    def request(
        self,
        task: Operation,
        files: tuple[SourceFile, ...],
        polygons: SourceFile | None = None,
    ) -> MeasureRequest:
        """See `RasterForm.request`; the plots are those of a model of the task `embed`.

        Raises:
            InvalidRequest: the request has both points and fields, a model or start without plots,
                or a subscriber.
        """
        del task
        if self.subscriber is not None:
            raise InvalidRequest.of(
                "subscriber",
                "only jobs call a subscriber, and /series makes no job: leave out `subscriber`",
            )
        for name in ("model", "start"):
            if getattr(self, name) is not None and not self.plots:
                raise InvalidRequest.of(
                    name, "has an effect on recurrence plots only: send plots=true, or leave it out"
                )
        plain = super().request("embed", files, polygons)
        return MeasureRequest(**vars(plain), plots=self.plots)


FORMS: Mapping[Operation, type[RasterForm]] = {
    "classify-pixels": ClassifyForm,
    "forecast": ForecastForm,
    "landcover": LandcoverForm,
    "embed": EmbedForm,
    "similar": SimilarForm,
    "series": MeasureForm,
}
MAX_ITEMS = 2_000


class ItemBody(_Strict):
    """A file of a stack that the request names instead of sending it."""

    href: Annotated[
        str,
        Field(
            min_length=1,
            max_length=8192,
            description="a path, or a `file:`, `http(s):` or `s3:` URL",
        ),
    ]
    date: Annotated[
        _IsoDate | None,
        Field(description="date of the file; give it for all items or for none"),
    ] = None


def _check_item_dates(items: Sequence[ItemBody], dates: Sequence[date] | None) -> None:
    dated = [item for item in items if item.date]
    if dated and len(dated) < len(items):
        raise ValueError(
            f"{len(items)} items but {len(dated)} with a date: give all of them a date, or none"
        )
    if dated and dates:
        raise ValueError("dates are given twice, with the items and as 'dates': remove one of them")


class _AsObjects(_Strict):
    """A raster request as JSON: GeoJSON parameters are objects instead of text."""

    subscriber: Annotated[SubscriberBody | None, Field(description=_CALLED)] = None

    area: Annotated[
        Area | None,
        Field(description="GeoJSON polygon, EPSG:4326: only this part is read and returned"),
    ] = None
    points: Annotated[
        PointCollection | None,
        Field(description="GeoJSON FeatureCollection of Points, EPSG:4326: predict only for these"),
    ] = None
    fields: Annotated[
        Any,  # a form's is text
        Field(description="GeoJSON FeatureCollection of polygons: predict per polygon"),
    ] = None

    @field_validator("fields")
    @classmethod
    def _is_an_object(cls, value: object) -> object:
        if value is not None and not isinstance(value, dict):
            raise ValueError(
                f"a GeoJSON object is required in a JSON body, but the value is a "
                f"{type(value).__name__}"
            )
        return value


class _Items(_AsObjects):
    """Files that the request names instead of sending them."""

    items: Annotated[
        tuple[ItemBody, ...], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
    ]

    @model_validator(mode="after")
    def _dated_once(self) -> Self:
        _check_item_dates(self.items, getattr(self, "dates", None))
        return self


class ClassifyItems(_Items, ClassifyForm):
    """JSON body of `POST /classify-pixels` that names its files."""


class ForecastItems(_Items, ForecastForm):
    """JSON body of `POST /forecast` that names its files."""


class LandcoverItems(_Items, LandcoverForm):
    """JSON body of `POST /landcover` that names its files."""


class EmbedItems(_Items, EmbedForm):
    """JSON body of `POST /embed` that names its files."""


class SimilarItems(_Items, SimilarForm):
    """JSON body of `POST /similar` that names its files."""


class MeasureItems(_Items, MeasureForm):
    """JSON body of `POST /series` that names its files."""


ITEMS: Mapping[
    Operation,
    type[ClassifyItems | ForecastItems | LandcoverItems | EmbedItems | SimilarItems | MeasureItems],
] = {
    "classify-pixels": ClassifyItems,
    "forecast": ForecastItems,
    "landcover": LandcoverItems,
    "embed": EmbedItems,
    "similar": SimilarItems,
    "series": MeasureItems,
}
_Name = Annotated[str, Field(min_length=1, max_length=300)]
_Names = Annotated[tuple[_Name, ...], Field(max_length=1000, fail_fast=True)]


_MOMENT = re.compile(
    r"\d{4}(?:-\d\d(?:-\d\d(?:T\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d))?)?)?"
)


def _is_moment(text: str) -> bool:
    """Whether a text is an ISO year, month, day, or time with its zone."""
    if not _MOMENT.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text + "0001-01-01T00:00:00Z"[len(text) :])
    except ValueError:
        return False
    return True


def interval(value: str | None) -> str | None:
    """Check a date or an interval of two dates, as STAC APIs accept them."""
    if value is None:
        return None
    ends = value.split("/")
    for end in ends:
        if not (end in {"", ".."} and len(ends) == 2) and not _is_moment(end):
            raise ValueError(
                f"'{shown(end)}' is not a date such as 2021, 2021-05, 2021-05-01 or "
                "2021-05-01T00:00:00Z"
            )
    if len(ends) > 2 or not any(end.strip(".") for end in ends):
        raise ValueError(
            f"'{shown(value)}' is not one date, or two dates separated by `/` of which one may be "
            "`..`"
        )
    return value


class StacSearch(_Strict):
    """A search of a STAC API."""

    url: Annotated[
        str,
        Field(
            min_length=1,
            max_length=8192,
            description="`http(s):` URL of the API's landing page",
        ),
    ]
    collections: Annotated[_Names, Field(description="ids of the collections to search")] = ()
    ids: Annotated[_Names, Field(description="ids of the items to search")] = ()
    bbox: Annotated[
        tuple[_Number, _Number, _Number, _Number] | None,
        AfterValidator(_box),
        Field(
            description="west, south, east, north in degrees, for the search; if the request has "
            "no `bbox` or `area` of its own, only this part of the items is read"
        ),
    ] = None
    intersects: Annotated[
        dict[str, Any] | None,
        Field(
            description="GeoJSON geometry, EPSG:4326, for the search; its extent is read as with "
            "`bbox`"
        ),
    ] = None
    datetime: Annotated[
        str | None,
        AfterValidator(interval),
        Field(
            max_length=100,
            description="a date, or two dates separated by `/`, of which one may be `..`",
            examples=["2021-01-01/2021-12-31"],
        ),
    ] = None
    max_cloud_cover: Annotated[
        _Number | None,
        Field(ge=0, le=100, description="largest `eo:cloud_cover` of an item, per cent"),
    ] = None
    query: Annotated[
        dict[str, Any] | None, Field(description="value of the STAC API's query extension")
    ] = None
    filter: Annotated[
        dict[str, Any] | None,
        Field(description="CQL2 as JSON, for the STAC API's filter extension"),
    ] = None

    @model_validator(mode="after")
    def _one_area(self) -> Self:
        if self.bbox and self.intersects:
            raise ValueError("bbox and intersects exclude each other: give one of them")
        if self.intersects is not None and extent_of_geojson(self.intersects) is None:
            raise ValueError(
                "intersects is not a valid GeoJSON geometry in degrees: give a geometry, not a "
                "Feature, in EPSG:4326"
            )
        return self

    @property
    def extent(self) -> tuple[float, float, float, float] | None:
        """West, south, east, north of the searched area, in degrees; None without an area."""
        return self.bbox or (extent_of_geojson(self.intersects) if self.intersects else None)


class StacDocument(_Loose):
    """A STAC ItemCollection, or a single Item, version 1.0 or 1.1."""

    model_config = ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)

    type: Literal["FeatureCollection", "Feature"]

    @property
    def plain(self) -> dict[str, Any]:
        """The document as it was sent."""
        return {"type": self.type, **(self.model_extra or {})}


def _kind_of_stac(value: object) -> str:
    if isinstance(value, str):
        return "address"
    search = isinstance(value, StacSearch) or (isinstance(value, dict) and "type" not in value)
    return "search" if search else "document"


StacReference = Annotated[
    Annotated[StacSearch, Tag("search")]
    | Annotated[StacDocument, Tag("document")]
    | Annotated[str, Field(min_length=1, max_length=8192), Tag("address")],
    Discriminator(_kind_of_stac),
    Field(
        description="a STAC ItemCollection or Item, the URL of one, or a search; the service reads "
        "the assets that the model needs, by HTTP ranges"
    ),
]


class _Stac(_AsObjects):
    """Files that the request names by STAC items."""

    stac: StacReference


class ClassifyStac(_Stac, ClassifyForm):
    """JSON body of `POST /classify-pixels` that names STAC items."""


class ForecastStac(_Stac, ForecastForm):
    """JSON body of `POST /forecast` that names STAC items."""


class LandcoverStac(_Stac, LandcoverForm):
    """JSON body of `POST /landcover` that names STAC items."""


class EmbedStac(_Stac, EmbedForm):
    """JSON body of `POST /embed` that names STAC items."""


class SimilarStac(_Stac, SimilarForm):
    """JSON body of `POST /similar` that names STAC items."""


class MeasureStac(_Stac, MeasureForm):
    """JSON body of `POST /series` that names STAC items."""


STAC: Mapping[
    Operation,
    type[ClassifyStac | ForecastStac | LandcoverStac | EmbedStac | SimilarStac | MeasureStac],
] = {
    "classify-pixels": ClassifyStac,
    "forecast": ForecastStac,
    "landcover": LandcoverStac,
    "embed": EmbedStac,
    "similar": SimilarStac,
    "series": MeasureStac,
}
_Values = Annotated[
    Annotated[tuple[_Number | None, ...], Field(fail_fast=True)] | None,
    Field(description="reflectance, 0 to 1, one value per date; null is a missing observation"),
]


class SeriesEntry(_Strict):
    """One pixel's observations: reflectance by band, one value per date."""

    id: Annotated[str, Field(max_length=200, description="returned with the result")]
    dates: Annotated[tuple[_IsoDate, ...], Field(min_length=1, max_length=10_000, fail_fast=True)]
    B01: _Values = None
    B02: _Values = None
    B03: _Values = None
    B04: _Values = None
    B05: _Values = None
    B06: _Values = None
    B07: _Values = None
    B08: _Values = None
    B8A: _Values = None
    B09: _Values = None
    B10: _Values = None
    B11: _Values = None
    B12: _Values = None

    @property
    def bands(self) -> dict[str, tuple[float | None, ...]]:
        """Reflectance of the bands that the series has, by name of the band."""
        given = ((name, getattr(self, name)) for name in type(self).model_fields if name[0] == "B")
        return {name: values for name, values in given if values is not None}

    @model_validator(mode="after")
    def _one_value_per_date(self) -> Self:
        for band, values in self.bands.items():
            if len(values) != len(self.dates):
                raise ValueError(
                    f"{len(self.dates)} dates but {len(values)} values of {band}: give one value "
                    "per date, null if it is missing"
                )
        return self


class SeriesBody(_Strict):
    """A JSON body with series instead of a raster."""

    series: Annotated[tuple[SeriesEntry, ...], Field(min_length=1)]
    model: _ModelName = None
    start: _Start = None
    subscriber: Annotated[SubscriberBody | None, Field(description=_CALLED)] = None

    def request(self, task: Task) -> SeriesRequest:
        """The body as a request that is independent of HTTP.

        Args:
            task: the requested task.
        """
        return SeriesRequest(
            task=task,
            series=tuple(
                SeriesInput(id=one.id, dates=one.dates, bands=one.bands) for one in self.series
            ),
            model=self.model,
            start=self.start,
            horizon=getattr(self, "horizon", None),
            subscriber=_called(self.subscriber),
            attribution="attribution" in getattr(self, "outputs", ()),
            backtest=getattr(self, "backtest", None),
        )


class ClassifySeries(SeriesBody):
    """JSON body of `POST /classify-pixels` with series."""

    outputs: Annotated[
        tuple[SeriesOutput, ...],
        _AtLeastOne,
        Field(
            description="outputs; a result always holds the class, its confidence and all "
            "probabilities; `attribution` adds how much each date contributed"
        ),
    ] = ("class",)


class ForecastSeries(SeriesBody):
    """JSON body of `POST /forecast` with series."""

    horizon: _Horizon = None
    backtest: _Backtest = None


class EmbedSeries(SeriesBody):
    """JSON body of `POST /embed` with series."""

    modality: Annotated[
        Literal["pixel"],
        Field(description="`pixel` only, because a series has no imagery for patches"),
    ] = "pixel"


SERIES: Mapping[Operation, type[SeriesBody]] = {
    "classify-pixels": ClassifySeries,
    "forecast": ForecastSeries,
    "embed": EmbedSeries,
}


_NEW_NAME = Field(
    max_length=64,
    pattern=r"^[a-z0-9][a-z0-9-]*$",
    description="name of the new model, for `model=NAME`: lower-case letters, digits and hyphens",
    examples=["my-crops"],
)
_Described = Annotated[
    str, Field(max_length=2000, description="description of the new model, for its card")
]
_EmbeddingName = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=200,
        description="a model of `/embed` for pixels, such as `embed-pixel`; its embedding is tried "
        "as features, with and without the bands; default: the bands only",
    ),
]


class HeadForm(StackForm):
    """Parameters of `POST /heads`, in addition to the files."""

    name: Annotated[str, _NEW_NAME]
    description: _Described = ""
    labels: Annotated[
        Any,
        Field(
            description="a file of points or polygons (GeoJSON, GeoPackage or GeoParquet; any "
            "CRS), or GeoJSON as text; each needs a property `class`; labels with the same "
            "property `place` are held out together in scoring"
        ),
    ] = None
    start: _Start = None
    embedding: _EmbeddingName = None


class _HeadObjects(HeadForm):
    """A JSON body of `POST /heads` with files: labels and area are objects instead of text."""

    area: Annotated[
        Area | None,
        Field(description="GeoJSON polygon, EPSG:4326: only this part is read"),
    ] = None
    labels: Annotated[
        dict[str, Any],
        Field(
            description="GeoJSON FeatureCollection of points or polygons with a property `class`"
        ),
    ]


class HeadItems(_HeadObjects):
    """JSON body of `POST /heads` that names its files."""

    items: Annotated[
        tuple[ItemBody, ...], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
    ]

    @model_validator(mode="after")
    def _dated_once(self) -> Self:
        _check_item_dates(self.items, self.dates)
        return self


class HeadStac(_HeadObjects):
    """JSON body of `POST /heads` that names STAC items."""

    stac: StacReference


class LabelledEntry(SeriesEntry):
    """One pixel's observations and its class."""

    id: Annotated[str, Field(max_length=200, description="id, for messages")] = ""
    name: Annotated[str | int, Field(alias="class", description="class of the pixel")]
    place: Annotated[
        str | int | None,
        Field(
            description="place of the pixel: series of one place are held out together in scoring"
        ),
    ] = None


class HeadSeries(_Strict):
    """JSON body of `POST /heads` with labelled series instead of a raster."""

    name: Annotated[str, _NEW_NAME]
    description: _Described = ""
    series: Annotated[tuple[LabelledEntry, ...], Field(min_length=1)]
    start: _Start = None
    embedding: _EmbeddingName = None

    def request(self) -> HeadRequest:
        """The body as a request that is independent of HTTP."""
        return HeadRequest(
            name=self.name,
            description=self.description,
            series=tuple(
                LabelledSeries(
                    series=SeriesInput(id=one.id or str(n), dates=one.dates, bands=one.bands),
                    name=str(one.name),
                    place=None if one.place is None else str(one.place),
                )
                for n, one in enumerate(self.series, start=1)
            ),
            start=self.start,
            embedding=self.embedding,
        )


class OutputFormat(_Loose):
    """The format of an output of a process."""

    mediaType: Annotated[  # noqa: N815 - the standard's name
        str | None, Field(max_length=200, description="one of those of the output's description")
    ] = None


class OutputRequest(_Strict):
    """How an output of a process is returned."""

    format: OutputFormat | None = None
    transmissionMode: Annotated[  # noqa: N815 - the standard's name
        Literal["value", "reference"],
        Field(description="`value`: in the response; `reference`: a link to it"),
    ] = "value"


class Execute(_Strict):
    """JSON body of an execution, as OGC API - Processes 1.0 has it."""

    inputs: Annotated[
        dict[str, Any],
        Field(
            description="by the names of the process description: values, or links "
            '(`{"href": …}`) to them; an object or binary value as `{"value": …, "mediaType": …}`'
        ),
    ] = {}
    outputs: Annotated[
        dict[str, OutputRequest],
        Field(description="the outputs to return; without any, all that the inputs give"),
    ] = {}
    response: Annotated[
        Literal["raw", "document"],
        Field(description="`raw`: the outputs themselves; `document`: JSON that holds them"),
    ] = "raw"
    subscriber: Annotated[SubscriberBody | None, Field(description=_CALLED)] = None


class Problem(BaseModel):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    trace_id: Annotated[
        str | None,
        Field(description="trace of the request, if it sent `traceparent` or the server traces"),
    ] = None
    errors: Annotated[
        list[dict[str, str]] | None,
        Field(
            description="with `invalid_request`: `field` and `detail` of each parameter that is "
            "not valid"
        ),
    ] = None
    violated_policies: Annotated[
        list[str] | None,
        Field(
            alias="violated-policies",
            description="with `too_many_requests`: names of the quotas that are used up",
        ),
    ] = None


class WarningEntry(BaseModel):
    """A finding about the input that does not stop the run."""

    code: str
    detail: str


class SummaryResponse(BaseModel):
    """The summary of a raster's result."""

    model_config = ConfigDict(extra="allow")

    model: str
    warnings: list[WarningEntry]


class SeriesResponse(BaseModel):
    """One result per series, in the order of the request."""

    model_config = ConfigDict(extra="allow")

    model: str
    results: list[dict[str, Any]]
    warnings: list[WarningEntry]


class PointsResponse(BaseModel):
    """A GeoJSON FeatureCollection of the requested points, results in `properties`."""

    model_config = ConfigDict(extra="allow")

    type: Literal["FeatureCollection"]
    features: list[dict[str, Any]]
    model: str
    warnings: list[WarningEntry]


class MeasuredResponse(BaseModel):
    """A GeoJSON FeatureCollection of points or fields; `properties` hold lists by date."""

    model_config = ConfigDict(extra="allow")

    type: Literal["FeatureCollection"]
    features: list[dict[str, Any]]
    dates: list[date]
    bands: list[str]
    indices: list[str]
    warnings: list[WarningEntry]


class Seconds(BaseModel):
    """Estimated duration of a run in seconds, from the last runs of the task on this server."""

    shortest: float
    longest: float
    runs: Annotated[
        int,
        Field(
            description="number of runs that the range is taken from; 0 before the first run of "
            "the task for the same kind (raster, points, fields or series) since the server's "
            "start: a rough range, from the time of one batch of the model"
        ),
    ]


class Estimate(BaseModel):
    """Estimated size, memory and duration of a request's run."""

    pixels: Annotated[
        int,
        Field(
            description="pixels, points or series to predict for; for fields the pixels of the "
            "windows that hold one"
        ),
    ]
    dates: Annotated[int, Field(description="dates of a raster that are used")]
    read_bytes: Annotated[
        int,
        Field(
            description="size of the values that are read of the dates and bands used, bytes; for "
            "points the most that may be read"
        ),
    ]
    memory_bytes: Annotated[int, Field(description="memory that the run takes at once, bytes")]
    becomes_a_job: Annotated[
        bool, Field(description="whether the request becomes a job even without `Prefer`")
    ]
    seconds: Annotated[
        Seconds | None,
        Field(description="null if a caller's own model was removed meanwhile"),
    ]


class ValidationResponse(BaseModel):
    """Result of the validation of a request."""

    valid: bool
    task: str
    model: str | None = None
    problem: Annotated[
        dict[str, Any] | None,
        Field(
            description="the error with which the request would be rejected: `code`, `detail`, "
            "`errors`"
        ),
    ] = None
    problems: Annotated[
        list[dict[str, Any]],
        Field(description="`problem`, and those that the request has besides"),
    ] = []
    warnings: list[WarningEntry] = []
    estimate: Estimate | None = None


class Link(BaseModel):
    """A link to another resource."""

    href: str
    rel: str
    type: str | None = None
    title: str | None = None


class JobInfo(BaseModel):
    """A job's status, as `statusInfo` of OGC API - Processes. Times are UTC."""

    jobID: str  # noqa: N815 - the standard's name
    type: Literal["process"] = "process"
    processID: Annotated[str, Field(description="the task")]  # noqa: N815 - the standard's name
    status: Literal["accepted", "running", "successful", "failed", "dismissed"]
    message: Annotated[str | None, Field(description="reason why the job failed")] = None
    progress: Annotated[
        int, Field(ge=0, le=100, description="progress in per cent; never decreases")
    ]
    created: datetime
    started: datetime | None
    finished: datetime | None
    updated: datetime
    links: list[Link]


class CallbackSecret(BaseModel):
    """The secrets with which the caller verifies callbacks."""

    secret: Annotated[
        str, Field(description="of this caller, as libraries of Standard Webhooks take it")
    ]
    secrets: Annotated[
        list[str],
        Field(description="every secret that callbacks are signed with, while one is replaced"),
    ]


class JobList(BaseModel):
    """The caller's jobs, newest first."""

    jobs: list[JobInfo]
    links: list[Link]


class LandingPage(BaseModel):
    """Where the parts of the API are."""

    title: str
    description: str
    links: list[Link]


class Conformance(BaseModel):
    """The classes of standards that the server conforms to."""

    conformsTo: list[str]  # noqa: N815 - the standard's name


class ProcessSummary(BaseModel):
    """A process: a task of the service."""

    id: str
    version: str
    title: str
    description: str
    keywords: list[str]
    jobControlOptions: list[Literal["sync-execute", "async-execute", "dismiss"]]  # noqa: N815
    outputTransmission: list[Literal["value", "reference"]]  # noqa: N815
    links: list[Link]


class ProcessList(BaseModel):
    """The processes."""

    processes: list[ProcessSummary]
    links: list[Link]


class ProcessInput(BaseModel):
    """An input of a process."""

    title: str
    description: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    minOccurs: int  # noqa: N815 - the standard's name
    maxOccurs: int | Literal["unbounded"]  # noqa: N815 - the standard's name


class ProcessOutput(BaseModel):
    """An output of a process."""

    title: str
    description: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ProcessDescription(ProcessSummary):
    """A process with its inputs and outputs."""

    inputs: dict[str, ProcessInput]
    outputs: dict[str, ProcessOutput]


class HeadResponse(BaseModel):
    """A model that was made from labels."""

    model: Annotated[str, Field(description="`name@version`")]
    card: ModelCard
    warnings: list[WarningEntry]


class HeadList(BaseModel):
    """The caller's own models."""

    heads: list[ModelCard]


class ModelList(BaseModel):
    """All models, and the default model of each task."""

    models: list[ModelCard]
    defaults: dict[str, str]


class Live(BaseModel):
    """The process runs."""

    status: Literal["live"] = "live"


class ReadyStatus(BaseModel):
    """The service is ready; with `PIMC_PRIVATE`, all that a client without a key receives."""

    status: Literal["ready"] = "ready"


class ClusterReady(BaseModel):
    """The cluster that runs the windows of jobs."""

    scheduler: Annotated[str, Field(description="address of the Dask scheduler")]
    workers: Annotated[int, Field(description="number of workers that compute windows")]
    threads: Annotated[int, Field(description="number of threads of these workers")]
    refused: Annotated[
        dict[str, str], Field(description="workers that differ from the service, with the reason")
    ]
    fault: Annotated[
        str | None,
        Field(description="why jobs wait; synchronous requests do not use the cluster"),
    ]


class Ready(ReadyStatus):
    """Every default model is loaded and warm."""

    provider: Annotated[str, Field(description="the execution provider in use")]
    models: Annotated[list[str], Field(description="each as `name@version`")]
    defaults: dict[str, str]
    refused: Annotated[
        dict[str, str], Field(description="bundles that are not served, each with the reason")
    ]
    workers: Annotated[int, Field(description="number of jobs that can run at once")]
    disk_free: Annotated[
        dict[str, int],
        Field(
            description="bytes free on the disk of jobs (`state`) and of temporary files "
            "(`scratch`)"
        ),
    ]
    cluster: Annotated[
        ClusterReady | None, Field(description="null if jobs run in the service")
    ] = None


def read_parameters(task: Operation, raw: Mapping[str, Sequence[str]]) -> RasterForm:
    """Validate the parameters of a task's form.

    Args:
        task: the requested task.
        raw: values of each parameter, unparsed; an empty value counts as not sent.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
    """
    return _read_form(FORMS[task], raw)


def read_head_parameters(raw: Mapping[str, Sequence[str]]) -> HeadForm:
    """Validate the parameters of the form of `POST /heads`.

    Args:
        raw: values of each parameter, unparsed; an empty value counts as not sent.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
    """
    return _read_form(HeadForm, raw)


def _read_form(model: type[_Form], raw: Mapping[str, Sequence[str]]) -> _Form:
    given: dict[str, object] = {}
    counts = Counter[str]()
    for name, values in raw.items():
        filled = [value for value in values if value.strip()]
        if name not in _VECTORS:
            _check_texts(filled)
            counts[name] = sum(value.count(",") for value in filled)
        if name in _LISTED:
            given[name] = filled
        elif name == "mask":
            given[name] = ",".join(filled) if filled else []
        elif len(filled) > 1:
            raise InvalidRequest.of(name, f"sent {len(filled)} times, but it takes one value")
        elif filled or name not in model.model_fields:
            given[name] = "".join(filled)
    counts.pop("points", None)  # which are parsed in pieces
    if counts.total() > MOST_VALUES:
        [(name, count)] = counts.most_common(1)
        raise InvalidRequest.of(shown(name), too_many(count))
    given = {name: value for name, value in given.items() if value != []}
    points = given.get("points")
    if points is None or "points" not in model.model_fields:
        return _checked(model, given)
    return _with_points(model, given, str(points).encode())


def _with_points(model: type[_Form], given: Mapping[str, object], text: bytes) -> _Form:
    """Validate a form with points, which are parsed in pieces.

    Args:
        model: type of the form.
        given: its parameters.
        text: its parameter `points`, GeoJSON.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
    """
    faults, points, form = Faults(), None, None
    try:
        points = validate(PointCollection, text, (_POINTS,), documents=())
    except ValidationError as error:
        faults.add(error)
    except Faults as found:
        faults = found
    except InvalidRequest as error:
        raise InvalidRequest.of("points", error.errors[0]["detail"]) from error
    faults.errors = [{**one, "loc": ("points", *one["loc"])} for one in faults.errors]
    try:
        form = model.model_validate({**given, "points": _ONE_POINT})
    except ValidationError as error:
        faults.add(error)
    if form is None or points is None:
        raise _rejection(faults, model)
    return form.model_copy(update={"points": points})


Items = tuple[tuple[ItemBody, ...], RasterForm]
"""Named files, and the other parameters."""
Stac = tuple[StacSearch | dict[str, Any] | str, RasterForm]
"""A search, document or URL of STAC items, and the other parameters."""


def read_items(
    task: Operation, body: bytes, *, allowed: bool, modality: Modality | None = None
) -> Items | None:
    """Validate a JSON body that names files; None if it names none.

    Args:
        task: the requested task.
        body: the body, unparsed.
        allowed: whether the server reads files by reference.
        modality: modality of an embedding, if the query states it.

    Returns:
        The named files, and the other parameters.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
        ForbiddenReference: the body names files, but the server reads none by reference.
    """
    named = _named(body, "items", ITEMS[task], allowed=allowed)
    if named is None:
        return None
    fields = _plain(task, named, modality)
    if named.items[0].date:
        fields["dates"] = tuple(item.date for item in named.items)
    # Not validated again: the parameters are valid, and a form's `points` would have to be text.
    return named.items, FORMS[task].model_construct(**fields)


def read_stac(
    task: Operation, body: bytes, *, allowed: bool, modality: Modality | None = None
) -> Stac | None:
    """Validate a JSON body that names STAC items or searches for them; None if it does not.

    Args:
        task: the requested task.
        body: the body, unparsed.
        allowed: whether the server reads files by reference.
        modality: modality of an embedding, if the query states it.

    Returns:
        The search, document or URL, and the other parameters.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
        ForbiddenReference: the body names items, but the server reads no files by reference.
    """
    named = _named(body, "stac", STAC[task], allowed=allowed)
    if named is None:
        return None
    stac = named.stac.plain if isinstance(named.stac, StacDocument) else named.stac
    return stac, FORMS[task].model_construct(**_plain(task, named, modality))


def _named(body: bytes, field: str, model: type[_Model], *, allowed: bool) -> _Model | None:
    """Validate a body that names files by a parameter; None if the parameter is missing."""
    if not _gives(body, field):
        return None
    if not allowed:
        raise ForbiddenReference(
            f"'{field}' is not allowed, because this server reads no files by reference: send the "
            "files, or have the administrator set PIMC_ALLOWED_ROOTS or PIMC_ALLOWED_HOSTS"
        )
    return _checked(model, body)


def _plain(task: Operation, named: BaseModel, modality: Modality | None) -> dict[str, Any]:
    """The parameters of a JSON body that the task's form has too.

    Raises:
        InvalidRequest: the query and the body state different modalities.
    """
    fields = {name: getattr(named, name) for name in FORMS[task].model_fields}
    if modality is not None:
        if fields["modality"] not in {None, modality}:
            conflict = f"'{modality}' in the query, but '{fields['modality']}' in the body"
            raise InvalidRequest.of("modality", f"{conflict}: send it once")
        fields["modality"] = modality
    return fields


def read_series(task: Operation, body: bytes) -> SeriesBody:
    """Validate a JSON body of series.

    Args:
        task: the requested task, or measured series.
        body: the body, unparsed.

    Raises:
        InvalidRequest: the task takes no series, or parameters are not valid.
    """
    if task not in SERIES:
        raise InvalidRequest.of(
            "series",
            f"/{task} takes imagery, not series: send GeoTIFFs as multipart/form-data, or 'items' "
            "or 'stac'",
        )
    return _checked(SERIES[task], body)


HeadFiles = tuple[tuple[ItemBody, ...], HeadForm]
"""Named files, and the other parameters of `POST /heads`."""
HeadItemsOfStac = tuple[StacSearch | dict[str, Any] | str, HeadForm]
"""A search, document or URL of STAC items, and the other parameters of `POST /heads`."""


def read_head_items(body: bytes, *, allowed: bool) -> HeadFiles | None:
    """Validate a JSON body of `POST /heads` that names files; None if it names none.

    Args:
        body: the body, unparsed.
        allowed: whether the server reads files by reference.

    Returns:
        The named files, and the other parameters.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
        ForbiddenReference: the body names files, but the server reads none by reference.
    """
    named = _named(body, "items", HeadItems, allowed=allowed)
    if named is None:
        return None
    fields = {name: getattr(named, name) for name in HeadForm.model_fields}
    if named.items[0].date:
        fields["dates"] = tuple(item.date for item in named.items)
    return named.items, HeadForm.model_construct(**fields)


def read_head_stac(body: bytes, *, allowed: bool) -> HeadItemsOfStac | None:
    """Validate a JSON body of `POST /heads` that names STAC items; None if it does not.

    Args:
        body: the body, unparsed.
        allowed: whether the server reads files by reference.

    Returns:
        The search, document or URL, and the other parameters.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
        ForbiddenReference: the body names items, but the server reads no files by reference.
    """
    named = _named(body, "stac", HeadStac, allowed=allowed)
    if named is None:
        return None
    stac = named.stac.plain if isinstance(named.stac, StacDocument) else named.stac
    fields = {name: getattr(named, name) for name in HeadForm.model_fields}
    return stac, HeadForm.model_construct(**fields)


def read_execute(body: bytes) -> Execute:
    """Validate the JSON body of an execution; its inputs only in their outer form.

    Raises:
        InvalidRequest: with every field that fails.
    """
    return _checked(Execute, body)


def read_head_series(body: bytes) -> HeadSeries:
    """Validate a JSON body of labelled series.

    Args:
        body: the body, unparsed.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
    """
    return _checked(HeadSeries, body)


class _Reference(_Loose):
    """The parameters by which a JSON body names files or STAC items, not validated."""

    items: Any = None
    stac: Any = None


def _gives(body: bytes, field: str) -> bool:
    """Whether a JSON body has a parameter that is not null."""
    # Without parsing a body of series: only with escapes can the name be spelled in another way.
    if f'"{field}"'.encode() not in body and b"\\u" not in body:
        return False
    _check_shape(body)
    found = members(body) if is_long(body) else None
    if found is None:
        return getattr(_checked(_Reference, body), field) is not None
    value = found.get(field)
    return value is not None and body[value.begin : value.end] != b"null"


def _checked(model: type[_Model], given: bytes | Mapping[str, object]) -> _Model:
    try:
        if isinstance(given, bytes):
            _check_shape(given)
            return validate(model, given, _long_lists(model), documents=_DOCUMENTS)
        return model.model_validate(given)
    except ValidationError as error:
        faults = Faults()
        faults.add(error)
        raise _rejection(faults, model) from error
    except Faults as faults:
        raise _rejection(faults, model) from None


def _rejection(faults: Faults, model: type[BaseModel]) -> InvalidRequest:
    if faults.count > MOST_FAULTS:
        return InvalidRequest.of(
            "body", f"{faults.count} values are not valid: send a few to see the reasons"
        )
    return invalid_request(faults.errors, model.model_fields)


_DOCUMENTS = frozenset({"fields", "labels", "stac"})
"""Parameters whose values are documents, with limits of their own."""
_SERIES_LIST = LongList(
    path=("series",),
    entries=TypeAdapter(list[SeriesEntry]),
    stand_in=b'{"id": "", "dates": ["2021-01-01"]}',
)
_LABELLED_LIST = LongList(
    path=("series",),
    entries=TypeAdapter(list[LabelledEntry]),
    stand_in=b'{"class": "", "dates": ["2021-01-01"]}',
)
_POINTS = LongList(
    path=("features",),
    entries=TypeAdapter(Annotated[list[PointFeature], Field(fail_fast=True)]),
    stand_in=b'{"type": "Feature", "geometry": {"type": "Point", "coordinates": [0, 0]}}',
    most=MAX_POINTS,
    fails_fast=True,
)
_ONE_POINT = f'{{"type": "FeatureCollection", "features": [{_POINTS.stand_in.decode()}]}}'
_PLAIN = TypeAdapter(list[Any])
_INPUT_LIST = LongList(
    path=("inputs", "series"),
    entries=_PLAIN,
    stand_in=b"null",
    # An entry may be a link or a value with its type; a backslash may spell their names.
    parsed_unless=(b'"href"', b'"value"', b"\\"),
)
_INPUT_LISTS = (
    _INPUT_LIST,
    *(
        LongList(path=path, entries=_PLAIN, stand_in=b"null", bounded=path[1] == "points")
        for name in ("points", "fields", "stac")
        for path in (("inputs", name, "features"), ("inputs", name, "value", "features"))
    ),
)


def _long_lists(model: type[BaseModel]) -> tuple[LongList, ...]:
    """The lists of a JSON body that may have many entries."""
    if issubclass(model, Execute):
        return _INPUT_LISTS
    if issubclass(model, HeadSeries):
        return (_LABELLED_LIST,)
    if issubclass(model, SeriesBody):
        return (_SERIES_LIST,)
    documents = (
        LongList(path=(name, "features"), entries=_PLAIN, stand_in=b"null", bounded=False)
        for name in ("fields", "labels", "stac")
    )
    lists = (replace(_POINTS, path=("points", "features")), *documents)
    return tuple(long for long in lists if long.path[0] in model.model_fields)


def _check_texts(values: Iterable[str]) -> None:
    """`_check_shape` of a form's parameters, some of which are JSON."""
    for text in values:
        _check_shape(text.encode())


def _check_shape(body: bytes) -> None:
    """Reject JSON that takes many times its size in memory because it is mostly brackets or keys.

    An empty list has two bytes and takes about 260 bytes of memory once parsed; each unknown key
    makes an error of its own. A body of series has one bracket or key per hundred bytes.
    """
    for kind, number in (
        ("lists and objects", body.count(b"[") + body.count(b"{")),
        ("keys", body.count(b":")),
    ):
        if number > _MAX_STRUCTURE:
            raise InvalidRequest.of(
                "body",
                f"about {number} {kind}, and at most {_MAX_STRUCTURE} are allowed: send several "
                "requests",
            )


def invalid_request(
    errors: Sequence[Mapping[str, Any]], known: Collection[str] = ()
) -> InvalidRequest:
    """Translate pydantic's validation errors.

    Args:
        errors: pydantic's list of errors.
        known: names of the existing parameters, for the message about an unknown one.
    """
    # pydantic also reports a list as too short if none of its entries is valid; leave that out.
    within = {error["loc"][:-1] for error in errors} | {error["loc"][:-2] for error in errors}
    errors = [e for e in errors if e["type"] != "too_short" or e["loc"] not in within]
    found = [_field_error(error, known) for error in errors[:MOST_ERRORS]]
    names = ", ".join(error["field"] for error in found)
    if len(errors) == 1:
        return InvalidRequest("{field}: {detail}".format(**found[0]), found)
    more = ", …" if len(errors) > MOST_ERRORS else ""
    return InvalidRequest(f"{len(errors)} parameters are not valid: {names}{more}", found)


_OTHER_NAMES: Mapping[str, str] = {
    "time": "dates", "datetime": "dates", "timestamps": "dates", "channels": "bands",
    "start_date": "start", "begin": "start", "steps": "horizon", "aoi": "area", "polygon": "area",
    "geometry": "area", "region": "area", "roi": "area", "bounds": "bbox", "extent": "bbox",
    "crs": "grid", "resolution": "grid", "clouds": "mask", "cloud_mask": "mask",
    "output": "outputs", "lonlat": "points", "coordinates": "points", "factor": "scale",
    "version": "model",
}  # fmt: skip
"""Names of this service's parameters, by their names in other services."""


def _suggestion(name: str, known: Collection[str]) -> str | None:
    """The parameter whose name is similar to an unknown name, in spelling or in other services."""
    if len(name) > _LONGEST_NAME:  # comparing takes time and memory in proportion
        return None
    plain = name.lower().replace("-", "_").removesuffix("[]")
    if plain in known:
        return plain
    other = _OTHER_NAMES.get(plain)
    if other in known:
        return other
    return next(iter(get_close_matches(plain, [*known], n=1, cutoff=0.7)), None)


def unknown_parameter(name: str, known: Collection[str]) -> str:
    """The message about an unknown parameter."""
    similar = _suggestion(name, known)
    hint = f" (did you mean '{similar}'?)" if similar else ""
    return f"unknown parameter{hint}; the parameters are {', '.join(sorted(known))}"


def _field_error(error: Mapping[str, Any], known: Collection[str]) -> dict[str, str]:
    path = error["loc"]
    detail = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        detail = unknown_parameter(str(path[0]), known) if len(path) == 1 else "unknown parameter"
    return {"field": ".".join(shown(part) for part in path) or "body", "detail": detail}
