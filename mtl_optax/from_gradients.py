"""Lifts a method that works on the gradients element by element, or keeps buffers of their size.

The companion of `from_rule` for what is no weighted sum: the same checks, the same state fields, the
same meaning of absent and non-finite tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax import task_tree
from mtl_optax.from_rule import BalanceState, next_count
from mtl_optax.guard import Guard


class TaskGradients(NamedTuple):
    """What such a method may look at.

    Attributes:
      updates: the task tree, leaves `[T, *shape]`; slots of tasks not in `active` hold 0.
      active: bool `[T]`; tasks present in this batch whose numbers are finite.
      broken: bool `[T]`; tasks present in this batch whose numbers are not.
      step: int32 scalar; updates done before this one.
      dtype: the dtype of statistics and weights.
      losses: `[T]` where the method needs them, 0 for inactive tasks.
      params: what the caller gave, or None.
      extra: the declared extra arguments of `update`; None where not given.
    """

    updates: Any
    active: jax.Array
    broken: jax.Array
    step: jax.Array
    dtype: Any
    losses: Any
    params: Any
    extra: dict[str, Any]


def from_gradients(
    name: str,
    num_tasks: int,
    init: Callable[[Any, Any], Any],
    apply: Callable[[TaskGradients, Any], tuple[Any, jax.Array, Any]],
    *,
    needs: frozenset[str] = frozenset({"gradients"}),
    extra: tuple[str, ...] = (),
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Lifts `apply` to a transformation that removes the task axis.

    Args:
      name: the factory's name, for messages.
      num_tasks: T.
      init: `(params, dtype) -> method_state`, arrays only.
      apply: `(TaskGradients, method_state) -> (update, weights [T], method_state)`; the update has the
        parameters' structure, and `weights` tells diagnostics how much of each task went into it.
      needs: what the table says, "gradients" among it.
      extra: names of extra arguments of `update` that `apply` reads.
      axis_name: mapped axes over which the elements of the gradients are split.

    Returns:
      A transformation with the update convention of `from_rule`.

    Raises:
      ValueError, TypeError: as `from_rule`.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> from mtl_optax.from_gradients import from_gradients
      >>> def apply(view, state):
      ...     largest = jax.tree.map(lambda g: g.max(0), view.updates)
      ...     return largest, jnp.ones(2), state
      >>> largest = from_gradients("largest", 2, lambda params, dtype: (), apply)
      >>> state = largest.init(jnp.zeros(2))
      >>> largest.update(jnp.array([[3., 0.], [0., 4.]]), state)[0].tolist()
      [3.0, 4.0]
    """
    guard = Guard(name, num_tasks, needs)

    def init_fn(params: Any) -> BalanceState:
        guard.remember(params)
        dtype = task_tree.statistics_dtype(params)
        state = BalanceState(
            balance_count=jnp.zeros((), jnp.int32),
            weights=jnp.zeros((num_tasks,), dtype),
            norms=(),
            cosine=(),
            skipped=jnp.zeros((num_tasks,), jnp.int32),
            weighed=jnp.zeros((num_tasks,), bool),
            block_names=(),
            rule_state=init(params, dtype),
        )
        # Equal zeros may share a buffer, and a shared buffer cannot be donated.
        return jax.tree.map(jnp.copy, state)

    @jax.jit
    def balance(
        updates: Any,
        state: BalanceState,
        params: Any,
        losses: Any,
        present: jax.Array,
        extra: dict[str, Any],
    ) -> tuple[Any, BalanceState]:
        keep = present & task_tree.finite(updates, num_tasks, axis_name)
        if losses is not None:
            keep = keep & jnp.isfinite(losses)
        view = TaskGradients(
            updates=task_tree.remove_absent(updates, keep),
            active=keep,
            broken=present & ~keep,
            step=state.balance_count,
            dtype=state.weights.dtype,
            losses=None if losses is None else jnp.where(keep, losses, 0),
            params=params,
            extra=extra,
        )
        result, weights, method_state = apply(view, state.rule_state)
        result = jax.tree.map(lambda u, g: task_tree.narrow(u, g.dtype), result, updates)
        return result, state._replace(
            balance_count=next_count(state.balance_count),
            weights=jnp.where(keep, weights, 0).astype(state.weights.dtype),
            skipped=next_count(state.skipped, present & ~keep),
            weighed=keep,
            rule_state=method_state,
        )

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        losses: Any = None,
        active: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, BalanceState]:
        guard.check(updates, params, extra_args)
        losses = guard.losses(losses, state.weights.dtype, extra_args)
        given = {key: extra_args.get(key) for key in extra}
        return balance(updates, state, params, losses, guard.present(active), given)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
