"""LDC-MTL: trained weights, with a penalty on the differences between the weighted losses."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Nonnegative, Transformation, factory
from mtl_optax.core.trained_values import TrainedState, start, train
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.log_weights import largest_weight


@factory
def ldc_mtl(
    tasks: int | Collection[str],
    *,
    penalty: Nonnegative = 0.01,
    optimizer: Transformation = optax.adam(1e-3),
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Trains weights that make the weighted losses equal, together with the network.

    The upper level of a bilevel problem makes the weighted losses equal, and the lower level decreases
    their sum. One step of a first-order method does both. With the trained values :math:`v_t`,
    :math:`s_t = \mathrm{sigmoid}(v_t)` and ``penalty`` :math:`\lambda`, the objective is

    .. math::
        \frac{\sum_t s_t L_t}{\sum_t s_t} + \lambda \sum_{t<T} |s_t L_t - s_{t+1} L_{t+1}|,

    where the first denominator is a constant under differentiation. The weights are the derivatives of
    the objective with respect to the losses. Scale: mean-like, as long as the penalty is small. This is
    the form of the authors' CelebA program.

    Args:
      tasks: T, or the task names; the penalty compares neighbours in the order of the tasks.
      penalty: lambda, >= 0, in the unit of an inverse loss.
      optimizer: any optax optimizer, which trains v from 1.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `TrainedState` (v). `update` needs `losses=`. Cost: O(T^2).

    Raises:
      ValueError: if the penalty is negative.

    Notes:
      In the authors' program, one optimizer trains the network and v; here v has its own optimizer. In two
      other programs of theirs, a layer on the representation computes the weights. In another one the
      losses are divided by their first value and replaced by their logarithm: return such losses from the
      loss function.

      Weights can be negative if :math:`2 \lambda \sum_t s_t > 1`. The trained value of an absent task does
      not change, and the tasks before and after it become neighbours. The derivative of the absolute
      value at 0 is 0. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.ldc_mtl(2, penalty=0.1)
      >>> losses = jnp.array([2., 1.])
      >>> update, state = tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=losses)
      >>> print(np.asarray(update).round(3), np.asarray(state.rule_state.values).round(3))
      [0.573 0.427] [[0.999 0.999]]

    References:
      Xiao, Dong, Zou and Ji, LDC-MTL: Balancing Multi-Task Learning through Scalable Loss Discrepancy
      Control, 2025, https://arxiv.org/abs/2502.08585
    """

    def init(num_tasks: int, dtype: DType) -> TrainedState:
        return start(optimizer, jnp.ones((num_tasks,), dtype))

    def weigh(inputs: StepInputs, state: TrainedState) -> tuple[jax.Array, TrainedState]:
        losses, active, dtype = inputs.losses, inputs.active, inputs.losses.dtype
        factors = jax.nn.sigmoid(state.values)
        weighted = factors * losses
        position = jnp.cumsum(active.astype(jnp.int32))
        neighbours = (jnp.abs(position[:, None] - position[None, :]) == 1) & active[None, :]
        order = jnp.sign(weighted[:, None] - weighted[None, :])
        above = jnp.sum(order, axis=1, where=neighbours)
        share = safe_divide(1, jnp.sum(factors, where=active))
        weights = factors * (share + jnp.asarray(penalty, dtype) * above)
        gradient = (1 - factors) * losses * weights
        bound = math.log(largest_weight(dtype))
        return weights, train(optimizer, state, gradient, active, -bound, bound)

    return from_rule("ldc_mtl", tasks, WeightRule(frozenset({"losses"}), weigh, init), **options)
