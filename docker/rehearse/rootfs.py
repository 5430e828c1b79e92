"""Stages carried out, each in a root file system of its own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from dockerfile import Ignore, Instruction, RehearsalError, Stage, expand

CHECKOUT = Path(__file__).resolve().parents[2]

# What pip and apt need to get through to the package index, as it is set up on this machine. It is
# there while a RUN runs and never becomes part of the root file system's environment.
_INDEX_VARIABLES = re.compile(r"PIP_\w+|\w+_proxy|SSL_CERT_\w+|REQUESTS_CA_BUNDLE", re.IGNORECASE)


@dataclass(kw_only=True)
class Image:
    """A root file system and what the instructions so far have said of it."""

    root: Path
    """Where it lies."""
    environment: dict[str, str] = field(default_factory=dict)
    """ENV."""
    arguments: dict[str, str] = field(default_factory=dict)
    """ARG, of this stage."""
    user: str = "0:0"
    """USER, as numbers."""
    workdir: str = "/"
    """WORKDIR."""
    command: tuple[str, ...] = ()
    """ENTRYPOINT and CMD."""
    entrypoint: tuple[str, ...] = ()
    """ENTRYPOINT alone."""
    health: tuple[str, ...] = ()
    """HEALTHCHECK's command."""
    volumes: tuple[str, ...] = ()
    """VOLUME."""
    stop_signal: str = "SIGTERM"
    """STOPSIGNAL."""


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A folder or file of this machine, where an image sees it."""

    source: Path
    """On this machine."""
    place: str
    """In the image."""
    read_only: bool = False
    """Whether it can only be read there."""


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Where root file systems are made, and what of this machine is lent to their RUNs."""

    folder: Path
    """Holds a folder for each stage."""
    mirror: str | None
    """Debian mirror; none: debootstrap's own."""
    arguments: Mapping[str, str]
    """Values for ARGs."""
    lent: tuple[Path, ...]
    """Files and folders of this machine that a RUN sees under the same path."""

    def make(self, target: str, stages: dict[str, Stage]) -> Image:
        """Build a stage and those it rests on, each once.

        Raises:
            RehearsalError: an instruction is not understood, or fails.
        """
        built: dict[str, Image] = {}
        for name in _needed(target, stages):
            stage = stages[name]
            print(f"== {name}", flush=True)
            built[name] = self._start(stage, built.get(stage.base))
            for instruction in stage.instructions:
                print(f"-- {instruction.keyword} {instruction.rest}", flush=True)
                self._carry_out(instruction, built[name], built)
        return built[target]

    def _start(self, stage: Stage, base: Image | None) -> Image:
        root = self.folder / stage.name
        remove(root)
        below = base.root if base else self._stand_in(stage.base)
        call(["cp", "--archive", "--reflink=auto", str(below), str(root)])
        if base is None:
            path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            return Image(root=root, environment={"PATH": path})
        return replace(base, root=root, environment=dict(base.environment), arguments={})

    def _stand_in(self, image: str) -> Path:
        match = re.fullmatch(r"python:(\d+\.\d+)\S*-slim-(\w+)", image)
        if not match:
            raise RehearsalError(f"'{image}' is no slim image of Python, nor a stage above it")
        version, suite = match.groups()
        root = self.folder / f"debian-{suite}"
        if not root.exists():
            packages = f"ca-certificates,python{version},python3-pip,python3-venv"
            unfinished = root.with_suffix(".unfinished")
            remove(unfinished)
            command = ["debootstrap", "--variant=minbase", f"--include={packages}", suite]
            call([*command, str(unfinished), *([self.mirror] if self.mirror else [])])
            # The official image has its Python there, and nowhere else.
            (unfinished / "usr/local/bin/python").symlink_to(f"/usr/bin/python{version}")
            unfinished.rename(root)
        return root

    def _carry_out(self, step: Instruction, image: Image, built: Mapping[str, Image]) -> None:
        match step.keyword:
            case "RUN":
                self._run(step, image)
            case "COPY":
                _copy(step, image, built)
            case "ENV":
                pairs = [word.partition("=") for word in step.words()]
                known = dict(image.environment)
                image.environment |= {name: expand(value, known) for name, _, value in pairs}
            case "ARG":
                name, _, default = step.rest.partition("=")
                if value := self.arguments.get(name, default):
                    image.arguments[name] = value
            case "WORKDIR":
                image.workdir = str(PurePosixPath(image.workdir) / step.rest)
                inside(image, image.workdir).mkdir(parents=True, exist_ok=True)
            case "USER":
                if not re.fullmatch(r"\d+:\d+", step.rest):
                    raise RehearsalError(f"USER {step.rest} is not uid:gid as numbers")
                image.user = step.rest
            case "CMD":
                image.command = (*image.entrypoint, *step.words())
            case "ENTRYPOINT":
                image.entrypoint = image.command = tuple(step.words())
            case "HEALTHCHECK":
                image.health = tuple(_health(step))
            case "VOLUME":
                image.volumes = tuple(step.words())
            case "STOPSIGNAL":
                image.stop_signal = step.rest
            case "EXPOSE" | "LABEL":
                pass  # says something to people and tools, and changes nothing inside
            case _:
                raise RehearsalError(f"{step.keyword} is not understood")

    def _run(self, step: Instruction, image: Image) -> None:
        if step.flags:
            raise RehearsalError(f"RUN with {dict(step.flags)} is not understood")
        lent = {n: v for n, v in os.environ.items() if _INDEX_VARIABLES.fullmatch(n)}
        environment = lent | image.arguments | image.environment
        shell = ["/bin/sh", "-c", step.rest]
        mounts = [Mount(source=path, place=str(path)) for path in self.lent]
        for mount in mounts:
            _prepare(mount, image)
        call(enclosed(image, shell, environment=environment, mounts=mounts))


def _needed(target: str, stages: dict[str, Stage]) -> list[str]:
    """The target and every stage it rests on or copies from, in the Dockerfile's order."""
    wanted = {target}
    for name in reversed(stages):
        if name in wanted:
            stage = stages[name]
            sources = {i.flags["from"] for i in stage.instructions if "from" in i.flags}
            wanted |= ({stage.base} | sources) & stages.keys()
    return [name for name in stages if name in wanted]


def _copy(step: Instruction, image: Image, built: Mapping[str, Image]) -> None:
    if set(step.flags) - {"from"}:
        raise RehearsalError(f"COPY with {dict(step.flags)} is not understood")
    *sources, destination = step.words()
    place = inside(image, str(PurePosixPath(image.workdir) / destination))
    for source in sources:
        if "from" in step.flags:
            call(["cp", "--archive", str(inside(built[step.flags["from"]], source)), str(place)])
        elif (CHECKOUT / source).is_dir():
            _copy_files(sent(source), CHECKOUT / source, place)
        else:
            into = place / Path(source).name if destination.endswith("/") else place
            _copy_files(sent(source), CHECKOUT / source, into)


def sent(source: str) -> list[Path]:
    """The files under a path of the checkout that a builder gets to see."""
    ignore = Ignore((CHECKOUT / ".dockerignore").read_text())
    start = CHECKOUT / source
    every = [start] if start.is_file() else [p for p in start.rglob("*") if p.is_file()]
    kept = [p for p in every if not ignore.keeps_out(PurePosixPath(p.relative_to(CHECKOUT)))]
    if not kept:
        raise RehearsalError(f"COPY {source}: not there, or kept out by .dockerignore")
    return sorted(kept)


def _copy_files(files: Iterable[Path], start: Path, place: Path) -> None:
    for file in files:
        into = place / file.relative_to(start) if file != start else place
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, into)


def _health(step: Instruction) -> list[str]:
    """The command of `HEALTHCHECK --flags CMD […]`; none for `HEALTHCHECK NONE`."""
    keyword, _, rest = step.rest.partition(" ")
    return Instruction(keyword=keyword, flags={}, rest=rest).words() if keyword == "CMD" else []


def inside(image: Image, path: str) -> Path:
    """Where a path of the image lies on this machine."""
    return image.root / path.lstrip("/")


def enclosed(
    image: Image,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    mounts: Sequence[Mount] = (),
    confined: bool = False,
) -> list[str]:
    """A command line that runs another in the image, in mount and process namespaces of its own.

    Args:
        image: Whose root, user and working directory.
        command: What to run.
        environment: All of its environment.
        mounts: What it sees of this machine, beyond /dev.
        confined: As docker-compose.yml has it: root file system read-only, a tmpfs on /tmp, no
            capabilities and no way to new ones.
    """
    root = image.root
    steps = [f"mount --bind {root} {root}"]
    drop = []
    if confined:
        temporary = f"{root}/tmp"  # noqa: S108 - the image's own
        steps += [f"mount -o remount,bind,ro {root}", f"mount -t tmpfs tmpfs {temporary}"]
        drop = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    for mount in mounts:
        steps.append(f"mount --bind {mount.source} {root}{mount.place}")
        if mount.read_only:
            steps.append(f"mount -o remount,bind,ro {root}{mount.place}")
    steps += [f"mount -t proc proc {root}/proc", f"mount --bind /dev {root}/dev"]
    uid, gid = image.user.split(":")
    user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", *drop]
    variables = [f"{name}={value}" for name, value in environment.items()]
    script = f'{"; ".join(steps)}; exec chroot {root} "$@"'
    # env changes to the working directory, as chroot starts in /.
    where = ["env", "--ignore-environment", f"--chdir={image.workdir}", *variables]
    unshare = ["unshare", "--mount", "--pid", "--fork"]
    return [*unshare, "sh", "-ec", script, "sh", *user, *where, *command]


def _prepare(mount: Mount, image: Image) -> None:
    """Make something to mount on."""
    place = inside(image, mount.place)
    place.parent.mkdir(parents=True, exist_ok=True)
    if mount.source.is_dir():
        place.mkdir(exist_ok=True)
    else:
        place.touch()


def call(command: Sequence[str]) -> None:
    """Run a command to its end.

    Raises:
        RehearsalError: it failed.
    """
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise RehearsalError(f"exit {error.returncode}: {shlex.join(command)[:2000]}") from error


def remove(folder: Path) -> None:
    """Delete a root file system, but never through something still mounted in it."""
    mounted = Path("/proc/self/mounts").read_text()
    if f" {folder}/" in mounted or f" {folder} " in mounted:
        raise RehearsalError(f"something is still mounted under {folder}")
    shutil.rmtree(folder, ignore_errors=True)
