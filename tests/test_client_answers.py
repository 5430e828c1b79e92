"""Results of both clients: rasters written by rasterio, zips, GeoJSON, series, cards."""

from __future__ import annotations

import gc
import json
import math
import xml.etree.ElementTree as ET
from datetime import date

import httpx
import numpy as np
import pytest
import rasterio

from pimc_client import (
    Embedding,
    Forecast,
    LegendClass,
    PixelClass,
    Raster,
    Rasters,
    ServiceWarning,
    Summary,
    Unauthorized,
    UnexpectedAnswer,
    results,
)
from tests.kits.client import CARD, LEGEND, TRANSFORM, classes, cog, connected, zipped

KINDS = pytest.mark.parametrize("kind", ["sync", "async"])
COG = "image/tiff; application=geotiff; profile=cloud-optimized"
FILE = ("a.tif", b"x")
HEADERS = [
    ("X-Request-ID", "r-1"),
    ("PIMC-Model", "pixels-landcover@1.0.0"),
    ("PIMC-Provider", "CPUExecutionProvider"),
    ("Server-Timing", "read;dur=12.5, infer;dur=1000, write;dur=0.25"),
    ("PIMC-Warning", "merged_dates; 2 files of 2021-01-05, as one"),
    ("PIMC-Warning", "dates_outside_window; 1 of 9; not used"),
]


def transport(content, kind=COG, *, card=None, status=200, headers=HEADERS):
    """A transport that responds to a task with one body, and to `GET /models/…` with `card`."""

    def handle(request):
        if request.method == "GET" and "/models/" in request.url.path:
            problem = {"code": "unknown_model", "status": 404, "detail": "none"}
            return httpx.Response(200, json=card) if card else httpx.Response(404, json=problem)
        return httpx.Response(status, content=content, headers=[*headers, ("Content-Type", kind)])

    return httpx.MockTransport(handle)


def request(kind, method, content, mime=COG, *args, card=None, headers=HEADERS, **options):
    sent = transport(content, mime, card=card, headers=headers)
    with connected(kind, "http://test", transport=sent) as client:
        return getattr(client, method)(*(args or (FILE,)), **options)


def request_json(kind, method, document, *args, mime="application/json", **options):
    return request(kind, method, json.dumps(document).encode(), mime, *args, **options)


@KINDS
def test_a_class_map(kind, tmp_path):
    content = classes(PIMC_LEGEND=json.dumps(LEGEND))
    raster = request(kind, "classify_pixels", content)
    assert isinstance(raster, Raster)
    assert raster.name == "class"
    np.testing.assert_array_equal(raster.array, [[0, 1, 255], [1, 1, 0]])
    assert raster.array is raster.array
    assert raster.content == content
    assert raster.shape == (1, 2, 3)
    assert raster.crs == "EPSG:32631"
    assert raster.transform == tuple(TRANSFORM)[:6]
    assert raster.nodata == 255
    assert raster.descriptions == ("class",)
    assert raster.legend == {
        0: LegendClass(value=0, name="Tree cover", color="#006400", code=10),
        1: LegendClass(value=1, name="Grass & herbs", color="#ffff4c", code=None),
    }
    assert raster.header.colors[1] == "#ffff4c"
    saved = raster.save(tmp_path / "classes.tif")
    assert saved.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["classes.qml", "classes.tif"]
    with rasterio.open(saved) as file:
        np.testing.assert_array_equal(file.read(1), raster.array)


@KINDS
def test_a_class_map_is_saved_with_the_style_of_qgis(kind, tmp_path):
    raster = request(kind, "classify_pixels", classes(PIMC_LEGEND=json.dumps(LEGEND)))
    raster.save(tmp_path / "classes.tif")
    style = ET.fromstring((tmp_path / "classes.qml").read_text())  # noqa: S314 - ours
    assert [
        (e.get("value"), e.get("color"), e.get("label")) for e in style.iter("paletteEntry")
    ] == [
        ("0", "#006400", "Tree cover"),
        ("1", "#ffff4c", "Grass & herbs"),
    ]
    # The user's own style stays.
    (tmp_path / "classes.qml").write_text("mine")
    raster.save(tmp_path / "classes.tif")
    assert (tmp_path / "classes.qml").read_text() == "mine"


@KINDS
def test_a_forecast_is_saved_with_a_style_that_shows_one_band(kind, tmp_path):
    names = [f"NDVI_2021-11-05_{q}" for q in ("q10", "q50", "q90")]
    content = cog(np.ones((3, 5, 6), np.float32), descriptions=names, nodata=math.nan)
    request(kind, "forecast", content).save(tmp_path / "forecast.tif")
    style = ET.fromstring((tmp_path / "forecast.qml").read_text())  # noqa: S314 - ours
    (renderer,) = style.iter("rasterrenderer")
    assert (renderer.get("type"), renderer.get("band")) == ("singlebandpseudocolor", "1")
    stops = [float(item.get("value")) for item in renderer.iter("item")]
    assert (stops[0], stops[-1], stops) == (-0.1, 0.9, sorted(stops))


@KINDS
def test_every_result_states_model_provider_times_and_warnings(kind):
    raster = request(kind, "classify_pixels", classes())
    assert raster.model == "pixels-landcover@1.0.0"
    assert raster.provider == "CPUExecutionProvider"
    assert raster.request_id == "r-1"
    assert raster.timing == {"read": 0.0125, "infer": 1.0, "write": 0.00025}
    assert raster.warnings == (
        ServiceWarning(code="merged_dates", detail="2 files of 2021-01-05, as one"),
        ServiceWarning(code="dates_outside_window", detail="1 of 9; not used"),
    )


@KINDS
def test_a_map_without_a_legend_gets_the_legend_of_its_model(kind):
    raster = request(kind, "classify_pixels", classes(), card=CARD)
    assert [c.name for c in raster.legend.values()] == ["Tree cover", "Grass & herbs"]


@KINDS
def test_a_map_without_any_legend_is_returned(kind):
    raster = request(kind, "landcover", classes())
    assert raster.legend == {}
    assert raster.array.shape == (2, 3)


@KINDS
def test_a_forecast_has_a_band_for_each_date_and_quantile(kind):
    names = [f"NDVI_2021-11-0{day}_{q}" for day in (1, 2) for q in ("q10", "q50")]
    values = np.random.default_rng(0).normal(size=(4, 5, 6)).astype("float32")
    values[:, 0, 0] = np.nan
    content = cog(values, descriptions=names, nodata=math.nan)
    raster = request(kind, "forecast", content, outputs=["q10", "q50"])
    assert raster.name == "forecast"
    np.testing.assert_array_equal(raster.array, values)
    assert raster.descriptions == tuple(names)
    assert math.isnan(raster.nodata)
    assert raster.legend == {}


@KINDS
def test_several_outputs_are_returned_by_name(kind, tmp_path):
    confidence = np.full((1, 2, 3), 0.5, "float32")
    members = {
        "class__tif": classes(PIMC_LEGEND=json.dumps(LEGEND)),
        "class__tif__aux__xml": b"<PAMDataset/>",
        "confidence__tif": cog(confidence, descriptions=["confidence"]),
    }
    rasters = request(
        kind,
        "classify_pixels",
        zipped(**members),
        "application/zip",
        outputs=["class", "confidence"],
    )
    assert isinstance(rasters, Rasters)
    assert list(rasters) == ["class", "confidence"]
    assert len(rasters) == 2
    np.testing.assert_array_equal(rasters["confidence"].array, confidence[0])
    assert rasters["class"].legend[0].name == "Tree cover"
    assert rasters["class"] is rasters["class"]
    assert rasters["confidence"].name == "confidence"
    assert rasters.model == rasters["class"].model == "pixels-landcover@1.0.0"
    with pytest.raises(KeyError):
        rasters["entropy"]
    saved = rasters.save(tmp_path / "new" / "folder")
    assert [path.name for path in saved] == ["class.tif", "confidence.tif"]
    assert saved[0].read_bytes() == members["class__tif"]
    assert (tmp_path / "new" / "folder" / "class.tif.aux.xml").read_bytes() == b"<PAMDataset/>"


@KINDS
def test_names_in_a_zip_stay_inside_the_folder(kind, tmp_path):
    content = zipped(**{"../../class__tif": classes(), "/evil__xml": b"x"})
    folder = tmp_path / "in"
    request(kind, "classify_pixels", content, "application/zip", outputs=["class"]).save(folder)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")) == [
        "in/class.tif",
        "in/evil.xml",
    ]


@KINDS
def test_a_crs_without_a_code_is_none(kind):
    sinusoidal = "+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R=6371007.181 +units=m +no_defs"
    raster = request(kind, "embed", cog(np.zeros((2, 3, 3), "float32"), crs=sinusoidal))
    assert raster.crs is None
    assert raster.name == "embedding"


@KINDS
def test_a_large_result_is_on_disk_until_its_raster_is_closed(kind, monkeypatch):
    monkeypatch.setattr(results, "IN_MEMORY", 2**16)
    values = np.random.default_rng(1).random((1, 200, 200), dtype="float32")
    raster = request(kind, "classify_pixels", cog(values), outputs="confidence")
    assert raster._file._rolled
    np.testing.assert_array_equal(raster.array, values[0])
    file = raster._file
    del raster
    gc.collect()
    assert file.closed


@KINDS
def test_a_closed_raster_keeps_the_pixels_that_were_read(kind):
    with request(kind, "classify_pixels", classes()) as raster:
        array = raster.array
    assert raster.array is array
    with pytest.raises(ValueError, match="closed"):
        raster.save("nowhere.tif")


@KINDS
def test_a_summary_is_a_mapping(kind):
    document = {
        "model": "pixels-landcover@1.0.0",
        "valid_share": 0.75,
        "warnings": [{"code": "merged_dates", "detail": "two"}],
    }
    summary = request_json(kind, "classify_pixels", document, answer="summary")
    assert isinstance(summary, Summary)
    assert dict(summary) == document
    assert summary["valid_share"] == 0.75
    assert summary.warnings == (ServiceWarning(code="merged_dates", detail="two"),)
    assert summary.request_id == "r-1"


def collection(*properties):
    return {
        "type": "FeatureCollection",
        "model": "m@1.0.0",
        "warnings": [],
        "features": [
            {
                "type": "Feature",
                "geometry": {"type": "Point", "coordinates": [4.0 + n, 50.0]},
                "properties": one,
            }
            for n, one in enumerate(properties)
        ],
    }


@KINDS
@pytest.mark.parametrize("method", ["classify_pixels", "landcover"])
def test_points_have_classes(kind, method):
    document = collection(
        {
            "status": "ok",
            "class": "Tree cover",
            "value": 0,
            "confidence": 0.9,
            "entropy": 0.3,
            "probabilities": {"Tree cover": 0.9, "Grass & herbs": 0.1},
        },
        {"status": "no_data"},
        {"status": "outside"},
    )
    found = request_json(
        kind, method, document, mime="application/geo+json", points=[(4, 50), (5, 50), (6, 50)]
    )
    assert isinstance(found, list)
    assert found.model == "m@1.0.0"
    assert [(p.lon, p.lat, p.status) for p in found] == [
        (4.0, 50.0, "ok"),
        (5.0, 50.0, "no_data"),
        (6.0, 50.0, "outside"),
    ]
    assert found[0].result == PixelClass(
        id=None,
        status="ok",
        label="Tree cover",
        value=0,
        confidence=0.9,
        entropy=0.3,
        probabilities={"Tree cover": 0.9, "Grass & herbs": 0.1},
    )
    assert found[1].result.label is None
    assert found[2].result.probabilities == {}


FORECAST = {
    "dates": ["2021-11-05", "2021-11-15"],
    "NDVI": {"q10": [0.1, None], "q50": [0.2, 0.3], "q90": [0.3, 0.4]},
    "EVI": {"q50": [0.1, 0.1]},
    "SAVI": {"q50": [0.1, 0.1]},
}


def is_the_forecast(found):
    assert isinstance(found, Forecast)
    assert found.dates == (date(2021, 11, 5), date(2021, 11, 15))
    assert list(found.indices) == ["NDVI", "EVI", "SAVI"]
    np.testing.assert_array_equal(found["NDVI"]["q10"], [0.1, np.nan])
    assert found["NDVI"]["q50"].dtype == np.float64


@KINDS
def test_points_have_forecasts_and_embeddings(kind):
    document = collection({"status": "ok", **FORECAST}, {"status": "no_data"})
    found = request_json(kind, "forecast", document, mime="application/geo+json", points=[(4, 50)])
    is_the_forecast(found[0].result)
    assert found[1].result.dates == ()
    assert found[1].result.indices == {}
    document = collection({"status": "ok", "embedding": [1, 2.5]}, {"status": "outside"})
    found = request_json(kind, "embed", document, mime="application/geo+json", points=[(4, 50)])
    assert isinstance(found[0].result, Embedding)
    np.testing.assert_array_equal(found[0].result.values, [1, 2.5])
    assert found[1].result.values is None


@KINDS
def test_series_of_each_task_have_results(kind):
    def results(*records):
        return {"model": "m@1.0.0", "results": list(records), "warnings": []}

    # Like the example of the API's contract, without a status.
    record = {"id": "field-7", "class": "Maize", "confidence": 0.97, "probabilities": {"Maize": 1}}
    found = request_json(kind, "classify_series", results(record), [one_series()])
    assert found.model == "m@1.0.0"
    assert (found[0].id, found[0].label, found[0].status) == ("field-7", "Maize", "ok")
    found = request_json(kind, "forecast_series", results({"id": "f", **FORECAST}), [one_series()])
    is_the_forecast(found[0])
    found = request_json(
        kind, "embed_series", results({"id": "e", "embedding": [0, 1]}), [one_series()]
    )
    np.testing.assert_array_equal(found[0].values, [0, 1])


def one_series():
    from pimc_client import Series

    return Series(id="a", dates=["2021-01-01"], B02=[0.1], B04=[0.1], B08=[0.3])


@KINDS
def test_the_registry_and_a_card_are_parsed(kind):
    document = {"models": [CARD], "defaults": {"classify-pixels": "pixels-landcover"}}
    content = json.dumps(document).encode()
    with connected(kind, "http://test", transport=transport(content, "application/json")) as client:
        models = client.models()
    assert len(models) == 1
    assert [m.id for m in models] == ["pixels-landcover@1.0.0"]
    assert models.defaults == {"classify-pixels": "pixels-landcover"}
    card = models["pixels-landcover"]
    assert card.window.start == "calendar-year"
    assert card.legend[0].code == 10
    assert card.card == CARD
    with connected(kind, "http://test", transport=transport(b"", card=CARD)) as client:
        assert client.model("pixels-landcover") == card


@KINDS
def test_readiness_is_true_or_has_the_reason(kind):
    body = {"status": "ready", "provider": "CPUExecutionProvider", "models": ["a@1.0.0"]}
    content = json.dumps(body).encode()
    with connected(kind, "http://test", transport=transport(content, "application/json")) as client:
        found = client.ready()
    assert found
    assert (found.provider, found.models) == ("CPUExecutionProvider", ("a@1.0.0",))


@KINDS
def test_an_error_has_all_members_of_the_problem_document(kind):
    problem = {
        "type": "urn:x", "title": "Unauthorized", "status": 401, "code": "unauthorized",
        "detail": "a key is needed", "request_id": "r-9",
    }  # fmt: skip
    sent = transport(json.dumps(problem).encode(), "application/problem+json", status=401)
    with (
        connected(kind, "http://test", transport=sent, api_key="hush") as client,
        pytest.raises(Unauthorized) as caught,
    ):
        client.classify_pixels(FILE)
    assert caught.value.request_id == "r-9"
    assert "hush" not in repr(client)
    assert "hush" not in str(caught.value)


@KINDS
@pytest.mark.parametrize(
    ("content", "mime"),
    [
        (b"<html>hello</html>", "text/html"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"no zip", "application/zip"),
        (b"no tiff", COG),
        (b'{"type": "FeatureCollection"}', "application/geo+json"),
    ],
)
def test_a_response_that_no_route_sends_is_an_error(kind, content, mime):
    with pytest.raises(UnexpectedAnswer):
        request(kind, "classify_pixels", content, mime)
    with pytest.raises(UnexpectedAnswer):
        request(kind, "classify_series", content, mime, [one_series()])
