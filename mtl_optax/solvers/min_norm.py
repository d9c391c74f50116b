"""The shortest convex combination of the gradients (MGDA)."""

import jax
import jax.numpy as jnp

from mtl_optax.solvers.cosine import mask_inactive, uniform_weights
from mtl_optax.solvers.nonnegative import nonnegative_least_squares, semidefinite


def min_norm_weights(
    cosine: jax.Array, norms: jax.Array, active: jax.Array | None = None
) -> jax.Array:
    r"""Weights of the min-norm point of the convex hull of the gradients.

    :math:`\min_a |\sum_i a_i g_i|^2` over the simplex is solved without the sum constraint: in the
    variables :math:`b_i = a_i n_i` and with :math:`r_i = n_{\min} / n_i`, the minimiser over
    :math:`b \ge 0` of :math:`\tfrac12 b^\top (C + r r^\top) b - r^\top b` is a multiple of the answer, also
    when 0 lies in the hull. All coefficients are at most 1, so norms that differ by many orders of
    magnitude cost no accuracy, with one exception: where 0 lies in the hull of gradients that are all some
    100 times (float32; 1e6 times in float64) as long as another, that one keeps a weight, up to 1. The
    combination is then no longer than it, but not 0.

    Args:
        cosine: cosines ``C`` of the gradients, ``[T, T]``.
        norms: norms ``n``, ``[T]``.
        active: tasks that count, bool ``[T]``; all by default.

    Returns:
        Weights on the raw gradients, ``[T]``, nonnegative, sum 1. Zero gradients share all the weight
        equally, and the combination is then exactly 0.
    """
    cosine, norms, active = mask_inactive(cosine, norms, active)
    cosine = semidefinite(cosine)
    zero = active & ~(norms > 0)
    usable = active & (norms > 0)
    smallest = jnp.min(jnp.where(usable, norms, jnp.inf))
    ratio = jnp.where(usable, smallest / jnp.where(usable, norms, 1), 0)
    amounts = nonnegative_least_squares(cosine + ratio[:, None] * ratio[None, :], ratio, usable)
    # The factor n_min cancels in the normalisation, and b / n alone could overflow.
    weights = amounts * ratio
    total = jnp.sum(weights)
    weights = weights / jnp.where(total > 0, total, 1)
    return jnp.where(jnp.any(zero), uniform_weights(zero, norms.dtype), weights)
