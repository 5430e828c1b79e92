"""Own classes: `POST /heads` makes a model, `GET` lists and `DELETE` removes models."""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath
from starlette.responses import JSONResponse

from service.api.admission import PATIENCE, Admitted
from service.api.dependencies import KNOWN_CALLER, App, AppState, Caller, Folder, root_of
from service.api.disconnect import parse_body, run_watched, unless_gone
from service.api.openapi import HEAD, HEAD_BODY, problems
from service.api.responses import json_response, server_timing, warning_headers
from service.api.routes.tasks import (
    begin_request,
    check_query,
    parsed_json,
    part_of,
    run_slot,
    unpacked,
    vector_file,
)
from service.api.schemas.forms import HeadForm
from service.api.schemas.response_bodies import HeadList, HeadResponse, WarningEntry
from service.api.schemas.validation import (
    read_head_items,
    read_head_parameters,
    read_head_series,
    read_head_stac,
)
from service.api.stac import stac_head
from service.api.uploads import FILES, FORM, LABELS, media_type, read_form
from service.errors import InvalidRequest
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.references import fetch_items
from service.run.request import HeadRequest
from service.tracing import span

if TYPE_CHECKING:
    from service.run.teach import Taught

router = APIRouter(tags=["own classes"], dependencies=[KNOWN_CALLER])
_Name = Annotated[str, InPath(max_length=64, pattern=r"^[a-z0-9][a-z0-9-]*$")]


@router.post("/heads", status_code=201, responses=dict(HEAD), openapi_extra=HEAD_BODY)
async def make_head(request: Request, app: App, folder: Folder, caller: Caller) -> Response:
    """Make a model of own classes from labelled pixels; `/classify-pixels` serves it at once."""
    check_query(request, set())
    owner = caller or ""
    share = begin_request(request, app, caller)
    async with app.admission.admit(share) as admitted:
        with span("receive"):
            parsed = await _read_request(request, app, folder, admitted)
        await to_thread.run_sync(app.heads.check_free, owner, parsed.name)
        taught = await run_watched(
            request, partial(_teach, app, parsed, owner, share), slot=run_slot(app, share)
        )
    card = taught.model.card
    app.metrics.ran(
        task="heads", pixels=card.metrics["n"], stages=asdict(taught.timing), key=caller
    )
    document = HeadResponse(
        model=card.id,
        card=card,
        warnings=[WarningEntry(code=w.code, detail=w.detail) for w in taught.warnings],
    )
    response = JSONResponse(
        document.model_dump(mode="json"),
        status_code=201,
        headers={
            "Location": f"{root_of(request)}/models/{card.name}",
            "PIMC-Model": card.id,
            "PIMC-Provider": taught.model.provider,
            "Server-Timing": server_timing(taught.timing),
        },
    )
    for text in warning_headers(taught.warnings):
        response.headers.append("PIMC-Warning", text)
    return response


@router.get("/heads", response_model=HeadList, responses=problems(["unauthorized"]))
async def list_heads(app: App, caller: Caller) -> Response:
    """List the caller's own models."""
    own = app.engine.own(caller or "")
    cards = [model.card for _, model in sorted(own.items())]
    return await json_response(lambda: HeadList(heads=cards))


@router.delete(
    "/heads/{name}",
    status_code=204,
    responses=problems(["unauthorized", "unknown_model", "invalid_request", "internal_error"]),
    response_class=Response,
)
async def remove_head(name: _Name, app: App, caller: Caller) -> Response:
    """Remove one of the caller's own models; runs that use it are completed."""
    await to_thread.run_sync(app.heads.remove, caller or "", name)
    return Response(status_code=204)


def _teach(
    app: AppState, request: HeadRequest, owner: str, caller: str, *, cancelled: threading.Event
) -> "Taught":
    from service.run.teach import teach  # imported here: it imports onnx, which slows the start

    with app.heads.draft() as draft:
        taught = teach(
            request,
            app.engine,
            draft,
            owner=owner,
            max_raster_bytes=app.settings.max_raster_bytes,
            max_labels=app.settings.max_fields,
            cache=app.cache,
            cancelled=cancelled,
            budget=app.budget,
            patience=PATIENCE,
            charge=partial(app.quotas.charged, caller),
        )
        app.heads.publish(owner, draft, taught.model)
        return taught


async def _read_request(
    request: Request, app: AppState, folder: Path, admitted: Admitted
) -> HeadRequest:
    """Read the body of `POST /heads`.

    Args:
        request: the request, whose body has not been read.
        app: application state.
        folder: folder of the request.
        admitted: the admitted request, which counts the bytes of its body.

    Raises:
        Overloaded: the body exceeds the space for bodies.
        RequestError: the body is not a valid request.
    """
    if media_type(request) == FORM:
        form = await read_form(request, folder, app.limits, admitted, LABELS)
        parameters = await parse_body(
            request,
            partial(read_head_parameters, form.fields),
            size=form.text_size,
            admitted=admitted,
        )
        if not form.files:
            raise InvalidRequest.of(FILES, "at least one GeoTIFF is required")
        labels = form.vectors.get(LABELS) or await vector_file(LABELS, parameters.labels, folder)
        return await _of_files(parameters, form.files, labels, request, folder, app, admitted)
    named, found, series = await parsed_json(
        request, app, admitted, read_head_items, read_head_stac, read_head_series
    )
    if named is None:
        if found is None:
            if series is None:
                raise TypeError("a body without files and items was not read as series")
            return await to_thread.run_sync(series.request)
        stac, parameters = found
        labels = await vector_file(LABELS, parameters.labels, folder)
        if labels is None:
            raise TypeError("validation accepted a body without labels")
        with span("fetch"):
            fetch = stac_head(stac, parameters.stack, labels, app, folder, admitted)
            fetched = await unless_gone(request, fetch)
        return await _of_files(
            parameters, fetched.files, labels, request, folder, app, admitted, stack=fetched.stack
        )
    items, parameters = named
    with span("fetch", items=len(items)):
        fetching = fetch_items(
            items,
            folder,
            app.settings,
            place=part_of(parameters.stack),
            on_demand=True,
            remotes=app.remotes,
        )
        files = await unless_gone(request, fetching)
    for file in files:
        if file.path.is_relative_to(folder):  # downloaded
            admitted.received(file.path.stat().st_size)
    labels = await vector_file(LABELS, parameters.labels, folder)
    return await _of_files(parameters, files, labels, request, folder, app, admitted)


async def _of_files(
    parameters: HeadForm,
    files: tuple[SourceFile, ...],
    labels: SourceFile | None,
    request: Request,
    folder: Path,
    app: AppState,
    admitted: Admitted,
    stack: StackOptions | None = None,
) -> HeadRequest:
    if labels is None:
        raise InvalidRequest.of(
            LABELS, "missing: send points or polygons, each with a property `class`"
        )
    opened, options = await unpacked(
        files, stack or parameters.stack, request, folder, app, admitted
    )
    return HeadRequest(
        name=parameters.name,
        description=parameters.description,
        files=opened,
        stack=options,
        labels=labels,
        start=parameters.start,
        embedding=parameters.embedding,
    )
