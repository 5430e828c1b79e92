"""Pretraining: it learns, and a killed run resumes exactly."""

from __future__ import annotations

import csv
import os
import shlex
import signal
import subprocess
import sys
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kits.patience import soon
from training.__main__ import app
from training.card import pretrain_command
from training.config import PatchEncoderConfig, PixelEncoderConfig
from training.datasets import PatchSet
from training.datasets.synthetic import make_dates, make_pixels, make_scene
from training.pretrain import (
    CHECKPOINT,
    LOG_FILE,
    ForeignCheckpoint,
    NothingToLearn,
    PretrainConfig,
    Pretraining,
    learning_rate,
    load_networks,
    pretrain,
)
from training.pretraining_data import Places, SourceNotGiven, Sources, SourcesConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TINY = PretrainConfig(
    steps=8,
    groups=2,
    per_group=12,
    series_views=0,
    imagery_views=0,
    side=16,
    pixel=PixelEncoderConfig(width=8, embedding=16, dropout=0.1),
    reflectance=True,
    patch=PatchEncoderConfig(width=8, depths=(0, 0, 0, 1), embedding=16, dropout=0.1),
    projection=16,
    measure_every=4,
    keep_every=3,
    measured_batches=1,
    sources=SourcesConfig(stacks=(), synthetic=2, series=(), eurosat=False),
)
NOWHERE = Places(data=Path("nowhere"))


def rows(folder: Path) -> list[dict[str, str]]:
    """The log, without the time it took."""
    with (folder / LOG_FILE).open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    stored = torch.load(folder / CHECKPOINT, weights_only=True)
    return {
        f"{part}.{name}": value
        for part in ("pixel_encoder", "patch_encoder", "projections", "losses")
        for name, value in stored[part].items()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    pretrain(TINY, places=NOWHERE, folder=folder, device="cpu")
    return folder


# Runs `python -m training`, but waits for ever before the batch of step 5.
_WAITS = """
import sys, threading
from pathlib import Path
from training.__main__ import app
from training.pretrain import Pretraining

batch, reached = Pretraining._batch, Path(sys.argv.pop())

def waits(self, step):
    if step == 5:
        reached.touch()
        threading.Event().wait()
    return batch(self, step)

Pretraining._batch = waits
app()
"""


def test_a_killed_run_goes_on_exactly(tmp_path, undisturbed):
    # The command on the card, as a user runs it.
    words = shlex.split(pretrain_command(TINY, tmp_path))[1:]
    options = ["--device", "cpu", "--data", "nowhere"]
    assert words[:2] == ["-m", "training"]
    held = [sys.executable, "-c", _WAITS, *words[2:], *options, str(tmp_path / "reached")]
    run = subprocess.Popen(held, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert soon(lambda: run.poll() is not None or (tmp_path / "reached").exists())
        assert run.poll() is None
        os.kill(run.pid, signal.SIGKILL)
    finally:
        run.wait()
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 3
    # Rows that the kill may have left after the checkpoint are replaced, not kept twice.
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write("1")  # a row of step 10, say, cut after its first digit
    app([*words[2:], *options], standalone_mode=False)
    assert rows(tmp_path) == rows(undisturbed)
    torch.testing.assert_close(weights(tmp_path), weights(undisturbed), rtol=0, atol=0)


def test_the_log_holds_what_is_promised(undisturbed):
    log = rows(undisturbed)
    assert [int(row["step"]) for row in log] == list(range(1, 9))
    assert all(float(row["loss"]) > 0 for row in log)
    measured = [row for row in log if row["pixel_to_patch"]]
    assert [int(row["step"]) for row in measured] == [4, 8]
    for name in ("patch_to_pixel", "uniformity_patch", "spread_pixel", "alignment"):
        assert all(row[name] for row in measured)
    assert list((undisturbed / "events").iterdir())


def test_the_checkpoint_gives_the_encoders_back(undisturbed):
    config, networks = load_networks(undisturbed / CHECKPOINT)
    assert config == TINY
    stored = torch.load(undisturbed / CHECKPOINT, weights_only=True)
    torch.testing.assert_close(networks.patch.state_dict(), stored["patch_encoder"])
    torch.testing.assert_close(networks.pixel.encoder.state_dict(), stored["pixel_encoder"])


def test_a_folder_of_another_run_is_refused(undisturbed):
    other = TINY.model_copy(update={"seed": 1})
    with pytest.raises(ForeignCheckpoint, match="another configuration"):
        pretrain(other, places=NOWHERE, folder=undisturbed, device="cpu")


def test_a_source_without_its_place_is_named(tmp_path):
    config = TINY.model_copy(update={"sources": SourcesConfig(stacks=(), pastis=1.0)})
    with pytest.raises(SourceNotGiven, match="pastis"):
        pretrain(config, places=NOWHERE, folder=tmp_path, device="cpu")


def test_it_learns_to_find_the_place(tmp_path):
    changes = {"steps": 50, "learning_rate": 5e-3, "measure_every": 50, "keep_every": 50}
    networks = pretrain(
        TINY.model_copy(update=changes), places=NOWHERE, folder=tmp_path, device="cpu"
    )
    losses = [float(row["loss_pairs"]) for row in rows(tmp_path)]
    assert sum(losses[-10:]) < sum(losses[:10]) * 0.9
    last = rows(tmp_path)[-1]
    # On fields of scenes it never saw: well above the chance of 5 in 24.
    assert float(last["pixel_to_patch_5"]) > 0.35
    assert all(torch.isfinite(p).all() for p in networks.parameters())


def test_a_run_in_chunks_starts_as_the_whole_one_does(tmp_path, undisturbed):
    complete = TINY.model_copy(update={"steps": 2, "measure_every": 2})
    chunked = complete.model_copy(update={"chunk": 8})
    for name, config in (("whole", complete), ("chunked", chunked)):
        pretrain(config, places=NOWHERE, folder=tmp_path / name, device="cpu")
    one, two = (float(rows(tmp_path / n)[0]["loss"]) for n in ("whole", "chunked"))
    # Only the statistics of batch normalisation and the dropout differ.
    assert one == pytest.approx(two, rel=0.25)
    assert weights(tmp_path / "chunked").keys() == weights(undisturbed).keys()


def test_the_learning_rate_rises_and_falls():
    config = TINY.model_copy(update={"steps": 1000})
    rates = [learning_rate(config, s) for s in range(1000)]
    peak = rates.index(max(rates))
    assert peak == pytest.approx(50, abs=2)
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(config.learning_rate)
    assert rates[-1] < config.learning_rate * 0.02


def sources_of_all_kinds() -> Sources:
    """A scene, series and imagery; nothing is held out."""
    scene = make_scene(size=32, dates=make_dates(date(2020, 1, 1), days=400), seed=0)
    rng = np.random.default_rng(0)
    tones = rng.uniform(0.02, 0.25, (64, 3, 1, 1)) + rng.normal(0, 0.002, (64, 3, 32, 32))
    imagery = PatchSet(
        source="tones",
        bands=("B04", "B03", "B02"),
        values=tones.astype(np.float32),
        scale=1.0,
        places=np.arange(64),
        validation=np.zeros(64, dtype=bool),
    )
    return Sources(
        scenes=[scene],
        weights=[1.0],
        held_out=[],
        series=[make_pixels(scene).select(("B02", "B04", "B08"))],
        imagery=imagery,
    )


def of_all_kinds(folder: Path, **changes: float) -> Pretraining:
    config = TINY.model_copy(update={"series_views": 16, "imagery_views": 16, **changes})
    return Pretraining(config, sources_of_all_kinds(), folder, torch.device("cpu"))


def test_views_of_either_side_alone_are_learned_from(tmp_path):
    of_all_kinds(tmp_path, steps=40, learning_rate=5e-3).run()
    log = rows(tmp_path)
    for name in ("loss_pairs", "loss_series", "loss_imagery"):
        losses = [float(row[name]) for row in log]
        assert sum(losses[-8:]) < sum(losses[:8]), name
    # Nothing is held out, so nothing is measured.
    assert not any(row["pixel_to_patch"] for row in log)


WITHOUT = {
    "pairs": {"pairs_weight": 0.0},
    "views": {"series_weight": 0.0, "imagery_weight": 0.0},
    "all but series": {"pairs_weight": 0.0, "imagery_weight": 0.0},
}


@pytest.mark.parametrize("chunk", [8, 4096])
@pytest.mark.parametrize(
    ("left_out", "untrained"),
    [
        ("pairs", {"projections.pixel.", "projections.patch.", "losses.pairs"}),
        ("views", {"projections.pixel_views", "projections.patch_views"}),
        ("all but series", {"patch_encoder", "projections.patch_views", "losses.imagery"}),
    ],
)
def test_a_comparison_of_weight_0_trains_nothing(tmp_path, chunk, left_out, untrained):
    run = of_all_kinds(tmp_path, steps=3, chunk=chunk, **WITHOUT[left_out])
    parts = run.networks.checkpoint().items()
    before = {f"{part}.{name}": v.clone() for part, state in parts for name, v in state.items()}
    run.run()
    after = weights(tmp_path)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    for part in untrained:
        assert not any(name.startswith(part) for name in changed), part
    assert any(name.startswith("pixel_encoder") for name in changed)
    assert all(torch.isfinite(value).all() for value in after.values())
    row = rows(tmp_path)[-1]
    zero = {name.partition("_")[0] for name in WITHOUT[left_out]}
    for name in ("pairs", "series", "imagery"):
        assert bool(row[f"loss_{name}"]) == (name not in zero)


def test_rows_of_a_comparison_of_weight_0_count_in_the_batch_statistics(tmp_path):
    found = []
    for name, changes in {"all": {}, **WITHOUT}.items():
        run = of_all_kinds(tmp_path / name, steps=1, **changes)
        run.folder.mkdir()
        networks = run.run()
        # The statistics of the first step, which the weights before training determine.
        found.append({k: v for k, v in networks.pixel.named_buffers() if "running" in k})
    assert found[0]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_a_run_without_some_comparisons_resumes_exactly(tmp_path, monkeypatch):
    ended = {}
    ahead = Pretraining._ahead
    for name in ("undisturbed", "stopped"):
        changes = {"steps": 5, "keep_every": 2, **WITHOUT["all but series"]}
        run = of_all_kinds(tmp_path / name, **changes)
        run.folder.mkdir()
        if name == "stopped":
            # Ends after step 3, of which the checkpoint holds two.
            with monkeypatch.context() as patch:
                patch.setattr(Pretraining, "_ahead", lambda *given: islice(ahead(*given), 3))
                run.run()
            run = of_all_kinds(tmp_path / name, **changes)
        run.run()
        ended[name] = weights(tmp_path / name)
    torch.testing.assert_close(ended["stopped"], ended["undisturbed"], rtol=0, atol=0)


def test_a_loss_without_a_comparison_is_refused(tmp_path):
    changes = {"pairs_weight": 0.0, "series_weight": 0.0, "imagery_weight": 0.0}
    with pytest.raises(NothingToLearn, match="pairs_weight=1"):
        of_all_kinds(tmp_path, **changes)
    # Without views there is nothing beside the pairs, whatever the weights of the views are.
    with pytest.raises(NothingToLearn):
        of_all_kinds(tmp_path, pairs_weight=0.0, series_views=0, imagery_views=0)
