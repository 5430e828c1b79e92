"""Build a Dockerfile's stages without Docker, start what it starts, and ask that for a map.

    Dockerfile ──parse──▶ stages ──build──▶ root file system ──start──▶ service ──ask──▶ map

For a machine that has no Docker engine: Debian, root, and the package `debootstrap`. A base image
is stood in for by a root file system that debootstrap makes, with Debian's Python where the
official image has its own. Every instruction is then carried out as it is written: `RUN` in a
chroot as the user in force, `COPY` from what `.dockerignore` leaves of the checkout or from an
earlier stage. The service is started as its user, without capabilities, on a root file system
mounted read-only, with a tmpfs on `/tmp` and its volumes; it counts as ready when the image's own
`HEALTHCHECK` says so. An instruction that is not understood is an error.

What this cannot show: the base image itself, layers and their cache, limits of memory and
processors, seccomp, and networks. `docs/how-to/deploy.md` has the commands and what they printed.
"""

from __future__ import annotations

import argparse
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dockerfile import RehearsalError, parse
from inspection import look
from rootfs import Workshop, call
from served import Service, contain, exercise, start, wait_until_healthy


def main(arguments: Sequence[str] | None = None) -> int:
    """Build a target, look at it, and start it where a stack is given; the exit status."""
    options = _options().parse_args(arguments)
    text = options.dockerfile.read_text()
    stages = parse(text, _pairs(options.build_arg))
    target = options.target or list(stages)[-1]
    workshop = Workshop(
        folder=options.work.resolve(),
        mirror=options.mirror,
        arguments=_pairs(options.build_arg),
        lent=tuple(options.lend),
    )
    try:
        image = workshop.make(target, stages)
        look(image, options.may_miss)
        key = secrets.token_hex(16)
        container = contain(
            image,
            workshop.folder / "volumes",
            {place: Path(folder) for place, folder in _pairs(options.volume).items()},
            {"PIMC_API_KEYS": key, **_pairs(options.env)},
        )
        for words in options.command:
            call(container.line([*image.entrypoint, *shlex.split(words)]))
        if options.stack:
            service = start(container, key, workshop.folder / "service.log")
            _serve(service, options.stack, workshop.folder / "map.tif")
    except RehearsalError as error:
        print(f"rehearsal failed: {error}", file=sys.stderr)
        return 1
    print(f"rehearsed: {options.dockerfile}, target {target}")
    return 0


def _serve(service: Service, files: Sequence[Path], into: Path) -> None:
    try:
        print(f"healthy after {wait_until_healthy(service, patience=180):.0f} s")
        print(service.confinement())
        exercise(service, files, into)
        print(f"at most {service.peak()} MB resident")
        print(f"stopped with status {service.stop()}")
    finally:
        service.kill()


def _pairs(words: Sequence[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("dockerfile", type=Path)
    add("--target", help="stage to build; default: the last")
    add("--work", type=Path, required=True, help="folder for the root file systems; some GB")
    add("--stack", type=Path, nargs="+", help="GeoTIFFs: start the service and classify them")
    add(
        "--command",
        action="append",
        default=[],
        metavar="ARGUMENTS",
        help="run the ENTRYPOINT with these to its end",
    )
    add(
        "--volume",
        action="append",
        default=[],
        metavar="PLACE=FOLDER",
        help="folder to mount, read-only, in place of a new volume",
    )
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment variable beyond the image's own",
    )
    add("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    add("--mirror", help="Debian mirror; default: debootstrap's own")
    add(
        "--lend",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="file or folder of this machine that RUN sees too: pip's configuration, certificates",
    )
    add(
        "--may-miss",
        action="append",
        default=[],
        metavar="LIBRARY",
        help="library that only the machine that serves has: libcuda.so.1",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
