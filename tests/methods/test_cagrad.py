"""`cagrad` against reference numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_cases import Batch, load
from golden_static import SOLVED, both_precisions, check, degenerate, flatten

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
@both_precisions
def test_golden(dtype: Any) -> None:
    rows = flatten(load("gradient/cagrad"), "c")
    batch = Batch([case["G"] for case, _, _ in rows])
    names = [f"{case['name']} c={label}" for case, label, _ in rows]
    wants = [None if degenerate(case["name"]) else e["update"] for case, _, e in rows]
    radii = {"c": np.asarray([float(label) for _, label, _ in rows])}

    def rescaled(rescale: int) -> Any:
        return lambda num_tasks, c: mtl.cagrad(num_tasks, c=c, rescale=rescale)  # type: ignore[arg-type]

    plain, _ = check(dtype, batch, names, wants, rescaled(0), SOLVED, keywords=radii)
    if dtype == np.float32:
        return
    for rescale in (1, 2):
        updates, _ = batch.run(rescaled(rescale), keywords=radii)
        for u, p, c in zip(updates, plain, radii["c"], strict=True):
            divisor = 1 + c * c if rescale == 1 else 1 + c
            np.testing.assert_allclose(u, p / divisor, rtol=1e-12)
