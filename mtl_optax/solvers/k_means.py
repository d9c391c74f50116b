"""Exact k-means of a few numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.loops import varying_like


def k_means_on_line(points: jax.Array, active: jax.Array, num_groups: int) -> jax.Array:
    """Replaces every number by the mean of its cluster, for the clusters of smallest squared error.

    In one dimension the optimal clusters are intervals of the sorted numbers, so dynamic programming over
    the boundaries finds the optimum: `best[k, j] = min_i best[k - 1, i] + error(i, j)`, where `error(i, j)`
    is the squared error of the sorted numbers i to j - 1. If several optima exist, one is chosen.

    Args:
      points: `[T]`, finite.
      active: numbers that count, bool `[T]`.
      num_groups: the number of clusters, static, 1 to T.

    Returns:
      The cluster means, `[T]`; 0 for inactive entries. Cost: O(T^2 num_groups).
    """
    size, dtype = points.shape[0], points.dtype
    peak = jnp.max(jnp.where(active, jnp.abs(points), 0))
    scaled = jnp.where(active, safe_divide(points, peak), 0)
    # Inactive entries are sorted last and have count 0, so they add nothing to any error.
    order = jnp.argsort(jnp.where(active, scaled, jnp.inf))
    values, counts = scaled[order], active[order].astype(dtype)

    error = _interval_errors(values, counts)
    best = error[0]
    cuts = []
    for _ in range(num_groups - 1):
        totals = best[:, None] + error
        cuts.append(jnp.argmin(totals, axis=0))
        best = jnp.min(totals, axis=0)

    position = jnp.arange(size)
    end = jnp.asarray(size, position.dtype)
    means = jnp.zeros((size,), dtype)
    for cut in [*reversed(cuts), jnp.zeros((size + 1,), position.dtype)]:
        start = cut[end].astype(position.dtype)
        inside = (position >= start) & (position < end)
        weight = jnp.where(inside, counts, 0)
        mean = jnp.sum(weight * values) / jnp.maximum(jnp.sum(weight), 1)
        means = jnp.where(inside, mean, means)
        end = start
    restored = jnp.zeros((size,), dtype).at[order].set(means)
    return jnp.where(active, restored * peak, 0)


def _interval_errors(values: jax.Array, counts: jax.Array) -> jax.Array:
    """`error[i, j]` of the sorted numbers i to j - 1, `[T + 1, T + 1]`; infinite for j < i.

    Means and errors of all intervals are updated together, by one number per step (Welford's method).
    Differences of sums of squares would lose accuracy by cancellation.
    """
    size, dtype = values.shape[0], values.dtype
    starts = jnp.arange(size + 1)

    def lengthen(carry: tuple[jax.Array, jax.Array, jax.Array], item: tuple) -> tuple:
        number, mean, error = carry
        value, count, index = item
        joins = jnp.where(starts <= index, count, 0)
        after = number + joins
        delta = value - mean
        moved = mean + joins * delta / jnp.maximum(after, 1)
        error = error + joins * delta * (value - moved)
        return (after, moved, error), jnp.where(starts <= index + 1, error, jnp.inf)

    zeros = jnp.zeros((size + 1,), dtype)
    first = jnp.where(starts == 0, zeros, jnp.inf)
    _, columns = lax.scan(
        lengthen, varying_like(values, (zeros, zeros, zeros)), (values, counts, jnp.arange(size))
    )
    return jnp.concatenate([first[None], columns]).T
