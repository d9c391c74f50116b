"""Euclidean projection onto the probability simplex."""

import jax
import jax.numpy as jnp


def project_onto_simplex(point: jax.Array, active: jax.Array | None = None) -> jax.Array:
    """Nearest point of ``{x >= 0, sum x = 1}`` in the Euclidean norm.

    The projection is ``max(point - threshold, 0)``. The threshold that belongs to a candidate support
    (all entries not below entry ``i``) is found for every ``i`` at once from a ``[T, T]`` comparison: at
    these sizes that is cheaper than a sort, and ties need no care.

    Args:
        point: the point to project, ``[T]``.
        active: tasks that count, bool ``[T]``; the others get 0. All by default.

    Returns:
        The projection, ``[T]``; all zero when no task is active.
    """
    if active is None:
        active = jnp.ones(point.shape, bool)
    lowest = jnp.finfo(point.dtype).min
    largest = jnp.max(jnp.where(active, point, lowest))
    # Only entries within 1 of the largest can be in the support. Shifting by the largest entry makes
    # huge inputs exact, and clipping there keeps everything finite.
    shifted = jnp.clip(jnp.where(active, point, lowest) - largest, -1, 0)
    shifted = jnp.where(active, shifted, -1)
    not_below = (shifted[None, :] >= shifted[:, None]).astype(point.dtype)
    sums = jnp.sum(not_below * shifted[None, :], axis=1)
    counts = jnp.sum(not_below, axis=1)
    support = active & (1 + counts * shifted > sums)
    size = jnp.maximum(jnp.sum(support.astype(point.dtype)), 1)
    threshold = (jnp.sum(jnp.where(support, shifted, 0)) - 1) / size
    return jnp.where(support, jnp.maximum(shifted - threshold, 0), 0)


def renormalize(weights: jax.Array, active: jax.Array) -> jax.Array:
    """Weights of the active tasks, divided by their sum; equal ones where they are all 0.

    What a method that remembers simplex weights starts from while a task is absent.
    """
    count = jnp.maximum(jnp.sum(active, dtype=jnp.int32), 1).astype(weights.dtype)
    kept = jnp.where(active, weights, 0)
    total = jnp.sum(kept)
    shares = kept / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, shares, active.astype(weights.dtype) / count)


def keep_shares(new: jax.Array, old: jax.Array, active: jax.Array) -> jax.Array:
    """What to remember of ``new``, weights of sum 1 over the active tasks, while others are absent.

    The active tasks divide among them what they had together in ``old``; the others keep what they had.
    Stored as it is, ``new`` would make the sum exceed 1, and a task that is absent now and then would
    lose a part of its share each time.

    Args:
        new: ``[T]``, sum 1 over the active tasks.
        old: ``[T]``, sum 1 over all.
        active: bool ``[T]``.

    Returns:
        ``[T]``, sum 1; exactly ``new`` where all are active.
    """
    share = jnp.sum(jnp.where(active, old, 0))
    return jnp.where(active, new * jnp.where(jnp.all(active), 1, share), old)
