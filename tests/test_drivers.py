"""GDAL drivers: a service keeps only those that it needs, and no file leads it elsewhere."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely

from benchmarks.mutations import GDAL_XML, edited
from tests.kits.patience import PATIENCE
from tests.kits.rasters import write
from tests.kits.sockets import connections, listening

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BANDS = ("B02", "B04", "B08")

_CHILD = """
import json, sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from service.read.drivers import keep_needed_drivers
if {limited!r}:
    keep_needed_drivers()
import rasterio
from rasterio.errors import RasterioError

folder, said = Path({folder!r}), {{}}

def opens(path):
    try:
        with rasterio.open(path) as file:
            return [file.driver, file.overviews(1)]
    except RasterioError:
        return None

said["opened"] = {{p.name: opens(p) for p in sorted(folder.glob("hostile-*"))}}
from rasterio.windows import Window
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.reader import StackReader
from service.read.stack import open_stack
from service.read.vectors import read_fields

files = [SourceFile(name=p.name, path=p) for p in sorted(folder.glob("s_*"))]
bands = ["B02", "B04", "B08"]
options = StackOptions(grid="EPSG:3035@20", mask="none")  # warped, and cut by a polygon
stack = open_stack(files, options, bands=bands, max_bytes=2**30)
with StackReader(stack) as reader:
    sits = reader.read(Window(0, 0, stack.grid.width, stack.grid.height))
said["values"] = round(float(sits.values[sits.valid[:, None].repeat(3, 1)].mean()), 4)
from rasterio.features import shapes, sieve
import numpy as np
mixed = np.array([[1, 1], [1, 2]], np.uint8)
said["outlines"] = len(list(shapes(mixed)))
said["sieved"] = int(sieve(mixed, 2).sum())
said["fields"] = len(read_fields(SourceFile(name="f", path=folder / "fields.bin"), 10))
import pyogrio
with rasterio.Env() as env:
    said["drivers"] = sorted(env.drivers())
said["vectors"] = sorted(pyogrio.list_drivers())
print(json.dumps(said))
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listening() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path, listener: socket.socket) -> Path:
    """A stack, fields, and files that lead GDAL to other files and to the network."""
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
    for month in (1, 2):
        write(tmp_path / f"s_2021-0{month}-01.tif", np.full((3, 40, 40), 2000, np.uint16),
              descriptions=BANDS)  # fmt: skip
    geometry = np.array([shapely.to_wkb(shapely.box(5e5, 5.59e6, 5.001e5, 5.6e6))])
    gpkg = tmp_path / "fields.gpkg"
    pyogrio.raw.write(gpkg, geometry, [], [], geometry_type="Polygon", crs="EPSG:32631")
    gpkg.rename(tmp_path / "fields.bin")
    secret = tmp_path / "secret.png"
    with rasterio.open(secret, "w", driver="PNG", width=8, height=8, count=1, dtype="uint8") as f:
        f.write(np.full((1, 8, 8), 7, np.uint8))
    (tmp_path / "hostile-wms.xml").write_text(
        f'<GDAL_WMS><Service name="TiledWMS"><ServerUrl>{url}</ServerUrl>'
        "<TiledGroupName>a</TiledGroupName></Service></GDAL_WMS>"
    )
    item = f'<Item name="OVERVIEW_FILE" domain="OVERVIEWS">{secret}</Item>'
    xml = f"<GDALMetadata>{item}</GDALMetadata>".encode()
    plain = (tmp_path / "s_2021-01-01.tif").read_bytes()

    def change(tiff: Any, directory: Any) -> None:
        entry = tiff.put(directory, GDAL_XML, 1, [0])
        entry.kind, entry.data, entry.count = 2, xml + b"\0", len(xml) + 1

    (tmp_path / "hostile-overview.tif").write_bytes(edited(plain, change))
    return tmp_path


def child(folder: Path, *, limited: bool) -> dict[str, Any]:
    program = _CHILD.format(root=str(ROOT), folder=str(folder), limited=limited)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
        env={**os.environ, "GDAL_HTTP_TIMEOUT": "1", "no_proxy": "127.0.0.1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_only_the_needed_drivers_stay_and_suffice(folder: Path, listener: socket.socket) -> None:
    report = child(folder, limited=True)
    assert report["drivers"] == ["COG", "GTiff", "JP2OpenJPEG", "MEM", "Memory", "VRT"]
    assert (report["outlines"], report["sieved"]) == (2, 4)
    assert report["vectors"] == ["GPKG"]
    assert (report["values"], report["fields"]) == (0.2, 1)
    # Neither the picture beside nor the network is reached.
    assert report["opened"] == {"hostile-wms.xml": None, "hostile-overview.tif": ["GTiff", []]}
    assert connections(listener) == 0


def test_with_all_drivers_the_same_files_lead_elsewhere(
    folder: Path, listener: socket.socket
) -> None:
    report = child(folder, limited=False)
    assert report["opened"]["hostile-overview.tif"] != ["GTiff", []]
    assert connections(listener) > 0
    assert len(report["drivers"]) > 100
    assert (report["values"], report["fields"]) == (0.2, 1)
