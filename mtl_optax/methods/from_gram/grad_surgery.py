"""Gradient surgery for one target: auxiliary gradients lose what works against it."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks, check_task_index
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.methods.from_gram.projection_order import raw_weights


def grad_surgery(
    num_tasks: int, *, target: int = 0, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""Projects auxiliary gradients off the target's where they conflict with it, then sums.

    PCGrad with one privileged task: the target's gradient is never changed, and auxiliaries do not
    adapt to each other. No auxiliary slows the target down to first order.

    .. math:: g_t' = g_t - \frac{\min(g_t \cdot g_{target},\, 0)}{|g_{target}|^2}\, g_{target}
        \quad (t \ne target), \qquad update = g_{target} + \sum_{t \ne target} g_t'.

    Sum-like. Equation 7 of the paper, which has no public code for it. With MetaBalance in one line:
    ``optax.chain(metabalance(T, reduce=False), grad_surgery(T), optax.adam(1e-3))``.

    Degenerate input: where the target's gradient is zero, or the target absent, nothing conflicts and
    the update is the sum. An auxiliary opposite to the target is removed. T = 1: the gradient itself.
    With ``reduce=False`` the slots hold :math:`w_t g_t`, whose sum is the update; all corrections are in
    the target's weight.

    Args:
      num_tasks: T, static.
      target: index of the target task.
      **options: see `WeightingOptions`; ``blocks="leaf"`` projects tensor by tensor.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients for the
      Gram matrix, one for the sum.

    Raises:
      ValueError: for a target outside 0..T-1.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.grad_surgery(2, target=0)
      >>> grads = jnp.array([[1., 0.], [-1., 1.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [1. 1.]

    References:
      He et al., MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes of
      Auxiliary Tasks, 2022, appendix; Yu et al., Gradient Surgery for Multi-Task Learning, 2020.
    """
    num_tasks = check_num_tasks("grad_surgery", num_tasks)
    target = check_task_index("grad_surgery", "target", target, num_tasks)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        conflicts = jnp.maximum(-evidence.cosine[:, target], 0)
        added = jnp.zeros_like(evidence.cosine).at[:, target].set(conflicts)
        return raw_weights(added, evidence.norms), state

    rule = Rule("grad_surgery", num_tasks, frozenset({"gram"}), lambda dtype: (), weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="grad_surgery",
    factory=grad_surgery,
    needs=("gram",),
    family="from_gram",
    scale="sum",
    reference="He et al., MetaBalance, 2022, equation 7",
    make=grad_surgery,
    properties=frozenset({"scale", "split"}),
)
