"""Inputs of a request: files, points, series and options, and how they are encoded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, TypedDict

from pimc_client.tables import json_of_file, points_of_file
from pimc_client.uploads import (
    Progress,
    Source,
    json_bytes,
    source_of_bytes,
    source_of_file,
    sources_of_paths,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EmbeddingType = Literal["float32", "int8"]
ProbabilityType = Literal["float32", "uint8"]
Task = Literal["classify-pixels", "forecast", "landcover", "embed"]
Runnable = Task | Literal["similar"]
"""Operations that a job can run."""
SimilarOutput = Literal["similarity", "similarities"]
Layout = Literal["file-per-date", "file-per-band-and-date", "file-per-band", "single-file"]
Sensor = Literal["sentinel-2", "hls", "landsat", "modis", "planetscope"]
Modality = Literal["pixel", "patch"]
RasterOutput = Literal["class", "confidence", "entropy", "probabilities", "attribution"]
ClassOutput = Literal[RasterOutput, "polygons"]
QuantileOutput = Literal["q10", "q50", "q90"]
AnswerKind = Literal["raster", "summary"]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A file that the server reads itself, if its administrator allows it."""

    href: str
    """A path or URL, as the server sees it."""
    date: Date | None = None
    """The acquisition date, if neither the metadata nor the file's name holds it."""


@dataclass(frozen=True, kw_only=True)
class StacItems:
    """STAC items whose assets the server reads itself, if its administrator allows their hosts."""

    items: Mapping[str, Any]
    """A STAC ItemCollection (1.0 or 1.1) as JSON, such as `ItemCollection.to_dict()` of pystac."""

    def document(self) -> dict[str, Any]:
        """The value of `stac` in a request."""
        return dict(self.items)


@dataclass(frozen=True, kw_only=True)
class StacSearch:
    """A search of a STAC API by the server, if its administrator allows the API's host.

    At least one of `collections`, `ids`, `bbox`, `intersects` and `datetime` is required.
    """

    url: str
    """Landing page of the API, or the address of an ItemCollection."""
    collections: Sequence[str] = ()
    """Ids of collections."""
    ids: Sequence[str] = ()
    """Ids of items."""
    bbox: Sequence[float] | None = None
    """West, south, east, north in degrees; only this part of the items is read."""
    intersects: Mapping[str, Any] | None = None
    """GeoJSON geometry (EPSG:4326); only its extent is read."""
    datetime: str | None = None
    """A date, or two separated by `/` with `..` for an open end."""
    max_cloud_cover: float | None = None
    """Largest `eo:cloud_cover` of an item, per cent."""
    query: Mapping[str, Any] | None = None
    """As the API's query extension takes it."""
    filter: Mapping[str, Any] | None = None
    """CQL2 as JSON, for the API's filter extension."""

    def document(self) -> dict[str, Any]:
        """The value of `stac` in a request."""
        given = {name: value for name, value in vars(self).items() if value not in (None, ())}
        for name in ("collections", "ids", "bbox"):
            if name in given:
                given[name] = list(given[name])
        return given


Date: TypeAlias = "date | str | np.datetime64"
"""A date of Python, numpy or pandas, or ISO text (`2021-01-05`)."""
Dates: TypeAlias = "Sequence[Date] | NDArray[np.datetime64] | Date"
"""Dates in order, one date, or comma-separated text; a pandas `DatetimeIndex` is accepted, too."""
File: TypeAlias = "str | os.PathLike[str] | BinaryIO | tuple[str, bytes]"
"""A path, an open binary file (sent from its current position), or `(name, bytes)`.

A path may be a file, a folder or zip (all rasters in it, including subfolders, and those of zips in
a folder), or a glob pattern.
"""
Files: TypeAlias = (
    "File | Reference | StacItems | StacSearch | Iterable[File] | Iterable[Reference]"
)
"""One file or many, in any order: dates come from `dates`, the metadata or the names; or STAC items
or a search, which the server reads itself."""
Points: TypeAlias = "Mapping[str, Any] | Iterable[Sequence[float]] | str | os.PathLike[str]"
"""A GeoJSON FeatureCollection of Points, pairs of (longitude, latitude) in degrees (EPSG:4326),
the path of a GeoJSON or CSV file, or a GeoPandas object."""
Fields: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str] | tuple[str, bytes]"
"""Polygons: a GeoJSON FeatureCollection, the path or `(name, bytes)` of a GeoJSON, GeoParquet or
GeoPackage file in any CRS, or a GeoPandas object."""
Area: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str]"
"""A GeoJSON Polygon, MultiPolygon or Feature in degrees (EPSG:4326), the path of such a file, or an
object of Shapely or GeoPandas."""
SeveralOutputs: TypeAlias = list[ClassOutput] | tuple[ClassOutput, ...]
# Not a Sequence: text is one too, and a type checker could not distinguish one output from several.
ClassOutputs: TypeAlias = ClassOutput | SeveralOutputs
"""One output is returned as one `Raster`, a list as `Rasters`, even a list of one."""
QuantileOutputs: TypeAlias = "QuantileOutput | Sequence[QuantileOutput]"
"""The quantiles are bands of one file."""
Values: TypeAlias = "Sequence[float | None] | NDArray[np.floating[Any]]"


class StackOptions(TypedDict, total=False):
    """How the files of a raster request are read; the server detects what is not given."""

    model: str
    """`name` or `name@version`; the task's default model if not given."""
    layout: Layout
    """How dates and bands are distributed over the files."""
    dates: Dates
    """One date per file, per band of a `file-per-band` file, or per date of a single file."""
    bands: Sequence[str] | str
    """Sentinel-2 band names in band order, such as `["B02", "B03", "B04", "B08", "SCL"]`."""
    scale: float | str
    """Reflectance = value x scale + offset; text such as `2022-01-25:0.0001` applies from that date
    on."""
    offset: float | str
    """As `scale`: `2022-01-25:-0.1` applies from that date on, `04.00:-0.1` from that processing
    baseline of Sentinel-2 on."""
    mask: str | Sequence[str]
    """How cloudy pixels are identified: `auto` (the default) by the masks in the files, `none` only
    by nodata and NaN, or rules such as `scl`, `fmask` or `cldprb:40`, all of which a clear pixel
    must pass. If the files hold no mask, `cloud` computes one from the series (at least six
    dates)."""
    sensor: Sensor
    """The satellite sensor; detected from names, tags and bands if not given."""
    grid: str
    """The output grid: `strict`, `finest`, a CRS and pixel size such as `EPSG:32631@10`, or the
    name of the file whose grid is used."""
    bbox: Sequence[float] | str
    """West, south, east, north in degrees: only this part is read and returned."""
    area: Area
    """A polygon: only this part is read and returned."""
    progress: Progress
    """Called while files are sent, with the bytes sent and the total number of bytes."""


class WindowOptions(StackOptions, total=False):
    """`StackOptions`, and the option of models that have a time window."""

    start: Date
    """First day of the time window; chosen by the rule on the model's card if not given."""


class CleaningOptions(WindowOptions, total=False):
    """`WindowOptions`, and how a class map is cleaned."""

    smooth: int
    """Radius in pixels: probabilities of neighbours count before the class is taken (Bayesian
    smoothing); 0 if left out."""
    min_area: float
    """Hectares: smaller areas of the map join the neighbour with the longest shared edge."""


class ClassOptions(CleaningOptions, total=False):
    """`CleaningOptions`, and the number type of probabilities."""

    dtype: ProbabilityType
    """Number type of the output `probabilities`: `float32` (the default), or `uint8`, a quarter of
    the size or less."""


class LabelOptions(StackOptions, total=False):
    """`StackOptions`, and the number type of probabilities."""

    dtype: ProbabilityType
    """As in `ClassOptions`."""


class JobOptions(CleaningOptions, total=False):
    """`CleaningOptions`, the options of the job's task, and the job's own."""

    horizon: int
    """Forecast: number of steps ahead."""
    backtest: bool
    """Forecast: test and correct it on earlier dates of the same stack."""
    stride: int
    """Patches: pixels between one patch and the next."""
    modality: Modality
    """Embed: `pixel` or `patch`."""
    dtype: EmbeddingType | ProbabilityType
    """Number type: of an embedding `float32` or `int8`; of probabilities `float32` or `uint8`."""
    subscriber: Mapping[str, str]
    """Addresses that the job calls: `successUri`, `failedUri`, `inProgressUri`."""
    idempotency_key: str
    """Two submissions with the same key create one job; without a key, each creates its own."""


class Series:
    """One pixel or field through time, without a raster.

    ```python
    Series(
        id="field-7",
        dates=["2021-01-05", "2021-01-15"],
        B02=[0.05, None],
        B04=[0.07, 0.06],
        B08=[0.31, 0.33],
    )
    ```

    Args:
        id: any name; the result repeats it.
        dates: acquisition dates (T).
        lon: longitude in degrees. A forecast takes into account whether the place is far from the
            model's training data.
        lat: latitude in degrees.
        **bands: values (T) of each band that the model's card lists: reflectance, unitless, 0 to 1.
            None, NaN, a masked value and pandas' `NA` are missing observations.

    Attributes:
        id: the name given.
        dates: the dates as ISO text.
        lonlat: longitude and latitude, None if they were not given.
        bands: band name to values; a missing observation is None.

    Raises:
        ValueError: dates and values differ in number, no band is given, a value is infinite, a date
            is missing, or only one of lon and lat is given.
        TypeError: a value is not a number, or a date is not a date.
    """

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 (the contract's name)
        dates: Dates,
        lon: float | None = None,
        lat: float | None = None,
        **bands: Values,
    ) -> None:
        if not bands:
            raise ValueError(
                f"series '{id}' has no band: give the values of each band that the model needs, "
                "such as B02=[…]"
            )
        self.id = id
        self.lonlat = _place(lon, lat, f"series '{id}'")
        self.dates = tuple(_dates(dates, f"series '{id}': dates"))
        self.bands: Mapping[str, tuple[float | None, ...]] = {
            name: _reflectance(values, f"series '{id}': {name}") for name, values in bands.items()
        }
        for name, values in self.bands.items():
            if len(values) != len(self.dates):
                raise ValueError(
                    f"series '{id}': {len(values)} values of {name} but {len(self.dates)} dates; "
                    "give one value per date, None if it is missing"
                )

    def to_json(self) -> dict[str, Any]:
        """The series in the server's JSON form; a missing observation is null."""
        bands = {name: list(values) for name, values in self.bands.items()}
        place = dict(zip(("lon", "lat"), self.lonlat or (), strict=False))
        return {"id": self.id, "dates": list(self.dates), **place, **bands}

    def __repr__(self) -> str:
        return f"<Series {self.id}: {len(self.dates)} dates of {', '.join(self.bands)}>"


def _place(lon: object, lat: object, label: str) -> tuple[float, float] | None:
    """Longitude and latitude in degrees; None if both are missing."""
    x, y = _number(lon, f"{label}: lon"), _number(lat, f"{label}: lat")
    if x is None or y is None:
        if x is None and y is None:
            return None
        raise ValueError(f"{label}: give both lon and lat, or none of them")
    if abs(x) > 180 or abs(y) > 90:
        raise ValueError(f"{label}: lon {x:g} and lat {y:g} are not degrees (EPSG:4326)")
    return x, y


def _reflectance(values: Any, label: str) -> tuple[float | None, ...]:  # noqa: ANN401 (`Values`, of any library)
    if hasattr(values, "filled"):  # a masked array of numpy
        values = values.astype(float).filled(math.nan)
    # `tolist` returns Python's own numbers, if the library has it.
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    return tuple(_number(value, f"{label}[{at}]") for at, value in enumerate(listed))


def _number(value: object, label: str) -> float | None:
    """A finite number, None for a missing one."""
    if value is None or _is_missing(value):
        return None
    try:
        number = float(value) if not isinstance(value, str) else None  # type: ignore[arg-type] # tried
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise TypeError(f"{label} is {value!r}: give a number, or None for a missing value")
    if math.isinf(number):
        raise ValueError(f"{label} is {number}: give a finite number, or None for a missing value")
    return None if math.isnan(number) else number


def _is_missing(value: object) -> bool:
    # Compared by name, so that neither NumPy nor pandas must be imported.
    return type(value).__name__ in {"NAType", "NaTType", "MaskedConstant"}


def iso(day: Date, label: str = "the date") -> str:
    """A date as YYYY-MM-DD; the server checks text.

    Raises:
        ValueError: the date is missing (`NaT`).
        TypeError: the value is not a date.
    """
    if isinstance(day, str):
        return day
    if isinstance(day, date) and not _is_missing(day):
        # A `datetime`, and so a Timestamp of pandas, is a `date` too.
        return day.date().isoformat() if isinstance(day, datetime) else day.isoformat()
    if _is_missing(day) or _is_numpy_date(day):
        text = "NaT" if _is_missing(day) else str(_numpy().asarray(day, "datetime64[D]"))
        if text == "NaT":
            raise ValueError(f"{label} is missing (NaT): every observation needs a date")
        return text
    raise TypeError(
        f"{label} is {day!r}, a {type(day).__name__}: give ISO text (2021-01-05), a date, or a "
        "date of numpy or pandas"
    )


def _is_numpy_date(value: object) -> bool:
    """Whether a value is one date of NumPy or xarray, including an array without dimensions."""
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return kind == "M" and getattr(value, "ndim", 0) == 0


def _numpy() -> Any:  # noqa: ANN401 (a module, imported when it is needed)
    import numpy as np

    return np


def _dates(dates: Any, label: str) -> list[str]:  # noqa: ANN401 (`Dates`, of any library)
    if isinstance(dates, str):
        return [value.strip() for value in dates.split(",")]
    if isinstance(dates, date) or _is_numpy_date(dates):
        return [iso(dates, label)]
    return [iso(day, f"{label}[{at}]") for at, day in enumerate(dates)]


def sources_of(files: Files) -> list[Source] | list[Reference] | StacItems | StacSearch:
    """The files to send, or the references, STAC items or search that the server reads itself.

    Raises:
        TypeError: a value is not a file, or files are mixed with references.
        ValueError: no file is given; see also `sources_of_paths`.
        FileNotFoundError: a path does not exist.
    """
    if isinstance(files, StacItems | StacSearch):
        return files
    given = [files] if _is_one(files) else list(files)  # type: ignore[arg-type] # many, so iterable
    if not given:
        raise ValueError("at least one file is required")
    references = [file for file in given if isinstance(file, Reference)]
    if references and len(references) < len(given):
        raise TypeError(
            f"{len(references)} of {len(given)} files are references: give either files to send or "
            "references, not both"
        )
    return references or _sources(given)


def _is_one(files: object) -> bool:
    if isinstance(files, tuple):
        return len(files) == 2 and isinstance(files[0], str) and isinstance(files[1], bytes)
    return isinstance(files, str | bytes | os.PathLike | Reference) or hasattr(files, "read")


def _sources(files: Sequence[object]) -> list[Source]:
    paths = [Path(file) for file in files if isinstance(file, str | os.PathLike)]
    at_paths = iter(sources_of_paths(paths))
    found: list[Source] = []
    for number, file in enumerate(files, 1):
        if isinstance(file, str | os.PathLike):
            found += next(at_paths)
        else:
            found.append(_source(file, number))
    return found


def _source(file: object, number: int) -> Source:
    if isinstance(file, tuple) and _is_one(file):
        return source_of_bytes(*file)
    if hasattr(file, "read"):
        return source_of_file(file, f"file-{number}.tif")  # type: ignore[arg-type] # it reads
    if isinstance(file, bytes):
        raise TypeError(
            f"file {number} is bytes without a name, which may hold the date: give (name, bytes)"
        )
    raise TypeError(
        f"file {number} is a {type(file).__name__}: give a path, a file open as 'rb', "
        "(name, bytes) or a Reference; StacItems or a StacSearch stand alone"
    )


def points_json(points: Points) -> dict[str, Any]:
    """Points as a GeoJSON FeatureCollection.

    Raises:
        ValueError: a point is not two finite numbers, or a file holds no points.
    """
    if isinstance(points, str | os.PathLike):
        return points_of_file(Path(points))
    if isinstance(points, Mapping):
        return dict(points)
    if hasattr(points, "__geo_interface__"):
        return geo_interface(points)
    features = []
    for number, point in enumerate(points, 1):
        if len(point) != 2:
            raise ValueError(f"point {number} has {len(point)} numbers: give (longitude, latitude)")
        lon, lat = float(point[0]), float(point[1])
        if not (abs(lon) <= 180 and abs(lat) <= 90):  # nor NaN
            raise ValueError(
                f"point {number} is ({lon:g}, {lat:g}): give longitude and latitude in degrees "
                "(EPSG:4326), in this order"
            )
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Point", "coordinates": [lon, lat]},
                "properties": {},
            }
        )
    return {"type": "FeatureCollection", "features": features}


def fields_source(fields: Fields) -> Source:
    """Polygons as a file to send.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path is a folder, or one of the files of a shapefile.
        TypeError: the value is not of a type that holds polygons.
    """
    if isinstance(fields, str | os.PathLike):
        path = Path(fields)
        if path.suffix.lower() == ".shp" or path.is_dir():
            raise ValueError(
                f"{path} is not one file with polygons: give GeoJSON, GeoParquet or GeoPackage, or "
                "read it with GeoPandas and give the GeoDataFrame"
            )
        ((source,),) = sources_of_paths([path]) if path.exists() else [_missing(path)]
        return source
    if isinstance(fields, tuple) and _is_one(fields):
        return source_of_bytes(*fields)
    return source_of_bytes("fields.geojson", json_bytes(fields_json(fields)))


def _missing(path: Path) -> list[Source]:
    raise FileNotFoundError(f"{path} does not exist: give an existing file")


def area_json(area: Area) -> dict[str, Any]:
    """A polygon as GeoJSON.

    Raises:
        ValueError: the file is not GeoJSON, or the GeoJSON is not one polygon.
        TypeError: the value is not of a type that holds a polygon.
    """
    document = fields_json(area)
    features = document.get("features")
    if document.get("type") != "FeatureCollection":
        return document
    if not isinstance(features, list) or len(features) != 1:
        raise ValueError("area is not one polygon: give one Polygon, MultiPolygon or Feature")
    return dict(features[0])


def fields_json(fields: Fields) -> dict[str, Any]:
    """Polygons as GeoJSON, for a request of references.

    Raises:
        ValueError: the file is not GeoJSON.
        TypeError: the value is not of a type that holds polygons.
    """
    if isinstance(fields, Mapping):
        return dict(fields)
    if isinstance(fields, str | os.PathLike):
        return json_of_file(Path(fields), "GeoJSON")
    if hasattr(fields, "__geo_interface__"):
        return geo_interface(fields)
    raise TypeError(
        f"polygons are given as a {type(fields).__name__}: give GeoJSON, the path of a file, or a "
        "GeoPandas object"
    )


def geo_interface(features: Any) -> dict[str, Any]:  # noqa: ANN401 (of any library)
    """The GeoJSON of a GeoPandas object, in degrees, or of another with `__geo_interface__`."""
    if getattr(features, "crs", None) is not None and hasattr(features, "to_crs"):
        features = features.to_crs("EPSG:4326")
    return dict(features.__geo_interface__)


def listed(values: Iterable[Date] | Dates | str, label: str) -> list[str]:
    """Names or dates as a list of text; one comma-separated text is split."""
    return _dates(values, label)
