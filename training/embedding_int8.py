"""int8 embeddings of bundles, measured on real data, and put on their cards.

bundle -> embeddings of all places -> probes with float32 and int8 -> table, card
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from models.card import ModelCard
from models.registry import load_bundle
from training.datasets import PixelSet
from training.datasets.eurosat import eurosat_rgb
from training.datasets.points import pune_2019, s2_points
from training.embedding import MIN_OBSERVATIONS, embed_crops, embed_patches
from training.errors import TrainingError
from training.export import check_new_version, replace_card
from training.int8_scale import PROBES, Comparison, int8_of
from training.legends import WORLDCOVER, relabelled, us_crops
from training.parity import Served
from training.probe import Labelled, joined
from training.score_tables import write_section

TITLE = "Embeddings: int8"
_ABOUT = (
    "Probes of frozen embeddings as the model returns them (float32) and as `dtype=int8` stores "
    "them: value = int8 x scale, one scale for all dimensions. The scale is 1.25 times the largest "
    "value of the training places of US crops (pixels) or EuroSAT (patches), in 127 steps. Pune "
    "(five classes, every second polygon a validation place) and the four campaigns of "
    "`s2_points` (WorldCover's classes) have no part in it. Both columns are of the same places "
    "and the same kind of probe, fitted anew. Victoria is not in the table, because one of its 219 "
    "validation pixels is half a point."
)
_HEAD = (
    "| bundle, data | probe | n (places) | scale | clipped | accuracy float32 | int8 | macro-F1 "
    "float32 | int8 |"
)
_COMMAND = "python -m training int8 models/zoo/embed-pixel models/zoo/embed-patch"


def measure_int8(
    folders: Sequence[Path], *, data: Path, report: Path, version: str | None = None
) -> str:
    """Compare int8 with float32 embeddings of bundles, and write the table.

    Args:
        folders: of bundles.
        data: folder of the data sets.
        report: the Markdown file that takes the table.
        version: of new bundles with the scale on their cards; None keeps bundles as they are, and
            takes the scale from their cards if they have one.

    Returns:
        The table.

    Raises:
        Int8Loses: a probe loses more than `MOST_LOSS`; no bundle of those after it is changed.
        VersionNotRaised: a bundle already has this version.
    """
    rows = []
    for folder in folders:
        card = load_bundle(folder).card
        if card.task != "embed":
            raise TrainingError(f"{card.id} is a model of {card.task}: give bundles of embeddings")
        check_new_version(card, version)
        kept = card.embedding_int8 if version is None else None
        field, found = int8_of(embedded(folder, card, data), kept.scale if kept else None)
        rows += [_row(card.name, field.scale, one) for one in found]
        if version is not None:
            changes = {"embedding_int8": field, "version": version}
            replace_card(folder, card.model_copy(update=changes))
    text = _table(rows)
    write_section(report, TITLE, text)
    return text


def embedded(folder: Path, card: ModelCard, data: Path) -> dict[str, Labelled]:
    """Embeddings of a bundle's float32 file, by name of the data."""
    graph = Served(folder / card.variants[0].file)
    if card.modality == "patch":
        return {"EuroSAT": embed_patches(graph, eurosat_rgb(data / "eurosat"))}
    sets = {
        "US crops": us_crops(data),
        "Pune": _halved(relabelled(pune_2019(data / "pune_2019")[0], WORLDCOVER)),
    }
    found = {name: embed_crops(graph, pixels) for name, pixels in sets.items()}
    campaigns = [relabelled(one, WORLDCOVER) for one in s2_points(data / "s2_points")]
    # Some dates have no pixel with a class and enough observations.
    usable = [one for one in campaigns if _embeddable(one)]
    return {**found, "four campaigns": joined([embed_crops(graph, one) for one in usable])}


def _embeddable(pixels: PixelSet) -> bool:
    labelled = pixels.labels is not None and pixels.labels >= 0
    return bool((labelled & (pixels.valid.sum(axis=1) >= MIN_OBSERVATIONS)).any())


def _halved(pixels: PixelSet) -> PixelSet:
    """Every second place is one of validation."""
    position = np.unique(pixels.places, return_inverse=True)[1]
    return replace(pixels, validation=position % 2 == 1)


def _row(name: str, scale: float, one: Comparison) -> str:
    accuracy, macro_f1 = (
        f"{before:.4f} | {after:.4f} ({after - before:+.4f})"
        for before, after in (one.accuracy, one.macro_f1)
    )
    return (
        f"| {name}, {one.data} | {PROBES[one.probe]} | {one.n} ({one.places}) | {scale:g} | "
        f"{one.clipped:.4%} | {accuracy} | {macro_f1} |"
    )


def _table(rows: Sequence[str]) -> str:
    return "\n".join([_ABOUT, "", _HEAD, "|---" * 9 + "|", *rows, "", "```sh", _COMMAND, "```"])
