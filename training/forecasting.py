"""Forecast task: the next values of spectral indices, trained on all series."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from models.forecast_calibration import relative_disagreement
from models.graph import PixelGraph
from models.heads import ForecastHead
from models.indices import SpectralIndices
from training.config import BANDS, INDICES, ForecastConfig
from training.datasets import PixelSet, Scene
from training.datasets.points import (
    crops_us_2021,
    modis_brazil,
    s2_points,
    us_regions,
    victoria_2018,
)
from training.datasets.public import further_series
from training.datasets.stacks import read_romania, read_stack, split_north
from training.losses import pinball
from training.networks import pixel_graph, pixel_shape
from training.probe import headless, regressed
from training.series import (
    SeriesAugmentation,
    SeriesTable,
    augment_series,
    computable,
    ordinal_day_of_year,
    samples_by_source,
    series_outputs,
    shared_dates,
    tabulate,
    typical_dates,
    usable_first,
)
from training.task import Inputs, Outputs

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
# Gain and noise stay small: augmentation changes the input but not the target.
_AUGMENTATION = SeriesAugmentation(
    drop=0.3, least=3, jitter=1.0, season=0.0, noise=0.003, gain=0.0, haze=0.0
)
# Towards raw stacks, which unlike the archives have long gaps, few dates and thin cloud that no
# mask finds.
_ROUGH = SeriesAugmentation(
    drop=0.7, gap=0.3, least=3, jitter=1.0, season=0.0, noise=0.005, gain=0.0, haze=0.05
)
# Step between the rows and columns of a stack that are used: neighbours are nearly copies.
_STRIDE = 2
# Share of a stack's northern rows that is held out.
_NORTH = 0.25
_STACKS = {
    "flanders_2017_2018": "flanders",
    "hesbaye_a_monthly": "hesbaye",
    "hesbaye_b_monthly": "hesbaye",
}
# The scored case: the first 26 composites of 2021 as input, the next ten as targets.
SCORED_SOURCE = "crops_us_2021"
SCORED_CUT = 26
# Series that a graph processes at once.
_BATCH = 1024
# Fewest dates before a cut.
_SHORTEST = 5


class PixelForecast:
    """Quantiles of the next values of NDVI, EVI and SAVI.

    Args:
        config: the configuration.
        data: folder of the data sets.
        everything: whether the validation places are trained on too.
        left_out: regions excluded from training.
        romania: path of the Romania cube of the wheel nrt 0.2.1; None leaves it out.
        public: folder of the files of `training.datasets.public`; None leaves them out.
    """

    has_linear_head = False

    def __init__(
        self,
        config: ForecastConfig,
        data: Path,
        *,
        everything: bool = False,
        left_out: Sequence[str] = (),
        romania: Path | None = None,
        public: Path | None = None,
    ) -> None:
        self.config = config
        sets = series_sets(data, romania, public)
        self.spectral = SpectralIndices(INDICES, BANDS)
        table = tabulate(sets, config.window, least=config.min_observations)
        self.table = table
        self.regions = table.regions
        away = table.in_regions(left_out)
        self.left_out = table.take(away)
        self.validation = table.take(
            table.validation & (table.source == table.sources.index(SCORED_SOURCE)) & ~away
        )
        self.train = table.take((~table.validation | everything) & ~away)
        self.scored = self.train.source == table.sources.index(SCORED_SOURCE)

    def graph(self) -> PixelGraph:
        """A new, untrained graph."""
        config = self.config
        return pixel_graph(
            config,
            lambda embedding: ForecastHead(
                embedding,
                steps=config.window.steps,
                indices=len(config.indices),
                horizon=config.horizon,
                quantiles=len(config.quantiles),
            ),
        )

    @property
    def steps(self) -> int:
        """Number of batches per epoch."""
        return len(self.train) // self.config.optimisation.batch

    def batches(self, epoch: int, rng: Generator) -> Iterator[tuple[Tensor, ...]]:  # noqa: ARG002  # the same in every epoch
        """Series up to a random date, and their targets: see `cut`."""
        batch = self.config.optimisation.batch
        focus = self.config.focus
        # The other regions are drawn by the square roots of their sizes, so that none dominates.
        sizes = np.bincount(self.train.region[~self.scored], minlength=len(self.train.regions))
        others = np.where(self.scored, 0.0, sizes[self.train.region].clip(1) ** -0.5)
        own = self.scored / max(self.scored.sum(), 1)
        weights = focus * own + (1.0 - focus) * others / others.sum()
        weights /= weights.sum()
        order = rng.choice(len(self.train), self.steps * batch, p=weights)
        for i in range(self.steps):
            chosen = order[i * batch : (i + 1) * batch]
            part = self.train.take(chosen)
            yield self._tensors(part, self._positions(part, self.scored[chosen], rng), rng)

    def _positions(self, part: SeriesTable, scored: Bools, rng: Generator) -> Ints:
        """Number of dates before each pixel's cut (N).

        A share of the US crops are cut where they are scored, the rest anywhere.
        """
        dates = part.present.sum(axis=1)
        low = np.minimum(_SHORTEST, dates - 1)
        drawn = rng.integers(low, dates)
        chosen = scored & (rng.random(len(part)) < self.config.scored_cut)
        return np.where(chosen, SCORED_CUT, drawn)

    def _tensors(
        self, part: SeriesTable, positions: Ints, rng: Generator | None = None
    ) -> tuple[Tensor, ...]:
        valid, days, day_of_year, target, known = cut(
            part, positions, self.config.window.steps, self.config.window.step_days,
            self.config.horizon,
        )  # fmt: skip
        values = part.values
        if rng is not None:
            # The scored source consists of composites, so it keeps the light augmentation.
            composites = part.source == part.sources.index(SCORED_SOURCE)
            rough = ~composites & (rng.random(len(valid)) < self.config.rough)
            plain = augment_series(values, valid, days, _AUGMENTATION, rng)
            hard = augment_series(values, valid, days, _ROUGH, rng)
            values, valid, days = (
                np.where(rough.reshape(-1, *[1] * (a.ndim - 1)), b, a)
                for a, b in zip(plain, hard, strict=True)
            )
            if self.config.calendar_shift:
                shifted = ~composites & (rng.random(len(valid)) < self.config.calendar_shift)
                anywhere = rng.integers(1, 366, len(valid)).astype(np.float32)
                day_of_year = np.where(shifted, anywhere, day_of_year)
        rows = _usable(valid, known) & computable(values, valid, self.spectral)
        values, valid, days = usable_first(values, valid, days)
        arrays = (values, valid, days, day_of_year, target, known)
        return tuple(torch.from_numpy(a[rows]) for a in arrays)

    def loss(self, graph: PixelGraph, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean loss of the networks: pinball loss plus the squared error of the median.

        Only known targets count.
        """
        *inputs, target, known = batch
        losses = [self._loss(quantiles, target, known) for quantiles in graph.each(*inputs)]
        return torch.stack(losses).mean()

    def _loss(self, quantiles: Tensor, target: Tensor, known: Tensor) -> Tensor:
        loss = pinball(quantiles, target, self.config.quantiles, known)
        middle = quantiles[..., len(self.config.quantiles) // 2]
        squared = torch.where(known, (middle - target).square(), 0.0).sum() / known.sum().clamp(1)
        return loss + self.config.squared * squared

    def finish(self, graph: PixelGraph) -> None:
        """Do nothing: a forecaster has nothing to fit after training."""

    def scores(self, graph: PixelGraph) -> dict[str, Any]:
        """RMSE in index units and the coverage of the outer quantiles, at the scored cut."""
        quantiles, target, known = self.predict(graph)
        return forecast_scores(quantiles, target, known)

    def predict(self, graph: PixelGraph) -> tuple[Floats, Floats, Bools]:
        """Quantiles (N, H, S, Q), targets and which are known (N, H, S) at the scored cut."""
        positions = np.full(len(self.validation), SCORED_CUT)
        *inputs, target, known = (a.numpy() for a in self._tensors(self.validation, positions))
        return series_outputs(graph, *inputs, np.zeros(len(target), np.float32)), target, known

    def quantiles(self, graph: PixelGraph, table: SeriesTable, positions: Ints) -> Floats:
        """Forecasts of series of any table from their cuts (N, H, S, Q).

        Args:
            graph: the trained graph.
            table: N series, each with a usable date before its cut.
            positions: number of dates of each series before its cut (N).
        """
        config = self.config
        if not len(table):
            shape = (0, config.horizon, len(INDICES), len(config.quantiles))
            return np.empty(shape, np.float32)
        valid, days, day_of_year, _, _ = cut(
            table, positions, config.window.steps, config.window.step_days, config.horizon
        )
        inside = np.zeros(len(table), np.float32)
        return series_outputs(graph, table.values, valid, days, day_of_year, inside)

    def evidence(self, graph: PixelGraph, table: SeriesTable, positions: Ints) -> Outputs:
        """Forecasts before their calibration, with what they are calibrated on.

        Returns:
            `quantiles` (N, H, S, Q), `disagreement` (N) of the networks, `embedding` (N, D) of the
            first one, and `anchors` (N, A, S): see `anchors_of`.
        """
        window = self.config.window
        valid, days, day_of_year, _, _ = cut(
            table, positions, window.steps, window.step_days, self.config.horizon
        )
        parts = []
        with torch.inference_mode():
            for i in range(0, max(len(table), 1), _BATCH):  # also without a series
                rows = slice(i, i + _BATCH)
                arrays = (
                    *usable_first(table.values[rows], valid[rows], days[rows]),
                    day_of_year[rows],
                )
                outputs, embedding, anchors = graph.evidence(*(torch.from_numpy(a) for a in arrays))
                found = (outputs.mean(dim=0), relative_disagreement(outputs), embedding, anchors)
                parts.append([t.numpy() for t in found])
        joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
        names = ("quantiles", "disagreement", "embedding", "anchors")
        return dict(zip(names, joined, strict=True))

    def predicted(self) -> Bools:
        """True for the validation pixels of `predict`: with dates before and after the cut (N)."""
        valid, _, _, _, known = cut(
            self.validation,
            np.full(len(self.validation), SCORED_CUT),
            self.config.window.steps,
            self.config.window.step_days,
            self.config.horizon,
        )
        return _usable(valid, known)

    def outputs(self, graph: Any) -> Outputs:  # noqa: ANN401  # a graph, or its file in its place
        """Quantiles on the validation places, with the observed targets."""
        return self.outputs_of(*self.predict(graph))

    def outputs_of(self, quantiles: NDArray[Any], target: NDArray[Any], known: Bools) -> Outputs:
        """Quantiles (N, H, S, Q) on the validation places, with the observed targets (N, H, S)."""
        places = self.validation.places[self.predicted()]
        return {"quantiles": quantiles, "target": target, "known": known, "places": places}

    def probe(self, graph: PixelGraph, protocol: str) -> Outputs:
        """Medians by a regression on embeddings of the frozen encoder, one regression per step."""
        bare = headless(graph)
        earlier = copy.copy(self)
        earlier.validation = self.train.take(self.scored)
        train, ahead, seen = earlier.predict(bare)
        rest, target, known = self.predict(bare)
        steps = [
            regressed(protocol, train[rows], ahead[rows, step], rest)
            for step in range(ahead.shape[1])
            for rows in (seen[:, step].all(axis=1),)
        ]
        median = np.stack(steps, axis=1).astype(np.float32)
        return self.outputs_of(median[..., None], target, known)

    def real_inputs(self) -> Inputs:
        """Validation series that share their dates."""
        return shared_dates(self.validation)

    def typical_inputs(self) -> list[Inputs]:
        """Training series in sets that share their dates; empty for a baseline's network."""
        # The accuracy of the baselines' networks in int8 has not been measured.
        return typical_dates(self.train) if self.config.network == "pimc" else []

    def card_shape(self) -> dict[str, Any]:
        """The fields of a card that follow from the configuration."""
        return {
            **pixel_shape(self.config),
            # A graph's inputs are given by position, and `elsewhere` comes after `day_of_year`.
            "elsewhere": self.config.encoder.calendar,
            "task": "forecast",
            "horizon": self.config.horizon,
            "quantiles": self.config.quantiles,
        }

    def data(self) -> list[dict[str, Any]]:
        """Name, use and number of samples of each source."""
        return samples_by_source({"series": self.train, "validation": self.validation})


def series_sets(
    data: Path, romania: Path | None = None, public: Path | None = None
) -> list[PixelSet]:
    """Every series that may be trained on, labelled or not: forecasts need no labels.

    Args:
        data: folder of the data sets.
        romania: path of the Romania cube; None leaves it out.
        public: folder of the files of `training.datasets.public`; None leaves them out.
    """
    scenes = [(read_stack(data / folder), region) for folder, region in _STACKS.items()]
    if romania:
        scenes.append((read_romania(romania), "romania"))
    return [
        *us_regions(crops_us_2021(data / "crops_us_2021")[0]),
        *s2_points(data / "s2_points"),
        *modis_brazil(data / "modis_brazil"),
        *victoria_2018(data / "victoria_2018"),
        *(pixels for scene, region in scenes for pixels in _pixels(scene, region)),
        *further_series(data, public),
    ]


def _pixels(scene: Scene, region: str) -> Iterator[PixelSet]:
    """Every second row and column of a stack as series; its northern rows are for validation."""
    thin = scene.crop(slice(None, None, _STRIDE), slice(None, None, _STRIDE))
    for place, part in enumerate(split_north(thin, _NORTH)):
        yield replace(part.pixels(BANDS, place), region=region)


def _usable(valid: Bools, known: Bools) -> Bools:
    """True for series with usable dates before and after the cut (N)."""
    return np.asarray(valid.any(axis=1) & known.any(axis=(1, 2)))


def cut(
    table: SeriesTable, positions: Ints, steps: int, step_days: int, horizon: int
) -> tuple[Bools, Floats, Floats, Floats, Bools]:
    """Cut series into input and target.

    The regular grid ends on the last date before the cut. A target is the clear observation
    nearest to its step, unknown where none is within half a step.

    Args:
        table: N series.
        positions: number of dates of each series before its cut (N), at least 1.
        steps: M.
        step_days: days between steps.
        horizon: H.

    Returns:
        valid (N, T) up to the cut; days (N, T) since the grid's first day; day_of_year (N) of
        that day; targets (N, H, S), index units; known (N, H, S).
    """
    rows = np.arange(len(table))
    last = table.days[rows, positions - 1]
    origin = last - (steps - 1) * step_days
    days = table.days - origin[:, None]
    before = np.arange(table.days.shape[1]) < positions[:, None]
    valid = table.valid & before & (days >= 0)
    ahead = (steps - 1 + np.arange(1, horizon + 1)) * step_days
    gap = np.abs(days[:, None, :] - ahead[None, :, None])
    gap = np.where((table.valid & ~before)[:, None], gap, np.inf)
    nearest = gap.argmin(axis=2)
    near = np.take_along_axis(gap, nearest[..., None], axis=2)[..., 0] <= step_days / 2
    target = table.indices[rows[:, None], nearest]
    known = np.broadcast_to(near[..., None], target.shape).copy()
    day_of_year = ordinal_day_of_year(table.first_day + origin.astype(np.int64))
    return valid, days.astype(np.float32), day_of_year, target, known


def forecast_scores(quantiles: Floats, target: Floats, known: Bools) -> dict[str, Any]:
    """RMSE of the median by index, their mean, and the coverage of the outer quantiles.

    Args:
        quantiles: (N, H, S, Q), index units.
        target: (N, H, S).
        known: True where the target counts (N, H, S).
    """
    error = quantiles[..., quantiles.shape[-1] // 2] - target
    rmse = {
        name: float(np.sqrt(np.square(error[..., i][known[..., i]]).mean()))
        for i, name in enumerate(INDICES)
    }
    inside = (target >= quantiles[..., 0]) & (target <= quantiles[..., -1])
    return {
        "n": int(known[..., 0].sum()),
        "rmse": {name: round(value, 4) for name, value in rmse.items()},
        "rmse_mean": round(float(np.mean(list(rmse.values()))), 4),
        "coverage": round(float(inside[known].mean()), 4),
    }
