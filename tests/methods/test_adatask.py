"""`adatask` against reference numbers, and what is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_cases import parameters
from golden_elements import STATIC, assert_steps_close, parameter_steps, precisions, trajectory

import mtl_optax as mtl


def scale_by_adagrad(eps):
    """AdaGrad with epsilon outside the root, where optax has it inside."""

    def update(updates, state, params=None):
        sums = jax.tree.map(lambda s, g: s + g**2, state, updates)
        return jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), updates, sums), sums

    return optax.GradientTransformation(lambda params: optax.tree.zeros_like(params), update)


@precisions(STATIC)
@pytest.mark.parametrize("case", parameters("loss/adatask", quick=["adam T=3 zero task at step 0"]))
def test_golden(x64, case, dtype, tolerance):
    given = case["hyperparameters"]
    inner = {
        "adam": lambda: optax.scale_by_adam(given["b1"], given["b2"], given["eps"]),
        "rmsprop": lambda: optax.scale_by_rms(given["decay"], given["eps"], eps_in_sqrt=False),
        "adagrad": lambda: scale_by_adagrad(given["eps"]),
    }[given["rule"]]
    tx = optax.chain(mtl.adatask(case["T"], inner()), optax.scale(-given["lr"]))
    updates, _ = trajectory(tx, case, dtype)
    assert_steps_close(updates, parameter_steps(case), tolerance, case["name"])


def test_adatask_gives_its_optimizer_everything_in_float32():
    """A weight decay of 0.1 of a bfloat16 parameter has more digits than bfloat16."""
    seen = []

    def look(updates, state, params):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves((updates, state, params)))
        return jax.tree.map(lambda u, p: u + 0.1 * p, updates, params), state

    inner = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), look)
    params = {"w": jnp.full(3, 1.0, jnp.bfloat16)}
    tx = mtl.adatask(2, inner)
    update, _ = tx.update({"w": jnp.ones((2, 3), jnp.bfloat16)}, tx.init(params), params)
    assert len(seen) == 3 and set(seen) == {jnp.dtype(jnp.float32)}
    assert update["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(update["w"], jnp.full(3, 2.2, jnp.bfloat16))
