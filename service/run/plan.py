"""Plans: a request checked against its files and its model, before a window is read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.card import Modality, ResolvedTimeWindow, Task
from service.errors import InvalidRequest, MissingDates, StackWarning, TooFewDates
from service.grid import beyond
from service.infer.engine import Engine
from service.infer.model import LoadedModel
from service.infer.patches import PatchGrid
from service.read.clouds import MIN_DATES
from service.read.geotiff import BlockCache
from service.read.radiometry import calibrate
from service.read.stack import Stack, open_stack
from service.read.vectors import Fields, read_fields
from service.run.backtest import (
    SAMPLED,
    Backtested,
    can_backtest,
    dates_for_correction,
    no_backtest,
)
from service.run.coverage import check_coverage
from service.run.executors import Timing, check
from service.run.extent import NEAR_KM, kilometres_away
from service.run.memory import (
    MemoryBudget,
    Need,
    fields_need,
    points_need,
    raster_need,
    sampling_need,
    series_need,
)
from service.run.request import (
    RasterRequest,
    Runnable,
    SeriesRequest,
    SimilarRequest,
    TaskRequest,
)
from service.run.series import SeriesRun, plan_series
from service.run.similar_places import read_places
from service.run.time_window import resolve_time_window
from service.tracing import span
from service.write.predictions import (
    ATTRIBUTION,
    JSON,
    POLYGONS,
    NumberType,
    Predictions,
    SimilarityPredictions,
    predictions_of,
)

_DEFAULT_OUTPUTS: Mapping[Task, tuple[str, ...]] = {
    "classify-pixels": ("class",),
    "forecast": ("q50",),
    "landcover": ("class",),
    "embed": (),
}


@dataclass(frozen=True, kw_only=True)
class RasterRun:
    """A run over a stack: model, stack, time window and outputs."""

    model: LoadedModel
    stack: Stack
    time_window: ResolvedTimeWindow | None
    """The model's time window over the stack's dates; None for a model of imagery."""
    outputs: tuple[str, ...] = ("class",)
    """Rasters of a classification, or quantiles of a forecast; ignored for an embedding."""
    horizon: int | None = None
    """Number of steps of a forecast; None takes the card's maximum."""
    backtest: Literal["no", "sample", "places"] = "no"
    """Whether forecasts are backtested: on a sample of the raster, or on each of the places."""
    backtested: Backtested | None = None
    """The finished backtest, by which the predictions are corrected."""
    stride: int = 64
    """Pixels between patches, 1 to the patch's side."""
    smooth: int = 0
    """Radius in pixels of the smoothing of a class map; 0 does not smooth."""
    min_area: float = 0.0
    """Hectares below which a connected area of a class map joins a neighbour; 0 joins none."""
    dtype: NumberType = "float32"
    """Number type of an embedding, or of a classification's probabilities."""
    similar_to: tuple[str, ...] | None = None
    """Names of the places that pixels are compared with; None predicts as the model does."""
    polygons: bool = False
    """Whether the class map is written as polygons as well; `outputs` then holds `class`."""
    rasters: bool = True
    """Whether rasters are written; if not, only the summary is made."""

    @cached_property
    def kilometres_away(self) -> float | None:
        """Distance from the model's training data, km; None if it is small or unknown."""
        return kilometres_away(self.model.card, self.stack.grid)

    def elsewhere(
        self, rows: NDArray[np.number[Any]], columns: NDArray[np.number[Any]]
    ) -> NDArray[np.bool_]:
        """Whether pixels are far from the training data (N), for a graph that takes it.

        Args:
            rows: row of each pixel (N).
            columns: column of each pixel (N).
        """
        if self._elsewhere is not None:
            return np.full(len(rows), self._elsewhere)
        lon, lat = self.stack.grid.lonlat(rows, columns).T
        return beyond(lon, lat, self.model.card.extent, NEAR_KM)

    @cached_property
    def _elsewhere(self) -> bool | None:
        """`elsewhere` if all pixels have the same; None if they may differ."""
        card = self.model.card
        return card.elsewhere and self.stack.grid.wholly_beyond(card.extent, NEAR_KM)

    @property
    def operation(self) -> Runnable:
        """The task of the run, or `similar`."""
        return self.model.card.task if self.similar_to is None else "similar"

    @property
    def cleaned(self) -> bool:
        """Whether the map is smoothed or sieved."""
        return bool(self.smooth or self.min_area)

    @property
    def attribution(self) -> bool:
        """Whether the request has the output `attribution`."""
        return ATTRIBUTION in self.outputs

    @property
    def used(self) -> tuple[int, ...]:
        """Positions of the observations used, on the stack's T axis."""
        return self.time_window.used if self.time_window else tuple(range(self.stack.observations))

    @property
    def history(self) -> tuple[int, ...]:
        """Positions of the observations up to the last one used: those of a backtest."""
        return tuple(range(self.used[-1] + 1))

    @property
    def read(self) -> tuple[int, ...]:
        """Positions of the observations that predictions are made from; those used are the last."""
        if self.backtest == "no":
            return self.used
        if self.backtest == "places":
            return self.history
        return dates_for_correction(self.stack.dates, self.used)

    @property
    def sampled(self) -> tuple[int, ...]:
        """Positions of all observations that are read, also those read only for a sample."""
        return self.used if self.backtest == "no" else self.history

    @property
    def predictions(self) -> Predictions:
        """The interpretation of the model's predictions.

        Raises:
            InvalidRequest: the model does not have an output, the horizon or the number type.
        """
        if self.similar_to is not None:
            return SimilarityPredictions(places=self.similar_to, outputs=self.outputs)
        return predictions_of(
            self.model.card,
            self.outputs,
            horizon=self.horizon,
            time_window=self.time_window,
            dtype=self.dtype,
            dates=[self.stack.dates[t] for t in self.used] if self.stack.dates else (),
        )

    @property
    def patches(self) -> PatchGrid:
        """The positions of a patch model's patches.

        Raises:
            InvalidRequest: the stride is out of range, or the raster is smaller than a patch.
        """
        return PatchGrid.over(self.stack.grid, side=self.model.card.patch or 0, stride=self.stride)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one pixel of a window: float32 values and 1 byte of validity per date."""
        return len(self.read) * (4 * len(self.stack.bands_read) + 1)

    @property
    def prediction_bytes(self) -> int:
        """Memory of one prediction, bytes: as the model returns it, and again as bands."""
        attributed = len(self.used) if self.attribution else 0
        bands = 1 + len(self.similar_to) if self.similar_to else 0
        return 2 * 4 * (int(np.prod(self.model.width)) + attributed + bands)


def plan_raster(
    model: LoadedModel,
    stack: Stack,
    *,
    start: date | None = None,
    outputs: Sequence[str] | None = None,
    horizon: int | None = None,
    stride: int = 64,
    smooth: int = 0,
    min_area: float = 0.0,
    dtype: NumberType = "float32",
    similar_to: tuple[str, ...] | None = None,
    rasters: bool = True,
) -> RasterRun:
    """A run checked against its model, before a pixel is read.

    Args:
        model: the model that predicts.
        stack: the model's input.
        start: first day of the time window; None applies the card's rule.
        outputs: requested rasters or quantiles; None takes the class map or the median forecast.
        horizon: number of steps of a forecast; None takes the card's maximum.
        stride: pixels between patches.
        smooth: radius of the smoothing of a class map, pixels.
        min_area: smallest area of a class map, hectares.
        dtype: number type of an embedding, or of a classification's probabilities.
        similar_to: names of the places that pixels are compared with; None predicts.
        rasters: whether the run writes rasters, or only makes the summary.

    Raises:
        InvalidRequest: the model does not have an output, the horizon or the stride, or the raster
            is smaller than a patch.
        MissingDates: the model needs dates, and the stack has none.
        TooFewDates: fewer dates than the model needs lie in the time window.
    """
    requested = _DEFAULT_OUTPUTS[model.card.task] if outputs is None else tuple(outputs)
    polygons = bool(model.card.classes) and POLYGONS in requested
    if polygons:  # the polygons are made from the class map
        requested = tuple(dict.fromkeys("class" if o == POLYGONS else o for o in requested))
    run = RasterRun(
        model=model,
        stack=stack,
        time_window=resolve_time_window(model.card, stack.dates, start, what="the stack"),
        outputs=requested,
        polygons=polygons,
        horizon=horizon,
        stride=stride,
        smooth=smooth,
        min_area=min_area,
        dtype=dtype,
        similar_to=similar_to,
        rasters=rasters,
    )
    check_run(run)
    return run


def check_run(run: RasterRun) -> None:
    """Check a run against its model.

    Raises:
        InvalidRequest: the model does not have an output, the horizon or the stride, or the raster
            is smaller than a patch.
        MissingDates: the model needs dates, and the run has no time window.
        TooFewDates: the run has fewer observations than the model needs.
    """
    card = run.model.card
    if card.modality == "pixel" and run.time_window is None:
        raise MissingDates(
            f"'{card.id}' takes a time series, and the stack has no dates: give `dates`"
        )
    if len(run.used) < card.min_observations:
        raise TooFewDates(
            f"the request uses {len(run.used)} observations, and '{card.id}' needs at least "
            f"{card.min_observations}: add dates"
        )
    check_cloud_dates(run.stack, len(run.used))
    _ = run.predictions
    if card.modality == "patch":
        _ = run.patches


def check_cloud_dates(stack: Stack, used: int) -> None:
    """Check that there are enough dates to estimate a cloud mask from the series.

    Raises:
        TooFewDates: there are not enough dates.
    """
    if stack.cloud_bands is not None and used < MIN_DATES:
        raise TooFewDates(
            f"mask=cloud compares each pixel with its own series and needs at least {MIN_DATES} "
            f"dates, and {used} of {stack.observations} are used: add dates, or give another mask "
            "or mask=none"
        )


def dates_summary(run: RasterRun) -> dict[str, JSON]:
    """The first day of the time window and the used dates, for summaries."""
    dates = [run.stack.dates[t] for t in run.used] if run.stack.dates else []
    return {
        "start": run.time_window.start.isoformat() if run.time_window else None,
        "dates_used": [day.isoformat() for day in dates],
    }


Kind = Literal["raster", "points", "fields", "series"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request checked against its files and its model."""

    request: TaskRequest
    model: LoadedModel
    run: RasterRun | SeriesRun
    pixels: int
    """Number of pixels of a raster run; 0 for points and series."""
    fields: Fields | None = None
    """Polygons to predict for, or places to compare every pixel with; None predicts for points,
    series or the whole raster."""
    need: Need
    """Memory that the run reserves."""
    planning: Timing
    """Time of reading the files' headers and the sampled pixels."""

    @property
    def predicts_for(self) -> Kind:
        """The kind of input: `raster`, `points`, `fields` or `series`."""
        if not isinstance(self.request, RasterRequest):
            return "series"
        if self.request.points is not None:
            return "points"
        # Similarity is of the whole raster; its places are in `fields`.
        whole = self.fields is None or isinstance(self.request, SimilarRequest)
        return "raster" if whole else "fields"


@span("plan")
def plan_request(
    request: TaskRequest,
    engine: Engine,
    *,
    max_raster_bytes: int,
    rasters: bool,
    owner: str = "",
    max_fields: int = 100_000,
    cache: BlockCache | None = None,
    budget: MemoryBudget | None = None,
    cancelled: threading.Event | None = None,
    patience: float | None = None,
) -> Plan:
    """Check that a request can be executed, before a window is read.

    Args:
        request: the request.
        engine: the models.
        max_raster_bytes: largest decoded size of a stack, bytes.
        rasters: whether the run writes files; it makes the document in any case.
        owner: the caller; the models that this caller has made may be named too.
        max_fields: largest number of polygons of a request.
        cache: GDAL's block cache; None does not change it.
        budget: memory budget of all runs; None creates one for this run.
        cancelled: an event that ends the wait for memory when it is set.
        patience: seconds to wait for memory; None waits without a limit.

    Raises:
        PIMCError: the files, the model and the parameters do not fit together. At most a sample of
            the pixels has been read.
        RasterTooLarge: the run needs more memory than the whole budget.
        Overloaded: other runs held the memory until `patience` had passed.
        Cancelled: `cancelled` was set.
    """
    budget = budget or MemoryBudget()
    begun = time.perf_counter()
    if isinstance(request, SeriesRequest):
        predictor = engine.find(request.model, request.task, "pixel", owner=owner)
        need = series_need(predictor, request.series, attribution=request.attribution)
        with budget.take(need, cancelled=cancelled, patience=patience):
            series = plan_series(
                predictor,
                request.series,
                start=request.start,
                horizon=request.horizon,
                attribution=request.attribution,
                backtest=bool(request.backtest),
                cancelled=cancelled,
            )
        return Plan(
            request=request,
            model=series.model,
            run=series,
            need=need,
            pixels=0,
            planning=Timing(),
        )
    if isinstance(request, SimilarRequest):
        fields: Fields | None = read_places(request, max_fields, lambda: check(cancelled))
    else:
        fields = (
            None
            if request.fields is None
            else read_fields(request.fields, max_fields, lambda: check(cancelled))
        )
    model = engine.find(request.model, request.task, _modality(request), owner=owner)
    run = _plan_files(
        request,
        model,
        max_raster_bytes,
        places=fields,
        rasters=rasters,
        before_each=lambda: check(cancelled),
    )
    run = _with_backtest(run, request, places=request.points is not None or fields is not None)
    if fields is not None:
        check_coverage(fields, run.stack.grid)
    need = _need(run, request, fields, budget.window_bytes)
    budget.check(need)  # before a job is accepted that can never run
    every = run.sampled
    with budget.take(sampling_need(run.stack, every), cancelled=cancelled, patience=patience):
        calibrated = calibrate(run.stack, every, cache=cache, before_read=lambda: check(cancelled))
    run = replace(run, stack=replace(calibrated, warnings=unique(calibrated.warnings)))
    return Plan(
        fields=fields,
        request=request,
        model=run.model,
        run=run,
        need=need,
        pixels=run.stack.grid.width * run.stack.grid.height if request.points is None else 0,
        planning=Timing(read=time.perf_counter() - begun),
    )


def _plan_files(
    request: RasterRequest,
    model: LoadedModel,
    max_raster_bytes: int,
    *,
    places: Fields | None,
    rasters: bool,
    before_each: Callable[[], None],
) -> RasterRun:
    _check_parameters(model, request)
    stack = open_stack(
        request.files,
        request.stack,
        bands=model.card.bands,
        dated=model.card.modality == "pixel",
        max_bytes=max_raster_bytes,
        sensors=model.card.sensors,
        other_sensors=model.card.other_sensors,
        model=model.card.id,
        before_each=before_each,
    )
    return plan_raster(
        model,
        stack,
        start=request.start,
        outputs=request.outputs,
        horizon=request.horizon,
        stride=request.stride or model.card.patch or 1,
        smooth=request.smooth or 0,
        min_area=request.min_area or 0.0,
        dtype=request.dtype or "float32",
        similar_to=tuple(map(str, places.ids))
        if isinstance(request, SimilarRequest) and places is not None
        else None,
        rasters=rasters,
    )


def _with_backtest(run: RasterRun, request: RasterRequest, *, places: bool) -> RasterRun:
    """The run with a backtest if one is due and the history is long enough."""
    requested = request.backtest
    if run.model.card.task != "forecast" or requested is False:
        return run
    if requested is None and request.points is not None:
        return run
    if can_backtest(run.model.card, [run.stack.dates[t] for t in run.history], requested=requested):
        return replace(run, backtest="places" if places else "sample")
    if requested is None:
        return run
    warnings = (*run.stack.warnings, no_backtest(run.model.card))
    return replace(run, stack=replace(run.stack, warnings=warnings))


def _need(run: RasterRun, request: RasterRequest, fields: Fields | None, window_bytes: int) -> Need:
    """The memory that a run takes."""
    if isinstance(request, SimilarRequest) and fields is not None:
        passes = (
            points_need(run, len(fields)),
            fields_need(run, window_bytes, len(fields)),
            raster_need(run, window_bytes),
        )
        return max(passes, key=lambda need: need.total)
    if request.points is not None:
        return points_need(run, len(request.points))
    if fields is not None:
        return fields_need(run, window_bytes, len(fields))
    whole = raster_need(run, window_bytes)
    if run.backtest == "no":
        return whole
    # The sample is read before the windows.
    sample = points_need(replace(run, backtest="places"), SAMPLED)
    return max(whole, sample, key=lambda need: need.total)


def bands_of(request: RasterRequest, engine: Engine, owner: str = "") -> tuple[str, ...]:
    """The bands that a request's model takes, by name.

    Args:
        request: the request.
        engine: the models.
        owner: the caller; the models that this caller has made may be named too.

    Raises:
        UnknownModel: the engine serves no such model.
        WrongTask: the model serves another task.
    """
    model = engine.find(request.model, request.task, _modality(request), owner=owner)
    return tuple(model.card.bands)


def _modality(request: RasterRequest) -> Modality | None:
    """Modality of an embedding; a named model implies it."""
    if request.task != "embed":
        return None
    if isinstance(request, SimilarRequest):
        return "pixel"
    return request.modality or (None if request.model else "pixel")


def _check_parameters(model: LoadedModel, request: RasterRequest) -> None:
    """Reject parameters that the model would silently ignore."""
    card = model.card
    if card.window is None and request.start is not None:
        raise InvalidRequest.of(
            "start", f"'{card.id}' takes imagery and has no time window: leave out `start`"
        )
    if card.modality == "patch" and request.fields is not None:
        raise InvalidRequest.of(
            "fields",
            f"'{card.id}' predicts for patches of {card.patch} x {card.patch} pixels, which may "
            "contain several fields: for results per field use a pixel model with "
            "/classify-pixels, /forecast, or /embed with modality=pixel",
        )
    for name in ("smooth", "min_area"):
        if getattr(request, name) and (request.points or request.fields) is not None:
            raise InvalidRequest.of(
                name,
                f"`{name}` changes a map, and a request with points or fields has no map: leave "
                f"out `{name}`, or the points and fields",
            )
    if ATTRIBUTION in (request.outputs or ()):
        for name in ("smooth", "min_area", "fields"):
            if getattr(request, name):
                raise InvalidRequest.of(
                    "outputs",
                    f"{ATTRIBUTION} explains what the model predicts for single pixels, and cannot "
                    f"be combined with {name}: send two requests, or request it at points",
                )
    if POLYGONS in (request.outputs or ()) and (request.points or request.fields) is not None:
        raise InvalidRequest.of(
            "outputs",
            f"`{POLYGONS}` outlines the areas of a map, and a request with points or fields has no "
            f"map: leave out `{POLYGONS}`, or the points and fields",
        )
    if request.dtype == "uint8" and (
        (request.points or request.fields) is not None
        or "probabilities" not in (request.outputs or ())
    ):
        raise InvalidRequest.of(
            "dtype",
            "uint8 is the number type of the raster `probabilities`, which this request does not "
            "make: add it to `outputs`, without points or fields, or leave out `dtype`",
        )
    if card.modality == "pixel" and request.stride is not None:
        raise InvalidRequest.of(
            "stride", f"'{card.id}' predicts for every pixel, not for patches: leave out `stride`"
        )


def unique(warnings: Iterable[StackWarning]) -> tuple[StackWarning, ...]:
    """Warnings without repetitions, in order."""
    return tuple(dict.fromkeys(warnings))
