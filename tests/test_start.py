"""The start as a process: ready, or ended with one line of error, without slow imports."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from models.registry import ZOO, Registry
from service.__main__ import DrainingServer
from service.api.app import create_app
from service.infer.engine import Engine, load_models
from service.infer.session import CUDA
from service.settings import Settings, SettingsError
from tests.kits.forks import Forked, ran
from tests.kits.patience import PATIENCE, soon
from tests.kits.process import RUNNING

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def environment(state: Path, **settings: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PIMC_")}
    return {**inherited, "PIMC_STATE_DIR": str(state), "PIMC_PROVIDERS": "cpu", **settings}


def python(
    *arguments: str, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the interpreter in the checkout to its end, in an environment or in that of the tests."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def failed_start(state: Path, *, forked: bool = True, **settings: str) -> tuple[int, str]:
    """Exit status and stderr of a `python -m service` that does not start.

    Args:
        state: its state directory.
        forked: whether the process has imported the service's packages before.
        settings: its environment.
    """
    variables = environment(state, **settings)
    if forked:
        done = ran("service", variables=variables)
    else:
        done = python("-m", "service", variables=variables)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@contextmanager
def started(
    log: Path, module: str, *arguments: str, forked: bool = False, **settings: str
) -> Iterator[int]:
    """The port of a service that runs as a process; its log is in a file. See `failed_start`."""
    variables = environment(log.parent / "state", **settings)
    process: Forked | subprocess.Popen[bytes]
    with log.open("w") as to:
        if forked:
            process = Forked(module, *arguments, variables=variables, stderr=to)
        else:
            command = [sys.executable, "-m", module, *arguments]
            process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=to)
    try:
        assert soon(lambda: process.poll() is not None or RUNNING.search(log.read_text()))
        found = RUNNING.search(log.read_text())
        assert found, log.read_text()
        yield int(found[1])
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)


def test_a_public_address_needs_keys_or_an_explicit_setting(tmp_path: Path) -> None:
    """Which addresses and settings, `test_settings` shows."""
    host = socket.gethostname()
    status, output = failed_start(tmp_path, PIMC_HOST=host)
    assert status == 2
    assert output.startswith(f"PIMC_HOST is {host}, which other machines can reach")
    assert len(output.splitlines()) == 1


def test_each_invalid_setting_is_one_line_of_error(tmp_path: Path) -> None:
    status, output = failed_start(
        tmp_path,
        forked=False,
        PIMC_PORT="http",
        PIMC_PROVIDERS="tpu",
        PIMC_MODEL_DIR="/no/such/folder",
        PIMC_ALLOWED_HOSTS="a/b",
        PIMC_API_KEYS="swordfish,sha256:12",
    )
    assert status == 2
    lines = dict(line.split(": ", 1) for line in output.splitlines())
    assert set(lines) == {
        "PIMC_PORT", "PIMC_PROVIDERS", "PIMC_MODEL_DIR", "PIMC_ALLOWED_HOSTS", "PIMC_API_KEYS",
    }  # fmt: skip
    assert lines["PIMC_MODEL_DIR"] == "/no/such/folder is not an existing directory"
    assert lines["PIMC_API_KEYS"].startswith("a key that begins with sha256:")
    assert "swordfish" not in output


def test_invalid_checksums_end_the_start(tmp_path: Path) -> None:
    sums = tmp_path / "sums"
    settings = Settings(model_checksums=sums)
    with pytest.raises(
        SettingsError, match=r"^PIMC_MODEL_CHECKSUMS: .*: No such file or directory"
    ):
        load_models(settings)
    sums.write_text("models are fine\n")
    status, output = failed_start(tmp_path, PIMC_MODEL_CHECKSUMS=str(sums), PIMC_PORT="0")
    assert status == 2
    errors = [line for line in map(json.loads, output.splitlines()) if line["level"] == "error"]
    assert errors[0]["message"].startswith("PIMC_MODEL_CHECKSUMS: ")
    assert errors[0]["message"].endswith("line 1 of sums is not 'sha256  folder/file'")


def test_an_unreadable_file_of_keys_ends_the_start(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    app = create_app(Settings(api_keys_file=keys, state_dir=tmp_path / "state"), built_in=None)

    async def start() -> None:
        async with app.router.lifespan_context(app):
            pytest.fail("the service started without its keys")

    with pytest.raises(SettingsError, match=r"^PIMC_API_KEYS_FILE: .*: No such file or directory"):
        anyio.run(start)
    keys.write_text("anna swordfish expires=soon\n")
    status, output = failed_start(tmp_path, PIMC_API_KEYS_FILE=str(keys), PIMC_PORT="0")
    assert status == 2
    errors = [line for line in map(json.loads, output.splitlines()) if line["level"] == "error"]
    assert errors[0]["message"].startswith("PIMC_API_KEYS_FILE: ")
    assert errors[0]["message"].endswith(
        "'soon' is not a date such as 2027-01-31 or a time such as 2027-01-31T12:00:00Z"
    )
    assert "swordfish" not in output


def test_missing_cuda_ends_the_start_with_one_line_of_error(tmp_path: Path) -> None:
    with Engine(Registry.load(write_zoo(tmp_path / "zoo")), threads=1) as engine:
        if engine.provider == CUDA:
            pytest.skip("needs a machine without CUDA")
    status, output = failed_start(tmp_path, PIMC_PROVIDERS="cuda", PIMC_PORT="0")
    assert status == 2
    errors = [line for line in map(json.loads, output.splitlines()) if line["level"] == "error"]
    assert errors[0]["message"].startswith("CUDA is required (PIMC_PROVIDERS=cuda), but ")
    assert "\n" not in errors[0]["message"]
    assert not any("stack" in line for line in errors)


def test_a_rejected_bundle_is_logged_and_the_zoo_is_served(tmp_path: Path) -> None:
    bad = tmp_path / "models" / "handed-in"
    bad.mkdir(parents=True)
    (bad / "card.json").write_text("{}")
    log = tmp_path / "log"
    with started(log, "service", PIMC_PORT="0", PIMC_MODEL_DIR=str(bad.parent)) as port:
        ready = httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=PATIENCE)
    assert ready.status_code == 200
    assert set(ready.json()["refused"]) == {"handed-in"}
    assert {name.partition("@")[0] for name in ready.json()["models"]} == {
        path.parent.name for path in ZOO.glob("*/card.json")
    }
    records = [line for line in map(json.loads, log.read_text().splitlines()) if "bundle" in line]
    assert [(line["level"], line["bundle"]) for line in records] == [("error", "handed-in")]
    assert "card.json is not valid" in records[0]["reason"]


def own_address() -> str:
    """An address of this machine that others can reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(
                ("192.0.2.1", 9)
            )  # an address for documentation; connecting a UDP socket sends nothing
            address = str(probe.getsockname()[0])
        except OSError:
            address = "127.0.0.1"
    if address.startswith("127."):
        pytest.skip("needs an address besides the loopback")
    return address


def test_an_app_on_another_server_rejects_remote_clients_without_keys(
    tmp_path: Path,
) -> None:
    command = ["uvicorn", "service.api.app:create_app", "--factory", "--host=0.0.0.0", "--port=0"]
    address = own_address()
    with (
        started(tmp_path / "log", *command, forked=True) as port,
        httpx.Client(base_url=f"http://{address}:{port}", timeout=PATIENCE) as stranger,
    ):
        response = stranger.get("/models")
        assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
        assert "PIMC_API_KEYS" in response.json()["detail"]
        assert stranger.get("/health/live").status_code == 200
        known = httpx.get(f"http://127.0.0.1:{port}/models", timeout=PATIENCE)
        assert known.status_code == 200
    zoo = write_zoo(tmp_path / "zoo")
    with (
        served(model_dir=zoo, host=address, api_keys=("swordfish",)) as keyed,
        httpx.Client(
            base_url=f"http://{address}:{keyed.base_url.port}", timeout=PATIENCE
        ) as stranger,
    ):
        assert stranger.get("/models").status_code == 401
        assert stranger.get("/models", headers={"X-API-Key": "swordfish"}).status_code == 200


# Runs `main` with the settings replaced by a peak of memory: 64 MiB of small blocks are freed below
# blocks that stay, so that the heap does not shrink by itself.
_PEAK = """
import ctypes, re, time
from service import __main__ as start

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def resident():
    return 1024 * int(re.search("VmRSS:(.*) kB", open("/proc/self/status").read())[1])

def peak():
    holes = [libc.malloc(2**16) for _ in range(1024)]
    libc.malloc(2**16)
    for hole in holes:
        ctypes.memset(hole, 1, 2**16)
    full = resident()
    for hole in holes:
        libc.free(ctypes.c_void_p(hole))
    while resident() > full - 2**25:
        time.sleep(0.01)
    raise SystemExit

start.read_settings = peak
start._TRIM_SECONDS = 0.01
start.main()
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
def test_the_memory_of_a_peak_is_returned_to_the_system() -> None:
    subprocess.run([sys.executable, "-c", _PEAK], cwd=ROOT, timeout=PATIENCE, check=True)


def test_objects_of_the_start_are_left_out_of_garbage_collections() -> None:
    app = FastAPI()
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="off")
    server = DrainingServer(config, app, grace_seconds=1)

    async def run() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(server.serve)
            while not server.started:
                await anyio.sleep(0.01)
            server.should_exit = True

    before = gc.get_freeze_count()
    try:
        anyio.run(run)
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_importing_the_service_does_not_import_training_packages() -> None:
    done = python("-c", "import service.__main__, sys; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "onnxruntime" in loaded
    heavy = {"torch", "onnx", "onnxscript", "sklearn", "scipy", "pandas", "matplotlib", "PIL"}
    assert not loaded & (heavy | {"training", "pimc_client"})


def test_many_connections_are_accepted_in_one_turn_of_the_event_loop() -> None:
    made: list[object] = []

    class Counted(asyncio.Protocol):
        def __init__(self, **_: object) -> None:
            made.append(self)

    http: Any = Counted
    config = uvicorn.Config(FastAPI(), port=0, log_config=None, lifespan="off", http=http)
    server = DrainingServer(config, FastAPI(), grace_seconds=1)

    async def run() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(server.serve)
            while not server.started:
                await anyio.sleep(0.01)
            place = server.servers[0].sockets[0].getsockname()
            # The event loop does not run meanwhile: they wait to be accepted.
            with ExitStack() as held:
                for _ in range(40):
                    held.enter_context(socket.create_connection(place[:2]))
                turns = 0
                while len(made) < 40:
                    before = len(made)
                    await anyio.lowlevel.checkpoint()
                    turns += len(made) > before
            server.should_exit = True
        assert turns < 20
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(place[:2])

    anyio.run(run, backend_options={"use_uvloop": True})
    gc.unfreeze()
