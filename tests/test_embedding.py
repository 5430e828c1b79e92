"""The embedding bundles: made from a checkpoint, and as they are shipped."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from models.graph import PatchGraph
from models.registry import ZOO, Bundle, load_bundle
from training.config import BANDS, PatchEncoderConfig, PixelEncoderConfig
from training.datasets import PatchSet, PixelSet
from training.datasets.eurosat import eurosat_rgb
from training.embedding import embed_crops, embed_patches, measure_retrieval, pixel_graph
from training.pretrain import Networks, PretrainConfig
from training.pretraining_data import Places, SourcesConfig, open_sources

pytestmark = pytest.mark.slow

TINY = PretrainConfig(
    groups=2,
    per_group=8,
    side=16,
    pixel=PixelEncoderConfig(width=8, embedding=16),
    patch=PatchEncoderConfig(width=8, depths=(0, 0, 0, 1), embedding=16),
    projection=8,
    sources=SourcesConfig(stacks=(), synthetic=2, series=(), eurosat=False),
)


@pytest.fixture(scope="module")
def networks() -> Networks:
    torch.manual_seed(0)
    return Networks(TINY).eval()


def test_crops_are_embedded_in_order_and_without_the_unlabelled(networks):
    rng = np.random.default_rng(0)
    values = rng.uniform(0.02, 0.4, (9, 36, 3)).astype(np.float32)
    valid = rng.random((9, 36)) < 0.8
    valid[4, 3:] = False  # too few observations
    labels = np.array([0, 1, -1, 1, 0, 2, 2, 0, 1])
    crops = PixelSet(
        source="x",
        bands=BANDS,
        dates=tuple(date(2021, 1, 1) + timedelta(days=10 * i) for i in range(36)),
        values=values,
        valid=valid,
        places=np.arange(9),
        validation=np.arange(9) % 2 == 1,
        labels=labels,
    )
    graph = pixel_graph(networks)
    found = embed_crops(graph, crops)
    kept = [0, 1, 3, 5, 6, 7, 8]
    assert found.labels.tolist() == labels[kept].tolist()
    assert found.validation.tolist() == [i % 2 == 1 for i in kept]
    for row, i in enumerate(kept):
        alone = graph(
            torch.from_numpy(values[i : i + 1]),
            torch.from_numpy(valid[i : i + 1]),
            torch.arange(36) * 10.0,
        )
        np.testing.assert_allclose(found.embeddings[row], alone.detach()[0], atol=1e-5)


def test_patches_are_embedded_as_reflectance(networks):
    values = np.random.default_rng(0).integers(0, 255, (5, 3, 64, 64)).astype(np.uint8)
    patches = PatchSet(
        source="x",
        bands=("B04", "B03", "B02"),
        values=values,
        scale=0.001,
        places=np.arange(5),
        validation=np.arange(5) > 2,
        labels=np.arange(5),
    )
    graph = PatchGraph(encoder=networks.patch, head=None)
    found = embed_patches(graph, patches)
    expected = graph(torch.from_numpy(values.astype(np.float32) * 0.001)).detach()
    np.testing.assert_allclose(found.embeddings, expected, atol=1e-5)
    assert found.labels.tolist() == [0, 1, 2, 3, 4]


def test_retrieval_is_measured_with_the_networks_given(networks, tmp_path):
    sources = open_sources(TINY.sources, Places(data=tmp_path), seed=0)
    scores = measure_retrieval(networks, TINY, sources, tmp_path)
    assert scores["candidates"] == 16
    assert set(scores) == {"candidates", "chance", "note", "all", "synthetic"}
    assert 0.0 <= scores["all"]["pixel_to_patch"] < 0.6
    assert not any(tmp_path.iterdir())


def shipped(name: str) -> tuple[Bundle, onnxruntime.InferenceSession]:
    bundle = load_bundle(ZOO / name)
    session = onnxruntime.InferenceSession(bundle.path(), providers=["CPUExecutionProvider"])
    return bundle, session


def test_the_pixel_bundle_embeds_pixels_and_leaks_nothing():
    bundle, session = shipped("embed-pixel")
    rng = np.random.default_rng(0)
    inputs = {
        "values": rng.uniform(0.02, 0.5, (6, 20, 3)).astype(np.float32),
        "valid": rng.random((6, 20)) < 0.8,
        "days": np.sort(rng.uniform(0, 359, 20)).astype(np.float32),
    }
    inputs["valid"][2] = False
    (found,) = session.run(["embedding"], inputs)
    assert found.shape == (6, bundle.card.embedding)
    assert np.isnan(found[2]).all()
    clear = [0, 1, 3, 4, 5]
    alone = {**inputs, "values": inputs["values"][clear], "valid": inputs["valid"][clear]}
    np.testing.assert_allclose(found[clear], session.run(None, alone)[0], atol=1e-5)
    assert np.isfinite(found[clear]).all()


def some_of(eurosat: Path, folder: Path, each: int) -> PatchSet:
    """A random part of both lists of EuroSAT."""
    rng = np.random.default_rng(1)
    for name in ("train.txt", "val.txt"):
        lines = (eurosat / name).read_text().splitlines()
        chosen = rng.choice(lines, size=each, replace=False)
        (folder / name).write_text("\n".join(chosen))
    for path in eurosat.glob("*.zip"):
        (folder / path.name).symlink_to(path)
    return eurosat_rgb(folder)


def test_the_patch_bundle_is_as_good_as_its_card_says(shared_data, tmp_path):
    bundle, session = shipped("embed-patch")
    patches = some_of(shared_data / "eurosat", tmp_path, 600)
    chosen = {held: np.flatnonzero(patches.validation == held) for held in (False, True)}
    embedded = {
        held: session.run(
            None, {"patches": patches.values[rows].astype(np.float32) * np.float32(patches.scale)}
        )[0]
        for held, rows in chosen.items()
    }
    assert embedded[True].shape == (600, bundle.card.embedding)
    unit = {k: v / np.linalg.norm(v, axis=1, keepdims=True) for k, v in embedded.items()}
    nearest = (unit[True] @ unit[False].T).argmax(axis=1)
    assert patches.labels is not None
    right = patches.labels[chosen[False]][nearest] == patches.labels[chosen[True]]
    stated = bundle.card.metrics["eurosat"]["pretrained"]["knn_15"]["accuracy"]
    # From a tenth of the examples and one neighbour: somewhat worse, but of that order.
    assert stated - 0.25 < right.mean() <= stated + 0.05
