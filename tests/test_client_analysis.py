"""Results as objects of xarray, pandas and Matplotlib, compared with rasterio."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import geopandas
import matplotlib as mpl
import numpy as np
import pytest
import rasterio
import rioxarray
from matplotlib import pyplot as plt
from rasterio.io import MemoryFile
from rasterio.plot import plotting_extent
from rasterio.transform import Affine

from pimc_client import (
    About,
    Embedding,
    Forecast,
    PixelClass,
    PointResult,
    Raster,
    Rasters,
    Results,
)
from tests.kits.client import LEGEND, classes, cog, zipped

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ABOUT = About(model="pixels-landcover@1.0.0")
BANDS = [
    f"{index}_{day}_{quantile}"
    for index in ("NDVI", "EVI", "SAVI")
    for day in ("2021-11-05", "2021-11-15")
    for quantile in ("q10", "q50", "q90")
]


@pytest.fixture(autouse=True)
def _no_display():
    mpl.use("agg")
    yield
    plt.close("all")


def raster(content, name="class"):
    return Raster(io.BytesIO(content), name=name, about=ABOUT)


def class_map():
    return raster(classes(PIMC_LEGEND=json.dumps(LEGEND)))


def forecast():
    values = np.random.default_rng(3).normal(size=(18, 4, 5)).astype("float32")
    values[:, 0, 0] = np.nan
    return values, raster(cog(values, descriptions=BANDS, nodata=np.nan), "forecast")


def test_rioxarray_reads_a_class_map_as_from_the_file(tmp_path):
    found = class_map()
    array = found.to_xarray()
    with rioxarray.open_rasterio(found.save(tmp_path / "class.tif")) as expected:
        np.testing.assert_array_equal(array, expected.squeeze("band"))
        np.testing.assert_allclose(array.x, expected.x)
        np.testing.assert_allclose(array.y, expected.y)
        assert array.dtype == expected.dtype
        assert array.rio.crs == expected.rio.crs
        assert array.rio.transform() == expected.rio.transform()
        assert array.rio.nodata == expected.rio.nodata
        assert array.rio.bounds() == expected.rio.bounds()
    assert array.dims == ("y", "x")
    assert array.name == "class"
    assert array.attrs["flag_values"] == [0, 1]
    assert array.attrs["flag_meanings"] == "Tree_cover Grass_&_herbs"
    assert array.attrs["model"] == "pixels-landcover@1.0.0"


def test_a_forecast_has_the_dimensions_index_time_and_quantile():
    values, found = forecast()
    array = found.to_xarray()
    assert array.dims == ("index", "time", "quantile", "y", "x")
    for number, name in enumerate(BANDS):
        index, day, quantile = name.split("_")
        one = array.sel(index=index, time=day, quantile=quantile)
        np.testing.assert_array_equal(one, values[number])


def test_several_bands_keep_their_names_and_a_crs_without_a_code_is_left_out():
    values = np.random.default_rng(0).random((2, 3, 4), dtype="float32")
    crs = "+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R=6371007.181 +units=m +no_defs"
    array = raster(cog(values, descriptions=["Tree cover"], crs=crs), "probabilities").to_xarray()
    assert list(array.band.values) == ["Tree cover", "2"]
    np.testing.assert_array_equal(array.sel(band="Tree cover"), values[0])
    assert array.rio.crs is None


def test_several_rasters_are_variables():
    probabilities = np.random.default_rng(0).random((2, 2, 3), dtype="float32")
    content = zipped(
        class__tif=classes(), probabilities__tif=cog(probabilities, descriptions=["a", "b"])
    )
    with Rasters(io.BytesIO(content), about=ABOUT) as rasters:
        found = rasters.to_xarray()
    assert list(found) == ["class", "probabilities"]
    assert found["probabilities"].dims == ("probabilities_band", "y", "x")
    np.testing.assert_array_equal(found["class"], [[0, 1, 255], [1, 1, 0]])
    assert found.rio.crs == rasterio.CRS.from_epsg(32631)


def test_a_class_map_is_drawn_in_its_colours_at_its_coordinates():
    found = class_map()
    axes = found.plot()
    (image,) = axes.get_images()
    green, yellow, none = (0, 100, 0, 255), (255, 255, 76, 255), (0, 0, 0, 0)
    expected = [[green, yellow, none], [yellow, yellow, green]]
    np.testing.assert_array_equal(image.get_array(), expected)
    with MemoryFile(found.content) as memory, memory.open() as file:
        assert image.get_extent() == pytest.approx(plotting_extent(file))
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["Tree cover", "Grass & herbs"]
    assert axes.get_title() == "class, pixels-landcover@1.0.0"


@pytest.mark.parametrize(
    ("band", "number"),
    [(None, 0), (3, 2), ("EVI_2021-11-05_q90", BANDS.index("EVI_2021-11-05_q90"))],
)
def test_one_band_of_several_is_drawn(band, number):
    values, found = forecast()
    figure, axes = plt.subplots()
    assert found.plot(band, ax=axes) is axes
    (image,) = axes.get_images()
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), values[number])
    assert figure.axes[1].get_ylabel() == BANDS[number]


@pytest.mark.parametrize(
    ("band", "message"),
    [(0, "band 0 does not exist: the raster has bands 1 to 18"), ("NDVI", "no band 'NDVI'")],
)
def test_a_missing_band_is_an_error(band, message):
    with pytest.raises(ValueError, match=message):
        forecast()[1].plot(band)


def test_a_rotated_grid_is_drawn_in_pixels():
    grid = Affine(8.0, 3.0, 1e5, 2.0, -9.0, 2e5)
    rotated = raster(cog(np.zeros((1, 3, 4), "float32"), transform=grid))
    assert "x" not in rotated.to_xarray().coords
    assert rotated.plot().get_images()[0].get_extent() == pytest.approx((-0.5, 3.5, 2.5, -0.5))


def test_results_become_a_data_frame():
    labels = Results(
        [
            PixelClass(
                id="a", status="ok", label="Maize", value=1, confidence=0.9, entropy=None,
                probabilities={"Maize": 0.9, "Rye": 0.1},
            ),
            PixelClass(
                id="b", status="no_data", label=None, value=None, confidence=None, entropy=None,
                probabilities={},
            ),
        ],
        about=ABOUT,
    )  # fmt: skip
    frame = labels.to_pandas()
    assert list(frame["id"]) == ["a", "b"]
    assert frame["probabilities.Rye"].tolist()[0] == 0.1
    assert frame["class"].isna().tolist() == [False, True]
    one = Forecast(
        id="f", status="ok", dates=(date(2021, 11, 5), date(2021, 11, 15)),
        indices={"NDVI": {"q50": np.array([0.5, np.nan])}},
    )  # fmt: skip
    frame = Results([one], about=ABOUT).to_pandas()
    assert frame["NDVI_2021-11-05_q50"][0] == 0.5
    assert frame["NDVI_2021-11-15_q50"].isna()[0]
    embedding = Embedding(id="e", status="ok", values=np.array([1.0, 2.0]))
    frame = Results([embedding], about=ABOUT).to_pandas()
    assert frame[["embedding_0", "embedding_1"]].to_numpy().tolist() == [[1.0, 2.0]]
    place = PointResult(
        lon=4.0, lat=50.0, status="ok", result=embedding, properties={"name": "here", "value": 3}
    )
    frame = Results([place], about=ABOUT).to_pandas()
    assert frame.to_dict("records") == [{"lon": 4.0, "lat": 50.0, "name": "here", "value": 3}]


def test_results_of_points_become_a_geo_data_frame(tmp_path):
    label = PixelClass(
        id="a", status="ok", label="Maize", value=1, confidence=0.9, entropy=None, probabilities={}
    )
    places = [
        PointResult(lon=lon, lat=50.0, status="ok", result=label, properties={"class": "Maize"})
        for lon in (4.0, 5.0)
    ]
    frame = Results(places, about=ABOUT).to_geopandas()
    frame.to_file(tmp_path / "points.gpkg")
    found = geopandas.read_file(tmp_path / "points.gpkg")
    assert found.crs == "EPSG:4326"
    assert list(found["class"]) == ["Maize", "Maize"]
    assert [(p.x, p.y) for p in found.geometry] == [(4.0, 50.0), (5.0, 50.0)]
    with pytest.raises(TypeError, match="no geometry"):
        Results([label], about=ABOUT).to_geopandas()


@pytest.mark.parametrize(
    ("library", "call"),
    [
        ("xarray", "raster.to_xarray()"),
        ("matplotlib", "raster.plot()"),
        ("pandas", "Results([], about=raster.about).to_pandas()"),
        ("geopandas", "Results([], about=raster.about).to_geopandas()"),
    ],
)
def test_a_missing_library_is_named_with_the_command_to_install_it(tmp_path, library, call):
    path = tmp_path / "a.tif"
    path.write_bytes(class_map().content)
    script = f"""
import sys
sys.modules[{library!r}] = None
from pimc_client import About, Raster, Results
raster = Raster(open({str(path)!r}, "rb"), name="class", about=About())
try:
    {call}
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert f"needs {library}, which is not installed" in done.stdout
    assert "pip install 'pimc-client[analysis]'" in done.stdout
