"""EMTL: equal relative rates of the tasks, by variance regularisation of MGDA."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Nonnegative, Share, factory
from mtl_optax.core.pipeline import rule_of
from mtl_optax.core.shared_rules import min_norm_rule
from mtl_optax.core.types import DType
from mtl_optax.core.validation import read_tasks
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import count_active, safe_divide
from mtl_optax.solvers.kl_ball import kl_ball_mirror_step
from mtl_optax.solvers.log_weights import keep_log_shares


class EMTLState(NamedTuple):
    """State of `emtl`.

    Attributes:
      log_p: `[T]`, logarithm of the adversary's distribution over tasks.
      base: the state of the base method.
    """

    log_p: jax.Array
    base: optax.OptState


@factory
def emtl(
    tasks: int | Collection[str],
    *,
    epsilon: Share = 0.0,
    rho: Nonnegative = 0.1,
    kl_radius: Nonnegative | None = None,
    step_size: Nonnegative = 0.5,
    base: optax.GradientTransformation | None = None,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Equalises the ratio of weighted loss to gradient norm over the tasks.

    This ratio, the *relative rate* :math:`R_t = \alpha_t L_t / |g_t|`, is large for a task with a large
    loss and little effect on the shared parameters. An adversary chooses a distribution p over tasks, in a
    KL ball around the uniform one, and follows large rates by mirror ascent. This bounds their variance.

    With :math:`\alpha` the weights of ``base``, ``step_size`` :math:`\eta`, ``epsilon``
    :math:`\epsilon`, and the smallest :math:`\mu \ge 0` for which :math:`KL(p\|u) \le` ``kl_radius``,
    where u is uniform:

    .. math::
        p_t \leftarrow \frac{(p_t e^{\eta R_t})^{1/(1+\mu)}}{\sum_s (p_s e^{\eta R_s})^{1/(1+\mu)}},
        \qquad w_t = \tfrac1T \big(\epsilon\, \alpha_t + (1-\epsilon)\, p_t\, \alpha_t / |g_t|\big),
        \qquad update = \sum_t w_t g_t

    with the new p. Scale: the method's own; by default the update is
    :math:`\tfrac1T \sum_t p_t \alpha_t\, g_t / |g_t|`, which is not longer than 1/T. Equations 11 to 13
    and algorithm 1 of the paper.

    By default the update does not depend on the scales of the losses: a factor c in a loss multiplies
    :math:`L_t` and :math:`g_t`, but it does not change :math:`\alpha_t`, :math:`R_t`, p and
    :math:`w_t g_t`. With ``epsilon > 0``, or a ``base`` whose weights depend on the lengths of the
    gradients, it does.

    Args:
      tasks: T, or the task names.
      epsilon: share of the plain update of `base`, in [0, 1]; 1 is this update divided by T.
      rho: strength of the regularisation; the radius of the ball is its square root.
      kl_radius: the radius of the ball; by default sqrt(rho).
      step_size: eta, the step size of the adversary.
      base: the method that computes alpha, any weighting method of this library; None means MGDA on unit
        gradients, `mgda(tasks, normalize="l2")`.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `EMTLState`. `update` needs `losses=`. Cost: one pass over the gradients
      for the Gram matrix, one for the sum, and a scalar root search.

    Raises:
      ValueError: if a number is outside its range, or `base` has another number of tasks.
      TypeError: if `base` is not a weighting method.

    Notes:
      The paper has no public code, and its text does not say whether MGDA uses raw or unit gradients. It
      claims that the method does not depend on the scales of the losses. With raw gradients
      (``base=mgda(tasks)``) it does: for nearly orthogonal gradients :math:`\alpha_t` is proportional to
      :math:`1/|g_t|^2`, and :math:`w_t` to :math:`1/|g_t|^3`. On unit gradients all five paths of the
      paper's Figure 1 reach the best mean, as in the paper; on raw gradients none does
      (``python -m examples.studies.emtl figure1``, where ``epsilon`` > 0 costs one of the five).
      On data like those of its Table 1 it is level with the plain sum, and on those of Table 3 it is 3 %
      better; on raw gradients it is significantly worse in both (``table1``, ``table3``).

      Norms and :math:`\alpha` are constant under differentiation. The paper weights the losses, so the
      heads are scaled too: see `split_value_and_grad`. The KL divergence never exceeds log T, so for
      ``rho`` >= (log T)^2 (0.481 for T = 2) the ball is no constraint.

      A zero gradient has rate 0 and no second term; MGDA gives it all the weight, and the update is 0.
      With one task, p is 1. The share of p of an absent task does not change.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.emtl(2)
      >>> grads, losses = jnp.array([[2., 0.], [0., 1.]]), jnp.array([1., 3.])
      >>> for scale in (jnp.array([1., 1.]), jnp.array([1., 1000.])):  # of the second loss
      ...     state, scaled = tx.init(jnp.zeros(2)), grads * scale[:, None]
      ...     update, state = tx.update(scaled, state, losses=losses * scale)
      ...     print(np.asarray(update).round(3))
      [0.087 0.163]
      [0.087 0.163]

    References:
      Yuan and Zhang, Equitable Multi-task Learning, 2023, https://arxiv.org/abs/2306.09373
    """
    axis = read_tasks("emtl", tasks)
    inner = min_norm_rule("l2") if base is None else rule_of("emtl", base, axis.number)

    def init(num_tasks: int, dtype: DType) -> EMTLState:
        log_p = jnp.full((num_tasks,), -math.log(num_tasks), dtype)
        return EMTLState(log_p, inner.init(num_tasks, dtype))

    def weigh(inputs: StepInputs, state: EMTLState) -> tuple[jax.Array, EMTLState]:
        active, dtype = inputs.active, inputs.dtype
        alpha, base_state = inner.weigh(inputs, state.base)
        alpha = jnp.where(active, alpha, 0).astype(dtype)
        per_norm = safe_divide(alpha, inputs.norms)
        radius = jnp.sqrt(jnp.asarray(rho, dtype)) if kl_radius is None else kl_radius
        scores = step_size * per_norm * inputs.losses
        log_p = kl_ball_mirror_step(state.log_p, scores, radius, active)
        eps = jnp.asarray(epsilon, dtype)
        weights = eps * alpha + (1 - eps) * jnp.exp(log_p) * per_norm
        # The share of p of an absent task does not change.
        kept = keep_log_shares(log_p, state.log_p, active)
        return weights / count_active(active, dtype), EMTLState(kept, base_state)

    needs = inner.needs | {"losses", "norms"}
    return from_rule("emtl", axis, WeightRule(needs, weigh, init, inner.extra), **options)
