"""Validation: what a request would be rejected or warned for, and its size, without running it.

Only headers and the sample of pixels that every plan reads are read.
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
    """What planning a request shows."""

    problem: PIMCError | None
    """What the request is rejected for; None if it can run."""
    warnings: tuple[StackWarning, ...] = ()
    model: str | None = None
    """As `name@version`."""
    pixels: int = 0
    """Pixels, points, fields or series to predict for."""
    dates: int = 0
    """Dates used of a raster; 0 for series, which have their own."""
    read_bytes: int = 0
    """Decoded bytes of the dates and bands used, of the whole raster."""
    memory_bytes: int = 0
    """Memory that the run takes from the budget."""


def validation(plan: Callable[[], Plan]) -> Validation:
    """Plan a request and describe the outcome.

    Args:
        plan: plans the request; errors of the request and its files are part of the outcome, and
            all others are raised.
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
            pixels=len(run.ready),
        )
    return _of_raster(planned, run)


def _of_raster(planned: Plan, run: RasterRun) -> Validation:
    grid = run.stack.grid
    fields = planned.fields
    points = getattr(planned.request, "points", None)
    count = planned.pixels if fields is None else len(fields)
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
    """An error as validation responses hold it."""
    errors = [dict(one) for one in error.errors] if isinstance(error, InvalidRequest) else []
    return {"code": error.code, "detail": error.detail, "errors": errors}
