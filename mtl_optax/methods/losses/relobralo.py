"""ReLoBRaLo: relative loss balancing with random lookback."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from mtl_optax.core.extra_args import step_key
from mtl_optax.core.factory import Decay, Positive, Seed, Share, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import count_active
from mtl_optax.solvers.log_weights import loss_ratio, softmax


class ReLoBRaLoState(NamedTuple):
    """State of `relobralo`.

    Attributes:
      weight_ema: `[T]`, the weights, which start at 1.
      first_losses: `[T]`, the loss of each task when it was first present.
      last_losses: `[T]`, the loss of each task when it was last present.
      num_steps: int32 `[T]`, the number of steps at which each task was present, at most 2.
    """

    weight_ema: jax.Array
    first_losses: jax.Array
    last_losses: jax.Array
    num_steps: jax.Array


@factory
def relobralo(
    tasks: int | Collection[str],
    *,
    ema_decay: Decay = 0.999,
    rho: Share = 0.999,
    temperature: Positive = 1.0,
    seed: Seed = 0,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Balances losses by their progress since the last step and, at random, since the first.

    With ``temperature`` :math:`\tau`, ``ema_decay`` :math:`\alpha` and a random :math:`b` that is 1 with
    the probability ``rho``, else 0:

    .. math::
        \lambda_t(k, k') = T\, \mathrm{softmax}_t\Big( \frac{L_t(k)}{\tau L_t(k')} \Big), \qquad
        w(k) = \alpha \big( b\, w(k-1) + (1 - b)\, \lambda(k, 0) \big) + (1 - \alpha)\, \lambda(k, k-1).

    In the first step the weights are 1, and in the second they are :math:`\lambda(1, 0)`. Scale:
    sum-like; the weights sum to T. Equations 10 and 11 of the paper.

    Args:
      tasks: T, or the task names.
      ema_decay: alpha, the weight of the past, in [0, 1).
      rho: probability that the past weights are averaged instead of those from the first losses, in [0, 1].
      temperature: tau, >= 1e-6; larger values make the weights more equal.
      seed: an integer, the seed of the random numbers.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `ReLoBRaLoState`; `update` needs `losses=`, and takes `noise=`, a uniform
      number in [0, 1) instead of a random one (b = 1 if it is below ``rho``). Cost: O(T).

    Raises:
      ValueError: if a number is outside its range.

    Notes:
      The key of step k is `fold_in(key(seed), k)`, so that the state contains no key.

      A ratio to a loss of 0 counts as 1. The first step of a task is the one in which it is first
      present; its weight is then 1. The weights of absent tasks do not change, and the softmax excludes
      them. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.relobralo(2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for losses in ([4., 1.], [2., 1.]):
      ...     update, state = tx.update(jnp.eye(2), state, losses=jnp.array(losses))
      >>> print(np.asarray(update).round(3))
      [0.755 1.245]

    References:
      Bischof and Kraus, Multi-Objective Loss Balancing for Physics-Informed Deep Learning, 2021,
      https://arxiv.org/abs/2110.09813
    """

    def init(num_tasks: int, dtype: DType) -> ReLoBRaLoState:
        zeros = jnp.zeros((num_tasks,), dtype)
        count = jnp.zeros((num_tasks,), jnp.int32)
        return ReLoBRaLoState(jnp.ones((num_tasks,), dtype), zeros, zeros, count)

    def weigh(inputs: StepInputs, state: ReLoBRaLoState) -> tuple[jax.Array, ReLoBRaLoState]:
        losses, active, dtype = inputs.losses, inputs.active, inputs.losses.dtype
        first = jnp.where(state.num_steps > 0, state.first_losses, losses)
        last = jnp.where(state.num_steps > 0, state.last_losses, losses)

        def balanced(base: jax.Array) -> jax.Array:
            logits = loss_ratio(losses, base) / jnp.asarray(temperature, dtype)
            return count_active(active, dtype) * softmax(logits, active)

        share = jnp.asarray(ema_decay, dtype)
        past = jnp.where(_draw(inputs, seed) < rho, state.weight_ema, balanced(first))
        later = share * past + (1 - share) * balanced(last)
        weights = jnp.where(state.num_steps == 1, balanced(first), later)
        weights = jnp.where(active & (state.num_steps > 0), weights, state.weight_ema)
        return weights, ReLoBRaLoState(
            weights,
            jnp.where(active, first, state.first_losses),
            jnp.where(active, losses, state.last_losses),
            jnp.minimum(state.num_steps + active.astype(jnp.int32), 2),
        )

    rule = WeightRule(frozenset({"losses"}), weigh, init, extra=("noise",))
    return from_rule("relobralo", tasks, rule, **options)


def _draw(inputs: StepInputs, seed: int | jax.Array) -> jax.Array:
    noise = inputs.extra["noise"]
    if noise is None:
        return jax.random.uniform(step_key(seed, inputs), (), jnp.float32)
    if np.shape(noise) != ():
        raise ValueError(f"relobralo: noise must be one number; found shape {np.shape(noise)}.")
    return jnp.asarray(noise)
