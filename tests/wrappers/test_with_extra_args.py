"""`with_extra_args`: trainers that pass no extra arguments, and that nothing of a step stays in them."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import mtl_optax as mtl

TASKS = ("a", "b")
PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5, jnp.float32)}
TX = optax.chain(mtl.scale_invariant(TASKS), optax.adam(1e-2))


def losses_of(params):
    return {"a": jnp.sum(params["w"] ** 2), "b": 3.0 * (params["b"] - params["w"][0]) ** 2}


def losses_and_grads(params):
    return mtl.per_task_value_and_grad(losses_of)(params)


def their_update(tx, grads, state, params):
    """What a trainer does that knows no extra arguments."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def step(params, state):
    losses, grads = losses_and_grads(params)
    return their_update(mtl.with_extra_args(TX, losses=losses), grads, state, params)


def expected(steps=3):
    params, state = PARAMS, TX.init(PARAMS)
    for _ in range(steps):
        losses, grads = losses_and_grads(params)
        updates, state = TX.update(grads, state, params, losses=losses)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(left, right):
    chex.assert_trees_all_close(left, right, rtol=1e-6)


def test_a_scanned_step_with_a_donated_state_is_that_of_the_optimizer():
    def run(params, state):
        return jax.lax.scan(lambda carry, _: (step(*carry), None), (params, state), length=3)[0]

    start = jax.tree.map(jnp.copy, (PARAMS, TX.init(PARAMS)))
    with jax.checking_leaks():
        found = jax.jit(run, donate_argnums=(0, 1))(*start)
    assert_close(found, expected())


def test_inside_a_chain_and_around_one():
    losses, grads = losses_and_grads(PARAMS)
    inside = optax.chain(
        mtl.with_extra_args(mtl.scale_invariant(TASKS), losses=losses), optax.sgd(1.0)
    )
    around = optax.chain(mtl.scale_invariant(TASKS), optax.sgd(1.0))
    state = around.init(PARAMS)
    chex.assert_trees_all_equal(inside.init(PARAMS), state)
    wanted = around.update(grads, state, PARAMS, losses=losses)
    chex.assert_trees_all_equal(inside.update(grads, state, PARAMS), wanted)
    given = mtl.with_extra_args(around, losses=losses)
    chex.assert_trees_all_equal(given.update(grads, state, PARAMS), wanted)


def test_arguments_of_the_caller_are_kept_and_none_is_given_twice():
    seen = {}

    def update_fn(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update_fn)
    tx = mtl.with_extra_args(inner, losses=1, active=2)
    tx.update(PARAMS, (), PARAMS, value=3)
    assert seen == {"losses": 1, "active": 2, "value": 3}
    with pytest.raises(TypeError, match=r"multiple values for keyword argument 'losses'"):
        tx.update(PARAMS, (), PARAMS, losses=4)


def test_a_transformation_that_takes_no_extra_arguments():
    tx = mtl.with_extra_args(optax.scale(2.0), losses=jnp.ones(2))
    assert tx.update(jnp.ones(1), tx.init(jnp.ones(1)))[0].tolist() == [2.0]


# --- Flax's TrainState, whose optimizer is a static field -----------------------------------------------


def train_state(tx=TX):
    train_state = pytest.importorskip("flax.training.train_state")
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    return state.replace(step=jnp.zeros((), jnp.int32))


def in_their_state(state):
    losses, grads = losses_and_grads(state.params)
    return state.replace(tx=mtl.with_extra_args(state.tx, losses=losses)).apply_gradients(
        grads=grads
    )


def put_back(state):
    return in_their_state(state).replace(tx=state.tx)


def test_a_train_state_that_gets_its_optimizer_back():
    state, compiled = train_state(), jax.jit(put_back, donate_argnums=0)
    state = jax.tree.map(jnp.copy, state)
    for _ in range(3):
        state = compiled(state)
    assert state.tx is TX and int(state.step) == 3 and compiled._cache_size() == 1
    assert_close((state.params, state.opt_state), expected())


def test_a_scan_over_a_train_state():
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: (put_back(s), None), state, length=3))
    with jax.checking_leaks():
        state, _ = run(train_state())
    assert_close((state.params, state.opt_state), expected())


def test_without_putting_it_back_the_losses_of_a_step_leave_it():
    """What the recipe avoids: the state holds tracers, and the next step is compiled anew."""
    state = jax.jit(in_their_state)(train_state())
    assert state.tx is not TX
    with pytest.raises(jax.errors.UnexpectedTracerError):
        state.tx.update(losses_and_grads(PARAMS)[1], state.opt_state, PARAMS)


def test_the_message_for_missing_losses_names_it():
    state = train_state()
    with pytest.raises(ValueError, match=r"mtl_optax\.with_extra_args\(tx, losses=losses\)"):
        state.apply_gradients(grads=losses_and_grads(state.params)[1])
