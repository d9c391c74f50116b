"""Euclidean projection onto the probability simplex, and simplex weights with absent tasks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import count_active, safe_divide
from mtl_optax.solvers.cosine import uniform_weights


def project_onto_simplex(point: jax.Array, active: jax.Array | None = None) -> jax.Array:
    """The nearest point of `{x >= 0, sum x = 1}` in the Euclidean norm.

    The projection is `max(point - threshold, 0)`. The threshold of every candidate support (all entries
    not below entry i) is computed at once from a `[T, T]` comparison. For few tasks this is cheaper than
    a sort, and ties need no special treatment.

    Args:
      point: the point to project, `[T]`.
      active: tasks that count, bool `[T]`; the others get 0. All by default.

    Returns:
      The projection, `[T]`; all zero if no task is active.
    """
    if active is None:
        active = jnp.ones(point.shape, bool)
    lowest = jnp.finfo(point.dtype).min
    largest = jnp.max(jnp.where(active, point, lowest))
    # Only entries within 1 of the largest can be in the support. Subtracting the largest entry keeps
    # very large inputs exact, and clipping keeps everything finite.
    shifted = jnp.clip(jnp.where(active, point, lowest) - largest, -1, 0)
    shifted = jnp.where(active, shifted, -1)
    not_below = (shifted[None, :] >= shifted[:, None]).astype(point.dtype)
    sums = jnp.sum(not_below * shifted[None, :], axis=1)
    counts = jnp.sum(not_below, axis=1)
    support = active & (1 + counts * shifted > sums)
    size = count_active(support, point.dtype)
    threshold = (jnp.sum(shifted, where=support) - 1) / size
    return jnp.where(support, jnp.maximum(shifted - threshold, 0), 0)


def renormalize(weights: jax.Array, active: jax.Array) -> jax.Array:
    """The weights of the active tasks divided by their sum; equal weights if they are all 0.

    The starting point of a method that stores simplex weights, in a step with absent tasks.
    """
    kept = jnp.where(active, weights, 0)
    return safe_divide(kept, jnp.sum(kept), uniform_weights(active, weights.dtype))


def keep_shares(new: jax.Array, old: jax.Array, active: jax.Array) -> jax.Array:
    """The simplex weights to store after a step with absent tasks.

    Absent tasks keep their old weights, and `new` is scaled to the sum of the old weights of the active
    tasks. Without the scaling the sum would exceed 1, and a task would lose weight by every absence.

    Args:
      new: `[T]`, sum 1 over the active tasks.
      old: `[T]`, sum 1 over all tasks.
      active: bool `[T]`.

    Returns:
      `[T]`, sum 1; exactly `new` if all tasks are active.
    """
    share = jnp.sum(old, where=active)
    return jnp.where(active, new * jnp.where(jnp.all(active), 1, share), old)
