"""BanditMTL: losses kept close to each other by an adversarial distribution over tasks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.kl_ball import kl_ball_mirror_step
from mtl_optax.solvers.log_weights import keep_log_shares, log_softmax


class BanditMTLState(NamedTuple):
    """`[T]`, logarithm of the adversary's distribution over tasks; starts uniform."""

    log_p: jax.Array


def bandit_mtl(
    num_tasks: int,
    *,
    step_size: Any = 0.5,
    kl_radius: Any = 1.2,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Leans towards the tasks with large losses, within a KL ball around equal weights.

    Regularises the variance between the task losses: an adversary :math:`p` does mirror ascent on
    :math:`\sum_t p_t L_t` under :math:`KL(p \| u) \le` ``kl_radius``. With ``step_size`` :math:`\eta` and
    the smallest :math:`\mu \ge 0` that keeps p in the ball:

    .. math::
        w_t = p_t / T, \qquad
        p_t \leftarrow \frac{(p_t e^{\eta L_t})^{1/(1+\mu)}}{\sum_s (p_s e^{\eta L_s})^{1/(1+\mu)}} .

    p is used first and moved after. The scale is the method's own: the weights sum to 1/T. Algorithm 1
    of the paper. The projection is exact, in logarithms, on the device; the code in circulation searches
    on the host, and fails for :math:`\eta L > 709` and once a p underflows. The divergence never exceeds
    log T, so a larger ``kl_radius`` (the default, for T <= 3) is no limit.

    Degenerate input: losses of any finite size and sign. Absent tasks keep their place in p, and the
    others' weights are normalised among themselves. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      step_size: eta, >= 0.
      kl_radius: radius of the ball, >= 0; 0 is equal weights.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`. State:
      `BanditMTLState`. Cost: a scalar root search, O(T) a step of it.

    Raises:
      ValueError: for numbers outside their range or missing `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.bandit_mtl(2)
      >>> grads, losses = jnp.eye(2), jnp.array([3., 1.])
      >>> updates, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(np.asarray(updates).round(3), np.asarray(jnp.exp(state.rule_state.log_p)).round(3))
      [0.25 0.25] [0.731 0.269]

    References:
      Mao et al., BanditMTL: Bandit-based Multi-task Learning for Text Classification, 2021.
    """
    num_tasks = check_num_tasks("bandit_mtl", num_tasks)
    check_range(
        "bandit_mtl", step_size=(step_size, 0, math.inf), kl_radius=(kl_radius, 0, math.inf)
    )

    def init(dtype: Any) -> BanditMTLState:
        return BanditMTLState(jnp.full((num_tasks,), -math.log(num_tasks), dtype))

    def weigh(evidence: Evidence, state: BanditMTLState) -> tuple[jax.Array, BanditMTLState]:
        active, dtype = evidence.active, evidence.losses.dtype
        count = jnp.maximum(jnp.sum(active), 1).astype(dtype)
        weights = jnp.exp(log_softmax(state.log_p, active)) / count
        scores = jnp.asarray(step_size, dtype) * evidence.losses
        moved = kl_ball_mirror_step(state.log_p, scores, jnp.asarray(kl_radius, dtype), active)
        return weights, BanditMTLState(keep_log_shares(moved, state.log_p, active))

    return from_rule(Rule("bandit_mtl", num_tasks, frozenset({"losses"}), init, weigh), **options)


METHOD = Method(
    name="bandit_mtl",
    factory=bandit_mtl,
    needs=("losses",),
    family="from_losses",
    scale="own",
    reference="Mao et al., BanditMTL, 2021",
    make=bandit_mtl,
    properties=frozenset({"permutation", "scale", "split"}),
)
