"""Which cases of a test `make check` leaves out."""

from __future__ import annotations

from typing import Any

import pytest


def in_all_tests(*values: Any, names: bool = False) -> list[Any]:
    """Values of a parameter that only `make test` tries; one that `make check` tries stands first.

    Args:
        values: the further values; each is one parameter, also if it is a tuple.
        names: whether each is a tuple of several parameters instead.
    """
    cases = values if names else [(value,) for value in values]
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]
