"""Learning rate annealing: the target's largest gradient entry over the mean entry of the others."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.core import task_tree
from mtl_optax.core.factory import Decay, factory
from mtl_optax.core.types import AxisName, DType
from mtl_optax.core.validation import find_target
from mtl_optax.rule import Method, StepInputs, UpdateRule, from_rule
from mtl_optax.solvers.arithmetic import move_average, safe_divide
from mtl_optax.solvers.log_weights import clip_weights


class LRAnnealingState(NamedTuple):
    """State of `lr_annealing`.

    Attributes:
      weight_ema: `[T]`, the EMA of the weights, from 1; the weight of the target stays 1.
    """

    weight_ema: jax.Array


@factory
def lr_annealing(
    tasks: int | Collection[str],
    *,
    target: int | str | None = None,
    ema_decay: Decay = 0.9,
    axis_name: AxisName = None,
) -> Method:
    r"""Weighs boundary losses so that the mean entry of their gradients is the equation's largest entry.

    In a physics-informed network, the gradient of the equation's loss, the ``target``, is often so much
    larger than the gradients of the boundary and initial conditions that the conditions are not fitted.

    With :math:`g_t` the gradient of task t over all parameters and ``ema_decay`` :math:`\beta`:

    .. math::
        \hat w_t = \frac{\max |g_{target}|}{\mathrm{mean} |g_t|}, \qquad
        w_t \leftarrow \beta w_t + (1 - \beta) \hat w_t, \qquad w_{target} = 1, \qquad
        update = \sum_t w_t g_t,

    where maximum and mean are over the elements. The weights start at 1, and the update uses the new
    weights. Scale: sum-like, with weights far above 1. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      target: name or index of the task with weight 1, the residual of the equation: required if the tasks
        have names, else 0 by default.
      ema_decay: beta in [0, 1).
      axis_name: see `MethodOptions`.

    Returns:
      A `Method` with the state `LRAnnealingState`. Cost: one pass over the gradients for their absolute
      values, one for the sum.

    Raises:
      ValueError: if the target is unknown, or `ema_decay` is outside its range.

    Notes:
      In the paper the new value has the weight :math:`\alpha = 0.9` in the average; in the authors'
      program it has 0.1, which is the default here. This program averages the means of the tensors; the
      paper and this function take the mean over all elements. Another public program takes the mean of
      the target's gradient instead of its maximum. A third one takes the absolute value of the mean,
      which is nearly 0 for gradients of both signs.

      A zero gradient does not change its weight; if the target's gradient is zero, no weight changes. If
      all gradients are zero, the update is 0. The weight of an absent task does not change. With one
      task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.lr_annealing(("boundary", "equation"), target="equation", ema_decay=0.0)
      >>> grads = jnp.array([[0.5, -0.5], [8., 2.]])
      >>> tx.update(grads, tx.init(jnp.zeros(2)))[0].tolist()
      [16.0, -6.0]

    References:
      Wang, Teng and Perdikaris, Understanding and Mitigating Gradient Flow Pathologies in Physics-Informed
      Neural Networks, 2021, https://arxiv.org/abs/2001.04536
    """
    index = find_target("lr_annealing", target, tasks)

    def init(params: optax.Params, num_tasks: int, dtype: DType) -> LRAnnealingState:
        return LRAnnealingState(jnp.ones((num_tasks,), dtype))

    def apply(
        inputs: StepInputs, state: LRAnnealingState
    ) -> tuple[optax.Updates, jax.Array, LRAnnealingState]:
        largest, mean = _absolute_statistics(inputs, index, axis_name)
        known = inputs.active & (mean > 0) & (largest > 0) & (jnp.arange(len(mean)) != index)
        fresh = clip_weights(safe_divide(largest, mean, 1))
        weights = move_average(state.weight_ema, fresh, ema_decay, known)
        blocks = task_tree.assign_blocks(task_tree.without_task_axis(inputs.updates), "all")
        update = task_tree.combine(inputs.updates, weights[None], inputs.active, blocks)
        return update, weights, LRAnnealingState(weights)

    rule = UpdateRule(frozenset({"gradients"}), apply, init, target=index)
    return from_rule("lr_annealing", tasks, rule, axis_name=axis_name)


def _absolute_statistics(
    inputs: StepInputs, target: int, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    """Returns the largest absolute entry of the target's gradient, and the mean one of each task `[T]`."""
    largest, total = jnp.zeros((), inputs.dtype), jnp.zeros(inputs.active.shape, inputs.dtype)
    size = 0
    for leaf in jax.tree.leaves(inputs.updates):
        absolute = jnp.abs(leaf.astype(inputs.dtype))
        count = leaf[0].size
        largest = jnp.maximum(largest, jnp.max(absolute[target], initial=0))
        # Divided before the sum, which could overflow.
        total = total + jnp.sum(absolute / max(count, 1), axis=tuple(range(1, leaf.ndim))) * count
        size += count
    sizes = task_tree.sum_over(jnp.asarray(max(size, 1), inputs.dtype), axis_name)
    mean = task_tree.sum_over(total / sizes, axis_name)
    return largest if axis_name is None else lax.pmax(largest, axis_name), mean
