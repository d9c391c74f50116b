"""Nash-MTL: the direction of the update as a bargaining game between the tasks."""

from __future__ import annotations

import functools
import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.arguments import check_range
from mtl_optax.core.factory import factory
from mtl_optax.core.lift import from_rule
from mtl_optax.core.method import Method, MethodOptions, Options
from mtl_optax.core.tasks import read_tasks
from mtl_optax.methods.gram.fairgrad import fairgrad
from mtl_optax.solvers.arithmetic import safe_divide


@factory
def nash_mtl(
    num_tasks: Any,
    *,
    max_norm: Any = None,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Takes the Nash bargaining solution: the direction with the largest product of progresses.

    It is invariant to the scale of each loss, and every task makes progress:
    :math:`g_t \cdot d = 1 / a_t > 0`.

    .. math:: \max_{|d| \le r} \sum_t \log (g_t \cdot d), \qquad
        G G^\top a = 1 / a \;\text{(elementwise)}, \quad a > 0, \qquad update = \sum_t a_t g_t.

    Scale: the method's own; the norm is always :math:`\sqrt T`, so the learning rate sets the step size.
    Algorithm 1 of the paper.

    Args:
      num_tasks: T, or the task names.
      max_norm: the global norm to which the update is clipped (1 in the authors' code), or None. The
        weights in the state are those before clipping.
      **options: see `MethodOptions`; `update_every` is the paper's interval between new weights.

    Returns:
      A `Method` with the state `BargainingState`. Cost: one pass over the gradients for the Gram matrix,
      one for the sum, and about ten `[T, T]` factorisations; with `max_norm` one pass over the update.

    Raises:
      ValueError: for a negative `max_norm`.

    Notes:
      A `max_norm` <= :math:`\sqrt T` always clips, except where weights are reused.

      The root is found by Newton's method on the cosine matrix, to the precision of the dtype. The
      authors' code solves at most 20 convex programs on the host and silently keeps the previous weights
      where they fail, which is most of the time for norms that differ much. Its weights also scale the
      heads: see `split_value_and_grad`.

      No solution exists if a gradient is zero or 0 lies in the convex hull of the gradients. The weights
      are then those of `mgda`, whose update is 0 there, and ``rule_state.fallback_count`` increases. All
      zero: the update is 0, counted too. T = 1: the unit gradient.

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
    tasks = read_tasks("nash_mtl", num_tasks)
    if max_norm is not None:
        check_range("nash_mtl", max_norm=(max_norm, 0, math.inf))
    rule = fairgrad(tasks, alpha=1.0).rule
    if max_norm is not None:
        rule = rule._replace(finish=functools.partial(_clip, max_norm))
    return from_rule("nash_mtl", tasks, rule, **options)


def _clip(max_norm: Any, update: Any, options: Options, dtype: Any) -> Any:
    """Clips the global norm of the update; with `reduce=False`, that of its sum over tasks."""
    wide = jax.tree.map(lambda u: u.astype(dtype), update)
    total = wide if options.reduce else jax.tree.map(lambda u: jnp.sum(u, axis=0), wide)
    squared = task_tree.sum_over(optax.tree.norm(total, squared=True), options.axis_name)
    norm, limit = jnp.sqrt(squared), jnp.asarray(max_norm, dtype)
    factor = safe_divide(limit, norm, 1, where=norm > limit).astype(dtype)
    return task_tree.narrow_like(jax.tree.map(lambda w: w * factor, wide), update)
