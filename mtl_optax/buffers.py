"""Transformations that keep gradients of each task from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.core import checks, task_tree
from mtl_optax.core.arguments import check_decay, check_integer
from mtl_optax.core.method import Method, is_watched
from mtl_optax.core.tasks import Tasks, read_tasks, task_vector
from mtl_optax.solvers.arithmetic import safe_divide


class AccumulateState(NamedTuple):
    """State of `accumulate`: sums over the micro-batches so far, and how often each task was in one."""

    inner_state: Any
    micro_count: jax.Array
    gradients: Any
    losses: jax.Array
    present: jax.Array


def accumulate(
    inner: optax.GradientTransformation, num_tasks: Any, every_k: int, *, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Averages per-task gradients over `every_k` micro-batches before `inner` sees them.

    The update is 0 on all calls but every `every_k`-th, when `inner` gets each task's mean gradient and
    mean loss over the micro-batches in which the task was present and finite; a task that was in none
    of them is passed on as inactive. `optax.MultiSteps` cannot do this: its accumulator has no task
    axis. Where the micro-batches come from one batch, `optax.microbatching` over the function that
    returns per-task gradients needs no state at all.

    Args:
      inner: the whole optimizer, balancing method included.
      num_tasks: T, or the task names.
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
    tasks = read_tasks("accumulate", num_tasks)
    check_integer("accumulate", "every_k", every_k, 1)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> AccumulateState:
        dtype = task_tree.statistics_dtype(params)
        state = AccumulateState(
            inner_state=inner.init(params),
            micro_count=jnp.zeros((), jnp.int32),
            gradients=task_tree.per_task_zeros(params, tasks.number, dtype),
            losses=jnp.zeros((tasks.number,), dtype),
            present=jnp.zeros((tasks.number,), dtype),
        )
        # Equal zeros may share a buffer, and a shared buffer cannot be donated.
        return jax.tree.map(jnp.copy, state)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        losses: Any = None,
        active: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, AccumulateState]:
        keep, losses = _read_step(
            "accumulate", updates, params, losses, active, tasks, state.losses.dtype, axis_name
        )
        gradients = jax.tree.map(
            lambda total, g: total + g.astype(total.dtype),
            state.gradients,
            task_tree.remove_absent(updates, keep),
        )
        sums = state._replace(
            micro_count=state.micro_count + 1,
            gradients=gradients,
            losses=state.losses + (0 if losses is None else jnp.where(keep, losses, 0)),
            present=state.present + keep.astype(state.present.dtype),
        )

        def step(sums: AccumulateState) -> tuple[Any, AccumulateState]:
            times = jnp.maximum(sums.present, 1)
            mean = jax.tree.map(
                lambda total: total / task_tree.along_tasks(times, total.ndim), sums.gradients
            )
            mean = task_tree.narrow_like(mean, updates)
            given = {} if losses is None else {"losses": sums.losses / times}
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


class RememberState(NamedTuple):
    """State of `remember`.

    Attributes:
      inner_state: of the method underneath.
      gradients: leaves `[T, *shape]`, averages of each task's gradients; start at 0.
      share: `[T]`, the share of each average that is data: `1 - decay ** k` after k gradients.
      losses: `[T]`, each task's last loss.
    """

    inner_state: Any
    gradients: Any
    share: jax.Array
    losses: jax.Array


def remember(
    inner: optax.GradientTransformation,
    decay: Any = 0.0,
    *,
    num_tasks: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the gradients of tasks that are absent from a step, so that a method sees all T.

    For one gradient a step (`one_task_value_and_grad`), one data loader per task, or a subset of the tasks
    in each step. With :math:`\beta` = ``decay``, for a task that is present for the k-th time

    .. math:: m_t \leftarrow \beta m_t + (1 - \beta) g_t, \qquad \hat m_t = m_t / (1 - \beta^k),

    and the others keep theirs. ``inner`` gets :math:`\hat m` for all tasks that have been present at least
    once, and the last losses.

    Args:
      inner: a method, or a whole optimizer that begins with one.
      decay: beta in [0, 1); 0 keeps the last gradient itself.
      num_tasks: T, or the task names; needed only if `inner` is no `Method`.
      axis_name: see `MethodOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to what `inner` returns, with the state `RememberState`.
      Memory: T gradients.

    Raises:
      ValueError: for updates without the task axis, a decay outside its range, or a `num_tasks` that is not
        the method's.

    Notes:
      A task that is not finite counts as absent: its old gradient stays. On a representation
      `[batch, width]` the kept gradients would belong to other examples: use it on parameters.

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
      2025, section 3.3, https://arxiv.org/abs/2408.11104
    """
    tasks = _tasks_of(inner, num_tasks)
    check_decay("remember", decay=decay)
    update_inner = optax.with_extra_args_support(inner).update

    def init_fn(params: Any) -> RememberState:
        dtype = task_tree.statistics_dtype(params)
        state = RememberState(
            inner_state=inner.init(params),
            gradients=task_tree.per_task_zeros(params, tasks.number, dtype),
            share=jnp.zeros((tasks.number,), dtype),
            losses=jnp.zeros((tasks.number,), dtype),
        )
        # Equal zeros may share a buffer, and a shared buffer cannot be donated.
        return jax.tree.map(jnp.copy, state)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        losses: Any = None,
        active: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, RememberState]:
        dtype = state.share.dtype
        keep, losses = _read_step(
            "remember", updates, params, losses, active, tasks, dtype, axis_name
        )
        last = state.losses if losses is None else jnp.where(keep, losses, state.losses)
        step = 1 - jnp.asarray(decay, dtype)
        present = task_tree.remove_absent(updates, keep)
        gradients = task_tree.move_towards(state.gradients, present, step, keep)
        share = jnp.where(keep, (1 - step) * state.share + step, state.share)
        corrected = jax.tree.map(
            lambda m: safe_divide(m, task_tree.along_tasks(share, m.ndim)), gradients
        )
        given = {} if losses is None else {"losses": last}
        result, inner_state = update_inner(
            task_tree.narrow_like(corrected, updates),
            state.inner_state,
            params,
            active=share > 0,
            **given,
            **extra_args,
        )
        return result, RememberState(inner_state, gradients, share, last)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _tasks_of(inner: Any, num_tasks: Any) -> Tasks:
    if not isinstance(inner, Method):
        if num_tasks is None:
            raise ValueError(
                "remember: give num_tasks for a transformation that is not one Method."
            )
        return read_tasks("remember", num_tasks)
    if num_tasks is not None and read_tasks("remember", num_tasks) != inner.tasks:
        raise ValueError(
            f"remember: num_tasks={num_tasks!r} is not that of {inner.name}, {inner.num_tasks}; leave it "
            "out."
        )
    return inner.tasks


def _read_step(
    name: str,
    updates: Any,
    params: Any,
    losses: Any,
    active: Any,
    tasks: Tasks,
    dtype: Any,
    axis_name: Any,
) -> tuple[jax.Array, Any]:
    """Which tasks are present and finite, bool `[T]`, and the losses `[T]` where they are given."""
    checks.check_updates(name, updates, tasks, params)
    keep = checks.read_active(name, active, tasks)
    keep = keep & task_tree.finite(updates, tasks.number, axis_name)
    if losses is not None:
        losses = task_vector(name, "losses", losses, tasks, dtype)
        keep = keep & jnp.isfinite(losses)
    return keep, losses
