"""Measured series: reflectance, spectral indices and recurrence plots of points or fields."""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from service.api.admission import PATIENCE
from service.api.dependencies import KNOWN_CALLER, App, AppState, Caller, Folder
from service.api.disconnect import run_watched
from service.api.negotiation import negotiate
from service.api.openapi import MEASURED, body
from service.api.responses import CSV, GEOJSON, PARQUET, server_timing, spooled, warning_headers
from service.api.routes.tasks import begin_request, check_query, read_request, run_slot
from service.api.sending import StoredFile
from service.errors import InvalidRequest
from service.jobs.serialise import document_bytes
from service.run.measured import Measured, measure
from service.run.request import MeasureRequest
from service.tracing import span
from service.write.fields import observations_csv, write_series_geoparquet

router = APIRouter(tags=["tasks"], dependencies=[KNOWN_CALLER], default_response_class=Response)


@router.post("/series", responses=dict(MEASURED), openapi_extra=body("series"))
async def series(request: Request, app: App, folder: Folder, caller: Caller) -> Response:
    """Measured reflectance, NDVI, EVI and SAVI of points or fields by date, without prediction."""
    check_query(request, set())
    share = begin_request(request, app, caller)
    async with app.admission.admit(share) as admitted:
        with span("receive"):
            parsed = await read_request(
                "series", request, app, folder, None, admitted, caller or ""
            )
        if not isinstance(parsed, MeasureRequest):
            raise TypeError("the parameters of /series did not make a MeasureRequest")
        media = negotiate(request.headers.get("accept", ""), (GEOJSON, CSV, PARQUET))
        if media != GEOJSON and parsed.plots:
            raise InvalidRequest.of(
                "plots",
                f"a table cannot hold recurrence plots: send 'Accept: {GEOJSON}', or no plots",
            )

        def run(*, cancelled: threading.Event) -> Measured:
            return _measure(app, parsed, share, cancelled)

        found = await run_watched(request, run, slot=run_slot(app, share))
        app.metrics.ran(task="series", pixels=found.pixels, stages=asdict(found.timing), key=caller)
        with span("respond"):
            return await to_thread.run_sync(_response, found, media, folder)


def _measure(
    app: AppState, parsed: MeasureRequest, caller: str, cancelled: threading.Event
) -> Measured:
    return measure(
        parsed,
        app.engine,
        max_raster_bytes=app.settings.max_raster_bytes,
        max_fields=app.settings.max_fields,
        executor=app.executor,
        cache=app.cache,
        cancelled=cancelled,
        budget=app.budget,
        patience=PATIENCE,
        charge=partial(app.quotas.charged, caller),
    )


def _response(found: Measured, media: str, folder: Path) -> Response:
    document = found.document
    columns = ("clear", *document["bands"], *document["indices"])
    response: Response
    if media == GEOJSON:
        response = spooled(document_bytes(document), GEOJSON, folder / "series.json")
    else:
        if media == CSV:
            table = observations_csv(document["features"], columns).encode()
            response = spooled(table, CSV, folder / "series.csv")
        else:
            path = write_series_geoparquet(document["features"], columns, folder / "series.parquet")
            response = StoredFile(path, media_type=PARQUET, filename=path.name)
        for text in warning_headers(found.warnings):
            response.headers.append("PIMC-Warning", text)
    if "plots" in document:
        response.headers["PIMC-Model"] = document["plots"]["model"]
    response.headers["Server-Timing"] = server_timing(found.timing)
    response.headers["Vary"] = "Accept"
    return response
