"""Legends: how a class map carries names and colours.

With GDAL 3.10 (rasterio's wheels) and 3.12:

- The GTiff driver keeps category names (`SetCategoryNames`) only in a side file, `.aux.xml`.
  No tag of the TIFF can hold them, so a response of one file cannot have them.
- From 3.12 on the same driver reads a raster attribute table from the `GDAL_METADATA` tag, as an
  item of role `rat`; `gdalinfo` and QGIS then show value, name and colour from the one file.
  GDAL before 3.12 skips the item, and cannot write it: `SetMetadata` takes text, not
  elements. So a placeholder of the same length goes through the COG driver, and the table replaces
  it afterwards; no offset moves and the file stays a valid COG.
- For everything older the band's tags name each class (`CLASS_0=Tree cover`), the dataset's tag
  `PIMC_LEGEND` holds the legend as JSON, and the colour table is TIFF's own.
- A zip carries `class.tif.aux.xml` beside `class.tif`: category names for every GDAL, which
  QGIS shows without a style file.
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
# From low to high; each reads in grey as well, but for `diverging`, whose middle is light.
_RAMPS: Mapping[Ramp, tuple[str, ...]] = {
    "sequential": ("#30123b", "#1f5f8b", "#2a9d8f", "#e9c46a", "#fff6d5"),
    "vegetation": ("#8c510a", "#dfc27d", "#f6e8c3", "#80cd66", "#1a7a2e"),
    "diverging": ("#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b"),
}
_PLACEHOLDER = "PIMC_RAT"
# A COG's header lies at its front, before any pixel.
_HEADER_BYTES = 8 * 2**20


def sidecar_of(path: Path) -> Path:
    """Path of GDAL's side file for metadata that a TIFF cannot hold."""
    return path.with_name(path.name + SIDECAR)


def category_names(layer: Layer) -> str:
    """GDAL's side file (PAM) that names the classes of a layer's first band."""
    names = "".join(f"<Category>{escape(c.name)}</Category>" for c in layer.legend)
    return (
        f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames>'
        "</PAMRasterBand></PAMDataset>\n"
    )


def style_of(path: Path) -> Path:
    """Path of the QGIS style that QGIS applies to a raster by its name."""
    return path.with_suffix(".qml")


def qgis_style(layer: Layer) -> str:
    """A QGIS style (QML) of a layer's first band, as QGIS 3.22 and later read it.

    A class map is paletted with the legend's names and colours, and has no entry for values that
    are no class. A continuous layer has a colour ramp over its limits.
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
    """A legend as the XML item that GDAL 3.12 and later read from the TIFF."""
    # Name, then GDAL's numbers: type 0 integer, 2 string; usage 5 value, 2 name, 6 to 8 colours,
    # 0 anything else.
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
    """A legend as the value of the dataset's tag."""
    return json.dumps([c.model_dump() for c in legend], ensure_ascii=False)


def write_legend(
    file: Any,  # noqa: ANN401 - rasterio has no types
    legend: Sequence[LegendClass],
    room: int,
) -> None:
    """Write a legend to an open file: colours, tags, and a placeholder for the attribute table.

    Args:
        file: open for writing.
        legend: the classes.
        room: size of the attribute table, bytes.
    """
    colors = {c.value: (*_rgb(c), 255) for c in legend}
    file.write_colormap(1, {**colors, NO_CLASS: (0, 0, 0, 0)})
    file.update_tags(PIMC_LEGEND=legend_json(legend))
    names = {f"CLASS_{c.value}": c.name for c in legend}
    file.update_tags(1, **names, **{_PLACEHOLDER: "x" * room})


def _rgb(c: LegendClass) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(c.color.removeprefix("#"))
    return red, green, blue


def put_in_place(path: Path, table: bytes) -> None:
    """Write the attribute table over its placeholder, padded with blanks, which XML ignores."""
    room = b'<Item name="%s" sample="0">%s</Item>' % (_PLACEHOLDER.encode(), b"x" * len(table))
    with path.open("r+b") as file:
        at = file.read(_HEADER_BYTES).find(room)
        if at < 0:
            raise RuntimeError(f"{path.name}: GDAL wrote the metadata in an unknown form")
        file.seek(at)
        file.write(table.ljust(len(room)))
