"""In which order a task meets the others, for methods that project gradients one after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax.from_rule import Evidence


def check_order(name: str, order: Any) -> None:
    """Raises where `order` is no known way to choose the order."""
    if order not in ("random", "cyclic"):
        raise ValueError(f'{name}: order must be "random" or "cyclic"; found {order!r}.')


def projection_order(
    name: str, num_tasks: int, order: str, seed: int, evidence: Evidence
) -> jax.Array:
    """`[T, T]` integers: row i lists the tasks in the order in which task i meets them.

    The extra argument `order` of `update` overrides the choice. "cyclic" starts with the next task;
    "random" shuffles every row anew each step. A task's own number may stand anywhere: it is skipped.
    """
    given = None if evidence.extra is None else evidence.extra.get("order")
    if given is not None:
        if jnp.shape(given) != (num_tasks, num_tasks) or not jnp.issubdtype(
            jnp.result_type(given), jnp.integer
        ):
            raise ValueError(
                f"{name}: order= must be integers of shape ({num_tasks}, {num_tasks}), row i the order "
                f"in which task i meets the others; found {jnp.result_type(given)} "
                f"{jnp.shape(given)}."
            )
        return jnp.asarray(given)
    ascending = jnp.arange(num_tasks, dtype=jnp.int32)
    if order == "cyclic":
        return (ascending[:, None] + 1 + ascending[None, :]) % num_tasks
    key = jax.random.fold_in(jax.random.key(seed), evidence.step)
    rows = jnp.broadcast_to(ascending[None, :], (num_tasks, num_tasks))
    return jax.random.permutation(key, rows, axis=1, independent=True)


def raw_weights(added: jax.Array, norms: jax.Array) -> jax.Array:
    """Weights `[T]` of the sum of gradients `g_i + n_i sum_j added[i, j] g_j / n_j`.

    The ratio of norms is formed first: each norm may be extreme where it is not.
    """
    inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    return 1 + jnp.sum(added * (norms[:, None] * inverse[None, :]), axis=0)
