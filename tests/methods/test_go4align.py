"""`go4align` against reference numbers."""

import pytest
from golden_cases import parameters
from golden_losses import check, run

import mtl_optax as mtl


@pytest.mark.parametrize("case", parameters("loss/go4align"))
def test_golden(case, dtype):
    h = case["hyperparameters"]
    method = mtl.go4align(case["T"], num_groups=h["num_groups"], step_size=h["robust_step_size"])
    check(run(method, case, dtype)[0], case["outputs"]["weights"])
