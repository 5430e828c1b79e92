"""STAC 1.1 items that describe results and models for catalogues.

    grid, layers, card, dates, sources → item.json beside the rasters
    card → an item of the MLM extension

An item does not depend on the clock or on random numbers: equal results have identical items.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from rasterio.crs import CRS

from models.card import LegendClass, ModelCard
from service.grid import Grid
from service.settings import project_version
from service.write.legend import SIDECAR
from service.write.predictions import JSON, POLYGONS, Layer

ITEM = "item.json"
"""File name of a result's item, in the folder of its rasters."""
COG = "image/tiff; application=geotiff; profile=cloud-optimized"
_STAC_VERSION = "1.1.0"
_EXTENSIONS: Mapping[str, str] = {
    name: f"https://stac-extensions.github.io/{name}/v{version}/schema.json"
    for name, version in {
        "projection": "2.0.0",
        "raster": "2.0.0",
        "classification": "1.1.0",
        "processing": "1.2.0",
        "forecast": "0.2.0",
        "mlm": "1.5.1",
    }.items()
}
_TASKS: Mapping[str, tuple[str, ...]] = {
    "classify-pixels": ("classification", "semantic-segmentation"),
    "landcover": ("classification", "scene-classification"),
    "forecast": ("regression",),
    "embed": ("similarity-search",),
}
"""The MLM extension's tasks for each of the service's; it has none for embeddings, which are used
for similarity search."""
_ALL_TIMES: Mapping[str, JSON] = {
    "datetime": None,
    "start_datetime": "1900-01-01T00:00:00Z",
    "end_datetime": "9999-12-31T23:59:59Z",
}
_EDGE_POINTS = 16
"""Number of points on each edge of a footprint, because a straight edge in a projection is a curve
in degrees."""
_LICENCE = re.compile(r"[\w.+-]+")
"""An SPDX identifier; STAC requires `other` for a licence stated in another form."""
_DEGREES = CRS.from_epsg(4326)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Provenance of a result: dates, files, provider and parameters."""

    dates: tuple[date, ...]
    """Acquisition dates used; empty for undated imagery."""
    forecast_dates: tuple[date, ...] = ()
    """Dates of a forecast's steps; empty for other tasks."""
    sources: tuple[str, ...]
    """Names or URLs of the files that contain a used band."""
    provider: str
    """The execution provider of the run."""
    parameters: Mapping[str, JSON]
    """Parameters of the request that change the result, such as `stride`."""
    backtest: Mapping[str, JSON] | None = None
    """The backtest of a forecast; None without one."""


def result_item(
    card: ModelCard,
    grid: Grid,
    layers: Sequence[Layer],
    made: Provenance,
    *,
    task: str | None = None,
    polygons: bool = False,
) -> dict[str, Any]:
    """A STAC Item that describes a result; its assets are files in the item's folder.

    Args:
        card: the model's card.
        grid: grid of the rasters.
        layers: the rasters, each in the file `<name>.tif`.
        made: provenance of the result.
        task: the task of the request; None for the model's task.
        polygons: whether the result contains the class map as polygons.

    Returns:
        The item. STAC requires a time or an interval. If the imagery has no dates, the interval is
        that of all times, as in an item of a model, and the property `pimc:undated` is true: no
        shorter interval is known to hold, and the time of the run would not be that of the images.
    """
    task = task or card.task
    valid = made.forecast_dates or made.dates
    of_dates = (
        f"{len(made.dates)} dates from {made.dates[0]} to {made.dates[-1]}"
        if made.dates
        else "imagery without dates"
    )
    extensions = ["projection", "raster", "processing", "mlm"]
    properties: dict[str, Any] = {
        "title": f"{task} by {card.id}",
        **(_interval(valid[0], valid[-1]) if valid else {**_ALL_TIMES, "pimc:undated": True}),
        **_projection(grid),
        "gsd": round(grid.pixel_size, 3),
        "processing:software": {"PIMC": project_version()},
        "processing:lineage": (
            f"{card.id} (sha256 {card.sha256}) on {of_dates}, computed by {made.provider}"
        ),
        "pimc:model": card.id,
        "pimc:dates_used": [day.isoformat() for day in made.dates],
        "pimc:sources": list(made.sources),
        "pimc:parameters": dict(made.parameters),
        **({"pimc:backtest": dict(made.backtest)} if made.backtest else {}),
        **_model_properties(card),
    }
    if any(layer.legend for layer in layers):
        extensions.append("classification")
    if made.forecast_dates:
        extensions.append("forecast")
        reference = made.dates[-1]
        properties["forecast:reference_datetime"] = _start(reference)
        properties["forecast:horizon"] = f"P{(made.forecast_dates[-1] - reference).days}D"
    assets: dict[str, Any] = {}
    for layer in layers:
        assets |= _assets(layer, grid)
    if polygons:
        assets[POLYGONS] = {
            "href": f"./{POLYGONS}.parquet",
            "type": "application/vnd.apache.parquet",
            "title": "connected areas of the class map",
            "roles": ["data"],
        }
    assets["model"] = _model_asset(card)
    geometry, bbox = footprint(grid)
    item = {
        "type": "Feature",
        "stac_version": _STAC_VERSION,
        "stac_extensions": [_EXTENSIONS[name] for name in extensions],
        "id": "",
        "geometry": geometry,
        **({"bbox": bbox} if bbox else {}),
        "properties": properties,
        "links": [],
        "assets": assets,
    }
    digest = hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()
    return {**item, "id": f"{task}-{card.name}-{digest[:16]}"}


def write_item(item: Mapping[str, Any], folder: Path) -> None:
    """Write an item to the folder of the rasters that it describes."""
    text = json.dumps(item, ensure_ascii=False, indent=1)
    (folder / ITEM).write_text(text, encoding="utf-8")


def item_of(raster: Path) -> Path:
    """Path of the item that describes a raster, in the raster's folder."""
    return raster.with_name(ITEM)


def model_item(card: ModelCard, href: str) -> dict[str, Any]:
    """A model as a STAC Item of the MLM extension.

    The item's extent is the whole Earth and all dates: the extension recommends the extent in which
    a model may be used, and a card contains no restriction.

    Args:
        card: the model's card.
        href: URL of the card, absolute or relative to the item. The item has no `self` link,
            because that link must be absolute and the service has no setting of its public address.
    """
    world = shapely.box(-180.0, -90.0, 180.0, 90.0)
    extensions = ["mlm", *(["classification"] if card.classes else [])]
    return {
        "type": "Feature",
        "stac_version": _STAC_VERSION,
        "stac_extensions": [_EXTENSIONS[name] for name in extensions],
        "id": card.id,
        "geometry": json.loads(shapely.to_geojson(world)),
        "bbox": [-180.0, -90.0, 180.0, 90.0],
        "properties": {
            "title": card.id,
            "description": card.description,
            "license": card.licence if _LICENCE.fullmatch(card.licence) else "other",
            **_ALL_TIMES,
            **_model_properties(card),
        },
        "links": [
            {"rel": "alternate", "href": href, "type": "application/json", "title": "the card"},
        ],
        "assets": {"model": _model_asset(card)},
    }


def footprint(grid: Grid) -> tuple[dict[str, Any] | None, list[float] | None]:
    """The outline of a grid as GeoJSON in degrees, and its bounding box.

    Returns:
        The outline, and west, south, east and north in degrees (EPSG:4326). An outline across the
        antimeridian is cut there, as GeoJSON requires, and west is then larger than east. Both None
        if the CRS is not a CRS of the Earth.
    """
    step = np.linspace(0.0, 1.0, _EDGE_POINTS, endpoint=False)
    one, zero = np.ones_like(step), np.zeros_like(step)
    columns = np.concatenate([step, one, 1 - step, zero]) * grid.width
    rows = np.concatenate([zero, step, one, 1 - step]) * grid.height
    lon, lat = grid.coordinates(columns, rows, _DEGREES)
    if not (np.isfinite(lon).all() and np.isfinite(lat).all()):
        return None, None
    crosses = np.ptp(lon) > 180
    lon = np.where(crosses & (lon < 0), lon + 360, lon)
    ring = shapely.Polygon(np.round(np.stack([lon, lat], axis=1), 7))
    outline = shapely.orient_polygons(shapely.make_valid(ring))
    west, south, east, north = (float(side) for side in outline.bounds)
    if not crosses:
        return json.loads(shapely.to_geojson(outline)), [west, south, east, north]
    left = shapely.intersection(outline, shapely.box(0, -90, 180, 90))
    right = shapely.intersection(outline, shapely.box(180, -90, 540, 90))
    right = shapely.transform(right, lambda points: points - [360.0, 0.0])
    parts = shapely.multipolygons([*shapely.get_parts(left), *shapely.get_parts(right)])
    cut = json.loads(shapely.to_geojson(shapely.orient_polygons(parts)))
    return cut, [west, south, east - 360.0, north]


def classes_of(legend: Sequence[LegendClass]) -> list[dict[str, JSON]]:
    """A legend in the form of STAC's classification extension.

    The extension allows only ASCII letters, digits, `-` and `_` in `name`; `title` is the class's
    own name.
    """
    return [
        {
            "value": c.value,
            "name": class_name(c.name) or f"class-{c.value}",
            "title": c.name,
            "color_hint": c.color.removeprefix("#").upper(),
            **({} if c.code is None else {"description": f"code {c.code} of the source's legend"}),
        }
        for c in legend
    ]


def class_name(text: str) -> str:
    """A class's name with all characters except ASCII letters, digits, `-` and `_` replaced."""
    return re.sub(r"[^0-9A-Za-z_-]+", "-", text).strip("-")


def _start(day: date) -> str:
    return f"{day.isoformat()}T00:00:00Z"


def _interval(first: date, last: date) -> dict[str, JSON]:
    if first == last:
        return {"datetime": _start(first)}
    return {
        "datetime": None,
        "start_datetime": _start(first),
        "end_datetime": f"{last.isoformat()}T23:59:59Z",
    }


def _projection(grid: Grid) -> dict[str, JSON]:
    code = grid.crs.to_authority()
    return {
        **(
            {"proj:code": ":".join(code)}
            if code
            else {"proj:code": None, "proj:wkt2": grid.crs.to_wkt(version="WKT2_2019")}
        ),
        "proj:shape": [grid.height, grid.width],
        "proj:transform": [float(number) for number in grid.transform],
    }


def _assets(layer: Layer, grid: Grid) -> dict[str, Any]:
    """The assets of a layer: its raster, its QGIS style and, for a class map, its side file."""
    name = layer.name
    raster: dict[str, Any] = {
        "href": f"./{name}.tif",
        "type": COG,
        "title": name,
        "roles": ["data"],
        "data_type": layer.dtype,
        "nodata": "nan" if math.isnan(layer.nodata) else layer.nodata,
        "raster:spatial_resolution": round(grid.pixel_size, 3),
        "bands": [{"name": band} for band in layer.bands],
    }
    if layer.scale is not None:
        raster |= {"raster:scale": layer.scale, "raster:offset": 0}
    if layer.legend:
        raster["classification:classes"] = classes_of(layer.legend)
    assets = {
        name: raster,
        f"{name}-style": {
            "href": f"./{name}.qml",
            "type": "application/xml",
            "title": f"QGIS style of {name}",
            "roles": ["style"],
        },
    }
    if layer.legend:
        assets[f"{name}-names"] = {
            "href": f"./{name}.tif{SIDECAR}",
            "type": "application/xml",
            "title": f"names of the classes of {name}, for GDAL",
            "roles": ["metadata"],
        }
    return assets


def _model_properties(card: ModelCard) -> dict[str, Any]:
    """The properties of the MLM extension; -1 stands for a dimension of variable size."""
    tasks = list(_TASKS[card.task])
    if card.modality == "pixel":
        shape, order = [-1, -1, len(card.bands)], ["batch", "time", "bands"]
    else:
        side = card.patch or -1
        shape, order = [-1, len(card.bands), side, side], ["batch", "bands", "height", "width"]
    result_shape, result_order = _result_structure(card)
    output: dict[str, Any] = {
        "name": card.output,
        "tasks": tasks,
        "result": {"shape": result_shape, "dim_order": result_order, "data_type": "float32"},
    }
    if card.classes:
        output["classification:classes"] = classes_of(card.classes)
    parameters = card.training.get("parameters")
    return {
        "version": card.version,
        **({"pimc:intended_use": card.intended_use} if card.intended_use else {}),
        "bands": [{"name": band} for band in card.bands],
        "mlm:name": card.name,
        "mlm:architecture": "PIMC encoder on recurrence plots"
        if card.modality == "pixel"
        else "PIMC encoder of imagery",
        "mlm:framework": "ONNX",
        "mlm:tasks": tasks,
        "mlm:input": [
            {
                "name": "reflectance",
                "description": "reflectance, unitless, 0 to 1",
                "bands": list(card.bands),
                "input": {"shape": shape, "dim_order": order, "data_type": "float32"},
            }
        ],
        "mlm:output": [output],
        **(
            {"mlm:total_parameters": parameters}
            if isinstance(parameters, int) and parameters >= 0
            else {}
        ),
    }


def _result_structure(card: ModelCard) -> tuple[list[int], list[str]]:
    if card.task == "forecast":
        return (
            [-1, card.horizon or 0, len(card.indices), len(card.quantiles)],
            ["batch", "time", "index", "quantile"],
        )
    if card.task == "embed":
        return [-1, card.embedding or 0], ["batch", "embedding"]
    return [-1, len(card.classes)], ["batch", "class"]


def _model_asset(card: ModelCard) -> dict[str, Any]:
    """The asset of the ONNX file, whose URI is its sha256 (RFC 6920) and not a location."""
    digest = base64.urlsafe_b64encode(bytes.fromhex(card.sha256)).decode().rstrip("=")
    return {
        "href": f"ni:///sha-256;{digest}",
        "type": "application/octet-stream",
        "title": f"{card.id}, float32",
        "roles": ["mlm:model"],
        # The extension requires `bands` in the item, and STAC allows it only if an asset has them.
        "bands": [{"name": band} for band in card.bands],
        "mlm:artifact_type": "onnx",
        "pimc:sha256": card.sha256,
    }
