"""The application: settings in, ASGI out."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from anyio import to_thread
from fastapi import FastAPI

from models.registry import ZOO, Registry
from service.admission import Admission
from service.dependencies import Held
from service.engine import Engine
from service.openapi import Described
from service.problems import add_handlers, fault
from service.routes import explorer, health, models, tasks
from service.security import Keys, SecurityHeaders
from service.settings import Settings, read_settings
from service.telemetry import Metrics, RequestRecord
from service.watch import ReadersPace

_LOG = logging.getLogger(__name__)
_DESCRIPTION = (
    "Land-cover classes, vegetation forecasts and embeddings from satellite image time series. "
    "Send the GeoTIFFs of a stack as `files`; `Accept` chooses between a COG, a zip and JSON."
)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service as an ASGI application; models are loaded when its lifespan starts.

    Args:
        settings: None reads them from the environment.

    Raises:
        SettingsError: the environment makes no usable settings.
    """
    settings = settings or read_settings()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # The port opens only once everything is loaded and warm, or has said why not.
        engine = await to_thread.run_sync(_load, settings)
        metrics.provider(engine.provider)
        app.state.held = Held(
            settings=settings,
            engine=engine,
            admission=Admission(settings.max_concurrency),
            metrics=metrics,
            keys=Keys(key.get_secret_value() for key in settings.api_keys),
        )
        try:
            yield
        finally:
            await to_thread.run_sync(engine.close)

    app = Described(title="PIMC", version=_version(), description=_DESCRIPTION, lifespan=lifespan)
    for router in (tasks.router, models.router, health.router, explorer.router):
        app.include_router(router)
    add_handlers(app)
    app.add_middleware(SecurityHeaders)
    # Later is further out. The record sees every answer, and what the other let through; the pace
    # is about the socket alone.
    app.add_middleware(RequestRecord, metrics=metrics, on_fault=fault)
    app.add_middleware(ReadersPace)
    return app


def _load(settings: Settings) -> Engine:
    folders = [ZOO] if settings.model_dir is None else [ZOO, settings.model_dir]
    registry = Registry.load(*folders)
    engine = Engine(registry, providers=settings.providers)
    for name, reason in registry.refused.items():  # the engine logs its own
        _LOG.error("refused bundle", extra={"bundle": name, "reason": reason})
    served = sorted(model.card.id for model in engine.models.values())
    _LOG.info("models loaded", extra={"provider": engine.provider, "models": served})
    return engine


def _version() -> str:
    try:
        return version("pimc-client")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0+checkout"
