"""Similarity runs: cosine similarity of every pixel's embedding to those of given places.

    places → their embeddings → unit vectors ────────┐
    stack → windows → Sits → infer → embeddings → cosines → COGs, summary

A place is a point (its pixel) or a polygon (the mean embedding of its pixels, each weighted by the
share that the polygon covers). The first pass reads only the windows that hold a polygon.

Shapes: N pixels, R places with an embedding, D numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import shapely
from numpy.typing import NDArray

from service.errors import InvalidRequest, StackWarning, first_names, warning_list
from service.read.reader import StackReader
from service.read.vectors import Fields
from service.run.collect import Floats, Outcome, Sink, WindowPredictions, Work
from service.run.executors import Timing, check
from service.run.fields import mean_embeddings
from service.run.pixels import predict_windows
from service.run.points import predict_pixels
from service.write.predictions import JSON

_NAMED = 20
"""Largest number of places that a message names."""
_ROWS_AT_ONCE = 4096
"""Embeddings that are compared at once."""
_POINT = int(shapely.GeometryType.POINT)
_POLYGONS = (int(shapely.GeometryType.POLYGON), int(shapely.GeometryType.MULTIPOLYGON))
_REASONS: Mapping[str, str] = {
    "outside": "outside the raster",
    "no_data": "with fewer clear dates than the model needs",
    "invalid": "neither a point nor a polygon",
}


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """Embeddings of all places of the request."""

    vectors: Floats
    """Unit vectors, one row per place (…, D); NaN for a place without an embedding."""
    statuses: Sequence[str]
    """`ok`, `no_data`, `outside` or `invalid`, one per place."""
    timing: Timing


@dataclass(frozen=True, kw_only=True)
class _Compare:
    """Replaces embeddings by their similarities to places."""

    reference: Floats
    """Unit vectors of the places (R, D)."""
    per_place: bool

    def __call__(self, found: WindowPredictions) -> WindowPredictions:
        cosines = similarities(found.predictions, self.reference, per_place=self.per_place)
        return replace(found, predictions=cosines)


def run_similar(work: Work, places: Fields) -> Outcome:
    """Run `/similar`: compare every pixel with the places.

    Args:
        work: the run, with its executor, journal and progress.
        places: points and polygons in any CRS.

    Raises:
        Cancelled: the run was cancelled.
        InvalidRequest: no place has an embedding.
        PIMCError: an error of the stack or the model.
    """
    found = _reference(work, places)
    usable = np.flatnonzero(np.array(found.statuses) == "ok")
    unused = _unused(places, found.statuses)
    if not len(usable):
        raise InvalidRequest.of(
            "points",
            f"no place has an embedding ({unused}): give a point or polygon on clear pixels of "
            "the raster",
        )
    names = tuple(str(places.ids[n]) for n in usable)
    work = replace(work, run=replace(work.run, similar_to=names))
    per_place = "similarities" in work.run.outputs
    compare = _Compare(reference=found.vectors[usable], per_place=per_place)
    with ExitStack() as stack:
        sink = Sink(work, work.run.stack.grid, stack)
        timing = predict_windows(
            work, sink.to_arrays, sink.collect, share=0.7, then=compare, stage="similarities"
        )
        outcome = sink.outcome(found.timing + timing)
    warnings = (*outcome.warnings, *places.warnings)
    if unused:
        warnings += (StackWarning(code="places_unused", detail=f"not compared: {unused}"),)
    listed: list[JSON] = [
        {"id": name, "status": status}
        for name, status in zip(places.ids, found.statuses, strict=True)
    ]
    summary: dict[str, JSON] = {
        **outcome.summary,
        "places": listed,
        "warnings": warning_list(warnings),
    }
    return replace(outcome, summary=summary, warnings=warnings)


def similarities(embeddings: Floats, reference: Floats, *, per_place: bool) -> Floats:
    """Cosine similarities of embeddings to the places.

    Args:
        embeddings: embeddings of pixels (N, D).
        reference: unit vectors of the places (R, D).
        per_place: whether to return a column per place as well.

    Returns:
        Similarities from -1 to 1: the largest (N, 1), or the largest and then one per place
        (N, 1 + R). NaN for an embedding with NaN or of length 0.
    """
    out = np.empty((len(embeddings), 1 + per_place * len(reference)), np.float32)
    # In parts, because N x R numbers may be more than N embeddings.
    for start in range(0, len(embeddings), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        cosines = np.clip(unit(embeddings[part]) @ reference.T, -1, 1)
        out[part, 0] = cosines.max(axis=1)
        if per_place:
            out[part, 1:] = cosines
    return out


def unit(vectors: Floats) -> Floats:
    """Vectors (N, D) scaled to unit length; NaN for vectors with NaN or of length 0."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(vectors / np.where(lengths > 0, lengths, np.nan), np.float32)


def _reference(work: Work, places: Fields) -> _Reference:
    """The embeddings of places: the pixel of a point, the mean of a polygon's pixels."""
    shapes = places.in_crs(work.run.stack.grid.crs)
    kinds = shapely.get_type_id(places.shapes)
    points, polygons = np.flatnonzero(kinds == _POINT), np.flatnonzero(np.isin(kinds, _POLYGONS))
    embeddings = np.full((len(places), work.run.model.width[0]), np.nan, np.float32)
    statuses = np.full(len(places), "invalid", np.object_)
    timing = Timing()
    if len(points):
        found, where, timing = _points(work, shapes[points])
        embeddings[points], statuses[points] = found, where
    if len(polygons):
        means = mean_embeddings(work, places.part(polygons), share=0.2)
        embeddings[polygons], statuses[polygons] = means.embeddings, means.statuses
        timing += means.timing
    vectors = unit(embeddings)
    missing = (statuses == "ok") & np.isnan(vectors).any(axis=1)
    statuses[missing] = "no_data"
    return _Reference(vectors=vectors, statuses=statuses.tolist(), timing=timing)


def _points(work: Work, shapes: NDArray[np.object_]) -> tuple[Floats, NDArray[np.object_], Timing]:
    """Embeddings (n, D) and statuses (n) of n points in the raster's CRS."""
    run = work.run
    rows, columns, inside = run.stack.grid.pixels_at(shapely.get_x(shapes), shapely.get_y(shapes))
    embeddings = np.full((len(shapes), run.model.width[0]), np.nan, np.float32)
    with StackReader(
        run.stack, run.used, cache=work.cache, before_read=lambda: check(work.cancelled)
    ) as reader:
        found = predict_pixels(run, reader, rows[inside], columns[inside], cancelled=work.cancelled)
    embeddings[inside] = found.predictions
    known = ~np.isnan(embeddings).any(axis=1)
    statuses = np.where(known, "ok", np.where(inside, "no_data", "outside")).astype(np.object_)
    return embeddings, statuses, found.timing


def _unused(places: Fields, statuses: Sequence[str]) -> str:
    """Names of the places without an embedding, by reason; empty if there are none."""
    parts = []
    for status, reason in _REASONS.items():
        ids = [f"'{one}'" for one, s in zip(places.ids, statuses, strict=True) if s == status]
        if ids:
            parts.append(f"{first_names(ids, _NAMED)} {reason}")
    return "; ".join(parts)
