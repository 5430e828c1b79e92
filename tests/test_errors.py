"""Each error has a status, a code and a title of its own."""

from __future__ import annotations

from inspect import signature

import pytest

from service import errors
from service.errors import (
    MOST_ERRORS,
    STATUS,
    InvalidRequest,
    PIMCError,
    StackWarning,
    first_names,
    shown,
)

# Nodes of the tree that group others and are not raised.
GROUPS = {"PIMCError", "RequestError", "RasterError"}


def every_error(root: type[PIMCError] = PIMCError) -> set[type[PIMCError]]:
    return {root}.union(*(every_error(child) for child in root.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(every_error(), key=lambda kind: kind.__name__))
def test_every_error_has_a_status(kind: type[PIMCError]) -> None:
    assert 400 <= STATUS[kind.code] <= 599


def test_every_status_has_its_error_and_no_two_share_a_code() -> None:
    leaves = [kind for kind in every_error() if kind.__name__ not in GROUPS]
    # A special case of another error is reported with that error's code.
    leaves = [kind for kind in leaves if "code" in vars(kind) or kind.__base__.__name__ in GROUPS]
    codes = [kind.code for kind in leaves]
    assert len(set(codes)) == len(codes)
    assert set(codes) == set(STATUS)


def test_every_error_has_a_title_of_its_own() -> None:
    for kind in every_error():
        if kind.__name__ not in GROUPS:
            assert kind.title.lower().replace(" ", "_") == kind.code or kind.code in {
                "not_a_geotiff"
            }, kind


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert errors.__doc__
    public = {kind.__name__ for kind in every_error() if not kind.__name__.startswith("_")}
    assert {name for name in public if name not in errors.__doc__} == set()


def test_an_error_of_one_field_names_it_twice() -> None:
    error = InvalidRequest.of("stride", "65 is over 64")
    assert error.detail == "stride: 65 is over 64"
    assert error.errors == ({"field": "stride", "detail": "65 is over 64"},)


def test_a_long_text_is_shown_without_its_middle() -> None:
    assert shown("a" * 100) == "a" * 100
    assert shown("a" * 90 + "b" * 90) == "a" * 75 + "… (80 characters left out) …" + "b" * 25
    assert shown(["x"]) == "['x']"
    assert first_names(["a" * 1000, "b", "c"], 2).endswith("a, b and 1 more")
    assert len(first_names(["a" * 1000, "b", "c"], 2)) < 150


@pytest.mark.parametrize("kind", sorted(every_error(), key=lambda kind: kind.__name__))
def test_no_message_is_longer_than_a_page(kind: type[PIMCError]) -> None:
    """Whatever a client's text is: the begin and the remedy at the end remain."""
    if kind.__init__ is not PIMCError.__init__ and "detail" not in signature(kind).parameters:
        pytest.skip("its message is its own")
    error = kind(f"'{'x' * 100_000}' is not a date; send one")
    assert error.detail.startswith("'xxx")
    assert error.detail.endswith("is not a date; send one")
    assert len(error.detail) == len(str(error)) < 5_000


def test_no_list_of_errors_is_longer_than_a_page() -> None:
    long = "x" * 100_000
    error = InvalidRequest("many", [{"field": long, "detail": long}] * 1000)
    assert len(error.errors) == MOST_ERRORS
    assert max(len(one["field"]) for one in error.errors) < 200
    assert max(len(one["detail"]) for one in error.errors) < 5_000


def test_no_warning_is_longer_than_a_page() -> None:
    assert len(StackWarning(code="a", detail="x" * 100_000).detail) < 5_000
