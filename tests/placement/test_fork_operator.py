"""`fork`, `join` and the carrier: the fork for code that does not own the call of `jax.grad`."""

import inspect
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from optax.experimental import aggregating
from placement_problem import (
    BATCH,
    LIKE,
    METHODS,
    TASKS,
    WIDTH,
    assert_close,
    encode,
    explicit_step,
    head_losses,
    inverse_losses,
    make_problem,
    products_of_the_bottom,
)
from sampling import sampled

import mtl_optax as mtl
from mtl_optax.placement.fork.carrier import _decode, _encode, encode_state


def forked(method, scale=1.0, active=None, joined=True):
    """The loss of the model with `method` on its representation."""

    def loss_fn(params, carrier, batch):
        x, y = batch
        copies, token = mtl.fork(method, carrier, encode(params["shared"], x), tasks=TASKS)
        losses = head_losses(params["heads"], copies, y)
        total = mtl.join(losses, token, active=active) if joined else jnp.sum(losses)
        return scale * total, losses

    return loss_fn


def fork_step(method, **options):
    """`fn(params, carrier, batch) -> ((grads, carrier), losses)`."""
    return jax.grad(forked(method, **options), argnums=(0, 1), has_aux=True)


def carrier_of(method):
    return mtl.fork_init(method, LIKE)


# --- numbers -----------------------------------------------------------------------------------------
# Those of `fork_value_and_grad`, which test_on_representation.py compares with for every method.


def test_equals_the_explicit_computation():
    method = METHODS["inverse losses"]
    params, batch = make_problem()
    state = method.init(LIKE)
    (grads, carrier), _ = jax.jit(fork_step(method))(params, carrier_of(method), batch)
    expected, expected_state = explicit_step(method, params, state, batch)
    assert_close(grads, expected)
    assert_close(mtl.fork_state(method, carrier, LIKE), expected_state)


@pytest.mark.slow
def test_tree_of_representations():
    """Two towers, one of which a task does not use."""
    method = mtl.multibalance(2)
    h = {"user": jnp.asarray([1.0, 2.0]), "item": (jnp.asarray(3.0), None)}

    def losses_of(first, second):
        return jnp.stack([jnp.sum(first["user"] ** 2), jnp.sum(second["user"]) * second["item"][0]])

    def loss_fn(h, carrier):
        copies, token = mtl.fork(method, carrier, h)
        return mtl.join(losses_of(*copies), token)

    grad, carrier = jax.jit(jax.grad(loss_fn, argnums=(0, 1)))(h, mtl.fork_init(method, h))
    rows = jax.jacrev(lambda h: losses_of(h, h))(h)
    expected, state = method.update(rows, method.init(h), h)
    assert_close(grad, expected)
    assert_close(mtl.fork_state(method, carrier, h), state)


@pytest.mark.slow
def test_bf16_representation():
    method = mtl.multibalance(2)
    h = jnp.asarray([1.0, -2.0, 0.5], jnp.bfloat16)

    def loss_fn(h, carrier):
        copies, token = mtl.fork(method, carrier, h)
        wide = [copy.astype(jnp.float32) for copy in copies]
        return mtl.join(jnp.stack([jnp.sum(wide[0] ** 2), jnp.sum(wide[1])]), token)

    carrier = mtl.fork_init(method, h)
    grad, new = jax.jit(jax.grad(loss_fn, argnums=(0, 1)))(h, carrier)
    assert grad.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, carrier)
    rows = jnp.stack([2 * h, jnp.ones_like(h)])
    expected, state = method.update(rows, method.init(h))
    assert_close(grad.astype(jnp.float32), expected.astype(jnp.float32))
    assert_close(new.weights, state.weights)


def test_the_update_has_the_dtype_of_the_representation():
    """After a chain that computes in float32."""
    widen = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u.astype(float), updates))
    method = optax.chain(mtl.sum_tasks(2), widen)
    h = jnp.asarray([1.0, -2.0], jnp.bfloat16)

    def loss_fn(h, carrier):
        (first, second), token = mtl.fork(method, carrier, h)
        return mtl.join(jnp.stack([jnp.sum(first**2), jnp.sum(second)]), token)

    grad = jax.jit(jax.grad(loss_fn))(h, mtl.fork_init(method, h))
    assert grad.dtype == jnp.bfloat16
    assert grad.tolist() == [3.0, -3.0]


@pytest.mark.slow
def test_float64(x64):
    method = mtl.multibalance(2)
    h = jnp.asarray([1.0, 2.0], jnp.float64)

    def loss_fn(h, carrier):
        copies, token = mtl.fork(method, carrier, h)
        return mtl.join(jnp.stack([jnp.sum(copies[0] ** 3), jnp.sum(copies[1])]), token)

    grad, carrier = jax.grad(loss_fn, argnums=(0, 1))(h, mtl.fork_init(method, h))
    expected, state = method.update(jnp.stack([3 * h**2, jnp.ones(2)]), method.init(h))
    assert grad.dtype == carrier.weights.dtype == jnp.float64
    assert_close((grad, carrier.weights), (expected, state.weights), rtol=1e-14)


def test_losses_by_name():
    """A dictionary of losses stands for its values in the order of the sorted names."""
    method = inverse_losses(2)

    def loss_fn(h, carrier):
        (a, b), token = mtl.fork(method, carrier, h)
        return mtl.join({"b": 3 * b, "a": a**2}, token, active={"a": True, "b": False})

    h = jnp.asarray(2.0)
    value, (grad, carrier) = jax.value_and_grad(loss_fn, argnums=(0, 1))(
        h, mtl.fork_init(method, h)
    )
    assert (float(value), float(grad)) == (4.0, 1.0)  # L = h^2, its gradient 4, weighted by 1 / L
    assert mtl.diagnostics(carrier)["weights"].tolist() == [0.25, 0.0]


def test_the_method_sees_losses_that_are_joined_twice_once():
    """Two joins double the cotangents; the losses that reach the method stay what they are."""
    method = inverse_losses(2)
    h = jnp.asarray([1.0, 2.0])

    def loss_fn(h, carrier, joins):
        copies, token = mtl.fork(method, carrier, h)
        losses = jnp.stack([jnp.sum(copies[0] ** 2), jnp.sum(copies[1])])
        return sum(mtl.join(losses, token) for _ in range(joins))

    def step(joins):
        return jax.grad(loss_fn, argnums=(0, 1))(h, mtl.fork_init(method, h), joins)

    (grad, carrier), (twice, same) = step(1), step(2)
    assert_close(carrier.weights, jnp.asarray([[1 / 5, 1 / 3]]))
    assert_close(same, carrier)
    assert_close(twice, 2 * grad)


# --- what JAX does to a function ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    sampled([None, jax.checkpoint_policies.dots_saveable], [jax.checkpoint_policies.dots_saveable]),
)
def test_a_fork_inside_checkpoint(policy):
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    loss_fn = jax.checkpoint(forked(method), policy=policy)
    step = jax.jit(jax.grad(loss_fn, argnums=(0, 1), has_aux=True))
    carrier = carrier_of(method)
    assert_close(step(params, carrier, batch), fork_step(method)(params, carrier, batch))


def test_a_fork_inside_a_scan_over_layers():
    """A scanned body of the differentiated function, one carrier a turn."""
    method = mtl.multibalance(2)
    h = jnp.asarray([1.0, -2.0, 0.5])
    carriers = jax.tree.map(lambda x: jnp.stack([x] * 3), mtl.fork_init(method, h))

    def turn(h, carrier):
        copies, token = mtl.fork(method, carrier, jnp.sin(h))
        return mtl.join(jnp.stack([jnp.sum(copies[0] ** 2), jnp.sum(copies[1])]), token)

    def scanned(h, carriers):
        return jnp.sum(lax.scan(lambda h, carrier: (h, turn(h, carrier)), h, carriers)[1])

    grad, new = jax.jit(jax.grad(scanned, argnums=(0, 1)))(h, carriers)
    expected, one = jax.grad(turn, argnums=(0, 1))(h, mtl.fork_init(method, h))
    assert_close(grad, 3 * expected)
    assert_close(new, jax.tree.map(lambda x: jnp.stack([x] * 3), one))


@pytest.mark.slow
def test_scan_over_steps():
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    step = fork_step(method)

    def body(carrier, _):
        (grads, carrier), _ = step(params, carrier, batch)
        return carrier, grads

    carrier = carrier_of(method)
    last, grads = jax.jit(lambda c: lax.scan(body, c, length=3))(carrier)
    single = jax.jit(body)
    for t in range(3):
        carrier, expected = single(carrier, None)
        assert_close(jax.tree.map(lambda g, t=t: g[t], grads), expected)
    assert_close(last, carrier)
    assert int(mtl.diagnostics(last)["steps"]) == 3


@pytest.mark.slow
def test_vmap_over_models():
    problems = [make_problem(seed) for seed in range(2)]
    method = mtl.multibalance(TASKS)
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    params, batch = (stack(*part) for part in zip(*problems, strict=True))
    carriers = stack(*[carrier_of(method)] * 2)
    step = jax.jit(fork_step(method))
    got = jax.jit(jax.vmap(fork_step(method)))(params, carriers, batch)
    assert_close(got, stack(*[step(p, carrier_of(method), b) for p, b in problems]))


# --- absent, broken and scaled tasks -----------------------------------------------------------------


def test_absent_task():
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    active = jnp.asarray([True, False, True])
    (grads, carrier), _ = jax.jit(fork_step(method, active=active))(
        params, carrier_of(method), batch
    )
    expected, _ = explicit_step(method, params, method.init(LIKE), batch, active=active)
    assert_close(grads["shared"], expected["shared"])
    assert not np.any(grads["heads"][:, 1])
    found = mtl.diagnostics(carrier)
    assert found["weights"][1] == 0.0
    assert found["skipped"].tolist() == [0, 0, 0]


def test_loss_of_an_absent_task_does_not_enter_the_sum():
    method = mtl.sum_tasks(2)

    def loss_fn(h, active):
        copies, token = mtl.fork(method, mtl.fork_init(method, h), h)
        return mtl.join(jnp.stack([copies[0] ** 2, jnp.log(-copies[1])]), token, active=active)

    value, grad = jax.value_and_grad(loss_fn)(jnp.asarray(3.0), jnp.asarray([True, False]))
    assert (float(value), float(grad)) == (9.0, 6.0)


@pytest.mark.parametrize(
    "name", sampled(["sum_tasks", "multibalance", "mgda", "metabalance"], ["multibalance"])
)
def test_nan_task_does_not_reach_the_bottom(name):
    params, (x, y) = make_problem()
    method = METHODS[name]
    broken = (x, y.at[:, 1].set(jnp.nan))
    (grads, carrier), losses = jax.jit(fork_step(method))(params, carrier_of(method), broken)
    assert np.isnan(losses[1])
    only = jax.jit(fork_step(method, active=jnp.asarray([True, False, True])))
    (expected, _), _ = only(params, carrier_of(method), (x, y))
    assert_close(grads["shared"], expected["shared"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(carrier))
    assert mtl.diagnostics(carrier)["skipped"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "name", sampled(["sum_tasks", "mgda", "inverse losses"], ["inverse losses"])
)
def test_loss_scaling(name):
    """A scaled sum scales the cotangents; the method sees the losses themselves."""
    params, batch = make_problem()
    method = METHODS[name]
    (grads, carrier), _ = jax.jit(fork_step(method))(params, carrier_of(method), batch)
    scaled_step = jax.jit(fork_step(method, scale=2.0**15))
    (scaled, same), _ = scaled_step(params, carrier_of(method), batch)
    assert_close(scaled, jax.tree.map(lambda g: 2.0**15 * g, grads))
    assert_close(same.weights, carrier.weights)


def test_a_head_that_ignores_its_copy():
    method = mtl.multibalance(2)

    def loss_fn(h, bias, carrier):
        (copy, _), token = mtl.fork(method, carrier, h)
        return mtl.join(jnp.stack([jnp.sum(copy**2), bias**2]), token)

    h = jnp.asarray([1.0, 2.0])
    grad_fn = jax.jit(jax.grad(loss_fn, argnums=(0, 1, 2)))
    grad, bias, carrier = grad_fn(h, jnp.asarray(3.0), mtl.fork_init(method, h))
    expected, _ = method.update(jnp.stack([2 * h, jnp.zeros(2)]), method.init(h))
    assert_close(grad, expected)
    assert float(bias) == 6.0
    assert mtl.diagnostics(carrier)["norms"][1] == 0.0


def test_no_task_is_differentiated():
    method = mtl.multibalance(2)

    def loss_fn(h, carrier):
        return jnp.sum(mtl.fork(method, carrier, h)[0][0]) * 0.0 + jnp.sum(h**2)

    h = jnp.asarray([1.0, 2.0])
    assert jax.grad(loss_fn)(h, mtl.fork_init(method, h)).tolist() == [2.0, 4.0]


# --- the carrier -------------------------------------------------------------------------------------

EDGES = [0, 1, -1, 2**16 - 1, 2**16, 2**24 + 1, -(2**24) - 1, 2**31 - 1, -(2**31), -(2**31) + 1]


def round_trip(leaf):
    carried = jax.jit(_encode)(leaf)
    assert jnp.issubdtype(carried.dtype, jnp.floating)
    like = jax.eval_shape(lambda: leaf)
    return jax.jit(lambda x: _decode(x, like))(carried)


def test_integers_travel_exactly():
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


def test_wide_numbers_travel_exactly(x64):
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


def everything():
    """A transformation of the user's whose state holds every kind of leaf, each changed by an update."""

    def init(params):
        return Everything(
            count=jnp.asarray([2**24, 2**31 - 3, -7], jnp.int32),
            bits=jnp.asarray(2**32 - 2, jnp.uint32),
            flag=jnp.asarray([True, False]),
            key=jax.random.key(5),
            half=jnp.asarray(1.5, jnp.bfloat16),
            empty=jnp.zeros((0,), jnp.int32),
        )

    def update(updates, state, params=None):
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


def test_every_kind_of_state():
    method = everything()
    h = jnp.asarray([1.0, 2.0])

    def loss_fn(h, carrier):
        copies, token = mtl.fork(method, carrier, h, tasks=2)
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


def test_counters_past_16_bits():
    """They are counted on, and `diagnostics` reads them from the carrier."""
    method = mtl.multibalance(2)
    h = jnp.asarray([1.0, 2.0])
    state = method.init(h)._replace(
        balance_count=jnp.int32(2**16 - 1), skipped=jnp.asarray([2**16 - 1, 2**24 + 1], jnp.int32)
    )

    def loss_fn(h, carrier):
        copies, token = mtl.fork(method, carrier, h)
        return mtl.join(jnp.stack([jnp.sum(copies[0]) * jnp.nan, jnp.sum(copies[1])]), token)

    carrier = jax.jit(jax.grad(loss_fn, argnums=1))(h, encode_state(state))
    new, found = mtl.fork_state(method, carrier, h), mtl.diagnostics(carrier)
    assert int(new.balance_count) == int(found["steps"]) == 2**16
    assert new.skipped.tolist() == found["skipped"].tolist() == [2**16, 2**24 + 1]


def test_complex_state_is_refused():
    method = optax.GradientTransformation(lambda params: jnp.zeros(2, jnp.complex64), lambda *_: _)
    with pytest.raises(TypeError, match="a state of dtype complex64 cannot travel as a cotangent"):
        mtl.fork_init(method, jnp.ones(2))


# --- what it costs -----------------------------------------------------------------------------------


def test_the_bottom_is_differentiated_once():
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    step = jax.make_jaxpr(fork_step(method))(params, carrier_of(method), batch)
    assert products_of_the_bottom(step) == 2  # forward, and the gradient of the weights


# --- mistakes ----------------------------------------------------------------------------------------


def test_method_that_keeps_the_axis_is_refused():
    params, batch = make_problem()
    method = mtl.metabalance(TASKS, reduce=False)
    with pytest.raises(ValueError) as caught:
        fork_step(method)(params, carrier_of(method), batch)
    assert str(caught.value) == (
        f"fork: the method must return updates shaped like the representation, {(BATCH, WIDTH)}; "
        f"found {(TASKS, BATCH, WIDTH)}. End the chain with one that removes the task axis, such as "
        "sum_tasks."
    )


def test_another_methods_carrier_is_refused():
    params, batch = make_problem()
    step = fork_step(mtl.multibalance(TASKS))
    raw = mtl.multibalance(TASKS).init(LIKE)
    for carrier in (
        carrier_of(mtl.mgda(TASKS)),
        carrier_of(mtl.multibalance(TASKS + 1)),
        jax.tree.map(lambda x: x.astype(float), raw),
    ):
        with pytest.raises(ValueError) as caught:
            step(params, carrier, batch)
        assert str(caught.value).startswith(
            "fork: the carrier is not of this method and representation: make it with "
            "fork_init(method, representation). "
        )


def test_the_operators_take_the_method_first_and_the_representation_last():
    for operator in (mtl.fork, mtl.fork_state):
        assert [*inspect.signature(operator).parameters][:3] == [
            *("method", "carrier", "representation")
        ]
    assert [*inspect.signature(mtl.fork_init).parameters] == ["method", "representation"]
    with pytest.raises(ValueError, match="the carrier is not of this method and representation"):
        mtl.fork(mtl.mgda(TASKS), LIKE, carrier_of(mtl.mgda(TASKS)))


def test_unknown_number_of_tasks_is_refused():
    method = aggregating.average_per_element_updates()
    h = jnp.ones(2)
    message = (
        "fork: cannot tell the number of tasks, because this transformation holds no method of mtl_optax. "
        "Give one, such as mtl_optax.multibalance(tasks), or pass tasks= for one of your own."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mtl.fork(method, mtl.fork_init(method, h), h)


def test_integers_of_the_representation_reach_the_heads():
    method = mtl.mgda(2)
    ids = jnp.array([2, 0])

    def loss_fn(w, carrier):
        copies, token = mtl.fork(method, carrier, {"dense": w**2, "ids": ids})
        a, b = (copy["dense"][copy["ids"]] for copy in copies)
        return mtl.join((a.sum(), -b[1]), token)

    w = jnp.arange(1.0, 4.0)
    carrier = mtl.fork_init(method, {"dense": w, "ids": ids})
    gradient, carrier = jax.jit(jax.grad(loss_fn, argnums=(0, 1)))(w, carrier)
    # The shortest combination of the cotangents [1, 0, 1] and [-1, 0, 0].
    np.testing.assert_allclose(carrier.weights[0], [0.4, 0.6], 1e-5)
    np.testing.assert_allclose(gradient, 2 * w * jnp.array([-0.2, 0.0, 0.4]), 1e-5)


def test_a_representation_without_gradients_is_refused():
    method = mtl.sum_tasks(2)
    for h, found in [
        ({"ids": jnp.ones(2, jnp.int32)}, "no leaf .* floating point, .* found int32 at .'ids'."),
        ({"key": jax.random.key(0), "h": jnp.ones(2)}, "leaf .'key'. is key<.*to the heads"),
        ({"f": jnp.ones(2, complex)}, "leaf .'f'. is complex.* as two leaves"),
    ]:
        with pytest.raises(TypeError, match=f"^fork: .*{found}"):
            mtl.fork(method, (), h)


def test_wrong_number_of_losses_is_refused():
    method = mtl.sum_tasks(2)
    h = jnp.ones(2)
    _, token = mtl.fork(method, mtl.fork_init(method, h), h)
    with pytest.raises(ValueError, match=r"^join: the fork has 2 tasks, found 3 losses\.$"):
        mtl.join(jnp.ones(3), token)
    message = (
        "join: active must have shape (2,), one entry per task in the order of the task axis; found "
        "(3,)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mtl.join(jnp.ones(2), token, active=jnp.ones(3, bool))


def test_forgotten_join():
    """A method that needs no losses does without; one that needs them says what is missing."""
    params, batch = make_problem()
    method = mtl.multibalance(TASKS)
    got = jax.jit(fork_step(method, joined=False))(params, carrier_of(method), batch)
    assert_close(got, jax.jit(fork_step(method))(params, carrier_of(method), batch))
    method = inverse_losses()
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(ValueError) as caught:
            wrap(fork_step(method, joined=False))(params, carrier_of(method), batch)
        assert str(caught.value).startswith("inverse: needs the losses of this step")
        assert caught.value.__notes__[0] == (
            "fork: the method was not given the losses: differentiate join(losses, token)."
        )
