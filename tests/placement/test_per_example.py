"""`weighted_value_and_grad(mode="examples")`: the same as with the stacked gradients of all examples."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from method_properties import make
from sampling import sampled

import mtl_optax as mtl
from mtl_optax.placement.factors import ExampleGradients, Factors
from mtl_optax.placement.per_example import gradients_in_factors, loss_of_example

B, POSITIONS, WIDTH, ROWS = 6, 5, 8, 7


def normal(seed, *shape):
    return 0.5 * jax.random.normal(jax.random.key(seed), shape)


X, SEQUENCE, TARGET = normal(0, B, WIDTH), normal(1, B, POSITIONS, WIDTH), normal(2, B)
# One example looks up the same row twice.
IDS = jax.random.randint(jax.random.key(3), (B, POSITIONS), 0, ROWS).at[0].set(2)
W = {name: normal(4 + n, WIDTH, WIDTH) for n, name in enumerate("qkvo")}


# --- models: the parameters, the losses of a batch, and the leaves that have no factors -----------------


def dense(p, x, y):
    h = jnp.tanh(x @ p["hidden"] + p["bias"][None])
    return (h @ p["out"] - y) ** 2


def attention(p, x):
    q, k, v = (x @ p[name] for name in "qkv")
    weights = jax.nn.softmax(q @ k.mT / WIDTH**0.5)
    h = x + (weights @ v) @ p["o"]
    centred = h - h.mean(-1, keepdims=True)
    return ((centred * p["scale"][None, None]) ** 3).sum((1, 2))


def heads(p, x):
    h = jnp.einsum("bsd,dhk->bhsk", x, p["in"])
    return jnp.sum(jnp.tanh(jnp.einsum("bhsk,hkd->bsd", jnp.sin(h), p["out"])), (1, 2))


def experts(p, x):
    return jnp.sum(jnp.tanh(jnp.einsum("bd,edf->bef", x, p["experts"])) ** 2, (1, 2))


def lookup(p, ids):
    return jnp.sum(jnp.tanh(p["table"][ids] @ p["dense"]) ** 2, (1, 2))


def take(p, ids):
    """As `nnx.Embed`: rows out of range are NaN, here zero, and have no gradient."""
    return jnp.sum(jnp.tanh(jnp.take(p["table"], 2 * ids, axis=0, fill_value=0) + 1.0) ** 2, (1, 2))


def clipped(p, ids):
    return jnp.sum(jnp.take(p["table"], 2 * ids, axis=0, mode="clip") ** 3, (1, 2))


def tied(p, ids):
    h = jnp.tanh(p["table"][ids] @ p["dense"])
    logits = jax.nn.log_softmax(h @ p["table"].T)
    return -jnp.take_along_axis(logits, ids[..., None], 2).sum((1, 2))


def convolution(p, x):
    h = jax.lax.conv_general_dilated(
        x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.sum(jnp.tanh(h) ** 2, (1, 2))


def used_twice(p, x):
    """Once as it is and once transposed, and once inside a function of its own."""
    h = jax.jit(lambda w, x: jnp.tanh(x @ w))(p["dense"], x)
    return jnp.sum(jnp.sin(jnp.tanh(h @ p["dense"]) @ p["dense"].T) ** 2, 1)


def checkpointed(p, x):
    f = jax.checkpoint(lambda x: jnp.tanh(jax.nn.relu(x @ p["first"]) @ p["last"]))
    return jnp.sum(f(x) ** 2, 1)


def layers(p, x):
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    return jnp.sum(jax.lax.scan(layer, x, p["layers"])[0] ** 2, 1)


def recurrent(p, x):
    def cell(h, x):
        return jnp.tanh(h @ p["state"] + x @ p["input"]), None

    start = jnp.zeros((x.shape[0], WIDTH))
    return jnp.sum(jax.lax.scan(cell, start, jnp.moveaxis(x, 1, 0))[0] ** 2, 1)


def with_custom_vjp(p, x):
    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, g: (g * cos,))
    return jnp.sum(sine(x @ p["dense"]), 1)


def physics(p, x):
    """The residual of u_t + u u_x = u_xx at points, with second derivatives of the network.

    The directions of the derivatives are the same at all points, and so have no axis of examples.
    """

    def u(x):
        return jnp.tanh(jnp.tanh(x @ p["first"] + p["bias"]) @ p["hidden"]) @ p["last"]

    def residual(x):
        gradient, hessian = jax.grad(u)(x), jax.hessian(u)(x)
        return (gradient[0] + u(x) * gradient[1] - hessian[1, 1]) ** 2

    return jax.vmap(residual)(x)


KERNEL = normal(9, WIDTH, WIDTH)
TABLE = {"table": normal(10, ROWS, WIDTH), "dense": KERNEL}
MODELS = {
    "dense": (
        {"hidden": KERNEL, "bias": normal(11, WIDTH), "out": normal(12, WIDTH)},
        dense,
        (X, TARGET),
        {"bias", "out"},  # whose factor is as large as its gradient
    ),
    "attention": (W | {"scale": normal(13, WIDTH)}, attention, (SEQUENCE,), {"scale"}),
    "heads": (
        {"in": normal(14, WIDTH, 2, 3), "out": normal(15, 2, 3, WIDTH)},
        heads,
        (SEQUENCE,),
        set(),
    ),
    "experts": ({"experts": normal(16, 3, WIDTH, 4)}, experts, (X,), set()),
    "lookup": (TABLE, lookup, (IDS,), set()),
    "lookup of one": (TABLE, lookup, (IDS[:, :1],), set()),
    "out of range": (TABLE, take, (IDS,), {"dense"}),
    "clipped": (TABLE, clipped, (IDS,), {"dense", "table"}),
    "tied": (TABLE, tied, (IDS,), set()),
    "convolution": ({"kernel": normal(17, 3, WIDTH, 4)}, convolution, (SEQUENCE,), {"kernel"}),
    "used twice": ({"dense": KERNEL}, used_twice, (X,), set()),
    "checkpoint": ({"first": KERNEL, "last": W["q"]}, checkpointed, (X,), set()),
    "layers": ({"layers": normal(18, 3, WIDTH, WIDTH)}, layers, (X,), {"layers"}),
    "recurrent": ({"state": KERNEL, "input": W["q"]}, recurrent, (SEQUENCE,), {"state", "input"}),
    "custom_vjp": ({"dense": KERNEL}, with_custom_vjp, (X,), set()),
    "physics": (
        {
            "first": normal(19, 2, WIDTH),
            "bias": normal(20, WIDTH),
            "hidden": KERNEL,
            "last": normal(21, WIDTH),
        },
        physics,
        (normal(22, B, 2),),
        {"first", "bias", "last"},
    ),
}


def step(method, mode, params, loss_fn, batch, steps=1, active=None, **options):
    """The update and the state after some steps with the same parameters."""
    fn = jax.jit(mtl.weighted_value_and_grad(loss_fn, method, mode=mode, **options))
    state = method.init(params)
    for _ in range(steps):
        losses, (update, state) = fn(params, state, *batch, active=active)
    return losses, update, state


def assert_equal(method, params, loss_fn, batch, rtol=1e-5, **options):
    stacked, examples = (
        step(method, mode, params, loss_fn, batch, **options) for mode in ("vmap", "examples")
    )
    # Of sums over positions, of which large terms may cancel.
    close = {"rtol": rtol, "atol": 0.1 * rtol}
    chex.assert_trees_all_close(examples[:2], stacked[:2], **close)
    for name in ("weights", "norms", "cosine"):
        chex.assert_trees_all_close(getattr(examples[2], name), getattr(stacked[2], name), **close)
    assert examples[2].skipped.tolist() == stacked[2].skipped.tolist()
    return examples


# --- every kind of parameter ----------------------------------------------------------------------------


QUICK = ("lookup", "layers")


@pytest.mark.parametrize("model", sampled(MODELS, QUICK))
def test_a_gram_method_gives_what_it_gives_on_stacked_gradients(model):
    assert_equal(mtl.modo(B), *MODELS[model][:3])


@pytest.mark.parametrize("model", sampled([*QUICK, "convolution"], ["convolution"]))
def test_a_method_on_norms_gives_what_it_gives_on_stacked_gradients(model):
    assert_equal(mtl.inverse_norm(B), *MODELS[model][:3])


@pytest.mark.parametrize("model", sampled(MODELS, ["out of range", "recurrent", *QUICK]))
def test_which_gradients_are_held(model):
    params, loss_fn, batch, expected = MODELS[model]
    of_example = loss_of_example(loss_fn, has_aux=False)
    _, _, factors = gradients_in_factors(of_example, params, (batch, {}))
    held = {
        name
        for (name, leaf), found in zip(sorted(params.items()), factors, strict=True)
        if not found.is_table and found.right.shape == (B, 1, leaf.size)
    }
    assert held == expected


@pytest.mark.slow
def test_a_transformer_block_of_flax():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(ROWS, WIDTH, rngs=rngs)
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
            self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
            self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            x = x + self.attention(self.norm(x))
            return self.embed.attend(x + self.down(nnx.gelu(self.up(x))))

    graph, params, rest = nnx.split(Block(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, ids):
        logits = nnx.merge(graph, params, rest)(ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean(1)

    assert_equal(mtl.modo(B), params, loss_fn, (IDS,))


# --- examples that are absent or not finite -------------------------------------------------------------

DENSE = MODELS["dense"][:3]
BROKEN = (X.at[1].set(jnp.inf).at[4].set(jnp.nan), TARGET)


@pytest.mark.parametrize(
    ("name", "every"),
    sampled(
        itertools.product(["modo", "inverse_norm", "sum_tasks"], [1, 2]),
        [("inverse_norm", 1)],
    ),
)
def test_examples_that_are_not_finite_are_left_out_and_counted(name, every):
    method = make(name, B, update_every=every)
    _, update, state = step(method, "examples", *DENSE[:2], BROKEN, steps=2)
    assert state.skipped.tolist() == [0, 2, 0, 0, 2, 0]
    active = jnp.array([True, False, True, True, False, True])
    _, expected, present = step(method, "vmap", *DENSE, steps=2, active=active)
    chex.assert_trees_all_close(update, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.weights, present.weights, rtol=1e-5)


@pytest.mark.slow
def test_absent_examples_have_no_weight_and_are_not_counted():
    active = jnp.arange(B) != 2
    _, _, state = assert_equal(mtl.modo(B), *DENSE, active=active)
    assert state.weights[0, 2] == 0 and not state.skipped.any()


def test_an_example_whose_derivative_alone_is_not_finite():
    def loss_fn(p, x):
        return jnp.sqrt(jnp.abs(x * p["w"][None])).sum(1)

    params, batch = {"w": jnp.ones(2)}, jnp.array([[1.0, 4.0], [0.0, 1.0], [9.0, 1.0]])
    losses, update, state = step(mtl.sum_tasks(3), "examples", params, loss_fn, (batch,))
    assert jnp.isfinite(losses).all() and state.skipped.tolist() == [0, 1, 0]
    np.testing.assert_allclose(update["w"], [2.0, 1.5], rtol=1e-6)


# --- the arguments of weighted_value_and_grad ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "every"),
    sampled(itertools.product(["modo", "inverse_norm"], [1, 3]), [("modo", 3)]),
)
def test_chosen_leaves_and_kept_weights(name, every):
    chosen = {"hidden": True, "bias": False, "out": True}
    assert_equal(make(name, B, update_every=every), *DENSE, steps=3, weights_from=chosen)


@pytest.mark.slow
def test_auxiliary_data_and_keyword_arguments():
    def loss_fn(p, x, *, y):
        return dense(p, x, y), {"twice": 2 * y}

    params, method = DENSE[0], mtl.modo(B)
    fn = mtl.weighted_value_and_grad(loss_fn, method, has_aux=True, mode="examples")
    (losses, aux), (update, _) = fn(params, method.init(params), X, y=TARGET)
    assert losses.shape == (B,)
    np.testing.assert_allclose(aux["twice"].ravel(), 2 * TARGET)
    _, expected, _ = step(method, "examples", *DENSE)
    chex.assert_trees_all_close(update, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_random_key_for_each_example():
    def loss_fn(p, x, keys):
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (WIDTH,)))(keys)
        return dense(p, jnp.where(keep, x, 0), TARGET[:1])

    batch = (X, jax.random.split(jax.random.key(0), B))
    assert_equal(mtl.modo(B), DENSE[0], loss_fn, batch)


def test_bfloat16_leaves():
    params, loss_fn, batch = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if isinstance(x, jax.Array) else x, DENSE
    )
    # Of the stacked gradients, each is rounded to 8 bits.
    _, update, _ = assert_equal(mtl.inverse_norm(B), params, loss_fn, batch, rtol=2e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype(jnp.bfloat16)}


def test_float32_parameters_computed_in_bfloat16():
    params, loss_fn, batch = MODELS["attention"][:3]
    low = lambda p, x: loss_fn(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), x)  # noqa: E731
    _, update, _ = assert_equal(mtl.inverse_norm(B), params, low, batch, rtol=3e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_double_precision():
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), (MODELS["attention"][0], SEQUENCE))
    assert_equal(mtl.modo(B), wide[0], attention, wide[1:], rtol=1e-12)


@pytest.mark.slow
def test_a_batch_that_is_divided_over_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, loss_fn, batch = MODELS["attention"][:3]
    placed = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    method = mtl.modo(B)
    _, expected, _ = step(method, "examples", params, loss_fn, batch)
    _, update, _ = step(method, "examples", params, loss_fn, placed)
    chex.assert_trees_all_close(update, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_in_which_examples_mix_is_that_of_a_batch_of_one():
    """Batch statistics are those of one example: its own deviation from them is 0."""

    def loss_fn(p, x):
        return ((x - x.mean(0, keepdims=True)) @ p["hidden"]).sum(1) ** 2

    params = {"hidden": KERNEL}
    losses, update, _ = step(mtl.sum_tasks(B), "examples", params, loss_fn, (X,))
    assert not losses.any() and not update["hidden"].any()


@pytest.mark.parametrize(
    ("loss_fn", "batch", "found"),
    [
        (dense, (X, TARGET[0]), r"found shape \(\) at \['args'\]\[1\]"),
        (dense, (X[1:], TARGET), rf"found shape \({B - 1}, {WIDTH}\)"),
        (lambda p: dense(p, X, TARGET), (), "found no arrays"),
        (
            lambda p, x: dense(p, X, TARGET),
            (X,),
            rf"for a batch of one example it returned \({B},\)",
        ),
        (lambda p, x: {"a": x.sum()}, (X,), "it returned 1 scalar"),
    ],
)
def test_arguments_that_are_no_examples_are_refused(loss_fn, batch, found):
    with pytest.raises(ValueError, match=found):
        step(mtl.modo(B), "examples", DENSE[0], loss_fn, batch)


def test_a_shard_map_inside_the_loss_is_refused_with_the_other_mode():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = jax.P(None, "model")

    def loss_fn(p, x):
        product = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(jax.P(), columns), out_specs=columns)
        return (product(x, p["dense"]) ** 2).sum(1)

    with pytest.raises(ValueError, match=r'shard_map inside loss_fn.*mode="products"'):
        step(mtl.inverse_norm(B), "examples", {"dense": KERNEL}, loss_fn, (X,))


# --- memory and the ways to a Gram matrix -----------------------------------------------------------------


def test_no_gradient_of_an_example_is_in_memory():
    number, width = 32, 128
    params, method = {"dense": normal(0, width, width)}, mtl.inverse_norm(number)
    fn = mtl.weighted_value_and_grad(used_twice, method, mode="examples")
    arguments = params, method.init(params), normal(2, number, width)
    used = jax.jit(fn).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert used < number * params["dense"].nbytes / 8


@pytest.mark.parametrize(
    ("shape", "is_table"),
    sampled(
        itertools.product(
            [(6, 1, 9, 5), (2, 7, 3, 4), (5, 4, 9, 3), (3, 5, 2, 0), (2, 0, 3, 2)], [False, True]
        ),
        [((6, 1, 9, 5), True), ((2, 7, 3, 4), False)],
    ),
)
def test_every_way_to_a_gram_matrix(shape, is_table):
    """Few and many positions, whose ways differ, and no column and no position."""
    examples, positions, rows, columns = shape
    left = normal(0, examples, positions, rows)
    numbers = jax.random.randint(jax.random.key(1), left.shape[:2], 0, rows)
    right = normal(2, examples, positions, columns)
    left = numbers if is_table else left
    got = ExampleGradients([Factors(left, right, (rows,), (columns,), (1, 0))], None)
    one_hot = np.asarray(jax.nn.one_hot(numbers, rows) if is_table else left, np.float64)
    gradients = np.einsum("bpm,bpn->bnm", one_hot, np.asarray(right, np.float64))
    flat, weights = gradients.reshape(examples, rows * columns), np.linspace(-1, 2, examples)
    everyone = jnp.ones(examples, bool)

    @jax.jit
    def all_ways(weights):
        (total,), _ = got.weighted_sum(weights, everyone, [True])
        return got.gram_matrix([True], jnp.float32), got.squared_norms([True]), total

    expected = flat @ flat.T, np.sum(flat**2, 1), np.tensordot(weights, gradients, 1)
    for found, want in zip(all_ways(weights.astype(np.float32)), expected, strict=True):
        # Sums of a few dozen products in float32.
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
