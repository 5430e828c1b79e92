"""A run: windows of a stack through a model, into rasters and a summary.

    stack ── read ahead ──▶ Sits ── infer ──▶ answers ── write behind ──▶ COGs, summary

Pixel models go over the stack once. Patch models first make a cloud-free composite, so that
overlapping patches decode no file twice; then the patches of it are answered; where they overlap,
a last pass averages their probabilities. Memory is bounded by `WINDOW_BYTES` a window, whatever
the raster, and where a window ends never shows in an answer.

A journal, where one is given, has each finished window before it counts, and hands it back to a
run that begins again: only the windows that it lacks are read and answered anew, and what comes
out is byte for byte what an undisturbed run gives.

Points take the same models without windows; series have a module of their own.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rasterio
import rasterio.warp
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # `warp.transform` raises it, and `errors` lacks it
from rasterio.windows import Window

from service.answers import JSON, Layer
from service.executors import Cancelled, Executor, ThreadExecutor, Timing, check
from service.output import RasterWriter, check_whole, create_raster, stored
from service.patches import PatchGrid, box_mean, fill_gaps
from service.runs import (
    RasterRun,
    check_run,
    outside_window,
    plan_raster,
    resolve_window,
    said_of_dates,
)
from service.stack import (
    Grid,
    Sits,
    StackReader,
    StackWarning,
    median_composite,
    spaced,
)

__all__ = [
    "Arrays",
    "Cancelled",
    "Journal",
    "Outcome",
    "PointOutcome",
    "RasterRun",
    "Step",
    "Timing",
    "plan_raster",
    "resolve_window",
    "run_points",
    "run_raster",
    "windows",
]

Floats = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]
"""What is kept of a window, by name."""

WINDOW_BYTES = 32 * 2**20
"""Values, validity and answers of one window. Up to six windows are alive at once.

Rasters from about 1000 x 1000 pixels on have windows of this size, so that none takes more memory
than these: with 64 MiB, 4096 x 4096 pixels of 12 dates took 633 MB and 1024 x 1024 took 413 MB.
"""

_OVER = 1.25
"""How far over its budget a window of one whole block may be."""
_SEVERAL = 8
"""Windows that a larger raster is cut into at least, so that the stages overlap."""
_FEW_PIXELS = 4096
"""Below this a window costs more to handle than its overlap brings."""
_AT_ONCE = 2
"""Parts of a chunk: while one is gathered, or waits for its last batch, the other's batches run."""
_COUNTED = "tally."
"""Before the names of a tally's counts, beside those of layers."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a raster run gives."""

    files: Mapping[str, Path]
    """Finished COGs, by output name; a class map's side file lies beside it."""
    summary: dict[str, JSON]
    """The answer as `application/json`."""
    timing: Timing
    warnings: tuple[StackWarning, ...]


@dataclass(frozen=True, kw_only=True)
class PointOutcome:
    """What points give."""

    results: tuple[dict[str, JSON], ...]
    """A result a point, in order: `status` ok, outside or no_data, and where ok the answer."""
    timing: Timing
    warnings: tuple[StackWarning, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One window of one pass of a run."""

    stage: str
    """The pass: `composite`, `patches`, `answers`."""
    number: int
    """Of the window, from 0, in the pass's order."""
    window: Window


class Journal(Protocol):
    """Keeps what a run has finished. Called from one thread at a time."""

    def load(self, step: Step) -> Arrays | None:
        """What was saved of a step; None where nothing was."""
        ...

    def save(self, step: Step, arrays: Arrays) -> None:
        """Keep a finished step; it is safe once this returns."""
        ...


# Windows --------------------------------------------------------------------------------------


def windows(
    grid: Grid, block: tuple[int, int], pixel_bytes: int, budget: int = WINDOW_BYTES
) -> list[Window]:
    """Windows that cover a raster, each pixel once, in an order that reads each block once.

    Args:
        grid: of the raster.
        block: rows and columns of a block on disk.
        pixel_bytes: memory that a pixel of a window takes.
        budget: bytes that a window may take; one pixel is always taken, and one whole block where
            it takes a quarter more at most.

    Returns:
        Windows made of whole blocks, or, where one block is over the budget, of parts of one.
    """
    whole = Window(0, 0, grid.width, grid.height)
    rows, cols = min(block[0], grid.height), min(block[1], grid.width)
    most = max(1, budget // pixel_bytes)
    # A block a little over the budget is taken whole: what is cut in two is decoded twice.
    if rows * cols <= _OVER * most:
        most = max(most, rows * cols)
    if rows * cols > most:
        part_cols = min(cols, most)
        part_rows = max(1, most // part_cols)
        return [
            part for one in _tiles(whole, rows, cols) for part in _tiles(one, part_rows, part_cols)
        ]
    if grid.height * grid.width <= min(most, _FEW_PIXELS):
        return [whole]  # else a rest of a few rows would be read and answered by itself
    aim = min(most, max(_FEW_PIXELS, -(-grid.height * grid.width // _SEVERAL)))
    blocks = max(1, aim // (rows * cols))
    across = -(-grid.width // cols)
    if blocks < across:
        return list(_tiles(whole, rows, blocks * cols))
    return list(_tiles(whole, rows * (blocks // across), grid.width))


def _tiles(area: Window, rows: int, cols: int) -> Iterator[Window]:
    for row in range(0, area.height, rows):
        for col in range(0, area.width, cols):
            yield Window(
                area.col_off + col,
                area.row_off + row,
                min(cols, area.width - col),
                min(rows, area.height - row),
            )


# Rasters --------------------------------------------------------------------------------------


def run_raster(
    run: RasterRun,
    folder: Path,
    *,
    progress: Callable[[float], None] = lambda _: None,
    cancelled: threading.Event | None = None,
    executor: Executor | None = None,
    journal: Journal | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> Outcome:
    """Answer for every pixel or patch of a raster.

    Whether its numbers are reflectance at all is for `check_radiometry` to say beforehand.

    Args:
        run: what to do.
        folder: where the finished files go; it exists. A run that fails leaves nothing in it.
        progress: told the share done, 0 to 1, in the calling thread.
        cancelled: set it to take the run back.
        executor: where windows run; None takes threads of this process.
        journal: has the windows finished before, and gets those finished now; None keeps none.
        window_bytes: memory for one window.

    Raises:
        Cancelled: `cancelled` was set.
        PIMCError: whatever the stack, the model or the request is at fault for.
    """
    check_run(run)
    check(cancelled)
    work = _Work(
        run=run,
        folder=folder,
        progress=_Progress(progress),
        cancelled=cancelled,
        executor=executor or ThreadExecutor(),
        journal=journal,
        window_bytes=window_bytes,
    )
    return _run_pixels(work) if run.model.card.modality == "pixel" else _run_patches(work)


class _Progress:
    """Adds up the shares of several passes."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report
        self._done = 0.0

    def of(self, share: float, grid: Grid) -> Callable[[int], None]:
        """What a pass over a grid calls with the number of pixels just done."""
        total = grid.width * grid.height

        def advance(count: int) -> None:
            self._done += share * count / total
            # The rest is finishing the files.
            self._report(min(self._done, 0.99))

        return advance

    def finish(self) -> None:
        self._report(1.0)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A run with everything around it."""

    run: RasterRun
    folder: Path
    progress: _Progress
    cancelled: threading.Event | None
    executor: Executor
    journal: Journal | None
    window_bytes: int

    def each(
        self,
        stage: str,
        parts: Sequence[Window],
        *,
        read: Callable[[Window], Any],
        infer: Callable[[Any], Any],
        digest: Callable[[Window, Any], Arrays],
        keep: Callable[[Window, Arrays], None],
        advance: Callable[[int], None],
    ) -> Timing:
        """One pass: every window read, answered, and what is worth keeping of it kept.

        Args:
            stage: the pass.
            parts: its windows.
            read: in a thread of its own, ahead.
            infer: in the calling thread.
            digest: of an answer, what `keep` needs.
            keep: takes windows in order, those of the journal first.
            advance: told the pixels of windows that need not be answered again.
        """
        steps = [Step(stage=stage, number=n, window=part) for n, part in enumerate(parts)]
        begin = self._recall(steps, keep, advance)

        def write(step: Step, answer: object) -> None:
            arrays = digest(step.window, answer)
            if self.journal is not None:
                self.journal.save(step, arrays)
            keep(step.window, arrays)

        return self.executor.run(
            steps[begin:],
            read=lambda step: read(step.window),
            infer=infer,
            write=write,
            cancelled=self.cancelled,
        )

    def _recall(
        self,
        steps: Sequence[Step],
        keep: Callable[[Window, Arrays], None],
        advance: Callable[[int], None],
    ) -> int:
        """How many windows, from the first on, the journal had.

        What comes after a gap is done again: sums of floats must be added in one order.
        """
        if self.journal is None:
            return 0
        for step in steps:
            check(self.cancelled)
            arrays = self.journal.load(step)
            if arrays is None:
                return step.number
            keep(step.window, arrays)
            advance(step.window.height * step.window.width)
        return len(steps)


class _Busy:
    """A context manager for several threads at once: the seconds in which any of them was in it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = 0
        self._since = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.seconds += time.perf_counter() - self._since


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The answers of one window, the last of which may still be under way."""

    index: NDArray[np.intp]
    """Places in the flattened window (n) that have an answer."""
    answers: Floats
    """Their answers (n, …)."""
    wait: Callable[[], None] = _nothing
    """Returns once all of them are there, or raises what went wrong."""


class _Sink:
    """Takes the answers of windows: into rasters where they are wanted, and the tally always."""

    def __init__(self, work: _Work, grid: Grid, stack: ExitStack) -> None:
        run = work.run
        self._work = work
        self._grid = grid
        self._answers = run.answers
        self._layers = {layer.name: layer for layer in run.answers.layers if run.rasters}
        self._tally = run.answers.tally()
        self._valid = 0
        self._waited = 0.0
        self._writer = stack.enter_context(
            RasterWriter(work.folder, grid, tuple(self._layers.values()), _tags(run))
        )

    def digest(self, window: Window, found: _Found) -> Arrays:
        """A window's bands by layer, `valid` answers, and what it adds to the tally."""
        start = time.perf_counter()
        found.wait()
        self._waited += time.perf_counter() - start
        # A sum of numbers is a number, and made faster than each of them is looked at.
        flat = found.answers.reshape(len(found.answers), math.prod(found.answers.shape[1:]))
        missing = np.isnan(np.einsum("ij->i", flat))
        rows = range(window.row_off, window.row_off + window.height)
        hectares = np.repeat(self._grid.hectares(rows), window.width)
        counts = self._tally.count(found.answers, hectares[found.index])
        arrays = {f"{_COUNTED}{name}": values for name, values in counts.items()}
        arrays["valid"] = (~missing).sum()
        if not self._layers:
            return arrays
        for name, values in self._answers.bands(found.answers).items():
            whole = self._layers[name].empty(window.height * window.width)
            whole[:, found.index] = values
            arrays[name] = whole.reshape(-1, window.height, window.width)
        return arrays

    def keep(self, window: Window, arrays: Arrays) -> None:
        """Count a window, and write its bands."""
        self._valid += int(arrays["valid"])
        self._tally.add(
            {n.removeprefix(_COUNTED): a for n, a in arrays.items() if n.startswith(_COUNTED)}
        )
        self._writer.write(window, {name: arrays[name] for name in self._layers})

    def outcome(self, timing: Timing) -> Outcome:
        """Finish the files, and sum up."""
        start = time.perf_counter()
        check(self._work.cancelled)
        files = self._writer.finish()
        check(self._work.cancelled)
        self._work.progress.finish()
        total = self._grid.width * self._grid.height
        warnings = _warnings(self._work.run)
        summary: dict[str, JSON] = {
            **_summary_head(self._work.run),
            "pixels": total,
            "valid_share": self._valid / total,
            **self._tally.summary(),
            "warnings": [{"code": w.code, "detail": w.detail} for w in warnings],
        }
        return Outcome(
            files=files,
            summary=summary,
            # Who waits for the last answers is not busy.
            timing=timing + Timing(write=time.perf_counter() - start - self._waited),
            warnings=warnings,
        )


def _warnings(run: RasterRun) -> tuple[StackWarning, ...]:
    outside = outside_window(run.model.card, run.stack.dates, run.window)
    return (*run.stack.warnings, *outside)


def _summary_head(run: RasterRun) -> dict[str, JSON]:
    stack, card = run.stack, run.model.card
    head: dict[str, JSON] = {
        "model": card.id,
        "task": card.task,
        "provider": run.model.provider,
        **said_of_dates(run),
        "layout": stack.layout,
        "scale": stack.scale,
        "offset": stack.offset,
        "mask": stack.mask,
    }
    return {**head, "stride": run.stride} if card.modality == "patch" else head


def _tags(run: RasterRun) -> dict[str, str]:
    """What every file says of where it comes from."""
    tags = {"TIFFTAG_SOFTWARE": "PIMC", "PIMC_MODEL": run.model.card.id}
    if run.window:
        tags["PIMC_WINDOW_START"] = run.window.start.isoformat()
    if run.stack.dates:
        tags["PIMC_DATES"] = ",".join(run.stack.dates[t].isoformat() for t in run.used)
    return tags


# Pixels ---------------------------------------------------------------------------------------


def _run_pixels(work: _Work) -> Outcome:
    run = work.run
    grid = run.stack.grid
    with ExitStack() as stack:
        sink = _Sink(work, grid, stack)
        advance = work.progress.of(0.9, grid)
        parts = windows(
            grid, run.stack.block, run.pixel_bytes + run.answer_bytes, work.window_bytes
        )
        # Closed, and its memory let go, before the files are finished.
        with (
            StackReader(run.stack, run.used) as reader,
            ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="chunk") as pool,
        ):
            pixels = _Pixels(work, reader, pool, advance)
            timing = work.each(
                "answers",
                parts,
                read=pixels.read,
                infer=pixels.infer,
                digest=sink.digest,
                keep=sink.keep,
                advance=advance,
            )
        return sink.outcome(replace(timing, infer=pixels.busy.seconds))


@dataclass(frozen=True, kw_only=True)
class _Clear:
    """A window, and which of its pixels have enough clear dates."""

    sits: Sits
    index: NDArray[np.intp]
    """Their places in the flattened window."""


class _Pixels:
    """Answers for the pixels of a window that have enough clear dates."""

    def __init__(
        self,
        work: _Work,
        reader: StackReader,
        pool: ThreadPoolExecutor,
        advance: Callable[[int], None],
    ) -> None:
        self.busy = _Busy()
        """Whether some pixels are being answered."""
        self._model = work.run.model
        self._days, self._day_of_year = _model_time(work.run)
        self._cancelled = work.cancelled
        self._reader = reader
        self._pool = pool
        self._advance = advance

    def read(self, window: Window) -> _Clear:
        """The first stage: all that can be known before the model is asked."""
        sits = self._reader.read(window)
        T = len(sits.valid)
        # In the smallest number that holds T: bytes are added six times as fast.
        kind = np.uint8 if T < 256 else np.uint32
        seen = np.add.reduce(sits.valid.view(np.uint8), axis=0, dtype=kind)
        index = np.flatnonzero(seen >= self._model.card.min_observations)
        return _Clear(sits=sits, index=index)

    def infer(self, clear: _Clear) -> _Found:
        """The second stage.

        It ends as the window's last chunks begin, and the next window's begin as they end: else
        a thread would have nothing to do at the end of each window.
        """
        T, C, h, w = clear.sits.values.shape
        values = clear.sits.values.reshape(T, C, h * w)
        valid = clear.sits.valid.reshape(T, h * w)
        index = clear.index
        self._advance(h * w - len(index))
        answers = np.empty((len(index), *self._model.width), np.float32)
        size = max(1, self._model.chunk // _AT_ONCE)

        def answer(start: int) -> int:
            check(self._cancelled)
            chunk = index[start : start + size]
            some, there = _chosen(values, chunk), _chosen(valid, chunk)
            answers[start : start + len(chunk)] = self._model.pixels(
                some.transpose(2, 0, 1), there.T, self._days, self._day_of_year
            )
            return len(chunk)

        def busy(start: int) -> int:
            with self.busy:
                return answer(start)

        # By chunks: only these are copied into (N, T, C), and a cancelled run stops soon.
        chunks = [self._pool.submit(busy, start) for start in range(0, len(index), size)]
        last = chunks[-_AT_ONCE:]
        try:
            for chunk in chunks[:-_AT_ONCE]:
                self._advance(chunk.result())
        except BaseException:
            for chunk in chunks:
                chunk.cancel()
            raise
        self._advance(len(index) - size * (len(chunks) - len(last)))

        def wait() -> None:
            for chunk in last:
                chunk.result()
            self._reader.recycle(clear.sits)

        return _Found(index=index, answers=answers, wait=wait)


def _chosen(planes: NDArray[Any], index: NDArray[np.intp]) -> NDArray[Any]:
    """Some pixels (..., n) of planes (..., N), by ascending places in them."""
    if index[-1] - index[0] + 1 == len(index):  # mostly none is left out: then nothing is copied
        return planes[..., index[0] : index[-1] + 1]
    out = spaced(planes.shape[:-1], index.shape, planes.dtype.type)
    out[...] = planes[..., index]  # `np.take` would copy all planes first
    return out


def _model_time(run: RasterRun) -> tuple[NDArray[np.float32], int]:
    """Days (T) since the window's first day, and that day's place in its year."""
    if run.window is None:
        raise TypeError(f"'{run.model.card.id}' takes no time series")
    days = np.asarray(run.window.days(run.stack.dates), np.float32)
    return days, run.window.first_day.timetuple().tm_yday


# Patches --------------------------------------------------------------------------------------


def _run_patches(work: _Work) -> Outcome:
    run = work.run
    patches = run.patches
    # An embedding between two others is no place between them, so those are never averaged.
    averaged = run.model.card.task == "landcover" and patches.reach > 0
    with ExitStack() as stack:
        sink = _Sink(work, patches.grid, stack)
        composite = stack.enter_context(_Scratch(work.folder / "composite.scratch.tif"))
        timing = _make_composite(work, composite)
        if not averaged:
            timing += _answer_patches(work, patches, composite, sink.digest, sink.keep)
            return sink.outcome(timing)
        raw = stack.enter_context(_Scratch(work.folder / "patches.scratch.tif"))
        with raw.create(patches.grid, run.model.width[0]) as file:
            timing += _answer_patches(work, patches, composite, _spread, _write_to(file))
        timing += _average(work, patches, raw, sink)
        return sink.outcome(timing)


class _Scratch:
    """A float raster that lives from one pass to the next; a context manager that removes it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)

    @contextmanager
    def create(self, grid: Grid, bands: int) -> Iterator[Any]:
        """The raster, open for writing; whole once the context is left."""
        layer = Layer(name="scratch", bands=tuple(str(b) for b in range(bands)))
        with stored():
            file = create_raster(self._path, grid, layer)
        with file:
            yield file
        check_whole(self._path)

    def open(self) -> Any:  # noqa: ANN401 - rasterio has no types
        """The raster, open for reading."""
        return rasterio.open(self._path)


def _spread(window: Window, found: _Found) -> Arrays:
    """Answers (n, K) as `values` (K, h, w), NaN elsewhere."""
    whole = np.full((found.answers.shape[1], window.height * window.width), np.nan, np.float32)
    whole[:, found.index] = found.answers.T
    return {"values": whole.reshape(-1, window.height, window.width)}


def _write_to(file: Any) -> Callable[[Window, Arrays], None]:  # noqa: ANN401 - rasterio has no types
    """Writes `values` (K, h, w) of each window."""

    def write(window: Window, arrays: Arrays) -> None:
        with stored():
            file.write(arrays["values"], window=window)

    return write


def _make_composite(work: _Work, target: _Scratch) -> Timing:
    """First pass: the median of each pixel's clear dates, NaN where it has too few."""
    run, grid = work.run, work.run.stack.grid
    advance = work.progress.of(0.2, grid)

    def infer(sits: Sits) -> Floats:
        advance(sits.valid[0].size)
        return _composite(run, sits)

    with (
        StackReader(run.stack, run.used) as reader,
        target.create(grid, len(run.stack.bands)) as file,
    ):
        # The median sorts a copy.
        pixel_bytes = 2 * run.pixel_bytes + 4 * len(run.stack.bands)
        parts = windows(grid, run.stack.block, pixel_bytes, work.window_bytes)
        return work.each(
            "composite",
            parts,
            read=reader.read,
            infer=infer,
            digest=lambda _, values: {"values": values},
            keep=_write_to(file),
            advance=advance,
        )


def _composite(run: RasterRun, sits: Sits) -> Floats:
    """Reflectance (C, h, w), NaN in pixels with too few clear dates."""
    median = median_composite(sits)
    median[:, sits.valid.sum(axis=0) < run.model.card.min_observations] = np.nan
    return median


def _answer_patches(
    work: _Work,
    patches: PatchGrid,
    composite: _Scratch,
    digest: Callable[[Window, _Found], Arrays],
    keep: Callable[[Window, Arrays], None],
) -> Timing:
    """Second pass: the answer of every patch, written to its cell."""
    run, cells = work.run, patches.grid
    advance = work.progress.of(0.6, cells)

    def infer(imagery: Floats) -> _Found:
        views = patches.cut(imagery)
        h, w = views.shape[:2]
        index, answers = [], []
        for start in range(0, h * w, run.model.chunk):
            check(work.cancelled)
            part = np.arange(start, min(start + run.model.chunk, h * w))
            clear, filled = fill_gaps(views[part // w, part % w])
            index.append(part[clear])
            answers.append(run.model.patches(filled))
            advance(len(part))
        return _Found(index=np.concatenate(index), answers=np.concatenate(answers))

    with composite.open() as file:
        cell_bytes = 4 * len(run.stack.bands) * patches.stride**2 + run.answer_bytes
        parts = windows(cells, (1, 1), cell_bytes, work.window_bytes)
        return work.each(
            "patches",
            parts,
            read=lambda w: file.read(window=patches.pixels(w)),
            infer=infer,
            digest=digest,
            keep=keep,
            advance=advance,
        )


def _average(work: _Work, patches: PatchGrid, raw: _Scratch, sink: _Sink) -> Timing:
    """Last pass: each cell's mean over all patches that contain it."""
    cells = patches.grid
    advance = work.progress.of(0.1, cells)

    def infer(item: tuple[Window, Floats]) -> _Found:
        window, probabilities = item
        advance(window.height * window.width)
        mean = box_mean(probabilities, patches.reach + 1)[:, -window.height :, -window.width :]
        flat = mean.reshape(len(mean), -1)
        index = np.flatnonzero(~np.isnan(flat[0]))
        return _Found(index=index, answers=np.ascontiguousarray(flat[:, index].T))

    with raw.open() as file:
        # As read, twice as running sums in float64, and as means.
        cell_bytes = 3 * work.run.answer_bytes
        parts = windows(cells, (1, 1), cell_bytes, work.window_bytes)
        return work.each(
            "answers",
            parts,
            read=lambda w: (w, file.read(window=patches.behind(w))),
            infer=infer,
            digest=sink.digest,
            keep=sink.keep,
            advance=advance,
        )


# Points ---------------------------------------------------------------------------------------


def run_points(run: RasterRun, points: Sequence[tuple[float, float]]) -> PointOutcome:
    """Answer for single places.

    Args:
        run: what to do; rasters of it are not made.
        points: longitude and latitude in degrees (EPSG:4326).

    Raises:
        PIMCError: whatever the stack, the model or the request is at fault for.
    """
    check_run(run)
    rows, cols, inside = _places(run.stack.grid, points)
    ask = _ask_pixels if run.model.card.modality == "pixel" else _ask_patches
    with StackReader(run.stack, run.used) as reader:
        answers, timing = ask(run, reader, rows[inside], cols[inside])
    results: list[dict[str, JSON]] = [{"status": "outside"} for _ in points]
    for place, answer in zip(np.flatnonzero(inside), answers, strict=True):
        there = not np.isnan(answer).any()
        record = run.answers.record(answer) if there else {}
        results[place] = {"status": "ok" if there else "no_data", **record}
    return PointOutcome(results=tuple(results), timing=timing, warnings=_warnings(run))


def _places(
    grid: Grid, points: Sequence[tuple[float, float]]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
    """Row and column of the pixel under each point, and whether there is one."""
    xs, ys = _projected(grid, points)
    with np.errstate(invalid="ignore"):
        cols, rows = np.floor(~grid.transform @ (xs, ys))
    # Where the projection holds no such place, these are not numbers, and compare as outside.
    inside = (rows >= 0) & (rows < grid.height) & (cols >= 0) & (cols < grid.width)
    return (
        np.where(inside, rows, 0).astype(np.intp),
        np.where(inside, cols, 0).astype(np.intp),
        inside,
    )


def _projected(
    grid: Grid, points: Sequence[tuple[float, float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """X and y of points in the grid's CRS, NaN for those that it cannot hold."""
    try:
        xs, ys = rasterio.warp.transform(
            "EPSG:4326", grid.crs, [p[0] for p in points], [p[1] for p in points]
        )
    except CPLE_BaseError:
        # One point beyond the projection fails them all, so look for it by halves.
        if len(points) == 1:
            return np.array([np.nan]), np.array([np.nan])
        half = len(points) // 2
        (ax, ay), (bx, by) = _projected(grid, points[:half]), _projected(grid, points[half:])
        return np.concatenate([ax, bx]), np.concatenate([ay, by])
    return np.asarray(xs, np.float64), np.asarray(ys, np.float64)


def _ask_pixels(
    run: RasterRun, reader: StackReader, rows: NDArray[np.intp], cols: NDArray[np.intp]
) -> tuple[Floats, Timing]:
    """Answers (N, …) for pixels, NaN where one has too few clear dates."""
    start = time.perf_counter()
    sits = reader.read_pixels(rows, cols)
    read = time.perf_counter()
    days, day_of_year = _model_time(run)
    answers = np.full((len(rows), *run.model.width), np.nan, np.float32)
    enough = sits.valid.sum(axis=0) >= run.model.card.min_observations
    answers[enough] = run.model.pixels(
        sits.values[:, :, enough].transpose(2, 0, 1), sits.valid[:, enough].T, days, day_of_year
    )
    return answers, Timing(read=read - start, infer=time.perf_counter() - read)


def _ask_patches(
    run: RasterRun, reader: StackReader, rows: NDArray[np.intp], cols: NDArray[np.intp]
) -> tuple[Floats, Timing]:
    """Answers (N, …) for the patches centred on pixels, NaN where one is not clear enough."""
    patches, grid = run.patches, run.stack.grid
    answers = np.full((len(rows), *run.model.width), np.nan, np.float32)
    timing = Timing()
    for at in range(0, len(rows), run.model.chunk):
        part = slice(at, at + run.model.chunk)
        start = time.perf_counter()
        imagery = np.stack(
            [
                _composite(run, reader.read(patches.centred(grid, int(row), int(col))))
                for row, col in zip(rows[part], cols[part], strict=True)
            ]
        )
        read = time.perf_counter()
        clear, filled = fill_gaps(imagery)
        answers[part][clear] = run.model.patches(filled)
        timing += Timing(read=read - start, infer=time.perf_counter() - read)
    return answers, timing
