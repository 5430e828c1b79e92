"""Validation: reads the parameters of a form or a JSON body, or raises `InvalidRequest`.

Lists with many entries (series, points, features) are parsed in pieces (`json_pieces`). The error
lists every parameter that is not valid; an unknown one is compared with the known names.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from models.card import Modality
from service.api.json_pieces import (
    MOST_FAULTS,
    MOST_VALUES,
    Faults,
    LongList,
    is_long,
    members,
    too_many,
    validate,
)
from service.api.schemas.forms import FORMS, HeadForm, RasterForm, StackForm
from service.api.schemas.geojson import MAX_POINTS, PointCollection, PointFeature
from service.api.schemas.parameter_types import LooseModel, Operation
from service.api.schemas.request_bodies import (
    ITEMS,
    SERIES,
    STAC,
    Execute,
    HeadItems,
    HeadSeries,
    HeadStac,
    ItemBody,
    LabelledEntry,
    SeriesBody,
    SeriesEntry,
    StacDocument,
    StacSearch,
)
from service.errors import MOST_ERRORS, ForbiddenReference, InvalidRequest, shown

# The parameters that take several values.
_LISTED = frozenset({"dates", "bands", "bbox", "outputs", "scale", "offset"})
_VECTORS = frozenset({"fields", "labels"})
"""Parameters that are read as files of features, with limits of their own."""
_LONGEST_NAME = 100
"""Longest name for which a parameter with a similar name is looked for, characters."""
_MAX_STRUCTURE = 500_000
_Model = TypeVar("_Model", bound=BaseModel)
_Form = TypeVar("_Form", bound="StackForm")


def read_parameters(task: Operation, raw: Mapping[str, Sequence[str]]) -> RasterForm:
    """Validate the parameters of a task's form.

    Args:
        task: the requested task.
        raw: values of each parameter, unparsed; an empty value counts as not sent.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
    """
    return _read_form(FORMS[task], raw)


def read_head_parameters(raw: Mapping[str, Sequence[str]]) -> HeadForm:
    """Validate the parameters of the form of `POST /heads`.

    Args:
        raw: values of each parameter, unparsed; an empty value counts as not sent.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
    """
    return _read_form(HeadForm, raw)


def _read_form(model: type[_Form], raw: Mapping[str, Sequence[str]]) -> _Form:
    given: dict[str, object] = {}
    counts = Counter[str]()
    for name, values in raw.items():
        filled = [value for value in values if value.strip()]
        if name not in _VECTORS:
            _check_texts(filled)
            counts[name] = sum(value.count(",") for value in filled)
        if name in _LISTED:
            given[name] = filled
        elif name == "mask":
            given[name] = ",".join(filled) if filled else []
        elif len(filled) > 1:
            raise InvalidRequest.of(name, f"sent {len(filled)} times, but it takes one value")
        elif filled or name not in model.model_fields:
            given[name] = "".join(filled)
    counts.pop("points", None)  # which are parsed in pieces
    if counts.total() > MOST_VALUES:
        [(name, count)] = counts.most_common(1)
        raise InvalidRequest.of(shown(name), too_many(count))
    given = {name: value for name, value in given.items() if value != []}
    points = given.get("points")
    if points is None or "points" not in model.model_fields:
        return _checked(model, given)
    return _with_points(model, given, str(points).encode())


def _with_points(model: type[_Form], given: Mapping[str, object], text: bytes) -> _Form:
    """Validate a form with points, which are parsed in pieces.

    Args:
        model: type of the form.
        given: its parameters.
        text: its parameter `points`, GeoJSON.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
    """
    faults, points, form = Faults(), None, None
    try:
        points = validate(PointCollection, text, (_POINTS,), documents=())
    except ValidationError as error:
        faults.add(error)
    except Faults as found:
        faults = found
    except InvalidRequest as error:
        raise InvalidRequest.of("points", error.errors[0]["detail"]) from error
    faults.errors = [{**one, "loc": ("points", *one["loc"])} for one in faults.errors]
    try:
        form = model.model_validate({**given, "points": _ONE_POINT})
    except ValidationError as error:
        faults.add(error)
    if form is None or points is None:
        raise _rejection(faults, model)
    return form.model_copy(update={"points": points})


Items = tuple[tuple[ItemBody, ...], RasterForm]
"""Named files, and the other parameters."""
Stac = tuple[StacSearch | dict[str, Any] | str, RasterForm]
"""A search, document or URL of STAC items, and the other parameters."""


def read_items(
    task: Operation, body: bytes, *, allowed: bool, modality: Modality | None = None
) -> Items | None:
    """Validate a JSON body that names files; None if it names none.

    Args:
        task: the requested task.
        body: the body, unparsed.
        allowed: whether the server reads files by reference.
        modality: modality of an embedding, if the query states it.

    Returns:
        The named files, and the other parameters.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
        ForbiddenReference: the body names files, but the server reads none by reference.
    """
    named = _named(body, "items", ITEMS[task], allowed=allowed)
    if named is None:
        return None
    fields = _plain(task, named, modality)
    if named.items[0].date:
        fields["dates"] = tuple(item.date for item in named.items)
    # Not validated again: the parameters are valid, and a form's `points` would have to be text.
    return named.items, FORMS[task].model_construct(**fields)


def read_stac(
    task: Operation, body: bytes, *, allowed: bool, modality: Modality | None = None
) -> Stac | None:
    """Validate a JSON body that names STAC items or searches for them; None if it does not.

    Args:
        task: the requested task.
        body: the body, unparsed.
        allowed: whether the server reads files by reference.
        modality: modality of an embedding, if the query states it.

    Returns:
        The search, document or URL, and the other parameters.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
        ForbiddenReference: the body names items, but the server reads no files by reference.
    """
    named = _named(body, "stac", STAC[task], allowed=allowed)
    if named is None:
        return None
    stac = named.stac.plain if isinstance(named.stac, StacDocument) else named.stac
    return stac, FORMS[task].model_construct(**_plain(task, named, modality))


def _named(body: bytes, field: str, model: type[_Model], *, allowed: bool) -> _Model | None:
    """Validate a body that names files by a parameter; None if the parameter is missing."""
    if not _gives(body, field):
        return None
    if not allowed:
        raise ForbiddenReference(
            f"'{field}' is not allowed, because this server reads no files by reference: send the "
            "files, or have the administrator set PIMC_ALLOWED_ROOTS or PIMC_ALLOWED_HOSTS"
        )
    return _checked(model, body)


def _plain(task: Operation, named: BaseModel, modality: Modality | None) -> dict[str, Any]:
    """The parameters of a JSON body that the task's form has too.

    Raises:
        InvalidRequest: the query and the body state different modalities.
    """
    fields = {name: getattr(named, name) for name in FORMS[task].model_fields}
    if modality is not None:
        if fields["modality"] not in {None, modality}:
            conflict = f"'{modality}' in the query, but '{fields['modality']}' in the body"
            raise InvalidRequest.of("modality", f"{conflict}: send it once")
        fields["modality"] = modality
    return fields


def read_series(task: Operation, body: bytes) -> SeriesBody:
    """Validate a JSON body of series.

    Args:
        task: the requested task, or measured series.
        body: the body, unparsed.

    Raises:
        InvalidRequest: the task takes no series, or parameters are not valid.
    """
    if task not in SERIES:
        raise InvalidRequest.of(
            "series",
            f"/{task} takes imagery, not series: send GeoTIFFs as multipart/form-data, or 'items' "
            "or 'stac'",
        )
    return _checked(SERIES[task], body)


HeadFiles = tuple[tuple[ItemBody, ...], HeadForm]
"""Named files, and the other parameters of `POST /heads`."""
HeadItemsOfStac = tuple[StacSearch | dict[str, Any] | str, HeadForm]
"""A search, document or URL of STAC items, and the other parameters of `POST /heads`."""


def read_head_items(body: bytes, *, allowed: bool) -> HeadFiles | None:
    """Validate a JSON body of `POST /heads` that names files; None if it names none.

    Args:
        body: the body, unparsed.
        allowed: whether the server reads files by reference.

    Returns:
        The named files, and the other parameters.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
        ForbiddenReference: the body names files, but the server reads none by reference.
    """
    named = _named(body, "items", HeadItems, allowed=allowed)
    if named is None:
        return None
    fields = {name: getattr(named, name) for name in HeadForm.model_fields}
    if named.items[0].date:
        fields["dates"] = tuple(item.date for item in named.items)
    return named.items, HeadForm.model_construct(**fields)


def read_head_stac(body: bytes, *, allowed: bool) -> HeadItemsOfStac | None:
    """Validate a JSON body of `POST /heads` that names STAC items; None if it does not.

    Args:
        body: the body, unparsed.
        allowed: whether the server reads files by reference.

    Returns:
        The search, document or URL, and the other parameters.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
        ForbiddenReference: the body names items, but the server reads no files by reference.
    """
    named = _named(body, "stac", HeadStac, allowed=allowed)
    if named is None:
        return None
    stac = named.stac.plain if isinstance(named.stac, StacDocument) else named.stac
    fields = {name: getattr(named, name) for name in HeadForm.model_fields}
    return stac, HeadForm.model_construct(**fields)


def read_execute(body: bytes) -> Execute:
    """Validate the JSON body of an execution; its inputs only in their outer form.

    Raises:
        InvalidRequest: with every field that fails.
    """
    return _checked(Execute, body)


def read_head_series(body: bytes) -> HeadSeries:
    """Validate a JSON body of labelled series.

    Args:
        body: the body, unparsed.

    Raises:
        InvalidRequest: parameters are not valid; the error lists each.
    """
    return _checked(HeadSeries, body)


class _Reference(LooseModel):
    """The parameters by which a JSON body names files or STAC items, not validated."""

    items: Any = None
    stac: Any = None


def _gives(body: bytes, field: str) -> bool:
    """Whether a JSON body has a parameter that is not null."""
    # Without parsing a body of series: only with escapes can the name be spelled in another way.
    if f'"{field}"'.encode() not in body and b"\\u" not in body:
        return False
    _check_shape(body)
    found = members(body) if is_long(body) else None
    if found is None:
        return getattr(_checked(_Reference, body), field) is not None
    value = found.get(field)
    return value is not None and body[value.begin : value.end] != b"null"


def _checked(model: type[_Model], given: bytes | Mapping[str, object]) -> _Model:
    try:
        if isinstance(given, bytes):
            _check_shape(given)
            return validate(model, given, _long_lists(model), documents=_DOCUMENTS)
        return model.model_validate(given)
    except ValidationError as error:
        faults = Faults()
        faults.add(error)
        raise _rejection(faults, model) from error
    except Faults as faults:
        raise _rejection(faults, model) from None


def _rejection(faults: Faults, model: type[BaseModel]) -> InvalidRequest:
    if faults.count > MOST_FAULTS:
        return InvalidRequest.of(
            "body", f"{faults.count} values are not valid: send a few to see the reasons"
        )
    return invalid_request(faults.errors, model.model_fields)


_DOCUMENTS = frozenset({"fields", "labels", "stac"})
"""Parameters whose values are documents, with limits of their own."""
_SERIES_LIST = LongList(
    path=("series",),
    entries=TypeAdapter(list[SeriesEntry]),
    stand_in=b'{"id": "", "dates": ["2021-01-01"]}',
)
_LABELLED_LIST = LongList(
    path=("series",),
    entries=TypeAdapter(list[LabelledEntry]),
    stand_in=b'{"class": "", "dates": ["2021-01-01"]}',
)
_POINTS = LongList(
    path=("features",),
    entries=TypeAdapter(Annotated[list[PointFeature], Field(fail_fast=True)]),
    stand_in=b'{"type": "Feature", "geometry": {"type": "Point", "coordinates": [0, 0]}}',
    most=MAX_POINTS,
    fails_fast=True,
)
_ONE_POINT = f'{{"type": "FeatureCollection", "features": [{_POINTS.stand_in.decode()}]}}'
_PLAIN = TypeAdapter(list[Any])
_INPUT_LIST = LongList(
    path=("inputs", "series"),
    entries=_PLAIN,
    stand_in=b"null",
    # An entry may be a link or a value with its type; a backslash may spell their names.
    parsed_unless=(b'"href"', b'"value"', b"\\"),
)
_INPUT_LISTS = (
    _INPUT_LIST,
    *(
        LongList(path=path, entries=_PLAIN, stand_in=b"null", bounded=path[1] == "points")
        for name in ("points", "fields", "stac")
        for path in (("inputs", name, "features"), ("inputs", name, "value", "features"))
    ),
)


def _long_lists(model: type[BaseModel]) -> tuple[LongList, ...]:
    """The lists of a JSON body that may have many entries."""
    if issubclass(model, Execute):
        return _INPUT_LISTS
    if issubclass(model, HeadSeries):
        return (_LABELLED_LIST,)
    if issubclass(model, SeriesBody):
        return (_SERIES_LIST,)
    documents = (
        LongList(path=(name, "features"), entries=_PLAIN, stand_in=b"null", bounded=False)
        for name in ("fields", "labels", "stac")
    )
    lists = (replace(_POINTS, path=("points", "features")), *documents)
    return tuple(long for long in lists if long.path[0] in model.model_fields)


def _check_texts(values: Iterable[str]) -> None:
    """`_check_shape` of a form's parameters, some of which are JSON."""
    for text in values:
        _check_shape(text.encode())


def _check_shape(body: bytes) -> None:
    """Reject JSON that takes many times its size in memory because it is mostly brackets or keys.

    An empty list has two bytes and takes about 260 bytes of memory once parsed; each unknown key
    makes an error of its own. A body of series has one bracket or key per hundred bytes.
    """
    for kind, number in (
        ("lists and objects", body.count(b"[") + body.count(b"{")),
        ("keys", body.count(b":")),
    ):
        if number > _MAX_STRUCTURE:
            raise InvalidRequest.of(
                "body",
                f"about {number} {kind}, and at most {_MAX_STRUCTURE} are allowed: send several "
                "requests",
            )


def invalid_request(
    errors: Sequence[Mapping[str, Any]], known: Collection[str] = ()
) -> InvalidRequest:
    """Translate pydantic's validation errors.

    Args:
        errors: pydantic's list of errors.
        known: names of the existing parameters, for the message about an unknown one.
    """
    # pydantic also reports a list as too short if none of its entries is valid; leave that out.
    within = {error["loc"][:-1] for error in errors} | {error["loc"][:-2] for error in errors}
    errors = [e for e in errors if e["type"] != "too_short" or e["loc"] not in within]
    found = [_field_error(error, known) for error in errors[:MOST_ERRORS]]
    names = ", ".join(error["field"] for error in found)
    if len(errors) == 1:
        return InvalidRequest("{field}: {detail}".format(**found[0]), found)
    more = ", …" if len(errors) > MOST_ERRORS else ""
    return InvalidRequest(f"{len(errors)} parameters are not valid: {names}{more}", found)


_OTHER_NAMES: Mapping[str, str] = {
    "time": "dates", "datetime": "dates", "timestamps": "dates", "channels": "bands",
    "start_date": "start", "begin": "start", "steps": "horizon", "aoi": "area", "polygon": "area",
    "geometry": "area", "region": "area", "roi": "area", "bounds": "bbox", "extent": "bbox",
    "crs": "grid", "resolution": "grid", "clouds": "mask", "cloud_mask": "mask",
    "output": "outputs", "lonlat": "points", "coordinates": "points", "factor": "scale",
    "version": "model",
}  # fmt: skip
"""Names of this service's parameters, by their names in other services."""


def _suggestion(name: str, known: Collection[str]) -> str | None:
    """The parameter whose name is similar to an unknown name, in spelling or in other services."""
    if len(name) > _LONGEST_NAME:  # comparing takes time and memory in proportion
        return None
    plain = name.lower().replace("-", "_").removesuffix("[]")
    if plain in known:
        return plain
    other = _OTHER_NAMES.get(plain)
    if other in known:
        return other
    return next(iter(get_close_matches(plain, [*known], n=1, cutoff=0.7)), None)


def unknown_parameter(name: str, known: Collection[str]) -> str:
    """The message about an unknown parameter."""
    similar = _suggestion(name, known)
    hint = f" (did you mean '{similar}'?)" if similar else ""
    return f"unknown parameter{hint}; the parameters are {', '.join(sorted(known))}"


def _field_error(error: Mapping[str, Any], known: Collection[str]) -> dict[str, str]:
    path = error["loc"]
    detail = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        detail = unknown_parameter(str(path[0]), known) if len(path) == 1 else "unknown parameter"
    return {"field": ".".join(shown(part) for part in path) or "body", "detail": detail}
