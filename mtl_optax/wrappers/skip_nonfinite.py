"""Skips non-finite steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.types import AxisName


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`: the inner state, and the number of skipped steps (int32)."""

    inner_state: optax.OptState
    skipped_steps: jax.Array


def skip_nonfinite(
    inner: optax.GradientTransformation, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Skips a step if a gradient, a loss or the update is not finite.

    If a gradient, a loss in `losses=`, or the update of `inner` contains NaN or infinity, the update is 0
    and the inner state does not change. The entries of absent tasks (`active=`) are ignored. A method
    excludes a non-finite task and combines the others. Use this wrapper to skip the whole step instead,
    or for the optimizer of the heads, whose gradients do not go through a method. `optax.apply_if_finite`
    cannot replace it, because it returns zeros with the task axis.

    Args:
      inner: the whole optimizer, which includes the balancing method.
      axis_name: see `MethodOptions`; all devices then skip the same steps.

    Returns:
      A transformation with the inputs and outputs of `inner`. Cost: one pass over the gradients and the
      update.

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
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: object
    ) -> tuple[optax.Updates, SkipNonfiniteState]:
        result, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        losses, active = (_vector(extra_args.get(name)) for name in ("losses", "active"))
        present = [_without_absent(leaf, active) for leaf in jax.tree.leaves((updates, losses))]
        bad = jnp.logical_not(_all_finite((present, result))).astype(jnp.float32)
        ok = task_tree.sum_over(bad, axis_name) == 0
        result = jax.tree.map(lambda u: jnp.where(ok, u, jnp.zeros((), u.dtype)), result)
        kept = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old), inner_state, state.inner_state
        )
        skipped = jnp.where(ok, state.skipped_steps, optax.safe_increment(state.skipped_steps))
        return result, SkipNonfiniteState(kept, skipped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _vector(values: object) -> jax.Array | None:
    """Returns one number per task as an array, from an array, a sequence, or a dictionary by name."""
    if values is None:
        return None
    return jnp.concatenate([jnp.atleast_1d(value) for value in jax.tree.leaves(values)])


def _without_absent(leaf: jax.Array, active: jax.Array | None) -> jax.Array:
    # The gradient of a head may have no task axis; the check of the update covers it.
    if active is None or jnp.shape(leaf)[:1] != active.shape:
        return leaf
    return task_tree.remove_absent(leaf, active)


def _all_finite(tree: object) -> jax.Array:
    checks = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    return jnp.all(jnp.stack(checks)) if checks else jnp.ones((), bool)
