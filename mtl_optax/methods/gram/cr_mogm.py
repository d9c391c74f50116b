"""CR-MOGM: an EMA over the weights of another method."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Decay, factory
from mtl_optax.core.pipeline import rule_of
from mtl_optax.core.shared_rules import min_norm_rule
from mtl_optax.core.types import DType
from mtl_optax.core.validation import read_tasks
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import move_average


class CRMOGMState(NamedTuple):
    """State of `cr_mogm`.

    Attributes:
      smoothed: `[T]`, EMA of the weights.
      started: bool `[T]`, whether each task has been present.
      base: the state of the underlying method.
    """

    smoothed: jax.Array
    started: jax.Array
    base: optax.OptState


@factory
def cr_mogm(
    tasks: int | Collection[str],
    *,
    base: optax.GradientTransformation | None = None,
    ema_decay: Decay = 0.9,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Averages the weights of another method over time.

    With stochastic gradients, weights such as MGDA's vary strongly between batches and are correlated
    with the gradients that they multiply. This can prevent convergence. An EMA reduces the correlation.

    With :math:`\hat\lambda` the weights of ``base`` on this batch:

    .. math:: \lambda \leftarrow \alpha \lambda + (1 - \alpha) \hat\lambda, \qquad
        update = \sum_t \lambda_t g_t

    which starts at the first :math:`\hat\lambda`. Scale: mean-like by default, else that of ``base``.
    Algorithm 1 of the paper with a constant :math:`\alpha` = ``ema_decay``.

    Args:
      tasks: T, or the task names.
      base: any weighting method of this library; None means `mgda`.
      ema_decay: :math:`\alpha`, the decay of the EMA, in [0, 1); with 0 the weights are those of `base`.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `CRMOGMState`. It needs what `base` needs. Cost: that of `base`.

    Raises:
      ValueError: if `ema_decay` is outside its range, or `base` has another number of tasks.
      TypeError: if `base` is not a weighting method.

    Notes:
      Zero gradients and T = 1 are treated as in `base`. The EMA of a task starts at its first weight. The
      EMA of an absent task does not change.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.cr_mogm(2, ema_decay=0.5)
      >>> grads = jnp.array([[2., 0.], [0., 1.]])
      >>> _, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> _, state = tx.update(grads[::-1], state)
      >>> print(np.asarray(state.weights).round(3))
      [[0.5 0.5]]

    References:
      Zhou, Zhang, Jiang, Zhong, Gu and Zhu, On the Convergence of Stochastic Multi-Objective Gradient
      Manipulation and Beyond, 2022,
      https://papers.neurips.cc/paper_files/paper/2022/hash/f91bd64a3620aad8e70a27ad9cb3ca57-Abstract-Conference.html
    """
    axis = read_tasks("cr_mogm", tasks)
    inner = min_norm_rule("none") if base is None else rule_of("cr_mogm", base, axis.number)

    def init(num_tasks: int, dtype: DType) -> CRMOGMState:
        smoothed, started = jnp.zeros((num_tasks,), dtype), jnp.zeros((num_tasks,), bool)
        return CRMOGMState(smoothed, started, inner.init(num_tasks, dtype))

    def weigh(inputs: StepInputs, state: CRMOGMState) -> tuple[jax.Array, CRMOGMState]:
        fresh, base_state = inner.weigh(inputs, state.base)
        fresh = fresh.astype(state.smoothed.dtype)
        decay = jnp.where(state.started, ema_decay, 0)
        smoothed = move_average(state.smoothed, fresh, decay, inputs.active)
        return smoothed, CRMOGMState(smoothed, state.started | inputs.active, base_state)

    return from_rule("cr_mogm", axis, WeightRule(inner.needs, weigh, init, inner.extra), **options)
