"""`python -m service`: bind, serve, drain on SIGTERM; one line per fault if the start fails.

python -m service                   serves
python -m service backup FOLDER     copies the jobs to a new folder, also while a service runs
python -m service restore FOLDER    copies a backup to an empty PIMC_STATE_DIR
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import logging.config
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.api.app import create_app, open_jobs
from service.api.auth import check_binding
from service.api.dependencies import AppState
from service.api.http_protocol import server_config
from service.jobs.backup import back_up, restore
from service.jobs.database import database_of
from service.jobs.s3 import storage_of
from service.jobs.storage import StorageUnreachable
from service.jobs.store import JobStore
from service.read.drivers import keep_needed_drivers
from service.settings import (
    SHORT_KEY,
    Settings,
    SettingsError,
    read_settings,
    short_keys,
    unknown_variables,
)
from service.telemetry import log_config
from service.threads import SupervisedThread

_MISUSE = 2
# Numbers of `mallopt` in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_TRIM_SECONDS = 10.0
_UVICORN_FAILED = 3
_FAILED = 1
"""Exit status if a supervised thread failed for good or the service hung; Compose, Kubernetes and
systemd then start the service again."""
_ACCEPTED_PER_TURN = 16
"""Largest number of connections that are accepted in one turn of the event loop."""
_COLLECT_AFTER = 20_000
"""Number of new objects after which garbage is collected; Python's default is 700."""
_STUCK_SECONDS = 12.0
"""Seconds after the grace period at which a process that hangs ends itself. With the default grace
period of 30 s, Compose and systemd send SIGKILL after 45 s."""


def main() -> None:
    """Serve until stopped, or run a command."""
    if len(sys.argv) > 1:
        _run_command(sys.argv[1:])
        return
    _configure_malloc()  # first: the limit on heaps does not affect existing heaps
    try:
        keep_needed_drivers()
        settings = read_settings()
        check_binding(settings)
        jobs = open_jobs(settings)
    except SettingsError as error:
        sys.exit(_report(error))
    serve(settings, jobs)


def _run_command(arguments: list[str]) -> None:
    """Back jobs up, or restore them."""
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="Without a command, start the service. Settings are environment variables "
        "whose names begin with PIMC_.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("backup", "copy the jobs of PIMC_STATE_DIR to a new folder; a service may be running"),
        ("restore", "copy a backup to PIMC_STATE_DIR, which must not hold jobs"),
    ):
        commands.add_parser(name, help=text, description=text).add_argument(
            "folder",
            type=Path,
            help="folder of the backup; for `backup` it must not exist yet",
        )
    given = parser.parse_args(arguments)
    try:
        settings = read_settings()
        state, url = settings.state_folder, database_of(settings)
        storage = storage_of(state, settings.storage_url, settings.storage_endpoint)
        if given.command == "backup":
            backup = back_up(state, given.folder, database_url=url, storage=storage)
            size = f"{backup.size / 1e6:.1f} MB"
            message = (
                f"{backup.jobs} jobs, {backup.results} with a result, {size}, in {given.folder}"
            )
        else:
            jobs = restore(given.folder, state, database_url=url, storage=storage)
            message = f"{jobs} jobs in {storage.name}"
    except SettingsError as error:
        sys.exit(_report(error))
    except StorageUnreachable as error:
        message = f"PIMC_STORAGE_URL: the bucket cannot be used: {error.reason}"
        sys.exit(_report(SettingsError(message)))
    except OSError as error:
        sys.exit(_report(SettingsError(f"{given.command} of {given.folder} failed: {error}")))
    sys.stdout.write(f"{message}\n")


def serve(settings: Settings, jobs: JobStore) -> None:
    """Serve until stopped, with validated settings.

    Args:
        settings: the settings.
        jobs: the store of the state directory, which it has locked; closed at the end.

    Raises:
        SystemExit: the start failed (status 2), or the service stopped because of a fault (1).
    """
    log = log_config(settings.log_level)
    logging.config.dictConfig(log)
    for name in unknown_variables():
        logging.getLogger("service").warning(
            "%s is not a setting of this service and has no effect: check its spelling", name
        )
    if short := short_keys():
        warning = "%d of the PIMC_API_KEYS have fewer than %d characters and can be guessed"
        logging.getLogger("service").warning(warning, short, SHORT_KEY)
    app = create_app(settings, jobs)
    config = server_config(app, settings, log_config=log)
    end_after = settings.grace_seconds + _STUCK_SECONDS
    server = DrainingServer(
        config,
        app,
        grace_seconds=settings.grace_seconds,
        on_stop=partial(_end_process_after, end_after),
    )
    try:
        server.run()
    except SystemExit as stop:
        # uvicorn exits with a status of its own if the start fails; the log has the cause.
        sys.exit(_MISUSE if stop.code == _UVICORN_FAILED else stop.code)
    if server.failed:
        sys.exit(_FAILED)


def _end_process_after(seconds: float) -> None:
    """End the process after some seconds even if threads hang; jobs resume at the next start."""

    def end() -> None:
        time.sleep(seconds)
        logging.getLogger("service").critical(
            "the service did not stop in time; its process ends now",
            extra={"seconds": seconds},
        )
        os._exit(_FAILED)

    threading.Thread(target=end, name="end", daemon=True).start()


def _configure_malloc() -> None:
    """Configure glibc's malloc to return freed memory to the system; no effect with other libcs.

    By default glibc keeps one heap per thread, with arrays of up to 32 MiB in it and holes between
    them. After requests of fifty clients, 1,400 MB stay in use by default and 500 MB with these
    options.
    """
    try:
        libc = ctypes.CDLL(None)
        set_option, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return
    set_option(_M_ARENA_MAX, 2)
    set_option(_M_MMAP_THRESHOLD, 2**20)
    # By default malloc returns each free end of a heap of 128 KiB or more, and the next window
    # allocates it again: a land-cover run of 512 x 512 pixels has 16,000 page faults instead of
    # 4,000.
    set_option(_M_TRIM_THRESHOLD, 2**25)
    SupervisedThread("trim", partial(_trim_repeatedly, trim)).start()


def _trim_repeatedly(trim: Callable[[int], int]) -> None:
    """Also return the free pages inside the heaps, which remain after a peak of load."""
    while True:
        time.sleep(_TRIM_SECONDS)
        trim(0)


class DrainingServer(uvicorn.Server):
    """Server that drains on SIGTERM: it rejects new requests, lets running ones end, then closes.

    uvicorn's own server closes the sockets first, so that a client cannot distinguish a stop from
    a crash.

    Args:
        config: uvicorn's configuration.
        app: application made by `create_app`.
        grace_seconds: seconds that running requests have to end.
        on_stop: called once, when the server begins to stop.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        *,
        grace_seconds: float,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._on_stop = on_stop
        self.failed = False
        """Whether the server stops because a supervised thread failed for good."""
        self._app = app
        self._grace_seconds = grace_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; at a second signal, stop without waiting for running requests."""
        del frame
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_seconds
            self._on_stop()
            state = self._state()
            if state is not None:
                state.closing.set()
        else:
            self.should_exit = True
            self.force_exit = self.force_exit or sig == signal.SIGINT

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and leave the objects of the start out of garbage collections.

        A collection of all objects holds up every thread, for as long as it takes to look at each:
        with 300 requests in flight 130 to 190 ms, every ten seconds at Python's own threshold.
        """
        await super().startup(sockets)
        await self._listen_again()
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER, 10, 10)

    async def _listen_again(self) -> None:
        """Register each listening socket several times.

        uvloop accepts one connection per registration and turn of the event loop. With a single
        one, clients that open connections in a loop delay those of all others by seconds.
        """
        config, loop = self.config, asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            kind: Any = config.http_protocol_class
            made: asyncio.Protocol = kind(
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return made

        for listener in [one for server in self.servers for one in server.sockets]:
            for _ in range(_ACCEPTED_PER_TURN - 1):
                again = socket.socket(fileno=os.dup(listener.fileno()))
                self.servers.append(
                    await loop.create_server(protocol, sock=again, backlog=config.backlog)
                )

    async def on_tick(self, counter: int) -> bool:
        """Check ten times a second whether to close."""
        state = self._state()
        if self._deadline is None and state is not None and state.runner.failed:
            self.failed = True
            self.handle_exit(signal.SIGTERM, None)
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0 or state is None or not state.admission.held:
                # Responses that are still being sent have the rest of the grace period.
                self.config.timeout_graceful_shutdown = max(1, round(left))
                self.should_exit = True
        return await super().on_tick(counter)

    def _state(self) -> AppState | None:
        """The application's state; None before its start is complete."""
        return getattr(self._app.state, "pimc", None)


def _report(error: SettingsError) -> int:
    """Write an error to stderr.

    Returns:
        The exit status of a failed start.
    """
    sys.stderr.write(f"{error}\n")
    return _MISUSE


if __name__ == "__main__":
    main()
