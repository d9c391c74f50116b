"""`dwa` against reference numbers, and what is its own."""

import numpy as np
import pytest
from golden_cases import parameters
from golden_losses import check, run, simple

import mtl_optax as mtl


@pytest.mark.parametrize(
    "case", parameters("loss/dwa", lambda c: c["hyperparameters"]["variant"] == "epoch")
)
def test_golden(case, dtype):
    method = mtl.dwa(case["T"], temperature=case["hyperparameters"]["temperature"])
    check(run(method, case, dtype)[0], case["outputs"]["weights"])


def test_dwa_averages_over_windows():
    losses = np.random.default_rng(0).uniform(0.5, 2, (7, 2))
    first, second = losses[:3].mean(0), losses[3:6].mean(0)
    logits = np.exp(second / first / 2)
    np.testing.assert_allclose(
        simple(mtl.dwa(2, window=3), losses), 2 * logits / logits.sum(), rtol=1e-5
    )
