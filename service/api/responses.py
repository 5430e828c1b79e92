"""HTTP responses: a COG, a zip of COGs, a JSON summary, GeoJSON.

result → file of the negotiated type + headers with the model, the stage times and the warnings
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from anyio import to_thread
from pydantic import BaseModel
from starlette.responses import Response

from service.api.sending import CHUNK_BYTES, StoredFile
from service.api.uploads import JSON
from service.errors import PIMCError, StackWarning, warning_list
from service.jobs.job import Job, removed
from service.jobs.serialise import StoredResult, document_bytes, loaded
from service.jobs.storage import RemoteFile
from service.jobs.store import JobStore
from service.run.execute import Result
from service.run.executors import Timing
from service.run.memory import Need
from service.run.request import RasterRequest, TaskRequest
from service.write.cog import USE_TAG, open_stored
from service.write.fields import write_csv, write_geoparquet
from service.write.legend import SIDECAR, sidecar_of, style_of
from service.write.polygons import polygon_features
from service.write.predictions import POLYGONS
from service.write.stac_item import item_of

COG = "image/tiff; application=geotiff; profile=cloud-optimized"
ZIP = "application/zip"
GEOJSON = "application/geo+json"
CSV = "text/csv"
PARQUET = "application/vnd.apache.parquet"
MULTIPART = "multipart/related"
FILE_TYPES = frozenset({COG, ZIP})
Reserve = Callable[[Need], AbstractContextManager[None]]
"""Reserves memory for the duration of a context."""
_DOCUMENT_BYTES = 8
"""Memory per byte of a result's document: its text, and its values as objects and as columns."""
_SUFFIXES = {ZIP: ".zip", CSV: ".csv", PARQUET: ".parquet", GEOJSON: ".geojson"}
# Proxies and clients limit the length of headers, so headers shorten warnings; JSON does not.
_MAX_WARNINGS = 20
_MAX_WARNING_LENGTH = 500
_NAMES_IN_HEADER = 3
_LIST = re.compile(r"(?P<names>'[^']*'(?:, '[^']*'){3,})(?: and (?P<more>\d+) more)?")


def offers(request: TaskRequest) -> tuple[str, ...]:
    """The media types in which a request's result is available, the default first."""
    if not isinstance(request, RasterRequest):
        return (JSON,)
    if request.points is not None:
        return (GEOJSON,)
    if request.fields is not None:
        return (GEOJSON, CSV, PARQUET)
    if request.outputs == (POLYGONS,):
        return (PARQUET, GEOJSON, ZIP, JSON)
    return (COG, ZIP, JSON)


def needs_files(request: TaskRequest, media: str) -> bool:
    """Whether a response of a media type consists of the result's files, not of its document."""
    return media in FILE_TYPES or (
        isinstance(request, RasterRequest) and request.outputs == (POLYGONS,) and media != JSON
    )


def make_response(result: Result, media: str, folder: Path) -> Response:
    """The response for the result of a run. Blocks while it writes a file.

    Args:
        result: result of the run.
        media: the negotiated media type, one of `offers`.
        folder: folder for a file of the response; it exists until the response is sent.
    """
    if POLYGONS in result.files and media == PARQUET:
        return whole_file(result, POLYGONS)
    if media == JSON or (media == GEOJSON and POLYGONS not in result.files):
        content = document_bytes(result.document)
        return _named(spooled(content, media, folder / f"{result.task}.json"), result)
    name = derived_name(result, media)
    if name is None:
        return whole_file(result)
    path = folder / name
    derive(result, lambda: result.document, media, path)
    return _derived(path, media, result)


async def json_response(make: Callable[[], BaseModel], *, exclude_none: bool = False) -> Response:
    """A response with a document that may be long, made in a thread and not on the event loop.

    Args:
        make: makes the document.
        exclude_none: whether fields without a value are left out.
    """

    def text() -> str:
        return make().model_dump_json(by_alias=True, exclude_none=exclude_none)

    return Response(await to_thread.run_sync(text), media_type=JSON)


def spooled(content: bytes, media: str, path: Path) -> Response:
    """A response from memory if it is short, otherwise from a file.

    A long response in memory would stay there until its client has read it.

    Args:
        content: content of the response.
        media: media type of the content.
        path: path of the file to write.
    """
    if len(content) <= CHUNK_BYTES:
        return Response(content, media_type=media)
    path.write_bytes(content)
    return StoredFile(path, media_type=media)


def stored_response(
    store: JobStore, job: Job, result: StoredResult, media: str, reserve: Reserve
) -> Response:
    """The response for a job's result. Blocks while it makes a file, at the first request for it.

    Args:
        store: store that holds the job.
        job: a successful job.
        result: result of the job.
        media: the negotiated media type, one of `offers`.
        reserve: reserves memory while a file is made.

    Raises:
        ResultNotReady: the result was removed.
    """
    gone = removed(job)
    if POLYGONS in result.files and media == PARQUET:
        return whole_file(result, POLYGONS, missing=gone)
    if media == JSON or (media == GEOJSON and POLYGONS not in result.files):
        return _named(StoredFile(result.document, media_type=media, missing=gone), result)
    name = derived_name(result, media)
    if name is None:
        return whole_file(result, missing=gone)

    def make(path: Path) -> None:
        with store.results.on_disk(job, result) as copy:
            derive_stored(copy, media, path, reserve)

    return _derived(store.results.derived(job, name, make), media, result, missing=gone)


def derived_name(result: Result | StoredResult, media: str) -> str | None:
    """Name of the file to make for a media type; None if the response is the only raster itself."""
    if media in _SUFFIXES:
        return f"{result.task}{_SUFFIXES[media]}"
    return f"{result.task}{_SUFFIXES[ZIP]}" if len(result.files) > 1 else None


def derive(
    result: Result | StoredResult, document: Callable[[], Mapping[str, Any]], media: str, path: Path
) -> None:
    """Make a result's zip, CSV, GeoParquet or GeoJSON.

    Args:
        result: the result, with its files on this machine.
        document: returns the result's JSON document.
        media: media type of the file.
        path: path of the file to write.
    """
    files = on_this_machine(result.files)
    if media == CSV:
        write_csv(document()["features"], path)
    elif media == GEOJSON:
        write_geojson(result, files[POLYGONS], path)
    elif media == PARQUET:
        write_geoparquet(document()["features"], path)
    else:
        zip_files(files, path)


def derive_stored(result: StoredResult, media: str, path: Path, reserve: Reserve) -> None:
    """Make a stored result's zip, CSV, GeoParquet or GeoJSON.

    Args:
        result: the result, with its files on this machine.
        media: media type of the file.
        path: path of the file to write.
        reserve: reserves memory while the file is made.

    Raises:
        Overloaded: runs hold the memory.
    """
    document = result.document
    if not isinstance(document, Path):
        raise TypeError("the document of the result is not on this machine")
    size = _DOCUMENT_BYTES * document.stat().st_size if media in {CSV, PARQUET} else 0
    need = Need(
        arrays=size,
        what="the JSON document of the result",
        remedy="Request GeoJSON, which needs no memory",
    )
    with reserve(need):
        derive(result, lambda: loaded(document.read_text("utf-8")), media, path)


def on_this_machine(files: Mapping[str, Path | RemoteFile]) -> Mapping[str, Path]:
    """Files of a result that `ResultFiles.on_disk` has brought to this machine.

    Raises:
        TypeError: it has not.
    """
    found = {name: file for name, file in files.items() if isinstance(file, Path)}
    if len(found) < len(files):
        raise TypeError("the files of the result are not on this machine")
    return found


def write_geojson(result: Result | StoredResult, polygons: Path, path: Path) -> None:
    """Write polygons as a GeoJSON document.

    Args:
        result: the result whose class map they outline, with its files on this machine.
        polygons: GeoParquet file of the polygons.
        path: path of the file to write.
    """
    with open_stored(on_this_machine(result.files)["class"]) as raster:
        crs, use = raster.grid.crs, raster.tags.get(USE_TAG)
    about = {
        "type": "FeatureCollection",
        "model": result.model,
        **({"intended_use": use} if use else {}),
        "provider": result.provider,
        "warnings": warning_list(result.warnings),
    }
    with path.open("wb") as target:
        target.write(document_bytes(about).removesuffix(b"}") + b',"features":[')
        for number, one in enumerate(polygon_features(polygons, crs)):
            target.write((b"," if number else b"") + document_bytes(one))
        target.write(b"]}")


def _derived(
    path: Path | RemoteFile,
    media: str,
    result: Result | StoredResult,
    *,
    missing: PIMCError | None = None,
) -> Response:
    if media == CSV:
        return with_raster_headers(StoredFile(path, media_type=CSV, missing=missing), result)
    kind = media if media in {PARQUET, GEOJSON} else ZIP
    response = StoredFile(path, media_type=kind, filename=path.name, missing=missing)
    return with_raster_headers(response, result)


def whole_file(
    result: Result | StoredResult, output: str | None = None, *, missing: PIMCError | None = None
) -> Response:
    """The response with one file of a result.

    Args:
        result: the result.
        output: name of the output; None takes the only one.
        missing: error to raise if the file has been removed.
    """
    name = output or next(iter(result.files))
    path = result.files[name]
    kind = PARQUET if name == POLYGONS else COG
    response = StoredFile(path, media_type=kind, filename=f"{name}{path.suffix}", missing=missing)
    return with_raster_headers(response, result)


def derived_file(
    path: Path | RemoteFile,
    output: str,
    media: str,
    result: StoredResult,
    *,
    missing: PIMCError | None = None,
) -> Response:
    """The response with a map or polygons derived from a job's result.

    Args:
        path: path of the file.
        output: name of the output.
        media: media type of the file.
        result: the result that the file was derived from.
        missing: error to raise if the file has been removed.
    """
    filename = f"{output}{path.suffix}"
    response = StoredFile(path, media_type=media, filename=filename, missing=missing)
    return with_raster_headers(response, result)


def with_raster_headers(response: Response, result: Result | StoredResult) -> Response:
    """Add the headers with the model, the stage times and the warnings."""
    for text in warning_headers(result.warnings):
        response.headers.append("PIMC-Warning", text)
    return _named(response, result)


def _named(response: Response, result: Result | StoredResult) -> Response:
    response.headers["PIMC-Model"] = result.model
    response.headers["PIMC-Provider"] = result.provider
    response.headers["Server-Timing"] = server_timing(result.timing)
    # A cache must not use this response for another `Accept`.
    response.headers["Vary"] = "Accept"
    return response


def server_timing(timing: Timing) -> str:
    """Milliseconds that each stage was busy, as a `Server-Timing` header."""
    stages = {"read": timing.read, "infer": timing.infer, "write": timing.write}
    return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in stages.items())


def warning_headers(warnings: Iterable[StackWarning]) -> list[str]:
    """`code; detail` of each warning as a header value: one line of latin-1, limited in length.

    Long lists of names are shortened, so that the text after them is not cut.
    """
    texts = [_header_text(f"{warning.code}; {warning.detail}") for warning in warnings]
    if len(texts) <= _MAX_WARNINGS:
        return texts
    left = len(texts) - _MAX_WARNINGS
    return [*texts[:_MAX_WARNINGS], f"more_warnings; {left} more; a JSON response lists all"]


def _header_text(text: str) -> str:
    text = _LIST.sub(_shortened, text) if len(text) > _MAX_WARNING_LENGTH else text
    line = "".join(c if c.isprintable() else " " for c in text)
    # Starlette encodes headers as latin-1, but a file name may hold any character.
    return line.encode("latin-1", "replace").decode("latin-1")[:_MAX_WARNING_LENGTH]


def _shortened(found: re.Match[str]) -> str:
    names = found["names"].split("', '")
    more = len(names) - _NAMES_IN_HEADER + int(found["more"] or 0)
    first = "', '".join(names[:_NAMES_IN_HEADER])
    return f"{first}' and {more} more"


_COPY_BYTES = 2**20


def zip_files(files: Mapping[str, Path], path: Path) -> Path:
    """Put finished files into one zip: `<output>.tif`, QGIS style, side file and `item.json`.

    Args:
        files: finished files by output name.
        path: path of the zip to write.

    Returns:
        The path.
    """
    # Not compressed again: a COG is compressed already and can be read by ranges inside the zip.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, file in files.items():
            _add(archive, file, f"{name}{file.suffix}")
            if sidecar_of(file).exists():
                _add(archive, sidecar_of(file), f"{name}.tif{SIDECAR}")
            if style_of(file).exists():
                _add(archive, style_of(file), f"{name}.qml")
        for item in {item_of(file) for file in files.values()}:
            if item.exists():
                _add(archive, item, item.name)
    return path


def _add(archive: zipfile.ZipFile, file: Path, name: str) -> None:
    # Without the file's own date, so that equal results have equal bytes.
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o644 << 16
    entry.file_size = file.stat().st_size  # decides on ZIP64 before a byte is written
    with file.open("rb") as source, archive.open(entry, "w") as target:
        shutil.copyfileobj(source, target, _COPY_BYTES)
