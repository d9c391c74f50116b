"""Methods that need only losses: `weigh_losses`, and the same weights in every placement."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_properties import make
from placement_problem import assert_close, inverse_losses, make_problem, plain_losses, programs
from sampling import sampled

import mtl_optax as mtl

T = 3
ON_LOSSES = sorted(n for n, row in mtl.METHODS.items() if set(row.needs) <= {"losses"})
NAMES = [n for n in ON_LOSSES if mtl.METHODS[n].needs] + ["rlw"]
# One with averages, one with trained weights, one with a random draw, and one on a single line.
SAMPLE = ("igb", "uncertainty", "rlw", "scale_invariant")
GRADIENT_METHODS = sorted(set(mtl.METHODS) - set(ON_LOSSES))
X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
W = jnp.linspace(0.2, 1.0, 6).reshape(3, 2)
TARGETS = jnp.array([0.3, 1.0, -0.5])


def head_losses(copies):
    return jnp.stack([((h - t) ** 2).mean() for h, t in zip(copies, TARGETS, strict=True)])


def task_losses(w):
    return head_losses([X @ w] * T)


# --- the same weights in every placement -------------------------------------------------------------


def on_parameters(method):
    def step(w, state):
        losses, grads = mtl.per_task_value_and_grad(task_losses)(w)
        return method.update(grads, state, w, losses=losses)

    return step, method.init(W)


def on_representation(method):
    def step(w, state):
        fn = mtl.fork_value_and_grad(lambda w, fork: head_losses(fork(X @ w)), method)
        return fn(w, state)[1]

    return step, method.init(jnp.zeros((4, 2)))


def on_losses(method):
    def step(w, state):
        return jax.grad(lambda w: mtl.weigh_losses(task_losses(w), state, method), has_aux=True)(w)

    return step, method.init(W)


PLACES = (on_parameters, on_representation, on_losses)


@pytest.mark.parametrize("name", sampled(NAMES, SAMPLE))
def test_same_weights_in_every_placement(name):
    method = make(name, T)
    steps, states = zip(*(place(method) for place in PLACES), strict=True)

    @jax.jit
    def every_place(ws, states):
        return [step(w, state) for step, w, state in zip(steps, ws, states, strict=True)]

    ws = [W] * len(PLACES)
    for count in range(3):
        gradients, states = zip(*every_place(ws, states), strict=True)
        ws = [
            w - 0.1 * g / jnp.linalg.norm(g)
            for w, g in zip(ws, jax.device_get(gradients), strict=True)
        ]
        for gradient, state in zip(gradients, states, strict=True):
            np.testing.assert_allclose(state.weights, states[0].weights, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(gradient, gradients[0], rtol=1e-3, atol=1e-4)
            assert int(state.balance_count) == count + 1


def backward_passes(function, *args):
    """How often the bottom's product with its input is transposed."""
    text = str(jax.make_jaxpr(function)(*args))
    return text.count("dot_general") - 1


def test_one_backward_pass_through_the_bottom():
    method = mtl.scale_invariant(T)
    plain = backward_passes(jax.grad(lambda w: task_losses(w).sum()), W)
    for place in (on_representation, on_losses):
        assert backward_passes(*place(method)[:1], W, place(method)[1]) == plain == 1


# --- the weighted sum --------------------------------------------------------------------------------


def test_the_sum_and_its_gradient():
    params, batch = make_problem()
    method = inverse_losses()

    @jax.jit
    def step(params, state):
        def loss_fn(params):
            return mtl.weigh_losses(plain_losses(params, batch), state, method)

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    (total, state), grads = step(params, method.init(params))
    losses, each = mtl.per_task_value_and_grad(plain_losses)(params, batch)
    assert_close(total, jnp.asarray(float(T)))
    assert_close(grads, jax.tree.map(lambda g: jnp.tensordot(1 / losses, g, axes=1), each))
    assert_close(mtl.diagnostics(state)["weights"], 1 / losses)


def test_absent_and_nan_tasks_are_left_out():
    method = inverse_losses()
    active = jnp.asarray([True, False, True])

    def loss_fn(w, state):
        losses = jnp.stack([w, 2 * w, jnp.asarray(jnp.nan)])
        return mtl.weigh_losses(losses, state, method, active=active)

    w = jnp.asarray(2.0)
    (total, state), grad = jax.value_and_grad(loss_fn, has_aux=True)(w, method.init(w))
    assert (float(total), float(grad)) == (1.0, 0.5)
    assert state.weights.tolist() == [[0.5, 0.0, 0.0]]
    assert state.skipped.tolist() == [0, 0, 1]


def test_extra_arguments_reach_the_method():
    method = mtl.rlw(T)
    noise = jnp.array([0.0, 1.0, 2.0])
    total, state = mtl.weigh_losses(jnp.ones(T), method.init(W), method, noise=noise)
    np.testing.assert_allclose(state.weights, jax.nn.softmax(noise)[None], rtol=1e-6)
    assert float(total) == pytest.approx(1.0)


@pytest.mark.parametrize("named", [False, True])
def test_losses_by_name(named):
    """Weights go to the losses of their names, whatever the order of the dictionary."""
    names = ("click", "cart", "buy")
    method = inverse_losses(names if named else T)
    state = method.init(W)

    def loss_fn(w, state):
        losses = {"click": 4 * w, "buy": w, "cart": 2 * w}
        active = {"buy": True, "click": True, "cart": False}
        return mtl.weigh_losses(losses, state, method, active=active)

    (total, state), grad = jax.value_and_grad(loss_fn, has_aux=True)(jnp.asarray(2.0), state)
    assert state.weights.tolist() == [[0.5, 0.0, 0.125]]  # buy, cart, click
    assert (float(total), float(grad)) == (2.0, 1.0)
    if named:
        message = "must have one entry per task, ['buy', 'cart', 'click']; found ['a', 'b', 'c']."
        with pytest.raises(ValueError, match=re.escape(message)):
            mtl.weigh_losses(dict.fromkeys("abc", jnp.ones(())), state, method)


# --- the same as an update ---------------------------------------------------------------------------


def weights_on_identity(tx, state, losses):
    """The definition: what the transformation makes of one unit vector a task."""
    return tx.update(jnp.eye(T), state, jnp.zeros(T), losses=losses)


@pytest.mark.parametrize("name", sampled(ON_LOSSES, SAMPLE))
def test_weights_are_those_of_an_update_on_an_identity(name):
    method = make(name, T)

    @jax.jit
    def both(losses, state, same):
        _, new = mtl.weigh_losses(losses, state, method)
        return mtl.head_weights(new), new, weights_on_identity(method, same, losses)

    # A method that needs no losses does not look at them in `update`: there NaN has no effect.
    second = jnp.nan if method.needs else 4.0
    state = same = method.init(W)
    for losses in (jnp.array([1.0, 3.0, 0.2]), jnp.array([0.5, second, 0.3])):
        weights, state, (expected, same) = both(losses, state, same)
        assert_close(weights, expected)
        assert_close(state, same)
        assert weights.any()


@pytest.mark.parametrize("name", [n for n in ON_LOSSES if not mtl.METHODS[n].needs])
def test_a_broken_loss_is_left_out_by_methods_that_need_none(name):
    method = make(name, T)
    total, state = mtl.weigh_losses(jnp.array([1.0, jnp.inf, 2.0]), method.init(W), method)
    weights = mtl.head_weights(state)
    assert float(total) == pytest.approx(float(weights[0] + 2 * weights[2]))
    assert weights[1] == 0 and weights[0] != 0
    assert state.skipped.tolist() == [0, 1, 0]


@pytest.mark.parametrize("shape", [(), (2,), (2, 2), (2, 3)])
def test_any_shape_of_parameters(shape):
    """Parameters that happen to look like a stack of tasks are not taken for one."""
    method = inverse_losses(2)
    state = method.init(jnp.ones(shape))
    assert float(mtl.weigh_losses(jnp.asarray([1.0, 4.0]), state, method)[0]) == 2.0


# --- what it costs -----------------------------------------------------------------------------------


# These two compare pairs of tasks, as their docstrings say.
@pytest.mark.parametrize(
    "name", sampled([n for n in ON_LOSSES if n not in ("go4align", "ldc_mtl")], SAMPLE)
)
def test_ten_thousand_losses_need_no_matrix(name):
    """Arrays grow with T, and not with its square; a KL ball takes 128 trial multipliers a task."""
    many = 10_000
    method = make(name, many)
    state = jax.eval_shape(method.init, jax.ShapeDtypeStruct((), jnp.float32))

    def step(w, scales, state):
        return jax.grad(lambda w: mtl.weigh_losses(w * scales, state, method), has_aux=True)(w)

    traced = jax.make_jaxpr(step)(jnp.ones(()), jnp.ones(many), state)
    sizes = [
        variable.aval.size
        for program in programs(traced.jaxpr)
        for variable in (
            *program.constvars,
            *program.invars,
            *(out for equation in program.eqns for out in equation.outvars),
        )
    ]
    assert many <= max(sizes) <= 128 * many


# --- mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_methods_that_need_gradients_are_refused(name):
    method = make(name, T)
    state = method.init(jnp.zeros(T))
    with pytest.raises(ValueError) as caught:
        mtl.weigh_losses(jnp.ones(T), state, method)
    assert str(caught.value) == (
        f"{name}: looks at gradients ({', '.join(sorted(method.needs))}), so it cannot weigh losses "
        "alone. Use it with mtl_optax.fork_value_and_grad (one backward pass) or "
        "mtl_optax.per_task_value_and_grad."
    )


def test_chains_are_refused():
    """What a chain does to gradients says nothing about losses; test_misuse.py has other wrappers."""
    tx = optax.chain(mtl.per_task(optax.scale(2.0), T), inverse_losses())
    with pytest.raises(TypeError, match=r"weigh_losses: method must be what a factory .* returned"):
        mtl.weigh_losses(jnp.ones(T), tx.init(jnp.zeros(T)), tx)


def test_blocks_of_a_method_on_losses_all_have_the_same_weights():
    """The weight of a task is that of each block, and not their sum."""
    params = {"a": jnp.zeros(2), "b": jnp.zeros(3), "c": jnp.zeros(())}
    losses = jnp.array([0.5, 2.0, 4.0])
    method = mtl.scale_invariant(3, blocks="leaf")
    total, state = mtl.weigh_losses(losses, method.init(params), method)
    assert state.weights.shape == (3, 3)
    assert float(total) == pytest.approx(3.0)
    np.testing.assert_allclose(mtl.head_weights(state), 1 / losses, rtol=1e-6)


def test_head_weights_are_the_mean_over_blocks():
    method = mtl.metabalance(2, relax_factor=1.0)
    grads = {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[1.0], [4.0]])}
    _, state = method.update(grads, method.init({"a": jnp.zeros(1), "b": jnp.zeros(1)}))
    np.testing.assert_allclose(mtl.head_weights(state), [1.0, (1 / 2 + 1 / 4) / 2], rtol=1e-6)
