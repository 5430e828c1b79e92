"""Score tables: intervals by bootstrap over places, spread over seeds, as Markdown and in cards.

outputs of each seed -> sums by place -> scores with intervals -> rows -> a section of the report
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.calibration import cross_fitted_scores, macro_f1
from training.errors import TrainingError
from training.forecasting import forecast_scores
from training.task import Outputs

Floats = NDArray[np.float32] | NDArray[np.float64]
Ints = NDArray[np.int64]
RESAMPLES = 1000
_INTRODUCTION = """# Results

Written by `python -m training evaluate` and `python -m training ablate`; each replaces its own \
sections ([how to train](how-to/train.md) describes them). All rows of a table were scored on the \
same pixels or patches, at places that were held out from training.
"""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A number with its 95 % interval and its spread over seeds."""

    value: float
    """Mean over seeds."""
    low: float
    high: float
    """Equal to `low` if there is no interval."""
    spread: float | None = None
    """Standard deviation over seeds; None for one seed."""

    def __str__(self) -> str:
        text = f"{self.value:.3f}"
        if self.low != self.high:
            text += f" ({self.low:.3f} to {self.high:.3f})"
        return text if self.spread is None else f"{text} ± {self.spread:.3f}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in a table."""

    name: str
    seeds: int
    scores: Mapping[str, Score]
    """By the name of the column."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The scores of all models on one split."""

    title: str
    split: str
    """The scored data and how they are separated from training."""
    n: int
    places: int
    rows: Sequence[Row]
    commands: Sequence[str] = field(default_factory=tuple)
    """Commands that reproduce the table."""
    notes: Sequence[str] = field(default_factory=tuple)


def outputs_row(name: str, seeds: Sequence[Outputs]) -> Row:
    """The row of a model from its outputs of each seed, on the same places.

    Raises:
        TrainingError: the places of two seeds differ.
    """
    first = seeds[0]
    for other in seeds[1:]:
        if not np.array_equal(first["places"], other["places"]):
            raise TrainingError(
                f"runs of {name} that differ in the seed were scored on different places: give "
                "runs with the same --data"
            )
    scores = _class_scores(seeds) if "logits" in first else _errors(seeds)
    return Row(name=name, seeds=len(seeds), scores=scores)


def sized(outputs: Outputs) -> tuple[int, int]:
    """Description of a table's split: n and places."""
    n = int(outputs["known"][..., 0].sum()) if "known" in outputs else len(outputs["labels"])
    return n, len(np.unique(outputs["places"]))


def measured(values: Sequence[float]) -> Score:
    """The mean of a measure over seeds, without an interval."""
    return _score([float(v) for v in values], None)


def _class_scores(seeds: Sequence[Outputs]) -> dict[str, Score]:
    labels, places = seeds[0]["labels"], seeds[0]["places"]
    predicted = [outputs["logits"].argmax(axis=1) for outputs in seeds]
    many = seeds[0]["logits"].shape[1]
    matrices = [place_confusions(p, labels, places, many) for p in predicted]
    errors = [
        cross_fitted_scores(a["logits"], labels, places)["expected_calibration_error"]
        for a in seeds
    ]
    return {
        "accuracy": interval(
            matrices,
            lambda c: np.trace(c, axis1=-2, axis2=-1) / c.sum(axis=(-2, -1)),
            [float((p == labels).mean()) for p in predicted],
        ),
        "macro-F1": interval(matrices, _macro_f1, [macro_f1(p, labels, many) for p in predicted]),
        "calibration error": measured(errors),
    }


def place_confusions(predicted: Ints, labels: Ints, places: Ints, classes: int) -> Floats:
    """Confusion matrix of each place (P, K, K): true class by predicted class."""
    number = np.unique(places, return_inverse=True)[1]
    cells = (number * classes + labels) * classes + predicted
    counts = np.bincount(cells, minlength=(number.max() + 1) * classes**2)
    return counts.reshape(-1, classes, classes).astype(np.float64)


def _macro_f1(confusion: Floats) -> Floats:
    """Of confusion matrices (..., K, K): the mean over the classes that each has (...)."""
    there = confusion.sum(axis=-1) > 0
    both = confusion.sum(axis=-2) + confusion.sum(axis=-1)
    f1 = 2 * np.diagonal(confusion, axis1=-2, axis2=-1) / np.maximum(both, 1)
    return np.asarray(f1.mean(axis=-1, where=there))


def _errors(seeds: Sequence[Outputs]) -> dict[str, Score]:
    """RMSE by index, the mean of these, and the share of targets within the outer quantiles."""
    sums, found = [], []
    for outputs in seeds:
        quantiles, target, known = (outputs[k] for k in ("quantiles", "target", "known"))
        middle = quantiles[..., quantiles.shape[-1] // 2]
        inside = (target >= quantiles[..., 0]) & (target <= quantiles[..., -1])
        number = np.unique(outputs["places"], return_inverse=True)[1]
        parts = np.zeros((number.max() + 1, 3, target.shape[-1]))
        for row, part in enumerate((np.square(middle - target), np.ones(target.shape), inside)):
            np.add.at(parts[:, row], number, np.where(known, part, 0).sum(axis=1))
        sums.append(parts)
        found.append(
            forecast_scores(
                np.asarray(quantiles, dtype=np.float32), np.asarray(target, np.float32), known
            )
        )

    def rmse(c: Floats) -> Floats:
        return np.asarray(np.sqrt(c[..., 0, :] / c[..., 1, :]))

    def of_index(place: int) -> Callable[[Floats], Floats]:
        return lambda c: rmse(c)[..., place]

    out = {
        f"RMSE {index.upper()}": interval(sums, of_index(i), [s["rmse"][index] for s in found])
        for i, index in enumerate(found[0]["rmse"])
    }
    out["RMSE mean"] = interval(
        sums, lambda c: rmse(c).mean(axis=-1), [s["rmse_mean"] for s in found]
    )
    if seeds[0]["quantiles"].shape[-1] > 1:
        out["coverage"] = interval(
            sums,
            lambda c: c[..., 2, :].sum(axis=-1) / c[..., 1, :].sum(axis=-1),
            [s["coverage"] for s in found],
        )
    return out


def interval(
    seeds: Sequence[Floats], score: Callable[[Floats], Floats], values: Sequence[float]
) -> Score:
    """95 % interval of a mean over seeds, by drawing places with replacement.

    All seeds use the same draws, so that the interval is that of their mean.

    Args:
        seeds: for each seed, the terms of the score by place (P, ...).
        score: computes the scores (R) of resamples from the sums of their terms over places
            (R, ...).
        values: for each seed, the score of all places without resampling.
    """
    rng = np.random.default_rng(0)
    places = len(seeds[0])
    weights = rng.multinomial(places, np.full(places, 1 / places), size=RESAMPLES).astype(float)
    drawn = np.mean([score(np.tensordot(weights, sums, axes=1)) for sums in seeds], axis=0)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return _score(values, (float(low), float(high)))


def _score(values: Sequence[float], limits: tuple[float, float] | None) -> Score:
    mean = float(np.mean(values))
    low, high = limits or (mean, mean)
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Score(value=mean, low=low, high=high, spread=spread)


def markdown(table: Table) -> str:
    """A table as Markdown, with a description of its split and columns."""
    columns = list(dict.fromkeys(key for row in table.rows for key in row.scores))
    spread = any(s.spread is not None for row in table.rows for s in row.scores.values())
    reading = f"Brackets hold 95 % intervals by {RESAMPLES} bootstraps over places"
    reading += "; the number after ± is the standard deviation over seeds." if spread else "."
    head = f"Split: {table.split}; n = {table.n}, {table.places} places. {reading}"
    lines = [
        " ".join([head, *table.notes]),
        "",
        "| model | seeds | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for row in table.rows:
        cells = [str(row.scores[c]) if c in row.scores else "" for c in columns]
        lines.append(f"| {row.name} | {row.seeds} | " + " | ".join(cells) + " |")
    if table.commands:
        lines += ["", "```sh", *table.commands, "```"]
    return "\n".join(lines)


def as_evaluation(table: Table) -> dict[str, Any]:
    """A table in the form of a card: each score as value, low, high."""
    return {
        "split": table.split,
        "n": table.n,
        "places": table.places,
        "interval": "95 %, bootstrap over places; spread: standard deviation over seeds",
        "models": {
            row.name: {
                "seeds": row.seeds,
                **{key: _numbers(score) for key, score in row.scores.items()},
                **_spreads(row),
            }
            for row in table.rows
        },
    }


def _numbers(score: Score) -> list[float]:
    return [round(v, 4) for v in (score.value, score.low, score.high)]


def _spreads(row: Row) -> dict[str, dict[str, float]]:
    found = {k: round(s.spread, 4) for k, s in row.scores.items() if s.spread is not None}
    return {"spread": found} if found else {}


def write_section(report: Path, title: str, text: str) -> None:
    """Write a section under `## title` into a Markdown file; it replaces an existing one."""
    old = report.read_text() if report.exists() else _INTRODUCTION
    section = f"## {title}\n\n{text}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(old):
        new = pattern.sub(lambda _: section + "\n", old)
    else:
        new = f"{old.rstrip()}\n\n{section}"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(new.rstrip() + "\n")
