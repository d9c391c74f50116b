"""Updates with the same projection on every unit gradient (IMTL-G and ConFIG)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.cosine import Geometry, product, uniform_weights
from mtl_optax.solvers.spectral import pseudo_solve


def _common_direction(geometry: Geometry) -> jax.Array:
    """Coefficients of the unit gradients in the direction with equal cosines; 0 for zero gradients."""
    ones = geometry.nonzero.astype(geometry.norms.dtype)
    return jnp.where(geometry.nonzero, pseudo_solve(geometry.cosine, ones), 0)


def _exists(squared_length: jax.Array, size: int) -> jax.Array:
    """Whether a sum of unit gradients is longer than the rounding error of a sum that is 0."""
    noise = 4 * size * jnp.finfo(squared_length.dtype).eps
    return squared_length > noise * noise


def equal_projection_weights(geometry: Geometry) -> jax.Array:
    r"""IMTL-G: weights of sum 1 for which the update has the same projection on every unit gradient.

    :math:`a_i \propto (C^+ 1)_i / n_i`. By definition of the method, weights can be negative, and so can
    the common projection.

    Args:
      geometry: the cosines C and the norms n of the gradients.

    Returns:
      Weights `[T]` on the raw gradients. A singular C is inverted on its range. If the unit gradients
      cancel (opposite gradients), the weights are proportional to 1 / n, as they are close to this case.
      If no solution exists (all gradients zero, or coefficients of sum 0), the weights are uniform. A
      zero gradient has weight 0.
    """
    norms, nonzero = geometry.norms, geometry.nonzero
    coefficients = _common_direction(geometry)
    squared = jnp.sum(coefficients * product(geometry.cosine, coefficients))
    equal = nonzero.astype(norms.dtype)
    coefficients = jnp.where(_exists(squared, len(norms)), coefficients, equal)
    raw = coefficients * geometry.over_norms(jnp.min(norms, where=nonzero, initial=jnp.inf))
    total = jnp.sum(raw)
    limit = norms.shape[0] * jnp.finfo(norms.dtype).eps * jnp.max(jnp.abs(raw))
    uniform = uniform_weights(geometry.active, norms.dtype)
    return safe_divide(raw, total, uniform, where=jnp.abs(total) > limit)


def config_weights(geometry: Geometry) -> jax.Array:
    r"""ConFIG: the direction with the same cosine to every gradient, as long as the summed projections.

    With :math:`x = C^+ 1`, the direction :math:`d_0` is :math:`\sum_i x_i g_i / n_i`, normalised, and the
    length is :math:`\sum_i g_i \cdot d_0`.

    Args:
      geometry: the cosines C and the norms n of the gradients.

    Returns:
      Weights `[T]` on the raw gradients, sum-like (identical gradients give their sum). A zero gradient
      has weight 0. If no common direction exists (opposite gradients), all weights are 0.
    """
    norms, coefficients = geometry.norms, _common_direction(geometry)
    image = product(geometry.cosine, coefficients)
    squared = jnp.sum(coefficients * image)
    exists = _exists(squared, len(norms))
    largest = jnp.max(norms)
    length = safe_divide(jnp.sum(safe_divide(norms, largest) * image), squared, where=exists)
    return jnp.where(exists, coefficients * length * geometry.over_norms(largest), 0)
