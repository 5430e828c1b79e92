"""STAC items: which asset is chosen for a band, and what the item states of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequest, MissingBands, PIMCError
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.masks import parse_mask
from service.read.stac import StacItem, asset_bands, item_tags, read_item, read_items
from service.read.stack import Stack, open_stack
from tests.kits.rasters import write

BANDS = ("B02", "B04", "B08")
COG = "image/tiff; application=geotiff; profile=cloud-optimized"


def item(assets: dict[str, Any], **properties: Any) -> dict[str, Any]:
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": "one", "bbox": [4, 50, 5, 51],
        "properties": {"datetime": "2021-05-01T10:50:31Z", **properties}, "links": [],
        "assets": {
            key: {"href": f"https://example.org/{key}.tif", "type": COG, **asset}
            for key, asset in assets.items()
        },
    }  # fmt: skip


def keys(document: dict[str, Any], mask: str | None = None) -> list[str]:
    chosen = read_item(document, "stac").chosen(BANDS, parse_mask(mask))
    return [asset.key for asset in chosen]


def test_a_real_item_of_earth_search(shared_data: Path) -> None:
    (path,) = (shared_data / "earthsearch_v0").glob("*.json")
    found = read_item(json.loads(path.read_text()), "stac")
    chosen = found.chosen(BANDS, None)
    # Of COG and JPEG 2000 the COG; the mask is found although the request does not name it.
    assert [asset.key for asset in chosen] == ["blue", "red", "nir", "scl"]
    assert all(asset.href.startswith("https://sentinel-cogs") for asset in chosen)
    assert chosen[0].bands[0].tags == {"scale": "0.0001", "offset": "0"}
    assert chosen[0].bands[0].nodata == 0
    assert found.source["id"] == "S2A_29RKH_20200219_0_L2A"
    twenty = found.chosen(("B05", "B11", "B12"), ())
    assert [asset.key for asset in twenty] == ["rededge1", "swir16", "swir22"]


def test_names_of_providers() -> None:
    assert keys(item({"B04": {}, "B02": {}, "B08": {}, "SCL": {}})) == ["B02", "B04", "B08", "SCL"]
    sizes = {f"{band}_{size}m": {} for band in BANDS for size in (60, 10, 20)}
    masks = {"SCL_60m": {}, "SCL_20m": {}}
    assert keys(item({**sizes, **masks})) == ["B02_10m", "B04_10m", "B08_10m", "SCL_20m"]
    # Landsat's numbers are not Sentinel-2's: what the item calls red is red.
    landsat = {
        "SR_B2": {"eo:bands": [{"name": "OLI_B2", "common_name": "blue"}]},
        "SR_B4": {"eo:bands": [{"name": "OLI_B4", "common_name": "red"}]},
        "SR_B5": {"eo:bands": [{"name": "OLI_B5", "common_name": "nir08"}]},
        "SR_B8": {"eo:bands": [{"name": "OLI_B8", "common_name": "pan"}]},
        "qa_pixel": {},
    }
    assert keys(item(landsat, platform="landsat-8")) == ["SR_B2", "SR_B4", "SR_B5", "qa_pixel"]
    hls = {"B02": {}, "B04": {}, "B8A": {}, "Fmask": {}}
    assert keys(item(hls)) == ["B02", "B04", "B8A", "Fmask"]
    # "rededge" is not red, and a thumbnail is not a raster.
    with pytest.raises(MissingBands, match=r"item 'one' has no asset for B04; .* rededge1"):
        keys(item({"blue": {}, "rededge1": {}, "nir": {}, "red": {"roles": ["thumbnail"]}}))


@pytest.mark.parametrize(
    "stated",
    [
        {"collection": "sentinel-2-l1c"},
        {"id": "S2A_31UES_20210501_0_L1C"},
        {"properties": {"s2:product_type": "S2MSI1C"}},
        {"properties": {"processing:level": "L1C"}},
        {"properties": {"product:type": "S2MSI1C"}},
        {"properties": {"title": "S2A_MSIL1C_20210501T105031_N0500_R051_T31UES_20230101T000000"}},
        # Its parts contradict each other.
        {"collection": "sentinel-2-l2a", "properties": {"s2:product_type": "S2MSI1C"}},
    ],
)
def test_level_1c_is_known_from_the_item(tmp_path: Path, stated: dict[str, Any]) -> None:
    document = item({"B02": {}, "B04": {}, "B08": {}}, constellation="sentinel-2")
    document["properties"] |= stated.get("properties", {})
    document |= {key: value for key, value in stated.items() if key != "properties"}
    assert item_tags(document)["processing:level"] == "L1C"
    (tmp_path / "item.json").write_text(json.dumps(document))
    files = [SourceFile(name="a/item.json", path=tmp_path / "item.json")]
    for band in BANDS:
        made = write(tmp_path / f"{band}.tif", np.full((1, 2, 2), 1500, np.uint16))
        files.append(SourceFile(name=f"a/{band}.tif", path=made.path))
    stack = open_stack(files, StackOptions(mask="none"), bands=BANDS, max_bytes=2**20)
    (warning,) = [one for one in stack.warnings if one.code == "top_of_atmosphere"]
    assert "their tags (processing:level=L1C)" in warning.detail


def test_other_levels_of_items_are_not_l1c() -> None:
    for stated in ({"s2:product_type": "S2MSI2A"}, {"processing:level": "L2"}, {}):
        document = item({"B02": {}}, constellation="sentinel-2", **stated)
        assert item_tags(document).get("processing:level") in {None, "L2A", "L2"}
    landsat = {**item({"red": {}}, platform="landsat-8"), "collection": "landsat-c2-l1c"}
    assert "processing:level" not in item_tags(landsat)


def test_an_item_of_zarr_says_so() -> None:
    """EOPF's items of Sentinel-2 name groups of a Zarr store."""
    store = "https://objects.eodc.eu/x/S2B_MSIL2A_20250501T105031.zarr"
    assets = {
        "SR_10m": {"href": f"{store}/measurements/reflectance/r10m",
                   "type": "application/vnd+zarr", "roles": ["data", "reflectance"]},
        "product": {"href": store, "type": "application/vnd+zarr; version=2"},
        "zipped": {"href": f"{store}.zip", "type": "application/zip"},
    }  # fmt: skip
    with pytest.raises(MissingBands, match=r"assets as Zarr \('SR_10m'\).*COGs.*to_raster"):
        keys({**item({}), "assets": assets})
    cube = {"cube": {"href": "https://example.org/a.nc", "type": "application/netcdf"}}
    with pytest.raises(MissingBands, match=r"netCDF \('cube'\)"):
        keys({**item({}), "assets": cube})
    # Rasters beside it are read.
    both = item({band: {} for band in BANDS})
    both["assets"] |= assets
    assert keys(both) == list(BANDS)


def test_names_of_data_cubes() -> None:
    # Digital Earth Australia names bands as its measurements; Brazil Data Cube counts `eo:bands`.
    names = ("nbart_blue", "nbart_red", "nbart_nir_1", "nbart_nir_2", "oa_fmask")
    dea = {name: {"eo:bands": [{"name": name}]} for name in names}
    assert keys(item(dea, platform="sentinel-2a")) == [*names[:3], "oa_fmask"]
    cube = {band: {"eo:bands": [n]} for n, band in enumerate((*BANDS, "SCL", "CLEAROB"))}
    assert keys(item(cube)) == [*BANDS, "SCL"]
    terrascope = {f"TOC-{band}_10M": {} for band in BANDS} | {"SCENECLASSIFICATION_20M": {}}
    assert keys(item(terrascope, platform="sentinel-2b")) == list(terrascope)


def test_numbers_of_another_sensor_without_common_names() -> None:
    """NASA's items of HLS have none, and its band 5 of Landsat is near infrared."""
    l30 = item({"B02": {}, "B04": {}, "B05": {}, "Fmask": {}})
    assert keys({**l30, "id": "HLS.L30.T31UES.2021121T104421.v2.0"}) == [
        "B02",
        "B04",
        "B05",
        "Fmask",
    ]
    s30 = item({"B02": {}, "B04": {}, "B05": {}, "B8A": {}, "Fmask": {}})
    assert keys({**s30, "id": "HLS.S30.T31UES.2021121T104421.v2.0"}) == [
        "B02",
        "B04",
        "B8A",
        "Fmask",
    ]
    five = item({"SR_B1": {}, "SR_B3": {}, "SR_B4": {}, "SR_B6": {}, "QA_PIXEL": {}})
    assert keys({**five, "id": "LT05_L2SP_198024_20100501_02_T1"}) == [
        "SR_B1", "SR_B3", "SR_B4", "QA_PIXEL"
    ]  # fmt: skip


def test_a_band_that_the_item_names_is_not_renamed_by_its_number(tmp_path: Path) -> None:
    """Landsat 5: B04 stands for red in the item's terms, and not for the sensor's fourth band."""
    id_ = "LT05_L2SP_198024_20100501_02_T1"
    assets, files = {}, []
    for n, name in enumerate(("blue", "green", "red", "nir08"), start=1):
        href = f"{id_}_SR_B{n}.TIF"
        file = write(tmp_path / href, np.full((1, 4, 4), 10_000 + n, np.uint16))
        files.append(file)
        assets[name] = {"href": href, "eo:bands": [{"name": f"SR_B{n}", "common_name": name}]}
    document = {**item(assets, platform="LANDSAT_5"), "id": id_}
    (tmp_path / "item.json").write_text(json.dumps(document))
    files.append(SourceFile(name="item.json", path=tmp_path / "item.json"))
    stack = open_stack(files, StackOptions(), bands=BANDS, max_bytes=2**24)
    names = [plane.source.name[-6:-4] for plane in stack.acquisitions[0].planes]
    assert (names, stack.sensor) == (["B1", "B3", "B4"], "Landsat 4 to 7")
    assert {(p.scale, p.offset) for p in stack.acquisitions[0].planes} == {(0.0000275, -0.2)}


def test_masks_by_name() -> None:
    assets = {"blue": {}, "red": {}, "nir": {}, "scl": {}, "cloud": {"title": "probability"}}
    assert keys(item(assets)) == ["blue", "red", "nir", "scl"]
    assert keys(item(assets), "none") == ["blue", "red", "nir"]
    assert keys(item(assets), "scl,cldprb") == ["blue", "red", "nir", "scl", "cloud"]
    # `mask=cloud` is the mask from the series, not Earth Search's probability.
    assert keys(item(assets), "scl,cloud") == ["blue", "red", "nir", "scl"]


def test_several_bands_in_one_asset() -> None:
    names = [{"name": name} for name in ("B02", "B03", "B04", "B08", "SCL")]
    assert keys(item({"stack": {"bands": names}, "visual": {"bands": names[:3]}})) == ["stack"]


def test_what_is_stated_in_1_0_and_in_1_1() -> None:
    old = {
        "eo:bands": [{"name": "B04"}],
        "raster:bands": [{"scale": 0.0001, "offset": -0.1, "nodata": 0}],
    }
    new = {"bands": [{"name": "B04"}], "raster:scale": 1e-4, "raster:offset": -0.1, "nodata": 0}
    (one,), (other,) = (asset_bands(a, "x", sentinel_2=True) for a in (old, new))
    texts = {"raster:bands": [{"scale": "0.0001", "offset": "-0.1", "nodata": "0"}]}
    (same,) = asset_bands({**old, **texts}, "x", sentinel_2=True)
    assert one == other == same
    assert one.tags == {"scale": "0.0001", "offset": "-0.1"}
    odd = {"raster:bands": [{"scale": "nan", "offset": None, "nodata": "nan"}], "nodata": True}
    assert asset_bands(odd, "B04", sentinel_2=True)[0].tags == {}


def test_the_baseline_by_any_of_its_names() -> None:
    tags = item_tags(item({}, constellation="sentinel-2", **{"processing:version": "05.10"}))
    assert tags["s2:processing_baseline"] == "05.10"
    assert "s2:processing_baseline" not in item_tags(item({}, **{"processing:version": "05.10"}))
    span = item({}, datetime=None, start_datetime="2021-05-01T00:00:00Z")
    assert item_tags(span)["datetime"] == "2021-05-01T00:00:00Z"


def test_addresses() -> None:
    document = item({"blue": {"href": "./B02.tif"}})
    base = "https://example.org/items/one.json"
    assert read_item(document, "stac", base).assets[0].href == "https://example.org/items/B02.tif"
    document["links"] = [{"rel": "self", "href": "https://other.example/a/one.json"}]
    assert read_item(document, "stac", base).assets[0].href == "https://other.example/a/B02.tif"
    bucket = {"href": "s3://eodata/B02.tif"}
    both = {**bucket, "alternate": {"https": {"href": "https://x.example/B02.tif"}}}
    assert read_item(item({"blue": both}), "stac").assets[0].href == "https://x.example/B02.tif"
    assert read_item(item({"blue": bucket}), "stac").assets[0].href == "s3://eodata/B02.tif"


def test_an_item_twice_is_one() -> None:
    one = item({"blue": {}})
    document = {"type": "FeatureCollection", "features": [one, one, {**one, "collection": "c"}]}
    assert [i.collection for i in read_items(document, "stac")] == [None, "c"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["href", "type", "roles", "bands", "eo:bands", "raster:bands", "name", "scale",
             "nodata", "alternate", "gsd", "proj:transform", "rel", "spatial_resolution"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@pytest.mark.slow
@given(anything, anything, anything, anything)
def test_any_json_is_an_item_or_refused(a: object, b: object, c: object, d: object) -> None:
    odd = {
        "type": "Feature", "id": "x", "properties": {"datetime": a}, "links": b, "bbox": c,
        "assets": {"blue": d, "red": {"href": "x.tif", "type": COG, "bands": d, "gsd": a}},
    }  # fmt: skip
    for document in (odd, {**odd, "assets": a}, {"type": "FeatureCollection", "features": [a, b]}):
        try:
            (found,) = read_items(document, "stac", "https://example.org/x.json")
            assert isinstance(found, StacItem)
            json.dumps(found.beside({"red": "x.tif"}))
            found.chosen(BANDS, None)
        except PIMCError:
            pass


# Beside uploads ---------------------------------------------------------------------------------


def opened(tmp_path: Path, stated: dict[str, Any], number: int = 3000, **properties: Any) -> Stack:
    """A file of three unnamed bands with an item beside it."""
    pixels = np.full((3, 40, 40), number, np.uint16)
    file = write(tmp_path / "stack.tif", pixels)
    document = item({"data": {"href": "stack.tif", **stated}}, **properties)
    (tmp_path / "item.json").write_text(json.dumps(document))
    beside = SourceFile(name="item.json", path=tmp_path / "item.json")
    return open_stack([file, beside], StackOptions(), bands=BANDS, max_bytes=2**24)


def test_an_item_beside_names_the_bands_of_its_file(tmp_path: Path) -> None:
    bands = [{"name": name, "nodata": 7, "scale": 2e-4, "offset": -0.1} for name in
             ("nir", "blue", "red")]  # fmt: skip
    (acquisition,) = opened(tmp_path, {"bands": bands}).acquisitions
    assert [plane.number for plane in acquisition.planes] == [2, 3, 1]
    assert {(p.scale, p.offset, p.nodata) for p in acquisition.planes} == {(2e-4, -0.1, 7)}


@pytest.mark.parametrize("form", ["eo:bands", "bands"])
def test_a_collection_beside_names_the_bands_of_its_items(tmp_path: Path, form: str) -> None:
    files = []
    for n in (1, 2, 3):
        pixels = np.full((1, 40, 40), 1000 * n, np.uint16)
        made = write(tmp_path / f"asset-{n}.tif", pixels)
        files.append(SourceFile(name=f"S2/asset-{n}.tif", path=made.path))
    document = item({f"a{n}": {"href": f"asset-{n}.tif"} for n in (1, 2, 3)})
    document["collection"] = "mine"
    assets = {
        f"a{n}": {form: [{"name": band}], "raster:bands": [{"scale": 2e-4}]}
        for n, band in enumerate(BANDS, 1)
    }
    about = {"type": "Collection", "stac_version": "1.0.0", "id": "mine", "item_assets": assets}
    for name, one in (("S2/item.json", document), ("collection.json", about)):
        path = tmp_path / name.replace("/", "-")
        path.write_text(json.dumps(one))
        files.append(SourceFile(name=name, path=path))
    (acquisition,) = open_stack(files, StackOptions(), bands=BANDS, max_bytes=2**24).acquisitions
    assert [plane.source.name for plane in acquisition.planes] == [f.name for f in files[:3]]
    assert {plane.scale for plane in acquisition.planes} == {2e-4}
    about["id"] = "another"
    files[-1].path.write_text(json.dumps(about))
    with pytest.raises(MissingBands):
        open_stack(files, StackOptions(), bands=BANDS, max_bytes=2**24)


@pytest.mark.parametrize(
    ("properties", "offset", "warned"),
    [
        ({"s2:processing_baseline": "05.09"}, -0.1, False),
        ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": False}, -0.1, False),
        ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True}, 0.0, True),
        ({"s2:processing_baseline": "03.01"}, 0.0, True),
        ({"sentinel:processing_baseline": "04.00"}, -0.1, False),
        ({"sentinel:boa_offset_applied": True}, 0.0, True),
        ({"s2:processing_baseline": "03.01", "earthsearch:boa_offset_applied": False}, 0.0, True),
    ],
)
def test_an_offset_that_an_item_contradicts_is_not_applied(
    tmp_path: Path, properties: dict[str, Any], offset: float, warned: bool
) -> None:
    bands = [{"name": name, "scale": 1e-4, "offset": -0.1} for name in BANDS]
    stack = opened(tmp_path, {"bands": bands}, constellation="sentinel-2", **properties)
    assert {plane.offset for plane in stack.acquisitions[0].planes} == {offset}
    codes = [warning.code for warning in stack.warnings]
    assert ("baseline_offset_suspected" in codes) is warned


def test_not_applied_means_nothing_before_there_was_an_offset(tmp_path: Path) -> None:
    """Earth Search says boa_offset_applied = false of products without any, too."""
    bands = [{"name": name} for name in BANDS]
    properties = {"s2:processing_baseline": "02.14", "earthsearch:boa_offset_applied": False}
    stack = opened(tmp_path, {"bands": bands}, constellation="sentinel-2", **properties)
    assert {plane.offset for plane in stack.acquisitions[0].planes} == {0.0}


def test_neither_collection_nor_item() -> None:
    for document in ({}, {"type": "Catalog"}, {"type": "FeatureCollection"}):
        with pytest.raises(InvalidRequest, match="neither a STAC ItemCollection nor an Item"):
            read_items(document, "stac")
