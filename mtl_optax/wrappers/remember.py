"""Stores the gradients of tasks that are absent from a step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.method import Method
from mtl_optax.core.types import Active, AxisName, Losses, Number
from mtl_optax.core.validation import Tasks, check_range, read_tasks
from mtl_optax.solvers.arithmetic import move_average
from mtl_optax.wrappers.present import read_present, update_by_means


class RememberState(NamedTuple):
    """State of `remember`.

    Attributes:
      inner_state: the state of `inner`.
      gradients: leaves `[T, *shape]`, the EMA of each task's gradients, which starts at 0.
      share: `[T]`, the bias correction of each EMA: `1 - decay ** k` after k gradients.
      losses: `[T]`, the last loss of each task.
    """

    inner_state: optax.OptState
    gradients: optax.Updates
    share: jax.Array
    losses: jax.Array


def remember(
    inner: optax.GradientTransformation,
    decay: Number = 0.0,
    *,
    tasks: int | Collection[str] | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stores the gradients of absent tasks, so that a method combines the gradients of all T tasks.

    It is meant for one gradient per step (`one_task_value_and_grad`), one data loader per task, or a
    subset of the tasks per step. With :math:`\beta` = ``decay``, a task that is present for the k-th time
    has

    .. math:: m_t \leftarrow \beta m_t + (1 - \beta) g_t, \qquad \hat m_t = m_t / (1 - \beta^k),

    and the averages of the other tasks do not change. ``inner`` gets :math:`\hat m` and the last losses
    of all tasks that have been present at least once.

    Args:
      inner: a method, or a whole optimizer that begins with one.
      decay: beta in [0, 1); 0 stores the last gradient itself.
      tasks: T, or the task names; needed only if `inner` is not a `Method`.
      axis_name: see `MethodOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to the update of `inner`, with the state `RememberState`.
      Memory: T gradients.

    Raises:
      ValueError: if the updates have no task axis, `decay` is outside its range, or `tasks` differs from
        the tasks of the method.

    Notes:
      A non-finite task counts as absent, so its stored gradient does not change. Use this on parameters:
      on a representation `[batch, width]` the stored gradients would belong to other examples.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.remember(mtl.sum_tasks(2))
      >>> state = tx.init(jnp.zeros(2))
      >>> for grads, active in ((jnp.array([[1., 0.], [0., 0.]]), [True, False]),
      ...                       (jnp.array([[0., 0.], [0., 3.]]), [False, True])):
      ...     update, state = tx.update(grads, state, active=jnp.array(active))
      >>> update.tolist()
      [1.0, 3.0]

    References:
      Liu, Chu and Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks,
      2024, section 3.3, https://arxiv.org/abs/2408.11104
    """
    axis = _tasks_of(inner, tasks)
    check_range("remember", "decay", decay, 0, 1, half_open=True)
    update_inner = optax.with_extra_args_support(inner).update

    def init_fn(params: optax.Params) -> RememberState:
        dtype = task_tree.statistics_dtype(params)
        state = RememberState(
            inner_state=inner.init(params),
            gradients=task_tree.per_task_zeros(params, axis.number, dtype),
            share=jnp.zeros((axis.number,), dtype),
            losses=jnp.zeros((axis.number,), dtype),
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
        **extra_args: object,
    ) -> tuple[optax.Updates, RememberState]:
        dtype = state.share.dtype
        keep, vector = read_present(
            "remember", axis, updates, params, active, axis_name, losses, dtype
        )
        last = state.losses if vector is None else jnp.where(keep, vector, state.losses)
        present = task_tree.remove_absent(updates, keep)
        gradients = task_tree.move_averages(state.gradients, present, decay, keep)
        share = move_average(state.share, 1, decay, keep)
        known = None if vector is None else last
        result, inner_state = update_by_means(
            update_inner, gradients, share, known, updates, state.inner_state, params, **extra_args
        )
        return result, RememberState(inner_state, gradients, share, last)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _tasks_of(inner: optax.GradientTransformation, tasks: int | Collection[str] | None) -> Tasks:
    if not isinstance(inner, Method):
        if tasks is None:
            raise ValueError("remember: give tasks for a transformation that is not one Method.")
        return read_tasks("remember", tasks)
    if tasks is not None and read_tasks("remember", tasks) != inner.tasks:
        raise ValueError(
            f"remember: tasks={tasks!r} is not that of {inner.name}, {inner.num_tasks}; leave it out."
        )
    return inner.tasks
