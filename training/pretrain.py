"""Pretraining without labels: PIMC (arXiv 2601.04127).

batch(step) -> regular series -> encoders -> projections -> symmetric InfoNCE -> weights

A pixel's recurrence plots and the imagery around it are a positive pair; the other places of the
batch are negatives, except those that are probably the same ground. Two views of series without
imagery, and of imagery without series, are further positive pairs.

All randomness follows from the seed and the step, so a killed run resumes from its last checkpoint
exactly as if it had not been interrupted.
"""

from __future__ import annotations

import csv
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.tensorboard import SummaryWriter

from models.encoders import PatchEncoder, PixelEncoder
from models.graph import PixelGraph
from models.heads import ProjectionHead
from training.augment import PatchAugmentation, PixelAugmentation
from training.config import BANDS, INDICES, PatchEncoderConfig, PixelEncoderConfig
from training.errors import TrainingError
from training.gradient_cache import Side, backward
from training.losses import SymmetricInfoNCE, alike, finite, near, same_group
from training.pairs import (
    ImageryViews,
    ImageryViewSampler,
    Pairs,
    PairSampler,
    SeriesGroup,
    SeriesViews,
    SeriesViewSampler,
    plain,
)
from training.pretraining_data import Places, Sources, SourcesConfig, open_sources
from training.retrieval import PairScores, pair_scores

log = logging.getLogger(__name__)

PATCH_BANDS = ("B04", "B03", "B02")
CHECKPOINT = "checkpoint.pt"
LOG_FILE = "log.csv"
_WARM_UP = 0.05


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PretrainConfig(_Frozen):
    """A pretraining run; stored in its checkpoints."""

    seed: int = 0
    steps: int = Field(default=20_000, ge=1)
    """Optimiser steps."""
    groups: int = 8
    """Groups of pairs in a batch; each group is of one scene, one area and one time window."""
    per_group: int = 32
    """Pixels in a group; a batch has groups x per_group pairs."""
    series_views: int = 128
    """Pixels without imagery in a batch, in two views; 0 for none."""
    imagery_views: int = 64
    """Patches without series in a batch, in two views; 0 for none."""
    pairs_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the loss of the pairs. A comparison of weight 0 is left out of the loss. Its rows
    still pass an encoder that another comparison trains, so that the batch statistics stay the
    same; an encoder that no comparison trains is not run."""
    series_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the loss of the series views; 0 as in `pairs_weight`."""
    imagery_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the loss of the imagery views; 0 as in `pairs_weight`."""
    chunk: int = 4096
    """Rows that an encoder processes at once; memory depends on this, not on the batch's size."""
    side: int = 32
    """Side of the imagery around a pixel, and of a view, in pixels, a multiple of 16."""
    steps_per_window: int = 36
    """M."""
    step_days: int = 10
    min_observations: int = 4
    pixel: PixelEncoderConfig = PixelEncoderConfig()
    reflectance: bool = False
    """Whether the pixel encoder sees the bands' reflectance in addition to the indices."""
    patch: PatchEncoderConfig = PatchEncoderConfig()
    projection: int = 128
    """Length of z0 and z1."""
    temperature: float = 0.1
    """Initial value; the temperature is learned."""
    near: float = 8.0
    """Pixels closer than this in a scene are not used as negatives; 0 uses them all."""
    alike: float = 0.03
    """Pixels whose series differ by less (root mean square, index units) are not negatives."""
    same_field: bool = False
    """Whether pixels of one field are used as negatives, if fields are known."""
    pixel_augmentation: PixelAugmentation = PixelAugmentation()
    patch_augmentation: PatchAugmentation = PatchAugmentation()
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    """Largest norm of the gradient."""
    bfloat16: bool = False
    """Whether the encoders run in bfloat16 on a CPU too; see `training.config.Optimisation`."""
    measure_every: int = 100
    """Steps between measurements on the held-out places."""
    keep_every: int = 100
    """Steps between checkpoints."""
    measured_batches: int = 4
    """Held-out batches in a measurement."""
    sources: SourcesConfig = SourcesConfig()

    @property
    def window_days(self) -> int:
        """Length of the time window."""
        return self.steps_per_window * self.step_days


# The run behind the zoo's `embed-pixel` and `embed-patch`: small enough for two CPU cores.
FIRST = PretrainConfig(
    steps=700,
    groups=8,
    per_group=16,
    series_views=128,
    imagery_views=64,
    series_weight=0.5,
    imagery_weight=0.5,
    side=32,
    reflectance=True,
    learning_rate=2e-3,
    keep_every=50,
    sources=SourcesConfig(romania=2.0),
)


class ForeignCheckpoint(TrainingError):
    """The folder already holds a run of another configuration."""


class NothingToLearn(TrainingError):
    """Every comparison of the loss has weight 0 or no data."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The training batch of one step."""

    pairs: Pairs
    series: SeriesViews | None
    imagery: ImageryViews | None

    @property
    def groups(self) -> tuple[SeriesGroup, ...]:
        """All series: those of the pairs, then the first views, then the second."""
        views = self.series
        return self.pairs.groups + ((*views.first, *views.second) if views else ())

    @property
    def patches(self) -> Tensor:
        """All imagery (N, C, P, P): that of the pairs, then the first views, then the second."""
        views = self.imagery
        return torch.cat([self.pairs.patches, *((views.first, views.second) if views else ())])


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """Two sets of embeddings that the loss compares, each a projection and rows of the batch."""

    first: tuple[str, slice]
    second: tuple[str, slice]
    excluded: Tensor | None
    weight: float


class Networks(nn.Module):
    """Both encoders with their projections and losses."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        encoder = PixelEncoder(
            steps=config.steps_per_window,
            indices=len(INDICES),
            bands=len(BANDS) if config.reflectance else 0,
            **config.pixel.model_dump(),
        )
        self.pixel = PixelGraph(
            bands=BANDS,
            indices=INDICES,
            steps=config.steps_per_window,
            step_days=config.step_days,
            encoder=encoder,
            head=None,
            reflectance=config.reflectance,
            with_series=True,
        )
        self.patch = PatchEncoder(bands=len(PATCH_BANDS), **config.patch.model_dump())
        wide = {"pixel": encoder.embedding, "patch": self.patch.embedding}
        # Views have projections of their own, because two views of a series share other information
        # than a series and its imagery.
        self.projections = nn.ModuleDict(
            {
                name: ProjectionHead(wide[name.partition("_")[0]], config.projection)
                for name in ("pixel", "patch", "pixel_views", "patch_views")
            }
        )
        self.losses = nn.ModuleDict(
            {name: SymmetricInfoNCE(config.temperature) for name in ("pairs", "series", "imagery")}
        )

    def checkpoint(self) -> dict[str, Any]:
        """State by part; fine-tuning starts from `pixel_encoder` or `patch_encoder`."""
        return {
            "pixel_encoder": self.pixel.encoder.state_dict(),
            "patch_encoder": self.patch.state_dict(),
            "projections": self.projections.state_dict(),
            "losses": self.losses.state_dict(),
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """The inverse of `checkpoint`."""
        self.pixel.encoder.load_state_dict(stored["pixel_encoder"])
        self.patch.load_state_dict(stored["patch_encoder"])
        self.projections.load_state_dict(stored["projections"])
        self.losses.load_state_dict(stored["losses"])


def pretrain(
    config: PretrainConfig,
    *,
    places: Places,
    folder: Path,
    device: str = "auto",
    workers: int = 1,
) -> Networks:
    """Train both encoders; resumes an earlier run in the same folder.

    Args:
        config: everything that determines the result.
        places: paths of the data.
        folder: for checkpoint, CSV log and TensorBoard events.
        device: `auto`, `cpu` or `cuda`.
        workers: threads that prepare batches ahead; their number affects the speed only.

    Returns:
        The networks as trained, on the device.

    Raises:
        ForeignCheckpoint: the folder holds a run of another configuration.
        NothingToLearn: every comparison of the loss has weight 0 or no data.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    folder.mkdir(parents=True, exist_ok=True)
    sources = open_sources(config.sources, places, seed=config.seed)
    return Pretraining(config, sources, folder, torch.device(chosen)).run(workers=workers)


class Pretraining:
    """One run: its networks, its optimiser, its samplers and its log."""

    def __init__(
        self, config: PretrainConfig, sources: Sources, folder: Path, device: torch.device
    ) -> None:
        self.config, self.folder, self.device = config, folder, device
        torch.manual_seed(config.seed)
        self.networks = Networks(config).to(device)
        self.optimizer = _optimizer(self.networks, config)
        self.learned_from = sources.counts()
        self.pairs = _pair_sampler(config, sources)
        held_out = replace(
            self.pairs, scenes=sources.held_out, weights=[1.0] * len(sources.held_out)
        )
        self.held_out = plain(held_out) if sources.held_out else None
        self.series = _series_sampler(config, sources)
        self.imagery = _imagery_sampler(config, sources)
        weights = (
            config.pairs_weight,
            config.series_weight if self.series else 0.0,
            config.imagery_weight if self.imagery else 0.0,
        )
        if not any(weights):
            raise NothingToLearn(
                "every comparison of the loss has weight 0 or no data: give one of --set "
                "pairs_weight=1, series_weight=1 or imagery_weight=1, and data for it"
            )

    def run(self, *, workers: int = 1) -> Networks:
        """Train to the last step."""
        step, spent = self._resume()
        rows = _RunLog(self.folder, first=step)
        started = time.monotonic() - spent
        for batch in self._ahead(step, workers):
            losses = self.step(batch, step)
            step += 1
            row: dict[str, float] = {"step": step, **losses}
            if step % self.config.measure_every == 0 or step == self.config.steps:
                row |= self.measure()
            row["seconds"] = round(time.monotonic() - started, 2)
            rows.write(row)
            _report(row, self.config.steps, begun=step - 1 == 0)
            if step % self.config.keep_every == 0 or step == self.config.steps:
                rows.flush()
                self._keep(step, row["seconds"])
        rows.close()
        return self.networks

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        """Run one optimiser step; returns its losses, temperature and learning rate."""
        torch.manual_seed(_mixed(self.config.seed, step))
        self.networks.train()
        rate = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        series, *beside = self._regular(batch.groups)
        patches = batch.patches.to(self.device)
        comparisons = self._comparisons(batch, series)
        found: dict[str, Tensor] = {}

        sides = {
            "pixel": self._shuffled(self.networks.pixel.encoder, series, *beside),
            "patch": self._shuffled(self.networks.patch, patches),
        }
        trained = {
            projection.partition("_")[0]
            for comparison in comparisons.values()
            for projection, _ in (comparison.first, comparison.second)
        }
        sides = {name: side for name, side in sides.items() if name in trained}

        def loss(embeddings: Sequence[Tensor]) -> Tensor:
            found.update(self._losses(comparisons, dict(zip(sides, embeddings, strict=True))))
            return torch.stack([comparisons[n].weight * found[n] for n in found]).sum()

        total = backward(list(sides.values()), loss, network=self.networks, chunk=self.config.chunk)
        value = finite(total, f"{self.folder.name}, step {step + 1}")
        nn.utils.clip_grad_norm_(self.networks.parameters(), self.config.clip)
        self.optimizer.step()
        return {
            "loss": value,
            **{f"loss_{name}": value.item() for name, value in found.items()},
            "temperature": self._loss("pairs").temperature.item(),
            "learning_rate": rate,
        }

    def measure(self) -> dict[str, float]:
        """Mean scores of pairs of the held-out places; empty if nothing is held out."""
        if self.held_out is None:
            return {}
        self.networks.eval()
        with torch.inference_mode():
            scores = [
                self._score(self.held_out.batch(self.config.seed + 1, number))
                for number in range(self.config.measured_batches)
            ]
        names = asdict(scores[0])
        return {name: sum(getattr(s, name) for s in scores) / len(scores) for name in names}

    def _score(self, pairs: Pairs) -> PairScores:
        pixels = self.networks.pixel.encoder(*self._regular(pairs.groups))
        patches = self.networks.patch(pairs.patches.to(self.device))
        z0 = self.networks.projections["pixel"](pixels)
        z1 = self.networks.projections["patch"](patches)
        # Patches that overlap show the same ground: retrieving the neighbour is not an error.
        excluded = near(pairs.scenes, pairs.positions, self.config.near).to(self.device)
        return pair_scores(z0, z1, pixels, patches, excluded)

    def _shuffled(self, encoder: nn.Module, *inputs: Tensor | None) -> Side:
        """A side of all rows of the batch, pairs and views alike.

        All rows pass the encoder together, so that the batch statistics in training are those of
        the mixture, as in use. They are shuffled, so that this also holds for each chunk.
        """
        size = max(len(part) for part in inputs if part is not None)
        order = torch.randperm(size).to(self.device)
        bfloat16 = self.config.bfloat16 or self.device.type == "cuda"

        def encode(rows: slice) -> Tensor:
            given = (None if part is None else part[order[rows]] for part in inputs)
            # bfloat16 has float32's range, so no gradient scaling is needed.
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                embeddings: Tensor = encoder(*given)
            return embeddings.float()

        return Side(encode=encode, size=len(order), order=order)

    def _comparisons(self, batch: Batch, series: Tensor) -> dict[str, _Comparison]:
        """The comparisons of the loss: pairs, then views if there are any; none of weight 0."""
        pairs = len(batch.pairs.patches)
        comparisons = {}
        if self.config.pairs_weight:
            comparisons["pairs"] = _Comparison(
                first=("pixel", slice(0, pairs)),
                second=("patch", slice(0, pairs)),
                excluded=self._false_negatives(batch.pairs, series[:pairs]),
                weight=self.config.pairs_weight,
            )
        for name, side, rows, weight in (
            ("series", "pixel", len(series), self.config.series_weight),
            ("imagery", "patch", len(batch.patches), self.config.imagery_weight),
        ):
            if rows == pairs or not weight:
                continue
            middle = pairs + (rows - pairs) // 2
            first, second = slice(pairs, middle), slice(middle, rows)
            comparisons[name] = _Comparison(
                first=(f"{side}_views", first),
                second=(f"{side}_views", second),
                excluded=alike(series[first], self.config.alike) if side == "pixel" else None,
                weight=weight,
            )
        return comparisons

    def _losses(
        self, comparisons: Mapping[str, _Comparison], embeddings: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The loss () of each comparison, given all embeddings of the batch by encoder."""
        losses = {}
        for name, comparison in comparisons.items():
            z0, z1 = (
                self.networks.projections[projection](
                    embeddings[projection.partition("_")[0]][rows]
                )
                for projection, rows in (comparison.first, comparison.second)
            )
            losses[name] = self._loss(name)(z0, z1, comparison.excluded)
        return losses

    def _loss(self, name: str) -> SymmetricInfoNCE:
        loss = self.networks.losses[name]
        if not isinstance(loss, SymmetricInfoNCE):
            raise TypeError(f"{name} is not a contrastive loss")
        return loss

    def _regular(self, groups: Sequence[SeriesGroup]) -> tuple[Tensor, Tensor, None, Tensor | None]:
        """The pixel encoder's inputs.

        Returns:
            Indices on the regular grid (N, K, M); how well each step is observed (N, 1, M), 0 to 1;
            None, because there is no season; and the bands (N, C, M) or None.
        """
        with torch.no_grad():
            parts = [
                self.networks.pixel.regular(
                    g.values.to(self.device), g.valid.to(self.device), g.days.to(self.device)
                )
                for g in groups
            ]
        # A pixel whose indices cannot be computed on any date has no series. Zeros, marked as
        # unobserved, keep its NaN out of the batch statistics.
        series = torch.nan_to_num(torch.cat([series for series, _, _ in parts]))
        observed = torch.cat([observed for _, observed, _ in parts])
        bands = [bands for _, _, bands in parts if bands is not None]
        return series, observed, None, torch.nan_to_num(torch.cat(bands)) if bands else None

    def _false_negatives(self, pairs: Pairs, series: Tensor) -> Tensor:
        excluded = near(pairs.scenes, pairs.positions, self.config.near).to(self.device)
        if not self.config.same_field:
            excluded |= same_group(pairs.fields).to(self.device)
        return excluded | alike(series, self.config.alike)

    def _ahead(self, first: int, workers: int) -> Iterator[Batch]:
        """The batches from step `first` on; worker threads prepare the next ones during a step."""
        with ThreadPoolExecutor(max_workers=workers) as pool:
            pending = deque(
                pool.submit(self._batch, step)
                for step in range(first, min(first + workers, self.config.steps))
            )
            for step in range(first, self.config.steps):
                batch = pending.popleft().result()
                if step + workers < self.config.steps:
                    pending.append(pool.submit(self._batch, step + workers))
                yield batch

    def _batch(self, step: int) -> Batch:
        seed = self.config.seed
        return Batch(
            pairs=self.pairs.batch(seed, step),
            series=None if self.series is None else self.series.batch(seed, step),
            imagery=None if self.imagery is None else self.imagery.batch(seed, step),
        )

    def _keep(self, step: int, spent: float) -> None:
        stored = {
            **self.networks.checkpoint(),
            "optimizer": self.optimizer.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "learned_from": self.learned_from,
            "step": step,
            "seconds": spent,
        }
        path = self.folder / CHECKPOINT
        # Written to another file and renamed: a kill leaves the last complete checkpoint.
        torch.save(stored, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def _resume(self) -> tuple[int, float]:
        """Load the checkpoint, if there is one: steps done and seconds spent."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return 0, 0.0
        # On the CPU: the optimiser counts its steps there, and the rest is copied to the device.
        stored = torch.load(path, map_location="cpu", weights_only=True)
        # Compared as configurations, not as text: settings added since then have their defaults.
        if PretrainConfig.model_validate(stored["config"]) != self.config:
            raise ForeignCheckpoint(
                f"{self.folder} holds a run of another configuration: give another --run"
            )
        self.networks.restore(stored)
        self.optimizer.load_state_dict(stored["optimizer"])
        log.info("resuming after step %d", stored["step"])
        return stored["step"], stored["seconds"]


def load_networks(checkpoint: Path) -> tuple[PretrainConfig, Networks]:
    """The networks of a checkpoint, in evaluation mode, on the CPU."""
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    config = PretrainConfig.model_validate(stored["config"])
    networks = Networks(config)
    networks.restore(stored)
    return config, networks.eval()


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Learning rate of a step: a linear rise, then a cosine to a hundredth of the maximum."""
    warm = max(1, round(_WARM_UP * config.steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    done = torch.tensor((step - warm) / max(1, config.steps - warm))
    share = 0.01 + 0.99 * 0.5 * (1.0 + torch.cos(done * torch.pi).item())
    return config.learning_rate * share


class _RunLog:
    """Writes one row per step to CSV and TensorBoard; a resumed run rewrites later rows."""

    COLUMNS = (
        "step",
        "loss",
        "loss_pairs",
        "loss_series",
        "loss_imagery",
        "temperature",
        "learning_rate",
        *PairScores.__dataclass_fields__,
        "seconds",
    )

    def __init__(self, folder: Path, *, first: int) -> None:
        path = folder / LOG_FILE
        kept = _rows_until(path, first)
        self.file = path.open("w", newline="")
        self.csv = csv.DictWriter(self.file, self.COLUMNS)
        self.csv.writeheader()
        self.csv.writerows(kept)
        self.file.flush()
        self.events = SummaryWriter(str(folder / "events"), purge_step=first + 1)

    def write(self, row: Mapping[str, float]) -> None:
        self.csv.writerow(row)
        self.file.flush()
        for name, value in row.items():
            if name != "step":
                self.events.add_scalar(name, value, int(row["step"]))

    def flush(self) -> None:
        self.events.flush()

    def close(self) -> None:
        self.file.close()
        self.events.close()


def _rows_until(path: Path, step: int) -> list[dict[str, str]]:
    if not path.exists() or step == 0:
        return []
    with path.open(newline="") as file:
        # A row that a kill cut short lacks its last column, and its step may lack a digit.
        return [row for row in csv.DictReader(file) if row["seconds"] and int(row["step"]) <= step]


def _report(row: Mapping[str, float], steps: int, *, begun: bool) -> None:
    """Progress, with an estimate of the time left."""
    step = int(row["step"])
    if not (begun or step % 10 == 0 or step == steps):
        return
    left = row["seconds"] / step * (steps - step)
    found = f" (pairs {row['loss_pairs']:.3f})" if "loss_pairs" in row else ""
    if "pixel_to_patch" in row:
        found += f", retrieval {row['pixel_to_patch']:.3f} / {row['patch_to_pixel']:.3f}"
    log.info(
        "step %d of %d, loss %.3f%s, %.1f min left",
        step,
        steps,
        row["loss"],
        found,
        left / 60.0,
    )


def _optimizer(networks: Networks, config: PretrainConfig) -> AdamW:
    """AdamW; biases, norms and temperatures are not decayed."""
    decayed = [p for p in networks.parameters() if p.ndim > 1]
    free = [p for p in networks.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.learning_rate)


def _pair_sampler(config: PretrainConfig, sources: Sources) -> PairSampler:
    return PairSampler(
        scenes=sources.scenes,
        weights=sources.weights,
        pixel_bands=BANDS,
        patch_bands=PATCH_BANDS,
        side=config.side,
        window_days=config.window_days,
        min_observations=config.min_observations,
        groups=config.groups,
        per_group=config.per_group,
        pixel_augmentation=config.pixel_augmentation,
        patch_augmentation=config.patch_augmentation,
    )


def _series_sampler(config: PretrainConfig, sources: Sources) -> SeriesViewSampler | None:
    if not sources.series or not config.series_views:
        return None
    groups = min(4, config.series_views)
    return SeriesViewSampler(
        sets=sources.series,
        window_days=config.window_days,
        groups=groups,
        per_group=config.series_views // groups,
        augmentation=config.pixel_augmentation,
    )


def _imagery_sampler(config: PretrainConfig, sources: Sources) -> ImageryViewSampler | None:
    if sources.imagery is None or not config.imagery_views:
        return None
    return ImageryViewSampler(
        patches=sources.imagery,
        side=config.side,
        size=config.imagery_views,
        augmentation=config.patch_augmentation,
    )


def _mixed(seed: int, step: int) -> int:
    """A seed for torch that differs for each seed and step."""
    return seed * 1_000_003 + step
