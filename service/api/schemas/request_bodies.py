"""JSON bodies of requests: named files, STAC items, series, labelled series, executions.

items, stac  a task's form, with files that the server reads by reference
series       observations of single pixels instead of a raster
execution    inputs and outputs of OGC API - Processes
"""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from models.card import Task
from service.api.schemas.forms import (
    ClassifyForm,
    EmbedForm,
    ForecastForm,
    HeadForm,
    LandcoverForm,
    MeasureForm,
    SimilarForm,
)
from service.api.schemas.geojson import Area, PointCollection, extent_of_geojson
from service.api.schemas.parameter_types import (
    NEW_NAME,
    SUBSCRIBER,
    AtLeastOne,
    Backtest,
    Box,
    Description,
    EmbeddingName,
    Horizon,
    IsoDate,
    LooseModel,
    ModelName,
    Number,
    Operation,
    SeriesOutput,
    Start,
    StrictModel,
    SubscriberBody,
    interval,
    subscriber_of,
)
from service.run.request import HeadRequest, LabelledSeries, SeriesInput, SeriesRequest

MAX_ITEMS = 2_000


class ItemBody(StrictModel):
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
        IsoDate | None,
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


class _AsObjects(StrictModel):
    """A raster request as JSON: GeoJSON parameters are objects instead of text."""

    subscriber: Annotated[SubscriberBody | None, Field(description=SUBSCRIBER)] = None

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


class StacSearch(StrictModel):
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
        Box,
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
        Number | None,
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


class StacDocument(LooseModel):
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
    Annotated[tuple[Number | None, ...], Field(fail_fast=True)] | None,
    Field(description="reflectance, 0 to 1, one value per date; null is a missing observation"),
]


class SeriesEntry(StrictModel):
    """One pixel's observations: reflectance by band, one value per date."""

    id: Annotated[str, Field(max_length=200, description="returned with the result")]
    dates: Annotated[tuple[IsoDate, ...], Field(min_length=1, max_length=10_000, fail_fast=True)]
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
    lon: Annotated[
        float | None,
        Field(
            ge=-180,
            le=180,
            description="longitude in degrees, with `lat`. A forecast takes into account whether "
            "the place is far from the model's training data",
        ),
    ] = None
    lat: Annotated[float | None, Field(ge=-90, le=90, description="latitude in degrees")] = None

    @property
    def lonlat(self) -> tuple[float, float] | None:
        """Longitude and latitude in degrees, None if they are not given."""
        return None if self.lon is None or self.lat is None else (self.lon, self.lat)

    @property
    def bands(self) -> dict[str, tuple[float | None, ...]]:
        """Reflectance of the bands that the series has, by name of the band."""
        given = ((name, getattr(self, name)) for name in type(self).model_fields if name[0] == "B")
        return {name: values for name, values in given if values is not None}

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.lon is None) != (self.lat is None):
            given, lacking = ("lon", "lat") if self.lat is None else ("lat", "lon")
            raise ValueError(f"{given} is given without {lacking}: give both or none")
        return self

    @model_validator(mode="after")
    def _one_value_per_date(self) -> Self:
        for band, values in self.bands.items():
            if len(values) != len(self.dates):
                raise ValueError(
                    f"{len(self.dates)} dates but {len(values)} values of {band}: give one value "
                    "per date, null if it is missing"
                )
        return self


class SeriesBody(StrictModel):
    """A JSON body with series instead of a raster."""

    series: Annotated[tuple[SeriesEntry, ...], Field(min_length=1)]
    model: ModelName = None
    start: Start = None
    subscriber: Annotated[SubscriberBody | None, Field(description=SUBSCRIBER)] = None

    def request(self, task: Task) -> SeriesRequest:
        """The body as a request that is independent of HTTP.

        Args:
            task: the requested task.
        """
        return SeriesRequest(
            task=task,
            series=tuple(
                SeriesInput(id=one.id, dates=one.dates, bands=one.bands, lonlat=one.lonlat)
                for one in self.series
            ),
            model=self.model,
            start=self.start,
            horizon=getattr(self, "horizon", None),
            subscriber=subscriber_of(self.subscriber),
            attribution="attribution" in getattr(self, "outputs", ()),
            backtest=getattr(self, "backtest", None),
        )


class ClassifySeries(SeriesBody):
    """JSON body of `POST /classify-pixels` with series."""

    outputs: Annotated[
        tuple[SeriesOutput, ...],
        AtLeastOne,
        Field(
            description="outputs; a result always holds the class, its confidence and all "
            "probabilities; `attribution` adds how much each date contributed"
        ),
    ] = ("class",)


class ForecastSeries(SeriesBody):
    """JSON body of `POST /forecast` with series."""

    horizon: Horizon = None
    backtest: Backtest = None


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


class HeadSeries(StrictModel):
    """JSON body of `POST /heads` with labelled series instead of a raster."""

    name: Annotated[str, NEW_NAME]
    description: Description = ""
    series: Annotated[tuple[LabelledEntry, ...], Field(min_length=1)]
    start: Start = None
    embedding: EmbeddingName = None

    def request(self) -> HeadRequest:
        """The body as a request that is independent of HTTP."""
        return HeadRequest(
            name=self.name,
            description=self.description,
            series=tuple(
                LabelledSeries(
                    series=SeriesInput(
                        id=one.id or str(n), dates=one.dates, bands=one.bands, lonlat=one.lonlat
                    ),
                    name=str(one.name),
                    place=None if one.place is None else str(one.place),
                )
                for n, one in enumerate(self.series, start=1)
            ),
            start=self.start,
            embedding=self.embedding,
        )


class OutputFormat(LooseModel):
    """The format of an output of a process."""

    mediaType: Annotated[  # noqa: N815 - the standard's name
        str | None, Field(max_length=200, description="one of those of the output's description")
    ] = None


class OutputRequest(StrictModel):
    """How an output of a process is returned."""

    format: OutputFormat | None = None
    transmissionMode: Annotated[  # noqa: N815 - the standard's name
        Literal["value", "reference"],
        Field(description="`value`: in the response; `reference`: a link to it"),
    ] = "value"


class Execute(StrictModel):
    """JSON body of an execution, as OGC API - Processes 1.0 has it."""

    inputs: Annotated[
        dict[str, Any],
        Field(
            description="by the names of the process description: values, or links "
            '(`{"href": …}`) to them; an object or binary value as `{"value": …, "mediaType": …}`'
        ),
    ] = {}  # noqa: RUF012 - pydantic copies it
    outputs: Annotated[
        dict[str, OutputRequest],
        Field(description="the outputs to return; without any, all that the inputs give"),
    ] = {}  # noqa: RUF012 - pydantic copies it
    response: Annotated[
        Literal["raw", "document"],
        Field(description="`raw`: the outputs themselves; `document`: JSON that holds them"),
    ] = "raw"
    subscriber: Annotated[SubscriberBody | None, Field(description=SUBSCRIBER)] = None
