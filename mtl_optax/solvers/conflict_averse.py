"""Conflict-averse weights (CAGrad): the best worst case within a ball around the mean gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.solvers.cosine import mask_inactive, uniform_weights
from mtl_optax.solvers.loops import varying_like
from mtl_optax.solvers.nonnegative import (
    REFINEMENTS,
    exchange,
    factored_solve,
    masked_inverse_factor,
    nonnegative_least_squares,
    product,
    semidefinite,
)


class _Pivoting(NamedTuple):
    passive: jax.Array  # bool [T]: tasks whose progress equals the worst
    level: jax.Array  # progress that every task is asked for
    low: jax.Array
    high: jax.Array
    fewest: jax.Array
    patience: jax.Array
    step: jax.Array
    done: jax.Array


def _level_on_support(
    per_level: jax.Array, offset: jax.Array, ratio: jax.Array, slack: jax.Array, radius: jax.Array
) -> jax.Array:
    """Level at which the correction of this support has length ``radius`` (the larger root)."""
    square = jnp.sum(ratio * per_level)
    cross = jnp.sum(ratio * offset)
    rest = jnp.sum(slack * offset) - radius * radius
    root = jnp.sqrt(jnp.maximum(cross * cross - square * rest, 0))
    return jnp.where(square > 0, (cross + root) / jnp.where(square > 0, square, 1), jnp.inf)


def _bisect(
    state: _Pivoting, cosine: jax.Array, ratio: jax.Array, slack: jax.Array, radius: jax.Array
) -> _Pivoting:
    """Narrow the level by bisection, with an exact correction for each one: where pivoting fails.

    Does nothing when the state is done.
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
    r"""Weights of the ``d`` with :math:`|d - g_0| \le c |g_0|` that maximises :math:`\min_i g_i \cdot d`.

    With :math:`g_0` the mean gradient, :math:`d = g_0 + e`, where ``e`` is the shortest vector that gives
    every task the progress :math:`g_i \cdot d \ge \mu`, a nonnegative combination :math:`z` of the
    gradients, and :math:`\mu` is as large as :math:`|e| \le c|g_0|` allows. For a given set of tasks at
    the level :math:`\mu`, :math:`|e|^2` is a quadratic in it; block principal pivoting finds the set, and
    the quadratic the level, in turns, inside a bracket. In the terms of the paper
    :math:`z = c |g_0| w / |g_w|`, without the division that fails for :math:`g_w = 0`.

    Args:
        cosine: cosines of the gradients, ``[T, T]``.
        norms: norms, ``[T]``.
        active: tasks that count, bool ``[T]``; all by default.
        c: radius of the ball relative to ``|g_0|``; 0 gives the mean.

    Returns:
        Weights on the raw gradients, ``[T]``: ``1 / T + z`` (no rescaling). A zero gradient counts in the
        mean and is left out of the worst case, which it cannot change. All zero, or a zero mean: uniform.
    """
    cosine, norms, active = mask_inactive(cosine, norms, active)
    cosine = semidefinite(cosine)
    size, dtype = norms.shape[0], norms.dtype
    uniform = uniform_weights(active, dtype)
    usable = active & (norms > 0)
    safe_norms = jnp.where(usable, norms, 1)
    largest = jnp.max(norms)
    smallest = jnp.min(jnp.where(usable, norms, jnp.inf))
    # Lengths in units of the largest norm; levels in units of that times the smallest norm.
    lengths = uniform * norms / jnp.where(largest > 0, largest, 1)
    slack = product(cosine, lengths)
    ratio = jnp.where(usable, smallest / safe_norms, 0)
    mean_norm = jnp.sqrt(jnp.maximum(jnp.sum(lengths * slack), 0))
    radius = jnp.asarray(c, dtype) * mean_norm
    safe_ratio = jnp.where(usable, ratio, 1)
    low = jnp.min(jnp.where(usable, slack / safe_ratio, jnp.inf))
    high = jnp.min(jnp.where(usable, (slack + radius) / safe_ratio, jnp.inf))
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

        # Where nothing is violated, the correction for this level is exact: move the level.
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
    added = jnp.where(usable & some, amounts * (largest / safe_norms), 0)
    return uniform + added
