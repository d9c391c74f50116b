"""`bandit_mtl` against reference numbers."""

import numpy as np
import pytest
from golden_cases import parameters
from golden_losses import check, run

import mtl_optax as mtl


@pytest.mark.parametrize("case", parameters("loss/bandit_mtl", quick=["rho 0.3 T=3"]))
def test_golden(case, dtype):
    h = case["hyperparameters"]
    method = mtl.bandit_mtl(case["T"], step_size=h["eta"], kl_radius=h["kl_radius"])
    weights, states = run(method, case, dtype)
    check(weights, case["outputs"]["weights"])
    check(np.exp(np.asarray(states.log_p)), case["outputs"]["p_after"])
