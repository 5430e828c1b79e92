"""The `pimc` command: requests, files, output and failures."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rich.console import Console

from pimc_client.cli import _bars, main
from tests.kits.client import CARD, LEGEND, Reply, classes, serving, without_pauses, zipped
from tests.kits.marks import in_all_tests

ROOT = Path(__file__).parents[1]
COG = {
    "Content-Type": "image/tiff; application=geotiff; profile=cloud-optimized",
    "PIMC-Model": "pixels-landcover@1.0.0",
    "PIMC-Warning": "merged_dates; two files of one day",
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "2021-01-05.tif"
    path.write_bytes(b"pixels")
    return str(path)


@pytest.fixture
def pimc(monkeypatch, capsys):
    """Runs `pimc` with arguments; returns the exit code, stdout and stderr."""

    def run(url, *arguments, **environment):
        for name, value in {"PIMC_URL": url, **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["pimc", *map(str, arguments)])
        with without_pauses(), pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        # `sys.exit(text)` is printed, and 1, by the interpreter itself.
        text = end.value.code if isinstance(end.value.code, str) else ""
        return (1 if text else end.value.code or 0), out, err + text

    return run


def unwrapped(text):
    """The text of an error message by typer, without its box and line ends."""
    return " ".join(text.replace("│", " ").split())


def as_json(document, status=200):
    return Reply(status, json.dumps(document).encode(), {"Content-Type": "application/json"})


def test_a_class_map_is_written_to_a_file(pimc, file, tmp_path):
    out = tmp_path / "out.tif"
    with serving(lambda _: Reply(body=classes(), headers=COG)) as (url, received):
        code, printed, warned = pimc(
            url, "classify-pixels", file, "-o", out, "--dates", "2021-01-05", "--mask", "none",
            "--scale", "0.0001", PIMC_API_KEY="secret",
        )  # fmt: skip
    assert code == 0
    assert str(out) in printed.replace("\n", "")
    assert "pixels-landcover@1.0.0" in printed
    assert "merged_dates: two files of one day" in warned
    with rasterio.open(out) as raster:
        np.testing.assert_array_equal(raster.read(1), [[0, 1, 255], [1, 1, 0]])
    posted = received[0]
    assert posted.path == "/classify-pixels"
    assert posted.headers["authorization"] == "Bearer secret"
    assert b'name="dates"\r\n\r\n2021-01-05\r\n' in posted.body
    assert b'name="mask"\r\n\r\nnone\r\n' in posted.body
    assert f'filename="{tmp_path.name}/2021-01-05.tif"'.encode() in posted.body


def test_several_outputs_are_written_to_a_folder(pimc, file, tmp_path):
    body = zipped(class__tif=classes(), confidence__tif=classes())
    reply = Reply(body=body, headers={"Content-Type": "application/zip"})
    with serving(lambda _: reply) as (url, received):
        code, *_ = pimc(
            url, "landcover", file, "-o", tmp_path / "maps", "--output", "class, confidence",
            "--stride", "16",
        )  # fmt: skip
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == ["class.tif", "confidence.tif"]
    assert b'name="outputs"\r\n\r\nclass,confidence\r\n' in received[0].body
    assert b'name="stride"\r\n\r\n16\r\n' in received[0].body


def test_a_summary_and_points_are_printed(pimc, file, tmp_path):
    with serving(lambda _: as_json({"valid_share": 0.5, "été": 1})) as (url, _):
        code, out, _ = pimc(url, "forecast", file, "--summary", "--horizon", "3")
    assert code == 0
    assert json.loads(out) == {"valid_share": 0.5, "été": 1}
    points = tmp_path / "points.json"
    feature = {
        "type": "Feature",
        "geometry": {"type": "Point", "coordinates": [4, 50]},
        "properties": {"status": "no_data"},
    }
    document = {"type": "FeatureCollection", "features": [feature]}
    points.write_text(json.dumps(document))
    with serving(lambda _: as_json(document)) as (url, received):
        code, out, _ = pimc(url, "embed", file, "--points", points, "--modality", "patch")
    assert code == 0
    assert json.loads(out) == [{"lon": 4, "lat": 50, "status": "no_data"}]
    assert b'"coordinates": [4, 50]' in received[0].body


def test_the_registry_is_printed(pimc):
    documents = {
        "/models": as_json({"models": [CARD], "defaults": {"classify-pixels": "pixels-landcover"}}),
        "/models/pixels-landcover": as_json(CARD),
    }
    with serving(lambda request: documents[request.path]) as (url, _):
        code, table, _ = pimc(url, "models")
        assert code == 0
        assert table.split()[:5] == ["model", "task", "bands", "classes", "default"]
        assert "pixels-landcover@1.0.0  classify-pixels  B02 B04 B08  2" in table
        _, listed, _ = pimc(url, "models", "--json")
        assert json.loads(listed) == [CARD]
        _, card, _ = pimc(url, "model", "pixels-landcover")
        assert json.loads(card) == CARD


def test_readiness_is_the_exit_code(pimc):
    up = as_json({"status": "ready", "provider": "CPUExecutionProvider", "models": ["a@1.0.0"]})
    with serving(lambda _: up) as (url, _):
        code, out, _ = pimc(url, "ready")
    assert code == 0
    assert "CPUExecutionProvider" in out
    down = as_json({"code": "not_ready", "status": 503, "detail": "loading"}, 503)
    with serving(lambda _: down) as (url, _):
        code, _, err = pimc(url, "ready")
    assert code == 1
    assert "not ready: loading" in err


def test_an_error_is_one_line_with_the_request_id(pimc, file, tmp_path):
    problem = {
        "code": "missing_dates", "status": 422, "request_id": "r-77",
        "detail": "8 files\nbut 7 dates",
    }  # fmt: skip
    with serving(lambda _: as_json(problem, 422)) as (url, _):
        code, out, err = pimc(url, "classify-pixels", file, "-o", tmp_path / "out.tif")
    assert code == 1
    assert out == ""
    assert err == "pimc: missing_dates: 8 files but 7 dates [request r-77]"
    assert not (tmp_path / "out.tif").exists()


def test_no_server_and_an_invalid_url_are_errors(pimc, monkeypatch):
    code, _, err = pimc("http://127.0.0.1:9", "ready")
    assert code == 1
    assert err.startswith("pimc: http://127.0.0.1:9/ cannot be reached")
    code, _, err = pimc("localhost", "models")
    assert code == 1
    assert err.startswith("pimc: 'localhost' is not a valid base URL")


def test_wrong_usage_is_an_error_before_anything_is_sent(pimc, file, tmp_path):
    with serving(lambda _: as_json({})) as (url, received):
        code, _, err = pimc(url, "classify-pixels", file)
        assert code == 2
        assert "-o" in err
        code, _, err = pimc(url, "classify-pixels", tmp_path / "no.tif", "--summary")
        assert code == 1
        assert err.startswith(f"pimc: {tmp_path}/no.tif does not exist")
        code, _, err = pimc(url, "embed", file, "--summary", "--points", file)
        assert code == 2
        code, _, err = pimc(url, "embed", file, "--job", "-o", tmp_path / "a.tif")
        assert code == 2
        assert "pimc jobs result" in unwrapped(err)
        points = tmp_path / "points.json"
        points.write_text("{")
        code, _, err = pimc(url, "forecast", file, "--points", points)
        assert code == 1
        assert err.startswith("pimc: ")
    assert received == []


@pytest.mark.parametrize("where", ["before", "after"])
def test_server_and_key_are_accepted_before_and_after_the_subcommand(pimc, where):
    with serving(lambda _: as_json({"models": [], "defaults": {}})) as (url, received):
        options = ["--url", url, "--api-key", "mine"]
        arguments = [*options, "models"] if where == "before" else ["models", *options]
        code, *_ = pimc("http://127.0.0.1:9", *arguments, PIMC_API_KEY="of the environment")
    assert code == 0
    assert received[0].headers["authorization"] == "Bearer mine"


@pytest.mark.parametrize("columns", ["20", "80"])
def test_names_of_models_are_not_cut_off_on_a_narrow_terminal(pimc, columns):
    name = "pixels-of-a-model-with-a-rather-long-name"
    bands = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
    card = {**CARD, "name": name, "bands": bands}
    document = {"models": [card], "defaults": {"classify-pixels": name}}
    with serving(lambda _: as_json(document)) as (url, _):
        code, table, _ = pimc(url, "models", COLUMNS=columns)
    assert code == 0
    words = table.split()
    assert f"{name}@1.0.0" in words
    assert words.count("classify-pixels") == 2
    assert set(bands) < set(words)
    assert "…" not in table


@pytest.mark.parametrize(
    ("out", "outputs", "message"),
    [
        ("no/such/class.tif", "class", "does not exist"),
        ("locked/class.tif", "class", "no permission"),
        ("locked/maps", "class,entropy", "no permission"),
        ("file.txt", "class,entropy", "name a folder"),
        ("maps.tif", "class,entropy", "name a folder"),
    ],
)
def test_the_output_path_is_checked_before_anything_is_sent(
    pimc, file, tmp_path, monkeypatch, out, outputs, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locked").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    # Root may write everywhere, so the check of the permission is replaced.
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: "locked" not in str(p) and access(p, mode))
    with serving(lambda _: as_json({})) as (url, received):
        code, _, err = pimc(url, "classify-pixels", file, "--output", outputs, "-o", out)
    assert code == 2
    assert message in unwrapped(err)
    assert received == []


def test_a_result_replaces_no_raster_but_a_result(pimc, tmp_path):
    source = tmp_path / "S2_2021-01-05.tif"
    with rasterio.open(
        source, "w", driver="GTiff", width=2, height=2, count=1, dtype="uint8"
    ) as written:
        written.write(np.ones((1, 2, 2), dtype=np.uint8))
    before = source.read_bytes()
    with serving(lambda _: Reply(body=classes(PIMC_MODEL="m@1"), headers=COG)) as (url, received):
        code, _, err = pimc(url, "classify-pixels", source, "-o", source)
        assert (code, received) == (2, [])
        assert "is a TIFF that PIMC did not write, perhaps an input" in unwrapped(err)
        assert source.read_bytes() == before
        out = tmp_path / "class.tif"
        for _ in range(2):  # a result may be written again
            code, *_ = pimc(url, "classify-pixels", source, "-o", out)
            assert code == 0


def test_a_raster_in_a_folder_is_named_after_its_output(pimc, file, tmp_path):
    with serving(lambda _: Reply(body=classes(), headers=COG)) as (url, _):
        code, *_ = pimc(url, "classify-pixels", file, "-o", tmp_path)
    assert code == 0
    assert (tmp_path / "class.tif").read_bytes() == classes()


@pytest.mark.parametrize(
    ("options", "body", "mime"),
    [
        ([], classes(), COG["Content-Type"]),
        *in_all_tests(
            (["--output", "class,entropy"], zipped(class__tif=classes()), "application/zip"),
            names=True,
        ),
    ],
)
def test_standard_output_holds_only_the_file(file, options, body, mime):
    reply = Reply(body=body, headers={**COG, "Content-Type": mime})
    with serving(lambda _: reply) as (url, _):
        done = subprocess.run(
            [sys.executable, "-m", "pimc_client.cli", "--url", url, "classify-pixels", file,
             "-o", "-", *options],
            capture_output=True, cwd=ROOT, check=True,
        )  # fmt: skip
    assert done.stdout == body
    assert b"merged_dates" in done.stderr
    assert not Path("-").exists()


POINTS = {
    "comma.csv": b"id,lon,lat\n1,3.02,50.81\n2,3.5,51\n",
    "excel.csv": "\ufeffName;Longitude;Latitude\r\n1;3,02;50,81\r\n2;3,5;51\r\n".encode(),
    "separator.csv": b"sep=;\r\nid;lon;lat\r\n1;3,02;50,81\r\n2;3,5;51\r\n",
    "windows.csv": "lat,lon,id,été\n50.81,3.02,1,oui\n51,3.5,2,5 €\n".encode("cp1252"),
    "latin.csv": "lat,lon,id,été\n50.81,3.02,1,oui\n51,3.5,2,ça\n".encode("latin-1"),
    "tab.csv": "x\ty\tid\n3.02\t50.81\t1\n3.5\t51\t2\n".encode("utf-16"),
    "bom.geojson": b"\xef\xbb\xbf" + json.dumps({
        "type": "FeatureCollection",
        "features": [
            {"type": "Feature", "id": i, "properties": {},
             "geometry": {"type": "Point", "coordinates": xy}}
            for i, xy in (("1", [3.02, 50.81]), ("2", [3.5, 51.0]))
        ],
    }).encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", POINTS)
def test_points_are_read_from_a_file(pimc, file, tmp_path, name):
    (tmp_path / name).write_bytes(POINTS[name])
    with serving(lambda _: as_json({"type": "FeatureCollection", "features": []})) as (url, sent):
        code, _, err = pimc(url, "embed", file, "--points", tmp_path / name)
    assert (code, err) == (0, "")
    part = next(p for p in sent[0].body.split(b"\r\n--") if b'name="points"' in p)
    features = json.loads(part.partition(b"\r\n\r\n")[2])["features"]
    found = [(feature["id"], feature["geometry"]["coordinates"]) for feature in features]
    assert found == [("1", [3.02, 50.81]), ("2", [3.5, 51.0])]
    assert all(feature["geometry"]["type"] == "Point" for feature in features)
    if name == "latin.csv":
        assert features[1]["properties"]["été"] == "ça"
    if name == "windows.csv":
        assert features[1]["properties"]["été"] == "5 €"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (
            b"id,lon\n1,3.02\n",
            "no column of latitudes, only id, lon: name one of its columns lat, latitude or y",
        ),
        (b"lon,lat\n", "has a header but no points"),
        (b"lon,lat,lon\n3.02,50.81,0\n", "has two columns lon: leave one of them out"),
        (b"lon,lat\n3.02,50.81\nx,50\n", "row 2, column lon: 'x' is not a finite number"),
        (b"lon,lat\n3.02,inf\n", "row 1, column lat: 'inf' is not a finite number"),
        (b"lon,lat\n3.02\n", "row 1: 1 cells but 2 columns"),
        (b"x,y\n600000,5600000\n", "600000 is not from -180 to 180; points are longitude and"),
        (b"{", "starts like JSON, but is not valid JSON"),
        (b"[]", "is JSON but not a GeoJSON FeatureCollection"),
    ],
)
def test_invalid_files_of_points_are_errors(pimc, file, tmp_path, content, message):
    points = tmp_path / "points"
    points.write_bytes(content)
    with serving(lambda _: as_json({})) as (url, received):
        code, _, err = pimc(url, "embed", file, "--points", points)
    assert code == 1
    assert err.startswith(f"pimc: {points}")
    assert message in err
    assert received == []


SERIES = {
    "long.csv": b"id,date,B02,B05\na,2021-01-05,0.1,0.2\nb,2021-01-05,0.3,\na,2021-01-15,NA,0.4\n",
    "list.json": json.dumps([
        {"id": "a", "dates": ["2021-01-05", "2021-01-15"], "B02": [0.1, None], "B05": [0.2, 0.4]},
        {"id": "b", "dates": ["2021-01-05"], "B02": [0.3], "B05": [None]},
    ]).encode(),
}  # fmt: skip


PLACED = b"""[{"id": "a", "dates": ["2021-01-05", "2021-01-15"], "B02": [0.1, 0.2], "lon": 5,
               "lat": 50.5}]"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"date,B02,longitude,latitude\n2021-01-05,0.1,5,50.5\n2021-01-15,0.2,5,50.5\n"),
        ("a.csv", b"date;B02;Lat;Lon\n2021-01-05;0,1;50,5;5\n2021-01-15;0,2;50,5;5\n"),
        ("a.json", PLACED),
    ],
)
def test_series_of_a_file_may_have_a_place(pimc, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with serving(lambda _: as_json({"results": [{"id": "a"}]})) as (url, received):
        assert pimc(url, "series", "embed", tmp_path / name)[0] == 0
    assert json.loads(received[0].body)["series"] == [
        {
            "id": "a", "dates": ["2021-01-05", "2021-01-15"], "B02": [0.1, 0.2], "lon": 5.0,
            "lat": 50.5,
        }
    ]  # fmt: skip


@pytest.mark.parametrize("name", SERIES)
def test_series_are_read_from_a_file(pimc, tmp_path, name):
    (tmp_path / name).write_bytes(SERIES[name])
    results = [{"id": "a", "class": "Maize", "probabilities": {"Maize": 0.9}}, {"id": "b"}]
    reply = as_json(
        {"model": "m@1", "results": results, "warnings": [{"code": "c", "detail": "d"}]}
    )
    with serving(lambda _: reply) as (url, received):
        code, out, err = pimc(url, "series", "classify-pixels", tmp_path / name, "--model", "m")
        assert code == 0
        assert json.loads(out) == results
        assert "c: d" in err
        target = tmp_path / "out.csv"
        code, *_ = pimc(url, "series", "classify-pixels", tmp_path / name, "-o", target)
    assert code == 0
    assert target.read_text() == "id,class,probabilities.Maize\na,Maize,0.9\nb,,\n"
    assert json.loads(received[0].body) == {
        "series": json.loads(SERIES["list.json"]),
        "model": "m",
    }


def test_a_forecast_of_series_is_written_as_a_table(pimc, tmp_path):
    file = tmp_path / "field.csv"
    file.write_text("date,B02,B04,B08\n2021-01-05,0.1,0.1,0.3\n")
    result = {"id": "field", "dates": ["2021-01-15"], "NDVI": {"q10": [0.4], "q50": [0.5]}}
    with serving(lambda _: as_json({"results": [result]})) as (url, received):
        target = tmp_path / "out.csv"
        code, *_ = pimc(url, "series", "forecast", file, "-o", target, "--horizon", "1")
    assert code == 0
    assert target.read_text() == "id,NDVI_2021-01-15_q10,NDVI_2021-01-15_q50\nfield,0.4,0.5\n"
    sent = json.loads(received[0].body)
    assert (sent["series"][0]["id"], sent["horizon"]) == ("field", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"id,B02\n1,0.1\n",
            "no column of dates, only id, B02: name one of its columns date, datetime or time",
        ),
        (b"id,date\n1,2021-01-05\n", "no column of a band: give one column per band, such as B02"),
        (b"date,B02\n2021-01-05,much\n", "row 1, column B02: 'much' is not a finite number"),
        (b'{"a": 1}', "is JSON without series"),
        (b'[{"dates": "2021"}]', "series 1 is not"),
        (
            b'[{"dates": ["2021-01-05"], "B02": [1], "lon": 5}]',
            "series '1': give both lon and lat, or none",
        ),
        (
            b'[{"dates": ["2021-01-05"], "B02": [1], "lon": 5, "lat": [1]}]',
            "series '1': lat is [1]",
        ),
        (b'[{"dates": ["2021-01-05"], "B02": ["a"]}]', "B02[0] is 'a': give a number"),
        (b"date,B02,lon\n2021-01-05,0.1,5\n", "a column lon, but none of latitudes: give both"),
        (
            b"date,B02,lon,lat\n2021-01-05,0.1,5,50\n2021-01-15,0.1,6,50\n",
            "row 2: series 'series' has another place than in its first row",
        ),
        (b"date,B02,lon,lat\n2021-01-05,0.1,5,100\n", "100 is not from -90 to 90"),
        (b'[{"dates": ["2021-01-05"], "B02": [1, 2]}]', "series '1': 2 values of B02 but 1 dates"),
    ],
)
def test_invalid_files_of_series_are_errors(pimc, tmp_path, content, message):
    file = tmp_path / "series"
    file.write_bytes(content)
    code, _, err = pimc("http://127.0.0.1:9", "series", "embed", file)
    assert code == 1
    assert message in err


JOB = {
    "jobID": "j-1", "type": "process", "processID": "classify-pixels", "status": "running",
    "progress": 40, "created": "2026-01-05T10:00:00Z", "links": [],
}  # fmt: skip


def test_jobs_are_listed_shown_and_cancelled(pimc):
    def respond(request):
        if request.method == "DELETE":
            return as_json({**JOB, "status": "dismissed"})
        return as_json({"jobs": [JOB]} if request.path == "/jobs" else JOB)

    with serving(respond) as (url, received):
        code, table, _ = pimc(url, "jobs", COLUMNS="80")
        assert code == 0
        assert table.splitlines()[1].split() == [
            "j-1", "classify-pixels", "running", "40", "%", "2026-01-05", "10:00",
        ]  # fmt: skip
        assert json.loads(pimc(url, "jobs", "--json")[1]) == [JOB]
        for arguments in (
            ["jobs", "show", "j-1", "--url", url],
            ["jobs", "--url", url, "show", "j-1"],
        ):
            code, shown, _ = pimc("http://127.0.0.1:9", *arguments)
            assert (code, json.loads(shown)) == (0, JOB)
        code, out, _ = pimc(url, "jobs", "cancel", "j-1")
    assert (code, out) == (0, "j-1 dismissed\n")
    assert received[-1].method == "DELETE"


def test_a_job_is_started_and_its_result_fetched(pimc, file, tmp_path):
    states = iter([40, 70, 100])
    content = classes(PIMC_LEGEND=json.dumps(LEGEND))

    def respond(request):
        if request.method == "POST":
            return as_json(JOB, 202)
        if request.path.startswith("/jobs/j-1/result"):
            return Reply(body=content, headers=COG)
        done = next(states)
        return as_json(
            {**JOB, "progress": done, "status": "successful" if done == 100 else "running"}
        )

    with serving(respond) as (url, received):
        code, out, _ = pimc(url, "classify-pixels", file, "--job")
        assert (code, out) == (0, "j-1\n")
        assert received[0].headers["prefer"] == "respond-async"
        code, *_ = pimc(url, "jobs", "result", "j-1", "-o", tmp_path / "a.tif")
    assert code == 0
    assert (tmp_path / "a.tif").read_bytes() == content


def test_a_proxy_that_is_down_is_named(pimc, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    code, _, err = pimc("http://pimc.example", "models")
    assert code == 1
    assert err.startswith(
        "pimc: http://pimc.example/ cannot be reached through the proxy http://127.0.0.1:9 ("
    )
    assert "add pimc.example to NO_PROXY" in err
    assert "secret" not in err


def test_a_proxy_without_a_scheme_and_one_that_needs_a_library(pimc, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "127.0.0.1:9")
    code, _, err = pimc("http://pimc.example", "models")
    assert code == 1
    assert "through the proxy http://127.0.0.1:9 (" in err
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "socksio", None)
    code, _, err = pimc("http://pimc.example", "models")
    assert code == 1
    assert err.startswith("pimc: Using SOCKS proxy")


def test_a_gateway_that_responds_for_the_server(pimc):
    reply = Reply(502, b"<html>Bad Gateway</html>", {"Content-Type": "text/html; charset=utf-8"})
    with serving(lambda _: reply) as (url, _):
        code, _, err = pimc(url, "models")
    assert code == 1
    assert err == (
        "pimc: unknown: HTTP 502 without a problem document (text/html): a proxy or gateway in "
        "front of the server may have responded"
    )


def test_the_terminal_shows_the_upload_and_then_the_job():
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)

    def shown():
        bars._bars.refresh()
        return terminal.file.getvalue().splitlines()[-1]

    with _bars(terminal) as bars:
        bars.uploaded(300_000, 600_000)
        assert "sending" in shown()
        assert "0.3 of 0.6 MB" in shown()
        bars.uploaded(300_000, None)
        assert "0.3 MB" in shown()
        bars.uploaded(600_000, 600_000)
        assert "computing" in shown()
        bars.computed(40.0)
        assert "40 %" in shown()


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_named_with_the_command_to_install_it(missing):
    script = (
        f"import sys; sys.modules['{missing}'] = None\nfrom pimc_client.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'pimc-client[command]'" in done.stderr
