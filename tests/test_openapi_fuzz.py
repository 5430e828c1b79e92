"""The OpenAPI document against the service: schemathesis with every check, real GeoTIFFs.

The longer run: `SCHEMATHESIS_EXAMPLES=300 python -m pytest tests/test_openapi_fuzz.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from tests.kits.patience import PATIENCE

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "6")
# As /embed, which takes what they take: of their many parameters every value would take minutes.
ALIKE = "^/(classify-pixels|forecast|landcover|similar|series|heads|validate)$"

_COMMAND = "from schemathesis.cli import schemathesis; schemathesis()"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(
        model_dir=write_zoo(tmp_path_factory.mktemp("zoo")),
        api_keys=("key",),
        max_body_bytes=10**6,
        max_raster_bytes=10**8,
    ) as client:
        yield client


@pytest.mark.parametrize(
    "part", [["--exclude-path-regex", ALIKE], ["--include-path-regex", ALIKE, "--phases=fuzzing"]]
)
def test_responses_conform_to_the_openapi_document(
    api: httpx.Client, tmp_path: Path, part: list[str]
) -> None:
    if EXAMPLES != "6":
        part = [argument for argument in part if not argument.startswith("--phases")]
    # It would wait ten seconds for the document of an address.
    description = tmp_path / "openapi.json"
    description.write_bytes(api.get("/openapi.json").content)
    run = subprocess.run(
        [
            sys.executable, "-c", _COMMAND, "--config-file", str(TESTS / "schemathesis.toml"),
            "run", str(description), "--url", str(api.base_url),
            "--checks", "all", "--seed", "1", "--no-color",
            "--header", "Authorization: Bearer key", "--max-examples", EXAMPLES, *part,
            "--request-timeout", str(PATIENCE), "--generation-database", "none",
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(TESTS.parent),
            # Its tables of Unicode take seconds to make.
            "HYPOTHESIS_STORAGE_DIRECTORY": str(TESTS.parent / ".hypothesis"),
        },
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    output = "\n".join(line[:500] for line in run.stdout.splitlines())
    assert run.returncode == 0, output
    found = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert found, output
    assert int(found[1]) == int(found[2]) > 0


def test_every_method_of_a_path_is_in_allow(api: httpx.Client) -> None:
    for path, item in api.get("/openapi.json").json()["paths"].items():
        response = api.request("OPTIONS", path.replace("{job_id}", "1").replace("{name}", "x"))
        assert response.status_code == 405
        allowed = set(response.headers["Allow"].split(", "))
        assert {method.upper() for method in item} <= allowed <= {*map(str.upper, item), "HEAD"}
