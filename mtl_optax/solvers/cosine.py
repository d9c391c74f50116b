"""The lengths and angles of gradients: the input of every solver on the Gram matrix."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import count_active, safe_divide


class Geometry(NamedTuple):
    """The lengths and angles of the task gradients, from which solvers compute weights.

    Attributes:
      cosine: `[T, T]`; the rows and columns of zero gradients and inactive tasks are 0.
      norms: `[T]`; 0 for inactive tasks.
      active: bool `[T]`, the tasks that count.
    """

    cosine: jax.Array
    norms: jax.Array
    active: jax.Array

    @property
    def nonzero(self) -> jax.Array:
        """Bool `[T]`, the active tasks with a nonzero gradient."""
        return self.norms > 0

    def over_norms(self, reference: jax.typing.ArrayLike) -> jax.Array:
        """`reference / norms`, and 0 for zero gradients."""
        return safe_divide(reference, self.norms)


def geometry_of(gram: jax.Array, active: jax.Array | None = None) -> Geometry:
    """Splits a Gram matrix into cosines and norms.

    If gradient norms differ by orders of magnitude, the entries of the Gram matrix differ by the square of
    that, and solving on it loses accuracy. Cosines do not have this problem.

    Args:
      gram: `[T, T]`, inner products of the task gradients.
      active: bool `[T]`, the tasks that count; all by default. The others may have any entries.

    Returns:
      The geometry. The diagonal of `cosine` is exactly 1 for nonzero gradients.
    """
    diagonal = jnp.diagonal(gram)
    active = jnp.ones(diagonal.shape, bool) if active is None else active
    nonzero = active & (diagonal > 0)
    norms = jnp.sqrt(jnp.where(nonzero, diagonal, 1))
    both = nonzero[:, None] & nonzero[None, :]
    cosine = jnp.where(both, gram, 0) / norms[:, None] / norms[None, :]
    cosine = jnp.where(jnp.eye(len(norms), dtype=bool), 1, jnp.clip(cosine, -1, 1))
    return Geometry(jnp.where(both, cosine, 0), jnp.where(nonzero, norms, 0), active)


def product(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Matrix times vector as a product and a sum: full precision on every backend, and fusible."""
    return jnp.sum(matrix * vector[None, :], axis=1)


def gram_product(cosine: jax.Array, norms: jax.Array, weights: jax.Array) -> jax.Array:
    """The inner product of every gradient with their weighted sum, finite for any norms.

    Norms are limited to a quarter of the square root of the dtype's largest number. With larger norms, a
    gradient step on weights ends at a vertex of the simplex in any case.
    """
    largest = jnp.max(norms)
    lengths = safe_divide(norms, largest)
    products = lengths * product(cosine, lengths * weights)
    limit = float(jnp.finfo(norms.dtype).max) ** 0.5 / 4
    return products * jnp.minimum(largest, limit) ** 2


def uniform_weights(active: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Equal weights of sum 1 over the active tasks; all zero if no task is active."""
    return active.astype(dtype) / count_active(active, dtype)
