"""Nash bargaining and alpha-fair weights: the roots of K w = w^(-1/alpha)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.solvers.arithmetic import mean_active
from mtl_optax.solvers.cosine import Geometry, product
from mtl_optax.solvers.loops import repeat
from mtl_optax.solvers.min_norm import min_norm_weights
from mtl_optax.solvers.nonnegative import factored_solve, inverse_factor, ridge, semidefinite

LIMIT = 60  # iterations at most
LONGEST_STEP = 2.0  # largest change of log v in one iteration


class _Newton(NamedTuple):
    log_amounts: jax.Array  # log v, [T]
    stationary: jax.Array  # there is no common descent direction, hence no root
    close: jax.Array  # the equation holds to about half of the digits


def fair_weights(
    geometry: Geometry, alpha: jax.typing.ArrayLike = 1.0
) -> tuple[jax.Array, jax.Array]:
    r"""Positive root of :math:`K w = w^{-1/\alpha}`.

    With :math:`v_i = w_i n_i` and :math:`c_i = n_i^{1/\alpha - 1}` the equation is
    :math:`(C v)_i = c_i v_i^{-1/\alpha}`, the stationarity condition of a convex function. It is solved by
    Newton's method for the relative change of v:
    :math:`(V C V + \operatorname{diag}(g / \alpha))\rho = g - V C v` with
    :math:`g_i = c_i v_i^{1 - 1/\alpha}`. The update :math:`v e^{\rho}` keeps v positive without a line
    search.

    Args:
      geometry: the cosines C and the norms n of the gradients.
      alpha: fairness, positive; 1 is Nash bargaining.

    Returns:
      `(weights [T], solved)`. No root exists if a gradient is zero or 0 lies in the convex hull of the
      gradients (numerically: of the unit gradients, to about `4 sqrt(T eps)`). Then `solved` is False, and
      the weights are those of the min-norm point, whose combination is 0 there.
    """
    norms, usable = geometry.norms, geometry.nonzero
    cosine = semidefinite(geometry.cosine)
    dtype, size = norms.dtype, norms.shape[0]
    inverse_alpha = 1 / jnp.asarray(alpha, dtype)
    log_norms = jnp.log(jnp.where(usable, norms, 1))
    centre = mean_active(log_norms, usable)
    log_c = jnp.where(usable, (inverse_alpha - 1) * (log_norms - centre), 0)
    eps = jnp.finfo(dtype).eps
    magnitude = jnp.abs(cosine)
    eye = jnp.eye(size, dtype=bool)

    def step(state: _Newton) -> tuple[_Newton, jax.Array]:
        v = jnp.where(usable, jnp.exp(state.log_amounts), 0)
        goal = jnp.where(usable, jnp.exp(log_c + (1 - inverse_alpha) * state.log_amounts), 0)
        reached = v * product(cosine, v)
        terms = v * product(magnitude, v)
        stationary = jnp.sum(reached) <= 16 * size * eps * jnp.sum(terms)
        gap = jnp.abs(goal - reached)
        # To rounding.
        converged = jnp.all(gap <= 4 * eps * (goal + terms))
        close = jnp.all(gap <= float(eps) ** 0.5 * goal + 64 * eps * terms)
        curvature = jnp.where(usable, inverse_alpha * goal + ridge(size, dtype) * v * v, 1)
        system = cosine * v[:, None] * v[None, :] + jnp.where(eye, curvature[:, None], 0)
        # Scaled to a unit diagonal: the accuracy then does not depend on the size of the amounts.
        scale = lax.rsqrt(jnp.diagonal(system))
        inverse = inverse_factor(system * scale[:, None] * scale[None, :])
        change = scale * factored_solve(inverse, scale * (goal - reached))
        longest = jnp.max(jnp.abs(change))
        change = change * jnp.minimum(1, LONGEST_STEP / jnp.maximum(longest, LONGEST_STEP))
        change = jnp.where(stationary | ~jnp.isfinite(longest), 0, change)
        moved = _Newton(state.log_amounts + change, stationary, close)
        return moved, stationary | converged

    start = _Newton(
        log_amounts=log_c / (1 + inverse_alpha),
        stationary=jnp.any(geometry.active & ~usable) | ~jnp.any(usable),
        close=jnp.asarray(False),
    )
    end, _ = repeat(step, start, cosine, LIMIT, start.stationary)
    log_scale = centre * (inverse_alpha - 1) / (inverse_alpha + 1)
    roots = jnp.where(usable, jnp.exp(end.log_amounts + log_scale - log_norms), 0)
    solved = ~end.stationary & end.close & jnp.all(jnp.isfinite(roots))
    weights = lax.cond(solved, lambda: roots, lambda: min_norm_weights(geometry))
    return weights, solved
