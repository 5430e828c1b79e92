"""Patch runs: a composite of the stack, predictions for its patches, averages of overlaps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.grid import Window
from service.infer.patches import PatchGrid, box_mean, fill_gaps, median_composite
from service.read.geotiff import BlockCache
from service.read.reader import StackReader
from service.read.stack import Sits
from service.run.collect import (
    Floats,
    Outcome,
    Sink,
    ToArrays,
    WindowPredictions,
    Work,
    spread,
    write_to,
)
from service.run.executors import Timing, check
from service.run.passes import Stages
from service.run.plan import RasterRun
from service.run.windows import Arrays, windows
from service.write.cog import ScratchRaster


def run_patches(work: Work) -> Outcome:
    """Predict for every patch of a raster; see `run_raster`."""
    run = work.run
    patches = run.patches
    # Embeddings are not averaged: the mean of two embeddings is not the embedding of their overlap.
    averaged = run.model.card.task == "landcover" and patches.reach > 0
    with ExitStack() as stack:
        sink = Sink(work, patches.grid, stack)
        composite = stack.enter_context(ScratchRaster(work.folder / "composite.scratch.tif"))
        timing = _make_composite(work, composite)
        if not averaged:
            timing += _predict_patches(work, patches, composite, sink.to_arrays, sink.collect)
            return sink.outcome(timing)
        raw = stack.enter_context(ScratchRaster(work.folder / "patches.scratch.tif"))
        with raw.create(patches.grid, run.model.width[0]) as file:
            timing += _predict_patches(work, patches, composite, spread, write_to(file))
        timing += _average(work, patches, raw, sink)
        return sink.outcome(timing)


def _make_composite(work: Work, target: ScratchRaster) -> Timing:
    """First pass: the median of each pixel's clear dates, NaN for a pixel with too few."""
    run, grid = work.run, work.run.stack.grid
    with target.create(grid, len(run.stack.bands)) as file:
        # Twice the window, because the median sorts a copy of it.
        pixel_bytes = 2 * run.pixel_bytes + 4 * len(run.stack.bands)
        parts = windows(grid, run.stack.block, pixel_bytes, work.window_bytes)
        return work.run_pass(
            "composite",
            parts,
            CompositePass(run=run),
            collect=write_to(file),
            share=0.2,
        )


@dataclass(frozen=True, kw_only=True)
class CompositePass:
    """The `Pass` that makes the composite."""

    run: RasterRun

    @property
    def paths(self) -> tuple[Path, ...]:
        """See `Pass.paths`."""
        return self.run.stack.paths

    @contextmanager
    def open(self, cache: BlockCache, cancelled: threading.Event | None) -> Iterator[Stages]:
        """See `Pass.open`."""
        with StackReader(
            self.run.stack, self.run.used, cache=cache, before_read=lambda: check(cancelled)
        ) as reader:
            yield Stages(
                read=reader.read,
                infer=lambda sits: clear_composite(self.run, sits),
                to_arrays=lambda _, values: {"values": values},
            )


def clear_composite(run: RasterRun, sits: Sits) -> Floats:
    """The median over the clear dates (C, h, w) float32; NaN for a pixel with too few of them."""
    median = median_composite(sits.values, sits.valid)
    median[:, sits.valid.sum(axis=0) < run.model.card.min_observations] = np.nan
    return median


def _predict_patches(
    work: Work,
    patches: PatchGrid,
    composite: ScratchRaster,
    to_arrays: ToArrays,
    collect: Callable[[Window, Arrays], None],
) -> Timing:
    """Second pass: the prediction of every patch, stored at the position of its cell."""
    run, cells = work.run, patches.grid
    cell_bytes = 4 * len(run.stack.bands) * patches.stride**2 + run.prediction_bytes
    parts = windows(cells, (1, 1), cell_bytes, work.window_bytes)
    return work.run_pass(
        "patches",
        parts,
        PatchPass(run=run, composite=composite, to_arrays=to_arrays),
        collect=collect,
        share=0.6,
    )


@dataclass(frozen=True, kw_only=True)
class PatchPass:
    """The `Pass` that predicts for the patches of the composite."""

    run: RasterRun
    composite: ScratchRaster
    """The finished composite, in the folder of the run."""
    to_arrays: ToArrays

    @property
    def paths(self) -> tuple[Path, ...]:
        """See `Pass.paths`."""
        return (self.composite.path,)

    @contextmanager
    def open(self, cache: BlockCache, cancelled: threading.Event | None) -> Iterator[Stages]:
        """See `Pass.open`."""
        del cache  # the composite's blocks are small
        patches, model = self.run.patches, self.run.model

        def infer(imagery: Floats) -> WindowPredictions:
            views = patches.cut(imagery)
            h, w = views.shape[:2]
            positions, predictions = [], []
            for start in range(0, h * w, model.chunk):
                check(cancelled)
                part = np.arange(start, min(start + model.chunk, h * w))
                clear, filled = fill_gaps(views[part // w, part % w])
                positions.append(part[clear])
                predictions.append(model.patches(filled))
            return WindowPredictions(
                positions=np.concatenate(positions), predictions=np.concatenate(predictions)
            )

        with self.composite.open() as file:
            yield Stages(
                read=lambda window: file.read(patches.pixels(window)),
                infer=infer,
                to_arrays=self.to_arrays,
            )


def _average(work: Work, patches: PatchGrid, raw: ScratchRaster, sink: Sink) -> Timing:
    """Last pass: each cell's mean over all patches that contain it."""
    cells = patches.grid

    def infer(item: tuple[Window, Floats]) -> WindowPredictions:
        window, probabilities = item
        mean = box_mean(probabilities, patches.reach + 1)[:, -window.height :, -window.width :]
        flat = mean.reshape(len(mean), -1)
        positions = np.flatnonzero(~np.isnan(flat[0]))
        return WindowPredictions(
            positions=positions, predictions=np.ascontiguousarray(flat[:, positions].T)
        )

    with raw.open() as file:
        # Three arrays: as read, as cumulative sums in float64, and as means.
        cell_bytes = 3 * work.run.prediction_bytes
        parts = windows(cells, (1, 1), cell_bytes, work.window_bytes)
        return work.run_pass(
            "predictions",
            parts,
            Stages(
                read=lambda w: (w, file.read(patches.behind(w))),
                infer=infer,
                to_arrays=sink.to_arrays,
            ),
            collect=sink.collect,
            share=0.1,
        )
