"""`weighted_value_and_grad(mode="products")`: the same as with T gradients, of which none is held."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_properties import make
from sampling import sampled

import mtl_optax as mtl
from mtl_optax.core.rule import WeightRule

T = 3
BY_WEIGHTS = [
    row.name
    for row in mtl.METHODS.values()
    if isinstance(rule := make(row.name, T).rule, WeightRule) and rule.average is None
]
KEYS = jax.random.split(jax.random.key(0), 5)
PARAMS = {
    "table": 0.5 * jax.random.normal(KEYS[0], (6, 4)),
    "dense": 0.5 * jax.random.normal(KEYS[1], (4, 4)),
    "heads": jax.random.normal(KEYS[2], (T, 4)),
}
IDS, TARGETS = jnp.array([0, 1, 1, 5, 2]), jnp.array([1.0, -2.0, 0.5])
DENSE = {"table": False, "dense": True, "heads": False}


def losses_of(params, scale=(1.0,) * T):
    """One scalar per task; a scale of 0 stands for an empty batch, whose mean is 0/0."""
    h = jnp.tanh(params["table"][IDS] @ params["dense"])
    errors = [(h @ head - y) ** 2 for head, y in zip(params["heads"], TARGETS, strict=True)]
    return tuple(e.sum() * s / s / e.size for e, s in zip(errors, scale, strict=True))


def array_of(params, scale=(1.0,) * T):
    return jnp.stack(losses_of(params, scale))


def run(method, mode, scales=((1.0,) * T,) * 2, loss_fn=losses_of, params=PARAMS, **options):
    """The last update and state, one step for every row of `scales`."""
    active = options.pop("active", None)
    fn = jax.jit(mtl.weighted_value_and_grad(loss_fn, method, mode=mode, **options))
    state = method.init(params)
    for scale in jnp.asarray(scales):
        _, (update, state) = fn(params, state, scale, active=active)
    return update, state


def assert_equal(method, rtol=1e-5, **options):
    stacked, products = (run(method, mode, **options) for mode in ("auto", "products"))
    chex.assert_trees_all_close(products[0], stacked[0], rtol=rtol, atol=rtol * 0.1)
    for name in ("weights", "norms"):
        got, want = getattr(products[1], name), getattr(stacked[1], name)
        chex.assert_trees_all_close(got, want, rtol=rtol, atol=rtol * 0.1)
    assert products[1].skipped.tolist() == stacked[1].skipped.tolist()
    return products


# --- every rule --------------------------------------------------------------------------------------


# One that needs norms, one that needs losses and one that needs products.
SAMPLE = ("inverse_norm", "scale_invariant", "modo")


@pytest.mark.parametrize("name", sampled(BY_WEIGHTS, SAMPLE))
def test_updates_are_those_of_stacked_gradients(name):
    assert_equal(make(name, T, blocks="all"))


@pytest.mark.parametrize("name", sampled(["modo", "inverse_norm"], ["inverse_norm"]))
@pytest.mark.parametrize("every", sampled([1, 2], [2]))
@pytest.mark.parametrize("chosen", [DENSE, pytest.param(None, marks=pytest.mark.slow)])
def test_chosen_leaves_and_kept_weights(name, every, chosen):
    method = make(name, T, update_every=every)
    assert_equal(method, weights_from=chosen, scales=[(1.0, 1.0, 1.0)] * 3)


@pytest.mark.parametrize("name", sampled(["modo", "inverse_norm"], ["modo"]))
def test_an_array_of_losses(name):
    assert_equal(make(name, T), loss_fn=array_of)


def test_losses_that_do_not_meet_a_leaf_at_all():
    def separate(params, scale):
        return tuple((leaf**2).sum() for leaf in jax.tree.leaves(params))

    assert_equal(mtl.modo(T), loss_fn=separate)


# --- absent and broken tasks -------------------------------------------------------------------------

EMPTY = (1.0, 0.0, 1.0)
WITHOUT_ONE = jnp.array([True, False, True])


@pytest.mark.parametrize("name", sampled(["modo", "inverse_norm", "sum_tasks"], ["modo"]))
@pytest.mark.parametrize("every", sampled([1, 2], [2]))
@pytest.mark.parametrize("active", [None, pytest.param(WITHOUT_ONE, marks=pytest.mark.slow)])
def test_a_task_that_is_not_finite_leaves_the_others_training(name, every, active):
    method = make(name, T, update_every=every)
    update, state = assert_equal(method, scales=[EMPTY] * 2, active=active)
    assert state.skipped.tolist() == [0, 2 * (active is None), 0]
    expected, _ = run(method, "products", active=WITHOUT_ONE)
    chex.assert_trees_all_close(update, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_task_that_breaks_on_a_step_between_is_left_out_and_counted():
    _, state = assert_equal(mtl.modo(T, update_every=3), scales=[(1.0,) * T, EMPTY])
    assert state.skipped.tolist() == [0, 1, 0]


def test_a_task_that_is_broken_outside_the_chosen_leaves_is_left_out_of_all():
    def loss_fn(params, scale):
        a, b = params["dense"] ** 2, params["dense"] * 3
        return a + params["table"].sum(), b + jnp.sqrt(0.0 * params["table"].sum())

    params, chosen = (
        {"dense": jnp.asarray(2.0), "table": jnp.ones(3)},
        {"dense": True, "table": False},
    )
    update, state = run(
        mtl.sum_tasks(2), "products", loss_fn=loss_fn, params=params, weights_from=chosen
    )
    assert update["dense"] == 4.0 and update["table"].tolist() == [1.0] * 3
    assert state.skipped.tolist() == [0, 2]


@pytest.mark.slow
def test_an_array_of_losses_skips_all_tasks():
    def loss_fn(params, scale):  # no final jnp.stack, whose losses the other modes keep apart
        return 2 * array_of(params, scale)

    update, state = assert_equal(mtl.modo(T), loss_fn=loss_fn, scales=[EMPTY])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(update))
    assert state.skipped.tolist() == [1, 1, 1]


def test_a_product_that_overflows_makes_no_weight_nan():
    """In float16 both norms are finite and their product is not."""

    def loss_fn(params, scale):
        half = params.astype(jnp.float16).sum()
        return half * 300, half * 400

    update, state = run(mtl.modo(2), "products", loss_fn=loss_fn, params=jnp.ones(4))
    assert np.isfinite(update).all() and np.isfinite(state.weights).all()
    assert state.skipped.tolist() == [2, 2]


# --- arithmetic --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_models_have_norms_in_float32():
    """Norms are exact up to float32; cosines have the three digits of the model's arithmetic."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    method = mtl.modo(T)
    scales = jnp.ones((1, T), jnp.bfloat16)
    stacked, products = (
        run(method, mode, params=params, scales=scales)[1] for mode in ("map", "products")
    )
    assert products.norms.dtype == products.cosine.dtype == jnp.float32
    np.testing.assert_allclose(products.norms, stacked.norms, 1e-5)
    np.testing.assert_allclose(products.cosine, stacked.cosine, rtol=0, atol=0.02)


# --- memory ------------------------------------------------------------------------------------------


def temporary_bytes(mode, num_tasks, **options):
    width, layers = 128, 6
    params = {"layers": jnp.ones((width, width)), "heads": jnp.ones((num_tasks, width))}
    params["layers"] = [params["layers"]] * layers

    def loss_fn(params, x):
        for w in params["layers"]:
            x = jnp.tanh(x @ w)
        return tuple(jnp.mean((x @ head) ** 2) for head in params["heads"])

    method = mtl.modo(num_tasks, **options)
    fn = mtl.weighted_value_and_grad(loss_fn, method, mode=mode)
    state, x = jax.eval_shape(method.init, params), jnp.ones((8, width))
    memory = jax.jit(fn).lower(params, state, x).compile().memory_analysis()
    leaves = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    return memory.temp_size_in_bytes, sum(leaves) + max(leaves)


@pytest.mark.slow
@pytest.mark.parametrize("every", sampled([1, 2], [1]))
def test_memory_does_not_grow_with_the_number_of_tasks(every):
    few, most = temporary_bytes("products", 2, update_every=every)
    many, _ = temporary_bytes("products", 8, update_every=every)
    stacked, _ = temporary_bytes("map", 8, update_every=every)
    assert many <= most and many < 1.1 * few
    assert stacked > 8 * many


# --- models with a backward pass of their own --------------------------------------------------------


def with_attention(attention):
    def loss_fn(params, scale):
        h = params["table"][IDS] @ params["dense"]
        h = jnp.tanh(attention(h, h, h))
        return tuple(((h @ params["heads"][t] - TARGETS[t]) ** 2).mean() for t in range(T))

    return loss_fn


def flash_attention(in_backward):
    """Attention that makes its probabilities anew on the way back."""

    @jax.custom_vjp
    def attention(q, k, v):
        return jax.nn.softmax(q @ k.T) @ v

    def forward(q, k, v):
        scores = q @ k.T
        normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        output = jnp.exp(scores - normaliser) @ v
        return output, (q, k, v, normaliser, output)

    def backward(kept, cotangent):
        q, k, v, normaliser, output = kept
        cotangent = in_backward(cotangent)
        p = jnp.exp(q @ k.T - normaliser)
        dot = (cotangent * output).sum(axis=-1, keepdims=True)
        ds = p * (cotangent @ v.T - dot)
        return ds @ k, ds.T @ q, p.T @ cotangent

    attention.defvjp(forward, backward)
    return attention


@pytest.mark.slow
def test_a_custom_vjp_whose_backward_pass_can_be_transposed():
    assert_equal(mtl.modo(T), loss_fn=with_attention(flash_attention(lambda g: g)))


def clip(g):
    return jnp.clip(g, -1.0, 1.0)


def normalise(g):
    return g / jnp.linalg.norm(g)


def in_numpy(g):
    return jax.pure_callback(lambda g: g, g, g)


@pytest.mark.parametrize("rule", sampled([clip, normalise, in_numpy], [normalise]))
def test_another_custom_vjp_is_refused_with_the_other_mode(rule):
    loss_fn = with_attention(flash_attention(rule))
    with pytest.raises(TypeError, match=r'custom_vjp.*mode="map"'):
        run(mtl.modo(T), "products", loss_fn=loss_fn)
    # Norms alone take no forward pass.
    run(mtl.inverse_norm(T), "products", loss_fn=loss_fn)


# --- what "auto" chooses -----------------------------------------------------------------------------


def holds_gradients(mode, width, rule=lambda g: g, dtype=jnp.float32):
    """Whether the program for a dense layer `[8, width]`, which is not run, has T gradients of it."""

    @jax.custom_vjp
    def layer(h, w):
        return h @ w

    layer.defvjp(
        lambda h, w: (h @ w, (h, w)), lambda kept, g: (rule(g) @ kept[1].T, kept[0].T @ rule(g))
    )

    def loss_fn(params):
        h = layer(jnp.ones((2, 8), dtype), params["w"])
        return tuple((h * scale).sum() for scale in (1.0, 2.0, 3.0))

    params, method = {"w": jax.ShapeDtypeStruct((8, width), dtype)}, mtl.modo(T)
    fn = mtl.weighted_value_and_grad(loss_fn, method, mode=mode)
    program = jax.make_jaxpr(fn)(params, jax.eval_shape(method.init, params))
    return f"[{T},8,{width}]" in str(program)


MANY = 2**30 // (T * 8 * 4) + 1


@pytest.mark.parametrize(
    ("width", "options", "held"),
    [
        (MANY, {}, False),
        (MANY - 1, {}, True),
        (MANY, {"rule": clip}, True),
        pytest.param(2 * MANY, {"dtype": jnp.float16}, True, marks=pytest.mark.slow),
        pytest.param(2 * MANY, {"dtype": jnp.bfloat16}, False, marks=pytest.mark.slow),
    ],
    ids=["large", "small", "no transpose", "float16", "bfloat16"],
)
def test_auto_holds_no_large_gradients(width, options, held):
    assert holds_gradients("auto", width, **options) is held
    assert holds_gradients("map", width, **options)


def test_other_modes_and_blocks_are_refused():
    with pytest.raises(ValueError, match="products"):
        mtl.weighted_value_and_grad(losses_of, mtl.modo(T), mode="stacked")
    with pytest.raises(ValueError, match='blocks="all"'):
        mtl.weighted_value_and_grad(losses_of, mtl.modo(T, blocks="leaf"), mode="products")
    with pytest.raises(ValueError, match="mode"):
        mtl.per_task_value_and_grad(losses_of, mode="products")
