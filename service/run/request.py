"""Requests: tasks with their inputs and options, as frozen values independent of HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

from models.card import Modality, Task
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.write.predictions import NumberType

Runnable = Literal[Task, "similar"]
"""Operations of a run: a task of a model, or similarity, which a model of embeddings serves."""
Charge = Callable[[int], AbstractContextManager[None]]
"""Counts pixels, points or series for a caller's quota, before they are read; the run happens in
the context, which may undo the count."""


def no_charge(pixels: int) -> AbstractContextManager[None]:  # noqa: ARG001 - as `Charge`
    """A `Charge` that counts nothing."""
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class PointQuery:
    """A point to predict for."""

    lon: float
    """Longitude in degrees, EPSG:4326."""
    lat: float
    """Latitude in degrees, EPSG:4326."""
    feature: Mapping[str, Any]
    """The GeoJSON feature of the request, to whose properties the results are added."""

    @classmethod
    def of(cls, feature: Mapping[str, Any]) -> PointQuery:
        """The point of a GeoJSON feature with a Point geometry."""
        lon, lat = feature["geometry"]["coordinates"][:2]
        return cls(lon=lon, lat=lat, feature=feature)


@dataclass(frozen=True, kw_only=True)
class Subscriber:
    """Addresses that the service calls when a job ends or proceeds, as OGC API - Processes has it.

    `form` states what the address of success gets: the job's status document, or the results
    document of OGC API - Processes. The others always get the status document.
    """

    success: str
    failed: str | None = None
    progress: str | None = None
    form: Literal["status", "results"] = "status"

    def url(self, event: Literal["success", "failed", "progress"]) -> str | None:
        """The address of an event; None if the request names none."""
        given: str | None = getattr(self, event)
        return given


@dataclass(frozen=True, kw_only=True)
class RasterRequest:
    """A task on a stack of GeoTIFFs."""

    task: Task
    files: tuple[SourceFile, ...]
    stack: StackOptions = field(default_factory=StackOptions)
    """The request's parameters about the files: layout, dates, bands, scale, mask, grid."""
    model: str | None = None
    """`name` or `name@version`; None takes the task's default."""
    modality: Modality | None = None
    """Modality of an embedding; None takes that of `model`, and `pixel` if `model` is None."""
    start: date | None = None
    """First day of the time window; None applies the card's rule."""
    outputs: tuple[str, ...] | None = None
    """Rasters of a classification, quantiles of a forecast; None takes the task's default."""
    horizon: int | None = None
    """Steps ahead of a forecast; None takes the card's maximum."""
    backtest: bool | None = None
    """Whether forecasts are backtested; None backtests rasters and fields with enough history."""
    stride: int | None = None
    """Pixels between patches; None takes the patch's side."""
    smooth: int | None = None
    """Radius in pixels of the smoothing of a class map; None does not smooth."""
    min_area: float | None = None
    """Hectares below which an area of a class map joins a neighbour; None joins none."""
    dtype: NumberType | None = None
    """Number type of an embedding, or of a classification's probabilities; None is float32."""
    points: tuple[PointQuery, ...] | None = None
    """Points to predict for; None predicts for the whole raster or for `fields`."""
    fields: SourceFile | None = None
    """A file of polygons to predict for; None predicts for the whole raster or for `points`."""

    items: tuple[Mapping[str, Any], ...] = ()
    """The STAC items to which the files belong; returned as `sources`."""
    subscriber: Subscriber | None = None
    """URLs that a job calls; None for no callbacks."""

    @property
    def operation(self) -> Runnable:
        """Name of the requested operation in jobs and results."""
        return self.task

    @property
    def of_places(self) -> bool:
        """Whether results are of points or fields alone: remote files are then read on demand."""
        return self.points is not None or self.fields is not None

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """Every file of the request: the rasters, and the polygons if there are any."""
        return self.files if self.fields is None else (*self.files, self.fields)


@dataclass(frozen=True, kw_only=True)
class MeasureRequest(RasterRequest):
    """The measured series of points or fields of a stack; either `points` or `fields` is given.

    No model runs. `model`, `task` and `start` determine the recurrence plots.
    """

    plots: bool = False
    """Whether the response contains recurrence plots."""


@dataclass(frozen=True, kw_only=True)
class SimilarRequest(RasterRequest):
    """How similar the embedding of every pixel is to those of places; the task is `embed`.

    The places are `place_points` or `place_file`; `points` and `fields` are None, because the
    result is of the whole raster.
    """

    place_points: tuple[PointQuery, ...] | None = None
    """Points in degrees."""
    place_file: SourceFile | None = None
    """A file of points and polygons."""

    @property
    def operation(self) -> Runnable:
        """See `RasterRequest`."""
        return "similar"

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """Every file that the request needs."""
        return self.files if self.place_file is None else (*self.files, self.place_file)


@dataclass(frozen=True, kw_only=True)
class SeriesInput:
    """One pixel's observations."""

    id: str
    """The caller's name for it; returned with the result."""
    dates: Sequence[date]
    """Dates in any order; of several observations of one date the first clear one is used."""
    bands: Mapping[str, Sequence[float | None]]
    """Reflectance by band name, one value per date; None is missing."""
    lonlat: tuple[float, float] | None = None
    """Longitude and latitude in degrees; None if unknown."""


@dataclass(frozen=True, kw_only=True)
class SeriesRequest:
    """A task on pixels given as series."""

    task: Task
    series: tuple[SeriesInput, ...]
    model: str | None = None
    """`name` or `name@version`; None takes the task's default."""
    start: date | None = None
    """First day of every series' time window; None applies the card's rule to each."""
    horizon: int | None = None
    """Steps ahead of a forecast; None takes the card's maximum."""
    subscriber: Subscriber | None = None
    """URLs that a job calls; None for no callbacks."""
    attribution: bool = False
    """Whether the attribution of each date to a class is requested."""
    backtest: bool | None = None
    """Whether forecasts are backtested; None does not."""

    @property
    def operation(self) -> Runnable:
        """Name of the requested operation in jobs and results."""
        return self.task


TaskRequest = RasterRequest | SeriesRequest


@dataclass(frozen=True, kw_only=True)
class LabelledSeries:
    """One pixel's observations, and its class."""

    series: SeriesInput
    name: str
    """The class."""
    place: str | None = None
    """Name of its place: the labels of one place are never in both training and scoring."""


@dataclass(frozen=True, kw_only=True)
class HeadRequest:
    """Labels from which a head for a caller's own classes is fitted."""

    name: str
    """Name of the new model."""
    description: str = ""
    files: tuple[SourceFile, ...] = ()
    """The stack; empty if `series` is given."""
    stack: StackOptions = field(default_factory=StackOptions)
    """The request's parameters about the files: layout, dates, bands, scale, mask, grid."""
    labels: SourceFile | None = None
    """A vector file of points and polygons with a property `class`; None if `series` is given."""
    series: tuple[LabelledSeries, ...] = ()
    start: date | None = None
    """First day of the time window; None uses all dates."""
    embedding: str | None = None
    """Model whose embedding is tried as features; None uses the series alone."""
