"""One trained value per task, for methods with an optimizer of their own."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainedState(NamedTuple):
    """The trained values, `[T]` per block.

    Attributes:
      values: the current values.
      optimizer: the state of the optimizer.
    """

    values: jax.Array
    optimizer: optax.OptState


def start(optimizer: optax.GradientTransformation, values: jax.Array) -> TrainedState:
    """Returns the state before the first step."""
    return TrainedState(values, optimizer.init(values))


def train(
    optimizer: optax.GradientTransformation,
    state: TrainedState,
    gradient: jax.Array,
    moves: jax.Array,
    low: float,
    high: float,
) -> TrainedState:
    """Takes one optimizer step for some tasks; values and state of the other tasks do not change.

    Args:
      optimizer: any optax optimizer.
      state: from `start` or the last step.
      gradient: `[T]`; entries may be infinite, because they are clipped.
      moves: bool `[T]`, the tasks to train.
      low: the smallest value allowed.
      high: the largest value allowed.

    Returns:
      The state after the step.
    """
    # Optimizers square gradients, and the square of a larger gradient would be infinite.
    limit = float(jnp.finfo(gradient.dtype).max) ** 0.5 / 64
    gradient = jnp.where(moves, jnp.clip(gradient, -limit, limit), 0)
    step, optimizer_state = optax.with_extra_args_support(optimizer).update(
        gradient, state.optimizer, state.values
    )
    moved = jnp.clip(jnp.asarray(optax.apply_updates(state.values, step)), low, high)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        chosen = moves if jnp.shape(old) == moves.shape else jnp.any(moves)
        return jnp.where(chosen, new, old)

    return TrainedState(
        jnp.where(moves, moved, state.values), jax.tree.map(keep, optimizer_state, state.optimizer)
    )
