"""FAMO: equal relative decrease of all losses, from loss values alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Nonnegative, factory
from mtl_optax.core.trained_values import TrainedState, start, train
from mtl_optax.core.types import DType, Losses, Number
from mtl_optax.core.validation import check_range, read_tasks, task_numbers, task_vector
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.log_weights import largest_weight, softmax

# Part of the definition of the method: the logarithm of a loss at its minimum is finite.
_EPSILON = 1e-8


class FAMOState(NamedTuple):
    """State of `famo`, `[T]` per block.

    Attributes:
      logits: the trained logits and the state of their optimizer.
      log_losses: log losses of the step at which each task was last present.
      last_step: int32, that step; -2 for a task that was never present.
    """

    logits: TrainedState
    log_losses: jax.Array
    last_step: jax.Array


@factory
def famo(
    tasks: int | Collection[str],
    *,
    gamma: Nonnegative = 1e-2,
    weight_lr: optax.ScalarOrSchedule = 0.025,
    min_losses: Number = 0.0,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Balances the relative rates at which the losses decrease, without task gradients.

    The method trains logits :math:`\xi` so that all log losses decrease at the same rate. It needs only
    the values of the losses. With :math:`D_t = L_t -` ``min_losses`` :math:`+ 10^{-8}`, ``gamma``
    :math:`\gamma` and :math:`z = \mathrm{softmax}(\xi)`:

    .. math::
        w_t = \frac{z_t / D_t}{\sum_s z_s / D_s}, \qquad
        \nabla_\xi = J_{softmax}^T \big( \log D^{before} - \log D^{after} \big) + \gamma\, \xi,

    which is the gradient for a step of Adam(``weight_lr``) on :math:`\xi`. The words "before" and "after"
    denote the losses of *the same batch* before and after the step of the network. Scale: mean-like; the
    weights sum to 1. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      gamma: decay of the logits, >= 0.
      weight_lr: Adam's learning rate, a number or schedule.
      min_losses: lower bounds of the losses, a scalar, `[T]`, or a dictionary by task name.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `FAMOState`. `update` needs `losses=`, and takes `losses_after=`. Cost:
      O(T).

    Raises:
      ValueError: if a number is outside its range, or `min_losses` or `losses_after` has the wrong shape.

    Notes:
      `losses_after=` are the losses of the previous batch after the previous step, which take one more
      forward pass. Without them, the losses of the current batch are used. This has no cost, but the
      difference between the batches enters the gradient.

      As in the authors' code, ``gamma`` is L2 regularisation inside Adam, not decoupled decay. The
      default of this code is 0.01; most of its scripts use 0.001.

      The first update does not change the logits. Without `losses_after`, the logit of a present task is
      trained from its losses now and when it was last present. With `losses_after`, the logit of a task
      is trained if it was present in the previous step and its entry is finite.

      A loss at or below its minimum counts as 1e-8 above it. Absent tasks are excluded from both sums.
      With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.famo(2)
      >>> state = tx.init(jnp.zeros(2))
      >>> update, state = tx.update(jnp.eye(2), state, losses=jnp.array([3., 1.]))
      >>> print(np.asarray(update).round(3))
      [0.25 0.75]
      >>> after = jnp.array([2.9, 0.5])  # the second loss decreased faster
      >>> now = jnp.array([1., 1.])
      >>> update, state = tx.update(jnp.eye(2), state, losses=now, losses_after=after)
      >>> print(np.asarray(update).round(3))
      [0.512 0.488]

    References:
      Liu, Feng, Stone and Liu, FAMO: Fast Adaptive Multitask Optimization, 2023,
      https://arxiv.org/abs/2306.03792
    """
    axis = read_tasks("famo", tasks)
    if not callable(weight_lr):
        check_range("famo", "weight_lr", weight_lr, 0)
    min_losses = task_numbers("famo", "min_losses", min_losses, axis, or_one=True)
    optimizer = optax.adam(weight_lr)

    def init(num_tasks: int, dtype: DType) -> FAMOState:
        zeros = jnp.zeros((num_tasks,), dtype)
        return FAMOState(start(optimizer, zeros), zeros, jnp.full((num_tasks,), -2, jnp.int32))

    def log_excess(losses: jax.Array) -> jax.Array:
        low = jnp.asarray(min_losses, losses.dtype)
        return jnp.log(jnp.maximum(losses - low, 0) + _EPSILON)

    def weigh(inputs: StepInputs, state: FAMOState) -> tuple[jax.Array, FAMOState]:
        active, losses_after = inputs.active, inputs.extra["losses_after"]
        log_losses = log_excess(inputs.losses)
        if losses_after is None:
            after, trains = log_losses, active & (state.last_step >= 0)
        else:
            after, trains = read_after(losses_after, inputs, state)
        logits = train_logits(state, after, trains)
        weights = softmax(logits.values - log_losses, active)
        last = jnp.where(active, inputs.step, state.last_step)
        return weights, FAMOState(logits, jnp.where(active, log_losses, state.log_losses), last)

    def read_after(
        losses_after: Losses, inputs: StepInputs, state: FAMOState
    ) -> tuple[jax.Array, jax.Array]:
        losses = task_vector("famo", "losses_after", losses_after, axis, state.log_losses.dtype)
        finite = jnp.isfinite(losses)
        trains = finite & (state.last_step == inputs.step - 1)
        return log_excess(jnp.where(finite, losses, 0)), trains

    def train_logits(state: FAMOState, after: jax.Array, trains: jax.Array) -> TrainedState:
        logits = state.logits.values
        z = softmax(logits, trains)
        decrease = jnp.where(trains, state.log_losses - after, 0)
        gradient = z * (decrease - jnp.sum(z * decrease))
        gradient = gradient + jnp.asarray(gamma, logits.dtype) * logits
        limit = largest_weight(logits.dtype)
        return train(optimizer, state.logits, gradient, trains, -limit, limit)

    rule = WeightRule(frozenset({"losses"}), weigh, init, ("losses_after",))
    return from_rule("famo", axis, rule, **options)
