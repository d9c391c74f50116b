"""`conflict_free` against reference numbers."""

from __future__ import annotations

from typing import Any

import pytest
from golden_cases import load
from golden_static import CLOSED, batch_of, both_precisions, check

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
@both_precisions
def test_golden_config(dtype: Any) -> None:
    cases = load("gradient/config")
    batch, names = batch_of(cases)
    check(dtype, batch, names, [c["update"] for c in cases], mtl.conflict_free, CLOSED)
