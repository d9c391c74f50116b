"""The tasks that are present and finite in a step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree, validation
from mtl_optax.core.types import Active, AxisName, DType, Losses


def read_present(
    name: str,
    tasks: validation.Tasks,
    updates: optax.Updates,
    params: optax.Params | None,
    active: Active | None,
    axis_name: AxisName,
    losses: Losses | None = None,
    dtype: DType | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns which tasks are present and finite, bool `[T]`, and the losses `[T]` or None."""
    validation.check_updates(name, updates, tasks, params)
    keep = validation.read_active(name, active, tasks)
    keep = keep & task_tree.finite(updates, tasks.number, axis_name)
    if losses is None:
        return keep, None
    vector = validation.task_vector(name, "losses", losses, tasks, dtype)
    return keep & jnp.isfinite(vector), vector
