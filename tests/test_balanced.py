"""Per-task gradients of a part of the parameters, or on some of the steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl

T = 3
PARAMS = {"dense": {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}, "table": jnp.ones((6, 4))}
DENSE = {"dense": True, "table": False}


def loss_fn(params, ids, scale):
    hidden = jnp.tanh(params["table"][ids] @ params["dense"]["w"] + params["dense"]["b"][None])
    return jnp.stack([(hidden**2).mean(), (hidden[:, 0] - 1).mean(), hidden[:, 1].sum()]) * scale


IDS, SCALE = jnp.array([0, 1, 1, 5]), jnp.array([1.0, 2.0, 0.5])


def run(fn, state, scale=SCALE, active=None):
    losses, (update, state) = fn(PARAMS, state, IDS, scale, active=active)
    return losses, update, state


def test_evidence_takes_the_weights_of_the_chosen_leaves_for_all():
    method = mtl.mgda(T)
    fn = mtl.balanced_value_and_grad(loss_fn, method, evidence=DENSE)
    losses, update, state = run(fn, method.init(PARAMS))
    expected_losses, grads = mtl.per_task_value_and_grad(loss_fn)(PARAMS, IDS, SCALE)
    _, alone = method.update(grads["dense"], method.init(PARAMS["dense"]))
    weights = np.asarray(alone.weights[0])
    np.testing.assert_allclose(losses, expected_losses, 1e-6)
    np.testing.assert_allclose(state.weights[0], weights, 1e-5, 1e-6)
    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(u, np.tensordot(weights, g, 1), 1e-4, 1e-6),
        update,
        grads,
    )


def test_chosen_leaves_may_be_named_by_a_callable():
    method = mtl.mgda(T)
    by_path = lambda path, leaf: "dense" in jax.tree_util.keystr(path)  # noqa: E731
    one = run(mtl.balanced_value_and_grad(loss_fn, method, evidence=by_path), method.init(PARAMS))
    two = run(mtl.balanced_value_and_grad(loss_fn, method, evidence=DENSE), method.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_steps_between_use_the_cached_weights_and_one_backward_pass():
    method = mtl.mgda(T, update_every=2)
    fn = jax.jit(mtl.balanced_value_and_grad(loss_fn, method))
    _, _, first = run(fn, method.init(PARAMS))
    later = jnp.array([3.0, 0.1, 1.0])
    _, update, second = run(fn, first, later)
    _, _, third = run(fn, second, later)
    np.testing.assert_array_equal(second.weights, first.weights)
    assert not np.allclose(third.weights, second.weights)
    assert int(third.balance_count) == 3
    _, grads = mtl.per_task_value_and_grad(loss_fn)(PARAMS, IDS, later)
    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(
            u, np.tensordot(np.asarray(first.weights[0]), g, 1), 1e-4, 1e-6
        ),
        update,
        grads,
    )


def test_a_non_finite_task_cannot_poison_a_single_pass():
    method = mtl.mgda(T, update_every=2)
    fn = mtl.balanced_value_and_grad(loss_fn, method)
    _, _, state = run(fn, method.init(PARAMS))
    _, update, state = run(fn, state, jnp.array([1.0, jnp.nan, 1.0]))
    for leaf in jax.tree.leaves((update, state)):
        assert np.isfinite(np.asarray(leaf)).all()
    assert state.skipped.tolist() == [0, 1, 0]


NAMES = ("view", "buy", "click")


@pytest.mark.parametrize("every", [1, 2])
def test_losses_by_name_come_back_as_given(every):
    """Weights `[T]` and `active=` follow the sorted names, on steps with and without new weights."""

    def named(params, ids, scale):
        losses = dict(zip(sorted(NAMES), loss_fn(params, ids, scale), strict=True))
        return {name: losses[name] for name in NAMES}, ids

    active = {"buy": True, "click": False, "view": True}
    tasks = mtl.multibalance(NAMES, update_every=every)
    fn = mtl.balanced_value_and_grad(named, tasks, has_aux=True)
    plain = mtl.balanced_value_and_grad(loss_fn, mtl.multibalance(T, update_every=every))

    @jax.jit
    def both(state):
        got = fn(PARAMS, state, IDS, SCALE, active=active)
        return got, plain(PARAMS, state, IDS, SCALE, active=jnp.array([True, False, True]))

    state = tasks.init(PARAMS)
    for _ in range(2):
        ((losses, aux), result), (expected, expected_result) = both(state)
        assert losses.keys() == set(NAMES) and aux.shape == IDS.shape
        assert [losses[name] for name in sorted(NAMES)] == expected.tolist()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), result, expected_result
        )
        state = result[1]
        assert state.weights[0, 1] == 0
    assert int(state.balance_count) == 2


def test_losses_of_other_names_are_refused():
    fn = mtl.balanced_value_and_grad(lambda w: {"buy": w, "view": w}, mtl.mgda(("buy", "click")))
    w = jnp.ones(())
    with pytest.raises(ValueError, match=r"\['buy', 'click'\]; found \['buy', 'view'\]"):
        fn(w, mtl.mgda(2).init(w))


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match='blocks="all"'):
        mtl.balanced_value_and_grad(loss_fn, mtl.metabalance(T))
    with pytest.raises(TypeError, match="weighting method"):
        mtl.balanced_value_and_grad(loss_fn, mtl.graddrop(T))
    fn = mtl.balanced_value_and_grad(loss_fn, mtl.mgda(T), evidence=lambda path, leaf: False)
    with pytest.raises(ValueError, match="none of the 3 leaves"):
        run(fn, mtl.mgda(T).init(PARAMS))


@pytest.mark.parametrize("every", [1, 2])
def test_max_norm_holds_here_too(every):
    method = mtl.nash_mtl(T, max_norm=0.5, update_every=every)
    fn = jax.jit(lambda state: run(mtl.balanced_value_and_grad(loss_fn, method), state)[1:])
    state = method.init(PARAMS)
    for _ in range(2):
        update, state = fn(state)
        squares = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(update))
        assert squares**0.5 == pytest.approx(0.5)


def test_a_task_that_was_absent_makes_new_weights_due():
    method = mtl.mgda(T, update_every=10)
    fn = jax.jit(
        lambda state, active: run(
            mtl.balanced_value_and_grad(loss_fn, method), state, active=active
        )[2]
    )
    state = fn(method.init(PARAMS), jnp.array([True, True, False]))
    assert state.weighed.tolist() == [True, True, False]
    state = fn(state, jnp.ones((T,), bool))
    assert state.weighed.all() and int(state.balance_count) == 2


def test_a_task_that_stays_non_finite_costs_no_backward_passes():
    """Its new weights would be due in every step, with T backward passes, and it would never get them."""

    def by_name(params, ids, scale):
        losses = loss_fn(params, ids, 1.0)
        return {name: losses[t] * scale[t] for t, name in enumerate("abc")}

    method = mtl.inverse_norm(("a", "b", "c"), update_every=10)
    fn = jax.jit(mtl.balanced_value_and_grad(by_name, method))
    _, _, first = run(fn, method.init(PARAMS), jnp.array([1.0, jnp.nan, 1.0]))
    assert first.weighed.tolist() == [True, False, True]
    _, update, second = run(fn, first, jnp.array([0.1, jnp.nan, 3.0]))
    # With the weights of the first step: none were computed for these gradients.
    np.testing.assert_array_equal(second.weights, first.weights)
    assert second.skipped.tolist() == [0, 2, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(update))
    _, _, third = run(fn, second, jnp.array([0.1, 1.0, 3.0]))
    assert third.weighed.all() and not np.allclose(third.weights, second.weights)
