"""An image confined as docker-compose.yml has it, and a service in it: started, asked, stopped."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dockerfile import RehearsalError
from rootfs import Image, Mount, call, enclosed, inside, remove

_SCRATCH = "/var/tmp"  # noqa: S108 - a volume of the image
_SHOWN = ("Content-Type", "PIMC-Model", "PIMC-Provider", "Server-Timing")
_OPEN = f"""
import numpy, rasterio
with rasterio.open("{_SCRATCH}/map.tif") as map:
    values, counts = numpy.unique(map.read(1), return_counts=True)
    print("  ", map.driver, map.width, map.height, map.crs, "nodata", map.nodata)
    print("  ", dict(zip(values.tolist(), counts.tolist())))
"""


@dataclass(frozen=True, kw_only=True)
class Container:
    """An image with its volumes and settings."""

    image: Image
    """What was built."""
    mounts: Mapping[str, Mount]
    """Its volumes, by place."""
    environment: Mapping[str, str]
    """All of its environment."""

    def line(self, command: Sequence[str]) -> list[str]:
        """A command line that runs another in it, as its user."""
        mounts = list(self.mounts.values())
        return enclosed(
            self.image, command, environment=self.environment, mounts=mounts, confined=True
        )


def contain(
    image: Image, folder: Path, given: Mapping[str, Path], settings: Mapping[str, str]
) -> Container:
    """An image with a new volume for each that it declares.

    Args:
        image: What was built.
        folder: Where new volumes are made.
        given: Folders that are mounted, read-only, in place of a new volume.
        settings: Environment variables beyond the image's own.
    """
    remove(folder)
    mounts = {}
    for place in image.volumes:
        if place in given:
            mounts[place] = Mount(source=given[place].resolve(), place=place, read_only=True)
            continue
        # As Docker does with a new volume: contents and owner of the folder that it covers.
        source = folder / place.lstrip("/")
        source.parent.mkdir(parents=True, exist_ok=True)
        call(["cp", "--archive", str(inside(image, place)), str(source)])
        mounts[place] = Mount(source=source, place=place)
    return Container(image=image, mounts=mounts, environment={**image.environment, **settings})


@dataclass(frozen=True, kw_only=True)
class Service:
    """A container whose command runs."""

    container: Container
    process: subprocess.Popen[bytes]
    """The command's parent, outside its namespaces."""
    log: Path
    """What it says on stderr."""
    key: str
    """The API key that it asks for."""

    def pid(self) -> int:
        """The service's own process, the first of its namespace."""
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return int(Path(children).read_text().split()[0])

    def healthy(self) -> bool:
        """Whether the image's HEALTHCHECK passes."""
        command = self.container.line(self.container.image.health)
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def confinement(self) -> str:
        """Who it runs as, what it may do and how its root is mounted, as the kernel says."""
        status = self._status()
        mounts = Path(f"/proc/{self.pid()}/mountinfo").read_text().splitlines()
        (root,) = [fields[5] for ln in mounts if (fields := ln.split())[4] == "/"]
        return (
            f"uid {status['Uid'][0]}, gid {status['Gid'][0]}, groups {status['Groups']}, "
            f"capabilities {status['CapEff'][0]} of {status['CapBnd'][0]}, "
            f"no new privileges: {status['NoNewPrivs'][0]}, root mounted {root}"
        )

    def peak(self) -> int:
        """The most memory that it has had resident so far, in MB."""
        return int(self._status()["VmHWM"][0]) // 1000

    def _status(self) -> dict[str, list[str]]:
        lines = Path(f"/proc/{self.pid()}/status").read_text().splitlines()
        return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}

    def stop(self, patience: float = 60.0) -> int:
        """Send it the image's STOPSIGNAL; its exit status."""
        os.kill(self.pid(), signal.Signals[self.container.image.stop_signal])
        return self.process.wait(patience)

    def kill(self) -> None:
        """End it at once, if it still runs; every process of its namespace goes with the first."""
        if self.process.poll() is None:
            os.kill(self.pid(), signal.SIGKILL)
            self.process.wait()


def start(container: Container, key: str, log: Path) -> Service:
    """Start the image's command; what it says on stderr goes to a log."""
    with log.open("wb") as written:
        process = subprocess.Popen(container.line(container.image.command), stderr=written)
    return Service(container=container, process=process, log=log, key=key)


def wait_until_healthy(service: Service, patience: float) -> float:
    """The seconds until the health check passed.

    Raises:
        RehearsalError: it ended, or did not become healthy in time.
    """
    begun = time.monotonic()
    while not service.healthy():
        if (status := service.process.poll()) is not None:
            said = service.log.read_text()[-2000:]
            raise RehearsalError(f"the service ended with status {status}:\n{said}")
        if time.monotonic() - begun > patience:
            raise RehearsalError(f"not healthy after {patience:.0f} s; its log: {service.log}")
        time.sleep(1)
    return time.monotonic() - begun


def exercise(service: Service, files: Sequence[Path], into: Path) -> None:
    """Without a key: refused. With one: a map, opened with the image's own rasterio, and a summary.

    Raises:
        RehearsalError: an answer is not as it should be.
    """
    # One file: the service refuses before it has read the body, and a long one would meet a closed
    # connection.
    status, _ = _ask(service, files[:1], "image/tiff", None)
    print(f"without a key: {status}")
    if status != 401:
        raise RehearsalError(f"a request without a key was answered {status}, not 401")
    print(f"{len(files)} files to /classify-pixels:")
    status, body = _ask(service, files, "image/tiff; application=geotiff", service.key)
    if status != 200:
        raise RehearsalError(f"answered {status}: {body[:2000].decode(errors='replace')}")
    into.write_bytes(body)
    print(f"   {len(body)} bytes in {into}")
    (service.container.mounts[_SCRATCH].source / "map.tif").write_bytes(body)
    call(service.container.line(["python", "-c", _OPEN]))
    _, summary = _ask(service, files, "application/json", service.key)
    print(f"   { ({c['name']: c['pixels'] for c in json.loads(summary)['classes']}) }")


def _ask(
    service: Service, files: Sequence[Path], accept: str, key: str | None
) -> tuple[int, bytes]:
    """POST a stack to /classify-pixels; print the answer's headers, return its status and body.

    Raises:
        RehearsalError: nothing answers.
    """
    boundary = secrets.token_hex(16)
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n'
        "Content-Type: image/tiff\r\n\r\n".encode()
        + file.read_bytes()
        + b"\r\n"
        for file in files
    ]
    request = urllib.request.Request(
        f"http://127.0.0.1:{service.container.environment['PIMC_PORT']}/classify-pixels",
        b"".join(parts) + f"--{boundary}--\r\n".encode(),
        {
            "Accept": accept,
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            **({"X-API-Key": key} if key else {}),
        },
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=600) as answer:
            for name in _SHOWN:
                print(f"   {name}: {answer.headers[name]}")
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except urllib.error.URLError as error:
        raise RehearsalError(f"no answer: {error.reason}; its log: {service.log}") from error
