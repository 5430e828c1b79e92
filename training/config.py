"""What a training run is told: frozen configurations, and those of the zoo's bundles.

A configuration is stored with its checkpoints and in the card, so a bundle can be made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.card import TimeWindow
from training.augment import PatchAugmentation

FinetuneTask = Literal["classify", "forecast", "landcover"]
BANDS = ("B02", "B04", "B08")
INDICES = ("ndvi", "evi", "savi")
QUANTILES = (0.1, 0.5, 0.9)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PixelEncoderConfig(_Frozen):
    """The arguments of `models.encoders.PixelEncoder` that are chosen, not derived."""

    width: int = 64
    depth: int = 1
    embedding: int = 256
    dropout: float = 0.3
    plots: bool = True
    series: bool = True
    threshold: float | None = None
    plot_dropout: float = 0.0
    calendar: bool = False


class PatchEncoderConfig(_Frozen):
    """The arguments of `models.encoders.PatchEncoder` that are chosen, not derived."""

    width: int = 24
    depths: tuple[int, ...] = (0, 1, 1, 1)
    embedding: int = 256
    dropout: float = 0.2


class Optimisation(_Frozen):
    """How the weights are found: AdamW under a one-cycle schedule, averaged."""

    epochs: Annotated[int, Field(ge=1)] = 20
    batch: Annotated[int, Field(ge=2)] = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warm_up: float = 0.1
    """Share of the steps in which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    average: float = 0.99
    """Decay of the exponential moving average of the weights, which is what is exported."""
    seed: int = 0


class ClassifyConfig(_Frozen):
    """A classifier of pixels."""

    task: Literal["classify"] = "classify"
    name: str
    legend: Literal["cdl", "worldcover"]
    """Which classes: those of the US crops, or the broad ones."""
    window: TimeWindow
    min_observations: int
    encoder: PixelEncoderConfig = PixelEncoderConfig()
    optimisation: Optimisation = Optimisation()
    smoothing: float = 0.05
    """Label smoothing."""
    balance: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Classes are drawn in proportion to their size to the power 1 - balance."""
    labels: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the labelled training pixels used, drawn by place."""


class ForecastConfig(_Frozen):
    """A forecaster of spectral indices."""

    task: Literal["forecast"] = "forecast"
    name: str
    window: TimeWindow
    min_observations: int
    horizon: int = 10
    quantiles: tuple[float, ...] = QUANTILES
    encoder: PixelEncoderConfig = PixelEncoderConfig(calendar=True)
    optimisation: Optimisation = Optimisation()
    focus: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.65
    """Share of the batches' pixels that come from the source that is scored."""
    squared: float = 1.0
    """Weight of the squared error of the median beside the pinball loss."""


class LandcoverConfig(_Frozen):
    """A classifier of patches of imagery."""

    task: Literal["landcover"] = "landcover"
    name: str
    patch: int = 64
    encoder: PatchEncoderConfig = PatchEncoderConfig()
    optimisation: Optimisation = Optimisation(epochs=18, batch=128, learning_rate=3e-3)
    smoothing: float = 0.05
    small_patch: int = 48
    """Side of the patches of the first epochs: cheaper, and another augmentation."""
    small_epochs: Annotated[float, Field(ge=0.0, le=1.0)] = 0.7
    """Share of the epochs on small patches."""
    mix: float = 0.25
    """Share of the batches in which parts of patches are exchanged (CutMix)."""
    symmetries: bool = True
    """Whether the answer is the mean over the eight symmetries of a patch."""
    augmentation: PatchAugmentation = PatchAugmentation(
        gain=0.12, band_gain=0.06, offset=0.006, noise=0.002
    )


FinetuneConfig = Annotated[
    ClassifyConfig | ForecastConfig | LandcoverConfig, Field(discriminator="task")
]


class Run(_Frozen):
    """One run: what is trained, from what, on which data."""

    config: FinetuneConfig
    data: Path
    """Folder of the data sets."""
    pretrained: Path | None = None
    """Checkpoint whose encoder the run starts from; None starts from scratch."""
    everything: bool = False
    """Whether the validation places are trained on too; such a run can report no score."""


# The zoo's bundles that finetuning makes. `python -m training finetune <name>` trains one.
ZOO: dict[str, ClassifyConfig | ForecastConfig | LandcoverConfig] = {
    config.name: config
    for config in (
        ClassifyConfig(
            name="pixels-crops-us",
            legend="cdl",
            window=TimeWindow(steps=36, step_days=10, start="calendar-year"),
            min_observations=6,
            encoder=PixelEncoderConfig(plot_dropout=0.4),
            optimisation=Optimisation(epochs=24),
        ),
        ClassifyConfig(
            name="pixels-landcover",
            legend="worldcover",
            window=TimeWindow(steps=36, step_days=10, start="fullest-year"),
            min_observations=4,
            encoder=PixelEncoderConfig(plot_dropout=0.4),
            optimisation=Optimisation(epochs=20),
            balance=0.4,
        ),
        ForecastConfig(
            name="forecast-vi",
            window=TimeWindow(steps=32, step_days=10, start="last-steps"),
            min_observations=6,
            encoder=PixelEncoderConfig(calendar=True, plot_dropout=0.3, dropout=0.1),
            optimisation=Optimisation(epochs=16),
        ),
        LandcoverConfig(name="landcover-eurosat"),
    )
}


def difference(
    base: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Settings of `other` that differ from `base`, the seed and the name apart, by dotted name."""
    changes: dict[str, Any] = {}
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            changes |= difference(base[key], value, f"{prefix}{key}.")
        elif key not in {"seed", "name"} and base.get(key) != value:
            changes[prefix + key] = value
    return changes
