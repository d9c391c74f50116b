"""ExcessMTL: weights that grow with the estimated excess risk of each task."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.factory import Nonnegative, NonnegativeInt, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import GradientAverage, Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import clip_finite, move_mean, safe_divide
from mtl_optax.solvers.log_weights import clip_weights, keep_log_shares, log_softmax


class ExcessMTLState(NamedTuple):
    """State of `excess_mtl`, `[T]` per block. The sums of the squared gradients are in `state.averages`.

    Attributes:
      log_weights: logarithms of the weights, which start at `-log(T)`.
      baseline: mean excess risk over the steps that measure it.
      num_steps: int32, the number of these steps so far, per task.
    """

    log_weights: jax.Array
    baseline: jax.Array
    num_steps: jax.Array


@factory
def excess_mtl(
    tasks: int | Collection[str],
    *,
    step_size: Nonnegative = 1.0,
    warmup_steps: NonnegativeInt = 0,
    eps: Nonnegative = 1e-7,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Gives larger weights to tasks with larger excess risk.

    A task with noisy labels has a large loss even after training, so methods that weigh by losses favour
    it. The excess risk, which is the difference to the lowest possible loss, excludes this noise. It is
    estimated to second order with the diagonal Hessian of AdaGrad.

    With ``eps`` :math:`\epsilon`, ``step_size`` :math:`\eta` and the sum of squares over all steps k:

    .. math::
        H_t = \sqrt{\textstyle\sum_k g_t(k)^2 + \epsilon}, \qquad
        e_t = \sum_i g_{t,i}^2 / H_{t,i}, \qquad
        w_t \leftarrow \frac{w_t e^{\eta e_t / b_t}}{\sum_s w_s e^{\eta e_s / b_s}}, \qquad
        update = \sum_t w_t g_t

    where the baseline :math:`b_t` is the mean of :math:`e_t` over the first ``warmup_steps`` steps.
    Scale: mean-like. Equations 6, 7 and 9 and appendix C.1 of the paper.

    Args:
      tasks: T, or the task names.
      step_size: eta, >= 0.
      warmup_steps: number of steps that measure the baseline, with equal weights; three epochs in the
        paper; a Python integer >= 0.
      eps: added to the sums of squares, >= 0.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `ExcessMTLState`; `state.averages` are the sums of squares. Cost: one pass
      over the gradients and these sums for e, one for the update; memory: T gradients.

    Raises:
      ValueError: if a number is outside its range.

    Notes:
      Use it on parameters. On a representation `[batch, width]` (`fork`) the sums of squares would mix
      unrelated examples of successive batches, unless its rows always have the same meaning.

      With ``warmup_steps`` = 0, as in the authors' code, the baseline is e at the first step, and this
      step changes the weights by :math:`\eta e_t` without the division. Here the weights sum to 1; in the
      authors' code they sum to T.

      A zero gradient has e = 0. A zero baseline counts as 1. If all gradients are zero, the update is 0.
      The sums of squares and the share of the weights of an absent task do not change. With one task, the
      update is its gradient.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.excess_mtl(2)
      >>> grads = jnp.array([[2., 0.], [0., 1.]])
      >>> _, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> [round(float(x), 3) for x in state.weights[0]]
      [0.731, 0.269]

    References:
      He, Zhou, Zhang, Yun, Xu, Zeng, Chilimbi and Zhao, Robust Multi-Task Learning with Excess Risks,
      2024, https://arxiv.org/abs/2402.02009
    """

    def init(num_tasks: int, dtype: DType) -> ExcessMTLState:
        return ExcessMTLState(
            log_weights=jnp.full((num_tasks,), -math.log(num_tasks), dtype),
            baseline=jnp.zeros((num_tasks,), dtype),
            num_steps=jnp.zeros((num_tasks,), jnp.int32),
        )

    def scale_by_hessian(
        inputs: StepInputs, squares: optax.Updates
    ) -> tuple[optax.Updates, optax.Updates]:
        """Returns `g / sqrt(H)`, whose squared norm is e, and the new sums of squares."""
        squares = jax.tree.map(_add_square, squares, inputs.updates)

        def one(gradient: jax.Array, total: jax.Array) -> jax.Array:
            hessian = jnp.sqrt(total + jnp.asarray(eps, total.dtype))
            return safe_divide(gradient.astype(total.dtype), jnp.sqrt(hessian))

        return jax.tree.map(one, inputs.updates, squares), squares

    def weigh(inputs: StepInputs, state: ExcessMTLState) -> tuple[jax.Array, ExcessMTLState]:
        active, dtype = inputs.active, inputs.norms.dtype
        excess = inputs.norms**2
        # The first steps measure the baseline; without warm-up, the first step also changes the weights.
        measures = active & (state.num_steps < max(warmup_steps, 1))
        relative = safe_divide(excess, state.baseline, excess)
        step = clip_weights(jnp.asarray(step_size, dtype) * relative)
        step = jnp.where(active & (state.num_steps >= warmup_steps), step, 0)
        log_weights = log_softmax(state.log_weights + step, active)
        kept = keep_log_shares(log_weights, state.log_weights, active)
        baseline = move_mean(state.baseline, excess, state.num_steps + 1, measures)
        num_steps = state.num_steps + measures.astype(jnp.int32)
        return jnp.exp(log_weights), ExcessMTLState(kept, baseline, num_steps)

    scaled = GradientAverage(task_tree.per_task_zeros, scale_by_hessian, weighted=False)
    rule = WeightRule(frozenset({"norms"}), weigh, init, average=scaled)
    return from_rule("excess_mtl", tasks, rule, **options)


def _add_square(total: jax.Array, gradient: jax.Array) -> jax.Array:
    """Adds the squared gradient, up to the largest number of the dtype."""
    wide = gradient.astype(total.dtype)
    return clip_finite(total + wide * wide)
