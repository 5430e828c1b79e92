"""Each error has a status, a code and a title of its own."""

from __future__ import annotations

import pytest

from service import errors
from service.errors import STATUS, InvalidRequest, PIMCError

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
