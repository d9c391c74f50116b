"""Hostile input for every method: finite in, finite out, and nobody suffers from a broken task.

`hostile_inputs.py` says what is drawn. The normal run tries a few batches per method, thousands of cases in
all; `python -m pytest -m fuzz` goes on for hundreds of thousands.
"""

import functools

import chex
import hostile_inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_properties import SAMPLE, every_method, make
from sampling import sampled

import mtl_optax as mtl

NAMES = every_method(group="hostile ")
# Of every family, with and without averages, and the hardest solvers.
QUICK = ("metabalance", "graddrop", "imtl_l", "scale_by_mtadam")
SEEDS = range(4)


@pytest.mark.parametrize("name", every_method(quick=QUICK, group="hostile "))
def test_hostile_input(name):
    for seed in SEEDS:
        assert hostile_inputs.failures(name, seed) == {}, seed


@pytest.mark.parametrize(
    "name",
    sampled(
        ["metabalance", "multibalance", "db_mtl", "inverse_norm", "conflict_free", "mgda", "gls"],
        ["metabalance", "db_mtl"],
    ),
)
def test_hostile_input_in_blocks_with_kept_weights(name):
    options = (("blocks", "leaf"), ("update_every", 3))
    for seed in SEEDS:
        failures = hostile_inputs.failures(name, seed, options=options)
        # A task that breaks where it is not covered makes new weights due, and an absent one does not.
        assert {what: c for what, c in failures.items() if "differs" not in what} == {}, seed


# Norms in float32: what counts as zero, what is used, what is left out.
ZERO, SMALLEST, LARGEST, TOO_LARGE = 1.05e-19, 1.12e-19, 1.8e19, 1.9e19


@pytest.mark.parametrize(
    "name",
    sampled(
        ["mgda", "inverse_norm", "sum_tasks", "graddrop", "moco"], ["inverse_norm", "graddrop"]
    ),
)
@pytest.mark.parametrize("wide", [False, True])
def test_a_norm_whose_square_overflows_is_not_finite(name, wide):
    with jax.enable_x64(wide):
        large, larger = (1.3e154, 1.4e154) if wide else (LARGEST, TOO_LARGE)
        tx, params = make(name, 2), jnp.zeros(2)
        for size, skipped in ((large, [0, 0]), (larger, [0, 1])):
            grads = jnp.array([[1.0, 0.0], [0.0, 1.0]]).at[1].multiply(size)
            update, state = tx.update(grads, tx.init(params), params)
            assert state.skipped.tolist() == skipped
            chex.assert_tree_all_finite((update, state))


@pytest.mark.parametrize("wide", [False, True])
def test_a_norm_whose_square_is_not_normal_is_zero(wide):
    with jax.enable_x64(wide):
        zero, small = (1.4e-154, 1.6e-154) if wide else (ZERO, SMALLEST)
        for name in ("pcgrad", "inverse_norm"):
            tx, params = make(name, 2), jnp.zeros(2)
            for size, counts in ((zero, False), (small, True)):
                grads = jnp.array([[1.0, 0.0], [0.0, size]])
                update, state = tx.update(grads, tx.init(params), params)
                assert bool(state.norms[0, 1] > 0) == bool(update[1] != 0) == counts
        # Without norms a small gradient is used as it is.
        tx = mtl.sum_tasks(2)
        update, _ = tx.update(jnp.eye(2) * zero, tx.init(params))
        assert (update == jnp.asarray(zero)).all()


@pytest.mark.parametrize(
    "name", sampled(["mgda", "inverse_norm", "sum_tasks", "graddrop"], ["sum_tasks", "graddrop"])
)
def test_the_sums_over_devices_decide(name):
    tx = make(name, 2, axis_name="i")
    state = tx.init(jnp.zeros(1))
    # Two devices, each with a part of the gradients.
    for size, skipped in ((LARGEST / 2, 0), (TOO_LARGE / 1.4, 1)):
        grads = jnp.stack([jnp.array([[size], [1.0]])] * 2)
        update, after = jax.vmap(lambda g: tx.update(g, state), axis_name="i")(grads)
        assert after.skipped.tolist() == [[skipped, 0]] * 2
        chex.assert_tree_all_finite(update)


@pytest.mark.fuzz
@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", NAMES)
def test_hostile_input_for_long(name, tasks):
    for seed in np.random.default_rng().integers(2**32, size=100):
        assert hostile_inputs.failures(name, seed, tasks) == {}, seed


def heads(copies, gradients, losses):
    """Losses of the given values; the cotangent of copy t is gradient t."""
    linear = jnp.stack([jnp.sum(c * g) for c, g in zip(copies, gradients, strict=True)])
    return linear - jax.lax.stop_gradient(linear) + losses


def through_operator(method, h, carrier, gradients, losses, active):
    def loss_fn(h, carrier):
        copies, token = mtl.fork(method, carrier, h)
        return mtl.join(heads(copies, gradients, losses), token, active=active)

    return jax.grad(loss_fn, argnums=(0, 1))(h, carrier)


def through_value_and_grad(method, h, state, gradients, losses, active):
    def loss_fn(h, fork):
        return heads(fork(h), gradients, losses)

    return mtl.fork_value_and_grad(loss_fn, method)(h, state, active=active)[1]


@functools.cache
def forked(name, operator):
    """`Batch -> (what the bottom receives, last state)` of a method in a fork, compiled once."""
    method = make(name, 4)
    h = jnp.zeros((hostile_inputs.N,))
    first = mtl.fork_init(method, h) if operator else method.init(h)
    through = through_operator if operator else through_value_and_grad

    @jax.jit
    @jax.vmap
    def run(batch):
        state, updates = jax.lax.scan(
            lambda state, step: through(method, h, state, *step)[::-1], first, tuple(batch)
        )
        return updates, mtl.fork_state(method, state, h) if operator else state

    return run


@pytest.mark.parametrize(
    "operator", sampled([True, False], [False]), ids=["operator", "value_and_grad"]
)
@pytest.mark.parametrize(
    "name", sampled(["multibalance", "metabalance", "scale_invariant", "moco"], ["multibalance"])
)
def test_hostile_input_through_a_fork(name, operator):
    for seed in SEEDS:
        first, second, broken = hostile_inputs.draw(seed)
        outputs = [jax.device_get(forked(name, operator)(batch)) for batch in (first, second)]
        chex.assert_tree_all_finite(outputs)
        (updates, state), (others, other_state) = outputs
        np.testing.assert_array_equal(state.skipped, broken)
        same = [hostile_inputs.without_counts(s) for s in (state, other_state)]
        chex.assert_trees_all_equal((updates, same[0]), (others, same[1]))


def test_the_search_can_fail():
    """What is drawn holds every kind of trouble, and a careless method falls over it."""
    batch, other, broken = hostile_inputs.draw(0)
    spoilt = ~np.isfinite(batch.gradients).all(axis=-1)
    assert spoilt.any() and (spoilt <= batch.active).all() and broken.sum() > 0
    assert (~batch.active).any() and (batch.losses == 1e30).any()
    assert not np.isfinite(other.gradients[~other.active]).all()
    sizes = np.abs(batch.gradients[np.isfinite(batch.gradients)])
    assert sizes.max() > 1e15 and sizes[sizes > 0].min() < 1e-15

    def careless(gradients):
        cosine = gradients @ gradients.T
        return jnp.sum(jnp.linalg.inv(cosine) @ gradients, axis=0)

    assert not np.isfinite(jax.vmap(careless)(batch.gradients[:, 0])).all()


@pytest.mark.parametrize("name", every_method(quick=SAMPLE, group="hostile "))
def test_an_empty_tree_is_a_legal_input(name):
    tx = make(name, 3)
    for params in ({}, {"none": None}, [[], ()]):

        def run(params=params):
            return tx.update(params, tx.init(params), params, losses=jnp.ones(3))

        update, state = jax.eval_shape(run)
        assert jax.tree.structure(update) == jax.tree.structure(params)
        assert jax.tree.leaves(state)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_tasks(name):
    tasks = 64
    tx = make(name, tasks)
    params = {"w": jnp.zeros(5)}
    draw = np.random.default_rng(0)
    grads = {"w": jnp.asarray(draw.normal(size=(tasks, 5)), jnp.float32)}
    losses = jnp.asarray(draw.uniform(0.1, 2, tasks), jnp.float32)
    update, state = tx.update(grads, tx.init(params), params, losses=losses)
    assert update["w"].shape == (5,)
    chex.assert_tree_all_finite((update, state))
