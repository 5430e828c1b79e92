"""Answers, read from what came back. Pure: nothing here connects to anything."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from pimc_client.answers import (
    About,
    Embedding,
    Forecast,
    Model,
    Models,
    ModelWindow,
    PixelClass,
    PointResult,
    Raster,
    Rasters,
    Readiness,
    Results,
    ServiceWarning,
    Summary,
    legend_class,
)
from pimc_client.calls import COG, GEOJSON, JSON, ZIP, Reply
from pimc_client.errors import GeoTIFFError, UnexpectedAnswer, service_error
from pimc_client.jobs import JobState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Record = Mapping[str, Any]
Result = PixelClass | Forecast | Embedding
Answer = Raster | Rasters | Summary | Results[PointResult[Any]]
R = TypeVar("R", PixelClass, Forecast, Embedding)

_TIFF = COG.partition(";")[0]
_NAMES = {"forecast": "forecast", "embed": "embedding"}
_DEFAULT_OUTPUT = "class"
_SERVICE_UNAVAILABLE = 503


@contextmanager
def _documented() -> Iterator[None]:
    """Says of an answer that lacks what it must have that it is none of the service's."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnexpectedAnswer(f"the answer is not as the service's are: {error!r}") from error


def checked(reply: Reply) -> Reply:
    """The reply, where it is no error.

    Raises:
        ServiceError: the service said no.
        UnexpectedAnswer: a redirect, which no route of the service sends.
    """
    if reply.status >= 400:
        raise service_error(reply.status, reply.headers, reply.read())
    if reply.status >= 300:
        reply.body.close()
        target = reply.headers.get("location", "nowhere")
        raise UnexpectedAnswer(f"the answer sends us on to {target}: is that the base URL?")
    return reply


@_documented()
def parse_answer(reply: Reply, task: str, output: str | None = None) -> Answer:
    """A raster request's answer, whatever its type.

    Args:
        reply: no error.
        task: what was asked for; it tells how to read points.
        output: the output asked for, where it was one.

    Raises:
        UnexpectedAnswer: a type that is none of the service's, or content that is not of its type.
    """
    kind = _type(reply)
    try:
        if kind == _TIFF:
            return Raster(reply.body, name=_output_name(reply, task, output), about=_about(reply))
        if kind == ZIP:
            return Rasters(reply.body, about=_about(reply))
    except (GeoTIFFError, zipfile.BadZipFile) as error:
        raise UnexpectedAnswer(f"an answer of type {kind} is none: {error}") from error
    document = parse_json(reply)
    about = _about(reply, document)
    if document.get("type") == "FeatureCollection":
        return Results([_point(f, task) for f in document["features"]], about=about)
    return Summary(document, about=about)


@_documented()
def parse_series(reply: Reply, read: Callable[[Record], R]) -> Results[R]:
    """A series request's answer, one result for each."""
    document = parse_json(reply)
    results = [read(record) for record in document["results"]]
    return Results(results, about=_about(reply, document))


def parse_json(reply: Reply) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UnexpectedAnswer: anything else.
    """
    kind = _type(reply)
    content = reply.read()
    if kind not in {JSON, GEOJSON}:
        raise UnexpectedAnswer(f"the answer is '{kind}', which is none of the service's types")
    try:
        document = json.loads(content)
    except ValueError as error:
        raise UnexpectedAnswer(f"the answer is no JSON although it says so: {error}") from error
    if not isinstance(document, dict):
        raise UnexpectedAnswer("the answer is JSON, but no object")
    return document


def _type(reply: Reply) -> str:
    kind: str = reply.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower()


def _output_name(reply: Reply, task: str, output: str | None) -> str:
    if task in _NAMES:  # Of a forecast, `outputs` are bands.
        return _NAMES[task]
    if output:
        return output
    _, _, filename = reply.headers.get("content-disposition", "").partition("filename=")
    return PurePosixPath(filename.strip('"; ')).stem or _DEFAULT_OUTPUT


def _about(reply: Reply, document: Record | None = None) -> About:
    """From the headers, and from the JSON where it says more."""
    headers, said = reply.headers, document or {}
    listed = said.get("warnings", ())
    warnings = [ServiceWarning(code=w["code"], detail=w["detail"]) for w in listed]
    return About(
        model=said.get("model") or headers.get("pimc-model"),
        provider=said.get("provider") or headers.get("pimc-provider"),
        request_id=headers.get("x-request-id"),
        timing=_timing(headers.get("server-timing", "")),
        warnings=tuple(warnings or map(_warning, headers.get_list("pimc-warning"))),
    )


def _warning(header: str) -> ServiceWarning:
    code, _, detail = header.partition(";")
    return ServiceWarning(code=code.strip(), detail=detail.strip())


def _timing(header: str) -> dict[str, float]:
    """Seconds by stage; the header has milliseconds."""
    stages = {}
    for metric in header.split(","):
        name, *parameters = (part.strip() for part in metric.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key == "dur":
                stages[name] = float(value) / 1000
    return stages


# --- results --------------------------------------------------------------------------------------


def pixel_class(record: Record) -> PixelClass:
    """A class of one place."""
    return PixelClass(
        id=record.get("id"),
        status=record.get("status", "ok"),
        label=record.get("class"),
        value=record.get("value"),
        confidence=record.get("confidence"),
        entropy=record.get("entropy"),
        probabilities=record.get("probabilities") or {},
    )


def forecast(record: Record) -> Forecast:
    """A forecast of one place."""
    indices = {
        index: {quantile: _array(values) for quantile, values in quantiles.items()}
        for index, quantiles in record.items()
        if index.isupper() and isinstance(quantiles, Mapping)
    }
    return Forecast(
        id=record.get("id"),
        status=record.get("status", "ok"),
        dates=tuple(date.fromisoformat(day) for day in record.get("dates") or ()),
        indices=indices,
    )


def embedding(record: Record) -> Embedding:
    """An embedding of one place."""
    values = record.get("embedding")
    return Embedding(
        id=record.get("id"),
        status=record.get("status", "ok"),
        values=None if values is None else _array(values),
    )


def _array(values: list[float | None]) -> NDArray[np.float64]:
    import numpy as np

    return np.array(values, dtype=np.float64)  # None becomes NaN


_READERS: Mapping[str, Callable[[Record], Result]] = {
    "classify-pixels": pixel_class,
    "landcover": pixel_class,
    "forecast": forecast,
    "embed": embedding,
}


def _point(feature: Record, task: str) -> PointResult[Any]:
    lon, lat = feature["geometry"]["coordinates"][:2]
    properties = feature.get("properties") or {}
    # The id that came with the point, wherever GeoJSON has it.
    record = {"id": feature.get("id"), **properties}
    return PointResult(
        lon=lon,
        lat=lat,
        status=properties.get("status", "ok"),
        result=_READERS[task](record),
        properties=properties,
    )


# --- the rest -------------------------------------------------------------------------------------


@_documented()
def parse_model(document: Record) -> Model:
    """A model's card."""
    window = document.get("window")
    return Model(
        name=document["name"],
        version=document["version"],
        task=document["task"],
        description=document["description"],
        bands=tuple(document["bands"]),
        window=window
        and ModelWindow(
            steps=window["steps"], step_days=window["step_days"], start=window["start"]
        ),
        min_observations=document["min_observations"],
        classes=tuple(legend_class(c) for c in document.get("classes") or ()),
        horizon=document.get("horizon"),
        metrics=document.get("metrics") or {},
        training_data=tuple(document.get("training_data") or ()),
        licence=document["licence"],
        variants=tuple(document["variants"]),
        sha256=document["sha256"],
        card=document,
    )


@_documented()
def parse_models(document: Record) -> Models:
    """The registry."""
    return Models(
        cards=tuple(parse_model(card) for card in document["models"]),
        defaults=document["defaults"],
    )


@_documented()
def parse_ready(reply: Reply) -> Readiness:
    """Readiness; "not yet" is an answer too.

    Raises:
        ServiceError: any other error.
    """
    if reply.status == _SERVICE_UNAVAILABLE:
        reason = service_error(reply.status, reply.headers, reply.read()).detail
        return Readiness(ready=False, provider=None, models=(), detail=reason)
    document = parse_json(checked(reply))
    return Readiness(
        ready=True,
        provider=document.get("provider"),
        models=tuple(document.get("models") or ()),
        detail=None,
    )


@_documented()
def parse_job(document: Record) -> JobState:
    """A job's state, as OGC API - Processes names things."""
    return JobState(
        id=document["jobID"],
        task=document["processID"],
        status=document["status"],
        progress=document.get("progress") or 0,
        created=_moment(document.get("created")),
        started=_moment(document.get("started")),
        finished=_moment(document.get("finished")),
        message=document.get("message"),
        document=document,
    )


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
