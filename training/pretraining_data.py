"""Pretraining data: scenes, pixel series and imagery, without the validation places."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from training.config import BANDS
from training.datasets import PatchSet, PixelSet, Scene
from training.datasets.eurosat import eurosat_rgb
from training.datasets.pastis import Pastis
from training.datasets.points import crops_us_2021, s2_points
from training.datasets.stacks import read_romania, read_stack, split_north
from training.datasets.synthetic import make_dates, make_scene
from training.errors import TrainingError

log = logging.getLogger(__name__)

SeriesSource = Literal["crops_us_2021", "s2_points"]
_SERIES = {"crops_us_2021": crops_us_2021, "s2_points": s2_points}
_SYNTHETIC_START = date(2020, 1, 1)
# Usable dates that a series needs, so that two views of it can differ.
_LEAST_OBSERVATIONS = 6


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StackSource(_Frozen):
    """A folder of GeoTIFFs."""

    folder: str
    """Under the data folder, or an absolute path."""
    weight: float = 1.0
    """How often its scenes are drawn, relative to the others."""
    validation: float = Field(default=0.25, ge=0.0, lt=1.0)
    """Share of its northern rows that is held out."""


class SourcesConfig(_Frozen):
    """The sources of a pretraining."""

    stacks: tuple[StackSource, ...] = (
        StackSource(folder="flanders_2017_2018"),
        StackSource(folder="hesbaye_a_monthly"),
        # Overlaps `hesbaye_a_monthly`, but not the rows that are held out there.
        StackSource(folder="hesbaye_b_monthly", validation=0.0),
    )
    romania: float = 0.0
    """Weight of the Romania cube; 0 leaves it out."""
    pastis: float = 0.0
    """Weight of all patches of PASTIS together; 0 leaves them out."""
    synthetic: int = Field(default=16, ge=0)
    """Synthetic scenes; a quarter more is held out."""
    synthetic_weight: float = 1.0
    """Weight of all synthetic scenes together."""
    series: tuple[SeriesSource, ...] = ("crops_us_2021", "s2_points")
    """Pixel series without imagery."""
    eurosat: bool = True
    """Whether imagery without series is used."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Paths of the data on this machine; not part of a configuration."""

    data: Path
    """Folder of the data sets."""
    romania: Path | None = None
    """`sentinel2_cube_subset_romania_10m.nc`, from the wheel nrt==0.2.1."""
    pastis: Path | None = None
    """A PASTIS folder."""


class SourceNotGiven(TrainingError):
    """A configuration names a source whose path was not given."""


class NoScene(TrainingError):
    """The configuration names no scene, that is, no imagery with series."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The data of a pretraining run, with the validation places kept apart."""

    scenes: Sequence[Scene]
    weights: Sequence[float]
    held_out: Sequence[Scene]
    series: Sequence[PixelSet]
    """Training places only."""
    imagery: PatchSet | None
    """Training places only."""

    def counts(self) -> dict[str, int]:
        """Number of samples by source: pixels of scenes and series, patches of imagery."""
        counts: dict[str, int] = {}
        for scene in self.scenes:
            rows, cols = scene.shape
            counts[scene.source] = counts.get(scene.source, 0) + rows * cols
        for pixels in self.series:
            name = pixels.source.partition("/")[0]
            counts[name] = counts.get(name, 0) + len(pixels.values)
        if self.imagery is not None:
            counts[self.imagery.source] = len(self.imagery.values)
        return counts


def open_sources(config: SourcesConfig, places: Places, *, seed: int) -> Sources:
    """Open every source that the configuration names.

    Args:
        config: the sources.
        places: paths of the data.
        seed: seed of the synthetic scenes.

    Raises:
        SourceNotGiven: the configuration names a source whose path was not given.
        NoScene: the configuration names no scene.
    """
    data = places.data
    groups: list[tuple[float, list[Scene]]] = []
    for stack in config.stacks:
        scene = read_stack(data / stack.folder)
        groups.append((stack.weight, list(split_north(scene, stack.validation))))
    if config.romania:
        cube = read_romania(_given(places.romania, "romania"))
        groups.append((config.romania, list(split_north(cube, 0.25))))
    if config.pastis:
        patches = Pastis.open(_given(places.pastis, "pastis"))
        official = [*patches.scenes("train"), *patches.scenes("validation")]
        groups.append((config.pastis, official))
    if config.synthetic:
        groups.append((config.synthetic_weight, _synthetic(config.synthetic, seed)))
    scenes, weights = _weighted(groups)
    if not scenes:
        raise NoScene(
            "pretraining needs at least one scene: --set sources.synthetic=16, or give a stack or "
            "PASTIS"
        )
    sources = Sources(
        scenes=scenes,
        weights=weights,
        held_out=[s for _, group in groups for s in group if s.validation],
        series=[p for name in config.series for p in _training(_SERIES[name](data / name))],
        imagery=_training_patches(eurosat_rgb(data / "eurosat")) if config.eurosat else None,
    )
    log.info("training data: %s", sources.counts())
    return sources


def _given(path: Path | None, name: str) -> Path:
    if path is None:
        raise SourceNotGiven(f"the configuration uses {name}: give its path with --{name}")
    return path


def _weighted(groups: Sequence[tuple[float, Sequence[Scene]]]) -> tuple[list[Scene], list[float]]:
    """The training scenes and their weights; the scenes of a group share the group's weight."""
    scenes, weights = [], []
    for weight, group in groups:
        training = [s for s in group if not s.validation]
        scenes += training
        weights += [weight / len(training)] * len(training)
    return scenes, weights


def _synthetic(count: int, seed: int) -> list[Scene]:
    dates = make_dates(_SYNTHETIC_START, days=400)
    held_out = max(1, count // 4)
    return [
        make_scene(dates=dates, seed=seed * 1000 + i, validation=i >= count)
        for i in range(count + held_out)
    ]


def _training(sets: Sequence[PixelSet]) -> list[PixelSet]:
    """Pixels of the training places with enough usable dates, in the bands of the graph."""
    training = []
    for pixels in sets:
        enough = pixels.valid.sum(axis=1) >= _LEAST_OBSERVATIONS
        chosen = pixels.select(BANDS).take(~pixels.validation & enough)
        if len(chosen.values):
            training.append(chosen)
    return training


def _training_patches(patches: PatchSet) -> PatchSet:
    chosen = np.flatnonzero(~patches.validation)
    return replace(
        patches,
        values=patches.values[chosen],
        places=patches.places[chosen],
        validation=patches.validation[chosen],
        labels=None if patches.labels is None else patches.labels[chosen],
    )
