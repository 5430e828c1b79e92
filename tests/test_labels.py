"""The pixels that points and polygons label, against areas computed by shapely."""

from __future__ import annotations

import threading
from functools import cache, partial

import numpy as np
import pytest
import shapely
from rasterio.crs import CRS
from shapely import MultiPoint, Point, Polygon, box

from service.errors import Cancelled, TooManyFields
from service.grid import Grid, Window
from service.read.vectors import Fields
from service.run import coverage, windows
from service.run.coverage import Coverage, FieldGrid, check_coverage
from service.run.executors import check
from service.run.labels import label_pixels
from service.run.memory import MemoryBudget, labelling_need
from tests.kits.rasters import NORTH_UP, UTM

H, W = 40, 60
GRID = Grid(crs=CRS.from_user_input(UTM), transform=NORTH_UP, width=W, height=H)


def pixels(left: float, top: float, right: float, bottom: float) -> Polygon:
    """A rectangle in pixel coordinates, on the grid."""
    return Polygon([NORTH_UP * corner for corner in box(left, top, right, bottom).exterior.coords])


def circle(column: float, row: float, radius: float) -> Polygon:
    x, y = NORTH_UP * (column, row)
    return Point(x, y).buffer(10 * radius)


SHAPES = [
    pixels(3, 3, 6, 6),  # 9 whole pixels
    pixels(10.5, 10.5, 12.5, 12.5),  # pixels covered by a half and by a quarter
    pixels(20.4, 20.4, 20.6, 20.6),  # smaller than a pixel
    pixels(29.8, 9.9, 30.2, 10.1),  # four pixels, none by half
    circle(40, 20, 15),  # many
    circle(0, 0, 6),  # partly outside
    circle(-20, -20, 6),  # outside
    *[circle(30, 30, 8)] * 5,  # one upon the other
    Point(NORTH_UP * (1.5, 2.5)),
    MultiPoint([NORTH_UP * (5.5, 6.5), NORTH_UP * (-3, 4)]),
    None,
]


def labels(shapes: list[object] = SHAPES) -> Fields:
    return Fields(
        ids=tuple(range(len(shapes))),
        properties=({},) * len(shapes),
        shapes=np.array(shapes, np.object_),
        crs=CRS.from_user_input(UTM),
        warnings=(),
    )


@cache
def squares() -> np.ndarray:
    """Each pixel as a polygon, (H, W)."""
    return np.array([[pixels(c, r, c + 1, r + 1) for c in range(W)] for r in range(H)])


def expected(shape: shapely.Geometry) -> set[tuple[int, int]]:
    """The pixels that a polygon covers by at least half, else those that it covers most."""
    share = shapely.area(shapely.intersection(squares(), shape)) / 100
    least = min(0.5, share.max())
    return {tuple(place) for place in np.argwhere(share >= least - 1e-6)} if least > 0 else set()


@pytest.mark.parametrize("most", [2**19, 40])
def test_polygons_label_the_pixels_that_they_cover(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(windows, "COVERED_CELLS", most)
    whole, largest, calls = FieldGrid.coverage, 0, 0

    def watched(self: FieldGrid, window: Window) -> Coverage:
        nonlocal largest, calls
        found = whole(self, window)
        largest, calls = max(largest, len(found.cells)), calls + 1
        return found

    monkeypatch.setattr(FieldGrid, "coverage", watched)
    row, column, which = label_pixels(labels(), GRID)
    assert largest <= most
    assert calls == 2 if most > H * W else calls > 20
    assert (np.diff(which) >= 0).all()
    for number, shape in enumerate(SHAPES):
        own = which == number
        found = set(zip(row[own].tolist(), column[own].tolist(), strict=True))
        assert len(found) == own.sum()
        if shape is None or shape.geom_type == "MultiPoint":
            continue
        if shape.geom_type == "Point":
            assert found == {(2, 1)}
            continue
        known = expected(shape)
        assert found <= known
        assert len(found) == min(len(known), 16)
        if len(known) > 16:  # spread over the polygon, not from a corner of it
            across = np.ptp(np.array(sorted(known)), axis=0)
            assert (np.ptp(np.array(sorted(found)), axis=0) > across / 2).all()
    assert list(zip(row[which == 13], column[which == 13], strict=True)) == [(6, 5)]


def test_a_request_that_is_cancelled_ends_between_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "COVERED_CELLS", 40)
    cancelled, parts = threading.Event(), 0
    whole = FieldGrid.coverage

    def watched(self: FieldGrid, window: Window) -> Coverage:
        nonlocal parts
        parts += 1
        cancelled.set()
        return whole(self, window)

    monkeypatch.setattr(FieldGrid, "coverage", watched)
    with pytest.raises(Cancelled):
        label_pixels(labels(), GRID, partial(check, cancelled))
    assert parts == 1
    with pytest.raises(Cancelled):
        FieldGrid(labels(SHAPES[:5]), GRID).parts([Window(0, 0, W, H)], partial(check, cancelled))


def test_polygons_may_not_cover_the_raster_too_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    many = labels([pixels(0, 0, W, H)] * 10)
    check_coverage(many, GRID)
    monkeypatch.setattr(coverage, "MOST_CELLS", 10 * W * H - 1)
    with pytest.raises(TooManyFields, match=f"10 polygons cover {10 * W * H} pixels together"):
        check_coverage(many, GRID)
    check_coverage(labels([pixels(-5 * W, 0, 5 * W, H)] * 9), GRID)  # only what lies on the raster
    check_coverage(labels([Point(NORTH_UP * (1, 1)), None]), GRID)


def test_finding_pixels_takes_from_the_budget() -> None:
    budget = MemoryBudget(64 * 2**20)
    need = labelling_need(100)
    with budget.take(need):
        assert budget.taken == need.total > 2**24
