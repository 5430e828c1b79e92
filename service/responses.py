"""Replies as HTTP answers: a COG, a zip of COGs, a summary, GeoJSON.

reply ─▶ body of the type negotiated + headers that say who answered, how fast, what is odd
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from starlette.responses import FileResponse, JSONResponse, Response

from service.executors import Timing
from service.intake import JSON
from service.orders import Order, RasterOrder, Reply
from service.output import zip_files
from service.stack import StackWarning

COG = "image/tiff; application=geotiff; profile=cloud-optimized"
ZIP = "application/zip"
GEOJSON = "application/geo+json"
FILE_TYPES = frozenset({COG, ZIP})

# Proxies and clients bound the length of headers; JSON answers hold every warning in full.
_MAX_WARNINGS = 20
_MAX_WARNING_LENGTH = 500


def offers(order: Order) -> tuple[str, ...]:
    """The types that an order can be answered in, the default first."""
    if not isinstance(order, RasterOrder):
        return (JSON,)
    if order.fields.points is not None:
        return (GEOJSON,)
    return (COG, ZIP, JSON)


def respond(reply: Reply, media: str, folder: Path) -> Response:
    """The answer that a reply makes. Blocks where it writes a zip.

    Args:
        reply: what came of it.
        media: the type negotiated, one of `offers`.
        folder: where a zip may be written; it outlives the sending.
    """
    if media not in FILE_TYPES:
        return _named(JSONResponse(reply.document, media_type=media), reply)
    return heads(_file(reply, media, folder), reply)


def heads(response: Response, reply: Reply) -> Response:
    """A raster with the headers that say who answered, how fast, and what is odd."""
    for text in warning_headers(reply.warnings):
        response.headers.append("PIMC-Warning", text)
    return _named(response, reply)


def _file(reply: Reply, media: str, folder: Path) -> Response:
    if media == ZIP or len(reply.files) > 1:
        path = zip_files(reply.files, folder / f"{reply.task}.zip")
        return FileResponse(path, media_type=ZIP, filename=path.name)
    (name, path), *_ = reply.files.items()
    return FileResponse(path, media_type=COG, filename=f"{name}.tif")


def _named(response: Response, reply: Reply) -> Response:
    response.headers["PIMC-Model"] = reply.model
    response.headers["PIMC-Provider"] = reply.provider
    response.headers["Server-Timing"] = server_timing(reply.timing)
    # The same request is answered otherwise in another type.
    response.headers["Vary"] = "Accept"
    return response


def server_timing(timing: Timing) -> str:
    """Milliseconds that each stage was busy, as a `Server-Timing` header says them."""
    stages = {"read": timing.read, "infer": timing.infer, "write": timing.write}
    return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in stages.items())


def warning_headers(warnings: Iterable[StackWarning]) -> list[str]:
    """`code; detail` of each warning, fit for a header: one line of latin-1, not too long."""
    texts = [_header_text(f"{warning.code}; {warning.detail}") for warning in warnings]
    if len(texts) <= _MAX_WARNINGS:
        return texts
    left = len(texts) - _MAX_WARNINGS
    return [*texts[:_MAX_WARNINGS], f"more_warnings; {left} more, all of them in a JSON answer"]


def _header_text(text: str) -> str:
    line = "".join(c if c.isprintable() else " " for c in text)
    # Starlette encodes headers as latin-1; a file name may hold any letter there is.
    return line.encode("latin-1", "replace").decode("latin-1")[:_MAX_WARNING_LENGTH]
