"""`pcgrad` against reference numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_cases import Batch, load, pad_order
from golden_static import CLOSED, both_precisions, check, flatten

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
@both_precisions
def test_golden(dtype: Any) -> None:
    rows = flatten(load("gradient/pcgrad"), "orders")
    batch = Batch([case["G"] for case, _, _ in rows])
    names = [f"{case['name']} {label}" for case, label, _ in rows]
    orders = np.stack([pad_order(e["orders"], batch.num_tasks) for _, _, e in rows])
    # More tasks than dimensions: what is left of a gradient can be rounding alone, and its sign decides.
    exempt = [n for n in names if n.startswith(("rankdef", "collinear", "anticollinear"))]
    wants = [e["update"] for _, _, e in rows]
    tolerances = (1e-9, CLOSED[1])
    check(dtype, batch, names, wants, mtl.pcgrad, tolerances, exempt, order=orders)
