"""What the application holds, handed to routes, and what each request gets of its own."""

# No `from __future__ import annotations` here: FastAPI needs the types at run time.
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import anyio
from anyio import to_thread
from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer

from service.admission import Admission
from service.engine import Engine
from service.intake import Limits
from service.security import Keys
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

    @property
    def limits(self) -> Limits:
        """What a body may hold."""
        return Limits(body_bytes=self.settings.max_body_bytes)


async def held(request: Request) -> Held:
    """The application's own."""
    found = request.app.state.held
    if not isinstance(found, Held):
        raise TypeError("the lifespan has not run: app.state.held is not set")
    return found


async def own_folder() -> AsyncIterator[Path]:
    """A folder that lives until the answer is sent, or has failed."""
    folder = Path(await to_thread.run_sync(lambda: tempfile.mkdtemp(prefix="pimc-")))
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
    return app.keys.check(request.headers)


App = Annotated[Held, Depends(held)]
Folder = Annotated[Path, Depends(own_folder)]
KNOWN_CALLER = Depends(known_caller)
Caller = Annotated[str | None, Depends(known_caller)]
"""Who asks: `None` where no keys are set. Checked once a request, however often it is asked for."""
