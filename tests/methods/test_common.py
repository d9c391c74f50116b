"""What every method in the table must do, whatever its mathematics."""

import copy
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_properties import BROAD, SAMPLE, every_method, make
from sampling import sampled

import mtl_optax as mtl

T = 3
EVERY, NAMES = every_method(), every_method(quick=BROAD)
PARAMS = {"a": jnp.ones((2, 3)), "b": {"scale": jnp.ones(()), "none": None, "w": jnp.ones((4,))}}
LOSSES = jnp.array([0.7, 1.3, 0.2])


def gradients(seed, params=PARAMS, tasks=T):
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    return jax.tree.map(lambda p: jax.random.normal(next(keys), (tasks, *p.shape), p.dtype), params)


@functools.cache
def method(name, tasks=T):
    return make(name, tasks)


def step(name):
    """One update outside jit: a method compiles itself, once for all tests of this file."""

    def run(grads, state, losses=LOSSES, active=None):
        active = jnp.ones((T,), bool) if active is None else jnp.asarray(active)
        return method(name).update(grads, state, PARAMS, losses=losses, active=active)

    return run


def after(name, steps=2):
    state = method(name).init(PARAMS)
    for seed in range(steps):
        update, state = step(name)(gradients(seed), state)
    return update, state


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(np.asarray(leaf)).all()


def assert_close(left, right, rtol=2e-5):
    """Equal relative to the largest entry: a sum of cancelling gradients has no smaller scale."""
    size = max((np.abs(x).max() for x in jax.tree.leaves(right) if x.size), default=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, rtol * size), left, right)


@pytest.mark.parametrize("name", NAMES)
def test_update_has_the_shape_and_dtype_of_params_and_state_is_stable(name):
    state = method(name).init(PARAMS)
    update, new = step(name)(gradients(0), state)
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)  # noqa: E731
    assert describe(update) == describe(PARAMS)
    assert describe(new) == describe(state)
    assert_finite((update, new))


@pytest.mark.parametrize("name", NAMES)
def test_init_reads_shapes_only(name):
    like = jax.eval_shape(lambda: PARAMS)
    from_shapes = method(name).init(like)
    assert_close(from_shapes, method(name).init(PARAMS))
    assert jax.tree.structure(jax.eval_shape(method(name).init, PARAMS)) == jax.tree.structure(
        from_shapes
    )


@pytest.mark.parametrize("name", every_method(quick=["gradnorm"]))
def test_vmapped_scan_equals_loops(name):
    """Scan refuses a state whose shapes or dtypes drift, which would recompile under plain jit."""
    tx = method(name)
    batch = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    models = batch(*(batch(gradients(seed), gradients(seed + 1)) for seed in (0, 10)))

    def body(state, grads):
        update, state = tx.update(grads, state, PARAMS, losses=LOSSES)
        return state, update

    run = jax.vmap(lambda grads: jax.lax.scan(body, tx.init(PARAMS), grads))
    states, updates = jax.jit(run)(models)
    for model, seed in enumerate((0, 10)):
        state = tx.init(PARAMS)
        for k in range(2):
            update, state = step(name)(gradients(seed + k), state)
            assert_close(jax.tree.map(lambda u, m=model, k=k: u[m, k], updates), update)
        assert_close(jax.tree.map(lambda u, m=model: u[m], states), state)


@pytest.mark.parametrize("name", every_method(quick=SAMPLE))
def test_unknown_extra_args_are_ignored(name):
    state = method(name).init(PARAMS)
    extra = {"value": jnp.ones(()), "grad": None, "unheard_of": "x"}
    update, _ = method(name).update(gradients(0), state, PARAMS, losses=LOSSES, **extra)
    assert_close(update, step(name)(gradients(0), state)[0], 0)


DEGENERATE = {
    "one zero": lambda g: jax.tree.map(lambda x: x.at[1].set(0), g),
    "all zero": lambda g: jax.tree.map(jnp.zeros_like, g),
    "identical": lambda g: jax.tree.map(lambda x: jnp.stack([x[0]] * T), g),
    "opposite": lambda g: jax.tree.map(lambda x: jnp.stack([x[0], -x[0], x[2]]), g),
    "collinear": lambda g: jax.tree.map(lambda x: jnp.stack([x[0], 2 * x[0], -3 * x[0]]), g),
    "tiny": lambda g: jax.tree.map(lambda x: x * 1e-18, g),
    "huge": lambda g: jax.tree.map(lambda x: x * 1e17, g),
    "twelve decades": lambda g: jax.tree.map(
        lambda x: x * jnp.array([1e-6, 1.0, 1e6]).reshape((T,) + (1,) * (x.ndim - 1)), g
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_degenerate_gradients_give_finite_updates(name):
    for case, change in DEGENERATE.items():
        state = method(name).init(PARAMS)
        for seed in range(2):
            update, state = step(name)(change(gradients(seed)), state)
            for leaf in jax.tree.leaves((update, state)):
                assert np.isfinite(np.asarray(leaf)).all(), (case, update, state)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_losses_give_finite_updates(name):
    for losses in ([0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1e30, 1.0, 1e-30], [-1.0, 2.0, 0.5]):
        state = method(name).init(PARAMS)
        for seed in range(3):
            update, state = step(name)(gradients(seed), state, jnp.array(losses))
            for leaf in jax.tree.leaves((update, state)):
                assert np.isfinite(np.asarray(leaf)).all(), (losses, update, state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_task_counts_as_absent_and_is_counted(name, bad):
    _, state = after(name)
    spoilt = jax.tree.map(lambda x: x.at[1].set(bad), gradients(7))
    update, new = step(name)(spoilt, state)
    absent, absent_state = step(name)(gradients(7), state, active=[True, False, True])
    assert_finite((update, new))
    assert_close(update, absent)
    skipped = [s.skipped for s in _balance_states(new)]
    before = [s.skipped for s in _balance_states(state)]
    assert any((a - b).tolist() == [0, 1, 0] for a, b in zip(skipped, before, strict=True))
    # The next step's numbers do not know whether the task was absent or broken.
    assert_close(step(name)(gradients(8), new)[0], step(name)(gradients(8), absent_state)[0])


@pytest.mark.parametrize("name", NAMES)
def test_an_absent_task_cannot_influence_anything(name):
    _, state = after(name)
    active = [True, False, True]
    results = []
    for value, loss in ((0.0, 1.0), (1e9, -5.0), (np.nan, np.nan)):
        grads = jax.tree.map(lambda x, v=value: x.at[1].set(v), gradients(3))
        update, new = step(name)(grads, state, LOSSES.at[1].set(loss), active)
        results.append((update, new))
        assert_finite((update, new))
        assert [s.skipped.tolist() for s in _balance_states(new)] == [
            s.skipped.tolist() for s in _balance_states(state)
        ]
    for other in results[1:]:
        assert_close(other, results[0])


@pytest.mark.parametrize("name", NAMES)
def test_nobody_present_gives_zero_and_leaves_statistics_alone(name):
    _, state = after(name)
    update, new = step(name)(gradients(3), state, active=[False] * T)
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(update))
    assert_close(statistics(new), statistics(state), 0)
    assert new.skipped.tolist() == state.skipped.tolist()


def statistics(state):
    """What a method remembers of the tasks."""
    return state.averages, state.rule_state


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_keeps_its_dtype_and_float32_statistics(name):
    """The dtypes alone; test_hostile.py has numbers of every method in both."""
    for dtype in (jnp.float16, jnp.bfloat16):
        params = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), PARAMS)
        tx = method(name)
        state = jax.eval_shape(tx.init, params)
        update, new = jax.eval_shape(tx.update, gradients(0, params), state, params, losses=LOSSES)
        assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype(dtype)}
        for one in _balance_states(new):
            assert one.weights.dtype == jnp.float32
        dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]  # noqa: E731
        assert dtypes(new) == dtypes(state)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_many_tasks_and_an_empty_tree(name):
    check_sizes(name, 20, {"w": jnp.ones(3)})
    check_sizes(name, 2, {})


def check_sizes(name, num_tasks, params):
    tx = method(name, num_tasks)
    grads = gradients(0, params, num_tasks)
    losses = jnp.linspace(0.5, 1.5, num_tasks)
    update, state = tx.update(grads, tx.init(params), params, losses=losses)
    assert jax.tree.map(jnp.shape, update) == jax.tree.map(jnp.shape, params)
    assert_finite((update, state))


@pytest.mark.parametrize("name", sampled(SAMPLE, ["metabalance"]))
def test_order_of_leaves_is_irrelevant(name):
    tx = method(name)
    first, second = {"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": jnp.ones(3), "b": jnp.ones(2)}
    grads = gradients(0, first)
    swapped = {"a": grads["b"], "b": grads["a"]}
    one, _ = tx.update(grads, tx.init(first), first, losses=LOSSES)
    other, _ = tx.update(swapped, tx.init(second), second, losses=LOSSES)
    assert_close({"a": other["b"], "b": other["a"]}, one)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_chain_with_an_optimizer_the_weights_can_be_found(name):
    tx = optax.chain(method(name), optax.adam(1e-2))
    state = tx.init(PARAMS)
    update, state = tx.update(gradients(0), state, PARAMS, losses=LOSSES)
    assert optax.tree.get(state, "weights").shape[-1] == T
    assert int(mtl.diagnostics(state)["steps"]) == 1
    assert mtl.head_weights(state).shape == (T,)
    assert_finite(optax.apply_updates(PARAMS, update))


@pytest.mark.parametrize("name", NAMES)
def test_updates_without_the_task_axis_are_refused(name):
    tx = method(name)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="These have no task axis"):
        tx.update(PARAMS, state, PARAMS, losses=LOSSES)
    with pytest.raises(ValueError, match=r"task axis has size 2 but tasks=3"):
        tx.update(gradients(0, tasks=2), state, PARAMS, losses=LOSSES)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_required_where_needed_and_ignored_elsewhere(name):
    tx = method(name)
    state = tx.init(PARAMS)
    if "losses" in mtl.METHODS[name].needs:
        with pytest.raises(ValueError, match=r"needs the losses of this step"):
            tx.update(gradients(0), state, PARAMS)
        with pytest.raises(ValueError, match=r"value=, which optax keeps for one scalar"):
            tx.update(gradients(0), state, PARAMS, value=LOSSES)
        with pytest.raises(ValueError, match=r"losses must have shape \(3,\)"):
            tx.update(gradients(0), state, PARAMS, losses=LOSSES[:2])
    else:
        without = jax.make_jaxpr(tx.update)(gradients(0), state, PARAMS)
        given = jax.make_jaxpr(lambda *args: tx.update(*args, losses=LOSSES))
        assert str(given(gradients(0), state, PARAMS)) == str(without)


@pytest.mark.parametrize("name", EVERY)
def test_tasks_must_be_static(name):
    factory, arguments = mtl.METHODS[name].factory, REQUIRED.get(name, {})
    with pytest.raises(TypeError, match="static_args"):
        factory(jnp.asarray(3), **arguments)
    with pytest.raises(ValueError, match=">= 1"):
        factory(0, **arguments)


REQUIRED = {
    "adatask": {"inner": optax.identity()},
    "fixed_weights": {"weights": [1.0]},
    "go4align": {"num_groups": 1},
    "lagrangian": {"limits": [None], "step_size": 1.0},
}


def _balance_states(tree):
    is_state = lambda node: isinstance(node, mtl.BalanceState)  # noqa: E731
    return [node for node in jax.tree.leaves(tree, is_leaf=is_state) if is_state(node)]


def test_cached_weights_between_updates():
    every = mtl.mgda(T, update_every=2)
    state = every.init(PARAMS)
    _, first = every.update(gradients(0), state, PARAMS)
    update, second = every.update(gradients(1), first, PARAMS)
    _, third = every.update(gradients(2), second, PARAMS)
    assert_close(second.weights, first.weights, 0)
    assert not np.allclose(third.weights, second.weights)
    fixed = mtl.fixed_weights(T, first.weights[0])
    expected, _ = fixed.update(gradients(1), fixed.init(PARAMS), PARAMS)
    assert_close(update, expected)


@pytest.mark.slow
def test_blocks_share_one_rule_and_carry_their_names():
    tx = mtl.mgda(T, blocks=lambda path, leaf: "matrix" if len(leaf.shape) == 2 else "rest")
    update, state = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    read = mtl.diagnostics(state, tx, PARAMS)
    assert sorted(read["weights"]) == ["matrix", "rest"]
    alone = mtl.mgda(T)
    matrix = {"a": PARAMS["a"]}
    expected, alone_state = alone.update({"a": gradients(0)["a"]}, alone.init(matrix), matrix)
    assert_close(update["a"], expected["a"])
    assert_close(read["cosines"]["matrix"], alone_state.cosine[0])


def test_alignment_leaves_out_gradients_that_are_zero():
    """2 |mean_t u_t|^2 - 1 over the unit gradients (1, 0) and (0, 1): 2 * 1/2 - 1."""
    tx = mtl.mgda(T)
    grads = jnp.zeros((T, 2)).at[0, 0].set(3.0).at[1, 1].set(5.0)
    _, state = tx.update(grads, tx.init(jnp.zeros(2)))
    assert float(mtl.diagnostics(state)["alignment"]) == pytest.approx(0.0, abs=1e-6)
    _, state = tx.update(jnp.zeros((T, 2)).at[0].set(1.0), tx.init(jnp.zeros(2)))
    assert float(mtl.diagnostics(state)["alignment"]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.slow
def test_fallbacks_are_counted_for_each_block_and_through_a_base():
    """In block "b" two gradients oppose each other, and no weights make all tasks gain."""
    grads = {"a": jnp.eye(2), "b": jnp.array([[1.0, 0.0], [-2.0, 0.0]])}
    params = jax.tree.map(lambda g: g[0], grads)
    nash = mtl.nash_mtl(2, blocks="leaf")
    for tx in (nash, mtl.emtl(2, base=nash, blocks="leaf")):
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(grads, state, params, losses=jnp.ones(2))
        read = mtl.diagnostics(state, tx, params)["fallback_count"]
        assert {block: int(count) for block, count in read.items()} == {"['a']": 0, "['b']": 3}
    whole = mtl.nash_mtl(2)
    carrier = mtl.fork_init(whole, params["b"])
    state = whole.init(params["b"])
    assert mtl.diagnostics(carrier)["fallback_count"].tolist() == 0
    for step in (1, 2):
        _, state = whole.update(grads["b"], state)
        assert mtl.diagnostics(state)["fallback_count"].tolist() == step
    assert "fallback_count" not in mtl.diagnostics(mtl.mgda(2).init(params))


def test_reduce_false_keeps_the_task_axis():
    keep, total = mtl.metabalance(T, reduce=False), mtl.metabalance(T)
    scaled, _ = keep.update(gradients(0), keep.init(PARAMS), PARAMS)
    update, _ = total.update(gradients(0), total.init(PARAMS), PARAMS)
    assert_close(jax.tree.map(lambda x: x.sum(0), scaled), update)


def test_counter_never_freezes_nor_returns_to_zero():
    tx = method("sum_tasks")
    state = tx.init(PARAMS)._replace(balance_count=jnp.asarray(2**31 - 1, jnp.int32))
    _, state = tx.update(gradients(0), state, PARAMS)
    _, later = tx.update(gradients(0), state, PARAMS)
    assert 0 < int(state.balance_count) < int(later.balance_count)


def test_unstacked_gradients_whose_first_dimension_is_the_number_of_tasks():
    tx = mtl.sum_tasks(T)
    params = {"w": jnp.ones((T, 2))}
    with pytest.raises(ValueError, match="These have no task axis"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("name", every_method(quick=["metabalance", "gradnorm"]))
def test_a_state_can_be_donated(name):
    """Equal zeros in one buffer would be donated twice, which XLA refuses."""
    tx = mtl.accumulate(method(name), T, 2)
    update = jax.jit(
        lambda state, grads: tx.update(grads, state, PARAMS, losses=LOSSES), donate_argnums=0
    )
    state = tx.init(PARAMS)
    for seed in range(2):
        given = [leaf for leaf in jax.tree.leaves(state) if leaf.size]
        _, state = update(state, gradients(seed))
        assert all(leaf.is_deleted() for leaf in given)
    assert_finite(state)


def test_fresh_states_can_be_donated():
    """As `init` makes them, without a wrapper that would copy; also where a rule gives one array twice."""

    def twice(params, num_tasks, dtype):
        zeros = jnp.zeros((num_tasks,), dtype)
        return zeros, zeros

    rule = mtl.UpdateRule(frozenset({"gradients"}), lambda inputs, state: None, twice)
    own = mtl.from_rule("own", T, rule)
    states = [tx.init(PARAMS) for tx in (own, *map(method, mtl.METHODS))]
    given = [leaf for leaf in jax.tree.leaves(states) if leaf.size]
    jax.jit(lambda states: jax.tree.map(jnp.copy, states), donate_argnums=0)(states)
    assert all(leaf.is_deleted() for leaf in given)


def test_a_fresh_carrier_can_be_donated():
    for name in SAMPLE:
        leaves = jax.tree.leaves(mtl.fork_init(method(name), PARAMS["a"]))
        buffers = [leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.size]
        assert len(set(buffers)) == len(buffers)


STANDING_STILL = {
    "bandit_mtl": mtl.bandit_mtl(T),
    # Rounding breaks the tie of the inner MGDA by a percent, and the adversary adds it up.
    "emtl": mtl.emtl(T, step_size=0.1),
    "excess_mtl": mtl.excess_mtl(T, step_size=0.0),
    "go4align": mtl.go4align(T, num_groups=3),
    "modo": mtl.modo(T),
    "multibalance": mtl.multibalance(T, weight_lr=0.01),
    "sdmgrad": mtl.sdmgrad(T),
}


@pytest.mark.parametrize("name", sampled(STANDING_STILL, ["multibalance", "modo"]))
def test_a_task_that_is_absent_now_and_then_keeps_its_share(name):
    tx, grads = STANDING_STILL[name], jnp.ones((T, 4))

    def two_steps(state, _):
        for active in ([True, True, True], [True, True, False]):
            _, state = tx.update(
                grads, state, jnp.ones(4), losses=jnp.ones(T), active=jnp.array(active)
            )
        return state, None

    state, _ = jax.lax.scan(two_steps, tx.init(jnp.ones(4)), length=100)
    _, state = tx.update(grads, state, jnp.ones(4), losses=jnp.ones(T))
    # Gradients and losses are all alike; that some break the tie a little is theirs.
    assert np.min(state.weights) > 0.8 * np.max(state.weights)


@pytest.mark.parametrize("late", [0, 1])
def test_metabalance_takes_a_late_task_as_it_is(late):
    tx, grads = mtl.metabalance(T, ema_decay=0.999), jnp.ones((T, 4))
    absent = jnp.arange(T) != late
    step = jax.jit(lambda state, active: tx.update(grads, state, active=active)[1])
    state = tx.init(jnp.ones(4))
    for _ in range(3):
        state = step(state, absent)
        assert_close(state.weights[0], absent.astype(jnp.float32))
    for _ in range(3):
        state = step(state, jnp.ones((T,), bool))
        assert_close(state.weights[0], jnp.ones(T))


@pytest.mark.parametrize("name", sampled(SAMPLE, ["metabalance"]))
def test_a_non_finite_task_stays_one_through_methods_that_keep_the_task_axis(name):
    first = mtl.fixed_weights(T, [1.0, 1.0, 1.0], reduce=False)
    chained, alone = optax.chain(first, method(name)), method(name)
    grads = jax.tree.map(lambda g: g.at[1].set(jnp.nan), gradients(0))
    update, (_, state) = chained.update(grads, chained.init(PARAMS), PARAMS, losses=LOSSES)
    expected, want = alone.update(grads, alone.init(PARAMS), PARAMS, losses=LOSSES)
    assert_close(update, expected, 0)
    assert_close(state.rule_state, want.rule_state, 0)
    assert state.skipped.tolist() == [0, 1, 0]
    # A loss that is not finite counts like a gradient; an absent task's slot stays 0.
    keep = mtl.scale_invariant(T, reduce=False)
    active = jnp.array([True, True, False])
    losses = LOSSES.at[1].set(jnp.nan)
    update, _ = keep.update(gradients(0), keep.init(PARAMS), PARAMS, losses=losses, active=active)
    assert np.isnan(update["a"][1]).all() and not np.any(update["a"][2])


def test_cached_weights_are_for_those_who_were_there():
    every = mtl.mgda(2, update_every=10)
    grads = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    state = every.init(jnp.zeros(2))
    _, state = every.update(grads.at[1].set(jnp.nan), state)
    assert state.weights.tolist() == [[1, 0]]
    update, state = every.update(grads, state)
    assert_close(update, jnp.array([0.5, 0.5]))
    _, cached = every.update(
        jnp.array([[1.0, 0.0], [0.0, 9.0]]), state, active=jnp.array([True, False])
    )
    assert_close(cached.weights, state.weights, 0)


@pytest.mark.parametrize(
    "rows", [[[1, 2], [-2, -4], [3, 0], [-12, 0]], [[1, 2], [-2, -4], [4, 8], [-1, -2]]]
)
def test_config_finds_no_direction_where_there_is_none(rows):
    grads = jnp.asarray(np.asarray(rows, np.float32) / 3)
    tx = mtl.conflict_free(len(rows))
    update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
    assert update.tolist() == [0, 0]


def test_named_tasks_are_sorted_everywhere():
    """One rule for the order: that in which JAX flattens a dictionary."""
    names = ("click", "buy", "cart")
    tx, numbered = mtl.metabalance(names, target="click"), mtl.metabalance(T, target=2)
    assert (
        tx.task_names == ("buy", "cart", "click") == tuple(jax.tree.leaves({n: n for n in names}))
    )
    grads = gradients(0)
    update, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    expected, _ = numbered.update(grads, numbered.init(PARAMS), PARAMS)
    assert_close(update, expected, 0)
    read = mtl.diagnostics(state, tx, PARAMS)
    assert float(read["weights"]["['a']"]["click"]) == 1.0
    assert set(read["skipped"]) == set(names)
    by_task = mtl.diagnostics(state, tx)["norms"]
    assert_close(by_task["cart"], state.norms[:, 1], 0)


def test_losses_and_active_by_name():
    names = ("click", "buy", "cart")
    tx = mtl.scale_invariant(names)
    losses = {"click": 0.2, "buy": 0.7, "cart": 1.3}
    active = {"cart": False, "click": True, "buy": True}
    state = tx.init(PARAMS)
    named = tx.update(gradients(0), state, PARAMS, losses=losses, active=active)
    array = tx.update(
        gradients(0),
        state,
        PARAMS,
        losses=jnp.array([0.7, 1.3, 0.2]),
        active=jnp.array([True, False, True]),
    )
    assert_close(named, array, 0)
    skip = mtl.skip_nonfinite(tx)
    spoilt = jax.tree.map(lambda g: g.at[1].set(jnp.nan), gradients(0))
    _, after = skip.update(spoilt, skip.init(PARAMS), PARAMS, losses=losses, active=active)
    assert int(after.skipped_steps) == 0


def test_a_method_is_a_type_that_unpacks_and_is_lost_where_it_must():
    tx = mtl.mgda(T)
    init, update = tx
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert (init, update) == (tx.init, tx.update)
    assert optax.with_extra_args_support(tx) is tx
    copied = copy.deepcopy(tx)
    assert isinstance(copied, mtl.Method) and copied.needs == tx.needs
    changed = tx._replace(update=lambda updates, state, params=None: (updates, state))
    for other in (changed, optax.chain(tx)):
        assert not isinstance(other, mtl.Method)
        assert isinstance(other, optax.GradientTransformationExtraArgs)


@pytest.mark.parametrize("name", EVERY)
def test_the_table_says_what_the_method_says(name):
    row = mtl.METHODS[name]
    tx = method(name)
    assert tx.name == name and tx.num_tasks == T and tx.task_names is None
    # Norms come with the Gram matrix.
    assert set(row.needs) == tx.needs - ({"norms"} if "gram" in tx.needs else set())
    assert row.family in ("losses", "norms", "gram", "gradients")
    assert re.fullmatch(r"[A-Z].+, (19|20)\d\d", row.reference)
    assert "Scale:" in row.factory.__doc__ and row.scale in ("sum", "mean", "own")


@pytest.mark.slow
def test_famo_takes_dictionaries_where_it_takes_arrays():
    names, losses = ("a", "b"), {"a": 2.0, "b": 1.0}
    named = mtl.famo(names, min_losses={"b": 0.1, "a": 0.2})
    array = mtl.famo(2, min_losses=jnp.array([0.2, 0.1]))
    results = []
    for tx, first, after in (
        (named, losses, {"a": 1.5, "b": 0.9}),
        (array, jnp.array([2.0, 1.0]), jnp.array([1.5, 0.9])),
    ):
        state = tx.init(jnp.zeros(2))
        for given in ({}, {"losses_after": after}):
            update, state = tx.update(jnp.eye(2), state, losses=first, **given)
        results.append(update)
    assert_close(*results, 0)


def test_skip_nonfinite_reads_any_mix_of_dictionaries_and_arrays():
    tx = mtl.skip_nonfinite(mtl.sum_tasks(("a", "b")))
    losses, active = {"a": 1.0, "b": jnp.nan}, {"a": True, "b": False}
    for given_losses in (losses, jnp.array([1.0, jnp.nan]), [1.0, jnp.nan]):
        for given_active in (active, jnp.array([True, False]), [True, False]):
            _, state = tx.update(
                jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=given_losses, active=given_active
            )
            assert int(state.skipped_steps) == 0
