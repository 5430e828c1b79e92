"""Errors: the exception tree, each leaf with a stable code, and the status of each code.

    request → files → stack → window of values → predictions → result → response
       │                │
       RequestError     RasterError

    PIMCError
    ├── RequestError
    │   ├── InvalidRequest                   a parameter fails validation
    │   │   └── MaskNotInAllFiles            some dates lack a cloud mask (`service.read.arrange`)
    │   ├── WrongTask                        the named model serves another task
    │   ├── UnsupportedMedia, NotAcceptable  a body or response of an unsupported type
    │   ├── Unauthorized
    │   ├── ForbiddenReference, UnreachableReference
    │   ├── NotFound, MethodNotAllowed, UnknownModel, UnknownJob, UnknownProcess
    │   ├── ResultNotReady, ResultsNotReady  the job is not finished
    │   ├── InvalidRange                     `Range` is not within the file
    │   ├── BodyTooLarge                     over the upload limit
    │   ├── BodyStalled                      the upload was too slow
    │   ├── NotAVectorFile, InvalidFields, TooManyFields    the file of `fields` or `labels`
    │   ├── TooFewLabels, NameTaken          own classes
    │   └── MalformedRequest, UriTooLong, HeaderTooLarge, HeadStalled    the head of the request
    ├── RasterError                          the content of the files
    │   ├── NotAGeoTIFF, CorruptRaster, NoGeoreference, GridMismatch
    │   ├── MissingBands, MissingDates, TooFewDates
    │   ├── ImplausibleReflectance, WrongSensor
    │   └── RasterTooLarge
    ├── Overloaded                           slots, memory, descriptors or the store are in use
    │   └── StorageUnreachable               of uploads and results (`service.jobs.storage`)
    ├── TooManyRequests                      the caller's quota is used up; nothing was started
    ├── NotReady                             models are missing or loading, or the server stops
    ├── InsufficientStorage                  the disk is full
    └── InternalError                        a fault of the server

The errors are independent of HTTP; only `STATUS` gives each code its status. A message names the
file or parameter, both sides of the conflict and the remedy.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

MOST_ERRORS = 20
"""Largest number of parameters that one error lists."""
_TEXT_LENGTH = 100
"""Largest number of characters of a client's text in a message."""
_MESSAGE_LENGTH = 4_000
"""Largest number of characters of a message. Messages shorten a client's text themselves; this
bound holds for those that do not."""


class PIMCError(Exception):
    """Any error that is reported to the client.

    Args:
        detail: message for people: the file or parameter, both sides of the conflict, the remedy.
    """

    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str) -> None:
        self.detail = shown(detail, _MESSAGE_LENGTH)
        super().__init__(self.detail)

    @staticmethod
    def of_code(code: str, detail: str, errors: Sequence[Mapping[str, str]] = ()) -> PIMCError:
        """Restore a stored error from its code.

        Args:
            code: the code; an unknown one becomes `internal_error`.
            detail: message of the error.
            errors: `{"field", "detail"}` of each invalid parameter, with `invalid_request`.
        """
        kinds: list[type[PIMCError]] = [PIMCError]
        for kind in kinds:
            kinds += kind.__subclasses__()
        # Not a subclass that inherits the code, whose arguments may be others.
        stated = (k for k in kinds if k is not PIMCError and vars(k).get("code") == code)
        kind = next(stated, InternalError)
        return kind(detail, errors) if issubclass(kind, InvalidRequest) else kind(detail)


class RequestError(PIMCError):
    """The request itself cannot be served."""


class InvalidRequest(RequestError):
    """A parameter fails validation.

    Args:
        detail: message for people.
        errors: `{"field", "detail"}` of each parameter that fails.
    """

    code = "invalid_request"
    title = "Invalid request"

    def __init__(self, detail: str, errors: Sequence[Mapping[str, str]] = ()) -> None:
        super().__init__(detail)
        self.errors = tuple(
            {"field": shown(one["field"]), "detail": shown(one["detail"], _MESSAGE_LENGTH)}
            for one in errors[:MOST_ERRORS]
        )

    @classmethod
    def of(cls, field: str, detail: str) -> Self:
        """The error of one parameter.

        Args:
            field: name of the parameter.
            detail: message without the name.
        """
        return cls(f"{field}: {detail}", [{"field": field, "detail": detail}])


class WrongTask(RequestError):
    """The named model serves another task."""

    code = "wrong_task"
    title = "Wrong task"


class UnsupportedMedia(RequestError):
    """The endpoint does not read bodies of this media type."""

    code = "unsupported_media_type"
    title = "Unsupported media type"


class NotAcceptable(RequestError):
    """No media type in `Accept` is available."""

    code = "not_acceptable"
    title = "Not acceptable"


class Unauthorized(RequestError):
    """The API key is missing, wrong or expired."""

    code = "unauthorized"
    title = "Unauthorized"


class ForbiddenReference(RequestError):
    """An `href` is outside the allowed roots and hosts."""

    code = "forbidden_reference"
    title = "Forbidden reference"


class UnreachableReference(RequestError):
    """The host of an allowed href does not return the file.

    Args:
        detail: message for people; names the host.
        later: whether the host may return the file later: it does not respond, or is busy.
    """

    code = "unreachable_reference"
    title = "Unreachable reference"

    def __init__(self, detail: str, *, later: bool = False) -> None:
        super().__init__(detail)
        self.later = later


class NotFound(RequestError):
    """The path does not exist."""

    code = "not_found"
    title = "Not found"


class MethodNotAllowed(RequestError):
    """The path does not support the method."""

    code = "method_not_allowed"
    title = "Method not allowed"


class UnknownModel(RequestError):
    """No model has the given name and version."""

    code = "unknown_model"
    title = "Unknown model"


class UnknownJob(RequestError):
    """The caller has no job with the given id."""

    code = "unknown_job"
    title = "Unknown job"


class UnknownProcess(RequestError):
    """No process of that id."""

    code = "unknown_process"
    title = "Unknown process"


class ResultNotReady(RequestError):
    """The job has no result: it waits, runs, was dismissed or has expired."""

    code = "result_not_ready"
    title = "Result not ready"


class ResultsNotReady(RequestError):
    """The job is not finished: OGC API - Processes gives this the status 404."""

    code = "results_not_ready"
    title = "Results not ready"


class BodyTooLarge(RequestError):
    """The body exceeds the upload limit."""

    code = "body_too_large"
    title = "Body too large"


class BodyStalled(RequestError):
    """The upload was slower than the minimum rate."""

    code = "body_stalled"
    title = "Body stalled"


class NotAVectorFile(RequestError):
    """The file of `fields` or `labels` is not GeoJSON, GeoPackage or GeoParquet, or is damaged."""

    code = "not_a_vector_file"
    title = "Not a vector file"


class InvalidFields(RequestError):
    """No feature of `fields` holds a polygon, or none of `labels` a point or polygon."""

    code = "invalid_fields"
    title = "Invalid fields"


class TooManyFields(RequestError):
    """The request holds more polygons or labels than are allowed."""

    code = "too_many_fields"
    title = "Too many fields"


class TooFewLabels(RequestError):
    """There are too few classes, or too few usable labels of a class, to fit a model."""

    code = "too_few_labels"
    title = "Too few labels"


class NameTaken(RequestError):
    """A model of the given name exists already."""

    code = "name_taken"
    title = "Name taken"


class MalformedRequest(RequestError):
    """The request is not valid HTTP/1.1."""

    code = "malformed_request"
    title = "Malformed request"


class UriTooLong(RequestError):
    """The request's path and query exceed their limit."""

    code = "uri_too_long"
    title = "URI too long"


class HeaderTooLarge(RequestError):
    """The request's headers exceed their limit."""

    code = "header_too_large"
    title = "Header too large"


class HeadStalled(RequestError):
    """The request's headers did not arrive in time."""

    code = "head_stalled"
    title = "Head stalled"


class InvalidRange(RequestError):
    """`Range` is not valid, or not within the file.

    Args:
        detail: message for people.
        size: size of the file, bytes.
    """

    code = "invalid_range"
    title = "Invalid range"

    def __init__(self, detail: str, size: int = 0) -> None:
        super().__init__(detail)
        self.size = size


class RasterError(PIMCError):
    """The files do not make a usable stack."""


class NotAGeoTIFF(RasterError):
    """The file is neither a GeoTIFF nor a JP2, or its GDAL driver cannot open it."""

    code = "not_a_geotiff"
    title = "Not a GeoTIFF"


class CorruptRaster(RasterError):
    """The file's header is readable, but its pixels are not."""

    code = "corrupt_raster"
    title = "Corrupt raster"


class NoGeoreference(RasterError):
    """The file has no CRS or no transform."""

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
    """The time window holds fewer dates than the card's `min_observations`."""

    code = "too_few_dates"
    title = "Too few dates"


class ImplausibleReflectance(RasterError):
    """The median of the clear pixels is outside -0.2 to 1.6 after scale and offset."""

    code = "implausible_reflectance"
    title = "Implausible reflectance"


class WrongSensor(RasterError):
    """The images come from a sensor that the model was not trained on."""

    code = "wrong_sensor"
    title = "Wrong sensor"


class RasterTooLarge(RasterError):
    """The decoded size, computed from the headers, exceeds the limit."""

    code = "raster_too_large"
    title = "Raster too large"


class Overloaded(PIMCError):
    """Other requests use the slots, memory, file descriptors or job store that this one needs.

    A running job waits until they are free instead of failing.

    Args:
        detail: message for people.
        retry_after: seconds after which a client may retry.
        uncertain: whether a change may have been stored all the same, because the connection to the
            job store's database broke while it was.
    """

    code = "overloaded"
    title = "Overloaded"

    def __init__(self, detail: str, retry_after: int = 5, *, uncertain: bool = False) -> None:
        super().__init__(detail)
        self.retry_after = retry_after
        self.uncertain = uncertain


class TooManyRequests(PIMCError):
    """The caller's quota is used up; nothing was started.

    Args:
        detail: message for people: the amount in use, and the quota.
        policy: name of the quota.
        retry_after: seconds after which a client may retry.
    """

    code = "too_many_requests"
    title = "Too many requests"

    def __init__(self, detail: str, policy: str = "", retry_after: int = 60) -> None:
        super().__init__(detail)
        self.policy = policy
        self.retry_after = retry_after


class NotReady(PIMCError):
    """A model is missing or still loading, or the server is stopping.

    Args:
        detail: message for people.
        retry_after: seconds after which a client may retry.
    """

    code = "not_ready"
    title = "Not ready"

    def __init__(self, detail: str, retry_after: int = 5) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class InsufficientStorage(PIMCError):
    """The server's disk is full: a body, a job or a result cannot be stored."""

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
    "unknown_process": 404,
    "results_not_ready": 404,
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
    """The error for a full disk; None if the operating system reported another error."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return InsufficientStorage(
            f"the server's disk is full ({os.strerror(error.errno).lower()}): the administrator "
            "must free space; nothing of this request is kept"
        )
    return None


def no_descriptors(error: BaseException) -> Overloaded | None:
    """The error for exhausted file descriptors; None if descriptors are free.

    GDAL and SQLite report only that a file does not open. After such an error this function tries
    to open a file itself.
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
        "the server has no free file descriptors: too many files and connections are open at once; "
        "retry later, or have the administrator raise the limit (ulimit -n, LimitNOFILE)"
    )


@dataclass(frozen=True, kw_only=True)
class StackWarning:
    """A finding about the input that does not stop the run."""

    code: str
    """Stable code, such as `merged_dates`."""
    detail: str
    """Message for people."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", shown(self.detail, _MESSAGE_LENGTH))


def warning_list(warnings: Iterable[StackWarning]) -> list[Any]:
    """Warnings as JSON, as responses and summaries contain them."""
    return [{"code": warning.code, "detail": warning.detail} for warning in warnings]


def first_names(names: Sequence[object], most: int) -> str:
    """Names for a message: at most a number of them, and how many more there are."""
    more = len(names) - most
    first = ", ".join(shown(name) for name in names[:most])
    return f"{first} and {more} more" if more > 0 else first


def shown(value: object, most: int = _TEXT_LENGTH) -> str:
    """A client's text for a message or the log, without its middle if it is long.

    Args:
        value: the text, or a value whose text is shown.
        most: largest number of characters of the text that are kept.
    """
    text = str(value)
    left_out = len(text) - most
    if left_out <= 0:
        return text
    end = most // 4
    return f"{text[: most - end]}… ({left_out} characters left out) …{text[-end:]}"


class Cancelled(Exception):
    """The run was cancelled; none of its files remain."""
