"""Own classes (`POST /heads`) on regions that no bundle was trained on, and the time it takes.

python -m benchmarks.own_classes [--data ../shared/data] [--region victoria] [--labels 10 30 100]
python -m benchmarks.own_classes --time [--side 1024]

Each draw takes a random half of the places; labels come from it, and pixels of the other half are
tested. The service learns and predicts through its HTTP API, as series. Forests, logistic
regression and TempCNN see the same bands at the same dates, gaps interpolated, and the same
indices; the untrained encoder sees its three bands. The settings of all but TempCNN are chosen by
cross-validation over places. Prints the Markdown of docs/results.md; with `--out` each score is
kept, so that a stopped run resumes. Uses one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import pyogrio
import rasterio
import shapely
import torch
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import rasterize
from rasterio.warp import transform, transform_geom
from sklearn.base import BaseEstimator
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.serving import served
from models.encoders import PixelEncoder
from models.graph import PixelGraph
from service.learn.graph import INDICES, STEP_DAYS, STEPS, indices_of
from service.learn.scores import calibration_error
from training import config
from training.baselines import TempCNN

_TESTED = 400
"""Pixels of other places that are predicted in each draw."""
_FEWEST_LABELS = 5
_FEWEST_CLASSES = 4
_CLEAR_SCL = (4, 5, 6, 7)
_BLOCK_DEGREES = 0.1
_NAME = "benchmark"


@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """Pixels with classes and places."""

    bands: tuple[str, ...]
    values: NDArray[np.float32]
    """(N, T, C) reflectance, NaN where missing."""
    dates: NDArray[np.str_]
    """ISO dates (N, T)."""
    classes: NDArray[np.str_]
    places: NDArray[np.str_]
    lonlat: NDArray[np.float64] | None = None
    """Degrees (N, 2), or one position of the whole region (2); None where not known."""


def _same(dates: Sequence[date], count: int) -> NDArray[np.str_]:
    return np.broadcast_to(np.array([day.isoformat() for day in dates]), (count, len(dates)))


def _blocks(lonlat: NDArray[np.float64]) -> NDArray[np.str_]:
    cells = np.floor(lonlat / _BLOCK_DEGREES).astype(int)
    return np.array([f"{x}/{y}" for x, y in cells])


_VICTORIA = np.array([143.0, -36.5])
"""A position in the cropland of Victoria: the data set holds none."""


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
            lonlat=_VICTORIA,
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
            lonlat=archive["lonlat"],
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
            lonlat=archive["lonlat"][own],
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
            lonlat=archive["lonlat"],
        )


def _herault(data: Path) -> Region:
    """Pixels inside the parcels, the 20 m bands repeated; each parcel is a place."""
    folder = data / "herault_safe_2018"
    products = sorted(folder.rglob("IMG_DATA"), key=lambda path: _day_of(path).toordinal())
    grid, crs, images, clear = None, None, [], []
    for product in products:
        layers = []
        for band in _HERAULT_BANDS:
            (path,) = product.rglob(f"*_{band}_?0m.jp2")
            with rasterio.open(path) as file:
                layers.append(_at_10m(file.read(1), path))
                if grid is None and path.parent.name == "R10m":
                    grid, crs = file.transform, file.crs
        (path,) = product.rglob("*_SCL_20m.jp2")
        with rasterio.open(path) as file:
            layers.append(_at_10m(file.read(1), path))
        height, width = (min(layer.shape[axis] for layer in layers) for axis in (0, 1))
        stored = np.stack([layer[:height, :width] for layer in layers])
        images.append(stored[:-1].astype(np.float32) * np.float32(1e-4))
        clear.append(np.isin(stored[-1], _CLEAR_SCL) & (stored[:-1] > 0).all(axis=0))
    values = np.where(np.stack(clear)[:, None], np.stack(images), np.nan)
    parcels = folder / "reference_data" / "france_data_2018.shp"
    facts, _, shapes, (crops,) = pyogrio.raw.read(parcels, columns=["EC_hcat_n"], encoding="utf-8")
    outlines = transform_geom(
        facts["crs"], crs, [shapely.geometry.mapping(shape) for shape in shapely.from_wkb(shapes)]
    )
    numbers = rasterize(
        [(shape, number) for number, shape in enumerate(outlines, start=1)],
        out_shape=values.shape[2:],
        transform=grid,
    )
    parcel = numbers[numbers > 0] - 1
    series = values[:, :, numbers > 0].transpose(2, 0, 1)
    names, counts = np.unique(crops.astype(str), return_counts=True)
    known = np.isin(crops.astype(str), names[counts >= _FEWEST_PARCELS]) & (
        crops != "not_known_and_other"
    )
    # A pixel of which no date is clear has no series.
    own = known[parcel] & np.isfinite(series).any(axis=(1, 2))
    return Region(
        bands=_HERAULT_BANDS,
        values=series[own],
        dates=_same([_day_of(product) for product in products], int(own.sum())),
        classes=crops[parcel[own]].astype(str),
        places=parcel[own].astype(str),
    )


_HERAULT_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
_FEWEST_PARCELS = 6
"""Fewer parcels of a crop leave a half of them without labels."""


def _day_of(product: Path) -> date:
    folder = next(parent for parent in product.parents if parent.suffix == ".SAFE")
    stamp = next(part for part in folder.name.split("_") if part[:2] == "20" and "T" in part)
    return date.fromisoformat(f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]}")


def _at_10m(image: NDArray[Any], path: Path) -> NDArray[Any]:
    if path.parent.name == "R10m":
        return image
    return image.repeat(2, axis=0).repeat(2, axis=1)


REGIONS: Mapping[str, Callable[[Path], Region]] = {
    "victoria": _victoria,
    "pune": _pune,
    "brazil": _brazil,
    "herault": _herault,
    "us-crops": _us_crops,
}


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Positions of the labels and of the tested pixels, in different places."""

    labels: NDArray[np.intp]
    tested: NDArray[np.intp]


def draw(region: Region, count: int, seed: int, tested: int | None = _TESTED) -> Draw | None:
    """Labels of each class from one half of the places, and pixels of the other half.

    Args:
        region: the pixels.
        count: number of labels of a class.
        seed: of the draw.
        tested: largest number of tested pixels; None for all. It does not change the labels.

    Returns:
        None if fewer than `_FEWEST_CLASSES` classes have enough labels.
    """
    random = np.random.default_rng(seed)
    places = np.unique(region.places)
    half = np.isin(region.places, random.permutation(places)[: len(places) // 2])
    labels = []
    for name in np.unique(region.classes):
        own = random.permutation(np.flatnonzero(half & (region.classes == name)))[:count]
        # A class that cannot fill its share is left out, unless it comes close to it.
        if len(own) >= max(_FEWEST_LABELS, count // 2):
            labels.append(own)
    if len(labels) < _FEWEST_CLASSES:
        return None
    chosen = np.concatenate(labels)
    there = ~half & np.isin(region.classes, region.classes[chosen])
    return Draw(labels=chosen, tested=random.permutation(np.flatnonzero(there))[:tested])


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


@dataclass(frozen=True, kw_only=True)
class Known:
    """Input of the other methods for one draw: the labels first, then the tested pixels."""

    region: Region
    drawn: Draw
    values: NDArray[np.float32]
    """Features (n, ...); for TempCNN those of `known_of`."""

    @property
    def split(self) -> int:
        """Number of labels."""
        return len(self.drawn.labels)

    @property
    def classes(self) -> NDArray[np.str_]:
        """Class of each label."""
        return self.region.classes[self.drawn.labels]

    def score(self, guesses: NDArray[np.str_]) -> float:
        """Macro-F1 of the classes guessed for the tested pixels."""
        truth = self.region.classes[self.drawn.tested]
        return float(f1_score(truth, guesses, average="macro", labels=np.unique(truth)))


def interpolated(region: Region, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    """Bands at every date (n, T, C), gaps interpolated in time; 0 without any clear date."""
    days = region.dates[rows].astype("datetime64[D]").astype(np.int64)
    values = region.values[rows].astype(np.float64)
    filled = np.empty_like(values)
    for n in range(len(values)):
        there = ~np.isnan(values[n]).any(axis=1)
        for c in range(values.shape[2]):
            filled[n, :, c] = (
                np.interp(days[n], days[n][there], values[n][there, c]) if there.any() else 0.0
            )
    return filled


def with_indices(bands: Sequence[str], values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Bands (..., C), then the normalised differences that the service computes of them."""
    column = {band: values[..., c] for c, band in enumerate(bands)}
    parts = [values]
    for name in indices_of(bands):
        a, b = (column[band] for band in INDICES[name])
        parts.append(np.clip((a - b) / np.maximum(a + b, 0.05), -1, 1)[..., None])
    return np.concatenate(parts, axis=-1).astype(np.float32)


def known_of(region: Region, drawn: Draw) -> Known:
    """Bands and indices of the labels and of the tested pixels, gaps interpolated in time."""
    rows = np.concatenate([drawn.labels, drawn.tested])
    values = with_indices(region.bands, interpolated(region, rows))
    return Known(region=region, drawn=drawn, values=values)


def tuned(known: Known, model: BaseEstimator, grid: Mapping[str, Any]) -> float:
    """Macro-F1 of a scikit-learn model whose settings are chosen over places.

    Args:
        known: the draw with its features.
        model: the model.
        grid: the settings that are tried.
    """
    places = known.region.places[known.drawn.labels]
    x = known.values.reshape(len(known.values), -1)
    labels = x[: known.split]
    folds = StratifiedGroupKFold(3, shuffle=True, random_state=0)
    search = GridSearchCV(
        model,
        grid,
        cv=list(folds.split(labels, known.classes, places)),
        scoring="f1_macro",
        error_score=0.0,
    )
    return known.score(search.fit(labels, known.classes).predict(x[known.split :]))


def forest(known: Known) -> float:
    """Macro-F1 of a random forest."""
    return tuned(
        known,
        RandomForestClassifier(150, random_state=0),
        {"max_features": ["sqrt", 0.1], "min_samples_leaf": [1, 2]},
    )


def regression(known: Known, strengths: Sequence[float] = (0.001, 0.01, 0.1)) -> float:
    """Macro-F1 of logistic regression on standardised features; `strengths` are the C tried."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=150))
    return tuned(known, model, {"logisticregression__C": list(strengths)})


_EPOCHS, _STEPS, _BATCH = 20, 300, 32


def tempcnn(known: Known) -> float:
    """Macro-F1 of TempCNN, with the paper's network, optimiser, batch and number of epochs.

    Pelletier et al. 2019, doi:10.3390/rs11050523. With few labels, its 20 epochs are a few dozen
    steps, in which it learns little: it is trained for at least 300.
    """
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    bands = len(known.region.bands)
    names, labels = np.unique(known.classes, return_inverse=True)
    inputs = torch.from_numpy(known.values.transpose(0, 2, 1).copy())
    encoder = TempCNN(
        steps=inputs.shape[2], indices=inputs.shape[1] - bands, bands=bands, embedding=256
    )
    head = torch.nn.Linear(encoder.embedding, len(names))

    def logits(x: torch.Tensor) -> torch.Tensor:
        # It ignores which dates were observed.
        out: torch.Tensor = head(encoder(x[:, bands:], x[:, :1], None, x[:, :bands]))
        return out

    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3)
    per_epoch = max(known.split // _BATCH, 1)
    for _ in range(max(_EPOCHS, -(-_STEPS // per_epoch))):
        for part in np.array_split(random.permutation(known.split), per_epoch):
            found = logits(inputs[part])
            loss = torch.nn.functional.cross_entropy(found, torch.from_numpy(labels[part]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature
            optimizer.step()
    encoder.eval()
    with torch.inference_mode():
        found = logits(inputs[known.split :])
    return known.score(names[found.argmax(dim=1).numpy()])


def untrained(known: Known) -> float:
    """Macro-F1 of logistic regression on the embedding of an encoder with random weights.

    The encoder is that of `embed-pixel`, with its three bands.
    """
    torch.manual_seed(0)
    encoder = PixelEncoder(steps=STEPS, indices=len(config.INDICES), bands=len(config.BANDS))
    graph = PixelGraph(
        bands=config.BANDS,
        indices=config.INDICES,
        steps=STEPS,
        step_days=STEP_DAYS,
        encoder=encoder,
        head=None,
        yearly=True,
        reflectance=True,
    ).eval()
    rows = np.concatenate([known.drawn.labels, known.drawn.tested])
    dates = known.region.dates[rows].astype("datetime64[D]")
    years = dates[:, :1].astype("datetime64[Y]").astype("datetime64[D]")
    days = (dates - years).astype(np.float32)
    values = known.region.values[rows][..., [known.region.bands.index(b) for b in config.BANDS]]
    found = np.zeros((len(rows), encoder.embedding), np.float32)
    for shared in np.unique(days, axis=0):
        own = (days == shared).all(axis=1)
        with torch.inference_mode():
            found[own] = graph(
                torch.from_numpy(np.nan_to_num(values[own])),
                torch.from_numpy(np.isfinite(values[own]).all(axis=2)),
                torch.from_numpy(shared),
            ).numpy()
    return regression(replace(known, values=np.nan_to_num(found)))


_OTHERS: Mapping[str, Callable[[Known], float]] = {
    "random forest": forest,
    "logistic regression": regression,
    "TempCNN": tempcnn,
    "untrained encoder": untrained,
}


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Score every draw of every region; scores that are in `--out` are not measured again."""
    rows: list[dict[str, Any]] = []
    if options.out and options.out.exists():
        rows = json.loads(options.out.read_text())
    done = {(row["region"], row["labels"], row["seed"]): row for row in rows}
    with served() as api:
        api.timeout = httpx.Timeout(600)
        for name in options.region:
            region = REGIONS[name](options.data)
            for count, seed in itertools.product(options.labels, range(options.draws)):
                drawn = draw(region, count, seed)
                if drawn is None:
                    continue
                row = done.get((name, count, seed))
                if row is None:
                    row = {
                        "region": name,
                        "labels": count,
                        "seed": seed,
                        "classes": len(np.unique(region.classes[drawn.labels])),
                        "tested": len(drawn.tested),
                    }
                    rows.append(row)
                missing = [m for m in options.method if m not in row]
                if missing:
                    known = known_of(region, drawn)
                for method in missing:
                    if method in _OTHERS:
                        row[method] = _OTHERS[method](known)
                    else:
                        row |= taught(api, region, drawn)
                    if options.out:
                        options.out.write_text(json.dumps(rows))
                print(json.dumps(row), flush=True)
    return rows


_METHODS = ("own classes", *_OTHERS)


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
        cells = [
            region,
            str(count),
            f"{np.mean([r['classes'] for r in own]):.3g}",
            str(len(own)),
        ]
        cells += [mean_text([row[name] for row in own if name in row]) for name in _METHODS]
        scored = [r for r in own if "card" in r]
        cells += [
            f"{np.mean([r['ece'] for r in scored]):.3f}",
            mean_text([r["card"] for r in scored]),
        ]
        print(f"| {' | '.join(cells)} |")


def mean_text(values: Sequence[float]) -> str:
    """Mean and standard error; a dash without values."""
    if not values:
        return "-"
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
    parser.add_argument("--method", nargs="+", choices=_METHODS, default=list(_METHODS))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file of the draws, also of earlier runs")
    parser.add_argument("--time", action="store_true", help="measure the time alone")
    parser.add_argument("--side", type=int, default=1024, help="of the stack of `--time`, pixels")
    options = parser.parse_args()
    if options.time:
        show_time(options.side)
    else:
        torch.set_num_threads(1)
        show(compare(options))


if __name__ == "__main__":
    main()
