"""Per-task gradients of a part of the parameters, or on some of the steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sampling import sampled

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


@pytest.mark.slow
def test_weights_from_takes_the_weights_of_the_chosen_leaves_for_all():
    method = mtl.mgda(T)
    fn = mtl.weighted_value_and_grad(loss_fn, method, weights_from=DENSE)
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


@pytest.mark.slow
def test_chosen_leaves_may_be_named_by_a_callable():
    method = mtl.mgda(T)
    by_path = lambda path, leaf: "dense" in jax.tree_util.keystr(path)  # noqa: E731
    one = run(
        mtl.weighted_value_and_grad(loss_fn, method, weights_from=by_path), method.init(PARAMS)
    )
    two = run(mtl.weighted_value_and_grad(loss_fn, method, weights_from=DENSE), method.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_steps_between_use_the_cached_weights_and_one_backward_pass():
    method = mtl.mgda(T, update_every=2)
    fn = jax.jit(mtl.weighted_value_and_grad(loss_fn, method))
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


# --- tasks whose derivative is not finite ------------------------------------------------------------


def one_by_one(params, ids, scale):
    """The losses as a tuple; a scale of 0 stands for an empty batch, whose mean is 0/0."""
    hidden = jnp.tanh(params["table"][ids] @ params["dense"]["w"] + params["dense"]["b"][None])
    totals = (hidden**2).sum(), (hidden[:, 0] - 1).sum(), hidden[:, 1].sum()
    return tuple(total * s / s for total, s in zip(totals, scale, strict=True))


def steps(method, scales, active=None, **options):
    """The last update and state of `weighted_value_and_grad`, one step for every row of `scales`."""
    fn = jax.jit(mtl.weighted_value_and_grad(one_by_one, method, **options))
    state = method.init(PARAMS)
    for scale in jnp.asarray(scales):
        _, (update, state) = fn(PARAMS, state, IDS, scale, active=active)
    return update, state


EMPTY = [1.0, 0.0, 1.0]
WITHOUT_ONE = jnp.array([True, False, True])


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"weights_from": DENSE}],
    ids=["all", "weights_from"],
)
@pytest.mark.parametrize("every", sampled([1, 2], [2]))
@pytest.mark.parametrize("absent", sampled([True, False], [False]))
def test_an_empty_batch_of_one_task_leaves_the_others_training(every, options, absent):
    """With new weights and with old ones; an absent task is not counted, a present one is."""
    method = mtl.inverse_norm(T, update_every=every)
    active = WITHOUT_ONE if absent else None
    update, state = steps(method, [EMPTY] * 2, active, **options)
    assert state.skipped.tolist() == [0, 0 if absent else 2, 0]
    assert int(state.balance_count) == 2
    # The same as with finite gradients of a task that is absent.
    expected, _ = steps(method, [[1.0] * T] * 2, WITHOUT_ONE, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-7), update, expected)


def test_a_task_that_breaks_on_a_step_between_is_left_out_and_counted():
    method = mtl.inverse_norm(T, update_every=3)
    update, state = steps(method, [[1.0] * T, EMPTY])
    assert state.skipped.tolist() == [0, 1, 0]
    _, grads = mtl.per_task_value_and_grad(one_by_one)(PARAMS, IDS, jnp.ones(T))
    weights = np.asarray(state.weights[0]) * np.asarray(WITHOUT_ONE)
    want = jax.tree.map(lambda g: np.tensordot(weights, g, 1), grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), update, want)


def test_a_task_that_is_broken_outside_the_chosen_leaves_is_left_out_there_and_counted():
    def losses_of(params):
        a, b = params["dense"] ** 2, params["dense"] * 3
        return a + params["table"].sum(), b + jnp.sqrt(0.0 * params["table"].sum())

    params, method = {"dense": jnp.asarray(2.0), "table": jnp.ones(3)}, mtl.sum_tasks(2)
    fn = mtl.weighted_value_and_grad(
        losses_of, method, weights_from={"dense": True, "table": False}
    )
    _, (update, state) = jax.jit(fn)(params, method.init(params))
    assert update["dense"] == 7.0 and update["table"].tolist() == [1.0] * 3
    assert state.skipped.tolist() == [0, 1]


def test_an_array_of_losses_skips_all_tasks_of_a_single_pass():
    method = mtl.mgda(T, update_every=2)
    fn = mtl.weighted_value_and_grad(loss_fn, method)
    _, _, state = run(fn, method.init(PARAMS))
    _, update, state = run(fn, state, jnp.array([1.0, jnp.nan, 1.0]))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(update))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))
    assert state.skipped.tolist() == [1, 1, 1]


# --- arguments ---------------------------------------------------------------------------------------


def test_extra_arguments_reach_the_method():
    """`traces=` of `ntk`, on the steps with new weights."""
    method = mtl.ntk(("a", "b"), update_every=2)
    fn = mtl.weighted_value_and_grad(lambda w: {"a": w * w, "b": 3 * w}, method)
    w = jnp.asarray(2.0)
    given = {"a": 1.0, "b": 3.0}
    _, (update, state) = fn(w, method.init(w), extra_args={"traces": given})
    want, alone = method.update(jnp.array([4.0, 3.0]), method.init(w), w, traces=given)
    assert update == want and state.weights.tolist() == alone.weights.tolist()
    _, (_, state) = fn(w, state)
    assert state.weights.tolist() == alone.weights.tolist()


NAMES = ("view", "buy", "click")


@pytest.mark.parametrize("every", sampled([1, 2], [2]))
def test_losses_by_name_come_back_as_given(every):
    """Weights `[T]` and `active=` follow the sorted names, on steps with and without new weights."""

    def named(params, ids, scale):
        losses = dict(zip(sorted(NAMES), loss_fn(params, ids, scale), strict=True))
        return {name: losses[name] for name in NAMES}, ids

    active = {"buy": True, "click": False, "view": True}
    tasks = mtl.multibalance(NAMES, update_every=every)
    fn = mtl.weighted_value_and_grad(named, tasks, has_aux=True)
    plain = mtl.weighted_value_and_grad(loss_fn, mtl.multibalance(T, update_every=every))

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
    fn = mtl.weighted_value_and_grad(lambda w: {"buy": w, "view": w}, mtl.mgda(("buy", "click")))
    w = jnp.ones(())
    with pytest.raises(ValueError, match=r"\['buy', 'click'\]; found \['buy', 'view'\]"):
        fn(w, mtl.mgda(2).init(w))


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match='blocks="all"'):
        mtl.weighted_value_and_grad(loss_fn, mtl.metabalance(T))
    with pytest.raises(TypeError, match="weighting method"):
        mtl.weighted_value_and_grad(loss_fn, mtl.graddrop(T))
    fn = mtl.weighted_value_and_grad(loss_fn, mtl.mgda(T), weights_from=lambda path, leaf: False)
    with pytest.raises(ValueError, match="none of the 3 leaves"):
        run(fn, mtl.mgda(T).init(PARAMS))


def test_a_task_that_was_absent_makes_new_weights_due():
    method = mtl.mgda(T, update_every=10)
    fn = jax.jit(
        lambda state, active: run(
            mtl.weighted_value_and_grad(loss_fn, method), state, active=active
        )[2]
    )
    state = fn(method.init(PARAMS), jnp.array([True, True, False]))
    assert state.weighed.tolist() == [True, True, False]
    state = fn(state, jnp.ones((T,), bool))
    assert state.weighed.all() and int(state.balance_count) == 2


def test_a_task_that_stays_non_finite_makes_no_new_weights_due():
    """They would be due in every step, and it would never get any."""

    def by_name(params, ids, scale):
        losses = loss_fn(params, ids, 1.0)
        return {name: losses[t] * scale[t] for t, name in enumerate("abc")}

    method = mtl.inverse_norm(("a", "b", "c"), update_every=10)
    fn = jax.jit(mtl.weighted_value_and_grad(by_name, method))
    _, _, first = run(fn, method.init(PARAMS), jnp.array([1.0, jnp.nan, 1.0]))
    assert first.weighed.tolist() == [True, False, True]
    _, update, second = run(fn, first, jnp.array([0.1, jnp.nan, 3.0]))
    # With the weights of the first step: none were computed for these gradients.
    np.testing.assert_array_equal(second.weights, first.weights)
    assert second.skipped.tolist() == [0, 2, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(update))
    _, _, third = run(fn, second, jnp.array([0.1, 1.0, 3.0]))
    assert third.weighed.all() and not np.allclose(third.weights, second.weights)


def test_after_freezing_a_step_runs_one_backward_pass():
    method = mtl.mgda(T, freeze_after=1)
    fn = jax.jit(mtl.weighted_value_and_grad(loss_fn, method))
    _, _, first = run(fn, method.init(PARAMS))
    _, update, second = run(fn, first, 3 * SCALE)
    np.testing.assert_array_equal(first.weights, second.weights)
    weighted = lambda params: first.weights[0] @ loss_fn(params, IDS, 3 * SCALE)  # noqa: E731
    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(u, g, 1e-5, 1e-6),
        update,
        jax.grad(weighted)(PARAMS),
    )


@pytest.mark.parametrize("mode", sampled(["auto", "map", "products", "examples"], ["products"]))
def test_integers_of_the_parameters_are_left_alone(mode):
    """Also if `weights_from` names them; their update is 0 in their own dtype."""
    params = {"ids": jnp.array([2, 0, 0]), "w": jnp.arange(1.0, 4.0), "table": jnp.ones((T, 2))}
    floats = {"w": params["w"], "table": params["table"]}
    method = mtl.mgda(T, update_every=2)

    def losses_of(params, x):
        rows = params["table"] * params["w"][:, None]
        return ((x @ rows[params["ids"]].T) ** 2 + x[:, :1]).mean(axis=1)

    def step(losses_of, params, chosen):
        fn = mtl.weighted_value_and_grad(losses_of, method, mode=mode, weights_from=chosen)
        return jax.jit(fn)(params, method.init(params), jnp.eye(T, 2) + 1)[1]

    update, state = step(losses_of, params, {"ids": True, "w": True, "table": False})
    moved = optax.apply_updates(params, update)
    assert update["ids"].dtype == params["ids"].dtype
    np.testing.assert_array_equal(moved["ids"], params["ids"])
    expected, alone = step(
        lambda floats, x: losses_of({**params, **floats}, x), floats, {"w": True, "table": False}
    )
    chex.assert_trees_all_close({name: update[name] for name in floats}, expected, rtol=1e-5)
    np.testing.assert_allclose(state.weights, alone.weights, 1e-5)
    with pytest.raises(ValueError, match=r"none of the 2 leaves .* that have gradients"):
        step(losses_of, params, {"ids": True, "w": False, "table": False})
