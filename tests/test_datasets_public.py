"""Series of public repositories and small data sets, against plain readings of the same files."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio

from tests.kits.programs import require
from training.config import BANDS
from training.datasets.public import (
    _chip,
    _long,
    _statistics,
    _tables,
    _wide,
    further_series,
)
from training.licences import TERMS


def test_shared_series_have_terms_and_are_those_of_their_files(shared_data: Path) -> None:
    sets = list(further_series(shared_data))
    assert {pixels.source for pixels in sets} == {"bavaria_2018", "herault_safe_2018"}
    assert {pixels.source for pixels in sets} <= set(TERMS)
    for pixels in sets:
        assert list(pixels.dates) == sorted(set(pixels.dates))
        assert not pixels.validation.any()
        assert np.isfinite(pixels.values[pixels.valid]).all()
        assert np.isnan(pixels.values[~pixels.valid]).any(axis=-1).all()
    fields = sets[0]
    with np.load(shared_data / "bavaria_2018" / "bavaria_fields_2018_l1c.npz") as archive:
        names = [f"B0{b[1:]}" if len(b) == 2 else b for b in archive["bands"].tolist()]
        stored = archive["reflectance"][..., [names.index(b) for b in BANDS]] * 1e-4
    np.testing.assert_allclose(fields.values[fields.valid], stored[fields.valid], rtol=1e-5)
    assert stored[..., 0][~fields.valid & (stored != 0).all(axis=-1)].min() >= 0.16
    # Pixels of a wheat field, in the order of the layers that sentinelhub-py keeps.
    folder = min((shared_data / "bavaria_2018" / "sentinelhub_10m").iterdir())
    wheat = sets[1]
    layers = {}
    for one in folder.iterdir():
        url = json.loads((one / "request.json").read_text())["url"]
        with rasterio.open(one / "response.tiff") as file:
            layers[url.split("TIME=")[1][:10]] = file.read()
    assert [day.isoformat() for day in wheat.dates] == sorted(layers)
    first = layers[wheat.dates[0].isoformat()]
    blue = first[3]  # after cloud, data and B01
    assert np.isin(wheat.values[wheat.valid[:, 0], 0, 0], blue).all()


def test_composites_of_both_layouts_are_dated_to_the_middle_of_their_month(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(300, 1700, (2, 12, 3))
    stored[1, 3] = 65535
    stored[0, 5, 0] = 1900  # a cloud
    months = [date(2016, 12, 1), *(date(2017, month, 1) for month in range(1, 12))]
    expected = stored * 1e-4
    expected[1, 3] = np.nan
    expected[0, 5] = np.nan
    wide = {f"OPTICAL-{band}-ts{t}-10m": stored[:, t, c] for t in range(12)
            for c, band in enumerate(BANDS)}  # fmt: skip
    wide = {"start_date": ["2016-12-01"] * 2, "finetune_class": ["trees", "lakes"], **wide}
    pq.write_table(pa.table(wide), tmp_path / "wide.parquet")
    rows: dict[str, Any] = {"sample_id": ["a"] * 12 + ["b"] * 12,
            "timestamp": [datetime(m.year, m.month, m.day) for m in months * 2]}  # fmt: skip
    rows |= {f"S2-L2A-{band}": stored[..., c].ravel() for c, band in enumerate(BANDS)}
    pq.write_table(pa.table(rows), tmp_path / "long.parquet")
    long = _long(tmp_path / "long.parquet", "worldcereal", "flanders-fields")
    fields = _wide(tmp_path / "wide.parquet")
    assert fields.labels.tolist() == [10, -1]
    for pixels in (fields, long):
        assert pixels.dates == tuple(month + timedelta(days=14) for month in months)
        np.testing.assert_allclose(pixels.values, expected, rtol=1e-6)
        np.testing.assert_array_equal(pixels.valid, np.isfinite(expected).all(axis=-1))


def test_a_chip_is_masked_by_its_classes_at_20_m(monkeypatch, tmp_path: Path) -> None:
    days = [date(2019, 1, 1), date(2019, 1, 6)]
    fine = np.arange(1, 2 * 4 * 4 + 1).reshape(2, 4, 4) * 100
    classes = np.full((2, 2, 2), 4)
    classes[1, 0, 1] = 9  # a cloud over rows 0 and 1, columns 2 and 3
    for name in ("S2_L2A_10m_x.nc", "S2_L2A_20m_x.nc"):
        (tmp_path / name).touch()
    layers = {"SCL": classes, "B02": fine, "B04": fine + 1, "B08": fine + 2}
    read = "training.datasets.public._layers"
    monkeypatch.setattr(read, lambda path, name: (layers[name], days))
    pixels = _chip(tmp_path)
    assert pixels.dates == tuple(days)
    cloudy = np.zeros((4, 4), bool)
    cloudy[:2, 2:] = True
    np.testing.assert_array_equal(pixels.valid[:, 1], ~cloudy.ravel())
    assert pixels.valid[:, 0].all()
    np.testing.assert_allclose(pixels.values[5, 0], [0.06, 0.0601, 0.0602], rtol=1e-5)


def field_statistics(days: list[str], *, cloudy: str, missing: str) -> dict[str, list[Any]]:
    """A response of Sentinel Hub's statistics: B02 0.05, B04 0.1 and B08 0.3 on every date."""
    means = {"C0": 0.0, "C4": 0.05, "C6": 0.1, "C10": 0.3}
    found: dict[str, list[Any]] = {}
    for channel, mean in means.items():
        rows = []
        for day in days:
            value: Any = "NaN" if channel == "C10" and day == missing else mean
            most = 1.0 if channel == "C0" and day == cloudy else value
            rows.append({"date": day, "basicStats": {"max": most, "mean": value}})
        found[channel] = rows
    return found


def test_statistics_keep_clear_dates_of_the_layer_and_fields_without_long_gaps(
    tmp_path: Path,
) -> None:
    days = [(date(2019, 1, 1) + timedelta(days=20 * i)).isoformat() for i in range(17)]
    cases = {
        "a": ("AGRICULTURE_L2A", days),
        "another level": ("AGRICULTURE_L1C", days),
        "a gap": ("AGRICULTURE_L2A", [*days[:8], *days[11:], "2020-01-01", "2020-01-21"]),
        "few dates": ("AGRICULTURE_L2A", days[:15]),
    }
    for name, (layer, own) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "request.json").write_text(json.dumps({"payload": {"layer": layer}}))
        response = field_statistics(own, cloudy=days[2], missing=days[4])
        (folder / "response.json").write_text(json.dumps(response))
    pixels = _statistics(tmp_path, "AGRICULTURE_L2A", "kenya")
    clear = [day for day in days if day not in (days[2], days[4])]
    assert [day.isoformat() for day in pixels.dates] == clear
    np.testing.assert_allclose(pixels.values, np.full((1, 15, 3), [0.05, 0.1, 0.3]), rtol=1e-6)
    assert pixels.labels.tolist() == [40]


def test_tables_of_grassland_leave_out_clouds_and_snow(tmp_path: Path) -> None:
    clear = {"blue": 0.04, "red": 0.05, "nir": 0.3, "green": 0.07, "swir1": 0.15,
             "mask": 1.0, "cs_cdf": 0.9}  # fmt: skip
    rows = [
        {"Date": "2022-05-01", "plotID": "a", **clear},
        {"Date": "2022-05-06", "plotID": "a", **clear, "cs_cdf": 0.5},
        {"Date": "2022-05-11", "plotID": "a", **clear, "mask": 0.0},
        {"Date": "2022-05-16", "plotID": "a", **clear, "green": 0.6, "swir1": 0.1},
        {"Date": "2022-05-21", "plotID": "a", **clear, "nir": ""},
        {"Date": "2022-05-26", "plotID": "b", **clear, "nir": 0.4},
    ]
    with (tmp_path / "fields.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pixels = _tables(tmp_path, "slovakia")
    assert pixels.dates == (date(2022, 5, 1), date(2022, 5, 26))
    np.testing.assert_array_equal(pixels.valid, [[True, False], [False, True]])
    np.testing.assert_allclose(pixels.values[0, 0], [0.04, 0.05, 0.3], rtol=1e-6)
    assert pixels.values[1, 1, 2] == np.float32(0.4)
    assert pixels.labels.tolist() == [30, 30]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    path = Path(__file__).parents[1] / "scripts" / "public_series.py"
    spec = importlib.util.spec_from_file_location("public_series", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "public_series", module)
    spec.loader.exec_module(module)
    return module


def test_parts_are_read_at_their_commit(script: Any, tmp_path: Path, monkeypatch) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path / "base" / "team" / "repo"), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    require(shutil.which("git"), "git", "git")
    # Neither the repository of a hook that starts the tests nor settings such as signed commits.
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    kept = tmp_path / "base" / "team" / "repo" / "data" / "fields" / "a.csv"
    kept.parent.mkdir(parents=True)
    kept.write_text("first")
    (kept.parents[1] / "beside.csv").write_text("not of the part")
    git("init", "--quiet")
    for name, value in (("user.name", "a"), ("user.email", "a@example.com")):
        git("config", name, value)
    git("config", "uploadpack.allowFilter", "true")
    git("config", "uploadpack.allowAnySHA1InWant", "true")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD")
    kept.unlink()
    git("commit", "--quiet", "-am", "deleted later")
    part = script.Part(repository="team/repo", commit=commit, path="data/fields", target="x/fields")
    monkeypatch.setattr(script, "PARTS", (part,))
    folder = tmp_path / "public"
    monkeypatch.setattr("sys.argv", ["x", str(folder), "--base", (tmp_path / "base").as_uri()])
    script.main()
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found == [folder / "x" / "fields" / "a.csv"]
    assert found[0].read_text() == "first"
    found[0].write_text("mine")
    script.main()
    assert found[0].read_text() == "mine"


def test_every_part_is_read_or_evaluated_on(script: Any) -> None:
    folders = {part.target.split("/")[0] for part in script.PARTS}
    assert folders == {"worldcereal", "worldcrops", "geomaize", "mowing"}
    assert folders - {"mowing"} <= set(TERMS)
    assert all(len(part.commit) == 40 for part in script.PARTS)
