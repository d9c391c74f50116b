"""Values, one per task, that a method trains with an optimizer of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainedState(NamedTuple):
    """Trained values, `[T]` a block.

    Attributes:
      values: the present values.
      optimizer: the state of their optimizer.
    """

    values: jax.Array
    optimizer: Any


def start(optimizer: optax.GradientTransformation, values: jax.Array) -> TrainedState:
    """The state before the first step."""
    return TrainedState(values, optimizer.init(values))


def train(
    optimizer: optax.GradientTransformation,
    state: TrainedState,
    gradient: jax.Array,
    moves: jax.Array,
    low: float,
    high: float,
) -> TrainedState:
    """One step of the optimizer for some tasks; values and optimizer state of the others do not change.

    Args:
      optimizer: any optax optimizer.
      state: from `start` or the last step.
      gradient: `[T]`; clipped to a finite range, so entries may be infinite.
      moves: bool `[T]`, the tasks to train.
      low: the smallest value allowed.
      high: the largest value allowed.

    Returns:
      The state after the step.
    """
    # Optimizers square gradients: beyond this the square, and the state with it, would be infinite.
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
        jnp.where(moves, moved, state.values),
        jax.tree.map(keep, optimizer_state, state.optimizer),
    )
