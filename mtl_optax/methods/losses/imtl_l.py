"""IMTL-L: a learned factor that scales every loss to the same size."""

from __future__ import annotations

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.arguments import check_transformation
from mtl_optax.core.factory import factory
from mtl_optax.core.lift import from_rule
from mtl_optax.core.method import Method, MethodOptions
from mtl_optax.core.rule import Evidence, WeightRule
from mtl_optax.core.tasks import read_tasks
from mtl_optax.core.trained_values import TrainedState, start, train
from mtl_optax.solvers.log_weights import largest_weight


@factory
def imtl_l(
    num_tasks: Any,
    *,
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Learns one scale per task that brings every loss to 1.

    Losses of different sizes contribute unequally to a sum. IMTL-L trains :math:`s_t` to minimise
    :math:`e^{s_t} L_t - s_t`, whose minimum is at a scaled loss of 1, without a prior over the tasks:

    .. math:: w_t = e^{s_t}, \qquad \partial_{s_t} = e^{s_t} L_t - 1 .

    The weights use s before the step. Scale: the method's own. The loss half of algorithm 1 of the paper;
    `imtl` combines it with the gradient half, `imtl_g`.

    Args:
      num_tasks: T, or the task names.
      optimizer: trains s, which starts at 0; any optax optimizer.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `TrainedState` (s). Needs `losses=`. Cost: O(T).

    Notes:
      The authors' code is not public.

      For losses of 0 or below, s has no finite optimum: weights are kept between 1/1.8e19 and 1.8e19
      (float32). The s of an absent task does not change. T = 1: one trained scale.

    Example:

      >>> import jax.numpy as jnp, numpy as np, optax, mtl_optax as mtl
      >>> tx = mtl.imtl_l(2, optimizer=optax.sgd(0.1))
      >>> grads, losses = jnp.eye(2), jnp.array([4., 0.5])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(update, np.asarray(state.rule_state.values).round(3))
      [1. 1.] [[-0.3   0.05]]

    References:
      Liu, Li, Kuang, Xue, Chen, Yang, Liao and Zhang, Towards Impartial Multi-task Learning, 2021,
      https://openreview.net/forum?id=IMPnRXEWpvr
    """
    tasks = read_tasks("imtl_l", num_tasks)
    check_transformation("imtl_l", "optimizer", optimizer)

    def init(dtype: Any) -> TrainedState:
        return start(optimizer, jnp.zeros((tasks.number,), dtype))

    def weigh(evidence: Evidence, state: TrainedState) -> tuple[jax.Array, TrainedState]:
        weights = jnp.exp(state.values)
        high = math.log(largest_weight(weights.dtype))
        gradient = weights * evidence.losses - 1
        return weights, train(optimizer, state, gradient, evidence.active, -high, high)

    return from_rule("imtl_l", tasks, WeightRule(frozenset({"losses"}), weigh, init), **options)
