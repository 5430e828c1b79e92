"""A PostgreSQL server of the tests: in a temporary folder, as an ordinary user, without a port."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg

from tests.kits.patience import PATIENCE
from tests.kits.programs import require


class Postgres:
    """A server that listens at a socket in a folder of its own.

    Args:
        folder: with its data, and the socket.
        programs: folder of `psql` and its like.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder = folder
        self.programs = programs

    def url(self, database: str = "postgres") -> str:
        """Address of a database."""
        return f"postgresql:///{database}?host={self._folder}&user=pimc"

    def database(self) -> str:
        """Make an empty database; returns its address."""
        name = f"test-{uuid.uuid4()}"
        with closing(psycopg.connect(self.url(), autocommit=True)) as db:
            db.execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type]
        return self.url(name)

    def run(self, program: str, *arguments: str, **how: object) -> str:
        """Run a program of PostgreSQL; returns what it prints."""
        command = [str(self.programs / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **how)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr
        return str(done.stdout)


@contextmanager
def server() -> Iterator[Postgres]:
    """A running server; skips without PostgreSQL, but never in CI."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    alone = shutil.which("postgres")
    require(found or alone, "the postgres server", "postgresql")
    programs = found[-1].parent if found else Path(str(alone)).parent
    # A socket's path may have 107 characters, so it does not lie in pytest's folder.
    folder = Path(tempfile.mkdtemp(prefix="pimc-pg-", dir="/tmp"))
    try:
        # It refuses to run as root.
        person: list[str] = []
        if os.geteuid() == 0:
            who = pwd.getpwnam("postgres")
            os.chown(folder, who.pw_uid, who.pw_gid)
            person = [f"--reuid={who.pw_uid}", f"--regid={who.pw_gid}", "--clear-groups"]
        # It ends with the tests, however they end.
        ordinary = ["setpriv", "--pdeathsig=QUIT", *person]
        data = folder / "data"
        made = [str(programs / "initdb"), f"--pgdata={data}", "--username=pimc", "--auth=trust"]
        options = ["--no-sync", "--no-locale", "--encoding=UTF8"]
        subprocess.run([*ordinary, *made, *options], check=True, capture_output=True, cwd=folder)
        settings = {"listen_addresses": "", "unix_socket_directories": folder, "fsync": "off"}
        run = [str(programs / "postgres"), "-D", str(data)]
        run += [f"--{name}={value}" for name, value in settings.items()]
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen([*ordinary, *run], stderr=output, stdout=output, cwd=folder)
        try:
            made_server = Postgres(folder, programs)
            _wait(made_server, process, log)
            yield made_server
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait(PATIENCE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(made: Postgres, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            psycopg.connect(made.url()).close()
        except psycopg.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        else:
            return
