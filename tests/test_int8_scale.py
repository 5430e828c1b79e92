"""The scale of int8 embeddings: as the service stores them, and what the probes lose."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.registry import ZOO, load_bundle
from service.write.predictions import quantised
from training.embedding_int8 import embedded, measure_int8
from training.errors import TrainingError
from training.export import VersionNotRaised
from training.int8_scale import Int8Loses, as_stored, compare, fit_scale, int8_of, loss_of
from training.probe import Labelled

pytestmark = pytest.mark.slow


@pytest.fixture
def easy() -> Labelled:
    """Two classes on either side of 0, which a coarse scale still separates."""
    random = np.random.default_rng(0)
    labels = np.arange(400) % 2
    centres = np.where(labels == 0, -1.0, 1.0)[:, None]
    embeddings = (centres + 0.2 * random.normal(size=(400, 6))).astype(np.float32)
    return Labelled(
        embeddings=embeddings,
        labels=labels,
        validation=np.arange(400) >= 200,
        places=np.arange(400) // 4,
    )


def test_training_and_service_store_the_same_numbers() -> None:
    embeddings = np.random.default_rng(1).normal(size=(500, 8)).astype(np.float32) * 3
    scale = 0.02  # clips
    np.testing.assert_allclose(
        as_stored(embeddings, scale), quantised(embeddings, scale) * np.float32(scale), rtol=1e-6
    )


def test_the_scale_leaves_headroom_above_the_training_places(easy: Labelled) -> None:
    field, found = int8_of({"easy": easy})
    train = easy.embeddings[:200]
    assert field.scale == fit_scale(train)
    assert field.scale * 127 == pytest.approx(1.25 * np.abs(train).max(), rel=1e-3)
    assert field.loss == {"accuracy": 0.0, "macro_f1": 0.0}
    assert [(one.probe, one.n, one.places, one.clipped) for one in found] == [
        ("linear_probe", 200, 50, 0.0), ("knn_15", 200, 50, 0.0),
    ]  # fmt: skip


def test_a_scale_that_loses_is_refused(easy: Labelled) -> None:
    # With steps of 4, everything becomes 0.
    with pytest.raises(Int8Loses, match="accuracy"):
        int8_of({"easy": easy}, 4.0)
    assert loss_of(compare("easy", easy, 4.0))["accuracy"] < -0.4


def test_clipped_values_are_counted(easy: Labelled) -> None:
    twice = replace(easy, embeddings=np.where(np.arange(6) < 3, easy.embeddings * 100, 0.0))
    (one, _) = compare("x", twice.__class__(**vars(twice)), 0.01)
    assert one.clipped == pytest.approx((np.abs(twice.embeddings) > 1.275).mean())


def test_other_models_and_the_same_version_are_refused(tmp_path: Path) -> None:
    pixel = ZOO / "embed-pixel"
    version = load_bundle(pixel).card.version
    how = {"data": tmp_path, "report": tmp_path / "r.md"}
    with pytest.raises(TrainingError, match="give bundles of embeddings"):
        measure_int8([ZOO / "forecast-vi"], **how)
    with pytest.raises(VersionNotRaised):
        measure_int8([pixel], version=version, **how)
    assert not (tmp_path / "r.md").exists()


@pytest.mark.parametrize("name", ["embed-pixel", "embed-patch"])
def test_shipped_bundles_state_a_scale_and_a_loss_below_half_a_point(name: str) -> None:
    field = load_bundle(ZOO / name).card.embedding_int8
    assert field is not None
    assert min(field.loss.values()) >= -0.005


def test_the_table_holds_what_the_shipped_pixel_bundle_loses(shared_data: Path) -> None:
    """On the smallest of its data sets; the command writes all of them."""
    folder = ZOO / "embed-pixel"
    card = load_bundle(folder).card
    assert card.embedding_int8 is not None
    data = embedded(folder, card, shared_data)["four campaigns"]
    found = compare("four campaigns", data, card.embedding_int8.scale)
    table = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    rows = re.findall(r"\| embed-pixel, four campaigns \|.*", table)
    assert len(rows) == len(found) == 2
    for one, row in zip(found, rows, strict=True):
        cells = [float(cell.split()[0]) for cell in row.split(" | ")[5:9]]
        # A pixel or two: products of another CPU differ in the last digit.
        np.testing.assert_allclose(cells[:2], one.accuracy, atol=0.004)
        np.testing.assert_allclose(cells[2:], one.macro_f1, atol=0.02)
    assert json.loads((folder / "card.json").read_text())["embedding_int8"]["loss"]
