"""Exceptions of the SDK: one class for each error code of the server.

    your files → Client → transport → server → response → Raster, Results, Summary, Job
                 │        │           │         │                                  │
                 ValueError           │         UnexpectedAnswer, GeoTIFFError     JobFailed, …
                          TransportError
                                      ServiceError

    PIMCError
    ├── TransportError             no response: connection failed or broke, or time limit
    │   ├── ConnectionFailed
    │   └── TimedOut
    ├── UnexpectedAnswer           a response that no route of the server sends
    ├── GeoTIFFError               a result that `Raster.array` cannot decode
    ├── StackError                 a STAC API or one of its files cannot be read
    ├── JobError                   a job without a result
    │   ├── JobFailed, JobDismissed
    │   └── WaitTimedOut           job still running at the end of the time limit
    └── ServiceError               an error response: status, code, detail, request_id, errors
        ├── RequestError
        │   ├── InvalidRequest, WrongTask, UnsupportedMedia, NotAcceptable
        │   ├── Unauthorized
        │   ├── ForbiddenReference, UnreachableReference
        │   ├── NotFound, MethodNotAllowed, UnknownModel, UnknownJob
        │   ├── ResultNotReady, InvalidRange
        │   ├── UnknownProcess, ResultsNotReady
        │   ├── BodyTooLarge, BodyStalled
        │   ├── NotAVectorFile, InvalidFields, TooManyFields
        │   ├── TooFewLabels, NameTaken
        │   └── MalformedRequest, UriTooLong, HeaderTooLarge, HeadStalled
        ├── RasterError
        │   ├── NotAGeoTIFF, CorruptRaster, NoGeoreference, GridMismatch
        │   ├── MissingBands, MissingDates, TooFewDates
        │   ├── ImplausibleReflectance, WrongSensor
        │   └── RasterTooLarge
        ├── Overloaded             at capacity, nothing was started; see `retry_after`
        ├── TooManyRequests        the caller's quota is used up; see `retry_after`
        ├── InsufficientStorage    the server's disk is full
        ├── NotReady               the models are being loaded; see `retry_after`
        └── InternalError          a fault of the server; its log has the request id

An error code without a class in this version is raised as a plain `ServiceError` with that `code`.
Invalid arguments raise `ValueError`, `TypeError` or `FileNotFoundError` before anything is sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pimc_client.retry import seconds_to_wait


def _rebuild(kind: type[PIMCError], args: tuple[Any, ...], state: dict[str, Any]) -> PIMCError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class PIMCError(Exception):
    """Any error of this package."""

    # By default, unpickling calls `kind(*args)`, which fails with keyword-only arguments. A process
    # pool in which a call fails would then break.
    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class TransportError(PIMCError):
    """No response arrived; `__cause__` is httpx's own error."""


class ConnectionFailed(TransportError):
    """The server was not reached, or the connection broke."""


class TimedOut(TransportError):
    """The server was silent for longer than the client's `timeout`."""


class UnexpectedAnswer(PIMCError):
    """A response that no route of the server sends: check the base URL."""


class GeoTIFFError(PIMCError):
    """A TIFF is damaged, or has a form that the server does not write."""


class StackError(PIMCError):
    """A STAC API, or a file that an item of it names, cannot be read."""


class JobError(PIMCError):
    """A job has no result."""

    def __init__(self, message: str, *, job_id: str) -> None:
        super().__init__(message)
        self.job_id = job_id


class JobFailed(JobError):
    """The job failed, and the server gives no reason."""


class JobDismissed(JobError):
    """The job was cancelled."""


class WaitTimedOut(JobError, TimeoutError):
    """The job was still running at the end of the time limit; it continues to run."""


class ServiceError(PIMCError):
    """The server responded with an error.

    Attributes:
        status: the HTTP status.
        code: the error's code, such as `grid_mismatch`; stable, for programs to branch on.
        detail: what is wrong: the file or parameter, what was given and what is allowed.
        request_id: the request's id in the server's log; None if the server sent none.
        errors: each parameter that failed validation, as `{"field", "detail"}`.
        retry_after: seconds of the server's `Retry-After`, None without one.
    """

    known_code: ClassVar[str | None] = None

    def __init__(
        self,
        detail: str,
        *,
        status: int,
        code: str,
        request_id: str | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.errors = tuple(errors)
        self.retry_after = retry_after

    def __str__(self) -> str:
        text = f"{self.code}: {self.detail}"
        return f"{text} [request {self.request_id}]" if self.request_id else text


class RequestError(ServiceError):
    """The request itself cannot be served."""


class InvalidRequest(RequestError):
    """A parameter fails validation; `errors` lists each."""

    known_code = "invalid_request"


class WrongTask(RequestError):
    """The requested model is of another task."""

    known_code = "wrong_task"


class UnsupportedMedia(RequestError):
    """The endpoint does not accept the body's media type."""

    known_code = "unsupported_media_type"


class NotAcceptable(RequestError):
    """The server cannot respond with any of the media types requested."""

    known_code = "not_acceptable"


class Unauthorized(RequestError):
    """An API key is required, and none or a wrong one was sent."""

    known_code = "unauthorized"


class MalformedRequest(RequestError):
    """The server could not read the request as HTTP."""

    known_code = "malformed_request"


class UriTooLong(RequestError):
    """The request's path and query are over the server's limit."""

    known_code = "uri_too_long"


class HeaderTooLarge(RequestError):
    """The request's headers are over the server's limit."""

    known_code = "header_too_large"


class HeadStalled(RequestError):
    """The request's headers did not arrive in time."""

    known_code = "head_stalled"


class NotAVectorFile(RequestError):
    """The fields are not a readable GeoJSON, GeoPackage or GeoParquet file."""

    known_code = "not_a_vector_file"


class InvalidFields(RequestError):
    """No feature of the fields holds a polygon."""

    known_code = "invalid_fields"


class TooManyFields(RequestError):
    """The request has more fields than the server accepts."""

    known_code = "too_many_fields"


class TooFewLabels(RequestError):
    """Fewer than two classes, or too few usable labels of one."""

    known_code = "too_few_labels"


class NameTaken(RequestError):
    """A model of that name exists."""

    known_code = "name_taken"


class ForbiddenReference(RequestError):
    """An href is outside the roots and hosts that the server may read."""

    known_code = "forbidden_reference"


class UnreachableReference(RequestError):
    """An href is allowed, but its host does not return the file."""

    known_code = "unreachable_reference"


class NotFound(RequestError):
    """The server has no such path: check the base URL."""

    known_code = "not_found"


class MethodNotAllowed(RequestError):
    """The path does not support the method: check the base URL."""

    known_code = "method_not_allowed"


class UnknownModel(RequestError):
    """The server has no model of that name and version."""

    known_code = "unknown_model"


class UnknownJob(RequestError):
    """The server has no job of that id."""

    known_code = "unknown_job"


class ResultNotReady(RequestError):
    """The job is not finished."""

    known_code = "result_not_ready"


class UnknownProcess(RequestError):
    """No process of this name, in requests of OGC API - Processes."""

    known_code = "unknown_process"


class ResultsNotReady(RequestError):
    """The job is not finished, in requests of OGC API - Processes."""

    known_code = "results_not_ready"


class InvalidRange(RequestError):
    """The requested range is not within the result."""

    known_code = "invalid_range"


class BodyTooLarge(RequestError):
    """The request is over the server's upload limit."""

    known_code = "body_too_large"


class BodyStalled(RequestError):
    """The upload stopped before its end."""

    known_code = "body_stalled"


class RasterError(ServiceError):
    """The files are not a usable stack."""


class NotAGeoTIFF(RasterError):
    """A file is not a TIFF."""

    known_code = "not_a_geotiff"


class CorruptRaster(RasterError):
    """The header of a file can be read, but its pixels cannot."""

    known_code = "corrupt_raster"


class NoGeoreference(RasterError):
    """A file has no CRS or no transform."""

    known_code = "no_georeference"


class GridMismatch(RasterError):
    """The files differ in CRS, transform or size."""

    known_code = "grid_mismatch"


class MissingBands(RasterError):
    """The stack lacks bands that the model needs."""

    known_code = "missing_bands"


class MissingDates(RasterError):
    """A file or band has no date."""

    known_code = "missing_dates"


class TooFewDates(RasterError):
    """The stack has fewer dates in the model's time window than the model needs."""

    known_code = "too_few_dates"


class ImplausibleReflectance(RasterError):
    """The values cannot be reflectance; set `scale` and `offset`."""

    known_code = "implausible_reflectance"


class WrongSensor(RasterError):
    """The imagery comes from a sensor that the model was not trained on."""

    known_code = "wrong_sensor"


class RasterTooLarge(RasterError):
    """The raster exceeds the server's limit on decoded size."""

    known_code = "raster_too_large"


class Overloaded(ServiceError):
    """The server is at capacity; it started nothing, and retries failed as well."""

    known_code = "overloaded"


class TooManyRequests(ServiceError):
    """The quota of the API key, or of the address, is used up; nothing was started."""

    known_code = "too_many_requests"


class InsufficientStorage(ServiceError):
    """The server's disk has no room for the body, the job or the result."""

    known_code = "insufficient_storage"


class NotReady(ServiceError):
    """The server is loading its models, and retries failed as well."""

    known_code = "not_ready"


class InternalError(ServiceError):
    """A fault of the server; its log has the request id."""

    known_code = "internal_error"


def _leaves(kind: type[ServiceError]) -> dict[str, type[ServiceError]]:
    found = {kind.known_code: kind} if kind.known_code else {}
    for child in kind.__subclasses__():
        found |= _leaves(child)
    return found


BY_CODE: Mapping[str, type[ServiceError]] = _leaves(ServiceError)
"""Error code to exception class."""


def service_error(status: int, headers: Mapping[str, str], body: bytes) -> ServiceError:
    """The exception for an error response, written by the server or by a proxy before it.

    Args:
        status: HTTP status, 400 or more.
        headers: the response's headers; keys in lower case, or a mapping that ignores case.
        body: an `application/problem+json` document, or any other content.
    """
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {}
    return problem_error(problem, status=status, headers=headers)


def _unexplained(status: int, headers: Mapping[str, str]) -> str:
    kind = headers.get("content-type", "").partition(";")[0]
    return (
        f"HTTP {status} without a problem document ({kind or 'no content type'}): a proxy or "
        "gateway in front of the server may have responded"
    )


def problem_error(
    problem: Mapping[str, Any], *, status: int, headers: Mapping[str, str]
) -> ServiceError:
    """The exception for a problem document (RFC 9457)."""
    code = str(problem.get("code", "unknown"))
    errors = problem.get("errors")
    return BY_CODE.get(code, ServiceError)(
        str(problem.get("detail") or problem.get("title") or _unexplained(status, headers)),
        status=int(problem.get("status", status)),
        code=code,
        request_id=problem.get("request_id") or headers.get("x-request-id"),
        errors=[e for e in errors if isinstance(e, Mapping)] if isinstance(errors, list) else (),
        retry_after=seconds_to_wait(headers.get("retry-after")),
    )
