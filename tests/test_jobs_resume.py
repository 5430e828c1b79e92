"""Resumed runs: a run that is interrupted at any window gives the bytes of an undisturbed run."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import shapely
from rasterio.warp import transform_geom

from benchmarks.tiny_zoo import write_zoo
from models.registry import Registry
from service.api.schemas.validation import read_parameters
from service.infer.engine import Engine
from service.read.geotiff import SourceFile
from service.run.execute import execute
from service.run.executors import ThreadExecutor
from service.run.plan import Plan, plan_request
from service.run.windows import Arrays, Step
from tests.kits.jobs import stack
from tests.kits.rasters import NORTH_UP, UTM

pytestmark = pytest.mark.slow

RUNS: dict[str, tuple[Any, dict[str, tuple[str, ...]]]] = {
    "classes": ("classify-pixels", {"outputs": ("class,confidence,probabilities",)}),
    "forecast": ("forecast", {"outputs": ("q10,q90",)}),
    "patches": ("landcover", {"stride": ("64",)}),
    "overlapping patches": ("landcover", {"stride": ("16",)}),
    "embedding": ("embed", {"modality": ("patch",), "stride": ("8",)}),
}
RUNS_OF_FIELDS = {
    "classes of fields": ("classify-pixels", {}),
    "forecasts of fields": ("forecast", {}),
    "embeddings of fields": ("embed", {}),
}
HEIGHT, WIDTH = 100, 150


class Killed(Exception):
    """Stands for the end of the process."""


class MemoryJournal:
    """A journal in memory whose process is killed while it saves window number `after`."""

    def __init__(self, after: int | None = None) -> None:
        self.after = after
        self.saved: dict[tuple[str, int], Arrays] = {}

    def load(self, step: Step) -> Arrays | None:
        return self.saved.get((step.stage, step.number))

    def save(self, step: Step, arrays: Arrays) -> None:
        if len(self.saved) == self.after:
            raise Killed
        self.saved[step.stage, step.number] = {n: a.copy() for n, a in arrays.items()}


class Counting(ThreadExecutor):
    """An executor that records the windows that are read."""

    read: list[tuple[str, int]]

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "read", [])

    def run(self, items: Any, *, read: Callable[[Any], Any], **stages: Any) -> Any:
        def recorded(step: Step) -> Any:
            self.read.append((step.stage, step.number))
            return read(step)

        return super().run(items, read=recorded, **stages)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(Registry.load(write_zoo(tmp_path_factory.mktemp("zoo"))), providers="cpu") as made:
        yield made


def parcels(path: Path) -> SourceFile:
    """Fields of the whole raster, some in several windows, in a file."""
    features = []
    for n, (x, y) in enumerate(product(range(0, WIDTH, 30), range(0, HEIGHT, 25))):
        shape = shapely.box(*NORTH_UP @ (x, y + 22.5), *NORTH_UP @ (x + 24.3, y))
        geometry = transform_geom(UTM, "EPSG:4326", shapely.geometry.mapping(shape))
        features.append({"type": "Feature", "id": n, "properties": {}, "geometry": geometry})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return SourceFile(name=path.name, path=path)


@pytest.fixture(scope="module", params=[*RUNS, *RUNS_OF_FIELDS], ids=str)
def plan(request: Any, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("stack")
    stack(folder, HEIGHT, WIDTH)
    task, fields = (RUNS | RUNS_OF_FIELDS)[request.param]
    files = tuple(SourceFile(name=p.name, path=p) for p in sorted(folder.iterdir()))
    polygons = parcels(folder / "parcels.geojson") if request.param in RUNS_OF_FIELDS else None
    request = read_parameters(task, fields).request(task, files, polygons)
    return plan_request(request, engine, max_raster_bytes=2**30, rasters=polygons is None)


def run(
    plan: Plan, folder: Path, journal: MemoryJournal | None, executor: ThreadExecutor | None = None
) -> tuple[dict[str, bytes], object, list[float]]:
    """The bytes of the result's files, the document, and the reported progress."""
    folder.mkdir()
    shares: list[float] = []
    result = execute(
        plan,
        folder,
        executor=executor or ThreadExecutor(),
        cancelled=threading.Event(),
        progress=shares.append,
        journal=journal,
    )
    return {p.name: p.read_bytes() for p in folder.iterdir()}, result.document, shares


@pytest.fixture(scope="module")
def undisturbed(
    plan: Plan, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], object]:
    """The files and the document of the run without a journal."""
    files, document, _ = run(plan, tmp_path_factory.mktemp("runs") / "undisturbed", None)
    return files, document


@pytest.fixture(scope="module")
def saved(
    plan: Plan,
    undisturbed: tuple[dict[str, bytes], object],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, int], Arrays]:
    """What a run saves from its first window to its last, in order; its result is the same."""
    complete = MemoryJournal()
    with_journal, same, _ = run(plan, tmp_path_factory.mktemp("runs") / "journal", complete)
    assert (with_journal, same) == undisturbed
    assert len(complete.saved) >= 5
    return complete.saved


def test_a_resumed_run_equals_an_undisturbed_run(
    plan: Plan,
    undisturbed: tuple[dict[str, bytes], object],
    saved: dict[tuple[str, int], Arrays],
    tmp_path: Path,
) -> None:
    for after in (0, 1, len(saved) // 2, len(saved) - 1):
        kept = MemoryJournal(after)
        with pytest.raises(Killed):
            run(plan, tmp_path / f"killed-{after}", kept)
        # No finished raster is there; the caller removes the folder with its temporary files.
        assert not list((tmp_path / f"killed-{after}").glob("*.tif"))
        kept.after = None
        executor = Counting()
        again, document, shares = run(plan, tmp_path / f"again-{after}", kept, executor)
        assert (again, document) == undisturbed
        assert executor.read == list(saved)[after:]
        assert shares == sorted(shares)
        assert shares[-1] == 1


def test_windows_after_a_missing_one_are_computed_again(
    plan: Plan,
    undisturbed: tuple[dict[str, bytes], object],
    saved: dict[tuple[str, int], Arrays],
    tmp_path: Path,
) -> None:
    steps = list(saved)
    lost = len(steps) // 2
    kept = MemoryJournal()
    kept.saved = {step: arrays for step, arrays in saved.items() if step != steps[lost]}
    executor = Counting()
    again, same, _ = run(plan, tmp_path / "again", kept, executor)
    assert (again, same) == undisturbed
    # Up to the end of that pass; the windows of later passes are not computed again.
    expected = [step for step in steps[lost:] if step[0] == steps[lost][0]]
    assert executor.read == expected
