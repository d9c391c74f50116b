"""Methods that need only losses: the same weights in every placement, and one backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl

T = 3
NAMES = [*sorted(n for n, row in mtl.METHODS.items() if row.needs == ("losses",)), "rlw"]
GRADIENT_METHODS = sorted(
    n for n, row in mtl.METHODS.items() if set(row.needs) & {"norms", "gram", "gradients"}
)
X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
W = jnp.linspace(0.2, 1.0, 6).reshape(3, 2)
TARGETS = jnp.array([0.3, 1.0, -0.5])


def head_losses(copies):
    return jnp.stack([((h - t) ** 2).mean() for h, t in zip(copies, TARGETS, strict=True)])


def task_losses(w):
    return head_losses([X @ w] * T)


def on_parameters(method):
    @jax.jit
    def step(w, state):
        losses, grads = mtl.per_task_value_and_grad(task_losses)(w)
        return method.update(grads, state, w, losses=losses)

    return step, method.init(W), lambda state: state


def on_representation(method):
    @jax.jit
    def step(w, carrier):
        _, (grad, carrier) = mtl.fork_value_and_grad(
            lambda w, fork: head_losses(fork(X @ w)), method
        )(w, carrier)
        return grad, carrier

    like = jnp.zeros((4, 2))
    return step, mtl.fork_init(method, like), lambda c: mtl.fork_state(method, c, like)


def on_losses(method):
    @jax.jit
    def step(w, state):
        return jax.grad(lambda w: mtl.weigh_losses(task_losses(w), state, method), has_aux=True)(w)

    return step, method.init(W), lambda state: state


@pytest.mark.parametrize("name", NAMES)
def test_same_weights_in_every_placement(name):
    method = mtl.METHODS[name].make(T)
    results = []
    for place in (on_parameters, on_representation, on_losses):
        step, state, read = place(method)
        w, gradients, weights = W, [], []
        for _ in range(3):
            gradient, state = step(w, state)
            w = w - 0.1 * gradient / jnp.linalg.norm(gradient)
            gradients.append(gradient)
            weights.append(read(state).weights)
        results.append((np.stack(weights), np.stack(gradients)))
        assert int(read(state).balance_count) == 3
    for weights, gradients in results[1:]:
        np.testing.assert_allclose(weights, results[0][0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gradients, results[0][1], rtol=1e-3, atol=1e-4)


def backward_passes(function, *args):
    """How often the bottom's product with its input is transposed."""
    text = str(jax.make_jaxpr(function)(*args))
    return text.count("dot_general") - 1


def test_one_backward_pass_through_the_bottom():
    method = mtl.scale_invariant(T)
    plain = backward_passes(jax.grad(lambda w: task_losses(w).sum()), W)
    for place in (on_representation, on_losses):
        step, state, _ = place(method)
        assert backward_passes(step, W, state) == plain == 1


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_methods_that_need_gradients_are_refused_on_losses(name):
    method = mtl.METHODS[name].make(T)
    state = method.init(jnp.zeros(T))
    with pytest.raises(ValueError, match=r"needs gradients .* cannot weigh losses alone.*fork"):
        mtl.weigh_losses(jnp.ones(T), state, method)


def test_an_absent_or_broken_loss_does_not_reach_the_sum():
    method = mtl.dwa(T)
    state = method.init(W)
    losses = jnp.array([1.0, np.nan, 2.0])
    total, state = mtl.weigh_losses(losses, state, method)
    assert float(total) == pytest.approx(3.0)
    assert state.skipped.tolist() == [0, 1, 0]
    active = jnp.array([True, False, False])
    total, state = mtl.weigh_losses(losses, state, method, active=active)
    assert float(total) == pytest.approx(1.0)
    assert state.skipped.tolist() == [0, 1, 0]


def test_extra_arguments_reach_the_method():
    method = mtl.rlw(T)
    noise = jnp.array([0.0, 1.0, 2.0])
    total, state = mtl.weigh_losses(jnp.ones(T), method.init(W), method, noise=noise)
    np.testing.assert_allclose(state.weights, jax.nn.softmax(noise), rtol=1e-6)
    assert float(total) == pytest.approx(1.0)
