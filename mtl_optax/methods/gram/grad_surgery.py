"""Gradient surgery for a target task: projects auxiliary gradients that conflict with it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import factory
from mtl_optax.core.validation import find_target
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.projections import projected_sum_weights


@factory
def grad_surgery(
    tasks: int | Collection[str],
    *,
    target: int | str | None = None,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Removes the part of each auxiliary gradient that conflicts with the target, and sums the results.

    This is PCGrad for one target task: the target's gradient is never changed, and auxiliary gradients
    are not projected on each other. To first order, no auxiliary slows the target down.

    .. math:: g_t' = g_t - \frac{\min(g_t \cdot g_{target},\, 0)}{|g_{target}|^2}\, g_{target}
        \quad (t \ne target), \qquad update = g_{target} + \sum_{t \ne target} g_t'

    Scale: sum-like. Equation 7 of the MetaBalance paper.

    Args:
      tasks: T, or the task names.
      target: name or index of the target task: required if the tasks have names, else 0 by default.
      **options: see `MethodOptions`; ``blocks="leaf"`` projects tensor by tensor.

    Returns:
      A `Method`. Cost: one pass over the gradients for the Gram matrix, one for the sum.

    Raises:
      ValueError: if the target is unknown.

    Notes:
      The paper has no public code for this method. With ``reduce=False`` the entries are :math:`w_t g_t`,
      whose sum is the update; all corrections are in the weight of the target. To combine with
      MetaBalance: ``optax.chain(metabalance(T, reduce=False), grad_surgery(T), optax.adam(1e-3))``.

      If the target is zero or absent, nothing conflicts and the update is the sum. An auxiliary gradient
      opposite to the target's is removed. If all gradients are zero, the update is 0. With one task, the
      update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.grad_surgery(2, target=0)
      >>> grads = jnp.array([[1., 0.], [-1., 1.]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> print(np.asarray(update).round(3))
      [1. 1.]

    References:
      He, Feng, Cheng, Ji, Guo and Caverlee, MetaBalance: Improving Multi-Task Recommendations via
      Adapting Gradient Magnitudes of Auxiliary Tasks, 2022, appendix, https://arxiv.org/abs/2203.06801

      Yu, Kumar, Gupta, Levine, Hausman and Finn, Gradient Surgery for Multi-Task Learning, 2020,
      https://arxiv.org/abs/2001.06782
    """
    index = find_target("grad_surgery", target, tasks)

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        conflicts = jnp.maximum(-inputs.cosine[:, index], 0)
        added = jnp.zeros_like(inputs.cosine).at[:, index].set(conflicts)
        return projected_sum_weights(added, inputs.norms), state

    rule = WeightRule(frozenset({"gram"}), weigh, target=index)
    return from_rule("grad_surgery", tasks, rule, **options)
