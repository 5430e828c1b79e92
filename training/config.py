"""Training configurations, as frozen values, and those of the zoo's bundles.

A configuration is stored in checkpoints and in the card, so that a bundle can be reproduced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from models.card import TimeWindow
from training.augment import PatchAugmentation
from training.errors import TrainingError

FinetuneTask = Literal["classify", "forecast", "landcover"]
Network = Literal["pimc", "tempcnn", "mlp"]
"""The PIMC encoder, or a baseline in its place: see `training.baselines`."""
Protocol = Literal["finetune", "linear", "knn"]
"""`finetune` trains all weights; `linear` and `knn` freeze the encoder and probe its embeddings."""
BANDS = ("B02", "B04", "B08")
INDICES = ("ndvi", "evi", "savi")
QUANTILES = (0.1, 0.5, 0.9)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PixelEncoderConfig(_Frozen):
    """The arguments of `models.encoders.PixelEncoder` that are chosen, not derived."""

    width: int = 64
    depths: tuple[int, int, int] = (1, 1, 1)
    embedding: int = 256
    dropout: float = 0.3
    plots: bool = True
    series: bool = True
    threshold: float | Literal["point", "distance"] | None = None
    percentage: float = 10.0
    plot_dropout: float = 0.0
    calendar: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_depth(cls, stored: Any) -> Any:  # noqa: ANN401 - whatever was stored
        """Accept the form of earlier versions: one depth for all levels."""
        if isinstance(stored, dict) and "depth" in stored:
            rest = {name: value for name, value in stored.items() if name != "depth"}
            return {**rest, "depths": (stored["depth"],) * 3}
        return stored


class PatchEncoderConfig(_Frozen):
    """The arguments of `models.encoders.PatchEncoder` that are chosen, not derived."""

    width: int = 24
    depths: tuple[int, ...] = (0, 1, 1, 1)
    embedding: int = 256
    dropout: float = 0.2
    contrast: bool = False
    stride: Annotated[int, Field(ge=1, le=2)] = 2


class EfficientNetLite0Config(_Frozen):
    """The arguments of `models.encoders.EfficientNetLite0` that are chosen, not derived."""

    network: Literal["efficientnet-lite0"] = "efficientnet-lite0"
    zoom: Annotated[float, Field(ge=1.0, le=4.0)] = 2.0
    dropout: float = 0.2


AnyPatchEncoderConfig = PatchEncoderConfig | EfficientNetLite0Config


class Optimisation(_Frozen):
    """Optimisation: AdamW under a one-cycle schedule, weights averaged."""

    epochs: Annotated[int, Field(ge=1)] = 20
    batch: Annotated[int, Field(ge=2)] = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warm_up: float = 0.1
    """Share of the steps in which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    average: float = 0.99
    """Decay of the exponential moving average of the weights, which is exported."""
    bfloat16: bool = False
    """Whether a CPU multiplies in bfloat16: several times faster with AMX, slower on a CPU that
    emulates it. A GPU always uses bfloat16."""
    seed: int = 0
    statistics: Annotated[int, Field(ge=0)] = 0
    """Batches on which batch normalisation is measured again once the weights are averaged. Its
    running mean and variance lag behind the weights; after few epochs of finetuning they are
    still those of the earlier data."""
    keep: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the weights before training in the result, the mean of both networks: a short
    training on other data then costs less of what the network knew (Wortsman et al. 2022, arXiv
    2109.01903). The statistics of batch normalisation are averaged too."""
    stop: Annotated[int, Field(ge=1)] | None = None
    """Epochs after which training ends although the schedule is longer (`epochs`); None trains to
    the end of the schedule. Averaging the weights replaces the rest of the schedule."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Training stops after this many epochs without a better score on the validation places, and
    the best averaged weights are used; None trains to the end. The epoch is then chosen on the
    validation places, which the card states."""


class _Networks(_Frozen):
    """Networks of one shape, trained side by side."""

    members: Annotated[int, Field(ge=1)] = 1
    """Networks whose mean is the prediction, trained side by side."""
    one_network: ClassVar[str] = "members=1"
    """The setting that leaves one network of several."""

    @property
    def networks(self) -> int:
        """Networks that predict together."""
        return self.members


class ClassifyConfig(_Networks):
    """A classifier of pixels."""

    task: Literal["classify"] = "classify"
    name: str
    legend: Literal["cdl", "worldcover"]
    """Legend of the classes: US crops or broad land cover."""
    window: TimeWindow
    min_observations: int
    bands: tuple[str, ...] = BANDS
    indices: tuple[str, ...] = INDICES
    """Names of spectral indices in `models.indices`, of those bands."""
    encoder: PixelEncoderConfig = PixelEncoderConfig()
    optimisation: Optimisation = Optimisation()
    smoothing: float = 0.05
    """Label smoothing."""
    balance: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Classes are drawn in proportion to their size to the power 1 - balance."""
    regions: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """The same exponent for regions: 0 draws regions by their size, 1 all equally often."""
    adjust: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Strength of logit adjustment for class frequency, 0 (none) to 1 (Menon et al. 2021, arXiv
    2007.07314)."""
    mix: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the pixels that are mixed with another pixel of the batch, as two covers share a
    pixel on the ground; the larger part gives the label."""
    labels: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the labelled training pixels used, drawn by place."""
    clarity: Annotated[float, Field(ge=0.0, le=60.0)] = 0.0
    """Decrease of a date's weight with its blue reflectance: see `models.graph.PixelGraph`."""
    reflectance: bool = False
    """Whether the encoders see the bands' reflectance in addition to the indices."""
    network: Network = "pimc"


class ForecastConfig(_Networks):
    """A forecaster of spectral indices."""

    task: Literal["forecast"] = "forecast"
    name: str
    window: TimeWindow
    min_observations: int
    bands: tuple[str, ...] = BANDS
    indices: tuple[str, ...] = INDICES
    horizon: int = 10
    quantiles: tuple[float, ...] = QUANTILES
    encoder: PixelEncoderConfig = PixelEncoderConfig(calendar=True)
    optimisation: Optimisation = Optimisation()
    focus: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.65
    """Share of a batch's pixels from the source that is scored."""
    scored_cut: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Share of those pixels that are cut at the scored date; the others at any date."""
    rough: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the pixels of the other sources that lose many dates and gain thin cloud, as in raw
    stacks."""
    calendar_shift: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the pixels of the other sources whose window gets another first day of the year,
    drawn from the whole year: elsewhere rain and harvest come in other months."""
    squared: float = 1.0
    """Weight of the squared error of the median, added to the pinball loss."""
    clarity: Annotated[float, Field(ge=0.0, le=60.0)] = 0.0
    """As in `ClassifyConfig`."""
    reflectance: bool = False
    """As in `ClassifyConfig`."""
    network: Network = "pimc"


class LandcoverConfig(_Frozen):
    """A classifier of patches of imagery."""

    task: Literal["landcover"] = "landcover"
    name: str
    patch: int = 64
    encoder: AnyPatchEncoderConfig = PatchEncoderConfig()
    others: tuple[AnyPatchEncoderConfig, ...] = ()
    """Encoders of further networks, each with its head; the prediction is the mean. Networks of
    other shapes, or trained differently, err on other patches, so their mean is more accurate."""
    optimisation: Optimisation = Optimisation(epochs=18, batch=128, learning_rate=3e-3)
    imagenet: bool = True
    """Whether an encoder that can starts from ImageNet weights: see `training.imagenet`."""
    smoothing: float = 0.05
    balance: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Classes are drawn in proportion to their size to the power 1 - balance. Above 0, an epoch
    draws patches with replacement."""
    small_patch: int = 48
    """Side of the patches in the first epochs, pixels: cheaper, and an augmentation."""
    small_epochs: Annotated[float, Field(ge=0.0, le=1.0)] = 0.7
    """Share of the epochs on small patches."""
    mix: float = 0.25
    """Share of the batches in which parts of patches are exchanged (CutMix)."""
    level_2a: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each batch from the labelled areas of level 2A (`training.datasets.level2a`), their
    classes alike."""
    drawn: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Length of an epoch, as a share of the training patches."""
    views: Literal[1, 2, 4, 8] = 8
    """Number of a patch's eight symmetries whose mean is the prediction."""
    augmentation: PatchAugmentation = PatchAugmentation(
        gain=0.12, band_gain=0.06, offset=0.006, noise=0.002
    )

    one_network: ClassVar[str] = "others=[]"
    """The setting that leaves one network of several."""

    @property
    def networks(self) -> int:
        """Networks that predict together."""
        return 1 + len(self.others)

    @model_validator(mode="before")
    @classmethod
    def _all_symmetries_or_one(cls, stored: Any) -> Any:  # noqa: ANN401 - whatever was stored
        """Accept the form of earlier versions: whether all eight symmetries are averaged."""
        if not isinstance(stored, dict) or "symmetries" not in stored:
            return stored
        rest = {name: value for name, value in stored.items() if name != "symmetries"}
        return {**rest, "views": 8 if stored["symmetries"] else 1}

    @model_validator(mode="before")
    @classmethod
    def _of_one_shape(cls, stored: Any) -> Any:  # noqa: ANN401 - whatever was stored
        """Accept the form of earlier versions: a number of networks of one shape."""
        if not isinstance(stored, dict) or "members" not in stored:
            return stored
        rest = {name: value for name, value in stored.items() if name != "members"}
        return {**rest, "others": (stored.get("encoder", {}),) * (stored["members"] - 1)}


FinetuneConfig = Annotated[
    ClassifyConfig | ForecastConfig | LandcoverConfig, Field(discriminator="task")
]


class Run(_Frozen):
    """One run: configuration, checkpoints to start from, data."""

    config: FinetuneConfig
    data: Path
    """Folder of the data sets."""
    pretrained: tuple[Path, ...] = ()
    """Checkpoints that the run starts from: that of a pretraining or an earlier run, or those of
    several earlier runs, whose networks are joined. An empty tuple starts from scratch."""
    everything: bool = False
    """Whether the validation places are trained on too; such a run has no score."""
    protocol: Protocol = "finetune"
    left_out: tuple[str, ...] = ()
    """Regions held out whole; see `training.regions`."""
    romania: Path | None = None
    """The Romania cube of nrt 0.2.1, as series for forecasts; None leaves it out."""
    public: Path | None = None
    """Folder of the files of `training.datasets.public`: series for forecasts, and regions that
    land cover is evaluated on; None leaves them out."""

    @field_validator("pretrained", mode="before")
    @classmethod
    def _several(cls, stored: Any) -> Any:  # noqa: ANN401 - whatever was stored
        """Accept the form of earlier versions: one checkpoint or None."""
        return () if stored is None else (stored,) if isinstance(stored, str | Path) else stored


_CROPS = ClassifyConfig(
    name="pixels-crops-us",
    legend="cdl",
    window=TimeWindow(steps=36, step_days=10, start="calendar-year"),
    min_observations=6,
    encoder=PixelEncoderConfig(width=44, plot_dropout=0.4),
    # Half the width costs no accuracy, and saves enough for three networks instead of one.
    members=3,
    optimisation=Optimisation(epochs=30),
    adjust=0.3,
    reflectance=True,
)
# The zoo's bundles that finetuning makes. `python -m training finetune <name>` trains one.
ZOO: dict[str, ClassifyConfig | ForecastConfig | LandcoverConfig] = {
    config.name: config
    for config in (
        _CROPS,
        _CROPS.model_copy(
            update={
                "name": "pixels-crops-us-20m",
                "bands": (*BANDS, "B05", "B11", "B12"),
                "indices": (*INDICES, "ndrei", "ndmi", "nbr"),
                # Twice as many plots: wider networks would exceed 12 MFLOP per pixel.
                "encoder": PixelEncoderConfig(width=42, plot_dropout=0.4),
                "adjust": 0.45,
            }
        ),
        # A quarter of the cost: one network instead of three, slightly narrower.
        _CROPS.model_copy(
            update={
                "name": "pixels-crops-us-small",
                "encoder": PixelEncoderConfig(width=38, plot_dropout=0.4),
                "members": 1,
            }
        ),
        ClassifyConfig(
            name="pixels-landcover",
            legend="worldcover",
            # Cover is stable from year to year, so dates of all years count.
            window=TimeWindow(steps=36, step_days=10, start="every-date"),
            min_observations=4,
            # No block at the finest level: its products gain the least from int8.
            encoder=PixelEncoderConfig(width=32, depths=(0, 1, 2), plot_dropout=0.4),
            optimisation=Optimisation(epochs=16),
            balance=0.1,
            # Small regions count more than their share of pixels, large ones less.
            regions=0.5,
            mix=0.4,
            # Stacks contain haze and snow that masks miss.
            clarity=15.0,
            reflectance=True,
        ),
        ForecastConfig(
            name="forecast-vi",
            window=TimeWindow(steps=32, step_days=10, start="last-steps"),
            min_observations=6,
            encoder=PixelEncoderConfig(width=44, calendar=True, plot_dropout=0.3, dropout=0.1),
            members=3,
            optimisation=Optimisation(epochs=20),
            focus=0.8,
            scored_cut=0.8,
            reflectance=True,
        ),
        LandcoverConfig(
            name="landcover-eurosat",
            # Two views of 120 pixels a side cost less than 0.5 GFLOP.
            encoder=EfficientNetLite0Config(zoom=1.875),
            views=2,
            optimisation=Optimisation(
                epochs=6,
                batch=64,
                learning_rate=1e-3,
                weight_decay=0.02,
                average=0.99,
                statistics=40,
            ),
            balance=0.5,
            # Two of six epochs on parts of 48 pixels, at half the time.
            small_epochs=0.3,
            mix=0.0,
            # No noise: EuroSAT's forests and water differ in texture by a grey level, and the
            # images are JPEGs, smoother than any with noise. A network trained with noise of one
            # grey level took a third of the forests for water or pasture. `clear`: a fifth of the
            # patches is as level 2A, which is what most stacks hold.
            augmentation=PatchAugmentation(
                crop=0.0, gain=0.1, band_gain=0.01, offset=0.001, noise=0.0, clear=0.2
            ),
        ),
    )
}


def starts_from_imagenet(config: ClassifyConfig | ForecastConfig | LandcoverConfig) -> bool:
    """Whether an encoder has weights of ImageNet before training: see `training.imagenet`."""
    return (
        isinstance(config, LandcoverConfig)
        and config.imagenet
        and any(isinstance(e, EfficientNetLite0Config) for e in (config.encoder, *config.others))
    )


def difference(
    base: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Settings of `other` that differ from `base`, except seed and name, by dotted name.

    A section of another kind, such as an encoder of another network, is one setting: a change of
    its fields alone would name settings that the section of `base` does not have.
    """
    changes: dict[str, Any] = {}
    for key, value in other.items():
        before = base.get(key)
        if isinstance(value, dict) and isinstance(before, dict) and before.keys() == value.keys():
            changes |= difference(before, value, f"{prefix}{key}.")
        elif key not in {"seed", "name"} and base.get(key) != value:
            changes[prefix + key] = value
    return changes


class UnknownSetting(TrainingError):
    """A setting or a name that does not exist."""


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def configuration(
    name: str, task: str | None = None
) -> ClassifyConfig | ForecastConfig | LandcoverConfig:
    """The zoo's configuration of a name, or for a new name the first configuration of a task.

    Raises:
        UnknownSetting: the name is new and no task is given, or it belongs to another task.
    """
    if name in ZOO:
        if task not in {None, ZOO[name].task}:
            raise UnknownSetting(
                f"{name} is a configuration of the task {ZOO[name].task}, not {task}: leave out "
                "--task, or give a new name"
            )
        return ZOO[name]
    for config in ZOO.values():
        if config.task == task:
            return config.model_copy(update={"name": name})
    raise UnknownSetting(
        f"{name} is not one of {', '.join(ZOO)}: give one of these, or --task for a new name"
    )


def changed(config: ConfigT, settings: Sequence[str]) -> ConfigT:
    """A configuration with some settings changed.

    Args:
        config: the configuration to change.
        settings: each `dotted.name=value`, the value in JSON or plain text.

    Raises:
        UnknownSetting: the configuration has no setting of that name, or the value is not valid.
    """
    values: dict[str, Any] = config.model_dump(mode="json")
    for setting in settings:
        name, _, text = setting.partition("=")
        *outer, last = name.split(".")
        place, groups = values, list[str]()
        for key in outer:
            if not isinstance(place.get(key), dict):
                break
            place = place[key]
            groups.append(key)
        if groups != outer or last not in place:
            raise UnknownSetting(
                f"--set {setting}: the configuration has no setting '{name}'; allowed: "
                f"{', '.join('.'.join((*groups, key)) for key in place)}"
            )
        try:
            place[last] = json.loads(text)
        except json.JSONDecodeError:
            place[last] = text
    try:
        return type(config).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UnknownSetting(
            f"--set {where}={first['input']!r} is not valid: {first['msg']}"
        ) from error
