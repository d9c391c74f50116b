"""Preference vectors over tasks, and directions of vectors of losses."""

from typing import Any

import jax
import jax.numpy as jnp


def active_preference(preference: Any, active: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The preference of the active tasks, ``[T]``; where none is given, one over their number."""
    if preference is None:
        count = jnp.maximum(jnp.sum(active), 1).astype(dtype)
        return active.astype(dtype) / count
    return jnp.where(active, jnp.asarray(preference, dtype), 0)


def unit(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(vector / length, length)``, without a square that leaves the range; ``(0, 0)`` for 0."""
    peak = jnp.max(jnp.abs(vector))
    usable = peak >= jnp.finfo(vector.dtype).tiny
    scaled = jnp.where(usable, vector / jnp.where(usable, peak, 1), 0)
    length = jnp.sqrt(jnp.where(usable, jnp.sum(scaled * scaled), 1))
    return scaled / length, jnp.where(usable, length * peak, 0)
