"""OGC API - Processes 1.0 (18-062r2): conformance, processes, execution, results.

`routes.jobs` has the list of jobs, their status and their dismissal, `routes.home` the landing
page. An execution is converted to a request of the task and then served like every other request by
`routes.tasks.serve`.
"""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from pydantic_core import from_json

from models.card import Task
from service.api.admission import Admitted
from service.api.auth import share_of
from service.api.dependencies import (
    KNOWN_CALLER,
    KNOWN_IF_PRIVATE,
    READER,
    App,
    AppState,
    Caller,
    JobFolder,
    Preferences,
    root_of,
)
from service.api.disconnect import check_connected, in_turn, parse_body, unless_gone
from service.api.json_pieces import JsonText
from service.api.openapi import EXECUTION, EXECUTION_BODY, RESULTS, problems
from service.api.problems import problem
from service.api.processes import (
    PROCESSES,
    Binary,
    Delivery,
    Inputs,
    Reference,
    bbox_of,
    conformance_classes,
    default_delivery,
    delivery_of,
    description_of,
    inputs_named,
    rasters_of,
    read_inputs,
    summary_of,
    task_of,
)
from service.api.results import Results, output_response, results_response
from service.api.routes.jobs import find_job
from service.api.routes.tasks import (
    Received,
    check_query,
    part_of,
    serve,
    vector_file,
    with_zips_opened,
)
from service.api.schemas.request_bodies import Execute, ItemBody
from service.api.schemas.response_bodies import Conformance, Link, ProcessDescription, ProcessList
from service.api.schemas.validation import read_execute, read_items, read_series, read_stac
from service.api.stac import stac_request
from service.api.uploads import FIELDS, JSON, media_type, read_json, reserve_parsed
from service.errors import (
    BodyTooLarge,
    InvalidRequest,
    NotFound,
    ResultsNotReady,
    UnsupportedMedia,
    shown,
)
from service.jobs.job import Job, removed
from service.jobs.serialise import json_parts
from service.read.geotiff import SourceFile
from service.read.placement import Place
from service.read.references import fetch_items
from service.run.execute import Result
from service.run.request import Runnable, TaskRequest
from service.write.predictions import ATTRIBUTION

_MONITOR = "monitor"
_FREED_AT_ONCE = 100
"""Number of entries of a list that are freed in one call."""
_Result = TypeVar("_Result")
router = APIRouter(tags=["processes"])


@router.get(
    "/conformance",
    dependencies=[KNOWN_IF_PRIVATE],
    responses=problems(["unauthorized", "internal_error"]),
)
async def conformance(app: App) -> Conformance:
    """The conformance classes of OGC API - Processes that the server declares."""
    callbacks = bool(app.settings.callback_hosts)
    return Conformance(conformsTo=conformance_classes(callbacks=callbacks))


@router.get(
    "/processes",
    dependencies=[KNOWN_IF_PRIVATE],
    response_model_exclude_none=True,
    responses=problems(["unauthorized", "invalid_request", "internal_error"]),
)
async def list_processes(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=10_000, description="largest number of processes")] = 10,
    offset: Annotated[int, Query(ge=0, le=10_000, description="number of processes to skip")] = 0,
) -> ProcessList:
    """The processes: each task is one, and the search for similar pixels."""
    root = root_of(request)
    here, end = f"{root}/processes", offset + limit
    links = [Link(href=here, rel="self", type=JSON, title="this list")]
    if end < len(PROCESSES):
        further = f"{here}?limit={limit}&offset={end}"
        links.append(Link(href=further, rel="next", type=JSON, title="more processes"))
    shown = [summary_of(process, root) for process in PROCESSES[offset:end]]
    return ProcessList(processes=shown, links=links)


@router.get(
    "/processes/{process_id}",
    dependencies=[KNOWN_IF_PRIVATE],
    response_model_exclude_none=True,
    responses=problems(["unauthorized", "unknown_process", "internal_error"]),
)
async def read_process(process_id: str, request: Request) -> ProcessDescription:
    """A process with its inputs and outputs."""
    return description_of(task_of(process_id), root_of(request))


@router.post(
    "/processes/{process_id}/execution",
    dependencies=[KNOWN_CALLER],
    response_class=Response,
    responses=dict(EXECUTION),
    openapi_extra=EXECUTION_BODY,
)
async def execute_process(
    process_id: str,
    request: Request,
    app: App,
    folder: JobFolder,
    caller: Caller,
    preferences: Preferences,
) -> Response:
    """Execute a process while the client waits, or as a job with `Prefer: respond-async`."""
    task = task_of(process_id)
    check_query(request, set())

    async def read(admitted: Admitted) -> Received:
        if media_type(request) != JSON:
            raise UnsupportedMedia(
                f"the body of an execution must be {JSON}: send JSON, or send the form to /{task}"
            )
        body = await read_json(request, app.limits, admitted)
        execute, inputs = await parse_body(
            request,
            partial(_parsed, task, body),
            size=len(body),
            admitted=admitted,
        )
        fetch = _Inputs(request, app, folder, admitted, len(body))
        with inputs_named(task):
            task_request = await unless_gone(
                request,
                _request_of(
                    task,
                    execute,
                    inputs,
                    fetch,
                    caller or "",
                    on_demand=preferences.respond_async and app.settings.workers_fetch,
                ),
            )
        delivery = delivery_of(execute, task_request)
        return Received(
            request=task_request,
            # A run that is kept as a job has all files of one.
            rasters=delivery.references
            or any(output.name in rasters_of(task) for output in delivery.outputs),
            respond=partial(_respond, app, request, folder, delivery),
            delivery=delivery.document(),
            kept=delivery.references,
        )

    return await serve(request, app, folder, caller, preferences, read)


def _parsed(task: Runnable, body: bytes) -> tuple[Execute, Inputs]:
    execute = read_execute(body)
    # The values are kept once, so that they can be given back in pieces.
    return execute.model_copy(update={"inputs": {}}), read_inputs(task, execute)


def _respond(
    app: AppState,
    request: Request,
    folder: Path,
    delivery: Delivery,
    result: Result,
    kept: Job | None,
) -> Response:
    """The response with the results of a run whose client waited."""
    if kept is not None:
        response = results_response(_stored(app, request, kept), delivery)
        monitor = f"{root_of(request)}/jobs/{kept.id}"
        response.headers.append("Link", f'<{monitor}>; rel="{_MONITOR}"; type="{JSON}"')
        return response

    def ready(name: str, make: Callable[[Path], object]) -> Path:
        path = folder / name
        if not path.exists():
            make(path)
        return path

    results = Results(
        result=result,
        ready=ready,
        on_disk=lambda: nullcontext(result),
        reserve=app.reserve,
        boundary=f"pimc-{uuid.uuid4().hex}",
    )
    return results_response(results, delivery)


def _stored(app: AppState, request: Request, job: Job) -> Results:
    result = app.jobs.results.read(job)
    return Results(
        result=result,
        ready=partial(app.jobs.results.derived, job),
        on_disk=partial(app.jobs.results.on_disk, job, result),
        reserve=app.reserve,
        boundary=f"pimc-{job.id}",
        here=f"{root_of(request)}/jobs/{job.id}/results",
        missing=removed(job),
    )


@router.get(
    "/jobs/{job_id}/results",
    dependencies=[KNOWN_CALLER, READER],
    response_class=Response,
    responses=dict(RESULTS),
)
async def read_results(job_id: str, request: Request, app: App, caller: Caller) -> Response:
    """The results of a job in the form that its execution requested; of other jobs, links."""
    job = await find_job(app, caller, job_id)
    if job.status == "failed":
        return problem(request, job.error)
    results, delivery = await to_thread.run_sync(
        _finished, app, request, job, limiter=app.downloads.readers
    )
    make = partial(results_response, results, delivery)
    return await app.downloads.made(share_of(caller, request.scope), make)


@router.get(
    "/jobs/{job_id}/results/{output}",
    dependencies=[KNOWN_CALLER, READER],
    response_class=Response,
    responses=dict(RESULTS),
)
async def read_results_output(
    job_id: str, output: str, request: Request, app: App, caller: Caller
) -> Response:
    """One of the results of a job, in the media type that its execution requested."""
    job = await find_job(app, caller, job_id)
    if job.status == "failed":
        return problem(request, job.error)
    results, delivery = await to_thread.run_sync(
        _finished, app, request, job, limiter=app.downloads.readers
    )
    for one in delivery.outputs:
        if one.name == output:
            make = partial(output_response, results, one)
            return await app.downloads.made(share_of(caller, request.scope), make)
    there = ", ".join(one.name for one in delivery.outputs)
    raise NotFound(f"job {job.id} has no result '{shown(output)}'; available: {there}")


def _finished(app: AppState, request: Request, job: Job) -> tuple[Results, Delivery]:
    """The results of a job, and how they are returned.

    Raises:
        ResultsNotReady: the job is not finished, or was dismissed.
        ResultNotReady: the results were removed.
    """
    if job.status != "successful":
        raise ResultsNotReady(
            f"job {job.id} has no results: its status is '{job.status}', its progress "
            f"{job.progress} %; the results exist once the status is 'successful'"
        )
    results, stored = _stored(app, request, job), app.jobs.job_requests.delivery(job)
    if stored is not None:
        return results, Delivery.of(stored)
    return results, default_delivery(app.jobs.job_requests.outline(job), results.result.files)


# Inputs -------------------------------------------------------------------------------------------


class _Inputs:
    """Reads a request's inputs into files and values.

    Args:
        request: the request, whose body has been read to the end.
        app: application state.
        folder: the request's folder.
        admitted: the admitted request, which counts the bytes that are fetched and decoded.
        size: size of the body, bytes.
    """

    def __init__(
        self, request: Request, app: AppState, folder: Path, admitted: Admitted, size: int
    ) -> None:
        self.request = request
        self.app = app
        self.folder = folder
        self.admitted = admitted
        self.size = size
        self._values = 0

    async def files(
        self, given: Sequence[Reference | Binary], *, place: Place | None, on_demand: bool
    ) -> tuple[SourceFile, ...]:
        """Files of a stack, in the order of the request; see `fetch_items`."""
        links = [one for one in given if isinstance(one, Reference)]
        files: tuple[SourceFile, ...] = ()
        if links:
            files = await self._fetched(links, self.folder, place=place, on_demand=on_demand)
        fetched = iter(files)
        found = []
        for number, one in enumerate(given):
            if isinstance(one, Reference):
                found.append(next(fetched))
            else:
                found.append(await self._decoded(one, f"value-{number:04d}.tif"))
        return tuple(found)

    async def polygons(
        self, given: Reference | Binary | dict[str, Any] | None
    ) -> SourceFile | None:
        """The file of `fields`."""
        if isinstance(given, Reference):
            file = (await self._fetched([given], self._apart()))[0]
            if not file.path.is_relative_to(self.folder):
                return file
            # Beside the other files, which are moved into the folder of a job.
            path = file.path.rename(self.folder / f"{FIELDS}.bin")
            return SourceFile(name=file.name, path=path)
        if isinstance(given, Binary):
            return await self._decoded(given, f"{FIELDS}.bin")
        return await vector_file(FIELDS, given, self.folder)

    async def value(self, given: Any) -> Any:  # noqa: ANN401 - JSON
        """A JSON value or a list of them, with references replaced by their content."""
        if isinstance(given, list):
            for n in await to_thread.run_sync(_references, given):
                given[n] = await self.value(given[n])
            return given
        if not isinstance(given, Reference):
            return given
        file = (await self._fetched([given], self._apart()))[0]
        size, most = file.path.stat().st_size, self.app.limits.json_bytes
        if size > most:
            raise BodyTooLarge(
                f"{given.field}: the linked JSON document has {size} bytes, and at most {most} are "
                "allowed: link to a smaller document"
            )
        text = await to_thread.run_sync(file.path.read_bytes)
        await reserve_parsed(text, self.admitted)
        try:
            return await self.in_turn(partial(from_json, text), len(text))
        except ValueError as error:
            raise InvalidRequest.of(
                given.field, f"the linked document is not valid JSON: {error}"
            ) from error

    async def text(self, body: Mapping[str, Any]) -> bytes:
        """A body of the task as JSON, with memory for parsing it again; its lists are emptied."""
        text = await self.in_turn(partial(_text, body), self.size)
        await reserve_parsed(text, self.admitted)
        return text

    async def in_turn(self, work: Callable[[], _Result], size: int) -> _Result:
        """See `disconnect.in_turn`."""
        return await in_turn(work, size=size, admitted=self.admitted)

    def _apart(self) -> Path:
        """A new folder, so that names of fetched files do not collide."""
        self._values += 1
        path = self.folder / f"input-{self._values}"
        path.mkdir()
        return path

    async def _fetched(
        self,
        links: Sequence[Reference],
        folder: Path,
        *,
        place: Place | None = None,
        on_demand: bool = False,
    ) -> tuple[SourceFile, ...]:
        items = [ItemBody.model_construct(href=link.href) for link in links]
        fields = [link.field for link in links]
        files = await fetch_items(
            items,
            folder,
            self.app.settings,
            fields=fields,
            place=place,
            on_demand=on_demand,
            remotes=self.app.remotes,
        )
        for file in files:
            if file.path.is_relative_to(self.folder):  # downloaded
                self.admitted.received(file.path.stat().st_size)
        return files

    async def _decoded(self, value: Binary, name: str) -> SourceFile:
        path = self.folder / name
        self.admitted.received(await to_thread.run_sync(value.write, path))
        return SourceFile(name=name, path=path)


def _references(values: Sequence[object]) -> list[int]:
    """Positions of the links in a list."""
    return [n for n, one in enumerate(values) if isinstance(one, Reference)]


def _text(body: Mapping[str, Any]) -> bytes:
    """A body as JSON; its lists are emptied in pieces, because freeing all takes long at once."""
    unparsed = {name: one.text for name, one in body.items() if isinstance(one, JsonText)}
    parts = []
    for part in json_parts({name: one for name, one in body.items() if name not in unparsed}):
        check_connected()
        parts.append(part)
    for value in body.values():
        while isinstance(value, list) and value:
            del value[-_FREED_AT_ONCE:]
    entries = ["".join(parts).encode()[1:-1]]
    entries += [json.dumps(name).encode() + b":" + text for name, text in unparsed.items()]
    return b"{" + b",".join(filter(None, entries)) + b"}"


async def _request_of(
    task: Runnable,
    execute: Execute,
    inputs: Inputs,
    fetch: _Inputs,
    owner: str,
    *,
    on_demand: bool,
) -> TaskRequest:
    """The task's request with the inputs and outputs of an execution."""
    app, folder = fetch.app, fetch.folder
    body: dict[str, Any] = {name: await fetch.value(one) for name, one in inputs.body.items()}
    if "bbox" in body:
        body["bbox"] = bbox_of(body["bbox"])
    if execute.subscriber is not None:
        body["subscriber"] = execute.subscriber.model_dump(exclude_none=True)
    polygons = await fetch.polygons(inputs.fields)
    attributed = _attributed(body.pop(ATTRIBUTION, False))
    places = "points" in body or polygons is not None
    if inputs.source == "series" or (places and task != "similar"):
        if attributed:
            body["outputs"] = ["class", ATTRIBUTION]
    elif "outputs" not in body:
        body.update(_rasters(task, execute.outputs, attributed=attributed))
    settings = app.settings
    allowed = bool(settings.allowed_roots or settings.allowed_hosts)
    if inputs.source == "series":
        text = await fetch.text(body)
        # Tasks other than those of `Task` take no series.
        return await fetch.in_turn(
            lambda: read_series(task, text).request(cast(Task, task)), len(text)
        )
    if inputs.source == "stac":
        text = await fetch.text(body)
        found = await fetch.in_turn(partial(read_stac, task, text, allowed=allowed), len(text))
        if found is None:
            raise InvalidRequest.of("stac", "a STAC document, a search or a URL is required")
        stac, form = found
        by_stac = await stac_request(
            task,
            stac,
            form,
            polygons,
            app,
            folder,
            fetch.admitted,
            owner,
            on_demand=on_demand,
        )
        return await with_zips_opened(by_stac, fetch.request, folder, app, fetch.admitted)
    # Binary values have no address: a placeholder lets the other parameters be validated.
    body["items"] = [{"href": getattr(one, "href", "value")} for one in inputs.files]
    text = await fetch.text(body)
    named = await fetch.in_turn(partial(read_items, task, text, allowed=True), len(text))
    if named is None:
        raise TypeError("the body names files")
    wanted = await to_thread.run_sync(named[1].request, task, (), polygons)
    files = await fetch.files(
        inputs.files, place=part_of(wanted.stack), on_demand=on_demand or wanted.of_places
    )
    return await with_zips_opened(
        replace(wanted, files=files), fetch.request, folder, app, fetch.admitted
    )


def _attributed(given: Any) -> bool:  # noqa: ANN401 - JSON
    """The input `attribution`, which the models of the task's bodies do not have.

    Raises:
        InvalidRequest: the value is not a boolean.
    """
    if not isinstance(given, bool):
        raise InvalidRequest.of(ATTRIBUTION, "the value is not valid: give true or false")
    return given


def _rasters(task: Runnable, outputs: Mapping[str, object], *, attributed: bool) -> dict[str, Any]:
    """The task parameter `outputs` for the requested process outputs; empty for the default.

    Raises:
        InvalidRequest: the input `attribution` is true, but `outputs` does not include it.
    """
    names = rasters_of(task)
    if len(names) == 1:  # the only file of the task
        return {}
    if attributed and outputs and ATTRIBUTION not in outputs:
        raise InvalidRequest.of(
            ATTRIBUTION,
            f"has no effect, because `outputs` does not name `{ATTRIBUTION}`: add it there, or "
            "leave out the input",
        )
    if outputs:
        wanted = [name for name in names if name in outputs]
    else:
        wanted = [name for name in names if attributed or name != ATTRIBUTION]
    return {"outputs": wanted} if wanted else {}
