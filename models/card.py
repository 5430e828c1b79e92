"""Model card: inputs, outputs, training data and scores of a bundle.

A bundle is a folder with a `card.json` and the ONNX files that the card names. The service takes a
model's inputs and outputs from the card alone, and `GET /models/{name}` returns the card. This
module does not import torch, because the service imports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Task = Literal["classify-pixels", "forecast", "landcover", "embed"]
Modality = Literal["pixel", "patch"]
Precision = Literal["float32", "float16", "int8"]
StartRule = Literal["calendar-year", "fullest-year", "every-date", "last-steps"]

CARD_FILE = "card.json"

# Inputs of the graph of each modality, without `day_of_year` and `elsewhere`, which a card may add.
PIXEL_INPUTS = ("values", "valid", "days")
PATCH_INPUTS = ("patches",)
# Inputs that are reflectance: float16 in a float16 variant, which halves the transfer to a device,
# and float32 in any other variant. All other inputs have the same type in all variants.
REFLECTANCE = ("values", "patches")
# Name of the only output of each task's graph.
OUTPUTS: dict[Task, str] = {
    "classify-pixels": "probabilities",
    "forecast": "quantiles",
    "landcover": "probabilities",
    "embed": "embedding",
}


Box = tuple[float, float, float, float]
"""West, south, east and north in degrees."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, kw_only=True)
class ResolvedTimeWindow:
    """A model's time window, applied to the dates of one series."""

    start: date
    """The first day from which observations are used; responses repeat it."""
    first_day: date
    """The day of the regular grid's first step; `days` in the graph count from here."""
    used: tuple[int, ...]
    """Positions, in the dates given, of those inside the window."""
    last: date | None
    """The last date used, None if no date is used."""

    def days(self, dates: Sequence[date]) -> list[int]:
        """Days from `first_day` to each used date: the graph's input `days` (T)."""
        return [(dates[i] - self.first_day).days for i in self.used]


class TimeWindow(_Frozen):
    """The span of dates that a model sees: `steps` steps of `step_days` days."""

    steps: Annotated[int, Field(ge=2)]
    """M, the length of the regular grid."""
    step_days: Annotated[int, Field(ge=1)]
    """Days between two steps of the regular grid."""
    start: StartRule
    """How the first day is chosen if the request does not give it.

    `calendar-year`: 1 January of the year with the most dates. `fullest-year`: the first day of the
    month from which the window holds the most dates. `every-date`: all dates are used, whatever
    their year; the first day is 1 January of the first date's year. The graph places all years on
    one that begins on 1 January, even if a start is given, so this rule suits covers that do not
    change from year to year. `last-steps`: the window ends on the last date. If several candidates
    hold the same number of dates, the later year is chosen, and for `fullest-year` January before
    other months.

    If a start is given, the window of every rule begins there and has its usual length.
    """

    @property
    def yearly(self) -> bool:
        """Whether the graph places the dates of several years on one."""
        return self.start == "every-date"

    def resolve(self, dates: Sequence[date], start: date | None = None) -> ResolvedTimeWindow:
        """Apply the window to dates.

        Args:
            dates: acquisition dates (T), at least one, in any order.
            start: first day of the window; None applies the card's rule.

        Returns:
            The window, with the dates inside it in the order given.
        """
        length = self.steps * self.step_days
        if self.start == "last-steps":
            inside = [d for d in dates if start is None or _within(d, start, length)]
            last = max(inside, default=None)
            # The grid's last step is the last date, so that a forecast starts one step later.
            end = last or (shifted(start, length) if start else max(dates))
            first_day = shifted(end, -(self.steps - 1) * self.step_days)
            lower = max(start, first_day) if start else first_day
            used = tuple(i for i, d in enumerate(dates) if last and lower <= d <= last)
            return ResolvedTimeWindow(
                start=start or first_day, first_day=first_day, used=used, last=last
            )
        if self.yearly:
            used = tuple(
                i for i, d in enumerate(dates) if start is None or _within(d, start, length)
            )
            # The grid's first step is always 1 January, so that the season has the same position
            # as in training.
            first_day = date((start or min(dates)).year, 1, 1)
            last = max((dates[i] for i in used), default=None)
            return ResolvedTimeWindow(
                start=start or first_day, first_day=first_day, used=used, last=last
            )
        first_day = start or max(
            self._candidates(dates),
            key=lambda s: (sum(_within(d, s, length) for d in set(dates)), s.month == 1, s),
        )
        used = tuple(i for i, d in enumerate(dates) if _within(d, first_day, length))
        last = max((dates[i] for i in used), default=None)
        return ResolvedTimeWindow(start=first_day, first_day=first_day, used=used, last=last)

    def _candidates(self, dates: Sequence[date]) -> list[date]:
        years = range(max(min(dates).year - 1, date.min.year), max(dates).year + 1)
        months = range(1, 13) if self.start == "fullest-year" else (1,)
        return [date(year, month, 1) for year in years for month in months]


def shifted(day: date, days: int) -> date:
    """A date some days later or earlier, held within the calendar (years 1 to 9999)."""
    ordinal = day.toordinal() + days
    return date.fromordinal(min(max(ordinal, date.min.toordinal()), date.max.toordinal()))


def _within(day: date, start: date, length: int) -> bool:
    """Whether a date is one of the `length` days from `start` on."""
    return 0 <= (day - start).days < length


class LegendClass(_Frozen):
    """One class: the pixel value it has in a map, and how it is shown."""

    value: Annotated[int, Field(ge=0, le=254)]
    """Pixel value in the `class` raster, and position among the probabilities."""
    name: str
    color: Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")]
    code: int | None = None
    """The source legend's own number (CDL, WorldCover), None if it has none."""


class TrainingData(_Frozen):
    """One data set that a model was trained on."""

    name: str
    use: str
    """Purpose: pretraining, labels, validation."""
    n: int
    """Samples used."""
    licence: str
    source: str


class Variant(_Frozen):
    """One ONNX file of the bundle."""

    name: Precision
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+\.onnx$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: int
    opset: int
    """ONNX operator set, for information; ONNX Runtime reads it from the file."""
    loss: dict[str, float] = {}
    """Measured change of each metric against float32 (negative is worse)."""


class EmbeddingInt8(_Frozen):
    """Parameters of storing an embedding as int8: value = int8 x scale, in every dimension."""

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """The scale, one for all dimensions, so that int8 vectors have the cosines of the originals."""
    loss: dict[str, float] = {}
    """Measured change of each score of each probe against float32 (negative is worse)."""


class ModelCard(_Frozen):
    """Inputs, outputs, training data, scores and files of a bundle."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    task: Task
    modality: Modality
    description: str
    bands: Annotated[tuple[str, ...], Field(min_length=1)]
    """Sentinel-2 band names, in the order of the graph's C axis."""
    indices: tuple[str, ...] = ()
    """Spectral indices computed in the graph (K), by name; empty for imagery."""
    window: TimeWindow | None = None
    """The time window of a pixel model; None for imagery."""
    patch: int | None = None
    """Side of a patch in pixels, for imagery; None for pixels."""
    day_of_year: bool = False
    """Whether the graph also takes `day_of_year` (N): the day of the year of the first day, 1 to
    366."""
    elsewhere: bool = False
    """Whether the graph also takes `elsewhere` (N): 1 where the place is far from the training data
    (`extent`), 0 where it is not or is unknown."""
    min_observations: Annotated[int, Field(ge=1)]
    """Clear observations that a pixel needs; a pixel with fewer has no prediction."""
    classes: tuple[LegendClass, ...] = ()
    horizon: int | None = None
    """Largest number of steps that a forecast reaches (H)."""
    quantiles: tuple[float, ...] = ()
    """The quantiles of a forecast (Q), ascending."""
    embedding: int | None = None
    """D, the length of an embedding."""
    embedding_int8: EmbeddingInt8 | None = None
    """Parameters of storing embeddings as int8; None if their loss was not measured."""
    default: bool = False
    """Whether the model is used for its task if a request does not name a model."""
    metrics: dict[str, Any] = {}
    training_data: tuple[TrainingData, ...] = ()
    training: dict[str, Any] = {}
    """Provenance: the command, the configuration, the seed, the duration."""
    sensors: tuple[str, ...] = ()
    """Sensors of the training imagery, e.g. `sentinel-2`; empty if unknown."""
    other_sensors: dict[str, str] = {}
    """Sensors that the model accepts although it was not trained on their imagery, each with the
    measured loss of accuracy, which a warning reports."""
    pixel_size: tuple[float, float] | None = None
    """Smallest and largest pixel size of the training imagery, metres; None if unknown."""
    regions: dict[str, Any] = {}
    """Scores on regions that were entirely held out, by region: accuracy or error, calibration."""
    intended_use: str = ""
    """What the model's results are good for; empty if the bundle does not state it."""
    extent: tuple[Box, ...] = ()
    """Boxes around the places whose labels, or for a forecast whose series, the model was trained
    on, degrees; empty if they are unknown or the model has no labels. Points scattered over the
    world are in no box."""
    licence: str
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """The sha256 of the float32 variant's file."""

    @property
    def id(self) -> str:
        """The name with the version, as `name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs."""
        return input_names(self.modality, day_of_year=self.day_of_year, elsewhere=self.elsewhere)

    @property
    def output(self) -> str:
        """Name of the graph's output."""
        return OUTPUTS[self.task]

    def use_in_answers(self) -> dict[str, str]:
        """`intended_use` as a member of a JSON answer; empty if the bundle does not state it."""
        return {"intended_use": self.intended_use} if self.intended_use else {}

    def lowest_scores(self) -> str:
        """The lowest scores of `regions` in words; empty if none is known."""
        accuracy, rmse, coverage = (
            _values(self.regions, score) for score in ("accuracy", "rmse", "coverage")
        )
        if accuracy and self.classes:
            what = "pixels" if self.modality == "pixel" else "patches"
            return (
                "where a region was left out of its training, as few as "
                f"{100 * min(accuracy):.0f} % of the {what} were right"
            )
        if rmse and coverage and self.quantiles:
            level = 100 * (self.quantiles[-1] - self.quantiles[0])
            return (
                "where a region was left out of its training, the RMSE was up to "
                f"{max(rmse):.2f}, and as few as {100 * min(coverage):.0f} % of the values were "
                f"in the {level:.0f} % prediction interval"
            )
        return ""

    @model_validator(mode="after")
    def _fits_its_task(self) -> ModelCard:
        needs: dict[str, bool] = {
            "window": self.modality == "pixel",
            "indices": self.modality == "pixel",
            "patch": self.modality == "patch",
            "classes": self.task in {"classify-pixels", "landcover"},
            "horizon": self.task == "forecast",
            "quantiles": self.task == "forecast",
            "embedding": self.task == "embed",
        }
        for field, needed in needs.items():
            if bool(getattr(self, field)) != needed:
                verb = "needs" if needed else "must not have"
                msg = f"a {self.task} card of modality {self.modality} {verb} '{field}'"
                raise ValueError(msg)
        if self.embedding_int8 and self.task != "embed":
            raise ValueError(f"a {self.task} card must not have 'embedding_int8'")
        if self.other_sensors and not self.sensors:
            raise ValueError(
                "'other_sensors' needs 'sensors': list the sensors of the training data there"
            )
        if self.pixel_size and not 0 < self.pixel_size[0] <= self.pixel_size[1]:
            raise ValueError(
                "'pixel_size' must be the smallest and the largest size in metres, above 0"
            )
        if not all(w <= e and -90 <= s <= n <= 90 for w, s, e, n in self.extent):
            raise ValueError(
                "a box of 'extent' must be west, south, east and north in degrees, in this order; "
                "add 360 to the east of a box across the antimeridian"
            )
        if self.elsewhere and not (self.task == "forecast" and self.extent):
            raise ValueError("'elsewhere' needs a forecast card with 'extent'")
        if [c.value for c in self.classes] != list(range(len(self.classes))):
            raise ValueError("the values of 'classes' must be 0, 1, 2 and so on, in this order")
        if self.variants[0].name != "float32" or self.variants[0].sha256 != self.sha256:
            raise ValueError("the first variant must be float32, with the card's sha256")
        return self


def input_names(modality: Modality, *, day_of_year: bool, elsewhere: bool) -> tuple[str, ...]:
    """Names of a graph's inputs, in order.

    Args:
        modality: of the model.
        day_of_year: whether a pixel model takes it.
        elsewhere: the same.
    """
    if modality == "patch":
        return PATCH_INPUTS
    further = {"day_of_year": day_of_year, "elsewhere": elsewhere}
    return (*PIXEL_INPUTS, *(name for name, taken in further.items() if taken))


def _values(regions: Mapping[str, Any], score: str) -> list[float]:
    """A score of the regions that have it, without the limits of its interval."""
    found = [region.get(score) for region in regions.values() if isinstance(region, Mapping)]
    first = [v[0] if isinstance(v, list | tuple) and v else v for v in found]
    return [float(v) for v in first if isinstance(v, int | float) and not isinstance(v, bool)]
