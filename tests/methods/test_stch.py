"""`stch` against reference numbers."""

import numpy as np
import pytest
from golden_cases import parameters
from golden_losses import check, run

import mtl_optax as mtl


@pytest.mark.parametrize("case", parameters("loss/stch"))
def test_golden(case, dtype):
    h, steps = case["hyperparameters"], case["hyperparameters"]["steps_per_epoch"]
    method = mtl.stch(
        case["T"], mu=h["mu"], warmup_steps=h["warmup_epoch"] * steps, nadir_steps=steps
    )
    weights, states = run(method, case, dtype)
    check(weights, case["outputs"]["weights"])
    check(np.asarray(states.mean)[-1:], [case["outputs"]["nadir"]])
