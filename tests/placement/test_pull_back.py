"""A loss pulled back alone: the same gradient, without the other tasks' heads and their NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling import sampled

import mtl_optax as mtl


def _losses(params, x):
    h = jax.checkpoint(lambda h: jnp.tanh(h @ params["shared"]))(x)
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["shared"]), None), h, None, length=2)
    return [(h * params["heads"][0]).sum(), (h**2).mean() * params["heads"][1], x.sum()]


PARAMS = {"shared": 0.5 * jnp.eye(3), "heads": [jnp.asarray(2.0), jnp.asarray(3.0)]}
X = jnp.ones((2, 3))
FORMS = {
    "tuple": lambda params, x: tuple(_losses(params, x)),
    "dictionary": lambda params, x: dict(zip("abc", _losses(params, x), strict=True)),
    "stack": lambda params, x: jnp.stack(_losses(params, x)),
    "array": lambda params, x: jnp.array(_losses(params, x)),
    "no stack": lambda params, x: jnp.stack(_losses(params, x))[jnp.arange(3)],
    "compiled": jax.jit(lambda params, x: jnp.stack(_losses(params, x))),
}


@functools.cache
def jacobian():
    return jax.jit(jax.jacrev(FORMS["stack"]))(PARAMS, X)


@pytest.mark.parametrize("form", sampled(FORMS, ["dictionary", "array"]))
def test_one_by_one_equals_row_by_row_of_the_jacobian(form):
    loss_fn = FORMS[form]
    fn = jax.jit(mtl.per_task_value_and_grad(loss_fn, mode="unroll"))
    losses, grads = fn(PARAMS, X)
    jax.tree.map(np.testing.assert_allclose, losses, jax.jit(loss_fn)(PARAMS, X))
    expected = jacobian()
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


# --- a task whose derivative is not finite -----------------------------------------------------------

FIVE = {name: jnp.full(3, 0.5) for name in ("shared", "a", "b", "d", "e")}


def _head(params, name, h):
    return (h * params[name]).sum()


def _root_of_zero(params, h):
    return jnp.sqrt(0.0 * _head(params, "b", h))  # finite, its derivative infinity times 0


def _zero_by_zero(params, h):
    none = 0.0 * _head(params, "b", h)
    return none / none


def _in_scan(head):
    def one(params, h):
        return jax.lax.scan(lambda total, _: (total + head(params, h), None), 0.0, None, length=2)[
            0
        ]

    return one


@jax.custom_vjp
def _root(x):
    return jnp.sqrt(x)


_root.defvjp(lambda x: (jnp.sqrt(x), x), lambda x, c: (c / (2 * jnp.sqrt(x)),))
BROKEN = {
    "a root of 0": _root_of_zero,
    "0/0": _zero_by_zero,
    "a scan": _in_scan(_root_of_zero),
    "nested jit": jax.jit(lambda *args: jax.jit(_zero_by_zero)(*args)),
    "custom_vjp": lambda params, h: _root(0.0 * _head(params, "b", h)),
}


def _five(broken):
    """Five heads, of which `broken` is task b and task c has no parameters."""

    def losses_of(params):
        h = jnp.tanh(params["shared"])
        losses = {name: _head(params, name, h) for name in "ade"}
        return {**losses, "b": broken(params, h), "c": jnp.asarray(3.0)}

    return losses_of


def _together(name):
    """Two heads in one construct."""

    def heads(params):
        h = jnp.tanh(params["shared"])
        return _head(params, "a", h), _root_of_zero(params, h)

    def scanned(params):
        step = lambda total, _: (jax.tree.map(jnp.add, total, heads(params)), None)  # noqa: E731
        return jax.lax.scan(step, (0.0, 0.0), None, length=2)[0]

    return {
        "jit": jax.jit(heads),
        "checkpoint": jax.checkpoint(heads),
        "scan": scanned,
        "cond": lambda params: jax.lax.cond(params["a"][0] > 0, heads, heads, params),
    }[name]


def _finite_rows(grads, num_tasks):
    return [
        all(np.isfinite(leaf[t]).all() for leaf in jax.tree.leaves(grads)) for t in range(num_tasks)
    ]


@pytest.mark.parametrize("name", sampled(BROKEN, ["0/0", "custom_vjp"]))
@pytest.mark.parametrize("mode", sampled(["auto", "unroll"], ["auto"]))
def test_a_task_that_is_not_finite_leaves_the_others_alone(name, mode):
    method = mtl.mgda(tuple("abcde"))

    @jax.jit
    def step(params):
        losses, grads = mtl.per_task_value_and_grad(_five(BROKEN[name]), mode=mode)(params)
        return grads, method.update(grads, method.init(params), params, losses=losses)

    grads, (update, state) = step(FIVE)
    assert _finite_rows(grads, 5) == [True, False, True, True, True]
    assert mtl.diagnostics(state, method)["skipped"] == {"a": 0, "b": 1, "c": 0, "d": 0, "e": 0}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(update))


@pytest.mark.parametrize("name", sampled(["jit", "checkpoint", "scan", "cond"], ["scan", "cond"]))
def test_heads_in_one_construct_stay_apart(name):
    _, grads = mtl.per_task_value_and_grad(_together(name))(FIVE)
    assert _finite_rows(grads, 2) == [True, False]


@pytest.mark.parametrize("mode", sampled(["vmap", "map"], ["map"]))
def test_the_other_modes_skip_all_tasks(mode):
    """What their docstrings say: a zero cotangent times an infinite derivative is NaN."""
    _, grads = mtl.per_task_value_and_grad(_five(_root_of_zero), mode=mode)(FIVE)
    assert _finite_rows(grads["shared"], 5) == [False] * 5


ARRAYS = {"stack": jnp.stack, "array": jnp.array, "jit": jax.jit(jnp.stack)}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_losses_skips_all_tasks_unless_a_final_stack_made_it(name):
    losses_of = lambda params: ARRAYS[name](_together("jit")(params))  # noqa: E731
    _, grads = mtl.per_task_value_and_grad(losses_of)(FIVE)
    assert _finite_rows(grads["shared"], 2) == [name != "jit", False]


def test_split_gradients_of_the_shared_part_stay_apart():
    def decode(heads, h):
        return {"a": _head(heads, "a", h), "b": _root_of_zero(heads, h)}

    fn = mtl.split_value_and_grad(jnp.tanh, decode)
    _, (shared, heads) = fn(FIVE["shared"], {"a": FIVE["a"], "b": FIVE["b"]})
    assert np.isfinite(shared[0]).all() and not np.isfinite(shared[1]).any()
    assert np.isfinite(heads["a"]).all()


def test_one_task_a_step_is_that_task_alone():
    fn = mtl.one_task_value_and_grad(_five(_root_of_zero), 5)
    finite = [_finite_rows(fn(step, FIVE)[1][0], 5) for step in range(2)]
    assert finite == [[True] * 5, [True, False, True, True, True]]


@pytest.mark.parametrize("dtype", sampled([jnp.float16, jnp.bfloat16], [jnp.bfloat16]))
def test_losses_of_few_bits_and_of_several_dtypes(dtype):
    def loss_fn(w):
        return {"a": (w * w).sum(), "b": w.sum().astype(jnp.float32), "c": 0}

    w = jnp.arange(3, dtype=dtype)
    _, grads = mtl.per_task_value_and_grad(loss_fn)(w)
    assert grads.dtype == dtype and grads.tolist() == [[0.0, 2.0, 4.0], [1.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("form", [tuple, jnp.stack])
def test_the_heads_of_other_tasks_are_not_pulled_back(form):
    """Work grows with T alone, and not with its square."""

    def flops(num_tasks):
        def loss_fn(shared, heads, x):
            h = jnp.tanh(x @ shared)
            return form([jnp.sum(jnp.tanh(h @ head) ** 2) for head in heads])

        shapes = jnp.ones((4, 8)), [jnp.ones((8, 64))] * num_tasks, jnp.ones((16, 4))
        step = mtl.per_task_value_and_grad(loss_fn, mode="unroll")
        return jax.jit(step).lower(*shapes).compile().cost_analysis()["flops"]

    assert flops(8) < 4.5 * flops(2)
