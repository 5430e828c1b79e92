"""Requests: tasks with their inputs and options, as frozen values independent of HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from models.card import Modality, Task
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions


@dataclass(frozen=True, kw_only=True)
class PointQuery:
    """A place to predict for."""

    lon: float
    """Longitude in degrees, EPSG:4326."""
    lat: float
    """Latitude in degrees, EPSG:4326."""
    feature: Mapping[str, Any]
    """The GeoJSON feature of the request; returned with the results among its properties."""

    @classmethod
    def of(cls, feature: Mapping[str, Any]) -> PointQuery:
        """The place of a GeoJSON Point feature."""
        lon, lat = feature["geometry"]["coordinates"][:2]
        return cls(lon=lon, lat=lat, feature=feature)


@dataclass(frozen=True, kw_only=True)
class RasterRequest:
    """A task on a stack of GeoTIFFs."""

    task: Task
    files: tuple[SourceFile, ...]
    stack: StackOptions = field(default_factory=StackOptions)
    """The caller's statements about the files."""
    model: str | None = None
    """`name` or `name@version`; None takes the task's default."""
    modality: Modality | None = None
    """Modality of an embedding; None uses the model's, or else pixels."""
    start: date | None = None
    """First day of the time window; None applies the card's rule."""
    outputs: tuple[str, ...] | None = None
    """Rasters of a classification, quantiles of a forecast; None uses the task's default."""
    horizon: int | None = None
    """Steps ahead of a forecast; None takes the card's maximum."""
    stride: int | None = None
    """Pixels between patches; None uses the patch's side."""
    smooth: int | None = None
    """Radius in pixels of the smoothing of a class map; None smooths nothing."""
    min_area: float | None = None
    """Hectares below which an area of a class map joins a neighbour; None joins none."""
    points: tuple[PointQuery, ...] | None = None
    """Predict for these places alone; None predicts for the whole raster."""
    fields: SourceFile | None = None
    """A file of polygons to predict for; None predicts for the whole raster."""

    items: tuple[Mapping[str, Any], ...] = ()
    """The STAC items that the files are of; returned as `sources`."""

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """Every file that the request needs."""
        return self.files if self.fields is None else (*self.files, self.fields)


@dataclass(frozen=True, kw_only=True)
class MeasureRequest(RasterRequest):
    """The measured series of places of a stack: `points` or `fields` is given.

    Nothing is predicted; `model`, `task` and `start` are those of the recurrence plots.
    """

    plots: bool = False
    """Whether recurrence plots are wanted."""


@dataclass(frozen=True, kw_only=True)
class SeriesInput:
    """One pixel's observations."""

    id: str
    """The caller's name for it; returned with the result."""
    dates: Sequence[date]
    """In any order; of several observations of one date the first clear one counts."""
    bands: Mapping[str, Sequence[float | None]]
    """Reflectance by band name, one value per date; None is missing."""


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


TaskRequest = RasterRequest | SeriesRequest


@dataclass(frozen=True, kw_only=True)
class LabelledSeries:
    """One pixel's observations, and its class."""

    series: SeriesInput
    name: str
    """The class."""
    place: str | None = None
    """Where it lies: labels of one place are never split when a head is scored."""


@dataclass(frozen=True, kw_only=True)
class HeadRequest:
    """Labels from which a caller's own classes are learnt."""

    name: str
    """Of the model to make."""
    description: str = ""
    files: tuple[SourceFile, ...] = ()
    """The stack; empty if the labels bring their own series."""
    stack: StackOptions = field(default_factory=StackOptions)
    """The caller's statements about the files."""
    labels: SourceFile | None = None
    """Points and polygons with a property `class`, in a vector file; None with series."""
    series: tuple[LabelledSeries, ...] = ()
    start: date | None = None
    """First day of the time window; None uses all dates."""
    embedding: str | None = None
    """Model whose embedding is tried as features; None tries none."""
