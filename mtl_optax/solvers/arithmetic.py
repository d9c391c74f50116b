"""Quotients, means and averages with finite results, over the active tasks."""

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


def clip_finite(x: jax.Array) -> jax.Array:
    """Clips to the finite numbers of the dtype."""
    largest = float(jnp.finfo(x.dtype).max)
    return jnp.clip(x, -largest, largest)


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


def mean_active(values: jax.Array, active: jax.Array) -> jax.Array:
    """The mean of the values of the active tasks; 0 if no task is active."""
    # Divided before the sum, which could overflow.
    return jnp.sum(values / count_active(active, values.dtype), where=active)


def move_average(
    average: jax.Array, new: jax.typing.ArrayLike, decay: jax.typing.ArrayLike, moves: jax.Array
) -> jax.Array:
    """One step of an exponential moving average; averages that do not move stay as they are.

    Args:
      average: the last averages.
      new: what they move towards.
      decay: the share of the last average. With 0 the result is `new`, as for a first value.
      moves: bool, which averages move.

    Returns:
      `decay * average + (1 - decay) * new` where `moves`, else `average`.

    Example:

      >>> import jax.numpy as jnp
      >>> moves = jnp.array([True, False])
      >>> move_average(jnp.array([2.0, 2.0]), 4.0, 0.5, moves).tolist()
      [3.0, 2.0]
    """
    decay = jnp.asarray(decay, average.dtype)
    return jnp.where(moves, decay * average + (1 - decay) * new, average)


def move_mean(mean: jax.Array, new: jax.Array, count: jax.Array, moves: jax.Array) -> jax.Array:
    """Adds the value `new` to the mean of `count - 1` values, where `moves`; gives the mean of `count`."""
    number = jnp.maximum(count, 1).astype(mean.dtype)
    return move_average(mean, new, 1 - 1 / number, moves)
