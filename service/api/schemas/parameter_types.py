"""Types of single parameters, which forms and JSON bodies share: dates, masks, boxes, outputs.

Each type reads a value as clients send it, checks it and describes it in the OpenAPI document. The
`description` of a parameter completes "NAME: …"; "default" states what holds if it is left out.
"""

import math
import re
from datetime import date, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from service.errors import InvalidRequest, shown
from service.read.masks import parse_mask
from service.read.reflectance import DatedNumber
from service.run.request import Runnable, Subscriber

Operation = Literal[Runnable, "series"]
"""The operation that a body requests: a run, or measured series."""
SimilarOutput = Literal["similarity", "similarities"]
ClassOutput = Literal["class", "confidence", "entropy", "probabilities", "polygons"]
DatedOutput = Literal[ClassOutput, "attribution"]
"""Outputs of a class of a time series."""
SeriesOutput = Literal["class", "confidence", "entropy", "probabilities", "attribution"]
SensorName = Literal["sentinel-2", "hls", "landsat", "modis", "planetscope"]
QuantileOutput = Literal["q10", "q50", "q90"]
_MOST_DATED = 1_000
PLAUSIBLE_DATES = (date(1970, 1, 1), date(2099, 12, 31))
_ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_JSON_LIST = re.compile(r"\s*\[(.*)\]\s*", re.DOTALL)
_DECIMAL_COMMA = re.compile(r"\s*[-+]?\d+,\d+\s*")
_BASELINE = re.compile(r"N?(\d{1,2})\.(\d{2})")


class StrictModel(BaseModel):
    """A frozen model that rejects unknown parameters; its errors hold no input."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class LooseModel(BaseModel):
    """A frozen model that ignores unknown members, which GeoJSON and OGC's standards allow."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


def _iso_date(value: object) -> object:
    # By default pydantic reads "20210105" as seconds since 1970.
    if isinstance(value, str) and not _ISO_DATE.fullmatch(value):
        raise ValueError(f"'{shown(value)}' is not an ISO date such as 2021-01-05")
    if not isinstance(value, str | date):
        raise ValueError(  # noqa: TRY004 - pydantic reports a ValueError
            f"a date must be a text such as 2021-01-05, and is of type {type(value).__name__}"
        )
    return value


def _plausible_date(day: date) -> date:
    """Reject a date outside the years in which dates are read from files."""
    first, last = PLAUSIBLE_DATES
    if not first <= day <= last:
        raise ValueError(f"{day} is not a date from {first} to {last}")
    return day


def listed(value: object) -> object:
    """Split values: "a,b", "a;b", '["a", "b"]', ["a", "b"] and ["a,b", "c"] become lists."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple):
        return value
    parts: list[object] = []
    for item in values:
        parts += _split(item) if isinstance(item, str) else [item]
    return parts


def _split(text: str) -> list[str]:
    """The values in a text, which may be a list in JSON's form."""
    found = _JSON_LIST.fullmatch(text)
    parts = re.split(r"[,;]\s*|\n", (found[1] if found else text).strip())
    return [part.strip().strip("\"'") if found else part.strip() for part in parts]


def _mask(value: object) -> object:
    """Join one or several rules of a mask to one text, and check that each rule exists."""
    text = ",".join(value) if isinstance(value, list) and all(map(_is_text, value)) else value
    if isinstance(text, str):
        try:
            parse_mask(text)
        except InvalidRequest as error:
            raise ValueError(error.errors[0]["detail"]) from error
    return text


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _dated(value: object) -> object:
    """Parse a number, or pairs of a date or baseline and the number that holds from then on.

    Raises:
        ValueError: a part is neither of them, or two parts have the same date or baseline.
    """
    parts = listed(value)
    if not isinstance(parts, list):
        return value
    if len(parts) > _MOST_DATED:
        raise ValueError(f"{len(parts)} numbers; at most {_MOST_DATED} are allowed")
    pairs = [_dated_number(part) for part in parts]
    texts = value if isinstance(value, list) else [value]
    if len(texts) == 1 and isinstance(texts[0], str) and _DECIMAL_COMMA.fullmatch(texts[0]):
        raise ValueError(
            f"'{shown(texts[0])}' has a decimal comma: give {texts[0].strip().replace(',', '.')}"
        )
    if len({since for since, _ in pairs}) < len(pairs):
        raise ValueError(
            f"'{shown(value)}' has several numbers for one date or processing baseline: give one "
            "for each"
        )
    if len(pairs) == 1 and pairs[0][0] == date.min:
        return pairs[0][1]
    return tuple(sorted(pairs, key=lambda pair: (isinstance(pair[0], date), str(pair[0]))))


def _dated_number(part: object) -> tuple[date | str, float]:
    if not isinstance(part, str | int | float):
        raise ValueError("a number is required, or a text such as 2022-01-25:-0.1")  # noqa: TRY004 - as above
    text, colon, number = str(part).rpartition(":")
    baseline = _BASELINE.fullmatch(text.strip())
    try:
        if baseline:
            return f"{int(baseline[1]):02d}.{baseline[2]}", _finite(number)
        return date.fromisoformat(text.strip()) if colon else date.min, _finite(number)
    except ValueError as error:
        raise ValueError(
            f"'{shown(part)}' is not a number such as -0.1, a number from a date on such as "
            "2022-01-25:-0.1, or a number from a processing baseline on such as 04.00:-0.1"
        ) from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)} is not a finite number")
    return number


def _positive(value: DatedNumber | None) -> DatedNumber | None:
    numbers = [value] if isinstance(value, int | float) else [n for _, n in value or ()]
    if any(number <= 0 for number in numbers):
        raise ValueError(f"the scale must be greater than 0, and is {min(numbers):g}")
    return value


def _once(value: object) -> object:
    """Remove repetitions from a list and keep its order."""
    # A list may hold values without a hash, which validation rejects.
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return list(dict.fromkeys(value))
    return value


IsoDate = Annotated[
    date,
    BeforeValidator(_iso_date),
    AfterValidator(_plausible_date),
    WithJsonSchema({"type": "string", "format": "date", "examples": ["2021-01-05"]}),
]
Split = BeforeValidator(listed)
SplitOnce = BeforeValidator(lambda value: _once(listed(value)))
_DATED_SCHEMA = WithJsonSchema(
    {
        "anyOf": [{"type": "number"}, {"type": "string"}],
        "examples": [-0.1, "2022-01-25:-0.1", "04.00:-0.1"],
    }
)
Scale = Annotated[
    DatedNumber | None, BeforeValidator(_dated), AfterValidator(_positive), _DATED_SCHEMA
]
"""A factor, or several with the dates or processing baselines from which on they hold."""
Offset = Annotated[DatedNumber | None, BeforeValidator(_dated), _DATED_SCHEMA]
"""A summand, or several with the dates or processing baselines from which on they hold."""
Mask = Annotated[Annotated[str, Field(max_length=200)] | None, BeforeValidator(_mask)]
"""Rules of cloud masks, comma-separated."""
# With fail_fast, because a list of millions of invalid values would make as many errors.
AtLeastOne = Field(min_length=1, fail_fast=True)
Number = Annotated[float, Field(allow_inf_nan=False)]
ModelName = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=200,
        description="`name` or `name@version` from `GET /models`; default: the task's default "
        "model",
    ),
]
Start = Annotated[
    IsoDate | None,
    Field(description="first day of the model's time window; default: by the card's rule"),
]
Horizon = Annotated[
    int | None,
    Field(
        ge=1,
        description="number of steps to forecast, 1 to the card's maximum; default: the maximum",
    ),
]
Backtest = Annotated[
    bool | None,
    Field(
        description="true: forecast from earlier dates of the same input as well, report the "
        "errors, and correct the forecast by them; false: do not; else rasters and fields with "
        "enough history are backtested, points and series are not"
    ),
]


def _box(
    value: tuple[float, float, float, float] | None,
) -> tuple[float, float, float, float] | None:
    if value is not None:
        west, south, east, north = value
        if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south < north <= 90):
            raise ValueError(
                f"{west:g}, {south:g}, {east:g}, {north:g} is not a valid box: give west, south, "
                "east, north in degrees, with south less than north"
            )
        if west == east:
            raise ValueError(
                f"west and east are both {west:g}, so the box is empty: give an east that differs"
            )
    return value


Box = Annotated[tuple[Number, Number, Number, Number] | None, AfterValidator(_box)]
"""West, south, east, north in degrees; west is greater than east across the antimeridian."""
_Address = Annotated[str, Field(min_length=1, max_length=2048)]


class SubscriberBody(StrictModel):
    """URLs that a job calls, with the names of OGC API - Processes."""

    successUri: Annotated[_Address, Field(description="called when the job has a result")]  # noqa: N815 - the standard's name
    failedUri: Annotated[_Address | None, Field(description="called when the job failed")] = None  # noqa: N815 - the standard's name
    inProgressUri: Annotated[  # noqa: N815 - the standard's name
        _Address | None,
        Field(description="called when the job begins, and after each further 10 per cent"),
    ] = None

    @property
    def subscriber(self) -> Subscriber:
        """The URLs as a value that is independent of HTTP."""
        return Subscriber(
            success=self.successUri, failed=self.failedUri, progress=self.inProgressUri
        )


SUBSCRIBER = (
    "URLs that a job calls when it ends, on hosts that the server allows; requires `Prefer: "
    "respond-async`"
)
"""Description of the parameter `subscriber`."""


def subscriber_of(body: SubscriberBody | None) -> Subscriber | None:
    """The URLs of a subscriber as a value that is independent of HTTP; None without one."""
    return None if body is None else body.subscriber


_MOMENT = re.compile(
    r"\d{4}(?:-\d\d(?:-\d\d(?:T\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d))?)?)?"
)


def _is_moment(text: str) -> bool:
    """Whether a text is an ISO year, month, day, or time with its zone."""
    if not _MOMENT.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text + "0001-01-01T00:00:00Z"[len(text) :])
    except ValueError:
        return False
    return True


def interval(value: str | None) -> str | None:
    """Check a date or an interval of two dates, as STAC APIs accept them."""
    if value is None:
        return None
    ends = value.split("/")
    for end in ends:
        if not (end in {"", ".."} and len(ends) == 2) and not _is_moment(end):
            raise ValueError(
                f"'{shown(end)}' is not a date such as 2021, 2021-05, 2021-05-01 or "
                "2021-05-01T00:00:00Z"
            )
    if len(ends) > 2 or not any(end.strip(".") for end in ends):
        raise ValueError(
            f"'{shown(value)}' is not one date, or two dates separated by `/` of which one may be "
            "`..`"
        )
    return value


NEW_NAME = Field(
    max_length=64,
    pattern=r"^[a-z0-9][a-z0-9-]*$",
    description="name of the new model, for `model=NAME`: lower-case letters, digits and hyphens",
    examples=["my-crops"],
)
Description = Annotated[
    str, Field(max_length=2000, description="description of the new model, for its card")
]
EmbeddingName = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=200,
        description="a model of `/embed` for pixels, such as `embed-pixel`; its embedding is tried "
        "as features, with and without the bands; default: the bands only",
    ),
]
