"""Predictions: bands, records and tallies against plain NumPy."""

from __future__ import annotations

import json
import math
from datetime import date

import numpy as np
import pytest

from benchmarks.tiny_zoo import write_bundle
from models.card import LegendClass
from models.registry import load_bundle
from service.errors import InvalidRequest
from service.write.predictions import (
    ClassPredictions,
    EmbeddingPredictions,
    classes_with_confidence,
    entropy,
    predictions_of,
)

LEGEND = tuple(
    LegendClass(value=v, name=name, color=f"#0000{v:02x}", code=v * 10)
    for v, name in enumerate(["water", "trees", "crops", "bare"])
)


def probabilities(count, seed=0):
    raw = np.random.default_rng(seed).exponential(size=(count, len(LEGEND)))
    return (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)


def test_entropy_is_shannons_in_nats():
    found = probabilities(200)
    expected = [-sum(float(p) * math.log(p) for p in row) for row in found]
    np.testing.assert_allclose(entropy(found), expected, rtol=1e-5)
    certain = np.array([[0, 1, 0, 0]], np.float32)
    assert entropy(certain)[0] == 0
    assert not np.signbit(entropy(certain)[0])
    assert entropy(np.full((1, 4), 0.25, np.float32))[0] == pytest.approx(np.log(4))
    assert np.isnan(entropy(np.full((1, 4), np.nan, np.float32)))[0]


def test_a_pixel_with_a_missing_probability_has_no_class():
    found = probabilities(5)
    found[2] = np.nan
    found[3, 1] = np.nan
    best, confidence = classes_with_confidence(found)
    assert best.dtype == np.uint8
    assert best[[2, 3]].tolist() == [255, 255]
    assert np.isnan(confidence[[2, 3]]).all()
    assert best[[0, 1, 4]].tolist() == found[[0, 1, 4]].argmax(axis=1).tolist()
    assert confidence[[0, 1, 4]].tolist() == found[[0, 1, 4]].max(axis=1).tolist()


def test_a_class_tally_does_not_depend_on_the_parts():
    found = probabilities(1000)
    found[::7] = np.nan
    hectares = np.random.default_rng(1).random(1000)
    predictions = ClassPredictions(legend=LEGEND, outputs=())
    tally = predictions.tally()
    for part in np.array_split(np.arange(1000), 13):
        tally.add(tally.count(found[part], hectares[part]))
    there = ~np.isnan(found).any(axis=1)
    best = np.where(there, np.nan_to_num(found).argmax(axis=1), -1)
    rows = tally.summary()["classes"]
    assert [row["name"] for row in rows] == [c.name for c in LEGEND]
    for row in rows:
        mine = best == row["value"]
        assert row["pixels"] == mine.sum()
        assert row["hectares"] == pytest.approx(hectares[mine].sum())
        assert row["share"] == pytest.approx(mine.sum() / there.sum())
        assert row["mean_confidence"] == pytest.approx(found[mine].max(axis=1).mean(), rel=1e-5)
    assert sum(row["share"] for row in rows) == pytest.approx(1)


def test_an_empty_tally_is_json_without_nan():
    tally = ClassPredictions(legend=LEGEND, outputs=()).tally()
    tally.add(tally.count(np.full((3, 4), np.nan, np.float32), np.ones(3)))
    text = json.dumps(tally.summary(), allow_nan=False)
    assert json.loads(text)["classes"][0]["mean_confidence"] is None
    json.dumps(EmbeddingPredictions(size=3).tally().summary(), allow_nan=False)


@pytest.fixture
def forecast(tmp_path):
    card = load_bundle(write_bundle(tmp_path, "f", "forecast", "pixel")).card
    dates = [date(2021, 1, 1 + 10 * n) for n in range(3)]
    return card, card.window.resolve(dates)


def test_forecast_bands_are_ordered_by_index_date_and_quantile(forecast):
    card, window = forecast
    predictions = predictions_of(card, ("q90", "q10"), horizon=2, time_window=window)
    (layer,) = predictions.layers
    assert layer.name == "forecast"
    assert layer.bands == tuple(
        f"{index}_{day}_{q}"
        for index in ("NDVI", "EVI", "SAVI")
        for day in ("2021-01-31", "2021-02-10")
        for q in ("q10", "q90")
    )
    values = np.random.default_rng(0).random((6, 3, 3, 3), np.float32)  # N, H, S, Q
    bands = predictions.bands(values)["forecast"]
    for b, name in enumerate(layer.bands):
        index, day, q = name.split("_")
        h = ["2021-01-31", "2021-02-10"].index(day)
        s = ["NDVI", "EVI", "SAVI"].index(index)
        np.testing.assert_array_equal(bands[b], values[:, h, s, ["q10", "q50", "q90"].index(q)])


def test_forecast_records_and_tally(forecast):
    card, window = forecast
    predictions = predictions_of(card, ("q10",), time_window=window)
    values = np.random.default_rng(0).random((40, 3, 3, 3), np.float32)
    record = predictions.record(values[7])
    assert record["dates"] == ["2021-01-31", "2021-02-10", "2021-02-20"]
    assert record["EVI"]["q90"] == pytest.approx(values[7, :, 1, 2].tolist())
    values[3] = np.nan
    tally = predictions.tally()
    tally.add(tally.count(values[:15], np.ones(15)))
    tally.add(tally.count(values[15:], np.ones(25)))
    summary = tally.summary()
    mean = np.nanmean(values.astype(float), axis=0)
    assert set(summary["SAVI"]) == {"mean", "q10"}
    assert summary["SAVI"]["mean"] == pytest.approx(mean[:, 2, 1].tolist())
    assert summary["SAVI"]["q10"] == pytest.approx(mean[:, 2, 0].tolist())


@pytest.mark.parametrize("horizon", [0, 4])
def test_an_invalid_horizon_is_an_error_with_both_limits(forecast, horizon):
    card, window = forecast
    with pytest.raises(InvalidRequest, match=rf"horizon: {horizon} is not .* from 1 to 3"):
        predictions_of(card, ("q50",), horizon=horizon, time_window=window)


def test_an_unknown_output_is_named_in_the_error(forecast, tmp_path):
    card, window = forecast
    with pytest.raises(InvalidRequest, match=r"unknown class; allowed: q10, q50, q90"):
        predictions_of(card, ("class",), time_window=window)
    classes = load_bundle(write_bundle(tmp_path, "c", "classify-pixels", "pixel")).card
    with pytest.raises(InvalidRequest, match="unknown q50; allowed: class, confidence"):
        predictions_of(classes, ("class", "q50"))


def test_a_class_record_has_all_members():
    found = probabilities(3)
    record = ClassPredictions(legend=LEGEND, outputs=()).record(found[1])
    best = int(found[1].argmax())
    assert (record["value"], record["class"]) == (best, LEGEND[best].name)
    assert record["confidence"] == pytest.approx(float(found[1].max()))
    assert list(record["probabilities"]) == [c.name for c in LEGEND]
    json.dumps(record, allow_nan=False)
