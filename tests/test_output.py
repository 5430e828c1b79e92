"""Output files, read by rasterio, rio-cogeo and Pillow."""

from __future__ import annotations

import json
import subprocess
import zipfile
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image
from rasterio.crs import CRS
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from models.card import LegendClass
from service.api.responses import zip_files
from service.grid import Grid
from service.write.cog import RasterWriter, create_raster
from service.write.legend import sidecar_of
from service.write.predictions import Layer
from tests.kits.marks import in_all_tests
from tests.kits.patience import PATIENCE
from tests.kits.programs import qgis_python

LEGEND = (
    LegendClass(value=0, name="Water & <ice>", color="#1020ff", code=80),
    LegendClass(value=1, name="Forêt", color="#006400", code=10),
    LegendClass(value=2, name="bare", color="#b4b4b4"),
)
CLASSES = Layer(name="class", bands=("class",), legend=LEGEND)
PAIR = Layer(name="pair", bands=("NDVI_2021-11-05_q50", "EVI_2021-11-05_q50"))
UTM = CRS.from_epsg(32631)
NORTH_UP = Affine(10, 0, 600_000, 0, -10, 5_600_000)
TAGS = {"PIMC_MODEL": "toy@1.0.0", "TIFFTAG_SOFTWARE": "PIMC"}


def grid(width, height, crs=UTM, transform=NORTH_UP):
    return Grid(crs=crs, transform=transform, width=width, height=height)


def values_of(layer, width, height, seed=0):
    random = np.random.default_rng(seed)
    if layer.legend:
        values = random.integers(0, 3, (1, height, width)).astype(np.uint8)
        values[:, :2] = 255
        return values
    values = random.random((len(layer.bands), height, width), np.float32)
    values[:, :2] = np.nan
    return values


def write(folder, layers, area, step=100):
    """Write layers window by window, and give what was written."""
    complete = {layer.name: values_of(layer, area.width, area.height) for layer in layers}
    with RasterWriter(folder, area, layers, TAGS) as writer:
        for row in range(0, area.height, step):
            for col in range(0, area.width, step):
                size = min(step, area.width - col), min(step, area.height - row)
                window = Window(col, row, *size)
                part = {
                    n: v[:, row : row + size[1], col : col + size[0]] for n, v in complete.items()
                }
                writer.write(window, part)
        files = writer.finish()
    return files, complete


@pytest.mark.parametrize("size", [(1, 1), (101, 64), (700, 530), *in_all_tests((1100, 1030))])
def test_valid_cogs_with_every_pixel(tmp_path, size):
    files, complete = write(tmp_path, (CLASSES, PAIR), grid(*size))
    assert set(files) == {"class", "pair"}
    for name, path in files.items():
        assert path == tmp_path / f"{name}.tif"
        assert cog_validate(path, strict=True) == (True, [], [])
        with rasterio.open(path) as file:
            np.testing.assert_array_equal(file.read(), complete[name])
            assert (file.width, file.height) == size
            assert file.crs == UTM
            assert file.transform.almost_equals(NORTH_UP)
            assert file.compression.name == "deflate"
            assert file.tags()["PIMC_MODEL"] == "toy@1.0.0"
            assert file.tags()["TIFFTAG_SOFTWARE"] == "PIMC"
    with rasterio.open(files["class"]) as file:
        assert (file.dtypes, file.nodata) == (("uint8",), 255)
        assert file.descriptions == ("class",)
    with rasterio.open(files["pair"]) as file:
        assert file.dtypes == ("float32", "float32")
        assert np.isnan(file.nodata)
        assert file.descriptions == PAIR.bands


@pytest.mark.parametrize(
    ("size", "bands", "side"),
    [((7, 5), 256, 16), ((2, 40), 256, 48), ((300, 200), 256, 128), ((300, 200), 2, 256)],
)
def test_a_block_that_is_written_is_no_larger_than_raster_and_bands_need(
    tmp_path, size, bands, side
):
    layer = Layer(name="deep", bands=tuple(map(str, range(bands))))
    with create_raster(tmp_path / "open.tif", grid(*size), layer) as file:
        assert set(file.block_shapes) == {(side, side)}


def test_nothing_else_is_left_in_the_folder(tmp_path):
    write(tmp_path, (CLASSES, PAIR), grid(50, 40))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "class.qml",
        "class.tif",
        "class.tif.aux.xml",
        "pair.qml",
        "pair.tif",
    ]


def test_the_legend_is_in_the_file_itself(tmp_path):
    files, _ = write(tmp_path, (CLASSES,), grid(700, 600))
    alone = files["class"].rename(tmp_path / "alone.tif")
    with rasterio.open(alone) as file:
        colors = file.colormap(1)
        for c in LEGEND:
            assert "#{:02x}{:02x}{:02x}".format(*colors[c.value][:3]) == c.color
            assert file.tags(1)[f"CLASS_{c.value}"] == c.name
        assert colors[255][3] == 0
        assert set(file.tags(1)) == {"CLASS_0", "CLASS_1", "CLASS_2"}
        legend = json.loads(file.tags()["PIMC_LEGEND"])
        assert [LegendClass(**c) for c in legend] == list(LEGEND)


def test_the_file_holds_the_attribute_table_that_newer_gdal_reads(tmp_path):
    files, _ = write(tmp_path, (CLASSES,), grid(30, 20))
    with Image.open(files["class"]) as image:
        # Pillow takes a TIFF's text for Latin-1; GDAL writes UTF-8.
        metadata = ET.fromstring(image.tag_v2[42112].encode("latin-1"))  # noqa: S314 - ours
    (item,) = [i for i in metadata.iter("Item") if i.get("role") == "rat"]
    assert item.get("name") == "DEFAULT_RASTER_ATTRIBUTE_TABLE"
    assert item.get("sample") == "0"
    usages = [f.findtext("Usage") for f in item.iter("FieldDefn")]
    rows = [[f.text for f in row.iter("F")] for row in item.iter("Row")]
    named = {row[usages.index("5")]: row[usages.index("2")] for row in rows}
    assert named == {str(c.value): c.name for c in LEGEND}
    assert [row[-1] for row in rows] == ["80", "10", None]
    assert b"PIMC_RAT" not in files["class"].read_bytes()


def test_the_style_of_a_class_map_has_its_classes_and_nothing_else(tmp_path):
    files, _ = write(tmp_path, (CLASSES,), grid(30, 20))
    style = ET.fromstring(files["class"].with_suffix(".qml").read_text())  # noqa: S314 - ours
    renderer = style.find("pipe/rasterrenderer")
    assert renderer.get("type") == "paletted"
    entries = [
        (e.get("value"), e.get("color"), e.get("label")) for e in renderer.iter("paletteEntry")
    ]
    assert entries == [(str(c.value), c.color, c.name) for c in LEGEND]


def test_the_style_of_a_continuous_layer_spans_its_limits(tmp_path):
    layer = Layer(name="forecast", bands=("NDVI",), limits=(-0.1, 0.9), ramp="vegetation")
    files, _ = write(tmp_path, (layer,), grid(30, 20))
    style = ET.fromstring(files["forecast"].with_suffix(".qml").read_text())  # noqa: S314 - ours
    stops = [float(item.get("value")) for item in style.iter("item")]
    assert (stops[0], stops[-1]) == (-0.1, 0.9)
    assert stops == sorted(stops)


QGIS = """
import json, os, sys
from qgis.core import QgsApplication, QgsRasterLayer
QgsApplication.setPrefixPath("/usr", True)
application = QgsApplication([], False)
application.initQgis()
found = {}
for path in sys.argv[1:]:
    layer = QgsRasterLayer(path, "layer", "gdal")
    assert layer.isValid(), path
    entries = [(e.label, e.color.name()) for e in getattr(layer.renderer(), "classes", list)()]
    found[path.rpartition("/")[2]] = [layer.renderer().type(), layer.bandCount(), entries,
                                      layer.bandName(1), layer.crs().authid()]
print(json.dumps(found), flush=True)
os._exit(0)  # without its own way out, which fails after Python has freed the layers
"""


@pytest.mark.slow
def test_qgis_opens_the_rasters_with_their_styles(tmp_path):
    python = qgis_python()
    forecast = Layer(name="forecast", bands=("NDVI_2021-11-05_q50",) * 3, ramp="vegetation")
    files, _ = write(tmp_path, (CLASSES, forecast), grid(30, 20))
    done = subprocess.run(
        [python, "-c", QGIS, *files.values()],
        env={"QT_QPA_PLATFORM": "offscreen", "HOME": str(tmp_path), "PATH": "/usr/bin"},
        capture_output=True, text=True, check=True, timeout=PATIENCE,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    kind, bands, entries, _, crs = found["class.tif"]
    assert (kind, bands, crs) == ("paletted", 1, "EPSG:32631")
    assert entries == [[c.name, c.color] for c in LEGEND]
    kind, bands, _, name, _ = found["forecast.tif"]
    assert (kind, bands) == ("singlebandpseudocolor", 3)
    assert "NDVI_2021-11-05_q50" in name


def test_the_side_file_names_the_classes_and_goes_into_the_zip(tmp_path):
    files, _ = write(tmp_path, (CLASSES, PAIR), grid(30, 20))
    archive = zip_files(files, tmp_path / "result.zip")
    with zipfile.ZipFile(archive) as opened:
        assert sorted(opened.namelist()) == [
            "class.qml", "class.tif", "class.tif.aux.xml", "pair.qml", "pair.tif",
        ]  # fmt: skip
        assert opened.testzip() is None
        text = opened.read("class.tif.aux.xml")
        assert opened.read("pair.tif") == files["pair"].read_bytes()
    names = [c.text for c in ET.fromstring(text).iter("Category")]  # noqa: S314 - ours
    assert names == [c.name for c in LEGEND]
    # GDAL takes it for what it is: it is listed among the raster's files.
    with rasterio.open(files["class"]) as file:
        assert str(sidecar_of(files["class"])) in file.files


def test_overviews_hold_classes_and_means_not_mixtures(tmp_path):
    area = grid(1200, 1100)
    left_right = np.zeros((1, 1100, 1200), np.uint8)
    left_right[:, :, 600:] = 2  # the mean of 0 and 2 would be 1
    ramp = np.broadcast_to(np.arange(1200, dtype=np.float32), (1, 1100, 1200)).copy()
    ramp[:, :, :2] = np.nan
    one = Layer(name="one", bands=("one",))
    with RasterWriter(tmp_path, area, (CLASSES, one), {}) as writer:
        writer.write(Window(0, 0, 1200, 1100), {"class": left_right, "one": ramp})
        files = writer.finish()
    with rasterio.open(files["class"], overview_level=0) as file:
        assert set(np.unique(file.read())) == {0, 2}
    with rasterio.open(files["one"], overview_level=0) as file:
        found = file.read(1)
        assert np.isnan(found[:, 0]).all()
        np.testing.assert_allclose(
            found[:, 1:], np.tile(ramp[0, 0, 2:].reshape(-1, 2).mean(1), (550, 1))
        )


SINUSOIDAL = CRS.from_string("+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R=6371007.181 +units=m +no_defs")
ODD = [
    (SINUSOIDAL, Affine(231.65, 0, -6_073_000, 0, -231.65, -1_300_000)),
    (UTM, Affine(8, 6, 600_000, 6, -8, 5_600_000)),
    (CRS.from_epsg(4326), Affine(1e-4, 0, 4.5, 0, -1e-4, 51.2)),
    (CRS.from_epsg(3035), NORTH_UP),
]


@pytest.mark.parametrize(("crs", "transform"), ODD)
def test_any_crs_and_any_transform(tmp_path, crs, transform):
    files, complete = write(tmp_path, (CLASSES, PAIR), grid(40, 30, crs, transform))
    for name, path in files.items():
        sidecar_of(path).unlink(missing_ok=True)  # nothing of the CRS may hide there
        assert cog_validate(path, strict=True)[0]
        with rasterio.open(path) as file:
            assert file.crs == crs
            assert file.transform.almost_equals(transform, precision=1e-6)
            np.testing.assert_array_equal(file.read(), complete[name])


@pytest.mark.slow
def test_many_bands(tmp_path):
    deep = Layer(name="deep", bands=tuple(f"embedding_{d}" for d in range(96)))
    files, complete = write(tmp_path, (deep,), grid(150, 140))
    assert cog_validate(files["deep"], strict=True) == (True, [], [])
    with rasterio.open(files["deep"]) as file:
        assert file.descriptions == deep.bands
        np.testing.assert_array_equal(file.read(), complete["deep"])


def broken(folder, *, finish):
    area = grid(40, 30)
    with RasterWriter(folder, area, (CLASSES, PAIR), {}) as writer:
        for layer in (CLASSES, PAIR):
            writer.write(Window(0, 0, 40, 30), {layer.name: values_of(layer, 40, 30)})
        if finish:
            assert all(path.exists() for path in writer.finish().values())
        raise KeyError


@pytest.mark.parametrize("finish", [False, True])
def test_an_error_leaves_nothing_even_after_the_files_are_finished(tmp_path, finish):
    with pytest.raises(KeyError):
        broken(tmp_path, finish=finish)
    assert list(tmp_path.iterdir()) == []


def test_gdal_has_nothing_to_complain_about(tmp_path, capfd):
    write(tmp_path, (CLASSES, PAIR), grid(300, 200))
    assert capfd.readouterr() == ("", "")
