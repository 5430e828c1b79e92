"""Land-cover task: classes of patches of imagery, trained on EuroSAT and labelled level 2A."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from models.card import LegendClass
from models.encoders import EfficientNetLite0, PatchEncoder
from models.graph import PatchGraph
from models.heads import ClassificationHead
from training.augment import augment_patches
from training.calibration import cross_fitted_scores, fit_temperature
from training.config import AnyPatchEncoderConfig, LandcoverConfig, PatchEncoderConfig
from training.datasets.eurosat import CLASSES, RGB, eurosat_ms, eurosat_rgb
from training.datasets.level2a import LabelledArea, draw_weights, joined, labelled_areas
from training.errors import TrainingError
from training.losses import cross_entropy
from training.probe import headless, probed_classes
from training.task import Inputs, Outputs

Floats = NDArray[np.float32]
_BATCH = 256
_COLORS = {
    "AnnualCrop": "#f5c542",
    "Forest": "#1b6b2f",
    "HerbaceousVegetation": "#a8c66c",
    "Highway": "#4d4d4d",
    "Industrial": "#8e44ad",
    "Pasture": "#d4e157",
    "PermanentCrop": "#c77b30",
    "Residential": "#e74c3c",
    "River": "#4fa3e0",
    "SeaLake": "#0b4f9c",
}


class NoLabelledArea(TrainingError):
    """A share of level 2A is configured, but the data have no labelled area of it."""


class PatchClassification:
    """EuroSAT's ten classes from red, green and blue.

    Args:
        config: the configuration.
        data: folder of the data sets.
        everything: whether the validation patches are trained on too.
        left_out: areas of level 2A that are not trained on; their patches are in `left_out`.
        romania: path of the Romania cube of the wheel nrt 0.2.1; None leaves it out.

    Raises:
        NoLabelledArea: the configuration takes a share of level 2A, and none is there.
    """

    has_linear_head = True

    def __init__(
        self,
        config: LandcoverConfig,
        data: Path,
        *,
        everything: bool = False,
        left_out: Sequence[str] = (),
        romania: Path | None = None,
    ) -> None:
        self.config = config
        self.patches = eurosat_rgb(data / "eurosat")
        self.geotiffs = data / "eurosat" / "ms_sample"
        if self.patches.labels is None or self.patches.legend is None:
            raise ValueError(f"{self.patches.source} has no labels")
        self.labels = self.patches.labels
        self.legend = self.patches.legend
        self.train = np.flatnonzero(~self.patches.validation | everything)
        self.validation = np.flatnonzero(self.patches.validation)
        self._finished: tuple[PatchGraph, Floats] | None = None
        areas = labelled_areas(data, romania) if config.level_2a else []
        self.regions = tuple(area.name for area in areas)
        away = [area for area in areas if area.name in left_out]
        near = [area for area in areas if area.name not in left_out]
        if config.level_2a and not near:
            raise NoLabelledArea(
                f"level_2a is {config.level_2a}, but {data} has no labelled area of level 2A left: "
                "give --romania or --set level_2a=0"
            )
        self.left_out = joined(away) if away else None
        self.areas = joined(near) if near else None
        self._draws = draw_weights(near) if near else None

    def graph(self) -> PatchGraph:
        """A new, untrained graph."""
        shapes = (self.config.encoder, *self.config.others)
        (encoder, head), *others = [self._network(shape) for shape in shapes]
        graph = PatchGraph(encoder=encoder, head=head, others=others, views=self.config.views)
        # Channels last: training is a third faster on a CPU, and tensor cores need this layout.
        for weight in graph.parameters():
            if weight.ndim == 4:
                weight.data = weight.contiguous(memory_format=torch.channels_last)
        return graph

    def _network(
        self, shape: AnyPatchEncoderConfig
    ) -> tuple[PatchEncoder | EfficientNetLite0, ClassificationHead]:
        encoder: PatchEncoder | EfficientNetLite0
        if isinstance(shape, PatchEncoderConfig):
            encoder = PatchEncoder(bands=len(RGB), **shape.model_dump())
        else:
            encoder = EfficientNetLite0(bands=len(RGB), zoom=shape.zoom, dropout=shape.dropout)
        return encoder, ClassificationHead(encoder.embedding, len(self.legend))

    @property
    def steps(self) -> int:
        """Number of batches per epoch."""
        return int(len(self.train) * self.config.drawn) // self.config.optimisation.batch

    def batches(self, epoch: int, rng: Generator) -> Iterator[tuple[Tensor, ...]]:
        """Augmented patches (N, C, P, P) and soft labels (N, K)."""
        how = self.config
        small = epoch < how.small_epochs * how.optimisation.epochs
        order = (
            rng.choice(self.train, len(self.train), p=self._weights())
            if how.balance
            else rng.permutation(self.train)
        )
        own = how.optimisation.batch - round(how.level_2a * how.optimisation.batch)
        for i in range(self.steps):
            chosen = order[i * own : (i + 1) * own]
            patches = augment_patches(self.read(chosen), how.augmentation, rng)
            labels = self.labels[chosen]
            if self.areas is not None:
                more = rng.choice(
                    len(self.areas.labels), how.optimisation.batch - own, p=self._draws
                )
                surface = replace(how.augmentation, clear=0.0)
                seen = augment_patches(self.areas.values[more], surface, rng)
                patches = np.concatenate([patches, seen])
                labels = np.concatenate([labels, self.areas.labels[more]])
            if small:
                patches = _cut(patches, how.small_patch, rng)
            target = np.eye(len(self.legend), dtype=np.float32)[labels]
            if rng.random() < how.mix:
                patches, target = cut_mix(patches, target, rng)
            yield torch.from_numpy(patches), torch.from_numpy(target)

    def _weights(self) -> NDArray[np.float64]:
        """Probability that each training patch is drawn (N)."""
        labels = self.labels[self.train]
        weights = np.bincount(labels)[labels] ** -self.config.balance
        return np.asarray(weights / weights.sum())

    def loss(self, graph: PatchGraph, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross entropy of the networks, with soft labels."""
        patches, target = batch
        logits = graph.each(patches.contiguous(memory_format=torch.channels_last))
        return cross_entropy(logits, target, self.config.smoothing)

    def finish(self, graph: PatchGraph) -> None:
        """Fit the temperature on the validation patches."""
        if graph.head is None:
            raise TypeError("a classifier without a head has no temperature")
        logits = self.logits(graph)
        graph.head.temperature.fill_(fit_temperature(logits, self.labels[self.validation]))
        # `scores` is called next on the same logits, which take minutes to compute on a CPU.
        self._finished = graph, logits

    def scores(self, graph: PatchGraph) -> dict[str, Any]:
        """Accuracy and calibration on the validation patches, as JPEGs and as GeoTIFFs."""
        finished = self._finished
        scores = cross_fitted_scores(
            finished[1] if finished and finished[0] is graph else self.logits(graph),
            self.labels[self.validation],
            self.patches.places[self.validation],
        )
        if self.geotiffs.is_dir():
            raw = eurosat_ms(self.geotiffs, self.geotiffs.parent)
            chosen = np.flatnonzero(raw.validation)
            predicted = _raw(graph, raw.values[chosen]).argmax(axis=1)
            right = raw.labels is not None and predicted == raw.labels[chosen]
            scores["geotiffs"] = {"n": len(chosen), "accuracy": round(float(np.mean(right)), 4)}
        return scores

    def logits(self, graph: PatchGraph) -> Floats:
        """Logits of the validation patches (N, K)."""
        return patch_outputs(graph, self.validation, self.read)

    def outputs(self, graph: Any) -> Outputs:  # noqa: ANN401  # a graph, or its file in its place
        """Logits of the validation patches, with their labels."""
        return self.outputs_of(self.logits(graph))

    def area_outputs(self, graph: PatchGraph, area: LabelledArea) -> Outputs:
        """Logits of an area's patches (N, K), with their labels, places and seasons."""
        return {
            "logits": patch_outputs(graph, np.arange(len(area.values)), area.values.__getitem__),
            "labels": area.labels,
            "places": area.places,
            "seasons": area.seasons,
        }

    def outputs_of(self, logits: NDArray[Any]) -> Outputs:
        """Logits of the validation patches (N, K), with their labels."""
        chosen = self.validation
        places = self.patches.places[chosen]
        return {"logits": logits, "labels": self.labels[chosen], "places": places}

    def embeddings(self, graph: PatchGraph, *, training: bool) -> tuple[Floats, NDArray[np.int64]]:
        """Embeddings (N, D) and labels (N) of the training or of the validation patches."""
        bare = headless(graph)
        chosen = self.train if training else self.validation
        return patch_outputs(bare, chosen, self.read), self.labels[chosen]

    def probe(self, graph: PatchGraph, protocol: str) -> Outputs:
        """Outputs of a probe of the frozen encoder."""
        return probed_classes(self, graph, protocol)

    def real_inputs(self) -> Inputs:
        """Some validation patches."""
        return {"patches": self.read(self.validation[:64])}

    def typical_inputs(self) -> list[Inputs]:
        """Empty: ONNX Runtime's int8 convolutions are not faster than those in float32."""
        return []

    def card_shape(self) -> dict[str, Any]:
        """The fields of a card that follow from the configuration and the legend."""
        return {
            "task": "landcover",
            "modality": "patch",
            "bands": RGB,
            "patch": self.config.patch,
            "min_observations": 1,
            "classes": tuple(
                LegendClass(value=i, name=name, color=_COLORS[name])
                for i, name in enumerate(CLASSES)
            ),
        }

    def data(self) -> list[dict[str, Any]]:
        """Name, use and number of samples of each source."""
        return [
            {"name": "eurosat", "use": "labels", "n": len(self.train)},
            {"name": "eurosat", "use": "validation", "n": len(self.validation)},
            *(
                {"name": name, "use": "labels, level 2A", "n": n}
                for name, n in (self.areas.sources if self.areas else {}).items()
            ),
        ]

    def read(self, chosen: NDArray[np.int64]) -> Floats:
        """Reflectance of patches (N, C, P, P)."""
        scale = np.float32(self.patches.scale)
        return self.patches.values[chosen].astype(np.float32) * scale


def patch_outputs(
    graph: Any,  # noqa: ANN401  # a graph, or its file in its place
    chosen: NDArray[np.int64],
    read: Callable[[NDArray[np.int64]], Floats],
) -> Floats:
    """Raw outputs of a graph for patches, in evaluation mode, batch by batch.

    Args:
        graph: the trained graph, or its ONNX file.
        chosen: positions of the patches (N), at least one.
        read: gives reflectance (n, C, P, P) of some positions (n).

    Returns:
        The graph's raw outputs (N, K).
    """
    parts = np.array_split(chosen, -(-len(chosen) // _BATCH))
    return np.concatenate([_raw(graph, read(part)) for part in parts])


def _raw(graph: Any, patches: NDArray[Any]) -> Floats:  # noqa: ANN401 - as `patch_outputs`
    """Raw outputs (N, K) of patches of reflectance."""
    graph.eval()
    with torch.inference_mode():
        return np.asarray(graph.raw(torch.from_numpy(patches)).numpy())


def _cut(patches: Floats, side: int, rng: Generator) -> Floats:
    """A random square of `side` x `side` pixels, at the same position of all patches of a batch."""
    row, col = rng.integers(patches.shape[-1] - side + 1, size=2)
    return np.ascontiguousarray(patches[:, :, row : row + side, col : col + side])


def cut_mix(patches: Floats, target: Floats, rng: Generator) -> tuple[Floats, Floats]:
    """Exchange a rectangle between patches, and its share of their labels.

    Yun et al. 2019, arXiv 1905.04899.

    Args:
        patches: patches of reflectance (N, C, P, P).
        target: soft labels (N, K).
        rng: random generator.

    Returns:
        The mixed patches and labels, new arrays.
    """
    other = rng.permutation(len(patches))
    side = patches.shape[-1]
    height, width = np.round(side * np.sqrt(rng.uniform(0.0, 0.6)) * np.ones(2)).astype(int)
    row, col = rng.integers(side - height + 1), rng.integers(side - width + 1)
    mixed = patches.copy()
    mixed[:, :, row : row + height, col : col + width] = patches[
        other, :, row : row + height, col : col + width
    ]
    share = np.float32(height * width / side**2)
    return mixed, (1 - share) * target + share * target[other]
