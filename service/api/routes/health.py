"""Health and metrics routes: liveness, readiness, Prometheus counts."""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
import resource
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from models.card import Modality, Task
from service.api.dependencies import KNOWN_IF_PRIVATE, App, AppState, known_if_private
from service.api.openapi import problems
from service.api.routes.models import DEFAULTS, defaults
from service.api.schemas.response_bodies import ClusterReady, Live, Ready, ReadyStatus
from service.errors import NotReady, Unauthorized
from service.infer.engine import Engine
from service.telemetry import METRICS_MEDIA_TYPE, free_bytes

router = APIRouter(tags=["operations"])
_BUSY = 0.9
"""Share of queue slots and of open files from which the server is not ready."""
_BUSY_SECONDS = 5
"""`Retry-After` of a server that is not ready because it is busy, seconds."""
_DESCRIPTORS = Path("/proc/self/fd")
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
    """Readiness: 200 if every default model is loaded and warm, and jobs can be stored and run.

    A server that is nearly at capacity is not ready, so that a load balancer sends new requests to
    others before it rejects them.
    """
    try:
        await known_if_private(request, app)
    except Unauthorized:
        try:
            _ready(app)
        except NotReady as error:
            raise NotReady(
                "the service is not ready; with an API key the response states why",
                retry_after=error.retry_after,
            ) from error
        return ReadyStatus()
    return _ready(app)


def _ready(app: AppState) -> Ready:
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
    faults += [f"model '{name}' fails on {engine.provider}" for name in engine.failing]
    if faults:
        raise NotReady("; ".join(faults), retry_after=60)
    busy = _busy(app.admission.slots_held, app.admission.slots)
    if busy:
        raise NotReady("; ".join(busy), retry_after=_BUSY_SECONDS)
    return Ready(
        provider=engine.provider,
        models=sorted(model.card.id for model in engine.models.values()),
        defaults=defaults(engine),
        refused=dict(engine.refused),
        workers=app.runner.workers,
        disk_free=disk_free,
        cluster=None if app.cluster is None else ClusterReady(**asdict(app.cluster())),
    )


def _busy(held: int, slots: int) -> list[str]:
    """Resources that are nearly used up, one phrase each.

    Args:
        held: queue slots in use.
        slots: queue slots of all callers together.
    """
    found = [f"{held} of {slots} queue slots are in use"] if held >= _BUSY * slots else []
    try:
        open_files = sum(1 for _ in _DESCRIPTORS.iterdir())
    except OSError:  # not Linux
        return found
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and open_files >= _BUSY * most:
        found.append(f"{open_files} of {most} files are open")
    return found


@router.get(
    "/metrics", response_class=Response, responses=_METRICS, dependencies=[KNOWN_IF_PRIVATE]
)
async def metrics(app: App) -> Response:
    """Metrics in the Prometheus text format."""
    return Response(await app.scrapes.latest(), media_type=METRICS_MEDIA_TYPE)


def _served(engine: Engine, task: Task, modality: Modality) -> bool:
    bundle = engine.registry.default(task, modality)
    return bundle is not None and bundle.card.name in engine.models


def _reason(engine: Engine, task: Task, modality: Modality) -> str:
    bundle = engine.registry.default(task, modality)
    if bundle is None:
        return f"no bundle serves the task {task} ({modality})"
    return engine.refused.get(bundle.card.name, f"'{bundle.card.id}' is not loaded")
