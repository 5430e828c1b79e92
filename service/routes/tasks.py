"""The tasks: a stack or series in, a map or numbers out.

Each route is one line; `_serve` is the whole way of a request.
"""

# No `from __future__ import annotations` here: FastAPI needs the types at run time.
import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response

from models.card import Modality, Task
from service.dependencies import KNOWN_CALLER, App, Asked, Caller, Folder, Held, Wishes
from service.errors import InvalidRequest, NotReady
from service.intake import FILES, FORM, media_type, read_form, read_json
from service.jobs import Repeatable, fingerprint
from service.negotiation import negotiate
from service.openapi import answers, body
from service.orders import Order, RasterOrder, Ready, Reply, SeriesOrder, carry_out, prepare
from service.references import fetch_items
from service.responses import FILE_TYPES, offers, respond
from service.routes.jobs import accepted
from service.schemas import read_fields, read_items, read_series
from service.telemetry import CountedExecutor
from service.watch import run_watched

router = APIRouter(tags=["tasks"], dependencies=[KNOWN_CALLER], default_response_class=Response)


@router.post(
    "/classify-pixels",
    responses=answers("classify-pixels"),
    openapi_extra=body("classify-pixels"),
)
async def classify_pixels(
    request: Request, app: App, folder: Folder, caller: Caller, asked: Asked
) -> Response:
    """A class for every pixel of a satellite image time series."""
    return await _serve("classify-pixels", request, app, folder, caller, asked)


@router.post("/forecast", responses=answers("forecast"), openapi_extra=body("forecast"))
async def forecast(
    request: Request, app: App, folder: Folder, caller: Caller, asked: Asked
) -> Response:
    """The next values of NDVI, EVI and SAVI for every pixel, with quantiles."""
    return await _serve("forecast", request, app, folder, caller, asked)


@router.post("/landcover", responses=answers("landcover"), openapi_extra=body("landcover"))
async def landcover(
    request: Request, app: App, folder: Folder, caller: Caller, asked: Asked
) -> Response:
    """Land-cover labels from imagery: one per 64 x 64 patch, or denser with `stride`."""
    return await _serve("landcover", request, app, folder, caller, asked)


@router.post("/embed", responses=answers("embed"), openapi_extra=body("embed"))
async def embed(
    request: Request,
    app: App,
    folder: Folder,
    caller: Caller,
    asked: Asked,
    modality: Annotated[Modality | None, Query(description="as in the body")] = None,
) -> Response:
    """The embedding of every pixel, from recurrence plots, or patch, from imagery."""
    return await _serve("embed", request, app, folder, caller, asked, modality)


async def _serve(
    task: Task,
    request: Request,
    app: Held,
    folder: Path,
    caller: str | None,
    asked: Wishes,
    modality: Modality | None = None,
) -> Response:
    """Body → intake → order → run → answer, or a job that runs later.

    Args:
        task: what is asked for.
        request: its body not yet read.
        app: what the application holds.
        folder: of this request alone; removed once the answer is sent.
        caller: who asks.
        asked: whether for a job, and whether again.
        modality: of an embedding, where the query says it.
    """
    _check_query(request, {"modality"} if task == "embed" else set())
    if app.closing.is_set():
        raise NotReady("the service is stopping; nothing was started", retry_after=10)
    owner = caller or ""
    if asked.respond_async:
        # Before the body, so that nothing is sent in vain.
        await to_thread.run_sync(app.jobs.check_room, owner, asked.idempotency_key)
    async with app.admission.seat():
        order = await _take_in(task, request, app, folder, modality)
        media = negotiate(request.headers.get("accept", ""), offers(order))
        repeatable = await _repeatable(order, folder, asked)
        if repeatable:
            first = await to_thread.run_sync(app.jobs.repeated, owner, repeatable)
            if first:
                return accepted(first, preferred=asked.respond_async)
        run = partial(_run, app, order, media, folder, later=asked.respond_async)
        try:
            outcome = await run_watched(request, run, place=_place(app))
        except asyncio.CancelledError:
            if not app.closing.is_set():
                raise
            # The grace is over: the server cancels what is left, and its own answer is no problem.
            raise NotReady("the service stopped before the run ended", retry_after=10) from None
        if isinstance(outcome, Ready):
            job = await to_thread.run_sync(
                partial(app.jobs.accept, outcome, folder, owner=owner, repeatable=repeatable)
            )
            await to_thread.run_sync(app.runner.accepted)
            return accepted(job, preferred=asked.respond_async)
        app.metrics.ran(task=task, pixels=outcome.pixels, timing=outcome.timing)
        return await to_thread.run_sync(respond, outcome, media, folder)


def _run(
    app: Held,
    order: Order,
    media: str,
    folder: Path,
    *,
    later: bool,
    cancelled: threading.Event,
) -> Reply | Ready:
    """The answer; or, for a job, only that there can be one."""
    ready = prepare(
        order,
        app.engine,
        max_raster_bytes=app.settings.max_raster_bytes,
        rasters=media in FILE_TYPES,
    )
    if later or ready.pixels > app.settings.sync_max_pixels:
        return ready
    return carry_out(ready, folder, executor=CountedExecutor(app.metrics), cancelled=cancelled)


async def _repeatable(order: Order, folder: Path, asked: Wishes) -> Repeatable | None:
    if asked.idempotency_key is None:
        return None
    print_of = await to_thread.run_sync(fingerprint, order, folder)
    return Repeatable(key=asked.idempotency_key, fingerprint=print_of)


@asynccontextmanager
async def _place(app: Held) -> AsyncIterator[None]:
    """A place, and the run counted while it is held."""
    async with app.admission.place():
        with app.metrics.run():
            yield


def _check_query(request: Request, known: set[str]) -> None:
    """Refuse a field that came in the query, where nobody would look for it.

    Raises:
        InvalidRequest: with every such field.
    """
    strange = sorted(set(request.query_params) - known)
    if strange:
        errors = [{"field": name, "detail": "goes into the body"} for name in strange]
        raise InvalidRequest(f"the query holds {', '.join(strange)}: fields go in the body", errors)


async def _take_in(
    task: Task, request: Request, app: Held, folder: Path, modality: Modality | None
) -> Order:
    """The order that a body makes.

    Raises:
        RequestError: the body is no order for this task.
    """
    if media_type(request) == FORM:
        form = await read_form(request, folder, app.limits)
        said = dict(form.fields)
        if modality is not None:
            said["modality"] = tuple({modality, *said.get("modality", ())})
        fields = await to_thread.run_sync(read_fields, task, said)
        if not form.files:
            raise InvalidRequest.of(FILES, "no GeoTIFF came")
        return RasterOrder(task=task, files=form.files, fields=fields)
    text = await read_json(request, app.limits)
    settings = app.settings
    allowed = bool(settings.allowed_roots or settings.allowed_hosts)
    named = await to_thread.run_sync(
        partial(read_items, task, text, allowed=allowed, modality=modality)
    )
    if named is not None:
        items, fields = named
        files = await fetch_items(items, folder, settings)
        return RasterOrder(task=task, files=files, fields=fields)
    series = await to_thread.run_sync(read_series, task, text)
    if modality == "patch":
        raise InvalidRequest.of("modality", "a series has no imagery, so no patches")
    return SeriesOrder(task=task, request=series)
