"""Methods that keep averages of the gradients: the same under every option of `MethodOptions`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling import sampled

import mtl_optax as mtl

T = 3
P = jax.P
PARAMS = {"a": jnp.ones((4, 3)), "b": jnp.ones((2,))}
LOSSES = jnp.array([0.7, 1.3, 0.2])
# Step sizes with which all weights change visibly in three updates and none reaches its limit.
METHODS = {
    "db_mtl": functools.partial(mtl.db_mtl, T),
    "excess_mtl": functools.partial(mtl.excess_mtl, T, step_size=0.05),
    "moco": functools.partial(mtl.moco, T, ema_decay=0.5, weight_lr=0.01),
    "ol_aux": functools.partial(mtl.ol_aux, T, weight_lr=0.01, update_every=2, filter_window=3),
}
WEIGH_AVERAGES = ("db_mtl", "moco")  # the weights of the others multiply the raw gradients


def gradients(seed):
    """Gradients of different magnitude per task and leaf, so that their weights differ."""
    rng = np.random.default_rng(seed)
    tasks, leaves = np.array([1.0, 2.0, 0.5]), {"a": 1.0, "b": 3.0}

    def draw(name, p):
        sizes = leaves[name] * tasks.reshape((T,) + (1,) * p.ndim)
        return jnp.asarray(sizes * rng.normal(size=(T, *p.shape)), jnp.float32)

    return {name: draw(name, p) for name, p in PARAMS.items()}


def run(method, leaves=tuple(PARAMS), update=None):
    """Updates and states of three steps on some of the leaves."""
    pick = lambda tree: {name: tree[name] for name in leaves}  # noqa: E731
    state, results = method.init(pick(PARAMS)), []
    for seed in range(3):
        result, state = (update or method.update)(pick(gradients(seed)), state, losses=LOSSES)
        results.append((result, state))
    return results


def averages_of(state):
    return state.averages.window if hasattr(state.averages, "window") else state.averages


def weighted_sum(weights, tree):
    return jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), tree)


def assert_close(actual, expected):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, 1e-5, 1e-5 * np.abs(e).max()),
        actual,
        expected,
    )


def assert_differ(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert not np.allclose(one, other, rtol=1e-3)


@pytest.mark.parametrize("name", sampled(METHODS, ["ol_aux"]))
def test_blocks_by_leaf_equal_the_method_on_each_leaf(name):
    together = run(METHODS[name](blocks="leaf"))
    for block, leaf in enumerate(PARAMS):
        alone = run(METHODS[name](), leaves=[leaf])
        for (update, state), (expected, want) in zip(together, alone, strict=True):
            assert_close(update[leaf], expected[leaf])
            assert_close(averages_of(state)[leaf], averages_of(want)[leaf])
            of_block = jax.tree.map(lambda x, b=block: x[b], (state.weights, state.rule_state))
            assert_close(of_block, jax.tree.map(lambda x: x[0], (want.weights, want.rule_state)))
    assert_differ(together[-1][1].weights[0], together[-1][1].weights[1])


@pytest.mark.parametrize("name", sampled(METHODS, ["moco", "db_mtl"]))
def test_reduce_false_sums_to_the_reduced_update(name):
    scaled, reduced = run(METHODS[name](reduce=False)), run(METHODS[name]())
    for seed, ((parts, state), (update, want)) in enumerate(zip(scaled, reduced, strict=True)):
        assert jax.tree.map(jnp.shape, parts) == jax.tree.map(jnp.shape, gradients(seed))
        assert_close(jax.tree.map(lambda x: x.sum(0), parts), update)
        assert_close(state, want)


@pytest.mark.parametrize("name", sampled(METHODS, ["moco", "db_mtl"]))
def test_update_every_keeps_the_weights_while_the_averages_move(name):
    every_other = run(METHODS[name](update_every=2))
    first, second, third = (state for _, state in every_other)
    np.testing.assert_array_equal(second.weights, first.weights)
    assert_differ(third.weights, second.weights)
    assert_differ(averages_of(second), averages_of(first))
    assert_differ(averages_of(third), averages_of(second))
    for seed, ((update, state), (_, want)) in enumerate(
        zip(every_other, run(METHODS[name](update_every=1)), strict=True)
    ):
        assert_close(state.averages, want.averages)
        weighted = averages_of(state) if name in WEIGH_AVERAGES else gradients(seed)
        assert_close(update, weighted_sum(state.weights[0], weighted))


def spec(x):
    """Leaves and their buffers are split along the first axis of the parameter."""
    for p in PARAMS.values():
        if x.shape[x.ndim - p.ndim :] == p.shape:
            return P(*(None,) * (x.ndim - p.ndim), "model")
    return P()


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("blocks", sampled(["all", "leaf"], ["all"]))
@pytest.mark.parametrize("name", sampled(METHODS, ["moco"]))
def test_axis_name_gives_the_unsharded_update_on_two_devices(name, blocks):
    mesh = jax.make_mesh((2,), ("model",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    method = METHODS[name](blocks=blocks, axis_name="model")
    state = method.init(PARAMS)
    in_specs = jax.tree.map(spec, (gradients(0), state))
    out_specs = jax.tree.map(spec, (PARAMS, state))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(*in_specs, P()), out_specs=out_specs)
    def local(grads, state, losses):
        return method.update(grads, state, losses=losses)

    sharded = run(method, update=lambda grads, state, losses: local(grads, state, losses))
    assert_close(sharded, run(METHODS[name](blocks=blocks)))
