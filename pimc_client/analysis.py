"""Results as objects of xarray, pandas, GeoPandas and Matplotlib.

Each function imports the library that it needs when it is called.
`pip install 'pimc-client[analysis]'` installs all of them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import geopandas
    import matplotlib.axes
    import pandas as pd
    import xarray
    from numpy.typing import NDArray

_FORECAST_BAND = re.compile(r"(?P<index>\w+)_(?P<date>\d{4}-\d\d-\d\d)_(?P<quantile>q\d+)")
"""Name of a forecast's band, such as `NDVI_2021-11-05_q50`."""


class LegendEntry(Protocol):
    """One class of a class map; a `LegendClass` is one."""

    @property
    def name(self) -> str:
        """Name of the class."""
        ...

    @property
    def color(self) -> str:
        """Colour as `#rrggbb`."""
        ...


class Pixels(Protocol):
    """The pixels of a raster and their description; a `Raster` is one."""

    @property
    def name(self) -> str:
        """Name of the output, such as `class`."""
        ...

    @property
    def model(self) -> str | None:
        """The model that predicted, as `name@version`."""
        ...

    @property
    def array(self) -> NDArray[Any]:
        """Pixels (rows, columns) of one band, else (bands, rows, columns)."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Bands, rows, columns."""
        ...

    @property
    def descriptions(self) -> Sequence[str | None]:
        """Name of each band."""
        ...

    @property
    def crs(self) -> str | None:
        """The CRS."""
        ...

    @property
    def transform(self) -> tuple[float, float, float, float, float, float] | None:
        """Affine transform (a, b, c, d, e, f) from column and row to the CRS's units."""
        ...

    @property
    def nodata(self) -> float | None:
        """Number of pixels without a prediction."""
        ...

    @property
    def scale(self) -> float | None:
        """Scale of integers: value = pixel x scale; None if the pixels are the values."""
        ...

    @property
    def legend(self) -> Mapping[int, LegendEntry]:
        """Pixel value to class; empty if pixels are not classes."""
        ...


def required(library: str, user: str) -> Any:  # noqa: ANN401 (a module)
    """Import an optional library.

    Args:
        library: the module's name.
        user: the function that needs it, for the message.

    Raises:
        ImportError: the library is not installed.
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        name = library.partition(".")[0]
        if (error.name or "").partition(".")[0] != name:
            raise
        raise ImportError(
            f"{user} needs {name}, which is not installed: pip install 'pimc-client[analysis]'",
            name=name,
        ) from error


# --- xarray ---------------------------------------------------------------------------------------


def data_array(raster: Pixels) -> xarray.DataArray:
    """A raster as a `DataArray`; see `Raster.to_xarray`."""
    xr = required("xarray", "to_xarray")
    pixels = raster.array
    dims, coords = ["y", "x"], _coordinates(raster)
    forecast = _forecast_axes(raster.descriptions)
    if forecast is not None:
        pixels = raster.array.reshape(*map(len, forecast.values()), *raster.shape[1:])
        dims, coords = [*forecast, *dims], {**forecast, **coords}
    elif raster.shape[0] > 1:
        dims = ["band", *dims]
        names = [name or str(number) for number, name in enumerate(raster.descriptions, 1)]
        coords = {"band": names, **coords}
    array: xarray.DataArray = xr.DataArray(
        pixels, dims=dims, coords=coords, name=raster.name, attrs=_attributes(raster)
    )
    return array


def dataset(rasters: Mapping[str, Pixels], model: str | None) -> xarray.Dataset:
    """Several rasters of a model as a `Dataset`; see `Rasters.to_xarray`."""
    xr = required("xarray", "to_xarray")
    arrays = {}
    for name, raster in rasters.items():
        array = data_array(raster)
        # The bands of two outputs may have different names, which cannot share one dimension.
        arrays[name] = array.rename(band=f"{name}_band") if "band" in array.dims else array
    found: xarray.Dataset = xr.Dataset(arrays, attrs={"model": model or ""})
    return found


def _forecast_axes(descriptions: Sequence[str | None]) -> dict[str, Any] | None:
    """The index, time and quantile of a forecast's bands; None for any other raster."""
    import numpy as np

    found = [_FORECAST_BAND.fullmatch(name or "") for name in descriptions]
    bands = [match.groups() for match in found if match]
    if not bands or len(bands) < len(found):
        return None
    indices, dates, quantiles = (list(dict.fromkeys(values)) for values in zip(*bands, strict=True))
    if bands != [(i, d, q) for i in indices for d in dates for q in quantiles]:
        return None
    return {"index": indices, "time": np.array(dates, "datetime64[ns]"), "quantile": quantiles}


def _coordinates(raster: Pixels) -> dict[str, Any]:
    """Coordinates: centres of pixels, and the CRS in the form that rioxarray reads."""
    import numpy as np

    xr = required("xarray", "to_xarray")
    transform = raster.transform
    if transform is None:
        return {}
    a, b, c, d, e, f = transform
    # In GDAL's order, as in CF files that GDAL writes.
    reference = {"GeoTransform": f"{c} {a} {b} {f} {d} {e}"}
    if raster.crs:
        reference |= {"spatial_ref": raster.crs, "crs_wkt": raster.crs}
    coords: dict[str, Any] = {"spatial_ref": xr.Variable((), 0, reference)}
    if b == d == 0:  # the axes of a rotated grid are not those of the CRS
        _, rows, columns = raster.shape
        coords["y"] = f + e * (np.arange(rows) + 0.5)
        coords["x"] = c + a * (np.arange(columns) + 0.5)
    return coords


def _attributes(raster: Pixels) -> dict[str, Any]:
    attributes: dict[str, Any] = {"grid_mapping": "spatial_ref"}
    if raster.model:
        attributes["model"] = raster.model
    if raster.nodata is not None:
        attributes["_FillValue"] = raster.array.dtype.type(raster.nodata)
    if raster.scale is not None:  # of the CF conventions, as are the flags
        attributes |= {"scale_factor": raster.scale, "add_offset": 0.0}
    if raster.legend:
        attributes["flag_values"] = list(raster.legend)
        names = [entry.name.replace(" ", "_") for entry in raster.legend.values()]
        attributes["flag_meanings"] = " ".join(names)
        attributes["flag_colors"] = " ".join(entry.color for entry in raster.legend.values())
    return attributes


# --- pandas ---------------------------------------------------------------------------------------


def data_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a `DataFrame`; a row may lack columns of the others."""
    frame: pd.DataFrame = required("pandas", "to_pandas").DataFrame(list(rows))
    return frame


def geo_data_frame(
    rows: Sequence[Mapping[str, Any]], geometries: Sequence[Mapping[str, Any] | None]
) -> geopandas.GeoDataFrame:
    """Rows and their GeoJSON geometries (EPSG:4326) as a `GeoDataFrame`."""
    gpd, shapely = (
        required("geopandas", "to_geopandas"),
        required("shapely.geometry", "to_geopandas"),
    )
    shapes = [None if one is None else shapely.shape(one) for one in geometries]
    frame: geopandas.GeoDataFrame = gpd.GeoDataFrame(list(rows), geometry=shapes, crs="EPSG:4326")
    return frame


# --- Matplotlib -----------------------------------------------------------------------------------


def plot(
    raster: Pixels, band: int | str | None, axes: matplotlib.axes.Axes | None
) -> matplotlib.axes.Axes:
    """Draw one band of a raster; see `Raster.plot`."""
    number = _band_number(raster, band)
    pixels = raster.array if raster.shape[0] == 1 else raster.array[number]
    if axes is None:
        axes = required("matplotlib.pyplot", "plot").subplots()[1]
    place: dict[str, Any] = {"interpolation": "nearest", **_extent(raster)}
    if raster.legend:
        axes.imshow(_colored(pixels, raster.legend), **place)
        _add_legend(axes, pixels, raster.legend)
    else:
        image = axes.imshow(pixels, **place)
        if axes.figure is not None:
            axes.figure.colorbar(image, ax=axes, label=raster.descriptions[number] or raster.name)
    # Full coordinates, because an offset of some million metres in a corner is easily overlooked.
    axes.ticklabel_format(style="plain", useOffset=False)
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_title(f"{raster.name}, {raster.model}" if raster.model else raster.name)
    if raster.crs:
        axes.set_xlabel(raster.crs)
    return axes


def _band_number(raster: Pixels, band: int | str | None) -> int:
    if band is None:
        return 0
    names = list(raster.descriptions)
    if isinstance(band, str):
        if band not in names:
            listed = ", ".join(str(name) for name in names[:6])
            raise ValueError(
                f"the raster has no band '{band}'; its bands are {listed}"
                f"{' and more' if len(names) > 6 else ''}"
            )
        return names.index(band)
    if not 1 <= band <= len(names):
        raise ValueError(f"band {band} does not exist: the raster has bands 1 to {len(names)}")
    return band - 1


def _extent(raster: Pixels) -> dict[str, Any]:
    """Edges of the image in CRS units; for a rotated grid none, so that axes count pixels."""
    if raster.transform is None or raster.transform[1] or raster.transform[3]:
        return {}
    a, _, left, _, e, top = raster.transform
    _, rows, columns = raster.shape
    return {"extent": (left, left + a * columns, top + e * rows, top)}


def _colored(pixels: NDArray[Any], legend: Mapping[int, LegendEntry]) -> NDArray[Any]:
    """RGBA image (rows, columns, 4), uint8; pixels without a class are transparent."""
    import numpy as np

    image = np.zeros((*pixels.shape, 4), np.uint8)
    for value, entry in legend.items():
        image[pixels == value] = [*bytes.fromhex(entry.color.removeprefix("#")), 255]
    return image


def _add_legend(
    axes: matplotlib.axes.Axes, pixels: NDArray[Any], legend: Mapping[int, LegendEntry]
) -> None:
    patches = required("matplotlib.patches", "plot")
    shown = [entry for value, entry in legend.items() if (pixels == value).any()]
    handles = [patches.Patch(color=entry.color, label=entry.name) for entry in shown]
    if handles:
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
