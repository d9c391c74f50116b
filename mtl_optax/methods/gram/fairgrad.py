"""FairGrad: alpha-fair allocation of progress between tasks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.arguments import check_range
from mtl_optax.core.factory import factory
from mtl_optax.core.lift import from_rule, next_count
from mtl_optax.core.method import Method, MethodOptions
from mtl_optax.core.rule import Evidence, WeightRule
from mtl_optax.core.tasks import read_tasks
from mtl_optax.solvers.nash import fair_weights


class BargainingState(NamedTuple):
    """State of `fairgrad` and `nash_mtl`.

    Attributes:
      fallback_count: int32 scalar, how often no solution existed and min-norm weights were used.
    """

    fallback_count: jax.Array


@factory
def fairgrad(num_tasks: Any, *, alpha: Any = 1.0, **options: Unpack[MethodOptions]) -> Method:
    r"""Allocates progress between tasks by alpha-fairness.

    Alpha-fairness is a criterion for sharing a resource, such as network bandwidth. Here the utility of a
    task is its progress :math:`g_t \cdot d`. The direction d of bounded length that maximises the sum of
    alpha-fair utilities has positive weights with

    .. math:: G G^\top w = w^{-1/\alpha} \;\text{(elementwise)}, \qquad update = \sum_t w_t g_t

    where the rows of G are the gradients. ``alpha`` = 1 is proportional fairness (`nash_mtl`); alpha
    towards 0 gives the mean of the losses; large values approach max-min fairness. Scale: the method's
    own; with :math:`\alpha = 1` the norm is always :math:`\sqrt T`. Algorithm 1 of the paper.

    Args:
      num_tasks: T, or the task names.
      alpha: fairness, positive.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `BargainingState`. Cost: one pass over the gradients for the Gram matrix,
      one for the sum, and about ten `[T, T]` factorisations.

    Raises:
      ValueError: for an alpha that is not positive.

    Notes:
      Newton's method on the cosine matrix finds the root to the dtype's precision. The authors' code
      differs: its least-squares solver has large errors for norms that differ much or lie around 1e-3; it
      multiplies by T and clips to norm 1 (chain ``optax.clip_by_global_norm(1.0)`` for that). The
      authors' experiments use alpha = 2.

      No root exists if a gradient is zero or 0 lies in the convex hull of the gradients (opposite
      gradients, more tasks than dimensions). Then the weights are those of MGDA, the update is 0, and
      ``rule_state.fallback_count`` increases. All zero: 0, counted.
      T = 1: :math:`w = |g|^{-2\alpha/(1+\alpha)}`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.fairgrad(2, alpha=2.0)
      >>> _, state = tx.update(jnp.array([[8., 0.], [0., 1.]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(state.weights).round(4))
      [[0.0625 1.    ]]

    References:
      Ban and Ji, Fair Resource Allocation in Multi-Task Learning, 2024,
      https://arxiv.org/abs/2402.15638
    """
    tasks = read_tasks("fairgrad", num_tasks)
    check_range("fairgrad", alpha=(alpha, 0, math.inf))
    if isinstance(alpha, (int, float)) and alpha == 0:
        raise ValueError("fairgrad: alpha must be positive; for the mean use mean_tasks.")

    def init(dtype: Any) -> BargainingState:
        return BargainingState(jnp.zeros((), jnp.int32))

    def weigh(evidence: Evidence, state: BargainingState) -> tuple[jax.Array, BargainingState]:
        fairness = jnp.asarray(alpha, evidence.norms.dtype)
        weights, solved = fair_weights(evidence.cosine, evidence.norms, evidence.active, fairness)
        failed = jnp.any(evidence.active) & ~solved
        return weights, BargainingState(next_count(state.fallback_count, failed))

    return from_rule("fairgrad", tasks, WeightRule(frozenset({"gram"}), weigh, init), **options)
