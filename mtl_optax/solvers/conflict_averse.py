"""CAGrad: the direction with the best worst-case progress in a ball around the mean gradient."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.cosine import mask_inactive, product, uniform_weights
from mtl_optax.solvers.loops import varying_like
from mtl_optax.solvers.nonnegative import (
    REFINEMENTS,
    exchange,
    factored_solve,
    masked_inverse_factor,
    nonnegative_least_squares,
    semidefinite,
)


class _Pivoting(NamedTuple):
    passive: jax.Array  # bool [T]: tasks whose progress equals the smallest one
    level: jax.Array  # progress that every task must reach
    low: jax.Array  # bracket of the level
    high: jax.Array
    fewest: jax.Array  # smallest number of violated conditions so far
    patience: jax.Array  # full exchanges still allowed without improvement
    step: jax.Array
    done: jax.Array


def _level_on_support(
    per_level: jax.Array, offset: jax.Array, ratio: jax.Array, slack: jax.Array, radius: jax.Array
) -> jax.Array:
    """The level at which the correction with this support has length `radius` (the larger root)."""
    square = jnp.sum(ratio * per_level)
    cross = jnp.sum(ratio * offset)
    rest = jnp.sum(slack * offset) - radius * radius
    root = jnp.sqrt(jnp.maximum(cross * cross - square * rest, 0))
    return safe_divide(cross + root, square, jnp.inf)


def _bisect(
    state: _Pivoting, cosine: jax.Array, ratio: jax.Array, slack: jax.Array, radius: jax.Array
) -> _Pivoting:
    """Bisection of the level, with an exact correction for each, for the cases where pivoting fails.

    Does nothing if the state is done.
    """

    def step(state: _Pivoting) -> _Pivoting:
        level = (state.low + state.high) / 2
        wanted = level * ratio - slack
        amounts = nonnegative_least_squares(cosine, wanted, ratio > 0)
        above = jnp.sum(amounts * wanted) > radius * radius
        return state._replace(
            passive=amounts > 0,
            level=level,
            low=jnp.where(above, state.low, level),
            high=jnp.where(above, level, state.high),
            step=state.step + 1,
        )

    steps = jnp.finfo(slack.dtype).nmant + 4
    state = state._replace(step=jnp.zeros_like(state.step))
    return lax.while_loop(lambda state: ~state.done & (state.step < steps), step, state)


def conflict_averse_weights(
    cosine: jax.Array,
    norms: jax.Array,
    active: jax.Array | None = None,
    c: jax.typing.ArrayLike = 0.4,
) -> jax.Array:
    r"""Weights of the d with :math:`|d - g_0| \le c |g_0|` that maximises :math:`\min_i g_i \cdot d`.

    With the mean gradient :math:`g_0`, :math:`d = g_0 + e`. The correction e is the shortest vector that
    gives every task the progress :math:`g_i \cdot d \ge \mu`, for the largest :math:`\mu` (the level) with
    :math:`|e| \le c|g_0|`. It is a nonnegative combination z of the gradients.

    If the tasks with progress exactly :math:`\mu` are known, :math:`|e|^2` is a quadratic function of
    :math:`\mu`. Block principal pivoting finds these tasks, and the quadratic function gives the level;
    both alternate, within a bracket. In the paper's notation :math:`z = c |g_0| w / |g_w|`; this form
    needs no division by :math:`|g_w|`, which can be 0.

    Args:
      cosine: `[T, T]`, cosines of the gradients.
      norms: `[T]`, gradient norms.
      active: bool `[T]`, the tasks that count; all by default.
      c: radius of the ball relative to the norm of the mean gradient; 0 gives the mean.

    Returns:
      Weights `[T]` on the raw gradients, `1 / T + z` (not rescaled). A zero gradient counts in the mean
      only, since it has no progress. If all gradients or their mean are zero, the weights are uniform.
    """
    cosine, norms, active = mask_inactive(cosine, norms, active)
    cosine = semidefinite(cosine)
    size, dtype = norms.shape[0], norms.dtype
    uniform = uniform_weights(active, dtype)
    usable = active & (norms > 0)
    largest = jnp.max(norms)
    smallest = jnp.min(jnp.where(usable, norms, jnp.inf))
    # Lengths are in units of the largest norm, and levels in units of the largest times the smallest
    # norm.
    lengths = safe_divide(uniform * norms, largest)
    slack = product(cosine, lengths)
    ratio = safe_divide(smallest, norms, where=usable)
    mean_norm = jnp.sqrt(jnp.maximum(jnp.sum(lengths * slack), 0))
    radius = jnp.asarray(c, dtype) * mean_norm
    low = jnp.min(safe_divide(slack, ratio, jnp.inf, where=usable))
    high = jnp.min(safe_divide(slack + radius, ratio, jnp.inf, where=usable))
    eps = jnp.finfo(dtype).eps
    resolution = 4 * eps * jnp.maximum(jnp.abs(low), jnp.abs(high))

    both = jnp.stack([ratio, slack])
    solve_both = jax.vmap(factored_solve, in_axes=(None, 0))

    def step(state: _Pivoting) -> _Pivoting:
        inverse = masked_inverse_factor(cosine, state.passive)
        per_level, offset = solve_both(inverse, jnp.where(state.passive[None], both, 0))
        amounts = state.level * per_level - offset
        missing = state.level * ratio - slack - product(cosine, amounts)
        scale = jnp.max(jnp.abs(amounts))
        too_small = state.passive & (amounts < -8 * eps * scale)
        short = usable & ~state.passive & (missing > 8 * eps * (mean_norm + scale))
        violated = too_small | short
        passive, fewest, patience = exchange(state.passive, violated, state.fewest, state.patience)

        # If no condition is violated, the correction for this level is exact and the level can change.
        exact = ~jnp.any(violated)
        squared = jnp.sum(amounts * (state.level * ratio - slack))
        above = squared > radius * radius
        low = jnp.where(exact & ~above, state.level, state.low)
        high = jnp.where(exact & above, state.level, state.high)
        guess = _level_on_support(per_level, offset, ratio, slack, radius)
        inside = (guess >= low) & (guess <= high)
        level = jnp.where(inside, guess, (low + high) / 2)
        done = exact & ((jnp.abs(level - state.level) <= resolution) | (high - low <= resolution))
        return _Pivoting(
            passive=passive,
            level=jnp.where(exact, level, state.level),
            low=low,
            high=high,
            fewest=jnp.where(exact, size + 1, fewest),
            patience=jnp.where(exact, 3, patience),
            step=state.step + 1,
            done=done,
        )

    some = radius > 0
    start = _Pivoting(
        passive=usable,
        level=jnp.where(some, high, 0),
        low=low,
        high=high,
        fewest=jnp.asarray(size + 1, jnp.int32),
        patience=jnp.asarray(3, jnp.int32),
        step=jnp.asarray(0, jnp.int32),
        done=~some,
    )
    limit = 4 * size + 30
    start = varying_like(cosine, start)
    end = lax.while_loop(lambda state: ~state.done & (state.step < limit), step, start)

    end = _bisect(end, cosine, ratio, slack, radius)
    inverse = masked_inverse_factor(cosine, end.passive)

    right = jnp.where(end.passive[None], both, 0)
    solution = solve_both(inverse, right)
    for _ in range(REFINEMENTS):
        rest = right - jax.vmap(product, in_axes=(None, 0))(cosine, solution)
        solution = solution + solve_both(inverse, jnp.where(end.passive[None], rest, 0))
    per_level, offset = solution
    level = _level_on_support(per_level, offset, ratio, slack, radius)
    level = jnp.where((level >= end.low) & (level <= end.high), level, end.level)
    amounts = jnp.maximum(level * per_level - offset, 0)
    added = jnp.where(usable & some, amounts * safe_divide(largest, norms, where=usable), 0)
    return uniform + added
