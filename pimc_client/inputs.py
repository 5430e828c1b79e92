"""What a caller gives: files, points, series and options; and how the service is told them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, TypedDict

from pimc_client.bodies import (
    Progress,
    Source,
    source_of_bytes,
    source_of_file,
    source_of_path,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Task = Literal["classify-pixels", "forecast", "landcover", "embed"]
Layout = Literal["file-per-date", "file-per-band", "single-file"]
MaskRule = Literal["scl", "none"]
Modality = Literal["pixel", "patch"]
ClassOutput = Literal["class", "confidence", "entropy", "probabilities"]
QuantileOutput = Literal["q10", "q50", "q90"]
AnswerKind = Literal["raster", "summary"]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A file that the service reads itself, where its administrator allows it."""

    href: str
    """A path or URL, as the service sees it."""
    date: date | str | None = None
    """The acquisition date, where neither metadata nor the file's name holds it."""


File: TypeAlias = "str | os.PathLike[str] | BinaryIO | tuple[str, bytes]"
"""A path, an open binary file (sent from where it stands), or `(name, bytes)`."""
Files: TypeAlias = "File | Reference | Iterable[File] | Iterable[Reference]"
"""One file or many, in any order: dates come from `dates`, the metadata or the names."""
Points: TypeAlias = "Mapping[str, Any] | Iterable[Sequence[float]]"
"""A GeoJSON FeatureCollection of Points, or pairs of (longitude, latitude); EPSG:4326."""
SeveralOutputs: TypeAlias = list[ClassOutput] | tuple[ClassOutput, ...]
# No Sequence: text is one too, and a type checker could not tell one output from several.
ClassOutputs: TypeAlias = ClassOutput | SeveralOutputs
"""One output is answered as one `Raster`, a list as `Rasters`, however short the list."""
QuantileOutputs: TypeAlias = "QuantileOutput | Sequence[QuantileOutput]"
"""The quantiles are bands of one file."""
Values: TypeAlias = "Sequence[float | None] | NDArray[np.floating[Any]]"


class StackOptions(TypedDict, total=False):
    """What every raster request may say of its files; left out, the service works it out."""

    model: str
    """`name` or `name@version`; else the task's default model."""
    layout: Layout
    """How dates and bands lie in the files."""
    dates: Sequence[date | str] | str
    """ISO dates: one per file, per band of a `file-per-band` file, or per date of a single file."""
    bands: Sequence[str] | str
    """Sentinel-2 band names in band order, such as `["B02", "B03", "B04", "B08", "SCL"]`."""
    scale: float
    """Reflectance = value x scale + offset."""
    offset: float
    """Reflectance = value x scale + offset."""
    mask: MaskRule
    """`scl` uses the scene classification band; `none` only nodata and NaN."""
    progress: Progress
    """Called while files are sent, with the bytes sent and the bytes in all."""


class WindowOptions(StackOptions, total=False):
    """What requests to models with a time window may say as well."""

    start: date | str
    """First day of the window; else the card's rule."""


class JobOptions(WindowOptions, total=False):
    """What a job may say: the options of its task, and its own."""

    horizon: int
    """Forecast: how many steps ahead."""
    stride: int
    """Patches: pixels between one and the next."""
    modality: Modality
    """Embed: `pixel` or `patch`."""
    idempotency_key: str
    """Submitting twice with one key makes one job; else each call makes its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """One pixel or field through time, without a raster.

    Raises:
        ValueError: dates and values differ in number.
    """

    id: str
    """Yours; the answer repeats it."""
    dates: Sequence[date | str]
    """T acquisition dates."""
    B02: Values
    """Blue reflectance (T), unitless, 0 to 1; None or NaN where there is none."""
    B04: Values
    """Red reflectance (T)."""
    B08: Values
    """Near infrared reflectance (T)."""

    def __post_init__(self) -> None:
        for name in ("B02", "B04", "B08"):
            found = len(getattr(self, name))
            if found != len(self.dates):
                raise ValueError(
                    f"series '{self.id}': {found} values of {name} but {len(self.dates)} dates"
                )

    def to_json(self) -> dict[str, Any]:
        """The series as the service reads it; a missing value is null."""
        bands = {"B02": self.B02, "B04": self.B04, "B08": self.B08}
        return {
            "id": self.id,
            "dates": [iso(day) for day in self.dates],
            **{name: [_number(value) for value in values] for name, values in bands.items()},
        }


def _number(value: float | None) -> float | None:
    # NaN is the one value that differs from itself, and what numpy has for null.
    return None if value is None or value != value else float(value)


def iso(day: date | str) -> str:
    """A date as YYYY-MM-DD; text is checked by the service, which can say where it came from."""
    if isinstance(day, datetime):
        return day.date().isoformat()
    return day.isoformat() if isinstance(day, date) else day


def sources_of(files: Files) -> list[Source] | list[Reference]:
    """The files to send, or the references to name.

    Raises:
        TypeError: something that is no file, or files mixed with references.
        ValueError: no file at all.
        FileNotFoundError, IsADirectoryError: a path that is no file.
    """
    given = [files] if _is_one(files) else list(files)  # type: ignore[arg-type] # many, so iterable
    if not given:
        raise ValueError("no files were given")
    references = [file for file in given if isinstance(file, Reference)]
    if references and len(references) < len(given):
        raise TypeError(
            f"{len(references)} of {len(given)} files are references: give files to send, or "
            "references alone"
        )
    return references or [_source(file, number) for number, file in enumerate(given, 1)]


def _is_one(files: object) -> bool:
    if isinstance(files, tuple):
        return len(files) == 2 and isinstance(files[0], str) and isinstance(files[1], bytes)
    return isinstance(files, str | bytes | os.PathLike | Reference) or hasattr(files, "read")


def _source(file: object, number: int) -> Source:
    if isinstance(file, str | os.PathLike):
        return source_of_path(Path(file))
    if isinstance(file, tuple) and _is_one(file):
        return source_of_bytes(*file)
    if hasattr(file, "read"):
        return source_of_file(file, f"file-{number}.tif")  # type: ignore[arg-type] # it reads
    if isinstance(file, bytes):
        raise TypeError("bytes need a name, which may hold the date: give (name, bytes)")
    raise TypeError(
        f"file {number} is a {type(file).__name__}: give a path, a file open as 'rb', "
        "(name, bytes) or a Reference"
    )


def points_json(points: Points) -> dict[str, Any]:
    """Points as a GeoJSON FeatureCollection.

    Raises:
        ValueError: a pair that is not two numbers.
    """
    if isinstance(points, Mapping):
        return dict(points)
    features = []
    for number, point in enumerate(points, 1):
        if len(point) != 2:
            raise ValueError(f"point {number} has {len(point)} numbers: give (longitude, latitude)")
        coordinates = [float(point[0]), float(point[1])]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Point", "coordinates": coordinates},
                "properties": {},
            }
        )
    return {"type": "FeatureCollection", "features": features}


def listed(values: Iterable[date | str] | str) -> list[str]:
    """Names or dates as a list of text, given as such or as one comma-separated text."""
    if isinstance(values, str):
        return [value.strip() for value in values.split(",")]
    return [iso(value) for value in values]
