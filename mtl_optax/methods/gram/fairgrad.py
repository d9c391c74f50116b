"""FairGrad: alpha-fair allocation of progress between tasks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

from mtl_optax.core.factory import Nonnegative, factory
from mtl_optax.core.shared_rules import fair_rule
from mtl_optax.rule import Method, MethodOptions, from_rule


@factory
def fairgrad(
    tasks: int | Collection[str], *, alpha: Nonnegative = 1.0, **options: Unpack[MethodOptions]
) -> Method:
    r"""Allocates progress between tasks by alpha-fairness.

    Alpha-fairness is a criterion for sharing a resource, such as network bandwidth. Here the utility of a
    task is its progress :math:`g_t \cdot d`. The direction d of bounded length that maximises the sum of
    alpha-fair utilities has positive weights with

    .. math:: G G^\top w = w^{-1/\alpha} \;\text{(elementwise)}, \qquad update = \sum_t w_t g_t

    where the rows of G are the gradients. ``alpha`` = 1 is proportional fairness (`nash_mtl`); alpha
    towards 0 gives the mean of the losses; large values approach max-min fairness. Scale: the method's
    own; with :math:`\alpha = 1` the norm is always :math:`\sqrt T`. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      alpha: fairness, positive.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `BargainingState`. Cost: one pass over the gradients for the Gram matrix,
      one for the sum, and about ten `[T, T]` factorisations.

    Raises:
      ValueError: if `alpha` is not positive.

    Notes:
      Newton's method on the cosine matrix finds the root to the dtype's precision. The authors' code uses
      a least-squares solver, which has large errors for norms that differ much or are around 1e-3. It
      also multiplies the update by T and clips it to norm 1 (chain ``optax.clip_by_global_norm(1.0)``
      after the method for this). The authors' experiments use alpha = 2.

      No root exists if a gradient is zero, or 0 is in the convex hull of the gradients (opposite
      gradients, more tasks than dimensions). Then the weights are those of MGDA, the update is 0, and
      ``rule_state.fallback_count`` increases. With one task, :math:`w = |g|^{-2\alpha/(1+\alpha)}`.

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
    if isinstance(alpha, (int, float)) and alpha == 0:
        raise ValueError("fairgrad: alpha must be positive; for the mean use mean_tasks.")

    return from_rule("fairgrad", tasks, fair_rule(alpha), **options)
