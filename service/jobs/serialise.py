"""Requests and results as JSON documents, for the job store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from models.card import Task
from service.errors import StackWarning, warning_list
from service.jobs.storage import RemoteFile
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.reflectance import DatedNumber
from service.run.execute import Result
from service.run.executors import Timing
from service.run.request import (
    PointQuery,
    RasterRequest,
    Runnable,
    SeriesInput,
    SeriesRequest,
    SimilarRequest,
    Subscriber,
    TaskRequest,
)


def request_document(
    request: TaskRequest, folder: Path, *, model: str | None = None
) -> dict[str, Any]:
    """A request as a JSON document.

    Args:
        request: the request.
        folder: the request's folder. Paths of files in it are stored relative to it; paths of
            other files are absolute.
        model: model to store instead of the request's own, which may be None.
    """
    model = model or request.model
    if isinstance(request, SeriesRequest):
        series = [
            {
                "id": one.id,
                "dates": _iso(one.dates),
                **({} if one.lonlat is None else {"lonlat": list(one.lonlat)}),
                **{b: list(v) for b, v in one.bands.items()},
            }
            for one in request.series
        ]
        rest = {"model": model, "start": _iso(request.start), "horizon": request.horizon}
        rest["attribution"] = request.attribution
        rest["backtest"] = request.backtest
        whole = {"series": series, **rest}
        return {"task": request.task, "series": whole, **_subscriber_document(request)}
    files = [_file(file, folder) for file in request.files]
    stack = {name: _iso(value) for name, value in vars(request.stack).items()}
    points = request.points
    fields = {
        **stack,
        "model": model,
        "modality": request.modality,
        "start": _iso(request.start),
        "outputs": request.outputs,
        "horizon": request.horizon,
        "backtest": request.backtest,
        "stride": request.stride,
        "smooth": request.smooth,
        "min_area": request.min_area,
        "dtype": request.dtype,
        "polygons": None if request.fields is None else _file(request.fields, folder),
        "items": [dict(item) for item in request.items],
        "points": None if points is None else [dict(point.feature) for point in points],
    }
    if isinstance(request, SimilarRequest):
        at, file = request.place_points, request.place_file
        fields["place_points"] = None if at is None else [dict(point.feature) for point in at]
        fields["place_file"] = None if file is None else _file(file, folder)
    return {
        "task": request.operation, "files": files, "fields": fields, **_subscriber_document(request)
    }  # fmt: skip


def _subscriber_document(request: TaskRequest) -> dict[str, Any]:
    return {} if request.subscriber is None else {"subscriber": asdict(request.subscriber)}


def _file(file: SourceFile, folder: Path) -> list[str]:
    """A file's name and its paths, relative to the folder if they are inside."""
    return [
        file.name,
        *(
            str(path.relative_to(folder) if path.is_relative_to(folder) else path)
            for path in file.paths
        ),
    ]


def request_of(document: Mapping[str, Any], folder: Path) -> TaskRequest:
    """The request that a JSON document holds.

    Args:
        document: a document that `request_document` of this or an earlier release made.
        folder: folder to which relative paths refer.
    """
    task: Runnable = document["task"]
    called = document.get("subscriber")
    subscriber = None if called is None else Subscriber(**called)
    if "series" in document:
        body = document["series"]
        return SeriesRequest(
            task=_task(task),
            series=tuple(map(_series_of, body["series"])),
            model=body.get("model"),
            start=_date(body.get("start")),
            horizon=body.get("horizon"),
            subscriber=subscriber,
            attribution=bool(body.get("attribution")),
            backtest=body.get("backtest", False),  # of a release before backtests
        )
    fields = document["fields"]
    plain = RasterRequest(
        task=_task(task),
        files=tuple(_file_of(entry, folder) for entry in document["files"]),
        stack=StackOptions(
            layout=fields.get("layout"),
            dates=tuple(map(date.fromisoformat, fields["dates"])) if fields.get("dates") else None,
            bands=_tuple(fields.get("bands")),
            scale=_dated(fields.get("scale")),
            offset=_dated(fields.get("offset")),
            mask=fields.get("mask"),
            grid=fields.get("grid"),
            bbox=_bbox(fields.get("bbox")),
            area=fields.get("area"),
            left_out=tuple((name, reason) for name, reason in fields.get("left_out") or ()),
            sensor=fields.get("sensor"),
        ),
        model=fields.get("model"),
        modality=fields.get("modality"),
        start=_date(fields.get("start")),
        outputs=_tuple(fields.get("outputs")),
        horizon=fields.get("horizon"),
        backtest=fields.get("backtest", False),  # as above
        stride=fields.get("stride"),
        smooth=fields.get("smooth"),
        min_area=fields.get("min_area"),
        dtype=fields.get("dtype"),
        points=_points_of(fields.get("points")),
        fields=_source(fields.get("polygons"), folder),
        items=tuple(fields.get("items") or ()),
        subscriber=subscriber,
    )
    if task != "similar":
        return plain
    return SimilarRequest(
        **vars(plain),
        place_points=_points_of(fields.get("place_points")),
        place_file=_source(fields.get("place_file"), folder),
    )


def outline_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """A request's document without what may be long: files, items, points and series."""
    if "series" in document:
        return {**document, "series": {**document["series"], "series": []}}
    fields = document["fields"]
    points: dict[str, Any] = {
        n: [] for n in ("points", "place_points") if fields.get(n) is not None
    }
    return {**document, "files": [], "fields": {**fields, **points, "items": [], "left_out": []}}


def _task(name: Runnable) -> Task:
    """The task of the model that a run needs."""
    return "embed" if name == "similar" else name


def _source(entry: list[str] | None, folder: Path) -> SourceFile | None:
    return None if entry is None else _file_of(entry, folder)


def _file_of(entry: list[str], folder: Path) -> SourceFile:
    name, path, *remote = entry
    return SourceFile(name=name, path=folder / path, remote=folder / remote[0] if remote else None)


def _series_of(entry: Mapping[str, Any]) -> SeriesInput:
    bands = {name: tuple(v) for name, v in entry.items() if name[0] == "B" and v is not None}
    lonlat = entry.get("lonlat")
    return SeriesInput(
        id=entry["id"],
        dates=tuple(map(date.fromisoformat, entry["dates"])),
        bands=bands,
        lonlat=None if lonlat is None else (lonlat[0], lonlat[1]),
    )


def _points_of(points: Any) -> tuple[PointQuery, ...] | None:  # noqa: ANN401 - JSON
    if points is None:
        return None
    # Releases before 0.2 stored the text of a FeatureCollection.
    features = json.loads(points)["features"] if isinstance(points, str) else points
    return tuple(map(PointQuery.of, features))


def _iso(value: Any) -> Any:  # noqa: ANN401 - anything that a request holds
    """A date as ISO text, also within a sequence; other values unchanged."""
    if isinstance(value, date):
        return value.isoformat()
    return [_iso(one) for one in value] if isinstance(value, list | tuple) else value


def _date(text: str | None) -> date | None:
    return None if text is None else date.fromisoformat(text)


def _dated(value: Any) -> DatedNumber | None:  # noqa: ANN401 - JSON
    """A number, or pairs of a date or processing baseline and the number from then on."""
    if not isinstance(value, list):
        return value  # type: ignore[no-any-return]
    return tuple(
        (date.fromisoformat(since) if "-" in since else since, float(number))
        for since, number in value
    )


def _tuple(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)


def _bbox(values: list[float] | None) -> tuple[float, float, float, float] | None:
    if values is None:
        return None
    west, south, east, north = values
    return west, south, east, north


@dataclass(frozen=True, kw_only=True)
class StoredResult:
    """A job's result: the values of its response headers, and its files."""

    task: Runnable
    model: str
    """As `name@version`."""
    provider: str
    document: Path | RemoteFile
    """The JSON document, which is sent unchanged."""
    files: Mapping[str, Path | RemoteFile]
    """The finished COGs, by output name."""
    timing: Timing
    warnings: tuple[StackWarning, ...]


def result_head(result: Result) -> dict[str, Any]:
    """The JSON description of a result: all but its document, with its files by name."""
    return {
        "task": result.task,
        "model": result.model,
        "provider": result.provider,
        "files": {name: path.name for name, path in result.files.items()},
        "pixels": result.pixels,
        "timing": asdict(result.timing),
        "warnings": warning_list(result.warnings),
    }


def stored_result(head: Mapping[str, Any], file: Path | RemoteFile, document: str) -> StoredResult:
    """The stored result that a description refers to.

    Args:
        head: the description, made by `result_head`.
        file: the description's file, beside which the result's files are.
        document: name of the result's JSON document.
    """
    return StoredResult(
        task=head["task"],
        model=head["model"],
        provider=head["provider"],
        document=file.with_name(document),
        files={name: file.with_name(path) for name, path in head["files"].items()},
        timing=Timing(**head["timing"]),
        warnings=tuple(StackWarning(**warning) for warning in head["warnings"]),
    )


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """A result's document as it is sent: JSON without NaN, in UTF-8.

    Raises:
        ValueError: the document holds NaN or infinity.
    """
    return "".join(json_parts(document, _ENCODE)).encode()


_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def loaded(text: str) -> Any:  # noqa: ANN401 - JSON
    """The value of a text that `json_parts` wrote, parsed in the same parts, for the same reason.

    Args:
        text: the text; with other white space, as of earlier releases, it is parsed at once.
    """
    try:
        return _value_at(text, 0)[0]
    except (ValueError, IndexError):
        return json.loads(text)


_DECODE = json.JSONDecoder().raw_decode


def _value_at(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at a position, and the position after it."""
    if text[at] == "{":
        found: dict[str, Any] = {}
        at += 1
        while text[at] != "}":
            name, at = _DECODE(text, at)
            found[name], at = _value_at(text, at + 1)  # after the colon
            at += text[at] == ","
        return found, at + 1
    if text.startswith(("[{", "[["), at):
        items: list[Any] = []
        at += 1
        while text[at] != "]":
            item, at = _DECODE(text, at)
            items.append(item)
            at += text[at] == ","
        return items, at + 1
    return _DECODE(text, at)


def json_parts(value: object, encode: Callable[[object], str] = json.dumps) -> Iterator[str]:
    """A JSON text in parts: one per entry of an object, one per item of a list.

    Python runs no other thread while it encodes a value. Encoding many megabytes as one value would
    block all other requests for seconds.

    Args:
        value: the value; names in its objects are texts.
        encode: encodes a text, or an item of a list.
    """
    if isinstance(value, Mapping):
        for number, (name, entry) in enumerate(value.items()):
            yield ("," if number else "{") + encode(name) + ":"
            yield from json_parts(entry, encode)
        yield "}" if value else "{}"
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield ("," if number else "[") + encode(item)
        yield "]" if value else "[]"
    else:
        yield encode(value)
