"""Weights from logarithms and ratios of losses, which are finite for every finite loss."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import safe_divide


def largest_weight(dtype: jax.typing.DTypeLike) -> float:
    """The upper bound of weights that are ratios of losses: the square root of the largest number.

    With a weight of that size a gradient of norm 1e18 still gives a finite update.
    """
    return float(jnp.finfo(dtype).max) ** 0.5


def clip_weights(weights: jax.Array) -> jax.Array:
    """The weights, clipped to at most `largest_weight` in absolute value."""
    largest = largest_weight(weights.dtype)
    return jnp.clip(weights, -largest, largest)


def loss_ratio(losses: jax.Array, base: jax.Array, known: jax.Array | bool = True) -> jax.Array:
    """`losses / base`, clipped to `largest_weight`; 1 if the base is 0 or not known."""
    return clip_weights(safe_divide(losses, base, 1, where=known & (base != 0)))


def magnitudes(losses: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Absolute values of the losses for logarithms and inverses, which need positive numbers.

    A weight from the absolute value of a negative loss is positive, so the loss still decreases. A loss
    of 0 (or below the smallest normal number) is not usable.

    Args:
      losses: `[T]`, finite.
      active: bool `[T]`, the tasks that count.

    Returns:
      `(sizes, usable)`: positive numbers `[T]`, 1 where not usable, and bool `[T]`.
    """
    sizes = jnp.abs(losses)
    usable = active & (sizes >= jnp.finfo(losses.dtype).tiny)
    return jnp.where(usable, sizes, 1), usable


def exp_weights(log_weights: jax.Array, usable: jax.Array) -> jax.Array:
    """`exp(log_weights)`, at most `largest_weight`, and 0 where not `usable`."""
    limit = math.log(largest_weight(log_weights.dtype))
    return jnp.where(usable, jnp.exp(jnp.minimum(log_weights, limit)), 0)


def keep_log_shares(new: jax.Array, old: jax.Array, active: jax.Array) -> jax.Array:
    """`mtl_optax.solvers.simplex.keep_shares` for logarithms of weights.

    Args:
      new: `[T]`, normalised over the active tasks.
      old: `[T]`, normalised over all tasks.
      active: bool `[T]`.

    Returns:
      `[T]`, finite; exactly `new` where all tasks are active.
    """
    lowest = float(jnp.finfo(old.dtype).min) / 4
    peak = jnp.max(jnp.where(active, old, lowest))
    share = jnp.sum(jnp.where(active, jnp.exp(old - peak), 0))
    log_share = peak + jnp.log(jnp.where(share > 0, share, 1))
    moved = jnp.maximum(new + jnp.where(jnp.all(active), 0, log_share), lowest)
    return jnp.where(active, moved, old)


def softmax(logits: jax.Array, active: jax.Array) -> jax.Array:
    """The softmax over the active entries, `[T]`; exactly 0 for the others."""
    return jnp.exp(log_softmax(logits, active))


def log_softmax(logits: jax.Array, active: jax.Array) -> jax.Array:
    """Logarithm of the softmax over the active entries.

    Args:
      logits: `[T]`, finite.
      active: bool `[T]`, the entries that count.

    Returns:
      `[T]`, finite. Inactive entries, and entries too low for the exponential, have a value whose
      exponential is exactly 0.
    """
    lowest = float(jnp.finfo(logits.dtype).min) / 4
    peak = jnp.max(jnp.where(active, logits, float(jnp.finfo(logits.dtype).min)))
    shifted = jnp.where(active, logits - peak, 0)
    total = jnp.sum(jnp.where(active, jnp.exp(shifted), 0))
    log_total = jnp.log(jnp.where(total > 0, total, 1))
    return jnp.where(active, jnp.maximum(shifted - log_total, lowest), lowest)
