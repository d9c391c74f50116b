"""Rules that several methods use."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.rule import StepInputs, WeightRule
from mtl_optax.core.state import next_count
from mtl_optax.core.trained_values import TrainedState, start, train
from mtl_optax.core.types import DType, Number
from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.log_weights import largest_weight
from mtl_optax.solvers.min_norm import min_norm_weights
from mtl_optax.solvers.nash import fair_weights


class BargainingState(NamedTuple):
    """State of `fairgrad` and `nash_mtl`, and a part of that of `scale_by_pub`.

    Attributes:
      fallback_count: int32 scalar, the number of steps without a solution, which used min-norm weights.
    """

    fallback_count: jax.Array


def min_norm_rule(normalize: str) -> WeightRule:
    """Returns the rule of the min-norm weights; `normalize` is the argument of `mgda`."""

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        norms = inputs.norms
        if normalize in ("l2", "loss+"):
            norms = jnp.where(norms > 0, 1, 0)
        if normalize in ("loss", "loss+"):
            # A loss of 0 would make its gradient infinite, so its gradient counts as zero instead.
            norms = safe_divide(norms, jnp.maximum(inputs.losses, 0))
        norms = norms.astype(inputs.cosine.dtype)
        return min_norm_weights(inputs.geometry._replace(norms=norms)), state

    needs = {"gram", "losses"} if normalize in ("loss", "loss+") else {"gram"}
    return WeightRule(frozenset(needs), weigh)


def fair_rule(alpha: Number) -> WeightRule:
    """Returns the rule of alpha-fair weights; without a solution they are the min-norm weights."""

    def init(num_tasks: int, dtype: DType) -> BargainingState:
        return BargainingState(jnp.zeros((), jnp.int32))

    def weigh(inputs: StepInputs, state: BargainingState) -> tuple[jax.Array, BargainingState]:
        fairness = jnp.asarray(alpha, inputs.norms.dtype)
        weights, solved = fair_weights(inputs.geometry, fairness)
        failed = jnp.any(inputs.active) & ~solved
        return weights, BargainingState(next_count(state.fallback_count, failed))

    return WeightRule(frozenset({"gram"}), weigh, init)


def trained_scale_rule(optimizer: optax.GradientTransformation) -> WeightRule:
    """Returns the rule that trains one weight per task, until the weighted loss is 1."""

    def init(num_tasks: int, dtype: DType) -> TrainedState:
        return start(optimizer, jnp.zeros((num_tasks,), dtype))

    def weigh(inputs: StepInputs, state: TrainedState) -> tuple[jax.Array, TrainedState]:
        weights = jnp.exp(state.values)
        high = math.log(largest_weight(weights.dtype))
        gradient = weights * inputs.losses - 1
        return weights, train(optimizer, state, gradient, inputs.active, -high, high)

    return WeightRule(frozenset({"losses"}), weigh, init)
