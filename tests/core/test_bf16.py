"""Training in bfloat16: statistics stay in float32, and are those of the same gradients in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl

T, STEPS = 2, 10


def _model(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "shared": jax.random.normal(keys[0], (6, 8)),
        "heads": jax.random.normal(keys[1], (T, 8)),
    }
    x = jax.random.normal(keys[2], (32, 6))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))


def _heads(heads, copies, x):
    targets = x[:, 0], -3 * x[:, 1]
    squares = [
        jnp.mean(jnp.square((h @ w - y).astype(jnp.float32)))
        for h, w, y in zip(copies, heads, targets, strict=True)
    ]
    return jnp.stack(squares)


def _train(place, dtype):
    params, x = _model(dtype)
    method, optimizer = mtl.multibalance(T), optax.sgd(1e-2)

    def encode(params):
        return jnp.tanh(x @ params["shared"])

    def forked(params, balance):
        def losses_of(params, fork):
            return _heads(params["heads"], fork(encode(params)), x)

        return mtl.fork_value_and_grad(losses_of, method)(params, balance)

    def per_task(params, balance):
        def losses_of(params):
            return _heads(params["heads"], (encode(params),) * T, x)

        losses, grads = mtl.per_task_value_and_grad(losses_of)(params)
        return losses, method.update(grads, balance, params, losses=losses)

    @jax.jit
    def step(params, balance, opt_state):
        _, (grads, balance) = (forked if place == "fork" else per_task)(params, balance)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), balance, opt_state

    h = jax.eval_shape(encode, params)
    balance = method.init(h if place == "fork" else params)
    opt_state = optimizer.init(params)
    weights = []
    for _ in range(STEPS):
        params, balance, opt_state = step(params, balance, opt_state)
        weights.append(balance.weights)
    return params, balance, np.stack(weights)


@pytest.mark.parametrize("place", ["fork", "per_task"])
def test_bf16_training_keeps_float32_statistics(place):
    params, balance, weights = _train(place, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    floats = [x for x in jax.tree.leaves(balance) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    assert weights.dtype == np.float32


def test_weights_of_a_bf16_representation_follow_those_of_float32():
    # On the parameters, rounded ones take another path: there the same gradients are compared, below.
    _, _, weights = _train("fork", jnp.bfloat16)
    _, _, expected = _train("fork", jnp.float32)
    np.testing.assert_allclose(weights, expected, atol=1e-2)


def test_bf16_gradients_count_as_their_float32_values():
    params, x = _model(jnp.bfloat16)
    method = mtl.multibalance(T)
    update = jax.jit(method.update)
    state = exact = method.init(params)

    @jax.jit
    @mtl.per_task_value_and_grad
    def gradients(params, scale):
        return _heads(params["heads"], (jnp.tanh(x @ params["shared"]),) * T, scale * x)

    for step in range(STEPS):
        scale = jnp.bfloat16(1 + step)
        losses, grads = gradients(params, scale)
        _, state = update(grads, state, params, losses=losses)
        whole = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
        _, exact = update(whole, exact, params, losses=losses)
        np.testing.assert_allclose(state.weights, exact.weights, rtol=1e-5)
