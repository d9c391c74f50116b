"""From a Gram matrix to cosines and norms, the pair that every Gram-based solver works on."""

import jax
import jax.numpy as jnp


def cosine_matrix(gram: jax.Array, active: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Split a Gram matrix into cosines and norms.

    Solving on cosines keeps what a raw Gram matrix loses when gradient norms differ by orders of
    magnitude: its entries then differ by the square of that. The division happens in two steps, because
    the product of two norms can leave the range of float32 where each quotient does not.

    Args:
        gram: inner products of the task gradients, ``[T, T]``.
        active: tasks that count, bool ``[T]``; all by default.

    Returns:
        ``(cosine [T, T], norms [T])``. The diagonal of ``cosine`` is exactly 1 for every task with a
        nonzero gradient; a zero gradient or an inactive task has norm 0 and a zero row and column.
    """
    diagonal = jnp.diagonal(gram)
    if active is not None:
        diagonal = jnp.where(active, diagonal, 0)
    nonzero = diagonal > 0
    norms = jnp.sqrt(jnp.where(nonzero, diagonal, 1))
    both = nonzero[:, None] & nonzero[None, :]
    cosine = jnp.where(both, gram, 0) / norms[:, None] / norms[None, :]
    cosine = jnp.where(jnp.eye(len(norms), dtype=bool), 1, jnp.clip(cosine, -1, 1))
    return jnp.where(both, cosine, 0), jnp.where(nonzero, norms, 0)


def mask_inactive(
    cosine: jax.Array, norms: jax.Array, active: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Clear the slots of inactive tasks, so that what they hold (even NaN) reaches nothing.

    Returns:
        ``(cosine, norms, active)``, the last one a bool ``[T]`` array also when it was None.
    """
    if active is None:
        return cosine, norms, jnp.ones(norms.shape, bool)
    both = active[:, None] & active[None, :]
    return jnp.where(both, cosine, 0), jnp.where(active, norms, 0), active


def uniform_weights(active: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The same weight for every active task, sum 1; all zero when no task is active."""
    count = jnp.maximum(jnp.sum(active.astype(dtype)), 1)
    return active.astype(dtype) / count
