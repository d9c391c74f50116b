"""`cagrad` against reference numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_cases import Batch, load
from golden_static import SOLVED, both_precisions, check, degenerate, flatten

import mtl_optax as mtl

ROWS = flatten(load("gradient/cagrad"), "c")
BATCH = Batch([case["G"] for case, _, _ in ROWS])
RADII = {"c": np.asarray([float(label) for _, label, _ in ROWS])}


def rescaled(rescale: int) -> Any:
    return lambda num_tasks, c: mtl.cagrad(num_tasks, c=c, rescale=rescale)  # type: ignore[arg-type]


@pytest.mark.usefixtures("x64")
@both_precisions
def test_golden(dtype: Any) -> None:
    names = [f"{case['name']} c={label}" for case, label, _ in ROWS]
    wants = [None if degenerate(case["name"]) else e["update"] for case, _, e in ROWS]
    check(dtype, BATCH, names, wants, rescaled(0), SOLVED, keywords=RADII)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_divisors() -> None:
    plain, _ = BATCH.run(rescaled(0), keywords=RADII)
    for rescale in (1, 2):
        updates, _ = BATCH.run(rescaled(rescale), keywords=RADII)
        for u, p, c in zip(updates, plain, RADII["c"], strict=True):
            divisor = 1 + c * c if rescale == 1 else 1 + c
            np.testing.assert_allclose(u, p / divisor, rtol=1e-12)
