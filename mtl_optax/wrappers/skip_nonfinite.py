"""Skips a step that is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.types import AxisName


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`: the inner state, and how many steps were skipped (int32)."""

    inner_state: optax.OptState
    skipped_steps: jax.Array


def skip_nonfinite(
    inner: optax.GradientTransformation, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Skips a whole step if anything in it is not finite.

    If a gradient, a loss given as `losses=`, or the update that `inner` makes of them holds NaN or
    infinity, the update is 0 and the inner state stays as it was. What the slots of an absent task
    (`active=`) hold does not count. The methods exclude a non-finite task by themselves and go on with
    the others; use this to skip the step instead, or to guard the heads, whose gradients no method sees.
    `optax.apply_if_finite` cannot replace it: its zeros keep the task axis.

    Args:
      inner: the whole optimizer, balancing method included.
      axis_name: see `MethodOptions`; all devices then skip together.

    Returns:
      A transformation with the input and output of `inner`. Cost: one pass over gradients and update.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> tx = mtl.skip_nonfinite(optax.chain(mtl.sum_tasks(2), optax.sgd(1.0)))
      >>> update, state = tx.update(jnp.array([[1.], [jnp.nan]]), tx.init(jnp.zeros(1)))
      >>> update.tolist(), int(state.skipped_steps)
      ([0.0], 1)
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> SkipNonfiniteState:
        return SkipNonfiniteState(inner.init(params), jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Any, SkipNonfiniteState]:
        result, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        seen = _without_absent((updates, extra_args.get("losses")), extra_args.get("active"))
        bad = jnp.logical_not(_all_finite((seen, result))).astype(jnp.float32)
        ok = task_tree.sum_over(bad, axis_name) == 0
        result = jax.tree.map(lambda u: jnp.where(ok, u, jnp.zeros((), u.dtype)), result)
        kept = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old), inner_state, state.inner_state
        )
        skipped = jnp.where(ok, state.skipped_steps, optax.safe_increment(state.skipped_steps))
        return result, SkipNonfiniteState(kept, skipped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _without_absent(tree: Any, active: Any) -> Any:
    """The leaves `[T, ...]` of a tree with the slots of absent tasks set to 0."""
    if active is None:
        return tree
    updates, losses = tree
    tree = (updates, _in_order(losses))
    active = _in_order(active)

    def one(leaf: Any) -> Any:
        # A head's gradient may have no task axis; then its numbers show in the update.
        with_tasks = jnp.shape(leaf)[:1] == active.shape
        return task_tree.remove_absent(leaf, active) if with_tasks else leaf

    return jax.tree.map(one, tree)


def _in_order(values: Any) -> Any:
    """A dictionary or a sequence of one number per task as an array in the order of the tasks."""
    if isinstance(values, Mapping):
        values = [values[name] for name in sorted(values)]
    if isinstance(values, (tuple, list)):
        values = jnp.stack([jnp.asarray(value) for value in values])
    return None if values is None else jnp.asarray(values)


def _all_finite(tree: optax.Params) -> jax.Array:
    checks = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    return jnp.all(jnp.stack(checks)) if checks else jnp.ones((), bool)
