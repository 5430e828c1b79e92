"""Measured series, against exactextract and rasterio; plots against the torch graph and pyts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas
import httpx
import numpy as np
import pytest
import rasterio
import torch
from exactextract import exact_extract
from pyts.image import RecurrencePlot
from rasterio.warp import transform, transform_geom
from shapely.geometry import Polygon, mapping, shape
from typer.testing import CliRunner

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_bundle, write_zoo
from models.card import ModelCard, TimeWindow
from models.encoders import PixelEncoder, standardised
from models.formulas import FORMULAS
from models.graph import PixelGraph
from models.recurrence import recurrence_plot
from models.registry import ZOO
from pimc_client.cli import app
from service.errors import InvalidRequest
from service.infer.plots import (
    PlotParameters,
    recurrence_plots,
    regular_series,
    spectral_index,
)
from service.read.geotiff import SourceFile
from service.run.measured import MAX_PLOTS
from tests.kits.client import connected
from tests.kits.rasters import NORTH_UP, UTM, write

pytestmark = pytest.mark.slow

H, W, DATES = 30, 40, 6
BANDS = ("B02", "B03", "B04", "B08", "SCL")
DAYS = [f"2021-0{n}-11" for n in range(1, DATES + 1)]
VEGETATION, CLOUD = 4, 9
CONFIG = {"clarity": 15.0, "encoder": {"plots": True, "threshold": None, "percentage": 10.0}}


def at(column: float, row: float) -> tuple[float, float]:
    x, y = NORTH_UP @ (column, row)
    return x, y


SHAPES = {
    "large": Polygon([at(3.3, 4.1), at(20.7, 5.2), at(18.2, 22.4), at(4.9, 19.8)]),
    "small": Polygon([at(30.2, 10.2), at(30.6, 10.2), at(30.6, 10.6), at(30.2, 10.6)]),
    "always cloudy": Polygon([at(32, 20), at(36, 20), at(36, 24), at(32, 24)]),
    "outside": Polygon([at(90, 90), at(95, 90), at(95, 95)]),
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> list[SourceFile]:
    folder = tmp_path_factory.mktemp("stack")
    random = np.random.default_rng(11)
    files = []
    for day in DAYS:
        values = random.integers(400, 5000, (len(BANDS), H, W)).astype(np.uint16)
        values[0] //= 4  # no index has a small denominator
        values[4] = np.where(random.random((H, W)) < 0.3, CLOUD, VEGETATION)
        values[4, 19:26, 31:38] = CLOUD
        values[:4, 2:4, 2:8] = 0
        files.append(write(folder / f"s_{day}.tif", values, descriptions=BANDS, nodata=0))
    return files


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    zoo = write_zoo(tmp_path_factory.mktemp("zoo"))
    card = {"default": False, "training": {"config": CONFIG}, "min_observations": 2}
    write_bundle(zoo, "embed-plots", "embed", "pixel", **card)
    with served(model_dir=zoo) as client:
        yield client


def measured(
    api: httpx.Client, stack: list[SourceFile], *, accept: str = "", **data: Any
) -> httpx.Response:
    files = [("files", (s.name, s.path.read_bytes())) for s in stack]
    given = {k: v if isinstance(v, str) else json.dumps(v) for k, v in data.items()}
    headers = {"Accept": accept} if accept else {}
    return api.post("/series", files=files, data=given, headers=headers)


def polygons() -> dict[str, Any]:
    features = [
        {"type": "Feature", "id": name, "properties": {"crop": name[:2]},
         "geometry": dict(transform_geom(UTM, "EPSG:4326", mapping(one), precision=-1))}
        for name, one in SHAPES.items()
    ]  # fmt: skip
    return {"type": "FeatureCollection", "features": features}


PIXELS = ((5, 9), (2, 3), (33, 22))


def points() -> dict[str, Any]:
    features = []
    for n, (column, row) in enumerate(PIXELS):
        x, y = at(column + 0.5, row + 0.5)
        (lon,), (lat,) = transform(UTM, "EPSG:4326", [x], [y])
        geometry = {"type": "Point", "coordinates": [lon, lat]}
        features.append({"type": "Feature", "id": f"p{n}", "properties": {"n": n},
                         "geometry": geometry})  # fmt: skip
    features.append({"type": "Feature", "id": "away", "properties": None,
                     "geometry": {"type": "Point", "coordinates": [4.0, 12.0]}})  # fmt: skip
    return {"type": "FeatureCollection", "features": features}


def test_series_without_a_clear_observation_have_a_warning(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    every = points()
    cloudy = {**every, "features": every["features"][2:]}  # always cloudy, and outside
    found = measured(api, stack, points=cloudy).json()
    assert [f["properties"]["status"] for f in found["features"]] == ["no_data", "outside"]
    (warning,) = [w for w in found["warnings"] if w["code"] == "all_missing"]
    assert warning["detail"].startswith("no point has a clear observation: every pixel needs 1")
    away = {**every, "features": every["features"][3:]}
    (warning,) = measured(api, stack, points=away).json()["warnings"]
    assert "all 1 are outside the raster, which covers longitudes " in warning["detail"]
    assert "exchanged" not in warning["detail"]
    for feature in (swapped := points())["features"]:
        feature["geometry"]["coordinates"].reverse()
    (warning,) = measured(api, stack, points=swapped).json()["warnings"]
    assert warning["detail"].endswith(
        "with longitude and latitude exchanged, 3 of 4 are inside: give the longitude first"
    )
    assert measured(api, stack, points=every).json()["warnings"] == []
    shapes = polygons()
    shapes["features"] = shapes["features"][2:3]
    (warning,) = measured(api, stack, fields=shapes).json()["warnings"]
    assert warning["detail"].startswith("no field has a clear observation")


def formulas(blue: Any, red: Any, nir: Any) -> dict[str, Any]:
    """The indices of the Awesome Spectral Indices catalogue, written out."""
    return {
        "NDVI": (nir - red) / (nir + red),
        "EVI": 2.5 * (nir - red) / (nir + 6 * red - 7.5 * blue + 1),
        "SAVI": 1.5 * (nir - red) / (nir + red + 0.5),
    }


def same(found: list[float | None], expected: Any, **tolerance: float) -> None:
    numbers = np.array(found, float)  # None becomes NaN
    np.testing.assert_allclose(numbers, np.asarray(expected, float), **tolerance)


def test_points_have_the_values_of_their_pixels(api: httpx.Client, stack: list[SourceFile]) -> None:
    response = measured(api, stack, points=points(), offset="0")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/geo+json"
    document = response.json()
    assert document["dates"] == DAYS
    assert document["bands"] == ["B02", "B04", "B08", "B03"]
    features = document["features"]
    assert [one["id"] for one in features] == ["p0", "p1", "p2", "away"]
    raw = np.stack([rasterio.open(s.path).read() for s in stack])
    for one, (column, row) in zip(features, PIXELS, strict=False):
        found, pixel = one["properties"], raw[:, :, row, column].astype(float)
        clear = (pixel[:, 4] == VEGETATION) & (pixel[:, :4] > 0).any(axis=1)
        same(found["clear"], clear)
        assert found["status"] == ("ok" if clear.any() else "no_data")
        reflectance = np.where(clear[:, None], pixel[:, :4] / 10_000, np.nan)
        for name, values in zip(("B02", "B03", "B04", "B08"), reflectance.T, strict=True):
            same(found[name], values, atol=1e-6)
        blue, _, red, nir = reflectance.T
        for name, values in formulas(blue, red, nir).items():
            same(found[name], np.clip(values, -1.5, 1.5), rtol=1e-4, atol=2e-6)
    assert features[0]["properties"]["n"] == 0
    assert features[1]["properties"]["status"] == "no_data"
    assert features[3]["properties"] == {"status": "outside"}


def test_fields_hold_the_mean_over_their_clear_pixels(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    features = measured(api, stack, fields=polygons(), offset="0").json()["features"]
    found = {one["id"]: one["properties"] for one in features}
    frame = geopandas.GeoDataFrame(geometry=list(SHAPES.values()), crs=UTM)
    for t, source in enumerate(stack):
        with rasterio.open(source.path) as file:
            raw = file.read().astype(float)
            profile = {**file.profile, "dtype": "float64", "nodata": np.nan, "count": 5}
        clear = (raw[4] == VEGETATION) & (raw[:4] > 0).any(axis=0)
        layers = np.concatenate([np.where(clear, raw[:4] / 10_000, np.nan), clear[None]])
        with rasterio.MemoryFile() as memory:
            with memory.open(**profile) as file:
                file.write(layers)
            with memory.open() as file:
                means = exact_extract(file, frame, ["mean"], output="pandas").to_numpy()
        for n, name in enumerate(SHAPES):
            if name == "outside":
                continue
            same([found[name]["clear"][t]], means[n, 4:5], atol=1e-5)
            for c, band in enumerate(("B02", "B03", "B04", "B08")):
                same([found[name][band][t]], means[n, c : c + 1], atol=1e-5)
            for index, value in formulas(*means[n, [0, 2, 3]]).items():
                same([found[name][index][t]], np.clip([value], -1.5, 1.5), atol=2e-4)
    assert found["large"]["status"] == "ok"
    assert found["large"]["crop"] == "la"
    assert found["large"]["pixels"] == pytest.approx(SHAPES["large"].area / 100, rel=1e-4)
    assert found["large"]["hectares"] == pytest.approx(SHAPES["large"].area / 1e4, rel=5e-3)
    assert found["always cloudy"]["status"] == "no_data"
    assert set(found["outside"]) == {"crop", "status"}


def test_a_table_has_a_row_for_each_place_and_date(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    document = measured(api, stack, fields=polygons()).json()
    response = measured(api, stack, fields=polygons(), accept="text/csv")
    assert response.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(response.text)))
    assert len(rows) == 3 * DATES + 1
    of = {one["id"]: one["properties"] for one in document["features"]}
    for row in rows[:-1]:
        t = DAYS.index(row["date"])
        for name in ("clear", *document["bands"], *document["indices"]):
            expected = of[row["id"]][name][t]
            assert row[name] == ("" if expected is None else str(expected))
    assert (rows[-1]["id"], rows[-1]["status"], rows[-1]["date"]) == ("outside", "outside", "")


def test_geoparquet_has_a_row_with_lists_for_each_place(
    api: httpx.Client, stack: list[SourceFile], tmp_path: Path
) -> None:
    fields = polygons()
    fields["features"][3]["properties"]["NDVI"] = "mine"  # this place has no series of its own
    document = measured(api, stack, fields=fields).json()
    response = measured(api, stack, fields=fields, accept="application/vnd.apache.parquet")
    assert response.headers["content-type"] == "application/vnd.apache.parquet"
    assert 'filename="series.parquet"' in response.headers["content-disposition"]
    path = tmp_path / "series.parquet"
    path.write_bytes(response.content)
    table = geopandas.read_parquet(path)
    assert table.crs == "OGC:CRS84"
    lists = ("clear", *document["bands"], *document["indices"])
    assert len(table) == len(document["features"])
    for (_, row), one in zip(table.iterrows(), document["features"], strict=True):
        own = one["properties"]
        assert (row["id"], row["status"], row["crop"]) == (one["id"], own["status"], own["crop"])
        assert row.geometry.distance(shape(one["geometry"])) < 1e-9
        if own["status"] == "outside":
            assert all(row[name] is None for name in ("dates", *lists))
            continue
        assert row["hectares"] == own["hectares"]
        assert [day.isoformat() for day in row["dates"]] == own["dates"] == DAYS
        for name in lists:
            same(row[name], np.array(own[name], float), atol=0)
    alone = measured(api, stack, points=points(), accept="application/vnd.apache.parquet")
    path.write_bytes(alone.content)
    assert geopandas.read_parquet(path)["id"].tolist() == ["p0", "p1", "p2", "away"]


def test_a_client_of_json_gets_geojson(api: httpx.Client, stack: list[SourceFile]) -> None:
    response = measured(api, stack, points=points(), accept="application/json")
    assert response.headers["content-type"] == "application/geo+json"
    assert response.json() == measured(api, stack, points=points()).json()


def graph_of(bands: tuple[str, ...], parameters: PlotParameters) -> PixelGraph:
    window = parameters.time_window
    return PixelGraph(
        bands=bands,
        indices=parameters.indices,
        steps=window.steps,
        step_days=window.step_days,
        encoder=PixelEncoder(steps=window.steps, indices=len(parameters.indices)),
        head=None,
        yearly=window.yearly,
        clarity=parameters.clarity,
    )


def test_plots_are_those_of_the_graph(api: httpx.Client, stack: list[SourceFile]) -> None:
    response = measured(api, stack, fields=polygons(), plots="true", model="embed-plots")
    assert response.status_code == 200, response.text
    document = response.json()
    head = document["plots"]
    assert (head["model"], head["first_day"]) == ("embed-plots@0.0.1", "2021-01-01")
    assert response.headers["PIMC-Model"] == head["model"]
    assert "PIMC-Model" not in measured(api, stack, points=points()).headers  # no model is used
    card = api.get("/models/embed-plots").json()
    parameters = PlotParameters.of(ModelCard(**card))
    days = [(rasterio_day(day) - rasterio_day("2021-01-01")).days for day in DAYS]
    found = {one["id"]: one["properties"] for one in document["features"]}
    for name in ("large", "small"):
        own = found[name]
        valid = np.array(own["clear"]) > 0.1
        if valid.sum() < card["min_observations"]:
            assert own["plots"] is None
            continue
        values = np.array([own[band] for band in card["bands"]], np.float32).T
        graph = graph_of(tuple(card["bands"]), parameters)
        series, _, _ = graph.regular(
            torch.tensor(values)[None],
            torch.tensor(valid)[None],
            torch.tensor(days, dtype=torch.float32),
        )
        expected = recurrence_plot(standardised(series))[0].numpy()
        shown = np.array([own["plots"][index] for index in ("NDVI", "EVI", "SAVI")])
        np.testing.assert_allclose(shown, expected, atol=2e-4)
        plain = RecurrencePlot().fit_transform(standardised(series)[0].numpy())
        np.testing.assert_allclose(shown, plain, atol=2e-4)
    assert found["always cloudy"]["plots"] is None
    assert "plots" not in found["outside"]


def rasterio_day(text: str) -> Any:
    return np.datetime64(text).astype(object)


@pytest.mark.parametrize("threshold", [None, 0.5, "point", "distance"])
@pytest.mark.parametrize("rule", ["calendar-year", "every-date"])
def test_the_stages_before_the_encoder_equal_those_of_the_graph(threshold: Any, rule: Any) -> None:
    random = np.random.default_rng(5)
    bands = ("B02", "B04", "B08", "B05", "B11", "B12")
    parameters = PlotParameters(
        indices=tuple(FORMULAS),
        time_window=TimeWindow(steps=36, step_days=10, start=rule),
        clarity=15.0,
        threshold=threshold,
        percentage=20.0,
    )
    values = random.uniform(0.0, 0.7, (20, 25, len(bands))).astype(np.float32)
    valid = random.random((20, 25)) < 0.7
    valid[0] = False
    values[1, 3:5] = np.nan
    days = np.sort(random.integers(0, 700, 25)).astype(np.float32)
    with torch.no_grad():
        expected, _, _ = graph_of(bands, parameters).regular(
            torch.tensor(values), torch.tensor(valid), torch.tensor(days)
        )
        plots = recurrence_plot(standardised(expected), threshold=threshold, percentage=20.0)
    series = regular_series(values, valid, days, bands=bands, parameters=parameters)
    np.testing.assert_allclose(series, expected, atol=2e-5)
    assert np.isnan(series[0]).all()
    # From one series, so that rounding cannot move a distance across the threshold.
    made = recurrence_plots(expected.numpy(), parameters)
    differs = np.abs(made[1:] - plots[1:].numpy()) > 1e-5
    assert differs.mean() < (1e-3 if isinstance(threshold, str) else 1e-9)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_every_index_is_that_of_the_graph(name: str) -> None:
    needs, formula = FORMULAS[name]
    bands = {band: np.float32([0.1, 0.3, 0.02]) * (n + 1) for n, band in enumerate(needs)}
    numerator, denominator = formula(*(torch.tensor(bands[band]) for band in needs))
    expected = (numerator / denominator).clamp(-1.5, 1.5).numpy()
    known = denominator.numpy() > 0.05
    found = spectral_index(name, bands)
    np.testing.assert_allclose(found[known], expected[known], rtol=1e-5)
    assert np.isnan(found[~known]).all()


def test_the_cards_of_the_zoo_state_their_plots() -> None:
    read = 0
    for path in sorted(ZOO.glob("*/card.json")):
        card = ModelCard.model_validate_json(path.read_text("utf-8"))
        if card.modality == "patch":
            with pytest.raises(InvalidRequest, match="has no parameters of recurrence plots"):
                PlotParameters.of(card)
            continue
        parameters = PlotParameters.of(card)
        assert parameters.indices == card.indices
        assert parameters.clarity == card.training["config"].get("clarity", 0.0)
        read += 1
    assert read


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        ({}, "invalid_request", "either `points` or `fields`"),
        ({"start": "2021-01-01", "points": points()}, "invalid_request", "plots=true"),
        (
            {"plots": "true", "points": points()},
            "invalid_request",
            "has no parameters of recurrence plots",
        ),
        ({"plots": "true", "points": points(), "model": "nothing"}, "unknown_model", "nothing"),
        ({"plots": "true", "points": points(), "model": "embed-patch"}, "wrong_task", "patch"),
        ({"outputs": "class", "points": points()}, "invalid_request", "outputs"),
    ],
)
def test_parameters_that_do_not_fit_are_rejected(
    api: httpx.Client, stack: list[SourceFile], data: dict[str, Any], code: str, message: str
) -> None:
    response = measured(api, stack, **data)
    assert response.json()["code"] == code, response.text
    assert message in response.text


def test_plots_fit_no_table_and_not_any_number_of_places(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    options = {"plots": "true", "model": "embed-plots"}
    for table in ("text/csv", "application/vnd.apache.parquet"):
        response = measured(api, stack, accept=table, points=points(), **options)
        assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    many = points()
    many["features"] *= MAX_PLOTS
    response = measured(api, stack, points=many, **options)
    assert response.status_code == 422
    assert f"at most {MAX_PLOTS}" in response.json()["detail"]


def test_a_band_that_not_every_date_has_is_left_out(
    api: httpx.Client, stack: list[SourceFile], tmp_path: Path
) -> None:
    values = np.full((1, H, W), 1500, np.uint16)
    more = [write(tmp_path / f"s_{day}_B11.tif", values, nodata=0) for day in DAYS[:-1]]
    apart = []
    for source in stack:
        with rasterio.open(source.path) as file:
            for name, band in zip(BANDS, file.read(), strict=True):
                apart.append(write(tmp_path / f"{source.path.stem}_{name}.tif", band[None]))
    document = measured(api, [*apart, *more], points=points()).json()
    assert document["bands"] == ["B02", "B04", "B08", "B03"]
    unused = [w["detail"] for w in document["warnings"] if w["code"] == "files_unused"]
    assert "B11, and not every date has them" in unused[0]
    last = write(tmp_path / f"s_{DAYS[-1]}_B11.tif", values, nodata=0)
    document = measured(api, [*apart, *more, last], points=points()).json()
    assert document["bands"] == ["B02", "B04", "B08", "B03", "B11"]
    assert document["features"][0]["properties"]["B11"][0] in {0.15, None}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_sdk_returns_the_series(api: httpx.Client, stack: list[SourceFile], kind: str) -> None:
    files = [source.path for source in stack]
    with connected(kind, str(api.base_url)) as client:
        found = client.measure(files, fields=polygons(), plots=True, model="embed-plots")
        with pytest.raises(ValueError, match="either points or fields"):
            client.measure(files)
    document = measured(api, stack, fields=polygons(), plots="true", model="embed-plots").json()
    assert found.document == document
    assert [day.isoformat() for day in found.dates] == DAYS
    assert [place["id"] for place in found] == list(SHAPES)
    assert found.plots(0)["NDVI"].shape == (36, 36)
    assert found.plots(3) == {}
    frame = found.to_pandas()
    assert list(frame.columns) == ["id", "status", "date", "clear", *found.bands, *found.indices]
    large = frame[frame["id"] == "large"]
    assert large["NDVI"].tolist() == document["features"][0]["properties"]["NDVI"]
    assert large["date"].dt.strftime("%Y-%m-%d").tolist() == DAYS


def test_the_command_writes_a_table(
    api: httpx.Client, stack: list[SourceFile], tmp_path: Path
) -> None:
    fields, out = tmp_path / "fields.geojson", tmp_path / "series.csv"
    fields.write_text(json.dumps(polygons()))
    files = [str(source.path) for source in stack]
    arguments = ["--url", str(api.base_url), "measure", *files, "--fields", str(fields)]
    done = CliRunner().invoke(app, [*arguments, "-o", str(out)])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["date"] for row in rows if row["id"] == "large"] == DAYS
    printed = CliRunner().invoke(app, arguments)
    assert json.loads(printed.stdout)["dates"] == DAYS
    assert CliRunner().invoke(app, ["measure", *files]).exit_code != 0


def test_properties_named_as_results_do_not_change_the_table(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    """Also of a place that is outside, which has no series of its own."""
    document = polygons()
    for feature in document["features"]:
        feature["properties"] |= {"dates": ["2019-07-01"], "B04": [1, 2, 3]}
    response = measured(api, stack, fields=document)
    assert "properties_replaced" in [one["code"] for one in response.json()["warnings"]]
    for fields in (document, polygons()):
        answer = measured(api, stack, accept="text/csv", fields=fields)
        assert answer.status_code == 200, answer.text
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        assert [row["date"] for row in rows if row["id"] == "large"] == DAYS
        (outside,) = (row for row in rows if row["id"] == "outside")
        assert (outside["date"], outside["B04"]) == ("", "")
