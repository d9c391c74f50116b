"""MGDA: the convex combination of the task gradients with the smallest norm."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Unpack

from mtl_optax.core.factory import factory
from mtl_optax.core.shared_rules import min_norm_rule
from mtl_optax.rule import Method, MethodOptions, from_rule


@factory
def mgda(
    tasks: int | Collection[str],
    *,
    normalize: Literal["none", "l2", "loss", "loss+"] = "none",
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Takes the convex combination of the task gradients with the smallest norm.

    A step in the opposite direction decreases every loss to first order. The update is 0 exactly if no
    such step exists (at a Pareto-stationary point). Small gradients get large weights, so MGDA favours
    the tasks that have nearly converged; ``normalize`` changes this.

    .. math:: a = \arg\min_{a \ge 0,\ \sum_t a_t = 1} \Big|\sum_t a_t\, g_t / c_t\Big|^2, \qquad
        update = \sum_t a_t g_t,

    with :math:`c_t = 1` ("none"), :math:`|g_t|` ("l2"), the loss :math:`L_t` ("loss"), or
    :math:`L_t |g_t|` ("loss+"). The weights multiply the raw gradients. Scale: mean-like. Algorithm 2 of
    Sener and Koltun.

    Args:
      tasks: T, or the task names.
      normalize: the divisor c of the gradients in the minimisation.
      **options: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state; with "loss" and "loss+" its `update` needs `losses=`. Cost: one
      pass over the gradients for the Gram matrix, one for the sum, and a `[T, T]` quadratic program.

    Raises:
      ValueError: if `normalize` is unknown.

    Notes:
      The solution is exact to the precision of the dtype; weights may be exactly 0. Public programs limit
      the weights to [0.001, 0.999] and stop after a fixed number of Frank-Wolfe steps. If gradient norms
      differ by a factor of 1000, this changes the update by as much as its norm.

      A zero gradient gets all the weight, and the update is 0, for every `normalize`. If all gradients
      are zero, the weights are equal. With "loss" and "loss+", the gradient of a loss of 0 or below
      counts as zero. With one task, its weight is 1.

      There is one exception to exactness. If the convex hull of some gradients contains 0, and another
      gradient is about 100 times shorter (1e6 times in float64) than these, the shorter one may keep a
      weight. The update is then not 0, but at most as long as this gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.mgda(2)
      >>> update, state = tx.update(jnp.array([[2., 0.], [0., 1.]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(state.weights).round(3))
      [[0.2 0.8]]
      >>> print(np.asarray(update).round(3))
      [0.4 0.8]

    References:
      Désidéri, Multiple-Gradient Descent Algorithm (MGDA) for Multiobjective Optimization, 2012,
      https://doi.org/10.1016/j.crma.2012.03.014

      Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, 2018,
      https://arxiv.org/abs/1810.04650
    """
    return from_rule("mgda", tasks, min_norm_rule(normalize), **options)
