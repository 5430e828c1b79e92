"""Legends: names and colours of classes in a class map, for GDAL and QGIS.

Behaviour of GDAL 3.10 (rasterio's wheels) and 3.12:

- The GTiff driver writes category names (`SetCategoryNames`) only to a side file, `.aux.xml`. No
  tag of a TIFF can contain them, so a response of a single TIFF has no category names.
- From 3.12 on the GTiff driver reads a raster attribute table from the `GDAL_METADATA` tag, as an
  item with the role `rat`; `gdalinfo` and QGIS then show value, name and colour from the TIFF
  alone. Older versions skip the item, and rasterio's GDAL cannot write it, because `SetMetadata`
  takes text and no XML elements. The COG driver therefore writes a placeholder of the same length,
  and `write_attribute_table` replaces it by the table: no offset changes, and the file remains a
  valid COG.
- For older versions, the band's tags name each class (`CLASS_0=Tree cover`), the dataset's tag
  `PIMC_LEGEND` contains the legend as JSON, and the colours are in TIFF's colour table.
- A zip contains `class.tif.aux.xml` beside `class.tif`, with category names for every version of
  GDAL, which QGIS shows without a style file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from models.card import LegendClass
from service.write.predictions import NO_CLASS, Layer, Ramp

SIDECAR = ".aux.xml"
# Colours from the lowest to the highest value. In greyscale they become lighter with the value,
# except `diverging`, whose middle is the lightest.
_RAMPS: Mapping[Ramp, tuple[str, ...]] = {
    "sequential": ("#30123b", "#1f5f8b", "#2a9d8f", "#e9c46a", "#fff6d5"),
    "vegetation": ("#8c510a", "#dfc27d", "#f6e8c3", "#80cd66", "#1a7a2e"),
    "diverging": ("#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b"),
}
_PLACEHOLDER = "PIMC_RAT"
# A COG's header precedes all of its pixels.
_HEADER_BYTES = 8 * 2**20


def sidecar_of(path: Path) -> Path:
    """Path of GDAL's side file (`.aux.xml`) for metadata that a TIFF cannot contain."""
    return path.with_name(path.name + SIDECAR)


def category_names(layer: Layer) -> str:
    """XML of GDAL's side file (PAM) with the names of the classes of a layer's first band."""
    names = "".join(f"<Category>{escape(c.name)}</Category>" for c in layer.legend)
    return (
        f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames>'
        "</PAMRasterBand></PAMDataset>\n"
    )


def style_of(path: Path) -> Path:
    """Path of the style file (`.qml`) that QGIS applies to the raster of the same name."""
    return path.with_suffix(".qml")


def qgis_style(layer: Layer) -> str:
    """A QGIS style (QML) of a layer's first band, for QGIS 3.22 and later.

    The style of a class map is a palette with the legend's names and colours, without an entry for
    255 (no class). The style of a continuous layer is a colour ramp between the layer's limits.
    """
    renderer = _paletted(layer) if layer.legend else _ramped(layer)
    return (
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        '<qgis version="3.22" styleCategories="Symbology"><pipe>'
        f'{renderer}<brightnesscontrast brightness="0" contrast="0"/>'
        "</pipe><blendMode>0</blendMode></qgis>\n"
    )


def _paletted(layer: Layer) -> str:
    entries = "".join(
        f'<paletteEntry value="{c.value}" color="{c.color}" label={quoteattr(c.name)} alpha="255"/>'
        for c in layer.legend
    )
    return (
        '<rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1" nodataColor="">'
        f"<colorPalette>{entries}</colorPalette></rasterrenderer>"
    )


def _ramped(layer: Layer) -> str:
    low, high = layer.limits
    colors = _RAMPS[layer.ramp]
    stops = [low + (high - low) * n / (len(colors) - 1) for n in range(len(colors))]
    items = "".join(
        f'<item value="{stop:.6g}" label="{stop:.3g}" color="{color}" alpha="255"/>'
        for stop, color in zip(stops, colors, strict=True)
    )
    bounds = f'minimumValue="{low:.6g}" maximumValue="{high:.6g}"'
    return (
        '<rasterrenderer type="singlebandpseudocolor" band="1" opacity="1" alphaBand="-1" '
        f'nodataColor="" classificationMin="{low:.6g}" classificationMax="{high:.6g}">'
        f'<rastershader><colorrampshader colorRampType="INTERPOLATED" {bounds} clip="0" '
        f'classificationMode="1" labelPrecision="3">{items}</colorrampshader></rastershader>'
        "</rasterrenderer>"
    )


def attribute_table(legend: Sequence[LegendClass]) -> bytes:
    """A legend as the XML item that GDAL 3.12 and later read from the TIFF, UTF-8."""
    # Name, type and usage of each column, by GDAL's numbers. Types: 0 integer, 2 string. Usages: 5
    # value, 2 name, 6 to 8 red, green and blue, 0 other.
    fields = (
        ("Value", 0, 5),
        ("Class", 2, 2),
        ("Red", 0, 6),
        ("Green", 0, 7),
        ("Blue", 0, 8),
        ("Code", 2, 0),
    )
    heads = "".join(
        f'<FieldDefn index="{i}"><Name>{name}</Name><Type>{kind}</Type><Usage>{usage}</Usage>'
        "</FieldDefn>"
        for i, (name, kind, usage) in enumerate(fields)
    )
    rows = "".join(f'<Row index="{c.value}">{_cells(c)}</Row>' for c in legend)
    return (
        '<Item name="DEFAULT_RASTER_ATTRIBUTE_TABLE" sample="0" role="rat">'
        f'<GDALRasterAttributeTable tableType="thematic">{heads}{rows}'
        "</GDALRasterAttributeTable></Item>"
    ).encode()


def _cells(c: LegendClass) -> str:
    code = "" if c.code is None else c.code
    return "".join(f"<F>{cell}</F>" for cell in (c.value, escape(c.name), *_rgb(c), code))


def legend_json(legend: Sequence[LegendClass]) -> str:
    """A legend as JSON, the value of the dataset's tag `PIMC_LEGEND`."""
    return json.dumps([c.model_dump() for c in legend], ensure_ascii=False)


def write_legend(
    file: Any,  # noqa: ANN401 - rasterio has no types
    legend: Sequence[LegendClass],
    table_bytes: int,
) -> None:
    """Write a legend to an open file: colours, tags, and a placeholder for the attribute table.

    Args:
        file: a rasterio dataset open for writing.
        legend: the classes.
        table_bytes: size of the attribute table that later replaces the placeholder, bytes.
    """
    colors = {c.value: (*_rgb(c), 255) for c in legend}
    file.write_colormap(1, {**colors, NO_CLASS: (0, 0, 0, 0)})
    file.update_tags(PIMC_LEGEND=legend_json(legend))
    names = {f"CLASS_{c.value}": c.name for c in legend}
    file.update_tags(1, **names, **{_PLACEHOLDER: "x" * table_bytes})


def _rgb(c: LegendClass) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(c.color.removeprefix("#"))
    return red, green, blue


def write_attribute_table(path: Path, table: bytes) -> None:
    """Write the attribute table over its placeholder, padded with blanks, which XML ignores.

    Args:
        path: a COG with the placeholder of `write_legend`.
        table: the XML of `attribute_table`.

    Raises:
        RuntimeError: the file does not contain the placeholder.
    """
    placeholder = b'<Item name="%s" sample="0">%s</Item>' % (
        _PLACEHOLDER.encode(),
        b"x" * len(table),
    )
    with path.open("r+b") as file:
        at = file.read(_HEADER_BYTES).find(placeholder)
        if at < 0:
            raise RuntimeError(
                f"{path.name}: the placeholder of the attribute table is not in the file's header; "
                "this version of GDAL writes metadata in another form"
            )
        file.seek(at)
        file.write(table.ljust(len(placeholder)))
