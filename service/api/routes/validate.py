"""Validation route: the errors, warnings and estimate of a request, without running it."""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
import threading
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.api.dependencies import KNOWN_CALLER, App, AppState, Caller, Folder
from service.api.disconnect import run_watched
from service.api.openapi import VALIDATION_ERRORS, problems, validation_body
from service.api.routes.tasks import begin_request, check_query, planned, read_request, run_slot
from service.api.schemas.response_bodies import Estimate, Seconds, ValidationResponse, WarningEntry
from service.run.plan import Plan
from service.run.request import RasterRequest, Runnable, TaskRequest
from service.run.validate import Validation, problem_document, rough_pace, validation
from service.telemetry import Pace

router = APIRouter(tags=["tasks"], dependencies=[KNOWN_CALLER])


@router.post("/validate", responses=problems(VALIDATION_ERRORS), openapi_extra=validation_body())
async def validate(
    request: Request,
    app: App,
    folder: Folder,
    caller: Caller,
    task: Annotated[Runnable, Query(description="the task for which the body is a request")],
) -> ValidationResponse:
    """Check a request without running it: errors, warnings, estimated size and time."""
    check_query(request, {"task"})
    share = begin_request(request, app, caller)
    async with app.admission.admit(share) as admitted:
        # Validation reads the headers and a sample.
        parsed = await read_request(
            task, request, app, folder, None, admitted, caller or "", on_demand=True
        )
        run = partial(_validated, app, task, parsed, caller or "")
        found, pace = await run_watched(request, run, slot=run_slot(app, share))
    return _response(app, task, found, pace)


def _validated(
    app: AppState, task: Runnable, parsed: TaskRequest, owner: str, *, cancelled: threading.Event
) -> tuple[Validation, Pace | None]:
    def plan(request: TaskRequest) -> Plan:
        rasters = isinstance(request, RasterRequest) and not request.of_places
        return planned(app, request, rasters=rasters, owner=owner, cancelled=cancelled)

    found = validation(parsed, plan, window_bytes=app.budget.window_bytes, cancelled=cancelled)
    model = app.engine.named(found.model, owner) if found.model else None
    if model is None:
        return found, None
    pace = app.metrics.pace(task, found.pixels, of=found.predicts_for)
    return found, pace or rough_pace(found, model)


def _response(
    app: AppState, task: Runnable, found: Validation, pace: Pace | None
) -> ValidationResponse:
    if found.problems:
        problems = [problem_document(problem) for problem in found.problems]
        return ValidationResponse(valid=False, task=task, problem=problems[0], problems=problems)
    return ValidationResponse(
        valid=True,
        task=task,
        model=found.model,
        warnings=[WarningEntry(code=w.code, detail=w.detail) for w in found.warnings],
        estimate=Estimate(
            pixels=found.pixels,
            dates=found.dates,
            read_bytes=found.read_bytes,
            memory_bytes=found.memory_bytes,
            becomes_a_job=found.raster_pixels > app.settings.sync_max_pixels,
            seconds=None
            if pace is None
            else Seconds(shortest=pace.shortest, longest=pace.longest, runs=pace.runs),
        ),
    )
