"""A short run of the load test with every kind of client."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.load import Report, asks, run

pytestmark = pytest.mark.slow


def test_a_crowd_of_every_kind_is_served_and_leaves_nothing() -> None:
    """How fast is for `python -m benchmarks.load` to say: this machine has other work to do."""
    kinds = asks(largest=64)
    report = run(15, 16, kinds, ["dripping"], PIMC_MAX_CONCURRENCY="2", PIMC_UPLOAD_SECONDS="5")
    assert report.faults == []
    assert report.leftovers == []
    assert report.running == 0
    answered = {
        name: {o for o in told if o != "overloaded"} for name, told in report.answers.items()
    }
    for ask in kinds:  # each only as it should have been
        said = f"{ask.status} {ask.code}" if ask.code else str(ask.status)
        left = ask.manner in {"half", "leave", "deaf"}
        assert answered.get(ask.name, set()) <= {"left" if left else said}
    # On a machine with other work some kinds may always come when the service is full.
    assert sum(map(bool, answered.values())) > len(kinds) / 2
    assert sum(told.get("overloaded", 0) for told in report.answers.values()) > 0
    assert all(report.probes.values())
    assert report.beside["dripping"].get("408", 0) > 0


def test_a_report_tells_growth_and_leftovers() -> None:
    def of(resident: list[float], **other: object) -> Report:
        lists = {"failures": [], "leftovers": []}
        maps = {"machine": {}, "answers": {}, "medians": {}, "probes": {}}
        numbers = {"seconds": 600, "callers": 1, "running": 0, "refused_p99": 0.0}
        empty = {**lists, **maps, **numbers}
        return Report(resident=resident, **{**empty, **other})  # type: ignore[arg-type]

    steady, growing = [1e8] * 600, [1e8 + 1e5 * second for second in range(600)]
    assert of(steady).faults == of(steady).delays == []
    assert of(growing).growth > statistics.fmean(growing[-60:]) / growing[180] - 1
    assert "memory went" in of(growing).delays[0]
    assert "left" in of(steady, leftovers=["pimc-x"]).faults[0]
    assert "in memory" in of([2e9] * 600).faults[0]
    assert of(steady, failures=["map: 500"]).faults == ["map: 500"]
    assert "ms" in of(steady, probes={"/metrics": [0.001] * 90 + [0.2] * 10}).delays[0]
