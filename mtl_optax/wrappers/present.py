"""For wrappers: which tasks are present and finite in a step, and an update by means per task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree, validation
from mtl_optax.core.types import Active, AxisName, DType, Losses
from mtl_optax.solvers.arithmetic import safe_divide


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


def update_by_means(
    update: Callable[..., Any],
    sums: optax.Updates,
    counts: jax.Array,
    losses: jax.Array | None,
    like: optax.Updates,
    *args: object,
    **extra_args: object,
) -> tuple[optax.Updates, optax.OptState]:
    """Calls `update` with the gradients `sums / counts` per task, in the dtypes of `like`.

    A task whose count is 0 is absent; losses that are None are not passed on.
    """
    means = jax.tree.map(lambda s: safe_divide(s, task_tree.along_tasks(counts, s.ndim)), sums)
    if losses is not None:
        extra_args["losses"] = losses
    return update(task_tree.narrow_like(means, like), *args, active=counts > 0, **extra_args)
