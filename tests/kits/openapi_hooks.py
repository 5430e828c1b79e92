"""Hooks of schemathesis: GeoTIFFs, which it cannot generate from the description, and areas."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import schemathesis
from hypothesis import strategies as st

from tests.kits.rasters import write

BANDS = ("B02", "B03", "B04", "B08")


def _geotiffs() -> list[bytes]:
    """Two dates of a small scene, and a file that is not a TIFF."""
    made = [b"no TIFF"]
    values = np.random.default_rng(4).integers(300, 4000, (2, 4, 66, 67)).astype(np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        for day, bands in zip(("2021-03-01", "2021-06-01"), values, strict=True):
            path = Path(folder) / "a.tif"
            write(path, bands, descriptions=BANDS, tags={"datetime": day}, compress="deflate")
            made.append(path.read_bytes())
    return made


schemathesis.openapi.media_type("image/tiff", st.sampled_from(_geotiffs()))


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Describe areas without their largest sizes, which `test_api_errors` tests.

    With them, each wrong number of a ring is generated within a thousand polygons of a thousand
    rings: most of the processor time of the whole run.
    """
    del context
    left: list[Any] = [raw_schema["components"]["schemas"]["Area"]]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            part.pop("maxItems", None)
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)
