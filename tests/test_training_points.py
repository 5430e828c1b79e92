"""Readers of points, EuroSAT and synthetic ground, against the archives read plainly."""

from __future__ import annotations

import io
import json
import zipfile
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.warp import transform_bounds

from training.datasets import PixelSet
from training.datasets.eurosat import CLASSES, JPEG_SCALE, EuroSATError, eurosat_ms, eurosat_rgb
from training.datasets.points import (
    blocks,
    crops_us_2021,
    crops_us_legend,
    modis_brazil,
    modis_legend,
    s2_points,
)
from training.datasets.synthetic_ground import GROUNDS, synthetic_ground
from training.legends import CDL, WORLDCOVER, landcover_sets, legend_classes, us_crops
from training.licences import TERMS

pytestmark = pytest.mark.slow


class TestCrops:
    def test_equal_the_archive(self, shared_data: Path) -> None:
        (pixels,) = crops_us_2021(shared_data / "crops_us_2021")
        archive = np.load(shared_data / "crops_us_2021" / "crops_us_2021_dev.npz")
        stored = archive["reflectance"]
        assert pixels.values.shape == stored.shape
        assert pixels.dates[0] == date.fromisoformat(str(archive["dates"][0]))
        np.testing.assert_allclose(
            pixels.values[7, :, 6][pixels.valid[7]],
            stored[7, :, 6][pixels.valid[7]] / 10_000,
            atol=1e-6,
        )
        missing = (stored == 0).all(-1)
        assert missing.any()
        np.testing.assert_array_equal(~pixels.valid, missing)
        assert np.isnan(pixels.values[missing]).all()

    def test_no_place_is_on_both_sides_of_the_split(self, shared_data: Path) -> None:
        (pixels,) = crops_us_2021(shared_data / "crops_us_2021")
        held = set(pixels.places[pixels.validation].tolist())
        assert held
        assert held.isdisjoint(pixels.places[~pixels.validation].tolist())

    def test_the_legend_is_cdl_codes_with_names_of_the_archive(self, shared_data: Path) -> None:
        names = crops_us_legend(shared_data / "crops_us_2021")
        assert [(c.code, c.name) for c in legend_classes(CDL)] == [(c, names[c]) for c in CDL]
        assert len(CDL) == 17
        pixels = us_crops(shared_data)
        (raw,) = crops_us_2021(shared_data / "crops_us_2021")
        assert pixels.labels is not None
        assert raw.labels is not None
        for i in (0, 500, 9000):
            code = int(raw.labels[i])
            expected = list(CDL).index(code) if code in CDL else -1
            assert pixels.labels[i] == expected


class TestS2Points:
    def test_sets_share_their_dates_and_hold_every_point(self, shared_data: Path) -> None:
        sets = s2_points(shared_data / "s2_points")
        archive = np.load(shared_data / "s2_points" / "s2_points_dev.npz")
        assert sum(len(s.places) for s in sets) == len(archive["source"])
        for pixels in sets:
            assert list(pixels.dates) == sorted(pixels.dates)
            assert pixels.values.shape[:2] == (len(pixels.places), len(pixels.dates))
        total = sum(int(s.valid.sum()) for s in sets)
        assert total == int((archive["reflectance"] != 0).any(-1).sum())

    def test_unknown_cover_has_no_class(self, shared_data: Path) -> None:
        labels = np.concatenate(
            [s.labels for s in s2_points(shared_data / "s2_points") if s.labels is not None]
        )
        archive = np.load(shared_data / "s2_points" / "s2_points_dev.npz")
        french = np.char.startswith(archive["source"], "france")
        unknown = archive["worldcover"] == 0
        # France and Corsica have declared crops instead, of which orchards and scrub are left out.
        covers = np.isin(archive["crop_code"] // 10**8, (11, 20, 40, 41))
        assert (labels == -1).sum() == (unknown & ~(french & covers)).sum() < unknown.sum()
        assert 0 not in labels


class TestModis:
    def test_values_dates_and_labels_equal_the_archive(self, shared_data: Path) -> None:
        folder = shared_data / "modis_brazil"
        sets, names = modis_brazil(folder), modis_legend(folder)
        archive = np.load(folder / "modis_brazil_dev.npz")
        counts = dict(zip(*np.unique(archive["label"], return_counts=True), strict=True))
        labels = np.concatenate([s.labels for s in sets if s.labels is not None])
        assert {names[i]: n for i, n in enumerate(np.bincount(labels))} == counts
        first = sets[0]
        days = [day.isoformat() for day in first.dates]
        rows = np.flatnonzero(
            (archive["dates"] == days).all(1)
            & (archive["source"] == first.source.partition("/")[2])
        )
        columns = [archive["bands"].tolist().index(b) for b in ("blue", "red", "nir")]
        np.testing.assert_array_equal(first.values, archive["values"][rows][:, :, columns])


POINTS = {
    "crops_us_2021": "crops_us_2021_dev.npz",
    "s2_points": "s2_points_dev.npz",
    "modis_brazil": "modis_brazil_dev.npz",
}
STACKS = ("flanders_2017_2018", "hesbaye_a_monthly", "hesbaye_b_monthly", "south_tyrol_2022")


def in_extent(name: str, lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Whether each point (N) is in one of the boxes of a data set (N)."""
    west, south, east, north = np.array(TERMS[name].extent).T[..., None]
    return ((lon >= west) & (lon <= east) & (lat >= south) & (lat <= north)).any(axis=0)


@pytest.mark.parametrize("name", POINTS)
def test_the_boxes_of_a_data_set_hold_its_points(shared_data: Path, name: str) -> None:
    archive = np.load(shared_data / name / POINTS[name])
    lonlat = archive["lonlat"]
    scattered = np.zeros(len(lonlat), bool)
    if name == "s2_points":
        scattered = archive["source"] == "global_12m"
    lon, lat = lonlat[~scattered].T
    assert in_extent(name, lon, lat).all()
    # Points over the world are in no box, except by chance.
    assert in_extent(name, *lonlat[scattered].T).mean() < 0.1 if scattered.any() else True
    # Each box is a tenth of a degree larger than its points at most.
    for west, south, east, north in TERMS[name].extent:
        own = lonlat[~scattered]
        own = own[((own >= [west, south]) & (own <= [east, north])).all(axis=1)]
        assert (own.min(axis=0) - [west, south] <= 0.1 + 1e-9).all()
        assert ([east, north] - own.max(axis=0) <= 0.1 + 1e-9).all()


@pytest.mark.parametrize("name", [*STACKS, "herault_safe_2018"])
def test_the_boxes_of_a_data_set_hold_its_stack(shared_data: Path, name: str) -> None:
    found = sorted((shared_data / name).glob("*.tif"))
    placed = 0
    for path in found or sorted((shared_data / name).rglob("*_B04_10m.jp2")):
        with rasterio.open(path) as file:
            if file.crs is None:
                continue
            west, south, east, north = transform_bounds(file.crs, "EPSG:4326", *file.bounds)
        assert in_extent(name, np.array([west, east]), np.array([south, north])).all()
        placed += 1
    assert placed > 2


def test_blocks_are_cells_of_a_tenth_of_a_degree() -> None:
    lonlat = np.array([[-120.01, 36.51], [-120.09, 36.59], [-119.99, 36.51], [-120.01, 36.61]])
    got = blocks(lonlat)
    assert got[0] == got[1]
    assert len(set(got.tolist())) == 3


class TestEuroSAT:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        rng = np.random.default_rng(0)
        names = [f"{c}_{i}.jpg" for c in CLASSES[:3] for i in (1, 2)]
        with zipfile.ZipFile(tmp_path / "part.zip", "w") as archive:
            for name in names:
                image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=95)
                archive.writestr(f"{name.rpartition('_')[0]}/{name}", buffer.getvalue())
        (tmp_path / "train.txt").write_text("\n".join(names[:4]))
        (tmp_path / "val.txt").write_text("\n".join(names[4:]))
        return tmp_path

    def test_patches_are_those_listed_in_order(self, folder: Path) -> None:
        patches = eurosat_rgb(folder)
        assert patches.values.shape == (6, 3, 64, 64)
        assert patches.labels is not None
        assert patches.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert patches.validation.tolist() == [False] * 4 + [True] * 2
        with zipfile.ZipFile(folder / "part.zip") as archive:
            data = archive.read("Forest/Forest_1.jpg")
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image)
        np.testing.assert_array_equal(patches.values[2], expected.transpose(2, 0, 1))

    def test_a_listed_patch_that_is_missing_is_named(self, folder: Path) -> None:
        with (folder / "val.txt").open("a") as file:
            file.write("\nRiver_77.jpg")
        with pytest.raises(EuroSATError, match=r"River_77\.jpg"):
            eurosat_rgb(folder)

    def test_geotiffs_show_what_the_jpegs_show(self, shared_data: Path) -> None:
        folder = shared_data / "eurosat"
        patches = eurosat_ms(folder / "ms_sample", folder)
        assert patches.values.shape[1:] == (3, 64, 64)
        path = next(iter(sorted((folder / "ms_sample").glob("Forest_*.tif"))))
        with rasterio.open(path) as file:
            red = file.read(4) / 10_000
        place = int(np.abs(patches.values[:, 0] - red).mean(axis=(1, 2)).argmin())
        np.testing.assert_allclose(patches.values[place, 0], red, atol=1e-6)
        entry = f"Forest/{path.stem}.jpg"
        for part in sorted(folder.glob("*.zip")):
            with zipfile.ZipFile(part) as archive:
                if entry in archive.namelist():
                    with Image.open(io.BytesIO(archive.read(entry))) as image:
                        jpeg = np.asarray(image)[..., 0] * JPEG_SCALE
                    assert np.abs(np.clip(red, 0, 0.275) - jpeg).mean() < 0.005
                    return
        pytest.fail(f"{entry} is in no zip")


@pytest.fixture(scope="module")
def ground() -> PixelSet:
    return synthetic_ground()


class TestLandcoverSources:
    def test_every_class_has_samples_and_every_label_is_a_class(self, shared_data: Path) -> None:
        labels = np.concatenate(
            [s.labels for s in landcover_sets(shared_data) if s.labels is not None]
        )
        counts = np.bincount(labels[labels >= 0], minlength=len(WORLDCOVER))
        assert len(counts) == len(WORLDCOVER)
        assert counts.min() >= 40

    def test_synthetic_ground_is_only_for_training(self, ground: PixelSet) -> None:
        pixels = ground
        assert not pixels.validation.any()
        assert len(pixels.places) == sum(g.pixels for g in GROUNDS)
        assert np.isnan(pixels.values[~pixels.valid]).all()
        values = pixels.values[pixels.valid]
        assert values.min() >= 0
        assert values.max() < 1.0

    def test_synthetic_ground_looks_like_its_class(self, ground: PixelSet) -> None:
        pixels = ground
        assert pixels.labels is not None
        red, nir = pixels.values[..., 1], pixels.values[..., 2]
        highest = np.nanquantile((nir - red) / (nir + red), 0.9, axis=1)
        assert np.median(highest[pixels.labels == 10]) > 0.75
        assert np.median(highest[pixels.labels == 60]) < 0.5
        assert np.median(highest[pixels.labels == 80]) < 0.1

    def test_it_is_the_same_from_the_same_seed(self, ground: PixelSet) -> None:
        np.testing.assert_array_equal(synthetic_ground().values, ground.values)
        assert not np.array_equal(synthetic_ground(seed=4).valid, ground.valid)


def test_colours_are_distinct() -> None:
    for legend in (CDL, WORLDCOVER):
        colors = [color for _, color in legend.values()]
        assert len(set(colors)) == len(colors)
        json.dumps([c.model_dump() for c in legend_classes(legend)])
