"""`conflict_free` against reference numbers."""

from __future__ import annotations

import pytest
from golden_cases import load
from golden_static import CLOSED, batch_of, check

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
def test_golden_config() -> None:
    cases = load("gradient/config")
    batch, names = batch_of(cases)
    check(batch, names, [c["update"] for c in cases], mtl.conflict_free, CLOSED)
