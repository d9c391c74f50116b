"""Weights kept for k steps (`update_every`), and gradients that are zero in most of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling import sampled

import mtl_optax as mtl
from mtl_optax.core import pipeline


def run(tx, grads, params, losses=None):
    """All updates and states of a stream of gradients, leaves `[STEPS, T, ...]`."""

    @jax.jit
    def scan(grads):
        def body(state, g):
            update, state = tx.update(g, state, params, losses=losses)
            return state, (update, state)

        return jax.lax.scan(body, tx.init(params), grads)[1]

    return scan(grads)


def rare(steps, every, first_due=0):
    """Two orthogonal gradients of norm 1; the auxiliary's is there in every `every`-th step only."""
    there = np.arange(steps) % every == first_due
    grads = np.zeros((steps, 2, 2), np.float32)
    grads[:, 0, 0] = 1
    grads[there, 1, 1] = 1
    return jnp.asarray(grads)


AVERAGED = {
    "metabalance": mtl.metabalance,
    "multibalance": mtl.multibalance,
    "multibalance debias": functools.partial(mtl.multibalance, ema_init="debias"),
}


@pytest.mark.parametrize("blocks", sampled(["leaf", "all"], ["leaf"]))
@pytest.mark.parametrize("decay", sampled([0.5, 0.9, 0.99], [0.9]))
@pytest.mark.parametrize("k", sampled([2, 10], [10]))
@pytest.mark.parametrize("name", AVERAGED)
def test_a_rare_gradient_is_enlarged_by_the_decay_at_most(name, k, decay, blocks):
    tx = AVERAGED[name](2, ema_decay=decay, update_every=k, blocks=blocks)
    grads = rare(1500, 437)
    updates, states = run(tx, {"w": grads}, {"w": jnp.zeros(2)})
    assert float(updates["w"][:, 1].max()) <= 1 / (1 - decay) * 1.0001
    assert np.isfinite(states.weights).all()


@pytest.mark.parametrize("target", [0, 1])
def test_the_bound_is_that_of_the_least_average(target):
    decay, relax = 0.9, 0.6
    tx = mtl.metabalance(
        2, target=target, ema_decay=decay, relax_factor=relax, update_every=10, blocks="all"
    )
    grads = rare(438, 437)
    if target == 1:
        grads = grads[:, ::-1]
    updates, states = run(tx, grads, jnp.zeros(2))
    before = jax.tree.map(lambda x: x[-2], states)
    average = float(before.rule_state.norm_ema[0, target])
    seen = 1 - decay**45  # the 44 steps of computed weights and this one
    limit = relax * (decay * average + 0.1) / seen / (1 - decay) + 1 - relax
    assert float(before.kept_weights[0, 1 - target]) > 100
    np.testing.assert_allclose(updates[-1, 1], limit, rtol=1e-4)
    np.testing.assert_allclose(states.weights[-1, 0, 1 - target], limit, rtol=1e-4)


def test_enlarge_never_shrinks_and_an_unknown_target_bounds_nothing():
    grads = np.tile(np.eye(2, dtype=np.float32), (2, 1, 1))
    grads[1, 1] *= 1e6
    for options in ({"strategy": "enlarge"}, {"relax_factor": 0.0}):
        tx = mtl.metabalance(2, update_every=2, **options)
        assert float(run(tx, jnp.asarray(grads), jnp.zeros(2))[0][1, 1]) == 1e6
    grads[:, 0] = 0
    tx = mtl.metabalance(2, update_every=2)
    assert float(run(tx, jnp.asarray(grads), jnp.zeros(2))[0][1, 1]) == 1e6


def test_the_bound_does_not_last():
    """A large gradient meets a smaller weight, and the next ordinary one the kept weight again."""
    norms = np.array([1, 1, 1e4, 1, 1], np.float32)
    grads = np.zeros((5, 2, 2), np.float32)
    grads[:, 0, 0], grads[:, 1, 1] = 1, norms
    updates, states = run(mtl.metabalance(2, update_every=10), jnp.asarray(grads), jnp.zeros(2))
    np.testing.assert_allclose(updates[[0, 1, 3, 4], 1], 1.0, rtol=1e-6)
    np.testing.assert_allclose(updates[2, 1], 0.7 * 1 + 0.3e4, rtol=0.01)
    np.testing.assert_array_equal(states.weights[3], states.weights[1])
    assert float(states.weights[2, 0, 1]) < 0.31
    assert np.ptp(states.kept_weights, axis=0).max() == 0


def unbounded(tx):
    options = tx.options._asdict()
    return pipeline.from_rule(tx.name, tx.tasks, tx.rule._replace(bound=None), **options)


@pytest.mark.parametrize(
    ("name", "blocks"),
    sampled(
        itertools.product([*AVERAGED, "db_mtl"], ["leaf", "all"]),
        [("metabalance", "leaf"), ("multibalance debias", "all"), ("db_mtl", "all")],
    ),
)
def test_ordinary_streams_are_unchanged(name, blocks):
    rng = np.random.default_rng(0)
    make = {**AVERAGED, "db_mtl": mtl.db_mtl}[name]
    params = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    # Tasks of unlike size, with noise of half their gradient, whose norms vary threefold from step to step.
    size = (10.0 ** np.arange(-2, 2))[None] * 3.0 ** rng.uniform(-0.5, 0.5, size=(60, 4))

    def stream(p):
        mean, noise = (
            np.sign(rng.normal(size=(4, *p.shape))),
            rng.uniform(-0.5, 0.5, (60, 4, *p.shape)),
        )
        return jnp.asarray((mean + noise) * size.reshape(60, 4, *[1] * p.ndim), jnp.float32)

    grads = {key: stream(p) for key, p in params.items()}
    tx = make(4, update_every=5, blocks=blocks)
    updates, states = run(tx, grads, params, jnp.ones(4))
    wanted, others = run(unbounded(tx), grads, params, jnp.ones(4))
    jax.tree.map(np.testing.assert_array_equal, updates, wanted)
    np.testing.assert_array_equal(states.weights, others.weights)


def test_db_mtl_limits_by_the_present_averages():
    grads = rare(438, 437)
    tx = mtl.db_mtl(2, log_losses=False, update_every=10)
    updates, states = run(tx, grads, jnp.zeros(2))
    assert float(states.kept_weights[-1, 0, 1]) > 1e6
    # Ten times the common norm, 1.
    np.testing.assert_allclose(updates[-1, 1], 10, rtol=1e-3)


@pytest.mark.parametrize("name", ["metabalance", "multibalance", "mgda", "gls"])
def test_a_task_that_is_not_finite_on_a_kept_step_is_left_out_and_counted(name):
    tx = mtl.METHODS[name].factory(3, update_every=3)
    params = {"w": jnp.zeros(3), "v": jnp.zeros(())}
    good = {"w": jnp.eye(3) + 0.1, "v": jnp.ones(3)}
    for bad, leaf in ((jnp.nan, "v"), (jnp.inf, "w"), (3e19, "w")):
        state = tx.init(params)
        _, state = tx.update(good, state, params, losses=jnp.ones(3))
        broken = {**good, leaf: good[leaf].at[1].set(bad)}
        update, after = tx.update(broken, state, params, losses=jnp.ones(3))
        present = jnp.array([True, False, True])
        without, _ = tx.update(good, state, params, losses=jnp.ones(3), active=present)
        jax.tree.map(np.testing.assert_array_equal, update, without)
        assert after.skipped.tolist() == [0, 1, 0]
        assert after.balance_count == 2


def test_frozen_weights_are_those_of_the_last_step_before():
    grads = jax.random.normal(jax.random.key(0), (9, 3, 5))
    params, losses = jnp.zeros(5), jnp.array([1.0, 2.0, 3.0])
    make = functools.partial(mtl.grad_similarity, 3, mode="weighted", update_every=2)
    _, moving = run(make(), grads, params, losses)
    updates, frozen = run(make(freeze_after=4), grads, params, losses)
    np.testing.assert_array_equal(frozen.weights[:4], moving.weights[:4])
    np.testing.assert_array_equal(frozen.weights[4:], jnp.stack([moving.weights[2]] * 5))
    assert (moving.weights[4:] != frozen.weights[4:]).any()
    np.testing.assert_allclose(updates[8], frozen.weights[8, 0] @ grads[8], 1e-5, 1e-6)


def test_frozen_weights_on_losses_and_on_a_fork():
    method = mtl.scale_invariant(2, freeze_after=2)
    state = method.init(jnp.zeros(()))
    for step in range(4):
        loss = lambda w, state, step=step: mtl.weigh_losses([w, 2 * w], state, method)  # noqa: E731
        gradient, state = jax.grad(loss, has_aux=True)(1.0 + step, state)
    assert float(gradient) == 1.0  # the weights of the second step: 1 / 2 and 1 / 4

    method = mtl.grad_similarity(2, freeze_after=1)
    fn = mtl.fork_value_and_grad(
        lambda h, fork: [(a * s).sum() for a, s in zip(fork(h), (1.0, 5.0), strict=True)], method
    )
    h, state = jnp.ones(3), method.init(jnp.ones(3))
    weights = []
    for _ in range(3):
        _, (_, state) = fn(h, state)
        weights.append(state.weights)
    np.testing.assert_array_equal(weights[0], weights[2])


def test_a_task_that_was_absent_when_the_weights_froze_gets_one_when_it_returns():
    method = mtl.inverse_norm(2, ema_decay=0.0, freeze_after=1)
    grads, state = jnp.eye(2), method.init(jnp.zeros(2))
    _, state = method.update(grads, state, active=jnp.array([True, False]))
    update, _ = method.update(grads, state)
    assert (update > 0).all()
