"""MGDA: the convex combination of the task gradients with the smallest norm."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Unpack

from mtl_optax.core.arguments import check_choice
from mtl_optax.core.factory import factory
from mtl_optax.core.method import Method, MethodOptions
from mtl_optax.core.pipeline import from_rule
from mtl_optax.core.shared_rules import min_norm_rule
from mtl_optax.core.tasks import read_tasks


@factory
def mgda(
    tasks: int | Collection[str],
    *,
    normalize: Literal["none", "l2", "loss", "loss+"] = "none",
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Takes the convex combination of the task gradients with the smallest norm.

    A step against it decreases every loss to first order; it is 0 exactly where no such step exists (a
    Pareto-stationary point). Small gradients get large weights, so MGDA follows the tasks that have
    nearly converged; ``normalize`` changes that.

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
      ValueError: for an unknown `normalize`.

    Notes:
      The solution is exact to the precision of the dtype; weights may be exactly 0. Public programs limit
      the weights to 0.001 and 0.999 and stop after a fixed number of Frank-Wolfe steps. For gradient
      norms a factor of 1000 apart, that changes the update by as much as its norm.

      A zero gradient gets all the weight, and the update is 0, for every `normalize`. All zero: equal
      weights. With "loss" and "loss+", a loss of 0 or below counts as a zero gradient. T = 1: weight 1.

      If the convex hull of gradients that are about 100 times (float32; 1e6 times in float64) as long as
      another one contains 0, that one keeps a weight. The update is then at most as long as it, not 0.

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
    axis = read_tasks("mgda", tasks)
    check_choice("mgda", "normalize", normalize, ("none", "l2", "loss", "loss+"))
    return from_rule("mgda", axis, min_norm_rule(normalize), **options)
