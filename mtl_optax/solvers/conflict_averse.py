"""CAGrad: the direction with the best worst-case progress in a ball around the mean gradient."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.cosine import Geometry, product, uniform_weights
from mtl_optax.solvers.loops import repeat
from mtl_optax.solvers.nonnegative import (
    masked_inverse_factor,
    nonnegative_least_squares,
    refined_solve,
    semidefinite,
)


class _Ball(NamedTuple):
    """The problem, with lengths in units of the largest norm, and levels of that times the smallest."""

    cosine: jax.Array
    usable: jax.Array  # bool [T]: tasks with a nonzero gradient
    slack: jax.Array  # [T], progress along every unit gradient without a correction
    ratio: jax.Array  # [T], progress along every unit gradient that a level of 1 asks for
    radius: jax.Array  # the largest length of the correction


class _Search(NamedTuple):
    level: jax.Array  # progress that every task must reach
    low: jax.Array  # bracket of the level
    high: jax.Array
    passive: jax.Array  # bool [T]: tasks whose progress equals the last level


def conflict_averse_weights(geometry: Geometry, c: jax.typing.ArrayLike = 0.4) -> jax.Array:
    r"""Weights of the d with :math:`|d - g_0| \le c |g_0|` that maximises :math:`\min_i g_i \cdot d`.

    With the mean gradient :math:`g_0`, :math:`d = g_0 + e`. The correction e is the shortest vector that
    gives every task the progress :math:`g_i \cdot d \ge \mu`, for the largest :math:`\mu` (the level) with
    :math:`|e| \le c|g_0|`. It is a nonnegative combination z of the gradients.

    As long as the tasks with progress exactly :math:`\mu` are the same, :math:`|e|^2` is a quadratic
    function of :math:`\mu`, and the next level is where it reaches :math:`c^2|g_0|^2`. In the paper's
    notation :math:`z = c |g_0| w / |g_w|`; this form needs no division by :math:`|g_w|`, which can be 0.

    Args:
      geometry: the lengths and angles of the gradients.
      c: radius of the ball relative to the norm of the mean gradient; 0 gives the mean.

    Returns:
      Weights `[T]` on the raw gradients, `1 / T + z` (not rescaled). A zero gradient counts in the mean
      only, since it has no progress. If all gradients or their mean are zero, the weights are uniform.
    """
    norms, usable = geometry.norms, geometry.nonzero
    cosine = semidefinite(geometry.cosine)
    uniform = uniform_weights(geometry.active, norms.dtype)
    largest = jnp.max(norms)
    lengths = safe_divide(uniform * norms, largest)
    slack = product(cosine, lengths)
    mean_norm = jnp.sqrt(jnp.maximum(jnp.sum(lengths * slack), 0))
    ball = _Ball(
        cosine=cosine,
        usable=usable,
        slack=slack,
        ratio=geometry.over_norms(jnp.min(norms, where=usable, initial=jnp.inf)),
        radius=jnp.asarray(c, norms.dtype) * mean_norm,
    )
    end = _search(ball)
    root, per_level, offset = _on_support(ball, end.passive)
    level = jnp.where((root >= end.low) & (root <= end.high), root, end.level)
    amounts = jnp.maximum(level * per_level - offset, 0)
    corrected = usable & (ball.radius > 0)
    return uniform + jnp.where(corrected, amounts * geometry.over_norms(largest), 0)


def _on_support(ball: _Ball, passive: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The level at which a correction by the tasks in `passive` is as long as the radius.

    The amounts z of the tasks are `level * per_level - offset`.
    """
    inverse = masked_inverse_factor(ball.cosine, passive)
    per_level = refined_solve(ball.cosine, inverse, ball.ratio, passive)
    offset = refined_solve(ball.cosine, inverse, ball.slack, passive)
    square, cross = jnp.sum(ball.ratio * per_level), jnp.sum(ball.ratio * offset)
    rest = jnp.sum(ball.slack * offset) - ball.radius * ball.radius
    root = jnp.sqrt(jnp.maximum(cross * cross - square * rest, 0))
    return safe_divide(cross + root, square, jnp.inf), per_level, offset


def _search(ball: _Ball) -> _Search:
    """Finds the level and the tasks that need a correction, by roots and bisection."""
    cosine, usable, slack, ratio, radius = ball
    low = jnp.min(safe_divide(slack, ratio, jnp.inf, where=usable))
    high = jnp.min(safe_divide(slack + radius, ratio, jnp.inf, where=usable))
    limits = jnp.finfo(cosine.dtype)
    resolution = 4 * limits.eps * jnp.maximum(jnp.abs(low), jnp.abs(high))

    def step(state: _Search) -> tuple[_Search, jax.Array]:
        wanted = state.level * ratio - slack
        amounts = nonnegative_least_squares(cosine, wanted, usable)
        above = jnp.sum(amounts * wanted) > radius * radius
        low = jnp.where(above, state.low, state.level)
        high = jnp.where(above, state.level, state.high)
        root, _, _ = _on_support(ball, amounts > 0)
        level = jnp.where((root >= low) & (root <= high), root, (low + high) / 2)
        done = (jnp.abs(level - state.level) <= resolution) | (high - low <= resolution)
        return _Search(level, low, high, amounts > 0), done

    start = _Search(jnp.where(radius > 0, high, 0), low, high, jnp.zeros_like(usable))
    end, _ = repeat(step, start, cosine, limits.nmant + 8 + usable.shape[0], ~(radius > 0))
    return end
