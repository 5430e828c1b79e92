"""Pixel embeddings with few labels, in `benchmarks.few_labels`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.few_labels import (
    Arm,
    best_plain,
    compare,
    monthly,
    plain_arms,
    run_arms,
    shipped_arms,
    tables,
    three_bands,
)
from benchmarks.own_classes import Region
from training.config import PixelEncoderConfig
from training.pretrain import CHECKPOINT, Networks, PretrainConfig

TINY = PretrainConfig(pixel=PixelEncoderConfig(width=8, embedding=16), reflectance=True)
_DATES = [f"2021-{month:02d}-{day}" for month in range(1, 13) for day in ("03", "17")]


@pytest.fixture(scope="module")
def region() -> Region:
    """Four classes whose near infrared peaks in different months, 24 places, a tenth missing."""
    rng = np.random.default_rng(0)
    kind = np.tile(np.arange(4), 48)
    steps = np.arange(len(_DATES))
    peak = np.exp(-(((steps - 3 - 5 * kind[:, None]) / 3) ** 2))
    values = np.full((len(kind), len(_DATES), 4), 0.08) + rng.normal(0, 0.005, (1, 1, 4))
    values[..., 2] += 0.3 * peak
    values += rng.normal(0, 0.01, values.shape)
    values[rng.random(values.shape[:2]) < 0.1] = np.nan
    return Region(
        bands=("B02", "B04", "B08", "B11"),
        values=values.astype(np.float32),
        dates=np.broadcast_to(_DATES, values.shape[:2]),
        classes=np.array(["a", "b", "c", "d"])[kind],
        places=(np.arange(len(kind)) // 8).astype(str),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs that differ in their seed alone, and one of another encoder."""
    folder = tmp_path_factory.mktemp("runs")
    wide = PixelEncoderConfig(width=8, embedding=24)
    made = {
        "pairs-s0": TINY,
        "pairs-s1": TINY.model_copy(update={"seed": 1}),
        "wide": TINY.model_copy(update={"pixel": wide}),
    }
    for name, config in made.items():
        torch.manual_seed(config.seed)
        (folder / name).mkdir()
        stored = {**Networks(config).checkpoint(), "config": config.model_dump(mode="json")}
        torch.save(stored, folder / name / CHECKPOINT)
    return [folder / name for name in made]


def test_embeddings_are_those_of_the_pixel_alone(region, runs):
    arm = run_arms(runs[:1])[0]
    found = arm.features(region)
    torch.manual_seed(0)
    graph = Networks(TINY).pixel.eval()
    days = (np.array(_DATES, "datetime64[D]") - np.datetime64("2021-01-01")).astype(np.float32)
    for n in (0, 7, 100):
        own = region.values[n, :, :3]
        clear = np.isfinite(own).all(axis=1)
        with torch.inference_mode():
            alone = graph(
                torch.from_numpy(own[None, clear]),
                torch.ones(1, int(clear.sum()), dtype=torch.bool),
                torch.from_numpy(days[clear]),
            )
        np.testing.assert_allclose(found[n], alone[0, :16], atol=1e-4)
    assert found.shape == (len(region.values), 16)


def test_a_region_without_a_band_of_the_embedding_has_no_score(region, runs):
    narrow = replace(region, bands=("B02", "B04", "B8A", "B11"))
    assert run_arms(runs[:1])[0].features(narrow) is None


def test_the_parts_of_the_shipped_embedding_make_up_the_whole(region):
    whole, encoder, series = (arm.features(region) for arm in shipped_arms())
    np.testing.assert_array_equal(np.concatenate([encoder, series], axis=1), whole)
    # NDVI of the step that is nearest to a date, standardised with fixed numbers.
    days = (np.array(_DATES, "datetime64[D]") - np.datetime64("2021-01-01")).astype(int)
    known = np.isfinite(region.values[..., 0])
    ndvi = three_bands(region)[..., 3][known]
    steps = series.reshape(len(whole), 6, 36)[:, 0, np.clip(days // 10, 0, 35)][known]
    assert np.corrcoef(ndvi, steps)[0, 1] > 0.95


def test_plain_features_are_gap_free_bands_and_indices(region):
    known = np.isfinite(region.values[..., 0])
    blue, red, nir = (three_bands(region)[..., n] for n in range(3))
    np.testing.assert_array_equal(nir[known], region.values[..., 2][known])
    assert np.isfinite(nir).all()
    indices = three_bands(region)[..., 3:]
    np.testing.assert_allclose(indices[..., 0], (nir - red) / (nir + red), atol=1e-5)
    evi = 2.5 * (nir - red) / (nir + 6 * red - 7.5 * blue + 1)
    np.testing.assert_allclose(indices[..., 1], evi, atol=1e-5)


def test_months_are_means_of_their_clear_dates(region):
    values = region.values[:1].copy()
    values[0, 0], values[0, 1] = 0.1, 0.2  # January
    values[0, 2], values[0, 3] = np.nan, 0.5  # February
    values[0, 4], values[0, 5] = np.nan, np.nan  # March
    values[0, 6], values[0, 7] = 0.2, 0.4  # April
    one = replace(region, values=values, dates=region.dates[:1])
    found = monthly(one)[0, :4, 0]
    march = 0.5 - 0.2 * 28 / 59  # days from the middle of February: to March, and to April
    np.testing.assert_allclose(found, [0.15, 0.5, march, 0.3], atol=1e-6)


def _broken(region: Region) -> None:
    raise AssertionError("scores that are kept are not measured again")


def test_runs_that_differ_in_their_seed_share_a_row_and_draws(region, runs, tmp_path):
    logistic = [arm for arm in plain_arms() if arm.row.startswith("logistic")]
    arms = [*logistic, *run_arms(runs)]
    out = tmp_path / "scores.json"
    columns = compare(arms, {"victoria": lambda: region}, labels=[10], draws=2, out=out)
    (column,) = columns
    assert column.scores.keys() == {arm.key for arm in arms}
    assert len(set(column.scores)) == len(arms)
    # The classes differ so clearly that a plain model learns them.
    assert column.scores[logistic[0].key].min() > 0.9
    text = tables(arms, columns)
    scores = [column.scores[arm.key] for arm in arms]
    both = (scores[2] + scores[3]) / 2
    error = np.std(both, ddof=1) / np.sqrt(2)
    assert f"| pairs | 2 | {both.mean():.3f} ± {error:.3f} |" in text
    above = 100 * (both - scores[0])
    seeds = np.std([100 * np.mean(score - scores[0]) for score in scores[2:4]], ddof=1)
    error = np.std(above, ddof=1) / np.sqrt(2)
    cell = f"{above.mean():+.1f} ± {error:.1f} (sd {seeds:.1f})"
    assert f"| pairs | {cell} | {cell} |" in text
    assert "| wide | 1 | " in text
    # A run again measures nothing, and prints the same.
    held = [replace(arm, features=_broken) for arm in arms]
    again = compare(held, {"victoria": lambda: region}, labels=[10], draws=2, out=out)
    assert tables(held, again) == text
    assert len(json.loads(out.read_text())) == 2 * len(arms)


def test_the_best_plain_model_is_that_of_the_same_bands(region):
    def guess(right: float):
        return lambda known: right

    arms = [
        Arm(row=row, key=row, three=three, plain=plain, features=three_bands, fit=guess(right))
        for row, three, plain, right in (
            ("a", True, True, 0.5),
            ("b", True, True, 0.6),
            ("c", False, True, 0.9),
            ("three", True, False, 0.61),
            ("ten", False, False, 0.88),
        )
    ]
    loads = {"victoria": lambda: region, "us-crops": lambda: region, "pune": lambda: region}
    columns = compare(arms, loads, labels=[10, 10_000], draws=2, out=None)
    assert [column.name for column in columns] == ["victoria, 10", "us-crops, 10", "pune, 10"]
    assert best_plain(arms, columns[0], three=True).row == "b"
    text = tables(arms, columns)
    assert "| three |" + " +1.0 ± 0.0 |" * 4 in text
    assert "| ten |" + " -2.0 ± 0.0 |" * 4 in text


def test_rare_classes_are_left_out(region):
    # Of 192 pixels, 48 are of each class, but for ten of "a", which get a class of their own.
    count = np.arange(len(region.classes)) // 4
    rare = (region.classes == "a") & (count % 5 == 0)
    made = replace(
        region,
        classes=np.where(rare, "e", region.classes),
        lonlat=np.stack([region.places.astype(float)] * 2, axis=1),
    )
    seen = {}

    def features(given: Region):
        seen[share] = set(given.classes)
        assert len(given.values) == len(given.dates) == len(given.places)
        np.testing.assert_array_equal(given.lonlat[:, 0], given.places.astype(float))
        return given.values

    arm = Arm(row="a", key="a", three=True, features=features, fit=lambda known: 0.5)
    for share in (0.05, 0.06):
        compare([arm], {"x": lambda: made}, labels=[5], draws=1, out=None, share=share)
    assert rare.sum() == 10  # 5.2 percent
    assert seen == {0.05: {"a", "b", "c", "d", "e"}, 0.06: {"a", "b", "c", "d"}}


def test_presto_sees_the_place_and_ndvi_with_the_weights_given(tmp_path):
    pytest.importorskip("einops")
    pytest.importorskip("rslearn")
    from benchmarks.peers import Presto, _presto_module

    torch.manual_seed(1)
    made = _presto_module().Presto.construct()
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    pixels = np.random.default_rng(0).uniform(0.02, 0.4, (2, 12, 10)).astype(np.float32)
    lonlat = np.array([[144.0, -37.0], [-93.0, 35.0]])
    presto = Presto(tmp_path / "weights.pt")
    found = presto.with_place(pixels, lonlat)
    x = torch.zeros(2, 12, 17)
    x[..., 2:12] = torch.from_numpy(pixels)
    x[..., 16] = (x[..., 8] - x[..., 4]) / (x[..., 8] + x[..., 4])
    mask = torch.zeros(2, 12, 17)
    mask[..., [0, 1, 12, 13, 14, 15]] = 1
    with torch.inference_mode():
        expected = made.encoder.eval()(
            x,
            torch.full((2, 12), 9),
            torch.tensor([[-37.0, 144.0], [35.0, -93.0]]),
            mask=mask,
            month=0,
        )
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(presto.with_place(pixels, lonlat[::-1]), found)
    # A missing band hides the others of its token, here B12 those of B11.
    pixels[..., 9] = np.nan
    hidden = presto.with_place(pixels, lonlat)
    pixels[..., 8] += 0.1
    torch.testing.assert_close(presto.with_place(pixels, lonlat), hidden)
