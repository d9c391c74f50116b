"""One gradient a step: `remember` and `one_task_value_and_grad`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sampling import sampled

import mtl_optax as mtl

T = 3
X = jax.random.normal(jax.random.key(0), (20, 4))
PARAMS = {"w": 0.3 * jax.random.normal(jax.random.key(1), (4, 5)), "v": jnp.ones(5)}


def loss_fn(params, x):
    h = jnp.tanh(x @ params["w"]) @ params["v"]
    return {"a": jnp.mean((h - 1) ** 2), "b": jnp.mean(h**4), "c": jnp.mean(jnp.sin(h)) + 2.0}


def assert_close(left, right, rtol=1e-5):
    """Equal relative to the largest entry: a sum of cancelling gradients has no smaller scale."""
    size = max(np.abs(x).max() for x in jax.tree.leaves(right))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, rtol * size), left, right)


def test_the_task_whose_turn_it_is():
    losses, grads = mtl.per_task_value_and_grad(loss_fn)(PARAMS, X)
    fn = jax.jit(mtl.one_task_value_and_grad(loss_fn, ("a", "b", "c")))
    for step in range(2 * T):
        found, (updates, active) = fn(step, PARAMS, X)
        one = jnp.arange(T) == step % T
        assert active.tolist() == one.tolist()
        assert_close(found, jnp.where(one, jnp.stack(list(losses.values())), 0))
        keep = lambda g, one=one: jnp.where(one.reshape((T,) + (1,) * (g.ndim - 1)), g, 0)  # noqa: E731
        assert_close(updates, jax.tree.map(keep, grads))
    assert fn._cache_size() == 1


def test_random_order_draws_every_task():
    fn = jax.jit(mtl.one_task_value_and_grad(loss_fn, T, order="random", seed=1))
    tasks = [int(jnp.argmax(fn(step, PARAMS, X)[1][1])) for step in range(30)]
    assert set(tasks) == {0, 1, 2} and tasks[:6] != [0, 1, 2, 0, 1, 2]


def test_one_branch_runs():
    """The other tasks are not even evaluated: each stands in a branch of its own."""

    def counted(params, x):
        jax.debug.callback(lambda: None)
        return loss_fn(params, x)

    jaxpr = jax.make_jaxpr(mtl.one_task_value_and_grad(counted, T))(0, PARAMS, X)
    conds = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "cond"]
    assert len(conds) == 1 and len(conds[0].params["branches"]) == T
    dots = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert not dots


@pytest.mark.parametrize(
    ("method", "decay"),
    sampled(
        itertools.product([mtl.conflict_free, mtl.mgda, mtl.metabalance, mtl.emtl], [0.0, 0.9]),
        [(mtl.metabalance, 0.9)],
    ),
)
def test_the_method_sees_averages_of_all_tasks(method, decay):
    """Written out: an average per task, corrected for its start, then the method on all of them."""
    inner = method(T)
    tx = mtl.remember(inner, decay=decay)
    fn, tx_update = jax.jit(mtl.one_task_value_and_grad(loss_fn, T)), jax.jit(tx.update)
    state, inner_state = tx.init(PARAMS), inner.init(PARAMS)
    means = jax.tree.map(lambda p: jnp.zeros((T, *p.shape)), PARAMS)
    counts, last = np.zeros(T), np.zeros(T)
    for step in range(7):
        x = X + 0.1 * step
        losses, (updates, active) = fn(step, PARAMS, x)
        update, state = tx_update(updates, state, PARAMS, losses=losses, active=active)
        t = step % T
        counts[t] += 1
        last[t] = losses[t]
        means = jax.tree.map(
            lambda m, g, t=t: m.at[t].set(decay * m[t] + (1 - decay) * g[t]), means, updates
        )
        share = jnp.asarray(np.where(counts > 0, 1 - decay**counts, 1))
        corrected = jax.tree.map(
            lambda m, s=share: m / s.reshape((T,) + (1,) * (m.ndim - 1)), means
        )
        expected, inner_state = inner.update(
            corrected, inner_state, PARAMS, losses=jnp.asarray(last), active=jnp.asarray(counts > 0)
        )
        assert_close(update, expected)


@pytest.mark.slow
def test_with_all_tasks_present_and_no_decay_nothing_changes():
    losses, grads = mtl.per_task_value_and_grad(loss_fn)(PARAMS, X)
    inner = mtl.upgrad(("a", "b", "c"))
    tx = mtl.remember(inner)
    update, _ = tx.update(grads, tx.init(PARAMS), PARAMS, losses=losses)
    assert_close(update, inner.update(grads, inner.init(PARAMS), PARAMS)[0], 0)


def test_a_non_finite_task_keeps_its_old_gradient():
    _, grads = mtl.per_task_value_and_grad(loss_fn)(PARAMS, X)
    tx = mtl.remember(mtl.sum_tasks(T), decay=0.5)
    first, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    spoilt = jax.tree.map(lambda g: g.at[1].set(jnp.nan), grads)
    second, state = tx.update(spoilt, state, PARAMS)
    assert_close(second, first)


@pytest.mark.slow
def test_a_subset_of_tasks_a_step_with_stack_tasks_in_a_chain():
    names = ("a", "b", "c")
    tx = optax.chain(mtl.remember(mtl.conflict_free(names), decay=0.9), optax.adam(1e-2))
    mtl.check(tx, PARAMS, names)
    state = tx.init(PARAMS)
    _, grads = mtl.per_task_value_and_grad(loss_fn)(PARAMS, X)
    of = {name: jax.tree.map(lambda g, t=t: g[t], grads) for t, name in enumerate(names)}
    for present in (("a",), ("c", "b"), ("b",)):
        updates, active = mtl.stack_tasks({name: of[name] for name in present}, names)
        update, state = tx.update(updates, state, PARAMS, active=active)
    assert jax.tree.map(jnp.shape, update) == jax.tree.map(jnp.shape, PARAMS)
    assert mtl.diagnostics(state)["weights"].shape == (T,)


@pytest.mark.slow
def test_it_trains_like_the_method_on_all_gradients():
    """Cyclic single gradients, three times the steps: the losses end about where the full method's do."""

    def train(tx, grads_of, steps):
        def step(carry, k):
            params, state = carry
            losses, updates, active = grads_of(k, params)
            update, state = tx.update(updates, state, params, losses=losses, active=active)
            return (optax.apply_updates(params, update), state), None

        (params, _), _ = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), jnp.arange(steps))
        return sum(loss_fn(params, X).values())

    def full(k, params):
        losses, updates = mtl.per_task_value_and_grad(loss_fn)(params, X)
        return losses, updates, jnp.ones((T,), bool)

    def one(k, params):
        losses, (updates, active) = mtl.one_task_value_and_grad(loss_fn, T)(k, params, X)
        return losses, updates, active

    start = sum(loss_fn(PARAMS, X).values())
    reference = train(optax.chain(mtl.upgrad(T), optax.adam(1e-2)), full, 200)
    single = train(optax.chain(mtl.remember(mtl.upgrad(T), decay=0.5), optax.adam(1e-2)), one, 200)
    assert reference < start - 0.3
    assert abs(single - reference) < 0.1 * (start - reference)


def test_messages():
    with pytest.raises(ValueError, match="give tasks for a transformation"):
        mtl.remember(optax.chain(mtl.mgda(2)))
    with pytest.raises(ValueError, match="tasks=3 is not that of mgda, 2"):
        mtl.remember(mtl.mgda(2), tasks=3)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        mtl.remember(mtl.mgda(2), 1.0)
    with pytest.raises(ValueError, match=r"one entry per task, \['a', 'b', 'x'\]"):
        mtl.one_task_value_and_grad(loss_fn, ("a", "b", "x"))(0, PARAMS, X)
    with pytest.raises(ValueError, match="must return 2 losses; found 3"):
        mtl.one_task_value_and_grad(loss_fn, 2)(0, PARAMS, X)
    with pytest.raises(ValueError, match='order must be "cyclic" or "random"'):
        mtl.one_task_value_and_grad(loss_fn, 3, order="first")
