"""`excess_mtl` against reference numbers, and what is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import parameters
from golden_losses import check

import mtl_optax as mtl


@pytest.mark.parametrize("case", parameters("gradient/torchjd_extras"))
def test_golden_torchjd_extras_excess_mtl(case, dtype):
    gradients = jnp.asarray(np.asarray([step["G"] for step in case["steps"]]), dtype)
    method = mtl.excess_mtl(gradients.shape[1], step_size=1e-2)

    def body(state, gradient):
        update, state = method.update(gradient, state)
        return state, (update, state.weights[0])

    start = method.init(jnp.zeros(gradients.shape[2], dtype))
    _, (updates, weights) = jax.jit(lambda g: jax.lax.scan(body, start, g))(gradients)
    check(np.asarray(weights), [step["excess_mtl_weights"] for step in case["steps"]])
    total = np.einsum("kt,ktn->kn", np.asarray(weights, float), np.asarray(gradients, float))
    check(np.asarray(updates), total)


def test_excess_mtl_measures_its_baseline_in_the_first_steps():
    gradients = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 4.0], [2.0, 1.0]])
    tx = mtl.excess_mtl(2, warmup_steps=2, step_size=0.5, eps=0.0)
    state, squares, excess = tx.init(jnp.zeros(1)), np.zeros(2), []
    log_weights = np.zeros(2)
    for k, gradient in enumerate(gradients):
        _, state = tx.update(jnp.asarray(gradient)[:, None], state)
        squares += gradient**2
        excess.append(gradient**2 / np.sqrt(squares))
        if k >= 2:
            log_weights += 0.5 * excess[k] / np.mean(excess[:2], axis=0)
        weights = np.exp(log_weights) / np.exp(log_weights).sum()
        np.testing.assert_allclose(state.weights[0], weights, rtol=1e-5)
