"""Series requests: predictions computed by hand, and every kind of invalid series."""

from __future__ import annotations

import threading
from datetime import date, timedelta

import numpy as np
import pytest

from benchmarks.tiny_zoo import CLASSES, SHARPNESS, STEP, write_zoo
from models.registry import Registry
from service.errors import (
    Cancelled,
    ImplausibleReflectance,
    InvalidRequest,
    MissingBands,
    MissingDates,
    TooFewDates,
)
from service.infer.engine import Engine
from service.run.series import SeriesInput, SeriesOutcome, plan_series, run_series

JANUARY = date(2021, 1, 1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    registry = Registry.load(write_zoo(tmp_path_factory.mktemp("zoo")))
    with Engine(registry, providers="cpu", threads=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def classifier(engine):
    return engine.models["pixels-landcover"]


def outcome_of(model, given, **options) -> SeriesOutcome:
    """Both steps at once."""
    return run_series(plan_series(model, given, **options))


def series(name="a", count=6, first=JANUARY, step=20, seed=0, **bands):
    random = np.random.default_rng(seed)
    made = {band: random.uniform(0, 0.5, count).tolist() for band in ("B02", "B04", "B08")}
    dates = [first + timedelta(days=step * n) for n in range(count)]
    return SeriesInput(id=name, dates=dates, bands={**made, **bands})


def mean(one, keep=None):
    table = np.array([one.bands[b] for b in ("B02", "B04", "B08")], float)
    return np.nanmean(table if keep is None else table[:, keep], axis=1)


def softmax(x):
    powers = np.exp(SHARPNESS * (x - x.max()))
    return powers / powers.sum()


def test_a_class_equals_the_computation_by_hand(classifier):
    one = series("field-7")
    (result,) = outcome_of(classifier, [one]).results
    expected = softmax(mean(one))
    assert result["id"] == "field-7"
    assert result["status"] == "ok"
    assert result["start"] == "2021-01-01"
    assert result["class"] == CLASSES[expected.argmax()]
    assert result["value"] == expected.argmax()
    assert result["confidence"] == pytest.approx(expected.max(), rel=1e-4)
    assert list(result["probabilities"].values()) == pytest.approx(expected, rel=1e-4)


def test_a_forecast_continues_the_last_date(engine):
    one = series(count=5, step=10)
    (result,) = outcome_of(engine.models["forecast-vi"], [one], horizon=2).results
    assert result["dates"] == ["2021-02-20", "2021-03-02"]
    expected = mean(one)
    for k, index in enumerate(("NDVI", "EVI", "SAVI")):
        assert result[index]["q50"] == pytest.approx(expected[k] + STEP * np.arange(1, 3))
        assert set(result[index]) == {"q10", "q50", "q90"}


def test_an_embedding(engine):
    one = series()
    (result,) = outcome_of(engine.models["embed-pixel"], [one]).results
    assert result["embedding"] == pytest.approx(mean(one), rel=1e-5)


def test_series_do_not_affect_each_other_whatever_their_dates(classifier):
    many = [
        series(str(n), count=4 + n, first=date(2015 + n, 1 + n, 3), step=7 + n, seed=n)
        for n in range(6)
    ]
    together = outcome_of(classifier, many).results
    alone = [outcome_of(classifier, [one]).results[0] for one in many]
    assert [r["id"] for r in together] == [one.id for one in many]
    assert len({r["start"] for r in together}) == 6
    for a, b in zip(together, alone, strict=True):
        assert list(a["probabilities"].values()) == pytest.approx(
            list(b["probabilities"].values()), rel=1e-5
        )


def test_each_date_takes_its_own_place_on_the_shared_axis(engine):
    # Days 0, 20, 40 and days 0, 30, 60 of different years share an axis of five days.
    first = series("a", count=3, step=20, first=date(2020, 1, 1))
    second = series("b", count=3, step=30, first=date(2019, 1, 1), seed=1)
    found = outcome_of(engine.models["embed-pixel"], [first, second]).results
    assert found[0]["embedding"] == pytest.approx(mean(first), rel=1e-5)
    assert found[1]["embedding"] == pytest.approx(mean(second), rel=1e-5)


def test_the_order_of_dates_does_not_matter(classifier):
    one = series()
    turned = SeriesInput(
        id="a", dates=one.dates[::-1], bands={b: v[::-1] for b, v in one.bands.items()}
    )
    assert outcome_of(classifier, [turned]).results == outcome_of(classifier, [one]).results


def test_a_date_with_a_missing_value_is_missing(engine):
    one = series(B04=[0.1, None, 0.3, float("nan"), 0.2, 0.4])
    (result,) = outcome_of(engine.models["embed-pixel"], [one]).results
    expected = mean(series(B04=[0.1, 0, 0.3, 0, 0.2, 0.4]), keep=[0, 2, 4, 5])
    assert result["embedding"] == pytest.approx(expected, rel=1e-5)


def test_of_a_doubled_date_the_first_clear_observation_counts(engine):
    plain = series(count=3)
    doubled = SeriesInput(
        id="a",
        dates=[plain.dates[0], *plain.dates, plain.dates[2]],
        bands={b: [None, *v, 0.9] for b, v in plain.bands.items()},
    )
    outcome = outcome_of(engine.models["embed-pixel"], [doubled])
    assert outcome.results[0]["embedding"] == pytest.approx(mean(plain), rel=1e-5)
    warning, partial = outcome.warnings
    assert (warning.code, partial.code) == ("merged_dates", "partial_season")
    assert "'a': 5 observations on 3 dates" in warning.detail


def test_dates_outside_the_window_are_unused_and_give_a_warning(engine):
    one = series(count=24, step=30)  # two years
    outcome = outcome_of(engine.models["embed-pixel"], [one], start=date(2021, 1, 1))
    inside = [n for n, day in enumerate(one.dates) if day < date(2021, 12, 27)]
    assert outcome.results[0]["embedding"] == pytest.approx(mean(one, keep=inside), rel=1e-5)
    (warning,) = outcome.warnings
    assert warning.code == "dates_outside_window"
    assert f"{24 - len(inside)} of 24 dates" in warning.detail
    assert "2021-01-01 to 2021-12-26" in warning.detail


def test_too_few_observations_are_no_data(classifier):
    one = series(count=3, B02=[0.1, None, None])
    (result,) = outcome_of(classifier, [one]).results
    assert result == {"id": "a", "status": "no_data", "start": "2021-01-01"}


def test_too_few_dates_are_no_data_among_others_and_an_error_alone(classifier):
    short, long = series("short", count=1), series("long")
    results = outcome_of(classifier, [short, long]).results
    assert [r["status"] for r in results] == ["no_data", "ok"]
    with pytest.raises(
        TooFewDates, match=r"series 'short' has 1 of its 1 dates.*2021-12-26.*at least 2"
    ):
        outcome_of(classifier, [short, short])


@pytest.mark.parametrize(
    ("one", "error", "says"),
    [
        (series("x", B04=[0.1] * 5), InvalidRequest, "'x' has 6 dates but 5 values of B04"),
        (
            SeriesInput(id="x", dates=[JANUARY], bands={"B02": [0.1], "B08": [0.1]}),
            MissingBands,
            "series 'x' lacks B04.*bands of the series: B02, B08",
        ),
        (
            SeriesInput(id="x", dates=[], bands={b: [] for b in ("B02", "B04", "B08")}),
            MissingDates,
            "series 'x' has no dates",
        ),
        (
            series("x", B02=[500.0] * 6, B04=[600.0] * 6),
            ImplausibleReflectance,
            r"series 'x' has a median of \d+.*-0.2 to 1.6",
        ),
        (series("x", B02=[1e300] * 6, B08=[None] * 6), None, "no_data"),
    ],
)
def test_an_invalid_series_is_named_in_the_error(classifier, one, error, says):
    if error is None:
        (result,) = outcome_of(classifier, [one]).results
        assert result["status"] == says
        return
    with pytest.raises(error, match=says):
        outcome_of(classifier, [series("good"), one])


def test_no_series_is_an_error(classifier):
    with pytest.raises(InvalidRequest, match="series"):
        outcome_of(classifier, [])


def test_an_invalid_horizon_is_an_error_before_the_run(engine):
    with pytest.raises(InvalidRequest, match="horizon: 9 is not a number of steps"):
        outcome_of(engine.models["forecast-vi"], [series()], horizon=9)


def test_series_stop_when_the_run_is_cancelled(classifier, monkeypatch):
    cancelled, runs = threading.Event(), []
    predict = type(classifier).pixels

    def counted(self, *given, **more):
        runs.append(len(given[0]))
        cancelled.set()
        return predict(self, *given, **more)

    monkeypatch.setattr(type(classifier), "pixels", counted)
    monkeypatch.setattr("service.run.series.SERIES_BATCH_BYTES", 1)  # a batch for each series
    run = plan_series(classifier, [series(str(n)) for n in range(5)])
    with pytest.raises(Cancelled):
        run_series(run, cancelled=cancelled)
    assert runs == [1]
