"""One device or many: the same numbers, and every array stays where it was.

Eight simulated devices, as a mesh of four ("data") by two ("model").
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_properties import make
from sampling import sampled
from small_model import (
    BATCH_SPECS,
    MODEL_SHAPES,
    MODEL_SPECS,
    ON_GRADIENTS,
    PLACEMENTS,
    ROWS,
    T,
    chosen_for,
    decode,
    divide,
    encode,
    fork_step,
    initial_state,
)

import mtl_optax as mtl

P = jax.P
TREE_SPECS = {"table": P("model", None), "kernel": P("data", "model"), "bias": P()}
TREE_SHAPES = {"table": (8, 4), "kernel": (8, 6), "bias": (5,)}
AXIS_TYPES = {"auto": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}
FAMILIES = [
    pytest.param(family, marks=pytest.mark.xdist_group(f"sharding {family}"))
    for family in ("losses", "norms", "gram", "gradients")
]

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


assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


def types(tree):
    return jax.tree.map(lambda x: str(jax.typeof(x)), tree)


# --- every method, on gradients of every kind of placement ----------------------------------------


# One of each family, one of whose blocks each has statistics, and those with averages of gradients.
SAMPLE = ("scale_invariant", "metabalance", "mgda", "db_mtl")
GROUPS = [
    pytest.param("sample", marks=pytest.mark.xdist_group("sharding")),
    *(pytest.param(*family.values, marks=[*family.marks, pytest.mark.slow]) for family in FAMILIES),
]


def methods_of(group):
    """The methods of a family, or a sample of all."""
    return {
        name: make(name, T)
        for name, row in mtl.METHODS.items()
        if row.family == group or (group == "sample" and name in SAMPLE)
    }


@functools.cache
def one_step(group):
    """One compiled function that takes a step with every method of a group."""
    methods = methods_of(group)

    def run(states, params, grads, losses):
        return {
            name: method.update(grads, states[name], params, losses=losses)
            for name, method in methods.items()
        }

    return methods, jax.jit(run)


def run_group(group, mesh):
    """The states that init made, and updates and states after two steps."""
    methods, run = one_step(group)
    params = place(draw(0, TREE_SHAPES), TREE_SPECS, mesh)
    fresh = {name: method.init(params) for name, method in methods.items()}
    states = fresh if mesh is None else jax.tree.map(functools.partial(settle, mesh), fresh)
    for seed, losses in ((1, [1.0, 2.0, 0.5]), (2, [0.8, 1.9, 0.6])):
        grads = place(draw(seed, TREE_SHAPES, (T,)), stacked(TREE_SPECS), mesh)
        out = run(states, params, grads, np.array(losses, np.float32))
        states = {name: state for name, (_, state) in out.items()}
    return fresh, out


def settle(mesh, leaf):
    """Puts small statistics on every device, where the first update would put them."""
    small = len(leaf.sharding.device_set) == 1
    return jax.device_put(leaf, jax.NamedSharding(mesh, P())) if small else leaf


@functools.cache
def unsharded(group):
    return jax.device_get(run_group(group, None)[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", sampled(AXIS_TYPES, ["explicit"]))
@pytest.mark.parametrize("group", GROUPS)
def test_every_method_is_the_same_on_a_mesh(group, kind):
    expected = unsharded(group)
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        before, after = run_group(group, mesh)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", sampled(AXIS_TYPES, ["explicit"]))
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


# --- one program per device: shard_map ------------------------------------------------------------------

AXES = ("data", "model")


ON_SHARDS = {
    "sample": ("graddrop", "mgda", "trimmed_mean"),
    "all": [row.name for row in mtl.METHODS.values() if row.family != "losses"],
}


def on_eight_shards(names):
    """Two steps of every such method, each device holding a part of every leaf."""
    mesh = make_mesh("auto")
    methods = {name: make(name, T, axis_name=AXES) for name in names}
    # Every leaf is split, so that summing over both axes counts each element once.
    shapes = {"table": (8, 4), "kernel": (16, 3)}
    params = draw(0, shapes)
    grads = [draw(seed, shapes, (T,)) for seed in (1, 2)]
    losses = np.array([[1.0, 2.0, 0.5], [0.8, 1.9, 0.6]], np.float32)
    # What graddrop would draw depends on the shapes that a device sees.
    noise = jax.tree.map(lambda p: np.abs(np.sin(100 * p)), params)
    states = {name: method.init(params) for name, method in methods.items()}

    def step(methods, states, params, noise, grads, losses):
        return {
            name: method.update(grads, states[name], params, losses=losses, noise=noise)
            for name, method in methods.items()
        }

    def spec(x):
        return P(*[None] * (x.ndim - 2), AXES) if x.shape[-2:] in shapes.values() else P()

    specs = jax.tree.map(spec, (states, params, noise, grads[0]))
    alone = jax.jit(functools.partial(step, {name: make(name, T) for name in names}))
    results = jax.eval_shape(alone, states, params, noise, grads[0], losses[0])
    results = jax.tree.map(spec, results)
    sharded = jax.shard_map(
        functools.partial(step, methods), mesh=mesh, in_specs=(*specs, P()), out_specs=results
    )

    def two_steps(step):
        first = jax.device_get(step(states, params, noise, grads[0], losses[0]))
        after = {name: state for name, (_, state) in first.items()}
        return jax.device_get(step(after, params, noise, grads[1], losses[1]))

    return two_steps(alone), two_steps(jax.jit(sharded))


@pytest.mark.parametrize("names", sampled(ON_SHARDS, ["sample"]))
def test_axis_name_sums_over_shards_of_parameters(names):
    expected, actual = on_eight_shards(ON_SHARDS[names])
    for name, result in expected.items():
        assert_close(actual[name], result)


def that_exclude(axis_name):
    """Transformations that exclude a task or skip a step by what they find on the devices."""
    method = functools.partial(make, tasks=T, axis_name=axis_name)
    return {
        **{name: method(name) for name in ("adatask", "graddrop", "mgda", "moco", "sum_tasks")},
        **{name: method(name) for name in ("scale_by_mtadam", "trimmed_mean")},
        "per_task": optax.chain(
            mtl.per_task(optax.trace(0.9), T, axis_name=axis_name), method("sum_tasks")
        ),
        "accumulate": mtl.accumulate(
            optax.chain(method("sum_tasks"), optax.trace(0.9)), T, 2, axis_name=axis_name
        ),
        "skip_nonfinite": mtl.skip_nonfinite(
            optax.chain(mtl.sum_tasks(T), optax.trace(0.9)), axis_name=axis_name
        ),
        # The method inside sees averages that are finite everywhere: it has nothing to agree on.
        "remember": mtl.remember(mtl.sum_tasks(T), 0.5, axis_name=axis_name),
    }


@functools.cache
def with_nan_on_one_device(axis_name, quick, sharded=True):
    """Two steps, the first with NaN in one task on one device: updates, and what each device counts.

    One program runs the transformations of the quick tests, and one the others.
    """
    txs = {name: tx for name, tx in that_exclude(axis_name).items() if (name in QUICK) == quick}
    first, second = (
        g.copy() for g in draw(5, {"first": (16, 3), "second": (16, 3)}, (T,)).values()
    )
    first[1, 6, 0] = np.nan
    noise = np.full((16, 3), 0.5, np.float32)

    def two_steps(first, second, noise):
        found = {}
        for name, tx in txs.items():
            state, updates = tx.init(jnp.zeros_like(noise)), []
            for grads in (first, second):
                update, state = tx.update(grads, state, noise=noise)
                updates.append(update)
            counts = [x for x in jax.tree.leaves(state) if x.shape[-2:] != noise.shape]
            found[name] = updates, [x[None] for x in counts]
        return found

    run = two_steps
    if sharded:
        run = jax.shard_map(
            two_steps,
            mesh=make_mesh("auto"),
            in_specs=(P(None, AXES), P(None, AXES), P(AXES)),
            out_specs=P(AXES),
            check_vma=axis_name is not None,
        )
    return jax.device_get(jax.jit(run)(first, second, noise))


QUICK = ("mgda", "graddrop", "skip_nonfinite")
EXCLUDE = pytest.mark.parametrize("name", sampled(sorted(that_exclude(None)), QUICK))


def assert_devices_agree(name, axis_name):
    quick = name in QUICK
    updates, counts = with_nan_on_one_device(axis_name, quick)[name]
    expected, expected_counts = with_nan_on_one_device(None, quick, sharded=False)[name]
    assert_close(updates, expected)
    assert_close(counts, [np.repeat(count, 8, axis=0) for count in expected_counts])


@EXCLUDE
@pytest.mark.slow
def test_devices_agree_on_who_is_excluded(name):
    assert_devices_agree(name, AXES)
    assert np.isfinite(with_nan_on_one_device(AXES, name in QUICK)[name][0]).all()


@pytest.mark.slow
@EXCLUDE
def test_without_axis_name_devices_exclude_each_on_their_own(name):
    """Why `axis_name`: only one device sees the NaN."""
    with pytest.raises(AssertionError):
        assert_devices_agree(name, None)


def fork_over_batch(axis_name, check_vma=True):
    """Weights and gradients of a fork whose representation is split over the batch."""
    mesh = make_mesh("auto")
    method = mtl.multibalance(T, weight_lr=0.1, axis_name=axis_name)
    params = draw(3, MODEL_SHAPES)
    batch = draw(4, {"x": (ROWS, 6), "y": (ROWS, T)})
    state = method.init(encode(divide(params)[0], batch))

    def step(params, state, batch):
        def loss_fn(params, fork, batch):
            shared, heads = divide(params)
            return jax.lax.pmean(decode(heads, fork(encode(shared, batch)), batch), AXES)

        _, (grads, state) = mtl.fork_value_and_grad(loss_fn, method)(params, state, batch)
        return grads, state.weights

    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), P(), P(AXES)),
            out_specs=(P() if check_vma else P(AXES), P(AXES)),
            check_vma=check_vma,
        )
    ), (params, state, batch)


@pytest.mark.slow
def test_axis_name_sums_over_shards_of_the_representation():
    step, arguments = fork_over_batch(AXES)
    method = mtl.multibalance(T, weight_lr=0.1)
    expected, state = jax.jit(functools.partial(fork_step, method=method))(*arguments)
    grads, weights = step(*arguments)
    assert_close(grads, expected)
    np.testing.assert_allclose(weights, np.tile(state.weights, (8, 1)), rtol=1e-5)


@pytest.mark.slow
def test_without_axis_name_every_device_finds_weights_of_its_own():
    """Why `axis_name`: a Gram matrix of a part of the batch is another matrix."""
    step, arguments = fork_over_batch(AXES)
    expected = np.asarray(step(*arguments)[1])
    step, arguments = fork_over_batch(None, check_vma=False)
    weights = np.asarray(step(*arguments)[1])
    assert np.ptp(weights, axis=0).max() > 0.05
    assert np.abs(weights - expected).max() > 0.02


@pytest.mark.parametrize("kind", ["auto", "axis_name"])
def test_devices_exchange_the_gram_matrix_and_nothing_else(kind):
    mesh = make_mesh("auto")
    method = mtl.multibalance(T, axis_name=AXES if kind == "axis_name" else None)
    grads = jax.device_put(jnp.ones((T, 16, 3)), jax.NamedSharding(mesh, P(None, AXES)))
    state = method.init(jnp.zeros((16, 3)))
    update = method.update
    if kind == "axis_name":
        specs = P(None, AXES), P()
        update = jax.shard_map(update, mesh=mesh, in_specs=specs, out_specs=(P(AXES), P()))
    hlo = pytest.importorskip("examples.studies.benchmarks.hlo", reason="needs a checkout")
    found = hlo.collectives(jax.jit(update).lower(grads, state).compile().as_text())
    assert [c.kind for c in found] == ["all-reduce"]
    assert found[0].numbers <= T * T


# --- accumulation -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradient_accumulation_by_microbatching_is_exact():
    params = draw(3, MODEL_SHAPES)
    batch = draw(4, {"x": (ROWS, 6), "y": (ROWS, T)})
    method = ON_GRADIENTS["multibalance"]
    state = method.init(params)

    def loss_fn(params, batch):
        shared, heads = divide(params)
        return decode(heads, [encode(shared, batch)] * T, batch)

    whole = mtl.per_task_value_and_grad(loss_fn, mode="vmap")
    mean = optax.microbatching.AccumulationType.MEAN
    parts = optax.microbatching.microbatch(whole, 1, ROWS // 4, mean)

    @jax.jit
    def both(params, batch):
        results = [value_and_grad(params, batch) for value_and_grad in (whole, parts)]
        return [method.update(grads, state, params, losses=losses) for losses, grads in results]

    at_once, accumulated = both(params, batch)
    chex.assert_trees_all_close(accumulated, at_once, rtol=2e-5, atol=2e-6)


# --- shard_map -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_a_device_under_shard_map(family):
    """Loops inside `shard_map` must start from the types that they end with."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AXIS_TYPES["auto"],))
    grads = jax.random.normal(jax.random.key(0), (8, T, 5))
    losses = jnp.linspace(0.5, 2.0, 8 * T).reshape(8, T)
    for row in mtl.METHODS.values():
        if row.family != family:
            continue
        tx = make(row.name, T)

        def one(grads, state, losses, tx=tx):
            alone = jax.tree.map(lambda x: x[0], (grads, state, losses))
            result = tx.update(*alone[:2], jnp.zeros(5), losses=alone[2])
            return jax.tree.map(lambda x: x[None], result)

        states = jax.tree.map(lambda x: jnp.stack([x] * 8), tx.init(jnp.zeros(5)))
        mapped = jax.shard_map(one, mesh=mesh, in_specs=P("model"), out_specs=P("model"))
        update, _ = jax.eval_shape(mapped, grads, states, losses)
        assert update.shape == (8, 5)


@pytest.mark.parametrize(
    ("form", "mode"),
    sampled(
        itertools.product([jnp.stack, tuple], ["vmap", "unroll", "map"]),
        [(jnp.stack, "vmap"), (tuple, "map")],
    ),
)
def test_local_losses_inside_shard_map(mode, form):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AXIS_TYPES["auto"],))
    w, x = jnp.ones((3, 2)), jax.random.normal(jax.random.key(0), (16, 3))

    def losses_of(w, x):
        h = jnp.tanh(x @ w)
        return form([jnp.mean(h**2), jnp.mean(h - 1)])

    def local(w, x):
        w = w + jnp.zeros_like(x[0, 0])  # from here on each device has its own
        losses, grads = mtl.per_task_value_and_grad(losses_of, mode=mode)(w, x)
        return jax.lax.pmean((losses, grads), "data")

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    expected = mtl.per_task_value_and_grad(losses_of)(w, x)
    chex.assert_trees_all_close(run(w, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("broken", sampled([False, True], [True]))
@pytest.mark.parametrize(
    ("factory", "mode"),
    sampled(
        itertools.product([mtl.inverse_norm, mtl.upgrad], ["auto", "products"]),
        [(mtl.inverse_norm, "auto")],
    ),
)
def test_weighted_gradients_inside_shard_map(broken, mode, factory):
    """Steps with new weights and with old ones, of one pass and of T, equal those on one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AXIS_TYPES["auto"],))
    w, x = jnp.ones((3, 2)), jax.random.normal(jax.random.key(0), (16, 3))
    method = factory(2, update_every=2)

    def two_steps(w, x, mean):
        def losses_of(w):
            h = jnp.tanh(x @ w)
            a, b = mean((jnp.mean(h**2), jnp.mean(h - 1)))
            return a, jnp.sqrt(0.0 * b) if broken else b

        fn = mtl.weighted_value_and_grad(losses_of, method, mode=mode)
        state = method.init(w)
        for _ in range(2):
            losses, (update, state) = fn(w, state)
        return losses, update, state

    sharded = jax.shard_map(
        lambda w, x: two_steps(w, x, lambda losses: jax.lax.pmean(losses, "data")),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    got = jax.jit(sharded)(w, x)
    expected = jax.jit(lambda w, x: two_steps(w, x, lambda losses: losses))(w, x)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    assert got[2].skipped.tolist() == [0, 2 * broken] and bool(jnp.any(got[1] != 0))


@pytest.mark.parametrize("check_vma", sampled([True, False], [True]))
@pytest.mark.parametrize(
    "total", sampled([True, False], [True]), ids=["losses of all", "losses of each device"]
)
def test_products_of_parameters_in_parts(total, check_vma):
    """Each device has a part of the parameters; its losses are summed over all, or are its own part."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AXIS_TYPES["auto"],))
    w = jax.random.normal(jax.random.key(0), (16, 3))

    def losses_of(w, add):
        a, b = (jnp.sin(w) ** 2).sum(), (jnp.cos(3 * w) - w).sum()
        return add(a), add(b)

    def step(w, mode, add=lambda x: x, axis_name=None):
        method = mtl.modo(2, axis_name=axis_name)
        fn = mtl.weighted_value_and_grad(lambda w: losses_of(w, add), method, mode=mode)
        _, (update, state) = fn(w, method.init(w))
        return update, state.weights, state.cosine[0]

    def sharded(mode):
        add = (lambda x: jax.lax.psum(x, "model")) if total else (lambda x: x)
        parts = jax.shard_map(
            lambda w: step(w, mode, add, "model"),
            mesh=mesh,
            in_specs=P("model"),
            out_specs=(
                P("model"),
                P("model"),
                P("model"),
            ),  # losses of a device may make a task inactive
            check_vma=check_vma,
        )
        return jax.jit(parts)(w)

    got = sharded("products")
    chex.assert_trees_all_close(got, sharded("auto"), rtol=1e-5, atol=1e-6)
    if check_vma or not total:
        update, weights, _ = jax.jit(step, static_argnums=1)(w, "auto")
        chex.assert_trees_all_close(got[0], update, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(got[1], jnp.tile(weights, (8, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sampled(AXIS_TYPES, ["explicit"]))
def test_products_on_a_mesh(kind):
    mesh = make_mesh(kind)
    w, x = jnp.ones((8, 6)) / 8, jax.random.normal(jax.random.key(0), (16, 8))

    def losses_of(w, x):
        h = jnp.tanh((x[:, :, None] * w[None]).sum(1))
        return (h**2).mean(), (h - 1).mean(), jnp.sqrt(0.0 * h.sum())

    method = mtl.upgrad(3)

    def step(w, state, x, mode):
        return mtl.weighted_value_and_grad(losses_of, method, mode=mode)(w, state, x)[1]

    expected = jax.jit(step, static_argnums=3)(w, method.init(w), x, "auto")
    placed = place({"w": w, "x": x}, {"w": P(None, "model"), "x": P("data", None)}, mesh)
    with jax.set_mesh(mesh):
        update, state = jax.jit(step, static_argnums=3)(
            placed["w"], method.init(placed["w"]), placed["x"], "products"
        )
    assert update.sharding.spec == P(None, "model") and state.skipped.tolist() == [0, 0, 1]
    got = jax.tree.map(np.asarray, (update, state.weights))
    chex.assert_trees_all_close(got, (expected[0], expected[1].weights), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_accumulate_on_an_explicit_mesh():
    mesh = make_mesh("explicit")
    params = place({"w": jnp.ones((8, 6))}, {"w": P("data", "model")}, mesh)
    grads = place({"w": jnp.ones((T, 8, 6))}, {"w": P(None, "data", "model")}, mesh)
    tx = mtl.accumulate(optax.chain(mtl.mgda(T), optax.sgd(1.0)), T, 2)
    with jax.set_mesh(mesh):
        step = jax.jit(tx.update)
        update, state = step(grads, tx.init(params), params)
        assert not np.any(update["w"])
        update, _ = step(grads, state, params)
    assert update["w"].sharding.spec == P("data", "model")
    np.testing.assert_allclose(update["w"], -1, 1e-6)
