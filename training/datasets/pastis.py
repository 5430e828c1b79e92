"""PASTIS: 2,433 labelled patches of France in its official layout, memory-mapped.

Garnot and Landrieu 2021, arXiv 2107.07933. The 29 GB are never read as a whole: a patch is a
`Scene` whose values are memory-mapped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from training.datasets import PixelSet, Scene
from training.errors import TrainingError

BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
BACKGROUND = 0
VOID = 19
CLASSES: Mapping[int, str] = {
    1: "Meadow",
    2: "Soft winter wheat",
    3: "Corn",
    4: "Winter barley",
    5: "Winter rapeseed",
    6: "Spring barley",
    7: "Sunflower",
    8: "Grapevine",
    9: "Beet",
    10: "Winter triticale",
    11: "Winter durum wheat",
    12: "Fruits, vegetables, flowers",
    13: "Potatoes",
    14: "Leguminous fodder",
    15: "Soybeans",
    16: "Orchard",
    17: "Mixed cereal",
    18: "Sorghum",
}

Part = Literal["train", "validation", "test"]
FOLDS: Mapping[Part, tuple[int, ...]] = {"train": (1, 2, 3), "validation": (4,), "test": (5,)}


class PastisError(TrainingError):
    """A folder is not PASTIS as published; the message states what is missing."""


@dataclass(frozen=True, kw_only=True)
class PatchEntry:
    """One patch, as `metadata.geojson` lists it."""

    number: int
    """`ID_PATCH`: the place, by which splits and bootstraps are made."""
    fold: int
    dates: tuple[date, ...]


@dataclass(frozen=True, kw_only=True)
class Pastis:
    """The patches of a PASTIS folder."""

    folder: Path
    entries: tuple[PatchEntry, ...]

    @classmethod
    def open(cls, folder: Path) -> Pastis:
        """Read the list of patches.

        Raises:
            PastisError: `metadata.geojson` is missing or lacks the official properties.
        """
        path = folder / "metadata.geojson"
        try:
            features = json.loads(path.read_text())["features"]
            entries = tuple(_entry(feature["properties"]) for feature in features)
        except OSError as error:
            raise PastisError(
                f"{path} cannot be read: give the folder of PASTIS that holds {path.name}"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise PastisError(
                f"{path} does not have the published form ({error!r}): download it again"
            ) from error
        return cls(folder=folder, entries=entries)

    def part(self, part: Part) -> tuple[PatchEntry, ...]:
        """The patches of the official folds: 1 to 3, 4, and 5."""
        return tuple(e for e in self.entries if e.fold in FOLDS[part])

    def scenes(self, part: Part) -> Iterator[Scene]:
        """The patches of a part, one after the other; values are memory-mapped."""
        for entry in self.part(part):
            yield self.scene(entry)

    def scene(self, entry: PatchEntry) -> Scene:
        """One patch. Background and void, which are not crops, are unlabelled (-1).

        Raises:
            PastisError: a file is missing, or its number of images differs from the listed dates.
        """
        values = self._load(f"DATA_S2/S2_{entry.number}.npy", mapped=True)
        if len(values) != len(entry.dates):
            raise PastisError(
                f"patch {entry.number} has {len(values)} images but {len(entry.dates)} dates in "
                "metadata.geojson: download both again"
            )
        target = self._load(f"ANNOTATIONS/TARGET_{entry.number}.npy")[0].astype(np.int64)
        order = np.argsort(np.array(entry.dates), kind="stable")
        # The published dates ascend; sorting would copy the mapped file into memory.
        ordered = np.array_equal(order, np.arange(len(order)))
        return Scene(
            source="pastis",
            bands=BANDS,
            dates=tuple(entry.dates[i] for i in order),
            values=values if ordered else values[order],
            scale=1e-4,
            labels=np.where((target == BACKGROUND) | (target == VOID), -1, target),
            validation=entry.fold not in FOLDS["train"],
        )

    def pixels(
        self, entry: PatchEntry, *, bands: tuple[str, ...], most: int, seed: int
    ) -> PixelSet:
        """Labelled pixels of a patch, at most `most`, drawn at random; their place is the patch."""
        scene = self.scene(entry)
        rng = np.random.default_rng([seed, entry.number])
        pixels = scene.pixels(bands, place=entry.number)
        labels = pixels.labels if pixels.labels is not None else np.empty(0, dtype=np.int64)
        labelled = np.flatnonzero(labels >= 0)
        chosen = rng.permutation(labelled)[:most]
        return pixels.take(np.sort(chosen))

    def _load(self, name: str, *, mapped: bool = False) -> NDArray[Any]:
        path = self.folder / name
        try:
            # No pickles: the official files are plain arrays.
            array: NDArray[Any] = np.load(path, mmap_mode="r" if mapped else None)
        except (OSError, ValueError) as error:
            raise PastisError(f"{path} cannot be read ({error}): download it again") from error
        return array


def _entry(properties: Mapping[str, Any]) -> PatchEntry:
    dates = properties["dates-S2"]
    # Some tools write the object as a string of JSON.
    listed: Mapping[str, int] = json.loads(dates) if isinstance(dates, str) else dates
    return PatchEntry(
        number=int(properties["ID_PATCH"]),
        fold=int(properties["Fold"]),
        dates=tuple(_day(listed[key]) for key in sorted(listed, key=int)),
    )


def _day(number: int) -> date:
    return datetime.strptime(str(number), "%Y%m%d").date()
