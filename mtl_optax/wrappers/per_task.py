"""Applies an optax transformation to each task separately."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.types import Active, AxisName
from mtl_optax.core.validation import names_of, read_tasks
from mtl_optax.wrappers.present import read_present


def per_task(
    inner: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    tasks: int | Collection[str],
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Applies an optax transformation to the gradient of each task separately.

    `vmap` over the tasks gives each task a separate state of `inner`. Use it before a balancing method
    for a transformation that has a state or takes norms: `per_task(optax.trace(0.9), T)` has one momentum
    per task, and `per_task(optax.clip_by_global_norm(1.0), T)` clips each task's gradient. A dictionary
    gives each task a transformation of its own.

    The state of an absent or non-finite task does not change. Its entries pass unchanged, so that the
    next method excludes and counts it.

    Args:
      inner: a transformation from leaves `[*shape]` to leaves `[*shape]`, or a dictionary of one per task
        name.
      tasks: T, or the task names.
      axis_name: see `MethodOptions`.

    Returns:
      A transformation on leaves `[T, *shape]`. Memory: T states of `inner`. The state of a dictionary is a
      dictionary by task name.

    Raises:
      ValueError: if the updates have no task axis, or a dictionary has other names than `tasks`.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> tx = optax.chain(mtl.per_task(optax.clip_by_global_norm(1.0), 2), mtl.sum_tasks(2))
      >>> state = tx.init(jnp.zeros(2))
      >>> [round(float(x), 3) for x in tx.update(jnp.array([[3., 4.], [0., 0.5]]), state)[0]]
      [0.6, 1.3]
    """
    axis = read_tasks("per_task", tasks)
    names = names_of("per_task", "inner", inner, axis) if isinstance(inner, Mapping) else ()

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        active: Active | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        keep, _ = read_present("per_task", axis, updates, params, active, axis_name)
        if not isinstance(inner, Mapping):
            return update_each(inner, updates, state, params, keep, extra_args)
        leaves, structure = jax.tree.flatten(updates)
        rows, states = [], {}
        for number, name in enumerate(names):
            gradient = structure.unflatten([leaf[number] for leaf in leaves])
            row, states[name] = _update_one(
                inner[name], gradient, state[name], keep[number], params, extra_args
            )
            rows.append(row)
        return jax.tree.map(lambda *rows: jnp.stack(rows), *rows), states

    def init_fn(params: optax.Params) -> optax.OptState:
        if not isinstance(inner, Mapping):
            return init_each(inner, params, axis.number)
        return {name: inner[name].init(params) for name in names}

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
    one = functools.partial(_update_one, inner, params=params, extra_args=extra_args)
    return jax.vmap(one)(updates, states, keep)


def _update_one(
    inner: optax.GradientTransformation,
    gradient: optax.Updates,
    state: optax.OptState,
    keep: jax.Array,
    params: optax.Params | None,
    extra_args: dict[str, object],
) -> tuple[optax.Updates, optax.OptState]:
    """Applies `inner` to the gradient of one task, which does not change unless `keep`."""
    moved = optax.with_extra_args_support(inner).update(gradient, state, params, **extra_args)
    return jax.tree.map(lambda new, old: jnp.where(keep, new, old), moved, (gradient, state))
