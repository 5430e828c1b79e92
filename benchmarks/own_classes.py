"""Own classes (`POST /heads`) on regions that no bundle was trained on, and the time it takes.

python -m benchmarks.own_classes [--data ../shared/data] [--region victoria] [--labels 10 30 100]
python -m benchmarks.own_classes --time [--side 1024]

Each draw takes a random half of the places; labels come from it, and pixels of the other half are
tested. The service learns and predicts through its HTTP API, as series. Forests and logistic
regression see the same bands at the same dates, gaps interpolated, and the same indices; their
settings are chosen by cross-validation over places. Prints the Markdown of docs/results.md; with
`--out` each draw is kept, so that a run that was stopped goes on. One thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.warp import transform
from sklearn.base import BaseEstimator
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.serving import served
from service.learn.graph import INDICES, indices_of
from service.learn.scores import calibration_error

_TESTED = 400
"""Pixels of other places that are predicted in each draw."""
_FEWEST_LABELS = 5
_CLEAR_SCL = (4, 5, 6, 7)
_BLOCK_DEGREES = 0.1
_NAME = "benchmark"


@dataclass(frozen=True, kw_only=True)
class Region:
    """Pixels with classes and places."""

    bands: tuple[str, ...]
    values: NDArray[np.float32]
    """(N, T, C) reflectance, NaN where missing."""
    dates: NDArray[np.str_]
    """ISO dates (N, T)."""
    classes: NDArray[np.str_]
    places: NDArray[np.str_]


def _same(dates: Sequence[date], count: int) -> NDArray[np.str_]:
    return np.broadcast_to(np.array([day.isoformat() for day in dates]), (count, len(dates)))


def _blocks(lonlat: NDArray[np.float64]) -> NDArray[np.str_]:
    cells = np.floor(lonlat / _BLOCK_DEGREES).astype(int)
    return np.array([f"{x}/{y}" for x, y in cells])


def _victoria(data: Path) -> Region:
    with np.load(data / "victoria_2018" / "victoria.npz") as archive:
        stored = archive["reflectance"].astype(np.float32) * np.float32(1e-4)
        days = [date(2018, 1, 1) + timedelta(days=5 * n) for n in range(stored.shape[1])]
        return Region(
            bands=tuple(archive["bands"].tolist()),
            values=np.where((stored > 0).any(-1, keepdims=True), stored, np.nan),
            dates=_same(days, len(stored)),
            classes=archive["class_name"][archive["label"]],
            places=archive["polygon"].astype(str),
        )


def _pune(data: Path) -> Region:
    with np.load(data / "pune_2019" / "pune_2019.npz") as archive:
        stored = archive["reflectance"].astype(np.float32) * np.float32(1e-4)
        clear = np.isin(archive["scl"], _CLEAR_SCL) & (stored > 0).any(-1)
        return Region(
            bands=tuple(archive["bands"].tolist()),
            values=np.where(clear[..., None], stored, np.nan),
            dates=np.broadcast_to(archive["dates"], clear.shape),
            classes=archive["label"],
            places=archive["polygon"].astype(str),
        )


def _brazil(data: Path) -> Region:
    """The largest source of the MODIS series; its bands by the nearest of Sentinel-2."""
    with np.load(data / "modis_brazil" / "modis_brazil_dev.npz") as archive:
        names, counts = np.unique(archive["source"], return_counts=True)
        own = archive["source"] == names[counts.argmax()]
        return Region(
            bands=("B02", "B04", "B08", "B12"),
            values=archive["values"][own][:, :, :4].astype(np.float32),
            dates=archive["dates"][own],
            classes=archive["label"][own],
            places=_blocks(archive["lonlat"][own]),
        )


def _us_crops(data: Path) -> Region:
    folder = data / "crops_us_2021"
    names = json.loads((folder / "labels.json").read_text())
    with np.load(folder / "crops_us_2021_dev.npz") as archive:
        stored = archive["reflectance"].astype(np.float32) * np.float32(1e-4)
        return Region(
            bands=tuple(archive["bands"].tolist()),
            values=np.where((stored != 0).any(-1, keepdims=True), stored, np.nan),
            dates=np.broadcast_to(archive["dates"], stored.shape[:2]),
            classes=np.array([names.get(str(n), str(n)) for n in archive["label"].tolist()]),
            places=_blocks(archive["lonlat"]),
        )


REGIONS: Mapping[str, Callable[[Path], Region]] = {
    "victoria": _victoria,
    "pune": _pune,
    "brazil": _brazil,
    "us-crops": _us_crops,
}


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Positions of the labels and of the tested pixels, in different places."""

    labels: NDArray[np.intp]
    tested: NDArray[np.intp]


def draw(region: Region, count: int, seed: int) -> Draw:
    """Labels of each class from one half of the places, and pixels of the other half."""
    random = np.random.default_rng(seed)
    places = np.unique(region.places)
    half = np.isin(region.places, random.permutation(places)[: len(places) // 2])
    labels = []
    for name in np.unique(region.classes):
        own = random.permutation(np.flatnonzero(half & (region.classes == name)))[:count]
        # A class that cannot fill its share is left out, unless it comes close to it.
        if len(own) >= max(_FEWEST_LABELS, count // 2):
            labels.append(own)
    chosen = np.concatenate(labels)
    there = ~half & np.isin(region.classes, region.classes[chosen])
    return Draw(labels=chosen, tested=random.permutation(np.flatnonzero(there))[:_TESTED])


def series_of(region: Region, n: int) -> dict[str, Any]:
    """One pixel as the API takes it."""
    values = region.values[n]
    return {
        "id": str(n),
        "dates": region.dates[n].tolist(),
        **{
            band: [None if np.isnan(v) else round(float(v), 4) for v in values[:, c]]
            for c, band in enumerate(region.bands)
        },
    }


def taught(api: httpx.Client, region: Region, drawn: Draw) -> dict[str, float]:
    """Scores of the service on the tested pixels, and the scores that its card estimates."""
    labelled = [
        {**series_of(region, n), "class": region.classes[n], "place": region.places[n]}
        for n in drawn.labels.tolist()
    ]
    began = time.perf_counter()
    response = api.post("/heads", json={"name": _NAME, "series": labelled})
    seconds = time.perf_counter() - began
    if response.status_code != httpx.codes.CREATED:
        raise RuntimeError(response.text)
    card = response.json()["card"]
    queried = [series_of(region, n) for n in drawn.tested.tolist()]
    found = api.post("/classify-pixels", json={"series": queried, "model": _NAME}).json()["results"]
    api.delete(f"/heads/{_NAME}").raise_for_status()
    names = [entry["name"] for entry in card["classes"]]
    # A pixel without a prediction counts as wrong.
    guesses = [one.get("class", "") for one in found]
    truth = region.classes[drawn.tested]
    sure = np.array(
        [[one["probabilities"][name] for name in names] for one in found if one["status"] == "ok"]
    )
    known = np.array([one["status"] == "ok" for one in found])
    return {
        "own classes": f1_score(truth, guesses, average="macro", labels=np.unique(truth)),
        "ece": calibration_error(sure, np.array([names.index(t) for t in truth[known]])),
        "card": card["metrics"]["macro_f1"],
        "seconds": seconds,
    }


def features(region: Region) -> NDArray[np.float64]:
    """Bands and indices at every date, gaps interpolated in time, (N, T * (C + K))."""
    days = region.dates.astype("datetime64[D]").astype(np.int64)
    values = region.values.astype(np.float64)
    filled = np.empty_like(values)
    for n in range(len(values)):
        there = ~np.isnan(values[n]).any(axis=1)
        for c in range(values.shape[2]):
            filled[n, :, c] = (
                np.interp(days[n], days[n][there], values[n][there, c]) if there.any() else 0.0
            )
    column = {band: filled[..., c] for c, band in enumerate(region.bands)}
    parts = [filled]
    for name in indices_of(region.bands):
        a, b = (column[band] for band in INDICES[name])
        parts.append(np.clip((a - b) / np.maximum(a + b, 0.05), -1, 1)[..., None])
    return np.concatenate(parts, axis=-1).reshape(len(values), -1)


def baselines(x: NDArray[np.float64], region: Region, drawn: Draw) -> dict[str, float]:
    """Macro-F1 of tuned scikit-learn models on the same labels and pixels."""
    forest = {"max_features": ["sqrt", 0.1], "min_samples_leaf": [1, 2]}
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=150))
    tuned: dict[str, tuple[BaseEstimator, dict[str, Any]]] = {
        "random forest": (RandomForestClassifier(150, random_state=0), forest),
        "logistic regression": (regression, {"logisticregression__C": [0.001, 0.01, 0.1]}),
    }
    classes, places = region.classes[drawn.labels], region.places[drawn.labels]
    folds = list(
        StratifiedGroupKFold(3, shuffle=True, random_state=0).split(
            x[drawn.labels], classes, places
        )
    )
    scores = {}
    for name, (model, grid) in tuned.items():
        search = GridSearchCV(model, grid, cv=folds, scoring="f1_macro", error_score=0.0)
        search.fit(x[drawn.labels], classes)
        scores[name] = f1_score(
            region.classes[drawn.tested],
            search.predict(x[drawn.tested]),
            average="macro",
            labels=np.unique(region.classes[drawn.tested]),
        )
    return scores


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every draw of every region, those in `--out` not again."""
    rows: list[dict[str, Any]] = []
    if options.out and options.out.exists():
        rows = json.loads(options.out.read_text())
    done = {(row["region"], row["labels"], row["seed"]) for row in rows}
    with served() as api:
        api.timeout = httpx.Timeout(600)
        for name in options.region:
            region = REGIONS[name](options.data)
            x = features(region)
            for count in options.labels:
                for seed in range(options.draws):
                    drawn = draw(region, count, seed)
                    short = len(drawn.labels) < count * len(np.unique(region.classes)) / 2
                    if short or (name, count, seed) in done:
                        continue
                    row = {
                        "region": name,
                        "labels": count,
                        "seed": seed,
                        "classes": len(np.unique(region.classes[drawn.labels])),
                        "tested": len(drawn.tested),
                        **taught(api, region, drawn),
                        **baselines(x, region, drawn),
                    }
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    if options.out:
                        options.out.write_text(json.dumps(rows))
    return rows


_METHODS = ("own classes", "random forest", "logistic regression")


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The means over draws as Markdown."""
    head = [
        "region",
        "labels a class",
        "classes",
        "draws",
        *_METHODS,
        "ECE",
        "the card's",
    ]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for region, count in dict.fromkeys((row["region"], row["labels"]) for row in rows):
        own = [row for row in rows if (row["region"], row["labels"]) == (region, count)]
        cells = [region, str(count), f"{np.mean([r['classes'] for r in own]):.3g}", str(len(own))]
        cells += [_mean([row[name] for row in own]) for name in _METHODS]
        cells += [f"{np.mean([r['ece'] for r in own]):.3f}", _mean([r["card"] for r in own])]
        print(f"| {' | '.join(cells)} |")


def _mean(values: Sequence[float]) -> str:
    """Mean and standard error."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{np.mean(values):.3f} ± {error:.3f}"


_SCENES = 4
"""Different images in the stack of `--time`, which are repeated: making one takes seconds."""


def stack(folder: Path, side: int, dates: int) -> list[tuple[str, Any]]:
    """A tiled stack of ten bands as int16 and 500 points of four classes, as a form's files."""
    random = np.random.default_rng(0)
    grid = Affine(10, 0, 500_000, 0, -10, 5_600_000)
    bands = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
    kind = np.kron(random.integers(0, 4, (side // 16, side // 16)), np.ones((16, 16), np.int64))
    grain = random.normal(0, 60, (len(bands), side, side)).astype(np.float32)
    scenes = []
    for n in range(_SCENES):
        level = random.uniform(300, 4000, (len(bands), 4)).astype(np.float32)
        path = folder / f"{n}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", width=side, height=side, count=len(bands), dtype="int16",
            crs="EPSG:32631", transform=grid, tiled=True, compress="deflate", zlevel=1, nodata=0,
        ) as file:  # fmt: skip
            file.write((level[:, kind] + np.roll(grain, 7 * n, axis=2)).clip(1).astype(np.int16))
            for number, band in enumerate(bands, start=1):
                file.set_band_description(number, band)
        scenes.append(path.read_bytes())
    days = [date(2021, 1, 1) + timedelta(days=10 * n) for n in range(dates)]
    files: list[tuple[str, Any]] = [
        ("files", (f"s2_{day}.tif", scenes[n % _SCENES], "image/tiff"))
        for n, day in enumerate(days)
    ]
    rows, cols = random.integers(0, side // 16 * 16, (2, 500))
    xs, ys = grid * (cols + 0.5, rows + 0.5)
    lons, lats = transform("EPSG:32631", "EPSG:4326", xs, ys)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [lon, lat]},
            "properties": {"class": f"class {kind[r, c]}"},
        }
        for lon, lat, r, c in zip(lons, lats, rows, cols, strict=True)
    ]
    labels = json.dumps({"type": "FeatureCollection", "features": features})
    return [("labels", ("labels.geojson", labels.encode(), "application/geo+json")), *files]


def show_time(side: int, dates: int = 36) -> None:
    """The time of one request with 500 points; CPU time does not depend on what else runs."""
    with TemporaryDirectory() as folder, served() as api:
        api.timeout = httpx.Timeout(600)
        sent = stack(Path(folder), side, dates)
        size = sum(len(content) for _, (_, content, _) in sent)
        began, busy = time.perf_counter(), time.process_time()
        response = api.post("/heads", files=sent, data={"name": _NAME})
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        if response.status_code != httpx.codes.CREATED:
            raise RuntimeError(response.text)
        metrics = response.json()["card"]["metrics"]
        print(
            f"500 points, {side} x {side} pixels, {dates} dates, 10 bands ({size / 2**20:.0f} MB "
            f"sent): {seconds:.1f} s, {busy:.1f} s of CPU time with the client's; "
            f"{response.headers['Server-Timing']}; macro-F1 {metrics['macro_f1']}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--region", nargs="+", choices=REGIONS, default=list(REGIONS))
    parser.add_argument("--labels", nargs="+", type=int, default=[10, 30, 100])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file of the draws, also of earlier runs")
    parser.add_argument("--time", action="store_true", help="measure the time alone")
    parser.add_argument("--side", type=int, default=1024, help="of the stack of `--time`, pixels")
    options = parser.parse_args()
    if options.time:
        show_time(options.side)
    else:
        show(compare(options))


if __name__ == "__main__":
    main()
