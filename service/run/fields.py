"""Field runs: predictions per polygon, each pixel weighted by the share that the polygon covers.

    windows that contain a field → Sits → infer → sums per field → means → results

A classification returns the mean probabilities over a field's pixels. A forecast is made from the
field's mean series, the mean over its clear pixels on each date. An embedding is the mean over the
field's pixels. A field may extend over several windows; each of them adds a few sums to the field,
so that memory does not grow with the raster.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import shapely
from exactextract import exact_extract
from exactextract.raster import NumPyRasterSource
from numpy.typing import NDArray

from service.errors import StackWarning
from service.grid import Grid, Window
from service.read.buffers import BufferPool
from service.read.reader import StackReader
from service.read.stack import Sits
from service.read.vectors import Fields
from service.run import windows as windowing
from service.run.backtest import Backtested, History, predict_from_history
from service.run.collect import WindowPredictions, Work, none_predicted, run_warnings
from service.run.executors import Timing, check
from service.run.pixels import ClearPixels, PixelStages, model_time
from service.run.plan import RasterRun
from service.run.windows import Arrays, windows
from service.write.predictions import JSON

_Kind = TypeVar("_Kind", "_Series", "_Means")
_CELLS_AT_ONCE = 2**16
"""Number of cells of fields whose series are gathered at once, which bounds the memory."""
_LABEL_CELLS = 16
"""Largest number of pixels that one polygon labels; the pixels of a field hardly differ."""
LEAST_CLEAR = 0.1
"""Share of a field's area that must be clear on a date for it to count in the mean series."""


@dataclass(frozen=True, kw_only=True)
class FieldOutcome:
    """Results of a field run."""

    results: tuple[dict[str, JSON], ...]
    """One result per field, in order: `status` (ok, no_data, outside or invalid), and the
    prediction with `pixels`, `hectares` and `clear_dates` if the status is ok."""
    pixels: int
    """Number of pixels of the windows read."""
    timing: Timing
    """Seconds of each stage."""
    warnings: tuple[StackWarning, ...]
    backtested: Backtested | None = None


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Coverage of a window: one entry for each field and cell of which the field covers a part.

    Entries are sorted by field.
    """

    fields: NDArray[np.intp]
    """Numbers (n) of the fields that cover a cell, ascending."""
    starts: NDArray[np.intp]
    """Position (n) of the first entry of each of these fields."""
    cells: NDArray[np.intp]
    """Position (E) of each entry's cell in the flattened window."""
    share: NDArray[np.float64]
    """Share (E) of each entry's cell that the field covers, 0 to 1."""

    def sums(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sums by field (n, …) of values by entry (E, …)."""
        if not len(self.fields):
            return np.zeros((0, *values.shape[1:]))
        return np.asarray(np.add.reduceat(values, self.starts, axis=0, dtype=np.float64))


class FieldGrid:
    """Fields on a raster's grid: the windows that contain them, and the covered shares of pixels.

    Args:
        fields: the polygons.
        grid: the raster's grid.
    """

    def __init__(self, fields: Fields, grid: Grid) -> None:
        self._shapes = np.full(len(fields), None, np.object_)
        in_crs = fields.in_crs(grid.crs)
        self.usable = np.array([shape is not None for shape in in_crs], np.bool_)
        to_pixels = ~grid.transform

        def to_grid(points: NDArray[np.float64]) -> NDArray[np.float64]:
            columns, rows = to_pixels @ (points[:, 0], points[:, 1])
            # The y axis of exactextract points up.
            return np.stack([columns, -rows], axis=1)

        if self.usable.any():
            self._shapes[self.usable] = shapely.transform(in_crs[self.usable], to_grid)
        self._tree = shapely.STRtree(self._shapes)
        self._bounds = shapely.bounds(self._shapes)

    def parts(self, windows: Iterable[Window]) -> list[Window]:
        """The windows that contain a part of a field, in order.

        A window in which fields together cover more than `COVERED_CELLS` cells is divided: the
        entries of overlapping fields, such as one field sent 10,000 times, would take too much
        memory.
        """
        found = []
        for window in windows:
            numbers = self.within(window)
            if not len(numbers):
                continue
            if (
                window.width * window.height == 1
                or self._cells(window, numbers) <= windowing.COVERED_CELLS
            ):
                found.append(window)
            else:
                found += self.parts(_halves(window))
        return found

    def _cells(self, window: Window, numbers: NDArray[np.intp]) -> int:
        """Number of cells of the fields' bounding boxes in a window, an upper limit of theirs."""
        (top, bottom), (left, right) = window.toranges()
        west, south, east, north = self._bounds[numbers].T
        across = np.ceil(np.minimum(east, right)) - np.floor(np.maximum(west, left))
        down = np.ceil(np.minimum(-south, bottom)) - np.floor(np.maximum(-north, top))
        return int((across * down).sum())

    def within(self, window: Window) -> NDArray[np.intp]:
        """Numbers of the fields whose bounding box intersects a window, ascending."""
        (top, bottom), (left, right) = window.toranges()
        return np.sort(self._tree.query(shapely.box(left, -bottom, right, -top)))

    def coverage(self, window: Window) -> Coverage:
        """The share of each cell of a window that each field covers.

        The shares are exact for every affine grid, because exactextract computes them in pixel
        coordinates.
        """
        (top, bottom), (left, right) = window.toranges()
        numbers = self.within(window)
        # Only the shares are used, so all cells may have the same byte as their value.
        cells = np.broadcast_to(np.zeros((), np.uint8), (bottom - top, right - left))
        source = NumPyRasterSource(cells, left, -bottom, right, -top)
        features = [
            {
                "type": "Feature",
                "properties": {},
                "geometry": _geometry(self._shapes[number]),
            }
            for number in numbers
        ]
        found = exact_extract(source, features, ["cell_id", "coverage"]) if features else []
        parts = [one["properties"] for one in found]
        counts = np.array([len(part["cell_id"]) for part in parts], np.intp)
        some = counts > 0
        empty: NDArray[Any] = np.zeros(0)
        return Coverage(
            fields=numbers[some],
            starts=(np.cumsum(counts) - counts)[some],
            cells=np.concatenate([part["cell_id"] for part in parts] or [empty]).astype(np.intp),
            share=np.concatenate([part["coverage"] for part in parts] or [empty]).astype(float),
        )


def label_pixels(
    labels: Fields, grid: Grid
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """The pixels of a raster that points and polygons label.

    Args:
        labels: points and polygons. A point labels the pixel in which it lies. A polygon labels the
            pixels of which it covers at least half or, if there are none, those of which it covers
            most; at most `_LABEL_CELLS` of these, evenly spread.
        grid: grid of the raster.

    Returns:
        Row (n) and column (n) of each labelled pixel, and the position of its label (n) in
        `labels`, in the order of the labels.
    """
    shapes = labels.in_crs(grid.crs)
    kinds = shapely.get_type_id(shapes)
    points = np.flatnonzero(np.isin(kinds, [shapely.GeometryType.POINT,
                                            shapely.GeometryType.MULTIPOINT]))  # fmt: skip
    places, index = shapely.get_coordinates(shapes[points], return_index=True)
    rows, columns, inside = grid.pixels_at(places[:, 0], places[:, 1])
    row, column = [rows[inside]], [columns[inside]]
    which = [points[index[inside]]]
    polygons = np.flatnonzero((kinds >= 0) & ~np.isin(np.arange(len(kinds)), points))
    whole = Window(0, 0, grid.width, grid.height)
    covered = FieldGrid(labels.part(polygons), grid).coverage(whole)
    ends = np.append(covered.starts, len(covered.cells))[1:]
    for field, begin, end in zip(covered.fields, covered.starts, ends, strict=True):
        share = covered.share[begin:end]
        cells = covered.cells[begin:end][share >= min(0.5, share.max())]
        spread = np.linspace(0, len(cells) - 1, min(len(cells), _LABEL_CELLS)).round()
        chosen = np.sort(cells)[spread.astype(np.intp)]
        row.append(chosen // grid.width)
        column.append(chosen % grid.width)
        which.append(np.full(len(chosen), polygons[field], np.intp))
    order = np.argsort(np.concatenate(which), kind="stable")
    return (
        np.concatenate(row)[order],
        np.concatenate(column)[order],
        np.concatenate(which)[order],
    )


def _halves(window: Window) -> tuple[Window, Window]:
    """The two halves of a window of several pixels, divided across its longer side."""
    left, top, width, height = window.col_off, window.row_off, window.width, window.height
    if width >= height:
        half = width // 2
        return Window(left, top, half, height), Window(left + half, top, width - half, height)
    half = height // 2
    return Window(left, top, width, half), Window(left, top + half, width, height - half)


def _geometry(shape: Any) -> dict[str, Any]:  # noqa: ANN401 - shapely has no types
    return dict(shapely.geometry.mapping(shape))


@dataclass(frozen=True, kw_only=True)
class FieldMeans:
    """The mean embedding of each field."""

    embeddings: NDArray[np.float32]
    """(n, D); NaN for a field without one."""
    statuses: list[str]
    """`ok`, `no_data`, `outside` or `invalid` (n)."""
    timing: Timing


def mean_embeddings(work: Work, fields: Fields, *, share: float) -> FieldMeans:
    """The mean embedding of each field, as `/embed` returns it.

    Args:
        work: the run.
        fields: the polygons.
        share: of the progress.

    Raises:
        Cancelled: the run was cancelled.
        PIMCError: an error of the stack or the model.
    """
    passed = _pass_over(work, fields, _Means, share=share)
    return FieldMeans(
        embeddings=passed.sums.means(),
        statuses=[str(result["status"]) for result in passed.sums.statuses()],
        timing=passed.timing,
    )


@dataclass(frozen=True, kw_only=True)
class _Pass(Generic[_Kind]):
    """The pass over the windows that hold a field."""

    sums: _Kind
    parts: Sequence[Window]
    timing: Timing


def _pass_over(work: Work, fields: Fields, kind: type[_Kind], *, share: float) -> _Pass[_Kind]:
    """Read the windows that hold a field, and add up what they give to each field."""
    run, grid = work.run, work.run.stack.grid
    on_grid = FieldGrid(fields, grid)
    parts = on_grid.parts(
        windows(grid, run.stack.block, run.pixel_bytes + run.prediction_bytes, work.window_bytes)
    )
    buffers = BufferPool()
    with buffers, StackReader(run.stack, run.read, cache=work.cache, buffers=buffers) as reader:
        stages = PixelStages(run, reader, buffers, work.cancelled)
        sums = kind(run, on_grid, len(fields), stages)
        timing = work.run_pass(
            "fields",
            parts,
            read=stages.read,
            infer=sums.infer,
            to_arrays=sums.to_arrays,
            collect=lambda _, arrays: sums.add(arrays),
            advance=_advance(work, parts, share),
        )
    return _Pass(sums=sums, parts=parts, timing=timing)


def run_fields(work: Work, fields: Fields) -> FieldOutcome:
    """Predict for polygons.

    Args:
        work: the run, with its executor, journal and progress; it writes no rasters.
        fields: the polygons.

    Raises:
        Cancelled: the run was cancelled.
        PIMCError: an error of the stack or the model.
    """
    run = work.run
    passed: _Pass[_Series] | _Pass[_Means]
    if run.model.card.task == "forecast":
        passed = _pass_over(work, fields, _Series, share=0.95)
    else:
        passed = _pass_over(work, fields, _Means, share=0.95)
    begun = time.perf_counter()
    results = passed.sums.results(work.cancelled)
    work.progress.finish()
    statuses = [result["status"] for result in results]
    missing = none_predicted(run, statuses, "field", work.cache)
    return FieldOutcome(
        results=tuple(results),
        pixels=sum(int(part.width * part.height) for part in passed.parts),
        timing=passed.timing + Timing(infer=time.perf_counter() - begun),
        warnings=(
            *run_warnings(run),
            *(passed.sums.backtested.warnings if passed.sums.backtested else ()),
            *missing,
            *fields.warnings,
        ),
        backtested=passed.sums.backtested,
    )


def _advance(work: Work, parts: Sequence[Window], share: float) -> Any:  # noqa: ANN401 - a function
    total = sum(part.width * part.height for part in parts) or 1
    grid = work.run.stack.grid
    return work.progress.of(share * grid.width * grid.height / total, grid)


class _Sums:
    """Sums of each field that every kind of result needs: pixels, area and clear dates."""

    backtested: Backtested | None = None
    """Of forecasts, after `results`."""

    def __init__(self, run: RasterRun, grid: FieldGrid, count: int, stages: PixelStages) -> None:
        self._run = run
        self._grid = grid
        self._stages = stages
        self._totals: dict[str, NDArray[np.float64]] = {}
        self._count = count

    def _extents(self, window: Window, covered: Coverage) -> dict[str, NDArray[Any]]:
        hectares = self._run.stack.grid.hectares(window).reshape(-1)
        return {
            "fields": covered.fields,
            "pixels": covered.sums(covered.share),
            "hectares": covered.sums(covered.share * hectares[covered.cells]),
        }

    def add(self, arrays: Arrays) -> None:
        """Add the sums of a window to those of its fields."""
        fields = arrays["fields"]
        for name, values in arrays.items():
            if name == "fields":
                continue
            total = self._totals.setdefault(name, np.zeros((self._count, *values.shape[1:])))
            total[fields] += values

    def _total(self, name: str) -> NDArray[np.float64]:
        return self._totals.get(name, np.zeros(self._count))

    def _status(self, ok: NDArray[np.bool_]) -> list[dict[str, JSON]]:
        covered = self._total("pixels") > 0
        found: list[dict[str, JSON]] = [
            {"status": "ok" if is_ok else "no_data" if is_covered else "outside"}
            for is_ok, is_covered in zip(ok, covered, strict=True)
        ]
        for number in np.flatnonzero(~self._grid.usable):
            found[number] = {"status": "invalid"}
        return found

    def _extent(self, number: int, clear_dates: float) -> dict[str, JSON]:
        return {
            "pixels": float(self._total("pixels")[number]),
            "hectares": float(self._total("hectares")[number]),
            "clear_dates": float(clear_dates),
        }


class _Means(_Sums):
    """Mean probabilities with the share of each class, or mean embeddings."""

    def infer(self, clear: ClearPixels) -> tuple[WindowPredictions, NDArray[np.integer[Any]]]:
        """The predictions of a window, and the number of clear dates of each pixel (h, w)."""
        return self._stages.infer(clear), clear.seen

    def to_arrays(
        self, window: Window, found: tuple[WindowPredictions, NDArray[np.integer[Any]]]
    ) -> Arrays:
        """The sums that a window adds to its fields."""
        predicted, seen = found
        covered = self._grid.coverage(window)
        arrays = self._extents(window, covered)
        position = np.full(int(window.height * window.width), -1)
        good = ~np.isnan(predicted.predictions).any(axis=1)
        position[predicted.index[good]] = np.flatnonzero(good)
        classes = bool(self._run.model.card.classes)
        width = self._run.model.width[0]
        sums: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
        for part, cells, share in _pieces(covered):
            at = position[cells]
            weight = np.where(at >= 0, share, 0.0)
            values = predicted.predictions[at] if len(predicted.predictions) else None
            weighted = np.zeros((len(at), width)) if values is None else weight[:, None] * values
            sums["weight"].append(part.sums(weight))
            sums["values"].append(part.sums(weighted))
            if classes:
                shares = np.zeros((len(at), width))
                if values is not None:
                    shares[np.arange(len(at)), values.argmax(axis=1)] = weight
                sums["shares"].append(part.sums(shares))
        arrays |= {name: np.concatenate(parts) for name, parts in sums.items()}
        if not sums:
            arrays |= {"weight": np.zeros(0), "values": np.zeros((0, width))}
            arrays |= {"shares": np.zeros((0, width))} if classes else {}
        arrays["seen"] = covered.sums(covered.share * seen.reshape(-1)[covered.cells])
        return arrays

    def means(self) -> NDArray[np.float32]:
        """The mean prediction of each field (n, K), NaN for a field without one."""
        weight = self._total("weight")
        values = self._totals.get("values", np.zeros((self._count, self._run.model.width[0])))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(values / weight[:, None], np.float32)

    def statuses(self) -> list[dict[str, JSON]]:
        """The status of each field."""
        return self._status(self._total("weight") > 0)

    def results(self, cancelled: threading.Event | None) -> list[dict[str, JSON]]:
        """The result of each field."""
        check(cancelled)
        weight = self._total("weight")
        results = self._status(weight > 0)
        for number in np.flatnonzero(weight > 0).tolist():
            mean = (self._totals["values"][number] / weight[number]).astype(np.float32)
            record = self._run.predictions.record(mean)
            classes = self._run.model.card.classes
            if classes:
                shares = self._totals["shares"][number] / weight[number]
                record["share"] = {
                    c.name: float(s) for c, s in zip(classes, shares, strict=True) if s > 0
                }
            seen = self._totals["seen"][number] / self._total("pixels")[number]
            results[number] |= {**record, **self._extent(number, seen)}
        return results


class _Series(_Sums):
    """Forecasts from the fields' mean series."""

    def infer(self, clear: ClearPixels) -> Sits:
        """The window's series; the model runs later, on the mean series in `results`."""
        return clear.sits

    def to_arrays(self, window: Window, sits: Sits) -> Arrays:
        """The sums that a window adds to its fields: clear area and reflectance by date."""
        covered = self._grid.coverage(window)
        arrays = self._extents(window, covered)
        arrays["clear"], arrays["values"] = series_sums(covered, sits)
        self._stages.give_back(sits)
        return arrays

    def results(self, cancelled: threading.Event | None) -> list[dict[str, JSON]]:
        """The result of each field."""
        run = self._run
        if "clear" not in self._totals:
            return self._status(np.zeros(self._count, np.bool_))
        clear = self._totals["clear"]
        valid = clear > LEAST_CLEAR * self._total("pixels")[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            values = (self._totals["values"] / clear[:, :, None]).astype(np.float32)
        days, day_of_year = model_time(run)
        predictions, self.backtested = predict_from_history(
            run.model,
            History(dates=tuple(run.stack.dates[t] for t in run.read), values=values, valid=valid),
            used=len(run.used),
            days=days,
            day_of_year=day_of_year,
            backtested=run.backtest == "places",
            cancelled=cancelled,
        )
        missing = np.isnan(predictions).reshape(self._count, -1)
        ok = np.asarray(~missing.any(axis=1))
        results = self._status(ok)
        for number in np.flatnonzero(ok).tolist():
            seen = clear[number, -len(run.used) :].sum() / self._total("pixels")[number]
            results[number] |= {
                **run.predictions.record(predictions[number]),
                **self._extent(number, seen),
            }
        return results


def series_sums(covered: Coverage, sits: Sits) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The sums that a window adds to the mean series of its fields.

    Args:
        covered: the cells of the window that fields cover.
        sits: the window's series.

    Returns:
        Clear pixels by field and date (n, T) float64, as sums of covered shares; and the sums of
        their reflectance (n, T, C) float64, weighted by these shares.
    """
    T, C, h, w = sits.values.shape
    values, valid = sits.values.reshape(T, C, h * w), sits.valid.reshape(T, h * w)
    clear, total = [], []
    for part, cells, share in _pieces(covered):
        weight = np.where(valid[:, cells], share, 0.0)
        clear.append(part.sums(weight.T))
        # Invalid pixels may be NaN, whose product with the weight 0 is NaN.
        known = np.where(valid[:, None, cells], values[:, :, cells], 0.0)
        total.append(part.sums((known * weight[:, None]).transpose(2, 0, 1)))
    return (
        np.concatenate(clear or [np.zeros((0, T))]),
        np.concatenate(total or [np.zeros((0, T, C))]),
    )


def _pieces(
    covered: Coverage,
) -> Iterator[tuple[Coverage, NDArray[np.intp], NDArray[np.float64]]]:
    """A coverage divided into parts of whole fields, each of about `_CELLS_AT_ONCE` entries."""
    ends = np.append(covered.starts[1:], len(covered.cells))
    begin = 0
    while begin < len(covered.fields):
        first = int(covered.starts[begin])
        stop = max(begin + 1, int(np.searchsorted(ends, first + _CELLS_AT_ONCE, side="right")))
        last = int(ends[stop - 1])
        part = Coverage(
            fields=covered.fields[begin:stop],
            starts=covered.starts[begin:stop] - first,
            cells=covered.cells[first:last],
            share=covered.share[first:last],
        )
        yield part, part.cells, part.share
        begin = stop
