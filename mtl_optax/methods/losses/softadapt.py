"""SoftAdapt: weights from the change of the losses in the last step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.factory import AnyNumber, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.log_weights import clip_weights, softmax


class SoftAdaptState(NamedTuple):
    """State of `softadapt`.

    Attributes:
      last_losses: `[T]`, the losses of the step at which each task was last present.
      started: bool `[T]`, whether each task has been present.
    """

    last_losses: jax.Array
    started: jax.Array


@factory
def softadapt(
    tasks: int | Collection[str],
    *,
    beta: AnyNumber = 0.1,
    variant: Literal["original", "normalized", "loss_weighted"] = "original",
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Gives larger weights to tasks whose losses decrease least or increase.

    With :math:`s_t = L_t(k) - L_t(k-1)` the change of loss t since the previous step and ``beta``
    :math:`\beta`, by ``variant``:

    .. math::
        \text{original: } w = \mathrm{softmax}(\beta s), \qquad
        \text{normalized: } w = \mathrm{softmax}\Big(\frac{\beta s}{\sum_r |s_r|}\Big), \qquad
        \text{loss\_weighted: } w_t = \frac{\bar L_t e^{\beta s_t}}{\sum_r \bar L_r e^{\beta s_r}},

    with :math:`\bar L_t` the mean of the two losses. At the first step the weights are 1/T. Scale:
    mean-like; the weights sum to 1. Sections 3.1.1 to 3.1.3 of the paper.

    Args:
      tasks: T, or the task names.
      beta: if positive, the weights favour the tasks with the least progress; if negative, those with the
        most.
      variant: the formula (above). "normalized" does not depend on the unit of the losses.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `SoftAdaptState`; `update` needs `losses=`. Cost: O(T).

    Raises:
      ValueError: if the variant is unknown.

    Notes:
      The authors' program also supports finite differences of higher order over more steps. In the
      normalized variant it divides by the plain sum of the changes, which can be 0 or negative; the paper
      and this function divide by the sum of absolute values. It adds 1e-8 to denominators; this function
      does not.

      In "loss_weighted" the absolute value of a mean loss is used. If a task was never present before,
      its change is 0. Absent tasks are excluded. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.softadapt(2, beta=1.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> for losses in ([4., 1.], [2., 1.]):
      ...     update, state = tx.update(jnp.eye(2), state, losses=jnp.array(losses))
      >>> print(np.asarray(update).round(3))
      [0.119 0.881]

    References:
      Heydari, Thompson and Mehmood, SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks
      with Multi-Part Loss Functions, 2019, https://arxiv.org/abs/1912.12355
    """

    def init(num_tasks: int, dtype: DType) -> SoftAdaptState:
        return SoftAdaptState(jnp.zeros((num_tasks,), dtype), jnp.zeros((num_tasks,), bool))

    def weigh(inputs: StepInputs, state: SoftAdaptState) -> tuple[jax.Array, SoftAdaptState]:
        losses, active = inputs.losses, inputs.active
        last = jnp.where(state.started & active, state.last_losses, losses)
        change = 2 * clip_weights(losses / 2 - last / 2)
        if variant == "normalized":
            change = safe_divide(change, jnp.sum(jnp.abs(change)))
        logits = jnp.asarray(beta, losses.dtype) * change
        if variant == "loss_weighted":
            size = jnp.abs(losses / 2 + last / 2)
            positive = size >= jnp.finfo(losses.dtype).tiny
            known = jnp.any(active & positive) & jnp.any(state.started & active)
            logits = jnp.where(known, logits + jnp.log(jnp.where(positive, size, 1)), logits)
            counted = active & (positive | ~known)
        else:
            counted = active
        kept = jnp.where(active, losses, state.last_losses)
        return softmax(logits, counted), SoftAdaptState(kept, state.started | active)

    return from_rule("softadapt", tasks, WeightRule(frozenset({"losses"}), weigh, init), **options)
