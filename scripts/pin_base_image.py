"""Pin the base image of the Dockerfiles by digest.

    python scripts/pin_base_image.py [--registry https://registry-1.docker.io] [--check]

The script requests the digest of the tag's current image index (all platforms) from the registry,
and sets `ARG PYTHON_IMAGE` of the Dockerfiles to `python:TAG@sha256:...`. With `--check` it writes
nothing, and the exit status is 1 if a Dockerfile is not pinned to that digest. Protocol: OCI
Distribution Specification 1.1, "Pulling manifests", and the token exchange of Docker's registry.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = tuple(sorted((ROOT / "docker").glob("*.Dockerfile")))
_IMAGE = re.compile(r"^ARG PYTHON_IMAGE=(?P<tagged>python:[\w.-]+)(?:@sha256:[0-9a-f]{64})?$", re.M)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_INDEX = (
    "application/vnd.oci.image.index.v1+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json"
)
_SECONDS = 30


def digest_of(image: str, registry: str) -> str:
    """Digest of a tag in a registry.

    Args:
        image: `name:tag`, of Docker's official images.
        registry: URL of the registry.

    Raises:
        OSError: the registry cannot be reached, or rejects the request.
        ValueError: the registry returns no digest.
    """
    name, _, tag = image.partition(":")
    url = f"{registry}/v2/library/{name}/manifests/{tag}"
    try:
        found = _head(url, {})
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise
        found = _head(url, {"Authorization": f"Bearer {_token(error)}"})
    if not _DIGEST.fullmatch(found):
        raise ValueError(f"{url} returned '{found}', which is not a digest")
    return found


def _head(url: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(  # noqa: S310 - the registry named on the command line
        url, method="HEAD", headers={"Accept": _INDEX, **headers}
    )
    with urllib.request.urlopen(request, timeout=_SECONDS) as response:  # noqa: S310 - see above
        return response.headers.get("Docker-Content-Digest", "")


def _token(refusal: urllib.error.HTTPError) -> str:
    """An anonymous token from the address that a 401 response names."""
    stated = dict(re.findall(r'(\w+)="([^"]*)"', refusal.headers.get("WWW-Authenticate", "")))
    query = urllib.parse.urlencode({name: stated[name] for name in ("service", "scope")})
    with urllib.request.urlopen(f"{stated['realm']}?{query}", timeout=_SECONDS) as response:  # noqa: S310 - named by the registry
        return str(json.load(response)["token"])


def pin(text: str, digest: str) -> str:
    """The text of a Dockerfile with its base image pinned to a digest.

    Raises:
        ValueError: the text has no line `ARG PYTHON_IMAGE=python:TAG`.
    """
    pinned, count = _IMAGE.subn(rf"ARG PYTHON_IMAGE=\g<tagged>@{digest}", text)
    if count != 1:
        raise ValueError("the Dockerfile has no line 'ARG PYTHON_IMAGE=python:TAG'")
    return pinned


def main(arguments: Sequence[str] | None = None, files: Sequence[Path] = DOCKERFILES) -> int:
    """Pin or check the Dockerfiles; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", default="https://registry-1.docker.io")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    stale = 0
    for path in files:
        text = path.read_text()
        image = _IMAGE.search(text)
        if image is None:
            print(f"{path.name} has no line 'ARG PYTHON_IMAGE=python:TAG'", file=sys.stderr)
            return 2
        try:
            digest = digest_of(image["tagged"], options.registry)
        except (OSError, ValueError) as error:
            print(f"{path.name}: no digest for {image['tagged']}: {error}", file=sys.stderr)
            return 2
        pinned = pin(text, digest)
        stale += pinned != text
        if not options.check:
            path.write_text(pinned)
        print(f"{path.name}: {image['tagged']}@{digest}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
