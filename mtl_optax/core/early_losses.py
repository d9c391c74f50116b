"""The mean losses early in training, to which some methods compare later losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.core.rule import StepInputs
from mtl_optax.solvers.arithmetic import move_mean


def early_means(
    inputs: StepInputs, mean: jax.Array, num_steps: jax.Array, skipped: int, window: int
) -> tuple[jax.Array, jax.Array]:
    """Adds the losses of a step to the mean over a window of each task.

    Args:
      inputs: the inputs of the step, with losses.
      mean: `[T]`, the mean over the steps of the window so far; starts at 0.
      num_steps: int32 `[T]`, the number of steps at which each task was present so far; starts at 0.
      skipped: steps of a task before its window.
      window: steps in the window, >= 1.

    Returns:
      The new `(mean, num_steps)`. A window is complete when `num_steps` is `skipped + window`; neither then
      changes.
    """
    measured = num_steps - skipped
    counts = inputs.active & (measured < window)
    moved = move_mean(mean, inputs.losses, measured + 1, counts & (measured >= 0))
    return moved, num_steps + counts.astype(jnp.int32)
