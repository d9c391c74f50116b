"""`skip_nonfinite`, `accumulate` and `per_task`: what they let through, and what they remember."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sampling import sampled

import mtl_optax as mtl

T = 2
PARAMS = {"a": jnp.ones((2,)), "b": jnp.ones(())}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)
LOSSES = jnp.array([0.5, 2.0])


def gradients(seed):
    keys = jax.random.split(jax.random.key(seed))
    return {"a": jax.random.normal(keys[0], (T, 2)), "b": jax.random.normal(keys[1], (T,))}


def spoil(grads, task, value=np.nan):
    return {**grads, "a": grads["a"].at[task, 1].set(value)}


def assert_close(left, right, rtol=1e-6):
    chex.assert_trees_all_close(left, right, rtol=rtol, atol=1e-7)


# --- skip_nonfinite ----------------------------------------------------------------------------------

GUARDED = mtl.skip_nonfinite(optax.chain(mtl.metabalance(T), optax.adam(1e-2)))
GUARDED_STEP = jax.jit(GUARDED.update)


@pytest.mark.parametrize("value", sampled([np.nan, np.inf, -np.inf], [np.nan, -np.inf]))
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_with_anything_not_finite_is_skipped_whole(where, value):
    _, state = GUARDED_STEP(gradients(0), GUARDED.init(PARAMS), PARAMS, losses=LOSSES)
    grads, losses = gradients(1), LOSSES
    if where == "gradient":
        grads = spoil(grads, 1, value)
    else:
        losses = losses.at[0].set(value)
    update, after = GUARDED_STEP(grads, state, PARAMS, losses=losses)
    chex.assert_trees_all_equal(update, ZERO)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert int(after.skipped_steps) == 1
    # The next step is what it would have been.
    update, _ = GUARDED_STEP(gradients(2), after, PARAMS, losses=LOSSES)
    expected, _ = GUARDED_STEP(gradients(2), state, PARAMS, losses=LOSSES)
    chex.assert_trees_all_equal(update, expected)


def test_a_step_whose_update_is_not_finite_is_skipped():
    def overflow(updates, state, params=None):
        return jax.tree.map(lambda u: u * jnp.finfo(u.dtype).max * 10, updates), state + 1

    inner = optax.GradientTransformation(lambda params: jnp.zeros(()), overflow)
    tx = mtl.skip_nonfinite(optax.chain(mtl.sum_tasks(T), inner))
    update, state = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(update, ZERO)
    assert float(state.inner_state[1]) == 0 and int(state.skipped_steps) == 1


@pytest.mark.slow
def test_it_goes_around_a_typed_key():
    tx = mtl.skip_nonfinite(optax.chain(mtl.sum_tasks(T), optax.add_noise(0.1, 0.5, 0)))
    _, state = tx.update(spoil(gradients(0), 0), tx.init(PARAMS), PARAMS)
    assert int(state.skipped_steps) == 1


# --- accumulate --------------------------------------------------------------------------------------

ACCUMULATED = mtl.accumulate(mtl.scale_invariant(T), T, every_k=3)
ACCUMULATED_STEP = jax.jit(ACCUMULATED.update)


def accumulated(steps):
    """The updates of `(gradients, losses, active)` one after the other."""
    state, updates = ACCUMULATED.init(PARAMS), []
    for grads, losses, active in steps:
        update, state = ACCUMULATED_STEP(
            grads, state, PARAMS, losses=losses, active=jnp.asarray(active)
        )
        updates.append(update)
    return updates, state


def at_once(grads, losses, active=(True, True)):
    tx = mtl.scale_invariant(T)
    return tx.update(grads, tx.init(PARAMS), PARAMS, losses=losses, active=jnp.asarray(active))[0]


def mean(*trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def test_the_mean_of_micro_batches_is_what_inner_sees():
    both = [True, True]
    steps = [(gradients(k), LOSSES * (1 + k), both) for k in range(6)]
    updates, state = accumulated(steps)
    for k in (0, 1, 3, 4):
        chex.assert_trees_all_equal(updates[k], ZERO)
    for last in (2, 5):
        three = steps[last - 2 : last + 1]
        expected = at_once(mean(*(g for g, _, _ in three)), mean(*(x for _, x, _ in three)))
        assert_close(updates[last], expected, 1e-5)
    assert int(state.micro_count) == 0 and int(state.inner_state.balance_count) == 2


@pytest.mark.parametrize("broken", [False, True], ids=["absent", "broken"])
def test_a_task_is_averaged_over_the_micro_batches_it_was_in(broken):
    away = [True, True] if broken else [True, False]
    bad = spoil(gradients(1), 1) if broken else gradients(1)
    both = [True, True]
    updates, _ = accumulated(
        [(gradients(0), LOSSES, both), (bad, LOSSES, away), (gradients(2), 3 * LOSSES, both)]
    )
    twice = mean(gradients(0), gradients(2))
    thrice = mean(gradients(0), gradients(1), gradients(2))
    grads = jax.tree.map(lambda one, other: jnp.stack([one[0], other[1]]), thrice, twice)
    losses = jnp.array([LOSSES[0] * 5 / 3, LOSSES[1] * 2])
    assert_close(updates[-1], at_once(grads, losses), 1e-5)


def test_a_task_in_no_micro_batch_is_passed_on_as_absent():
    steps = [(spoil(gradients(k), 1), LOSSES, [True, True]) for k in range(3)]
    updates, state = accumulated(steps)
    expected = at_once(mean(*(g for g, _, _ in steps)), LOSSES, (True, False))
    assert_close(updates[-1], expected, 1e-5)
    assert state.inner_state.skipped.tolist() == [0, 0]


def test_accumulation_keeps_float32_sums_of_half_precision_gradients():
    params = {"w": jnp.zeros((1,), jnp.float16)}
    tx = mtl.accumulate(mtl.sum_tasks(T), T, every_k=2)
    state = tx.init(params)
    for _ in range(2):
        update, state = tx.update({"w": jnp.full((T, 1), 30_000.0, jnp.float16)}, state, params)
    # Two times 30,000 twice: the sum of four leaves float16, the mean over micro-batches does not.
    assert update["w"].dtype == jnp.float16 and float(update["w"][0]) == 60_000.0
    assert state.gradients["w"].dtype == jnp.float32


# --- per_task ----------------------------------------------------------------------------------------


def test_a_broken_task_leaves_only_its_own_state_as_it_was():
    tx = mtl.per_task(optax.trace(0.9), T)
    _, state = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    passed, after = tx.update(spoil(gradients(1), 1), state, PARAMS)
    # The method behind it must see the NaN to exclude and count the task.
    assert np.isnan(passed["a"][1]).any()
    own = [jax.tree.map(lambda x: x[1], s) for s in (after, state)]
    chex.assert_trees_all_equal(*own)
    assert not np.allclose(after.trace["a"][0], state.trace["a"][0])


def test_an_absent_task_does_the_same():
    tx = mtl.per_task(optax.trace(0.9), T)
    _, state = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    _, after = tx.update(gradients(1), state, PARAMS, active=jnp.array([False, True]))
    chex.assert_trees_all_equal(after.trace["a"][0], state.trace["a"][0])


# --- drop_extra_args ---------------------------------------------------------------------------------


def test_only_the_named_arguments_are_dropped():
    seen = {}

    def update_fn(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update_fn)
    tx = optax.chain(mtl.sum_tasks(T), mtl.drop_extra_args(inner, "losses", "active"))
    active = jnp.ones((T,), bool)
    tx.update(gradients(0), tx.init(PARAMS), PARAMS, losses=LOSSES, active=active, value=1.0)
    assert seen == {"value": 1.0}


def test_nothing_to_drop_is_a_mistake():
    with pytest.raises(ValueError) as raised:
        mtl.drop_extra_args(optax.scale(1.0))
    assert str(raised.value) == (
        "drop_extra_args: name the extra arguments to drop, such as 'losses'."
    )


# --- absent tasks ------------------------------------------------------------------------------------


def test_what_an_absent_task_holds_skips_no_step():
    active = jnp.array([True, False])
    grads = {"a": gradients(0)["a"].at[1].set(jnp.nan), "b": gradients(0)["b"].at[1].set(jnp.inf)}
    update, state = GUARDED.update(
        grads, GUARDED.init(PARAMS), PARAMS, losses=LOSSES.at[1].set(jnp.nan), active=active
    )
    assert int(state.skipped_steps) == 0
    chex.assert_tree_all_finite(update)
    _, state = GUARDED.update(grads, GUARDED.init(PARAMS), PARAMS, losses=LOSSES)
    assert int(state.skipped_steps) == 1


@pytest.mark.parametrize("name", ["accumulate", "per_task"])
def test_misshapen_losses_and_active_are_refused(name):
    if name == "accumulate":
        tx = mtl.accumulate(mtl.sum_tasks(T), T, 2)
    else:
        tx = mtl.per_task(optax.trace(0.9), T)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=rf"{name}: active must have shape \(2,\)"):
        tx.update(gradients(0), state, PARAMS, active=jnp.asarray(False))
    if name == "accumulate":
        with pytest.raises(ValueError, match=r"accumulate: losses must have shape \(2,\)"):
            tx.update(gradients(0), state, PARAMS, losses=jnp.asarray(1.0))


# --- dictionaries by task name -----------------------------------------------------------------------

NAMES = ("click", "buy")  # in the order of the axis: buy, click


@pytest.mark.parametrize("name", ["accumulate", "per_task", "skip_nonfinite"])
def test_dictionaries_stand_for_arrays(name):
    def make(tasks):
        method = mtl.scale_invariant(tasks)
        if name == "accumulate":
            return mtl.accumulate(method, tasks, 1)
        if name == "per_task":
            return optax.chain(mtl.per_task(optax.trace(0.9), tasks), method)
        return mtl.skip_nonfinite(method)

    grads = spoil(gradients(0), 1)
    given = {"buy": LOSSES[0], "click": LOSSES[1]}, {"buy": True, "click": False}
    updates = [
        tx.update(grads, tx.init(PARAMS), PARAMS, losses=losses, active=active)[0]
        for tx, (losses, active) in (
            (make(T), (LOSSES, jnp.array([True, False]))),
            (make(NAMES), given),
            (make(T), given),
        )
    ]
    assert np.any(updates[0]["a"])
    chex.assert_trees_all_equal(*updates)


def test_each_task_may_have_an_optimizer_of_its_own():
    inner = {"a": optax.trace(0.9), "b": optax.scale_by_adam()}
    tx, grads = mtl.per_task(inner, ("a", "b")), [gradients(k) for k in range(3)]
    state = tx.init(PARAMS)
    for g in grads:
        update, state = jax.jit(tx.update)(g, state, PARAMS)
    for number, alone in enumerate(inner.values()):
        own = alone.init(PARAMS)
        for g in grads:
            expected, own = alone.update(jax.tree.map(lambda x: x[number], g), own, PARAMS)  # noqa: B023
        assert_close(jax.tree.map(lambda x: x[number], update), expected)  # noqa: B023


def test_a_broken_task_leaves_its_own_optimizer_as_it_was():
    tx = mtl.per_task({"a": optax.trace(0.9), "b": optax.trace(0.5)}, ("a", "b"))
    _, state = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    update, after = tx.update(spoil(gradients(1), 1), state, PARAMS)
    chex.assert_trees_all_equal(after["b"], state["b"])
    assert np.isnan(update["a"][1]).any() and np.isfinite(update["a"][0]).all()
    assert not np.array_equal(after["a"].trace["a"], state["a"].trace["a"])


def test_optimizers_must_have_the_names_of_the_tasks():
    with pytest.raises(ValueError, match="inner must have one entry per task"):
        mtl.per_task({"a": optax.identity(), "c": optax.identity()}, ("a", "b"))


# --- accumulate with counts --------------------------------------------------------------------------


def test_counts_weigh_the_micro_batches():
    """The mean over 2 + 6 labels of the first task and 4 + 0 of the second."""
    tx = mtl.accumulate(mtl.sum_tasks(T, reduce=False), T, every_k=2)
    state, counts = tx.init(PARAMS), jnp.array([[2, 4], [6, 0]])
    for k in range(2):
        update, state = tx.update(
            gradients(k), state, PARAMS, losses=LOSSES * (1 + k), counts=counts[k]
        )
    first, second = gradients(0), gradients(1)
    expected = jax.tree.map(
        lambda x, y: jnp.stack([0.25 * x[0] + 0.75 * y[0], x[1]]), first, second
    )
    assert_close(update, expected)


def test_counts_weigh_the_losses_and_mark_a_task_as_absent():
    tx = mtl.accumulate(mtl.scale_invariant(T), T, every_k=2)
    state = tx.init(PARAMS)
    for k, count in enumerate(({"a": 1, "b": 0}, {"a": 3, "b": 0})):
        update, state = tx.update(
            gradients(k), state, PARAMS, losses=LOSSES * (1 + k), counts=count
        )
    grads = jax.tree.map(lambda x, y: 0.25 * x + 0.75 * y, gradients(0), gradients(1))
    assert_close(update, at_once(grads, LOSSES * 1.75, (True, False)), 1e-5)
