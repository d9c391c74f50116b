"""`inverse_norm` against reference numbers, and what is its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_jaxpi_in_ten_lines() -> None:
    """`update_every=k` on the losses' own function: weights every k-th step, one backward pass between."""
    x = jax.random.normal(jax.random.key(0), (9, 3))

    def loss_fn(w: jax.Array) -> dict[str, jax.Array]:
        return {"res": jnp.mean((jnp.tanh(x @ w) - 1) ** 2), "ics": 50 * jnp.mean((w - 2) ** 2)}

    method = mtl.inverse_norm(("res", "ics"), eps=1e-5, update_every=3)
    step = jax.jit(mtl.weighted_value_and_grad(loss_fn, method))
    w, expected_w, weights = jnp.zeros(3), jnp.zeros(3), {"res": 1.0, "ics": 1.0}
    state = method.init(w)
    for k in range(7):
        _, (update, state) = step(w, state)
        grads = jax.jacrev(loss_fn)(expected_w)
        if k % 3 == 0:
            norms = {name: np.linalg.norm(g) for name, g in grads.items()}
            mean = np.mean(list(norms.values()))
            weights = {n: 0.9 * weights[n] + 0.1 * mean / (norms[n] + 1e-5 * mean) for n in norms}
        expected = sum(weights[name] * g for name, g in grads.items())
        np.testing.assert_allclose(update, expected, rtol=1e-12)
        w, expected_w = w - 0.01 * update, expected_w - 0.01 * expected


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_inverse_norm_has_weights_that_can_be_multiplied(power):
    """The fourth power of a ratio of 1e12 is beyond float32: the weight stops at the root of its range."""
    grads = jnp.array([[1e6, 0.0], [0.0, 1e-6]])
    tx = mtl.inverse_norm(2, power=power, ema_decay=0.0)
    update, state = tx.update(grads, tx.init(jnp.zeros(2)))
    largest = float(jnp.finfo(jnp.float32).max) ** 0.5
    assert float(state.weights[0, 1]) == pytest.approx(min(5e11**power, largest), rel=1e-3)
    assert np.isfinite(update).all()
    bounded = mtl.inverse_norm(2, power=power, ema_decay=0.0, eps=0.1)
    _, state = bounded.update(grads, bounded.init(jnp.zeros(2)))
    assert float(state.weights[0, 1]) == pytest.approx(10.0**power, rel=1e-5)
