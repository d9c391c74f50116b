"""Arithmetic with finite results."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def safe_divide(
    numerator: jax.typing.ArrayLike,
    denominator: jax.Array,
    otherwise: jax.typing.ArrayLike = 0,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """Returns `numerator / denominator` where the denominator is positive, and `otherwise` elsewhere.

    No division by 0 occurs, so neither the result nor its derivative is NaN.

    Args:
      numerator: broadcasts against `denominator`.
      denominator: any array.
      otherwise: the result where the division is not done.
      where: where to divide; by default where `denominator > 0`.

    Returns:
      An array of the broadcast shape.

    Example:

      >>> import jax.numpy as jnp
      >>> safe_divide(jnp.array([1.0, 1.0]), jnp.array([4.0, 0.0])).tolist()
      [0.25, 0.0]
    """
    usable = denominator > 0 if where is None else where
    return jnp.where(usable, numerator / jnp.where(usable, denominator, 1), otherwise)


def count_active(active: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Counts the active tasks; the result is at least 1, so that a mean can be divided by it.

    Args:
      active: bool `[T]`.
      dtype: the dtype of the result.

    Returns:
      A scalar.

    Example:

      >>> import jax.numpy as jnp
      >>> float(count_active(jnp.array([True, False, True]), jnp.float32))
      2.0
    """
    return jnp.maximum(jnp.sum(active, dtype=jnp.int32), 1).astype(dtype)
