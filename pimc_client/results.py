"""Results of a client's methods: rasters, summaries, points, models, jobs."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Literal, TypeVar, cast, overload
from xml.sax.saxutils import quoteattr

from pimc_client import analysis
from pimc_client.geotiff import GeoTIFF, Transform, read_array, read_header
from pimc_client.tables import csv_text, flat_record

if TYPE_CHECKING:
    import os

    import geopandas
    import matplotlib.axes
    import numpy as np
    import pandas as pd
    import xarray
    from numpy.typing import NDArray

Status = Literal["ok", "no_data", "outside"]
"""`no_data`: too few clear dates; `outside`: not on the raster. Both have no values."""
JobStatus = Literal["accepted", "running", "successful", "failed", "dismissed"]
JobProgress = Callable[[float], object]
"""Called with the percentage done, each time it has changed."""
T = TypeVar("T")


IN_MEMORY = 32 * 2**20
"""Largest result, in bytes, that is held in memory; a larger one is stored in a temporary file."""


@dataclass(frozen=True, kw_only=True)
class ServiceWarning:
    """A warning of the server, such as `dates_outside_window`."""

    code: str
    detail: str

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class About:
    """How a result was computed."""

    model: str | None = None
    """The model that predicted, as `name@version`."""
    provider: str | None = None
    """The execution provider: `CUDAExecutionProvider` or `CPUExecutionProvider`."""
    request_id: str | None = None
    """The request's id in the server's log."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the server spent, by stage: `read`, `infer`, `write`."""
    warnings: tuple[ServiceWarning, ...] = ()


def new_file() -> BinaryIO:
    """A temporary file for a result: in memory while it is small, else on disk."""
    import tempfile

    return cast("BinaryIO", tempfile.SpooledTemporaryFile(max_size=IN_MEMORY))


class _Result:
    """The members of `About`, as properties of every result."""

    about: About

    @property
    def model(self) -> str | None:
        """The model that predicted, as `name@version`."""
        return self.about.model

    @property
    def provider(self) -> str | None:
        """The execution provider that ran the model."""
        return self.about.provider

    @property
    def request_id(self) -> str | None:
        """The request's id in the server's log."""
        return self.about.request_id

    @property
    def timing(self) -> Mapping[str, float]:
        """Seconds by stage."""
        return self.about.timing

    @property
    def warnings(self) -> tuple[ServiceWarning, ...]:
        """Warnings of the server."""
        return self.about.warnings


@dataclass(frozen=True, kw_only=True)
class LegendClass:
    """One class of a model."""

    value: int
    """The class's pixel value in a `class` raster, and its position among the probabilities."""
    name: str
    color: str
    """Colour as `#rrggbb`."""
    code: int | None = None
    """The class's number in the source legend (CDL, WorldCover), None without one."""


def legend_in(tags: Mapping[str, str]) -> dict[int, LegendClass]:
    """The legend that the server writes into a class map's tags; empty if there is none."""
    try:
        classes = [legend_class(c) for c in json.loads(tags.get("PIMC_LEGEND", "[]"))]
    except (ValueError, TypeError, KeyError):  # a tag of the same name by another program
        return {}
    return {c.value: c for c in classes}


def legend_class(document: Mapping[str, Any]) -> LegendClass:
    """One class, from its JSON form."""
    return LegendClass(
        value=int(document["value"]),
        name=document["name"],
        color=document["color"],
        code=document.get("code"),
    )


def qgis_style(legend: Iterable[LegendClass]) -> str:
    """The QGIS style (QML) of a class map, for QGIS 3.22 and later.

    A TIFF's colour table has 256 entries and no names, and only GDAL 3.12 and later read the
    names from the file. With the style, QGIS lists the classes and nothing else.
    """
    entries = "".join(
        f'<paletteEntry value="{c.value}" color={quoteattr(c.color)} label={quoteattr(c.name)} '
        'alpha="255"/>'
        for c in legend
    )
    return _style(
        '<rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1" nodataColor="">'
        f"<colorPalette>{entries}</colorPalette></rasterrenderer>"
    )


_LIMITS: Mapping[str, tuple[float, float]] = {
    "forecast": (-0.1, 0.9),
    "probabilities": (0.0, 1.0),
    "attribution": (-0.25, 0.25),
    "embedding": (-1.0, 1.0),
}
"""Rasters of several bands, and the values that a style shows them between."""
_RAMP = ("#8c510a", "#dfc27d", "#f6e8c3", "#80cd66", "#1a7a2e")


def qgis_ramp(low: float, high: float) -> str:
    """The QGIS style (QML) of a raster's first band as colours, for QGIS 3.22 and later.

    Without a style, QGIS shows the first three bands of any raster as red, green and blue.

    Args:
        low: value of the first colour.
        high: value of the last colour.
    """
    stops = [low + (high - low) * n / (len(_RAMP) - 1) for n in range(len(_RAMP))]
    items = "".join(
        f'<item value="{stop:.6g}" label="{stop:.3g}" color="{color}" alpha="255"/>'
        for stop, color in zip(stops, _RAMP, strict=True)
    )
    return _style(
        '<rasterrenderer type="singlebandpseudocolor" band="1" opacity="1" alphaBand="-1" '
        f'nodataColor="" classificationMin="{low:.6g}" classificationMax="{high:.6g}">'
        '<rastershader><colorrampshader colorRampType="INTERPOLATED" classificationMode="1" '
        f'minimumValue="{low:.6g}" maximumValue="{high:.6g}" clip="0" labelPrecision="3">'
        f"{items}</colorrampshader></rastershader></rasterrenderer>"
    )


def _style(renderer: str) -> str:
    return (
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        f'<qgis version="3.22" styleCategories="Symbology"><pipe>{renderer}</pipe>'
        "<blendMode>0</blendMode></qgis>\n"
    )


class Raster(_Result):
    """A GeoTIFF, as the server wrote it.

    The file is held in memory, or on disk if it is large, until the raster is closed or garbage
    collected. The header is parsed at once, the pixels when `array` is first accessed.

    Attributes:
        name: the output's name, such as `class` or `forecast`.
        about: how the result was computed.
        header: the contents of the GeoTIFF's header.
        legend: pixel value to class; empty if pixels are not classes.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        name: str,
        about: About,
    ) -> None:
        self.name = name
        self.about = about
        self._file = file
        self._close = weakref.finalize(self, file.close)
        self.header: GeoTIFF = read_header(file)
        self.legend: Mapping[int, LegendClass] = legend_in(self.header.tags)

    @cached_property
    def array(self) -> NDArray[Any]:
        """The pixels: (rows, columns) if there is one band, else (bands, rows, columns).

        Raises:
            GeoTIFFError: the file is damaged, or of a form that the server does not write.
        """
        pixels = read_array(self._file, self.header)
        return pixels[0] if self.header.count == 1 else pixels

    @property
    def scale(self) -> float | None:
        """Scale of integers: value = pixel x scale; None if pixels are the values.

        Embeddings as int8 and probabilities as uint8 have one.
        """
        return self.header.scale

    @property
    def values(self) -> NDArray[Any]:
        """As `array`; with a `scale` the values, as float32 with NaN for no prediction.

        Probabilities as uint8 are rounded by at most 1/508, and their sum over the classes need not
        be 1.

        Raises:
            GeoTIFFError: as for `array`.
        """
        import numpy as np

        if self.scale is None:
            return self.array
        values = self.array * np.float32(self.scale)
        return np.where(self.array == self.nodata, np.float32(np.nan), values)

    @property
    def content(self) -> bytes:
        """The bytes of the file."""
        self._file.seek(0)
        return self._file.read()

    def copy_to(self, file: BinaryIO) -> None:
        """Write the bytes of the file to an open binary file, piece by piece."""
        self._file.seek(0)
        shutil.copyfileobj(self._file, file)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file; an existing file is replaced only by a complete one.

        A QGIS style of the same name (`.qml`) is written beside it: for a class map with the names
        and colours of the classes, for a raster of several bands with the first band in colours,
        where QGIS would otherwise show three bands as a picture. An existing style is kept.
        """
        target = Path(path)
        part = target.with_name(f"{target.name}.part")
        try:
            with part.open("wb") as file:
                self.copy_to(file)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        style, text = target.with_suffix(".qml"), self._qgis_style()
        if text and not style.exists():
            style.write_text(text, encoding="utf-8")
        return target

    def _qgis_style(self) -> str | None:
        """The style to write beside the file; None for one that QGIS shows well without."""
        if self.header.count > 1:
            return qgis_ramp(*_LIMITS.get(self.name, (0.0, 1.0)))
        return qgis_style(self.legend.values()) if self.legend else None

    def to_xarray(self) -> xarray.DataArray:
        """The pixels as an `xarray.DataArray`.

        Dimensions are `y` and `x` (centres of pixels, in the CRS's units). If there are several
        bands, `band` precedes them, or for a forecast `index`, `time` and `quantile`. `rioxarray`
        reads the CRS and nodata from the array; a class map has its legend in the attributes
        `flag_values`, `flag_meanings` and `flag_colors`.

        Raises:
            ImportError: xarray is not installed (`pip install 'pimc-client[analysis]'`).
            GeoTIFFError: as for `array`.
        """
        return analysis.data_array(self)

    def plot(
        self, band: int | str | None = None, ax: matplotlib.axes.Axes | None = None
    ) -> matplotlib.axes.Axes:
        """Draw one band with Matplotlib; a class map is drawn in its colours with a legend.

        Args:
            band: name or number from 1; the first band if not given.
            ax: the axes to draw into; a new figure if not given.

        Returns:
            The axes.

        Raises:
            ImportError: Matplotlib is not installed (`pip install 'pimc-client[analysis]'`).
            ValueError: the raster has no such band.
            GeoTIFFError: as for `array`.
        """
        return analysis.plot(self, band, ax)

    def close(self) -> None:
        """Release the file; `array` stays available if it was accessed before."""
        self._close()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(bands, rows, columns)."""
        return self.header.count, self.header.height, self.header.width

    @property
    def descriptions(self) -> tuple[str | None, ...]:
        """Name of each band, such as `NDVI_2021-11-05_q50`."""
        return self.header.descriptions

    @property
    def nodata(self) -> float | None:
        """The value of pixels without a prediction: 255 for classes, -128 for int8, else NaN."""
        return self.header.nodata

    @property
    def crs(self) -> str | None:
        """`EPSG:<code>`; None if the CRS has no code. rasterio reads such a CRS from the file."""
        return f"EPSG:{self.header.epsg}" if self.header.epsg else None

    @property
    def transform(self) -> Transform | None:
        """Pixel to CRS, as `(a, b, c, d, e, f)` in the order of affine and rasterio."""
        return self.header.transform

    @property
    def tags(self) -> Mapping[str, str]:
        """The file's metadata."""
        return self.header.tags

    def __enter__(self) -> Raster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        bands, rows, columns = self.shape
        shape = f"{bands} x {rows} x {columns} {self.header.dtype}"
        return f"<Raster {self.name}: {shape}, {self.crs}, from {self.model}>"


class Rasters(_Result, Mapping[str, Raster]):
    """Several rasters of one request, by output name; each is unpacked when first accessed.

    Attributes:
        about: how the result was computed.
    """

    def __init__(self, file: BinaryIO, *, about: About) -> None:
        import zipfile

        self.about = about
        self._file = file
        self._close = weakref.finalize(self, file.close)
        self._archive = zipfile.ZipFile(file)
        names = {PurePosixPath(name): name for name in self._archive.namelist()}
        self._members = {p.stem: name for p, name in names.items() if p.suffix == ".tif"}
        self._beside = {p.name: name for p, name in names.items() if p.suffix != ".tif"}
        self._rasters: dict[str, Raster] = {}

    def __getitem__(self, name: str) -> Raster:
        if name not in self._rasters:
            member = self._members[name]
            file = new_file()
            with self._archive.open(member) as packed:
                shutil.copyfileobj(packed, file)
            self._rasters[name] = Raster(file, name=name, about=self.about)
        return self._rasters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def copy_to(self, file: BinaryIO) -> None:
        """Write the zip of all files to an open binary file, piece by piece."""
        self._file.seek(0)
        shutil.copyfileobj(self._file, file)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write each raster as `<name>.tif` into a folder, which is created if it is missing.

        The other files of the response are written there as well, such as the one from which GDAL
        and QGIS read the names of classes.

        Returns:
            The rasters' paths.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, member in self._beside.items():
            (target / name).write_bytes(self._archive.read(member))
        return [raster.save(target / f"{name}.tif") for name, raster in self.items()]

    @property
    def item(self) -> Mapping[str, Any] | None:
        """The STAC Item that describes the rasters; None if the server sent none."""
        member = self._beside.get("item.json")
        return None if member is None else json.loads(self._archive.read(member))

    def to_xarray(self) -> xarray.Dataset:
        """The rasters as an `xarray.Dataset`, one variable for each; see `Raster.to_xarray`.

        The dimension of a variable with several bands is named after it: `probabilities_band`.

        Raises:
            ImportError: xarray is not installed (`pip install 'pimc-client[analysis]'`).
        """
        return analysis.dataset(self, self.model)

    def close(self) -> None:
        """Release the files."""
        for raster in self._rasters.values():
            raster.close()
        self._close()

    def __enter__(self) -> Rasters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Rasters {', '.join(self)}, from {self.model}>"


class Summary(_Result, Mapping[str, Any]):
    """The summary of a raster, as the server's JSON: dates used, valid share and others."""

    def __init__(self, document: Mapping[str, Any], *, about: About) -> None:
        self.about = about
        self._document = dict(document)

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 (any JSON)
        return self._document[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._document)

    def __len__(self) -> int:
        return len(self._document)

    def __repr__(self) -> str:
        return f"<Summary of {', '.join(self)}, from {self.model}>"


class Results(_Result, list[T]):
    """One result for each series or point, in the order given."""

    def __init__(self, results: list[T], *, about: About) -> None:
        super().__init__(results)
        self.about = about

    def to_pandas(self) -> pd.DataFrame:
        """The results as a `pandas.DataFrame`, one row for each.

        Columns have the names of the server's properties. Those of a forecast are named like the
        bands of a raster (`NDVI_2021-11-05_q50`), the probability of a class
        `probabilities.<class>`, and the dimensions of an embedding `embedding_0` and so on.

        Raises:
            ImportError: pandas is not installed (`pip install 'pimc-client[analysis]'`).
        """
        return analysis.data_frame([cast("Any", one).row() for one in self])

    def to_geopandas(self) -> geopandas.GeoDataFrame:
        """The results of points as a `GeoDataFrame` in EPSG:4326; columns as in `to_pandas`.

        Raises:
            ImportError: GeoPandas is not installed (`pip install 'pimc-client[analysis]'`).
            TypeError: the results are of series, which have no geometry.
        """
        points = [one for one in self if isinstance(one, PointResult)]
        if len(points) < len(self):
            raise TypeError("results of series have no geometry: use to_pandas instead")
        geometries = [{"type": "Point", "coordinates": [one.lon, one.lat]} for one in points]
        return analysis.geo_data_frame([one.row() for one in points], geometries)


_OWN_FORMATS = (".csv", ".geojson", ".json")
_PARQUET = (".parquet", ".geoparquet")
_TABLES = (*_OWN_FORMATS, ".gpkg", *_PARQUET, ".fgb", ".shp")


def check_table(path: Path) -> str:
    """Check that a `Table` can be saved to a path, before a request is sent for it.

    Returns:
        The suffix in lower case.

    Raises:
        ValueError: no format has the path's suffix.
        ImportError: the format needs GeoPandas, which is not installed.
    """
    kind = path.suffix.lower()
    if kind not in _TABLES:
        raise ValueError(
            f"{path.name} cannot be written, because '{kind}' is not the suffix of a table: name a "
            f"file that ends with {', '.join(_TABLES[:-1])} or {_TABLES[-1]}"
        )
    if kind not in _OWN_FORMATS:
        analysis.required("geopandas", f"a table as {kind}")
    return kind


class Table(_Result, Sequence[Mapping[str, Any]]):
    """Results of fields: one row for each, in the order given, with its id and properties.

    A row holds the field's own properties and the results, named as in `Results.to_pandas`.

    Attributes:
        document: the GeoJSON FeatureCollection, as the server sent it (EPSG:4326).
        about: how the results were computed.
    """

    def __init__(self, document: Mapping[str, Any], *, about: About) -> None:
        self.about = about
        self.document = document
        self._rows = [_row_of(feature) for feature in document["features"]]

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        """The row of a field by its position."""
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a `pandas.DataFrame`.

        Raises:
            ImportError: pandas is not installed (`pip install 'pimc-client[analysis]'`).
        """
        return analysis.data_frame(self._rows)

    def to_geopandas(self) -> geopandas.GeoDataFrame:
        """The rows and polygons as a `GeoDataFrame` in EPSG:4326.

        Raises:
            ImportError: GeoPandas is not installed (`pip install 'pimc-client[analysis]'`).
        """
        geometries = [feature["geometry"] for feature in self.document["features"]]
        return analysis.geo_data_frame(self._rows, geometries)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table in the format of the path's suffix.

        `.csv` is written without polygons, `.geojson` and `.json` as GeoJSON. GeoPandas writes
        `.gpkg`, `.parquet`, `.geoparquet`, `.fgb` and `.shp`.

        Raises:
            ValueError: the suffix is not one of these.
            ImportError: the format needs GeoPandas, which is not installed.
        """
        target = Path(path)
        kind = check_table(target)
        if kind == ".csv":
            target.write_text(csv_text(self._rows), encoding="utf-8")
        elif kind in _OWN_FORMATS:
            target.write_text(json.dumps(self.document, ensure_ascii=False), encoding="utf-8")
        elif kind in _PARQUET:
            self.to_geopandas().to_parquet(target)
        else:
            self.to_geopandas().to_file(target)
        return target

    def __repr__(self) -> str:
        return f"<Table of {len(self)} fields, from {self.model}>"


class Measured(_Result, Sequence[Mapping[str, Any]]):
    """Measured series of places: the properties of each, in the order given.

    A place has `id` and `status`, and on the raster lists by date: `clear` (share, 0 to 1), one
    per band (reflectance) and one per spectral index; None where nothing is clear.

    Attributes:
        document: the GeoJSON FeatureCollection, as the server sent it (EPSG:4326).
        about: how the series were read.
        dates: T acquisition dates.
        bands: names of the bands.
        indices: names of the spectral indices.
    """

    def __init__(self, document: Mapping[str, Any], *, about: About) -> None:
        self.about = about
        self.document = document
        self.dates = tuple(date.fromisoformat(day) for day in document["dates"])
        self.bands: tuple[str, ...] = tuple(document["bands"])
        self.indices: tuple[str, ...] = tuple(document["indices"])
        self._places = [
            {"id": feature.get("id", number), **feature["properties"]}
            for number, feature in enumerate(document["features"], 1)
        ]

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        """A place by its position."""
        return self._places[index]

    def __len__(self) -> int:
        return len(self._places)

    def plots(self, index: int) -> Mapping[str, NDArray[np.float64]]:
        """The recurrence plots (M, M) of a place by spectral index.

        Empty if none were requested, or if too few dates are clear.
        """
        import numpy as np

        found = self._places[index].get("plots") or {}
        return {name: np.array(plot, dtype=np.float64) for name, plot in found.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One row per place and date: `id`, `status`, `date`, `clear`, bands and indices."""
        columns = ("clear", *self.bands, *self.indices)
        return [
            {
                "id": place["id"],
                "status": place["status"],
                "date": day,
                **{name: place[name][t] for name in columns},
            }
            for place in self._places
            for t, day in enumerate(place.get("dates", ()))
        ]

    def to_pandas(self) -> pd.DataFrame:
        """`rows` as a `pandas.DataFrame`, with dates as timestamps.

        Raises:
            ImportError: pandas is not installed (`pip install 'pimc-client[analysis]'`).
        """
        frame = analysis.data_frame(self.rows())
        if len(frame):
            frame["date"] = frame["date"].astype("datetime64[s]")
        return frame

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `rows` as CSV (`.csv`), or the GeoJSON document (any other ending)."""
        target = Path(path)
        if target.suffix.lower() == ".csv":
            target.write_text(csv_text(self.rows()), encoding="utf-8")
        else:
            target.write_text(json.dumps(self.document, ensure_ascii=False), encoding="utf-8")
        return target

    def __repr__(self) -> str:
        return f"<Measured series of {len(self)} places at {len(self.dates)} dates>"


def _row_of(feature: Mapping[str, Any]) -> dict[str, Any]:
    properties = flat_record(feature.get("properties") or {})
    return {"id": feature["id"], **properties} if "id" in feature else properties


@dataclass(frozen=True, kw_only=True)
class PixelClass:
    """The class of one pixel, field or patch."""

    id: str | None
    status: Status
    label: str | None
    """The class's name, None without a prediction."""
    value: int | None
    """The class's pixel value, as in the legend."""
    confidence: float | None
    """The largest probability, 0 to 1."""
    entropy: float | None
    """Shannon entropy of the probabilities, in nats, if the server sent it."""
    probabilities: Mapping[str, float]
    """Class name to probability; empty without a prediction."""
    attribution: Mapping[str, float | None] = field(default_factory=dict)
    """ISO date to the drop in the class's probability without this date; None where the place is
    not clear on it. Empty if it was not requested."""

    def row(self) -> dict[str, Any]:
        """The result as one row of a table."""
        known = {"id": self.id, "status": self.status, "class": self.label, "value": self.value}
        more = {"confidence": self.confidence, "entropy": self.entropy}
        shares = {"probabilities": self.probabilities, "attribution": self.attribution}
        return flat_record({**known, **more, **shares})


@dataclass(frozen=True, kw_only=True, eq=False)
class Forecast:
    """The next values of one pixel or field."""

    id: str | None
    status: Status
    dates: tuple[date, ...]
    """H dates ahead; empty without a prediction."""
    indices: Mapping[str, Mapping[str, NDArray[np.float64]]]
    """Spectral index (`NDVI`, `EVI`, `SAVI`) to quantile (`q10`, `q50`, `q90`) to values (H)."""

    def __getitem__(self, index: str) -> Mapping[str, NDArray[np.float64]]:
        """The quantiles of a spectral index: `forecast["NDVI"]["q50"]`."""
        return self.indices[index]

    def row(self) -> dict[str, Any]:
        """The result as one row of a table."""
        values = {
            index: {quantile: list(found) for quantile, found in quantiles.items()}
            for index, quantiles in self.indices.items()
        }
        days = [day.isoformat() for day in self.dates]
        return flat_record({"id": self.id, "status": self.status, "dates": days, **values})


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """The embedding of one pixel, field or patch."""

    id: str | None
    status: Status
    values: NDArray[np.float64] | None
    """(D), None without a prediction."""

    def row(self) -> dict[str, Any]:
        """The result as one row of a table."""
        values = [] if self.values is None else self.values.tolist()
        return flat_record({"id": self.id, "status": self.status, "embedding": values})


@dataclass(frozen=True, kw_only=True)
class PointResult(Generic[T]):
    """The result at one point."""

    lon: float
    """Degrees."""
    lat: float
    """Degrees."""
    status: Status
    result: T
    """The prediction; without values if `status` is not `ok`."""
    properties: Mapping[str, Any]
    """The GeoJSON properties, as the server sent them."""

    def row(self) -> dict[str, Any]:
        """The result as one row of a table."""
        return {"lon": self.lon, "lat": self.lat, **flat_record(self.properties)}


@dataclass(frozen=True, kw_only=True)
class ModelWindow:
    """The time window of a model."""

    steps: int
    step_days: int
    start: str
    """The rule for the first day if a request does not give one."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's card."""

    name: str
    version: str
    task: str
    description: str
    bands: tuple[str, ...]
    """Sentinel-2 bands that the model needs."""
    window: ModelWindow | None
    """None for models of imagery."""
    min_observations: int
    """Clear observations that a pixel needs."""
    classes: tuple[LegendClass, ...]
    horizon: int | None
    """The largest number of steps ahead, None for other tasks than forecasts."""
    metrics: Mapping[str, Any]
    training_data: tuple[Mapping[str, Any], ...]
    licence: str
    variants: tuple[Mapping[str, Any], ...]
    sha256: str
    card: Mapping[str, Any]
    """The whole card, as the server sent it."""

    @property
    def id(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def legend(self) -> Mapping[int, LegendClass]:
        """Pixel value to class."""
        return {c.value: c for c in self.classes}


@dataclass(frozen=True, kw_only=True)
class Taught:
    """A model of the caller's own classes, just made."""

    model: Model
    """Its card; `metrics` holds its scores on places left out."""
    warnings: tuple[ServiceWarning, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of the server; iterate over the cards, or take one by name."""

    cards: tuple[Model, ...]
    defaults: Mapping[str, str]
    """Task to the model that is used if a request does not give one."""

    def __iter__(self) -> Iterator[Model]:
        return iter(self.cards)

    def __len__(self) -> int:
        return len(self.cards)

    def __getitem__(self, name: str) -> Model:
        """The card of a model by name; KeyError if there is none."""
        return {card.name: card for card in self.cards}[name]


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """Whether the server is ready; true if it is."""

    ready: bool
    provider: str | None
    """The execution provider in use, None while not ready."""
    models: tuple[str, ...]
    """The models loaded, as `name@version`."""
    detail: str | None
    """The reason why the server is not ready, None if it is ready."""

    def __bool__(self) -> bool:
        return self.ready


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The state of a job when it was last read."""

    id: str
    task: str
    """The task that runs, such as `classify-pixels`."""
    status: JobStatus
    progress: float
    """Per cent, 0 to 100."""
    created: datetime | None
    started: datetime | None
    """Time of the start, None while the job is in the queue."""
    finished: datetime | None
    """Time of the end, None until the job has finished."""
    message: str | None
    """The server's message about the job, None if there is none."""
    document: Mapping[str, Any]
    """The whole state, as the server sent it."""

    @property
    def done(self) -> bool:
        """Whether the job has finished, successfully or not."""
        return self.status not in {"accepted", "running"}


class JobHandle(Generic[T]):
    """A job and its state when it was last read.

    Attributes:
        state: the state when last read; `refresh` and `wait` read it again.
        accept: media types to request the result in.
        output: the single output requested, if it is known.
    """

    def __init__(self, state: JobState, *, accept: str, output: str | None = None) -> None:
        self.state = state
        self.accept = accept
        self.output = output

    @property
    def id(self) -> str:
        """The job's id; `Client.job` finds the job by it."""
        return self.state.id

    @property
    def task(self) -> str:
        """The task that runs."""
        return self.state.task

    @property
    def status(self) -> JobStatus:
        """The status when last read."""
        return self.state.status

    @property
    def progress(self) -> float:
        """Per cent done when last read."""
        return self.state.progress

    @property
    def done(self) -> bool:
        """Whether the job had finished when last read."""
        return self.state.done

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {self.task}, {self.status}>"
