"""Client disconnects: a run is cancelled once its client has disconnected."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from contextvars import ContextVar
from typing import Protocol, TypeVar

import anyio
from anyio import to_thread
from starlette.requests import Request

from service.api.admission import Admitted
from service.errors import Cancelled

Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")
SHORT_BODY = 2**18
"""Largest size of a body that is parsed at once, bytes."""
_GONE: ContextVar[threading.Event | None] = ContextVar("gone", default=None)
"""Set once the client of the request has disconnected; of this task and the threads it starts."""


class Run(Protocol[Result_co]):
    """Work that can be cancelled."""

    def __call__(self, *, cancelled: threading.Event) -> Result_co:
        """Run, and stop soon after `cancelled` is set.

        Raises:
            Cancelled: `cancelled` was set before the end.
        """
        ...


def check_connected() -> None:
    """Stop reading a request whose client has disconnected; called between pieces of the work.

    Raises:
        Cancelled: the client disconnected.
    """
    gone = _GONE.get()
    if gone is not None and gone.is_set():
        raise Cancelled("the client disconnected while its request was read")


async def in_turn(parse: Callable[[], Result], *, size: int, admitted: Admitted) -> Result:
    """Parse or write JSON in a thread; a long text in turn, as Python runs one thread at a time.

    Args:
        parse: the work.
        size: size of the text, bytes.
        admitted: the admitted request.
    """
    if size <= SHORT_BODY:
        return await to_thread.run_sync(parse, limiter=admitted.intake)
    async with admitted.turn():
        return await to_thread.run_sync(parse)


async def parse_body(
    request: Request, parse: Callable[[], Result], *, size: int, admitted: Admitted
) -> Result:
    """Parse a body in a thread; a long one in turn, and for as long as the client stays connected.

    Args:
        request: the request, whose body has been read to the end.
        parse: parses the body.
        size: size of the body, bytes.
        admitted: the admitted request.

    Raises:
        Cancelled: the client disconnected before the body was parsed.
    """
    parsing = in_turn(parse, size=size, admitted=admitted)
    return await (parsing if size <= SHORT_BODY else unless_gone(request, parsing))


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Await work on a body that has been read, only for as long as the client stays connected.

    Args:
        request: the request, whose body has been read to the end.
        work: the work, such as fetching the files that the body names.

    Raises:
        Cancelled: the client disconnected before the work was done.
    """
    gone = threading.Event()
    outer = _GONE.set(gone)
    with anyio.CancelScope() as working:
        watcher = asyncio.create_task(_watch_disconnect(request, gone, working))
        try:
            return await work
        finally:
            watcher.cancel()
            _GONE.reset(outer)
    raise Cancelled("the client disconnected while its request was read")


async def run_watched(
    request: Request, run: Run[Result], *, slot: AbstractAsyncContextManager[None]
) -> Result:
    """Wait for a run slot, then run in a thread for as long as the client stays connected.

    Args:
        request: the request, whose body has been read to the end.
        run: called with `cancelled`, an event that is set once the client has disconnected.
        slot: context of the run slot, entered before the run and left after it.

    Returns:
        What `run` returns.

    Raises:
        Cancelled: the client disconnected before the run began or ended.
    """
    gone = threading.Event()
    waiting = anyio.CancelScope()
    watcher = asyncio.create_task(_watch_disconnect(request, gone, waiting))
    try:
        async with AsyncExitStack() as held:
            with waiting:
                await held.enter_async_context(slot)
            if gone.is_set():
                raise Cancelled("the client disconnected before the run began")
            return await to_thread.run_sync(lambda: run(cancelled=gone))
    finally:
        # Also when the server cancels this task at its shutdown.
        gone.set()
        watcher.cancel()


async def _watch_disconnect(
    request: Request, gone: threading.Event, waiting: anyio.CancelScope
) -> None:
    """Set `gone` and cancel `waiting` once the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    gone.set()
    waiting.cancel()
