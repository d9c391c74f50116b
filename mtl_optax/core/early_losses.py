"""Weights of log losses relative to the losses early in training, for several methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax.core.rule import StepInputs, WeightRule
from mtl_optax.core.types import DType
from mtl_optax.solvers.arithmetic import count_active, move_mean
from mtl_optax.solvers.log_weights import exp_weights, log_softmax, magnitudes


class EarlyLossState(NamedTuple):
    """State of `igb` and `stch`, `[T]` per block.

    Attributes:
      mean: the mean loss over the first steps after the warm-up.
      num_steps: int32, the number of steps at which each task was present, until the mean is complete.
    """

    mean: jax.Array
    num_steps: jax.Array


def early_loss_rule(
    warmup: int,
    window: int,
    score: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> WeightRule:
    """Returns the rule with the weights `T softmax(score)` of the log losses.

    Until the early mean of every present task is known, the weights of the log losses are 1. A task
    counts the steps at which it is present.

    Args:
      warmup: steps before the mean is measured.
      window: steps over which the mean is taken, >= 1.
      score: `(sizes, early, usable) -> [T]`: the absolute losses, the absolute early means, and whether
        each mean is not 0; see `magnitudes`.

    Returns:
      The rule.
    """

    def init(num_tasks: int, dtype: DType) -> EarlyLossState:
        return EarlyLossState(jnp.zeros((num_tasks,), dtype), jnp.zeros((num_tasks,), jnp.int32))

    def weigh(inputs: StepInputs, state: EarlyLossState) -> tuple[jax.Array, EarlyLossState]:
        active, losses = inputs.active, inputs.losses
        sizes, usable = magnitudes(losses, active)
        log_shares = log_softmax(score(sizes, *magnitudes(state.mean, active)), usable)
        known = jnp.all((state.num_steps == warmup + window) | ~active)
        log_number = jnp.log(count_active(active, losses.dtype))
        log_weights = jnp.where(known, log_shares + log_number, 0) - jnp.log(sizes)

        measured = state.num_steps - warmup
        counts = active & (measured < window)
        mean = move_mean(state.mean, losses, measured + 1, counts & (measured >= 0))
        new = EarlyLossState(mean, state.num_steps + counts.astype(jnp.int32))
        return exp_weights(log_weights, usable), new

    return WeightRule(frozenset({"losses"}), weigh, init)
