"""Cards and the registry: time windows, and bundles that are rejected with a reason."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.card import ModelCard, StartRule, TimeWindow
from models.registry import (
    CHECKSUMS,
    ZOO,
    BundleError,
    Registry,
    load_bundle,
    read_checksums,
)
from training.card import DESCRIPTIONS
from training.export import VersionNotRaised, describe
from training.licences import sensed


def card(content: bytes = b"onnx", **changes: Any) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest()
    return {
        "name": "toy",
        "version": "1.0.0",
        "task": "classify-pixels",
        "modality": "pixel",
        "description": "A toy.",
        "bands": ["B02", "B04", "B08"],
        "indices": ["ndvi"],
        "window": {"steps": 36, "step_days": 10, "start": "calendar-year"},
        "min_observations": 3,
        "classes": [{"value": 0, "name": "Trees", "color": "#006400", "code": 10}],
        "licence": "MIT",
        "variants": [
            {
                "name": "float32",
                "file": "model.onnx",
                "sha256": sha256,
                "bytes": len(content),
                "opset": 20,
            }
        ],
        "sha256": sha256,
        **changes,
    }


FILES = ("model.onnx", "card.json")


def write(folder: Path, content: bytes = b"onnx", **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(content)
    (folder / "card.json").write_text(json.dumps(card(**changes)))
    return folder


def every(days: int, first: date, last: date) -> list[date]:
    return [first + timedelta(days=d) for d in range(0, (last - first).days + 1, days)]


START, END = date(2021, 1, 5), date(2021, 12, 31)


class TestTimeWindow:
    def test_calendar_year_is_the_one_with_the_most_dates(self) -> None:
        dates = every(5, date(2017, 8, 14), date(2018, 11, 20))
        window = TimeWindow(steps=36, step_days=10, start="calendar-year").resolve(dates)
        assert window.start == window.first_day == date(2018, 1, 1)
        assert {dates[i].year for i in window.used} == {2018}
        assert window.days(dates)[0] == (dates[window.used[0]] - date(2018, 1, 1)).days

    def test_the_later_year_is_chosen_in_a_tie(self) -> None:
        dates = [date(y, m, 1) for y in (2019, 2020) for m in range(1, 12)]
        window = TimeWindow(steps=36, step_days=10, start="calendar-year").resolve(dates)
        assert window.start == date(2020, 1, 1)

    def test_fullest_year_takes_a_season_that_crosses_the_new_year(self) -> None:
        dates = every(10, date(2020, 7, 3), date(2021, 6, 20))
        window = TimeWindow(steps=36, step_days=10, start="fullest-year").resolve(dates)
        assert window.start == date(2020, 7, 1)
        assert len(window.used) == len(dates)

    def test_fullest_year_prefers_january(self) -> None:
        dates = [date(2018, m, 10) for m in range(1, 12)]
        window = TimeWindow(steps=36, step_days=10, start="fullest-year").resolve(dates)
        assert window.start == date(2018, 1, 1)

    def test_every_date_takes_all_years(self) -> None:
        dates = every(30, date(2016, 3, 5), date(2020, 11, 20))
        rule = TimeWindow(steps=36, step_days=10, start="every-date")
        window = rule.resolve(dates[::-1])
        assert window.start == window.first_day == date(2016, 1, 1)
        assert len(window.used) == len(dates)
        assert window.last == dates[-1]
        assert max(window.days(dates[::-1])) == (dates[-1] - date(2016, 1, 1)).days

    def test_a_start_does_not_shift_the_seasons_of_every_date(self) -> None:
        dates = every(10, date(2018, 1, 4), date(2020, 12, 20))
        rule = TimeWindow(steps=36, step_days=10, start="every-date")
        window = rule.resolve(dates, date(2019, 5, 1))
        assert window.start == date(2019, 5, 1)
        assert window.first_day == date(2019, 1, 1)
        day_of = dict(zip(window.used, window.days(dates), strict=True))
        # A day of May lies where it lies without a start; of the next January, a year later.
        whole = rule.resolve(dates).days(dates)
        assert all((whole[i] - day) % 365 in {0, 364, 1} for i, day in day_of.items())
        assert min(day_of.values()) >= 120
        assert max(day_of.values()) <= 120 + 360

    def test_last_steps_ends_on_the_last_date(self) -> None:
        dates = every(10, date(2021, 1, 5), date(2021, 12, 31))
        window = TimeWindow(steps=32, step_days=10, start="last-steps").resolve(dates[::-1])
        assert window.last == dates[-1]
        assert window.first_day == dates[-1] - timedelta(days=310)
        assert max(window.days(dates[::-1])) == 310
        assert min(window.days(dates[::-1])) == 0

    @pytest.mark.parametrize("rule", ["calendar-year", "fullest-year", "every-date", "last-steps"])
    @pytest.mark.parametrize("start", [None, date.min, date(2021, 6, 1), date.max])
    @pytest.mark.parametrize(
        "dates", [[date.min], [date.max], [date.min, date.max], every(20, START, END)]
    )
    def test_no_date_is_too_extreme(
        self, rule: StartRule, start: date | None, dates: list[date]
    ) -> None:
        window = TimeWindow(steps=36, step_days=10, start=rule).resolve(dates, start)
        length = timedelta(days=360)
        first = start or window.start
        if start or rule != "every-date":
            assert all(timedelta(0) <= dates[i] - first < length for i in window.used)
        # 31 December is beyond 36 steps of 10 days.
        assert window.used or start or (rule, dates) == ("calendar-year", [date.max])

    def test_a_given_start_bounds_what_is_used(self) -> None:
        dates = every(10, date(2020, 1, 1), date(2021, 12, 31))
        start = date(2020, 6, 1)
        for rule in ("calendar-year", "fullest-year", "every-date", "last-steps"):
            window = TimeWindow(steps=36, step_days=10, start=rule).resolve(dates, start)  # type: ignore[arg-type]
            used = [dates[i] for i in window.used]
            assert window.start == start
            assert start <= min(used) < max(used) < start + timedelta(days=360)

    def test_a_start_after_every_date_uses_none(self) -> None:
        for rule in ("calendar-year", "last-steps"):
            window = TimeWindow(steps=36, step_days=10, start=rule).resolve(  # type: ignore[arg-type]
                [date(2020, 1, 1)], date(2022, 1, 1)
            )
            assert window.used == ()
            assert window.last is None


class TestCard:
    def test_round_trip(self) -> None:
        first = ModelCard.model_validate(card())
        assert ModelCard.model_validate_json(first.model_dump_json()) == first
        assert first.id == "toy@1.0.0"
        assert first.inputs == ("values", "valid", "days")

    def test_a_card_of_an_earlier_version_states_no_sensor(self) -> None:
        first = ModelCard.model_validate(card())
        assert (first.sensors, first.pixel_size, first.regions) == ((), None, {})

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"task": "forecast"}, "must not have 'classes'|needs 'horizon'"),
            ({"window": None}, "needs 'window'"),
            ({"patch": 64}, "must not have 'patch'"),
            ({"classes": []}, "needs 'classes'"),
            ({"sha256": "0" * 64}, "first variant"),
            ({"colour": "red"}, "Extra inputs"),
            ({"classes": [{"value": 3, "name": "x", "color": "#000000"}]}, "must be 0, 1, 2"),
            ({"pixel_size": [20, 10]}, "smallest and the largest"),
            ({"pixel_size": [0, 10]}, "smallest and the largest"),
            ({"extent": [[5, 50, 4, 51]]}, "west, south, east and north"),
            ({"extent": [[50, 4, 51, 95]]}, "west, south, east and north"),
            ({"extent": [[170, -20, -170, -10]]}, "add 360 to the east"),
            ({"elsewhere": True, "extent": [[4, 50, 5, 51]]}, "needs a forecast card"),
        ],
    )
    def test_a_card_that_contradicts_itself_is_rejected(
        self, changes: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(ValidationError, match=reason):
            ModelCard.model_validate(card(**changes))


class TestRegistry:
    def test_finds_by_name_and_version(self, tmp_path: Path) -> None:
        write(tmp_path / "a")
        registry = Registry.load(tmp_path)
        assert registry.refused == {}
        bundle = registry.find("toy")
        assert bundle is not None
        assert bundle.path().read_bytes() == b"onnx"
        assert registry.find("toy@1.0.0") == bundle
        assert registry.find("toy@2.0.0") is None
        assert registry.find("other") is None

    def test_the_default_is_the_card_marked_default(self, tmp_path: Path) -> None:
        write(tmp_path / "a", name="a-model")
        write(tmp_path / "b", name="b-model", default=True)
        bundle = Registry.load(tmp_path).default("classify-pixels")
        assert bundle is not None
        assert bundle.card.name == "b-model"
        assert Registry.load(tmp_path).default("forecast") is None

    def test_a_later_folder_replaces_a_name(self, tmp_path: Path) -> None:
        write(tmp_path / "one" / "toy")
        write(tmp_path / "two" / "toy", version="2.0.0")
        bundle = Registry.load(tmp_path / "one", tmp_path / "two").find("toy")
        assert bundle is not None
        assert bundle.card.version == "2.0.0"

    def test_one_invalid_bundle_does_not_affect_the_others(self, tmp_path: Path) -> None:
        write(tmp_path / "good")
        write(tmp_path / "bad", name="bad")
        (tmp_path / "bad" / "model.onnx").write_bytes(b"tampered")
        registry = Registry.load(tmp_path)
        assert list(registry.bundles) == ["toy"]
        assert "sha256" in registry.refused["bad"]

    def test_each_rejection_names_the_bundle_and_the_reason(self, tmp_path: Path) -> None:
        missing = write(tmp_path / "missing")
        (missing / "model.onnx").unlink()
        with pytest.raises(BundleError, match=r"'missing'.*model\.onnx, which is missing"):
            load_bundle(missing)
        broken = write(tmp_path / "broken")
        (broken / "card.json").write_text("{}")
        with pytest.raises(BundleError, match=r"'broken'.*card\.json is not valid"):
            load_bundle(broken)
        with pytest.raises(BundleError, match=r"'absent'.*cannot be read"):
            load_bundle(tmp_path / "absent")

    @pytest.mark.parametrize("name", ["weights.pt", "README.md", ".hidden", "weights.bin"])
    def test_a_folder_holds_only_what_its_card_names(self, tmp_path: Path, name: str) -> None:
        folder = write(tmp_path / "more")
        (folder / name).write_bytes(b"")
        with pytest.raises(
            BundleError,
            match=rf"'more': the folder holds '{re.escape(name)}', which card\.json does not",
        ):
            load_bundle(folder)

    def test_a_folder_within_a_bundle_is_rejected(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "deep")
        (folder / "more").mkdir()
        with pytest.raises(BundleError, match="'deep': the folder holds 'more'"):
            load_bundle(folder)

    def test_a_symbolic_link_is_rejected(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "bundles" / "linked")
        (folder / "model.onnx").rename(tmp_path / "model.onnx")
        (folder / "model.onnx").symlink_to(tmp_path / "model.onnx")
        with pytest.raises(BundleError, match=r"'linked': model\.onnx is a symbolic link"):
            load_bundle(folder)

    @pytest.mark.slow
    def test_with_checksums_only_what_they_list_is_loaded(self, tmp_path: Path) -> None:
        write(tmp_path / "zoo" / "listed", name="listed")
        write(tmp_path / "zoo" / "changed", name="changed")
        write(tmp_path / "zoo" / "added", name="added")
        made = subprocess.run(
            [
                "/usr/bin/env",
                "sha256sum",
                *sorted(f"{f}/{p}" for f in ("listed", "changed") for p in FILES),
            ],
            cwd=tmp_path / "zoo",
            capture_output=True,
            text=True,
            check=True,
        )
        (tmp_path / "sums").write_text(made.stdout)
        checksums = read_checksums(tmp_path / "sums")
        assert set(Registry.load(tmp_path / "zoo", checksums=checksums).bundles) == {
            "listed",
            "changed",
        }
        # Another file with a card that vouches for it: the card alone would be accepted.
        (tmp_path / "zoo" / "changed" / "model.onnx").write_bytes(b"other")
        changed = card(b"other", name="changed")
        (tmp_path / "zoo" / "changed" / "card.json").write_text(json.dumps(changed))
        assert "changed" in Registry.load(tmp_path / "zoo").bundles
        registry = Registry.load(tmp_path / "zoo", checksums=checksums)
        assert list(registry.bundles) == ["listed"]
        assert registry.refused == {
            name: f"bundle '{name}': PIMC_MODEL_CHECKSUMS does not list model.onnx with its "
            "sha256: restore the file, or update the list"
            for name in ("added", "changed")
        }

    @pytest.mark.parametrize("line", ["", "abc  a/b", f"{'0' * 64}  a", f"{'0' * 64}  ../a/b"])
    def test_a_list_of_another_form_is_rejected(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "sums").write_text(f"{'1' * 64}  a/b\n{line}\n")
        with pytest.raises(ValueError, match="line 2 of sums is not 'sha256  folder/file'"):
            read_checksums(tmp_path / "sums")

    def test_a_graph_without_a_card_is_rejected_and_listed(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "bare")
        (folder / "card.json").unlink()
        (tmp_path / "empty").mkdir()
        (tmp_path / "file.txt").write_text("no folder")
        registry = Registry.load(tmp_path)
        assert list(registry.refused) == ["bare"]
        assert "card.json cannot be read" in registry.refused["bare"]

    def test_two_bundles_of_one_folder_do_not_share_a_name(self, tmp_path: Path) -> None:
        write(tmp_path / "a")
        write(tmp_path / "b", version="2.0.0")
        registry = Registry.load(tmp_path)
        assert registry.bundles["toy"].card.version == "1.0.0"
        assert registry.refused["b"] == (
            "bundle 'b': bundle 'a' has the same name 'toy': change the name in one card.json"
        )

    def test_an_unreadable_file_does_not_affect_other_bundles(self, tmp_path: Path) -> None:
        write(tmp_path / "good")
        bad = write(tmp_path / "bad", name="bad")
        (bad / "card.json").unlink()
        (bad / "card.json").mkdir()
        registry = Registry.load(tmp_path)
        assert list(registry.bundles) == ["toy"]
        assert "'bad': card.json cannot be read" in registry.refused["bad"]


class TestLowestScores:
    @pytest.mark.parametrize(
        ("regions", "shown"),
        [
            ({}, ""),
            ({"a": {"accuracy": 0.0}, "b": {"accuracy": [0.7, 0.6, 0.8]}}, "as few as 0 %"),
            ({"a": {"accuracy": None}, "b": {"accuracy": 0.456}}, "as few as 46 % of the pixels"),
            ({"a": 0.5, "b": {"accuracy": "high"}, "c": {"accuracy": [None]}}, ""),
            ({"a": {"rmse": 0.2, "coverage": 0.7}}, ""),  # not of a classification
        ],
    )
    def test_of_regions_that_have_them(self, regions: dict[str, Any], shown: str) -> None:
        found = ModelCard.model_validate(card(regions=regions)).lowest_scores()
        assert shown in found
        assert bool(found) is bool(shown)


class TestZoo:
    def test_its_list_of_checksums_is_current(self) -> None:
        """`make checksums` writes it."""
        checksums = read_checksums(ZOO / CHECKSUMS)
        files = {f"{p.parent.name}/{p.name}" for p in ZOO.glob("*/*") if p.is_file()}
        assert set(checksums) == files
        assert Registry.load(ZOO, checksums=checksums).refused == {}

    def test_the_zoo_is_complete(self) -> None:
        registry = Registry.load(ZOO)
        assert registry.refused == {}
        assert set(registry.bundles) == {
            "pixels-landcover",
            "pixels-crops-us",
            "pixels-crops-us-20m",
            "pixels-crops-us-small",
            "forecast-vi",
            "landcover-eurosat",
            "embed-pixel",
            "embed-patch",
        }
        assert sum(p.stat().st_size for p in ZOO.rglob("*") if p.is_file()) < 67e6

    def test_every_card_states_sensors_and_pixel_sizes_of_its_training_data(self) -> None:
        for bundle in Registry.load(ZOO).bundles.values():
            card = bundle.card
            learned = {part.name for part in card.training_data if part.use != "validation"}
            assert "sentinel-2" in card.sensors
            assert ("modis" in card.sensors) == ("modis_brazil" in learned)
            assert card.pixel_size == (10.0, 250.0 if "modis" in card.sensors else 10.0)

    def test_every_card_states_its_use_and_where_it_was_trained(self) -> None:
        for bundle in Registry.load(ZOO).bundles.values():
            card = bundle.card
            assert card.intended_use == DESCRIPTIONS[card.name].use != ""
            assert card.description == DESCRIPTIONS[card.name].text
            assert card.extent == sensed(card.training_data)["extent"]
            assert bool(card.extent) is (card.task != "embed")
            assert bool(card.lowest_scores()) is (card.task != "embed")

    def test_a_patch_costs_at_most_half_a_gigaflop(self) -> None:
        card = Registry.load(ZOO).bundles["landcover-eurosat"].card
        assert card.training["megaflop"] < 500

    def test_weights_under_another_licence_come_with_its_text(self) -> None:
        text = (ZOO / "LICENSE-Apache-2.0.txt").read_text()
        assert "Version 2.0, January 2004" in text
        notice = (ZOO / "NOTICE.txt").read_text()
        for bundle in Registry.load(ZOO).bundles.values():
            assert ("Apache-2.0" in bundle.card.licence) == (bundle.card.name in notice)

    def test_the_legends_carry_their_sources_codes(self) -> None:
        registry = Registry.load(ZOO)
        crops = registry.bundles["pixels-crops-us"].card.classes
        assert len(crops) == 17
        assert {1, 2, 3, 5, 61, 69, 75, 176} < {c.code for c in crops}
        assert {c.code for c in registry.bundles["pixels-landcover"].card.classes} >= {10, 30, 40}
        assert len(registry.bundles["landcover-eurosat"].card.classes) == 10

    def test_a_card_is_described_again(self, tmp_path: Path) -> None:
        """`python -m training describe` writes the fields of the code; files stay as they are."""
        folder = tmp_path / "embed-patch"
        shutil.copytree(ZOO / "embed-patch", folder)
        path = folder / "card.json"
        card = json.loads(path.read_text())
        path.write_text(json.dumps({**card, "description": "", "intended_use": "", "sensors": []}))
        with pytest.raises(VersionNotRaised, match=card["version"]):
            describe(folder, version=card["version"])
        describe(folder, version="9.0.0")
        assert load_bundle(folder).card == ModelCard.model_validate({**card, "version": "9.0.0"})
