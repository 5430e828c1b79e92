"""JSON bodies in pieces: the same values and errors as of a body that is parsed in one call."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.api import json_pieces, processes
from service.api.json_pieces import JsonText
from service.api.processes import Binary
from service.api.routes import processes as routes
from service.api.schemas import validation
from service.api.schemas.forms import EmbedForm
from service.api.schemas.request_bodies import ClassifySeries
from service.api.schemas.validation import (
    read_execute,
    read_head_items,
    read_head_series,
    read_items,
    read_parameters,
    read_series,
    read_stac,
)
from service.errors import InvalidRequest
from tests.kits.marks import in_all_tests

DATES = ["2021-01-05", "2021-02-05", "2021-03-05"]
SERIES = [
    {"id": f"f{n}", "dates": DATES, "B04": [0.1, None, 0.2], "B08": [1, 2e-1, 0.3]}
    for n in range(9)
]
POINT = {"type": "Feature", "id": 1, "geometry": {"type": "Point", "coordinates": [3, 50.5]},
         "properties": {"a": ["]", "}", "\\\",", None]}}  # fmt: skip
POINTS = {"type": "FeatureCollection", "features": [POINT] * 6}
RING = [[3, 50], [4, 50], [4, 51], [3, 50]]
FIELD = {
    "type": "Feature",
    "properties": {"class": "ä"},
    "geometry": {"type": "Polygon", "coordinates": [RING]},
}
FIELDS = {"type": "FeatureCollection", "features": [FIELD] * 4}


def read_body(text: bytes) -> Any:
    """A body of files, STAC items or series, as the routes read it."""
    named = read_items("classify-pixels", text, allowed=True)
    found = read_stac("classify-pixels", text, allowed=True) if named is None else None
    return named or found or read_series("classify-pixels", text)


def read_parsed(text: bytes) -> Any:
    """An execution, with the inputs that are not parsed yet."""
    found = read_execute(text)
    inputs = {
        name: json.loads(one.text) if isinstance(one, JsonText) else one
        for name, one in found.inputs.items()
    }
    return found.model_copy(update={"inputs": inputs})


ITEMS = [{"href": "/a.tif", "date": "2021-01-05"}]
READERS: dict[str, tuple[Callable[[bytes], Any], dict[str, Any]]] = {
    "series": (
        lambda text: read_series("forecast", text),
        {"model": "m", "series": SERIES, "horizon": 3},
    ),
    "labelled": (
        read_head_series,
        {"name": "own", "series": [{**one, "class": "a"} for one in SERIES], "start": "2021-01-01"},
    ),
    "points": (
        read_body,
        {"points": POINTS, "items": ITEMS},
    ),
    "points of a form": (
        lambda text: read_parameters("embed", {"points": (text.decode(),), "modality": ("pixel",)}),
        POINTS,
    ),
    "fields": (
        read_body,
        {"items": ITEMS, "fields": FIELDS, "bands": ["B04"]},
    ),
    "labels": (
        lambda text: read_head_items(text, allowed=True) or read_head_series(text),
        {"name": "own", "labels": FIELDS, "items": ITEMS},
    ),
    "stac": (
        read_body,
        {"stac": {**FIELDS, "links": [1, {}]}, "smooth": 2},
    ),
    "execution": (
        read_parsed,
        {"inputs": {"series": [{"value": one} for one in SERIES]}, "response": "document"},
    ),
}
OF_MANY_CASES = pytest.mark.parametrize(
    "kind", [*list(READERS)[:3], *in_all_tests(*list(READERS)[3:])]
)
HOSTILE = (
    "", ",", "]", "[", "}", "{", '"', "\\", ":", "null", "1", "[]", "{}", ' "x": 1,', "NaN",
    "1e999",
    " ", '"series": 3,', '"features": [],', "\\u0061", "[1, 2],", '"2021-01-0"', "\x00", "é",
)  # fmt: skip


def read(text: bytes, reader: Callable[[bytes], Any], size: int) -> object:
    """What a reader returns, or the error, for a size from which a list is cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_pieces, "PIECE_BYTES", size)
        try:
            return reader(text)
        except InvalidRequest as error:
            return error.detail, error.errors


@pytest.mark.parametrize("kind", READERS)
def test_a_body_in_pieces_is_the_body_in_one(kind: str) -> None:
    reader, body = READERS[kind]
    for indent in (None, 1):
        text = json.dumps(body, indent=indent).encode()
        for size in (1, 30, 100, 300):
            assert read(text, reader, size) == reader(text)


@OF_MANY_CASES
def test_a_damaged_body_has_the_same_errors_in_pieces(kind: str) -> None:
    reader, body = READERS[kind]
    rng = random.Random(kind)  # noqa: S311 - no secret
    valid = json.dumps(body)
    rejected = 0
    for number in range(400):
        text = valid
        for _ in range(rng.choice((1, 1, 2, 5))):
            begin = rng.randrange(len(text))
            end = min(len(text), begin + rng.choice((0, 1, 3, 30)))
            text = text[:begin] + rng.choice(HOSTILE) + text[end:]
        data = text.encode()
        whole = read(data, reader, 2**30)
        rejected += isinstance(whole, tuple) and isinstance(whole[0], str)
        size = rng.choice((1, 30, 100))
        assert repr(read(data, reader, size)) == repr(whole), (number, size, text)
    assert 100 < rejected < 400


@OF_MANY_CASES
def test_wrong_values_have_the_same_errors_in_pieces(kind: str) -> None:
    reader, body = READERS[kind]
    rng = random.Random(kind)  # noqa: S311 - no secret
    for number in range(300):
        copy = json.loads(json.dumps(body))
        for _ in range(rng.choice((1, 2, 8))):
            place = copy
            for _ in range(rng.choice((1, 2, 3, 4, 5))):
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                within = [key for key in keys if isinstance(place[key], dict | list) and place[key]]
                if not within:
                    break
                place = place[rng.choice(within)]
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            new = rng.choice([None, 5, "x", [], {}, [1], {"type": "x"}, 1e400, True])
            place[rng.choice(keys)] = new
            if isinstance(place, dict) and rng.random() < 0.2:
                place["unknown"] = new
        data = json.dumps(copy).encode()
        size = rng.choice((1, 30, 100))
        assert repr(read(data, reader, size)) == repr(read(data, reader, 2**30)), (number, size)


@pytest.mark.slow
def test_too_many_points_have_the_same_error_in_pieces() -> None:
    reader, body = READERS["points"]
    many = {**body, "points": {**POINTS, "features": [POINT] * 10_001}}
    text = json.dumps(many).encode()
    assert read(text, reader, 2**16) == read(text, reader, 2**30)
    assert "10000" in str(read(text, reader, 2**16))


@pytest.mark.parametrize(
    "text",
    [
        b'{"series": [' + b"[" * 1000 + b'"' + b'\\"' * 500_000,
        b'{"series": [' + b'"\\' * 200_000 + b"]}",
        b'{"series": [' + b"[]," * 100_000 + b"]}",
        b'{"series": [' + b" " * 200_000 + b',{"id": "a", "dates": ["2021-01-05"]}]}',
        b'{"series": [{"id": "a", "dates": ["2021-01-05"]},' + b" " * 200_000 + b"]}",
        b'{"series": [' + b"1" * 200_000 + b"]}",
        b'{"series": [' + b'"' + b"x" * 200_000 + b'"' + b"]}",
        b"[" + b"1," * 100_000 + b"1]",
        b"{" + b'"a":1,' * 100_000 + b'"b":2}',
        b'{"series": ' + b"{" * 100_000,
    ],
)
def test_a_hostile_body_is_rejected_as_in_one_call(text: bytes) -> None:
    def reader(body: bytes) -> object:
        return read_series("classify-pixels", body)

    whole = read(text, reader, 2**30)
    assert isinstance(whole, tuple)
    assert read(text, reader, 2**16) == whole


@pytest.mark.parametrize(
    "text",
    [
        b'{"series": [{"id": "a", "dates": ["2021-01-05"], "B04": [' + b"1," * 300_000 + b"1]}]}",
        b'{"junk": [' + b"1," * 300_000 + b"1]}",
        b'{"junk": [' + b"1," * 300_000 + b'1], "series": [{"id": "a", "dates": ["2021-01-05"]}]}',
    ],
)
def test_more_values_than_any_entry_may_have_are_not_parsed(
    text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(*_: object) -> None:
        pytest.fail("the body was parsed")

    monkeypatch.setattr(ClassifySeries, "model_validate_json", parsed)
    with pytest.raises(InvalidRequest, match=r"about 30000\d values, and at most 200000"):
        read_series("classify-pixels", text)


@pytest.mark.parametrize("name", ["area", "dates", "bbox", "subscriber", "unknown"])
def test_more_values_than_parameters_may_have_are_not_parsed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(*_: object) -> None:
        pytest.fail("the form was parsed")

    monkeypatch.setattr(EmbedForm, "model_validate", parsed)
    with pytest.raises(InvalidRequest, match=rf"{name}: about 300000 values, and at most 200000"):
        read_parameters("embed", {name: ("[" + "1," * 300_000 + "1]",), "modality": ("pixel",)})


def test_a_point_of_a_form_has_no_more_values_than_any_entry() -> None:
    heavy = {**POINT, "properties": {"n": [1] * 300_000}}
    text = json.dumps({**POINTS, "features": [heavy]})
    with pytest.raises(InvalidRequest, match=r"points: entry 0 or one of the next has about 30000"):
        read_parameters("embed", {"points": (text,)})


def test_base64_is_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(1000)  # noqa: S311 - no secret
    text = base64.b64encode(content).decode()
    path = tmp_path / "file"
    for size in (4, 8, 1024, 2**16):
        monkeypatch.setattr(processes, "_CHARACTERS", size)
        assert Binary(text=text, field="f").write(path) == len(content)
        assert path.read_bytes() == content
        for wrong in (
            text[:8] + "=" + text[9:], text[:7] + "=" + text[8:], text[:-1], text + "=",
            text + "AAAA", text[:9] + " " + text[10:], text[:9] + "\n" + text[10:],
            text[:9] + "é" + text[10:], text[:9] + "_" + text[10:], "%%%",
        ):  # fmt: skip
            with pytest.raises(InvalidRequest, match="not valid base64"):
                Binary(text=wrong, field="f").write(path)
        with pytest.raises(InvalidRequest, match="empty"):
            Binary(text="", field="f").write(path)


def test_no_call_of_the_parser_reads_more_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"series": [{**SERIES[0], "id": str(n)} for n in range(20_000)]}).encode()
    longest = 0
    validate = type(validation._SERIES_LIST.entries).validate_json

    def measured(self: Any, piece: bytes) -> Any:
        nonlocal longest
        longest = max(longest, len(piece))
        return validate(self, piece)

    monkeypatch.setattr(type(validation._SERIES_LIST.entries), "validate_json", measured)
    assert len(read_series("embed", text).series) == 20_000
    assert json_pieces.PIECE_BYTES <= longest < 4 * json_pieces.PIECE_BYTES < len(text)


@pytest.mark.parametrize("indent", [None, 1])
def test_the_series_of_an_execution_are_parsed_once(
    monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    monkeypatch.setattr(json_pieces, "PIECE_BYTES", 100)
    plain = {"series": SERIES, "model": "m"}
    text = json.dumps({"inputs": plain, "response": "document"}, indent=indent).encode()
    inputs = processes.read_inputs("embed", read_execute(text))
    assert isinstance(inputs.body["series"], JsonText)
    made = routes._text(inputs.body)
    assert json.loads(made) == plain
    assert read_series("embed", made) == read_series("embed", json.dumps(plain).encode())


@pytest.mark.parametrize("entry", [{"value": SERIES[0]}, {"href": "/a.json"}, {"id": "\u0061\\"}])
def test_series_of_an_execution_that_may_be_links_are_parsed(
    monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any]
) -> None:
    monkeypatch.setattr(json_pieces, "PIECE_BYTES", 100)
    body = {"inputs": {"series": [*SERIES, entry]}}
    assert read_execute(json.dumps(body).encode()).inputs == body["inputs"]


MANY = "[" + ",".join(["1"] * (json_pieces.MOST_VALUES + 2)) + "]"


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (read_execute, f'{{"inputs": {{"mask": {MANY}}}}}'),
        (read_execute, f'{{"inputs": {{"series": {MANY}, "series": []}}}}'),
        (read_execute, f'{{"inputs": {{"points": {{"features": [], "more": {MANY}}}}}}}'),
        (READERS["series"][0], f'{{"series": {MANY}, "series": []}}'),
    ],
)
def test_what_is_parsed_in_one_call_has_few_values(
    reader: Callable[[bytes], Any], text: str
) -> None:
    with pytest.raises(InvalidRequest, match="values, and at most 200000 are allowed"):
        reader(text.encode())
