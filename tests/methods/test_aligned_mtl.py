"""`aligned_mtl` against reference numbers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from golden_cases import load
from golden_static import SOLVED, batch_of, both_precisions, check

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
@both_precisions
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_golden(scale: str, dtype: Any) -> None:
    cases = [c for c in load("gradient/aligned_mtl") if scale in c["modes"]]
    batch, names = batch_of(cases)
    modes = [c["modes"][scale] for c in cases]
    # A Gram matrix holds the inverse singular values to eps * cond^2: 2e-6 at 1e5, 1e-5 in float32 at 10.
    usable = [(m.get("cond") or np.inf) <= 1e5 for m in modes]
    wants = [m["update_sum"] if ok else None for m, ok in zip(modes, usable, strict=True)]
    make = functools.partial(mtl.aligned_mtl, scale=scale)
    check(dtype, batch, names, wants, make, SOLVED)
