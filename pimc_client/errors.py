"""What can go wrong, as exceptions; one class a code of the service.

    your files → Client → transport → service → answer → Raster, Results, Summary, Job
                 │        │           │         │                                  │
                 ValueError           │         UnexpectedAnswer, GeoTIFFError     JobFailed, …
                          TransportError
                                      ServiceError

    PIMCError
    ├── TransportError             no answer came: not reached, broken off, too slow
    │   ├── ConnectionFailed
    │   └── TimedOut
    ├── UnexpectedAnswer           an answer that is none of this service's
    ├── GeoTIFFError               a TIFF that `Raster.array` does not decode
    ├── JobError                   a job that brings no result
    │   ├── JobFailed, JobDismissed
    │   └── WaitTimedOut           still running after the time you gave it
    └── ServiceError               the service said no: status, code, detail, request_id, errors
        ├── RequestError
        │   ├── InvalidRequest, WrongTask, UnsupportedMedia, NotAcceptable
        │   ├── Unauthorized
        │   ├── ForbiddenReference, UnreachableReference
        │   ├── NotFound, MethodNotAllowed, UnknownModel, UnknownJob
        │   ├── ResultNotReady
        │   └── BodyTooLarge, BodyStalled
        ├── RasterError
        │   ├── NotAGeoTIFF, CorruptRaster, NoGeoreference, GridMismatch
        │   ├── MissingBands, MissingDates, TooFewDates
        │   ├── ImplausibleReflectance
        │   └── RasterTooLarge
        ├── Overloaded             nothing was started; `retry_after` says when to come back
        ├── InsufficientStorage    the service's disk is full
        ├── NotReady               the models are still being loaded; likewise
        └── InternalError          the service's fault; its log has the request id

A code that this version does not know is a plain `ServiceError` with that `code`. Mistakes seen
before anything is sent are Python's own: `ValueError`, `TypeError`, `FileNotFoundError`.
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

    # Pickle calls `kind(*args)` by default, which keyword-only arguments break, and with it
    # every process pool in which a call fails.
    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class TransportError(PIMCError):
    """No answer came; the cause is httpx's own error."""


class ConnectionFailed(TransportError):
    """The service was not reached, or the connection broke off."""


class TimedOut(TransportError):
    """The service took longer than the client's `timeout`."""


class UnexpectedAnswer(PIMCError):
    """An answer that is none of this service's; is the address right?"""


class GeoTIFFError(PIMCError):
    """A TIFF that the reader of this package does not decode."""


class JobError(PIMCError):
    """A job that brings no result."""

    def __init__(self, message: str, *, job_id: str) -> None:
        super().__init__(message)
        self.job_id = job_id


class JobFailed(JobError):
    """The job ended in a failure that the service does not explain."""


class JobDismissed(JobError):
    """The job was cancelled."""


class WaitTimedOut(JobError, TimeoutError):
    """The job was still running after the time given; it goes on, and `wait` may be repeated."""


class ServiceError(PIMCError):
    """The service answered with an error.

    Attributes:
        status: the HTTP status.
        code: the error's name in the service, such as `grid_mismatch`; what to branch on.
        detail: what is wrong, naming the file or field and both sides of the conflict.
        request_id: what to quote to whoever runs the service; None where it sent none.
        errors: each field that failed validation, as `{"field", "detail"}`.
        retry_after: seconds after which the service asks to be tried again, None where it does not.
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
        said = f"{self.code}: {self.detail}"
        return f"{said} [request {self.request_id}]" if self.request_id else said


class RequestError(ServiceError):
    """The request itself cannot be served."""


class InvalidRequest(RequestError):
    """A field fails validation; `errors` lists each."""

    known_code = "invalid_request"


class WrongTask(RequestError):
    """The model named serves another task."""

    known_code = "wrong_task"


class UnsupportedMedia(RequestError):
    """A body of a type that the endpoint does not read."""

    known_code = "unsupported_media_type"


class NotAcceptable(RequestError):
    """The service answers none of the types asked for."""

    known_code = "not_acceptable"


class Unauthorized(RequestError):
    """Keys are required and none or a wrong one was sent."""

    known_code = "unauthorized"


class ForbiddenReference(RequestError):
    """An href outside the roots and hosts that the service may read."""

    known_code = "forbidden_reference"


class UnreachableReference(RequestError):
    """An href that is allowed, and whose host does not answer with the file."""

    known_code = "unreachable_reference"


class NotFound(RequestError):
    """No such path; is the base URL right?"""

    known_code = "not_found"


class MethodNotAllowed(RequestError):
    """The path has no such method; is the base URL right?"""

    known_code = "method_not_allowed"


class UnknownModel(RequestError):
    """The service has no model of that name and version."""

    known_code = "unknown_model"


class UnknownJob(RequestError):
    """The service has no job of that id."""

    known_code = "unknown_job"


class ResultNotReady(RequestError):
    """The job is not finished."""

    known_code = "result_not_ready"


class BodyTooLarge(RequestError):
    """Over the service's upload limit."""

    known_code = "body_too_large"


class BodyStalled(RequestError):
    """The upload stopped half way."""

    known_code = "body_stalled"


class RasterError(ServiceError):
    """The files do not make a usable stack."""


class NotAGeoTIFF(RasterError):
    """A file that is not a TIFF."""

    known_code = "not_a_geotiff"


class CorruptRaster(RasterError):
    """A file whose header opens and whose pixels do not."""

    known_code = "corrupt_raster"


class NoGeoreference(RasterError):
    """A file without a CRS or without a transform."""

    known_code = "no_georeference"


class GridMismatch(RasterError):
    """Files that differ in CRS, transform or size."""

    known_code = "grid_mismatch"


class MissingBands(RasterError):
    """Bands that the model needs are not there."""

    known_code = "missing_bands"


class MissingDates(RasterError):
    """A file or band has no date."""

    known_code = "missing_dates"


class TooFewDates(RasterError):
    """Fewer dates in the model's window than it needs."""

    known_code = "too_few_dates"


class ImplausibleReflectance(RasterError):
    """Values that are no reflectance; `scale` and `offset` say how to read them."""

    known_code = "implausible_reflectance"


class RasterTooLarge(RasterError):
    """Over the service's limit on decoded size."""

    known_code = "raster_too_large"


class Overloaded(ServiceError):
    """No place was free and nothing was started, however often it was retried."""

    known_code = "overloaded"


class InsufficientStorage(ServiceError):
    """The service's disk takes no more of a body, a job or an answer."""

    known_code = "insufficient_storage"


class NotReady(ServiceError):
    """The service is still loading its models, and was so however often it was retried."""

    known_code = "not_ready"


class InternalError(ServiceError):
    """The service's fault; its log has the request id."""

    known_code = "internal_error"


def _leaves(kind: type[ServiceError]) -> dict[str, type[ServiceError]]:
    found = {kind.known_code: kind} if kind.known_code else {}
    for child in kind.__subclasses__():
        found |= _leaves(child)
    return found


BY_CODE: Mapping[str, type[ServiceError]] = _leaves(ServiceError)
"""The class of each code."""


def service_error(status: int, headers: Mapping[str, str], body: bytes) -> ServiceError:
    """The exception of an error answer, whether the service or a proxy before it wrote it.

    Args:
        status: HTTP status, 400 or more.
        headers: the answer's headers; keys in lower case, or a mapping that ignores case.
        body: an `application/problem+json` document, or anything.
    """
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {}
    return problem_error(problem, status=status, headers=headers)


def problem_error(
    problem: Mapping[str, Any], *, status: int, headers: Mapping[str, str]
) -> ServiceError:
    """The exception of a problem document (RFC 9457)."""
    code = str(problem.get("code", "unknown"))
    errors = problem.get("errors")
    return BY_CODE.get(code, ServiceError)(
        str(problem.get("detail") or problem.get("title") or f"the answer was HTTP {status}"),
        status=int(problem.get("status", status)),
        code=code,
        request_id=problem.get("request_id") or headers.get("x-request-id"),
        errors=[e for e in errors if isinstance(e, Mapping)] if isinstance(errors, list) else (),
        retry_after=seconds_to_wait(headers.get("retry-after")),
    )
