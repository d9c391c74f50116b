"""Updates that make the same progress on every unit gradient (IMTL-G and ConFIG)."""

import jax
import jax.numpy as jnp

from mtl_optax.solvers.cosine import mask_inactive, uniform_weights
from mtl_optax.solvers.spectral import pseudo_solve


def _common_direction(cosine: jax.Array, norms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Coefficients of the unit gradients in the common direction, and which gradients are nonzero."""
    nonzero = norms > 0
    ones = nonzero.astype(norms.dtype)
    return jnp.where(nonzero, pseudo_solve(cosine, ones), 0), nonzero


def equal_projection_weights(
    cosine: jax.Array, norms: jax.Array, active: jax.Array | None = None
) -> jax.Array:
    r"""IMTL-G: weights of sum 1 whose combination has the same projection on every unit gradient.

    :math:`a_i \propto (C^+ 1)_i / n_i`. Weights can be negative, and so can the common projection: that is
    the method.

    Args:
        cosine: cosines ``C`` of the gradients, ``[T, T]``.
        norms: norms ``n``, ``[T]``.
        active: tasks that count, bool ``[T]``; all by default.

    Returns:
        Weights on the raw gradients, ``[T]``. A singular ``C`` is inverted on its range. The weights are
        uniform where no answer exists (every gradient zero, or a common direction of sum 0); a zero
        gradient gets 0.
    """
    cosine, norms, active = mask_inactive(cosine, norms, active)
    coefficients, nonzero = _common_direction(cosine, norms)
    smallest = jnp.min(jnp.where(nonzero, norms, jnp.inf))
    raw = jnp.where(nonzero, coefficients * (smallest / jnp.where(nonzero, norms, 1)), 0)
    total = jnp.sum(raw)
    limit = norms.shape[0] * jnp.finfo(norms.dtype).eps * jnp.max(jnp.abs(raw))
    exists = jnp.abs(total) > limit
    weights = raw / jnp.where(exists, total, 1)
    return jnp.where(exists, weights, uniform_weights(active, norms.dtype))


def config_weights(
    cosine: jax.Array, norms: jax.Array, active: jax.Array | None = None
) -> jax.Array:
    r"""ConFIG: the direction with the same cosine to every gradient, as long as the projections together.

    With :math:`x = C^+ 1` the direction is :math:`d_0 = \sum_i x_i g_i / n_i`, normalised, and the
    length is :math:`\sum_i g_i \cdot d_0`.

    Args:
        cosine: cosines ``C`` of the gradients, ``[T, T]``.
        norms: norms ``n``, ``[T]``.
        active: tasks that count, bool ``[T]``; all by default.

    Returns:
        Weights on the raw gradients, ``[T]`` (sum-like: identical gradients give their sum). A zero
        gradient gets 0, and the result is 0 where no common direction exists (opposite gradients).
    """
    cosine, norms, active = mask_inactive(cosine, norms, active)
    coefficients, nonzero = _common_direction(cosine, norms)
    image = jnp.sum(cosine * coefficients[None, :], axis=1)
    squared = jnp.sum(coefficients * image)
    # Below this the direction is what rounding has left of a sum that vanishes.
    noise = 4 * norms.shape[0] * jnp.finfo(norms.dtype).eps
    exists = squared > noise * noise
    largest = jnp.max(norms)
    lengths = norms / jnp.where(largest > 0, largest, 1)
    length = jnp.sum(lengths * image) / jnp.where(exists, squared, 1)
    ratios = jnp.where(nonzero, largest / jnp.where(nonzero, norms, 1), 0)
    return jnp.where(exists, coefficients * length * ratios, 0)
