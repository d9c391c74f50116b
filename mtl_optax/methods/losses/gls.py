"""Geometric loss strategy: the geometric mean of the losses."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import factory
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import count_active, mean_active
from mtl_optax.solvers.log_weights import exp_weights, magnitudes


@factory
def gls(tasks: int | Collection[str], **options: Unpack[MethodOptions]) -> Method:
    r"""Minimises the geometric mean of the losses.

    Equal relative decreases of different losses then have the same effect, in any unit. The objective
    :math:`F = (\prod_t L_t)^{1/T}` has the gradient :math:`\sum_t w_t g_t` with

    .. math:: w_t = F / (T L_t).

    Scale: the method's own; if all losses are equal, every weight is 1/T. Equation 2 of the paper.

    Args:
      tasks: T, or the task names.
      **options: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state. `update` needs `losses=`. Cost: O(T).

    Notes:
      The mean is computed with logarithms, because the product of a few losses can be outside the range
      of float32.

      A negative loss is weighted by its absolute value, so that it still decreases. A loss of 0, at which
      F has no gradient, has weight 0 and is excluded from the mean, as are absent tasks. Weights are at
      most 1.8e19 (float32). With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.gls(2)
      >>> losses = jnp.array([8., 0.5])
      >>> print(np.asarray(tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=losses)[0]).round(3))
      [0.125 2.   ]

    References:
      Chennupati, Sistu, Yogamani and Rawashdeh, MultiNet++: Multi-Stream Feature Aggregation and
      Geometric Loss Strategy for Multi-Task Learning, 2019, https://arxiv.org/abs/1904.08492
    """

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        sizes, usable = magnitudes(inputs.losses, inputs.active)
        logs = jnp.log(sizes)
        log_number = jnp.log(count_active(usable, logs.dtype))
        return exp_weights(mean_active(logs, usable) - logs - log_number, usable), state

    return from_rule("gls", tasks, WeightRule(frozenset({"losses"}), weigh), **options)
