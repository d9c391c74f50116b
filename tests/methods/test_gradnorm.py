"""`gradnorm` against reference numbers, and what is its own."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_cases import parameters
from golden_losses import OPTIMIZERS, check, run

import mtl_optax as mtl


@pytest.mark.parametrize(
    "case", parameters("loss/gradnorm", lambda c: c["hyperparameters"]["variant"] == "paper")
)
def test_golden(case, dtype):
    h = case["hyperparameters"]
    optimizer = OPTIMIZERS[h["weight_optimizer"]](h["weight_lr"])
    method = mtl.gradnorm(case["T"], alpha=h["alpha"], optimizer=optimizer)
    check(run(method, case, dtype)[0], case["outputs"]["weights_before"])


def test_gradnorm_keeps_its_weights_where_none_stays_positive():
    method = mtl.gradnorm(1, optimizer=optax.sgd(10.0), alpha=0.0)
    weights, states = run(method, {"losses": [[1.0]] * 3}, jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(weights, 1)
    two = mtl.gradnorm(2, optimizer=optax.chain(optax.sgd(1.0), optax.add_decayed_weights(-9.0)))
    weights, states = run(two, {"losses": [[1.0, 1.0]] * 3}, jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(weights, 1)
    assert states.fallback_count.tolist() == [1, 2, 3]
