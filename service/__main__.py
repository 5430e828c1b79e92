"""`python -m service`: bind, serve, drain on SIGTERM; one sentence if the start fails.

python -m service                   serves
python -m service backup FOLDER     copies the jobs to a new folder, also while a service runs
python -m service restore FOLDER    copies such a folder to an empty PIMC_STATE_DIR
"""

from __future__ import annotations

import argparse
import ctypes
import logging.config
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.api.app import create_app, open_jobs
from service.api.auth import check_binding
from service.api.dependencies import AppState
from service.api.http_protocol import server_config
from service.jobs.backup import back_up, restore
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
"""Exit status if a thread was given up or the service hung, after which it is started again."""
_STUCK_SECONDS = 12.0
"""Seconds after the grace period after which a process that hangs is ended. Compose and systemd
send SIGKILL after 45 s, with the default grace period of 30 s."""


def main() -> None:
    """Serve until stopped, or carry out a command."""
    if len(sys.argv) > 1:
        _command(sys.argv[1:])
        return
    _give_memory_back()  # first: the limit on heaps does not affect existing ones
    try:
        keep_needed_drivers()
        settings = read_settings()
        check_binding(settings)
        jobs = open_jobs(settings)
    except SettingsError as error:
        sys.exit(_refusal(error))
    serve(settings, jobs)


def _command(arguments: list[str]) -> None:
    """Back jobs up, or restore them."""
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="Without a command: serve. Settings are environment variables, PIMC_*.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("backup", "copy the jobs of PIMC_STATE_DIR to a new folder; a service may be running"),
        ("restore", "copy such a folder to PIMC_STATE_DIR, which must not hold jobs"),
    ):
        commands.add_parser(name, help=text, description=text).add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    try:
        state = read_settings().state_folder
        if given.command == "backup":
            made = back_up(state, given.folder)
            size = f"{made.size / 1e6:.1f} MB"
            said = f"{made.jobs} jobs, {made.results} with a result, {size}, in {given.folder}"
        else:
            said = f"{restore(given.folder, state)} jobs in {state}"
    except SettingsError as error:
        sys.exit(_refusal(error))
    except OSError as error:
        sys.exit(_refusal(SettingsError(f"{given.command} of {given.folder} failed: {error}")))
    sys.stdout.write(f"{said}\n")


def serve(settings: Settings, jobs: JobStore) -> None:
    """Serve with validated settings and a locked state directory."""
    log = log_config(settings.log_level)
    logging.config.dictConfig(log)
    for name in unknown_variables():
        logging.getLogger("service").warning("%s is not a setting of this service", name)
    if short := short_keys():
        said = "%d of the API keys have fewer than %d characters and can be guessed"
        logging.getLogger("service").warning(said, short, SHORT_KEY)
    app = create_app(settings, jobs)
    config = server_config(app, settings, log_config=log)
    end_after = settings.grace_seconds + _STUCK_SECONDS
    server = DrainingServer(
        config,
        app,
        grace_seconds=settings.grace_seconds,
        on_stop=partial(_end_at_last, end_after),
    )
    try:
        server.run()
    except SystemExit as stop:
        # uvicorn has its own exit status for a failed start; the log has the cause.
        sys.exit(_MISUSE if stop.code == _UVICORN_FAILED else stop.code)
    if server.failed:
        sys.exit(_FAILED)


def _end_at_last(seconds: float) -> None:
    """End the process after some time, whatever still hangs: jobs resume at the next start."""

    def end() -> None:
        time.sleep(seconds)
        logging.getLogger("service").critical(
            "the service did not stop in time and is ended", extra={"seconds": seconds}
        )
        os._exit(_FAILED)

    threading.Thread(target=end, name="end", daemon=True).start()


def _give_memory_back() -> None:
    """Configure glibc's malloc to return the memory of a window.

    By default glibc keeps one heap per thread, with arrays of up to 32 MiB in them and holes
    between: after fifty clients 1,400 MB stayed in use, with these options 500 MB.
    """
    try:
        libc = ctypes.CDLL(None)
        set_option, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return
    set_option(_M_ARENA_MAX, 2)
    set_option(_M_MMAP_THRESHOLD, 2**20)
    # Otherwise every free end of a heap of 128 KiB or more is returned and allocated again by the
    # next window: a land-cover run of 512 x 512 pixels then has 16,000 page faults, not 4,000.
    set_option(_M_TRIM_THRESHOLD, 2**25)
    SupervisedThread("trim", partial(_keep_trimming, trim)).start()


def _keep_trimming(trim: Callable[[int], int]) -> None:
    """Also return the holes inside the heaps, which a peak of load leaves."""
    while True:
        time.sleep(_TRIM_SECONDS)
        trim(0)


class DrainingServer(uvicorn.Server):
    """Drains on SIGTERM: new requests are rejected, running ones may end, then the sockets close.

    uvicorn by itself closes the sockets first, and a client cannot distinguish a stop from a crash.

    Args:
        config: uvicorn's.
        app: made by `create_app`.
        grace_seconds: seconds that running requests have to end.
        on_stop: called once, when it begins to stop.
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
        """Whether it stops because a thread was given up."""
        self._app = app
        self._grace_seconds = grace_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second signal does not wait."""
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

    async def on_tick(self, counter: int) -> bool:
        """Check ten times a second whether to close."""
        found = self._state()
        if self._deadline is None and found is not None and found.runner.failed:
            self.failed = True
            self.handle_exit(signal.SIGTERM, None)
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            state = self._state()
            if left <= 0 or state is None or not state.admission.held:
                # Responses that are still being sent have until then.
                self.config.timeout_graceful_shutdown = max(1, round(left))
                self.should_exit = True
        return await super().on_tick(counter)

    def _state(self) -> AppState | None:
        """The application's state; None before its start is complete."""
        return getattr(self._app.state, "pimc", None)


def _refusal(error: SettingsError) -> int:
    sys.stderr.write(f"{error}\n")
    return _MISUSE


if __name__ == "__main__":
    main()
