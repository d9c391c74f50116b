"""A mirror step on the simplex, projected on a Kullback-Leibler ball around the uniform distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import count_active, safe_divide

# The cost of a round does not depend on the number of points, so few rounds with many points are fastest.
# From a bracket of 1/16,000 of the range, three Newton steps reach float64 accuracy.
GRID_ROUNDS = 2
GRID_POINTS = 128
NEWTON_STEPS = 3


def _tilted(exponents: jax.Array, active: jax.Array, log_count: jax.Array) -> jax.Array:
    """`log(p * count)`, p the softmax of `exponents` over the active entries, along the last axis."""
    exponents = jnp.where(active, exponents, -jnp.inf)
    log_partition = jax.nn.logsumexp(exponents, axis=-1, keepdims=True)
    return jnp.where(active, exponents - log_partition + log_count, 0)


def _divergence(excess: jax.Array, active: jax.Array, count: jax.Array) -> jax.Array:
    """KL divergence from the uniform distribution, given `excess = log(p * count)`.

    The terms `t e^t - (e^t - 1)` are nonnegative, so a small divergence is accurate too.
    """
    terms = excess * jnp.exp(excess) - jnp.expm1(excess)
    return jnp.sum(jnp.where(active, jnp.maximum(terms, 0), 0), axis=-1) / count


def kl_ball_mirror_step(
    log_p: jax.Array,
    scores: jax.Array,
    radius: jax.typing.ArrayLike,
    active: jax.Array | None = None,
) -> jax.Array:
    r"""Exponentiated-gradient step, then the KL projection on a ball around the uniform distribution.

    The result is :math:`p' \propto (p\,e^{s})^\tau` with the largest :math:`\tau \in (0, 1]` for which
    :math:`KL(p' \| u) \le` ``radius``. With :math:`q = \log p + s`, the derivative of the divergence with
    respect to :math:`\tau` is :math:`\tau \operatorname{Var}_{p'}(q)`, so the root is unique. A lower bound
    is :math:`\tau \ge \sqrt{8\,radius} / range(q)` (Hoeffding's lemma). A grid in :math:`\log\tau` narrows
    the bracket, and Newton steps inside it find the root.

    Args:
      log_p: `[T]`, logarithm of the current distribution, normalised or not.
      scores: `[T]`, s: the step size times the reward of each task. Clipped to an eighth of the largest
        number, so entries may be infinite.
      radius: largest divergence from uniform; 0 gives the uniform distribution, and `log T` or more is no
        constraint.
      active: bool `[T]`, the tasks that count; the divergence is from the uniform distribution over
        these. All by default.

    Returns:
      The logarithm of the new distribution, `[T]`, finite and normalised over the active tasks. Inactive
      tasks have a value whose exponential is exactly 0.
    """
    dtype = log_p.dtype
    scores = jnp.asarray(scores, dtype)
    if active is None:
        active = jnp.ones(log_p.shape, bool)
    radius = jnp.asarray(radius, dtype)
    floor = jnp.finfo(dtype).min / 4
    number = count_active(active, dtype)
    log_count = jnp.log(number)

    limit = jnp.finfo(dtype).max / 8
    raw = jnp.where(active, log_p, 0) + jnp.where(active, jnp.clip(scores, -limit, limit), 0)
    raw = jnp.where(active, raw - jnp.max(jnp.where(active, raw, -jnp.inf)), 0)
    width = -jnp.min(raw)
    spread = width > 0
    unit = raw / jnp.where(spread, width, 1)  # in [-1, 0]

    def excess_at(log_x: jax.Array) -> jax.Array:
        return _tilted(jnp.exp(log_x)[..., None] * unit[None, :], active[None, :], log_count)

    # x = tau * width. Below `low` the divergence cannot exceed the radius; `high` is tau = 1.
    high = jnp.log(jnp.where(spread, width, 1))
    tiny = jnp.finfo(dtype).tiny
    low = jnp.minimum(jnp.log(8 * jnp.maximum(radius, tiny)) / 2, high)
    full = _tilted(raw, active, log_count)
    inside = _divergence(full, active, number) <= radius

    for _ in range(GRID_ROUNDS):
        grid = low + (high - low) * jnp.linspace(0, 1, GRID_POINTS, dtype=dtype)
        within = _divergence(excess_at(grid), active[None, :], number) <= radius
        low = jnp.max(jnp.where(within, grid, low))
        high = jnp.min(jnp.where(within, high, grid))
    log_x = (low + high) / 2
    for _ in range(NEWTON_STEPS):
        excess = excess_at(log_x[None])[0]
        value = _divergence(excess, active, number)
        p = jnp.where(active, jnp.exp(excess), 0) / number
        x = jnp.exp(log_x)
        mean = jnp.sum(p * unit)
        slope = x * x * jnp.sum(p * (unit - mean) * (unit - mean))
        log_x = jnp.clip(log_x + safe_divide(radius - value, slope), low, high)

    shrunk = excess_at(log_x[None])[0]
    excess = jnp.where(inside | ~spread, full, shrunk)
    excess = jnp.where(radius > 0, excess, 0)
    return jnp.where(active, jnp.maximum(excess - log_count, floor), floor)
