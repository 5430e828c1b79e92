"""HTTP requests, built from the arguments of a call; nothing here opens a connection."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Literal
from urllib.parse import quote

from pimc_client.inputs import (
    AnswerKind,
    Area,
    Date,
    Dates,
    EmbeddingType,
    Fields,
    Files,
    Layout,
    Modality,
    Points,
    ProbabilityType,
    Reference,
    Runnable,
    Sensor,
    Series,
    StacItems,
    StacSearch,
    Task,
    area_json,
    fields_json,
    fields_source,
    iso,
    listed,
    points_json,
    sources_of,
)
from pimc_client.uploads import AsyncBody, Body, Progress, Source, json_body, multipart_body

if TYPE_CHECKING:
    import httpx

__version__ = "0.1.0"

COG = "image/tiff; application=geotiff; profile=cloud-optimized"
ZIP = "application/zip"
JSON = "application/json"
GEOJSON = "application/geo+json"
ANYTHING = f"{COG}, {ZIP};q=0.9, {GEOJSON};q=0.8, {JSON};q=0.7"
"""Media types to accept for the result of a job whose request is not known."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request to send."""

    method: str
    path: str
    """Path below the base URL, percent-encoded."""
    accept: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body | None = None
    delay: float = 0.0
    """Seconds to wait before the request is sent."""
    retry: bool = True
    """Whether the request may be sent again if it fails."""

    def content(self) -> Body | None:
        """The body, as bytes to iterate over."""
        return self.body

    def acontent(self) -> AsyncBody | None:
        """The body, as bytes to iterate over with `async for`."""
        return None if self.body is None else AsyncBody(self.body)

    def all_headers(self) -> dict[str, str]:
        """The headers that belong to this request; the client adds its own."""
        headers = {"Accept": self.accept, **self.headers}
        if self.body is not None:
            headers["Content-Type"] = self.body.content_type
            if self.body.length is not None:
                headers["Content-Length"] = str(self.body.length)
        return headers

    def repeatable(self) -> bool:
        """Whether sending the request again sends the same bytes."""
        return self.retry and (self.body is None or self.body.replayable)


@dataclass(frozen=True, kw_only=True)
class Response:
    """A complete response; its user closes `body`."""

    status: int
    headers: httpx.Headers
    body: BinaryIO

    def read(self) -> bytes:
        """The body's bytes; the body is closed."""
        with self.body as body:
            body.seek(0)
            return body.read()


def base_url_of(url: str) -> str:
    """A base URL that paths can be appended to.

    Raises:
        ValueError: the text is not an absolute http or https URL.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f"'{url}' is not a valid base URL: give one that starts with http:// or https://, such "
            "as http://127.0.0.1:8000"
        )
    return url.rstrip("/") + "/"


def client_headers(api_key: str | None) -> dict[str, str]:
    """The headers of every request."""
    headers = {"User-Agent": f"pimc-client/{__version__}"}
    return {**headers, "Authorization": f"Bearer {api_key}"} if api_key else headers


def build_raster(
    task: Task | Literal["similar", "series"],
    files: Files,
    *,
    outputs: str | Sequence[str] | None = None,
    points: Points | None = None,
    fields: Fields | None = None,
    answer: AnswerKind = "raster",
    horizon: int | None = None,
    backtest: bool | None = None,
    stride: int | None = None,
    modality: Modality | None = None,
    dtype: EmbeddingType | ProbabilityType | None = None,
    model: str | None = None,
    layout: Layout | None = None,
    dates: Dates | None = None,
    bands: Sequence[str] | str | None = None,
    scale: float | str | None = None,
    offset: float | str | None = None,
    mask: str | Sequence[str] | None = None,
    sensor: Sensor | None = None,
    grid: str | None = None,
    bbox: Sequence[float] | str | None = None,
    area: Area | None = None,
    start: Date | None = None,
    plots: bool = False,
    smooth: int | None = None,
    min_area: float | None = None,
    subscriber: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Request:
    """A raster request: a form with the files, or JSON that names references.

    Raises:
        TypeError: an argument is not a file or not a date.
        ValueError: no file is given, a point is not a pair, or options exclude each other.
        FileNotFoundError: a path does not exist.
    """
    given = _parameters(
        model=model,
        layout=layout,
        dates=dates,
        bands=bands,
        scale=scale,
        offset=offset,
        mask=mask,
        sensor=sensor,
        grid=grid,
        bbox=bbox,
        area=area,
        start=start,
        points=points,
        outputs=outputs,
        horizon=horizon,
        backtest=backtest,
        stride=stride,
        modality=modality,
        dtype=dtype,
        plots=plots or None,
        smooth=smooth,
        min_area=min_area,
        subscriber=subscriber,
    )
    # With /similar, pixels are compared with the points or fields; its result is a whole raster.
    places = (None, None) if task == "similar" else (points, fields)
    accept = _accept(task, outputs, *places, answer)
    return Request(
        method="POST",
        path=task,
        accept=accept,
        body=_raster_body(sources_of(files), given, fields, progress),
    )


def _parameters(**options: Any) -> dict[str, Any]:  # noqa: ANN401 (any option)
    """Options as the API has them; None is left out."""
    as_sent: Mapping[str, Callable[[Any], Any]] = {
        "dates": lambda dates: listed(dates, "dates"),
        "bands": lambda bands: listed(bands, "bands"),
        "mask": lambda mask: mask if isinstance(mask, str) else ",".join(mask),
        "bbox": _bbox,
        "area": area_json,
        "start": lambda start: iso(start, "start"),
        "points": points_json,
        "outputs": lambda outputs: listed(outputs, "outputs"),
    }
    return {
        name: as_sent[name](value) if name in as_sent else value
        for name, value in options.items()
        if value is not None
    }


def build_head(
    name: str,
    files: Files,
    labels: Fields,
    *,
    progress: Progress | None = None,
    **options: Any,  # noqa: ANN401 (`description`, `embedding`, and those of `WindowOptions`)
) -> Request:
    """A request for a model of own classes from a stack and labels.

    Raises:
        TypeError: an argument is not a file, a date or labels.
        ValueError: no file is given.
        FileNotFoundError: a path does not exist.
    """
    given = _parameters(name=name, **options)
    body = _raster_body(sources_of(files), given, labels, progress, vector="labels")
    return Request(method="POST", path="heads", body=body)


def build_head_of_series(
    name: str,
    series: Iterable[Series],
    classes: Iterable[str],
    *,
    places: Iterable[str] | None = None,
    **options: Any,  # noqa: ANN401 (`description`, `embedding`, `start`)
) -> Request:
    """A request for a model of own classes from labelled series.

    Raises:
        ValueError: the numbers of series, classes and places differ.
    """
    given, names = list(series), list(classes)
    where = [None] * len(given) if places is None else list(places)
    if not len(given) == len(names) == len(where):
        raise ValueError(
            f"{len(given)} series, {len(names)} classes and {len(where)} places: give one class "
            "and one place per series"
        )
    labelled = [
        {**one.to_json(), "class": kind, **({} if place is None else {"place": place})}
        for one, kind, place in zip(given, names, where, strict=True)
    ]
    body = json_body({"series": labelled, **_parameters(name=name, **options)})
    return Request(method="POST", path="heads", body=body)


def build_heads() -> Request:
    """A request for the caller's own models."""
    return Request(method="GET", path="heads")


def build_head_removal(name: str) -> Request:
    """A request to remove one of the caller's own models."""
    return Request(method="DELETE", path=f"heads/{quote(name, safe='')}")


def validated(request: Request, task: Runnable) -> Request:
    """The same request of a task, to be checked and not run."""
    return Request(method="POST", path=f"validate?task={task}", body=request.body)


def _bbox(bbox: Sequence[float] | str) -> list[float]:
    """West, south, east, north, degrees.

    Raises:
        ValueError: the argument is not four numbers.
    """
    try:
        numbers = [float(side) for side in (bbox.split(",") if isinstance(bbox, str) else bbox)]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise ValueError(
            f"bbox={bbox!r} is not west, south, east and north in degrees, such as "
            "'4.1,50.9,4.2,51.0'"
        )
    return numbers


def _accept(
    task: str,
    outputs: str | Sequence[str] | None,
    points: Points | None,
    fields: Fields | None,
    answer: AnswerKind,
) -> str:
    if answer not in {"raster", "summary"}:
        raise ValueError(f"answer='{answer}' is not valid: give 'raster' or 'summary'")
    places = {"points": points, "fields": fields, "answer='summary'": answer == "summary" or None}
    given = [name for name, value in places.items() if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} exclude each other: points and fields return one result for "
            "each, answer='summary' a summary of the whole raster; give one of them"
        )
    if points is not None or fields is not None or outputs == "polygons":
        return f"{GEOJSON}, {JSON};q=0.9"
    if answer == "summary":
        return JSON
    several = outputs is not None and not isinstance(outputs, str)
    # A forecast's quantiles are bands of one file.
    return ZIP if several and task in {"classify-pixels", "landcover", "similar"} else COG


def _raster_body(
    sources: list[Source] | list[Reference] | StacItems | StacSearch,
    options: Mapping[str, Any],
    fields: Fields | None,
    progress: Progress | None,
    vector: str = "fields",
) -> Body:
    by_reference: dict[str, Any] = {}
    if isinstance(sources, StacItems | StacSearch):
        by_reference = {"stac": sources.document()}
        sources = []
    elif references := [source for source in sources if isinstance(source, Reference)]:
        by_reference = {"items": [_item(r) for r in references]}
    if by_reference:
        polygons = {} if fields is None else {vector: fields_json(fields)}
        return json_body({**by_reference, **options, **polygons})
    files = [("files", source) for source in sources if isinstance(source, Source)]
    if fields is not None:
        files.insert(0, (vector, fields_source(fields)))
    return multipart_body(files, {k: _parameter(v) for k, v in options.items()}, progress)


def _item(reference: Reference) -> dict[str, str]:
    dated = {} if reference.date is None else {"date": iso(reference.date, reference.href)}
    return {"href": reference.href, **dated}


def _parameter(value: Any) -> str:  # noqa: ANN401 (any option)
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, Mapping | bool):
        return json.dumps(value, allow_nan=False)
    return str(value)


def build_series(
    task: Task,
    series: Iterable[Series],
    *,
    model: str | None = None,
    start: Date | None = None,
    horizon: int | None = None,
    backtest: bool | None = None,
) -> Request:
    """A series request: pixels or fields without a raster.

    Raises:
        ValueError: `series` is empty.
        TypeError: `series` is one `Series` instead of several.
    """
    if isinstance(series, Series):
        raise TypeError("series is one Series: give a list of them")
    listed = [one.to_json() for one in series]
    if not listed:
        raise ValueError("at least one series is required")
    options = {
        "model": model,
        "start": None if start is None else iso(start, "start"),
        "horizon": horizon,
        "backtest": backtest,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return Request(method="POST", path=task, body=json_body({"series": listed, **given}))


def submitted(request: Request, idempotency_key: str | None) -> Request:
    """The same request, run as a job.

    If a request is sent twice with one key, by a retry or by the user, the server creates one job.
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
    """The model registry."""
    return Request(method="GET", path="models")


def build_model(reference: str) -> Request:
    """A model's card, by `name` or `name@version`."""
    return Request(method="GET", path=f"models/{quote(reference, safe='@')}")


def build_ready() -> Request:
    """Readiness; "not ready" is a result here, so it is not retried."""
    return Request(method="GET", path="health/ready", retry=False)


def build_jobs() -> Request:
    """The list of jobs."""
    return Request(method="GET", path="jobs")


def build_job(job_id: str, *, delay: float = 0.0) -> Request:
    """One job's state."""
    return Request(method="GET", path=f"jobs/{quote(job_id, safe='')}", delay=delay)


def build_cancel(job_id: str) -> Request:
    """The cancellation of a job."""
    return Request(method="DELETE", path=f"jobs/{quote(job_id, safe='')}")


def build_result(
    job_id: str,
    *,
    accept: str,
    output: str | None = None,
    smooth: int | None = None,
    min_area: float | None = None,
) -> Request:
    """A job's result, or one output of it, derived anew if `smooth` or `min_area` is given.

    Raises:
        ValueError: `smooth` or `min_area` without an output.
    """
    path = f"jobs/{quote(job_id, safe='')}/result"
    given = {"smooth": smooth, "min_area": min_area}
    query = "&".join(f"{name}={value}" for name, value in given.items() if value is not None)
    if query and output is None:
        raise ValueError("smooth and min_area need the output 'class': give it, or leave them out")
    if query:
        return Request(
            method="GET", path=f"{path}/{quote(str(output), safe='')}?{query}", accept=accept
        )
    return Request(
        method="GET",
        path=path if output is None else f"{path}/{quote(output, safe='')}",
        accept=accept,
    )
