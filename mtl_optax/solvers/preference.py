"""Preference vectors over tasks, and unit vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.cosine import uniform_weights


def active_preference(
    preference: jax.typing.ArrayLike | None, active: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """The preference `[T]` with 0 for inactive tasks; None is one over the number of active tasks."""
    if preference is None:
        return uniform_weights(active, dtype)
    return jnp.where(active, jnp.asarray(preference, dtype), 0)


def unit(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The unit vector and the length; `(0, 0)` for the zero vector.

    Entries are scaled before they are squared, so that no square overflows or underflows.
    """
    peak = jnp.max(jnp.abs(vector))
    usable = peak >= jnp.finfo(vector.dtype).tiny
    scaled = safe_divide(vector, peak, where=usable)
    length = jnp.sqrt(jnp.where(usable, jnp.sum(scaled * scaled), 1))
    return scaled / length, jnp.where(usable, length * peak, 0)
