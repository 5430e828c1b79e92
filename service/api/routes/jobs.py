"""Job routes: status, results, dismissal.

A status document is OGC API - Processes' `statusInfo`. A caller sees only its own jobs; another
caller's job is unknown to it.
"""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from starlette.responses import JSONResponse

from service.api.dependencies import KNOWN_CALLER, READER, App, AppState, Caller, root_of
from service.api.negotiation import negotiate
from service.api.openapi import FILE, RESULT, problems
from service.api.problems import problem
from service.api.responses import offers, stored_response, whole_raster
from service.api.schemas import JobInfo, JobList, Link
from service.errors import NotFound
from service.jobs.store import Job, removed

_RESULTS = "http://www.opengis.net/def/rel/ogc/1.0/results"
_MANY = 1000
router = APIRouter(tags=["jobs"], dependencies=[KNOWN_CALLER])


@router.get(
    "/jobs",
    responses=problems(["unauthorized", "invalid_request", "unknown_job", "internal_error"]),
)
async def list_jobs(
    request: Request,
    app: App,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=_MANY, description="largest number of jobs")] = _MANY,
    cursor: Annotated[
        str | None, Query(max_length=64, description="id of the last job of the page before")
    ] = None,
) -> JobList:
    """The caller's jobs, the newest first."""
    found = await to_thread.run_sync(partial(app.jobs.latest, caller or "", limit, before=cursor))
    here = f"{root_of(request)}/jobs"
    links = [_link(here, "self", "this list")]
    if len(found) == limit:
        links.append(_link(f"{here}?limit={limit}&cursor={found[-1].id}", "next", "older jobs"))
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
    asked = await to_thread.run_sync(app.jobs.request, job)
    media = negotiate(request.headers.get("accept", ""), offers(asked))
    result = await to_thread.run_sync(app.jobs.result, job)
    make = partial(stored_response, app.jobs, job, result, media)
    return await to_thread.run_sync(make, limiter=app.downloads.makers)


@router.get(
    "/jobs/{job_id}/result/{output}",
    responses=dict(FILE),
    response_class=Response,
    dependencies=[READER],
)
async def read_output(
    job_id: str, output: str, request: Request, app: App, caller: Caller
) -> Response:
    """One raster of a job's result."""
    job = await _find(app, caller, job_id)
    if job.status == "failed":
        return problem(request, job.error)
    result = await to_thread.run_sync(app.jobs.result, job)
    if output not in result.files:
        there = ", ".join(result.files) or "none, as the result is not a raster"
        raise NotFound(f"job {job.id} has no output '{output[:64]}'; available: {there}")
    return whole_raster(result, output, missing=removed(job))


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
