"""Error responses: `application/problem+json` (RFC 9457) for every 4xx and 5xx."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from service.api.schemas.validation import invalid_request
from service.errors import (
    STATUS,
    Cancelled,
    InternalError,
    InvalidRange,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    NotReady,
    Overloaded,
    PIMCError,
    TooManyRequests,
    Unauthorized,
    no_descriptors,
    no_room,
    shown,
)
from service.telemetry import TRACE_ID

PROBLEM = "application/problem+json"
_OGC = "http://www.opengis.net/def/exceptions/ogcapi-processes-1/1.0"
_TYPES: Mapping[str, str] = {
    "unknown_process": f"{_OGC}/no-such-process",
    "unknown_job": f"{_OGC}/no-such-job",
    "result_not_ready": f"{_OGC}/result-not-ready",
    "results_not_ready": f"{_OGC}/result-not-ready",
}
"""Types that OGC API - Processes names; the others are this service's own."""
METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
_LOG = logging.getLogger(__name__)
_CLOSED = 499  # nginx's status for a client that has disconnected


def add_handlers(app: FastAPI) -> None:
    """Register handlers that convert every error into a problem document."""
    app.add_exception_handler(PIMCError, _on_error)
    app.add_exception_handler(OSError, _on_system)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Cancelled, _on_disconnect)


def problem(
    request: Request, error: PIMCError, headers: Mapping[str, str] | None = None
) -> Response:
    """The response for an error.

    Args:
        request: the request.
        error: the error.
        headers: further headers of the response.
    """
    request.state.code = error.code
    if isinstance(error, TooManyRequests):
        request.state.violated = error.policy
    body = problem_document(error, request.state.request_id)
    return JSONResponse(
        body,
        status_code=body["status"],
        headers={**(headers or {}), **_headers(error)},
        media_type=PROBLEM,
    )


def problem_document(error: PIMCError, request_id: str) -> dict[str, Any]:
    """An error as a problem document (RFC 9457).

    Args:
        error: the error.
        request_id: id of the request, by which the log can be searched.
    """
    body: dict[str, Any] = {
        "type": _TYPES.get(error.code, f"urn:pimc:problem:{error.code}"),
        "title": error.title,
        "status": STATUS[error.code],
        "detail": error.detail,
        "code": error.code,
        "request_id": request_id,
    }
    trace_id = TRACE_ID.get()
    if trace_id is not None:
        body["trace_id"] = trace_id
    if isinstance(error, TooManyRequests):
        body["violated-policies"] = [error.policy]
    if isinstance(error, InvalidRequest):
        body["errors"] = [dict(e) for e in error.errors]
    return body


def fault(request: Request) -> Response:
    """The response for an unexpected error, without internal details."""
    detail = (
        "internal error: report the request_id to the server's administrator, whose log has the "
        "cause under it"
    )
    return problem(request, InternalError(detail))


def _headers(error: PIMCError) -> dict[str, str]:
    if isinstance(error, Overloaded | NotReady | TooManyRequests):
        return {"Retry-After": str(error.retry_after)}
    if isinstance(error, InvalidRange):
        return {"Content-Range": f"bytes */{error.size}"}
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": 'Bearer realm="pimc"'}
    return {}


def _on_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, PIMCError) or STATUS[error.code] == STATUS[InternalError.code]:
        _LOG.error("internal error", exc_info=error)
        return fault(request)
    return problem(request, error)


def _on_system(request: Request, error: Exception) -> Response:
    """Handle errors of the operating system: a full disk, no free descriptors, or others."""
    known = no_room(error) or no_descriptors(error)
    if known is None:
        _LOG.error("unexpected error", exc_info=error)
        return fault(request)
    _LOG.error(known.title.lower(), exc_info=error)
    return problem(request, known)


def _on_http(request: Request, error: Exception) -> Response:
    """Handle errors that Starlette raises."""
    if not isinstance(error, HTTPException):
        return fault(request)
    path = shown(request.scope["path"])
    if error.status_code == STATUS[NotFound.code]:
        return problem(
            request,
            NotFound(f"there is no path {path}: GET /openapi.json lists the paths of this service"),
        )
    if error.status_code == STATUS[MethodNotAllowed.code]:
        allowed = ", ".join(_allowed(request))
        detail = f"{path} supports {allowed}, not {request.method}"
        return problem(request, MethodNotAllowed(detail), {"Allow": allowed})
    return problem(request, InvalidRequest(str(error.detail)))


def _allowed(request: Request) -> list[str]:
    """The methods that a path supports; Starlette's own error names those of one route only."""
    # A path that supports GET supports HEAD.
    scopes = {
        method: {**request.scope, "method": "GET" if method == "HEAD" else method}
        for method in METHODS
    }
    return [
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    ]


def _on_validation(request: Request, error: Exception) -> Response:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    # The first part of FastAPI's location is its source: "query", "path".
    return problem(request, invalid_request([{**e, "loc": e["loc"][1:]} for e in found]))


def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLOSED)
