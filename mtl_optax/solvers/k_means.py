"""Exact k-means of a few numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import safe_divide


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
      The cluster means, `[T]`; 0 for inactive entries. Cost: O(T^3).
    """
    size, dtype = points.shape[0], points.dtype
    peak = jnp.max(jnp.where(active, jnp.abs(points), 0))
    scaled = jnp.where(active, safe_divide(points, peak), 0)
    # Inactive entries are sorted last and have count 0, so they add nothing to any error.
    order = jnp.argsort(jnp.where(active, scaled, jnp.inf))
    values, counts = scaled[order], active[order].astype(dtype)

    mean, error = _intervals(values, counts)
    best = error[0]
    cuts = []
    for _ in range(num_groups - 1):
        totals = best[:, None] + error
        cuts.append(jnp.argmin(totals, axis=0))
        best = jnp.min(totals, axis=0)

    position, end, means = jnp.arange(size), size, jnp.zeros((size,), dtype)
    for cut in [*reversed(cuts), jnp.zeros((size + 1,), position.dtype)]:
        start = cut[end]
        means = jnp.where((position >= start) & (position < end), mean[start, end], means)
        end = start
    restored = jnp.zeros((size,), dtype).at[order].set(means)
    return jnp.where(active, restored * peak, 0)


def _intervals(values: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean, and `error[i, j]`, of the sorted numbers i to j - 1; infinite errors for j < i.

    Differences of sums of squares in place of the errors would lose accuracy by cancellation.
    """
    bounds = jnp.arange(values.shape[0] + 1)
    after = bounds[:, None] <= bounds[None, :-1]
    weights = jnp.where(after[:, None] & ~after[None], counts[None, None], 0)
    number = jnp.maximum(jnp.sum(weights, axis=-1), 1)
    mean = jnp.sum(weights * values[None, None], axis=-1) / number
    error = jnp.sum(weights * (values[None, None] - mean[..., None]) ** 2, axis=-1)
    return mean, jnp.where(bounds[:, None] <= bounds[None], error, jnp.inf)
