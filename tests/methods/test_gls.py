"""`gls` against reference numbers."""

import pytest
from golden_cases import parameters
from golden_losses import check, run

import mtl_optax as mtl


@pytest.mark.parametrize("case", parameters("loss/gls"))
def test_golden(case, dtype):
    check(run(mtl.gls(case["T"]), case, dtype)[0], case["outputs"]["weights"])
