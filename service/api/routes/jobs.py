"""Job routes: status, results, dismissal.

A status document is the `statusInfo` of OGC API - Processes. A caller can read only its own jobs;
for another caller's job the error is `unknown_job`.
"""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import MAXYEAR, UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from pydantic import AfterValidator, BeforeValidator, Field
from starlette.responses import JSONResponse

from service.api.admission import PATIENCE
from service.api.auth import share_of
from service.api.dependencies import KNOWN_CALLER, READER, App, AppState, Caller, root_of
from service.api.disconnect import run_watched
from service.api.negotiation import negotiate
from service.api.openapi import FILE, ITEM_FILE, RESULT, STAC_COLLECTION, problems
from service.api.problems import problem
from service.api.processes import Delivery, task_of
from service.api.responses import (
    COG,
    GEOJSON,
    PARQUET,
    derived_file,
    json_response,
    offers,
    on_this_machine,
    stored_response,
    whole_file,
    with_raster_headers,
    write_geojson,
)
from service.api.results import links_to
from service.api.schemas.parameter_types import interval, listed
from service.api.schemas.response_bodies import CallbackSecret, JobInfo, JobList, Link
from service.api.sending import StoredFile
from service.errors import InvalidRequest, NotFound, ResultNotReady, shown
from service.infer.smooth import MAX_RADIUS
from service.jobs.callbacks import caller_secret, secret_text
from service.jobs.job import Job, JobFilter, JobStatus, removed
from service.jobs.outbox import Event
from service.jobs.serialise import StoredResult, document_bytes
from service.jobs.storage import RemoteFile
from service.jobs.store import JobStore
from service.run.derive import Cleaning, check_derivable, derivation_need, derive_map
from service.run.request import RasterRequest
from service.write.legend import SIDECAR, sidecar_of, style_of
from service.write.predictions import POLYGONS
from service.write.stac_item import ITEM

_RESULTS = "http://www.opengis.net/def/rel/ogc/1.0/results"
_BESIDE = {".qml": style_of, f".tif{SIDECAR}": sidecar_of}
"""Files beside a raster, by what follows the output's name."""
_MANY = 1000
_ITEMS_AT_ONCE = 8
"""Items that are read at once for a list: each takes two requests if they are in a bucket."""
_LISTED = BeforeValidator(listed)
_Seconds = Annotated[int, Field(ge=0, le=2**31 - 1)]
router = APIRouter(tags=["jobs"], dependencies=[KNOWN_CALLER])


@router.get(
    "/jobs",
    response_model=JobList,
    response_model_exclude_none=True,
    responses={
        200: {"content": {GEOJSON: {"schema": STAC_COLLECTION}}},
        **problems(
            ["unauthorized", "invalid_request", "unknown_job", "unknown_process", "internal_error"]
        ),
    },
)
async def list_jobs(
    request: Request,
    app: App,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=_MANY, description="largest number of jobs")] = _MANY,
    cursor: Annotated[
        str | None, Query(max_length=64, description="id of the last job of the previous page")
    ] = None,
    kinds: Annotated[
        tuple[str, ...],
        _LISTED,
        Query(alias="type", description="`process`, the type of every job"),
    ] = (),
    processes: Annotated[
        tuple[str, ...], _LISTED, Query(alias="processID", description="only jobs of these tasks")
    ] = (),
    status: Annotated[
        tuple[JobStatus, ...], _LISTED, Query(description="only jobs of these statuses")
    ] = (),
    created: Annotated[
        str | None,
        AfterValidator(interval),
        Query(
            alias="datetime",
            max_length=100,
            description="only jobs created at this time or in this interval: two times separated "
            "by `/`, of which one may be `..`",
        ),
    ] = None,
    shortest: Annotated[
        tuple[_Seconds, ...],
        _LISTED,
        Query(alias="minDuration", description="only jobs that ran at least so many seconds"),
    ] = (),
    longest: Annotated[
        tuple[_Seconds, ...],
        _LISTED,
        Query(alias="maxDuration", description="only jobs that ran at most so many seconds"),
    ] = (),
) -> Response:
    """List the caller's jobs, newest first; as STAC Items for `Accept: application/geo+json`."""
    since, until = moments(created) if created else (None, None)
    which = JobFilter(
        tasks=tuple(map(task_of, processes)),
        statuses=status,
        since=since,
        until=until,
        shortest=max(shortest, default=None),
        longest=min(longest, default=None),
    )
    find = partial(app.jobs.latest, caller or "", limit, before=cursor, which=which)
    others = kinds and JobInfo.model_fields["type"].default not in kinds
    found = [] if others else await to_thread.run_sync(find)
    here = f"{root_of(request)}/jobs"
    query = [(k, v) for k, v in request.query_params.multi_items() if k not in {"limit", "cursor"}]
    links = [
        _link(here, "self", "this list"),
        _link(here, "alternate", "STAC Items of the results", kind=GEOJSON),
    ]
    if len(found) == limit:
        further = urlencode([*query, ("limit", limit), ("cursor", found[-1].id)])
        links.append(_link(f"{here}?{further}", "next", "older jobs"))
    accept = request.headers.get("accept", "")
    if negotiate(accept, ("application/json", GEOJSON), lenient=True) == GEOJSON:
        shown = [
            {**link.model_dump(exclude_none=True), "type": GEOJSON}
            for link in links
            if link.rel != "alternate"
        ]
        shown.append(_link(here, "alternate", "this list").model_dump(exclude_none=True))

        def items() -> Response:
            features = _items(app, found, here)
            document = {"type": "FeatureCollection", "features": features, "links": shown}
            text = document_bytes(document)
            return Response(text, media_type=GEOJSON, headers={"Vary": "Accept"})

        return await app.downloads.made(share_of(caller, request.scope), items)

    def jobs() -> JobList:
        return JobList(jobs=[info(job, request) for job in found], links=links)

    return await json_response(jobs, exclude_none=True)


@router.get("/callbacks", responses=problems(["unauthorized", "not_found", "internal_error"]))
async def read_callback_secret(app: App, caller: Caller) -> CallbackSecret:
    """The secret with which callbacks to this caller are signed."""
    settings = app.settings
    if not settings.callback_hosts:
        raise NotFound(
            "this server sends no callbacks: its administrator must set PIMC_CALLBACK_HOSTS"
        )
    found = [
        secret_text(caller_secret(secret.get_secret_value(), caller or ""))
        for secret in settings.callback_secrets
    ]
    return CallbackSecret(secret=found[0], secrets=found)


@router.get(
    "/jobs/{job_id}",
    response_model_exclude_none=True,
    responses=problems(["unauthorized", "unknown_job", "internal_error"]),
)
async def read_job(job_id: str, request: Request, app: App, caller: Caller) -> JobInfo:
    """The status of a job."""
    return info(await find_job(app, caller, job_id), request)


@router.delete(
    "/jobs/{job_id}",
    response_model_exclude_none=True,
    responses=problems(["unauthorized", "unknown_job", "insufficient_storage", "internal_error"]),
)
async def dismiss_job(job_id: str, request: Request, app: App, caller: Caller) -> JobInfo:
    """Dismiss a waiting or running job, or remove the result of a finished one."""
    return info(await to_thread.run_sync(app.runner.dismiss, caller or "", job_id), request)


@router.get(
    "/jobs/{job_id}/result", responses=dict(RESULT), response_class=Response, dependencies=[READER]
)
async def read_result(job_id: str, request: Request, app: App, caller: Caller) -> Response:
    """The result of a job, as in a synchronous response, or the problem with which it failed."""
    job = await find_job(app, caller, job_id)
    for name in ("smooth", "min_area"):
        if name in request.query_params:
            raise _only_of_maps(name)
    if job.status == "failed":
        return problem(request, job.error)
    readers = app.downloads.readers
    stored = await to_thread.run_sync(app.jobs.job_requests.outline, job, limiter=readers)
    media = negotiate(request.headers.get("accept", ""), offers(stored))
    result = await to_thread.run_sync(app.jobs.results.read, job, limiter=readers)
    make = partial(stored_response, app.jobs, job, result, media, app.reserve)
    return await app.downloads.made(share_of(caller, request.scope), make)


@router.get(
    "/jobs/{job_id}/result/item.json",
    responses=dict(ITEM_FILE),
    response_class=Response,
    dependencies=[READER],
)
async def read_item(job_id: str, request: Request, app: App, caller: Caller) -> Response:
    """The STAC Item of a job's rasters, with links to them."""
    job = await find_job(app, caller, job_id)
    if job.status == "failed":
        return problem(request, job.error)
    readers = app.downloads.readers
    result = await to_thread.run_sync(app.jobs.results.read, job, limiter=readers)
    here = f"{root_of(request)}/jobs/{job.id}"
    item = await to_thread.run_sync(_linked_item, result, here, limiter=readers)
    if item is None:
        raise NotFound(f"job {job.id} has no STAC Item: its result is not a raster")
    return JSONResponse(item, media_type=GEOJSON)


def _items(app: AppState, jobs: Sequence[Job], here: str) -> list[dict[str, Any]]:
    """The STAC Items of those jobs that have one."""

    def item(job: Job) -> dict[str, Any] | None:
        with suppress(ResultNotReady):  # the result was removed meanwhile
            return _linked_item(app.jobs.results.read(job), f"{here}/{job.id}")
        return None

    with ThreadPoolExecutor(_ITEMS_AT_ONCE) as threads:
        found = list(threads.map(item, [job for job in jobs if job.status == "successful"]))
    return [one for one in found if one is not None]


def _linked_item(result: StoredResult, here: str) -> dict[str, Any] | None:
    """The STAC Item of a job with links to its files; None if the job has no item."""
    raster = next(iter(result.files.values()), None)
    if raster is None:
        return None
    try:
        item: dict[str, Any] = json.loads(raster.with_name(ITEM).read_bytes())
    except FileNotFoundError:
        return None
    for name, asset in item["assets"].items():
        if name in result.files:
            asset["href"] = f"{here}/result/{name}"
        elif asset["href"].startswith("./"):
            asset["href"] = f"{here}/result/{asset['href'].removeprefix('./')}"
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
            description="for `class` and `polygons`: radius of Bayesian smoothing of the finished "
            "map, pixels; requires that the job has the output `probabilities`",
        ),
    ] = 0,
    min_area: Annotated[
        float,
        Query(
            ge=0,
            allow_inf_nan=False,
            description="for `class` and `polygons`: areas below this size, in hectares, join a "
            "neighbour",
        ),
    ] = 0.0,
) -> Response:
    """One output of a job's result; `smooth` and `min_area` derive a cleaner class map.

    `polygons` is derived as well if the job has only the class map. `class.qml` is the QGIS style
    of `class`, and `class.tif.aux.xml` has the names of its classes for GDAL.
    """
    job = await find_job(app, caller, job_id)
    if job.status == "failed":
        return problem(request, job.error)
    result = await to_thread.run_sync(app.jobs.results.read, job, limiter=app.downloads.readers)
    outlined = output == POLYGONS and POLYGONS not in result.files and "class" in result.files
    if outlined or ((smooth or min_area) and output in {"class", POLYGONS}):
        media = COG
        if output == POLYGONS:
            accept = request.headers.get("accept", "")
            media = negotiate(accept, (PARQUET, GEOJSON), lenient=True)
        how = Cleaning(smooth=smooth, min_area=min_area)
        derive = partial(_derived, app, job, result, how, output, media)
        # Deriving a map takes as much work as a run, so it takes a run slot.
        slot = app.admission.runs.slot(share_of(caller, request.scope))
        path = await run_watched(request, derive, slot=slot)
        return derived_file(path, output, media, result, missing=removed(job))
    if beside := await to_thread.run_sync(_beside, result, output, limiter=app.downloads.readers):
        response = StoredFile(
            beside, media_type="application/xml", filename=output, missing=removed(job)
        )
        return with_raster_headers(response, result)
    if output not in result.files:
        available = ", ".join(result.files) or "none, as the result is not a raster"
        raise NotFound(f"job {job.id} has no output '{shown(output)}'; available: {available}")
    if smooth or min_area:
        raise _only_of_maps("smooth" if smooth else "min_area")
    if output == POLYGONS:
        media = negotiate(request.headers.get("accept", ""), (PARQUET, GEOJSON), lenient=True)
        make = partial(stored_response, app.jobs, job, result, media, app.reserve)
        return await app.downloads.made(share_of(caller, request.scope), make)
    return whole_file(result, output, missing=removed(job))


def _beside(result: StoredResult, name: str) -> Path | RemoteFile | None:
    """The QGIS style (`class.qml`) or the class names (`class.tif.aux.xml`) of a raster."""
    for suffix, of in _BESIDE.items():
        raster = result.files.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if raster is not None:
            file = raster.with_name(of(Path(raster.name)).name)
            return file if file.exists() else None
    return None


def _only_of_maps(parameter: str) -> InvalidRequest:
    return InvalidRequest.of(
        parameter,
        f"`{parameter}` of a finished job applies to its map: send it to "
        "/jobs/{job_id}/result/class or /jobs/{job_id}/result/polygons, or leave it out",
    )


def _derived(
    app: AppState,
    job: Job,
    result: StoredResult,
    how: Cleaning,
    output: str,
    media: str,
    *,
    cancelled: threading.Event,
) -> Path | RemoteFile:
    """The map or polygons derived from a result; made at the first request for them."""
    suffix = ".parquet" if output == POLYGONS else ".tif"
    name = f"{output}-{how.name}"

    def make(path: Path) -> None:
        original = app.jobs.job_requests.outline(job)
        smoothed_by = original.smooth or 0 if isinstance(original, RasterRequest) else 0
        with app.jobs.results.on_disk(job, result) as copy:
            files = on_this_machine(copy.files)
            most = app.settings.sync_max_pixels
            check_derivable(files, how, smoothed_by=smoothed_by, most_pixels=most)
            need = derivation_need(files, how, output)
            with app.budget.take(need, cancelled=cancelled, patience=PATIENCE):
                derive_map(files, how, output, path, cancelled=cancelled)

    made = app.jobs.results.derived(job, name + suffix, make)
    if media != GEOJSON:
        return made

    def convert(path: Path) -> None:
        with (
            app.jobs.results.on_disk(job, result) as copy,
            app.jobs.results.copied(made) as polygons,
        ):
            write_geojson(copy, polygons, path)

    return app.jobs.results.derived(job, f"{name}.geojson", convert)


async def find_job(app: AppState, caller: str | None, job_id: str) -> Job:
    """A job of the caller; see `JobStore.find`."""
    return await to_thread.run_sync(app.jobs.find, caller or "", job_id)


def accepted(job: Job, request: Request, *, applied: str, status: int = 202) -> Response:
    """The response to a request that became a job.

    Args:
        job: the new job, or the existing one if the request repeats an earlier request.
        request: the request; links have its path prefix.
        applied: value of `Preference-Applied`: preferences that the job follows, or empty.
        status: 202; on the paths of OGC API - Processes 201, whose documents hold no null.
    """
    # Without scheme and host, so that a client resolves it against the address that it used.
    headers = {"Location": f"{root_of(request)}/jobs/{job.id}"}
    if applied:
        headers["Preference-Applied"] = applied
    document = info(job, request).model_dump(mode="json", exclude_none=status == 201)
    return JSONResponse(document, status_code=status, headers=headers)


def callback_body(job: Job, event: Event, *, jobs: JobStore, root_path: str) -> dict[str, Any]:
    """The body of a callback: the job's status or, of a finished execution, links to its results.

    Args:
        job: the job in its present state.
        event: the change of the job.
        jobs: the store of the job.
        root_path: the path before the service's own paths.
    """
    if event == "success" and job.status == "successful":
        with suppress(ResultNotReady):  # removed meanwhile, as the status states
            delivery = jobs.job_requests.delivery(job)
            if delivery is not None:
                here = f"{root_path}/jobs/{job.id}/results"
                return dict(links_to(Delivery.of(delivery).outputs, here))
    return status_of(job, root_path).model_dump(mode="json", exclude_none=True)


def info(job: Job, request: Request) -> JobInfo:
    """The status document of a job.

    Args:
        job: the job.
        request: the request; links have its path prefix.
    """
    return status_of(job, root_of(request))


def status_of(job: Job, root_path: str) -> JobInfo:
    """A job as its status document.

    Args:
        job: the job.
        root_path: path prefix that a proxy adds, with which links begin.
    """
    here = f"{root_path}/jobs/{job.id}"
    links = [_link(here, "self", "this document")]
    if job.status == "successful":
        links.append(_link(f"{here}/results", _RESULTS, "the results, of OGC API - Processes"))
        links.append(_link(f"{here}/result", _RESULTS, "the result", kind=None))
    return JobInfo(
        jobID=job.id,
        processID=job.task,
        status=job.status,
        message=job.error.detail if job.status == "failed" else None,
        progress=job.progress,
        created=_time_of(job.created),
        started=None if job.started is None else _time_of(job.started),
        finished=None if job.finished is None else _time_of(job.finished),
        updated=_time_of(job.updated),
        links=links,
    )


def _link(href: str, rel: str, title: str, kind: str | None = "application/json") -> Link:
    return Link(href=href, rel=rel, type=kind, title=title)


def moments(text: str) -> tuple[float | None, float | None]:
    """Begin and end of a time or an interval, seconds since 1970; None for an open end.

    A time lasts as long as its last digit states: a year, a month, a day, a second or a
    microsecond.

    Args:
        text: a text that `interval` accepts.
    """
    begin, slash, end = text.partition("/")
    return _span(begin)[0], _span(end if slash else begin)[1]


def _span(text: str) -> tuple[float | None, float | None]:
    if not text.strip("."):
        return None, None
    first = datetime.fromisoformat(text + "0001-01-01T00:00:00Z"[len(text) :])
    if first.year == MAXYEAR:
        return first.timestamp(), None
    if len(text) == len("2021"):
        last = first.replace(year=first.year + 1)
    elif len(text) == len("2021-01"):
        last = (first + timedelta(days=31)).replace(day=1)
    elif len(text) == len("2021-01-01"):
        last = first + timedelta(days=1)
    else:
        last = first + timedelta(microseconds=1 if "." in text else 10**6)
    return first.timestamp(), last.timestamp()


def _time_of(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
