"""A short run of `python -m benchmarks.fuzz`: mutated GeoTIFFs against the service."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio

from benchmarks.mutations import Tiff, case, edited, sound_files
from tests.kits.forks import ran

pytestmark = pytest.mark.slow

CASES = 100


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return sound_files(tmp_path_factory.mktemp("sound"))


def test_parsing_and_building_a_file_changes_nothing(
    sound: dict[str, bytes], tmp_path: Path
) -> None:
    """So only the edits damage the files of a case, not the kit."""
    for name, content in sound.items():
        for number, same in enumerate((content, edited(content, lambda tiff, directory: None))):
            (tmp_path / f"{number}.tif").write_bytes(same)
        with rasterio.open(tmp_path / "0.tif") as one, rasterio.open(tmp_path / "1.tif") as two:
            assert one.profile == two.profile, name
            assert one.tags() == two.tags()
            assert one.descriptions == two.descriptions
            assert one.overviews(1) == two.overviews(1)
            np.testing.assert_array_equal(one.read(), two.read())
            np.testing.assert_array_equal(one.dataset_mask(), two.dataset_mask())


def test_a_seed_always_gives_the_same_case(sound: dict[str, bytes]) -> None:
    again = dict(reversed(sound.items()))
    assert all(case(seed, sound) == case(seed, again) for seed in range(30))
    assert len({case(seed, sound).files for seed in range(30)}) == 30
    assert Tiff.parse(sound["bigtiff-big-endian"]).order == ">"


def test_no_mutated_file_crashes_hangs_or_discloses_internals(tmp_path: Path) -> None:
    """A hang is found by the run itself, case by case."""
    options = ["--cases", str(CASES), "--first", "1000000", "--workers", "1"]
    run = ran("benchmarks.fuzz", *options, variables={})
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["failures"] == []
    assert report["cases"] == CASES
    assert run.returncode == 0
    # The cases reach every stage: file format, header, pixels, prediction.
    codes = report["codes"]
    for code in ("not_a_geotiff", "missing_bands", "corrupt_raster", "no_georeference", "200"):
        assert codes.get(code, 0) >= 2, codes
