"""The three placements: on the parameters, on the representation, on the losses."""

import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from optax.experimental import aggregating

import mtl_optax as mtl
from mtl_optax.from_rule import Rule, from_rule
from mtl_optax.placement.carrier import _decode, _encode

TASKS, BATCH, INPUTS, WIDTH = 3, 11, 7, 5


def make_problem(seed: int = 0) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "shared": jax.random.normal(keys[0], (INPUTS, WIDTH)),
        "heads": jax.random.normal(keys[1], (WIDTH, TASKS)),
    }
    x = jax.random.normal(keys[2], (BATCH, INPUTS))
    y = jax.random.normal(keys[3], (BATCH, TASKS)) * jnp.asarray([[1.0, 3.0, 0.2]])
    return params, (x, y)


def encode(shared: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ shared)


def head_losses(heads: jax.Array, copies: Any, y: jax.Array) -> jax.Array:
    predictions = [copies[t] @ heads[:, t] for t in range(TASKS)]
    return jnp.stack([jnp.mean((p - y[:, t]) ** 2) for t, p in enumerate(predictions)])


def plain_losses(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    return head_losses(params["heads"], (encode(params["shared"], x),) * TASKS, y)


def forked(method: Any, scale: float = 1.0, active: Any = None, joined: bool = True) -> Any:
    """The loss of the model with `method` on its representation."""

    def loss_fn(params: Any, carrier: Any, batch: Any) -> Any:
        x, y = batch
        h = encode(params["shared"], x)
        copies, token = mtl.fork(h, carrier, method, num_tasks=TASKS)
        losses = head_losses(params["heads"], copies, y)
        total = mtl.join(losses, token, active=active) if joined else jnp.sum(losses)
        return scale * total, losses

    return loss_fn


def fork_step(method: Any, **options: Any) -> Any:
    return jax.grad(forked(method, **options), argnums=(0, 1), has_aux=True)


def carrier_of(method: Any) -> Any:
    return mtl.fork_init(method, jnp.zeros((BATCH, WIDTH)))


def explicit_step(method: Any, params: Any, state: Any, batch: Any, **extra: Any) -> Any:
    """What a fork does, written out: T pullbacks to the representation, then `method.update`."""
    return jax.jit(_explicit_step, static_argnums=0)(method, params, state, batch, extra)


def _explicit_step(method: Any, params: Any, state: Any, batch: Any, extra: Any) -> Any:
    x, y = batch
    h, pull_shared = jax.vjp(lambda shared: encode(shared, x), params["shared"])
    losses, pull_heads = jax.vjp(
        lambda heads, h: head_losses(heads, (h,) * TASKS, y), params["heads"], h
    )
    rows = jnp.stack([pull_heads(unit)[1] for unit in jnp.eye(TASKS)])
    update, state = optax.with_extra_args_support(method).update(
        rows, state, h, losses=losses, **extra
    )
    grads = {"shared": pull_shared(update)[0], "heads": pull_heads(jnp.ones(TASKS))[0]}
    return grads, state


def assert_close(got: Any, want: Any, rtol: float = 2e-5) -> None:
    """Equality up to float32 rounding in another order of operations."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.max(np.abs(b), initial=0)))


def inverse_losses(num_tasks: int = TASKS) -> Any:
    """A method that needs losses: weights 1 / L."""

    def weigh(evidence: Any, state: Any) -> Any:
        positive = evidence.losses > 0
        return jnp.where(positive, 1 / jnp.where(positive, evidence.losses, 1), 0), state

    return from_rule(Rule("inverse", num_tasks, frozenset({"losses"}), lambda dtype: (), weigh))


# --- on the parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "vmap", "unroll", "map"])
def test_modes_agree_with_jacrev(mode: Any) -> None:
    params, batch = make_problem()
    fn = jax.jit(mtl.per_task_value_and_grad(plain_losses, mode=mode))
    losses, grads = fn(params, batch)
    assert_close(losses, plain_losses(params, batch))
    assert_close(grads, jax.jacrev(plain_losses)(params, batch))


def test_argnums_aux_and_keywords() -> None:
    def loss_fn(a: jax.Array, b: jax.Array, *, power: int) -> Any:
        return jnp.stack([jnp.sum(a**power), jnp.sum(a * b)]), {"b": b}

    a, b = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 5.0])
    both = mtl.per_task_value_and_grad(loss_fn, argnums=(1, 0), has_aux=True)
    (losses, aux), (grad_b, grad_a) = both(a, b, power=2)
    assert losses.tolist() == [5.0, 13.0]
    assert aux["b"].tolist() == [3.0, 5.0]
    assert grad_a.tolist() == [[2.0, 4.0], [3.0, 5.0]]
    assert grad_b.tolist() == [[0.0, 0.0], [1.0, 2.0]]
    one = mtl.per_task_value_and_grad(loss_fn, argnums=(0,), has_aux=True)
    assert isinstance(one(a, b, power=2)[1], tuple)


def test_negative_argnum() -> None:
    fn = mtl.per_task_value_and_grad(lambda x, w: jnp.stack([w * x, w**2]), argnums=-1)
    assert fn(2.0, jnp.asarray(3.0))[1].tolist() == [2.0, 6.0]


LIST = (
    "loss_fn must return one array [T], found a tuple of 2: jnp.stack the losses (and pass "
    "has_aux=True where the second output is auxiliary)."
)
SCALAR = (
    "loss_fn must return one loss per task, an array [T]; found shape (). Return jnp.stack([...]) of "
    "the losses instead of their sum."
)


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda w: (w, w), TypeError, LIST),
        (lambda w: w, ValueError, SCALAR),
        (
            lambda w: jnp.ones(2, jnp.int32),
            TypeError,
            "losses must be real floating point, found int32.",
        ),
    ],
)
def test_losses_of_the_wrong_kind_are_refused(loss_fn: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        mtl.per_task_value_and_grad(loss_fn)(jnp.asarray(1.0))
    assert str(caught.value) == message


def test_unknown_mode_is_refused() -> None:
    message = 'mode must be "auto", "vmap", "unroll" or "map"; found \'fast\'.'
    for place in (mtl.per_task_value_and_grad, mtl.split_value_and_grad):
        arguments = [plain_losses] * (1 if place is mtl.per_task_value_and_grad else 2)
        with pytest.raises(ValueError, match=re.escape(message)):
            place(*arguments, mode="fast")  # type: ignore[call-overload]


@pytest.mark.parametrize("mode", ["vmap", "unroll", "map"])
def test_split_gives_the_same_gradients(mode: Any) -> None:
    params, batch = make_problem()
    x, y = batch

    def decode(heads: Any, h: Any, x: Any, y: Any) -> Any:
        return head_losses(heads, (h,) * TASKS, y), jnp.mean(h)

    fn = mtl.split_value_and_grad(lambda shared, x, y: encode(shared, x), decode, True, mode=mode)
    (losses, aux), (shared, heads) = jax.jit(fn)(params["shared"], params["heads"], x, y)
    _, whole = mtl.per_task_value_and_grad(plain_losses)(params, batch)
    assert_close(losses, plain_losses(params, batch))
    assert_close(aux, jnp.mean(encode(params["shared"], x)))
    assert_close(shared, whole["shared"])
    assert_close(heads, jnp.sum(whole["heads"], axis=0))


# --- on the losses -----------------------------------------------------------------------------------


def test_weigh_losses_is_the_weighted_sum() -> None:
    params, batch = make_problem()
    method = inverse_losses()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            return mtl.weigh_losses(plain_losses(params, batch), state, method)

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    (total, state), grads = step(params, method.init(params))
    losses, each = mtl.per_task_value_and_grad(plain_losses)(params, batch)
    assert_close(total, jnp.asarray(float(TASKS)))
    assert_close(grads, jax.tree.map(lambda g: jnp.tensordot(1 / losses, g, axes=1), each))
    assert_close(mtl.diagnostics(state)["weights"], 1 / losses)


def test_weigh_losses_leaves_absent_and_nan_tasks_out() -> None:
    method = inverse_losses()
    active = jnp.asarray([True, False, True])

    def loss_fn(w: jax.Array, state: Any) -> Any:
        losses = jnp.stack([w, 2 * w, jnp.asarray(jnp.nan)])
        return mtl.weigh_losses(losses, state, method, active=active)

    w = jnp.asarray(2.0)
    (total, state), grad = jax.value_and_grad(loss_fn, has_aux=True)(w, method.init(w))
    assert (float(total), float(grad)) == (1.0, 0.5)
    assert state.weights.tolist() == [0.5, 0.0, 0.0]
    assert state.skipped.tolist() == [0, 0, 1]


def test_weigh_losses_for_any_shape_of_parameters() -> None:
    """Parameters that happen to look like a stack of tasks are not taken for one."""
    for shape in [(), (2,), (2, 2), (2, 3)]:
        method = inverse_losses(2)
        state = method.init(jnp.ones(shape))
        assert float(mtl.weigh_losses(jnp.asarray([1.0, 4.0]), state, method)[0]) == 2.0


def test_weigh_losses_refuses_what_needs_gradients() -> None:
    method = mtl.mgda(2)
    message = (
        "mgda: needs gradients (gram), so it cannot weigh losses alone. Use it through "
        "mtl_optax.fork (one backward pass) or mtl_optax.per_task_value_and_grad."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mtl.weigh_losses(jnp.ones(2), method.init(jnp.ones(3)), method)
    with pytest.raises(ValueError, match=re.escape("losses must be one array [T]; found ().")):
        mtl.weigh_losses(jnp.asarray(1.0), method.init(jnp.ones(3)), method)


# --- on the representation: the same numbers as the computation written out --------------------------

METHODS = {
    "sum_tasks": mtl.sum_tasks(TASKS),
    "multibalance": mtl.multibalance(TASKS),
    "mgda": mtl.mgda(TASKS),
    "metabalance": mtl.metabalance(TASKS),
    "emtl": mtl.emtl(TASKS),
    "inverse losses": inverse_losses(),
    "momentum per task": optax.chain(mtl.per_task(optax.trace(0.9), TASKS), mtl.sum_tasks(TASKS)),
    "optax": mtl.drop_extra_args(aggregating.average_per_element_updates(), "losses", "active"),
}


@pytest.mark.parametrize("name", METHODS)
def test_fork_equals_the_explicit_computation(name: str) -> None:
    method = METHODS[name]
    params, batch = make_problem()
    like = jnp.zeros((BATCH, WIDTH))
    carrier, state = carrier_of(method), method.init(jnp.zeros(like.shape))
    step = jax.jit(fork_step(method))
    for _ in range(3):
        want, state = explicit_step(method, params, state, batch)
        (grads, carrier), losses = step(params, carrier, batch)
        assert_close(grads, want)
        assert_close(losses, plain_losses(params, batch))
        assert_close(mtl.fork_state(method, carrier, like), state)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, want)


def test_sum_tasks_is_the_plain_gradient() -> None:
    params, batch = make_problem()
    method = mtl.sum_tasks(TASKS)
    (grads, _), _ = fork_step(method)(params, carrier_of(method), batch)
    assert_close(grads, jax.grad(lambda p: jnp.sum(plain_losses(p, batch)))(params))


def test_fork_value_and_grad_is_fork_and_join() -> None:
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)

    def loss_fn(params: Any, fork: Any, batch: Any) -> Any:
        x, y = batch
        losses = head_losses(params["heads"], fork(encode(params["shared"], x)), y)
        return losses, jnp.sum(losses)

    active = jnp.asarray([True, False, True])
    fn = mtl.fork_value_and_grad(loss_fn, method, has_aux=True)
    (losses, aux), (grads, carrier) = jax.jit(fn)(params, carrier_of(method), batch, active=active)
    want, want_losses = fork_step(method, active=active)(params, carrier_of(method), batch)
    assert_close((grads, carrier), want)
    assert_close((losses, aux), (want_losses, jnp.sum(want_losses)))


def test_fork_value_and_grad_wants_one_fork() -> None:
    method = mtl.sum_tasks(2)
    carrier = mtl.fork_init(method, jnp.ones(2))

    def twice(w: Any, fork: Any) -> Any:
        return jnp.stack([fork(w)[0].sum(), fork(w)[1].sum()])

    for loss_fn, times in [(twice, 2), (lambda w, fork: w, 0)]:
        message = (
            f"fork_value_and_grad: loss_fn must call fork exactly once, it called it {times} times. "
            "For several representations pass fork a tuple of them."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            mtl.fork_value_and_grad(loss_fn, method)(jnp.ones(2), carrier)


# --- on the representation: what JAX does to a function ----------------------------------------------


def test_scan_over_steps() -> None:
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    step = fork_step(method)

    def body(carry: Any, _: Any) -> Any:
        params, carrier = carry
        (grads, carrier), losses = step(params, carrier, batch)
        return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), carrier), losses

    carry = params, carrier_of(method)
    scanned, losses = jax.jit(lambda c: lax.scan(body, c, length=3))(carry)
    single = jax.jit(body)
    for t in range(3):
        carry, want = single(carry, None)
        assert_close(losses[t], want)
    assert_close(scanned, carry)
    assert int(mtl.diagnostics(scanned[1])["steps"]) == 3


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_remat(policy: Any) -> None:
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    loss_fn = jax.checkpoint(forked(method), policy=policy)
    step = jax.jit(jax.grad(loss_fn, argnums=(0, 1), has_aux=True))
    carrier = carrier_of(method)
    assert_close(step(params, carrier, batch), fork_step(method)(params, carrier, batch))


def test_fork_inside_a_scan_over_layers() -> None:
    """A fork inside a scanned body of the differentiated function, one carrier a turn."""
    method = mtl.multibalance(2)
    h = jnp.asarray([1.0, -2.0, 0.5])
    carriers = jax.tree.map(lambda x: jnp.stack([x] * 3), mtl.fork_init(method, h))

    def turn(h: jax.Array, carrier: Any) -> jax.Array:
        copies, token = mtl.fork(jnp.sin(h), carrier, method)
        return mtl.join(jnp.stack([jnp.sum(copies[0] ** 2), jnp.sum(copies[1])]), token)

    def scanned(h: jax.Array, carriers: Any) -> jax.Array:
        return jnp.sum(lax.scan(lambda h, carrier: (h, turn(h, carrier)), h, carriers)[1])

    grad, new = jax.jit(jax.grad(scanned, argnums=(0, 1)))(h, carriers)
    want, one = jax.grad(turn, argnums=(0, 1))(h, mtl.fork_init(method, h))
    assert_close(grad, 3 * want)
    assert_close(new, jax.tree.map(lambda x: jnp.stack([x] * 3), one))


def test_vmap_over_models() -> None:
    problems = [make_problem(seed) for seed in range(2)]
    method = mtl.multibalance(TASKS)
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    params, batch = (stack(*part) for part in zip(*problems, strict=True))
    carriers = stack(*[carrier_of(method)] * 2)
    got = jax.jit(jax.vmap(fork_step(method)))(params, carriers, batch)
    each = [fork_step(method)(p, carrier_of(method), b) for p, b in problems]
    assert_close(got, stack(*each))


def test_bf16_representation() -> None:
    method = mtl.multibalance(2)
    h = jnp.asarray([1.0, -2.0, 0.5], jnp.bfloat16)

    def loss_fn(h: jax.Array, carrier: Any) -> jax.Array:
        copies, token = mtl.fork(h, carrier, method)
        wide = [copy.astype(jnp.float32) for copy in copies]
        return mtl.join(jnp.stack([jnp.sum(wide[0] ** 2), jnp.sum(wide[1])]), token)

    carrier = mtl.fork_init(method, h)
    grad, new = jax.jit(jax.grad(loss_fn, argnums=(0, 1)))(h, carrier)
    assert grad.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, carrier)
    rows = jnp.stack([2 * h, jnp.ones_like(h)])
    want, state = method.update(rows, method.init(h))
    assert_close(grad.astype(jnp.float32), want.astype(jnp.float32))
    assert_close(new.weights, state.weights)


def test_pytree_representation() -> None:
    """Two towers, one of which a task does not use."""
    method = mtl.multibalance(2)
    h = {"user": jnp.asarray([1.0, 2.0]), "item": (jnp.asarray(3.0), None)}

    def losses_of(first: Any, second: Any) -> jax.Array:
        return jnp.stack([jnp.sum(first["user"] ** 2), jnp.sum(second["user"]) * second["item"][0]])

    def loss_fn(h: Any, carrier: Any) -> jax.Array:
        copies, token = mtl.fork(h, carrier, method)
        return mtl.join(losses_of(*copies), token)

    grad, carrier = jax.jit(jax.grad(loss_fn, argnums=(0, 1)))(h, mtl.fork_init(method, h))
    rows = jax.jacrev(lambda h: losses_of(h, h))(h)
    want, state = method.update(rows, method.init(h), h)
    assert_close(grad, want)
    assert_close(mtl.fork_state(method, carrier, h), state)


# --- on the representation: absent, broken and scaled tasks ------------------------------------------


def test_absent_task() -> None:
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    active = jnp.asarray([True, False, True])
    (grads, carrier), _ = jax.jit(fork_step(method, active=active))(
        params, carrier_of(method), batch
    )
    state = method.init(jnp.zeros((BATCH, WIDTH)))
    want, state = explicit_step(method, params, state, batch, active=active)
    assert_close(grads["shared"], want["shared"])
    assert not np.any(grads["heads"][:, 1])
    assert float(carrier.weights[1]) == 0.0
    assert mtl.diagnostics(carrier)["skipped"].tolist() == [0, 0, 0]


def test_loss_of_an_absent_task_does_not_enter_the_sum() -> None:
    method = mtl.sum_tasks(2)

    def loss_fn(h: jax.Array, active: jax.Array) -> jax.Array:
        copies, token = mtl.fork(h, mtl.fork_init(method, h), method)
        return mtl.join(jnp.stack([copies[0] ** 2, jnp.log(-copies[1])]), token, active=active)

    value, grad = jax.value_and_grad(loss_fn)(jnp.asarray(3.0), jnp.asarray([True, False]))
    assert (float(value), float(grad)) == (9.0, 6.0)


@pytest.mark.parametrize("name", ["sum_tasks", "multibalance", "mgda", "metabalance"])
def test_nan_task_does_not_reach_the_bottom(name: str) -> None:
    params, (x, y) = make_problem()
    method = METHODS[name]
    broken = (x, y.at[:, 1].set(jnp.nan))
    (grads, carrier), losses = jax.jit(fork_step(method))(params, carrier_of(method), broken)
    assert np.isnan(losses[1])
    (want, _), _ = fork_step(method, active=jnp.asarray([True, False, True]))(
        params, carrier_of(method), (x, y)
    )
    assert_close(grads["shared"], want["shared"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(carrier))
    assert mtl.diagnostics(carrier)["skipped"].tolist() == [0, 1, 0]


def test_loss_scaling() -> None:
    """Scaled losses scale the cotangents; the method is told the losses themselves."""
    params, batch = make_problem()
    for name in ("sum_tasks", "mgda", "inverse losses"):
        method = METHODS[name]
        (grads, carrier), _ = fork_step(method)(params, carrier_of(method), batch)
        (scaled, same), _ = fork_step(method, scale=2.0**15)(params, carrier_of(method), batch)
        assert_close(scaled, jax.tree.map(lambda g: 2.0**15 * g, grads))
        assert_close(same.weights, carrier.weights)


def test_head_that_ignores_its_copy() -> None:
    method = mtl.multibalance(2)

    def loss_fn(h: jax.Array, bias: jax.Array, carrier: Any) -> jax.Array:
        (copy, _), token = mtl.fork(h, carrier, method)
        return mtl.join(jnp.stack([jnp.sum(copy**2), bias**2]), token)

    h = jnp.asarray([1.0, 2.0])
    grad_fn = jax.jit(jax.grad(loss_fn, argnums=(0, 1, 2)))
    grad, bias, carrier = grad_fn(h, jnp.asarray(3.0), mtl.fork_init(method, h))
    want, _ = method.update(jnp.stack([2 * h, jnp.zeros(2)]), method.init(h))
    assert_close(grad, want)
    assert float(bias) == 6.0
    assert float(carrier.norms[1]) == 0.0


def test_no_task_is_differentiated() -> None:
    method = mtl.multibalance(2)

    def loss_fn(h: jax.Array, carrier: Any) -> jax.Array:
        return jnp.sum(mtl.fork(h, carrier, method)[0][0]) * 0.0 + jnp.sum(h**2)

    h = jnp.asarray([1.0, 2.0])
    assert jax.grad(loss_fn)(h, mtl.fork_init(method, h)).tolist() == [2.0, 4.0]


# --- on the representation: any state ----------------------------------------------------------------

EDGES = [0, 1, -1, 2**16 - 1, 2**16, 2**24 + 1, -(2**24) - 1, 2**31 - 1, -(2**31), -(2**31) + 1]


def round_trip(leaf: jax.Array) -> jax.Array:
    carried = jax.jit(_encode)(leaf)
    assert jnp.issubdtype(carried.dtype, jnp.floating)
    like = jax.eval_shape(lambda: leaf)
    return jax.jit(lambda x: _decode(x, like))(carried)


def test_integers_travel_exactly() -> None:
    random = np.random.default_rng(0)
    anything = random.integers(-(2**31), 2**31, 10_000)
    for values in (np.asarray(EDGES), anything):
        signed = jnp.asarray(values.astype(np.int32))
        unsigned = jnp.asarray(values.astype(np.int64).astype(np.uint32))
        for leaf in (signed, unsigned, signed.reshape(2, -1), signed[0]):
            back = round_trip(leaf)
            assert back.dtype == leaf.dtype
            np.testing.assert_array_equal(back, leaf)
    for dtype in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint16):
        info = jnp.iinfo(dtype)
        leaf = jnp.asarray([info.min, 0, 1, info.max], dtype)
        back = round_trip(leaf)
        assert back.dtype == leaf.dtype
        np.testing.assert_array_equal(back, leaf)


def test_wide_numbers_travel_exactly(x64: None) -> None:
    leaf = jnp.asarray([*EDGES, 2**53 + 1, 2**63 - 1, -(2**63)], jnp.int64)
    np.testing.assert_array_equal(round_trip(leaf), leaf)
    leaf = jnp.asarray([2**64 - 1, 2**63 + 1], jnp.uint64)
    np.testing.assert_array_equal(round_trip(leaf), leaf)
    leaf = jnp.asarray([1 / 3, 1e300], jnp.float64)
    np.testing.assert_array_equal(round_trip(leaf), leaf)


class Everything(NamedTuple):
    count: jax.Array
    bits: jax.Array
    flag: jax.Array
    key: jax.Array
    half: jax.Array
    empty: jax.Array


def everything() -> optax.GradientTransformation:
    """A foreign method whose state holds every kind of leaf, each changed by an update."""

    def init(params: Any) -> Everything:
        return Everything(
            count=jnp.asarray([2**24, 2**31 - 3, -7], jnp.int32),
            bits=jnp.asarray(2**32 - 2, jnp.uint32),
            flag=jnp.asarray([True, False]),
            key=jax.random.key(5),
            half=jnp.asarray(1.5, jnp.bfloat16),
            empty=jnp.zeros((0,), jnp.int32),
        )

    def update(updates: Any, state: Everything, params: Any = None) -> Any:
        state = Everything(
            count=state.count + 1,
            bits=state.bits + jnp.uint32(1),
            flag=~state.flag,
            key=jax.random.fold_in(state.key, 1),
            half=state.half * 2,
            empty=state.empty,
        )
        return jax.tree.map(lambda u: u.sum(0), updates), state

    return optax.GradientTransformation(init, update)


def test_every_kind_of_state() -> None:
    method = everything()
    h = jnp.asarray([1.0, 2.0])

    def loss_fn(h: jax.Array, carrier: Any) -> jax.Array:
        copies, token = mtl.fork(h, carrier, method, num_tasks=2)
        return mtl.join(jnp.stack([jnp.sum(copies[0] ** 2), jnp.sum(copies[1])]), token)

    grad_fn = jax.jit(jax.grad(loss_fn, argnums=(0, 1)))
    carrier, state = mtl.fork_init(method, h), method.init(h)
    for _ in range(2):
        grad, carrier = grad_fn(h, carrier)
        _, state = method.update(jnp.ones((2, 2)), state)
    got = mtl.fork_state(method, carrier, h)
    assert grad.tolist() == [3.0, 5.0]
    assert jax.random.key_data(got.key).tolist() == jax.random.key_data(state.key).tolist()
    assert got.key.dtype == state.key.dtype
    for a, b in zip(got._replace(key=0), state._replace(key=0), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def test_float64_fork(x64: None) -> None:
    method = mtl.multibalance(2)
    h = jnp.asarray([1.0, 2.0], jnp.float64)

    def loss_fn(h: jax.Array, carrier: Any) -> jax.Array:
        copies, token = mtl.fork(h, carrier, method)
        return mtl.join(jnp.stack([jnp.sum(copies[0] ** 3), jnp.sum(copies[1])]), token)

    grad, carrier = jax.grad(loss_fn, argnums=(0, 1))(h, mtl.fork_init(method, h))
    want, state = method.update(jnp.stack([3 * h**2, jnp.ones(2)]), method.init(h))
    assert grad.dtype == carrier.weights.dtype == jnp.float64
    assert_close((grad, carrier.weights), (want, state.weights), rtol=1e-14)


def test_complex_state_is_refused() -> None:
    method = optax.GradientTransformation(lambda params: jnp.zeros(2, jnp.complex64), lambda *_: _)
    with pytest.raises(TypeError, match="a state of dtype complex64 cannot travel as a cotangent"):
        mtl.fork_init(method, jnp.ones(2))


# --- on the representation: what it costs ------------------------------------------------------------


def dot_products(jaxpr: Any) -> Counter[tuple[tuple[int, ...], ...]]:
    """How often each matrix product occurs, by the shapes of its operands, inner programs included."""
    found: Counter[Any] = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found[tuple(v.aval.shape for v in equation.invars)] += 1
        for value in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += dot_products(inner)
    return found


def test_the_bottom_is_differentiated_once() -> None:
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    plain = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(plain_losses(p, batch))))(params)
    fork = jax.make_jaxpr(fork_step(method))(params, carrier_of(method), batch)
    each = jax.make_jaxpr(mtl.per_task_value_and_grad(plain_losses, mode="unroll"))(params, batch)

    def of_bottom(closed: Any) -> int:
        products = dot_products(closed.jaxpr)
        return sum(n for shapes, n in products.items() if (BATCH, INPUTS) in shapes)

    assert of_bottom(plain) == of_bottom(fork) == 2  # forward, and the gradient of the weights
    assert of_bottom(each) == 1 + TASKS


def test_cotangents_are_not_stacked() -> None:
    """No array of the T cotangents is left in the compiled step."""
    batch_size, width, tasks = 96, 40, 4
    method = mtl.multibalance(tasks)
    keys = jax.random.split(jax.random.key(0), 3)
    shared = jax.random.normal(keys[0], (24, width))
    heads = [jax.random.normal(key, (width,)) for key in jax.random.split(keys[1], tasks)]
    x = jax.random.normal(keys[2], (batch_size, 24))

    def loss_fn(params: Any, carrier: Any) -> jax.Array:
        copies, token = mtl.fork(jnp.tanh(x @ params[0]), carrier, method)
        losses = [jnp.mean((c @ p - 1) ** 2) for c, p in zip(copies, params[1], strict=True)]
        return mtl.join(jnp.stack(losses), token)

    carrier = mtl.fork_init(method, jnp.zeros((batch_size, width)))
    step = jax.jit(jax.grad(loss_fn, argnums=(0, 1)))
    program = step.lower((shared, heads), carrier).compile().as_text()
    kind = "f64" if shared.dtype == jnp.float64 else "f32"
    assert f"{kind}[{batch_size},{width}]" in program
    sizes = [
        np.prod([int(n) for n in shape.split(",")])
        for shape in re.findall(rf"{kind}\[([\d,]+)\]", program)
    ]
    assert max(sizes) <= batch_size * width


# --- on the representation: mistakes -----------------------------------------------------------------


def test_method_that_keeps_the_axis_is_refused() -> None:
    params, batch = make_problem()
    method = mtl.metabalance(TASKS, reduce=False)
    with pytest.raises(ValueError) as caught:
        fork_step(method)(params, carrier_of(method), batch)
    assert str(caught.value) == (
        f"fork: the method must return updates shaped like the representation, {(BATCH, WIDTH)}; "
        f"found {(TASKS, BATCH, WIDTH)}. End the chain with one that removes the task axis, such as "
        "sum_tasks."
    )


def test_wrong_carrier_is_refused() -> None:
    params, batch = make_problem()
    with pytest.raises(ValueError, match="fork: the carrier is not of this method and represent"):
        fork_step(mtl.multibalance(TASKS))(params, carrier_of(mtl.mgda(TASKS)), batch)


def test_raw_state_in_place_of_a_carrier_is_refused() -> None:
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    state = method.init(jnp.zeros((BATCH, WIDTH)))
    with pytest.raises(ValueError, match=re.escape("make it with fork_init(method, represent")):
        fork_step(method)(params, jax.tree.map(lambda x: x.astype(float), state), batch)


def test_carrier_of_other_sizes_is_refused() -> None:
    params, batch = make_problem()
    with pytest.raises(ValueError, match="fork: the carrier is not of this method and represent"):
        fork_step(mtl.multibalance(TASKS))(params, carrier_of(mtl.multibalance(TASKS + 1)), batch)


def test_unknown_number_of_tasks_is_refused() -> None:
    method = aggregating.average_per_element_updates()
    h = jnp.ones(2)
    message = "fork: cannot tell the number of tasks from this method's state; pass num_tasks=."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mtl.fork(h, mtl.fork_init(method, h), method)


def test_integer_representation_is_refused() -> None:
    method = mtl.sum_tasks(2)
    h = {"dense": jnp.ones(2), "ids": jnp.ones(2, jnp.int32)}
    message = (
        "fork: the representation must be real floating point; leaf ['ids'] is int32. Give integers "
        "to the heads directly."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        mtl.fork(h, mtl.fork_init(method, h), method)


def test_wrong_number_of_losses_is_refused() -> None:
    method = mtl.sum_tasks(2)
    h = jnp.ones(2)
    _, token = mtl.fork(h, mtl.fork_init(method, h), method)
    with pytest.raises(ValueError, match=r"^join: the fork has 2 tasks, found 3 losses\.$"):
        mtl.join(jnp.ones(3), token)
    message = "join: active must have shape (2,), one entry per task; found (3,)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mtl.join(jnp.ones(2), token, active=jnp.ones(3, bool))


def test_forgotten_join() -> None:
    """A method that needs no losses does without; one that does says what is missing."""
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    got = fork_step(method, joined=False)(params, carrier_of(method), batch)
    assert_close(got, fork_step(method)(params, carrier_of(method), batch))
    method = inverse_losses()
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(ValueError) as caught:
            wrap(fork_step(method, joined=False))(params, carrier_of(method), batch)
        assert str(caught.value).startswith("inverse: needs the losses of this step")
        assert caught.value.__notes__[0] == (
            "fork: the method was not told the losses: differentiate join(losses, token)."
        )
