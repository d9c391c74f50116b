"""`sharpness_aware`: the gradients of the tasks at parameters that are moved uphill."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl

PARAMS = {"w": jnp.array([[0.5, -1.0], [2.0, 0.3]]), "b": jnp.array([0.1, -0.2])}
X = jax.random.normal(jax.random.key(0), (16, 2))


def loss_fn(params, x):
    h = jnp.tanh(x @ params["w"] + params["b"][None])
    return {"a": jnp.mean((h[:, 0] - x[:, 0]) ** 2), "b": 9 * jnp.mean((h[:, 1] + x[:, 1]) ** 2)}


def loss_of(task, params):
    return loss_fn(params, X)[task]


def unit(tree):
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: leaf / norm, tree)


def uphill(loss):
    @jax.jit
    def moved(params):
        return jax.tree.map(lambda p, g: p + 0.1 * g, params, unit(jax.grad(loss)(params)))

    return moved(PARAMS)


GRAD_FN = mtl.per_task_value_and_grad(loss_fn)


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), left, right)


def test_all_tasks_move_by_the_gradient_of_the_sum():
    losses, grads = jax.jit(mtl.sharpness_aware(GRAD_FN, 0.1))(PARAMS, X)
    assert_close(losses, loss_fn(PARAMS, X))
    moved = uphill(lambda p: sum(loss_fn(p, X).values()))
    assert_close(grads, jax.jit(GRAD_FN)(moved, X)[1])


def test_each_task_moves_by_its_own_gradient():
    _, grads = jax.jit(mtl.sharpness_aware(GRAD_FN, 0.1, each_task=True))(PARAMS, X)
    for row, task in enumerate(("a", "b")):
        alone = functools.partial(loss_of, task)
        expected = jax.grad(alone)(uphill(alone))
        assert_close(jax.tree.map(lambda g, row=row: g[row], grads), expected)


@pytest.mark.parametrize("each_task", [False, True])
def test_a_broken_task_does_not_move_the_others(each_task):
    def broken(params, x):
        return {**loss_fn(params, x), "c": jnp.sqrt(-1.0 - params["b"][0] ** 2)}

    aware = mtl.sharpness_aware(mtl.per_task_value_and_grad(broken), 0.1, each_task=each_task)
    _, grads = jax.jit(aware)(PARAMS, X)
    _, expected = jax.jit(mtl.sharpness_aware(GRAD_FN, 0.1, each_task=each_task))(PARAMS, X)
    assert_close(jax.tree.map(lambda g: g[:2], grads), expected)
    assert np.isnan(grads["b"][2]).any()


def test_zero_gradients_move_nothing():
    flat = mtl.per_task_value_and_grad(lambda p: {"a": 0 * p["b"][0], "b": 0 * p["b"][1]})
    _, grads = mtl.sharpness_aware(flat, 0.1, each_task=True)(PARAMS)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_a_negative_radius_is_refused():
    with pytest.raises(ValueError, match="radius"):
        mtl.sharpness_aware(GRAD_FN, -0.1)
