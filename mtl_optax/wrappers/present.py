"""The tasks that are present and finite in a step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree, validation
from mtl_optax.core.types import AxisName, DType
from mtl_optax.core.validation import Tasks, task_vector


def read_present(
    name: str,
    updates: optax.Updates,
    params: optax.Params | None,
    losses: Any,
    active: Any,
    tasks: Tasks,
    dtype: DType,
    axis_name: AxisName,
) -> tuple[jax.Array, Any]:
    """Returns which tasks are present and finite, bool `[T]`, and the losses `[T]` or None."""
    validation.check_updates(name, updates, tasks, params)
    keep = validation.read_active(name, active, tasks)
    keep = keep & task_tree.finite(updates, tasks.number, axis_name)
    if losses is not None:
        losses = task_vector(name, "losses", losses, tasks, dtype)
        keep = keep & jnp.isfinite(losses)
    return keep, losses
