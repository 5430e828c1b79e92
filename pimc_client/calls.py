"""Requests, built from what a caller gives. Pure: nothing here connects to anything."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote

from pimc_client.bodies import Body, Progress, Source, json_body, multipart_body
from pimc_client.inputs import (
    AnswerKind,
    Files,
    Layout,
    MaskRule,
    Modality,
    Points,
    Reference,
    Series,
    Task,
    iso,
    listed,
    points_json,
    sources_of,
)

if TYPE_CHECKING:
    from datetime import date

    import httpx

COG = "image/tiff; application=geotiff; profile=cloud-optimized"
ZIP = "application/zip"
JSON = "application/json"
GEOJSON = "application/geo+json"
ANYTHING = f"{COG}, {ZIP};q=0.9, {GEOJSON};q=0.8, {JSON};q=0.7"
"""What is accepted of a job whose request is not known any more."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One exchange to make."""

    method: str
    path: str
    """Below the base URL, percent-encoded."""
    accept: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body | None = None
    delay: float = 0.0
    """Seconds to wait before."""
    retry: bool = True
    """Whether it may be sent again where it fails."""

    def all_headers(self) -> dict[str, str]:
        """What goes over the wire beside the client's own headers."""
        headers = {"Accept": self.accept, **self.headers}
        if self.body is not None:
            headers["Content-Type"] = self.body.content_type
            if self.body.length is not None:
                headers["Content-Length"] = str(self.body.length)
        return headers

    def repeatable(self) -> bool:
        """Whether sending it again sends the same."""
        return self.retry and (self.body is None or self.body.replayable)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back, whole; `body` is the receiver's to close."""

    status: int
    headers: httpx.Headers
    body: BinaryIO

    def read(self) -> bytes:
        """The body's bytes; the body is closed."""
        with self.body as body:
            body.seek(0)
            return body.read()


def build_raster(
    task: Task,
    files: Files,
    *,
    outputs: str | Sequence[str] | None = None,
    points: Points | None = None,
    answer: AnswerKind = "raster",
    horizon: int | None = None,
    stride: int | None = None,
    modality: Modality | None = None,
    model: str | None = None,
    layout: Layout | None = None,
    dates: Sequence[date | str] | str | None = None,
    bands: Sequence[str] | str | None = None,
    scale: float | None = None,
    offset: float | None = None,
    mask: MaskRule | None = None,
    start: date | str | None = None,
    progress: Progress | None = None,
) -> Request:
    """Imagery and what to make of it: a form with the files, or JSON that names references.

    Raises:
        TypeError: something that is no file.
        ValueError: no file, a point that is no pair, or an answer that cannot be.
        FileNotFoundError, IsADirectoryError: a path that is no file.
    """
    options: dict[str, Any] = {
        "model": model,
        "layout": layout,
        "dates": None if dates is None else listed(dates),
        "bands": None if bands is None else listed(bands),
        "scale": scale,
        "offset": offset,
        "mask": mask,
        "start": None if start is None else iso(start),
        "points": None if points is None else points_json(points),
        "outputs": None if outputs is None else listed(outputs),
        "horizon": horizon,
        "stride": stride,
        "modality": modality,
    }
    said = {name: value for name, value in options.items() if value is not None}
    accept = _accept(task, outputs, points, answer)
    return Request(
        method="POST",
        path=task,
        accept=accept,
        body=_raster_body(sources_of(files), said, progress),
    )


def _accept(
    task: Task, outputs: str | Sequence[str] | None, points: Points | None, answer: AnswerKind
) -> str:
    if answer not in {"raster", "summary"}:
        raise ValueError(f"answer is '{answer}': it can be 'raster' or 'summary'")
    if points is not None:
        if answer == "summary":
            raise ValueError("points are answered one by one, and answer='summary' wants a summary")
        return f"{GEOJSON}, {JSON};q=0.9"
    if answer == "summary":
        return JSON
    several = outputs is not None and not isinstance(outputs, str)
    # A forecast's quantiles are bands of one file.
    return ZIP if several and task in {"classify-pixels", "landcover"} else COG


def _raster_body(
    sources: list[Source] | list[Reference], options: Mapping[str, Any], progress: Progress | None
) -> Body:
    references = [source for source in sources if isinstance(source, Reference)]
    if references:
        return json_body({"items": [_item(r) for r in references], **options})
    files = [source for source in sources if isinstance(source, Source)]
    return multipart_body(files, {k: _field(v) for k, v in options.items()}, progress)


def _item(reference: Reference) -> dict[str, str]:
    dated = {} if reference.date is None else {"date": iso(reference.date)}
    return {"href": reference.href, **dated}


def _field(value: Any) -> str:  # noqa: ANN401 (any option)
    if isinstance(value, list):
        return ",".join(value)
    return json.dumps(value, allow_nan=False) if isinstance(value, Mapping) else str(value)


def build_series(
    task: Task,
    series: Iterable[Series],
    *,
    model: str | None = None,
    start: date | str | None = None,
    horizon: int | None = None,
) -> Request:
    """Pixels that need no raster.

    Raises:
        ValueError: no series.
    """
    given = [one.to_json() for one in series]
    if not given:
        raise ValueError("no series were given")
    options = {
        "model": model,
        "start": None if start is None else iso(start),
        "horizon": horizon,
    }
    said = {name: value for name, value in options.items() if value is not None}
    return Request(method="POST", path=task, body=json_body({"series": given, **said}))


def submitted(request: Request, idempotency_key: str | None) -> Request:
    """The same request as a job.

    The key makes a second sending, by the retry or by you, find the first one's job.
    """
    return Request(
        method=request.method,
        path=request.path,
        accept=request.accept,
        headers={
            **request.headers,
            "Prefer": "respond-async",
            "Idempotency-Key": idempotency_key or os.urandom(16).hex(),
        },
        body=request.body,
    )


def build_models() -> Request:
    """The registry."""
    return Request(method="GET", path="models")


def build_model(reference: str) -> Request:
    """One card, by `name` or `name@version`."""
    return Request(method="GET", path=f"models/{quote(reference, safe='@')}")


def build_ready() -> Request:
    """Readiness; "not yet" is an answer here and nothing to retry."""
    return Request(method="GET", path="health/ready", retry=False)


def build_jobs() -> Request:
    """Every job."""
    return Request(method="GET", path="jobs")


def build_job(job_id: str, *, delay: float = 0.0) -> Request:
    """One job's state."""
    return Request(method="GET", path=f"jobs/{quote(job_id, safe='')}", delay=delay)


def build_cancel(job_id: str) -> Request:
    """An end to a job."""
    return Request(method="DELETE", path=f"jobs/{quote(job_id, safe='')}")


def build_result(job_id: str, *, accept: str, output: str | None = None) -> Request:
    """A job's result, or one output of it."""
    path = f"jobs/{quote(job_id, safe='')}/result"
    return Request(
        method="GET",
        path=path if output is None else f"{path}/{quote(output, safe='')}",
        accept=accept,
    )
