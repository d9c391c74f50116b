"""`rlw` against reference numbers, and what is its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import parameters
from golden_losses import check, run

import mtl_optax as mtl


@pytest.mark.parametrize("case", parameters("loss/rlw"))
def test_golden(case, dtype):
    normals = case["normals"]
    weights, _ = run(mtl.rlw(case["T"]), case, dtype, np.ones_like(normals), {"noise": normals})
    check(weights, case["outputs"]["weights"])


def test_rlw_is_uniform_on_average_and_follows_its_seed():
    losses = np.ones((400, 3))
    case = {"losses": losses}
    draws, _ = run(mtl.rlw(3, seed=1), case, jnp.dtype(jnp.float32))
    np.testing.assert_allclose(draws.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(draws.mean(0), 1 / 3, atol=0.03)
    again, _ = run(mtl.rlw(3, seed=1), case, jnp.dtype(jnp.float32))
    other, _ = run(mtl.rlw(3, seed=2), case, jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(draws, again)
    assert not np.allclose(draws, other)
