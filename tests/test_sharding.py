"""One device or many: the same numbers, and every array stays where it was.

Eight simulated devices, as a mesh of four ("data") by two ("model").
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl

T = 3
P = jax.P
TREE_SPECS = {"table": P("model", None), "kernel": P("data", "model"), "bias": P()}
TREE_SHAPES = {"table": (8, 4), "kernel": (8, 6), "bias": (5,)}
AXIS_TYPES = {"auto": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}
FAMILIES = ["from_losses", "from_norms", "from_gram", "from_gradients"]

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def make_mesh(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AXIS_TYPES[kind],) * 2)


def place(tree, specs, mesh):
    """Puts `tree` on `mesh`; without a mesh, leaves it on one device."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), tree, specs)


def stacked(specs):
    return jax.tree.map(lambda s: P(None, *s), specs, is_leaf=lambda s: isinstance(s, P))


def draw(seed, shapes, lead=()):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: np.asarray(jax.random.normal(key, (*lead, *shape)))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def assert_close(actual, expected):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=1e-5, atol=1e-5),
        actual,
        expected,
    )


def types(tree):
    return jax.tree.map(lambda x: str(jax.typeof(x)), tree)


# --- every method, on gradients of every kind of placement ----------------------------------------


def methods_of(family):
    return {n: row.make(T) for n, row in mtl.METHODS.items() if row.family == family}


@functools.cache
def two_steps(family):
    """One compiled function that takes two steps with every method of a family."""
    methods = methods_of(family)

    def run(states, params, first, second, losses):
        out = {}
        for name, method in methods.items():
            _, state = method.update(first, states[name], params, losses=losses[0])
            out[name] = method.update(second, state, params, losses=losses[1])
        return out

    return methods, jax.jit(run)


def run_family(family, mesh):
    methods, run = two_steps(family)
    params = place(draw(0, TREE_SHAPES), TREE_SPECS, mesh)
    first, second = (
        place(draw(seed, TREE_SHAPES, (T,)), stacked(TREE_SPECS), mesh) for seed in (1, 2)
    )
    losses = np.array([[1.0, 2.0, 0.5], [0.8, 1.9, 0.6]], np.float32)
    states = {name: method.init(params) for name, method in methods.items()}
    return states, run(states, params, first, second, losses)


@functools.cache
def unsharded(family):
    return jax.device_get(run_family(family, None)[1])


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_is_the_same_on_a_mesh(family, kind):
    expected = unsharded(family)
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        before, after = run_family(family, mesh)
    assert set(after) == set(expected)
    for name, (updates, state) in after.items():
        assert_close((updates, state), expected[name])
        for leaf, spec in zip(
            jax.tree.leaves(updates), jax.tree.leaves(dict(sorted(TREE_SPECS.items()))), strict=True
        ):
            wanted = jax.NamedSharding(mesh, spec)
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (name, leaf.sharding)
        check_state_stays(name, before[name], state, mesh, kind)


def check_state_stays(name, before, after, mesh, kind):
    """Buffers lie as their parameters do, statistics everywhere, and no update moves either."""
    if kind == "explicit":
        assert types(before) == types(after), name
    by_shape = {
        (*lead, *shape): P(*(None,) * len(lead), *TREE_SPECS[leaf])
        for leaf, shape in TREE_SHAPES.items()
        for lead in ((), (T,))
    }
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        spec = by_shape.get(new.shape, P())
        wanted = jax.NamedSharding(mesh, spec)
        assert new.sharding.is_equivalent_to(wanted, new.ndim), (name, new.shape, new.sharding)
        if spec != P():
            assert old.sharding.is_equivalent_to(wanted, old.ndim), (name, old.shape, old.sharding)


# --- every placement, in a whole training step ----------------------------------------------------

MODEL_SHAPES = {"kernel": (6, 8), "bias": (8,), "heads": (T, 8)}
MODEL_SPECS = {"kernel": P(None, "model"), "bias": P("model"), "heads": P(None, "model")}
BATCH_SPECS = {"x": P("data"), "y": P("data", None)}
ROWS = 16


def encode(shared, batch):
    return jnp.tanh(batch["x"] @ shared["kernel"] + shared["bias"][None])


def decode(heads, copies, batch):
    # A product and a sum, which every mesh takes: the contracted axis is split over "model".
    outputs = [(copy * heads["heads"][t][None]).sum(-1) for t, copy in enumerate(copies)]
    return jnp.stack([((o - batch["y"][:, t]) ** 2).mean() for t, o in enumerate(outputs)])


def divide(params):
    return {"kernel": params["kernel"], "bias": params["bias"]}, {"heads": params["heads"]}


def per_task_step(params, state, batch, method):
    def loss_fn(params):
        shared, heads = divide(params)
        return decode(heads, [encode(shared, batch)] * T, batch)

    losses, grads = mtl.per_task_value_and_grad(loss_fn, mode="vmap")(params)
    return method.update(grads, state, params, losses=losses)


def split_step(params, state, batch, method):
    shared, heads = divide(params)
    value_and_grad = mtl.split_value_and_grad(
        encode, lambda heads, h, batch: decode(heads, [h] * T, batch)
    )
    losses, (shared_grads, head_grads) = value_and_grad(shared, heads, batch)
    updates, state = method.update(shared_grads, state, shared, losses=losses)
    return updates | head_grads, state


def fork_step(params, carrier, batch, method):
    def loss_fn(params, fork, batch):
        shared, heads = divide(params)
        return decode(heads, fork(encode(shared, batch)), batch)

    _, (grads, carrier) = mtl.fork_value_and_grad(loss_fn, method)(params, carrier, batch)
    return grads, carrier


def weighed_step(params, state, batch, method):
    def loss_fn(params):
        shared, heads = divide(params)
        losses = decode(heads, [encode(shared, batch)] * T, batch)
        return mtl.weigh_losses(losses, state, method)

    return jax.grad(loss_fn, has_aux=True)(params)


PLACEMENTS = {
    "per_task": per_task_step,
    "split": split_step,
    "fork": fork_step,
    "weigh_losses": weighed_step,
}
REPRESENTATIVES = {
    name: row.make(T)
    for name, row in mtl.METHODS.items()
    if name in ("multibalance", "metabalance", "db_mtl", "mgda", "scale_invariant", "sum_tasks")
}


def chosen_for(placement):
    """Methods that a placement takes: those on losses must not need gradients."""
    if placement == "weigh_losses":
        return {n: m for n, m in REPRESENTATIVES.items() if set(mtl.METHODS[n].needs) <= {"losses"}}
    return REPRESENTATIVES


@jax.jit
def every_placement(params, states, batch):
    """One step of every placement with several methods each: one compilation."""
    return {
        placement: {
            name: step(params, states[placement][name], batch, method)
            for name, method in chosen_for(placement).items()
        }
        for placement, step in PLACEMENTS.items()
    }


def initial_state(placement, method, params, batch):
    if placement == "fork":
        return mtl.fork_init(method, encode(divide(params)[0], batch))
    return method.init(divide(params)[0] if placement == "split" else params)


def run_placements(mesh):
    params = place(draw(3, MODEL_SHAPES), MODEL_SPECS, mesh)
    batch = place(draw(4, {"x": (ROWS, 6), "y": (ROWS, T)}), BATCH_SPECS, mesh)
    states = {
        placement: {
            name: initial_state(placement, method, params, batch)
            for name, method in chosen_for(placement).items()
        }
        for placement in PLACEMENTS
    }
    return states, every_placement(params, states, batch)


@functools.cache
def unsharded_placements():
    return jax.device_get(run_placements(None)[1])


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_every_placement_is_the_same_on_a_mesh(kind):
    expected = unsharded_placements()
    with jax.set_mesh(make_mesh(kind)):
        before, after = run_placements(make_mesh(kind))
    for placement in PLACEMENTS:
        assert_close(after[placement], expected[placement])
        for name, (grads, state) in after[placement].items():
            for leaf, value in grads.items():
                wanted = jax.NamedSharding(make_mesh(kind), MODEL_SPECS[leaf])
                assert value.sharding.is_equivalent_to(wanted, value.ndim), (placement, name, leaf)
            if kind == "explicit":
                assert types(state) == types(before[placement][name]), (placement, name)
