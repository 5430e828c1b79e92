"""What the application holds, handed to routes, and what each request gets of its own."""

# No `from __future__ import annotations` here: FastAPI needs the types at run time.
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import anyio
from anyio import to_thread
from fastapi import Depends, Header, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer

from service.admission import Admission
from service.engine import Engine
from service.intake import Limits
from service.jobs import JobStore
from service.negotiation import prefers_async
from service.runner import JobRunner
from service.security import Keys, check_reached
from service.settings import Settings
from service.telemetry import Metrics


@dataclass(frozen=True, kw_only=True)
class Held:
    """What outlives a request: made by the lifespan, `app.state.held`."""

    settings: Settings
    engine: Engine
    admission: Admission
    metrics: Metrics
    keys: Keys
    jobs: JobStore
    runner: JobRunner
    closing: threading.Event
    """Set once the service is told to stop: nothing new is begun."""

    @property
    def limits(self) -> Limits:
        """What a body may hold."""
        return Limits(
            body_bytes=self.settings.max_body_bytes, idle_seconds=self.settings.upload_seconds
        )


async def held(request: Request) -> Held:
    """The application's own."""
    found = request.app.state.held
    if not isinstance(found, Held):
        raise TypeError("the lifespan has not run: app.state.held is not set")
    return found


async def own_folder(request: Request, app: Annotated[Held, Depends(held)]) -> AsyncIterator[Path]:
    """A folder that lives until the answer is sent, or has failed.

    What is to become a job's lies beside the jobs, so that it need not be copied.
    """
    stays = prefers_async(request.headers.getlist("prefer"))
    async for folder in _folder(app.jobs.requests if stays else None):
        yield folder


async def answer_folder(app: Annotated[Held, Depends(held)]) -> AsyncIterator[Path]:
    """A folder beside the jobs that lives until the answer is sent, or has failed."""
    async for folder in _folder(app.jobs.requests):
        yield folder


async def _folder(parent: Path | None) -> AsyncIterator[Path]:
    """A folder in another, or where the system keeps such."""
    folder = Path(await to_thread.run_sync(lambda: tempfile.mkdtemp(prefix="pimc-", dir=parent)))
    try:
        yield folder
    finally:
        # Also where the request was cancelled: nothing of it may stay.
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))


# These two check nothing: they have Swagger UI ask for a key and send it along.
_BEARER = HTTPBearer(auto_error=False, description="one of `PIMC_API_KEYS`, where set")
_API_KEY = APIKeyHeader(name="X-API-Key", auto_error=False)


async def known_caller(
    request: Request,
    app: Annotated[Held, Depends(held)],
    _bearer: Annotated[object, Security(_BEARER)],
    _key: Annotated[object, Security(_API_KEY)],
) -> str | None:
    """Only callers with a key, where keys are set.

    Returns:
        The caller's id, which stays the same for a key; None where no keys are set.

    Raises:
        Unauthorized: none or a wrong one came.
    """
    check_reached(request.scope, app.settings)
    return app.keys.check(request.headers)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the headers of a task ask for beside its answer's type."""

    respond_async: bool
    """A job, rather than an answer now."""
    idempotency_key: str | None


async def wishes(
    request: Request,
    prefer: Annotated[
        str | None, Header(description="`respond-async`: answer 202 and a job at once")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            pattern=r"^[!-~]+$",
            description="a repeat with the same key is answered with the first one's job",
        ),
    ] = None,
) -> Wishes:
    """What the headers ask for; `Prefer` may come several times."""
    del prefer  # there for the description
    return Wishes(
        respond_async=prefers_async(request.headers.getlist("prefer")),
        idempotency_key=idempotency_key,
    )


App = Annotated[Held, Depends(held)]
Folder = Annotated[Path, Depends(own_folder)]
AnswerFolder = Annotated[Path, Depends(answer_folder)]
Asked = Annotated[Wishes, Depends(wishes)]
KNOWN_CALLER = Depends(known_caller)
Caller = Annotated[str | None, Depends(known_caller)]
"""Who asks: `None` where no keys are set. Checked once a request, however often it is asked for."""
