"""Measured series: reflectance and spectral indices of points or fields by date, without a model.

    places × dates → reflectance, spectral indices, clear share [→ recurrence plots]

A place is a point or a field. The value of a point is that of its pixel; the value of a field is
the mean over its clear pixels, each weighted by the share of the pixel that the polygon covers.
Indices are computed from this mean reflectance, as for forecasts of fields.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.card import ModelCard, ResolvedTimeWindow
from service.errors import InvalidRequest, MissingBands, StackWarning, warning_list
from service.grid import Window
from service.infer.engine import Engine
from service.infer.plots import (
    Floats,
    PlotParameters,
    recurrence_plots,
    regular_series,
    spectral_index,
)
from service.read.buffers import BufferPool
from service.read.geotiff import BlockCache
from service.read.radiometry import calibrate, why_missing
from service.read.reader import StackReader
from service.read.stack import Sits, Stack, open_stack
from service.read.vectors import Fields, read_fields
from service.run.coverage import Coverage, FieldGrid, check_coverage, series_sums
from service.run.executors import ThreadExecutor, Timing, check
from service.run.fields import LEAST_CLEAR
from service.run.memory import MemoryBudget, measuring_need
from service.run.plan import check_cloud_dates, unique
from service.run.request import Charge, MeasureRequest, PointQuery, no_charge
from service.run.time_window import resolve_time_window
from service.run.windows import windows
from service.write.fields import field_features, replaced_properties
from service.write.predictions import JSON

BANDS = ("B02", "B04", "B08")
"""Bands that a stack must have, because the indices need them."""
FURTHER_BANDS = ("B01", "B03", "B05", "B06", "B07", "B8A", "B09", "B11", "B12")
"""Bands that the response also contains if every date has them."""
Sums = NDArray[np.float64]
INDICES = ("ndvi", "evi", "savi")
MAX_OBSERVATIONS = 250_000
"""Largest number of places times dates of a request, because the response is held in memory."""
MAX_PLOTS = 500
"""Largest number of places of a request with plots."""
_PLOTS_AT_ONCE = 16
"""Number of places whose plots are made between two checks whether the run was cancelled."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The result of a `MeasureRequest`."""

    document: Mapping[str, Any]
    """GeoJSON with `warnings`."""
    pixels: int
    """Number of pixels read."""
    timing: Timing
    warnings: tuple[StackWarning, ...]


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Mean series of N places."""

    values: Floats
    """Reflectance (N, T, C), unitless; NaN on dates on which a place has no clear pixel."""
    clear: NDArray[np.float64]
    """Share of the place that is clear (N, T), 0 to 1."""
    extents: Sequence[Mapping[str, JSON]]
    """`status` of each place, and `pixels` and `hectares` of a field."""
    pixels: int
    """Number of pixels read."""


@dataclass(frozen=True, kw_only=True)
class _Plotter:
    """Makes the recurrence plots of one model."""

    card: ModelCard
    parameters: PlotParameters
    time_window: ResolvedTimeWindow
    bands: tuple[str, ...]
    """Bands of the stack."""
    days: NDArray[np.float32]
    """Days since the time window's first day (T) of the used dates."""

    @classmethod
    def of(cls, request: MeasureRequest, engine: Engine, stack: Stack) -> _Plotter:
        found = engine.registry.find(request.model) if request.model else None
        task = found.card.task if found else "embed"
        card = engine.find(request.model, task, "pixel").card
        parameters = PlotParameters.of(card)
        lacking = [band for band in card.bands if band not in stack.bands]
        if lacking:
            raise MissingBands(
                f"the plots of '{card.id}' need {', '.join(lacking)}, which the stack does not "
                f"have on every date (bands of the stack: {', '.join(stack.bands)}): add the "
                "missing bands, or send plots=false"
            )
        time_window = resolve_time_window(card, stack.dates, request.start, what="the stack")
        if time_window is None:
            raise TypeError(f"'{card.id}' has plots but no time window")
        return cls(
            card=card,
            parameters=parameters,
            time_window=time_window,
            bands=stack.bands,
            days=np.asarray(time_window.days(stack.dates), np.float32),
        )

    def plots(self, places: _Places, cancelled: threading.Event | None) -> list[JSON]:
        """The plots of each place by index name; None for a place with too few clear dates."""
        made: list[JSON] = []
        for begin in range(0, len(places.values), _PLOTS_AT_ONCE):
            check(cancelled)
            part = slice(begin, begin + _PLOTS_AT_ONCE)
            made += self._plots(places.values[part], places.clear[part])
        return made

    def _plots(self, values: Floats, clear: NDArray[np.float64]) -> list[JSON]:
        used = list(self.time_window.used)
        values = values[:, used]
        valid = (clear[:, used] > LEAST_CLEAR) & ~np.isnan(values).any(axis=2)
        series = regular_series(
            values, valid, self.days, bands=self.bands, parameters=self.parameters
        )
        made = recurrence_plots(series, self.parameters)
        enough = (valid.sum(axis=1) >= self.card.min_observations) & ~np.isnan(series).any((1, 2))
        return [
            {
                name.upper(): np.round(plot, 6).tolist()
                for name, plot in zip(self.parameters.indices, own, strict=True)
            }
            if has_enough
            else None
            for own, has_enough in zip(made, enough, strict=True)
        ]

    def head(self) -> dict[str, JSON]:
        """Description of the plots, for the response."""
        regular = self.parameters.time_window
        return {
            "plots": {
                "model": self.card.id,
                "first_day": self.time_window.first_day.isoformat(),
                "steps": regular.steps,
                "step_days": regular.step_days,
                "threshold": self.parameters.threshold,
            }
        }


def measure(
    request: MeasureRequest,
    engine: Engine,
    *,
    max_raster_bytes: int,
    max_fields: int,
    executor: ThreadExecutor,
    cache: BlockCache | None = None,
    cancelled: threading.Event | None = None,
    budget: MemoryBudget | None = None,
    patience: float | None = None,
    charge: Charge = no_charge,
) -> Measured:
    """Measure the series of points or fields.

    Args:
        request: the stack and the places.
        engine: the models, whose cards have the parameters of the plots.
        max_raster_bytes: largest decoded size of a stack, bytes.
        max_fields: largest number of polygons of a request.
        executor: processes the windows that contain a field.
        cache: GDAL's block cache; None does not change it.
        cancelled: an event that cancels the run when it is set.
        budget: memory budget of all runs; None creates one for this run.
        patience: seconds to wait for memory; None waits without a limit.
        charge: counts the points, or with fields the pixels of the stack, before they are read.

    Raises:
        TooManyRequests: `charge` rejected the run.
        Overloaded: other runs held the memory until `patience` had passed.
        InvalidRequest: the request has neither points nor fields, or both, or more observations or
            plots than one response may contain.
        PIMCError: the files, the places and the parameters do not fit together.
        Cancelled: `cancelled` was set.
    """
    begun = time.perf_counter()
    if (request.points is None) == (request.fields is None):
        raise InvalidRequest.of(
            "fields", "send either `points` or `fields`, the places whose series are measured"
        )
    fields = (
        None
        if request.fields is None
        else read_fields(request.fields, max_fields, lambda: check(cancelled))
    )
    opened = open_stack(
        request.files,
        request.stack,
        bands=BANDS,
        optional=FURTHER_BANDS,
        max_bytes=max_raster_bytes,
        before_each=lambda: check(cancelled),
    )
    count = len(request.points or ()) if fields is None else len(fields)
    _check_size(count, opened.observations, plots=request.plots)
    if fields is not None:
        check_coverage(fields, opened.grid)
    plotter = _Plotter.of(request, engine, opened) if request.plots else None
    check_cloud_dates(opened, opened.observations)
    budget = budget or MemoryBudget()
    need = measuring_need(
        opened,
        budget.window_bytes,
        points=count if fields is None else 0,
        fields=0 if fields is None else count,
    )
    pixels = count if fields is None else opened.grid.width * opened.grid.height
    with charge(pixels), budget.take(need, cancelled=cancelled, patience=patience):
        stack = calibrate(opened, cache=cache, before_read=lambda: check(cancelled))
        planned = Timing(read=time.perf_counter() - begun)
        if fields is None:
            places, timing = _points(stack, request.points or (), cache, cancelled)
        else:
            size = budget.window_bytes
            places, timing = _fields(stack, fields, executor, cache, cancelled, size)
        begun = time.perf_counter()
        records = _records(stack, places, plotter, cancelled)
    statuses = [extent["status"] for extent in places.extents]
    points = request.points or ()
    own = fields.properties if fields else [one.feature.get("properties") or {} for one in points]
    warnings = unique(
        (
            *stack.warnings,
            *(fields.warnings if fields else ()),
            *_none_seen(
                stack,
                statuses,
                "field" if fields else "point",
                cache,
                [(point.lon, point.lat) for point in points],
            ),
            *replaced_properties(own, records),
        )
    )
    features = (
        field_features(fields.ids, own, fields.geojson, records)
        if fields
        else [
            {**point.feature, "properties": {**properties, **record}}
            for point, properties, record in zip(points, own, records, strict=True)
        ]
    )
    document: dict[str, Any] = {
        "type": "FeatureCollection",
        "features": features,
        "dates": [day.isoformat() for day in stack.dates],
        "bands": list(stack.bands),
        "indices": [name.upper() for name in INDICES],
        "mask": stack.mask,
        "sensor": stack.sensor,
        **(plotter.head() if plotter else {}),
        **({"sources": [dict(item) for item in request.items]} if request.items else {}),
        "warnings": warning_list(warnings),
    }
    return Measured(
        document=document,
        pixels=places.pixels,
        timing=planned + timing + Timing(write=time.perf_counter() - begun),
        warnings=warnings,
    )


def _check_size(places: int, dates: int, *, plots: bool) -> None:
    if places * dates > MAX_OBSERVATIONS:
        raise InvalidRequest.of(
            "fields",
            f"{places} places at {dates} dates are {places * dates} observations, and a response "
            f"contains at most {MAX_OBSERVATIONS}: send fewer places or fewer dates",
        )
    if plots and places > MAX_PLOTS:
        raise InvalidRequest.of(
            "plots",
            f"{places} places, and a response contains the plots of at most {MAX_PLOTS}: send "
            "fewer places, or plots=false",
        )


def _none_seen(
    stack: Stack,
    statuses: Sequence[JSON],
    noun: str,
    cache: BlockCache | None,
    lonlat: Sequence[tuple[float, float]],
) -> tuple[StackWarning, ...]:
    """The warning that no place has a clear observation, with the reason; empty if one has."""
    if "ok" in statuses or not statuses:
        return ()
    if "no_data" in statuses:
        why = why_missing(stack, range(stack.observations), 1, cache=cache)
    else:
        why = f"all {len(statuses)} are {stack.grid.away(lonlat)}"
    detail = f"no {noun} has a clear observation: {why}"
    return (StackWarning(code="all_missing", detail=detail),)


def _points(
    stack: Stack,
    points: Sequence[PointQuery],
    cache: BlockCache | None,
    cancelled: threading.Event | None,
) -> tuple[_Places, Timing]:
    begun = time.perf_counter()
    rows, cols, inside = stack.grid.locate([(point.lon, point.lat) for point in points])
    T, C = stack.observations, len(stack.bands)
    values = np.full((len(points), T, C), np.nan, np.float32)
    clear = np.zeros((len(points), T))
    with StackReader(stack, cache=cache, before_read=lambda: check(cancelled)) as reader:
        sits = reader.read_pixels(rows[inside], cols[inside])
    clear[inside] = sits.valid.T
    values[inside] = np.where(sits.valid[:, None], sits.values, np.nan).transpose(2, 0, 1)
    seen = clear.any(axis=1)
    statuses = np.where(seen, "ok", np.where(inside, "no_data", "outside")).tolist()
    places = _Places(
        values=values,
        clear=clear,
        extents=[{"status": status} for status in statuses],
        pixels=int(inside.sum()),
    )
    return places, Timing(read=time.perf_counter() - begun)


def _fields(
    stack: Stack,
    fields: Fields,
    executor: ThreadExecutor,
    cache: BlockCache | None,
    cancelled: threading.Event | None,
    window_bytes: int,
) -> tuple[_Places, Timing]:
    grid, on_grid = stack.grid, FieldGrid(fields, stack.grid)
    T, C, N = stack.observations, len(stack.bands), len(fields)
    pixel_bytes = T * (4 * len(stack.bands_read) + 1)
    parts = on_grid.parts(
        windows(grid, stack.block, pixel_bytes, window_bytes), lambda: check(cancelled)
    )
    clear, total = np.zeros((N, T)), np.zeros((N, T, C))
    pixels, hectares = np.zeros(N), np.zeros(N)

    def digest(read: tuple[Coverage, Sits]) -> tuple[Coverage, Sums, Sums]:
        covered, sits = read
        sums = series_sums(covered, sits)
        buffers.give_back(sits.values, sits.valid)
        return covered, *sums

    def add(part: Window, sums: tuple[Coverage, Sums, Sums]) -> None:
        covered, seen, reflectance = sums
        area = grid.hectares(part).reshape(-1)[covered.cells]
        clear[covered.fields] += seen
        total[covered.fields] += reflectance
        pixels[covered.fields] += covered.sums(covered.share)
        hectares[covered.fields] += covered.sums(covered.share * area)

    buffers = BufferPool()
    with (
        buffers,
        StackReader(
            stack, cache=cache, buffers=buffers, before_read=lambda: check(cancelled)
        ) as reader,
    ):
        timing = executor.run(
            parts,
            read=lambda part: (on_grid.coverage(part), reader.read(part)),
            infer=digest,
            write=add,
            cancelled=cancelled,
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (total / clear[:, :, None]).astype(np.float32)
        share = np.where(pixels[:, None] > 0, clear / pixels[:, None], 0.0)
    extents: list[Mapping[str, JSON]] = []
    for n in range(N):
        if not on_grid.usable[n]:
            extents.append({"status": "invalid"})
        elif pixels[n] <= 0:
            extents.append({"status": "outside"})
        else:
            extents.append(
                {
                    "status": "ok" if clear[n].any() else "no_data",
                    "pixels": float(pixels[n]),
                    "hectares": float(hectares[n]),
                }
            )
    return _Places(
        values=values,
        clear=np.clip(share, 0.0, 1.0),
        extents=extents,
        pixels=sum(int(part.width * part.height) for part in parts),
    ), timing


def _records(
    stack: Stack,
    places: _Places,
    plotter: _Plotter | None,
    cancelled: threading.Event | None,
) -> list[dict[str, JSON]]:
    """The properties of each place: lists by date, null on dates without a clear pixel."""
    by_band = {name: places.values[:, :, c] for c, name in enumerate(stack.bands)}
    columns = {**by_band, **{name.upper(): spectral_index(name, by_band) for name in INDICES}}
    plots = plotter.plots(places, cancelled) if plotter else [None] * len(places.values)
    days: list[JSON] = [day.isoformat() for day in stack.dates]
    records: list[dict[str, JSON]] = []
    for n, extent in enumerate(places.extents):
        check(cancelled)
        record: dict[str, JSON] = dict(extent)
        if record["status"] in {"ok", "no_data"}:
            record |= {"dates": days, "clear": np.round(places.clear[n], 6).tolist()}
            record |= {name: _numbers(values[n]) for name, values in columns.items()}
            if plotter is not None:
                record["plots"] = plots[n]
        records.append(record)
    return records


def _numbers(values: Floats) -> list[JSON]:
    """A list for JSON: null for NaN, and 6 digits after the point."""
    return [None if np.isnan(v) else round(float(v), 6) for v in values]
