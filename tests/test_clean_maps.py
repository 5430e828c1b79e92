"""Clean maps: smoothing and sieving against slow, plain references; windows against the whole."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio
import scipy.ndimage

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from models.registry import Registry
from service.api.routes import jobs
from service.errors import Cancelled, InvalidRequest
from service.infer.engine import Engine
from service.infer.smooth import FRACTION, SMOOTHNESS, smoothed
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.stack import open_stack
from service.run.memory import raster_need
from service.run.plan import plan_raster
from service.run.raster import make_work, run_raster
from service.write import sieve
from service.write.predictions import NO_CLASS, probabilities_of_bytes, probability_bytes
from service.write.sieve import areas_of, sieve_bytes, sieved
from tests.kits.client import connected
from tests.kits.jobs import waited
from tests.kits.marks import in_all_tests
from tests.kits.metrics import metric
from tests.kits.rasters import write

H, W, DATES = 48, 64, 4
BANDS = ("B02", "B04", "B08")
HECTARES = 0.01  # of a pixel of 10 m


# Smoothing -----------------------------------------------------------------------------------


def smoothed_slowly(probabilities: np.ndarray, radius: int) -> np.ndarray:
    """Equations of Camara et al. 2024, pixel by pixel."""
    K, H, W = probabilities.shape
    p = np.clip(probabilities.astype(float), 1e-4, 1 - 1e-4)
    x = np.log(p / (1 - p))
    out = np.full(x.shape, np.nan)
    for row in range(H):
        for column in range(W):
            for k in range(K):
                if np.isnan(x[k, row, column]):
                    continue
                near = [
                    x[k, r, c]
                    for r in range(max(0, row - radius), min(H, row + radius + 1))
                    for c in range(max(0, column - radius), min(W, column + radius + 1))
                    if not np.isnan(x[k, r, c])
                ]
                near = sorted(near, reverse=True)[: max(1, math.ceil(FRACTION * len(near)))]
                mean = sum(near) / len(near)
                spread = sum((one - mean) ** 2 for one in near) / max(1, len(near) - 1)
                out[k, row, column] = (
                    spread / (spread + SMOOTHNESS) * x[k, row, column]
                    + SMOOTHNESS / (spread + SMOOTHNESS) * mean
                )
    chances = np.exp(out) / (1 + np.exp(out))
    return chances / chances.sum(axis=0)


def probabilities_of(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, shape)
    found = np.exp(logits) / np.exp(logits).sum(axis=0)
    found[:, 2, 3] = np.nan
    found[:, 0, :2] = np.nan
    found[0, 5, 5], found[1:, 5, 5] = 1.0, 0.0
    return found.astype(np.float32)


@pytest.mark.parametrize("radius", [1, 2, 4])
def test_smoothing_equals_the_equations_of_the_paper(radius: int) -> None:
    probabilities = probabilities_of((4, 11, 13))
    border = ((0, 0), (radius, radius), (radius, radius))
    found = smoothed(np.pad(probabilities, border, constant_values=np.nan), radius)
    expected = smoothed_slowly(probabilities, radius)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert (np.isnan(found) == np.isnan(probabilities)).all()
    np.testing.assert_allclose(np.nansum(found, axis=0)[~np.isnan(found[0])], 1, rtol=1e-5)


def smoothed_as_sits_does(probabilities: np.ndarray, radius: int) -> np.ndarray:
    """The rules of `sits_smooth`: mirrored edges, and pixels without a value get the mean."""
    p = np.clip(probabilities.astype(float), 1e-4, 1 - 1e-4)
    x = np.log(p / (1 - p))
    mirrored = np.pad(x, ((0, 0), (radius, radius), (radius, radius)), mode="symmetric")
    out = np.empty_like(x)
    for k, row, column in np.ndindex(x.shape):
        window = mirrored[k, row : row + 2 * radius + 1, column : column + 2 * radius + 1]
        there = np.sort(window[~np.isnan(window)])[::-1]
        used = there[: math.ceil(0.5 * len(there))]
        own, prior = x[k, row, column], used.mean()
        weight = used.var(ddof=1) / (used.var(ddof=1) + 20)
        out[k, row, column] = prior if np.isnan(own) else weight * own + (1 - weight) * prior
    chances = np.exp(out) / (1 + np.exp(out))
    return np.asarray(chances / chances.sum(axis=0))


def test_smoothing_differs_from_sits_only_at_edges_and_pixels_without_a_prediction() -> None:
    radius, probabilities = 2, probabilities_of((3, 13, 15))
    found = smoothed_slowly(probabilities, radius)
    sits = smoothed_as_sits_does(probabilities, radius)
    missing = np.isnan(probabilities[0])
    inner = np.zeros(missing.shape, bool)
    inner[radius:-radius, radius:-radius] = True
    assert (inner & missing).any()
    alike = inner & ~missing
    np.testing.assert_allclose(found[:, alike], sits[:, alike], rtol=1e-9)
    assert np.isnan(found[:, missing]).all()
    assert not np.isnan(sits).any()
    assert (np.abs(found - sits).max(axis=0)[~inner & ~missing] > 1e-6).any()


def test_smoothing_removes_a_single_pixel_and_keeps_an_edge() -> None:
    probabilities = np.full((2, 20, 20), 0.1, np.float32)
    probabilities[0, :, :10], probabilities[1, :, 10:] = 0.9, 0.9
    probabilities[:, 5, 4] = 0.4, 0.6  # a speck in the left half
    found = smoothed(np.pad(probabilities, ((0, 0), (2, 2), (2, 2)), constant_values=np.nan), 2)
    expected = np.zeros((20, 20), int)
    expected[:, 10:] = 1
    assert (found.argmax(axis=0) == expected).all()


# Areas and sieve -----------------------------------------------------------------------------


def noise(seed: int, shape: tuple[int, int] = (23, 31), classes: int = 3) -> np.ndarray:
    random = np.random.default_rng(seed)
    found = random.integers(0, classes, shape).astype(np.uint8)
    found[random.random(shape) < 0.05] = NO_CLASS
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [1, 3, 256])
def test_areas_equal_those_of_scipy(seed: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sieve, "_ROWS", rows)
    classes = noise(seed, classes=2 + seed)
    labels, count = areas_of(classes)
    expected = np.zeros(classes.shape, int)
    for value in np.unique(classes):
        own, n = scipy.ndimage.label(classes == value)
        expected[own > 0] = own[own > 0] + expected.max() * (n > 0)
    pairs = {(int(a), int(b)) for a, b in zip(labels.ravel(), expected.ravel(), strict=True)}
    assert len(pairs) == count == len(np.unique(expected))
    _, first = np.unique(labels, return_index=True)
    assert (np.diff(first) > 0).all()


def sieved_slowly(classes: np.ndarray, hectares: np.ndarray, least: float) -> np.ndarray:
    """The rule of `sieved`, with every area found anew after each join."""
    classes = classes.copy()
    stuck: set[tuple[int, int]] = set()
    while True:
        areas = []
        for value in set(np.unique(classes).tolist()) - {NO_CLASS}:
            own, count = scipy.ndimage.label(classes == value)
            for number in range(1, count + 1):
                mask = own == number
                first = tuple(np.argwhere(mask)[0])
                areas.append((float(hectares[mask].sum()), first, mask, value))
        small = [a for a in areas if a[0] < least - 1e-12 and a[1] not in stuck]
        if not small:
            return classes
        _, first, mask, _ = min(small, key=lambda area: (round(area[0], 9), area[1]))
        choices = []
        for size, start, other, value in areas:
            if start == first:
                continue
            shared = sum(
                int((mask & np.roll(other, step, axis)).sum())
                - int(_wrapped(mask, other, step, axis))
                for step, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1))
            )
            if shared:
                choices.append((shared, round(size, 9), tuple(-n for n in start), value))
        if not choices:
            stuck.add(first)
            continue
        classes[mask] = max(choices)[3]


def _wrapped(mask: np.ndarray, other: np.ndarray, step: int, axis: int) -> int:
    """Neighbours that `np.roll` makes of opposite edges."""
    one = mask.take(0 if step == 1 else -1, axis)
    two = other.take(-1 if step == 1 else 0, axis)
    return int((one & two).sum())


@pytest.mark.parametrize("seed", [0, *in_all_tests(1, 2)])
@pytest.mark.parametrize("least", [0.02, 0.055, 0.31])
def test_the_sieve_equals_a_plain_implementation_of_its_rule(seed: int, least: float) -> None:
    classes = noise(seed, (12, 14), 2 + seed % 3)
    hectares = np.full(classes.shape, HECTARES)
    found = sieved(classes, hectares, least)
    assert (found == sieved_slowly(classes, hectares, least)).all()
    assert ((found == NO_CLASS) == (classes == NO_CLASS)).all()


def test_an_area_between_two_of_one_class_joins_them() -> None:
    classes = np.array([[0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [2, 2, 2, 2, 2]], np.uint8)
    found = sieved(classes, np.full(classes.shape, HECTARES), 0.045)
    assert found.tolist() == [[0] * 5, [0] * 5, [2] * 5]


def test_too_many_areas_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sieve, "MAX_AREAS", 10)
    with pytest.raises(InvalidRequest, match="set `smooth` as well"):
        sieved(noise(0), np.full((23, 31), HECTARES), 0.1)


# Runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> list[SourceFile]:
    folder, random = tmp_path_factory.mktemp("stack"), np.random.default_rng(7)
    # Broad areas with noise, so that neither smoothing nor the sieve is without effect.
    level = scipy.ndimage.gaussian_filter(random.normal(0, 1, (3, H, W)), (0, 3, 3)) * 4000
    level = np.clip(2000 + level + random.normal(0, 350, (3, H, W)), 300, 6000)
    files = []
    for month in range(1, DATES + 1):
        values = (level * random.uniform(0.97, 1.03, (3, H, W))).astype(np.uint16)
        values[:, 20:24, 30:37] = 0
        name = f"s_2021-0{month}-01.tif"
        files.append(write(folder / name, values, descriptions=BANDS, nodata=0))
    return files


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def api(zoo: Path) -> Iterator[httpx.Client]:
    with served(model_dir=zoo) as client:
        yield client


def posted(api: httpx.Client, stack: list[SourceFile], **data: Any) -> httpx.Response:
    headers = data.pop("headers", {})
    files = [("files", (s.name, s.path.read_bytes())) for s in stack]
    return api.post("/classify-pixels", files=files, data=data, headers=headers)


def layers(response: httpx.Response) -> dict[str, np.ndarray]:
    assert response.status_code == 200, response.text
    found = {}
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        for name in archive.namelist():
            if name.endswith(".tif"):
                with rasterio.MemoryFile(archive.read(name)) as memory, memory.open() as file:
                    found[name.removesuffix(".tif")] = file.read()
    return found


EVERY = "class,confidence,probabilities"


def test_a_cleaned_map_is_that_of_the_plain_probabilities(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    plain = layers(posted(api, stack, outputs=EVERY))["probabilities"]
    found = layers(posted(api, stack, outputs=EVERY, smooth=2))
    expected = smoothed_slowly(plain, 2)
    np.testing.assert_allclose(found["probabilities"], expected, atol=2e-5)
    decided = np.where(np.isnan(expected[0]), NO_CLASS, expected.argmax(axis=0))
    clear_cut = np.diff(np.sort(expected, axis=0)[-2:], axis=0)[0] > 1e-4
    changed = np.isnan(expected[0]) | clear_cut
    assert (found["class"][0] == decided)[changed].all()
    assert (decided != np.where(np.isnan(plain[0]), NO_CLASS, plain.argmax(axis=0))).any()

    both = layers(posted(api, stack, outputs=EVERY, smooth=2, min_area=0.2))
    hectares = np.full((H, W), HECTARES)
    assert (both["class"][0] == sieved_slowly(found["class"][0], hectares, 0.2)).all()
    assert (both["class"] != found["class"]).any()
    np.testing.assert_array_equal(both["probabilities"], found["probabilities"])
    there = both["class"][0] != NO_CLASS
    value = np.where(there, both["class"][0], 0)
    own = np.take_along_axis(found["probabilities"], value[None], axis=0)[0]
    np.testing.assert_array_equal(both["confidence"][0][there], own[there])
    assert np.isnan(both["confidence"][0][~there]).all()


@pytest.mark.parametrize(
    "options",
    [{"smooth": 1, "min_area": 0.3}, *in_all_tests({"smooth": 3}, {"min_area": 0.15})],
)
def test_results_do_not_depend_on_the_windows(
    zoo: Path, stack: list[SourceFile], tmp_path: Path, options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with Engine(Registry.load(zoo), providers="cpu") as engine:
        model = engine.models["pixels-landcover"]
        opened = open_stack(stack, StackOptions(), bands=model.card.bands, max_bytes=2**30)
        outputs = ("class", "confidence", "probabilities")
        run = plan_raster(model, opened, outputs=outputs, **options)
        found = []
        for name, size in (("whole", 2**25), ("windows", 2**13)):
            folder = tmp_path / name
            folder.mkdir()
            outcome = run_raster(make_work(run, folder, window_bytes=size))
            pixels = {}
            for layer, path in outcome.files.items():
                with rasterio.open(path) as file:
                    pixels[layer] = file.read()
            found.append((pixels, outcome.summary))
            assert not list(folder.glob("*scratch*"))
        (complete, one), (parts, other) = found
        for name in outputs:
            np.testing.assert_array_equal(complete[name], parts[name])
        counts = [row["pixels"] for row in one["classes"]]
        assert counts == [int((complete["class"] == n).sum()) for n in range(len(counts))]
        assert counts == [row["pixels"] for row in other["classes"]]


def test_the_summary_states_how_the_map_was_cleaned(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    accept = {"Accept": "application/json"}
    found = posted(api, stack, headers=accept, smooth=2, min_area=0.5).json()
    assert (found["smooth"], found["min_area"]) == (2, 0.5)
    plain = posted(api, stack, headers=accept).json()
    assert "smooth" not in plain
    assert [r["pixels"] for r in found["classes"]] != [r["pixels"] for r in plain["classes"]]


def test_a_job_gives_the_same_map(api: httpx.Client, stack: list[SourceFile]) -> None:
    job = posted(api, stack, smooth=2, min_area=0.2, headers={"Prefer": "respond-async"}).json()
    found = waited(api, job["jobID"])
    assert found["status"] == "successful", found
    direct = posted(api, stack, smooth=2, min_area=0.2)
    assert api.get(f"/jobs/{job['jobID']}/result").content == direct.content


def job_of(api: httpx.Client, stack: list[SourceFile], **data: Any) -> str:
    response = posted(api, stack, headers={"Prefer": "respond-async"}, **data)
    assert waited(api, response.json()["jobID"])["status"] == "successful"
    return str(response.json()["jobID"])


def pixels(content: bytes) -> np.ndarray:
    with rasterio.MemoryFile(content) as memory, memory.open() as file:
        assert file.nodata == NO_CLASS
        assert file.colormap(1)
        return file.read(1)


@pytest.mark.parametrize(
    "how", ["smooth=2&min_area=0.2", *in_all_tests("smooth=2", "min_area=0.2")]
)
def test_a_finished_job_is_cleaned_without_running_again(
    api: httpx.Client, stack: list[SourceFile], how: str
) -> None:
    job = job_of(api, stack, outputs="class,probabilities")
    derived = api.get(f"/jobs/{job}/result/class?{how}")
    assert derived.status_code == 200, derived.text
    options = dict(one.split("=") for one in how.split("&"))
    direct = posted(api, stack, **options)
    np.testing.assert_array_equal(pixels(derived.content), pixels(direct.content))
    plain = api.get(f"/jobs/{job}/result/class").content
    assert (pixels(plain) != pixels(derived.content)).any()
    assert api.get(f"/jobs/{job}/result/class?{how}").content == derived.content
    polygons = api.get(f"/jobs/{job}/result/polygons?{how}")
    accept = {"Accept": "application/vnd.apache.parquet"}
    expected = posted(api, stack, headers=accept, outputs="polygons", **options)
    assert polygons.content == expected.content


# Probabilities as bytes ----------------------------------------------------------------------


def test_bytes_are_the_nearest_of_254_steps_and_sum_to_one_when_read() -> None:
    exact = probabilities_of((7, 40, 50)).reshape(7, -1).T
    found = probability_bytes(exact)
    for stored, row in zip(found.tolist(), exact.tolist(), strict=True):
        assert stored == [255 if math.isnan(p) else round(p * 254) for p in row]
    read = probabilities_of_bytes(found.T).T
    assert (np.isnan(read) == np.isnan(exact)).all()
    there = ~np.isnan(exact[:, 0])
    np.testing.assert_allclose(read[there].sum(axis=1), 1, rtol=1e-6)
    # Half a step, and the change by which the sum becomes 1: at most half a step per class.
    assert np.abs(read - exact)[there].max() <= (1 + 7) / 508


@pytest.fixture(scope="module")
def in_bytes(api: httpx.Client, stack: list[SourceFile]) -> str:
    """A finished job with probabilities as bytes."""
    return job_of(api, stack, outputs="class,probabilities", dtype="uint8")


def test_probabilities_as_bytes_are_those_of_float32_rounded(
    api: httpx.Client, stack: list[SourceFile], in_bytes: str
) -> None:
    exact = layers(posted(api, stack, outputs="class,probabilities"))
    content = api.get(f"/jobs/{in_bytes}/result/probabilities").content
    with rasterio.MemoryFile(content) as memory, memory.open() as file:
        assert set(file.dtypes) == {"uint8"}
        assert set(file.nodatavals) == {255}
        assert file.scales == pytest.approx([1 / 254] * 3)
        assert set(file.offsets) == {0}
        assert file.descriptions == ("first", "second", "third")
        stored = file.read()
    expected = np.where(np.isnan(exact["probabilities"]), 255, exact["probabilities"] * 254)
    np.testing.assert_array_equal(stored, np.rint(expected))
    np.testing.assert_array_equal(
        pixels(api.get(f"/jobs/{in_bytes}/result/class").content), exact["class"][0]
    )
    item = api.get(f"/jobs/{in_bytes}/result/item.json").json()
    asset = item["assets"]["probabilities"]
    assert (asset["data_type"], asset["nodata"]) == ("uint8", 255)
    assert asset["raster:scale"] == pytest.approx(1 / 254)
    assert item["properties"]["pimc:parameters"]["dtype"] == "uint8"


@pytest.mark.slow
def test_a_map_is_smoothed_from_bytes(
    api: httpx.Client, stack: list[SourceFile], in_bytes: str
) -> None:
    exact = layers(posted(api, stack, outputs="class,probabilities"))["probabilities"]
    steps = np.rint(exact.astype(float) * 254)
    smooth = smoothed_slowly(steps / steps.sum(axis=0), 2)
    expected = np.where(np.isnan(smooth[0]), NO_CLASS, smooth.argmax(axis=0))
    clear_cut = np.diff(np.sort(smooth, axis=0)[-2:], axis=0)[0] > 1e-4
    decided = np.isnan(smooth[0]) | clear_cut
    found = pixels(api.get(f"/jobs/{in_bytes}/result/class?smooth=2").content)
    assert (found == expected)[decided].all()
    assert decided.mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_sdk_reads_probabilities_of_bytes(
    api: httpx.Client, stack: list[SourceFile], kind: str
) -> None:
    exact = layers(posted(api, stack, outputs="probabilities,class"))["probabilities"]
    with connected(kind, str(api.base_url)) as client:
        paths = [file.path for file in stack]
        found = client.classify_pixels(paths, outputs="probabilities", dtype="uint8")
    assert found.array.dtype == np.uint8
    np.testing.assert_allclose(found.values, exact, atol=1 / 508 + 1e-6)


@pytest.mark.parametrize(
    "data",
    [
        {"outputs": "class"},
        {"outputs": "probabilities", "points": '{"type": "FeatureCollection", "features": '
         '[{"type": "Feature", "geometry": {"type": "Point", "coordinates": [3, 50]}, '
         '"properties": {}}]}'},
    ],
)  # fmt: skip
def test_bytes_need_the_raster_of_probabilities(
    api: httpx.Client, stack: list[SourceFile], data: dict[str, Any]
) -> None:
    response = posted(api, stack, dtype="uint8", **data)
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "dtype"
    assert "add it to `outputs`" in response.json()["detail"]


@pytest.mark.slow
def test_a_finished_map_is_outlined_without_running_again(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    job = job_of(api, stack)
    for kind in ("application/vnd.apache.parquet", "application/geo+json"):
        accept = {"Accept": kind}
        derived = api.get(f"/jobs/{job}/result/polygons", headers=accept)
        direct = posted(api, stack, headers=accept, outputs="polygons")
        assert derived.headers["content-type"] == direct.headers["content-type"] == kind
        assert derived.content == direct.content
        cleaned = api.get(f"/jobs/{job}/result/polygons?min_area=0.2", headers=accept)
        direct = posted(api, stack, headers=accept, outputs="polygons", min_area=0.2)
        assert cleaned.content == direct.content != derived.content
    other = job_of(api, stack, outputs="confidence")
    assert api.get(f"/jobs/{other}/result/polygons").status_code == 404


# The SDK, and what does not fit --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_sdk_cleans_a_finished_job(
    api: httpx.Client, stack: list[SourceFile], kind: str
) -> None:
    name = job_of(api, stack, outputs="class,probabilities")
    with connected(kind, str(api.base_url)) as client:
        found = client.job(name).result("class", smooth=2, min_area=0.2)
        with pytest.raises(ValueError, match="need the output 'class'"):
            client.job(name).result(smooth=2)
    direct = posted(api, stack, smooth=2, min_area=0.2)
    np.testing.assert_array_equal(found.array, pixels(direct.content))
    assert found.legend[0].name == "first"


@pytest.mark.slow
def test_a_job_without_what_a_derived_map_needs_says_so(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    plain = job_of(api, stack)
    response = api.get(f"/jobs/{plain}/result/class?smooth=2")
    assert response.status_code == 422
    assert "outputs=class,probabilities" in response.json()["detail"]
    assert api.get(f"/jobs/{plain}/result/class?min_area=0.2").status_code == 200
    smooth = job_of(api, stack, outputs="class,probabilities", smooth=1)
    assert "smoothed already" in api.get(f"/jobs/{smooth}/result/class?smooth=2").text
    other = job_of(api, stack, outputs="confidence")
    assert "no class map" in api.get(f"/jobs/{other}/result/class?min_area=1").text
    for strange in ("smooth=11", "smooth=-1", "min_area=-1", "min_area=nan"):
        assert api.get(f"/jobs/{plain}/result/class?{strange}").status_code == 422


@pytest.mark.parametrize("parameter", ["smooth=2", "min_area=0.5"])
def test_cleaning_is_rejected_where_it_would_have_no_effect(
    api: httpx.Client, stack: list[SourceFile], parameter: str
) -> None:
    job = job_of(api, stack, outputs="class,probabilities")
    for path in ("result", "result/probabilities"):
        response = api.get(f"/jobs/{job}/{path}?{parameter}")
        assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
        assert response.json()["errors"][0]["field"] == parameter.partition("=")[0]
        assert api.get(f"/jobs/{job}/{path}").status_code == 200


def test_a_derived_map_takes_memory_from_the_budget(
    api: httpx.Client, stack: list[SourceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(api, stack)
    taken: list[float] = []
    plain = jobs.derive_map

    def derive(*arguments: Any, **named: Any) -> None:
        taken.append(metric(api, "pimc_memory_taken_bytes"))
        plain(*arguments, **named)

    monkeypatch.setattr(jobs, "derive_map", derive)
    for output in ("class", "polygons"):
        assert api.get(f"/jobs/{job}/result/{output}?min_area=0.3").status_code == 200
    # What a sieve takes at most: an area may be a pixel.
    assert min(taken) >= sieve_bytes(H * W)
    assert metric(api, "pimc_memory_taken_bytes") == 0
    monkeypatch.setattr("service.run.derive.sieve_bytes", lambda _: 2**60)
    response = api.get(f"/jobs/{job}/result/class?min_area=0.4")
    assert (response.status_code, response.json()["code"]) == (413, "raster_too_large")
    assert len(taken) == 2


def test_a_large_map_is_not_derived_while_a_client_waits(
    zoo: Path, stack: list[SourceFile]
) -> None:
    with served(model_dir=zoo, sync_max_pixels=H * W - 1) as api:
        job = job_of(api, stack)
        response = api.get(f"/jobs/{job}/result/class?min_area=0.2")
        assert "PIMC_SYNC_MAX_PIXELS" in response.json()["detail"]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"smooth": 11}, "smooth"),
        ({"smooth": -1}, "smooth"),
        ({"smooth": 1.5}, "smooth"),
        ({"min_area": -1}, "min_area"),
        ({"min_area": "nan"}, "min_area"),
        ({"smooth": 1, "points": '{"type": "FeatureCollection", "features": [{"type": "Feature", '
          '"geometry": {"type": "Point", "coordinates": [3, 50]}, "properties": {}}]}'}, "smooth"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_fit_are_rejected(
    api: httpx.Client, stack: list[SourceFile], data: dict[str, Any], field: str
) -> None:
    response = posted(api, stack, **data)
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == field


def test_a_long_sieve_can_be_cancelled() -> None:
    def stop() -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        sieved(noise(0), np.full((23, 31), HECTARES), 0.1, check=stop)


@pytest.mark.parametrize("options", [{"min_area": 0.1}, {"outputs": ("class", "polygons")}])
def test_work_on_the_whole_map_counts_as_memory(
    zoo: Path, stack: list[SourceFile], options: dict[str, Any]
) -> None:
    with Engine(Registry.load(zoo), providers="cpu") as engine:
        model = engine.models["pixels-landcover"]
        opened = open_stack(stack, StackOptions(), bands=model.card.bands, max_bytes=2**30)
        plain = raster_need(plan_raster(model, opened), 2**20)
        more = raster_need(plan_raster(model, opened, **options), 2**20)
        assert more.total >= plain.total + H * W * 26
