"""Forms: the parameters that each task takes beside the files of a multipart request.

A form becomes a request that is independent of HTTP (`service.run.request`). The `description` of
a parameter completes "NAME: …"; "default" states what holds if the parameter is left out.
"""

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import Field, Json

from models.card import Modality, Task
from service.api.schemas.geojson import Area, PointCollection
from service.api.schemas.parameter_types import (
    NEW_NAME,
    SUBSCRIBER,
    AtLeastOne,
    Backtest,
    Box,
    ClassOutput,
    DatedOutput,
    Description,
    EmbeddingName,
    Horizon,
    IsoDate,
    Mask,
    ModelName,
    Number,
    Offset,
    Operation,
    QuantileOutput,
    Scale,
    SensorName,
    SimilarOutput,
    Split,
    SplitOnce,
    Start,
    StrictModel,
    SubscriberBody,
    subscriber_of,
)
from service.errors import InvalidRequest
from service.infer.smooth import MAX_RADIUS
from service.read.geotiff import SourceFile
from service.read.layouts import Layout, StackOptions
from service.read.masks import RULES
from service.run.request import MeasureRequest, PointQuery, RasterRequest, SimilarRequest
from service.write.predictions import EmbeddingType, ProbabilityType

_Band = Annotated[str, Field(min_length=1, max_length=64)]
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


class StackForm(StrictModel):
    """Parameters that describe the files of a stack; common to all requests with files."""

    layout: Annotated[
        Layout | None,
        Field(description="content of each file; default: determined from the files"),
    ] = None
    dates: Annotated[
        Annotated[tuple[IsoDate, ...], AtLeastOne] | None,
        Split,
        Field(
            description="ISO dates, comma-separated or repeated: one per file, per band of a "
            "`file-per-band` file, or per date of a `single-file` stack; default: read from the "
            "files",
        ),
    ] = None
    bands: Annotated[
        Annotated[tuple[_Band, ...], AtLeastOne] | None,
        Split,
        Field(
            description="Sentinel-2 band names in band order, comma-separated or repeated; "
            "default: read from the files",
        ),
    ] = None
    scale: Annotated[
        Scale,
        Field(
            description="factor in reflectance = value x scale + offset; from a date on as in "
            "`2022-01-25:0.0001`, or from a processing baseline on as in `04.00:0.0001`, several "
            "comma-separated; default: read from the files",
        ),
    ] = None
    offset: Annotated[
        Offset,
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
        Mask,
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
        Box,
        Split,
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


class RasterForm(StackForm):
    """Parameters of all tasks, in addition to the files."""

    model: ModelName = None
    subscriber: Annotated[
        Json[SubscriberBody] | None, Field(description=f"JSON object: {SUBSCRIBER}")
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
            subscriber=subscriber_of(self.subscriber),
            **cast(Any, {name: getattr(self, name, None) for name in of_some_tasks}),
        )


class ClassifyForm(RasterForm):
    """Parameters of `POST /classify-pixels`."""

    start: Start = None
    outputs: Annotated[tuple[DatedOutput, ...], AtLeastOne, SplitOnce] = ("class",)
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
        Number | None,
        Field(
            ge=0,
            description="hectares: smaller areas of the map join the neighbour with the longest "
            "shared edge; default: 0, none",
        ),
    ] = None
    dtype: _ProbabilityType = "float32"


class ForecastForm(RasterForm):
    """Parameters of `POST /forecast`."""

    start: Start = None
    outputs: Annotated[tuple[QuantileOutput, ...], AtLeastOne, SplitOnce] = ("q50",)
    horizon: Horizon = None
    backtest: Backtest = None


class LandcoverForm(RasterForm):
    """Parameters of `POST /landcover`."""

    outputs: Annotated[tuple[ClassOutput, ...], AtLeastOne, SplitOnce] = ("class",)
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
    start: Start = None
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
    start: Start = None
    outputs: Annotated[tuple[SimilarOutput, ...], AtLeastOne, SplitOnce] = ("similarity",)

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
        IsoDate | None,
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


class HeadForm(StackForm):
    """Parameters of `POST /heads`, in addition to the files."""

    name: Annotated[str, NEW_NAME]
    description: Description = ""
    labels: Annotated[
        Any,
        Field(
            description="a file of points or polygons (GeoJSON, GeoPackage or GeoParquet; any "
            "CRS), or GeoJSON as text; each needs a property `class`; labels with the same "
            "property `place` are held out together in scoring"
        ),
    ] = None
    start: Start = None
    embedding: EmbeddingName = None
