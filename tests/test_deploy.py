"""Deployment: promises of the Dockerfiles, the Compose file and the pinned packages.

Nothing is built here: `docker/rehearse` does that, and its parser reads the Dockerfiles for these
tests.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from service.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docker" / "rehearse"))

from dockerfile import Ignore, Instruction, Stage, parse  # noqa: E402 - lies outside every package
from rootfs import sent  # noqa: E402

SERVING = ["cpu", "gpu"]
TRAINING = ["training", "training-gpu"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
DOCKERFILES = {
    name: parse((ROOT / "docker" / f"{name}.Dockerfile").read_text())
    for name in ("service", "training")
}
TARGETS = [("service", "cpu"), ("service", "gpu"), ("training", "training")]


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


def line_of(stages: dict[str, Stage], target: str) -> list[Instruction]:
    """Every instruction that makes a stage, those of the stages under it first."""
    stage = stages[target]
    below = line_of(stages, stage.base) if stage.base in stages else []
    return [*below, *stage.instructions]


def last(instructions: list[Instruction], keyword: str) -> Instruction:
    return [i for i in instructions if i.keyword == keyword][-1]


def environment_of(instructions: list[Instruction]) -> dict[str, str]:
    pairs = [word.partition("=") for i in instructions if i.keyword == "ENV" for word in i.words()]
    return {name: value for name, _, value in pairs}


# -- the Dockerfiles -------------------------------------------------------------------------------


@pytest.mark.parametrize("file", DOCKERFILES)
def test_base_images_are_pinned(file):
    stages = DOCKERFILES[file]
    bases = {stage.base for stage in stages.values()} - set(stages)
    assert bases == {"python:3.11-slim-bookworm"}


@pytest.mark.parametrize(("file", "target"), TARGETS)
def test_images_run_as_a_fixed_user_that_is_not_root(file, target):
    done = line_of(DOCKERFILES[file], target)
    assert last(done, "USER").rest == "10001:10001"
    made = " ".join(i.rest for i in done if i.keyword == "RUN")
    assert "groupadd --gid 10001 pimc" in made
    assert "useradd --uid 10001 --gid pimc" in made


@pytest.mark.parametrize(("file", "target"), TARGETS)
def test_images_start_python_itself_and_so_get_its_signals(file, target):
    done = line_of(DOCKERFILES[file], target)
    start = last(done, "CMD" if file == "service" else "ENTRYPOINT")
    assert start.rest.startswith("[")
    assert start.words() == ["python", "-m", file]
    assert last(done, "STOPSIGNAL").rest == "SIGTERM"


@pytest.mark.parametrize("target", SERVING)
def test_health_is_asked_of_health_ready_without_a_shell_or_curl(target):
    check = last(line_of(DOCKERFILES["service"], target), "HEALTHCHECK")
    keyword, _, command = check.rest.partition(" ")
    assert keyword == "CMD"
    words = Instruction(keyword="CMD", flags={}, rest=command).words()
    assert words[:2] == ["python", "-c"]
    compile(words[2], "HEALTHCHECK", "exec")
    assert "'/health/ready'" in words[2]


@pytest.mark.parametrize("file", DOCKERFILES)
def test_packages_are_installed_pinned_as_wheels_and_never_in_a_final_stage(file):
    installs = [
        (stage.name, run.rest)
        for stage in DOCKERFILES[file].values()
        for run in stage.instructions
        if run.keyword == "RUN" and " install --only" in run.rest.replace("\\", "")
    ]
    everything = " ".join(i.rest for s in DOCKERFILES[file].values() for i in s.instructions)
    assert everything.count("-m pip ") == len(installs) > 0
    for stage, command in installs:
        assert stage.startswith("packages")
        assert "--only-binary=:all:" in command
        assert "--constraint constraints.txt" in command


@pytest.mark.parametrize(("file", "target"), TARGETS)
def test_final_images_take_from_debian_only_what_the_wheels_link_to(file, target):
    done = line_of(DOCKERFILES[file], target)
    commands = " && ".join(i.rest for i in done if i.keyword == "RUN")
    installs = re.findall(r"apt-get install ([^&]*)", commands)
    assert [w for i in installs for w in i.split() if not w.startswith("--")] == ["libexpat1"]


@pytest.mark.parametrize("target", SERVING)
def test_the_served_image_holds_no_training_code(target):
    done = line_of(DOCKERFILES["service"], target)
    copied = [i for i in done if i.keyword == "COPY"]
    assert {i.words()[0] for i in copied if "from" not in i.flags} == {"models/", "service/"}
    assert [i.words()[0] for i in copied if "from" in i.flags] == ["/opt/venv"]


@pytest.mark.parametrize("file", DOCKERFILES)
def test_what_is_copied_is_there_and_is_sent_to_the_builder(file):
    for stage in DOCKERFILES[file].values():
        for copy in (i for i in stage.instructions if i.keyword == "COPY"):
            if "from" in copy.flags:
                assert copy.flags["from"] in DOCKERFILES[file]
            else:
                assert all(sent(source) for source in copy.words()[:-1])


def test_the_images_set_only_settings_that_the_service_knows():
    for target in SERVING:
        environment = environment_of(line_of(DOCKERFILES["service"], target))
        given = {n.removeprefix(PREFIX).lower() for n in environment if n.startswith(PREFIX)}
        assert given <= set(Settings.model_fields)
        assert environment["PIMC_HOST"] == "0.0.0.0"  # noqa: S104 - the container's own network


def test_the_builder_gets_no_data_keys_or_history():
    ignore = Ignore((ROOT / ".dockerignore").read_text())
    for path in (".git/config", ".env", "docker/pimc.env", "tests/conftest.py", "runs/a/model.pt"):
        assert ignore.keeps_out(PurePosixPath(path)), path
    for path in ("pyproject.toml", "models/card.py", "models/zoo/x/model.onnx", "service/app.py"):
        assert not ignore.keeps_out(PurePosixPath(path)), path
    assert ignore.keeps_out(PurePosixPath("service/routes/__pycache__/tasks.cpython-311.pyc"))


# -- the pinned packages ---------------------------------------------------------------------------


def required(requirements: list[str]) -> dict[str, Requirement]:
    """What requirements lead to, directly or not, as the packages installed here say."""
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
    assert not {"torch", "onnx", "scikit-learn"} & set(required(EXTRAS["service"]))


def test_cuda_is_of_the_version_that_onnx_runtime_asks_for(pinned):
    asked = required(["onnxruntime-gpu[cuda,cudnn]"])
    cuda = {name: r for name, r in asked.items() if name.startswith("nvidia-")}
    assert "nvidia-cudnn-cu13" in cuda
    for name, requirement in cuda.items():
        assert requirement.specifier.contains(pinned[name]), requirement


# -- docker-compose.yml ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVING + TRAINING)
def test_containers_are_hardened(name, compose):
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp"]  # noqa: S108
    assert not {"privileged", "user", "network_mode", "pid", "cap_add"} & set(service)


def test_there_are_no_further_containers(compose):
    assert set(compose["services"]) == {*SERVING, *TRAINING}


@pytest.mark.parametrize("name", SERVING + TRAINING)
def test_each_profile_starts_one_container(name, compose):
    # A service without a profile would start with every other and take the port from it.
    assert compose["services"][name]["profiles"] == [name]


def test_a_plain_up_starts_the_cpu():
    settings = [ln for ln in (ROOT / ".env").read_text().splitlines() if ln and ln[0] != "#"]
    assert settings == ["COMPOSE_PROFILES=cpu"]


@pytest.mark.parametrize("name", SERVING + TRAINING)
def test_images_are_built_from_targets_that_exist(name, compose):
    build = compose["services"][name]["build"]
    stages = DOCKERFILES[Path(build["dockerfile"]).name.removesuffix(".Dockerfile")]
    assert (ROOT / build["dockerfile"]).is_file()
    assert build.get("target", list(stages)[-1]) in stages


@pytest.mark.parametrize("name", SERVING)
def test_the_port_is_published_on_the_loopback_alone(name, compose):
    assert compose["services"][name]["ports"] == ["127.0.0.1:${PIMC_PORT:-8000}:8000"]


@pytest.mark.parametrize("name", SERVING)
def test_memory_processors_and_processes_are_limited(name, compose):
    limits = compose["services"][name]["deploy"]["resources"]["limits"]
    assert set(limits) == {"cpus", "memory", "pids"}


@pytest.mark.parametrize(("name", "expected"), [("cpu", 0), ("gpu", 1), ("training-gpu", 1)])
def test_only_the_gpu_profiles_ask_for_a_gpu(name, expected, compose):
    resources = compose["services"][name]["deploy"]["resources"]
    devices = resources.get("reservations", {}).get("devices", [])
    assert len(devices) == expected
    assert all(d["driver"] == "nvidia" and d["capabilities"] == ["gpu"] for d in devices)


@pytest.mark.parametrize("name", SERVING)
def test_every_setting_can_be_set_and_no_other(name, compose):
    passed = {n.removeprefix(PREFIX).lower() for n in compose["services"][name]["environment"]}
    of_the_image = {"host", "port", "model_dir", "state_dir", "providers"}
    assert passed == set(Settings.model_fields) - of_the_image


@pytest.mark.parametrize("name", SERVING)
def test_what_compose_sets_by_default_makes_settings(name, compose, monkeypatch):
    for variable, value in compose["services"][name]["environment"].items():
        monkeypatch.setenv(variable, re.sub(r"\$\{\w+:-(.*)\}", r"\1", str(value)))
    settings = Settings()
    assert settings.allow_anonymous
    assert settings.model_copy(update={"allow_anonymous": False}) == Settings.model_construct()


def test_a_stop_waits_for_the_requests_under_way(compose):
    grace = Settings.model_fields["grace_seconds"].default
    for name in SERVING:
        assert int(compose["services"][name]["stop_grace_period"].removesuffix("s")) > grace


def test_jobs_lie_on_a_volume_that_outlives_the_container(compose):
    for name in SERVING:
        place = environment_of(line_of(DOCKERFILES["service"], name))["PIMC_STATE_DIR"]
        assert ("state", place, "rw") in [
            mount_of(volume) for volume in compose["services"][name]["volumes"]
        ]


@pytest.mark.parametrize("name", SERVING + TRAINING)
def test_volumes_cover_every_folder_that_the_image_writes_to(name, compose):
    service = compose["services"][name]
    file = "service" if name in SERVING else "training"
    target = name if name in SERVING else "training"
    written = last(line_of(DOCKERFILES[file], target), "VOLUME").words()
    mounts = [mount_of(volume) for volume in service["volumes"]]
    assert sorted(place for _, place, _ in mounts) == sorted(written)
    named = {source for source, _, _ in mounts if re.fullmatch(r"\w+", source)}
    assert named <= set(compose["volumes"])


def test_training_writes_the_models_that_serving_only_reads(compose):
    of = {n: [mount_of(v) for v in s["volumes"]] for n, s in compose["services"].items()}
    for name in SERVING:
        assert ("models", "/models", "ro") in of[name]
    for name in TRAINING:
        assert ("models", "/models", "rw") in of[name]


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


# -- the parser that reads all this ----------------------------------------------------------------


def test_a_dockerfile_is_read_as_docker_reads_it():
    text = """
        # about the base
        ARG BASE=debian:12
        FROM ${BASE} AS one
        RUN first \\
            # about the second
            && second
        FROM one AS two
        COPY --from=one --chown=1:1 /a /b
        CMD ["x", "y z"]
    """
    stages = parse("\n".join(line.strip() for line in text.splitlines()), {"BASE": "debian:13"})
    assert [(s.name, s.base) for s in stages.values()] == [("one", "debian:13"), ("two", "one")]
    assert [(i.keyword, i.rest) for i in stages["one"].instructions] == [
        ("RUN", "first  && second")
    ]
    copy, command = stages["two"].instructions
    assert copy.flags == {"from": "one", "chown": "1:1"}
    assert copy.words() == ["/a", "/b"]
    assert command.words() == ["x", "y z"]


@pytest.mark.parametrize(
    ("patterns", "path", "kept_out"),
    [
        ("*", "a", True),
        ("*\n!a", "a/b/c", False),
        ("*\n!a\n**/c", "a/b/c", True),
        ("*\n!a\n**/c", "c", True),
        ("a/*.pyc", "a/b.pyc", True),
        ("a/*.pyc", "a/b/c.pyc", False),
        ("# a", "a", False),
    ],
)
def test_the_last_pattern_that_matches_decides(patterns, path, kept_out):
    assert Ignore(patterns).keeps_out(PurePosixPath(path)) is kept_out
