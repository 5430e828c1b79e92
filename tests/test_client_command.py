"""The `pimc` command: what it sends, writes, prints, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from client_kit import Reply, serving
from test_client_answers import CARD, classes, zipped

from pimc_client.command import main

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
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        # `sys.exit(text)` is printed, and 1, by the interpreter itself.
        text = end.value.code if isinstance(end.value.code, str) else ""
        return (1 if text else end.value.code or 0), out, err + text

    return run


def as_json(document, status=200):
    return Reply(status, json.dumps(document).encode(), {"Content-Type": "application/json"})


def test_a_class_map_to_a_file(pimc, file, tmp_path):
    out = tmp_path / "out.tif"
    with serving(lambda _: Reply(body=classes(), headers=COG)) as (url, received):
        code, said, warned = pimc(
            url, "classify-pixels", file, "-o", out, "--dates", "2021-01-05", "--mask", "none",
            "--scale", "0.0001", PIMC_API_KEY="secret",
        )  # fmt: skip
    assert code == 0
    assert str(out) in said.replace("\n", "")
    assert "pixels-landcover@1.0.0" in said
    assert "merged_dates: two files of one day" in warned
    with rasterio.open(out) as raster:
        np.testing.assert_array_equal(raster.read(1), [[0, 1, 255], [1, 1, 0]])
    posted = received[0]
    assert posted.path == "/classify-pixels"
    assert posted.headers["authorization"] == "Bearer secret"
    assert b'name="dates"\r\n\r\n2021-01-05\r\n' in posted.body
    assert b'name="mask"\r\n\r\nnone\r\n' in posted.body
    assert b'filename="2021-01-05.tif"' in posted.body


def test_several_outputs_to_a_folder(pimc, file, tmp_path):
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


def test_the_registry(pimc):
    answers = {
        "/models": as_json({"models": [CARD], "defaults": {"classify-pixels": "pixels-landcover"}}),
        "/models/pixels-landcover": as_json(CARD),
    }
    with serving(lambda request: answers[request.path]) as (url, _):
        code, table, _ = pimc(url, "models")
        assert code == 0
        assert "classify-pixels" in table
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
    said = {
        "code": "missing_dates", "status": 422, "request_id": "r-77",
        "detail": "8 files\nbut 7 dates",
    }  # fmt: skip
    with serving(lambda _: as_json(said, 422)) as (url, _):
        code, out, err = pimc(url, "classify-pixels", file, "-o", tmp_path / "out.tif")
    assert code == 1
    assert out == ""
    assert err == "pimc: missing_dates: 8 files but 7 dates [request r-77]"
    assert not (tmp_path / "out.tif").exists()


def test_nobody_there_and_a_url_that_is_none(pimc, monkeypatch):
    code, _, err = pimc("http://127.0.0.1:9", "ready")
    assert code == 1
    assert err.startswith("pimc: http://127.0.0.1:9/ cannot be reached")
    code, _, err = pimc("localhost", "models")
    assert code == 1
    assert err.startswith("pimc: 'localhost' is no base URL")


def test_wrong_use_is_explained_before_anything_is_sent(pimc, file, tmp_path):
    with serving(lambda _: as_json({})) as (url, received):
        code, _, err = pimc(url, "classify-pixels", file)
        assert code == 2
        assert "-o" in err
        code, _, err = pimc(url, "classify-pixels", file, "--summary", "-o", tmp_path / "a.tif")
        assert code == 2
        code, _, err = pimc(url, "classify-pixels", tmp_path / "no.tif", "--summary")
        assert code == 2
        assert "no.tif" in err.replace("\n", "").replace(" ", "").replace("│", "")
        points = tmp_path / "points.json"
        points.write_text("{")
        code, _, err = pimc(url, "forecast", file, "--points", points)
        assert code == 1
        assert err.startswith("pimc: ")
    assert received == []


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_it_says_what_to_install(missing):
    script = (
        f"import sys; sys.modules['{missing}'] = None\nfrom pimc_client.command import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'pimc-client[command]'" in done.stderr
