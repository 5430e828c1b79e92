"""OpenAPI document: bodies, files and problems that FastAPI cannot derive from the routes.

All schemas come from the models of `service.api.schemas`, so that the document agrees with the
validation.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from anyio import to_thread
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.api.problems import PROBLEM
from service.api.responses import COG, CSV, GEOJSON, MULTIPART, PARQUET, ZIP
from service.api.schemas.forms import FORMS, HeadForm
from service.api.schemas.parameter_types import Operation
from service.api.schemas.request_bodies import (
    ITEMS,
    SERIES,
    STAC,
    Execute,
    HeadItems,
    HeadSeries,
    HeadStac,
)
from service.api.schemas.response_bodies import (
    HeadResponse,
    JobInfo,
    MeasuredResponse,
    PointsResponse,
    Problem,
    SeriesResponse,
    SummaryResponse,
)
from service.api.uploads import FILES, FORM, JSON
from service.errors import STATUS

DESCRIPTION = (
    "Land-cover classes, vegetation forecasts and embeddings from satellite image time series. "
    "Send the GeoTIFFs of a stack as `files`; `Accept` chooses between a COG, a zip and JSON."
)
_REF = "#/components/schemas/{model}"
_TASK_ERRORS = (
    "unauthorized", "forbidden_reference", "unreachable_reference", "unknown_model",
    "not_acceptable", "body_stalled", "body_too_large", "raster_too_large",
    "unsupported_media_type", "invalid_request", "wrong_task", "not_a_geotiff",
    "not_a_vector_file", "invalid_fields", "too_many_fields",
    "corrupt_raster", "no_georeference", "grid_mismatch",
    "missing_bands", "missing_dates", "too_few_dates", "implausible_reflectance", "overloaded",
    "too_many_requests", "not_ready", "insufficient_storage", "internal_error",
)  # fmt: skip
_HEADERS: Mapping[str, str] = {
    "X-Request-ID": "the request's id, which the server's log also states",
    "PIMC-Model": "the model that was used, as `name@version`",
    "PIMC-Provider": "the execution provider that computed the result",
    "Server-Timing": "milliseconds that the stages `read`, `infer` and `write` were busy",
    "PIMC-Warning": "`code; detail` of a warning; one header per warning",
    "RateLimit": "what remains of the caller's quotas, if the server has quotas",
    "RateLimit-Policy": "the caller's quotas, if the server has quotas",
}
_JOB_HEADERS: Mapping[str, str] = {
    "X-Request-ID": "the request's id, which the server's log also states",
    "Location": "the path of the job's status",
    "Preference-Applied": "`respond-async`, if `Prefer` requested it",
}
_BINARY: Mapping[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_MODELS: tuple[type[BaseModel], ...] = (
    *FORMS.values(),
    *ITEMS.values(),
    *STAC.values(),
    *SERIES.values(),
    Execute,
    HeadForm,
    HeadItems,
    HeadSeries,
    HeadStac,
    HeadResponse,
    SummaryResponse,
    SeriesResponse,
    PointsResponse,
    MeasuredResponse,
    Problem,
)


class DocumentedApp(FastAPI):
    """An application whose OpenAPI document includes models that no route declares."""

    _made: Mapping[str, bytes] = MappingProxyType({})

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - those of FastAPI
        super().__init__(**options)
        self._making = threading.Lock()

    async def description_of(self, root_path: str) -> bytes:
        """The OpenAPI document as JSON, built once, by the first request for it.

        Building takes half a second, so it runs in a thread while other requests are served.

        Args:
            root_path: path prefix that a proxy adds; the same for every request.
        """
        made = self._made.get(root_path)
        if made is not None:
            return made
        return await to_thread.run_sync(self._description, root_path)

    def _description(self, root_path: str) -> bytes:
        with self._making:
            made = self._made.get(root_path)
            if made is None:
                servers = {"servers": [{"url": root_path}]} if root_path else {}
                made = json.dumps({**self.openapi(), **servers}, separators=(",", ":")).encode()
                self._made = {root_path: made}
            return made

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, built once."""
        if self.openapi_schema:
            return self.openapi_schema
        document = super().openapi()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        _, defined = models_json_schema([(m, "validation") for m in _MODELS], ref_template=_REF)
        forms = {HeadForm.__name__, *(model.__name__ for model in FORMS.values())}
        for name, schema in defined["$defs"].items():
            schemas[name] = _form(schema) if name in forms else schema
        return document


def body(task: Operation) -> dict[str, Any]:
    """`openapi_extra` of a task's route: the bodies that it accepts."""
    content: dict[str, Any] = {
        FORM: {"schema": _ref(FORMS[task]), "encoding": {FILES: {"contentType": "image/tiff"}}}
    }
    bodies: list[type[BaseModel]] = [ITEMS[task], STAC[task]]
    if task in SERIES:
        bodies.append(SERIES[task])
    content[JSON] = {"schema": {"anyOf": [_ref(model) for model in bodies]}}
    return {"requestBody": {"required": True, "content": content}}


def validation_body() -> dict[str, Any]:
    """`openapi_extra` of `POST /validate`: the bodies of every task."""
    forms: list[type[BaseModel]] = [FORMS[task] for task in FORMS if task != "series"]
    documents: list[type[BaseModel]] = [ITEMS[task] for task in ITEMS if task != "series"]
    content = {
        FORM: {"schema": {"anyOf": [_ref(model) for model in forms]}},
        JSON: {"schema": {"anyOf": [_ref(m) for m in (*documents, *SERIES.values())]}},
    }
    return {"requestBody": {"required": True, "content": content}}


VALIDATION_ERRORS = _TASK_ERRORS
"""Codes of `POST /validate` for a body that cannot be read as a request: those of its task."""


def responses(task: Operation) -> dict[int | str, dict[str, Any]]:
    """`responses` of a task's route."""
    summaries: list[type[BaseModel]] = [SummaryResponse]
    if task in SERIES:
        summaries.append(SeriesResponse)
    return {
        200: _success(*summaries),
        202: {
            "description": "A job, because `Prefer` requests one or the raster is large",
            "headers": _described(_JOB_HEADERS),
            "content": {JSON: {"schema": _ref(JobInfo)}},
        },
        **problems(_TASK_ERRORS),
    }


def _success(*documents: type[BaseModel]) -> dict[str, Any]:
    return {
        "description": "The result, in the media type that `Accept` chooses",
        "headers": _described(_HEADERS),
        "content": {
            COG: _BINARY,
            ZIP: _BINARY,
            JSON: {"schema": {"anyOf": [_ref(model) for model in documents]}},
            GEOJSON: {"schema": _ref(PointsResponse)},
            CSV: {"schema": {"type": "string"}},
            PARQUET: _BINARY,
        },
    }


def _described(headers: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: {"description": text, "schema": {"type": "string"}} for name, text in headers.items()
    }


def problems(codes: Iterable[str]) -> dict[int | str, dict[str, Any]]:
    """`responses` for errors, by status, each naming its codes."""
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(STATUS[code], []).append(f"`{code}`")
    return {
        status: {
            "description": ", ".join(names),
            "content": {PROBLEM: {"schema": _ref(Problem)}},
        }
        for status, names in sorted(by_status.items())
    }


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


MEASURED: Mapping[int | str, dict[str, Any]] = {
    200: {
        "description": "The points or fields in their order, with lists by date as properties",
        "headers": _described(
            {
                **{n: _HEADERS[n] for n in ("X-Request-ID", "Server-Timing", "PIMC-Warning")},
                "PIMC-Model": "with `plots`: the model whose recurrence plots these are",
            }
        ),
        "content": {
            GEOJSON: {"schema": _ref(MeasuredResponse)},
            CSV: {"schema": {"type": "string"}},
            PARQUET: _BINARY,
        },
    },
    **problems(_TASK_ERRORS),
}
"""`responses` of measured series."""
# The result of a failed job is its problem, which may be any problem of a task.
_RESULT_ERRORS = (*_TASK_ERRORS, "unknown_job", "result_not_ready", "invalid_range")
RESULT: Mapping[int | str, dict[str, Any]] = {
    200: _success(SummaryResponse, SeriesResponse),
    **problems(_RESULT_ERRORS),
}
"""`responses` of a job's result."""
FILE: Mapping[int | str, dict[str, Any]] = {
    200: {
        "description": "The raster, the polygons, or a file beside the raster",
        "headers": _described(_HEADERS),
        "content": {
            COG: _BINARY,
            PARQUET: _BINARY,
            GEOJSON: {"schema": _ref(PointsResponse)},
            "application/xml": _BINARY,
        },
    },
    **problems((*_RESULT_ERRORS, "not_found")),
}
"""`responses` of one raster of a job's result."""

EXECUTION_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {JSON: {"schema": _ref(Execute)}}}
}
"""`openapi_extra` of an execution."""
_OUTPUTS: Mapping[int | str, dict[str, Any]] = {
    200: {
        "description": "The outputs: one as it is, several as parts, or all in a document",
        "headers": _described(_HEADERS),
        "content": {
            COG: _BINARY,
            MULTIPART: _BINARY,
            JSON: {"schema": {"type": "object"}},
            GEOJSON: {"schema": _ref(PointsResponse)},
            CSV: {"schema": {"type": "string"}},
            PARQUET: _BINARY,
        },
    },
    204: {
        "description": "Links to the outputs",
        "headers": _described({**_HEADERS, "Link": "an output, or the job that keeps them"}),
    },
}
EXECUTION: Mapping[int | str, dict[str, Any]] = {
    **_OUTPUTS,
    201: {
        "description": "A job, because `Prefer` requests it",
        "headers": _described(_JOB_HEADERS),
        "content": {JSON: {"schema": _ref(JobInfo)}},
    },
    **problems(
        (
            *(code for code in _TASK_ERRORS if code != "not_acceptable"),
            "unknown_process",
        )
    ),
}
"""`responses` of an execution."""
RESULTS: Mapping[int | str, dict[str, Any]] = {
    **_OUTPUTS,
    **problems((*_RESULT_ERRORS, "results_not_ready", "not_found")),
}
"""`responses` of the results of a job."""

STAC_ITEM: Mapping[str, Any] = {
    "type": "object",
    "description": "a STAC Item (1.1)",
    "required": ["type", "stac_version", "id", "properties", "assets", "links"],
    "properties": {"type": {"const": "Feature"}, "stac_version": {"const": "1.1.0"}},
}
STAC_COLLECTION: Mapping[str, Any] = {
    "type": "object",
    "description": "a STAC ItemCollection",
    "required": ["type", "features", "links"],
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {"type": "array", "items": STAC_ITEM},
    },
}
ITEM_FILE: Mapping[int | str, dict[str, Any]] = {
    200: {"description": "The item", "content": {GEOJSON: {"schema": STAC_ITEM}}},
    **problems((*_RESULT_ERRORS, "not_found")),
}
"""`responses` of the STAC Item of a job's result."""


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    """A form's schema with `files`, which is not a parameter of the model."""
    files = {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "minItems": 1,
        "description": "the GeoTIFF stack",
    }
    fields = {name: _without_null(field) for name, field in schema["properties"].items()}
    required = [FILES, *schema.get("required", ())]
    return {**schema, "properties": {FILES: files, **fields}, "required": required}


def _without_null(field: dict[str, Any]) -> dict[str, Any]:
    """A parameter's schema without null: a form leaves the parameter out instead."""
    kept = {key: value for key, value in field.items() if key != "anyOf"}
    if kept.get("default", ...) is None:
        del kept["default"]
    options = [option for option in field.get("anyOf", []) if option.get("type") != "null"]
    return {**kept, **options[0]} if len(options) == 1 else field


HEAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            FORM: {"schema": _ref(HeadForm), "encoding": {FILES: {"contentType": "image/tiff"}}},
            JSON: {"schema": {"anyOf": [_ref(HeadItems), _ref(HeadStac), _ref(HeadSeries)]}},
        },
    }
}
"""`openapi_extra` of `POST /heads`."""
HEAD: Mapping[int | str, dict[str, Any]] = {
    201: {
        "description": "The new model, which `/classify-pixels` serves at once",
        "headers": _described(
            {
                "Location": "the model's card",
                "PIMC-Model": "`name@version`",
                "PIMC-Provider": "the execution provider that runs the model",
                "Server-Timing": "milliseconds of `read` and of `infer`, which includes fitting",
            }
        ),
        "content": {JSON: {"schema": _ref(HeadResponse)}},
    },
    **problems(
        (
            *(code for code in _TASK_ERRORS if code != "not_acceptable"),
            "too_few_labels",
            "name_taken",
        )
    ),
}
"""`responses` of `POST /heads`."""
