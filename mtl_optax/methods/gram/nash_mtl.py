"""Nash-MTL: the direction of the update as a bargaining game between the tasks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

from mtl_optax.core.factory import factory
from mtl_optax.core.shared_rules import fair_rule
from mtl_optax.rule import Method, MethodOptions, from_rule


@factory
def nash_mtl(tasks: int | Collection[str], **options: Unpack[MethodOptions]) -> Method:
    r"""Takes the Nash bargaining solution: the direction with the largest product of progresses.

    It is invariant to the scale of each loss, and every task makes progress:
    :math:`g_t \cdot d = 1 / a_t > 0`.

    .. math:: \max_{|d| \le r} \sum_t \log (g_t \cdot d), \qquad
        G G^\top a = 1 / a \;\text{(elementwise)}, \quad a > 0, \qquad update = \sum_t a_t g_t.

    Scale: the method's own; the norm is always :math:`\sqrt T`, so the learning rate sets the step size.
    Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      **options: see `MethodOptions`; `update_every` is the interval between new weights in the paper.

    Returns:
      A `Method` with the state `BargainingState`. Cost: one pass over the gradients for the Gram matrix,
      one for the sum, and about ten `[T, T]` factorisations.

    Notes:
      The authors clip the update to a global norm of 1: put `optax.clip_by_global_norm(1.0)` after it.

      Newton's method on the cosine matrix finds the root to the precision of the dtype. The authors' code
      solves at most 20 convex programs on the host. If they fail, which is usual for norms that differ
      much, it silently reuses the previous weights. Its weights also scale the heads: see
      `split_value_and_grad`.

      No solution exists if a gradient is zero, or 0 is in the convex hull of the gradients. The weights
      are then those of `mgda`, whose update is 0, and ``rule_state.fallback_count`` increases. With one
      task, the update is its unit gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.nash_mtl(2)
      >>> update, state = tx.update(jnp.array([[8., 0.], [0., 0.1]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(update).round(3))
      [1. 1.]
      >>> print(np.asarray(state.weights).round(3))
      [[ 0.125 10.   ]]

    References:
      Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik and Fetaya, Multi-Task Learning as a
      Bargaining Game, 2022, https://arxiv.org/abs/2202.01017
    """
    return from_rule("nash_mtl", tasks, fair_rule(1.0), **options)
