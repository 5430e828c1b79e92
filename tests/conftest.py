"""Fixtures of all tests."""

from __future__ import annotations

import fcntl
import functools
import gc
import importlib.util
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.kits import postgres as postgres_kit
from tests.kits import s3 as s3_kit
from tests.kits.gate import Gate
from tests.kits.jobs import BACKENDS, Backend

ROOT = Path(__file__).parents[1]
gc.disable()  # imports make millions of objects that stay: to look at them takes seconds
# pyts compiles its functions whenever it is imported, which takes longer than any test of it.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
# Each HTTP client reads the list of certificate authorities, which takes longer than most requests.
ssl.create_default_context = functools.cache(ssl.create_default_context)


LONGEST = (
    "test_explorer", "test_docs_samples", "test_openapi_fuzz", "test_training_landcover",
    "test_training_ablation", "test_graph_export", "test_load", "test_dask_files", "test_memory",
    "test_training_finetune", "test_level2a", "test_storage", "test_on_demand", "test_dask",
    "test_stac", "test_qgis_plugin", "test_hostile", "test_start", "test_ogc_fuzz", "test_fuzz",
    "test_client_service", "test_replicas", "test_pretrain", "test_threads",
    "test_unreachable_hosts", "test_backtest", "test_turns", "test_vector_guard", "test_jobs_store",
    "test_downloads", "test_json_fuzz", "test_real_input", "test_ogc", "test_jobs_process",
    "test_jobs", "test_heads", "test_int8_scale", "test_embedding", "test_forecast_interval",
    "test_security_leaks", "test_stac_items", "test_jobs_resume", "test_pipeline", "test_deploy",
    "test_keys", "test_descriptors", "test_training_regions",
)  # fmt: skip
"""Files that take longest, in this order: of two processes neither is left with one at the end."""


SERVERS = {"postgres", "s3"}
"""Fixtures that start a server of another program, which takes longer than the tests of it."""


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that need a server as slow. The longest files come first, the others as they are.

    A parameter that alone needs a server is marked where it stands, with `in_all_tests`.
    """
    for item in items:
        if isinstance(item, pytest.Function) and SERVERS & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Look for garbage from here on, but not among the objects of imports and tests.

    They stay. So does what is garbage already: to look for it takes a second.
    """
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real satellite data beside the checkout; without it the test is skipped, except in CI."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI must have the real data, and {folder.name} is not there")
        pytest.skip("needs the real satellite data at ../shared/data")
    return folder


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate in this process, open at first and afterwards."""
    with Gate(tmp_path / "gate").installed() as made:
        yield made


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgres_kit.Postgres]:
    """A PostgreSQL server; skips without one, but never in CI."""
    with postgres_kit.server() as made:
        yield made


@pytest.fixture(scope="session")
def s3() -> Iterator[s3_kit.S3]:
    """A server with the interface of S3, and its credentials in the environment."""
    with pytest.MonkeyPatch.context() as patch, s3_kit.server() as made:
        for name, value in s3_kit.CREDENTIALS.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """An empty state directory with its database, of either kind."""
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").database()
    return Backend(tmp_path / "state", url)


@pytest.fixture(scope="session")
def demo() -> ModuleType:
    """The module that `make demo` runs."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "docs" / "demo.py")
    if spec is None or spec.loader is None:
        pytest.fail("docs/demo.py is not there")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def romania(demo: ModuleType) -> tuple[Path, Path]:
    """The Romania cube and its tree cover; skips where it cannot be fetched, but never in CI."""
    folder = ROOT / "demo" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Two processes of a parallel run must not unpack the same files.
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cube, trees = demo.fetch(folder)
    except subprocess.CalledProcessError:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{demo.WHEEL} cannot be fetched")
    return cube, trees
