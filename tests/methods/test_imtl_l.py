"""`imtl_l` against reference numbers."""

import pytest
from golden_cases import parameters
from golden_losses import OPTIMIZERS, check, run

import mtl_optax as mtl


@pytest.mark.parametrize("case", parameters("loss/imtl_l"))
def test_golden(case, dtype):
    h = case["hyperparameters"]
    method = mtl.imtl_l(case["T"], optimizer=OPTIMIZERS[h["optimizer"]](h["lr"]))
    check(run(method, case, dtype)[0], case["outputs"]["weights"])
