"""The real stacks, against plain rasterio and numpy."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.windows import Window

from service.errors import MissingDates
from service.infer.patches import median_composite
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.radiometry import calibrate
from service.read.reader import StackReader
from service.read.stack import Sits, Stack, open_stack
from tests.kits.rasters import write

pytestmark = pytest.mark.slow

BANDS = ("B02", "B04", "B08")


def sources(paths: Sequence[Path]) -> list[SourceFile]:
    return [SourceFile(name=path.name, path=path) for path in paths]


def opened(files: Sequence[SourceFile], *, bands=BANDS, dated: bool = True, **options) -> Stack:
    return open_stack(files, StackOptions(**options), bands=bands, dated=dated, max_bytes=2**30)


def read(stack: Stack, window: Window | None = None) -> Sits:
    with StackReader(stack) as reader:
        return reader.read(window or Window(0, 0, stack.grid.width, stack.grid.height))


def pixels(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def test_flanders(shared_data: Path) -> None:
    folder = shared_data / "flanders_2017_2018"
    files = sources(sorted(folder.glob("*.tif")))  # with LABEL_CT.tif and LABEL_LC.tif
    assert len(files) == 120
    stack = opened(files)
    scenes = sorted(folder.glob("S2_*.tif"))
    assert (stack.layout, stack.mask, stack.scale, stack.offset) == (
        "file-per-date",
        "scl",
        1e-4,
        0,
    )
    assert stack.files == tuple(path.name for path in scenes)
    assert stack.dates == tuple(
        date.fromisoformat(f"{n[:4]}-{n[4:6]}-{n[6:]}") for n in (p.name[7:15] for p in scenes)
    )
    (unused,) = stack.warnings
    assert unused.code == "files_unused"
    assert "2 of 120 files not used: 'LABEL_CT.tif', 'LABEL_LC.tif'" in unused.detail
    assert calibrate(stack).warnings == stack.warnings

    sits = read(stack)
    raw = np.stack([pixels(path) for path in scenes])  # B02 B03 B04 B08 SCL
    values, scl = raw[:, [0, 2, 3]], raw[:, 4]
    present = (values != 0).all(axis=1)
    np.testing.assert_array_equal(sits.valid, present & np.isin(scl, [4, 5, 6, 7]))
    np.testing.assert_allclose(
        sits.values, np.where(present[:, None], values * 1e-4, np.nan), rtol=1e-6
    )
    assert stack.grid.hectares(Window(0, 0, 64, 64)) == pytest.approx(0.01)

    part = read(stack, Window(10, 24, 30, 12))
    np.testing.assert_array_equal(part.values, sits.values[:, :, 24:36, 10:40])


def test_a_flanders_date_in_two_half_empty_granules(shared_data: Path, tmp_path: Path) -> None:
    scenes = sorted((shared_data / "flanders_2017_2018").glob("S2_*.tif"))[60:64]
    complete = read(opened(sources(scenes)))
    with rasterio.open(scenes[1]) as file:
        raw, names, day = file.read(), file.descriptions, file.tags()["datetime"]
        where = {"crs": file.crs, "transform": file.transform, "nodata": file.nodata}
    halves = []
    for name, empty in (("west.tif", slice(40, None)), ("east.tif", slice(None, 20))):
        half = raw.copy()
        half[:, :, empty] = 0
        halves.append(
            write(tmp_path / name, half, descriptions=names, tags={"datetime": day}, **where)
        )
    stack = opened([*sources(scenes[:1]), *halves, *sources(scenes[2:])])
    (warning,) = stack.warnings
    assert warning.code == "merged_dates"
    assert day[:10] in warning.detail
    merged = read(stack)
    np.testing.assert_array_equal(merged.valid, complete.valid)
    clear = complete.valid[:, None]
    np.testing.assert_array_equal(
        np.where(clear, merged.values, 0), np.where(clear, complete.values, 0)
    )


def test_mato_grosso(shared_data: Path) -> None:
    folder = shared_data / "mato_grosso_modis"
    files = sources(sorted(folder.glob("*.tif")))  # with ndvi, evi and doy
    dates = tuple(map(date.fromisoformat, (folder / "dates.txt").read_text().split()))
    stack = opened(files, dates=dates)
    assert (stack.layout, stack.mask, stack.scale, stack.offset) == ("file-per-band", "none", 1, 0)
    assert stack.dates == dates
    assert sorted(stack.files) == ["blue.tif", "nir.tif", "red.tif"]
    assert calibrate(stack).warnings == stack.warnings

    sits = read(stack)
    raw = np.stack([pixels(folder / f"{name}.tif") for name in ("blue", "red", "nir")], axis=1)
    missing = (raw < -1e300).any(axis=1)
    assert missing.sum() == 52
    np.testing.assert_array_equal(sits.valid, ~missing)
    assert np.isnan(sits.values.swapaxes(0, 1)[:, missing]).all()
    np.testing.assert_allclose(
        sits.values.swapaxes(0, 1)[:, ~missing], raw.swapaxes(0, 1)[:, ~missing], rtol=1e-6
    )
    assert stack.grid.hectares(Window(0, 0, 1, 1))[0, 0] == pytest.approx(5.3665, rel=1e-4)
    with pytest.raises(MissingDates, match="each of 3 files"):
        opened(files)
    with pytest.raises(MissingDates, match="137 bands but 136 dates"):
        opened(files, dates=dates[:-1])


def test_hesbaye_as_a_single_file(shared_data: Path, tmp_path: Path) -> None:
    paths = sorted((shared_data / "hesbaye_a_monthly").glob("*.tif"))
    apart = opened(sources(paths))
    assert (apart.layout, len(apart.dates), apart.mask) == ("file-per-date", 20, "none")
    assert calibrate(apart).warnings == apart.warnings
    with rasterio.open(paths[0]) as first:
        where = {"crs": first.crs, "transform": first.transform, "nodata": first.nodata}
    stacked = np.concatenate([pixels(path) for path in paths])
    one = write(tmp_path / "stack.tif", stacked, compress="deflate", **where)
    together = open_stack(
        [one],
        StackOptions(dates=apart.dates, bands=("B02", "B03", "B04", "B08")),
        bands=BANDS,
        max_bytes=2**30,
    )
    assert (together.layout, together.dates) == ("single-file", apart.dates)
    complete = read(together)
    np.testing.assert_array_equal(complete.values, read(apart).values)
    with StackReader(together) as reader:
        points = reader.read_pixels([0, 50, 100], [100, 7, 0])
    np.testing.assert_array_equal(points.values, complete.values[:, :, [0, 50, 100], [100, 7, 0]])


def test_eurosat_needs_no_dates(shared_data: Path) -> None:
    path = sorted((shared_data / "eurosat" / "ms_sample").glob("*.tif"))[0]
    stack = opened(sources([path]), bands=("B04", "B03", "B02"), dated=False)
    assert (stack.layout, stack.dates, stack.observations) == ("file-per-date", (), 1)
    assert calibrate(stack).warnings == stack.warnings
    sits = read(stack)
    composite = median_composite(sits.values, sits.valid)
    np.testing.assert_allclose(composite, pixels(path)[[3, 2, 1]] * 1e-4, rtol=1e-6)


def test_no_real_scene_gives_a_radiometry_warning(shared_data: Path) -> None:
    for path in sorted((shared_data / "eurosat" / "ms_sample").glob("*.tif"))[::4]:
        stack = opened(sources([path]), dated=False)
        assert calibrate(stack).warnings == stack.warnings, path.name
