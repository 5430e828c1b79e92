"""Card fields of a run: description, scores, training data and provenance."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.card import CARD_FILE, ModelCard, TrainingData
from training.config import (
    ZOO,
    ClassifyConfig,
    ForecastConfig,
    LandcoverConfig,
    Run,
    configuration,
    difference,
    starts_from_imagenet,
)
from training.errors import TrainingError
from training.finetune import RUN, WEIGHTS, machine
from training.imagenet import IMAGES
from training.licences import (
    LICENCE,
    LICENCE_FROM_IMAGENET,
    pretraining_data,
    sensed,
    training_data,
)
from training.pretrain import CHECKPOINT, FIRST, PretrainConfig
from training.task import Graph, Task

EVALUATION = "evaluation.json"
"""File of an evaluation's table, in a run's folder."""
ROBUSTNESS = "robustness.json"
"""File of the scores on other imagery, in a run's folder."""


class UnknownOrigin(TrainingError):
    """A checkpoint that does not state what data it was trained on."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """The part of a card that is written by hand."""

    text: str
    use: str = ""
    """What the model's results are good for: the card's `intended_use`."""
    default: bool = False


_OWN_CLASSES = "For a map that you rely on, teach your own classes (POST /heads)."
_US_CROPS = (
    "A map of the crops in California and Arkansas; a first look at most elsewhere, where other "
    f"crops and other calendars are common. {_OWN_CLASSES}"
)
DESCRIPTIONS: Mapping[str, Description] = {
    "pixels-crops-us": Description(
        text=(
            "Crops of the United States from a calendar year of B02, B04 and B08: the 17 codes of "
            "the Cropland Data Layer with at least 100 pixels in the data. Trained on California "
            "and Arkansas in 2021, on labels that are themselves a map. Not tested elsewhere, in "
            "other years or on other crops; it assigns one of its classes to every pixel."
        ),
        use=_US_CROPS,
    ),
    "pixels-crops-us-20m": Description(
        text=(
            "Crops of the United States as in `pixels-crops-us`, for stacks that also have the 20 "
            "m bands: it uses red-edge and shortwave indices in addition to the vegetation "
            "indices. Same places, year and limits."
        ),
        use=_US_CROPS,
    ),
    "pixels-crops-us-small": Description(
        text=(
            "Crops of the United States as in `pixels-crops-us`, at a quarter of the cost: one "
            "network instead of three. Same places, year and limits."
        ),
        use=_US_CROPS,
    ),
    "pixels-landcover": Description(
        default=True,
        text=(
            "Broad land cover from one or more years of B02, B04 and B08, after ESA WorldCover's "
            "classes, on monthly to five-day series that begin on any day. All dates are used and "
            "placed on one year: with several years the map shows the stable cover, and `start` "
            "restricts it to the year that begins there. A pixel belongs to the cover that holds "
            "most of it. Most labels are cropland and grassland; trees, shrubs, built-up, bare, "
            "water and wetland have few, and the labels are themselves maps (WorldCover is about "
            "77 % right). Left out: orchards and vineyards, which WorldCover maps as trees in one "
            "place and as crops in another; mangroves (two samples); snow and moss (none). "
            "Synthetic series of the rare classes were added for training, never for a score. "
            "Shrubs, built-up, bare, water and wetland are weak; treat them as hints."
        ),
        use=f"A first look at broad land cover. {_OWN_CLASSES}",
    ),
    "forecast-vi": Description(
        default=True,
        text=(
            "NDVI, EVI and SAVI of the next ten ten-day steps with the 10 % and 90 % quantiles, "
            "from up to 320 days of B02, B04 and B08. It uses the day of the year and whether the "
            "place is far from the training data, but neither the weather nor the place itself."
        ),
        use=(
            "A first look at the next hundred days. Before you rely on it, compare it with the "
            "last value and last year's date on your own dates (`backtest`)."
        ),
    ),
    "landcover-eurosat": Description(
        default=True,
        text=(
            "EuroSAT's ten classes of 64 x 64 patches from red, green and blue: EfficientNet-Lite0 "
            "with ImageNet weights (Apache-2.0), finetuned. Reflectance above 0.275 is clipped, as "
            "in EuroSAT's images, which are level 1C images of Europe; a fifth of the training "
            "patches had the air's scattering removed, so that level 2A is classified as well. "
            "Half of its last training patches were smoothed, as resampling to another grid does, "
            "and a quarter are from four small areas of level 2A. Smooth forest is still often "
            "taken for pasture, herbaceous vegetation or sea where most trees have no leaves, and "
            "arable fields in autumn and winter for pasture, orchards or water."
        ),
        use=f"A first look at the land cover of large areas, by patches. {_OWN_CLASSES}",
    ),
    "embed-pixel": Description(
        default=True,
        text=(
            "Embedding of a pixel from a year of B02, B04 and B08. The first 256 numbers are the "
            "output of the PIMC pixel encoder on recurrence plots of NDVI, EVI and SAVI, "
            "pretrained without labels against the imagery around the pixel. The other 216 are "
            "the series that the encoder sees, in 36 steps of ten days: NDVI, EVI and SAVI, then "
            "the square roots of B02, B04 and B08, all standardised with fixed numbers. Not of "
            "unit length: normalise before comparing by cosine. Pretrained on few places: compare "
            "its scores with those of its series alone before relying on it."
        ),
        use="Features for own classes (POST /heads) and for finding similar places; not a map.",
    ),
    "embed-patch": Description(
        text=(
            "Embedding of a 64 x 64 patch from red, green and blue: the PIMC patch encoder, "
            "pretrained without labels against pixel series and on EuroSAT imagery. Reflectance "
            "above 0.275 is clipped. Not of unit length: normalise before comparing by cosine. "
            "From a short run on few places: compare its scores with those of an untrained "
            "encoder before relying on it."
        ),
        use="Features for finding similar patches and for models of your own; not a map.",
    ),
}


def described(name: str) -> dict[str, Any]:
    """The card's fields that are written by hand; none of a bundle that has no description."""
    about = DESCRIPTIONS.get(name)
    if about is None:
        return {}
    return {
        "name": name,
        "description": about.text,
        "intended_use": about.use,
        "default": about.default,
    }


def card_fields(run: Run, task: Task[Any], metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of a run's card, except its files."""
    config = run.config
    data = _training_data(run, task)
    return {
        "description": f"{name}: a bundle finetuned for {config.task}.",
        **described(name),
        "name": name,
        "licence": LICENCE_FROM_IMAGENET if starts_from_imagenet(config) else LICENCE,
        "metrics": _metrics(config, metrics),
        "training_data": data,
        **sensed(data),
        "training": training_facts(run, metrics),
        "day_of_year": False,
        **task.card_shape(),
    }


_CHOSEN = "epoch_chosen_on_the_validation_places"
_SPLITS = {
    "classify": "places of 0.1 degree that training never saw; labels are maps, not field surveys",
    "forecast": (
        "US crops of 2021 in places of 0.1 degree that training never saw; the first 26 ten-day "
        "composites in, the next ten out; clear targets only, index units"
    ),
    "landcover": "EuroSAT's spatial split: scenes that training never saw",
}


def _metrics(
    config: ClassifyConfig | ForecastConfig | LandcoverConfig, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    scores = metrics["scores"]
    if not scores:
        return {"validation": "none: trained on every place"}
    split = _SPLITS[config.task]
    if _CHOSEN in metrics:
        split += (
            f"; the epoch ({metrics[_CHOSEN]}) was chosen on them, so the scores are optimistic"
        )
    return {"validation": {"split": split, **scores}}


def _training_data(run: Run, task: Task[Any]) -> tuple[TrainingData, ...]:
    """Training data of a run, preceded by those of the pretraining that it started from."""
    start = (
        (training_data("imagenet", "weights that training starts from", IMAGES),)
        if starts_from_imagenet(run.config)
        else ()
    )
    return (
        *start,
        *pretraining_data(_learned_from(run)),
        *(training_data(**part) for part in task.data()),
    )


def _learned_from(run: Run) -> dict[str, int]:
    """Number of samples of each source in the pretrainings behind a run."""
    found: dict[str, int] = {}
    for checkpoint in run.pretrained:
        if earlier := _run_of(checkpoint):
            found |= _learned_from(earlier)
        elif stored := _pretraining(checkpoint):
            found |= stored["learned_from"]
    return found


def _run_of(weights: Path) -> Run | None:
    """The run that wrote some weights, None if its settings are not beside them."""
    settings = weights.parent / RUN
    if weights.name != WEIGHTS or not settings.is_file():
        return None
    return Run.model_validate_json(settings.read_bytes())


def _pretraining(checkpoint: Path) -> dict[str, Any] | None:
    """Contents of a pretraining's checkpoint, None for any other file.

    Raises:
        UnknownOrigin: the checkpoint does not state its training data.
    """
    if checkpoint.name != CHECKPOINT or not checkpoint.is_file():
        return None
    stored: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if "pixel_encoder" not in stored or "config" not in stored:
        return None
    if "learned_from" not in stored:
        raise UnknownOrigin(
            f"{checkpoint} does not state its training data, which a card needs: an earlier "
            "version wrote it, so run the pretraining again"
        )
    return stored


def training_facts(run: Run, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance of a run: commands, configuration, seed, log, duration, machine."""
    return {
        "command": " && ".join(commands(run)),
        "config": json.loads(run.config.model_dump_json()),
        "protocol": run.protocol,
        "places": _places(run),
        "seed": run.config.optimisation.seed,
        "log": {key: metrics[key] for key in ("epochs", "loss", _CHOSEN) if key in metrics},
        "seconds_of_last_command": metrics["seconds"],
        "machine": _machine_of(metrics),
        "torch": torch.__version__,
    }


def _places(run: Run) -> str:
    """The places that a run is trained on, in words."""
    but = [] if run.everything else ["the validation places"]
    if run.left_out:
        but.append(f"the regions {', '.join(run.left_out)}")
    return " but ".join(["all", *([" and ".join(but)] if but else [])])


def _machine_of(metrics: Mapping[str, Any]) -> str:
    """The machine of the training; runs that do not record it were trained on this one."""
    threads = f", {metrics['threads']} threads" if "threads" in metrics else ""
    return str(metrics.get("machine", machine())) + threads.replace(" 1 threads", " one thread")


def commands(run: Run, folder: Path | None = None) -> list[str]:
    """Commands that reproduce a run, the runs that it starts from first.

    Args:
        run: the run.
        folder: the run's folder, if a later run starts from it; None uses the default.
    """
    config = run.config
    words = ["python -m training finetune", config.name]
    earlier: list[str] = []
    new = config.name not in ZOO
    if new:
        words += ["--task", config.task]
    if folder:
        words += ["--run", folder.as_posix()]
    for checkpoint in run.pretrained:
        words += ["--pretrained", checkpoint.as_posix()]
        earlier += [c for c in _commands_before(checkpoint) if c not in earlier]
    words += ["--romania CUBE"] if run.romania else []
    words += ["--public PUBLIC"] if run.public else []
    words += [f"--left-out {shlex.quote(region)}" for region in run.left_out]
    if run.everything:
        words.append("--everything")
    if run.protocol != "finetune":
        words += ["--protocol", run.protocol]
    usual = configuration(config.name, config.task if new else None)
    changes = difference(usual.model_dump(mode="json"), config.model_dump(mode="json"))
    words += _as_settings(changes)
    words += [f"--seed {config.optimisation.seed}"] if config.optimisation.seed else []
    return [*earlier, " ".join(words)]


def _commands_before(checkpoint: Path) -> list[str]:
    """Commands that make a checkpoint: a pretraining, or a run and those that it starts from."""
    if earlier := _run_of(checkpoint):
        return commands(earlier, checkpoint.parent)
    stored = _pretraining(checkpoint)
    if stored is None:
        return []
    return [pretrain_command(PretrainConfig.model_validate(stored["config"]), checkpoint.parent)]


def pretrain_command(config: PretrainConfig, folder: Path) -> str:
    """Command that repeats a pretraining; CUBE and PASTIS stand for the paths of these data."""
    usual, now = (c.model_dump(mode="json") for c in (FIRST, config))
    words = ["python -m training pretrain --threads 1", f"--run {folder.as_posix()}"]
    words += ["--romania CUBE"] if config.sources.romania else []
    words += ["--pastis PASTIS"] if config.sources.pastis else []
    words += _as_settings(difference(usual, now))
    words += [f"--set seed={config.seed}"] if config.seed != FIRST.seed else []
    return " ".join(words)


def _as_settings(changes: Mapping[str, Any]) -> list[str]:
    return [f"--set {shlex.quote(f'{key}={json.dumps(v)}')}" for key, v in changes.items()]


def parameters(network: nn.Module) -> int:
    """Number of weights of a network."""
    return sum(p.numel() for p in network.parameters())


def megaflop(graph: Graph, inputs: Sequence[Tensor]) -> float:
    """Floating-point operations of one forward pass, in millions, a multiply-add as two.

    Args:
        graph: the graph; its matrix products and convolutions are counted.
        inputs: input of one pixel or patch.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        graph(*inputs)
    return float(counter.get_total_flops()) / 1e6


def same_configuration(card: ModelCard, run: Run) -> bool:
    """Whether a bundle was trained with a run's configuration, ignoring seed and name."""
    if "config" not in card.training:
        return False
    # Compared as configurations, not as text: settings added since then have their defaults.
    config = Run.model_validate({"config": card.training["config"], "data": run.data}).config
    return not difference(config.model_dump(mode="json"), run.config.model_dump(mode="json"))


def write_card(folder: Path, card: ModelCard) -> None:
    """Write a bundle's card."""
    (folder / CARD_FILE).write_text(card.model_dump_json(indent=1) + "\n")
