"""The benchmark of Sentinel-2's offset, on land that is made up."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import pytest

from benchmarks import offsets
from benchmarks.offsets import CHANGES, Judged, Scenes, judge, table


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """The same clear fields every ten days, with a little noise."""
    random = np.random.default_rng(0)
    pattern = random.uniform(0.5, 1.5, (3, 64, 64)) * np.array([0.04, 0.06, 0.3])[:, None, None]
    values = (pattern + random.normal(0, 0.002, (12, 3, 64, 64))).astype(np.float32)
    dates = tuple(date(2019, 3, 1) + timedelta(days=10 * n) for n in range(12))
    clear = np.ones((12, 64, 64), np.bool_)
    return Scenes(name="fields", mask="none", values=values, clear=clear, dates=dates)


def judged(scenes: Scenes, change: str) -> Judged:
    part = range(1, 11), slice(2, 26), slice(4, 28)
    return judge(scenes, *part, change, np.random.default_rng(0))


@pytest.mark.parametrize(("change", "holding"), zip(CHANGES, (10, 5, 5, 1), strict=True))
def test_the_offset_of_clear_land_is_found(scenes: Scenes, change: str, holding: int) -> None:
    one = judged(scenes, change)
    assert (one.outcome, one.applied, one.holding) == ("applied", holding, holding)
    assert (one.stack, one.mask, one.side) == ("fields", "none", 24)


def test_sound_land_is_left_alone(scenes: Scenes) -> None:
    before = scenes.values.copy()
    one = judged(scenes, "")
    assert (one.outcome, one.applied, one.holding) == ("silent", 0, 0)
    np.testing.assert_array_equal(scenes.values, before)


def test_shares_by_side() -> None:
    def part(outcome: str, change: str = "", applied: int = 0, holding: int = 0) -> Judged:
        where = {"stack": "fields", "mask": "none", "side": 24, "dates": 10}
        return Judged(**where, change=change, outcome=outcome, applied=applied, holding=holding)

    parts = [
        *[part("silent")] * 5,
        *[part("suspected")] * 2,
        part("wrong"),
        part("applied", CHANGES[0], 3, 3),
        part("wrong", CHANGES[2], 1, 2),
        part("silent", CHANGES[3], 0, 3),
        part("silent", CHANGES[3], 0, 0),  # no clear date: nothing was changed
    ]
    head, _, row = table(parts, "side", lambda one: str(one.side))
    assert row == (
        "| 24 | 8 | 62.5 % | 25.0 % | 12.5 % | 3 | 33.3 % | 0.0 % | 33.3 % | 33.3 % | 50.0 % |"
    )
    assert head.count("|") == row.count("|")


def test_the_command_prints_every_table(
    scenes: Scenes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(offsets, "read_stacks", lambda *_: [scenes])
    monkeypatch.setattr("sys.argv", ["offsets", "--romania", "cube.nc", "--draws", "2"])
    offsets.main()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert [text.split(" | ")[0] for text in tables] == [
        "| mask", "| side, mask", "| stack, mask", "| dates", "| change"
    ]  # fmt: skip
    assert tables[0].splitlines()[2].startswith("| none | 12 | 100.0 % | 0.0 % | 0.0 % | 12 |")
