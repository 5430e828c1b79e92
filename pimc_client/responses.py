"""HTTP responses, parsed into results; nothing here opens a connection."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from pimc_client.errors import GeoTIFFError, UnexpectedAnswer, service_error
from pimc_client.requests import COG, GEOJSON, JSON, ZIP, Response
from pimc_client.results import (
    About,
    Embedding,
    Forecast,
    JobState,
    Measured,
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
    Table,
    Taught,
    legend_class,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Record = Mapping[str, Any]
PlaceResult = PixelClass | Forecast | Embedding
TaskResult = Raster | Rasters | Summary | Results[PointResult[Any]] | Table
R = TypeVar("R")

_TIFF = COG.partition(";")[0]
_NAMES = {"forecast": "forecast", "embed": "embedding"}
_DEFAULT_OUTPUT = "class"
_SERVICE_UNAVAILABLE = 503


@contextmanager
def _documented() -> Iterator[None]:
    """Raise `UnexpectedAnswer` if a response lacks a required member."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnexpectedAnswer(
            f"the response is not that of a PIMC server ({error!r}): check the base URL"
        ) from error


def checked(response: Response) -> Response:
    """The response, if it is not an error.

    Raises:
        ServiceError: the server responded with an error.
        UnexpectedAnswer: the response is a redirect, which no route of the server sends.
    """
    if response.status >= 400:
        raise service_error(response.status, response.headers, response.read())
    if response.status >= 300:
        response.body.close()
        target = response.headers.get("location", "no address")
        raise UnexpectedAnswer(
            f"the response is a redirect to {target}: use the base URL of that address"
        )
    return response


@_documented()
def parse_result(response: Response, task: str, output: str | None = None) -> TaskResult:
    """The result of a raster request, by the response's media type.

    Args:
        response: a response that is not an error.
        task: the request's task, which determines how points are parsed.
        output: the output requested, if it was a single one.

    Raises:
        UnexpectedAnswer: no route sends this media type, or the content is of another type.
    """
    kind = _type(response)
    try:
        if kind == _TIFF:
            return Raster(
                response.body, name=_output_name(response, task, output), about=_about(response)
            )
        if kind == ZIP:
            return Rasters(response.body, about=_about(response))
    except (GeoTIFFError, zipfile.BadZipFile) as error:
        raise UnexpectedAnswer(
            f"the response states media type '{kind}', but its content is of another type "
            f"({error}): check the base URL"
        ) from error
    document = parse_json(response)
    about = _about(response, document)
    if document.get("type") == "FeatureCollection":
        features = document["features"]
        if all(feature["geometry"]["type"] == "Point" for feature in features):
            return Results([_point(feature, task) for feature in features], about=about)
        return Table(document, about=about)
    return Summary(document, about=about)


@_documented()
def parse_series(response: Response, read: Callable[[Record], R]) -> Results[R]:
    """The results of a series request, one for each series."""
    document = parse_json(response)
    results = [read(record) for record in document["results"]]
    return Results(results, about=_about(response, document))


@_documented()
def parse_measured(response: Response) -> Measured:
    """Measured series."""
    document = parse_json(response)
    return Measured(document, about=_about(response, document))


def parse_json(response: Response) -> dict[str, Any]:
    """The JSON object of a response.

    Raises:
        UnexpectedAnswer: the response is not a JSON object.
    """
    kind = _type(response)
    content = response.read()
    if kind not in {JSON, GEOJSON}:
        raise UnexpectedAnswer(
            f"the response has media type '{kind}', which no route of a PIMC server sends: check "
            "the base URL"
        )
    try:
        document = json.loads(content)
    except ValueError as error:
        raise UnexpectedAnswer(
            f"the response has media type '{kind}', but is not valid JSON ({error}): check the "
            "base URL"
        ) from error
    if not isinstance(document, dict):
        raise UnexpectedAnswer(
            "the response is JSON, but not an object as every route of a PIMC server sends: check "
            "the base URL"
        )
    return document


def _type(response: Response) -> str:
    kind: str = response.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower()


def _output_name(response: Response, task: str, output: str | None) -> str:
    if task in _NAMES:  # the outputs of a forecast are bands of one file
        return _NAMES[task]
    if output:
        return output
    _, _, filename = response.headers.get("content-disposition", "").partition("filename=")
    return PurePosixPath(filename.strip('"; ')).stem or _DEFAULT_OUTPUT


def _about(response: Response, document: Record | None = None) -> About:
    """How a result was computed, from the headers and from the JSON document if there is one."""
    headers, content = response.headers, document or {}
    listed = content.get("warnings", ())
    warnings = [ServiceWarning(code=w["code"], detail=w["detail"]) for w in listed]
    return About(
        model=content.get("model") or headers.get("pimc-model"),
        provider=content.get("provider") or headers.get("pimc-provider"),
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
        attribution=record.get("attribution") or {},
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
        values=None if values is None else _array(values) * record.get("scale", 1.0),
    )


def _array(values: list[float | None]) -> NDArray[np.float64]:
    import numpy as np

    return np.array(values, dtype=np.float64)  # None becomes NaN


_READERS: Mapping[str, Callable[[Record], PlaceResult]] = {
    "classify-pixels": pixel_class,
    "landcover": pixel_class,
    "forecast": forecast,
    "embed": embedding,
}


def _point(feature: Record, task: str) -> PointResult[Any]:
    lon, lat = feature["geometry"]["coordinates"][:2]
    properties = feature.get("properties") or {}
    # GeoJSON has the point's id either in the feature or in its properties.
    record = {"id": feature.get("id"), **properties}
    return PointResult(
        lon=lon,
        lat=lat,
        status=properties.get("status", "ok"),
        result=_READERS[task](record),
        properties=properties,
    )


# --- models, readiness and jobs -------------------------------------------------------------------


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
def parse_taught(document: Record) -> Taught:
    """A model that was made."""
    return Taught(
        model=parse_model(document["card"]),
        warnings=tuple(
            ServiceWarning(code=w["code"], detail=w["detail"]) for w in document["warnings"]
        ),
    )


@_documented()
def parse_heads(document: Record) -> tuple[Model, ...]:
    """The caller's own models."""
    return tuple(parse_model(card) for card in document["heads"])


@_documented()
def parse_models(document: Record) -> Models:
    """The registry."""
    return Models(
        cards=tuple(parse_model(card) for card in document["models"]),
        defaults=document["defaults"],
    )


@_documented()
def parse_ready(response: Response) -> Readiness:
    """Readiness; "not ready" is a result too.

    Raises:
        ServiceError: the server responded with another error.
    """
    if response.status == _SERVICE_UNAVAILABLE:
        reason = service_error(response.status, response.headers, response.read()).detail
        return Readiness(ready=False, provider=None, models=(), detail=reason)
    document = parse_json(checked(response))
    return Readiness(
        ready=True,
        provider=document.get("provider"),
        models=tuple(document.get("models") or ()),
        detail=None,
    )


@_documented()
def parse_job(document: Record) -> JobState:
    """A job's state, from the status document of OGC API - Processes."""
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
