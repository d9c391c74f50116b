"""Aligned-MTL: weights for which all singular values of the gradient matrix become equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.cosine import Geometry
from mtl_optax.solvers.spectral import kept_eigenpairs, rotate


def _common_value(singular: jax.Array, kept: jax.Array, scale: str) -> jax.Array:
    """The value that all singular values become; `singular` is ascending, the kept ones are last."""
    count = jnp.sum(kept, dtype=jnp.int32)
    first = kept.shape[0] - count
    if scale == "min":
        return singular[jnp.minimum(first, kept.shape[0] - 1)]
    if scale == "median":  # the lower median
        return singular[jnp.minimum(first + jnp.maximum(count - 1, 0) // 2, kept.shape[0] - 1)]
    total = jnp.sum(jnp.where(kept, singular * singular, 0))
    return jnp.sqrt(total / jnp.maximum(count, 1).astype(singular.dtype))


def aligned_weights(geometry: Geometry, scale: str = "min") -> jax.Array:
    r"""Weights :math:`\sigma\, U \operatorname{diag}(1 / s) U^\top 1` from the singular values s.

    Args:
      geometry: the lengths and angles of the gradients.
      scale: sigma: "min", the smallest nonzero singular value; "median", the lower median of the nonzero
        ones; "rmse", their root mean square.

    Returns:
      Weights `[T]` on the raw gradients, sum-like. Singular values below the square root of
      `mtl_optax.solvers.spectral.eigenvalue_tolerance` (relative to the largest) count as zero, so in
      float32 a gradient about a thousand times shorter than another one is dropped. A zero gradient has
      weight 0. If all are zero, the weights are 1.
    """
    cosine, norms, active = geometry
    ones = active.astype(norms.dtype)
    largest = jnp.max(norms)
    lengths = safe_divide(norms, largest)
    values, vectors, kept = kept_eigenpairs(cosine * lengths[:, None] * lengths[None, :])
    singular = jnp.sqrt(jnp.where(kept, values, 0))
    coefficients = safe_divide(1, singular, where=kept)
    common = _common_value(singular, kept, scale)
    weights = common * rotate(vectors, coefficients, ones)
    weights = jnp.where(norms > 0, weights, 0)
    return jnp.where(largest > 0, weights, ones)
