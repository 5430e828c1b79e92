"""int8 embeddings: the scale that a card states, and what it costs on the probes.

embeddings of all places -> scale from training places -> int8 and back -> probes beside float32
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.card import EmbeddingInt8
from models.formulas import INT8_STEPS, int8_steps
from training.errors import TrainingError
from training.probe import NEIGHBOURS, Labelled, probe

MOST_LOSS = 0.005
"""Accuracy or macro-F1 of a probe that int8 may cost."""
_HEADROOM = 1.25
"""Values elsewhere may be larger than any of the training places by this factor."""
_DIGITS = 4
PROBES = {"linear_probe": "linear", f"knn_{NEIGHBOURS}": f"{NEIGHBOURS} nearest"}
"""Probes by their name in scores, with the name in tables."""


class Int8Loses(TrainingError):
    """A probe's score loses more with int8 embeddings than is allowed."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One probe on one data set, with float32 and with int8 embeddings."""

    data: str
    probe: str
    """A key of `PROBES`."""
    n: int
    """Validation samples."""
    places: int
    """Validation places."""
    accuracy: tuple[float, float]
    """With float32, and with int8."""
    macro_f1: tuple[float, float]
    clipped: float
    """Share of values beyond the range of int8, 0 to 1."""


def fit_scale(embeddings: NDArray[np.float32]) -> float:
    """The scale of int8 for embeddings (N, D): the range of these, with headroom, in 127 steps."""
    scale = _HEADROOM * float(np.abs(embeddings).max()) / INT8_STEPS
    return float(f"{scale:.{_DIGITS}g}")


def as_stored(embeddings: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Embeddings (N, D) as they come back from int8."""
    return np.asarray(int8_steps(embeddings, scale) * np.float32(scale), np.float32)


def compare(name: str, data: Labelled, scale: float) -> list[Comparison]:
    """Both probes on a data set, with float32 and with int8 embeddings."""
    stored = replace(data, embeddings=as_stored(data.embeddings, scale))
    # One resample: intervals are not reported, because both scores are of the same places.
    before, after = probe(data, resamples=1), probe(stored, resamples=1)
    validation = data.places[data.validation]
    return [
        Comparison(
            data=name,
            probe=kind,
            n=len(validation),
            places=len(np.unique(validation)),
            accuracy=_both(before[kind], after[kind], "accuracy"),
            macro_f1=_both(before[kind], after[kind], "macro_f1"),
            clipped=float((np.abs(data.embeddings) > (INT8_STEPS + 0.5) * scale).mean()),
        )
        for kind in PROBES
    ]


def _both(before: object, after: object, name: str) -> tuple[float, float]:
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        raise TypeError("a probe's scores are a mapping")
    return float(before[name]), float(after[name])


def loss_of(found: Sequence[Comparison]) -> dict[str, float]:
    """The worst change of each score; negative is worse."""
    return {
        name: round(min(after - before for before, after in changes), 4)
        for name, changes in (
            ("accuracy", [one.accuracy for one in found]),
            ("macro_f1", [one.macro_f1 for one in found]),
        )
    }


def int8_of(
    sets: Mapping[str, Labelled], scale: float | None = None
) -> tuple[EmbeddingInt8, list[Comparison]]:
    """The card's field, and the comparisons that it is from.

    Args:
        sets: embeddings by name of the data; the scale is fitted on the training places of the
            first.
        scale: a scale to keep; None fits one.

    Raises:
        Int8Loses: a probe loses more than `MOST_LOSS`.
    """
    first = next(iter(sets.values()))
    scale = fit_scale(first.part(~first.validation)[0]) if scale is None else scale
    found = [one for name, data in sets.items() for one in compare(name, data, scale)]
    loss = loss_of(found)
    for name, change in loss.items():
        if change < -MOST_LOSS:
            raise Int8Loses(
                f"int8 with scale {scale} changes {name} of a probe by {change}, and the largest "
                f"allowed loss is {MOST_LOSS}: keep float32 embeddings for this bundle"
            )
    return EmbeddingInt8(scale=scale, loss=loss), found
