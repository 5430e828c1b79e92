"""Task routes: a stack or series in, a map or numbers out.

Each route calls `serve`, which handles a request from its body to its response.
"""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, cast

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response

from models.card import Modality, Task
from service.api.admission import PATIENCE, Admitted
from service.api.auth import share_of
from service.api.dependencies import (
    KNOWN_CALLER,
    App,
    AppState,
    Caller,
    Folder,
    Preferences,
    RequestPreferences,
)
from service.api.disconnect import parse_body, run_watched, unless_gone
from service.api.negotiation import negotiate
from service.api.openapi import body, responses
from service.api.quotas import cost
from service.api.responses import make_response, needs_files, offers
from service.api.routes.jobs import accepted
from service.api.schemas.parameter_types import Operation
from service.api.schemas.validation import read_items, read_parameters, read_series, read_stac
from service.api.stac import stac_request
from service.api.uploads import FIELDS, FILES, FORM, media_type, read_form, read_json
from service.errors import MOST_ERRORS, InvalidRequest, NotReady, first_names
from service.jobs.callbacks import check_subscriber
from service.jobs.job import Job
from service.jobs.job_requests import Idempotency, fingerprint
from service.jobs.serialise import json_parts
from service.read.containers import unpack, unpacked_bytes
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.placement import Place
from service.read.references import fetch_items
from service.run.execute import Result, execute
from service.run.plan import Plan, plan_request
from service.run.request import RasterRequest, Runnable, TaskRequest
from service.tracing import span

_Items = TypeVar("_Items")
_Stac = TypeVar("_Stac")
_Series = TypeVar("_Series")
_Read_co = TypeVar("_Read_co", covariant=True)


class ByReference(Protocol[_Read_co]):
    """Reads a JSON body that names files or STAC items."""

    def __call__(self, body: bytes, *, allowed: bool) -> _Read_co | None:
        """Read the body; None if it names none.

        Args:
            body: the body, unparsed.
            allowed: whether the server reads files by reference.

        Raises:
            RequestError: the body is not valid, or names files that the server does not read.
        """
        ...


router = APIRouter(tags=["tasks"], dependencies=[KNOWN_CALLER], default_response_class=Response)


@router.post(
    "/classify-pixels",
    responses=responses("classify-pixels"),
    openapi_extra=body("classify-pixels"),
)
async def classify_pixels(
    request: Request, app: App, folder: Folder, caller: Caller, preferences: Preferences
) -> Response:
    """Predict a class for every pixel of a satellite image time series."""
    return await _serve("classify-pixels", request, app, folder, caller, preferences)


@router.post("/forecast", responses=responses("forecast"), openapi_extra=body("forecast"))
async def forecast(
    request: Request, app: App, folder: Folder, caller: Caller, preferences: Preferences
) -> Response:
    """Predict the next values of NDVI, EVI and SAVI for every pixel, with quantiles."""
    return await _serve("forecast", request, app, folder, caller, preferences)


@router.post("/landcover", responses=responses("landcover"), openapi_extra=body("landcover"))
async def landcover(
    request: Request, app: App, folder: Folder, caller: Caller, preferences: Preferences
) -> Response:
    """Predict land cover from imagery: one label per 64 x 64 patch, or denser with `stride`."""
    return await _serve("landcover", request, app, folder, caller, preferences)


@router.post("/embed", responses=responses("embed"), openapi_extra=body("embed"))
async def embed(
    request: Request,
    app: App,
    folder: Folder,
    caller: Caller,
    preferences: Preferences,
    modality: Annotated[
        Modality | None,
        Query(description="`pixel` or `patch`, as the parameter of the same name in the body"),
    ] = None,
) -> Response:
    """Compute embeddings of pixels from recurrence plots, or of patches from imagery."""
    return await _serve("embed", request, app, folder, caller, preferences, modality)


@router.post("/similar", responses=responses("similar"), openapi_extra=body("similar"))
async def similar(
    request: Request, app: App, folder: Folder, caller: Caller, preferences: Preferences
) -> Response:
    """Cosine similarity of every pixel's embedding to given points or fields."""
    return await _serve("similar", request, app, folder, caller, preferences)


async def _serve(
    task: Runnable,
    request: Request,
    app: AppState,
    folder: Path,
    caller: str | None,
    preferences: RequestPreferences,
    modality: Modality | None = None,
) -> Response:
    """See `serve`; the body is a form or JSON, and `Accept` chooses the response.

    Args:
        task: the requested task.
        request: the request, whose body has not been read.
        app: application state.
        folder: folder of this request, which is removed once the response is sent.
        caller: the caller's id; None if no keys are set.
        preferences: the preferences in the request's headers.
        modality: modality of an embedding, if the query states it.

    Raises:
        PIMCError: the request is rejected, or its run fails.
    """
    check_query(request, {"modality"} if task == "embed" else set())

    async def read(admitted: Admitted) -> Received:
        parsed = await read_request(
            task,
            request,
            app,
            folder,
            modality,
            admitted,
            caller or "",
            on_demand=preferences.respond_async and app.settings.workers_fetch,
        )
        media = negotiate(request.headers.get("accept", ""), offers(parsed))
        return Received(
            request=parsed,
            rasters=needs_files(parsed, media),
            respond=lambda result, _job: make_response(result, media, folder),
        )

    return await serve(request, app, folder, caller, preferences, read)


@dataclass(frozen=True, kw_only=True)
class Received:
    """A parsed body, and how to respond to it."""

    request: TaskRequest
    """The request that the body holds."""
    rasters: bool
    """Whether the response needs rasters."""
    respond: Callable[[Result, Job | None], Response]
    """Makes the response from the result and from the job that keeps it, if any; may block."""
    delivery: Mapping[str, Any] | None = None
    """The form in which OGC API - Processes returns the results, stored with the job; None on other
    paths."""
    kept: bool = False
    """Whether a run whose client waits is kept as a job, because the response links to it."""


async def serve(
    request: Request,
    app: AppState,
    folder: Path,
    caller: str | None,
    preferences: RequestPreferences,
    read: Callable[[Admitted], Awaitable[Received]],
) -> Response:
    """Body → upload → request → plan → result → response, or a job that runs later.

    Args:
        request: the request, whose body has not been read.
        app: application state.
        folder: folder of this request, which is removed once the response is sent.
        caller: the caller's id; None if no keys are set.
        preferences: the preferences in the request's headers.
        read: reads the body, once the request is admitted.

    Raises:
        PIMCError: the request is rejected, or its run fails.
    """
    owner, charged = caller or "", begin_request(request, app, caller)
    share = app.quotas.share(charged)
    check_room = partial(app.jobs.check_room, caller=charged, share=share)
    if preferences.respond_async:
        # Checked before the body is read, so that no body is uploaded in vain.
        await to_thread.run_sync(check_room, owner, preferences.idempotency_key)
    async with app.admission.admit(charged) as admitted:
        with span("receive"):
            received = await read(admitted)
        _check_subscriber(received, app, later=preferences.respond_async)
        status = 202 if received.delivery is None else 201
        idempotency = await _idempotency(received, folder, preferences)
        if idempotency:
            first = await to_thread.run_sync(app.jobs.repeated, owner, idempotency)
            if first:
                return accepted(first, request, applied=preferences.of_a_job, status=status)
        if received.kept and not preferences.respond_async:
            await to_thread.run_sync(check_room, owner, None)
        run = partial(_run, app, received, folder, owner, charged, later=preferences.respond_async)
        try:
            plan, result = await run_watched(request, run, slot=run_slot(app, charged))
        except asyncio.CancelledError:
            if not app.closing.is_set():
                raise
            # At the end of the grace period the server cancels the tasks of running requests.
            raise NotReady(
                "the server stopped before the run ended: retry, or send 'Prefer: respond-async' "
                "for a job that resumes after a restart",
                retry_after=10,
            ) from None
        if result is None:
            job = await to_thread.run_sync(
                partial(
                    app.jobs.accept,
                    plan,
                    folder,
                    owner=owner,
                    idempotency=idempotency,
                    upgrade=preferences.upgrade,
                    caller=charged,
                    share=share,
                    pixels=cost(plan),
                    delivery=received.delivery,
                )
            )
            await to_thread.run_sync(app.runner.accepted)
            return accepted(job, request, applied=preferences.of_a_job, status=status)
        stages = asdict(result.timing)
        app.metrics.ran(
            task=result.task,
            pixels=result.pixels,
            stages=stages,
            key=caller,
            of=plan.predicts_for,
        )
        kept = None
        if received.kept:
            keep = partial(app.jobs.keep, owner=owner, caller=charged, share=share)
            kept = await to_thread.run_sync(
                partial(keep, plan, folder, _work(folder), result, delivery=received.delivery)
            )
        with span("respond"):
            return await to_thread.run_sync(received.respond, result, kept)


def _work(folder: Path) -> Path:
    """The folder that holds the files of a run that is kept, and nothing else."""
    return folder / "work"


def _check_subscriber(received: Received, app: AppState, *, later: bool) -> None:
    """Check the addresses that a job would call.

    Raises:
        InvalidRequest: the client waits for the result itself, and no job is made.
        ForbiddenReference: an address is not on an allowed host.
    """
    if received.request.subscriber is None:
        return
    if not (later or received.kept):
        raise InvalidRequest.of(
            "subscriber",
            "only jobs call a subscriber: send the header 'Prefer: respond-async' as well",
        )
    check_subscriber(received.request.subscriber, app.settings)


def _run(
    app: AppState,
    received: Received,
    folder: Path,
    owner: str,
    caller: str,
    *,
    later: bool,
    cancelled: threading.Event,
) -> tuple[Plan, Result | None]:
    """Plan a request and run it; if it becomes a job, return the plan without a result.

    Args:
        app: application state.
        received: the parsed body.
        folder: folder of the request.
        owner: the caller, whose own models the request may name.
        caller: the caller for whose quotas the run counts.
        later: whether the client prefers a job.
        cancelled: event that is set once the client has disconnected.

    Raises:
        InvalidRequest: OGC API - Processes requires a synchronous response to a large request.
        PIMCError: the request is rejected, or its run fails.
    """
    plan = planned(
        app, received.request, rasters=received.rasters, owner=owner, cancelled=cancelled
    )
    most = app.settings.sync_max_pixels
    if not later and plan.pixels > most and received.delivery is not None:
        raise InvalidRequest.of(
            "Prefer",
            f"the request has {plan.pixels} pixels, and a client can wait for {most} "
            "(PIMC_SYNC_MAX_PIXELS): send 'Prefer: respond-async'",
        )
    if later or plan.pixels > most:
        return plan, None
    if received.kept:
        folder = _work(folder)
        folder.mkdir()
    with app.quotas.charged(caller, cost(plan)):
        result = execute(
            plan,
            folder,
            executor=app.executor,
            cache=app.cache,
            cancelled=cancelled,
            budget=app.budget,
            patience=PATIENCE,
        )
    return plan, result


def planned(
    app: AppState,
    request: TaskRequest,
    *,
    rasters: bool,
    owner: str,
    cancelled: threading.Event,
) -> Plan:
    """Plan a request whose client waits for the response; see `plan_request`."""
    return plan_request(
        request,
        app.engine,
        max_raster_bytes=app.settings.max_raster_bytes,
        rasters=rasters,
        owner=owner,
        max_fields=app.settings.max_fields,
        cache=app.cache,
        budget=app.budget,
        cancelled=cancelled,
        patience=PATIENCE,
    )


async def _idempotency(
    received: Received, folder: Path, preferences: RequestPreferences
) -> Idempotency | None:
    if preferences.idempotency_key is None:
        return None
    digest = await to_thread.run_sync(fingerprint, received.request, folder, received.delivery)
    return Idempotency(key=preferences.idempotency_key, fingerprint=digest)


@asynccontextmanager
async def run_slot(app: AppState, caller: str) -> AsyncIterator[None]:
    """Hold a run slot and count the run as in flight while the context is open.

    Args:
        app: application state.
        caller: the caller's id, or the client's address without API keys.
    """
    async with AsyncExitStack() as held:
        with span("queue"):
            await held.enter_async_context(app.admission.runs.slot(caller))
        with app.metrics.run():
            yield


def begin_request(request: Request, app: AppState, caller: str | None) -> str:
    """Accept a request that takes a slot, and let its response state the caller's quotas.

    Args:
        request: the request.
        app: application state.
        caller: the caller's id; None if no keys are set.

    Returns:
        The id for whose quotas and slots the request counts; see `share_of`.

    Raises:
        NotReady: the server is stopping.
    """
    if app.closing.is_set():
        raise NotReady(
            "the server is stopping; nothing was started, retry after 10 s", retry_after=10
        )
    share = share_of(caller, request.scope)
    request.state.limits = partial(app.quotas.limits, share)
    return share


def check_query(request: Request, known: set[str]) -> None:
    """Reject parameters in the query, where they would have no effect.

    Args:
        request: the request.
        known: names of the parameters that the query may hold.

    Raises:
        InvalidRequest: the query holds other parameters; the message lists each.
    """
    misplaced = sorted(set(request.query_params) - known)
    if misplaced:
        errors = [{"field": name, "detail": "send it in the body"} for name in misplaced]
        raise InvalidRequest(
            f"parameters in the query: send {first_names(misplaced, MOST_ERRORS)} in the body",
            errors,
        )


async def unpacked(
    files: Sequence[SourceFile],
    stack: StackOptions,
    request: Request,
    folder: Path,
    app: AppState,
    admitted: Admitted,
) -> tuple[tuple[SourceFile, ...], StackOptions]:
    """Unpack the zips among a request's files, for as long as its client stays connected.

    Args:
        files: the files, zips among them.
        stack: the parameters that describe the files.
        request: the request, whose body has been read to the end.
        folder: folder of the request, into which zips are unpacked.
        app: application state.
        admitted: the admitted request, for whose body the members count.

    Returns:
        The files with those of the zips, and the parameters with the files that were left out.

    Raises:
        Cancelled: the client disconnected.
        Overloaded: the members exceed the space for bodies.
        PIMCError: a zip cannot be opened, or holds too many files or bytes.
    """
    most = app.settings.max_body_bytes
    size = await to_thread.run_sync(partial(unpacked_bytes, files, max_bytes=most))
    admitted.reserve(size, in_memory=False)
    work = partial(
        unpack,
        files,
        folder,
        max_bytes=most,
        max_files=app.limits.files,
        jp2=app.settings.jp2,
    )
    opened = await run_watched(request, work, slot=nullcontext())
    return opened.files, replace(stack, left_out=(*stack.left_out, *opened.left_out))


async def with_zips_opened(
    parsed: RasterRequest, request: Request, folder: Path, app: AppState, admitted: Admitted
) -> RasterRequest:
    """A request on the files that its zips hold; see `unpacked`."""
    files, stack = await unpacked(parsed.files, parsed.stack, request, folder, app, admitted)
    return replace(parsed, files=files, stack=stack)


async def read_request(
    task: Operation,
    request: Request,
    app: AppState,
    folder: Path,
    modality: Modality | None,
    admitted: Admitted,
    owner: str,
    *,
    on_demand: bool = False,
) -> TaskRequest:
    """Read the body of a request.

    Args:
        task: the requested task, or measured series.
        request: the request, whose body has not been read.
        app: application state.
        folder: folder of the request.
        modality: modality of an embedding, if the query states it.
        admitted: the admitted request, which counts the bytes of its body.
        owner: the caller, whose own models the request may name.
        on_demand: whether the blocks of remote files are fetched when they are read; those of a
            request of places are in any case.

    Raises:
        Overloaded: the body exceeds the space for bodies.
        RequestError: the body is not a valid request for this task.
    """
    if media_type(request) == FORM:
        form = await read_form(request, folder, app.limits, admitted)
        values = dict(form.fields)
        if modality is not None:
            values["modality"] = tuple({modality, *values.get("modality", ())})
        parameters = await parse_body(
            request,
            partial(read_parameters, task, values),
            size=form.text_size,
            admitted=admitted,
        )
        if not form.files:
            raise InvalidRequest.of(FILES, "at least one GeoTIFF is required")
        polygons = form.vectors.get(FIELDS) or await vector_file(FIELDS, parameters.fields, folder)
        parsed = await to_thread.run_sync(parameters.request, task, form.files, polygons)
        return await with_zips_opened(parsed, request, folder, app, admitted)
    settings = app.settings
    named, found, series = await parsed_json(
        request,
        app,
        admitted,
        partial(read_items, task, modality=modality),
        partial(read_stac, task, modality=modality),
        partial(read_series, task),
    )
    if named is not None:
        items, parameters = named
        polygons = await vector_file(FIELDS, parameters.fields, folder)
        wanted = await to_thread.run_sync(parameters.request, task, (), polygons)
        with span("fetch", items=len(items)):
            fetching = fetch_items(
                items,
                folder,
                settings,
                place=part_of(wanted.stack),
                on_demand=on_demand or wanted.of_places,
                remotes=app.remotes,
            )
            files = await unless_gone(request, fetching)
        for file in files:
            if file.path.is_relative_to(folder):  # downloaded
                admitted.received(file.path.stat().st_size)
        return await with_zips_opened(replace(wanted, files=files), request, folder, app, admitted)
    if found is not None:
        stac, parameters = found
        polygons = await vector_file(FIELDS, parameters.fields, folder)
        fetch = stac_request(
            task,
            stac,
            parameters,
            polygons,
            app,
            folder,
            admitted,
            owner,
            on_demand=on_demand,
        )
        with span("fetch"):
            by_stac = await unless_gone(request, fetch)
        return await with_zips_opened(by_stac, request, folder, app, admitted)
    if series is None:
        raise TypeError("a body without files and items was not read as series")
    if modality == "patch":
        raise InvalidRequest.of(
            "modality", "'patch' needs imagery, and a series has none: send 'pixel'"
        )
    if task in {"series", "similar"}:
        raise TypeError(f"validation accepted a body of series for /{task}, which needs imagery")
    return await to_thread.run_sync(series.request, cast(Task, task))


async def parsed_json(
    request: Request,
    app: AppState,
    admitted: Admitted,
    items: ByReference[_Items],
    stac: ByReference[_Stac],
    series: Callable[[bytes], _Series],
) -> tuple[_Items | None, _Stac | None, _Series | None]:
    """Read a JSON body: the one of files, STAC items and series that it holds.

    Args:
        request: the request, whose body has not been read.
        app: application state.
        admitted: the admitted request, which counts the bytes of its body.
        items: reads a body that names files; None if it names none.
        stac: reads a body that names STAC items; None if it names none.
        series: reads a body of series.

    Raises:
        Overloaded: the body exceeds the space for bodies.
        RequestError: the body is not valid.
        Cancelled: the client disconnected before the body was parsed.
    """
    text = await read_json(request, app.limits, admitted)
    allowed = bool(app.settings.allowed_roots or app.settings.allowed_hosts)

    def parse() -> tuple[_Items | None, _Stac | None, _Series | None]:
        named = items(text, allowed=allowed)
        if named is not None:
            return named, None, None
        found = stac(text, allowed=allowed)
        if found is not None:
            return None, found, None
        return None, None, series(text)

    return await parse_body(request, parse, size=len(text), admitted=admitted)


def part_of(stack: StackOptions) -> Place | None:
    """The part of the files that is read; None reads every block."""
    if stack.bbox is None and stack.area is None:
        return None
    return Place(grid=stack.grid, bbox=stack.bbox, area=stack.area)


async def vector_file(
    name: str, given: str | Mapping[str, Any] | None, folder: Path
) -> SourceFile | None:
    """Write GeoJSON that a form or a JSON body holds to a file, like an uploaded file.

    Args:
        name: name of the parameter.
        given: value of the parameter: GeoJSON as text or object; None if it was not sent.
        folder: folder of the request.

    Returns:
        The file; None if the parameter was not sent.
    """
    if given is None:
        return None
    path = folder / f"{name}.bin"

    def write() -> None:
        text = given if isinstance(given, str) else "".join(json_parts(given))
        path.write_text(text, encoding="utf-8")

    await to_thread.run_sync(write)
    return SourceFile(name=name, path=path)
