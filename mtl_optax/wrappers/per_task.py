"""Applies an optax transformation to each task separately."""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.types import Active, AxisName
from mtl_optax.core.validation import read_tasks
from mtl_optax.wrappers.present import read_present


def per_task(
    inner: optax.GradientTransformation, tasks: int | Collection[str], *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Applies an optax transformation to the gradient of each task separately.

    `vmap` over the tasks gives each task a separate state of `inner`. Use it before a balancing method
    for a transformation that has a state or takes norms: `per_task(optax.trace(0.9), T)` has one momentum
    per task, and `per_task(optax.clip_by_global_norm(1.0), T)` clips each task's gradient.

    The state of an absent or non-finite task does not change. Its entries pass unchanged, so that the
    next method excludes and counts it.

    Args:
      inner: a transformation from leaves `[*shape]` to leaves `[*shape]`.
      tasks: T, or the task names.
      axis_name: see `MethodOptions`.

    Returns:
      A transformation on leaves `[T, *shape]`. Memory: T states of `inner`.

    Raises:
      ValueError: if the updates have no task axis.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> tx = optax.chain(mtl.per_task(optax.clip_by_global_norm(1.0), 2), mtl.sum_tasks(2))
      >>> state = tx.init(jnp.zeros(2))
      >>> [round(float(x), 3) for x in tx.update(jnp.array([[3., 4.], [0., 0.5]]), state)[0]]
      [0.6, 1.3]
    """
    axis = read_tasks("per_task", tasks)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        active: Active | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        keep, _ = read_present("per_task", axis, updates, params, active, axis_name)
        return update_each(inner, updates, state, params, keep, extra_args)

    return optax.GradientTransformationExtraArgs(
        lambda params: init_each(inner, params, axis.number), update_fn
    )


def init_each(
    inner: optax.GradientTransformation, params: optax.Params, num_tasks: int
) -> optax.OptState:
    """Returns one state of `inner` per task, stacked along a leading axis."""

    def concrete(leaf: object) -> object:
        shaped = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.zeros(leaf.shape, leaf.dtype) if shaped else leaf

    like = jax.tree.map(concrete, params)
    return jax.vmap(inner.init, in_axes=None, axis_size=num_tasks)(like)


def update_each(
    inner: optax.GradientTransformation,
    updates: optax.Updates,
    states: optax.OptState,
    params: optax.Params | None,
    keep: jax.Array,
    extra_args: dict[str, object],
) -> tuple[optax.Updates, optax.OptState]:
    """Applies `inner` per task; gradient and state of tasks outside `keep` `[T]` do not change."""
    update = optax.with_extra_args_support(inner).update

    def one(
        gradient: optax.Updates, state: optax.OptState, keep: jax.Array
    ) -> tuple[optax.Updates, optax.OptState]:
        moved = update(gradient, state, params, **extra_args)
        return jax.tree.map(lambda new, old: jnp.where(keep, new, old), moved, (gradient, state))

    return jax.vmap(one)(updates, states, keep)
