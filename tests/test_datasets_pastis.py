"""The PASTIS reader, on small files in the official layout."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from training.datasets.pastis import BANDS, CLASSES, Pastis, PastisError

DAYS = {10000: ["20180917", "20181012", "20190105"], 10001: ["20180920", "20181017"]}


def dates_of(patch: int) -> dict[str, int]:
    return {str(i): int(day) for i, day in enumerate(DAYS.get(patch, DAYS[10001]))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five patches of 8 x 8 pixels, one a fold; the dates of one as a string."""
    rng = np.random.default_rng(0)
    (tmp_path / "DATA_S2").mkdir()
    (tmp_path / "ANNOTATIONS").mkdir()
    features = []
    for fold in range(1, 6):
        patch = 9999 + fold
        dates = dates_of(patch)
        values = rng.integers(1, 9000, (len(dates), 10, 8, 8)).astype(np.int16)
        target = rng.integers(0, 20, (3, 8, 8)).astype(np.uint8)
        np.save(tmp_path / "DATA_S2" / f"S2_{patch}.npy", values)
        np.save(tmp_path / "ANNOTATIONS" / f"TARGET_{patch}.npy", target)
        properties = {
            "ID_PATCH": patch,
            "Fold": fold,
            "dates-S2": json.dumps(dates) if fold == 2 else dates,
        }
        features.append({"type": "Feature", "properties": properties, "geometry": None})
    collection = {"type": "FeatureCollection", "features": features}
    (tmp_path / "metadata.geojson").write_text(json.dumps(collection))
    return tmp_path


def test_folds_are_the_official_ones(folder):
    pastis = Pastis.open(folder)
    assert [e.number for e in pastis.part("train")] == [10000, 10001, 10002]
    assert [e.number for e in pastis.part("validation")] == [10003]
    assert [e.number for e in pastis.part("test")] == [10004]
    assert [s.validation for s in pastis.scenes("train")] == [False] * 3
    assert [s.validation for s in pastis.scenes("test")] == [True]


def test_dates_are_read_from_objects_and_from_strings(folder):
    entries = {e.number: e for e in Pastis.open(folder).entries}
    assert entries[10000].dates == (date(2018, 9, 17), date(2018, 10, 12), date(2019, 1, 5))
    assert entries[10001].dates == (date(2018, 9, 20), date(2018, 10, 17))


def test_values_stay_on_disk_and_are_scaled_where_they_are_read(folder):
    pastis = Pastis.open(folder)
    scene = next(pastis.scenes("train"))
    assert isinstance(scene.values, np.memmap)
    stored = np.load(folder / "DATA_S2" / "S2_10000.npy")
    values, valid = scene.read(("B04", "B8A"), slice(2, 5), slice(0, 8))
    assert valid.all()
    expected = stored[:, [BANDS.index("B04"), BANDS.index("B8A")], 2:5] / 10000.0
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert isinstance(scene.crop(slice(0, 2), slice(0, 2)).values, np.memmap)


def test_background_and_void_are_unlabelled(folder):
    scene = next(Pastis.open(folder).scenes("train"))
    target = np.load(folder / "ANNOTATIONS" / "TARGET_10000.npy")[0]
    assert scene.labels is not None
    assert {0, 19} <= set(target.ravel())
    np.testing.assert_array_equal(scene.labels == -1, (target == 0) | (target == 19))
    kept = scene.labels >= 0
    np.testing.assert_array_equal(scene.labels[kept], target[kept])
    assert set(CLASSES) == set(range(1, 19))


def test_labelled_pixels_are_drawn_once_and_match_the_files(folder):
    pastis = Pastis.open(folder)
    entry = pastis.entries[0]
    pixels = pastis.pixels(entry, bands=("B02", "B08"), most=20, seed=1)
    again = pastis.pixels(entry, bands=("B02", "B08"), most=20, seed=1)
    np.testing.assert_array_equal(pixels.values, again.values)
    assert len(pixels.values) == 20
    assert (pixels.places == 10000).all()
    assert pixels.labels is not None
    stored = np.load(folder / "DATA_S2" / "S2_10000.npy")[:, [0, 6]]
    target = np.load(folder / "ANNOTATIONS" / "TARGET_10000.npy")[0]
    series = stored.transpose(2, 3, 0, 1).reshape(64, 3, 2) / 10000.0
    for values, label in zip(pixels.values, pixels.labels, strict=True):
        matches = np.flatnonzero(np.isclose(series, values, rtol=1e-5).all(axis=(1, 2)))
        assert len(matches) == 1
        assert target.ravel()[matches[0]] == label


def test_zero_in_every_band_is_missing(folder):
    path = folder / "DATA_S2" / "S2_10000.npy"
    stored = np.load(path)
    stored[1, :, 3, 4] = 0
    np.save(path, stored)
    values, valid = next(Pastis.open(folder).scenes("train")).read(("B04",))
    assert not valid[1, 3, 4]
    assert np.isnan(values[1, 0, 3, 4])
    assert valid.sum() == valid.size - 1


def test_errors_name_the_fault_of_the_folder(folder):
    pastis = Pastis.open(folder)
    np.save(folder / "DATA_S2" / "S2_10001.npy", np.ones((5, 10, 8, 8), np.int16))
    with pytest.raises(PastisError, match="5 images but 2 dates"):
        list(pastis.scenes("train"))
    (folder / "DATA_S2" / "S2_10000.npy").unlink()
    with pytest.raises(PastisError, match=r"S2_10000\.npy"):
        next(pastis.scenes("train"))
    (folder / "metadata.geojson").write_text('{"features": [{"properties": {"Fold": 1}}]}')
    with pytest.raises(PastisError, match=r"dates-S2"):
        Pastis.open(folder)
