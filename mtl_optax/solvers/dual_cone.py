"""Projection onto the dual cone of the gradients: the nearest update that hurts no task."""

import jax
import jax.numpy as jnp

from mtl_optax.solvers.cosine import mask_inactive, uniform_weights
from mtl_optax.solvers.nonnegative import nonnegative_least_squares, product, semidefinite


def _preference(preference: jax.Array | None, active: jax.Array, norms: jax.Array) -> jax.Array:
    if preference is None:
        return uniform_weights(active, norms.dtype)
    return jnp.where(active, preference, 0)


def _inverse(norms: jax.Array) -> jax.Array:
    return jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)


def dualproj_weights(
    cosine: jax.Array,
    norms: jax.Array,
    active: jax.Array | None = None,
    preference: jax.Array | None = None,
) -> jax.Array:
    r"""Weights of the projection of :math:`\sum_i u_i g_i` onto :math:`\{d : g_i \cdot d \ge 0\}`.

    The projection is :math:`\sum_i (u_i + z_i) g_i` with the :math:`z \ge 0` that makes it shortest.

    Args:
        cosine: cosines of the gradients, ``[T, T]``.
        norms: norms, ``[T]``.
        active: tasks that count, bool ``[T]``; all by default.
        preference: ``u``, ``[T]``; ``1 / T`` over the active tasks by default.

    Returns:
        Weights on the raw gradients, ``[T]``. Where no task is hurt they equal ``u``. A zero gradient
        keeps its ``u``. With 0 inside the convex hull the combination is 0.
    """
    cosine, norms, active = mask_inactive(cosine, norms, active)
    cosine = semidefinite(cosine)
    preference = _preference(preference, active, norms)
    # In units of the largest norm, so that nothing overflows.
    largest = jnp.max(norms)
    lengths = preference * norms / jnp.where(largest > 0, largest, 1)
    added = nonnegative_least_squares(cosine, -product(cosine, lengths))
    return preference + added * largest * _inverse(norms)


def upgrad_weights(
    cosine: jax.Array,
    norms: jax.Array,
    active: jax.Array | None = None,
    preference: jax.Array | None = None,
) -> jax.Array:
    r"""Weights of :math:`\sum_i P(u_i g_i)`, each gradient projected onto the dual cone by itself.

    On cosines the ``T`` projections depend neither on the norms nor on the preference, so that norms
    of very different size cost no accuracy. They are solved as one batch.

    Args:
        cosine: cosines of the gradients, ``[T, T]``.
        norms: norms, ``[T]``.
        active: tasks that count, bool ``[T]``; all by default.
        preference: ``u``, nonnegative ``[T]``; ``1 / T`` over the active tasks by default.

    Returns:
        Weights on the raw gradients, ``[T]``; see :func:`dualproj_weights` for the degenerate cases.
    """
    cosine, norms, active = mask_inactive(cosine, norms, active)
    cosine = semidefinite(cosine)
    preference = _preference(preference, active, norms)
    added = jax.vmap(nonnegative_least_squares, in_axes=(None, 0))(cosine, -cosine)
    # added[i, j]: how much of the unit gradient j the projection of the unit gradient i takes in.
    # u_i n_i / n_j is formed first: its factors may be extreme where the product is not.
    ratios = norms[:, None] * _inverse(norms)[None, :]
    return preference + jnp.sum(preference[:, None] * added * ratios, axis=0)
