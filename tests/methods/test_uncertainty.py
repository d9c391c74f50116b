"""`uncertainty` against reference numbers."""

import numpy as np
import pytest
from golden_cases import parameters
from golden_losses import OPTIMIZERS, check, run

import mtl_optax as mtl


@pytest.mark.parametrize("case", parameters("loss/uncertainty"))
def test_golden(case, dtype):
    h = case["hyperparameters"]
    optimizer = OPTIMIZERS[h["optimizer"]](h["lr"])
    method = mtl.uncertainty(case["T"], form=h["form"], init=h["init"], optimizer=optimizer)
    weights, states = run(method, case, dtype)
    check(weights, case["outputs"]["weights"])
    check(np.asarray(states.values)[:-1], case["outputs"]["state_before"][1:])
