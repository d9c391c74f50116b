"""A loss pulled back alone: the same gradient, without the other tasks' heads and their NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl


def _losses(params, x):
    h = jax.checkpoint(lambda h: jnp.tanh(h @ params["shared"]))(x)
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["shared"]), None), h, None, length=2)
    return [(h * params["heads"][0]).sum(), (h**2).mean() * params["heads"][1], x.sum()]


PARAMS = {"shared": 0.5 * jnp.eye(3), "heads": [jnp.asarray(2.0), jnp.asarray(3.0)]}
X = jnp.ones((2, 3))
FORMS = {
    "stack": lambda params, x: jnp.stack(_losses(params, x)),
    "array": lambda params, x: jnp.array(_losses(params, x)),
    "no stack": lambda params, x: jnp.stack(_losses(params, x))[jnp.arange(3)],
    "compiled": jax.jit(lambda params, x: jnp.stack(_losses(params, x))),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_by_one_equals_row_by_row_of_the_jacobian(form):
    loss_fn = FORMS[form]
    losses, grads = mtl.per_task_value_and_grad(loss_fn, mode="unroll")(PARAMS, X)
    np.testing.assert_allclose(losses, loss_fn(PARAMS, X))
    expected = jax.jacrev(loss_fn)(PARAMS, X)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_a_task_that_is_not_finite_leaves_the_others_alone():
    def loss_fn(params):
        h = params["shared"].sum()
        return jnp.stack([h * params["heads"][0], jnp.sqrt(h * params["heads"][1] - 100)])

    _, grads = jax.jit(mtl.per_task_value_and_grad(loss_fn, mode="unroll"))(PARAMS)
    assert np.isfinite(grads["shared"][0]).all() and np.isfinite(grads["heads"][1][0])
    assert not np.isfinite(grads["shared"][1]).any()


def test_the_heads_of_other_tasks_are_not_pulled_back():
    """Work grows with T alone, and not with its square."""

    def flops(num_tasks):
        def loss_fn(shared, heads, x):
            h = jnp.tanh(x @ shared)
            return jnp.stack([jnp.sum(jnp.tanh(h @ head) ** 2) for head in heads])

        shapes = jnp.ones((4, 8)), [jnp.ones((8, 64))] * num_tasks, jnp.ones((16, 4))
        step = mtl.per_task_value_and_grad(loss_fn, mode="unroll")
        return jax.jit(step).lower(*shapes).compile().cost_analysis()["flops"]

    assert flops(8) < 4.5 * flops(2)
