"""JSON bodies in pieces: a long list is cut at commas, so that no call of the parser takes long.

Parsing and validating a document is one call, during which no other thread of the process runs, the
event loop included. A list that is cut into pieces of a few thousand values is parsed in as many
calls, between which other threads run. A document is only cut here, not checked: each piece is
parsed, and so is what is left of the document without its long lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, from_json

from service.api.disconnect import check_connected
from service.errors import InvalidRequest

_Model = TypeVar("_Model", bound=BaseModel)
PIECE_BYTES = 2**16
"""Size from which a piece of a list ends at the next comma, bytes."""

MOST_FAULTS = 10_000
"""Number of invalid values beyond which none is listed: each takes a kilobyte to describe."""
MOST_VALUES = 200_000
"""Largest number of values that are parsed in one call; a series of 10,000 dates and 13 bands has
140,000."""

_TEXT = rb'"(?:[^"\\]++|\\.)*+"'
_SPACE = re.compile(rb"[ \t\n\r]*+")
_NAME = re.compile(rb"[ \t\n\r]*+(" + _TEXT + rb")[ \t\n\r]*+:[ \t\n\r]*+", re.DOTALL)
_SCALAR = re.compile(rb'[^"{}\[\],: \t\n\r]++')
_IN_TEXT = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_WITHOUT_BRACKETS = re.compile(rb'(?:[^"{}\[\]]++|' + _TEXT + rb")*+", re.DOTALL)
_SCALARS = re.compile(rb'(?:(?:[^",{}\[\]]++|' + _TEXT + rb")*+,)*+", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class LongList:
    """A list of a body that may have many entries."""

    path: tuple[str, ...]
    """Keys that lead to it."""
    entries: TypeAdapter[list[Any]]
    """Validates a piece of it."""
    stand_in: bytes
    """A valid entry, with which the rest of the body is validated."""
    most: int | None = None
    """Largest number of entries; None for any."""
    fails_fast: bool = False
    """Whether only the first invalid entry is reported."""
    bounded: bool = True
    """Whether the number of values of an entry is limited."""
    parsed_unless: tuple[bytes, ...] = ()
    """If the list has none of these texts, it is kept as `JsonText`, for a later validation; empty
    for a list that is always parsed."""


@dataclass(frozen=True)
class JsonText:
    """A JSON value that was not parsed."""

    text: bytes


class Faults(Exception):
    """Errors of a body that was validated in pieces; the first `MOST_FAULTS` are kept."""

    def __init__(self) -> None:
        super().__init__("the body is not valid")
        self.errors: list[Mapping[str, Any]] = []
        """pydantic's descriptions, with places in the whole body."""
        self.count = 0
        """Number of all errors."""

    def add(self, error: ValidationError, path: tuple[str, ...] = (), first: int = 0) -> None:
        """Add the errors of a piece, or of all else.

        Args:
            error: pydantic's error.
            path: keys that lead to the list; empty for all else.
            first: position in the list of the piece's first entry.
        """
        self.count += error.error_count()
        if self.count > MOST_FAULTS:
            return
        for one in error.errors(include_url=False, include_input=False):
            place = one["loc"]
            if path:
                place = (*path, int(place[0]) + first, *place[1:])
            self.errors.append({**one, "loc": place})


def validate(
    model: type[_Model], text: bytes, lists: Sequence[LongList], *, documents: Collection[str]
) -> _Model:
    """Validate a JSON body as `model.model_validate_json` does, its long lists in pieces.

    Args:
        model: type of the body.
        text: the body.
        lists: its long lists.
        documents: top-level keys whose values may have any number of values.

    Raises:
        ValidationError: the body is not valid.
        Faults: the same, found in pieces.
        InvalidRequest: an entry, or all that is not in a long list, has too many values.
        Cancelled: the client disconnected.
    """
    if is_long(text):
        found = _in_pieces(model, text, lists, documents)
        if found is not None:
            return found
        # Not well-formed: the parser rejects it before it makes values of it.
    return model.model_validate_json(text)


def _in_pieces(
    model: type[_Model], text: bytes, lists: Sequence[LongList], documents: Collection[str]
) -> _Model | None:
    """`validate`; None if the body has no long list, or is not well-formed."""
    begin = _after_space(text, 0)
    if text[begin : begin + 1] == b"[":
        whole = _value(text, begin)
        if (
            whole is None
            or text[whole.end :].strip()
            or not all(map(_parses, _pieces(text, whole)))
        ):
            return None
        return model.model_validate_json(b"[]")  # an error: a body is an object
    top = members(text)
    if top is None:
        return None
    # All that is not subtracted counts, also the earlier values of a repeated key.
    beside = text.count(b",")
    beside -= sum(_values(text, value) for name, value in top.items() if name in documents)
    faults, replaced = Faults(), []
    filled: list[tuple[tuple[str, ...], list[Any] | JsonText]] = []
    objects: dict[tuple[str, ...], Mapping[str, Value]] = {(): top}
    for long in lists:
        where = _list_at(text, objects, long.path)
        if where is None:
            continue
        beside -= 0 if long.path[0] in documents else _values(text, where)
        entire = text[where.begin : where.end] if long.parsed_unless else b""
        if entire and not any(one in entire for one in long.parsed_unless):
            filled.append((long.path, JsonText(entire)))
            replaced.append((where, b"[]"))
            continue
        read = _entries(long, text, where, faults)
        if read is None:
            return None
        entries, number = read
        if long.most is not None and number > long.most and not faults.count:
            faults.add(_too_long(long.path, long.most))
        filled.append((long.path, entries))
        replaced.append((where, b"[" + (long.stand_in if number else b"") + b"]"))
    if beside > MOST_VALUES:
        raise InvalidRequest.of("body", too_many(beside))
    if not filled:
        return None
    try:
        found = model.model_validate_json(_with_replaced(text, replaced))
    except ValidationError as error:
        if _malformed(error):
            return None
        of_entries, faults.errors = faults.errors, []
        faults.add(error)
        faults.errors += of_entries  # a list is the last field of its object
    if faults.count:
        names = {name: rank for rank, name in enumerate(model.model_fields)}
        faults.errors.sort(key=lambda one: names.get(str(one["loc"][0]), len(names)))
        raise faults
    for path, new in filled:
        found = _with(found, path, new)
    return found


def _entries(
    long: LongList, text: bytes, where: Value, faults: Faults
) -> tuple[list[Any], int] | None:
    """The valid entries of a list, and the number of all; None if the list is not well-formed.

    Args:
        long: kind of the list.
        text: the body.
        where: where the list is.
        faults: the errors of entries are added to it.
    """
    entries: list[Any] = []
    number = 0
    failed = False
    for piece in _pieces(text, where):
        if failed:
            if not _parses(piece):
                return None
            continue
        values = piece.count(b",")
        if long.bounded and values > MOST_VALUES:
            near = f"entry {number} or one of the next has {too_many(values)}"
            raise InvalidRequest.of(".".join(long.path), near)
        try:
            some = long.entries.validate_json(piece)
        except ValidationError as error:
            if _malformed(error):
                return None
            faults.add(error, long.path, number)
            failed = long.fails_fast
            some = from_json(piece)
        else:
            entries += some
        if not some and where.cuts:  # a comma without an entry
            return None
        number += len(some)
    return entries, number


def _list_at(
    text: bytes, objects: dict[tuple[str, ...], Mapping[str, Value]], path: tuple[str, ...]
) -> Value | None:
    """Where a list is; None if there is none.

    Args:
        text: the document.
        objects: the values of each object that was looked at, by the keys that lead to it; the
            objects on the way to the list are added.
        path: keys that lead to the list.
    """
    where = None
    for depth, name in enumerate(path):
        if path[:depth] not in objects:
            objects[path[:depth]] = (where and members(text, where)) or {}
        where = objects[path[:depth]].get(name)
    return None if where is None or text[where.begin : where.begin + 1] != b"[" else where


def _with_replaced(text: bytes, replaced: Iterable[tuple[Value, bytes]]) -> bytes:
    """A document with other text in place of some of its values."""
    parts, at = [], 0
    for where, new in sorted(replaced, key=lambda one: one[0].begin):
        parts += [text[at : where.begin], new]
        at = where.end
    return b"".join([*parts, text[at:]])


def _with(
    owner: Any,  # noqa: ANN401 - JSON
    path: Sequence[str],
    entries: list[Any] | JsonText,
) -> Any:  # noqa: ANN401 - JSON
    """A copy of a model or an object, with other entries in the list at a path."""
    name, *further = path
    old = owner[name] if isinstance(owner, Mapping) else getattr(owner, name)
    if further:
        new = _with(old, further, entries)
    else:
        new = entries if isinstance(entries, JsonText) else type(old)(entries)
    return (
        {**owner, name: new} if isinstance(owner, Mapping) else owner.model_copy(update={name: new})
    )


def _parses(piece: bytes) -> bool:
    try:
        from_json(piece)
    except ValueError:
        return False
    return True


def _malformed(error: ValidationError) -> bool:
    return error.error_count() == 1 and error.errors()[0]["type"] == "json_invalid"


def _too_long(path: tuple[str, ...], most: int) -> ValidationError:
    """The error of a list that has too many entries."""
    context = {"field_type": "List", "max_length": most, "actual_length": most + 1}
    line: InitErrorDetails = {"type": "too_long", "loc": path, "input": None, "ctx": context}
    return ValidationError.from_exception_data("", [line], input_type="json")


def _values(text: bytes, where: Value) -> int:
    return text.count(b",", where.begin, where.end)


def too_many(values: int) -> str:
    """The message about too many values."""
    return (
        f"about {values} values, and at most {MOST_VALUES} are allowed: send several requests, or "
        "simplify the geometry"
    )


@dataclass(frozen=True, kw_only=True)
class Value:
    """Where a document holds a value."""

    begin: int
    """Position of the first byte."""
    end: int
    """Position after the value."""
    cuts: Sequence[int] = ()
    """Positions of the commas at which a list is cut."""


def is_long(text: bytes) -> bool:
    """Whether a body is long enough to be parsed in pieces."""
    return len(text) > PIECE_BYTES


def members(text: bytes, within: Value | None = None) -> Mapping[str, Value] | None:
    """The values of an object by their keys; of a repeated key the last one, as parsers have it.

    Args:
        text: the document, not parsed.
        within: where the object is; None if it is the document.

    Returns:
        The values; None if there is no object, or it is not well-formed as far as was seen.
    """
    begin, end = (0, len(text)) if within is None else (within.begin, within.end)
    at = _after_space(text, begin)
    if text[at : at + 1] != b"{":
        return None
    found: dict[str, Value] = {}
    while name := _NAME.match(text, at + 1):
        check_connected()
        value = _value(text, name.end())
        key = _decoded(name[1])
        if value is None or key is None:
            return None
        found[key] = value
        at = _after_space(text, value.end)
        if text[at : at + 1] == b"}":
            return found if _after_space(text, at + 1) >= end else None
        if text[at : at + 1] != b",":
            return None
    return None


def _pieces(text: bytes, value: Value) -> Iterator[bytes]:
    """The entries of a list as several lists, each as text.

    Args:
        text: the document.
        value: where the list is.
    """
    for begin, end in pairwise([value.begin, *value.cuts, value.end - 1]):
        check_connected()
        yield b"[" + text[begin + 1 : end] + b"]"


def _after_space(text: bytes, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _decoded(name: bytes) -> str | None:
    try:
        return str(json.loads(name))
    except ValueError:
        return None


def _value(text: bytes, begin: int) -> Value | None:
    """The value that begins at a position; None if it does not end."""
    if text[begin : begin + 1] == b'"':
        end = _end_of_text(text, begin)
        return None if end is None else Value(begin=begin, end=end)
    if text[begin : begin + 1] not in (b"[", b"{"):
        scalar = _SCALAR.match(text, begin)
        return None if scalar is None else Value(begin=begin, end=scalar.end())
    in_list, depth, cuts = text[begin : begin + 1] == b"[", 1, []
    at = last = begin + 1
    while at < len(text):
        if in_list and depth == 1:
            check_connected()
            at = _matched(_SCALARS, text, at)
            if at - last >= PIECE_BYTES and text[at - 1 : at] == b",":
                cuts.append(at - 1)
                last = at
        at = _matched(_WITHOUT_BRACKETS, text, at)
        byte = text[at : at + 1]
        if byte == b'"':  # a text at the end of a piece, longer than one, or without an end
            end = _end_of_text(text, at)
            if end is None:
                return None
            at = end
        elif byte in (b"[", b"{"):
            depth += 1
            at += 1
        elif byte in (b"]", b"}"):
            depth -= 1
            at += 1
            if depth == 0:
                return Value(begin=begin, end=at, cuts=cuts)
    return None


def _end_of_text(text: bytes, begin: int) -> int | None:
    """The end of the text that begins at a position; None if it does not end."""
    at, last = begin + 1, begin
    while last < at < len(text):
        check_connected()
        last, at = at, _matched(_IN_TEXT, text, at)
        if text[at : at + 1] == b'"':
            return at + 1
    return None


def _matched(pattern: re.Pattern[bytes], text: bytes, at: int) -> int:
    """The end of a match that is at most as long as a piece."""
    found = pattern.match(text, at, at + PIECE_BYTES)
    return at if found is None else found.end()
