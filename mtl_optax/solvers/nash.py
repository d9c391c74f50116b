"""Nash bargaining and alpha-fair weights: the roots of K w = w^(-1/alpha)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.solvers.cosine import mask_inactive
from mtl_optax.solvers.loops import varying_like
from mtl_optax.solvers.min_norm import min_norm_weights
from mtl_optax.solvers.nonnegative import (
    factored_solve,
    inverse_factor,
    product,
    ridge,
    semidefinite,
)

LIMIT = 60
LONGEST_STEP = 2.0


class _Newton(NamedTuple):
    log_amounts: jax.Array  # log v, [T]
    step: jax.Array
    stationary: jax.Array  # no common descent direction: a root cannot exist
    converged: jax.Array
    close: jax.Array  # the equation holds to what rounding and a few digits allow


def fair_weights(
    cosine: jax.Array,
    norms: jax.Array,
    active: jax.Array | None = None,
    alpha: jax.typing.ArrayLike = 1.0,
) -> tuple[jax.Array, jax.Array]:
    r"""Positive root of :math:`K w = w^{-1/\alpha}`.

    In the variables :math:`v_i = w_i n_i` it reads :math:`(C v)_i = c_i v_i^{-1/\alpha}` with
    :math:`c_i = n_i^{1/\alpha - 1}`, the stationarity of a convex function. Newton's step for it, taken
    as a relative change of ``v``, solves :math:`(V C V + \operatorname{diag}(g / \alpha))\rho = g - V C v`
    with :math:`g_i = c_i v_i^{1 - 1/\alpha}`; applying it as :math:`v e^{\rho}` keeps
    ``v`` positive without a line search.

    Args:
        cosine: cosines ``C`` of the gradients, ``[T, T]``.
        norms: norms ``n``, ``[T]``.
        active: tasks that count, bool ``[T]``; all by default.
        alpha: fairness, positive; 1 is Nash bargaining.

    Returns:
        ``(weights [T], solved)``. No root exists when a gradient is zero or when 0 lies in the convex
        hull of the gradients (numerically: in that of the unit gradients, to about ``4 sqrt(T eps)``).
        Then ``solved`` is False and the weights are those of the min-norm point, whose combination
        vanishes there: a Pareto-stationary point offers no common descent to bargain over.
    """
    cosine, norms, active = mask_inactive(cosine, norms, active)
    cosine = semidefinite(cosine)
    dtype, size = norms.dtype, norms.shape[0]
    inverse_alpha = 1 / jnp.asarray(alpha, dtype)
    usable = active & (norms > 0)
    count = jnp.maximum(jnp.sum(usable.astype(dtype)), 1)
    log_norms = jnp.log(jnp.where(usable, norms, 1))
    centre = jnp.sum(log_norms) / count
    log_c = jnp.where(usable, (inverse_alpha - 1) * (log_norms - centre), 0)
    eps = jnp.finfo(dtype).eps
    magnitude = jnp.abs(cosine)
    eye = jnp.eye(size, dtype=bool)

    def step(state: _Newton) -> _Newton:
        v = jnp.where(usable, jnp.exp(state.log_amounts), 0)
        goal = jnp.where(usable, jnp.exp(log_c + (1 - inverse_alpha) * state.log_amounts), 0)
        reached = v * product(cosine, v)
        terms = v * product(magnitude, v)
        stationary = jnp.sum(reached) <= 16 * size * eps * jnp.sum(terms)
        gap = jnp.abs(goal - reached)
        converged = jnp.all(gap <= 4 * eps * (goal + terms))
        close = jnp.all(gap <= float(eps) ** 0.5 * goal + 64 * eps * terms)
        curvature = jnp.where(usable, inverse_alpha * goal + ridge(size, dtype) * v * v, 1)
        system = cosine * v[:, None] * v[None, :] + jnp.where(eye, curvature[:, None], 0)
        # Scaled to a unit diagonal, so that amounts of any size factorise alike.
        scale = lax.rsqrt(jnp.diagonal(system))
        inverse = inverse_factor(system * scale[:, None] * scale[None, :])
        change = scale * factored_solve(inverse, scale * (goal - reached))
        longest = jnp.max(jnp.abs(change))
        change = change * jnp.minimum(1, LONGEST_STEP / jnp.maximum(longest, LONGEST_STEP))
        change = jnp.where(stationary | ~jnp.isfinite(longest), 0, change)
        return _Newton(state.log_amounts + change, state.step + 1, stationary, converged, close)

    start = _Newton(
        log_amounts=log_c / (1 + inverse_alpha),
        step=jnp.asarray(0, jnp.int32),
        stationary=jnp.any(active & ~usable) | ~jnp.any(usable),
        converged=jnp.asarray(False),
        close=jnp.asarray(False),
    )
    start = varying_like(cosine, start)
    end = lax.while_loop(
        lambda state: ~state.stationary & ~state.converged & (state.step < LIMIT), step, start
    )
    log_scale = centre * (inverse_alpha - 1) / (inverse_alpha + 1)
    roots = jnp.where(usable, jnp.exp(end.log_amounts + log_scale - log_norms), 0)
    solved = ~end.stationary & end.close & jnp.all(jnp.isfinite(roots))
    weights = lax.cond(solved, lambda: roots, lambda: min_norm_weights(cosine, norms, active))
    return weights, solved


def nash_bargaining_weights(
    cosine: jax.Array, norms: jax.Array, active: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    r"""Positive root of :math:`K a = 1 / a`: :func:`fair_weights` with ``alpha = 1``.

    The norms drop out of the equation on cosines, and the combination always has norm ``sqrt(T)``.
    """
    return fair_weights(cosine, norms, active, alpha=1.0)
