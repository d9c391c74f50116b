"""Aligned-MTL: gradients rotated and scaled to a Gram matrix with one eigenvalue."""

import jax
import jax.numpy as jnp

from mtl_optax.solvers.cosine import mask_inactive
from mtl_optax.solvers.spectral import kept_eigenpairs, rotate

SCALES = ("min", "median", "rmse")


def _common_scale(singular: jax.Array, kept: jax.Array, scale: str) -> jax.Array:
    """The singular value that all of them become; ``singular`` ascends, the kept ones come last."""
    count = jnp.sum(kept, dtype=jnp.int32)
    first = kept.shape[0] - count
    if scale == "min":
        return singular[jnp.minimum(first, kept.shape[0] - 1)]
    if scale == "median":  # the lower one of the two in the middle
        return singular[jnp.minimum(first + jnp.maximum(count - 1, 0) // 2, kept.shape[0] - 1)]
    total = jnp.sum(jnp.where(kept, singular * singular, 0))
    return jnp.sqrt(total / jnp.maximum(count, 1).astype(singular.dtype))


def aligned_weights(
    cosine: jax.Array,
    norms: jax.Array,
    active: jax.Array | None = None,
    scale: str = "min",
    preference: jax.Array | None = None,
) -> jax.Array:
    r"""Weights :math:`\sigma\, U \operatorname{diag}(1 / s) U^\top p` from the singular values ``s``.

    Args:
        cosine: cosines of the gradients, ``[T, T]``.
        norms: norms, ``[T]``.
        active: tasks that count, bool ``[T]``; all by default.
        scale: ``sigma``: the smallest singular value that is not zero ("min"), their lower median
            ("median") or their root mean square ("rmse").
        preference: ``p``, ``[T]``; ones by default.

    Returns:
        Weights on the raw gradients, ``[T]`` (sum-like). Singular values below the tolerance of
        :func:`mtl_optax.solvers.spectral.eigenvalue_tolerance` count as zero, so that in float32 a task
        whose gradient is about a thousand times shorter than another one is dropped. A zero gradient
        gets 0; when all are zero the weights equal the preference.
    """
    cosine, norms, active = mask_inactive(cosine, norms, active)
    if preference is None:
        preference = jnp.ones_like(norms)
    preference = jnp.where(active, preference, 0)
    largest = jnp.max(norms)
    lengths = norms / jnp.where(largest > 0, largest, 1)
    values, vectors, kept = kept_eigenpairs(cosine * lengths[:, None] * lengths[None, :])
    singular = jnp.sqrt(jnp.where(kept, values, 0))
    coefficients = jnp.where(kept, 1 / jnp.where(kept, singular, 1), 0)
    common = _common_scale(singular, kept, scale)
    weights = common * rotate(vectors, coefficients, preference)
    weights = jnp.where(norms > 0, weights, 0)
    return jnp.where(largest > 0, weights, preference)
