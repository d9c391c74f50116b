"""GO4Align: one weight per group of tasks with similar risk."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.factory import Nonnegative, factory
from mtl_optax.core.types import DType
from mtl_optax.core.validation import check_integer, read_tasks
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.k_means import k_means_on_line
from mtl_optax.solvers.log_weights import exp_weights, keep_log_shares, log_softmax, magnitudes


class GO4AlignState(NamedTuple):
    """State of `go4align`, `[T]` per block.

    Attributes:
      log_q: logarithm of the running distribution over tasks, which starts uniform.
    """

    log_q: jax.Array


@factory
def go4align(
    tasks: int | Collection[str],
    *,
    num_groups: int,
    step_size: Nonnegative = 1e-4,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Groups tasks by a running measure of their risk, and computes one weight per group.

    Tasks with similar progress get the same weight. With ``step_size`` :math:`\beta`:

    .. math::
        q_t \leftarrow \frac{q_t e^{-\beta L_t}}{\sum_s q_s e^{-\beta L_s}}, \qquad
        r_t = q_t \frac{\sum_s L_s}{L_t}, \qquad
        w_t = \text{mean of } r \text{ over the group of } t,

    where k-means on r determines ``num_groups`` groups. Scale: the method's own. Algorithm 1 of the
    paper.

    Args:
      tasks: T, or the task names.
      num_groups: K, static, 1 to T.
      step_size: beta, >= 0.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `GO4AlignState`. `update` needs `losses=`. Cost: O(T^3).

    Raises:
      ValueError: if a number is outside its range.

    Notes:
      The authors' code has one group by default, and so one weight for all tasks; here ``num_groups`` has
      no default. Its k-means has a random start and runs on the host (and its import is commented out);
      here dynamic programming on the device finds the optimum in one dimension. If several groupings are
      optimal, one of them is used.

      A negative loss is weighted by its absolute value. A loss of 0 has weight 0 and belongs to no group.
      r is at most 1.8e19 (float32). The share of q of an absent task does not change. With one task, the
      update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.go4align(3, num_groups=2)
      >>> losses = jnp.array([4., 5., 0.5])
      >>> print(np.asarray(tx.update(jnp.eye(3), tx.init(jnp.zeros(3)), losses=losses)[0]).round(2))
      [0.71 0.71 6.34]

    References:
      Shen, Wang, Xiao, van Noord and Worring, GO4Align: Group Optimization for Multi-Task Alignment,
      2024, https://arxiv.org/abs/2404.06486
    """
    axis = read_tasks("go4align", tasks)
    check_integer("go4align", "num_groups", num_groups, 1, axis.number)

    def init(num_tasks: int, dtype: DType) -> GO4AlignState:
        return GO4AlignState(jnp.full((num_tasks,), -math.log(num_tasks), dtype))

    def weigh(inputs: StepInputs, state: GO4AlignState) -> tuple[jax.Array, GO4AlignState]:
        active, losses = inputs.active, inputs.losses
        beta = jnp.asarray(step_size, losses.dtype)
        log_q = log_softmax(state.log_q - beta * losses, active)
        sizes, usable = magnitudes(losses, active)
        log_shares = log_softmax(jnp.log(sizes), usable)  # log of L_t / sum L
        relative = exp_weights(log_q - log_shares, usable)
        weights = k_means_on_line(relative, usable, num_groups)
        return weights, GO4AlignState(keep_log_shares(log_q, state.log_q, active))

    return from_rule("go4align", axis, WeightRule(frozenset({"losses"}), weigh, init), **options)
