"""Random loss weighting: new random weights at every step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.extra_args import step_key
from mtl_optax.core.factory import Seed, factory
from mtl_optax.core.validation import read_tasks, task_vector
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.log_weights import softmax


@factory
def rlw(
    tasks: int | Collection[str], *, seed: Seed = 0, **options: Unpack[MethodOptions]
) -> Method:
    r"""Draws random weights at every step.

    This is a baseline: if random weights reach the same result as a method, it is not due to the weights
    of the method.

    .. math:: w = \mathrm{softmax}(z), \qquad z_t \sim N(0, 1)

    Scale: mean-like; the weights sum to 1 and are 1/T on average. Section 3 of the paper; the normal
    distribution is the one in the authors' code.

    Args:
      tasks: T, or the task names.
      seed: an integer, the seed of the random numbers.
      **options: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state. `update` takes `noise=`, z `[T]`, instead of random numbers.
      Cost: O(T).

    Raises:
      ValueError: if `noise` is not `[T]`.

    Notes:
      The key of step k is `fold_in(key(seed), k)`, so a resumed run has the same weights as an
      uninterrupted one.

      Absent tasks are excluded from the softmax. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.rlw(2)
      >>> state = tx.init(jnp.zeros(2))
      >>> print(np.asarray(tx.update(jnp.eye(2), state, noise=jnp.array([0., 1.]))[0]).round(3))
      [0.269 0.731]

    References:
      Lin, Ye, Zhang and Tsang, Reasonable Effectiveness of Random Weighting: A Litmus Test for
      Multi-Task Learning, 2022, https://arxiv.org/abs/2111.10603
    """
    axis = read_tasks("rlw", tasks)

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        noise = inputs.extra["noise"]
        if noise is None:
            noise = jax.random.normal(step_key(seed, inputs), (axis.number,), jnp.float32)
        noise = task_vector("rlw", "noise", noise, axis)
        return softmax(noise, inputs.active), state

    return from_rule("rlw", axis, WeightRule(frozenset(), weigh, extra=("noise",)), **options)
