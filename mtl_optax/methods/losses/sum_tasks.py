"""The sum of the task gradients."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import factory
from mtl_optax.core.validation import read_tasks
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule


@factory
def sum_tasks(tasks: int | Collection[str], **options: Unpack[MethodOptions]) -> Method:
    """Sums the task gradients: plain multi-task training.

    The update is `sum_t g_t` over the present tasks. Scale: sum-like. Use it as a baseline, or at the end
    of a chain of transformations that keep the task axis.

    Args:
      tasks: T, or the task names.
      **options: see `MethodOptions`.

    Returns:
      A `Method`. Cost: one pass over the gradients.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.sum_tasks(2)
      >>> tx.update(jnp.array([[1., 0.], [0., 4.]]), tx.init(jnp.zeros(2)))[0].tolist()
      [1.0, 4.0]

    References:
      Caruana, Multitask Learning, 1997, https://doi.org/10.1023/A:1007379606734
    """
    axis = read_tasks("sum_tasks", tasks)

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        return jnp.ones((axis.number,)), state

    return from_rule("sum_tasks", axis, WeightRule(frozenset(), weigh), **options)
