"""Synthetic scenes: seasons, fields, clouds."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import numpy as np
import pytest

from training.datasets.synthetic import (
    COVERS,
    double_logistic,
    make_dates,
    make_pixels,
    make_scene,
)

DATES = make_dates(date(2021, 1, 1))


def ndvi(values: np.ndarray) -> np.ndarray:
    """Of (..., C) in the order B02, B03, B04, B08."""
    return (values[..., 3] - values[..., 2]) / (values[..., 3] + values[..., 2])


def test_greenness_is_halfway_on_the_day_of_the_rise():
    days = np.arange(365.0)
    season = double_logistic(days, rise=100, fall=250, speed=0.1)
    assert season[100] == pytest.approx(0.5, abs=1e-3)
    assert season[250] == pytest.approx(0.5, abs=1e-3)
    assert season[175] > 0.99
    assert season[10] < 0.01


def test_the_same_seed_gives_the_same_scene():
    one, two, other = (make_scene(size=16, dates=DATES, seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(one.values, two.values)
    assert not np.array_equal(one.values, other.values)


def test_each_cover_peaks_in_its_season():
    for number, cover in enumerate(COVERS[:2]):
        scene = make_scene(size=24, dates=DATES, fields=6, seed=1, clouds=0.0, covers=(cover,))
        assert scene.labels is not None
        assert (scene.labels == 0).all(), number
        series = ndvi(scene.pixels(scene.bands).values).mean(axis=0)
        peak = DATES[int(series.argmax())].timetuple().tm_yday
        assert cover.rise < peak < cover.fall
        assert series.max() > 0.6
        assert series.min() < 0.4


def test_clouds_are_bright_not_valid_and_about_as_many_as_asked():
    shares = [
        1.0 - make_scene(size=16, dates=DATES, seed=s, clouds=0.4).valid.mean() for s in range(12)
    ]
    assert np.mean(shares) == pytest.approx(0.4, abs=0.08)
    scene = make_scene(size=16, dates=DATES, seed=0, clouds=0.4)
    blue = scene.values[:, 0]
    assert blue[~scene.valid].min() > blue[scene.valid].max()
    assert make_scene(size=16, dates=DATES, seed=0, clouds=0.0).valid.all()


def test_fields_are_uniform_in_class_and_connected_cells():
    scene = make_scene(size=32, dates=DATES, fields=10, seed=5)
    assert scene.fields is not None
    assert scene.labels is not None
    for field in np.unique(scene.fields):
        assert len(np.unique(scene.labels[scene.fields == field])) == 1
    # A Voronoi cell is convex: along any row a field is one stretch.
    for row in scene.fields:
        starts = row[np.insert(np.diff(row) != 0, 0, True)]
        assert len(starts) == len(set(starts))


def test_pixels_are_split_by_field():
    pixels = make_pixels(make_scene(size=32, dates=DATES, fields=20, seed=2), validation=0.3)
    held = set(pixels.places[pixels.validation])
    assert len(held) == pytest.approx(0.3 * len(set(pixels.places)), abs=1)
    assert not held & set(pixels.places[~pixels.validation])


def test_classes_can_be_separated_by_nearest_mean():
    pixels = make_pixels(make_scene(size=48, dates=DATES, fields=60, seed=7, clouds=0.0))
    pixels = replace(pixels, values=np.nan_to_num(pixels.values))
    assert pixels.labels is not None
    train, rest = ~pixels.validation, pixels.validation
    flat = pixels.values.reshape(len(pixels.values), -1)
    means = {k: flat[train & (pixels.labels == k)].mean(0) for k in np.unique(pixels.labels[train])}
    names = np.array(list(means))
    distance = np.stack([np.square(flat[rest] - m).sum(1) for m in means.values()])
    right = (names[distance.argmin(0)] == pixels.labels[rest]).mean()
    assert right > 2.0 / len(names)
