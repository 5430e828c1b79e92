"""A run in a worker thread, for as long as somebody waits for it."""

from __future__ import annotations

import asyncio
import threading
from typing import Protocol, TypeVar

from anyio import to_thread
from starlette.requests import Request

Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")


class Run(Protocol[Result_co]):
    """Work that can be told to stop."""

    def __call__(self, *, cancelled: threading.Event) -> Result_co:
        """Do it; stop soon once `cancelled` is set."""
        ...


async def run_watched(request: Request, run: Run[Result]) -> Result:
    """Run in a thread; tell the run when the caller has gone.

    Args:
        request: its body must have been read to the end.
        run: called with `cancelled`, an event that is set once nobody waits any more.
    """
    gone = threading.Event()
    watcher = asyncio.create_task(_set_once_gone(request, gone))
    try:
        return await to_thread.run_sync(lambda: run(cancelled=gone))
    finally:
        # Also where this task was cancelled, as at a shutdown: then nobody waits either.
        gone.set()
        watcher.cancel()


async def _set_once_gone(request: Request, gone: threading.Event) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    gone.set()
