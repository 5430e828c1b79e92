"""Tables of series, their augmentation, and cuts for forecasts."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pytest
import torch

from models.card import TimeWindow
from models.indices import SpectralIndices
from models.timegrid import TimeGrid
from training.classification import in_window, log_shares, mix_pixels, sampling_weights
from training.config import BANDS, INDICES
from training.datasets import PixelSet
from training.forecasting import cut, forecast_scores
from training.series import (
    SeriesAugmentation,
    SeriesTable,
    any_year,
    augment_series,
    computable,
    ordinal_day_of_year,
    other_hemisphere,
    tabulate,
    usable_first,
)

pytestmark = pytest.mark.slow

YEAR = TimeWindow(steps=36, step_days=10, start="calendar-year")


def pixel_set(source: str, first: date, every: int, t: int, n: int = 6, seed: int = 0) -> PixelSet:
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.02, 0.5, (n, t, 3)).astype(np.float32)
    valid = rng.random((n, t)) < 0.8
    values[~valid] = np.nan
    return PixelSet(
        source=source,
        bands=("B02", "B04", "B08"),
        dates=tuple(first + timedelta(days=every * i) for i in range(t)),
        values=values,
        valid=valid,
        places=np.arange(n) // 2,
        validation=np.arange(n) >= n - 2,
        labels=np.arange(n) % 3,
    )


@pytest.fixture
def sets() -> list[PixelSet]:
    return [
        pixel_set("a/monthly", date(2020, 11, 3), 30, 14),
        pixel_set("a/dekads", date(2021, 1, 5), 10, 36, seed=1),
        pixel_set("b", date(2019, 1, 1), 5, 73, seed=2),
    ]


def test_usable_dates_first_change_nothing_but_the_length(sets: list[PixelSet]) -> None:
    table = tabulate(sets, YEAR, least=1)
    values, valid, days = usable_first(table.values, table.valid, table.days)
    assert valid.shape[1] == table.valid.sum(axis=1).max() < table.valid.shape[1]
    grid = TimeGrid(36, 10.0)
    complete, _ = grid(
        *(torch.from_numpy(a) for a in (table.values.swapaxes(1, 2), table.valid, table.days))
    )
    short, _ = grid(*(torch.from_numpy(a) for a in (values.swapaxes(1, 2), valid, days)))
    torch.testing.assert_close(short, complete, rtol=1e-4, atol=1e-5)


class TestTabulate:
    def test_each_pixel_keeps_its_own_dates_and_values(self, sets: list[PixelSet]) -> None:
        table = tabulate(sets, YEAR, least=1)
        assert table.values.shape == (18, 73, 3)
        assert table.sources == ("a", "b")
        row, original = 6 + 2, sets[1]
        for t in (0, 11, 35):
            day = date.fromordinal(int(table.first_day[row] + table.days[row, t]))
            assert day == original.dates[t]
            if table.valid[row, t]:
                np.testing.assert_array_equal(table.values[row, t], original.values[2, t])
        assert table.present[row].sum() == 36
        assert not table.valid[row, 36:].any()

    def test_nothing_missing_is_valid_and_indices_are_the_formulas(
        self, sets: list[PixelSet]
    ) -> None:
        table = tabulate(sets, YEAR, least=1)
        red, nir = table.values[..., 1][table.valid], table.values[..., 2][table.valid]
        np.testing.assert_allclose(
            table.indices[table.valid][:, 0], (nir - red) / (nir + red), atol=1e-6
        )
        assert np.isfinite(table.values).all()

    def test_places_of_two_sources_are_never_one(self, sets: list[PixelSet]) -> None:
        table = tabulate(sets, YEAR, least=1)
        a, b = table.places[table.source == 0], table.places[table.source == 1]
        assert set(a.tolist()).isdisjoint(b.tolist())
        # Two sets of one source may meet in a place.
        assert len(set(a.tolist())) == 3

    def test_too_short_series_are_left_out(self, sets: list[PixelSet]) -> None:
        usable = tabulate(sets, YEAR, least=1).valid.sum(axis=1)
        least = int(np.median(usable))
        assert len(tabulate(sets, YEAR, least=least)) == (usable >= least).sum() < len(usable)

    def test_only_dates_in_the_window_are_used(self, sets: list[PixelSet]) -> None:
        table = tabulate(sets, YEAR, least=1)
        inside = in_window(table, YEAR)
        assert not (inside & (table.days >= 360)).any()
        # The monthly series began two months before the year with the most dates.
        assert (table.valid & ~inside)[:6].any()

    def test_a_window_of_every_date_uses_all_dates(self, sets: list[PixelSet]) -> None:
        window = YEAR.model_copy(update={"start": "every-date"})
        table = tabulate(sets, window, least=1)
        np.testing.assert_array_equal(in_window(table, window), table.valid)
        assert (table.days[table.valid] >= 0).all()


class TestAugmentation:
    def arrays(self, n: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        days = np.broadcast_to(np.arange(36, dtype=np.float32) * 10, (n, 36)).copy()
        values = rng.uniform(0.02, 0.4, (n, 36, 3)).astype(np.float32)
        return values, rng.random((n, 36)) < 0.9, days

    def test_dates_are_only_ever_dropped_and_enough_remain(self) -> None:
        values, valid, days = self.arrays()
        how = SeriesAugmentation(drop=0.95, gap=0.5, least=4)
        _, kept, _ = augment_series(values, valid, days, how, np.random.default_rng(1))
        assert not (kept & ~valid).any()
        assert kept.sum(axis=1).min() >= 4
        assert kept.sum() < 0.8 * valid.sum()

    def test_augmentation_of_strength_zero_changes_nothing(self) -> None:
        how = SeriesAugmentation(drop=0, jitter=0, season=0, noise=0, gain=0)
        values, valid, days = self.arrays()
        got = augment_series(values, valid, days, how, np.random.default_rng(1))
        for one, other in zip(got, (values, valid, days), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)

    def test_a_year_starts_on_any_day_and_keeps_its_cyclic_order(self) -> None:
        rng = np.random.default_rng(2)
        _, valid, days = self.arrays()
        inside, turned = any_year(valid, days, rng, least=4)
        assert turned.min() >= 0
        assert turned.max() < 366
        assert inside.sum(axis=1).min() >= 4
        assert not (inside & ~valid).any()
        assert inside.sum() > 0.95 * valid.sum()
        gaps = np.diff(turned, axis=1) % 365.25
        np.testing.assert_allclose(gaps, 10, atol=1e-3)
        assert np.ptp(turned[:, 0]) > 300

    def test_a_share_of_the_pixels_gets_the_seasons_of_the_other_hemisphere(self) -> None:
        _, _, days = self.arrays(2000)
        moved = other_hemisphere(days, 0.25, np.random.default_rng(0)) - days
        assert 0.2 < (moved[:, 0] > 0).mean() < 0.3
        assert set(np.unique(moved.round(3)).tolist()) <= {0.0, 182.625}
        np.testing.assert_array_equal(moved.min(axis=1), moved.max(axis=1))

    def test_a_long_series_is_cut_to_one_year(self) -> None:
        days = np.broadcast_to(np.arange(60, dtype=np.float32) * 30, (50, 60))
        inside, _ = any_year(np.ones((50, 60), dtype=bool), days, np.random.default_rng(0), least=4)
        assert inside.sum(axis=1).max() <= 13
        assert inside.sum(axis=1).min() >= 12
        assert len(np.unique(inside.argmax(axis=1))) > 10

    def test_a_series_of_cloud_alone_is_not_computable(self) -> None:
        values = np.full((2, 3, 3), 0.2, dtype=np.float32)
        values[1] = (0.42, 0.3, 0.3)  # EVI's denominator vanishes
        spectral = SpectralIndices(INDICES, BANDS)
        assert computable(values, np.ones((2, 3), dtype=bool), spectral).tolist() == [True, False]


def test_balance_draws_small_classes_more_often(sets: list[PixelSet]) -> None:
    table = tabulate(sets, YEAR, least=1)
    some = table.take(np.flatnonzero((table.labels != 2) | (np.arange(len(table)) < 3)))
    plain, even = sampling_weights(some, 0.0), sampling_weights(some, 1.0)
    np.testing.assert_allclose(plain, 1 / len(some))
    cells = {
        (label, source): even[(some.labels == label) & (some.source == source)].sum()
        for label, source in set(zip(some.labels.tolist(), some.source.tolist(), strict=True))
    }
    np.testing.assert_allclose(list(cells.values()), 1 / len(cells))


class TestCut:
    def table(self) -> SeriesTable:
        return tabulate([pixel_set("c", date(2021, 1, 5), 10, 36, n=8)], YEAR, least=1)

    def test_targets_are_the_composites_after_the_cut(self) -> None:
        table = self.table()
        valid, days, day_of_year, target, known = cut(table, np.full(8, 26), 32, 10, 10)
        assert not valid[:, 26:].any()
        np.testing.assert_array_equal(valid[:, :26], table.valid[:, :26])
        np.testing.assert_array_equal(days[:, 25], 310)
        np.testing.assert_array_equal(known[..., 0], table.valid[:, 26:])
        np.testing.assert_array_equal(target[known], table.indices[:, 26:][known])
        # 310 days before 12 September 2021.
        assert (date(2021, 9, 12) - timedelta(days=310)).timetuple().tm_yday == day_of_year[0]

    def test_a_target_more_than_half_a_step_away_is_unknown(self) -> None:
        table = tabulate([pixel_set("m", date(2021, 1, 5), 30, 12, n=8)], YEAR, least=1)
        _, _, _, _, known = cut(table, np.full(8, 6), 32, 10, 10)
        near = known.any(axis=(0, 2))
        assert near[[2, 5, 8]].all()
        assert not near[[0, 1, 3, 4, 6, 7, 9]].any()

    def test_scores_equal_a_plain_computation(self) -> None:
        rng = np.random.default_rng(0)
        target = rng.normal(size=(30, 10, 3)).astype(np.float32)
        quantiles = (target[..., None] + rng.normal(size=(30, 10, 3, 1))) + np.array([-1, 0, 1.0])
        known = rng.random((30, 10, 3)) < 0.7
        got = forecast_scores(quantiles.astype(np.float32), target, known)
        miss = (quantiles[..., 1] - target)[..., 1][known[..., 1]]
        assert got["rmse"]["evi"] == pytest.approx(np.sqrt((miss**2).mean()), abs=1e-4)
        inside = np.abs(quantiles[..., 1] - target)[known] <= 1
        assert got["coverage"] == pytest.approx(inside.mean(), abs=1e-4)


def test_regions_are_drawn_alike_whatever_their_size() -> None:
    large = replace(pixel_set("a", date(2021, 1, 5), 10, 36, n=40), region="large")
    small = replace(pixel_set("a", date(2021, 1, 5), 10, 36, n=4), region="small")
    table = tabulate([large, small], YEAR, least=1)
    assert table.regions == ("large", "small")
    drawn = [
        np.bincount(table.region, sampling_weights(table, 0.0, share)) for share in (0.0, 0.5, 1.0)
    ]
    np.testing.assert_allclose(drawn[0], [40 / 44, 4 / 44])
    np.testing.assert_allclose(drawn[1], np.sqrt([40, 4]) / np.sqrt([40, 4]).sum())
    np.testing.assert_allclose(drawn[2], [0.5, 0.5])
    assert table.in_regions(["small", "nowhere"]).sum() == 4


def test_day_of_year_is_that_of_the_date() -> None:
    days = [date(2020, 12, 31), date(2021, 1, 1), date(2021, 3, 1)]
    got = ordinal_day_of_year(np.array([d.toordinal() for d in days]))
    assert got.tolist() == [366, 1, 60]


def test_shares_are_of_what_is_drawn(sets: list[PixelSet]) -> None:
    table = tabulate(sets, YEAR, least=1)
    table = table.take(np.flatnonzero(table.labels != 2))
    shares = log_shares(table, sampling_weights(table, 0.0), 4)
    np.testing.assert_allclose(np.exp(shares[:2]), [(table.labels == k).mean() for k in (0, 1)])
    # A class that is nowhere is not made infinitely likely.
    np.testing.assert_array_equal(shares[2:], 0)


class TestMixedPixels:
    def mixed(self, share: float) -> tuple[SeriesTable, np.ndarray, np.ndarray]:
        table = tabulate([pixel_set("a", date(2021, 1, 5), 10, 36, n=40)], YEAR, least=1)
        rng = np.random.default_rng(3)
        return table, *mix_pixels(table, table.values, table.valid, share, rng)

    def test_the_smaller_part_lies_between_both_pixels(self) -> None:
        table, values, valid = self.mixed(1.0)
        other = np.random.default_rng(3).permutation(len(table))
        changed = np.flatnonzero((values != table.values).any(axis=(1, 2)))
        changed = changed[other[changed] != changed]
        assert len(changed) > 3
        for i in changed:
            assert table.source[i] == table.source[other[i]]
            np.testing.assert_array_equal(table.days[i], table.days[other[i]])
            np.testing.assert_array_equal(valid[i], table.valid[i] & table.valid[other[i]])
            here, there = table.values[i][valid[i]], table.values[other[i]][valid[i]]
            area = ((values[i][valid[i]] - here) / (there - here)).ravel()
            np.testing.assert_allclose(area, area[0], atol=1e-3)
            assert 0 < area[0] <= 0.5

    def test_nothing_is_mixed_with_a_share_of_zero(self) -> None:
        table, values, valid = self.mixed(0.0)
        np.testing.assert_array_equal(values, table.values)
        np.testing.assert_array_equal(valid, table.valid)
