"""Job routes: status, results, dismissal.

A status document is OGC API - Processes' `statusInfo`. A caller sees only its own jobs; another
caller's job is unknown to it.
"""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from starlette.responses import JSONResponse

from service.api.auth import share_of
from service.api.dependencies import KNOWN_CALLER, READER, App, AppState, Caller, root_of
from service.api.negotiation import negotiate
from service.api.openapi import FILE, ITEM_FILE, RESULT, STAC_COLLECTION, problems
from service.api.problems import problem
from service.api.responses import (
    GEOJSON,
    PARQUET,
    derived_file,
    offers,
    stored_response,
    whole_file,
)
from service.api.schemas import JobInfo, JobList, Link
from service.errors import NotFound, ResultNotReady
from service.infer.smooth import MAX_RADIUS
from service.jobs.serialise import StoredResult
from service.jobs.store import Job, removed
from service.run.derive import Cleaning, check_derivable, derive_map
from service.run.request import RasterRequest
from service.write.predictions import POLYGONS
from service.write.stac_item import item_of

_RESULTS = "http://www.opengis.net/def/rel/ogc/1.0/results"
_MANY = 1000
router = APIRouter(tags=["jobs"], dependencies=[KNOWN_CALLER])


@router.get(
    "/jobs",
    response_model=JobList,
    responses={
        200: {"content": {GEOJSON: {"schema": STAC_COLLECTION}}},
        **problems(["unauthorized", "invalid_request", "unknown_job", "internal_error"]),
    },
)
async def list_jobs(
    request: Request,
    app: App,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=_MANY, description="largest number of jobs")] = _MANY,
    cursor: Annotated[
        str | None, Query(max_length=64, description="id of the last job of the page before")
    ] = None,
) -> JobList | Response:
    """The caller's jobs, the newest first; as STAC Items of their results if `Accept` asks so."""
    found = await to_thread.run_sync(partial(app.jobs.latest, caller or "", limit, before=cursor))
    here = f"{root_of(request)}/jobs"
    links = [_link(here, "self", "this list")]
    if len(found) == limit:
        links.append(_link(f"{here}?limit={limit}&cursor={found[-1].id}", "next", "older jobs"))
    accept = request.headers.get("accept", "")
    if negotiate(accept, ("application/json", GEOJSON), lenient=True) == GEOJSON:
        items = await to_thread.run_sync(_items, app, found, here)
        listed = [{**link.model_dump(exclude_none=True), "type": GEOJSON} for link in links]
        document = {"type": "FeatureCollection", "features": items, "links": listed}
        return JSONResponse(document, media_type=GEOJSON, headers={"Vary": "Accept"})
    return JobList(jobs=[info(job, request) for job in found], links=links)


@router.get("/jobs/{job_id}", responses=problems(["unauthorized", "unknown_job", "internal_error"]))
async def read_job(job_id: str, request: Request, app: App, caller: Caller) -> JobInfo:
    """The status of a job."""
    return info(await _find(app, caller, job_id), request)


@router.delete(
    "/jobs/{job_id}",
    responses=problems(["unauthorized", "unknown_job", "insufficient_storage", "internal_error"]),
)
async def dismiss_job(job_id: str, request: Request, app: App, caller: Caller) -> JobInfo:
    """Dismiss a waiting or running job, or remove the result of a finished one."""
    return info(await to_thread.run_sync(app.runner.dismiss, caller or "", job_id), request)


@router.get(
    "/jobs/{job_id}/result", responses=dict(RESULT), response_class=Response, dependencies=[READER]
)
async def read_result(job_id: str, request: Request, app: App, caller: Caller) -> Response:
    """The result of a job, as the synchronous response; or the problem that it failed with."""
    job = await _find(app, caller, job_id)
    if job.status == "failed":
        return problem(request, job.error)
    stored = await to_thread.run_sync(app.jobs.request, job)
    media = negotiate(request.headers.get("accept", ""), offers(stored))
    result = await to_thread.run_sync(app.jobs.result, job)
    make = partial(stored_response, app.jobs, job, result, media)
    return await to_thread.run_sync(make, limiter=app.downloads.makers)


@router.get(
    "/jobs/{job_id}/result/item.json",
    responses=dict(ITEM_FILE),
    response_class=Response,
    dependencies=[READER],
)
async def read_item(job_id: str, request: Request, app: App, caller: Caller) -> Response:
    """The STAC Item of a job's rasters, with links to them."""
    job = await _find(app, caller, job_id)
    if job.status == "failed":
        return problem(request, job.error)
    result = await to_thread.run_sync(app.jobs.result, job)
    item = await to_thread.run_sync(_linked_item, result, f"{root_of(request)}/jobs/{job.id}")
    if item is None:
        raise NotFound(
            f"job {job.id} has no STAC Item: its result is not a raster, or its imagery has no date"
        )
    return JSONResponse(item, media_type=GEOJSON)


def _items(app: AppState, jobs: Sequence[Job], here: str) -> list[dict[str, Any]]:
    """The items of those jobs that have one."""
    found = []
    for job in jobs:
        with suppress(ResultNotReady):  # one that is removed meanwhile is no longer listed
            if job.status == "successful":
                found.append(_linked_item(app.jobs.result(job), f"{here}/{job.id}"))
    return [item for item in found if item is not None]


def _linked_item(result: StoredResult, here: str) -> dict[str, Any] | None:
    """A job's item, its rasters linked where the server has them; None without an item."""
    raster = next(iter(result.files.values()), None)
    if raster is None or not item_of(raster).exists():
        return None
    item: dict[str, Any] = json.loads(item_of(raster).read_bytes())
    for name, asset in list(item["assets"].items()):
        if name in result.files:
            asset["href"] = f"{here}/result/{name}"
        elif asset["href"].startswith("./"):
            del item["assets"][name]  # beside the raster in the zip alone
    item["links"] = [
        {"rel": "alternate", "href": f"{here}/result/item.json", "type": GEOJSON},
        {"rel": "via", "href": here, "type": "application/json", "title": "the job"},
    ]
    return item


@router.get(
    "/jobs/{job_id}/result/{output}",
    responses=dict(FILE),
    response_class=Response,
    dependencies=[READER],
)
async def read_output(
    job_id: str,
    output: str,
    request: Request,
    app: App,
    caller: Caller,
    smooth: Annotated[
        int,
        Query(
            ge=0,
            le=MAX_RADIUS,
            description="of `class` and `polygons`: radius in pixels of a smoothing of the "
            "finished map; the job must hold `probabilities`",
        ),
    ] = 0,
    min_area: Annotated[
        float,
        Query(
            ge=0,
            allow_inf_nan=False,
            description="of `class` and `polygons`: hectares below which an area joins a neighbour",
        ),
    ] = 0.0,
) -> Response:
    """One raster of a job's result, or its polygons; `smooth`, `min_area` derive a cleaner map."""
    job = await _find(app, caller, job_id)
    if job.status == "failed":
        return problem(request, job.error)
    result = await to_thread.run_sync(app.jobs.result, job)
    if (smooth or min_area) and output in {"class", POLYGONS}:
        how = Cleaning(smooth=smooth, min_area=min_area)
        derive = partial(_derived, app, job, result, how, output)
        # A run slot: the work is that of a run.
        async with app.admission.runs.slot(share_of(caller, request.scope)):
            path = await to_thread.run_sync(derive)
        return derived_file(path, output, result, missing=removed(job))
    if output not in result.files:
        there = ", ".join(result.files) or "none, as the result is not a raster"
        raise NotFound(f"job {job.id} has no output '{output[:64]}'; available: {there}")
    if output == POLYGONS:
        media = negotiate(request.headers.get("accept", ""), (PARQUET, GEOJSON), lenient=True)
        make = partial(stored_response, app.jobs, job, result, media)
        return await to_thread.run_sync(make, limiter=app.downloads.makers)
    return whole_file(result, output, missing=removed(job))


def _derived(
    app: AppState,
    job: Job,
    result: StoredResult,
    how: Cleaning,
    output: str,
) -> Path:
    """A map or polygons derived from a result, made once."""
    asked = app.jobs.request(job)
    before = asked.smooth or 0 if isinstance(asked, RasterRequest) else 0
    most = app.settings.sync_max_pixels
    check_derivable(result.files, how, smoothed_by=before, most_pixels=most)
    suffix = ".parquet" if output == POLYGONS else ".tif"
    name = f"{output}-{how.name}{suffix}"
    return app.jobs.ready(job, name, partial(derive_map, result.files, how, output))


async def _find(app: AppState, caller: str | None, job_id: str) -> Job:
    return await to_thread.run_sync(app.jobs.find, caller or "", job_id)


def accepted(job: Job, request: Request, *, applied: str) -> Response:
    """The response to a request that became a job.

    Args:
        job: the new one, or the first request's if this repeats it.
        request: to which links are relative.
        applied: preferences that the job follows; empty for none.
    """
    # Without scheme and host, so that a client resolves it against the address that it used.
    headers = {"Location": f"{root_of(request)}/jobs/{job.id}"}
    if applied:
        headers["Preference-Applied"] = applied
    return JSONResponse(
        info(job, request).model_dump(mode="json"), status_code=202, headers=headers
    )


def info(job: Job, request: Request) -> JobInfo:
    """A job as its status document."""
    here = f"{root_of(request)}/jobs/{job.id}"
    links = [_link(here, "self", "this document")]
    if job.status == "successful":
        links.append(_link(f"{here}/result", _RESULTS, "the result", kind=None))
    return JobInfo(
        jobID=job.id,
        processID=job.task,
        status=job.status,
        message=job.error.detail if job.status == "failed" else None,
        progress=job.progress,
        created=_moment(job.created),
        started=None if job.started is None else _moment(job.started),
        finished=None if job.finished is None else _moment(job.finished),
        updated=_moment(job.updated),
        links=links,
    )


def _link(href: str, rel: str, title: str, kind: str | None = "application/json") -> Link:
    return Link(href=href, rel=rel, type=kind, title=title)


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
