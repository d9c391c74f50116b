"""The mean of the task gradients."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import optax

from mtl_optax.core.factory import factory
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.cosine import uniform_weights


@factory
def mean_tasks(tasks: int | Collection[str], **options: Unpack[MethodOptions]) -> Method:
    """Averages the task gradients.

    The update is the mean of `g_t` over the present tasks. Scale: mean-like.

    Args:
      tasks: T, or the task names.
      **options: see `MethodOptions`.

    Returns:
      A `Method`. Cost: one pass over the gradients.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.mean_tasks(2)
      >>> tx.update(jnp.array([[1., 0.], [0., 4.]]), tx.init(jnp.zeros(2)))[0].tolist()
      [0.5, 2.0]

    References:
      Caruana, Multitask Learning, 1997, https://doi.org/10.1023/A:1007379606734
    """

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        return uniform_weights(inputs.active, inputs.dtype), state

    return from_rule("mean_tasks", tasks, WeightRule(frozenset(), weigh), **options)
