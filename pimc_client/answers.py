"""What a caller gets: rasters, summaries, points, series, models. Values, without a connection."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Literal, TypeVar, cast

from pimc_client.geotiff import GeoTIFF, Transform, read_array, read_header

if TYPE_CHECKING:
    import os

    import numpy as np
    from numpy.typing import NDArray

Status = Literal["ok", "no_data", "outside"]
"""`no_data`: too few clear dates; `outside`: not on the raster. Neither has values."""
T = TypeVar("T")

IN_MEMORY = 32 * 2**20
"""Bytes of an answer that are held in memory; a longer one goes to a temporary file."""


@dataclass(frozen=True, kw_only=True)
class ServiceWarning:
    """What was odd but no error, such as `dates_outside_window`."""

    code: str
    detail: str

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class About:
    """How an answer came to be."""

    model: str | None = None
    """The model that answered, as `name@version`."""
    provider: str | None = None
    """Where it ran: `CUDAExecutionProvider` or `CPUExecutionProvider`."""
    request_id: str | None = None
    """What to quote to whoever runs the service."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the service spent, by stage: `read`, `infer`, `write`."""
    warnings: tuple[ServiceWarning, ...] = ()
    """What was odd but no error."""


def new_file() -> BinaryIO:
    """A file for an answer: in memory while it is small, else on disk; gone when closed."""
    import tempfile

    return cast("BinaryIO", tempfile.SpooledTemporaryFile(max_size=IN_MEMORY))


class _Answer:
    """The same five facts at every answer."""

    about: About

    @property
    def model(self) -> str | None:
        """The model that answered, as `name@version`."""
        return self.about.model

    @property
    def provider(self) -> str | None:
        """The execution provider that computed the answer."""
        return self.about.provider

    @property
    def request_id(self) -> str | None:
        """The request's id in the service's log."""
        return self.about.request_id

    @property
    def timing(self) -> Mapping[str, float]:
        """Seconds by stage."""
        return self.about.timing

    @property
    def warnings(self) -> tuple[ServiceWarning, ...]:
        """What was odd but no error."""
        return self.about.warnings


@dataclass(frozen=True, kw_only=True)
class LegendClass:
    """One class of a model."""

    value: int
    """Its pixel value in a `class` raster, and its position among the probabilities."""
    name: str
    color: str
    """As `#rrggbb`."""
    code: int | None = None
    """The source legend's own number (CDL, WorldCover), None where it has none."""


def legend_in(tags: Mapping[str, str]) -> dict[int, LegendClass]:
    """The legend that the service writes into a class map's tags; empty where there is none."""
    try:
        classes = [legend_class(c) for c in json.loads(tags.get("PIMC_LEGEND", "[]"))]
    except (ValueError, TypeError, KeyError):  # somebody else's tag of the same name
        return {}
    return {c.value: c for c in classes}


def legend_class(document: Mapping[str, Any]) -> LegendClass:
    """One class, as the service's JSON has it."""
    return LegendClass(
        value=int(document["value"]),
        name=document["name"],
        color=document["color"],
        code=document.get("code"),
    )


class Raster(_Answer):
    """A GeoTIFF, as the service wrote it.

    The file lies in memory, or on disk where it is large, until the raster is closed or
    forgotten. The header is read at once, the pixels when `array` is first asked for.

    Attributes:
        name: the output's name, such as `class` or `forecast`.
        about: how the answer came to be.
        header: everything that the GeoTIFF's header says.
        legend: pixel value to class; empty where pixels are no classes.
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
        """The pixels: (rows, columns) of a single band, else (bands, rows, columns).

        Raises:
            GeoTIFFError: this package's small reader cannot decode the file.
        """
        pixels = read_array(self._file, self.header)
        return pixels[0] if self.header.count == 1 else pixels

    @property
    def content(self) -> bytes:
        """The file itself."""
        self._file.seek(0)
        return self._file.read()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file; a file of that name is replaced, and never left half written."""
        target = Path(path)
        part = target.with_name(f"{target.name}.part")
        self._file.seek(0)
        try:
            with part.open("wb") as file:
                shutil.copyfileobj(self._file, file)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target

    def close(self) -> None:
        """Let go of the file; `array` stays where it was read before."""
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
        """The value of pixels without an answer: 255 for classes, else NaN."""
        return self.header.nodata

    @property
    def crs(self) -> str | None:
        """`EPSG:<code>`; None where the CRS has no code, which rasterio then reads from `save`."""
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


class Rasters(_Answer, Mapping[str, Raster]):
    """Several rasters of one request, by output name; each is unpacked when first asked for.

    Attributes:
        about: how the answer came to be.
    """

    def __init__(self, file: BinaryIO, *, about: About) -> None:
        import zipfile

        self.about = about
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

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write each as `<name>.tif` into a folder, which is made where it is missing.

        What the service sent beside them, such as the side file in which GDAL and QGIS look for
        the names of classes, goes there as well.

        Returns:
            The rasters' paths.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, member in self._beside.items():
            (target / name).write_bytes(self._archive.read(member))
        return [raster.save(target / f"{name}.tif") for name, raster in self.items()]

    def close(self) -> None:
        """Let go of the files."""
        for raster in self._rasters.values():
            raster.close()
        self._close()

    def __enter__(self) -> Rasters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Rasters {', '.join(self)}, from {self.model}>"


class Summary(_Answer, Mapping[str, Any]):
    """The answer in numbers, as the service's JSON has it: dates used, valid share, and so on."""

    def __init__(self, document: Mapping[str, Any], *, about: About) -> None:
        self.about = about
        self._document = dict(document)

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 (whatever JSON can say)
        return self._document[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._document)

    def __len__(self) -> int:
        return len(self._document)

    def __repr__(self) -> str:
        return f"<Summary of {', '.join(self)}, from {self.model}>"


class Results(_Answer, list[T]):
    """One result for each series or point, in the order given."""

    def __init__(self, results: list[T], *, about: About) -> None:
        super().__init__(results)
        self.about = about


@dataclass(frozen=True, kw_only=True)
class PixelClass:
    """The class of one pixel, field or patch."""

    id: str | None
    status: Status
    label: str | None
    """The class's name, None without an answer."""
    value: int | None
    """The class's pixel value, as in the legend."""
    confidence: float | None
    """The largest probability, 0 to 1."""
    entropy: float | None
    """Shannon's, in nats, where it was given."""
    probabilities: Mapping[str, float]
    """Class name to probability; empty without an answer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Forecast:
    """The next values of one pixel or field."""

    id: str | None
    status: Status
    dates: tuple[date, ...]
    """H dates ahead; empty without an answer."""
    indices: Mapping[str, Mapping[str, NDArray[np.float64]]]
    """Spectral index (`NDVI`, `EVI`, `SAVI`) to quantile (`q10`, `q50`, `q90`) to values (H)."""

    def __getitem__(self, index: str) -> Mapping[str, NDArray[np.float64]]:
        """The quantiles of a spectral index: `forecast["NDVI"]["q50"]`."""
        return self.indices[index]


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """Where the encoder puts one pixel, field or patch."""

    id: str | None
    status: Status
    values: NDArray[np.float64] | None
    """(D), None without an answer."""


@dataclass(frozen=True, kw_only=True)
class PointResult(Generic[T]):
    """The answer at one point."""

    lon: float
    """Degrees."""
    lat: float
    """Degrees."""
    status: Status
    result: T
    """What is there; without values where `status` is not `ok`."""
    properties: Mapping[str, Any]
    """The GeoJSON properties, as they came."""


@dataclass(frozen=True, kw_only=True)
class ModelWindow:
    """The stretch of time that a model looks at."""

    steps: int
    step_days: int
    start: str
    """The rule for its first day where a request names none."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's card."""

    name: str
    version: str
    task: str
    description: str
    bands: tuple[str, ...]
    """Sentinel-2 bands that it needs."""
    window: ModelWindow | None
    """None for imagery."""
    min_observations: int
    """Clear observations that a pixel needs."""
    classes: tuple[LegendClass, ...]
    horizon: int | None
    """Steps ahead that a forecast reaches at most."""
    metrics: Mapping[str, Any]
    training_data: tuple[Mapping[str, Any], ...]
    licence: str
    variants: tuple[Mapping[str, Any], ...]
    sha256: str
    card: Mapping[str, Any]
    """The whole card, as it came."""

    @property
    def id(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def legend(self) -> Mapping[int, LegendClass]:
        """Pixel value to class."""
        return {c.value: c for c in self.classes}


@dataclass(frozen=True, kw_only=True)
class Models:
    """What the service serves; iterate over the cards, or ask for one by name."""

    cards: tuple[Model, ...]
    defaults: Mapping[str, str]
    """Task to the model that answers where a request names none."""

    def __iter__(self) -> Iterator[Model]:
        return iter(self.cards)

    def __len__(self) -> int:
        return len(self.cards)

    def __getitem__(self, name: str) -> Model:
        """The card of a name; KeyError where there is none."""
        return {card.name: card for card in self.cards}[name]


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """Whether the service can answer; true where it can."""

    ready: bool
    provider: str | None
    """The execution provider in use, None while not ready."""
    models: tuple[str, ...]
    """What is loaded, as `name@version`."""
    detail: str | None
    """Why not, None where it is ready."""

    def __bool__(self) -> bool:
        return self.ready
