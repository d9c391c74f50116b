"""A part of many alike cases for the quick tests; the others are slow ones."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """`cases` for `parametrize`, a tuple for several arguments; those that are not in `quick` are slow."""
    cases = list(cases)
    assert all(case in cases for case in quick), quick
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in quick else pytest.mark.slow,
        )
        for case in cases
    ]
