"""Projections of every gradient on the others, one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.solvers.arithmetic import safe_divide

Memory = TypeVar("Memory")


def add_in_order(
    cosine: jax.Array,
    orders: jax.Array,
    amount: Callable[[jax.Array, jax.Array, Memory], tuple[jax.Array, Memory]],
    memory: Memory,
) -> tuple[jax.Array, Memory]:
    """Adds a multiple of every other unit gradient to every unit gradient, one after another.

    Args:
      cosine: `[T, T]`.
      orders: integers `[T, T]`, row i the order of the others for gradient i; i itself is skipped.
      amount: `(component, others, memory) -> (multiples [T], memory)`: gradient i gets multiple i of the
        unit gradient `others[i]`, along which its component so far is `component[i]`.
      memory: any tree of arrays.

    Returns:
      `(added, memory)`: row i of `added`, `[T, T]`, has the multiples of the others in gradient i.
    """
    own = jnp.arange(cosine.shape[0], dtype=jnp.int32)

    def meet(
        carry: tuple[jax.Array, jax.Array, Memory], others: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, Memory], None]:
        added, along, memory = carry
        one_hot = (others[:, None] == own[None, :]).astype(cosine.dtype)
        taken, memory = amount(jnp.sum(along * one_hot, axis=1), others, memory)
        taken = jnp.where(others != own, taken, 0)[:, None]
        return (added + taken * one_hot, along + taken * cosine[others], memory), None

    start = (jnp.zeros_like(cosine), cosine, memory)
    (added, _, memory), _ = lax.scan(meet, start, orders.T)
    return added, memory


def projected_sum_weights(added: jax.Array, norms: jax.Array) -> jax.Array:
    """The weights `[T]` of the raw gradients in the sum over i of `g_i + n_i sum_j added[i, j] g_j / n_j`.

    The ratio of the norms n is computed first, because a norm can be extreme where the ratio is not.
    """
    inverse = safe_divide(1, norms)
    return 1 + jnp.sum(added * (norms[:, None] * inverse[None, :]), axis=0)
