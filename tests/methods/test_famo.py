"""`famo` against reference numbers, and what is its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import parameters
from golden_losses import check, run, simple

import mtl_optax as mtl


@pytest.mark.parametrize("case", parameters("loss/famo"))
def test_golden(case, dtype):
    h = case["hyperparameters"]
    low = jnp.asarray(case["min_losses"], dtype)
    method = mtl.famo(case["T"], gamma=h["gamma"], weight_lr=h["w_lr"], min_losses=low)
    # The first entry belongs to no step, and must not be looked at.
    after = [[1.0] * case["T"], *case["losses_after_update"][:-1]]
    check(run(method, case, dtype, extra={"losses_after": after})[0], case["outputs"]["weights"])


def test_famo_without_losses_after_takes_the_present_ones():
    losses = np.array([[2.0, 1.0], [1.5, 0.2]])
    method = mtl.famo(2)
    given = simple(method, losses, losses_after=np.array([[1.0, 1.0], [1.5, 0.2]]))
    np.testing.assert_array_equal(given, simple(method, losses))
