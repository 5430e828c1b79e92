"""Health and metrics routes: liveness, readiness, Prometheus counts."""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
import tempfile
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread
from fastapi import APIRouter, Request, Response

from models.card import Modality, Task
from service.api.dependencies import KNOWN_IF_PRIVATE, App, AppState, known_if_private
from service.api.openapi import problems
from service.api.routes.models import DEFAULTS, defaults
from service.api.schemas import Live, Ready, ReadyStatus
from service.errors import NotReady, Unauthorized
from service.infer.engine import Engine
from service.telemetry import METRICS_MEDIA_TYPE, free_bytes

router = APIRouter(tags=["operations"])
_STORE_SECONDS = 2.0
_METRICS: dict[int | str, dict[str, Any]] = {
    200: {"content": {METRICS_MEDIA_TYPE: {"schema": {"type": "string"}}}},
    **problems(["unauthorized"]),
}


@router.get("/health/live")
async def live() -> Live:
    """Liveness: 200 while the process runs."""
    return Live()


@router.get("/health/ready", responses=problems(["not_ready"]))
async def ready(request: Request, app: App) -> Ready | ReadyStatus:
    """Readiness: 200 if every default model is loaded and warm, and jobs can be stored and run."""
    try:
        await known_if_private(request, app)
    except Unauthorized:
        try:
            await _ready(app)
        except NotReady as error:
            raise NotReady(
                "the service is not ready; with an API key the response states why",
                retry_after=error.retry_after,
            ) from error
        return ReadyStatus()
    return await _ready(app)


async def _ready(app: AppState) -> Ready:
    if app.closing.is_set():
        raise NotReady("the service is stopping", retry_after=10)
    engine = app.engine
    faults = [_reason(engine, *which) for which in DEFAULTS.values() if not _served(engine, *which)]
    faults += app.runner.faults()
    folders = {"state": app.settings.state_folder, "scratch": Path(tempfile.gettempdir())}
    disk_free = {name: free_bytes(folder) for name, folder in folders.items()}
    faults += [
        f"{count} bytes are free on the disk of '{name}', and at least "
        f"{app.settings.min_free_bytes} are required (PIMC_MIN_FREE_BYTES)"
        for name, count in disk_free.items()
        if count < app.settings.min_free_bytes
    ]
    faults += await _store_faults(app)
    faults += [f"model '{name}' fails on {engine.provider}" for name in engine.failing]
    if faults:
        raise NotReady("; ".join(faults), retry_after=60)
    return Ready(
        provider=engine.provider,
        models=sorted(model.card.id for model in engine.models.values()),
        defaults=defaults(engine),
        refused=dict(engine.refused),
        workers=app.runner.workers,
        disk_free=disk_free,
    )


async def _store_faults(app: AppState) -> list[str]:
    fault: str | None = f"the job store did not respond within {_STORE_SECONDS:g} s"
    # A separate limiter: checks of a store that hangs must not take the threads of requests.
    with anyio.move_on_after(_STORE_SECONDS):
        fault = await to_thread.run_sync(app.jobs.fault, abandon_on_cancel=True, limiter=app.probe)
    return [] if fault is None else [fault]


@router.get(
    "/metrics", response_class=Response, responses=_METRICS, dependencies=[KNOWN_IF_PRIVATE]
)
async def metrics(app: App) -> Response:
    """Metrics in the Prometheus text format."""
    return Response(app.metrics.text(), media_type=METRICS_MEDIA_TYPE)


def _served(engine: Engine, task: Task, modality: Modality) -> bool:
    bundle = engine.registry.default(task, modality)
    return bundle is not None and bundle.card.name in engine.models


def _reason(engine: Engine, task: Task, modality: Modality) -> str:
    bundle = engine.registry.default(task, modality)
    if bundle is None:
        return f"no bundle serves the task {task} ({modality})"
    return engine.refused.get(bundle.card.name, f"'{bundle.card.id}' is not loaded")
