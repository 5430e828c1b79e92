"""The SDK package: public names, errors, and the cost of its import."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pimc_client
from pimc_client import cli
from pimc_client.errors import BY_CODE, ServiceError, WaitTimedOut, service_error
from pimc_client.requests import build_raster
from service.api.schemas.forms import FORMS
from service.errors import STATUS

ROOT = Path(__file__).parents[1]

NAMES = [
    "About",
    "AsyncClient",
    "AsyncJob",
    "BodyStalled",
    "BodyTooLarge",
    "Client",
    "ConnectionFailed",
    "CorruptRaster",
    "Embedding",
    "ForbiddenReference",
    "Forecast",
    "GeoTIFFError",
    "GridMismatch",
    "HeadStalled",
    "HeaderTooLarge",
    "ImplausibleReflectance",
    "InsufficientStorage",
    "InternalError",
    "InvalidFields",
    "InvalidRange",
    "InvalidRequest",
    "Job",
    "JobDismissed",
    "JobError",
    "JobFailed",
    "JobState",
    "LegendClass",
    "MalformedRequest",
    "Measured",
    "MethodNotAllowed",
    "MissingBands",
    "MissingDates",
    "Model",
    "ModelWindow",
    "Models",
    "NameTaken",
    "NoGeoreference",
    "NotAGeoTIFF",
    "NotAVectorFile",
    "NotAcceptable",
    "NotFound",
    "NotReady",
    "Overloaded",
    "PIMCError",
    "PixelClass",
    "PointResult",
    "Raster",
    "RasterError",
    "RasterTooLarge",
    "Rasters",
    "Readiness",
    "Reference",
    "RequestError",
    "ResultNotReady",
    "ResultsNotReady",
    "Results",
    "Series",
    "ServiceError",
    "ServiceWarning",
    "StacItems",
    "StacSearch",
    "StackError",
    "Summary",
    "Table",
    "Taught",
    "TimedOut",
    "TooFewDates",
    "TooFewLabels",
    "TooManyFields",
    "TooManyRequests",
    "TransportError",
    "Unauthorized",
    "UnexpectedAnswer",
    "UnknownJob",
    "UnknownModel",
    "UnknownProcess",
    "UnreachableReference",
    "UnsupportedMedia",
    "UriTooLong",
    "WaitTimedOut",
    "WrongSensor",
    "WrongTask",
    "__version__",
    "fetch_stack",
]


def test_the_public_names_are_listed():
    assert sorted(pimc_client.__all__) == sorted(NAMES)
    assert all(hasattr(pimc_client, name) for name in NAMES)


def test_every_error_code_has_its_own_class():
    assert set(BY_CODE) == set(STATUS)
    assert len(set(BY_CODE.values())) == len(STATUS)
    assert all(kind.__name__ in pimc_client.__all__ for kind in BY_CODE.values())


@pytest.mark.parametrize(("code", "status"), STATUS.items())
def test_an_error_response_raises_the_class_of_its_code(code, status):
    body = f'{{"code": "{code}", "status": {status}, "detail": "both", "request_id": "r1"}}'
    error = service_error(status, {}, body.encode())
    assert type(error) is BY_CODE[code]
    assert (error.status, error.code, error.detail, error.request_id) == (
        status,
        code,
        "both",
        "r1",
    )
    assert str(error) == f"{code}: both [request r1]"


def test_an_unknown_code_is_a_service_error_with_that_code():
    error = service_error(418, {}, b'{"code": "teapot", "detail": "short and stout"}')
    assert type(error) is ServiceError
    assert (error.code, error.status, error.detail) == ("teapot", 418, "short and stout")


@pytest.mark.parametrize("body", [b"<html>Bad Gateway</html>", b"", b"[1]", b"\xff\xfe"])
def test_an_error_by_a_proxy_is_explained(body):
    error = service_error(502, {"x-request-id": "r2"}, body)
    assert type(error) is ServiceError
    assert (error.status, error.code, error.request_id) == (502, "unknown", "r2")
    assert "502" in error.detail


def test_errors_can_be_pickled():
    original = service_error(
        422, {}, b'{"code": "invalid_request", "detail": "d", "errors": [{"field": "dates"}]}'
    )
    copy = pickle.loads(pickle.dumps(original))  # noqa: S301 (our own bytes)
    assert type(copy) is type(original)
    assert copy.errors == ({"field": "dates"},)
    assert str(copy) == str(original)
    waited = pickle.loads(pickle.dumps(WaitTimedOut("slow", job_id="j")))  # noqa: S301
    assert (waited.job_id, str(waited)) == ("j", "slow")
    assert isinstance(waited, TimeoutError)


def test_the_synchronous_client_is_generated_from_the_asynchronous_one():
    script = ROOT / "scripts" / "generate_sync_client.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_parameter_of_the_server_is_an_option_of_the_client_and_of_the_command():
    options = inspect.signature(build_raster).parameters
    for task, form in FORMS.items():
        assert set(form.model_fields) <= options.keys(), task
        command = {"classify-pixels": "classify_pixels", "series": "measure"}.get(task, task)
        offered = inspect.signature(getattr(cli, command)).parameters.keys()
        # The option --output and the command `fields`; the command itself waits for its jobs.
        offered = offered | {"outputs", "fields", "subscriber"}
        assert set(form.model_fields) <= offered, task


def test_the_version_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pimc_client.__version__ == project["version"]
    assert (ROOT / "pimc_client" / "py.typed").exists()


def imported_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_import_loads_no_heavy_module_and_no_other_package_of_the_project():
    heavy = {"httpx", "numpy", "asyncio", "typer", "rich"}
    ours = {"models", "service", "training"}
    assert not imported_by("import pimc_client") & (heavy | ours)


def test_a_client_imports_only_httpx_until_pixels_are_accessed():
    loaded = imported_by("import pimc_client; pimc_client.Client('http://localhost')")
    assert "httpx" in loaded
    assert not loaded & {"numpy", "typer", "rasterio", "models", "service"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pimc_client.Client, pimc_client.AsyncClient),
        (pimc_client.Job, pimc_client.AsyncJob),
    ],
)
def test_both_clients_have_the_same_methods_with_the_same_arguments(one, other):
    def methods(kind):
        found = {n: f for n, f in vars(kind).items() if callable(f) and not n.startswith("_")}
        return {
            n.removeprefix("a"): inspect.signature(f).parameters.keys() for n, f in found.items()
        }

    def annotations(kind, name):
        parameters = inspect.signature(getattr(kind, name)).parameters.values()
        return [str(p) for p in parameters]

    assert methods(one) == methods(other)
    for name in methods(one).keys() - {"close"}:
        assert annotations(one, name) == annotations(other, name)
        assert inspect.iscoroutinefunction(getattr(other, name))
