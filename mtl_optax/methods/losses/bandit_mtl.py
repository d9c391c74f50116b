"""BanditMTL: an adversarial distribution over tasks that reduces the variance of the losses."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.factory import Nonnegative, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import count_active
from mtl_optax.solvers.kl_ball import kl_ball_mirror_step
from mtl_optax.solvers.log_weights import keep_log_shares, softmax


class BanditMTLState(NamedTuple):
    """State of `bandit_mtl`, `[T]` per block.

    Attributes:
      log_p: logarithm of the adversary's distribution over tasks, which starts uniform.
    """

    log_p: jax.Array


@factory
def bandit_mtl(
    tasks: int | Collection[str],
    *,
    step_size: Nonnegative = 0.5,
    kl_radius: Nonnegative = 1.2,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Gives larger weights to tasks with larger losses, within a KL ball around equal weights.

    The method regularises the variance of the task losses. An adversary p does mirror ascent on
    :math:`\sum_t p_t L_t` under :math:`KL(p \| u) \le` ``kl_radius``, where u is uniform. With
    ``step_size`` :math:`\eta` and the smallest :math:`\mu \ge 0` that satisfies the constraint:

    .. math::
        w_t = p_t / T, \qquad
        p_t \leftarrow \frac{(p_t e^{\eta L_t})^{1/(1+\mu)}}{\sum_s (p_s e^{\eta L_s})^{1/(1+\mu)}} .

    The weights use p before the step. Scale: the method's own; the weights sum to 1/T. Algorithm 1 of
    the paper.

    Args:
      tasks: T, or the task names.
      step_size: eta, >= 0.
      kl_radius: radius of the ball, >= 0; 0 gives equal weights.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `BanditMTLState`. `update` needs `losses=`. Cost: a scalar root search,
      O(T) per iteration.

    Raises:
      ValueError: if a number is outside its range.

    Notes:
      The divergence is at most log T, so a larger ``kl_radius`` (such as the default for T <= 3) is no
      constraint.

      Published programs search for :math:`\mu` on the host, and fail for :math:`\eta L > 709` or once an
      entry of p underflows. Here the projection is exact, in logarithms, on the device.

      Losses may have any finite size and sign. The share of p of an absent task does not change; the
      other weights are normalised without it. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.bandit_mtl(2)
      >>> grads, losses = jnp.eye(2), jnp.array([3., 1.])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(np.asarray(update).round(3), np.asarray(jnp.exp(state.rule_state.log_p)).round(3))
      [0.25 0.25] [[0.731 0.269]]

    References:
      Mao, Wang, Liu, Lin and Hu, BanditMTL: Bandit-based Multi-task Learning for Text Classification,
      2021, https://aclanthology.org/2021.acl-long.428
    """

    def init(num_tasks: int, dtype: DType) -> BanditMTLState:
        return BanditMTLState(jnp.full((num_tasks,), -math.log(num_tasks), dtype))

    def weigh(inputs: StepInputs, state: BanditMTLState) -> tuple[jax.Array, BanditMTLState]:
        active = inputs.active
        weights = softmax(state.log_p, active) / count_active(active, inputs.dtype)
        log_p = kl_ball_mirror_step(state.log_p, step_size * inputs.losses, kl_radius, active)
        return weights, BanditMTLState(keep_log_shares(log_p, state.log_p, active))

    return from_rule("bandit_mtl", tasks, WeightRule(frozenset({"losses"}), weigh, init), **options)
