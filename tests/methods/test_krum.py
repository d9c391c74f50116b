"""`krum` against reference numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_cases import Batch, error, load
from sampling import sampled

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("squared", sampled([False, True], [True]))
@pytest.mark.parametrize(("byzantine", "selected"), [(1, 1), (1, 2), (0, 1)])
def test_golden(byzantine: int, selected: int, squared: bool) -> None:
    key = f"krum_byz{byzantine}_sel{selected}"
    cases = [c for c in load("gradient/mean_sum_trimmed_krum") if key in c]
    batch = Batch([c["G"] for c in cases])

    def make(num_tasks: int) -> Any:
        return mtl.krum(num_tasks, num_byzantine=byzantine, num_selected=selected, squared=squared)

    updates, weights = batch.run(make)
    for case, update, w in zip(cases, updates, weights, strict=True):
        want = case[key]["weights_squared_distances" if squared else "weights"]
        np.testing.assert_allclose(w, want, atol=1e-12, err_msg=case["name"])
        assert error(update, np.asarray(want) @ np.asarray(case["G"])) <= 1e-9
