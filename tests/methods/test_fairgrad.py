"""`fairgrad` against reference numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_cases import Batch, load
from golden_static import OWN_LENGTH, SOLVED, both_precisions, check, degenerate, flatten

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
@both_precisions
def test_golden(dtype: Any) -> None:
    rows = flatten(load("gradient/fairgrad"), "alpha")
    batch = Batch([case["G"] for case, _, _ in rows])
    names = [f"{case['name']} alpha={label}" for case, label, _ in rows]
    wants = [None if degenerate(case["name"]) else e["update"] for case, _, e in rows]
    alpha = {"alpha": np.asarray([float(label) for _, label, _ in rows])}
    run = {"relative_to": OWN_LENGTH, "keywords": alpha}
    _, weights = check(dtype, batch, names, wants, mtl.fairgrad, SOLVED, **run)
    if dtype == np.float32:
        return
    for (case, label, entry), w in zip(rows, weights, strict=True):
        if entry["weights"] is not None and not degenerate(case["name"]):
            residual = np.asarray(case["G"]) @ np.asarray(case["G"]).T @ w * w ** (1 / float(label))
            assert np.abs(residual - 1).max() <= 1e-6, case["name"]
