"""Methods that draw: a new draw in every step, and the same one where a step is done again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_properties import RANDOM, make
from sampling import sampled

import mtl_optax as mtl

T = 4
GRADIENTS = jnp.asarray(np.random.default_rng(0).normal(size=(T, 6)), jnp.float32)
# Pairs conflict, so that the order of projections shows.
GRADIENTS = GRADIENTS - 0.9 * jnp.mean(GRADIENTS, axis=0, keepdims=True)
LOSSES = jnp.array([0.7, 1.3, 0.2, 2.0])
OPTIONS = {"relobralo": {"rho": 0.5, "ema_decay": 0.5}}


@pytest.mark.parametrize("name", sampled(sorted(RANDOM), ["rlw", "relobralo"]))
def test_every_step_draws_anew(name):
    tx = make(name, T, **OPTIONS.get(name, {}))
    state = tx.init(jnp.zeros(6))
    for k in range(2):  # relobralo draws from its third step on
        _, state = tx.update(GRADIENTS, state, losses=(1 + k) * LOSSES)

    @jax.jit
    @jax.vmap
    def at_step(count):
        again = state._replace(balance_count=count)
        return tx.update(GRADIENTS, again, losses=LOSSES[::-1])[0]

    steps = np.arange(2, 18, dtype=np.int32)
    updates = np.asarray(at_step(jnp.asarray(steps)))
    drawn = np.unique(updates.round(5), axis=0)
    assert len(drawn) >= 2 if name == "relobralo" else len(drawn) > 8
    np.testing.assert_array_equal(at_step(jnp.asarray(steps)), updates)


@pytest.mark.parametrize("name", sampled(sorted(RANDOM), ["rlw", "graddrop"]))
def test_another_seed_draws_something_else(name):
    def updates(seed):
        tx = make(name, T, seed=seed, **OPTIONS.get(name, {}))

        def body(state, k):
            update, state = tx.update(GRADIENTS, state, losses=LOSSES + k * LOSSES[::-1])
            return state, update

        return jax.jit(lambda: jax.lax.scan(body, tx.init(jnp.zeros(6)), jnp.arange(12.0))[1])()

    assert not np.allclose(updates(0), updates(1), rtol=1e-3)


def test_one_task_of_many_is_drawn_anew_too():
    """`one_task_value_and_grad` draws by the number of the step that it is given."""
    fn = mtl.one_task_value_and_grad(lambda w: jnp.stack([w, 2 * w, 3 * w]), 3, order="random")
    tasks = jax.jit(jax.vmap(lambda step: fn(step, 1.0)[1][1]))(jnp.arange(20))
    assert np.asarray(tasks).any(axis=0).all()
