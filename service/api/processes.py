"""OGC API - Processes 1.0 (18-062r2): process descriptions, and execute requests as task requests.

    request models ──▶ process descriptions: inputs, outputs
    execute request ─┬─ inputs ──▶ the JSON body of the task, and binary values as files
                     └─ outputs, response ──▶ `Delivery`

Each task is a process. Its inputs are the parameters of the task's JSON bodies, described and
validated by the same models; the parameter `outputs` of a forecast is the input `quantiles`, and
the uploaded files are the input `files`.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel

from models.card import Task
from service.api.disconnect import check_connected
from service.api.json_pieces import JsonText
from service.api.negotiation import MediaRange
from service.api.responses import COG, CSV, GEOJSON, PARQUET, ZIP
from service.api.schemas.parameter_types import ClassOutput, DatedOutput, SimilarOutput
from service.api.schemas.request_bodies import ITEMS, MAX_ITEMS, SERIES, STAC, Execute
from service.api.schemas.response_bodies import (
    Link,
    PointsResponse,
    ProcessDescription,
    ProcessInput,
    ProcessOutput,
    ProcessSummary,
    SeriesResponse,
    SummaryResponse,
)
from service.api.schemas.validation import unknown_parameter
from service.api.uploads import JSON
from service.errors import InvalidRequest, UnknownProcess, shown
from service.run.request import RasterRequest, Runnable, TaskRequest
from service.settings import project_version
from service.write.predictions import ATTRIBUTION, POLYGONS

_CLASSES = "http://www.opengis.net/spec/ogcapi-processes-1/1.0/conf"


def conformance_classes(*, callbacks: bool) -> list[str]:
    """The conformance classes that the server declares; each of their requirements has a test.

    Args:
        callbacks: whether the server sends callbacks.
    """
    names = ["core", "ogc-process-description", "json", "job-list", "dismiss"]
    return [f"{_CLASSES}/{name}" for name in (*names, *(["callback"] if callbacks else []))]


EXECUTE = "http://www.opengis.net/def/rel/ogc/1.0/execute"
PROCESSES: tuple[Runnable, ...] = (*get_args(Task), "similar")
CRS84 = "http://www.opengis.net/def/crs/OGC/1.3/CRS84"
_CRS84H = "http://www.opengis.net/def/crs/OGC/0/CRS84h"
_GEOPACKAGE = "application/geopackage+sqlite3"
SOURCES = ("files", "stac", "series")
"""Inputs with the data of a run, of which a request has exactly one."""
FILE_TYPES = ("image/tiff; application=geotiff", "image/jp2", ZIP)
"""Media types of binary values of the input `files`."""
VECTOR_TYPES = (GEOJSON, _GEOPACKAGE, PARQUET)
"""Media types of values of the input `fields`."""
_TEXTS: Mapping[Runnable, tuple[str, str, tuple[str, ...]]] = {
    "classify-pixels": (
        "Classify pixels",
        "A class for every pixel of a satellite image time series",
        ("classification", "land cover", "crops", "time series"),
    ),
    "forecast": (
        "Forecast spectral indices",
        "The next values of NDVI, EVI and SAVI for every pixel, with quantiles",
        ("forecast", "NDVI", "EVI", "SAVI", "time series"),
    ),
    "landcover": (
        "Label imagery",
        "Land-cover labels from imagery: one per 64 x 64 patch, or denser with `stride`",
        ("classification", "land cover", "imagery"),
    ),
    "embed": (
        "Embed pixels or patches",
        "The embedding of every pixel, from recurrence plots, or patch, from imagery",
        ("embedding", "features", "time series"),
    ),
    "similar": (
        "Find pixels similar to given places",
        "Cosine similarity of every pixel's embedding to that of points or polygons",
        ("similarity", "embedding", "search", "time series"),
    ),
}
_OUTPUT_TEXTS: Mapping[str, str] = {
    "class": "the class of every pixel: uint8, nodata 255, names and colours in the file",
    "confidence": "the probability of the class",
    "entropy": "the entropy of the probabilities",
    "probabilities": "the probability of every class, a band each",
    POLYGONS: "one feature per connected area of the class map",
    ATTRIBUTION: "how much each date mattered to the class of a pixel, a band per date; only if "
    "`outputs` names it, or with the input `attribution`",
    "forecast": "NDVI, EVI and SAVI by date and quantile, a band each",
    "embedding": "the embedding, a band per dimension",
    "similarity": "the similarity of every pixel to the most similar place, -1 to 1",
    "similarities": "the similarity of every pixel to each place, -1 to 1, a band per place",
    "summary": "the result in numbers: model, dates, warnings, classes or means; not with "
    "`points`, `fields` or `series`",
    "features": "one feature per point or field, the results in its properties; only with the "
    "input `points` or `fields`, which have no other output",
    "series": "one result per series; only with the input `series`, which has no other output",
}


def task_of(process: str) -> Runnable:
    """The task with the id of a process.

    Raises:
        UnknownProcess: no process has this id.
    """
    for task in PROCESSES:
        if task == process:
            return task
    there = ", ".join(PROCESSES)
    raise UnknownProcess(f"there is no process '{shown(process)}'; available: {there}")


# Descriptions -------------------------------------------------------------------------------------


def summary_of(task: Runnable, root: str) -> ProcessSummary:
    """A process without its inputs and outputs, for the list of processes.

    Args:
        task: the process.
        root: path before the service's own paths.
    """
    title, description, keywords = _TEXTS[task]
    here = f"{root}/processes/{task}"
    return ProcessSummary(
        id=task,
        version=project_version(),
        title=title,
        description=description,
        keywords=list(keywords),
        jobControlOptions=["sync-execute", "async-execute", "dismiss"],
        outputTransmission=["value", "reference"],
        links=[
            Link(href=here, rel="self", type=JSON, title="the description of the process"),
            Link(href=f"{here}/execution", rel=EXECUTE, type=JSON, title="its execution"),
        ],
    )


def description_of(task: Runnable, root: str) -> ProcessDescription:
    """A process with its inputs and outputs.

    Args:
        task: the process.
        root: path before the service's own paths.
    """
    return ProcessDescription(
        **vars(summary_of(task, root)),
        inputs=dict(inputs_of(task)),
        outputs=dict(_outputs_of(task)),
    )


@cache
def inputs_of(task: Runnable) -> Mapping[str, ProcessInput]:
    """The inputs of a process by name, from the models of the task's JSON bodies."""
    one_of = f"exactly one of {', '.join(f'`{name}`' for name in _sources(task))} is required"
    found = {
        "files": _input(
            "files",
            f"the GeoTIFFs of a stack, as links or binary values with their mediaType; {one_of}",
            {"oneOf": [_binary(kind) for kind in FILE_TYPES]},
            MAX_ITEMS,
        ),
        "stac": _described("stac", STAC[task], "stac", f"; {one_of}"),
    }
    if task in SERIES:
        found["series"] = _described("series", SERIES[task], "series", f"pixels; {one_of}")
    for field in ITEMS[task].model_fields:
        name = _input_name(task, field)
        if name is not None and name not in found:
            found[name] = _described(name, ITEMS[task], field)
    found["bbox"] = _input("bbox", found["bbox"].description, _BBOX)
    polygons = "polygons, in any CRS: predict per polygon"
    places = "points or polygons, in any CRS, with which every pixel is compared"
    found["fields"] = _input(
        "fields",
        places if task == "similar" else polygons,
        {
            "oneOf": [
                {"type": "object", "contentMediaType": GEOJSON},
                *(_binary(kind) for kind in VECTOR_TYPES if kind != GEOJSON),
            ]
        },
    )
    if task == "classify-pixels":
        found[ATTRIBUTION] = _input(
            ATTRIBUTION,
            "true: all outputs of a map, and the results of points and series, include how much "
            "each date mattered to the class, which takes about 64 predictions per pixel",
            {"type": "boolean", "default": False},
        )
    return found


_BBOX: dict[str, Any] = {
    "type": "object",
    "format": "ogc-bbox",
    "required": ["bbox"],
    "properties": {
        "bbox": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 6},
        "crs": {"type": "string", "format": "uri", "default": CRS84, "enum": [CRS84, _CRS84H]},
    },
}


def _sources(task: Runnable) -> tuple[str, ...]:
    return tuple(name for name in SOURCES if name != "series" or task in SERIES)


def _input_name(task: Runnable, field: str) -> str | None:
    """The input for a field of the task's models; None for a field that is not an input."""
    if field == "outputs":
        return "quantiles" if task == "forecast" else None  # outputs of maps are process outputs
    # A subscriber is a property of the execute request, not an input.
    return None if field in {"items", "subscriber"} else field


def _described(name: str, model: type[BaseModel], field: str, more: str = "") -> ProcessInput:
    """An input, described by a field of a model."""
    document = model.model_json_schema()
    schema = _openapi(document["properties"][field], document.get("$defs", {}))
    for key in ("default", "nullable", "title"):
        schema.pop(key, None)
    text = f"{schema.pop('description', '')}{more}"
    most: int | Literal["unbounded"] = 1
    if schema.get("type") == "array":  # each element is one value of the input
        most = schema.get("maxItems", "unbounded")
        schema = schema["items"]
    if "anyOf" in schema:  # an input of several types: the first is the default
        schema["oneOf"] = schema.pop("anyOf")
    return _input(name, text, schema, most)


def _input(
    name: str, description: str, schema: dict[str, Any], most: int | Literal["unbounded"] = 1
) -> ProcessInput:
    rest: dict[str, Any] = {"schema": schema}  # an alias
    return ProcessInput(title=name, description=description, minOccurs=0, maxOccurs=most, **rest)


def _binary(media: str) -> dict[str, Any]:
    return {
        "type": "string",
        "format": "byte",
        "contentEncoding": "base64",
        "contentMediaType": media,
    }


@cache
def _outputs_of(task: Runnable) -> Mapping[str, ProcessOutput]:
    found = {}
    for name, offers in _offers(task).items():
        kinds = [_kind(name, media) for media in offers]
        rest: dict[str, Any] = {"schema": kinds[0] if len(kinds) == 1 else {"oneOf": kinds}}
        found[name] = ProcessOutput(title=name, description=_OUTPUT_TEXTS[name], **rest)
    return found


def _kind(name: str, media: str) -> dict[str, Any]:
    """The schema of an output in one of its types."""
    if media in {COG, PARQUET}:
        return _binary(media)
    if media == CSV:
        return {"type": "string", "contentMediaType": CSV}
    models: Mapping[str, type[BaseModel]] = {"summary": SummaryResponse, "series": SeriesResponse}
    model = models.get(name, PointsResponse)
    document = model.model_json_schema()
    return {**_openapi(document, document.get("$defs", {})), "contentMediaType": media}


_KEPT = frozenset(
    {
        "title", "description", "type", "format", "default", "enum", "pattern", "minimum",
        "maximum", "minLength", "maxLength", "minItems", "maxItems", "required", "items",
        "properties", "additionalProperties", "oneOf", "anyOf", "nullable", "example",
    }
)  # fmt: skip


def _openapi(schema: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON Schema (2020-12) as a schema of OpenAPI 3.0, which process descriptions require.

    Args:
        schema: the JSON Schema of a pydantic model.
        named: its `$defs`, with which references are replaced.
    """
    if "$ref" in schema:
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        return {
            **_openapi(named[schema["$ref"].rpartition("/")[2]], named),
            **_openapi(rest, named),
        }
    options = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    nullable = "anyOf" in schema and len(options) < len(schema["anyOf"])
    found = dict(schema)
    if len(options) == 1:
        found = {
            **_openapi(options[0], named),
            **schema,
        }  # the field's own keywords have precedence
    if "anyOf" in found:
        del found["anyOf"]
        if len(options) > 1:
            found["anyOf"] = options
    if nullable:
        found["nullable"] = True
    if found.get("default", ...) is None:
        del found["default"]
    if "const" in found:
        found["enum"] = [found["const"]]
    if "examples" in found:
        found["example"] = found["examples"][0]
    if "prefixItems" in found:
        found["items"] = found["prefixItems"][0]
    found = {key: value for key, value in found.items() if key in _KEPT}
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), Mapping):
            found[key] = _openapi(found[key], named)
    for key in ("oneOf", "anyOf"):
        if key in found:
            found[key] = [_openapi(one, named) for one in found[key]]
    if "properties" in found:
        found["properties"] = {
            name: _openapi(one, named) for name, one in found["properties"].items()
        }
    return found


# Outputs ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Output:
    """A requested output."""

    name: str
    media: str
    reference: bool = False
    """Whether a link to the output is returned instead of its value."""


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How the results of an execution are returned."""

    response: Literal["raw", "document"]
    outputs: tuple[Output, ...]

    @property
    def references(self) -> bool:
        """Whether a link to an output is returned."""
        return any(output.reference for output in self.outputs)

    def document(self) -> dict[str, Any]:
        """As JSON values, which are stored with a job."""
        return {"response": self.response, "outputs": [vars(output) for output in self.outputs]}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Delivery:
        """The delivery stored in a document."""
        outputs = tuple(Output(**output) for output in document["outputs"])
        return cls(response=document["response"], outputs=outputs)


def rasters_of(task: Runnable) -> tuple[str, ...]:
    """Names of the files that a task can write for a raster."""
    if task == "classify-pixels":
        return get_args(DatedOutput)
    if task == "landcover":
        return get_args(ClassOutput)
    if task == "similar":
        return get_args(SimilarOutput)
    return ("forecast",) if task == "forecast" else ("embedding",)


def _offers(task: Runnable) -> dict[str, tuple[str, ...]]:
    """Media types of each output of a process, the default first."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(rasters_of(task), (COG,))
    if POLYGONS in found:
        found[POLYGONS] = (PARQUET, GEOJSON)
    found["summary"] = (JSON,)
    if task != "similar":  # whose places are compared with every pixel
        found["features"] = (GEOJSON, CSV, PARQUET)
    return {**found, "series": (JSON,)} if task in SERIES else found


def available(request: TaskRequest) -> dict[str, tuple[str, ...]]:
    """The outputs that are available with a request's inputs, with their media types."""
    offers = _offers(request.operation)
    if not isinstance(request, RasterRequest):
        names: Sequence[str] = ("series",)
    elif request.points is not None:
        return {"features": (GEOJSON,)}
    elif request.fields is not None:
        names = ("features",)
    else:
        # Attribution takes many times as long as all other outputs together, so it is computed only
        # on request.
        left_out = {ATTRIBUTION} - set(request.outputs or ())
        rasters = [name for name in rasters_of(request.operation) if name not in left_out]
        names = (*rasters, "summary")
    return {name: offers[name] for name in names}


def delivery_of(execute: Execute, request: TaskRequest) -> Delivery:
    """How the results of an execution are returned.

    Raises:
        InvalidRequest: an output is not available with the inputs, or not in the requested type.
    """
    offers = available(request)
    outputs = []
    for name in execute.outputs or offers:
        if name not in offers:
            raise InvalidRequest.of(
                f"outputs.{name}",
                f"not available with these inputs; available: {', '.join(offers)}",
            )
        requested = execute.outputs.get(name)
        media = requested.format.mediaType if requested and requested.format else None
        outputs.append(
            Output(
                name=name,
                media=offers[name][0]
                if media is None
                else _chosen(media, offers[name], f"outputs.{name}.format.mediaType"),
                reference=requested is not None and requested.transmissionMode == "reference",
            )
        )
    return Delivery(response=execute.response, outputs=tuple(outputs))


def default_delivery(request: TaskRequest, files: Iterable[str]) -> Delivery:
    """How the results of a job that was not submitted by an execution are returned: as links.

    Args:
        request: the job's request.
        files: names of the files that the job has written.
    """
    found = {name: PARQUET if name == POLYGONS else COG for name in files}
    if found:
        found["summary"] = JSON
    else:
        found = {name: media[0] for name, media in available(request).items()}
    outputs = tuple(Output(name=n, media=media, reference=True) for n, media in found.items())
    return Delivery(response="document", outputs=outputs)


def _chosen(given: str, offers: Sequence[str], field: str) -> str:
    """The offered media type that matches a requested one.

    Raises:
        InvalidRequest: no offered type matches.
    """
    wanted = MediaRange.parse(given)
    for offer in offers:
        offered = MediaRange.parse(offer)
        if wanted and offered and wanted.match(offered):
            return offer
    raise InvalidRequest.of(field, f"'{shown(given)}' is not one of {', '.join(offers)}")


# Inputs -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A link instead of a value."""

    href: str
    field: str
    """Name of the input, for messages."""


_CHARACTERS = 2**16
"""Number of characters of base64 that are decoded at once, a multiple of 4."""


@dataclass(frozen=True, kw_only=True)
class Binary:
    """A binary value, still encoded as base64."""

    text: str
    field: str
    """Name of the input, for messages."""

    def write(self, path: Path) -> int:
        """Decode the value and write it to a file.

        Returns:
            Size of the file in bytes.

        Raises:
            InvalidRequest: the value is not base64, or is empty.
            Cancelled: the client disconnected.
        """
        size, end = 0, len(self.text)
        with path.open("wb") as file:
            for at in range(0, end, _CHARACTERS):
                check_connected()  # other threads run between two pieces
                piece = self.text[at : at + _CHARACTERS]
                if at + _CHARACTERS < end:
                    piece = piece.replace("=", "?")  # padding is valid at the end only
                try:
                    size += file.write(binascii.a2b_base64(piece, strict_mode=True))
                except (binascii.Error, ValueError) as error:
                    raise InvalidRequest.of(
                        self.field,
                        f"the value is not valid base64 ({error}): encode the file again",
                    ) from error
        if not size:
            raise InvalidRequest.of(
                self.field, "the value is empty (0 bytes): encode the bytes of the file as base64"
            )
        return size


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of an execution, by how they are read."""

    source: str
    """The one of `SOURCES` that the request has."""
    files: tuple[Reference | Binary, ...]
    """Files of a stack; empty for other sources."""
    fields: Reference | Binary | dict[str, Any] | None
    """Polygons: a link, a file, or GeoJSON."""
    body: Mapping[str, Any]
    """The other inputs, by their names in the task's JSON bodies; a link is a `Reference`."""


def read_inputs(task: Runnable, execute: Execute) -> Inputs:
    """The inputs of an execute request, references not yet resolved and options not yet validated.

    Raises:
        InvalidRequest: an input is unknown or has a wrong type, or there is not exactly one source.
    """
    known, given, outputs = inputs_of(task), dict(execute.inputs), _offers(task)
    for name in execute.outputs:
        if name not in outputs:
            there = ", ".join(outputs)
            raise InvalidRequest.of(f"outputs.{shown(name)}", f"unknown output; available: {there}")
    for name in given:
        if name not in known:
            raise InvalidRequest.of(f"inputs.{shown(name)}", unknown_parameter(name, known))
    sources = [name for name in _sources(task) if name in given]
    if len(sources) != 1:
        given_sources = ", ".join(sources) or "none"
        raise InvalidRequest.of(
            "inputs",
            f"exactly one of {', '.join(_sources(task))} is required; given: {given_sources}",
        )
    files = tuple(
        _file(value, f"inputs.files.{n}", FILE_TYPES)
        for n, value in enumerate(_each(given.pop("files", [])))
    )
    if sources == ["files"] and not files:
        raise InvalidRequest.of("inputs.files", "at least one GeoTIFF is required")
    if len(files) > MAX_ITEMS:
        raise InvalidRequest.of(
            "inputs.files",
            f"the request has {len(files)} files, and at most {MAX_ITEMS} are allowed: send fewer "
            "files",
        )
    fields = given.pop("fields", None)
    if fields is not None and sources == ["series"]:
        raise InvalidRequest.of("inputs.fields", "cannot be combined with series: send one of them")
    body = {
        ("outputs" if name == "quantiles" else name): _value(name, value, known[name])
        for name, value in given.items()
    }
    if isinstance(body.get("stac"), Reference):
        body["stac"] = body["stac"].href  # a URL of items, which `stac_request` fetches
    return Inputs(
        source=sources[0],
        files=files,
        fields=None if fields is None else _vector(fields),
        body=body,
    )


@contextmanager
def inputs_named(task: Runnable) -> Iterator[None]:
    """Translate field names of the task's bodies in errors to names of inputs.

    Raises:
        InvalidRequest: the error, with the input that caused each part of it.
    """
    try:
        yield
    except InvalidRequest as error:
        errors = [{**one, "field": _named(task, one["field"])} for one in error.errors]
        if len(errors) == 1:
            raise InvalidRequest.of(errors[0]["field"], errors[0]["detail"]) from error
        detail = error.detail
        if errors:
            names = ", ".join(one["field"] for one in errors)
            detail = f"{len(errors)} inputs are not valid: {names}"
        raise InvalidRequest(detail, errors) from error


def _named(task: Runnable, field: str) -> str:
    if field.startswith("inputs") or field == "body":
        return field
    field = re.sub(r"^items\b", "files", field)
    if task == "forecast":
        field = re.sub(r"^outputs\b", "quantiles", field)
    return f"inputs.{field}"


def _each(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def bbox_of(value: Any) -> Any:  # noqa: ANN401 - JSON
    """West, south, east, north of a bounding box, without heights; any other value unchanged.

    Raises:
        InvalidRequest: the box is not in CRS84.
    """
    if not isinstance(value, dict):
        return value
    crs = value.get("crs", CRS84)
    if crs not in (CRS84, _CRS84H):
        raise InvalidRequest.of("inputs.bbox.crs", f"'{shown(crs)}' is not supported: give {CRS84}")
    numbers = value.get("bbox")
    if isinstance(numbers, list) and len(numbers) == 6:
        return [*numbers[:2], *numbers[3:5]]
    return numbers


def _value(name: str, value: object, known: ProcessInput) -> Any:  # noqa: ANN401 - JSON
    """A value in the form of the task's JSON bodies."""
    if isinstance(value, JsonText):
        return value
    field = f"inputs.{name}"
    if known.maxOccurs != 1:
        if isinstance(value, dict) and "href" in value:
            return _reference(value, field)  # a link to the list of all values
        return [_plain(one, f"{field}.{n}") for n, one in enumerate(_each(value))]
    return _plain(value, field)


def _plain(value: object, field: str) -> Any:  # noqa: ANN401 - JSON
    """A value without its media type and encoding, or a reference to it."""
    if not isinstance(value, dict):
        return value
    if "href" in value:
        return _reference(value, field)
    if "value" not in value:
        return value
    media = value.get("mediaType")
    if media is not None:
        _chosen(str(media), (JSON, GEOJSON), f"{field}.mediaType")
    return value["value"]


def _reference(link: Mapping[str, Any], field: str) -> Reference:
    href = link["href"]
    if not isinstance(href, str) or not href:
        raise InvalidRequest.of(
            f"{field}.href", "a path, a `file:` URL or an `http(s):` URL is required"
        )
    return Reference(href=href, field=f"{field}.href")


def _file(value: object, field: str, kinds: Sequence[str]) -> Reference | Binary:
    """A file, as a link or a binary value."""
    text = value
    if isinstance(value, dict):
        if "href" in value:
            return _reference(value, field)
        text = value.get("value")
        if value.get("mediaType") is not None:
            _chosen(str(value["mediaType"]), kinds, f"{field}.mediaType")
        if value.get("encoding", "base64") != "base64":
            raise InvalidRequest.of(f"{field}.encoding", "only 'base64' is supported")
    if not isinstance(text, str):
        raise InvalidRequest.of(field, 'a link {"href": …} or a base64 value is required')
    return Binary(text=text, field=field)


def _vector(value: object) -> Reference | Binary | dict[str, Any]:
    """Polygons: GeoJSON as an object, another format as a file, or a link to either."""
    field = "inputs.fields"
    if isinstance(value, dict) and "href" not in value:
        inner = value.get("value", value)
        if isinstance(inner, dict):
            return inner
    return _file(value, field, VECTOR_TYPES)
