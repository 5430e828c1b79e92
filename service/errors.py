"""Errors: the exception tree, each leaf with a stable code, and the status of each code.

    request → files → stack → window of values → predictions → result → response
       │                │
       RequestError     RasterError

    PIMCError
    ├── RequestError
    │   ├── InvalidRequest                   a field fails validation
    │   ├── WrongTask                        the model named serves another task
    │   ├── UnsupportedMedia, NotAcceptable  a body or response of an unsupported type
    │   ├── Unauthorized
    │   ├── ForbiddenReference, UnreachableReference
    │   ├── NotFound, MethodNotAllowed, UnknownModel, UnknownJob
    │   ├── ResultNotReady                   the job is not finished
    │   ├── InvalidRange                     `Range` is not within the file
    │   ├── BodyTooLarge                     over the upload limit
    │   ├── BodyStalled                      the upload stopped half way
    │   ├── NotAVectorFile, InvalidFields, TooManyFields    what `fields` holds
    │   ├── TooFewLabels, NameTaken          own classes
    │   └── MalformedRequest, UriTooLong, HeaderTooLarge, HeadStalled    the head of the request
    ├── RasterError                          the content of the files
    │   ├── NotAGeoTIFF, CorruptRaster, NoGeoreference, GridMismatch
    │   ├── MissingBands, MissingDates, TooFewDates
    │   ├── ImplausibleReflectance, WrongSensor
    │   └── RasterTooLarge
    ├── Overloaded                           slots, memory, descriptors or the store are in use
    ├── TooManyRequests                      the caller's share is used up; nothing was started
    ├── NotReady                             models are missing or loading, or the server stops
    ├── InsufficientStorage                  the disk is full
    └── InternalError                        a fault of the server

The errors are independent of HTTP; only `STATUS` gives each code its status. A message names the
file or parameter and both sides of the conflict.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


class PIMCError(Exception):
    """Any error that is reported to the client."""

    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    @staticmethod
    def of_code(code: str, detail: str, errors: Sequence[Mapping[str, str]] = ()) -> PIMCError:
        """Restore a stored error from its code."""
        kinds: list[type[PIMCError]] = [PIMCError]
        for kind in kinds:
            kinds += kind.__subclasses__()
        kind = next((k for k in kinds if k.code == code and not k.__subclasses__()), InternalError)
        return kind(detail, errors) if issubclass(kind, InvalidRequest) else kind(detail)


class RequestError(PIMCError):
    """The request itself cannot be served."""


class InvalidRequest(RequestError):
    """A field fails validation; `errors` lists each as `{"field", "detail"}`."""

    code = "invalid_request"
    title = "Invalid request"

    def __init__(self, detail: str, errors: Sequence[Mapping[str, str]] = ()) -> None:
        super().__init__(detail)
        self.errors = tuple(errors)

    @classmethod
    def of(cls, field: str, detail: str) -> InvalidRequest:
        """The error of one field."""
        return cls(f"{field}: {detail}", [{"field": field, "detail": detail}])


class WrongTask(RequestError):
    """The model named serves another task."""

    code = "wrong_task"
    title = "Wrong task"


class UnsupportedMedia(RequestError):
    """A body of a type that the endpoint does not read."""

    code = "unsupported_media_type"
    title = "Unsupported media type"


class NotAcceptable(RequestError):
    """No type in `Accept` is available."""

    code = "not_acceptable"
    title = "Not acceptable"


class Unauthorized(RequestError):
    """The API key is missing or wrong."""

    code = "unauthorized"
    title = "Unauthorized"


class ForbiddenReference(RequestError):
    """An href outside the allowed roots and hosts."""

    code = "forbidden_reference"
    title = "Forbidden reference"


class UnreachableReference(RequestError):
    """The host of an allowed href does not return the file."""

    code = "unreachable_reference"
    title = "Unreachable reference"


class NotFound(RequestError):
    """No such path."""

    code = "not_found"
    title = "Not found"


class MethodNotAllowed(RequestError):
    """The path has no such method."""

    code = "method_not_allowed"
    title = "Method not allowed"


class UnknownModel(RequestError):
    """No model of that name and version."""

    code = "unknown_model"
    title = "Unknown model"


class UnknownJob(RequestError):
    """No job of that id."""

    code = "unknown_job"
    title = "Unknown job"


class ResultNotReady(RequestError):
    """The job is not finished."""

    code = "result_not_ready"
    title = "Result not ready"


class BodyTooLarge(RequestError):
    """The body exceeds the upload limit."""

    code = "body_too_large"
    title = "Body too large"


class BodyStalled(RequestError):
    """The upload stalled while it held a queue slot."""

    code = "body_stalled"
    title = "Body stalled"


class NotAVectorFile(RequestError):
    """Not GeoJSON, GeoPackage or GeoParquet, or one that does not read."""

    code = "not_a_vector_file"
    title = "Not a vector file"


class InvalidFields(RequestError):
    """No feature holds a polygon."""

    code = "invalid_fields"
    title = "Invalid fields"


class TooManyFields(RequestError):
    """More fields than one request may hold."""

    code = "too_many_fields"
    title = "Too many fields"


class TooFewLabels(RequestError):
    """Too few classes, or too few usable labels of a class, to learn from."""

    code = "too_few_labels"
    title = "Too few labels"


class NameTaken(RequestError):
    """A model of that name exists."""

    code = "name_taken"
    title = "Name taken"


class MalformedRequest(RequestError):
    """The request is not HTTP."""

    code = "malformed_request"
    title = "Malformed request"


class UriTooLong(RequestError):
    """The request's path and query are over their limit."""

    code = "uri_too_long"
    title = "URI too long"


class HeaderTooLarge(RequestError):
    """The request's headers are over their limit."""

    code = "header_too_large"
    title = "Header too large"


class HeadStalled(RequestError):
    """The request's headers did not come in time."""

    code = "head_stalled"
    title = "Head stalled"


class InvalidRange(RequestError):
    """`Range` is not valid, or not within the file."""

    code = "invalid_range"
    title = "Invalid range"

    def __init__(self, detail: str, size: int = 0) -> None:
        """State the file's size.

        Args:
            detail: for the client.
            size: of the file, bytes.
        """
        super().__init__(detail)
        self.size = size


class RasterError(PIMCError):
    """The files do not make a usable stack."""


class NotAGeoTIFF(RasterError):
    """Not a TIFF that GDAL's GTiff driver opens."""

    code = "not_a_geotiff"
    title = "Not a GeoTIFF"


class CorruptRaster(RasterError):
    """The header is readable, the pixels are not."""

    code = "corrupt_raster"
    title = "Corrupt raster"


class NoGeoreference(RasterError):
    """No CRS or no transform."""

    code = "no_georeference"
    title = "No georeference"


class GridMismatch(RasterError):
    """Files differ in CRS, transform or size."""

    code = "grid_mismatch"
    title = "Grid mismatch"


class MissingBands(RasterError):
    """A band that the model needs is missing."""

    code = "missing_bands"
    title = "Missing bands"


class MissingDates(RasterError):
    """A file or band has no date."""

    code = "missing_dates"
    title = "Missing dates"


class TooFewDates(RasterError):
    """Fewer dates in the window than the card's `min_observations`."""

    code = "too_few_dates"
    title = "Too few dates"


class ImplausibleReflectance(RasterError):
    """The median of the clear pixels lies outside -0.2 to 1.6 after scale and offset."""

    code = "implausible_reflectance"
    title = "Implausible reflectance"


class WrongSensor(RasterError):
    """Images of a sensor that the model was not trained on."""

    code = "wrong_sensor"
    title = "Wrong sensor"


class RasterTooLarge(RasterError):
    """The decoded size, judged from headers, exceeds the limit."""

    code = "raster_too_large"
    title = "Raster too large"


class Overloaded(PIMCError):
    """What the request needs is in use by others: a slot, memory, descriptors, the job store.

    A running job waits for it instead of failing.
    """

    code = "overloaded"
    title = "Overloaded"

    def __init__(self, detail: str, retry_after: int = 5) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class TooManyRequests(PIMCError):
    """The caller's share is used up; nothing was started.

    Args:
        detail: what is used, and what the share is.
        policy: name of the quota.
        retry_after: seconds.
    """

    code = "too_many_requests"
    title = "Too many requests"

    def __init__(self, detail: str, policy: str = "", retry_after: int = 60) -> None:
        super().__init__(detail)
        self.policy = policy
        self.retry_after = retry_after


class NotReady(PIMCError):
    """A model is missing or still loading, or the server is stopping."""

    code = "not_ready"
    title = "Not ready"

    def __init__(self, detail: str, retry_after: int = 5) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class InsufficientStorage(PIMCError):
    """The disk is full: a body, a job or a result cannot be stored."""

    code = "insufficient_storage"
    title = "Insufficient storage"


class InternalError(PIMCError):
    """A fault of the server; the log has the cause."""


STATUS: Mapping[str, int] = {
    "not_a_geotiff": 422,
    "corrupt_raster": 422,
    "no_georeference": 422,
    "grid_mismatch": 422,
    "missing_bands": 422,
    "missing_dates": 422,
    "too_few_dates": 422,
    "implausible_reflectance": 422,
    "wrong_sensor": 422,
    "raster_too_large": 413,
    "body_too_large": 413,
    "body_stalled": 408,
    "malformed_request": 400,
    "not_a_vector_file": 422,
    "invalid_fields": 422,
    "too_many_fields": 413,
    "too_few_labels": 422,
    "name_taken": 409,
    "head_stalled": 408,
    "uri_too_long": 414,
    "header_too_large": 431,
    "unknown_model": 404,
    "unknown_job": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "unsupported_media_type": 415,
    "wrong_task": 422,
    "invalid_request": 422,
    "result_not_ready": 409,
    "invalid_range": 416,
    "forbidden_reference": 403,
    "unreachable_reference": 422,
    "unauthorized": 401,
    "too_many_requests": 429,
    "overloaded": 503,
    "not_ready": 503,
    "insufficient_storage": 507,
    "internal_error": 500,
}
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})


def no_room(error: BaseException) -> InsufficientStorage | None:
    """The error for a full disk; None if the system's error is another."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return InsufficientStorage(f"the server's disk is full: {os.strerror(error.errno).lower()}")
    return None


def no_descriptors(error: BaseException) -> Overloaded | None:
    """The error for exhausted file descriptors; None if there are some.

    GDAL and SQLite state only that a file does not open, so after an error of theirs it is tried
    whether any file does.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and not any(os.strerror(n) in str(error) for n in _NO_DESCRIPTORS):
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as other:
            number = other.errno
        if number not in _NO_DESCRIPTORS:
            return None
    elif number is not None and number not in _NO_DESCRIPTORS:
        return None
    return Overloaded(
        "the server has no free file descriptors: too many files and connections are open at once "
        "(ulimit -n, LimitNOFILE)"
    )


@dataclass(frozen=True, kw_only=True)
class StackWarning:
    """Something suspicious that is not an error."""

    code: str
    detail: str


class Cancelled(Exception):
    """The run was cancelled; nothing of it is left."""
