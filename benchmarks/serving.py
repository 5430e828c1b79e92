"""Runs the service on a real socket, in a thread of the test's own process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from models.registry import ZOO
from service.api.app import create_app
from service.api.http_protocol import server_config
from service.settings import Settings


@contextmanager
def served(*, built_in: bool | None = None, **settings: Any) -> Iterator[httpx.Client]:
    """A client of a service with these settings; the service stops when the context ends.

    Args:
        built_in: whether the built-in bundles are served; None serves them unless `model_dir` names
            others, because loading them takes longer than the rest of a start.
        settings: of the service.
    """
    with ExitStack() as stack:
        if "state_dir" not in settings:  # the services of a test run would share the default one
            settings["state_dir"] = Path(stack.enter_context(TemporaryDirectory(prefix="state-")))
        made = Settings(**{"providers": "cpu", "port": 0, **settings})
        if built_in is None:
            built_in = made.model_dir is None
        yield from _run(create_app(made, built_in=ZOO if built_in else None), made)


def _run(app: FastAPI, settings: Settings) -> Iterator[httpx.Client]:
    config = server_config(app, settings, log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the service ended before it was ready; the log has the reason")
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(timeout=300)
