"""A short run of the load test with every kind of client."""

from __future__ import annotations

import shutil
import statistics
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import pytest

from benchmarks import load, process
from benchmarks.load import Outcomes, Report, requests, run
from benchmarks.strangers import STRANGERS
from benchmarks.tiny_zoo import write_bundle, write_zoo
from tests.kits.forks import Forked
from tests.kits.patience import PATIENCE

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _forked_services(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(environment: Mapping[str, str], log: IO[str]) -> Forked:
        return Forked("service", variables=environment, stderr=log)

    monkeypatch.setattr(process, "started", started)


def test_clients_of_every_kind_are_served_and_leave_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are not tested, because a test machine may be busy: see `python -m benchmarks.load`."""
    zoo = str(write_zoo(tmp_path))
    monkeypatch.setattr(load, "_DEAF_SECONDS", 1.0)
    kinds = requests(largest=64)

    def enough(clients: Outcomes, others: Outcomes) -> bool:
        seen = {outcome for counts in clients.values() for outcome in counts}
        return (
            clients.keys() >= {kind.name for kind in kinds}
            and seen > {"overloaded"}
            and others["dripping"].get("408", 0) > 0
        )

    report = run(
        PATIENCE, 16, kinds, ["dripping"],
        enough=enough, PIMC_MAX_CONCURRENCY="2", PIMC_UPLOAD_SECONDS="5", PIMC_MODEL_DIR=zoo,
    )  # fmt: skip
    assert report.faults == []
    assert report.leftovers == []
    assert report.running == 0
    outcomes = {
        name: {o for o in counts if o != "overloaded"} for name, counts in report.outcomes.items()
    }
    for request in kinds:  # each kind has only its expected outcome
        status = f"{request.status} {request.code}" if request.code else str(request.status)
        left = request.behaviour in {"half", "leave", "deaf"}
        assert outcomes.get(request.name, set()) <= {"left" if left else status}
    # On a busy machine many kinds may always be rejected as overloaded.
    assert any(outcomes.values())
    assert sum(counts.get("overloaded", 0) for counts in report.outcomes.values()) > 0
    assert all(report.probes.values())
    assert report.beside["dripping"].get("408", 0) > 0


def test_a_report_states_growth_leftovers_and_delays() -> None:
    def of(resident: list[float], **other: object) -> Report:
        lists = {"failures": [], "leftovers": []}
        maps = {"machine": {}, "outcomes": {}, "medians": {}, "probes": {}}
        numbers = {"seconds": 600, "callers": 1, "running": 0, "refused_p99": 0.0}
        empty = {**lists, **maps, **numbers}
        return Report(resident=resident, **{**empty, **other})  # type: ignore[arg-type]

    steady, growing = [1e8] * 600, [1e8 + 1e5 * second for second in range(600)]
    assert of(steady).faults == of(steady).delays == []
    assert (
        of(growing).growth
        == statistics.fmean(growing[-160:]) / statistics.fmean(growing[120:280]) - 1
    )
    assert "memory grew" in of(growing).delays[0]
    assert of(growing[::-1]).delays == []
    assert "left" in of(steady, leftovers=["pimc-x"]).faults[0]
    assert "in memory" in of([2e9] * 600).faults[0]
    assert of(steady, failures=["map: 500"]).faults == ["map: 500"]
    assert "ms" in of(steady, probes={"/metrics": [0.001] * 90 + [0.2] * 10}).delays[0]


def served_often(clients: Outcomes) -> bool:
    return len(clients) == 2 and all(counts.get("200", 0) >= 10 for counts in clients.values())


def test_a_key_that_hogs_the_service_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    kinds = [one for one in requests(largest=64) if one.name in {"map 1 x 1", "series of 1"}]

    def enough(clients: Outcomes, others: Outcomes) -> bool:
        return served_often(clients) and others["hogs"].get("429", 0) > 0

    report = run(
        PATIENCE, 4, kinds, ["dripping", "hogs"],
        keys=True, enough=enough, PIMC_MAX_CONCURRENCY="1", PIMC_MAX_REQUESTS_PER_CALLER="2",
        PIMC_MODEL_DIR=str(write_zoo(tmp_path)),
    )  # fmt: skip
    assert report.failures == []
    outcomes = {name for counts in report.outcomes.values() for name in counts}
    assert outcomes == {"200"}  # each client has slots of its own
    assert report.beside["hogs"]["429"] > 0
    assert set(report.beside["hogs"]) <= {"200", "202", "429"}


def test_strangers_take_neither_memory_nor_connections_from_the_others(tmp_path: Path) -> None:
    write_bundle(tmp_path, "pixels-landcover", "classify-pixels", "pixel")
    # Its results are larger than the buffers of a socket.
    write_bundle(tmp_path, "embed-pixel", "embed", "pixel", wide=32)
    kinds = [one for one in requests(largest=64) if one.name in {"map 1 x 1", "series of 1"}]

    def enough(clients: Outcomes, others: Outcomes) -> bool:
        known = (
            ("idle", "closed"), ("heads", "cut off"), ("leaving", "left"),
            ("unread", "unread at once"),
        )  # fmt: skip
        return (
            served_often(clients)
            and all(others[name].get(outcome, 0) > 0 for name, outcome in known)
            and bool(others["blocks"])
        )

    report = run(
        PATIENCE, 4, kinds, list(STRANGERS),
        enough=enough, PIMC_MAX_CONCURRENCY="2", PIMC_MAX_CONNECTIONS_PER_ADDRESS="64",
        PIMC_MODEL_DIR=str(tmp_path),
    )  # fmt: skip
    assert report.faults == []
    outcomes = {name for counts in report.outcomes.values() for name in counts}
    assert "200" in outcomes
    assert outcomes <= {"200", "overloaded"}
    seen = report.beside
    assert seen["idle"]["closed"] > 0  # three hundred connections, of which 64 are kept
    assert seen["heads"]["cut off"] > 0
    assert "taken whole" not in seen["heads"]
    assert 0 < seen["unread"]["unread at once"] <= 16  # PIMC_MAX_DOWNLOADS_PER_CALLER
    assert seen["leaving"]["left"] > 0
    assert seen["blocks"]
    assert set(seen["blocks"]) <= {"200", "413", "429", "503"}


def test_leftovers_are_found_while_folders_are_removed(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"request-{number}").mkdir()
        (tmp_path / f"request-{number}" / "a.tif").touch()
    (tmp_path / "kept").mkdir()
    removed = threading.Thread(
        target=lambda: [shutil.rmtree(folder) for folder in tmp_path.glob("request-*")]
    )
    removed.start()
    while removed.is_alive():
        assert tmp_path / "kept" in process.below(tmp_path)
    assert process.below(tmp_path) == {tmp_path / "kept"}
