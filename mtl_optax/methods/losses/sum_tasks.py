"""The sum of the task gradients, with an option to measure them."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Flag, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule

MEASURED_STEPS = 100
"""The number of first steps in which `measure=True` observes the gradients."""


class MeasuredState(NamedTuple):
    """State of `sum_tasks(measure=True)`, `[T, T]` per block.

    Attributes:
      products: the mean inner products of the task gradients over the measured steps.
      count: in how many of these steps both tasks were active.
    """

    products: jax.Array
    count: jax.Array


@factory
def sum_tasks(
    tasks: int | Collection[str], *, measure: Flag = False, **options: Unpack[MethodOptions]
) -> Method:
    """Sums the task gradients: plain multi-task training.

    The update is `sum_t g_t` over the present tasks. Scale: sum-like. Use it as a baseline, or at the end
    of a chain of transformations that keep the task axis. With `measure=True` it also observes the
    gradients of the first 100 steps, from which `advise` says whether balancing may pay.

    Args:
      tasks: T, or the task names.
      measure: whether the state has the mean inner products of the gradients over the first 100 steps.
        `blocks` is then "leaf" by default, so that `advise` can leave out the heads.
      **options: see `MethodOptions`.

    Returns:
      A `Method`. Cost: one pass over the gradients. With `measure=True` it has the state `MeasuredState`,
      and every step takes one more pass, for the Gram matrix: remove the option after the first look.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.sum_tasks(2)
      >>> tx.update(jnp.array([[1., 0.], [0., 4.]]), tx.init(jnp.zeros(2)))[0].tolist()
      [1.0, 4.0]

    References:
      Caruana, Multitask Learning, 1997, https://doi.org/10.1023/A:1007379606734
    """

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        return jnp.ones(inputs.active.shape), state

    def init(num_tasks: int, dtype: DType) -> MeasuredState:
        zeros = jnp.zeros((num_tasks, num_tasks), dtype)
        return MeasuredState(zeros, zeros)

    def observe(inputs: StepInputs, state: MeasuredState) -> tuple[jax.Array, MeasuredState]:
        both = inputs.active[:, None] & inputs.active[None, :] & (inputs.step < MEASURED_STEPS)
        count = state.count + both
        share = both / jnp.maximum(count, 1)  # of this step in the mean
        products = (1 - share) * state.products + share * inputs.gram
        return jnp.ones(inputs.active.shape), MeasuredState(products, count)

    if not measure:
        return from_rule("sum_tasks", tasks, WeightRule(frozenset(), weigh), **options)
    options = {"blocks": "leaf", **options}
    return from_rule("sum_tasks", tasks, WeightRule(frozenset({"gram"}), observe, init), **options)
