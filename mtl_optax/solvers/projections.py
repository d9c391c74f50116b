"""Weights of the raw gradients from coefficients of projected gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import safe_divide


def projected_sum_weights(added: jax.Array, norms: jax.Array) -> jax.Array:
    """The weights `[T]` of the raw gradients in the sum over i of `g_i + n_i sum_j added[i, j] g_j / n_j`.

    The ratio of the norms n is computed first, because a norm can be extreme where the ratio is not.
    """
    inverse = safe_divide(1, norms)
    return 1 + jnp.sum(added * (norms[:, None] * inverse[None, :]), axis=0)
