"""What the notes of single methods promise, where no property that methods share would show it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl


def test_pcd_counts_the_steps_without_a_feasible_update():
    """Two auxiliaries that are opposite cannot both have their guarantee."""
    tx = mtl.pcd(3, tau=0.1)
    opposite = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    possible = jnp.array([[1.0, 0.0], [-1.0, 1.0], [0.5, 1.0]])
    state, counts = tx.init(jnp.zeros(2)), []
    for grads in (possible, opposite, opposite, possible):
        update, state = tx.update(grads, state)
        counts.append(int(state.rule_state.fallback_count[0]))
        if grads is opposite:  # the target alone
            assert state.weights[0, 0] > 0 and state.weights[0, 1:].tolist() == [0, 0]
        else:
            assert float(jnp.min(grads @ update)) > 0
    assert counts == [0, 1, 2, 2]
    # Without its target a step has no constraint to fail.
    _, state = tx.update(opposite, state, active=jnp.array([False, True, True]))
    assert int(state.rule_state.fallback_count[0]) == 2


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
