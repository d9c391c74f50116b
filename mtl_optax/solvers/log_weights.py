"""Weights made of logarithms and quotients of losses, finite for every finite loss."""

import math

import jax
import jax.numpy as jnp


def largest_weight(dtype: jax.typing.DTypeLike) -> float:
    """The square root of the largest number: no weight made of a quotient of losses exceeds it.

    A weight of that size still gives a finite update with a gradient of norm 1e18.
    """
    return float(jnp.finfo(dtype).max) ** 0.5


def magnitudes(losses: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sizes of the losses, 1 where there is none to speak of, and where there is one.

    A logarithm or an inverse needs a positive number. A negative loss counts by its size, so that it is
    still descended; a loss of 0 (or below the smallest normal number) counts as absent.

    Args:
        losses: ``[T]``, finite.
        active: tasks that count, bool ``[T]``.

    Returns:
        ``(sizes, usable)``: positive numbers ``[T]``, and bool ``[T]``.
    """
    sizes = jnp.abs(losses)
    usable = active & (sizes >= jnp.finfo(losses.dtype).tiny)
    return jnp.where(usable, sizes, 1), usable


def exp_weights(log_weights: jax.Array, usable: jax.Array) -> jax.Array:
    """``exp(log_weights)`` up to the largest weight, and 0 where not ``usable``."""
    limit = math.log(largest_weight(log_weights.dtype))
    return jnp.where(usable, jnp.exp(jnp.minimum(log_weights, limit)), 0)


def keep_log_shares(new: jax.Array, old: jax.Array, active: jax.Array) -> jax.Array:
    """:func:`mtl_optax.solvers.simplex.keep_shares` of logarithms of weights.

    Args:
        new: ``[T]``, normalised over the active tasks.
        old: ``[T]``, normalised over all.
        active: bool ``[T]``.

    Returns:
        ``[T]``, finite; exactly ``new`` where all are active.
    """
    lowest = float(jnp.finfo(old.dtype).min) / 4
    peak = jnp.max(jnp.where(active, old, lowest))
    share = jnp.sum(jnp.where(active, jnp.exp(old - peak), 0))
    log_share = peak + jnp.log(jnp.where(share > 0, share, 1))
    moved = jnp.maximum(new + jnp.where(jnp.all(active), 0, log_share), lowest)
    return jnp.where(active, moved, old)


def log_softmax(logits: jax.Array, active: jax.Array) -> jax.Array:
    """Logarithm of the softmax over the active entries.

    Args:
        logits: ``[T]``, finite.
        active: entries that count, bool ``[T]``.

    Returns:
        ``[T]``, finite: what is too low to exponentiate, and every inactive entry, is so low that its
        exponential is exactly 0.
    """
    lowest = float(jnp.finfo(logits.dtype).min) / 4
    peak = jnp.max(jnp.where(active, logits, float(jnp.finfo(logits.dtype).min)))
    shifted = jnp.where(active, logits - peak, 0)
    total = jnp.sum(jnp.where(active, jnp.exp(shifted), 0))
    log_total = jnp.log(jnp.where(total > 0, total, 1))
    return jnp.where(active, jnp.maximum(shifted - log_total, lowest), lowest)
