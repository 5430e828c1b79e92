"""Predictions: a model's outputs as rasters, records and summaries.

    predictions (N, …) ──┬── bands     arrays (B, N) of each layer, for rasters
                         ├── record    one prediction as JSON
                         └── tally     counts and means over all predictions, for the summary

Each kind of prediction has one class: classes, forecasts, embeddings. This module writes no files
and does not use GDAL.

Shapes: N pixels, B bands, K classes, H steps of a forecast, S spectral indices, Q quantiles, D
numbers of an embedding, R places of a similarity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.card import LegendClass, ModelCard, ResolvedTimeWindow, shifted
from models.formulas import INT8_STEPS, int8_steps
from service.errors import InvalidRequest

Floats = NDArray[np.float32]
# A value that the json module can serialise.
JSON = dict[str, "JSON"] | list["JSON"] | str | float | int | bool | None
# Sums over a part of the predictions, by name.
Counts = Mapping[str, NDArray[Any]]
Ramp = Literal["sequential", "vegetation", "diverging"]

POLYGONS = "polygons"
"""Name in `outputs` of a class map as polygons, which is a file beside the rasters."""
ATTRIBUTION = "attribution"
"""Name in `outputs` of the attribution of each date to the class of a pixel."""
NO_CLASS = 255
"""The `class` of a pixel without a prediction."""
NO_EMBEDDING = -128
"""Every int8 of a pixel without an embedding; the values of others are -127 to 127."""
NO_PROBABILITY = 255
"""Every uint8 of a pixel without a prediction; probabilities are 0 to `PROBABILITY_STEPS`."""
PROBABILITY_STEPS = 254
"""The uint8 of probability 1: value = uint8 / 254."""
EmbeddingType = Literal["float32", "int8"]
ProbabilityType = Literal["float32", "uint8"]
NumberType = EmbeddingType | ProbabilityType
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One raster of a result."""

    name: str
    """Name of the file without its extension, and name in `outputs`."""
    bands: tuple[str, ...]
    """Description of each band (B)."""
    legend: tuple[LegendClass, ...] = ()
    """Classes of a class map, which is uint8 with nodata 255; without them the layer is float32
    with nodata NaN."""
    scale: float | None = None
    """If given, the layer holds integers, and value = integer x scale."""
    unsigned: bool = False
    """Whether those integers are uint8 with nodata 255, and not int8 with nodata -128."""
    limits: tuple[float, float] = (0.0, 1.0)
    """Values with the first and the last colour of the style; values outside have these, too."""
    ramp: Ramp = "sequential"
    """Colours of a continuous layer: `vegetation` for spectral indices, `diverging` around 0."""

    @property
    def dtype(self) -> str:
        """NumPy type of the pixels."""
        if self.scale is not None:
            return "uint8" if self.unsigned else "int8"
        return "uint8" if self.legend else "float32"

    @property
    def nodata(self) -> float:
        """Value of a pixel without a prediction."""
        if self.scale is not None:
            return NO_PROBABILITY if self.unsigned else NO_EMBEDDING
        return NO_CLASS if self.legend else float("nan")

    def empty(self, count: int) -> NDArray[Any]:
        """An array (B, count) of nodata in the layer's dtype."""
        return np.full((len(self.bands), count), self.nodata, self.dtype)


class Tally(Protocol):
    """Running sums over predictions, whose memory does not grow with their number."""

    def count(
        self,
        predictions: Floats,
        hectares: NDArray[np.float64],
        classes: NDArray[np.uint8] | None = None,
    ) -> Counts:
        """Sums over a part of the predictions, without those that contain NaN.

        Args:
            predictions: (N, …) float32.
            hectares: area of each prediction's pixel or cell (N) float64, hectares.
            classes: as in `Predictions.bands`.
        """
        ...

    def add(self, counts: Counts) -> None:
        """Add the sums of a part, which `count` returned."""
        ...

    def summary(self) -> dict[str, JSON]:
        """The summary of all parts as JSON."""
        ...


class Predictions(Protocol):
    """One kind of prediction, for one request."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The requested rasters."""
        ...

    def bands(
        self, predictions: Floats, classes: NDArray[np.uint8] | None = None
    ) -> dict[str, NDArray[Any]]:
        """The bands of each layer.

        Args:
            predictions: (N, …) float32, NaN for a pixel without a prediction.
            classes: classes (N) of a map that was cleaned, 255 for no class; None takes the most
                probable class of each prediction.

        Returns:
            Arrays (B, N) in the layer's dtype, by layer name.
        """
        ...

    def record(self, prediction: Floats) -> dict[str, JSON]:
        """One prediction (…) float32 as JSON, with all outputs of the model."""
        ...

    def tally(self) -> Tally:
        """An empty tally."""
        ...


def predictions_of(
    card: ModelCard,
    outputs: Sequence[str],
    *,
    horizon: int | None = None,
    time_window: ResolvedTimeWindow | None = None,
    dtype: NumberType = "float32",
    dates: Sequence[date] = (),
) -> Predictions:
    """The interpretation of a model's outputs for one request.

    Args:
        card: the model's card.
        outputs: names of the requested rasters or quantiles; ignored for an embedding, which has
            one output.
        horizon: number of steps of a forecast; None takes the card's maximum.
        time_window: the model's time window over the dates; a forecast starts after its last date.
        dtype: number type of an embedding, or of the layer `probabilities`.
        dates: the dates used (T); `attribution` has a band for each.

    Raises:
        InvalidRequest: the model does not have an output, the horizon or the number type, or a
            forecast has no date.
    """
    if card.task == "forecast":
        return _forecast_of(card, outputs, horizon, time_window)
    if card.task == "embed":
        return EmbeddingPredictions(size=card.embedding or 0, scale=_scale_of(card, dtype))
    known: tuple[str, ...] = ("class", "confidence", "entropy", "probabilities")
    if card.modality == "pixel":
        known = (*known, ATTRIBUTION)
    _check_names("outputs", outputs, known)
    if dtype == "int8":
        raise InvalidRequest.of(
            "dtype", "int8 is for embeddings: probabilities are stored as float32 or uint8"
        )
    return ClassPredictions(
        legend=card.classes,
        outputs=tuple(outputs),
        dates=tuple(dates),
        as_bytes=dtype == "uint8",
    )


def _scale_of(card: ModelCard, dtype: NumberType) -> float | None:
    if dtype == "float32":
        return None
    if dtype == "uint8":
        raise InvalidRequest.of(
            "dtype", "uint8 is for probabilities: embeddings are stored as float32 or int8"
        )
    if card.embedding_int8 is None:
        raise InvalidRequest.of(
            "dtype",
            f"the card of '{card.id}' states no scale for int8: send dtype=float32, or measure "
            "the scale with 'python -m training int8'",
        )
    return card.embedding_int8.scale


def _forecast_of(
    card: ModelCard,
    outputs: Sequence[str],
    horizon: int | None,
    time_window: ResolvedTimeWindow | None,
) -> ForecastPredictions:
    quantiles = tuple(quantile_name(q) for q in card.quantiles)
    _check_names("outputs", outputs, quantiles)
    most = card.horizon or 0
    steps = most if horizon is None else horizon
    if not 1 <= steps <= most:
        raise InvalidRequest.of(
            "horizon", f"{steps} is not a number of steps from 1 to {most}, which '{card.id}' takes"
        )
    step_days = card.window.step_days if card.window else 0
    last = time_window.last if time_window else None
    if last is None:
        raise InvalidRequest.of(
            "dates",
            "a forecast starts after the last date, and the files have no dates: give `dates`",
        )
    return ForecastPredictions(
        indices=tuple(name.upper() for name in card.indices),
        dates=tuple(shifted(last, step_days * (k + 1)) for k in range(steps)),
        quantiles=quantiles,
        outputs=tuple(q for q in quantiles if q in outputs),
    )


def quantile_name(quantile: float) -> str:
    """Name of a quantile in `outputs` and in bands: `q10` for 0.1."""
    return f"q{round(quantile * 100):02d}"


def _check_names(field: str, requested: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in requested if name not in known]
    if unknown:
        raise InvalidRequest.of(field, f"unknown {', '.join(unknown)}; allowed: {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class ClassPredictions:
    """Class probabilities (N, K), 0 to 1."""

    legend: tuple[LegendClass, ...]
    """The classes (K)."""
    outputs: tuple[str, ...]
    """Names of the requested layers."""
    dates: tuple[date, ...] = ()
    """The dates used (T)."""
    as_bytes: bool = False
    """Whether the layer `probabilities` is uint8."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """See `Predictions`."""
        every = {
            "class": Layer(name="class", bands=("class",), legend=self.legend),
            "confidence": Layer(name="confidence", bands=("confidence",)),
            "entropy": Layer(
                name="entropy",
                bands=("entropy",),
                limits=(0.0, float(np.log(max(2, len(self.legend))))),
            ),
            "probabilities": Layer(
                name="probabilities",
                bands=tuple(c.name for c in self.legend),
                scale=1 / PROBABILITY_STEPS if self.as_bytes else None,
                unsigned=self.as_bytes,
            ),
            ATTRIBUTION: Layer(
                name=ATTRIBUTION,
                bands=tuple(day.isoformat() for day in self.dates),
                limits=(-0.25, 0.25),
                ramp="diverging",
            ),
        }
        return tuple(every[name] for name in self.outputs)

    def bands(
        self, predictions: Floats, classes: NDArray[np.uint8] | None = None
    ) -> dict[str, NDArray[Any]]:
        """See `Predictions`; the confidence is the probability of the class in the map.

        The run adds `attribution`, which predictions alone do not determine.
        """
        classes, confidence = classes_with_confidence(predictions, classes)
        made: dict[str, Callable[[], NDArray[Any]]] = {
            "class": lambda: classes[None],
            "confidence": lambda: confidence[None],
            "entropy": lambda: entropy(predictions)[None],
            "probabilities": lambda: (
                (probability_bytes(predictions) if self.as_bytes else predictions).T
            ),
        }
        return {name: made[name]() for name in self.outputs if name != ATTRIBUTION}

    def record(self, prediction: Floats) -> dict[str, JSON]:
        """See `Predictions`."""
        value = int(classes_with_confidence(prediction[None])[0][0])
        return {
            "class": self.legend[value].name,
            "value": value,
            "confidence": float(prediction.max()),
            "entropy": float(entropy(prediction[None])[0]),
            "probabilities": {
                c.name: float(p) for c, p in zip(self.legend, prediction, strict=True)
            },
        }

    def tally(self) -> ClassTally:
        """See `Predictions`."""
        return ClassTally(self.legend)


class ClassTally:
    """Pixels, area and confidence of each class."""

    def __init__(self, legend: tuple[LegendClass, ...]) -> None:
        self._legend = legend
        self._pixels = np.zeros(len(legend), np.int64)
        self._hectares = np.zeros(len(legend))
        self._confidence = np.zeros(len(legend))

    def count(
        self,
        predictions: Floats,
        hectares: NDArray[np.float64],
        classes: NDArray[np.uint8] | None = None,
    ) -> Counts:
        """See `Tally`."""
        classes, confidence = classes_with_confidence(predictions, classes)
        present = classes != NO_CLASS
        classes = classes[present]
        size = len(self._legend)
        return {
            "pixels": np.bincount(classes, minlength=size),
            "hectares": np.bincount(classes, hectares[present], minlength=size),
            "confidence": np.bincount(classes, confidence[present], minlength=size),
        }

    def add(self, counts: Counts) -> None:
        """See `Tally`."""
        self._pixels += counts["pixels"]
        self._hectares += counts["hectares"]
        self._confidence += counts["confidence"]

    def summary(self) -> dict[str, JSON]:
        """See `Tally`."""
        total = int(self._pixels.sum())
        return {"classes": [self._row(c, total) for c in self._legend]}

    def _row(self, c: LegendClass, total: int) -> JSON:
        pixels = int(self._pixels[c.value])
        return {
            "value": c.value,
            "name": c.name,
            "code": c.code,
            "color": c.color,
            "pixels": pixels,
            "hectares": float(self._hectares[c.value]),
            "share": pixels / total if total else 0.0,
            "mean_confidence": float(self._confidence[c.value] / pixels) if pixels else None,
        }


def classes_with_confidence(
    probabilities: Floats, classes: NDArray[np.uint8] | None = None
) -> tuple[NDArray[np.uint8], Floats]:
    """The class of each prediction, and the probability of that class.

    Args:
        probabilities: class probabilities (N, K) float32, 0 to 1.
        classes: classes (N) of a map that was cleaned, 255 for no class; None takes the most
            probable class of each prediction.

    Returns:
        Classes (N) uint8 and their probabilities (N) float32; 255 and NaN for a prediction that
        contains NaN or has no class.
    """
    if classes is not None:
        present = classes != NO_CLASS
        of_class = probabilities[np.arange(len(classes)), np.where(present, classes, 0)]
        return classes, np.where(present, of_class, np.float32(np.nan))
    # argmax treats NaN as the largest value and so returns the position of a NaN.
    best = probabilities.argmax(axis=1)
    confidence: Floats = probabilities[np.arange(len(best)), best]
    classes = best.astype(np.uint8)
    classes[np.isnan(confidence)] = NO_CLASS
    return classes, confidence


def probability_bytes(probabilities: Floats) -> NDArray[np.uint8]:
    """Probabilities (N, K) as uint8: the nearest of 254 steps, 255 for NaN.

    A stored probability is at most 1/508 from its value. The steps of a pixel need not sum to 254:
    `probabilities_of_bytes` makes the sum 1 again.
    """
    out = np.empty(probabilities.shape, np.uint8)
    # In parts, so that the floats in between take little memory.
    for start in range(0, len(probabilities), _ROWS_AT_ONCE):
        steps = np.rint(probabilities[start : start + _ROWS_AT_ONCE] * PROBABILITY_STEPS)
        out[start : start + _ROWS_AT_ONCE] = np.where(np.isnan(steps), NO_PROBABILITY, steps)
    return out


def probabilities_of_bytes(stored: NDArray[np.uint8]) -> Floats:
    """Probabilities (K, …) float32 of what `probability_bytes` stored, with sum 1 over K.

    NaN for a pixel without a prediction.
    """
    values = np.where(stored == NO_PROBABILITY, np.float32(np.nan), stored.astype(np.float32))
    # Not 0: the largest of at most 255 probabilities is at least one step.
    found: Floats = values / values.sum(axis=0)
    return found


def entropy(probabilities: Floats) -> Floats:
    """Shannon's entropy (N) float32 of probabilities (N, K), in nats, 0 to ln K."""
    # 0 ln 0 is 0. The product with NaN remains NaN.
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    # "+ 0.0" turns -0.0, the entropy of a certain prediction, into 0.
    total: Floats = -(probabilities * logs).sum(axis=1) + np.float32(0.0)
    return total


@dataclass(frozen=True, kw_only=True)
class ForecastPredictions:
    """Quantiles (N, H, S, Q) of spectral indices; the first `len(dates)` steps are requested."""

    indices: tuple[str, ...]
    """Spectral indices (S), in upper case."""
    dates: tuple[date, ...]
    """Dates of the forecast."""
    quantiles: tuple[str, ...]
    """Quantiles (Q), ascending, as `q10`."""
    outputs: tuple[str, ...]
    """The requested quantiles, ascending."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """See `Predictions`."""
        names = tuple(
            f"{index}_{day.isoformat()}_{quantile}"
            for index in self.indices
            for day in self.dates
            for quantile in self.outputs
        )
        layer = Layer(name="forecast", bands=names, limits=(-0.1, 0.9), ramp="vegetation")
        return (layer,) if names else ()

    def bands(
        self, predictions: Floats, classes: NDArray[np.uint8] | None = None
    ) -> dict[str, NDArray[Any]]:
        """See `Predictions`."""
        del classes
        if not self.outputs:
            return {}
        requested = [self.quantiles.index(name) for name in self.outputs]
        # (N, H, S, Q) to (S, H, Q, N): index, date, quantile is the order of the bands.
        stacked = predictions[:, : len(self.dates), :, requested].transpose(2, 1, 3, 0)
        # The full shape, because -1 is ambiguous if N is 0.
        return {"forecast": stacked.reshape(len(self.layers[0].bands), len(predictions))}

    def record(self, prediction: Floats) -> dict[str, JSON]:
        """See `Predictions`."""
        return {"dates": self._days(), **self._by_index(prediction[: len(self.dates)])}

    def tally(self) -> ForecastTally:
        """See `Predictions`."""
        return ForecastTally(self)

    def means(self, mean: NDArray[np.float64]) -> dict[str, JSON]:
        """The summary of mean quantiles (H, S, Q) over all pixels; NaN if no pixel has any."""
        middle = len(self.quantiles) // 2
        by_index = self._by_index(mean, self.outputs)
        for s, index in enumerate(self.indices):
            by_index[index] = {"mean": _numbers(mean[:, s, middle]), **by_index[index]}
        return {"dates": self._days(), **by_index}

    def _by_index(
        self, values: NDArray[Any], quantiles: Sequence[str] | None = None
    ) -> dict[str, dict[str, JSON]]:
        return {
            index: {
                name: _numbers(values[:, s, q])
                for q, name in enumerate(self.quantiles)
                if quantiles is None or name in quantiles
            }
            for s, index in enumerate(self.indices)
        }

    def _days(self) -> JSON:
        return [day.isoformat() for day in self.dates]


class ForecastTally:
    """The mean of each quantile over all pixels."""

    def __init__(self, predictions: ForecastPredictions) -> None:
        self._predictions = predictions
        self._pixels = 0
        shape = (len(predictions.dates), len(predictions.indices), len(predictions.quantiles))
        self._sum = np.zeros(shape)

    def count(
        self,
        predictions: Floats,
        hectares: NDArray[np.float64],
        classes: NDArray[np.uint8] | None = None,
    ) -> Counts:
        """See `Tally`; areas and classes are ignored."""
        del hectares, classes
        requested = predictions[:, : len(self._predictions.dates)]
        present = ~np.isnan(requested).any(axis=(1, 2, 3))
        return {"pixels": present.sum(), "sum": requested[present].sum(axis=0, dtype=np.float64)}

    def add(self, counts: Counts) -> None:
        """See `Tally`."""
        self._pixels += int(counts["pixels"])
        self._sum += counts["sum"]

    def summary(self) -> dict[str, JSON]:
        """See `Tally`."""
        mean = self._sum / self._pixels if self._pixels else np.full(self._sum.shape, np.nan)
        return self._predictions.means(mean)


@dataclass(frozen=True, kw_only=True)
class EmbeddingPredictions:
    """Embeddings (N, D)."""

    size: int
    """D."""
    scale: float | None = None
    """Scale of int8; None writes float32."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """See `Predictions`."""
        layer = Layer(
            name="embedding",
            bands=tuple(f"embedding_{d}" for d in range(self.size)),
            scale=self.scale,
            limits=(-1.0, 1.0),
            ramp="diverging",
        )
        return (layer,)

    def bands(
        self, predictions: Floats, classes: NDArray[np.uint8] | None = None
    ) -> dict[str, NDArray[Any]]:
        """See `Predictions`."""
        del classes
        if self.scale is None:
            return {"embedding": predictions.T}
        return {"embedding": quantised(predictions, self.scale).T}

    def record(self, prediction: Floats) -> dict[str, JSON]:
        """See `Predictions`."""
        if self.scale is None:
            return {"embedding": _numbers(prediction)}
        values: list[JSON] = quantised(prediction[None], self.scale)[0].tolist()
        return {"embedding": values, "scale": self.scale}

    def tally(self) -> EmbeddingTally:
        """See `Predictions`."""
        return EmbeddingTally(self.size, self.scale)


def quantised(embeddings: Floats, scale: float) -> NDArray[np.int8]:
    """Embeddings (N, D) as int8: the nearest step, -127 or 127 beyond them, -128 for NaN."""
    out = np.empty(embeddings.shape, np.int8)
    # In parts, so that the floats in between take little memory.
    for start in range(0, len(embeddings), _ROWS_AT_ONCE):
        some = embeddings[start : start + _ROWS_AT_ONCE]
        steps = int8_steps(some, scale)
        out[start : start + _ROWS_AT_ONCE] = np.where(np.isnan(steps), NO_EMBEDDING, steps)
    return out


class EmbeddingTally:
    """The mean Euclidean norm of the embeddings, and the share of values beyond int8."""

    def __init__(self, size: int, scale: float | None = None) -> None:
        self._size = size
        self._scale = scale
        self._pixels = 0
        self._norm = 0.0
        self._clipped = 0

    def count(
        self,
        predictions: Floats,
        hectares: NDArray[np.float64],
        classes: NDArray[np.uint8] | None = None,
    ) -> Counts:
        """See `Tally`; areas and classes are ignored."""
        del hectares, classes
        norms = np.linalg.norm(predictions.astype(np.float64), axis=1)
        present = ~np.isnan(norms)
        counts = {"pixels": present.sum(), "norm": norms[present].sum()}
        if self._scale is not None:
            most = np.float32((INT8_STEPS + 0.5) * self._scale)
            counts["clipped"] = (np.abs(predictions) > most).sum()
        return counts

    def add(self, counts: Counts) -> None:
        """See `Tally`."""
        self._pixels += int(counts["pixels"])
        self._norm += float(counts["norm"])
        self._clipped += int(counts.get("clipped", 0))

    def summary(self) -> dict[str, JSON]:
        """See `Tally`."""
        mean = self._norm / self._pixels if self._pixels else None
        found: dict[str, JSON] = {"dimensions": self._size, "mean_norm": mean}
        if self._scale is not None:
            values = self._pixels * self._size
            clipped = self._clipped / values if values else None
            found |= {"dtype": "int8", "scale": self._scale, "clipped_share": clipped}
        return {"embedding": found}


@dataclass(frozen=True, kw_only=True)
class SimilarityPredictions:
    """Cosine similarities (N, 1) or (N, 1 + R): the largest, then that to each place."""

    places: tuple[str, ...]
    """Names of the places (R)."""
    outputs: tuple[str, ...]
    """`similarity`, `similarities` or both."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """See `Predictions`."""
        every = {
            "similarity": Layer(name="similarity", bands=("similarity",)),
            "similarities": Layer(name="similarities", bands=self.places),
        }
        return tuple(every[name] for name in self.outputs)

    def bands(
        self, predictions: Floats, classes: NDArray[np.uint8] | None = None
    ) -> dict[str, NDArray[Any]]:
        """See `Predictions`."""
        del classes
        made = {"similarity": predictions[:, :1].T, "similarities": predictions[:, 1:].T}
        return {name: made[name] for name in self.outputs}

    def record(self, prediction: Floats) -> dict[str, JSON]:
        """See `Predictions`."""
        return {"similarity": float(prediction[0])}

    def tally(self) -> SimilarityTally:
        """See `Predictions`."""
        return SimilarityTally()


class SimilarityTally:
    """Mean, smallest and largest of the largest similarities."""

    def __init__(self) -> None:
        self._pixels = 0
        self._sum = 0.0
        self._low, self._high = math.inf, -math.inf

    def count(
        self,
        predictions: Floats,
        hectares: NDArray[np.float64],
        classes: NDArray[np.uint8] | None = None,
    ) -> Counts:
        """See `Tally`; areas and classes are ignored."""
        del hectares, classes
        values = predictions[:, 0][~np.isnan(predictions[:, 0])].astype(np.float64)
        return {
            "pixels": np.asarray(len(values)),
            "sum": values.sum(),
            "low": values.min(initial=math.inf),
            "high": values.max(initial=-math.inf),
        }

    def add(self, counts: Counts) -> None:
        """See `Tally`."""
        self._pixels += int(counts["pixels"])
        self._sum += float(counts["sum"])
        self._low = min(self._low, float(counts["low"]))
        self._high = max(self._high, float(counts["high"]))

    def summary(self) -> dict[str, JSON]:
        """See `Tally`."""
        if not self._pixels:
            return {"similarity": {"mean": None, "min": None, "max": None}}
        mean = self._sum / self._pixels
        return {"similarity": {"mean": mean, "min": self._low, "max": self._high}}


def dated(dates: Sequence[date], values: NDArray[Any]) -> dict[str, JSON]:
    """One number per date (T) as a JSON object by ISO date, null for NaN."""
    return {day.isoformat(): n for day, n in zip(dates, _numbers(values), strict=True)}


def _numbers(values: NDArray[Any]) -> list[JSON]:
    """Values (n) as a list for JSON, which has no NaN: None instead."""
    return [None if np.isnan(v) else float(v) for v in values]
