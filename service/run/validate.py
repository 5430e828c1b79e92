"""Validation: the error or warnings and the size of a request, without running it.

Validation reads as much as planning does: the files' headers and a sample of their pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from service.errors import (
    InvalidFields,
    InvalidRequest,
    MissingBands,
    MissingDates,
    NotAGeoTIFF,
    NotAVectorFile,
    PIMCError,
    RasterError,
    RequestError,
    StackWarning,
    TooFewDates,
    TooManyFields,
    UnknownModel,
    WrongSensor,
    WrongTask,
)
from service.infer.model import LoadedModel
from service.infer.patches import PatchGrid
from service.read.geotiff import SourceFile, side_file
from service.read.layouts import StackOptions
from service.read.stack import read_headers
from service.run.collect import run_warnings
from service.run.coverage import FieldGrid
from service.run.executors import check
from service.run.fields import field_windows
from service.run.plan import Kind, Plan, RasterRun, unique
from service.run.request import RasterRequest, SeriesRequest, TaskRequest
from service.run.series import SeriesRun
from service.run.windows import WINDOW_BYTES
from service.telemetry import Pace


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The outcome of planning a request."""

    problems: tuple[PIMCError, ...] = ()
    """The errors that the request is rejected with, in the order found; empty if it can run."""
    warnings: tuple[StackWarning, ...] = ()
    model: str | None = None
    """The model, as `name@version`."""
    predicts_for: Kind = "raster"
    pixels: int = 0
    """Pixels, points or series to predict for; for fields the pixels of the windows that hold one,
    which the run reads."""
    raster_pixels: int = 0
    """Pixels of the raster, by which a request becomes a job; 0 for points and series."""
    predictions: int = 0
    """Pixels or patches that the model predicts for."""
    files: int = 0
    """Files that the run opens."""
    dates: int = 0
    """Number of the stack's dates that the run uses; 0 for series, each of which has its own."""
    read_bytes: int = 0
    """Bytes of the values that are read of the used dates and bands; for points those of the whole
    raster, which is the most that they read."""
    memory_bytes: int = 0
    """Memory that the run takes from the memory budget, bytes."""


def validation(
    request: TaskRequest,
    plan: Callable[[TaskRequest], Plan],
    *,
    window_bytes: int = WINDOW_BYTES,
    cancelled: threading.Event | None = None,
) -> Validation:
    """Plan a request and describe the outcome.

    After a problem the request is planned again without what the problem is about, as long as
    that can be left out, so that problems that do not follow from each other are all found.

    Args:
        request: the request.
        plan: plans a request; errors of the request and its files are part of the outcome, and
            all others are raised.
        window_bytes: memory of one window of a run.
        cancelled: an event that ends the validation when it is set.

    Raises:
        Cancelled: `cancelled` was set.
    """
    problems: list[PIMCError] = []
    consequences: tuple[type[PIMCError], ...] = ()
    files_missing = False
    candidate: TaskRequest | None = request
    while candidate is not None and len(problems) < _MOST_PROBLEMS:
        try:
            planned = plan(candidate)
        except (RequestError, RasterError) as error:
            if isinstance(error, consequences) or (files_missing and _of_arrangement(error)):
                break
            problems.append(error)
            if isinstance(error, UnknownModel | WrongTask):
                consequences += _OF_THE_MODEL
            if isinstance(error, NotAGeoTIFF):
                files_missing = True
                consequences += _OF_MISSING_FILES
                problems += _other_files(candidate, error, cancelled)
            candidate = _without(candidate, error, cancelled)
        else:
            break
    if problems:
        return Validation(problems=tuple(problems[:_MOST_PROBLEMS]))
    run = planned.run
    if isinstance(run, SeriesRun):
        return Validation(
            warnings=run.warnings,
            model=planned.model.card.id,
            predicts_for=planned.predicts_for,
            pixels=len(run.series),
            predictions=len(run.series),
            memory_bytes=planned.need.total,
        )
    return _of_raster(planned, run, window_bytes, cancelled)


_Given = TypeVar("_Given", RasterRequest, SeriesRequest, StackOptions)
_MOST_PROBLEMS = 20
_OF_THE_MODEL = (MissingBands, TooFewDates, WrongSensor, InvalidRequest)
"""Problems that another model may not have: not reported once the requested one is left out."""
_OF_MISSING_FILES = (MissingBands, MissingDates, TooFewDates)
"""Problems that files may have because others are left out."""
_PARAMETERS = frozenset({"start", "outputs", "horizon", "stride", "smooth", "min_area", "dtype"})
_OF_THE_STACK = frozenset({"grid", "bbox", "area", "mask", "scale", "offset"})


def _of_arrangement(error: PIMCError) -> bool:
    """Whether an error is about parameters that count or name the files."""
    about = {"dates", "bands", "files", "grid", "layout"}
    return isinstance(error, InvalidRequest) and any(e["field"] in about for e in error.errors)


def _without(
    request: TaskRequest, error: PIMCError, cancelled: threading.Event | None
) -> TaskRequest | None:
    """A request without what an error is about; None if it needs that, or does not have it."""
    if isinstance(error, UnknownModel | WrongTask):
        return None if request.model is None else replace(request, model=None)
    named = {one["field"] for one in error.errors} if isinstance(error, InvalidRequest) else set()
    if isinstance(request, SeriesRequest):
        return _cleared(request, named & {"start", "horizon"})
    if isinstance(error, NotAVectorFile | InvalidFields | TooManyFields) or "fields" in named:
        # Similarity cannot be planned without its places.
        return replace(request, fields=None) if request.fields is not None else None
    if isinstance(error, NotAGeoTIFF):
        files = tuple(file for file in request.files if _fault(file, cancelled) is None)
        return replace(request, files=files) if files and files != request.files else None
    stack = _cleared(request.stack, named & _OF_THE_STACK)
    cleared = _cleared(request, named & _PARAMETERS)
    return cleared if stack is None else replace(cleared or request, stack=stack)


def _cleared(value: _Given, names: Set[str]) -> _Given | None:
    """A request or its options with some parameters not given; None if none of them is."""
    given: dict[str, Any] = {name: None for name in names if getattr(value, name) is not None}
    return replace(value, **given) if given else None


def _other_files(
    request: TaskRequest, first: PIMCError, cancelled: threading.Event | None
) -> list[PIMCError]:
    """The errors of further files that are not GeoTIFFs."""
    files = request.files if isinstance(request, RasterRequest) else ()
    found = [error for file in files if (error := _fault(file, cancelled)) is not None]
    # The first error names the others as well.
    return [error for error in found if not first.detail.startswith(error.detail)]


def _fault(file: SourceFile, cancelled: threading.Event | None) -> NotAGeoTIFF | None:
    """Why a file cannot be read; None if it can, or is left out beside rasters."""
    check(cancelled)
    if side_file(file):
        return None
    try:
        read_headers([file])
    except NotAGeoTIFF as error:
        return error
    except RasterError:
        return None  # found again when the request is planned
    return None


def _of_raster(
    planned: Plan, run: RasterRun, window_bytes: int, cancelled: threading.Event | None
) -> Validation:
    fields = planned.fields
    pixels = read = run.stack.grid.width * run.stack.grid.height
    if planned.predicts_for == "points":
        pixels = len(getattr(planned.request, "points", ()))
    elif planned.predicts_for == "fields" and fields is not None:
        on_grid = FieldGrid(fields, run.stack.grid)
        parts = field_windows(run, on_grid, window_bytes, cancelled)
        pixels = read = sum(int(part.width * part.height) for part in parts)
    predictions, card = pixels, planned.model.card
    if card.modality == "patch" and planned.predicts_for == "raster":
        patches = PatchGrid.over(run.stack.grid, side=card.patch or 0, stride=run.stride)
        predictions = patches.grid.width * patches.grid.height
    return Validation(
        warnings=unique((*run_warnings(run), *(fields.warnings if fields else ()))),
        model=planned.model.card.id,
        predicts_for=planned.predicts_for,
        pixels=pixels,
        raster_pixels=planned.pixels,
        predictions=predictions,
        files=len(run.stack.paths),
        dates=len(run.used),
        read_bytes=read * run.pixel_bytes,
        memory_bytes=planned.need.total,
    )


_MARGIN = 3.0
"""Factor by which the time of a batch may differ from that of a prediction in a run."""
_READ_RATES = 2e7, 2e9
"""Bytes per second that a slow and a fast machine decode."""
_FILE_SECONDS = 0.02
"""Seconds in which a slow machine opens a file."""
_OVERHEAD_SECONDS = 1.0
"""Seconds of the rest of a run on a slow machine."""


def rough_pace(found: Validation, model: LoadedModel) -> Pace:
    """Estimate the duration of a run before the first one, from one batch of the model.

    The range is wide: what reading takes is not measured.

    Args:
        found: the outcome of a request that can run.
        model: the model of the request.

    Raises:
        InternalError: ONNX Runtime failed.
    """
    infer = found.predictions * model.seconds_each()
    slow, fast = _READ_RATES
    return Pace(
        shortest=max(infer / _MARGIN, found.read_bytes / fast),
        longest=infer * _MARGIN
        + found.read_bytes / slow
        + found.files * _FILE_SECONDS
        + _OVERHEAD_SECONDS,
        runs=0,
    )


def problem_document(error: PIMCError) -> dict[str, object]:
    """An error as JSON: `code`, `detail`, and `errors` for an invalid request."""
    errors = [dict(one) for one in error.errors] if isinstance(error, InvalidRequest) else []
    return {"code": error.code, "detail": error.detail, "errors": errors}
