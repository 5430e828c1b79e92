"""Python modules as processes that are forked, as imports take most of a start's processor time.

    python -m tests.kits.forks SOCKET    imports what services and workers import, and forks

The first process starts this server, and it ends with the tests. A forked process has its own
environment, arguments and limits, runs its module as `python -m` does, and can be killed.
`test_start` starts the service without it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from tests.kits.patience import PATIENCE

ROOT = Path(__file__).parents[2]
_MOST_BYTES = 2**18
"""Largest size of a message: the environment of a process."""


class Forked:
    """A process, with the interface of `subprocess.Popen` as far as tests use it.

    Args:
        module: what `python -m` would run, in the root of the repository.
        arguments: its arguments.
        variables: environment in addition to that of the tests.
        file_bytes: largest size of a file that it can write; 0 for no limit.
        stdout: where its output goes; None for nowhere.
        stderr: where its errors go; None for a pipe, the attribute `stderr`.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        variables: Mapping[str, str],
        file_bytes: int = 0,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
    ) -> None:
        self.returncode: int | None = None
        self.stderr: IO[str] | None = None
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
        message = json.dumps([module, arguments, environment, file_bytes]).encode()
        self._keeper, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as sent:
            sent.enter_context(theirs)
            if stdout is None:
                stdout = sent.enter_context(Path(os.devnull).open("w"))
            if stderr is None:
                read, write = os.pipe()
                self.stderr, stderr = os.fdopen(read), sent.enter_context(os.fdopen(write, "w"))
            given = [theirs.fileno(), stdout.fileno(), stderr.fileno()]
            socket.send_fds(_server(), [message], given)
        self.pid = int(self._keeper.recv(64))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns the exit code, which is negative after a signal."""
        if self.returncode is None:
            self._keeper.settimeout(timeout)
            try:
                self.returncode = int(self._keeper.recv(64))
            except TimeoutError:
                raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0.0) from None
            self._keeper.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self.returncode is None and not select.select([self._keeper], [], [], 0)[0]:
            return None
        return self.wait()

    def send_signal(self, number: int) -> None:
        """Send a signal; does nothing once it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def ran(
    module: str, *arguments: str, variables: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a module to its end: what `subprocess.run` would return for `python -m`."""
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        process = Forked(module, *arguments, variables=variables, stdout=output, stderr=errors)
        code = process.wait(PATIENCE)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess([module, *arguments], code, *texts)


@cache
def _server() -> socket.socket:
    """The connection to the server of this process, which it starts; the server ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.kits.forks", str(theirs.fileno())]
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# In the server ----------------------------------------------------------------------------------


def _serve(link: socket.socket) -> tuple[str, list[str]] | None:
    """Fork until the tests end.

    Returns:
        In a forked process its module and arguments; None in the others.
    """
    _import_all()
    while True:
        message, descriptors, _, _ = socket.recv_fds(link, _MOST_BYTES, 3)
        if not message:
            return None
        report, *streams = descriptors
        if os.fork() == 0:
            link.close()
            with socket.socket(fileno=report) as keeper:
                child = os.fork()
                if child:
                    for stream in streams:
                        os.close(stream)
                    _keep(child, keeper)
                    os._exit(0)
            return _prepared(streams, *json.loads(message))
        for descriptor in descriptors:
            os.close(descriptor)
        while _ended():
            pass


def _import_all() -> None:
    """Import what the modules import that are run, but none of these modules."""
    import service

    for package in pkgutil.walk_packages(service.__path__, "service."):
        if not package.name.endswith("__main__"):
            importlib.import_module(package.name)
    for name in ("distributed.cli.dask_worker", "obstore.store", "psycopg"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # pages that no collection touches stay shared


def _ended() -> bool:
    """Whether a process that keeps another one has ended, and is now gone."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


def _keep(child: int, keeper: socket.socket) -> None:
    """Report a process's id and exit code; it is killed if the tests end before it."""
    keeper.send(str(child).encode())
    if keeper in select.select([os.pidfd_open(child), keeper], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(BrokenPipeError):
        keeper.send(str(code).encode())


def _prepared(
    streams: list[int],
    module: str,
    arguments: list[str],
    variables: dict[str, str],
    file_bytes: int,
) -> tuple[str, list[str]]:
    """Give a process its streams, environment and limits; returns module and arguments."""
    for target, source in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # else the server's, whatever TMPDIR is
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    import dask.config

    dask.config.refresh()  # it reads the environment when it is imported
    return module, arguments


if __name__ == "__main__":
    run = _serve(socket.socket(fileno=int(sys.argv[1])))
    if run is not None:
        sys.argv = [run[0], *run[1]]
        runpy.run_module(run[0], run_name="__main__", alter_sys=True)
