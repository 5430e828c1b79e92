"""HTTP responses: a COG, a zip of COGs, a JSON summary, GeoJSON.

result → body of the negotiated type + headers with the model, the stage times and the warnings
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.responses import FileResponse, JSONResponse, Response

from service.api.uploads import JSON
from service.errors import StackWarning
from service.run.execute import Result
from service.run.executors import Timing
from service.run.request import RasterRequest, TaskRequest
from service.write.fields import fields_csv, write_geoparquet
from service.write.legend import SIDECAR, sidecar_of, style_of

COG = "image/tiff; application=geotiff; profile=cloud-optimized"
ZIP = "application/zip"
GEOJSON = "application/geo+json"
CSV = "text/csv"
PARQUET = "application/vnd.apache.parquet"
FILE_TYPES = frozenset({COG, ZIP})
# Proxies and clients limit the length of headers; JSON responses hold every warning in full.
_MAX_WARNINGS = 20
_MAX_WARNING_LENGTH = 500


def offers(request: TaskRequest) -> tuple[str, ...]:
    """The media types available for a request, the default first."""
    if not isinstance(request, RasterRequest):
        return (JSON,)
    if request.points is not None:
        return (GEOJSON,)
    if request.fields is not None:
        return (GEOJSON, CSV, PARQUET)
    return (COG, ZIP, JSON)


def make_response(result: Result, media: str, folder: Path) -> Response:
    """The response for a result. Blocks while it writes a zip.

    Args:
        result: of a run.
        media: the negotiated type, one of `offers`.
        folder: for a zip; it exists until the response is sent.
    """
    if media == CSV:
        text = fields_csv(result.document["features"])
        return with_raster_headers(Response(text, media_type=CSV), result)
    if media == PARQUET:
        path = write_geoparquet(result.document["features"], folder / f"{result.task}.parquet")
        response = FileResponse(path, media_type=PARQUET, filename=path.name)
        return with_raster_headers(response, result)
    if media not in FILE_TYPES:
        return _named(JSONResponse(result.document, media_type=media), result)
    return with_raster_headers(_file(result, media, folder), result)


def with_raster_headers(response: Response, result: Result) -> Response:
    """Add the headers with the model, the stage times and the warnings."""
    for text in warning_headers(result.warnings):
        response.headers.append("PIMC-Warning", text)
    return _named(response, result)


def _file(result: Result, media: str, folder: Path) -> Response:
    if media == ZIP or len(result.files) > 1:
        path = zip_files(result.files, folder / f"{result.task}.zip")
        return FileResponse(path, media_type=ZIP, filename=path.name)
    (name, path), *_ = result.files.items()
    return FileResponse(path, media_type=COG, filename=f"{name}.tif")


def _named(response: Response, result: Result) -> Response:
    response.headers["PIMC-Model"] = result.model
    response.headers["PIMC-Provider"] = result.provider
    response.headers["Server-Timing"] = server_timing(result.timing)
    # The same request has another response for another `Accept`.
    response.headers["Vary"] = "Accept"
    return response


def server_timing(timing: Timing) -> str:
    """Milliseconds that each stage was busy, as a `Server-Timing` header."""
    stages = {"read": timing.read, "infer": timing.infer, "write": timing.write}
    return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in stages.items())


def warning_headers(warnings: Iterable[StackWarning]) -> list[str]:
    """`code; detail` of each warning as a header value: one line of latin-1, limited in length."""
    texts = [_header_text(f"{warning.code}; {warning.detail}") for warning in warnings]
    if len(texts) <= _MAX_WARNINGS:
        return texts
    left = len(texts) - _MAX_WARNINGS
    return [*texts[:_MAX_WARNINGS], f"more_warnings; {left} more; a JSON response lists all"]


def _header_text(text: str) -> str:
    line = "".join(c if c.isprintable() else " " for c in text)
    # Starlette encodes headers as latin-1; a file name may hold any letter.
    return line.encode("latin-1", "replace").decode("latin-1")[:_MAX_WARNING_LENGTH]


_COPY_BYTES = 2**20


def zip_files(files: Mapping[str, Path], path: Path) -> Path:
    """Put finished files into one zip, each as `<output>.tif` with its QGIS style and side file.

    Args:
        files: finished files by output name.
        path: of the zip to write.

    Returns:
        The path.
    """
    # Stored: a COG is compressed already, and a stored one can still be read by ranges.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, file in files.items():
            _add(archive, file, f"{name}.tif")
            if sidecar_of(file).exists():
                _add(archive, sidecar_of(file), f"{name}.tif{SIDECAR}")
            if style_of(file).exists():
                _add(archive, style_of(file), f"{name}.qml")
    return path


def _add(archive: zipfile.ZipFile, file: Path, name: str) -> None:
    # Without the file's own date, so that equal results are equal bytes.
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o644 << 16
    entry.file_size = file.stat().st_size  # decides on ZIP64 before a byte is written
    with file.open("rb") as source, archive.open(entry, "w") as target:
        shutil.copyfileobj(source, target, _COPY_BYTES)
