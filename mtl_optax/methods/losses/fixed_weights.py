"""Fixed weights: the plain weighted sum."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import factory
from mtl_optax.core.types import PerTask
from mtl_optax.core.validation import task_numbers
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule


@factory
def fixed_weights(
    tasks: int | Collection[str], weights: PerTask, **options: Unpack[MethodOptions]
) -> Method:
    """Multiplies each task gradient by a given number.

    The update is `sum_t weights[t] * g_t` with constant weights (linear scalarisation). With a careful
    search over the weights, it is a strong baseline. Scale: sum-like if the weights are 1.

    Args:
      tasks: T, or the task names.
      weights: `[T]`, or a dictionary by task name; any real numbers.
      **options: see `MethodOptions`.

    Returns:
      A `Method`. Cost: one pass over the gradients.

    Raises:
      ValueError: if `weights` does not have one entry per task.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.fixed_weights(("click", "buy"), {"click": 0.5, "buy": 1.0})
      >>> state = tx.init(jnp.zeros(2))
      >>> tx.update(jnp.array([[1., 0.], [0., 4.]]), state)[0].tolist()
      [1.0, 2.0]

    References:
      Kurin et al., In Defense of the Unitary Scalarization for Deep Multi-Task Learning, 2022,
      https://arxiv.org/abs/2201.04122
    """
    weights = task_numbers("fixed_weights", "weights", weights, tasks)

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        return jnp.asarray(weights), state

    return from_rule("fixed_weights", tasks, WeightRule(frozenset(), weigh), **options)
