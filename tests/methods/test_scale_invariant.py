"""`scale_invariant` against reference numbers."""

import numpy as np
import pytest
from golden_cases import parameters
from golden_losses import check, run

import mtl_optax as mtl


@pytest.mark.parametrize("case", parameters("loss/si"))
def test_golden_si(case, dtype):
    """Task weights, which the reference has beside the losses, are a reducer of their own here."""
    task_weights = np.asarray(case["hyperparameters"]["task_weights"], dtype)
    weights, _ = run(mtl.scale_invariant(case["T"]), case, dtype)
    check(weights * task_weights, case["outputs"]["weights"])
