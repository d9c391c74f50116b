"""Projection onto the dual cone of the gradients: the nearest update without a conflict."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.cosine import mask_inactive, product, uniform_weights
from mtl_optax.solvers.nonnegative import nonnegative_least_squares, semidefinite


def _preference(preference: jax.Array | None, active: jax.Array, norms: jax.Array) -> jax.Array:
    if preference is None:
        return uniform_weights(active, norms.dtype)
    return jnp.where(active, preference, 0)


def dualproj_weights(
    cosine: jax.Array,
    norms: jax.Array,
    active: jax.Array | None = None,
    preference: jax.Array | None = None,
) -> jax.Array:
    r"""Weights of the projection of :math:`\sum_i u_i g_i` onto :math:`\{d : g_i \cdot d \ge 0\}`.

    The projection is :math:`\sum_i (u_i + z_i) g_i` with the :math:`z \ge 0` that minimises its norm.

    Args:
      cosine: `[T, T]`, cosines of the gradients.
      norms: `[T]`, gradient norms.
      active: bool `[T]`, the tasks that count; all by default.
      preference: `[T]`, u; one over the number of active tasks by default.

    Returns:
      Weights `[T]` on the raw gradients. Without conflict they are equal to u. The weight of a zero
      gradient is its u. If 0 lies inside the convex hull of the gradients, the weighted sum is 0.
    """
    cosine, norms, active = mask_inactive(cosine, norms, active)
    cosine = semidefinite(cosine)
    preference = _preference(preference, active, norms)
    # Lengths are in units of the largest norm, so that nothing overflows.
    largest = jnp.max(norms)
    lengths = safe_divide(preference * norms, largest)
    added = nonnegative_least_squares(cosine, -product(cosine, lengths))
    return preference + added * largest * safe_divide(1, norms)


def upgrad_weights(
    cosine: jax.Array,
    norms: jax.Array,
    active: jax.Array | None = None,
    preference: jax.Array | None = None,
) -> jax.Array:
    r"""Weights of :math:`\sum_i P(u_i g_i)`, where P is the projection onto the dual cone.

    The T projections of the unit gradients do not depend on the norms or the preference, so norms of very
    different size cost no accuracy. They are computed as one batch.

    Args:
      cosine: `[T, T]`, cosines of the gradients.
      norms: `[T]`, gradient norms.
      active: bool `[T]`, the tasks that count; all by default.
      preference: nonnegative `[T]`, u; one over the number of active tasks by default.

    Returns:
      Weights `[T]` on the raw gradients; see `dualproj_weights` for degenerate input.
    """
    cosine, norms, active = mask_inactive(cosine, norms, active)
    cosine = semidefinite(cosine)
    preference = _preference(preference, active, norms)
    # added[i, j]: coefficient of the unit gradient j in the projection of the unit gradient i.
    added = jax.vmap(nonnegative_least_squares, in_axes=(None, 0))(cosine, -cosine)
    # The ratio of the norms is formed first: each norm may be extreme even if their ratio is not.
    ratios = norms[:, None] * safe_divide(1, norms)[None, :]
    return preference + jnp.sum(preference[:, None] * added * ratios, axis=0)
