"""The convex combination of the gradients with the smallest norm (MGDA)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.cosine import Geometry, uniform_weights
from mtl_optax.solvers.nonnegative import nonnegative_least_squares, semidefinite


def min_norm_weights(geometry: Geometry) -> jax.Array:
    r"""Weights of the min-norm point of the convex hull of the gradients.

    Minimises :math:`|\sum_i a_i g_i|^2` over the simplex by a problem without the constraint on the sum.
    With :math:`b_i = a_i n_i` and :math:`r_i = n_{\min} / n_i`, the minimiser over :math:`b \ge 0` of
    :math:`\tfrac12 b^\top (C + r r^\top) b - r^\top b` is a multiple of the solution, also when the
    convex hull contains 0. All coefficients are at most 1, so norms of different orders of magnitude cost
    no accuracy.

    There is one exception. If the convex hull of some gradients contains 0, and another gradient is about
    100 times shorter (1e6 times in float64) than these, the shorter one may keep a weight, up to 1. The
    combination is then not 0, but at most as long as this gradient.

    Args:
      geometry: the cosines C and the norms n of the gradients.

    Returns:
      Weights of the raw gradients, `[T]`, nonnegative, sum 1. Zero gradients share all the weight equally,
      and the combination is then exactly 0.
    """
    norms, usable = geometry.norms, geometry.nonzero
    ratio = geometry.over_norms(jnp.min(norms, where=usable, initial=jnp.inf))
    matrix = semidefinite(geometry.cosine) + ratio[:, None] * ratio[None, :]
    amounts = nonnegative_least_squares(matrix, ratio, usable)
    # b / n could overflow; its multiple by n_min cannot, and the factor cancels in the normalisation.
    weights = amounts * ratio
    total = jnp.sum(weights)
    weights = safe_divide(weights, total, weights)
    zero = geometry.active & ~usable
    return jnp.where(jnp.any(zero), uniform_weights(zero, norms.dtype), weights)
