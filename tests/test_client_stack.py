"""`pimc stack` and `fetch_stack`: a stack from a STAC API on loopback, classified as any other."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.warp
from affine import Affine
from rasterio.windows import Window
from typer.testing import CliRunner

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_bundle
from pimc_client import Client, StackError, fetch_stack
from pimc_client.cli import app
from tests.kits import stac as kit
from tests.kits.ranges import RangeServer, range_server
from tests.kits.stac import Acquisition, Catalogue

pytestmark = pytest.mark.slow

WINDOW = Window(330, 340, 120, 60)
SPAN = {"start": "2022-06-01", "end": "2022-06-30"}


@dataclass(frozen=True, kw_only=True)
class World:
    """A STAC API, and a range server with COGs of South Tyrol."""

    api: str
    catalogue: Catalogue
    web: RangeServer
    tyrol: tuple[Acquisition, ...]
    stacks: tuple[Path, ...]
    """The files that the COGs were made of."""
    bbox: list[float]


@pytest.fixture(scope="module")
def world(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("web")
    stacks = tuple(sorted((shared_data / "south_tyrol_2022").glob("S2_L2A*.tif"))[:3])
    tyrol = tuple(
        kit.write_cogs(path, root / f"tyrol{n}", "32TPS") for n, path in enumerate(stacks)
    )
    bounds = rasterio.windows.bounds(WINDOW, Affine(*tyrol[0].transform))
    bbox = list(rasterio.warp.transform_bounds("EPSG:32632", "EPSG:4326", *bounds))
    with ExitStack() as stack:
        web = stack.enter_context(range_server(root))
        items = [
            kit.earth_search(at, f"{web.url}/tyrol{n}", cloud=10.0 * n)
            for n, at in enumerate(tyrol)
        ]
        api, catalogue = stack.enter_context(kit.stac_api(items))
        yield World(api=api, catalogue=catalogue, web=web, tyrol=tyrol, stacks=stacks, bbox=bbox)


def fetched(world: World, folder: Path, **options: Any) -> list[Path]:
    return fetch_stack(folder, **{"bbox": world.bbox, "url": world.api, **SPAN, **options})


def days(paths: Sequence[Path]) -> list[str]:
    return [path.stem.removeprefix("S2_") for path in paths]


def test_files_hold_the_pixels_of_the_source(world: World, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    world.web.requests.clear()
    paths = fetched(world, tmp_path, progress=lambda done, dates: seen.append((done, dates)))
    assert days(paths) == [at.day[:10].replace("-", "") for at in world.tyrol]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    total = sum(path.stat().st_size for at in world.tyrol for path in at.paths.values())
    assert sum(end - begin for _, begin, end in world.web.requests) < total / 2
    for path, source in zip(paths, world.stacks, strict=True):
        with rasterio.open(path) as file, rasterio.open(source) as original:
            assert file.descriptions == ("B02", "B03", "B04", "B08", "SCL")
            assert file.scales == (1e-4, 1e-4, 1e-4, 1e-4, 1.0)
            assert file.offsets == (0.0,) * 5
            assert set(file.nodatavals) == {0}
            assert file.tags()["datetime"][:10] in source.name
            assert file.crs == original.crs
            step = ~original.transform @ file.transform
            window = Window(round(step.c), round(step.f), file.width, file.height)
            assert (window.col_off, window.row_off) <= (WINDOW.col_off, WINDOW.row_off)
            assert file.width >= WINDOW.width
            there = original.read(window=window)
            assert (file.read([1, 2, 3, 4]) == there[:4]).all()
            # SCL came at 20 m, every second pixel of the original.
            assert (file.read(5) == at_20_m(original.read(5), window)).all()


def at_20_m(classes: np.ndarray, window: Window) -> np.ndarray:
    coarse = classes[::2, ::2].repeat(2, 0).repeat(2, 1)
    rows, columns = window.toslices()
    return coarse[rows, columns]


def test_an_item_stands_beside_each_file(world: World, tmp_path: Path) -> None:
    (path, *_) = fetched(world, tmp_path)
    item = json.loads(path.with_suffix(".json").read_text())
    assert item["stac_version"] == "1.1.0"
    assert [band["name"] for band in item["assets"]["data"]["bands"]][-1] == "SCL"
    assert item["properties"]["proj:code"] == "EPSG:32632"
    source = world.catalogue.items[0]
    assert item["properties"]["datetime"] == source["properties"]["datetime"]
    assert item["links"][0]["href"].endswith(f"/items/{source['id']}")


def test_what_is_there_is_not_fetched_again(world: World, tmp_path: Path) -> None:
    paths = fetched(world, tmp_path)
    before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    (tmp_path / "S2_20220610.part").write_bytes(b"cut off")
    world.web.requests.clear()
    assert fetched(world, tmp_path) == paths
    # The first item's header states the grid.
    assert {name.split("/")[0] for name, *_ in world.web.requests} - {"tyrol0"} == {"tyrol1"}
    assert [path.read_bytes() for path in paths] == before
    with pytest.raises(StackError, match="other bands or another grid"):
        fetched(world, tmp_path, bands=["B04"])


def test_pages_clouds_and_dates(world: World, tmp_path: Path) -> None:
    world.catalogue.page = 1
    world.catalogue.searches.clear()
    try:
        paths = fetched(world, tmp_path / "all")
    finally:
        world.catalogue.page = 100
    assert len(paths) == len(world.catalogue.searches) == 3
    assert len(fetched(world, tmp_path / "clear", max_cloud_cover=10)) == 2
    first = world.tyrol[0].day[:10]
    assert len(fetched(world, tmp_path / "one", start=first, end=first)) == 1


def test_the_offset_goes_into_the_tags(world: World, tmp_path: Path) -> None:
    before = json.dumps(world.catalogue.items)
    _, applied, raised = world.catalogue.items
    applied["properties"] |= {
        "s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True,
    }  # fmt: skip
    raised["properties"] |= {"s2:processing_baseline": "05.09"}
    for item in (applied, raised):
        for asset in item["assets"].values():
            for band in asset.get("raster:bands", ()):
                band["offset"] = -0.1
    try:
        paths = fetched(world, tmp_path)
    finally:
        world.catalogue.items[:] = json.loads(before)
    offsets = []
    for path in paths:
        with rasterio.open(path) as file:
            offsets.append((file.offsets[0], file.tags()["offset"]))
    assert offsets == [(0.0, "0"), (0.0, "0"), (-0.1, "-0.1")]


def test_tiles_of_one_day_are_one_file(world: World, tmp_path: Path) -> None:
    """Two halves with an overlap, as neighbouring tiles have, give the whole."""
    at = world.tyrol[0]
    halves = []
    for name, left, right in (("west", 0, 420), ("east", 380, 935)):
        paths = kit.write_columns(at, world.web.folder / name, left, right)
        half = Acquisition(**{**vars(at), "paths": paths})
        halves.append(kit.earth_search(half, f"{world.web.url}/{name}", tile=name))
    (total,) = fetched(world, tmp_path / "whole", end=at.day[:10])
    with kit.stac_api(halves) as (api, _):
        (joined,) = fetched(world, tmp_path / "joined", url=api)
    with rasterio.open(total) as one, rasterio.open(joined) as other:
        assert one.transform == other.transform
        assert (one.read() == other.read()).all()
    assert len(json.loads(joined.with_suffix(".json").read_text())["links"]) == 2


def test_the_command_ends_in_a_map(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pimc stack` and then `pimc classify-pixels` with the folder, nothing in between."""
    folder = tmp_path / "stack"
    box = ",".join(map(str, world.bbox))
    arguments = ["stack", "--bbox", box, "--start", SPAN["start"], "--end", SPAN["end"]]
    run = CliRunner().invoke(app, [*arguments, "--out", str(folder), "--stac", world.api])
    assert run.exit_code == 0, run.output
    assert "3 dates" in run.output
    zoo = tmp_path / "zoo"
    write_bundle(zoo, "pixels-landcover", "classify-pixels", "pixel")
    with served(model_dir=zoo) as service:
        monkeypatch.setenv("PIMC_URL", str(service.base_url))
        out = tmp_path / "classes.tif"
        run = CliRunner().invoke(app, ["classify-pixels", str(folder), "--out", str(out)])
        assert run.exit_code == 0, run.output
        with Client(str(service.base_url)) as pimc:
            cut = [crop(path, folder, tmp_path / path.name) for path in world.stacks]
            by_hand = pimc.classify_pixels(cut)
            summary = pimc.classify_pixels(folder, answer="summary")
    with rasterio.open(out) as file:
        assert (file.read(1) == by_hand.array).all()
        assert len(np.unique(file.read(1))) > 1
    assert summary["mask"] == "scl"


def crop(source: Path, folder: Path, path: Path) -> Path:
    """The same window of a file that the COGs were made of, SCL as at 20 m."""
    with rasterio.open(next(folder.glob("*.tif"))) as like, rasterio.open(source) as file:
        step = ~file.transform @ like.transform
        window = Window(round(step.c), round(step.f), like.width, like.height)
        data = file.read(window=window)
        data[4] = at_20_m(file.read(5), window)
        profile = {**file.profile, "width": like.width, "height": like.height}
        profile["transform"] = like.transform
        with rasterio.open(path, "w", **profile) as target:
            target.write(data)
            target.descriptions = file.descriptions
            target.update_tags(**file.tags())
    return path


def test_mistakes_say_what_to_do(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, message in (
        ({"bbox": [1, 2, 3]}, "west, south, east, north"),
        ({"bbox": [5, 50, 4, 51]}, "west below east"),
        ({"start": "yesterday"}, "start: 'yesterday' is not an ISO date"),
        ({"start": "2023-01-01"}, "is after the end"),
        ({"bands": ["B99"]}, "B99 are not Sentinel-2 bands"),
    ):
        with pytest.raises(ValueError, match=message):
            fetch_stack(tmp_path, **{"bbox": world.bbox, "url": world.api, **SPAN, **options})
    with pytest.raises(StackError, match="no item of 'landsat'"):
        fetched(world, tmp_path, collection="landsat")
    with pytest.raises(StackError, match="responded HTTP 501"):
        fetched(world, tmp_path, url=f"{world.web.url}/nothing")
    with pytest.raises(StackError, match="cannot be reached"):
        fetched(world, tmp_path, url="http://127.0.0.1:9")
    with pytest.raises(StackError, match=r"item 'S2A_31UES.* has no asset for B12"):
        fetched(world, tmp_path, bands=["B12"])
    span = ["--start", "2021-01-01", "--end", "2021-02-01", "--out", str(tmp_path)]
    run = CliRunner().invoke(app, ["stack", "--bbox", "here", *span])
    assert "'here' is not west,south,east,north" in str(run.exception)


def test_an_asset_without_a_file_is_named(world: World, tmp_path: Path) -> None:
    """In a separate process, because GDAL caches a missing URL for the life of its process."""
    how = {"bbox": world.bbox, "url": world.api, **SPAN}
    program = f"from pimc_client import fetch_stack; fetch_stack({str(tmp_path)!r}, **{how!r})"
    blue = world.tyrol[0].paths["B02"]
    hidden = blue.rename(blue.with_suffix(".gone"))
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
    finally:
        hidden.rename(blue)
    assert re.search(
        r"StackError: item 'S2A_31UES.*', asset 'blue' cannot be read from 127\.0\.0\.1",
        done.stderr,
    ), done.stderr


def test_without_rasterio_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def hidden(name: str, *rest: Any) -> Any:
        if name.startswith("rasterio"):
            raise ModuleNotFoundError("No module named 'rasterio'", name="rasterio")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", hidden)
    with pytest.raises(ImportError, match=r"pip install 'pimc-client\[stac\]'"):
        fetch_stack(tmp_path, bbox=[4, 50, 5, 51], start="2021-01-01", end="2021-02-01")


def test_the_guides_program_fetches(world: World, tmp_path: Path) -> None:
    """With the address and the place of this test in those of the page."""
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "stac.md").read_text()
    *_, program = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    box = ", ".join(map(str, world.bbox))
    program = re.sub(r"bbox=\(.*?\)", f"url='{world.api}', bbox=({box})", program)
    program = program.replace("2018-01-01", SPAN["start"]).replace("2018-12-31", SPAN["end"])
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nprint(len(paths))"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3"]
    assert len(list((tmp_path / "leie").glob("S2_*.tif"))) == 3
