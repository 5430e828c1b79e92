"""Validation: the error or warnings and the size of a request, without running it.

Validation reads as much as planning does: the files' headers and a sample of their pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from service.errors import InvalidRequest, PIMCError, RasterError, RequestError, StackWarning
from service.run.collect import run_warnings
from service.run.plan import Plan, RasterRun, unique
from service.run.series import SeriesRun


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The outcome of planning a request."""

    problem: PIMCError | None
    """The error with which the request is rejected; None if the request can run."""
    warnings: tuple[StackWarning, ...] = ()
    model: str | None = None
    """The model, as `name@version`."""
    pixels: int = 0
    """Pixels, points, fields or series to predict for."""
    dates: int = 0
    """Number of the stack's dates that the run uses; 0 for series, each of which has its own."""
    read_bytes: int = 0
    """Decoded bytes of the used dates and bands, over the whole raster."""
    memory_bytes: int = 0
    """Memory that the run takes from the memory budget, bytes."""


def validation(plan: Callable[[], Plan]) -> Validation:
    """Plan a request and return the outcome.

    Args:
        plan: plans the request.

    Returns:
        The outcome; an error of the request or its files becomes its `problem`.

    Raises:
        PIMCError: an error with another cause.
    """
    try:
        planned = plan()
    except (RequestError, RasterError) as error:
        return Validation(problem=error)
    run = planned.run
    if isinstance(run, SeriesRun):
        return Validation(
            problem=None,
            warnings=run.warnings,
            model=planned.model.card.id,
            pixels=len(run.series),
        )
    return _of_raster(planned, run)


def _of_raster(planned: Plan, run: RasterRun) -> Validation:
    grid = run.stack.grid
    fields = planned.fields
    points = getattr(planned.request, "points", None)
    # Similarity is of the whole raster; its places are in `fields`.
    whole = fields is None or run.similar_to is not None
    count = planned.pixels if whole else len(fields or ())
    return Validation(
        problem=None,
        warnings=unique((*run_warnings(run), *(fields.warnings if fields else ()))),
        model=planned.model.card.id,
        pixels=count if points is None else len(points),
        dates=len(run.used),
        read_bytes=grid.width * grid.height * run.pixel_bytes,
        memory_bytes=planned.need.total if planned.need else 0,
    )


def problem_document(error: PIMCError) -> dict[str, object]:
    """An error as JSON: `code`, `detail`, and `errors` for an invalid request."""
    errors = [dict(one) for one in error.errors] if isinstance(error, InvalidRequest) else []
    return {"code": error.code, "detail": error.detail, "errors": errors}
