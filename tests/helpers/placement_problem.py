"""A small model of three tasks, and what a method on its representation does to it, written out."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.experimental import aggregating

import mtl_optax as mtl

TASKS, BATCH, INPUTS, WIDTH = 3, 11, 7, 5
LIKE = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.zeros(()).dtype)  # the representation


def make_problem(seed=0):
    """`(params, batch)`."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "shared": jax.random.normal(keys[0], (INPUTS, WIDTH)),
        "heads": jax.random.normal(keys[1], (WIDTH, TASKS)),
    }
    x = jax.random.normal(keys[2], (BATCH, INPUTS))
    y = jax.random.normal(keys[3], (BATCH, TASKS)) * jnp.asarray([[1.0, 3.0, 0.2]])
    return params, (x, y)


def encode(shared, x):
    return jnp.tanh(x @ shared)


def head_losses(heads, copies, y):
    predictions = [copies[t] @ heads[:, t] for t in range(TASKS)]
    return jnp.stack([jnp.mean((p - y[:, t]) ** 2) for t, p in enumerate(predictions)])


class Model(NamedTuple):
    """`encode(shared, x) -> h` and `head_losses(heads, copies, y) -> losses [T]`."""

    encode: Callable[..., Any] = encode
    head_losses: Callable[..., Any] = head_losses


PLAIN = Model()


def plain_losses(params, batch):
    """The losses without any fork."""
    x, y = batch
    return head_losses(params["heads"], (encode(params["shared"], x),) * TASKS, y)


def forked_losses(model=PLAIN):
    """The loss function for `fork_value_and_grad`."""

    def loss_fn(params, fork, batch):
        x, y = batch
        return model.head_losses(params["heads"], fork(model.encode(params["shared"], x)), y)

    return loss_fn


def explicit_step(method, params, state, batch, model=PLAIN, **extra):
    """What a method on the representation does: T pullbacks to it, then `method.update`."""
    return jax.jit(_explicit_step, static_argnums=(0, 1))(
        method, model, params, state, batch, extra
    )


def _explicit_step(method, model, params, state, batch, extra):
    x, y = batch
    h, pull_shared = jax.vjp(lambda shared: model.encode(shared, x), params["shared"])
    losses, pull_heads = jax.vjp(
        lambda heads, h: model.head_losses(heads, (h,) * TASKS, y), params["heads"], h
    )
    rows = jnp.stack([pull_heads(unit)[1] for unit in jnp.eye(TASKS)])
    update, state = optax.with_extra_args_support(method).update(
        rows, state, h, losses=losses, **extra
    )
    grads = {"shared": pull_shared(update)[0], "heads": pull_heads(jnp.ones(TASKS))[0]}
    return grads, state


def inverse_losses(tasks=TASKS):
    """A method that needs losses: weights 1 / L."""

    def weigh(inputs, state):
        positive = inputs.losses > 0
        return jnp.where(positive, 1 / jnp.where(positive, inputs.losses, 1), 0), state

    return mtl.from_rule("inverse", tasks, mtl.WeightRule(frozenset({"losses"}), weigh))


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


def descend(params, grads):
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def assert_close(got, want, rtol=2e-5):
    """Equality up to float32 rounding in another order of operations."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.max(np.abs(b), initial=0)))


def programs(jaxpr):
    """A program and all programs inside it."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from programs(inner)


def dot_products(closed):
    """How often each matrix product occurs, by the shapes of its operands."""
    return Counter(
        tuple(v.aval.shape for v in equation.invars)
        for program in programs(closed.jaxpr)
        for equation in program.eqns
        if equation.primitive.name == "dot_general"
    )


def products_of_the_bottom(closed):
    """How many matrix products read the input of the bottom."""
    return sum(n for shapes, n in dot_products(closed).items() if (BATCH, INPUTS) in shapes)
