"""Cosines and norms from a Gram matrix: the input of every Gram-based solver."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import count_active, safe_divide


def cosine_matrix(gram: jax.Array, active: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Splits a Gram matrix into cosines and norms.

    If gradient norms differ by orders of magnitude, the entries of the Gram matrix differ by the square of
    that, and solving on it loses accuracy. Cosines do not have this problem.

    Args:
      gram: `[T, T]`, inner products of the task gradients.
      active: bool `[T]`, the tasks that count; all by default.

    Returns:
      `(cosine [T, T], norms [T])`. The diagonal of `cosine` is exactly 1 for nonzero gradients. A zero
      gradient or an inactive task has norm 0 and a zero row and column.
    """
    diagonal = jnp.diagonal(gram)
    if active is not None:
        diagonal = jnp.where(active, diagonal, 0)
    nonzero = diagonal > 0
    norms = jnp.sqrt(jnp.where(nonzero, diagonal, 1))
    both = nonzero[:, None] & nonzero[None, :]
    cosine = jnp.where(both, gram, 0) / norms[:, None] / norms[None, :]
    cosine = jnp.where(jnp.eye(len(norms), dtype=bool), 1, jnp.clip(cosine, -1, 1))
    return jnp.where(both, cosine, 0), jnp.where(nonzero, norms, 0)


def mask_inactive(
    cosine: jax.Array, norms: jax.Array, active: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sets the entries of inactive tasks to 0, NaN entries too.

    Returns:
      `(cosine, norms, active)`; `active` is a bool array `[T]` also if it was None.
    """
    if active is None:
        return cosine, norms, jnp.ones(norms.shape, bool)
    both = active[:, None] & active[None, :]
    return jnp.where(both, cosine, 0), jnp.where(active, norms, 0), active


def product(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Matrix times vector as a product and a sum: full precision on every backend, and fusible."""
    return jnp.sum(matrix * vector[None, :], axis=1)


def gram_product(cosine: jax.Array, norms: jax.Array, weights: jax.Array) -> jax.Array:
    """The inner product of every gradient with their weighted sum, finite for any norms.

    Norms above a quarter of the root of the largest number count as this. A gradient step on weights of
    such a size ends at a vertex of the simplex in any case.
    """
    largest = jnp.max(norms)
    lengths = safe_divide(norms, largest)
    products = lengths * product(cosine, lengths * weights)
    limit = float(jnp.finfo(norms.dtype).max) ** 0.5 / 4
    return products * jnp.minimum(largest, limit) ** 2


def uniform_weights(active: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Equal weights of sum 1 over the active tasks; all zero if no task is active."""
    return active.astype(dtype) / count_active(active, dtype)
