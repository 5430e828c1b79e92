"""Field runs: predictions per polygon, each pixel weighted by the share that the polygon covers.

    windows that contain a field → Sits → infer covered pixels → sums per field → means → results

A classification returns the mean probabilities over a field's pixels. A forecast is made from the
field's mean series, the mean over its clear pixels on each date. An embedding is the mean over the
field's pixels. A field may extend over several windows; each of them adds a few sums to the field,
so that memory does not grow with the raster.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.errors import StackWarning
from service.grid import Window
from service.read.geotiff import BlockCache
from service.read.stack import Sits
from service.read.vectors import Fields
from service.run.backtest import Backtested, History, predict_from_history
from service.run.collect import WindowPredictions, Work, none_predicted, run_warnings
from service.run.coverage import Coverage, FieldGrid, pieces, series_sums
from service.run.executors import Timing, check
from service.run.passes import Stages
from service.run.pixels import ClearPixels, model_time, open_pixels
from service.run.plan import RasterRun
from service.run.windows import Arrays, windows
from service.write.predictions import JSON

_Kind = TypeVar("_Kind", "_Series", "_Means")
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
    run = work.run
    on_grid = FieldGrid(fields, run.stack.grid)
    parts = field_windows(run, on_grid, work.window_bytes, work.cancelled)
    sums = kind(run, on_grid, len(fields))
    timing = work.run_pass(
        "fields",
        parts,
        kind.pass_of(run=run, grid=on_grid),
        collect=lambda _, arrays: sums.add(arrays),
        share=share,
    )
    return _Pass(sums=sums, parts=parts, timing=timing)


def field_windows(
    run: RasterRun, on_grid: FieldGrid, window_bytes: int, cancelled: threading.Event | None
) -> list[Window]:
    """The windows of a run that hold a field, in order.

    Args:
        run: the run.
        on_grid: the fields.
        window_bytes: memory of one window.
        cancelled: an event that ends the search when it is set.

    Raises:
        Cancelled: `cancelled` was set.
    """
    pixel_bytes = run.pixel_bytes + run.prediction_bytes
    every = windows(run.stack.grid, run.stack.block, pixel_bytes, window_bytes)
    return on_grid.parts(every, partial(check, cancelled))


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


@dataclass(frozen=True, kw_only=True)
class _FieldPass:
    """The `Pass` over the windows that hold a field, but for its stages."""

    run: RasterRun
    grid: FieldGrid

    @property
    def paths(self) -> tuple[Path, ...]:
        """See `Pass.paths`."""
        return self.run.stack.paths

    def _extents(self, window: Window, covered: Coverage) -> dict[str, NDArray[Any]]:
        hectares = self.run.stack.grid.hectares(window).reshape(-1)
        return {
            "fields": covered.fields,
            "pixels": covered.sums(covered.share),
            "hectares": covered.sums(covered.share * hectares[covered.cells]),
        }


@dataclass(frozen=True, kw_only=True)
class _MeansPass(_FieldPass):
    """The `Pass` that predicts for covered pixels, and sums the predictions of each field."""

    @contextmanager
    def open(self, cache: BlockCache, cancelled: threading.Event | None) -> Iterator[Stages]:
        """See `Pass.open`."""
        with open_pixels(self.run, cache, cancelled) as stages:
            # A coverage takes memory, so it is not made in the stage that reads ahead.
            def infer(found: tuple[Window, ClearPixels]) -> Arrays:
                window, clear = found
                covered = self.grid.coverage(window)
                wanted = np.zeros(clear.seen.size, np.bool_)
                wanted[covered.cells] = True
                positions = clear.positions[wanted[clear.positions]]
                predicted = stages.infer(replace(clear, positions=positions))
                return self._arrays(window, covered, predicted, clear.seen)

            yield Stages(
                read=lambda window: (window, stages.read(window)),
                infer=infer,
                to_arrays=lambda _, arrays: arrays,
            )

    def _arrays(
        self,
        window: Window,
        covered: Coverage,
        predicted: WindowPredictions,
        seen: NDArray[np.integer[Any]],
    ) -> Arrays:
        """The sums that a window adds to its fields.

        Args:
            window: the window.
            covered: its cells that fields cover.
            predicted: the predictions of these cells.
            seen: number of clear dates of each pixel (h, w).
        """
        arrays = self._extents(window, covered)
        position = np.full(int(window.height * window.width), -1)
        good = ~np.isnan(predicted.predictions).any(axis=1)
        predictions = predicted.predictions[good]
        position[predicted.positions[good]] = np.arange(len(predictions))
        classes = bool(self.run.model.card.classes)
        width = self.run.model.width[0]
        sums: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
        for part, cells, share in pieces(covered):
            at = position[cells]
            weight = np.where(at >= 0, share, 0.0)
            values = predictions[at] if len(predictions) else None
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


@dataclass(frozen=True, kw_only=True)
class _SeriesPass(_FieldPass):
    """The `Pass` that sums the series of each field; the model runs later, on the mean series."""

    @contextmanager
    def open(self, cache: BlockCache, cancelled: threading.Event | None) -> Iterator[Stages]:
        """See `Pass.open`."""
        with open_pixels(self.run, cache, cancelled) as stages:

            def to_arrays(window: Window, sits: Sits) -> Arrays:
                covered = self.grid.coverage(window)
                arrays = self._extents(window, covered)
                arrays["clear"], arrays["values"] = series_sums(covered, sits)
                stages.give_back(sits)
                return arrays

            yield Stages(read=stages.read, infer=lambda clear: clear.sits, to_arrays=to_arrays)


class _Sums:
    """Sums of each field that every kind of result needs: pixels, area and clear dates."""

    pass_of: type[_MeansPass | _SeriesPass]
    """The pass whose arrays are added."""
    backtested: Backtested | None = None
    """The backtest of forecasts, after `results`."""

    def __init__(self, run: RasterRun, grid: FieldGrid, count: int) -> None:
        self._run = run
        self._grid = grid
        self._totals: dict[str, NDArray[np.float64]] = {}
        self._count = count

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

    pass_of = _MeansPass

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
        weight = self._total("weight")
        results = self._status(weight > 0)
        for number in np.flatnonzero(weight > 0).tolist():
            check(cancelled)
            mean = (self._totals["values"][number] / weight[number]).astype(np.float32)
            record = self._run.predictions.record(mean)
            classes = self._run.model.card.classes
            if classes:
                shares = self._totals["shares"][number] / weight[number]
                # Every class, so that the columns of tables do not depend on what is found.
                record["share"] = {c.name: float(s) for c, s in zip(classes, shares, strict=True)}
            seen = self._totals["seen"][number] / self._total("pixels")[number]
            results[number] |= {**record, **self._extent(number, seen)}
        return results


class _Series(_Sums):
    """Forecasts from the fields' mean series."""

    pass_of = _SeriesPass

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
            History(
                dates=tuple(run.stack.dates[t] for t in run.read),
                values=values,
                valid=valid,
                elsewhere=run.elsewhere(*self._grid.middles()),
            ),
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
            check(cancelled)
            seen = clear[number, -len(run.used) :].sum() / self._total("pixels")[number]
            results[number] |= {
                **run.predictions.record(predictions[number]),
                **self._extent(number, seen),
            }
        return results
