"""Pixel classification task: classes of pixel series, trained on labelled points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from models.card import TimeWindow
from models.graph import PixelGraph
from models.heads import ClassificationHead
from models.indices import SpectralIndices
from training.augment import through_air
from training.calibration import cross_fitted_scores, fit_temperature
from training.config import ClassifyConfig
from training.datasets.synthetic_ground import SYNTHETIC
from training.legends import CDL, WORLDCOVER, crop_sets, landcover_sets, legend_classes
from training.losses import cross_entropy
from training.networks import pixel_graph, pixel_shape
from training.probe import headless, probed_classes
from training.series import (
    SeriesAugmentation,
    SeriesTable,
    any_year,
    augment_series,
    computable,
    other_hemisphere,
    samples_by_source,
    series_outputs,
    shared_dates,
    tabulate,
    typical_dates,
    usable_first,
)
from training.task import Inputs, Outputs

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_LEGENDS = {"cdl": CDL, "worldcover": WORLDCOVER}
# The broad classifier must work on monthly, ten-day and five-day series with thin cloud.
_AUGMENTATION = {
    "cdl": SeriesAugmentation(),
    "worldcover": SeriesAugmentation(drop=0.7, gap=0.15, jitter=4.0, gain=0.08, haze=0.04),
}
# Share of the pixels of real imagery that are seen through the air, as at level 1C.
_THROUGH_AIR = {"cdl": 0.0, "worldcover": 0.05}
# Share of the training pixels moved to the other hemisphere: nearly all labels are northern.
_OTHER_HEMISPHERE = 0.15


class PixelClassification:
    """Classes of pixels by their series.

    Args:
        config: the configuration.
        data: folder of the data sets.
        everything: whether the validation places are trained on too.
        left_out: regions excluded from training; all their labelled pixels are in the table
            `left_out`.
    """

    has_linear_head = True

    def __init__(
        self,
        config: ClassifyConfig,
        data: Path,
        *,
        everything: bool = False,
        left_out: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.legend = _LEGENDS[config.legend]
        sets = crop_sets(data) if config.legend == "cdl" else landcover_sets(data)
        self.spectral = SpectralIndices(config.indices, config.bands)
        table = tabulate(sets, config.window, least=config.min_observations, spectral=self.spectral)
        self.table = table.take(table.labels >= 0)
        self.regions = tuple(name for name in table.regions if name != SYNTHETIC)
        away = self.table.in_regions(left_out)
        self.left_out = self.table.take(away)
        self.validation = self.table.take(self.table.validation & ~away)
        chosen = np.flatnonzero((~self.table.validation | everything) & ~away)
        self.train = self.table.take(_share(chosen, self.table.places, config))
        self.adjustment = torch.from_numpy(
            config.adjust * log_shares(self.train, self._weights(), len(self.legend))
        )

    def graph(self) -> PixelGraph:
        """A new, untrained graph."""
        return pixel_graph(self.config, lambda d: ClassificationHead(d, len(self.legend)))

    @property
    def steps(self) -> int:
        """Number of batches per epoch."""
        return max(len(self.train) // self.config.optimisation.batch, 8)

    def batches(self, epoch: int, rng: Generator) -> Iterator[tuple[Tensor, ...]]:  # noqa: ARG002  # the same in every epoch
        """Augmented series and their classes: values, valid, days, labels."""
        how, air = _AUGMENTATION[self.config.legend], _THROUGH_AIR[self.config.legend]
        weights = self._weights()
        batch = self.config.optimisation.batch
        order = (
            rng.choice(len(self.train), self.steps * batch, p=weights)
            if self.config.balance or self.config.regions or len(self.train) < self.steps * batch
            else rng.permutation(len(self.train))
        )
        for i in range(self.steps):
            part = self.train.take(order[i * batch : (i + 1) * batch])
            values, valid, days = part.values, part.valid, part.days
            if self.config.mix:
                values, valid = mix_pixels(part, values, valid, self.config.mix, rng)
            if self.config.window.start == "fullest-year":
                valid, days = any_year(valid, days, rng, least=how.least)
            elif self.config.window.yearly:
                days = other_hemisphere(days, _OTHER_HEMISPHERE, rng)
            values, valid, days = augment_series(values, valid, days, how, rng)
            if air:
                # Built-up and barren land of the synthetic ground differ in brightness alone, which
                # the air would hide.
                real = ~part.in_regions([SYNTHETIC])
                risen = real & (rng.random(len(part)) < air)
                values[risen] = through_air(values[risen], self.config.bands, rng)
            rows = computable(values, valid, self.spectral)
            arrays = *usable_first(values, valid, days), part.labels
            yield tuple(torch.from_numpy(a[rows]) for a in arrays)

    def _weights(self) -> NDArray[np.float64]:
        return sampling_weights(self.train, self.config.balance, self.config.regions)

    def loss(self, graph: PixelGraph, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross entropy of the networks."""
        *inputs, labels = batch
        adjustment = self.adjustment.to(labels.device)
        adjusted = [logits + adjustment for logits in graph.each(*inputs)]
        return cross_entropy(adjusted, labels, self.config.smoothing)

    def finish(self, graph: PixelGraph) -> None:
        """Fit the temperature on the validation places."""
        logits = self.logits(graph, self.validation)
        if not isinstance(graph.head, ClassificationHead):
            raise TypeError("a classifier without a head has no temperature")
        graph.head.temperature.fill_(fit_temperature(logits, self.validation.labels))

    def scores(self, graph: PixelGraph) -> dict[str, Any]:
        """Accuracy and calibration on the validation places, by source too if there are several."""
        table, logits = self.validation, self.logits(graph, self.validation)
        scores = cross_fitted_scores(logits, table.labels, table.places)
        for i, source in enumerate(table.sources):
            part = table.source == i
            if part.any() and not part.all():
                scores[source] = cross_fitted_scores(
                    logits[part], table.labels[part], table.places[part]
                )
        return scores

    def logits(self, graph: PixelGraph, table: SeriesTable) -> Floats:
        """Logits of a table's pixels (N, K), each in the time window of the card's rule."""
        valid = in_window(table, self.config.window)
        return series_outputs(graph, table.values, valid, table.days)

    def outputs(self, graph: Any) -> Outputs:  # noqa: ANN401  # a graph, or its file in its place
        """Logits of the validation places, with their labels."""
        return self.outputs_of(self.logits(graph, self.validation))

    def outputs_of(self, logits: NDArray[Any]) -> Outputs:
        """Logits of the validation places (N, K), with their labels."""
        table = self.validation
        return {"logits": logits, "labels": table.labels, "places": table.places}

    def embeddings(self, graph: PixelGraph, *, training: bool) -> tuple[Floats, Ints]:
        """Embeddings (N, D) and labels (N) of the training or of the validation places."""
        table = self.train if training else self.validation
        return self.logits(headless(graph), table), table.labels

    def probe(self, graph: PixelGraph, protocol: str) -> Outputs:
        """Outputs of a probe of the frozen encoder."""
        return probed_classes(self, graph, protocol)

    def real_inputs(self) -> Inputs:
        """Validation pixels that share their dates."""
        return shared_dates(self.validation)

    def typical_inputs(self) -> list[Inputs]:
        """Training pixels in sets that share their dates; empty for a baseline's network."""
        # The accuracy of the baselines' networks in int8 has not been measured.
        return typical_dates(self.train) if self.config.network == "pimc" else []

    def card_shape(self) -> dict[str, Any]:
        """The fields of a card that follow from the configuration and the legend."""
        return {
            **pixel_shape(self.config),
            "task": "classify-pixels",
            "classes": legend_classes(self.legend),
        }

    def data(self) -> list[dict[str, Any]]:
        """Name, use and number of samples of each source."""
        return samples_by_source({"labels": self.train, "validation": self.validation})


def in_window(table: SeriesTable, window: TimeWindow) -> NDArray[np.bool_]:
    """True for usable dates within each pixel's time window, which begins on day 0 (N, T).

    A pixel without a usable date in the window keeps all its usable dates, so that it is still
    scored.
    """
    length = np.inf if window.yearly else window.steps * window.step_days
    inside = table.valid & (table.days >= 0) & (table.days < length)
    empty = ~inside.any(axis=1, keepdims=True)
    return np.where(empty, table.valid, inside)


def sampling_weights(
    table: SeriesTable, balance: float, regions: float = 0.0
) -> NDArray[np.float64]:
    """Probability that each pixel is drawn (N).

    A class of one source is drawn in proportion to its size to the power 1 - balance: 0 keeps the
    frequencies of the data, 1 draws all classes and sources equally often. `regions` is the same
    exponent for regions.
    """
    cells = table.labels * len(table.sources) + table.source
    _, cell, sizes = np.unique(cells, return_inverse=True, return_counts=True)
    pixels = np.bincount(table.region, minlength=len(table.regions)).astype(np.float64)
    weights = sizes[cell] ** -balance * pixels[table.region] ** -regions
    return np.asarray(weights / weights.sum())


def log_shares(table: SeriesTable, weights: NDArray[np.float64], classes: int) -> Floats:
    """Logarithm of each class's share of the draws (K); 0 for a class that does not occur."""
    shares = np.bincount(table.labels, weights, minlength=classes)
    return np.log(np.where(shares > 0, shares, 1.0)).astype(np.float32)


def mix_pixels(
    part: SeriesTable, values: Floats, valid: Bools, share: float, rng: Generator
) -> tuple[Floats, Bools]:
    """Put a second cover into some pixels, by up to half of their area.

    Reflectance is linear in the areas. Mixed are pixels of one set (the same source and the same
    dates) on dates that both have; a pixel left with fewer than half its dates stays as it was.

    Args:
        part: the pixels (N), for their source and days.
        values: reflectance (N, T, C).
        valid: True where usable (N, T).
        share: share of the pixels that are mixed, 0 to 1.
        rng: random generator.

    Returns:
        values and valid, new arrays. The labels stay valid, because a pixel's own cover keeps the
        larger part.
    """
    other = rng.permutation(len(values))
    both = valid & valid[other]
    alike = (part.days == part.days[other]).all(axis=1) & (part.source == part.source[other])
    enough = 2 * both.sum(axis=1) >= valid.sum(axis=1)
    mixed = alike & enough & (rng.random(len(values)) < share)
    area = rng.uniform(0.0, 0.5, (len(values), 1, 1)).astype(np.float32)
    blend = (1 - area) * values + area * values[other]
    return (
        np.where(mixed[:, None, None], blend, values),
        np.where(mixed[:, None], both, valid),
    )


def _share(chosen: Ints, places: Ints, config: ClassifyConfig) -> Ints:
    """The first share of the chosen pixels, place by place in random order."""
    if config.labels == 1.0:
        return chosen
    rng = np.random.default_rng(config.optimisation.seed)
    order = rng.permutation(places.max() + 1)
    ranked = chosen[np.argsort(order[places[chosen]], kind="stable")]
    return np.asarray(ranked[: max(round(config.labels * len(chosen)), 1)])
