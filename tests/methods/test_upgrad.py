"""`upgrad` and `dualproj` against reference numbers."""

from __future__ import annotations

from typing import Any

import pytest
from golden_cases import load
from golden_static import SOLVED, batch_of, both_precisions, check

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
@both_precisions
@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_golden_upgrad_dualproj(name: str, dtype: Any) -> None:
    cases = load("gradient/upgrad_dualproj")
    batch, names = batch_of(cases)
    wants = [c[name]["update"] for c in cases]
    scale = ("gradients", "gradients")
    check(dtype, batch, names, wants, getattr(mtl, name), SOLVED, relative_to=scale)
