"""Dynamic weight average: tasks whose losses decrease slowly get larger weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.factory import Positive, PositiveInt, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import count_active, move_mean
from mtl_optax.solvers.log_weights import loss_ratio, softmax


class DWAState(NamedTuple):
    """State of `dwa`, `[T]` per block. Each task counts the steps at which it was present.

    Attributes:
      mean: mean loss of the current window so far.
      num_steps: int32, the number of steps of the current window so far.
      last: mean loss of the last complete window.
      before: mean loss of the window before that.
      windows: int32, the number of complete windows so far, at most 2.
    """

    mean: jax.Array
    num_steps: jax.Array
    last: jax.Array
    before: jax.Array
    windows: jax.Array


@factory
def dwa(
    tasks: int | Collection[str],
    *,
    temperature: Positive = 2.0,
    window: PositiveInt = 1,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Gives larger weights to tasks whose losses decrease slowly.

    Tasks train at different rates, and those with the least relative progress get more weight. With
    :math:`\bar L_t(e)` the mean loss of task t over window e (``window`` steps; an epoch in the paper)
    and ``temperature`` :math:`\tau`:

    .. math::
        w_t = T\, \mathrm{softmax}_t\big( \bar L_t(e-1) / \bar L_t(e-2) / \tau \big),

    and :math:`w_t = 1` during the first two windows. Scale: sum-like; the weights sum to T. Equation 7 of
    the paper.

    Args:
      tasks: T, or the task names.
      temperature: tau, >= 1e-6; larger values make the weights more equal.
      window: steps per window, static.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `DWAState`. `update` needs `losses=`. Cost: O(T).

    Raises:
      ValueError: if a number is outside its range.

    Notes:
      The windows are as in the authors' code. Another published program initialises them with ones, so
      that its first ratios compare losses with 1.

      If :math:`\bar L_t(e-2) = 0`, the ratio is 1. Ratios are at most 1.8e19 in absolute value (float32). A
      task's windows count the steps at which it was present. The weights of the present tasks sum to
      their number. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.dwa(2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for losses in ([4., 1.], [2., 1.], [1., 1.]):
      ...     update, state = tx.update(jnp.eye(2), state, losses=jnp.array(losses))
      >>> print(np.asarray(update).round(3))
      [0.876 1.124]

    References:
      Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, 2019,
      https://arxiv.org/abs/1803.10704
    """

    def init(num_tasks: int, dtype: DType) -> DWAState:
        zeros, counts = jnp.zeros((num_tasks,), dtype), jnp.zeros((num_tasks,), jnp.int32)
        return DWAState(zeros, counts, zeros, zeros, counts)

    def weigh(inputs: StepInputs, state: DWAState) -> tuple[jax.Array, DWAState]:
        active, dtype = inputs.active, inputs.losses.dtype
        ratio = loss_ratio(state.last, state.before, state.windows == 2)
        logits = ratio / jnp.asarray(temperature, dtype)
        return count_active(active, dtype) * softmax(logits, active), observe(inputs, state)

    def observe(inputs: StepInputs, state: DWAState) -> DWAState:
        num_steps = state.num_steps + inputs.active.astype(jnp.int32)
        mean = move_mean(state.mean, inputs.losses, num_steps, inputs.active)
        full = num_steps == window
        return DWAState(
            mean=jnp.where(full, 0, mean),
            num_steps=jnp.where(full, 0, num_steps),
            last=jnp.where(full, mean, state.last),
            before=jnp.where(full, state.last, state.before),
            windows=jnp.minimum(state.windows + full.astype(jnp.int32), 2),
        )

    return from_rule("dwa", tasks, WeightRule(frozenset({"losses"}), weigh, init), **options)
