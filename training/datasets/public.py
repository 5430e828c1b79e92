"""Series for forecasts, which need no labels: of public repositories, and of small shared sets.

`public` is a folder with files of public repositories as they lie there (docs/how-to/train.md):

    worldcereal/  WorldCereal/worldcereal-classification: two tables and a chip of 64 x 64 pixels
    worldcrops/   ESA-PhiLab/WorldCrops: kenya and centralasia, a folder for each field
    geomaize/     EOAfrica/GEOMaize: tables of monthly composites
    mowing/       simonopravil/gee-mowing-detection: tables by field; for evaluation only

Fields are means of their pixels. Each is given as `PixelSet`s whose pixels share their dates.
"""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray

from training.config import BANDS
from training.datasets import PixelSet
from training.datasets.points import bavaria_2018
from training.datasets.stacks import CLEAR_SCL, read_safe_folders

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
_MOST = 2000
"""Most pixels of a set: neighbours in a stack are nearly copies."""
_OF_A_FIELD = 40
_CLEAR_BLUE = 0.16
"""Blue reflectance at the top of the atmosphere below which a mean of a field counts as clear."""
_CLOUDY_BLUE = 0.18
"""The same at the surface, for composites."""
_NODATA = 65535
_MONTH_SHIFT = 14
"""Days from the first of a month to the day that its composite is dated to."""
# Channels of the statistics of a field: cloud mask, NDVI, NDWI, then the bands from B01 on.
_CLOUDY, _CHANNELS = "C0", {"B02": "C4", "B04": "C6", "B08": "C10"}
_FEWEST_CLEAR, _LONGEST_GAP = 14, 62
_BRIGHTEST = 1.2
"""Reflectance from which a mean is an error."""
# Snow: NDSI and green reflectance above these (Hall et al. 1995, doi:10.1016/0034-4257(95)00137-P).
_SNOW_INDEX, _SNOW_GREEN = 0.4, 0.1
# WorldCover's codes, also by the classes of WorldCereal.
_GRASS, _CROPS = 30, 40
_COVERS = {"temporary_crops": _CROPS, "trees": 10, "grasslands": _GRASS, "built_up": 50}
_CLEAR_SCORE = 0.6
"""Cloud Score+ from which Google's documentation counts a pixel as clear."""


def further_series(data: Path, public: Path | None = None) -> Iterator[PixelSet]:
    """Series beside the large sets that forecasts are trained on.

    Args:
        data: folder of the shared data sets.
        public: folder of the files of public repositories; None leaves them out.
    """
    yield from _shared_series(data)
    if public is None:
        return
    yield _chip(public / "worldcereal")
    yield _long(public / "worldcereal" / "data_0.parquet", "worldcereal", "flanders-fields")
    yield from _labelled(public)


def _labelled(public: Path) -> Iterator[PixelSet]:
    """Those of public repositories whose cover was seen on the ground."""
    yield _wide(public / "worldcereal" / "test_public_extractions.parquet")
    yield _statistics(public / "worldcrops" / "kenya", "AGRICULTURE_L2A", "kenya")
    for i, path in enumerate(sorted((public / "geomaize").rglob("*.geoparquet"))):
        yield _long(path, "geomaize", "ghana", _CROPS, _MOST * i)


def _shared_series(data: Path) -> Iterator[PixelSet]:
    yield from _bavaria(data / "bavaria_2018")
    scene = read_safe_folders(data / "herault_safe_2018")
    whole = scene.pixels(BANDS)
    some = whole.valid.sum(axis=1) >= len(whole.dates) // 2
    yield _set("herault_safe_2018", "herault", whole.dates, whole.values[some])


def covered_fields(public: Path) -> Iterator[PixelSet]:
    """Fields whose cover was seen on the ground, with WorldCover's codes as labels.

    They are for evaluation: most regions have one class, and a network that was trained on them
    takes grassland elsewhere for crops (docs/decisions/regions.md).

    Args:
        public: folder of the files of public repositories.
    """
    yield from _labelled(public)
    yield from unseen_series(public)


BESIDE_TRAINING = ("switzerland",)
"""Regions that are not trained on, but most of whose fields are within 110 km of the boxes of
training data (`training.licences`): Bavaria's reaches to the Lake of Constance."""


def unseen_series(public: Path) -> Iterator[PixelSet]:
    """Series that are never trained on, for evaluation: grassland and fields of level 1C.

    The authors of the grassland series ask to be asked before their data are used, although the
    repository is under the MIT licence.

    Args:
        public: folder of the files of public repositories.
    """
    yield _tables(public / "mowing" / "SK_poly", "slovakia")
    yield _tables(public / "mowing" / "CH_poly", "switzerland")
    yield _statistics(public / "worldcrops" / "centralasia", "AGRICULTURE_L1C", "uzbekistan")


def _set(
    source: str,
    region: str,
    dates: Sequence[date],
    values: NDArray[np.floating],
    cover: int | Sequence[int] | None = None,
    first: int = 0,
) -> PixelSet:
    """At most some of the series (N, T, C), NaN where not usable; none is for validation.

    Args:
        source: name of the data set.
        region: name of the region.
        dates: (T).
        values: reflectance (N, T, C).
        cover: label of all series, or of each, as WorldCover's code.
        first: number of the first place, so that sets of one source have places of their own.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(len(values))[:_MOST])
    kept = values[chosen].astype(np.float32)
    labels = None if cover is None else np.broadcast_to(cover, len(values))[chosen]
    return PixelSet(
        source=source,
        bands=BANDS,
        dates=tuple(dates),
        values=kept,
        valid=np.asarray(np.isfinite(kept).all(axis=-1)),
        places=first + chosen.astype(np.int64),
        validation=np.zeros(len(chosen), dtype=bool),
        labels=None if labels is None else labels.astype(np.int64),
        region=region,
    )


def _bavaria(folder: Path) -> Iterator[PixelSet]:
    """Means of fields of level 1C without their cloudy dates, and pixels of wheat fields."""
    for fields in bavaria_2018(folder):
        values = fields.select(BANDS).values
        clear = fields.valid & (values[..., 0] < _CLEAR_BLUE)
        yield _set(
            fields.source, "bavaria", fields.dates, np.where(clear[..., None], values, np.nan)
        )
    for i, field in enumerate(sorted((folder / "sentinelhub_10m").iterdir()), start=1):
        yield _field(field, _MOST * i)


def _field(folder: Path, first: int) -> PixelSet:
    """Pixels of a field as sentinelhub-py keeps them: cloud, data, B01 to B08 and further bands."""
    layers = {}
    for one in folder.iterdir():
        url = json.loads((one / "request.json").read_text())["url"]
        found = re.search(r"TIME=(\d{4}-\d\d-\d\d)", url)
        if found is None:
            raise ValueError(f"{one} states no time")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(one / "response.tiff") as file:
                layers[date.fromisoformat(found[1])] = file.read([1, 2, 4, 6, 10])
    days = sorted(layers)
    stack = np.stack([layers[day] for day in days]).reshape(len(days), 5, -1).transpose(2, 0, 1)
    cloud, there, values = stack[..., 0], stack[..., 1], stack[..., 2:]
    valid = (cloud == 0) & (there == 1) & (values > 0).all(axis=-1)
    inside = np.flatnonzero(valid.mean(axis=1) > 0.6)
    chosen = np.random.default_rng(0).permutation(inside)[:_OF_A_FIELD]
    kept = np.where(valid[chosen][..., None], values[chosen], np.nan)
    return _set("bavaria_2018", "bavaria", days, kept, first=first)


def _chip(folder: Path) -> PixelSet:
    """A window of 64 x 64 pixels with one layer per date; the scene classification is at 20 m."""
    (fine,), (coarse,) = folder.glob("S2_L2A_10m*.nc"), folder.glob("S2_L2A_20m*.nc")
    values = np.stack([_layers(fine, band)[0] for band in BANDS], axis=-1) * 1e-4
    scl, days = _layers(coarse, "SCL")
    valid = np.isin(scl.repeat(2, axis=1).repeat(2, axis=2), CLEAR_SCL) & (values > 0).all(axis=-1)
    by_pixel = np.where(valid[..., None], values, np.nan).reshape(len(days), -1, len(BANDS))
    return _set("worldcereal", "belgium", days, by_pixel.transpose(1, 0, 2))


def _layers(path: Path, name: str) -> tuple[NDArray[np.generic], list[date]]:
    """A variable (T, H, W) of a netCDF file and its dates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(f"netcdf:{path}:{name}") as file:
            values, tags = file.read(), file.tags()
    since = datetime.fromisoformat(tags["timestamp#units"].removeprefix("seconds since "))
    offsets = tags["NETCDF_DIM_timestamp_VALUES"].strip("{}").split(",")
    return values, [(since + timedelta(seconds=int(s))).date() for s in offsets]


def _long(
    path: Path, source: str, region: str, cover: int | None = None, first: int = 0
) -> PixelSet:
    """Monthly composites with one row per field and month."""
    import pyarrow.parquet as pq

    columns = [f"S2-L2A-{band}" for band in BANDS]
    rows = pq.ParquetFile(path).read(columns=["sample_id", "timestamp", *columns]).to_pydict()
    ids, row = np.unique(rows["sample_id"], return_inverse=True)
    months = sorted(set(rows["timestamp"]))
    column = [months.index(month) for month in rows["timestamp"]]
    values = np.full((len(ids), len(months), len(BANDS)), np.nan)
    values[row, column] = np.stack([rows[name] for name in columns], axis=-1)
    return _composites(source, region, [month.date() for month in months], values, cover, first)


def _wide(path: Path) -> PixelSet:
    """Monthly composites with one row per field, all of the same twelve months."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path).read()
    first = date.fromisoformat(table["start_date"][0].as_py())
    months = [date(first.year + (first.month + i - 1) // 12, (first.month + i - 1) % 12 + 1, 1)
              for i in range(12)]  # fmt: skip
    names = [[f"OPTICAL-{band}-ts{i}-10m" for i in range(12)] for band in BANDS]
    values = np.stack([[table[n].to_numpy() for n in own] for own in names]).transpose(2, 1, 0)
    cover = [_COVERS.get(name, -1) for name in table["finetune_class"].to_pylist()]
    return _composites("worldcereal", "uganda", months, values.astype(float), cover)


def _composites(
    source: str,
    region: str,
    months: Sequence[date],
    stored: NDArray[np.float64],
    cover: int | Sequence[int] | None = None,
    first: int = 0,
) -> PixelSet:
    """Stored composites (N, T, C), dated to the middle of their months."""
    values = stored * 1e-4
    valid = ((stored > 0) & (stored != _NODATA)).all(axis=-1) & (values[..., 0] < _CLOUDY_BLUE)
    days = [month + timedelta(days=_MONTH_SHIFT) for month in months]
    return _set(source, region, days, np.where(valid[..., None], values, np.nan), cover, first)


def _statistics(folder: Path, layer: str, region: str) -> PixelSet:
    """Means of fields as Sentinel Hub's statistics: each of one request and its response.

    Kept are dates on which no pixel of the field is cloudy, and fields that have enough of them.

    Args:
        folder: holds a folder with `request.json` and `response.json` for each field.
        layer: the layer requested, of level 1C or 2A.
        region: name of the region.
    """
    fields = []
    for one in sorted(folder.iterdir()):
        request = json.loads((one / "request.json").read_text())
        if request["payload"]["layer"] != layer:
            continue
        found = dict(_clear_means(json.loads((one / "response.json").read_text())))
        ordinals = sorted(day.toordinal() for day in found)
        if len(ordinals) >= _FEWEST_CLEAR and np.diff(ordinals).max() <= _LONGEST_GAP:
            fields.append(found)
    return _fields("worldcrops", region, fields, _CROPS)


def _clear_means(response: Mapping[str, Any]) -> Iterator[tuple[date, list[float]]]:
    """Dates without a cloudy pixel, and the mean of each band; a missing number is "NaN"."""
    by_day = {
        channel: {row["date"]: row["basicStats"] for row in response.get(channel, [])}
        for channel in (_CLOUDY, *_CHANNELS.values())
    }
    for day, cloud in by_day[_CLOUDY].items():
        own = [by_day[channel].get(day, {}) for channel in _CHANNELS.values()]
        means = [float(statistics.get("mean", "nan")) for statistics in own]
        if float(cloud["max"]) == 0 and all(0 < mean < _BRIGHTEST for mean in means):
            yield date.fromisoformat(day), means


def _tables(folder: Path, region: str) -> PixelSet:
    """Means of grassland fields: a CSV table for each field and year, with reflectance.

    Left out are cloudy dates by Cloud Score+ and snow, which the tables do not mask.
    """
    fields: dict[str, dict[date, list[float]]] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                names = ("blue", "red", "nir", "green", "swir1", "mask", "cs_cdf")
                if not all(row[name] for name in names):
                    continue
                blue, red, nir, green, swir, mask, score = (float(row[name]) for name in names)
                snow = (green - swir) / (green + swir) > _SNOW_INDEX and green > _SNOW_GREEN
                if mask and score >= _CLEAR_SCORE and not snow:
                    own = fields.setdefault(row["plotID"], {})
                    own[date.fromisoformat(row["Date"])] = [blue, red, nir]
    return _fields("mowing", region, list(fields.values()), _GRASS)


def _fields(
    source: str, region: str, fields: Sequence[Mapping[date, list[float]]], cover: int
) -> PixelSet:
    """Fields of one cover, each with the means of its clear dates, on the dates of all."""
    days = sorted({day for field in fields for day in field})
    missing = [np.nan] * len(BANDS)
    values = np.array([[field.get(day, missing) for day in days] for field in fields])
    return _set(source, region, days, values, cover)
