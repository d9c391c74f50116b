"""`fork_value_and_grad`: a method on the representation, with an ordinary state."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from method_properties import make
from optax.experimental import aggregating
from placement_problem import (
    BATCH,
    LIKE,
    METHODS,
    PLAIN,
    TASKS,
    WIDTH,
    Model,
    assert_close,
    descend,
    encode,
    explicit_step,
    forked_losses,
    head_losses,
    make_problem,
    plain_losses,
    products_of_the_bottom,
)
from sampling import sampled

import mtl_optax as mtl

NAMES = ("click", "cart", "buy")
ORDER = sorted(NAMES)


def fork_step(method, model=PLAIN):
    """`fn(params, state, batch, active=None) -> (losses, (grads, state))`."""
    return mtl.fork_value_and_grad(
        forked_losses(model), method, tasks=TASKS if method is METHODS["optax"] else None
    )


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


# --- the same numbers as the computation written out -------------------------------------------------


QUICK = ["metabalance", "optax"]


@pytest.mark.parametrize("name", sampled(METHODS, QUICK))
def test_equals_the_explicit_computation(name):
    method = METHODS[name]
    params, batch = make_problem()
    state = expected_state = method.init(jnp.zeros(LIKE.shape))
    step = jax.jit(fork_step(method))
    for _ in range(3):
        expected, expected_state = explicit_step(method, params, expected_state, batch)
        losses, (grads, new) = step(params, state, batch)
        assert_close(losses, plain_losses(params, batch))
        assert_close(grads, expected)
        assert_close(new, expected_state)
        assert types(new) == types(state)
        params, state = descend(params, grads), new


@pytest.mark.parametrize("name", sampled(METHODS, ["metabalance"]))
def test_equals_fork_and_join(name):
    method = METHODS[name]
    params, batch = make_problem()
    active = jnp.asarray([True, False, True])

    def joined(params, carrier):
        x, y = batch
        copies, token = mtl.fork(method, carrier, encode(params["shared"], x), tasks=TASKS)
        losses = head_losses(params["heads"], copies, y)
        return mtl.join(losses, token, active=active), losses

    state, carrier = method.init(jnp.zeros(LIKE.shape)), mtl.fork_init(method, LIKE)
    both = jax.jit(
        lambda params, state, carrier: (
            fork_step(method)(params, state, batch, active=active),
            jax.grad(joined, argnums=(0, 1), has_aux=True)(params, carrier),
        )
    )
    for _ in range(2):
        (losses, (grads, state)), (expected, expected_losses) = both(params, state, carrier)
        expected_grads, carrier = expected
        assert_close(losses, expected_losses)
        assert_close(grads, expected_grads)
        assert_close(state, mtl.fork_state(method, carrier, LIKE))
        params = descend(params, grads)


@pytest.mark.slow
def test_sum_tasks_is_the_plain_gradient():
    params, batch = make_problem()
    method = mtl.sum_tasks(TASKS)
    _, (grads, _) = fork_step(method)(params, method.init(LIKE), batch)
    assert_close(grads, jax.grad(lambda p: jnp.sum(plain_losses(p, batch)))(params))


def test_every_path_to_a_parameter_counts():
    """A weight that bottom and heads share, and a head that reads the representation past the fork."""
    method = mtl.multibalance(2)
    x = jax.random.normal(jax.random.key(0), (4, 3))

    def losses_of(w, h, copies):
        tied = jnp.mean((copies[0] @ w.T - x) ** 2)
        return jnp.stack([tied, jnp.sum(jnp.sin(copies[1]) * h)])

    def loss_fn(w, fork):
        h = jnp.tanh(x @ w)
        return losses_of(w, h, fork(h))

    w = jax.random.normal(jax.random.key(1), (3, 2))
    state = method.init(jnp.zeros((4, 2)))
    _, (grad, _) = jax.jit(mtl.fork_value_and_grad(loss_fn, method))(w, state)

    @jax.jit
    def expected(w):
        h, pull = jax.vjp(lambda w: jnp.tanh(x @ w), w)
        rows = jax.jacrev(lambda copy: losses_of(w, h, (copy, copy)))(h)
        past = lambda w, h: losses_of(w, h, (lax.stop_gradient(h),) * 2).sum()  # noqa: E731
        by_head, by_h = jax.grad(past, argnums=(0, 1))(w, h)
        update, _ = method.update(rows, state, h)
        return by_head + pull(update + by_h)[0]

    assert_close(grad, expected(w))


def with_penalty(params, fork, batch):
    """A loss of the bottom's activations that does not pass through the fork."""
    x, y = batch
    h = encode(params["shared"], x)
    losses = head_losses(params["heads"], fork(h), y)
    return losses.at[1].add(jnp.mean(h**4))


def test_a_loss_beside_the_fork_has_weight_1():
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    fn = jax.jit(mtl.fork_value_and_grad(with_penalty, method))
    losses, (grads, state) = fn(params, method.init(LIKE), batch)
    expected, expected_state = explicit_step(method, params, method.init(LIKE), batch)
    past = jax.grad(lambda shared: jnp.mean(encode(shared, batch[0]) ** 4))(params["shared"])
    assert_close(grads, {**expected, "shared": expected["shared"] + past})
    assert_close(state.norms, expected_state.norms)
    assert losses[1] > plain_losses(params, batch)[1]


@pytest.mark.slow
def test_each_task_has_inputs_of_its_own():
    """One representation of the concatenated batch, or one per task with one block: the same."""
    method, by_leaf = mtl.metabalance(2, blocks="all"), mtl.metabalance(2)
    inputs = jax.random.normal(jax.random.key(0), (2, BATCH, 3))
    w = jax.random.normal(jax.random.key(1), (3, WIDTH))

    def losses_of(first, second):
        return jnp.stack([jnp.mean(first**2), 30.0 * jnp.mean(jnp.sin(second))])

    def together(w, fork):
        first, second = fork(inputs.reshape(-1, 3) @ w)
        return losses_of(first[:BATCH], second[BATCH:])

    def apart(w, fork):
        first, second = fork((inputs[0] @ w, inputs[1] @ w))
        return losses_of(first[0], second[1])

    def step(loss_fn, method, like):
        return mtl.fork_value_and_grad(loss_fn, method)(w, method.init(like))[1][0]

    one, two = jnp.zeros((2 * BATCH, WIDTH)), (jnp.zeros((BATCH, WIDTH)),) * 2
    plain = jax.grad(lambda w: jnp.sum(losses_of(*(inputs @ w))))(w)
    balanced = step(together, method, one)
    assert_close(step(apart, method, two), balanced)
    assert not np.allclose(balanced, plain, rtol=0.1)
    assert_close(step(apart, by_leaf, two), plain)  # nothing is balanced, as the docstring warns


def test_a_bottom_without_parameters():
    """Features that are fixed: only the heads have a gradient."""
    method = mtl.multibalance(TASKS)
    params, batch = make_problem()
    features = encode(params["shared"], batch[0])

    def loss_fn(heads, fork, features, y):
        return head_losses(heads, fork(features), y)

    fn = jax.jit(mtl.fork_value_and_grad(loss_fn, method))
    _, (grads, state) = fn(params["heads"], method.init(LIKE), features, batch[1])
    expected, expected_state = explicit_step(method, params, method.init(LIKE), batch)
    assert_close(grads, expected["heads"])
    assert_close(state, expected_state)


# --- what a model may be made of ---------------------------------------------------------------------


@jax.custom_vjp
def reversed_gradient(x, scale):
    return x * scale


reversed_gradient.defvjp(
    lambda x, scale: (x * scale, scale),
    lambda scale, c: (-3.0 * scale * c, jnp.zeros_like(scale)),
)


def scanned(shared, x):
    def layer(h, _):
        return jnp.tanh(h + 0.1 * jnp.sum(h**2, axis=1, keepdims=True)), None

    return lax.scan(layer, x @ shared, None, length=2)[0]


def with_cond(heads, copies, y):
    losses = head_losses(heads, copies, y)
    return lax.cond(jnp.sum(losses) > 0, lambda x: jnp.log1p(x), lambda x: x, losses)


checkpoint = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
TWO = jnp.asarray(2.0)
MODELS = {
    "custom_vjp in the encoder": Model(lambda w, x: reversed_gradient(encode(w, x), TWO)),
    "custom_vjp in the heads": Model(
        head_losses=lambda heads, copies, y: head_losses(
            heads, [reversed_gradient(copy, TWO) for copy in copies], y
        )
    ),
    "custom_jvp": Model(
        lambda w, x: jax.nn.relu(x @ w),
        lambda heads, copies, y: jax.nn.softplus(head_losses(heads, copies, y)),
    ),
    "checkpoint around the encoder": Model(jax.checkpoint(encode)),
    "checkpoint around the heads": Model(head_losses=jax.checkpoint(head_losses)),
    "checkpoint with a policy": Model(checkpoint(encode), checkpoint(head_losses)),
    "jit": Model(jax.jit(encode), jax.jit(head_losses)),
    "scan": Model(scanned),
    "cond": Model(head_losses=with_cond),
}


@pytest.mark.parametrize(
    "name",
    sampled(MODELS, ["custom_vjp in the encoder"]),
)
def test_models_equal_the_explicit_computation(name):
    method, model = mtl.multibalance(TASKS), MODELS[name]
    params, batch = make_problem()
    state = method.init(jnp.zeros(LIKE.shape))
    losses, (grads, new) = jax.jit(fork_step(method, model))(params, state, batch)
    expected, expected_state = explicit_step(method, params, state, batch, model)
    assert_close(grads, expected)
    assert_close(new, expected_state)
    if name.startswith("checkpoint"):
        assert_close(losses, plain_losses(params, batch))


def test_a_rule_of_its_own_is_followed():
    """`custom_vjp` in encoder or heads: what the bottom receives is -3 times as much."""
    params, batch = make_problem()
    method = mtl.sum_tasks(TASKS)
    one = jnp.asarray(1.0)
    _, (plain, _) = fork_step(method)(params, method.init(LIKE), batch)
    for model in (
        Model(lambda w, x: reversed_gradient(encode(w, x), one)),
        Model(
            head_losses=lambda heads, copies, y: head_losses(
                heads, [reversed_gradient(copy, one) for copy in copies], y
            )
        ),
    ):
        _, (grads, _) = fork_step(method, model)(params, method.init(LIKE), batch)
        assert_close(grads, {"shared": -3 * plain["shared"], "heads": plain["heads"]})


@pytest.mark.slow
def test_tree_of_representations():
    """Two towers, one of which a task does not use."""
    method = mtl.multibalance(2)
    h = {"user": jnp.asarray([1.0, 2.0]), "item": (jnp.asarray(3.0), None)}

    def losses_of(first, second):
        return jnp.stack([jnp.sum(first["user"] ** 2), jnp.sum(second["user"]) * second["item"][0]])

    fn = mtl.fork_value_and_grad(lambda h, fork: losses_of(*fork(h)), method)
    _, (grad, state) = jax.jit(fn)(h, method.init(h))
    rows = jax.jacrev(lambda h: losses_of(h, h))(h)
    expected, expected_state = method.update(rows, method.init(h), h)
    assert_close(grad, expected)
    assert_close(state, expected_state)


def test_bf16_representation():
    method = mtl.multibalance(2)
    h = jnp.asarray([1.0, -2.0, 0.5], jnp.bfloat16)

    def loss_fn(h, fork):
        wide = [copy.astype(jnp.float32) for copy in fork(h)]
        return jnp.stack([jnp.sum(wide[0] ** 2), jnp.sum(wide[1])])

    state = method.init(h)
    losses, (grad, new) = jax.jit(mtl.fork_value_and_grad(loss_fn, method))(h, state)
    assert grad.dtype == jnp.bfloat16 and losses.dtype == jnp.float32
    assert types(new) == types(state)
    rows = jnp.stack([2 * h, jnp.ones_like(h)])
    expected, expected_state = method.update(rows, method.init(h))
    assert_close(grad.astype(jnp.float32), expected.astype(jnp.float32))
    assert_close(new.weights, expected_state.weights)


def test_the_update_has_the_dtype_of_the_representation():
    """After a chain that computes in float32."""
    widen = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u.astype(float), updates))
    method = optax.chain(mtl.sum_tasks(2), widen)
    w, x = jnp.asarray([1.0, -2.0], jnp.bfloat16), jnp.asarray(3.0, jnp.bfloat16)

    def loss_fn(w, fork):
        first, second = fork(w * x)
        return jnp.stack([jnp.sum(first**2), jnp.sum(second)]).astype(float)

    _, (grad, _) = mtl.fork_value_and_grad(loss_fn, method)(w, method.init(w))
    assert grad.dtype == jnp.bfloat16
    assert grad.tolist() == [21.0, -33.0]  # 3 (2 * 3 w + 1)


@pytest.mark.slow
def test_float64(x64):
    method = mtl.multibalance(2)
    h = jnp.asarray([1.0, 2.0], jnp.float64)

    def loss_fn(h, fork):
        copies = fork(h)
        return jnp.stack([jnp.sum(copies[0] ** 3), jnp.sum(copies[1])])

    _, (grad, state) = mtl.fork_value_and_grad(loss_fn, method)(h, method.init(h))
    expected, expected_state = method.update(jnp.stack([3 * h**2, jnp.ones(2)]), method.init(h))
    assert grad.dtype == state.weights.dtype == jnp.float64
    assert_close((grad, state.weights), (expected, expected_state.weights), rtol=1e-14)


def test_a_head_that_ignores_its_copy():
    method = mtl.multibalance(2)

    def loss_fn(params, fork):
        copy, _ = fork(params["h"])
        return jnp.stack([jnp.sum(copy**2), params["bias"] ** 2])

    params = {"h": jnp.asarray([1.0, 2.0]), "bias": jnp.asarray(3.0)}
    state = method.init(params["h"])
    _, (grads, state) = jax.jit(mtl.fork_value_and_grad(loss_fn, method))(params, state)
    expected, _ = method.update(
        jnp.stack([2 * params["h"], jnp.zeros(2)]), method.init(jnp.ones(2))
    )
    assert_close(grads["h"], expected)
    assert float(grads["bias"]) == 6.0
    assert state.norms[0, 1] == 0.0


# --- what goes in and out ----------------------------------------------------------------------------


def test_auxiliary_output():
    """Arrays, integers and arrays that depend on no parameter come back as they are."""
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)

    def loss_fn(params, fork, batch):
        h = encode(params["shared"], batch[0])
        losses = head_losses(params["heads"], fork(h), batch[1])
        return losses, {"h": h, "rows": jnp.arange(BATCH), "y": (batch[1], None)}

    fn = jax.jit(mtl.fork_value_and_grad(loss_fn, method, has_aux=True))
    (losses, aux), (grads, _) = fn(params, method.init(LIKE), batch)
    assert_close(losses, plain_losses(params, batch))
    assert_close(aux["h"], encode(params["shared"], batch[0]))
    assert aux["rows"].tolist() == list(range(BATCH))
    assert_close(aux["y"], (batch[1], None))
    assert_close(grads, fork_step(method)(params, method.init(LIKE), batch)[1][0])


def named_losses(params, fork, batch):
    """The model with copies and losses by name; tasks stand in the order of the sorted names."""
    copies = fork(encode(params["shared"], batch[0]))
    assert sorted(copies) == ORDER
    losses = head_losses(params["heads"], [copies[name] for name in ORDER], batch[1])
    return dict(zip(ORDER, losses, strict=True))


@pytest.mark.parametrize("factory", sampled([mtl.multibalance, mtl.gradnorm], [mtl.gradnorm]))
def test_names(factory):
    params, batch = make_problem()
    named, numbered = factory(NAMES), factory(TASKS)
    active = {"cart": True, "buy": True, "click": False}
    fn = jax.jit(mtl.fork_value_and_grad(named_losses, named))
    losses, (grads, state) = fn(params, named.init(LIKE), batch, active=active)
    assert losses.keys() == set(NAMES)
    expected_losses, (expected, expected_state) = jax.jit(fork_step(numbered))(
        params, numbered.init(LIKE), batch, active=jnp.asarray([True, True, False])
    )
    assert_close([losses[name] for name in ORDER], list(expected_losses))
    assert_close(grads, expected)
    assert_close(state, expected_state)
    assert mtl.diagnostics(state, named)["weights"]["click"] == 0.0


def test_losses_by_name_without_names_in_the_method():
    """Copies by number, losses in the order of their sorted names, `losses` and `aux` as they were."""
    params, batch = make_problem()
    method = METHODS["inverse losses"]

    def loss_fn(params, fork, batch):
        losses = forked_losses()(params, fork, batch)
        return dict(zip(ORDER, losses, strict=True)), "aux"

    fn = mtl.fork_value_and_grad(loss_fn, method, has_aux=True)
    (losses, aux), (grads, _) = fn(params, method.init(LIKE), batch)
    expected_losses, (expected, _) = fork_step(method)(params, method.init(LIKE), batch)
    assert aux == "aux"
    assert_close([losses[name] for name in ORDER], list(expected_losses))
    assert_close(grads, expected)


def test_arguments_of_the_loss_function_and_of_the_method():
    params, batch = make_problem()
    method = mtl.graddrop(TASKS)

    def loss_fn(params, fork, x, *, targets):
        return forked_losses()(params, fork, (x, targets))

    @jax.jit
    def step(params, state, noise):
        fn = mtl.fork_value_and_grad(loss_fn, method)
        x, y = batch
        return fn(params, state, x, targets=y, extra_args={"noise": noise})[1][0]

    # Noise 0 keeps every positive entry, and noise 1 every negative one.
    for noise in (jnp.zeros(LIKE.shape), jnp.ones(LIKE.shape)):
        expected, _ = explicit_step(method, params, method.init(LIKE), batch, noise=noise)
        assert_close(step(params, method.init(LIKE), noise), expected)


def test_names_for_a_transformation_that_has_none():
    params, batch = make_problem()
    chain = optax.chain(mtl.per_task(optax.trace(0.9), TASKS), mtl.sum_tasks(TASKS))
    fn = mtl.fork_value_and_grad(named_losses, chain, tasks=NAMES)
    losses, (grads, _) = jax.jit(fn)(params, chain.init(jnp.zeros(LIKE.shape)), batch)
    assert losses.keys() == set(NAMES)
    assert_close(grads, jax.grad(lambda p: plain_losses(p, batch).sum())(params))


# --- absent and broken tasks -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sum_tasks", "multibalance", "inverse losses"])
def test_absent_task(name):
    params, batch = make_problem()
    method = METHODS[name]
    active = jnp.asarray([True, False, True])
    state = method.init(LIKE)
    losses, (grads, new) = jax.jit(fork_step(method))(params, state, batch, active=active)
    expected, expected_state = explicit_step(method, params, state, batch, active=active)
    assert_close(losses, plain_losses(params, batch))
    assert_close(grads["shared"], expected["shared"])
    assert_close(new, expected_state)
    assert_close(grads["heads"], expected["heads"] * active[None])
    assert new.weights[0, 1] == 0.0 and not new.skipped.any()


@pytest.mark.parametrize(
    "name", sampled(["sum_tasks", "multibalance", "mgda", "metabalance"], ["multibalance"])
)
def test_nan_task_does_not_reach_the_bottom(name):
    params, (x, y) = make_problem()
    method = METHODS[name]
    broken = (x, y.at[:, 1].set(jnp.nan))
    step, state = jax.jit(fork_step(method)), method.init(LIKE)
    losses, (grads, new) = step(params, state, broken)
    assert np.isnan(losses[1])
    _, (expected, _) = step(params, state, (x, y), active=jnp.asarray([True, False, True]))
    assert_close(grads["shared"], expected["shared"])
    assert_close(grads["heads"][:, ::2], expected["heads"][:, ::2])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new))
    assert new.skipped.tolist() == [0, 1, 0]


def squares(copy, head, y, scale):
    """The derivative of the square root is not finite where `scale` is 0."""
    return jnp.sqrt(scale * jnp.sum((copy @ head - y) ** 2))


def broken_losses(form):
    """Three finite losses, of which the second has no finite derivative."""
    scales = jnp.asarray([1.0, 0.0, 2.0])

    def loss_fn(params, fork, batch):
        x, y = batch
        copies = fork(encode(params["shared"], x))
        if form == "vmap":
            return jax.vmap(squares)(jnp.stack(copies), params["heads"].T, y.T, scales)
        each = [
            squares(copy, params["heads"][:, t], y[:, t], scales[t])
            for t, copy in enumerate(copies)
        ]
        return dict(zip("abc", each, strict=True)) if form == "dictionary" else jnp.stack(each)

    return loss_fn


@pytest.mark.parametrize(
    ("form", "name"),
    sampled(
        itertools.product(["dictionary", "stack", "vmap"], ["multibalance", "mgda"]),
        [("dictionary", "multibalance"), ("stack", "multibalance")],
    ),
)
def test_a_head_without_a_finite_derivative_is_left_out_alone(form, name):
    params, batch = make_problem()
    method = METHODS[name]
    step = jax.jit(mtl.fork_value_and_grad(broken_losses(form), method))
    losses, (grads, state) = step(params, method.init(LIKE), batch)
    only = jnp.asarray([True, False, True])
    _, (expected, absent) = step(params, method.init(LIKE), batch, active=only)
    assert np.all(np.isfinite(jax.tree.leaves(losses)))
    assert np.all(np.isfinite(grads["shared"])) and np.any(grads["shared"])
    assert_close(grads["shared"], expected["shared"])
    assert_close(grads["heads"][:, ::2], expected["heads"][:, ::2])
    assert not np.any(np.isfinite(grads["heads"][:, 1]))
    assert state.skipped.tolist() == [0, 1, 0]
    assert absent.skipped.tolist() == [0, 0, 0]


# --- what JAX does to a function ---------------------------------------------------------------------


def test_scan_over_steps():
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)

    def body(carry, _):
        losses, (grads, state) = fork_step(method)(*carry, batch)
        return (descend(carry[0], grads), state), losses

    carry = params, method.init(LIKE)
    scanned, losses = jax.jit(lambda c: lax.scan(body, c, length=3))(carry)
    single = jax.jit(body)
    for t in range(3):
        carry, expected = single(carry, None)
        assert_close(losses[t], expected)
    assert_close(scanned, carry)
    assert int(scanned[1].balance_count) == 3


@pytest.mark.slow
def test_vmap_over_models():
    problems = [make_problem(seed) for seed in range(2)]
    method = mtl.multibalance(TASKS)
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    params, batch = (stack(*part) for part in zip(*problems, strict=True))
    states = stack(*[method.init(LIKE)] * 2)
    got = jax.jit(jax.vmap(fork_step(method)))(params, states, batch)
    each = [fork_step(method)(p, method.init(LIKE), b) for p, b in problems]
    assert_close(got, stack(*each))


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_shard_map_over_the_batch():
    """Two steps with the batch split over eight devices are those of one device."""
    params, (x, y) = make_problem()
    batch = tuple(jnp.concatenate([part, -part[:5]]) for part in (x, y))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def two_steps(method, average, params, batch):
        def loss_fn(params, fork, batch):
            return average(forked_losses()(params, fork, batch))

        def step(carry, _):
            losses, (grads, state) = mtl.fork_value_and_grad(loss_fn, method)(*carry, batch)
            return (descend(carry[0], grads), state), losses

        return lax.scan(step, (params, method.init(LIKE)), length=2)

    # GradNorm reads norms and losses.
    alone = jax.jit(functools.partial(two_steps, mtl.gradnorm(TASKS), lambda losses: losses))
    method = mtl.gradnorm(TASKS, axis_name="data")
    local = functools.partial(two_steps, method, lambda losses: lax.pmean(losses, "data"))
    specs = jax.P(), jax.P("data")
    split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P()))
    # Sums over the batch have another order, and two steps pass it on.
    assert_close(split(params, batch), alone(params, batch), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_shard_map_with_the_losses_of_each_device():
    """As with `jax.grad`, what is differentiated is then the sum of all devices' losses."""
    params, (x, y) = make_problem()
    batch = tuple(part[:8] for part in (x, y))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    method = mtl.sum_tasks(TASKS, axis_name="data")

    def local(params, batch):
        losses, (grads, _) = fork_step(method)(params, method.init(LIKE), batch)
        return losses[None], grads

    specs = {"in_specs": (jax.P(), jax.P("data")), "out_specs": (jax.P("data"), jax.P())}
    losses, grads = jax.jit(jax.shard_map(local, mesh=mesh, **specs))(params, batch)
    assert_close(losses.mean(axis=0), plain_losses(params, batch))
    expected = jax.grad(lambda params: plain_losses(params, batch).sum())(params)
    assert_close(grads, jax.tree.map(lambda g: 8 * g, expected))


# --- what it costs -----------------------------------------------------------------------------------


def test_the_bottom_is_differentiated_once():
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    plain = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(plain_losses(p, batch))))(params)
    fork = jax.jit(fork_step(method)).trace(params, method.init(LIKE), batch).jaxpr
    each = jax.make_jaxpr(mtl.per_task_value_and_grad(plain_losses, mode="unroll"))(params, batch)
    # Forward, and the gradient of the weights.
    assert products_of_the_bottom(plain) == products_of_the_bottom(fork) == 2
    assert products_of_the_bottom(each) == 1 + TASKS


def layers(shared, x):
    """The activations of two layers, and a loss of them."""
    aux = 0.0
    for w in shared["layers"]:
        x = jnp.tanh(x @ w)
        aux += jnp.mean(x**2)
    return x, aux


def scanned_layers(shared, x):
    def layer(h, w):
        h = jnp.tanh(h @ w)
        return h, jnp.mean(h**2)

    h, aux = lax.scan(layer, x, jnp.stack(shared["layers"]))
    return h, jnp.sum(aux)


def embedded(shared, ids):
    return layers(shared, shared["table"][ids].reshape(ids.shape[0], -1))


BOTTOMS = {
    "layers": layers,
    "scan": scanned_layers,
    "checkpoint": jax.checkpoint(layers),
    "embedding": embedded,
}


@pytest.mark.parametrize("bottom", sampled(BOTTOMS, ["layers"]))
def test_a_loss_beside_the_fork_costs_no_second_backward_pass(bottom):
    """The compiled step has the plain one's operations, and its memory but for T cotangents."""
    batch, width, tasks = 64, 128, 2
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "layers": [jax.random.normal(key, (width, width)) / 16 for key in keys[:2]],
        "heads": [jax.random.normal(key, (width,)) for key in keys[2:4]],
    }
    x = jax.random.normal(keys[4], (batch, width))
    if bottom == "embedding":
        params["table"] = jax.random.normal(keys[5], (50, width // 4))
        x = jax.random.randint(keys[4], (batch, 4), 0, 50)

    def loss_fn(params, fork, x):
        h, aux = BOTTOMS[bottom](params, x)
        heads = zip(fork(h), params["heads"], strict=True)
        first, second = (jnp.mean(jnp.sin(copy @ head)) for copy, head in heads)
        return jnp.stack([first + 0.01 * aux, second])

    def plain(params, x):
        return jax.grad(lambda p: jnp.sum(loss_fn(p, lambda h: (h,) * tasks, x)))(params)

    method = mtl.sum_tasks(tasks)
    fork = mtl.fork_value_and_grad(loss_fn, method)
    state = method.init(jnp.zeros((batch, width)))
    expected = jax.jit(plain).lower(params, x).compile()
    got = jax.jit(lambda params, x: fork(params, state, x)[1][0]).lower(params, x).compile()
    assert_close(got(params, x), expected(params, x))
    flops, least = (program.cost_analysis()["flops"] for program in (got, expected))
    assert flops <= 1.03 * least
    memory, least = (p.memory_analysis().temp_size_in_bytes for p in (got, expected))
    assert memory <= least + tasks * batch * width * x.dtype.itemsize


@pytest.mark.parametrize("names", sampled([False, True], [True]))
def test_cotangents_are_not_stacked(names):
    """No array of the T cotangents is left in the compiled step."""
    batch_size, width, tasks = 96, 40, 4
    method = mtl.multibalance([f"task {t}" for t in range(tasks)] if names else tasks)
    keys = jax.random.split(jax.random.key(0), 3)
    shared = jax.random.normal(keys[0], (24, width))
    heads = [jax.random.normal(key, (width,)) for key in jax.random.split(keys[1], tasks)]
    x = jax.random.normal(keys[2], (batch_size, 24))

    def loss_fn(params, fork):
        copies = fork(jnp.tanh(x @ params[0]))
        copies = list(copies.values()) if names else copies
        return jnp.stack(
            [jnp.mean((c @ p - 1) ** 2) for c, p in zip(copies, params[1], strict=True)]
        )

    state = method.init(jnp.zeros((batch_size, width)))
    step = jax.jit(mtl.fork_value_and_grad(loss_fn, method))
    program = step.lower((shared, heads), state).compile().as_text()
    kind = "f64" if shared.dtype == jnp.float64 else "f32"
    assert f"{kind}[{batch_size},{width}]" in program
    sizes = [
        np.prod([int(n) for n in shape.split(",")])
        for shape in re.findall(rf"{kind}\[([\d,]+)\]", program)
    ]
    assert max(sizes) <= batch_size * width


# --- mistakes ----------------------------------------------------------------------------------------

INNER = (
    "fork_value_and_grad: loss_fn calls fork inside jit, checkpoint, scan, vmap or the like. Move the "
    "call out of there, or use mtl_optax.fork and mtl_optax.join, which may stand anywhere."
)


def custom_vjp(f):
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda *args: (f(*args), args), lambda args, _: args)
    return wrapped


WRAPPERS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda p: lax.scan(lambda c, _: (c, f(p)), 0.0, None, length=1)[1][0],
    "cond": lambda f: lambda p: lax.cond(p["shared"][0, 0] < 9, f, f, p),
    "vmap": lambda f: lambda p: jax.vmap(f)(jax.tree.map(lambda x: x[None], p))[0],
    "jvp": lambda f: lambda p: jax.jvp(f, (p,), (p,))[0],
    "custom_vjp": custom_vjp,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_fork_inside_another_transformed_function_is_refused(name):
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)

    def loss_fn(params, fork, batch):
        return WRAPPERS[name](lambda params: forked_losses()(params, fork, batch))(params)

    step = mtl.fork_value_and_grad(loss_fn, method)

    def many(params, state, batch):
        return lax.scan(lambda carry, _: (carry, step(*carry, batch)), (params, state), length=2)

    for outside in (step, jax.jit(step), many):
        with pytest.raises(ValueError) as caught:
            outside(params, method.init(jnp.zeros(LIKE.shape)), batch)
        assert str(caught.value) == INNER


def test_fork_is_called_once():
    method = mtl.sum_tasks(2)

    def twice(w, fork):
        return jnp.stack([fork(w)[0].sum(), fork(w)[1].sum()])

    for loss_fn, times in [(twice, 2), (lambda w, fork: w, 0)]:
        with pytest.raises(ValueError) as caught:
            mtl.fork_value_and_grad(loss_fn, method)(jnp.ones(2), method.init(jnp.ones(2)))
        assert str(caught.value) == (
            f"fork_value_and_grad: loss_fn must call fork exactly once, it called it {times} times. "
            "If each task has inputs of its own, fork one representation of the concatenated batch; a "
            'tuple of representations needs a method with blocks="all".'
        )


def test_method_that_keeps_the_axis_is_refused():
    params, batch = make_problem()
    method = mtl.metabalance(TASKS, reduce=False)
    with pytest.raises(ValueError) as caught:
        fork_step(method)(params, method.init(LIKE), batch)
    assert str(caught.value) == (
        f"fork: the method must return updates shaped like the representation, {(BATCH, WIDTH)}; "
        f"found {(TASKS, BATCH, WIDTH)}. End the chain with one that removes the task axis, such as "
        "sum_tasks."
    )


def test_unknown_number_of_tasks_is_refused():
    method = aggregating.average_per_element_updates()
    message = (
        "fork_value_and_grad: cannot tell the number of tasks, because this transformation holds no method "
        "of mtl_optax. Give one, such as mtl_optax.multibalance(tasks), or pass tasks= for one of "
        "your own."
    )
    fn = mtl.fork_value_and_grad(lambda w, fork: jnp.stack(fork(w)), method)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fn(jnp.ones(()), method.init(jnp.ones(())))


def test_wrong_number_of_losses_is_refused():
    method = mtl.sum_tasks(2)
    fn = mtl.fork_value_and_grad(lambda w, fork: jnp.stack([*fork(w), w]), method)
    message = (
        "fork_value_and_grad: the losses of loss_fn must have shape (2,), one entry per task in the "
        "order of the task axis; found (3,)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fn(jnp.ones(()), method.init(jnp.ones(())))
    fn = mtl.fork_value_and_grad(lambda w, fork: jnp.stack(fork(w)), method)
    with pytest.raises(ValueError, match=r"active must have shape \(2,\), .* found \(3,\)"):
        fn(jnp.ones(()), method.init(jnp.ones(())), active=jnp.ones(3, bool))


def test_losses_of_other_names_are_refused():
    method = mtl.sum_tasks(("buy", "click"))

    def loss_fn(w, fork):
        copies = fork(w)
        return {"buy": copies["buy"], "view": copies["click"]}

    message = "must have one entry per task, ['buy', 'click']; found ['buy', 'view']."
    with pytest.raises(ValueError, match=re.escape(message)):
        mtl.fork_value_and_grad(loss_fn, method)(jnp.ones(()), method.init(jnp.ones(())))


@pytest.mark.parametrize(
    "name", sampled(["metabalance", "mgda", "moco", "pcgrad"], ["metabalance"])
)
def test_leaves_that_are_not_floats_are_left_alone(name):
    """Integers and booleans among the parameters and in the representation (here a graph)."""
    blocks = {} if name in ("moco", "pcgrad") else {"blocks": "all"}
    method = make(name, 2, **blocks)
    edges, mask = jnp.array([1, 0, 2]), jnp.array([True, False, True])
    params = {"w": jnp.array([1.0, -2.0, 3.0]), "edges": edges, "steps": jnp.uint32(2**30 + 1)}

    def loss_fn(params, fork, whole):
        h = params["w"] ** 2
        h = {"nodes": h, "edges": params["edges"], "mask": mask} if whole else h
        losses = []
        for copy, power in zip(fork(h), (1, 2), strict=True):
            nodes = copy["nodes"] if whole else copy
            to, here = (copy["edges"], copy["mask"]) if whole else (edges, mask)
            losses.append((nodes**power * nodes[to] * here).sum())
        return tuple(losses)

    fn = jax.jit(mtl.fork_value_and_grad(loss_fn, method), static_argnums=2)
    graph = {"nodes": params["w"], "edges": edges, "mask": mask}
    got = fn(params, method.init(graph), True)
    want = fn(params, method.init(params["w"]), False)
    np.testing.assert_allclose(got[0], want[0])
    np.testing.assert_allclose(got[1][0]["w"], want[1][0]["w"], 1e-6)
    assert got[1][0]["steps"].dtype == jnp.uint32 and got[1][0]["edges"].dtype == edges.dtype
    moved = optax.apply_updates(params, got[1][0])
    np.testing.assert_array_equal(moved["edges"], edges)
    assert moved["steps"] == params["steps"] and not np.allclose(moved["w"], params["w"])


def test_what_has_no_gradient_is_refused():
    method, w = mtl.sum_tasks(2), jnp.ones(2)
    fn = mtl.fork_value_and_grad(lambda w, fork: [w[0] * c[1] for c in fork(jnp.arange(2))], method)
    with pytest.raises(TypeError, match="no leaf of the representation is floating point"):
        fn(w, method.init(w))
    fn = mtl.fork_value_and_grad(lambda p, fork: [c.sum() for c in fork(p["w"])], method)
    for wrong in (jnp.ones(2, complex), jax.random.key(0)):
        with pytest.raises(TypeError, match=r"\['x'\]"):
            fn({"w": w, "x": wrong}, method.init(w))
