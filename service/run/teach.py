"""Own classes: a head fitted to a caller's labels, scored by place, and written as a bundle.

    labels → pixels of the stack → features, by the graph that serves them → kernel.fit → bundle

The feature graph runs only for the labelled pixels, so that the time for a large stack is mainly
that of reading these pixels.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.card import (
    CARD_FILE,
    Box,
    LegendClass,
    ModelCard,
    TimeWindow,
    TrainingData,
    Variant,
)
from models.registry import Bundle, sha256_of
from service.errors import (
    InvalidRequest,
    MissingBands,
    StackWarning,
    TooFewLabels,
)
from service.infer.engine import Engine
from service.infer.model import LoadedModel
from service.learn.graph import (
    STEP_DAYS,
    STEPS,
    Embedding,
    columns_of,
    feature_graph,
    indices_of,
    series_length,
    with_head,
)
from service.learn.kernel import Features, Fitted, fit, fit_bytes
from service.learn.places import folds_of, named_places, spatial_places
from service.learn.scores import scores
from service.read.geotiff import BlockCache
from service.read.radiometry import calibrate
from service.read.reader import StackReader
from service.read.sensors import card_names
from service.read.stack import LAND_BANDS, open_stack, stack_bands
from service.read.vectors import read_labels
from service.run.coverage import check_coverage
from service.run.executors import Timing, check
from service.run.labels import label_pixels
from service.run.memory import MemoryBudget, fit_need, labelling_need, points_need, series_need
from service.run.plan import plan_raster, unique
from service.run.points import predict_pixels
from service.run.request import Charge, HeadRequest, no_charge
from service.run.series import plan_series, predict_series

MODEL_FILE = "model.onnx"
CLASS, PLACE = "class", "place"
"""Names of the properties of a label: its class, and optionally its place."""
FEWEST_LABELS = 5
"""Smallest number of labels of a class."""
_FEWEST_PLACES = 3
"""Number of places of a class below which its score by place means little."""
_MOST_PIXELS = 2000
"""Largest number of labelled pixels in a head, each of which takes time in every prediction."""
_MOST_CLASSES = 100
_MOST_TEXT = 100
"""Largest number of characters of a class's name."""
_FEWEST_CLEAR = 4
"""Clear dates that a pixel needs, if the stack has at least three times as many dates."""
_SEVERAL_YEARS = 400
"""Days between the first and the last date above which a stack covers several seasons."""
_NOT_COMPOSABLE = (
    "the graph of '{}' cannot become part of another model: name another model for /embed, or "
    "leave out `embedding`"
)
_USE = "A map of your own classes near your labels. Elsewhere its accuracy was not measured."
_VERSION = "1.0.0"
_OPSET = 20
_PALETTE = (
    "#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#1f78b4",
    "#b2df8a", "#fb9a99", "#fdbf6f", "#cab2d6", "#6a3d9a", "#b15928", "#8dd3c7", "#bebada",
    "#80b1d3", "#fccde5", "#bc80bd", "#ccebc5",
)  # fmt: skip
"""Colours of ColorBrewer's qualitative schemes; more classes repeat them."""


@dataclass(frozen=True, kw_only=True)
class Taught:
    """A bundle made from labels, in the folder of the request, and its loaded model."""

    bundle: Bundle
    model: LoadedModel
    warnings: tuple[StackWarning, ...]
    timing: Timing


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """Labelled pixels with their features and positions."""

    features: NDArray[np.float32]
    """Features (n, D), NaN for a pixel with too few clear dates."""
    labels: NDArray[np.intp]
    """Position of each pixel's label (n) in the list of labels."""
    xy: NDArray[np.float64] | None
    """Column and row of each pixel (n, 2); None for series, which have no position."""


@dataclass(frozen=True, kw_only=True)
class _Label:
    """One label of the request."""

    name: str
    """Name of its class."""
    place: str | None
    """Name of its place; None if the request does not name it."""


def teach(
    request: HeadRequest,
    engine: Engine,
    folder: Path,
    *,
    owner: str,
    max_raster_bytes: int,
    max_labels: int,
    cache: BlockCache | None = None,
    cancelled: threading.Event | None = None,
    budget: MemoryBudget | None = None,
    patience: float | None = None,
    charge: Charge = no_charge,
) -> Taught:
    """Fit a head to a caller's labels and write it as a bundle.

    Args:
        request: the stack or series, and the labels.
        engine: the models, which load the bundle.
        folder: an empty folder, to which the bundle is written.
        owner: the caller; the models that this caller has made may be named too.
        max_raster_bytes: largest decoded size of a stack, bytes.
        max_labels: largest number of labels of a request.
        cache: GDAL's block cache; None does not change it.
        cancelled: an event that cancels the run when it is set.
        budget: memory budget of all runs; None creates one for this run.
        patience: seconds to wait for memory; None waits without a limit.
        charge: counts the labelled pixels or series before they are read.

    Returns:
        The bundle, loaded.

    Raises:
        TooManyRequests: `charge` rejected the run.
        TooFewLabels: the labels have fewer than two classes, or a class has fewer than
            `FEWEST_LABELS` usable labels.
        MissingBands: no index can be computed, or a band of the embedding is missing.
        PIMCError: an error of the files, the labels or the options.
        Cancelled: `cancelled` was set.
    """
    begun = time.perf_counter()
    work = _Teaching(
        request=request,
        engine=engine,
        folder=folder,
        embedding=_embedding(request, engine, owner),
        max_raster_bytes=max_raster_bytes,
        max_labels=max_labels,
        cache=cache,
        cancelled=cancelled,
        budget=budget or MemoryBudget(),
        patience=patience,
        charge=charge,
    )
    return work.taught(begun)


def _embedding(request: HeadRequest, engine: Engine, owner: str) -> Embedding | None:
    if request.embedding is None:
        return None
    model = engine.find(request.embedding, "embed", "pixel", owner=owner)
    bundle = engine.registry.find(request.embedding)
    card = model.card
    if bundle is None or card.day_of_year:
        raise InvalidRequest.of("embedding", _NOT_COMPOSABLE.format(card.id))
    embedding = Embedding(
        model=bundle.path().read_bytes(), bands=card.bands, length=card.embedding or 0
    )
    if embedding.opset is None:
        raise InvalidRequest.of("embedding", _NOT_COMPOSABLE.format(card.id))
    return embedding


@dataclass(kw_only=True)
class _Teaching:
    """The steps of one request, with their inputs."""

    request: HeadRequest
    engine: Engine
    folder: Path
    embedding: Embedding | None
    max_raster_bytes: int
    max_labels: int
    cache: BlockCache | None
    cancelled: threading.Event | None
    budget: MemoryBudget
    patience: float | None
    charge: Charge

    def taught(self, begun: float) -> Taught:
        """All steps: samples, features, folds, fit, bundle."""
        warnings: list[StackWarning] = []
        if self.request.files:
            labels, samples, facts = self._from_raster(warnings)
        else:
            labels, samples, facts = self._from_series(warnings)
        read = time.perf_counter()
        kept, names = self._usable(labels, samples, facts["outside"], warnings)
        classes = np.array([names.index(labels[n].name) for n in samples.labels[kept]], np.intp)
        where, nearest = self._places(labels, samples, kept, warnings)
        for name, some in _few_places(names, classes, where):
            has = (
                "place, and without it no label is left to predict it from: it has no score"
                if some == 1
                else "places, so its score by place means little"
            )
            detail = (
                f"class '{name}' has {some} {has}. Label it in at least {_FEWEST_PLACES} places"
            )
            warnings.append(StackWarning(code="few_places", detail=detail))
        candidates = self._candidates(samples.features[kept], facts["bands"])
        size = fit_bytes(len(kept), samples.features.shape[1], len(names), len(candidates))
        need = fit_need(size, labels=len(kept), classes=len(names))
        with self.budget.take(need, cancelled=self.cancelled, patience=self.patience):
            fitted = fit(
                candidates,
                classes,
                self._folds(where, samples.labels[kept], classes),
                partial(check, self.cancelled),
            )
            scored = scores(fitted.probabilities, classes, where, fitted.tested)
        metrics = {
            **scored,
            "split": f"{'places' if where.max() else 'labels of one place'} left out, in folds",
            "labels": dict(Counter(labels[n].name for n in np.unique(samples.labels[kept]))),
            "places": int(where.max()) + 1,
            "separation_pixels": nearest,
        }
        bundle = self._bundle(fitted, names, facts, metrics)
        model = self.engine.load(bundle)
        return Taught(
            bundle=bundle,
            model=model,
            warnings=unique(warnings),
            timing=Timing(read=read - begun, infer=time.perf_counter() - read),
        )

    # Samples -------------------------------------------------------------------------------

    def _from_raster(
        self, warnings: list[StackWarning]
    ) -> tuple[list[_Label], _Samples, dict[str, Any]]:
        request = self.request
        if request.labels is None:
            raise InvalidRequest.of(
                "labels", "a file of points or polygons with a property `class` is required"
            )
        found = read_labels(request.labels, self.max_labels, partial(check, self.cancelled))
        labels = _labels(found.properties)
        before_each = partial(check, self.cancelled)
        bands = stack_bands(request.files, request.stack, before_each)
        self._check_bands(bands, "the stack")
        stack = open_stack(
            request.files,
            request.stack,
            bands=bands,
            max_bytes=self.max_raster_bytes,
            before_each=before_each,
        )
        warnings += found.warnings
        features = self._features(bands, len(stack.dates))
        run = plan_raster(features, stack, start=request.start)
        check_coverage(found, stack.grid)
        with self.budget.take(
            labelling_need(len(found)), cancelled=self.cancelled, patience=self.patience
        ):
            rows, cols, which = label_pixels(found, stack.grid, partial(check, self.cancelled))
        outside = sorted(set(range(len(labels))) - set(which.tolist()))
        rows, cols, which = self._agreed(rows, cols, which, labels, warnings)
        memory = self.budget.take(
            points_need(run, len(rows)), cancelled=self.cancelled, patience=self.patience
        )
        with self.charge(len(rows)), memory:
            run = replace(
                run,
                stack=calibrate(
                    stack, run.used, cache=self.cache, before_read=partial(check, self.cancelled)
                ),
            )
            with StackReader(
                run.stack, run.used, cache=self.cache, before_read=partial(check, self.cancelled)
            ) as reader:
                predicted = predict_pixels(
                    run, reader, rows, cols, cancelled=self.cancelled
                ).predictions
        warnings += run.stack.warnings
        samples = _Samples(
            features=predicted, labels=which, xy=np.stack([cols, rows], axis=1).astype(np.float64)
        )
        used = [stack.dates[t] for t in run.used]
        if request.start is None and (used[-1] - used[0]).days > _SEVERAL_YEARS:
            detail = (
                f"the {len(used)} dates from {used[0]} to {used[-1]} are placed on one year: "
                "if the classes change from year to year, as crops do, give `start` here and in "
                "requests that use the model"
            )
            warnings.append(StackWarning(code="several_years", detail=detail))
        size = stack.grid.pixel_size
        return (
            labels,
            samples,
            {
                "bands": bands,
                "outside": outside,
                "card": features.card,
                "sensors": card_names(stack.sensor),
                "pixel_size": (round(size, 2), round(size, 2)) if size else None,
                "extent": _extent(stack.grid.lonlat(rows, cols)),
                "source": f"a stack of {len(used)} dates from {used[0]} to {used[-1]}",
            },
        )

    def _from_series(
        self, warnings: list[StackWarning]
    ) -> tuple[list[_Label], _Samples, dict[str, Any]]:
        given = self.request.series
        labels = [_Label(name=_class_of(one.name, n), place=one.place)
                  for n, one in enumerate(given, start=1)]  # fmt: skip
        bands = tuple(b for b in LAND_BANDS if all(b in one.series.bands for one in given))
        self._check_bands(bands, "some series")
        dates = int(np.median([len(set(one.series.dates)) for one in given]))
        features = self._features(bands, dates)
        series = [one.series for one in given]
        width = features.width[0]
        memory = self.budget.take(
            series_need(features, series, as_json=False),
            cancelled=self.cancelled,
            patience=self.patience,
        )
        with self.charge(len(given)), memory:
            run = plan_series(features, series, start=self.request.start, cancelled=self.cancelled)
            warnings += run.warnings
            rows = [np.full(width, np.nan, np.float32) if row is None else row
                    for row in predict_series(run, self.cancelled)]  # fmt: skip
        samples = _Samples(features=np.stack(rows), labels=np.arange(len(given)), xy=None)
        return (
            labels,
            samples,
            {
                "bands": bands,
                "outside": [],
                "card": features.card,
                "sensors": (),
                "pixel_size": None,
                "extent": _extent(
                    np.array([one.series.lonlat or (np.nan, np.nan) for one in given])
                ),
                "source": f"{len(given)} series",
            },
        )

    def _check_bands(self, bands: Sequence[str], what: str) -> None:
        if not indices_of(bands):
            common = ", ".join(bands) or "none"
            raise MissingBands(
                f"{what} must have B04 and B08, or B03 and B04, on every date, to compute a "
                f"spectral index; bands that every date has: {common}. Add the missing bands"
            )
        lacking = set(self.embedding.bands) - set(bands) if self.embedding else set()
        if lacking:
            raise MissingBands(
                f"{what} lacks {', '.join(sorted(lacking))}, which the embedding model "
                f"'{self.request.embedding}' needs: add the bands, or leave out `embedding`"
            )

    def _features(self, bands: tuple[str, ...], dates: int) -> LoadedModel:
        """A model whose output is the features, loaded from the request's folder."""
        content = feature_graph(bands, series=True, embedding=self.embedding)
        path = self.folder / MODEL_FILE
        path.write_bytes(content)
        card = ModelCard(
            name=self.request.name,
            version=_VERSION,
            task="embed",
            modality="pixel",
            description="features",
            bands=bands,
            indices=indices_of(bands),
            window=TimeWindow(steps=STEPS, step_days=STEP_DAYS, start="every-date"),
            min_observations=min(max(dates // 3, 1), _FEWEST_CLEAR),
            embedding=self._width(bands),
            licence="unstated",
            variants=(_variant(path),),
            sha256=sha256_of(path),
        )
        return self.engine.load(Bundle(card=card, folder=self.folder))

    def _width(self, bands: Sequence[str]) -> int:
        return series_length(bands) + (self.embedding.length if self.embedding else 0)

    def _agreed(
        self,
        rows: NDArray[np.intp],
        cols: NDArray[np.intp],
        which: NDArray[np.intp],
        labels: Sequence[_Label],
        warnings: list[StackWarning],
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """The pixels without repetitions, and without those that have labels of two classes."""
        names = np.array([labels[n].name for n in which], np.object_)
        claims: dict[tuple[int, int], set[str]] = {}
        for row, col, name in zip(rows.tolist(), cols.tolist(), names, strict=True):
            check(self.cancelled)
            claims.setdefault((row, col), set()).add(name)
        taken: set[tuple[int, int]] = set()
        keep = []
        for n, place in enumerate(zip(rows.tolist(), cols.tolist(), strict=True)):
            check(self.cancelled)
            if len(claims[place]) == 1 and place not in taken:
                keep.append(n)
            taken.add(place)
        disputed = sum(len(one) > 1 for one in claims.values())
        if disputed:
            detail = (
                f"{disputed} pixels have labels of several classes and are not used: correct the "
                "labels"
            )
            warnings.append(StackWarning(code="labels_conflict", detail=detail))
        chosen = np.array(keep, np.intp)
        return rows[chosen], cols[chosen], which[chosen]

    # Selection and folds ---------------------------------------------------------------------

    def _usable(
        self,
        labels: Sequence[_Label],
        samples: _Samples,
        outside: Sequence[int],
        warnings: list[StackWarning],
    ) -> tuple[NDArray[np.intp], list[str]]:
        """Positions of the pixels to which a head is fitted, and the classes' names in order.

        Raises:
            TooFewLabels: there are fewer than two classes, or too few usable labels of a class.
            InvalidRequest: there are too many classes.
        """
        clear = np.flatnonzero(np.isfinite(samples.features).all(axis=1))
        names = list(dict.fromkeys(label.name for label in labels))
        usable = set(samples.labels[clear].tolist())
        cloudy = set(samples.labels.tolist()) - usable
        for code, which, why, remedy in (
            ("label_outside", set(outside), "are outside the raster", "check their CRS"),
            ("label_cloudy", cloudy, "have too few clear dates", "add clear dates"),
        ):
            if which:
                detail = f"{len(which)} of {len(labels)} labels {why} and are not used: {remedy}"
                warnings.append(StackWarning(code=code, detail=detail))
        if len(names) < 2:
            raise TooFewLabels(
                f"all labels are of the class '{names[0]}', and at least 2 classes are required: "
                "label places of another class, such as 'other'"
            )
        if len(names) > _MOST_CLASSES:
            raise InvalidRequest.of(
                "labels",
                f"the labels have {len(names)} classes; at most {_MOST_CLASSES} are allowed: join "
                "some classes",
            )
        given = Counter(label.name for label in labels)
        good = Counter(labels[n].name for n in usable)
        for name in names:
            if good[name] < FEWEST_LABELS:
                own = [n for n, label in enumerate(labels) if label.name == name]
                away = len(set(own) & set(outside))
                clouds = len(set(own) & cloudy)
                raise TooFewLabels(
                    f"class '{name}' has {good[name]} usable labels of {given[name]} "
                    f"({away} outside the raster, {clouds} with too few clear dates), and at "
                    f"least {FEWEST_LABELS} are required: label more places of the class, or leave "
                    "the class out"
                )
        return _thinned(clear, samples.labels[clear], labels, names), names

    def _places(
        self,
        labels: Sequence[_Label],
        samples: _Samples,
        kept: NDArray[np.intp],
        warnings: list[StackWarning],
    ) -> tuple[NDArray[np.intp], float | None]:
        """The place of each pixel (n), and the smallest distance between places in pixels.

        Raises:
            InvalidRequest: only some labels name a place.
        """
        which = samples.labels[kept]
        named = [labels[n].place for n in which]
        if all(name is not None for name in named):
            return named_places(named, which), None
        if any(name is not None for name in named):
            lacking = sum(name is None for name in named)
            raise InvalidRequest.of(
                "labels",
                f"{lacking} of {len(named)} labels have no property `{PLACE}`, and the others "
                "have one: give it for all labels or for none",
            )
        if samples.xy is not None:
            return spatial_places(samples.xy[kept], which)
        detail = (
            "the series have no `place`, so each counts as a separate place: if some series are "
            "neighbours, the scores are too high"
        )
        warnings.append(StackWarning(code="places_unknown", detail=detail))
        return named_places(which.tolist(), which), None

    def _folds(
        self, where: NDArray[np.intp], which: NDArray[np.intp], classes: NDArray[np.intp]
    ) -> NDArray[np.intp]:
        if where.max() > 0:
            return folds_of(where, classes)
        # A single place cannot be left out, so the folds are of labels; `few_places` warns of it.
        return folds_of(np.unique(which, return_inverse=True)[1].astype(np.intp), classes)

    def _candidates(
        self, features: NDArray[np.float32], bands: Sequence[str]
    ) -> dict[str, Features]:
        """The features that are tried: those of the series, and with an embedding of all three."""

        def of(values: NDArray[np.float32], *, series: bool, embedded: bool) -> Features:
            embedding = self.embedding if embedded else None
            cauchy, linear = columns_of(bands, series=series, embedding=embedding)
            return Features(values=values, columns={"Cauchy": cauchy, "linear": linear})

        if self.embedding is None:
            return {"series": of(features, series=True, embedded=False)}
        edge = self._width(bands) - self.embedding.length
        return {
            "series": of(features[:, :edge], series=True, embedded=False),
            "embedding": of(features[:, edge:], series=False, embedded=True),
            "series and embedding": of(features, series=True, embedded=True),
        }

    # Result ----------------------------------------------------------------------------------

    def _bundle(
        self,
        fitted: Fitted,
        names: Sequence[str],
        facts: Mapping[str, Any],
        metrics: Mapping[str, Any],
    ) -> Bundle:
        chosen, request = fitted.choice.features, self.request
        graph = feature_graph(
            facts["bands"],
            series=chosen != "embedding",
            embedding=None if chosen == "series" else self.embedding,
        )
        path = self.folder / MODEL_FILE
        merged = self.embedding if chosen != "series" else None
        opset = (merged.opset if merged else None) or _OPSET
        new = path.with_suffix(".new")
        new.write_bytes(with_head(graph, fitted.head))
        new.replace(path)
        draft: ModelCard = facts["card"]
        card = ModelCard.model_validate(
            {
                **draft.model_dump(),
                "task": "classify-pixels",
                "description": request.description or f"Own classes: {', '.join(names)}.",
                "embedding": None,
                "classes": tuple(
                    LegendClass(value=n, name=name, color=_PALETTE[n % len(_PALETTE)])
                    for n, name in enumerate(names)
                ),
                "metrics": metrics,
                "training_data": (
                    TrainingData(
                        name="the caller's labels",
                        use="labels",
                        n=metrics["n"],
                        licence="unstated",
                        source=facts["source"],
                    ),
                ),
                "training": {
                    "features": chosen,
                    "classifier": "kernel ridge, Cauchy and linear kernel",
                    "width": fitted.head.width,
                    "ridge": {part.kernel: part.ridge for part in fitted.choice.parts},
                    "temperature": fitted.choice.temperature,
                    "embedding": request.embedding if chosen != "series" else None,
                    "start": request.start.isoformat() if request.start else None,
                },
                "sensors": facts["sensors"],
                "pixel_size": facts["pixel_size"],
                "intended_use": _USE,
                "extent": facts["extent"],
                "variants": (_variant(path, opset),),
                "sha256": sha256_of(path),
            }
        )
        (self.folder / CARD_FILE).write_text(card.model_dump_json(indent=1), encoding="utf-8")
        return Bundle(card=card, folder=self.folder)


def _labels(properties: Sequence[Mapping[str, Any]]) -> list[_Label]:
    """Class and place of each label, from the properties of the features.

    Raises:
        InvalidRequest: a feature has no class, or its class is not a valid name.
    """
    lacking = [n for n, one in enumerate(properties, start=1) if one.get(CLASS) in (None, "")]
    if lacking:
        raise InvalidRequest.of(
            "labels",
            f"{len(lacking)} of {len(properties)} features have no property `{CLASS}`, the first "
            f"of them feature {lacking[0]}: give every feature a `{CLASS}`",
        )
    return [
        _Label(
            name=_class_of(one[CLASS], n),
            place=None if one.get(PLACE) in (None, "") else str(one[PLACE]),
        )
        for n, one in enumerate(properties, start=1)
    ]


def _class_of(value: object, number: int) -> str:
    """The name of a class; a number with a fraction of 0, as in tables, becomes an integer.

    Raises:
        InvalidRequest: the value is not a text or a number, or is too long.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidRequest.of(
            "labels", f"the `{CLASS}` of feature {number} is not a text or a number"
        )
    name = " ".join(str(value).split())
    if not 0 < len(name) <= _MOST_TEXT:
        raise InvalidRequest.of(
            "labels",
            f"the `{CLASS}` of feature {number} has {len(name)} characters; 1 to {_MOST_TEXT} are "
            "allowed",
        )
    return name


def _extent(lonlat: NDArray[np.float64]) -> tuple[Box, ...]:
    """Boxes around places (N, 2) in degrees, one for each cell of a degree; none if one is NaN."""
    if not len(lonlat) or not np.isfinite(lonlat).all():
        return ()
    cells = np.unique(np.floor(lonlat), axis=0, return_inverse=True)[1].ravel()
    parts = [lonlat[cells == cell] for cell in range(cells.max() + 1)]
    return tuple((*part.min(axis=0).tolist(), *part.max(axis=0).tolist()) for part in parts)


def _thinned(
    pixels: NDArray[np.intp],
    which: NDArray[np.intp],
    labels: Sequence[_Label],
    names: Sequence[str],
) -> NDArray[np.intp]:
    """At most `_MOST_PIXELS` of the pixels, fewer of frequent classes and all of rare ones."""
    if len(pixels) <= _MOST_PIXELS:
        return pixels
    classes = np.array([names.index(labels[n].name) for n in which])
    random = np.random.default_rng(0)  # a fixed seed, so that the same labels give the same model
    kept: list[NDArray[np.intp]] = []
    left = _MOST_PIXELS
    by_size = sorted(range(len(names)), key=lambda name: int((classes == name).sum()))
    for turn, name in enumerate(by_size):
        own = random.permutation(np.flatnonzero(classes == name))[: left // (len(names) - turn)]
        left -= len(own)
        kept.append(own)
    return np.asarray(pixels[np.sort(np.concatenate(kept))])


def _few_places(
    names: Sequence[str], classes: NDArray[np.intp], places: NDArray[np.intp]
) -> list[tuple[str, int]]:
    """Classes with labels in fewer than `_FEWEST_PLACES` places, and their number of places."""
    counts = [len(np.unique(places[classes == n])) for n in range(len(names))]
    return [
        (name, count) for name, count in zip(names, counts, strict=True) if count < _FEWEST_PLACES
    ]


def _variant(path: Path, opset: int = _OPSET) -> Variant:
    return Variant(
        name="float32",
        file=path.name,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        opset=opset,
    )
