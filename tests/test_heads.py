"""Own classes over a real socket: made, served, listed, owned, removed, kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio
import rasterio.warp
from affine import Affine
from typer.testing import CliRunner

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from pimc_client import NameTaken, Series, TooFewLabels, cli
from service.jobs.backup import back_up, restore
from tests.kits.client import connected
from tests.kits.jobs import ASYNC, running, waited
from tests.kits.rasters import NORTH_UP, UTM, write

KEYS = ("k" * 32, "l" * 32)
DATES = ("2021-01-15", "2021-03-15", "2021-05-15", "2021-07-15", "2021-09-15", "2021-11-15")
BANDS = ("B02", "B03", "B04", "B08", "SCL")
SIDE, CLOUDY = 48, 6
"""Side of the raster, and of the corner that is never clear."""
NAMES = ("maize", "wheat", "forest")


def truth() -> np.ndarray:
    """Vertical stripes of three classes, in blocks."""
    rows, cols = np.mgrid[:SIDE, :SIDE]
    return (rows // 8 + cols // 8) % 3


def reflectance() -> np.ndarray:
    """(T, 4, H, W) of plants that are green at different times of the year."""
    random = np.random.default_rng(1)
    season = np.array([[0, 0, 0.2, 1, 0.6, 0], [0.2, 0.6, 1, 0.3, 0, 0.1], [0.8] * 6])
    green = season[truth()].transpose(2, 0, 1)
    red, nir = 0.2 - 0.16 * green, 0.22 + 0.25 * green
    values = np.stack([0.6 * red, 0.8 * red, red, nir], axis=1)
    return np.clip(values + random.normal(0, 0.02, values.shape), 0.005, 0.9)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Any]]:
    folder = tmp_path_factory.mktemp("stack")
    scl = np.full((1, SIDE, SIDE), 4, np.uint16)
    scl[0, :CLOUDY, :CLOUDY] = 9
    sent = []
    for day, values in zip(DATES, reflectance(), strict=True):
        bands = np.concatenate([(values * 1e4).astype(np.uint16), scl])
        path = write(folder / f"scene_{day}.tif", bands, descriptions=BANDS, nodata=0).path
        sent.append(("files", (path.name, path.read_bytes(), "image/tiff")))
    return sent


def degrees(row: float, col: float) -> list[float]:
    x, y = NORTH_UP * (col, row)
    (lon,), (lat,) = rasterio.warp.transform(UTM, "EPSG:4326", [x], [y])
    return [lon, lat]


def point(row: int, col: int, name: object, **more: object) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": {"type": "Point", "coordinates": degrees(row + 0.5, col + 0.5)},
        "properties": {"class": name, **more},
    }


def square(row: int, col: int, side: int, name: str) -> dict[str, Any]:
    corners = [(0, 0), (0, side), (side, side), (side, 0), (0, 0)]
    ring = [degrees(row + r, col + c) for r, c in corners]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"class": name},
    }


def collection(features: list[dict[str, Any]]) -> str:
    return json.dumps({"type": "FeatureCollection", "features": features})


def labelled(count: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """Points of each class, none of them under the clouds."""
    random = np.random.default_rng(seed)
    found = []
    for value, name in enumerate(NAMES):
        rows, cols = np.nonzero(truth()[CLOUDY:, CLOUDY:] == value)
        chosen = random.permutation(len(rows))[:count]
        found += [point(rows[n] + CLOUDY, cols[n] + CLOUDY, name) for n in chosen]
    return found


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    zoo = write_zoo(tmp_path_factory.mktemp("zoo"))
    with served(model_dir=zoo, api_keys=KEYS, max_fields=200) as client:
        client.headers["X-API-Key"] = KEYS[0]
        yield client


def make(api: httpx.Client, files, features, name: str = "mine", **data: str) -> httpx.Response:
    return api.post(
        "/heads", files=files, data={"name": name, "labels": collection(features), **data}
    )


@pytest.fixture(scope="module")
def made(api: httpx.Client, files) -> dict[str, Any]:
    response = make(api, files, labelled(), name="my-crops", description="three crops")
    assert response.status_code == 201, response.text
    assert response.headers["Location"] == "/models/my-crops"
    assert response.headers["PIMC-Model"] == "my-crops@1.0.0"
    assert response.headers["PIMC-Provider"] == api.get("/health/ready").json()["provider"]
    assert response.headers["Server-Timing"].startswith("read;dur=")
    return dict(response.json())


def class_map(api: httpx.Client, files, model: str) -> np.ndarray:
    response = api.post("/classify-pixels", files=files, data={"model": model})
    assert response.status_code == 200, response.text
    with rasterio.MemoryFile(response.content) as file, file.open() as raster:
        return raster.read(1)


def test_the_map_is_of_the_classes_taught(api, files, made) -> None:
    found = class_map(api, files, "my-crops")
    cloudy = np.zeros((SIDE, SIDE), bool)
    cloudy[:CLOUDY, :CLOUDY] = True
    assert (found[cloudy] == 255).all()
    assert (found == truth())[~cloudy].mean() > 0.97


def test_the_card_states_what_it_was_made_of(api, made) -> None:
    card = made["card"]
    assert card == api.get("/models/my-crops").json() == api.get("/models/my-crops@1.0.0").json()
    assert card["description"] == "three crops"
    assert card["bands"] == ["B02", "B03", "B04", "B08"]
    assert {c["name"] for c in card["classes"]} == set(NAMES)
    assert len({c["color"] for c in card["classes"]}) == 3
    assert card["pixel_size"] == [pytest.approx(10, abs=0.1)] * 2
    assert card["intended_use"].startswith("A map of your own classes near your labels.")
    ((west, south, east, north),) = card["extent"]
    places = np.array([f["geometry"]["coordinates"] for f in labelled()])
    box = [*places.min(axis=0), *places.max(axis=0)]
    assert [west, south, east, north] == pytest.approx(box, abs=1e-6)
    metrics = card["metrics"]
    assert metrics["n"] == 60
    assert metrics["labels"] == dict.fromkeys(NAMES, 20)
    assert np.array(metrics["confusion"]).sum() == 60
    low, high = metrics["macro_f1_interval"]
    assert 0.8 < low <= metrics["macro_f1"] <= high <= 1
    assert 0 <= metrics["ece"] < 0.2
    assert metrics["places"] > 3
    assert metrics["separation_pixels"] >= 1.5
    assert card["training_data"][0]["n"] == 60
    assert "6 dates from 2021-01-15 to 2021-11-15" in card["training_data"][0]["source"]


def test_a_map_far_from_the_labels_has_a_warning(api, tmp_path, made) -> None:
    for place, warned in ((5e5, False), (5.9e5, False), (8e5, True)):
        sent = []
        for day, values in zip(DATES, reflectance(), strict=True):
            path = tmp_path / f"scene_{day}.tif"
            moved = Affine(10, 0, place, 0, -10, NORTH_UP.f)
            write(path, (values * 1e4).astype(np.uint16), descriptions=BANDS[:4], transform=moved)
            sent.append(("files", (path.name, path.read_bytes(), "image/tiff")))
        answer = api.post(
            "/classify-pixels",
            files=sent,
            data={"model": "my-crops"},
            headers={"Accept": "application/json"},
        ).json()
        codes = {one["code"]: one["detail"] for one in answer["warnings"]}
        assert ("outside_training" in codes) is warned
        if warned:
            assert "'my-crops@1.0.0' was trained on. A map of your own" in codes["outside_training"]


def test_the_scores_are_those_of_labels_that_it_never_saw(api, files) -> None:
    """Classes that a place predicts by chance do not raise the score."""
    random = np.random.default_rng(2)
    features = labelled(30)
    names = [f["properties"]["class"] for f in features]
    for feature, name in zip(features, random.permutation(names), strict=True):
        feature["properties"]["class"] = name
    response = make(api, files, features, name="chance")
    assert response.json()["card"]["metrics"]["macro_f1"] < 0.55
    assert api.delete("/heads/chance").status_code == 204


def test_every_way_of_asking_gives_the_same_class(api, files, made) -> None:
    found = class_map(api, files, "my-crops")
    points = api.post(
        "/classify-pixels",
        files=files,
        data={
            "model": "my-crops",
            "points": collection([point(20, 30, "?"), point(40, 10, "?"), point(1, 1, "?")]),
        },
    ).json()["features"]
    names = [c["name"] for c in made["card"]["classes"]]
    warnings = [p["properties"]["class"] for p in points[:2]]
    assert warnings == [names[found[20, 30]], names[found[40, 10]]]
    assert points[2]["properties"]["status"] == "no_data"
    field = api.post(
        "/classify-pixels",
        files=files,
        data={"model": "my-crops", "fields": collection([square(16, 24, 8, "?")])},
    ).json()["features"][0]["properties"]
    assert field["class"] == NAMES[truth()[16, 24]]
    series = {
        "id": "a",
        "dates": DATES,
        **{
            band: [round(float(v), 4) for v in values]
            for band, values in zip(BANDS, reflectance()[:, :, 20, 30].T, strict=False)
        },
    }
    one = api.post("/classify-pixels", json={"series": [series], "model": "my-crops"}).json()
    assert one["results"][0]["class"] == names[found[20, 30]]
    job = api.post("/classify-pixels", files=files, data={"model": "my-crops"}, headers=ASYNC)
    assert waited(api, job.json()["jobID"])["status"] == "successful"
    response = api.get(f"/jobs/{job.json()['jobID']}/result")
    with rasterio.MemoryFile(response.content) as file, file.open() as raster:
        np.testing.assert_array_equal(raster.read(1), found)


def test_a_model_belongs_to_the_key_that_made_it(api, files, made) -> None:
    other = {"X-API-Key": KEYS[1]}
    assert [c["name"] for c in api.get("/heads").json()["heads"]] == ["my-crops"]
    assert "my-crops" in [c["name"] for c in api.get("/models").json()["models"]]
    assert api.get("/heads", headers=other).json() == {"heads": []}
    assert "my-crops" not in api.get("/models", headers=other).text
    for response in (
        api.get("/models/my-crops", headers=other),
        api.delete("/heads/my-crops", headers=other),
        api.post("/classify-pixels", files=files, data={"model": "my-crops"}, headers=other),
    ):
        assert (response.status_code, response.json()["code"]) == (404, "unknown_model")
        assert "my-crops@" not in response.text
    assert class_map(api, files, "my-crops").shape == (SIDE, SIDE)


def test_a_name_can_be_used_again_once_its_model_is_removed(api, files) -> None:
    assert make(api, files, labelled(6), name="brief").status_code == 201
    taken = make(api, files, labelled(6), name="brief")
    assert (taken.status_code, taken.json()["code"]) == (409, "name_taken")
    assert api.delete("/heads/brief").status_code == 204
    assert api.delete("/heads/brief").status_code == 404
    assert api.get("/models/brief").status_code == 404
    assert make(api, files, labelled(6), name="brief").status_code == 201
    assert api.delete("/heads/brief").status_code == 204


def test_a_built_in_model_cannot_be_removed_or_replaced(api, files) -> None:
    assert api.delete("/heads/pixels-landcover").status_code == 404
    response = make(api, files, labelled(6), name="pixels-landcover")
    assert (response.status_code, response.json()["code"]) == (409, "name_taken")


def test_polygons_teach_as_points_do(api, files) -> None:
    squares = [
        square(r * 8 + 1, c * 8 + 1, 5, NAMES[truth()[r * 8, c * 8]])
        for r in range(1, 6)
        for c in range(1, 6)
    ]
    response = make(api, files, squares, name="squares")
    assert response.status_code == 201, response.text
    metrics = response.json()["card"]["metrics"]
    assert sum(metrics["labels"].values()) == 25
    assert metrics["n"] == 25 * 16
    assert metrics["places"] <= 25
    assert metrics["macro_f1"] > 0.9
    order = [NAMES.index(c["name"]) for c in response.json()["card"]["classes"]]
    found = class_map(api, files, "squares")
    right = np.array([*order, *[-1] * 253])[found] == truth()
    assert right.mean() > 0.95
    assert api.delete("/heads/squares").status_code == 204


def test_labels_may_come_as_a_file_with_places(api, files) -> None:
    features = labelled(12)
    for n, feature in enumerate(features):
        feature["properties"]["place"] = f"farm-{n % 4}"
    sent = [*files, ("labels", ("labels.geojson", collection(features).encode(), "text/plain"))]
    response = api.post("/heads", files=sent, data={"name": "farms"})
    assert response.status_code == 201, response.text
    assert response.json()["card"]["metrics"]["places"] == 4
    assert response.json()["card"]["metrics"]["separation_pixels"] is None
    assert api.delete("/heads/farms").status_code == 204


def test_series_teach_without_a_raster(api, files, made) -> None:
    values = reflectance()
    series = []
    for feature in labelled(10, seed=4):
        (x,), (y,) = rasterio.warp.transform(
            "EPSG:4326",
            UTM,
            *([coordinate] for coordinate in feature["geometry"]["coordinates"]),
        )
        col, row = ~NORTH_UP * (x, y)
        own = values[:, :, int(row), int(col)]
        series.append(
            {
                "dates": DATES,
                "class": feature["properties"]["class"],
                **dict(zip(("lon", "lat"), feature["geometry"]["coordinates"], strict=True)),
                **{b: own[:, i].tolist() for i, b in enumerate(BANDS[:4])},
            }
        )
    response = api.post("/heads", json={"name": "by-series", "series": series})
    assert response.status_code == 201, response.text
    assert [w["code"] for w in response.json()["warnings"]] == ["places_unknown"]
    places = np.array([(one["lon"], one["lat"]) for one in series])
    box = [*places.min(axis=0), *places.max(axis=0)]
    assert response.json()["card"]["extent"] == [pytest.approx(box)]
    same = class_map(api, files, "by-series") == class_map(api, files, "my-crops")
    assert same.mean() > 0.9
    assert api.delete("/heads/by-series").status_code == 204
    for one in series:
        del one["B08"], one["B03"]
    lacking = api.post("/heads", json={"name": "by-series", "series": series})
    assert (lacking.status_code, lacking.json()["code"]) == (422, "missing_bands")


def test_an_embedding_may_be_tried_and_is_checked(api, files) -> None:
    response = make(api, files, labelled(8), name="embedded", embedding="embed-pixel")
    assert response.status_code == 201, response.text
    assert response.json()["card"]["training"]["features"] in {
        "series",
        "embedding",
        "series and embedding",
    }
    assert (class_map(api, files, "embedded") == truth()).mean() > 0.6
    assert api.delete("/heads/embedded").status_code == 204
    wrong = make(api, files, labelled(8), name="embedded", embedding="pixels-landcover")
    assert (wrong.status_code, wrong.json()["code"]) == (422, "wrong_task")


OUTSIDE = [point(-50 - n, 5, "wheat") for n in range(6)]
CLOUDED = [point(n % 5, n // 5, "wheat") for n in range(6)]
MAIZE = [f for f in labelled(8) if f["properties"]["class"] == "maize"]


@pytest.mark.parametrize(
    ("features", "code", "message"),
    [
        (MAIZE, "too_few_labels", "all labels are of the class 'maize'"),
        (
            [*MAIZE, *[f for f in labelled(4) if f["properties"]["class"] == "wheat"]],
            "too_few_labels",
            "class 'wheat' has 4 usable labels of 4 (",
        ),
        ([*MAIZE, *OUTSIDE], "too_few_labels", "6 outside the raster"),
        (
            [*OUTSIDE, *[point(-90, n, "maize") for n in range(5)]],
            "too_few_labels",
            "0 usable labels of 6 (6 outside the raster",
        ),
        ([*MAIZE, *CLOUDED], "too_few_labels", "6 with too few clear dates"),
        ([*MAIZE, point(9, 9, None)], "invalid_request", "no property `class`"),
        ([*MAIZE, point(9, 9, "x" * 101)], "invalid_request", "101 characters"),
        ([*MAIZE, point(9, 9, ["a"])], "invalid_request", "not a text or a number"),
        (
            [*labelled(6), point(9, 9, "maize", place="here")],
            "invalid_request",
            "for all labels or for none",
        ),
        (
            [{"type": "Feature", "geometry": None, "properties": {"class": "a"}}],
            "invalid_fields",
            "Point",
        ),
        (labelled(80), "too_many_fields", "200"),
    ],
)
def test_labels_of_no_use_are_refused(api, files, features, code, message) -> None:
    response = make(api, files, features)
    assert response.status_code in {413, 422}
    assert response.json()["code"] == code
    assert message in response.json()["detail"]
    assert api.get("/models/mine").status_code == 404


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "My crops", "labels": collection(MAIZE)}, "name"),
        ({"name": "../zoo", "labels": collection(MAIZE)}, "name"),
        ({"labels": collection(MAIZE)}, "name"),
        ({"name": "mine"}, "labels"),
        ({"name": "mine", "labels": collection(MAIZE), "model": "x"}, "model"),
    ],
)
def test_a_request_that_is_not_whole_is_refused(api, files, data, message) -> None:
    response = api.post("/heads", files=files, data=data)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert message in response.json()["detail"]


def test_what_weakens_a_model_is_warned_of(api, files) -> None:
    near = [point(24 + n // 3, 24 + n % 3, "grass") for n in range(6)]
    both = [point(30, 30, "wheat"), point(30, 30, "maize")]
    features = [*labelled(8), *near, *both, *OUTSIDE[:2], *CLOUDED[:3]]
    response = make(api, files, features)
    assert response.status_code == 201, response.text
    warnings = {w["code"]: w["detail"] for w in response.json()["warnings"]}
    assert "class 'grass' has 1 place, and without it" in warnings["few_places"]
    assert warnings["labels_conflict"].startswith("1 pixels have labels of several classes")
    assert warnings["label_outside"].startswith("2 of ")
    assert warnings["label_cloudy"].startswith("3 of ")
    assert any(h.startswith("few_places; ") for h in response.headers.get_list("PIMC-Warning"))
    assert api.delete("/heads/mine").status_code == 204


@pytest.fixture
def stack(tmp_path: Path, files) -> Path:
    folder = tmp_path / "stack"
    folder.mkdir()
    for _, (name, content, _) in files:
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_sdk_teaches(api, stack, kind: str) -> None:
    labels = json.loads(collection([*labelled(8), *OUTSIDE[:2]]))
    with connected(kind, str(api.base_url), api_key=KEYS[1]) as pimc:
        taught = pimc.teach("sdk", stack, labels, description="by the SDK", mask="scl")
        assert taught.model.id == "sdk@1.0.0"
        assert taught.model.description == "by the SDK"
        assert [w.code for w in taught.warnings] == ["label_outside"]
        assert [model.name for model in pimc.own_models()] == ["sdk"]
        found = pimc.classify_pixels(stack, model="sdk")
        assert {c.name for c in found.legend.values()} == set(NAMES)
        assert (found.array == truth()).mean() > 0.9
        with pytest.raises(NameTaken):
            pimc.teach("sdk", stack, labels)
        with pytest.raises(TooFewLabels):
            pimc.teach("other", stack, json.loads(collection(MAIZE)))
        pimc.delete_model("sdk")
        assert pimc.own_models() == ()


@pytest.mark.slow
def test_the_sdk_teaches_from_series(api) -> None:
    values = reflectance()
    chosen = [(r, c) for r in range(8, 40, 8) for c in range(8, 40, 8)]
    series = [
        Series(id=f"{r}-{c}", dates=DATES, **dict(zip(BANDS, values[:, :, r, c].T, strict=False)))
        for r, c in chosen
    ]
    classes = ["forest" if truth()[place] == 2 else "field" for place in chosen]
    with connected("sync", str(api.base_url), api_key=KEYS[1]) as pimc:
        taught = pimc.teach_series("by-series", series, classes, places=[str(r) for r, _ in chosen])
        assert taught.warnings == ()
        assert taught.model.metrics["places"] == 4
        assert taught.model.metrics["macro_f1"] > 0.9
        pimc.delete_model("by-series")
        with pytest.raises(ValueError, match="15 classes"):
            pimc.teach_series("by-series", series, classes[:-1])


@pytest.mark.slow
def test_the_command_teaches_and_forgets(api, stack, tmp_path) -> None:
    (tmp_path / "labels.geojson").write_text(collection(labelled(8)))
    run = partial(
        CliRunner().invoke, cli.app, env={"PIMC_URL": str(api.base_url), "PIMC_API_KEY": KEYS[1]}
    )
    done = run(["teach", "mine", str(stack), "--labels", str(tmp_path / "labels.geojson")])
    assert done.exit_code == 0, done.output
    assert "mine@1.0.0: macro-F1 " in done.output
    assert "on places left out, in folds" in done.output
    for name in NAMES:
        assert name in done.output
    assert run(["models"]).output.count("mine@1.0.0") == 1
    assert run(["forget", "mine"]).output == "mine removed\n"


def test_labels_of_one_place_are_scored_with_a_warning(api, files) -> None:
    features = labelled(8)
    for feature in features:
        feature["properties"]["place"] = "here"
    response = make(api, files, features)
    assert response.status_code == 201, response.text
    metrics = response.json()["card"]["metrics"]
    assert metrics["split"].startswith("labels of one place")
    assert metrics["macro_f1_interval"] is None
    assert [w["code"] for w in response.json()["warnings"]] == ["few_places"] * 3
    assert api.delete("/heads/mine").status_code == 204


@pytest.mark.slow
def test_files_may_be_named_instead_of_sent(tmp_path, files) -> None:
    for _, (name, content, _) in files:
        (tmp_path / name).write_bytes(content)
    items = [{"href": str(tmp_path / name)} for _, (name, _, _) in files]
    body = {"name": "named", "items": items, "labels": json.loads(collection(labelled(6)))}
    with served(allowed_roots=(tmp_path,)) as api:
        response = api.post("/heads", json=body)
        assert response.status_code == 201, response.text
        # Without keys the models are everybody's.
        assert [c["name"] for c in api.get("/heads").json()["heads"]] == ["named"]
    with served() as api:
        assert api.post("/heads", json=body).json()["code"] == "forbidden_reference"


@pytest.mark.slow
def test_a_backup_holds_the_models(tmp_path: Path, files) -> None:
    with served(state_dir=tmp_path / "state") as api:
        card = make(api, files, labelled(6)).json()["card"]
        (tmp_path / "state" / "heads" / ".new-half").mkdir()
        back_up(tmp_path / "state", tmp_path / "backup")
    assert [p.name for p in (tmp_path / "backup" / "heads").rglob("*")] == [
        "_",
        "mine",
        *(p.name for p in (tmp_path / "state" / "heads" / "_" / "mine").iterdir()),
    ]
    restore(tmp_path / "backup", tmp_path / "restored")
    with served(state_dir=tmp_path / "restored") as api:
        assert api.get("/models/mine").json() == card


@pytest.mark.slow
def test_a_model_outlives_kill_9(tmp_path: Path, files) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    with running(tmp_path / "state", zoo) as service:
        response = make(service.api, files, labelled(), name="kept")
        assert response.status_code == 201, response.text
        before = class_map(service.api, files, "kept")
        service.kill()
    # Files that a kill in the middle of a request leaves.
    half = tmp_path / "state" / "heads" / ".new-half"
    half.mkdir()
    (half / "model.onnx").write_bytes(b"half")
    with running(tmp_path / "state", zoo) as service:
        np.testing.assert_array_equal(class_map(service.api, files, "kept"), before)
        assert service.api.get("/models/kept").json() == response.json()["card"]
        assert not half.exists()
        assert service.api.delete("/heads/kept").status_code == 204
        service.kill()
    with running(tmp_path / "state", zoo) as service:
        assert service.api.get("/heads").json() == {"heads": []}


@pytest.mark.slow
def test_the_memory_of_a_fit_is_reserved(tmp_path: Path) -> None:
    dates = [f"2021-{month:02}-05" for month in range(1, 9)]
    entries = [
        {
            "class": ("bare", "green")[n % 2],
            "dates": dates,
            "B04": [0.1 + 0.1 * (n % 2)] * 8,
            "B08": [0.2 + 0.0001 * n] * 8,
        }
        for n in range(2000)
    ]
    with served(model_dir=write_zoo(tmp_path), memory_budget=128 * 2**20) as api:
        response = api.post("/heads", json={"name": "many", "series": entries})
        assert (response.status_code, response.json()["code"]) == (413, "raster_too_large")
        assert "the fit of 2 classes to 2000 labelled pixels" in response.json()["detail"]
        response = api.post("/heads", json={"name": "few", "series": entries[:200]})
        assert response.status_code == 201, response.text
        assert "pimc_memory_taken_bytes 0.0" in api.get("/metrics").text
