"""Projection onto the dual cone of the gradients: the nearest update without a conflict."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.cosine import Geometry, product
from mtl_optax.solvers.nonnegative import (
    nonnegative_by_products,
    nonnegative_least_squares,
    semidefinite,
)
from mtl_optax.solvers.preference import active_preference

# The largest number of entries in all matrices [T, T] that one batch of projections factors. Up to T = 50
# all projections are one batch; for larger T, methods without factorisations are faster.
_NUMBERS_AT_A_TIME = 2**17


def dualproj_weights(
    geometry: Geometry, preference: jax.typing.ArrayLike | None = None
) -> jax.Array:
    r"""Weights of the projection of :math:`\sum_i u_i g_i` onto :math:`\{d : g_i \cdot d \ge 0\}`.

    The projection is :math:`\sum_i (u_i + z_i) g_i` with the :math:`z \ge 0` that minimises its norm.

    Args:
      geometry: the lengths and angles of the gradients.
      preference: `[T]`, u; one over the number of active tasks by default.

    Returns:
      Weights `[T]` on the raw gradients. Without conflict they are equal to u. The weight of a zero
      gradient is its u. If 0 lies inside the convex hull of the gradients, the weighted sum is 0.
    """
    norms, cosine = geometry.norms, semidefinite(geometry.cosine)
    preference = active_preference(preference, geometry.active, norms.dtype)
    # Lengths are in units of the largest norm, so that nothing overflows.
    largest = jnp.max(norms)
    lengths = safe_divide(preference * norms, largest)
    added = nonnegative_least_squares(cosine, -product(cosine, lengths))
    return preference + added * largest * geometry.over_norms(1)


def upgrad_weights(geometry: Geometry, preference: jax.typing.ArrayLike | None = None) -> jax.Array:
    r"""Weights of :math:`\sum_i P(u_i g_i)`, where P is the projection onto the dual cone.

    The T projections of the unit gradients do not depend on the norms or the preference, so norms of very
    different size cost no accuracy. For T > 50 they are computed by products of matrices; if this does not
    converge, because gradients are nearly dependent, by factorisations in several batches, so that memory
    does not grow as T^3.

    Args:
      geometry: the lengths and angles of the gradients.
      preference: nonnegative `[T]`, u; one over the number of active tasks by default.

    Returns:
      Weights `[T]` on the raw gradients; see `dualproj_weights` for degenerate input.
    """
    norms, cosine = geometry.norms, semidefinite(geometry.cosine)
    preference = active_preference(preference, geometry.active, norms.dtype)
    # added[i, j]: coefficient of the unit gradient j in the projection of the unit gradient i.
    at_a_time = max(1, _NUMBERS_AT_A_TIME // norms.size**2)
    project = functools.partial(nonnegative_least_squares, cosine)
    if norms.size <= at_a_time:
        added = jax.vmap(project)(-cosine)
    else:
        found, solved = jax.vmap(functools.partial(nonnegative_by_products, cosine))(-cosine)
        added = lax.cond(
            jnp.all(solved),
            lambda: found,
            lambda: lax.map(project, -cosine, batch_size=at_a_time),
        )
    # The ratio of the norms is formed first: each norm may be extreme even if their ratio is not.
    ratios = norms[:, None] * geometry.over_norms(1)[None, :]
    return preference + jnp.sum(preference[:, None] * added * ratios, axis=0)
