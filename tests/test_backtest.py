"""Backtests: the fit against slow references, known results, and every kind of request."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio
import rasterio.warp

from benchmarks.backtests import Scored, forecasts, stacks
from benchmarks.serving import served
from benchmarks.tiny_zoo import HORIZON, SPREAD, STEP, write_zoo
from benchmarks.unseen_forecasts import table, unseen
from models.registry import Registry
from service.infer.engine import Engine
from service.jobs.serialise import request_document, request_of
from service.learn.backtest import (
    FACTORS,
    Hindcasts,
    backtest,
    bounded_least_squares,
    weighted_quantile,
)
from service.read.geotiff import SourceFile
from service.run.backtest import sample_pixels
from service.run.request import RasterRequest
from tests.kits.jobs import waited
from tests.kits.marks import in_all_tests
from tests.kits.rasters import NORTH_UP, UTM, write

H, W = 6, 8  # of which the sample takes every pixel
DATES = [date(2020, 1, 1) + timedelta(days=10 * t) for t in range(44)]
BANDS = ("B02", "B04", "B08")
INDICES = ("NDVI", "EVI", "SAVI")


# The fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_shares_are_the_best_of_a_dense_grid(count: int) -> None:
    grid = np.linspace(0, 1, 201)
    points = np.array([p for p in itertools.product(grid, repeat=count) if sum(p) <= 1 + 1e-9])
    for seed in range(30):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(40, count)) @ rng.normal(size=(count, count))
        y = x @ rng.uniform(-0.5, 1.2, count) + rng.normal(size=40)
        gram, cross = x.T @ x, x.T @ y
        best = bounded_least_squares(gram, cross)
        assert (best >= 0).all()
        assert best.sum() <= 1 + 1e-9

        def loss(t: np.ndarray, g: np.ndarray = gram, c: np.ndarray = cross) -> np.ndarray:
            return np.einsum("...i,ij,...j", t, g, t) - 2 * t @ c

        assert loss(best) <= loss(points).min() + 1e-9


def test_weighted_quantile_is_that_of_repeated_values() -> None:
    rng = np.random.default_rng(0)
    values, times = rng.normal(size=50), rng.integers(1, 6, 50)
    repeated = np.repeat(values, times)
    for level in (0.1, 0.5, 0.8, 0.93, 1.0):
        expected = np.quantile(repeated, level, method="inverted_cdf")
        assert weighted_quantile(values, times.astype(float), level) == expected


def hindcasts(
    *, days: int, noise: float, kind: str = "model", seed: int = 0, pixels: int = 20
) -> Hindcasts:
    """Hindcasts of every tenth day, whose interval is right for noise of 0.1.

    The observed values are near the model's median, persistence or last year's date, by `kind`.
    """
    rng = np.random.default_rng(seed)
    ages = np.repeat(np.arange(10, days + 1, 10), pixels)
    shape = (len(ages), 10, 3)
    guesses = {
        "model": rng.normal(0.5, 0.2, shape),
        "persistence": np.broadcast_to(rng.normal(0.5, 0.2, (len(ages), 1, 3)), shape),
        "last_year": rng.normal(0.5, 0.2, shape),
    }
    half = 0.1 * 1.2815516
    return Hindcasts(
        quantiles=guesses["model"][..., None] + np.array([-half, 0.0, half]),
        target=guesses[kind] + rng.normal(0, noise, shape),
        persistence=guesses["persistence"][:, 0],
        last_year=guesses["last_year"],
        age=ages,
        month=np.full(len(ages), 5),
        weight=np.full(len(ages), 1 / 3 / pixels),
    )


@pytest.mark.parametrize("noise", [0.1, *in_all_tests(0.07, 0.3)])
def test_the_factor_makes_the_band_right(noise: float) -> None:
    found = backtest(hindcasts(days=3000, noise=noise))
    assert found.correction.factor == pytest.approx(noise / 0.1, rel=0.1)
    fresh = hindcasts(days=3000, noise=noise, seed=1)
    quantiles = found.correction.apply(fresh.quantiles, fresh.persistence, fresh.last_year)
    inside = (fresh.target >= quantiles[..., 0]) & (fresh.target <= quantiles[..., 2])
    assert 0.77 < inside.mean() < 0.84
    assert found.overall.coverage == pytest.approx(inside.mean(), abs=0.03)


@pytest.mark.slow
def test_a_short_history_changes_the_band_less_and_never_beyond_its_bounds() -> None:
    factors = [backtest(hindcasts(days=d, noise=0.3)).correction.factor for d in (20, 200, 1500)]
    assert (factors[0] < factors[1]).all()
    assert (factors[0] > 1).all()
    assert (factors[1] < factors[2] * 1.05).all()
    assert (backtest(hindcasts(days=1500, noise=30)).correction.factor <= FACTORS[1]).all()
    assert (backtest(hindcasts(days=1500, noise=1e-6)).correction.factor >= FACTORS[0]).all()


def test_shares_go_to_the_forecast_that_was_right() -> None:
    correction = backtest(hindcasts(days=2000, noise=0.01, kind="last_year")).correction
    assert (correction.shares[:, 1] > 0.9).all()
    correction = backtest(hindcasts(days=2000, noise=0.01, kind="persistence")).correction
    assert (correction.shares[:, 0] > 0.9).all()
    assert (correction.share_alone > 0.9).all()
    correction = backtest(hindcasts(days=2000, noise=0.01)).correction
    assert (correction.shares < 0.1).all()


def test_the_other_season_counts_little() -> None:
    spring, autumn = hindcasts(days=360, noise=0.1), hindcasts(days=360, noise=0.4, seed=1)
    own = np.minimum(spring.age, 365 - spring.age) < 60
    mixed = Hindcasts(
        **{
            name: np.where(own.reshape(-1, *[1] * (a.ndim - 1)), a, getattr(autumn, name))
            for name, a in vars(spring).items()
        }
    )
    swapped = Hindcasts(
        **{
            name: np.where(own.reshape(-1, *[1] * (a.ndim - 1)), getattr(autumn, name), a)
            for name, a in vars(spring).items()
        }
    )
    assert (backtest(mixed).correction.factor < backtest(swapped).correction.factor / 1.5).all()


def test_only_the_own_season_narrows_the_interval() -> None:
    def factor(noise: float, *, own: bool) -> float:
        found = hindcasts(days=360, noise=noise)
        days_off = np.minimum(found.age, 365 - found.age)
        kept = days_off < 60 if own else days_off > 120
        chosen = Hindcasts(**{name: array[kept] for name, array in vars(found).items()})
        return float(backtest(chosen).correction.factor.mean())

    assert factor(0.03, own=True) < 0.7
    assert factor(0.03, own=False) > 0.98
    # Errors larger than the interval widen it, whatever their season.
    assert factor(0.3, own=False) > 1.5


def test_errors_are_judged_by_shares_fitted_without_them() -> None:
    # Pure noise: shares fitted on all of it would look better than persistence and the model.
    found = hindcasts(days=90, noise=0.2, pixels=2)
    assert backtest(found).overall.rmse["forecast"] >= backtest(found).overall.rmse["model"] * 0.99


def test_the_sample_lies_on_the_raster_and_at_few_places() -> None:
    for height, width in ((1, 1), (6, 8), (3, 400), (64, 64), (5000, 7000)):
        rows, columns = sample_pixels(height, width)
        assert 1 <= len(rows) <= 48
        assert rows.min() >= 0
        assert rows.max() < height
        assert columns.min() >= 0
        assert columns.max() < width
        assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == len(rows)
    blocks = set(zip(*(p // 512 for p in sample_pixels(5000, 7000)), strict=True))
    assert len(blocks) <= 24


# Requests -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    files: list[SourceFile]
    values: np.ndarray
    """Reflectance (T, 3, H, W), NaN where missing."""

    @property
    def indices(self) -> np.ndarray:
        """(N, T, 3), by the formulas as printed."""
        blue, red, nir = self.values.transpose(1, 2, 3, 0).reshape(3, H * W, -1)
        return np.stack(
            [
                (nir - red) / (nir + red),
                2.5 * (nir - red) / (nir + 6 * red - 7.5 * blue + 1),
                1.5 * (nir - red) / (nir + red + 0.5),
            ],
            axis=-1,
        )

    def model(self, upto: int) -> np.ndarray:
        """The tiny zoo's medians (N, H, S) from the dates up to a position."""
        pixels = self.values.transpose(2, 3, 0, 1).reshape(H * W, -1, 3)
        seen = pixels[:, max(0, upto - 35) : upto + 1]
        mean = np.nanmean(seen, axis=1)
        return mean[:, None] + STEP * np.arange(1, HORIZON + 1)[:, None]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("stack")
    rng = np.random.default_rng(5)
    season = 1 + np.sin(np.arange(len(DATES)) * 10 / 365 * 2 * np.pi)
    level = rng.uniform(300, 900, (1, 3, H, W)) * np.array([1, 1.5, 2])[None, :, None, None]
    level = level + season[:, None, None, None] * np.array([0, -100, 900])[None, :, None, None]
    stored = (level * rng.uniform(0.9, 1.1, (len(DATES), 3, H, W))).astype(np.uint16)
    stored.transpose(0, 2, 3, 1)[rng.random((len(DATES), H, W)) < 0.2] = 0
    files = [
        write(folder / f"s_{day}.tif", bands, descriptions=BANDS, nodata=0)
        for day, bands in zip(DATES, stored, strict=True)
    ]
    values = np.where((stored == 0).any(axis=1, keepdims=True), np.nan, stored * 1e-4)
    return Scene(files=files, values=values)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("server")
    with served(model_dir=write_zoo(folder / "zoo"), state_dir=folder / "state") as client:
        yield client


def posted(
    api: httpx.Client,
    scene: Scene,
    *,
    dates: slice = slice(None),
    headers: dict[str, str] | None = None,
    **data: Any,
) -> httpx.Response:
    files = [("files", (s.name, s.path.read_bytes())) for s in scene.files[dates]]
    data.setdefault("outputs", "q10,q50,q90")
    return api.post("/forecast", files=files, data=data, headers=headers or {})


def summary(api: httpx.Client, scene: Scene, **how: Any) -> dict[str, Any]:
    response = posted(api, scene, headers={"Accept": "application/json"}, **how)
    assert response.status_code == 200, response.text
    return dict(response.json())


def nearest(scene: Scene, pixel: int, day: int, within: float, lo: int, hi: int) -> Any:
    """Indices of a pixel at the clear date nearest to a day, by looking at each."""
    best, found = within + 1e-9, None
    for t in range(lo, hi):
        gap = abs(10 * t - day)
        if gap < best and np.isfinite(scene.indices[pixel, t]).all():
            best, found = gap, scene.indices[pixel, t]
    return found


def origins() -> list[int]:
    every = list(range(1, len(DATES) - 1))  # with two dates behind, and a step before the last
    return [every[i] for i in np.linspace(0, len(every) - 1, 24).round().astype(int)]


def test_errors_by_month_are_those_of_a_slow_reference(api: httpx.Client, scene: Scene) -> None:
    record = summary(api, scene)["backtest"]
    errors: dict[int, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    inside: dict[int, list[np.ndarray]] = defaultdict(list)
    used = origins()
    for t in used:
        model = scene.model(t)
        for pixel in range(H * W):
            first = max(0, t - 35)
            clear = [u for u in range(first, t + 1) if np.isfinite(scene.values[u, 0].flat[pixel])]
            if len(clear) < 2:
                continue
            for h in range(HORIZON):
                came = nearest(scene, pixel, 10 * (t + h + 1), 5, t + 1, len(DATES))
                if came is None:
                    continue
                of = errors[DATES[t].month]
                of["model"].append(model[pixel, h] - came)
                of["persistence"].append(scene.indices[pixel, clear[-1]] - came)
                year = nearest(scene, pixel, 10 * (t + h + 1) - 365, 10, 0, t + 1)
                if year is not None:
                    of["last_year"].append(year - came)
                inside[DATES[t].month].append(np.abs(model[pixel, h] - came) <= SPREAD)
    assert [m["month"] for m in record["months"]] == sorted(errors)
    for month in record["months"]:
        of = errors[month["month"]]
        assert month["pixel_dates"] == len(of["model"])
        for name, differences in of.items():
            expected = np.sqrt(np.square(differences).mean(axis=0)).mean()
            assert month["rmse"][name] == pytest.approx(expected, abs=2e-4), name
        share = np.mean(inside[month["month"]])
        assert month["coverage_of_model"] == pytest.approx(share, abs=2e-3)
    assert record["pixels"] == H * W
    assert (record["first"], record["last"]) == (str(DATES[used[0]]), str(DATES[used[-1]]))
    assert record["calibrated"] is True
    assert record["level"] == 0.8
    years = record["where_last_year"]
    assert 0 < years["pixel_dates"] < record["pixel_dates"]
    assert set(years["rmse"]) == {"forecast", "model", "persistence", "last_year"}


def corrected(scene: Scene, record: dict[str, Any]) -> np.ndarray:
    """The corrected quantiles (N, H, S, 3) that a record's shares and factors give."""
    last = len(DATES) - 1
    model = scene.model(last)
    out = np.full((H * W, HORIZON, 3, 3), np.nan)
    for pixel in range(H * W):
        latest = nearest(scene, pixel, 10 * last, 355, 0, last + 1)
        for h, step in enumerate(record["steps"]):
            year = nearest(scene, pixel, 10 * (last + h + 1) - 365, 10, 0, last + 1)
            own = model[pixel, h]
            if year is None:
                median = own + step["share_of_persistence_alone"] * (latest - own)
            else:
                median = own + step["share_of_persistence"] * (latest - own)
                median = median + step["share_of_last_year"] * (year - own)
            interval = np.array([-1, 0, 1]) * SPREAD * step["factor"]
            out[pixel, h] = median[:, None] + interval
    return out


def test_every_pixel_is_corrected_by_the_record(api: httpx.Client, scene: Scene) -> None:
    response = posted(api, scene)
    assert response.status_code == 200, response.text
    with rasterio.MemoryFile(response.content) as file, file.open() as raster:
        found = raster.read().reshape(3, HORIZON, 3, H * W).transpose(3, 1, 0, 2)
    record = summary(api, scene)["backtest"]
    assert any(abs(step["factor"] - 1) > 0.02 for step in record["steps"])
    assert found == pytest.approx(corrected(scene, record), abs=1e-3)
    plain = posted(api, scene, backtest="false")
    with rasterio.MemoryFile(plain.content) as file, file.open() as raster:
        same = raster.read().reshape(3, HORIZON, 3, H * W).transpose(3, 1, 0, 2)
    interval = np.array([-1, 0, 1]) * SPREAD
    assert same == pytest.approx(scene.model(len(DATES) - 1)[..., None] + interval, abs=1e-4)
    assert "backtest" not in summary(api, scene, backtest="false")


@pytest.mark.slow
def test_points_fields_and_series_test_themselves(api: httpx.Client, scene: Scene) -> None:
    rows, columns = np.divmod(np.arange(H * W), W)
    xs, ys = zip(*(NORTH_UP * (c + 0.5, r + 0.5) for r, c in zip(rows, columns, strict=True)),
                 strict=True)  # fmt: skip
    places = zip(*rasterio.warp.transform(UTM, "EPSG:4326", xs, ys), strict=True)
    points = {
        "type": "FeatureCollection",
        "features": [
            {"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": xy}}
            for xy in places
        ],
    }
    plain = posted(api, scene, points=json.dumps(points)).json()
    assert "backtest" not in plain
    tested = posted(api, scene, points=json.dumps(points), backtest="true").json()
    whole = summary(api, scene)["backtest"]
    assert tested["backtest"] == whole  # the same 48 pixels
    expected = corrected(scene, whole)
    for pixel, feature in enumerate(tested["features"]):
        of = feature["properties"]
        found = np.array([[of[i][q] for q in ("q10", "q50", "q90")] for i in INDICES])
        assert found.transpose(2, 0, 1) == pytest.approx(expected[pixel], abs=1e-3)
    by_pixel = scene.values.transpose(2, 3, 1, 0).reshape(H * W, 3, -1)
    series = [
        {
            "id": str(n),
            "dates": [str(day) for day in DATES],
            **{
                band: [None if np.isnan(v) else v for v in by_pixel[n, c]]
                for c, band in enumerate(BANDS)
            },
        }
        for n in range(H * W)
    ]  # fmt: skip
    by_series = api.post("/forecast", json={"series": series, "backtest": True}).json()
    assert by_series["backtest"] == whole
    again = api.post("/forecast", json={"series": series}).json()
    assert "backtest" not in again
    (west, south), (east, north) = (NORTH_UP * (0, H), NORTH_UP * (W, 0))
    ring = [(west, south), (east, south), (east, north), (west, north), (west, south)]
    fields = {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "properties": {},
                "geometry": rasterio.warp.transform_geom(
                    UTM, "EPSG:4326", {"type": "Polygon", "coordinates": [ring]}, precision=-1
                ),
            }
        ],
    }
    one = posted(api, scene, fields=json.dumps(fields)).json()
    assert one["backtest"]["pixels"] == 1
    assert one["features"][0]["properties"]["status"] == "ok"


@pytest.mark.slow
def test_a_short_history_is_told_only_if_asked(api: httpx.Client, scene: Scene) -> None:
    short = slice(-4, None)
    found = summary(api, scene, dates=short)
    assert "backtest" not in found
    assert not {"no_backtest"} & {w["code"] for w in found["warnings"]}
    found = summary(api, scene, dates=short, backtest="true")
    assert "backtest" not in found
    assert "no_backtest" in {w["code"] for w in found["warnings"]}
    # Dates enough, but clouds: no earlier forecast has a target.
    cloudy = [
        {
            "id": "one",
            "dates": [str(day) for day in DATES[:20]],
            **{band: [None] * 18 + [0.05 * n] * 2 for n, band in enumerate(BANDS, start=1)},
        }
    ]
    response = api.post("/forecast", json={"series": cloudy, "backtest": True}).json()
    assert response["results"][0]["status"] == "ok"
    assert "no_backtest" in {w["code"] for w in response["warnings"]}
    assert "backtest" not in response
    # Six months are not enough by themselves, and enough if requested.
    middle = slice(-8, None)
    assert "backtest" not in summary(api, scene, dates=middle)
    assert "backtest" in summary(api, scene, dates=middle, backtest="true")


def test_a_forecast_that_loses_says_so(api: httpx.Client, scene: Scene) -> None:
    # The tiny model forecasts reflectance, not indices: worse than the last value.
    found = summary(api, scene, dates=slice(-8, None), backtest="true")
    record, codes = found["backtest"], {w["code"] for w in found["warnings"]}
    assert record["rmse"]["forecast"] > 1.02 * record["rmse"]["persistence"]
    assert "forecast_worse" in codes


def test_other_tasks_have_no_backtest(api: httpx.Client, scene: Scene) -> None:
    files = [("files", (s.name, s.path.read_bytes())) for s in scene.files[:4]]
    response = api.post("/classify-pixels", files=files, data={"backtest": "true"})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


@pytest.mark.slow
def test_a_job_has_the_same_backtest(api: httpx.Client, scene: Scene) -> None:
    response = posted(api, scene, headers={"Prefer": "respond-async"})
    assert response.status_code == 202, response.text
    job = response.json()["jobID"]
    assert waited(api, job)["status"] == "successful"
    found = api.get(f"/jobs/{job}/result", headers={"Accept": "application/json"}).json()
    assert found["backtest"] == summary(api, scene)["backtest"]
    assert api.get(f"/jobs/{job}/result").content == posted(api, scene).content


def test_a_stored_request_of_an_earlier_release_stays_as_it_was(tmp_path: Path) -> None:
    given = RasterRequest(task="forecast", files=(), backtest=None)
    document = request_document(given, tmp_path)
    assert request_of(document, tmp_path).backtest is None
    del document["fields"]["backtest"]
    assert request_of(document, tmp_path).backtest is False


# Real stacks --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_band_covers_on_a_real_stack(shared_data: Path) -> None:
    folder = Path(__file__).parents[1] / "models" / "zoo"
    with Engine(Registry.load(folder), providers="cpu") as engine:
        pixels = dict(stacks(shared_data, None))["Flanders"]
        scored = [one for one in forecasts(engine, pixels) if 4 <= one.month <= 9]
    target = np.concatenate([one.target for one in scored])
    known = np.isfinite(target).all(axis=-1)

    def coverage(quantiles: np.ndarray) -> float:
        known_here = known & np.isfinite(quantiles).all(axis=(-1, -2))
        inside = (target >= quantiles[..., 0]) & (target <= quantiles[..., 2])
        return float(inside[known_here].mean())

    without = coverage(np.concatenate([one.before for one in scored]))
    with_backtest = coverage(np.concatenate([one.after for one in scored]))
    assert 0.75 <= without <= 0.85, "the bundle's own interval, calibrated on other regions"
    assert 0.75 <= with_backtest <= 0.85


def test_unseen_sources_are_those_that_no_card_names(shared_data: Path) -> None:
    names = [name for name, _ in unseen(shared_data, None, ["herault_safe_2018"])]
    assert names == ["pune", "bavaria"]
    for name, groups in unseen(shared_data, None, []):
        for pixels in groups:
            assert list(pixels.dates) == sorted(set(pixels.dates)), name
            assert pixels.values.shape[1:] == (len(pixels.dates), len(BANDS)), name
            blue, _, near_infrared = np.nanmedian(pixels.values, axis=(0, 1))
            assert 0.01 < blue < near_infrared < 0.6, name


def test_the_table_compares_bundles_on_the_targets_of_both() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=(50, 4, 3))

    def scored(error: float, half: float) -> list[Scored]:
        median = target + error
        quantiles = np.stack([median - half, median, median + half], axis=-1)
        quantiles[: int(half * 10)] = np.nan  # each lacks other forecasts
        still = target + 0.3
        return [Scored(month=5, target=target, before=quantiles, after=quantiles,
                       persistence=still, last_year=still, seconds=(0.0, 0.0))]  # fmt: skip

    found = {"a place": [scored(0.1, 0.2), scored(0.3, 0.1)]}
    lines = list(table(found, ["1.0.0", "2.0.0"]))
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    # 48 series of four steps; the first bundle is within its band, the second misses by 0.2.
    assert cells[:3] == ["a place, all months", "192", "0.100"]
    assert cells[3:7] == ["0.300", "0.300", "1.000", "0.000"]
    assert cells[7:9] == ["0.400", "2.200"]
    assert [line.split(" |")[0] for line in lines[3:]] == [
        "| a place, April to September", "| a place, month 5"
    ]  # fmt: skip
