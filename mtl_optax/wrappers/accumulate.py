"""Averages the gradients of each task over micro-batches."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.core import task_tree
from mtl_optax.core.arguments import check_integer
from mtl_optax.core.method import is_watched
from mtl_optax.core.tasks import read_tasks
from mtl_optax.core.types import Active, AxisName, Losses
from mtl_optax.wrappers.present import read_present


class AccumulateState(NamedTuple):
    """State of `accumulate`: sums over the micro-batches so far, and how often each task was in one."""

    inner_state: optax.OptState
    micro_count: jax.Array
    gradients: optax.Updates
    losses: jax.Array
    present: jax.Array


def accumulate(
    inner: optax.GradientTransformation,
    tasks: int | Collection[str],
    every_k: int,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Averages per-task gradients over `every_k` micro-batches before `inner` sees them.

    The update is 0 on all calls but every `every_k`-th, when `inner` gets each task's mean gradient and
    mean loss over the micro-batches in which the task was present and finite; a task that was in none
    of them is passed on as inactive. `optax.MultiSteps` cannot do this: its accumulator has no task
    axis. Where the micro-batches come from one batch, `optax.microbatching` over the function that
    returns per-task gradients needs no state at all.

    Args:
      inner: the whole optimizer, balancing method included.
      tasks: T, or the task names.
      every_k: micro-batches per step, static.
      axis_name: see `MethodOptions`; `inner` needs it too.

    Returns:
      A transformation from leaves `[T, *shape]` to what `inner` returns. Memory: one float32 copy of
      the T gradients.

    Raises:
      ValueError: for updates without the task axis, or `every_k` < 1.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> tx = mtl.accumulate(optax.chain(mtl.sum_tasks(2), optax.sgd(1.0)), 2, every_k=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> update, state = tx.update(jnp.array([[1.], [2.]]), state)
      >>> later, state = tx.update(jnp.array([[3.], [2.]]), state)
      >>> update.tolist(), later.tolist()
      ([0.0], [-4.0])
    """
    axis = read_tasks("accumulate", tasks)
    check_integer("accumulate", "every_k", every_k, 1)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> AccumulateState:
        dtype = task_tree.statistics_dtype(params)
        state = AccumulateState(
            inner_state=inner.init(params),
            micro_count=jnp.zeros((), jnp.int32),
            gradients=task_tree.per_task_zeros(params, axis.number, dtype),
            losses=jnp.zeros((axis.number,), dtype),
            present=jnp.zeros((axis.number,), dtype),
        )
        # Equal zeros may share a buffer, and a shared buffer cannot be donated.
        return jax.tree.map(jnp.copy, state)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        losses: Losses | None = None,
        active: Active | None = None,
        **extra_args: Any,
    ) -> tuple[Any, AccumulateState]:
        keep, vector = read_present(
            "accumulate", updates, params, losses, active, axis, state.losses.dtype, axis_name
        )
        gradients = jax.tree.map(
            lambda total, g: total + g.astype(total.dtype),
            state.gradients,
            task_tree.remove_absent(updates, keep),
        )
        sums = state._replace(
            micro_count=state.micro_count + 1,
            gradients=gradients,
            losses=state.losses + (0 if vector is None else jnp.where(keep, vector, 0)),
            present=state.present + keep.astype(state.present.dtype),
        )

        def step(sums: AccumulateState) -> tuple[Any, AccumulateState]:
            times = jnp.maximum(sums.present, 1)
            mean = jax.tree.map(
                lambda total: total / task_tree.along_tasks(times, total.ndim), sums.gradients
            )
            mean = task_tree.narrow_like(mean, updates)
            given = {} if vector is None else {"losses": sums.losses / times}
            result, inner_state = inner.update(
                mean, sums.inner_state, params, active=sums.present > 0, **given, **extra_args
            )
            empty = jax.tree.map(jnp.zeros_like, sums._replace(inner_state=None))
            return result, empty._replace(inner_state=inner_state)

        def wait(sums: AccumulateState) -> tuple[Any, AccumulateState]:
            shapes, _ = jax.eval_shape(step, sums)
            return jax.tree.map(jnp.zeros_like, shapes), sums

        # `check` wants to see what reaches the methods inside, which a branch would hide.
        if is_watched():
            return step(sums)
        return lax.cond(sums.micro_count == every_k, step, wait, sums)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
