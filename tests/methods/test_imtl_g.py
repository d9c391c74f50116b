"""`imtl_g` against reference numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_cases import load
from golden_static import CLOSED, batch_of, both_precisions, check

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
@both_precisions
def test_golden(dtype: Any) -> None:
    cases = load("gradient/imtl_g")
    batch, names = batch_of(cases)
    # The weights sum to 1: where the coefficients nearly cancel, their error grows by the condition
    # number. Without a bound the closed form has no answer: finite only.
    usable = [(c.get("cond_unit_matrix") or np.inf) <= 1e4 for c in cases]
    wants = [c["update"] if ok else None for c, ok in zip(cases, usable, strict=True)]
    check(dtype, batch, names, wants, mtl.imtl_g, CLOSED)
