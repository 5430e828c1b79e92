"""Results as OGC API - Processes returns them: raw or as a document, by value or by reference.

    Delivery ─┬─ raw ──┬─ one output by value ──▶ the output itself
              │        ├─ all by reference ─────▶ 204 and a `Link` header per output
              │        └─ several ──────────────▶ multipart/related, one part per output
              └─ document ──────────────────────▶ JSON: values (binary ones as base64) and links

Responses with values are written to files first, so that a large result takes no memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO

from starlette.responses import JSONResponse, Response

from service.api.processes import Delivery, Output
from service.api.responses import (
    COG,
    CSV,
    GEOJSON,
    MULTIPART,
    PARQUET,
    Reserve,
    derive,
    derive_stored,
    derived_name,
    with_raster_headers,
)
from service.api.sending import StoredFile
from service.api.uploads import JSON
from service.errors import PIMCError
from service.jobs.serialise import StoredResult, document_bytes
from service.jobs.storage import RemoteFile
from service.run.execute import Result
from service.write.predictions import POLYGONS

_COPY_BYTES = 3 * 2**18  # a multiple of three, so that base64 needs no padding in between
_SUFFIXES: Mapping[str, str] = {
    COG: ".tif",
    PARQUET: ".parquet",
    GEOJSON: ".geojson",
    CSV: ".csv",
    JSON: ".json",
}


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of a run, and the files derived from them."""

    result: Result | StoredResult
    ready: Callable[[str, Callable[[Path], object]], Path | RemoteFile]
    """Returns a file by its name; the function writes it if it does not exist."""
    on_disk: Callable[[], AbstractContextManager[Result | StoredResult]]
    """Returns the result with its files on this machine."""
    boundary: str
    """Separates the parts of a multipart response; unpredictable when the inputs were sent."""
    reserve: Reserve
    """Reserves memory while a file is made."""
    here: str | None = None
    """Path of the job's results, for links; None for a run that is not a job."""
    missing: PIMCError | None = None
    """The error to raise if a file has been removed."""


def results_response(results: Results, delivery: Delivery) -> Response:
    """The response with an execution's results. Blocks while it makes a file.

    Args:
        results: the results; those of a job if the delivery contains a link.
        delivery: how the results are returned.

    Raises:
        ResultNotReady: the result was removed.
    """
    if delivery.response == "document":
        return _document(results, delivery)
    if all(output.reference for output in delivery.outputs):
        response = Response(status_code=204)
        for output in delivery.outputs:
            response.headers.append(
                "Link",
                f'<{_href(results, output)}>; rel="item"; title="{output.name}"; '
                f'type="{output.media.replace(chr(34), "")}"',
            )
        return with_raster_headers(response, results.result)
    if len(delivery.outputs) == 1:
        return output_response(results, delivery.outputs[0])
    path = results.ready(
        _name(results, delivery, "multipart"), partial(_write_parts, results, delivery)
    )
    kind = f'{MULTIPART}; type="{delivery.outputs[0].media.partition(";")[0]}"'
    media = f'{kind}; boundary="{results.boundary}"'
    return _sent(results, path, media)


def output_response(results: Results, output: Output) -> Response:
    """The response with one output itself."""
    path = _path(results, output)
    return _sent(results, path, output.media, f"{output.name}{_SUFFIXES[output.media]}")


def _sent(
    results: Results, path: Path | RemoteFile, media: str, filename: str | None = None
) -> Response:
    response = StoredFile(path, media_type=media, filename=filename, missing=results.missing)
    return with_raster_headers(response, results.result)


def _path(results: Results, output: Output) -> Path | RemoteFile:
    """The file of an output."""
    result = results.result
    if output.name in result.files and output.media in {COG, PARQUET}:
        return result.files[output.name]
    if output.name != POLYGONS and output.media in {JSON, GEOJSON}:
        return _document_path(results)
    name = derived_name(result, output.media)
    if name is None:
        raise TypeError(f"there is no derived file of type {output.media}")

    def make(path: Path) -> None:
        with results.on_disk() as copy:
            if isinstance(copy, StoredResult):
                derive_stored(copy, output.media, path, results.reserve)
            else:
                derive(copy, lambda: copy.document, output.media, path)

    return results.ready(name, make)


def _document_path(results: Results) -> Path | RemoteFile:
    result = results.result
    if isinstance(result, StoredResult):
        return result.document
    document = result.document
    return results.ready("document.json", lambda path: path.write_bytes(document_bytes(document)))


def _here(results: Results) -> str:
    if results.here is None:
        raise TypeError("an output of a run that is not kept has no link")
    return results.here


def _href(results: Results, output: Output) -> str:
    return f"{_here(results)}/{output.name}"


def _name(results: Results, delivery: Delivery, suffix: str) -> str:
    """A file name that differs between deliveries, and between addresses in the response."""
    text = json.dumps([delivery.document(), results.here, results.boundary])
    return f"results-{hashlib.sha256(text.encode()).hexdigest()[:16]}.{suffix}"


# Several outputs as parts ------------------------------------------------------------------------


def _write_parts(results: Results, delivery: Delivery, path: Path) -> None:
    with path.open("wb") as target:
        for output in delivery.outputs:
            head = {"Content-Type": output.media, "Content-ID": output.name}
            if output.reference:
                head["Content-Location"] = _href(results, output)
            lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
            target.write(f"--{results.boundary}\r\n{lines}\r\n".encode())
            if not output.reference:
                with _path(results, output).open("rb") as source:
                    shutil.copyfileobj(source, target, _COPY_BYTES)
            target.write(b"\r\n")
        target.write(f"--{results.boundary}--\r\n".encode())


# A document of all outputs -----------------------------------------------------------------------


def _document(results: Results, delivery: Delivery) -> Response:
    if all(output.reference for output in delivery.outputs):
        links = links_to(delivery.outputs, _here(results))
        return with_raster_headers(JSONResponse(links), results.result)
    path = results.ready(
        _name(results, delivery, "json"), partial(_write_document, results, delivery)
    )
    return _sent(results, path, JSON)


def links_to(outputs: Iterable[Output], here: str) -> dict[str, dict[str, str]]:
    """A results document that contains only links.

    Args:
        outputs: outputs of a job.
        here: path of the job's results.
    """
    return {
        output.name: {"href": f"{here}/{output.name}", "type": output.media, "title": output.name}
        for output in outputs
    }


def _write_document(results: Results, delivery: Delivery, path: Path) -> None:
    with path.open("wb") as target:
        for number, output in enumerate(delivery.outputs):
            target.write(b"," if number else b"{")
            target.write(f"{json.dumps(output.name)}:".encode())
            if output.reference:
                link = links_to([output], _here(results))[output.name]
                target.write(json.dumps(link).encode())
                continue
            with _path(results, output).open("rb") as source:
                _write_value(source, output.media, target)
        target.write(b"}")


def _write_value(source: IO[bytes], media: str, target: BinaryIO) -> None:
    """A value with its media type: JSON unchanged, text as a string, everything else as base64."""
    about = f'"mediaType":{json.dumps(media)}'
    target.write(f"{{{about},".encode())
    if media in {JSON, GEOJSON}:
        target.write(b'"value":')
        shutil.copyfileobj(source, target, _COPY_BYTES)
    elif media == CSV:
        target.write(b'"value":')
        target.write(json.dumps(source.read().decode()).encode())
    else:
        target.write(b'"encoding":"base64","value":"')
        while chunk := source.read(_COPY_BYTES):
            target.write(base64.b64encode(chunk))
        target.write(b'"')
    target.write(b"}")
