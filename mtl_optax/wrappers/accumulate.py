"""Averages the gradients of each task over micro-batches."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.core import task_tree
from mtl_optax.core.types import Active, AxisName, Losses
from mtl_optax.core.validation import check_integer, read_tasks, task_vector
from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.wrappers.present import read_present, update_by_means


class AccumulateState(NamedTuple):
    """State of `accumulate`: sums over the micro-batches so far, and the counts `[T]` to divide by."""

    inner_state: optax.OptState
    micro_count: jax.Array
    gradients: optax.Updates
    losses: jax.Array
    counts: jax.Array


def accumulate(
    inner: optax.GradientTransformation,
    tasks: int | Collection[str],
    every_k: int,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Averages the gradients of each task over `every_k` micro-batches before `inner`.

    On every `every_k`-th call, `inner` gets the mean gradient and the mean loss of each task, over the
    micro-batches in which this task was present and finite. A task that was in no micro-batch is
    inactive. On the other calls the update is 0.

    If the micro-batches have unequal numbers of labels, the mean of their means is not the mean over the
    batch. Pass `counts=` to `update`, the number of labels (or tokens) per task in this micro-batch, `[T]`
    or a dictionary; it weights the means. A task whose count is 0 is absent from the micro-batch.

    `optax.MultiSteps` cannot do this, because its accumulator has no task axis. If the micro-batches are
    parts of one batch, apply `optax.microbatching` to the function that returns the task gradients
    instead; it needs no state.

    Args:
      inner: the whole optimizer, which includes the balancing method.
      tasks: T, or the task names.
      every_k: the number of micro-batches per step, static.
      axis_name: see `MethodOptions`; `inner` needs it too.

    Returns:
      A transformation from leaves `[T, *shape]` to the update of `inner`. Memory: one copy of the T
      gradients, at least in float32.

    Raises:
      ValueError: if the updates have no task axis, `every_k` < 1, or `counts` has the wrong shape or names.

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
            counts=jnp.zeros((axis.number,), dtype),
        )
        # Equal zeros may share a buffer, which cannot be donated twice.
        return jax.tree.map(jnp.copy, state)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        losses: Losses | None = None,
        active: Active | None = None,
        counts: Losses | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, AccumulateState]:
        keep, vector = read_present(
            "accumulate", axis, updates, params, active, axis_name, losses, state.losses.dtype
        )
        share = keep.astype(state.counts.dtype)
        if counts is not None:
            given = task_vector("accumulate", "counts", counts, axis, share.dtype)
            share = jnp.where(keep & (given > 0), given, 0)
        sums = _with_micro_batch(state, updates, vector, share)

        def step(sums: AccumulateState) -> tuple[optax.Updates, AccumulateState]:
            means = None if vector is None else safe_divide(sums.losses, sums.counts)
            result, inner_state = update_by_means(
                inner.update,
                sums.gradients,
                sums.counts,
                means,
                updates,
                sums.inner_state,
                params,
                **extra_args,
            )
            empty = jax.tree.map(jnp.zeros_like, sums._replace(inner_state=None))
            return result, empty._replace(inner_state=inner_state)

        def wait(sums: AccumulateState) -> tuple[optax.Updates, AccumulateState]:
            shapes, _ = jax.eval_shape(step, sums)
            return jax.tree.map(jnp.zeros_like, shapes), sums

        return lax.cond(sums.micro_count == every_k, step, wait, sums)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _with_micro_batch(
    state: AccumulateState, updates: optax.Updates, losses: jax.Array | None, share: jax.Array
) -> AccumulateState:
    """Adds the gradients and losses of a micro-batch, each task times its `share` `[T]`, 0 if absent."""
    keep = share > 0
    gradients = jax.tree.map(
        lambda total, g: total + g.astype(total.dtype) * task_tree.along_tasks(share, g.ndim),
        state.gradients,
        task_tree.remove_absent(updates, keep),
    )
    return state._replace(
        micro_count=state.micro_count + 1,
        gradients=gradients,
        losses=state.losses + (0 if losses is None else share * jnp.where(keep, losses, 0)),
        counts=state.counts + share,
    )
