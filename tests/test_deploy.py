"""Containers and pinned packages, against the settings, the code and the packages that they serve.

No image is built here: docs/how-to/deploy.md states what was run and what was not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from service.settings import PREFIX, Settings
from tests.kits.patience import PATIENCE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SERVING = ["cpu", "gpu", "replicas"]
DATABASE = ["postgres"]
DASK = ["scheduler", "worker"]
TRAINING = ["training", "training-gpu"]
MONITORING = ["prometheus", "grafana"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
DOCKERFILES = {
    name: re.sub(r"\\\n\s*", " ", (ROOT / "docker" / f"{name}.Dockerfile").read_text())
    for name in ("service", "training")
}
LOCKS = sorted((ROOT / "docker" / "locked").glob("*.txt"))
ONLY_IN_THE_IMAGE = {"host", "port", "model_dir", "state_dir", "providers"}


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.fixture(scope="module")
def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert not Version(specifier.version).local, pin
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(names) == len(set(names))
    return {n: Version(next(iter(p.specifier)).version) for n, p in zip(names, pins, strict=True)}


def script(name: str) -> ModuleType:
    """A module of `scripts/`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- the images ------------------------------------------------------------------------------------


def copied(file: str) -> list[str]:
    """Paths that a Dockerfile copies from the checkout."""
    found = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILES[file], re.MULTILINE)
    return [source for line in found for source in line.split()[:-1]]


def environment_of_the_image() -> dict[str, str]:
    lines = re.findall(r"^ENV (.*)$", DOCKERFILES["service"], re.MULTILINE)
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("service", ["-c", "import service.__main__ as s; print(s.__file__)"]),
        ("training", ["-m", "training", "--help"]),
    ],
)
def test_an_image_holds_all_of_our_code_that_it_runs(tmp_path, file, command):
    for source in copied(file):
        if not source.startswith("docker/"):
            shutil.copytree(ROOT / source, tmp_path / source)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout


def test_the_build_context_holds_only_what_is_copied():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    sent = {line[1:] for line in rules if line.startswith("!")}
    needed = {source for file in DOCKERFILES for source in copied(file)}
    for source in needed:
        assert (ROOT / source).exists(), source
        assert any(source.startswith(path) for path in sent), source
    for path in sent:
        assert any(source.startswith(path) for source in needed), path


def test_the_images_set_only_settings_that_the_service_has():
    given = {n.removeprefix(PREFIX).lower() for n in environment_of_the_image() if PREFIX in n}
    assert {"host", "port", "state_dir"} <= given <= set(Settings.model_fields)


@contextmanager
def responding(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server that gives every request a status: its port, and the paths requested."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, paths
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_of_the_image_requests_readiness(status, healthy):
    found = re.search(r"^HEALTHCHECK .*?CMD (\[.*\])$", DOCKERFILES["service"], re.MULTILINE)
    assert found
    _, *command = json.loads(found[1])
    with responding(status) as (port, paths):
        environment = {**os.environ, "PIMC_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
        done = subprocess.run(
            [sys.executable, *command], env=environment, timeout=PATIENCE, check=False
        )
    assert (done.returncode == 0) is healthy
    assert paths == ["/health/ready"]


# -- the base image --------------------------------------------------------------------------------

DIGEST = f"sha256:{'ab' * 32}"


@contextmanager
def registry() -> Iterator[str]:
    """A registry that requires a token, as Docker's does, and has one tag."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            requested = "service=here&scope=repository%3Alibrary%2Fpython%3Apull"
            assert self.path == f"/token?{requested}"
            self.wfile.write(b'{"token": "open sesame"}')

        def do_HEAD(self) -> None:
            allowed = self.headers["Authorization"] == "Bearer open sesame"
            known = self.path == "/v2/library/python/manifests/3.11-slim-bookworm"
            self.send_response(401 if not allowed else 200 if known else 404)
            if not allowed:
                realm = f"http://127.0.0.1:{self.server.server_port}/token"
                scope = "repository:library/python:pull"
                self.send_header(
                    "WWW-Authenticate", f'Bearer realm="{realm}",service="here",scope="{scope}"'
                )
            elif known and "index" in self.headers["Accept"]:
                self.send_header("Docker-Content-Digest", DIGEST)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_base_image_is_pinned_by_the_digest_that_the_registry_states(tmp_path):
    pinning = script("pin_base_image")
    files = []
    for path in pinning.DOCKERFILES:
        files.append(tmp_path / path.name)
        text = re.sub(r"@sha256:\w+", "", path.read_text())
        files[-1].write_text(text)
    with registry() as url:
        assert pinning.main(["--registry", url, "--check"], files) == 1
        assert pinning.main(["--registry", url], files) == 0
        assert pinning.main(["--registry", url, "--check"], files) == 0
        other = tmp_path / "other.Dockerfile"
        other.write_text("ARG PYTHON_IMAGE=python:0.1\n")
        assert pinning.main(["--registry", url], [other]) == 2
    for path in files:
        base = f"ARG PYTHON_IMAGE=python:3.11-slim-bookworm@{DIGEST}\n"
        assert base in path.read_text()


# -- the pinned packages ---------------------------------------------------------------------------


def required(requirements: list[str]) -> dict[str, Requirement]:
    """Direct and indirect dependencies, by the metadata of the installed packages."""
    found: dict[str, Requirement] = {}
    waiting = [Requirement(r) for r in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name) + "".join(sorted(requirement.extras))
        if name in found:
            continue
        found[name] = requirement
        try:
            below = distribution(requirement.name).requires or []
        except PackageNotFoundError:  # of an extra that is not installed here
            continue
        for line in below:
            further = Requirement(line)
            extras = ["", *requirement.extras]
            if not further.marker or any(further.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(further)
    return {canonicalize_name(r.name): r for r in found.values()}


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_every_package_is_pinned_within_what_pyproject_asks_for(extra, pinned):
    direct = [Requirement(r) for r in (EXTRAS[extra] if extra else PROJECT["dependencies"])]
    for requirement in direct:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
    assert set(required([str(r) for r in direct])) <= set(pinned)


def test_serving_needs_no_torch():
    assert "torch" in required(EXTRAS["training"])
    assert not {"torch", "scikit-learn", "scipy"} & set(required(EXTRAS["service"]))


def test_cuda_is_of_the_version_that_onnx_runtime_requires(pinned):
    requested = required(["onnxruntime-gpu[cuda,cudnn]"])
    cuda = {name: r for name, r in requested.items() if name.startswith("nvidia-")}
    assert "nvidia-cudnn-cu13" in cuda
    for name, requirement in cuda.items():
        assert requirement.specifier.contains(pinned[name]), requirement


def locked(path: Path) -> dict[str, tuple[Version, str]]:
    """Version and hash of each package of a lock file."""
    text = path.read_text()
    entries = re.findall(
        r"^([a-z0-9.-]+)==(\S+) \\\n    --hash=sha256:([0-9a-f]{64})\n", text, re.M
    )
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == 2 * len(entries), path.name  # each line is part of an entry
    return {canonicalize_name(name): (Version(v), sha) for name, v, sha in entries}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_file_has_each_package_once_at_the_pinned_version(path, pinned):
    found = locked(path)
    assert {name: version for name, (version, _) in found.items()} == {
        name: pinned[name] for name in found
    }


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_file_is_complete(path):
    """`--no-deps` installs it: what its packages need must be in it."""
    direct = script("lock").locks()[path.stem]
    # torch for the CPU, as it may be installed here, names none of its CUDA packages.
    assert set(required(direct)) <= set(locked(path))


def test_the_dockerfiles_install_the_lock_files():
    everything = "".join(DOCKERFILES.values())
    installs = re.findall(r"-m pip .*? install (.*?)(?: &&|\n|$)", everything)
    assert len(installs) == len(LOCKS) == len(script("lock").locks())
    assert {line.split()[-1] for line in installs} == {path.name for path in LOCKS}
    for line in installs:
        assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(line.split())


@pytest.fixture(scope="module")
def bill(tmp_path_factory) -> dict:
    """The bill of an environment of the service's packages: it has their metadata and no more."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python3*/site-packages")
    for name in required(EXTRAS["service"]):
        with suppress(PackageNotFoundError):  # of an extra that is not installed here
            (metadata,) = (f for f in distribution(name).files or () if f.name == "METADATA")
            found = Path(metadata.locate()).parent
            (packages / found.name).symlink_to(found)
    return script("sbom").bill(folder / "bin" / "python", ROOT / "models" / "zoo")


def test_the_bill_of_materials_lists_packages_and_models_as_they_are(bill):
    parts = {part["name"].lower(): part for part in bill["components"]}
    for name in ("fastapi", "rasterio", "onnxruntime-gpu"):
        assert parts[name]["version"] == distribution(name).version
    for folder in (ROOT / "models" / "zoo").glob("*/"):
        content = (folder / "model.onnx").read_bytes()
        (sha,) = parts[folder.name]["hashes"]
        assert sha == {"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}
    refs = [part["bom-ref"] for part in bill["components"]]
    assert len(refs) == len(set(refs))


def test_a_package_without_a_licence_is_named(bill):
    sbom = script("sbom")
    needed = set(required(EXTRAS["service"]))
    served = [p for p in bill["components"] if canonicalize_name(p["name"]) in needed]
    assert len(served) > 20
    assert sbom.unlicensed({"components": served}) == []
    served[0].pop("licenses")
    assert sbom.unlicensed({"components": served}) == [served[0]["name"]]


# -- docker-compose.yml ----------------------------------------------------------------------------


def test_every_container_is_hardened(compose):
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["init"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "network_mode", "pid", "cap_add"} & set(service), name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name


def test_no_profile_starts_two_containers_that_take_one_port(compose):
    assert set(compose["services"]) == {*SERVING, *TRAINING, *MONITORING, *DATABASE, *DASK}
    settings = (ROOT / ".env").read_text().splitlines()
    (plain,) = [line.partition("=")[2] for line in settings if line.startswith("COMPOSE_PROFILES=")]
    profiles = {profile for s in compose["services"].values() for profile in s["profiles"]}
    assert plain in profiles
    for profile in profiles:
        started = [s for s in compose["services"].values() if profile in s["profiles"]]
        ports = [port for service in started for port in service.get("ports", [])]
        assert len(ports) == len(set(ports)), profile


def test_images_are_built_from_targets_that_exist(compose):
    for name in SERVING + TRAINING + DASK:
        build = compose["services"][name]["build"]
        text = (ROOT / build["dockerfile"]).read_text()
        stages = re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE)
        assert build.get("target", stages[-1]) in stages


@pytest.mark.parametrize(("name", "expected"), [("cpu", 0), ("gpu", 1), ("training-gpu", 1)])
def test_only_the_gpu_profiles_ask_for_a_gpu(name, expected, compose):
    resources = compose["services"][name]["deploy"]["resources"]
    devices = resources.get("reservations", {}).get("devices", [])
    assert len(devices) == expected
    assert all(d["driver"] == "nvidia" and d["capabilities"] == ["gpu"] for d in devices)


@pytest.mark.parametrize("name", SERVING)
def test_every_setting_can_be_set_and_no_other(name, compose):
    given = compose["services"][name]["environment"]
    passed = {n.removeprefix(PREFIX).lower() for n in given if n.startswith(PREFIX)}
    others = {n for n in given if not n.startswith(PREFIX)}
    assert all(n.startswith(("AWS_", "OTEL_")) for n in others)
    assert all(given[n] is None for n in others if n.startswith("AWS_"))
    assert passed == set(Settings.model_fields) - ONLY_IN_THE_IMAGE


@pytest.mark.parametrize("name", SERVING)
def test_the_defaults_of_compose_are_valid_settings(name, compose, monkeypatch):
    for variable, value in compose["services"][name]["environment"].items():
        if value is None:  # passed on from the shell, and not set here
            continue
        monkeypatch.setenv(variable, re.sub(r"\$\{\w+:-(.*)\}", r"\1", str(value)))
    if name == "replicas":
        monkeypatch.setenv("PIMC_STATE_DIR", environment_of_the_image()["PIMC_STATE_DIR"])
    settings = Settings()
    assert settings.allow_anonymous
    for value in (settings.database_url, settings.dask_scheduler):
        assert (value is not None) is (name == "replicas")
    default = {
        "allow_anonymous": None, "database_url": None, "dask_scheduler": None, "state_dir": None
    }  # fmt: skip
    assert settings.model_copy(update=default) == Settings.model_construct()


def test_the_replicas_reach_the_database_of_compose(compose):
    url = compose["services"]["replicas"]["environment"]["PIMC_DATABASE_URL"]
    given = compose["services"]["postgres"]["environment"]
    found = re.search(r"postgresql://(\w+):(\w+)@(\w+)/(\w+)", url)
    assert found
    wanted = [given[f"POSTGRES_{name}"] for name in ("USER", "PASSWORD", "DB")]
    assert list(found.groups()) == [*wanted[:2], "postgres", wanted[2]]
    assert "ports" not in compose["services"]["postgres"]


def test_only_replicas_and_workers_reach_the_scheduler(compose):
    """Its port runs any code."""
    services = compose["services"]
    assert {n for n, s in services.items() if "dask" in s.get("networks", {})} == {
        "replicas", *DASK
    }  # fmt: skip
    assert compose["networks"]["dask"]["internal"] is True
    for name in DASK:
        # Workers also read a bucket and remote files, by a network in which nobody else is.
        own = ["dask", "outside"] if name == "worker" else ["dask"]
        assert list(services[name]["networks"]) == own
        assert "ports" not in services[name]
    assert [n for n, s in services.items() if "outside" in s.get("networks", {})] == ["worker"]
    address = services["replicas"]["environment"]["PIMC_DASK_SCHEDULER"]
    assert "tcp://scheduler:8786" in address
    assert address in services["worker"]["command"]
    assert "8786" in services["scheduler"]["command"]


def test_workers_are_like_the_replicas(compose):
    worker, replicas = (compose["services"][name] for name in ("worker", "replicas"))
    assert worker["image"] == replicas["image"]
    assert worker["environment"] == replicas["environment"]
    places = {place: source for source, place, _ in map(mount_of, replicas["volumes"])}
    for source, place, mode in map(mount_of, worker["volumes"]):
        assert places[place] == source
        assert mode == ("rw" if not source else "ro")  # workers write only temporary files


def test_the_image_has_the_commands_of_dask():
    from distributed.cli import dask_scheduler, dask_worker

    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    manifests = ROOT / "deploy" / "kubernetes" / "cluster"
    commands = [compose[name]["command"] for name in DASK]
    for name in DASK:
        deployment = yaml.safe_load((manifests / f"{name}.yaml").read_text())
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        commands.append(container["command"])
    for program, name, *arguments in commands:
        assert program == "dask"
        command = {"scheduler": dask_scheduler, "worker": dask_worker}[name].main
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        given = {argument.partition("=")[0] for argument in arguments if argument[:2] == "--"}
        assert given <= known
    assert environment_of_the_image()["PYTHONPATH"] == "/srv/pimc"


def test_the_open_files_suffice_for_the_connections(compose):
    connections = Settings.model_fields["max_connections"].default
    for name in SERVING:
        assert compose["services"][name]["ulimits"]["nofile"] > 4 * connections


def test_a_stop_waits_for_the_running_requests(compose):
    grace = Settings.model_fields["grace_seconds"].default
    for name in SERVING:
        assert int(compose["services"][name]["stop_grace_period"].removesuffix("s")) > grace


@pytest.mark.parametrize("name", SERVING + TRAINING)
def test_volumes_cover_every_folder_that_the_image_writes_to(name, compose):
    text = DOCKERFILES["service" if name in SERVING else "training"]
    (written,) = re.findall(r"^VOLUME (.*)$", text, re.MULTILINE)
    mounts = [mount_of(volume) for volume in compose["services"][name]["volumes"]]
    assert sorted(place for _, place, _ in mounts) == sorted(json.loads(written))
    named = {source for source, _, _ in mounts if re.fullmatch(r"\w+", source)}
    assert named <= set(compose["volumes"])


def test_jobs_outlive_the_container_and_serving_only_reads_models(compose):
    of = {n: [mount_of(v) for v in s.get("volumes", [])] for n, s in compose["services"].items()}
    for name in SERVING:
        # Replicas have a folder of their own in common, as a service without them locks its own.
        volume = "shared" if name == "replicas" else "state"
        assert (volume, environment_of_the_image()["PIMC_STATE_DIR"], "rw") in of[name]
        assert ("models", environment_of_the_image()["PIMC_MODEL_DIR"], "ro") in of[name]
    for name in TRAINING:
        assert ("models", environment_of_the_image()["PIMC_MODEL_DIR"], "rw") in of[name]


def mount_of(volume: str | dict) -> tuple[str, str, str]:
    """Source, place and mode of a volume in either syntax."""
    if isinstance(volume, dict):
        mode = "ro" if volume.get("read_only") else "rw"
        return volume.get("source", ""), volume["target"], mode
    source, place, *mode = volume.split(":")
    return source, place, mode[0] if mode else "rw"


def test_the_docs_name_each_variable_and_volume(compose):
    docs = (ROOT / "docs" / "how-to" / "deploy.md").read_text()
    variables = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    for name in [*variables, *compose["volumes"], *compose["services"]]:
        assert f"`{name}`" in docs, name
