"""Small transformations that combine with the methods: reducers, lifting over tasks, guards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import checks, task_tree
from mtl_optax.core.factory import factory
from mtl_optax.core.lift import from_rule
from mtl_optax.core.method import Method, MethodOptions
from mtl_optax.core.rule import Evidence, WeightRule
from mtl_optax.core.tasks import read_tasks, task_numbers


@factory
def fixed_weights(num_tasks: Any, weights: Any, **options: Unpack[MethodOptions]) -> Method:
    """Multiplies each task gradient by a given number.

    The update is `sum_t weights[t] * g_t` with constant weights: linear scalarisation, the baseline that
    a careful search over weights can make hard to beat. Scale: sum-like with weights of one.

    Args:
      num_tasks: T, or the task names.
      weights: `[T]`, or a dictionary by task name; any real numbers.
      **options: see `MethodOptions`.

    Returns:
      A `Method`. Cost: one pass over the gradients.

    Raises:
      ValueError: if `weights` does not have one entry per task.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.fixed_weights(("click", "buy"), {"click": 0.5, "buy": 1.0})
      >>> state = tx.init(jnp.zeros(2))
      >>> tx.update(jnp.array([[1., 0.], [0., 4.]]), state)[0].tolist()
      [1.0, 2.0]

    References:
      Kurin et al., In Defense of the Unitary Scalarization for Deep Multi-Task Learning, 2022,
      https://arxiv.org/abs/2201.04122
    """
    tasks = read_tasks("fixed_weights", num_tasks)
    weights = task_numbers("fixed_weights", "weights", weights, tasks)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        return jnp.asarray(weights), state

    return from_rule("fixed_weights", tasks, WeightRule(frozenset(), weigh), **options)


@factory
def sum_tasks(num_tasks: Any, **options: Unpack[MethodOptions]) -> Method:
    """Sums the task gradients: plain multi-task training.

    The update is `sum_t g_t` over the tasks present. Scale: sum-like. It ends a chain of transformations
    that keep the task axis, and is the baseline of every comparison.

    Args:
      num_tasks: T, or the task names.
      **options: see `MethodOptions`.

    Returns:
      A `Method`. Cost: one pass over the gradients.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.sum_tasks(2)
      >>> tx.update(jnp.array([[1., 0.], [0., 4.]]), tx.init(jnp.zeros(2)))[0].tolist()
      [1.0, 4.0]

    References:
      Caruana, Multitask Learning, 1997, https://doi.org/10.1023/A:1007379606734
    """
    tasks = read_tasks("sum_tasks", num_tasks)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        return jnp.ones((tasks.number,)), state

    return from_rule("sum_tasks", tasks, WeightRule(frozenset(), weigh), **options)


@factory
def mean_tasks(num_tasks: Any, **options: Unpack[MethodOptions]) -> Method:
    """Averages the task gradients.

    The update is the mean of `g_t` over the tasks present. Scale: mean-like.

    Args:
      num_tasks: T, or the task names.
      **options: see `MethodOptions`.

    Returns:
      A `Method`. Cost: one pass over the gradients.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.mean_tasks(2)
      >>> tx.update(jnp.array([[1., 0.], [0., 4.]]), tx.init(jnp.zeros(2)))[0].tolist()
      [0.5, 2.0]

    References:
      Caruana, Multitask Learning, 1997, https://doi.org/10.1023/A:1007379606734
    """
    tasks = read_tasks("mean_tasks", num_tasks)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        present = jnp.maximum(jnp.sum(evidence.active), 1)
        return jnp.broadcast_to(1 / present, (tasks.number,)), state

    return from_rule("mean_tasks", tasks, WeightRule(frozenset(), weigh), **options)


def per_task(
    inner: optax.GradientTransformation, num_tasks: Any, *, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Lifts any optax transformation over the task axis: `[T, ...]` to `[T, ...]`.

    Every task gets its own copy of `inner` and of its state, by `vmap`. This makes a transformation that
    has a state or takes norms correct before a balancing method: `per_task(optax.trace(0.9), T)` keeps
    one momentum per task, `per_task(optax.clip_by_global_norm(1.0), T)` clips each task's gradient.

    An absent or non-finite task leaves its own state as it was; its slot passes through unchanged, so
    that the method after it excludes and counts it.

    Args:
      inner: a transformation from leaves `[*shape]` to leaves `[*shape]`.
      num_tasks: T, or the task names.
      axis_name: see `MethodOptions`.

    Returns:
      A transformation on leaves `[T, *shape]`. Memory: T states of `inner`.

    Raises:
      ValueError: for updates without the task axis.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> tx = optax.chain(mtl.per_task(optax.clip_by_global_norm(1.0), 2), mtl.sum_tasks(2))
      >>> state = tx.init(jnp.zeros(2))
      >>> [round(float(x), 3) for x in tx.update(jnp.array([[3., 4.], [0., 0.5]]), state)[0]]
      [0.6, 1.3]
    """
    tasks = read_tasks("per_task", num_tasks)

    def update_fn(
        updates: Any, state: Any, params: Any = None, *, active: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        checks.check_updates("per_task", updates, tasks, params)
        keep = checks.read_active("per_task", active, tasks)
        keep = keep & task_tree.finite(updates, tasks.number, axis_name)
        return update_each(inner, updates, state, params, keep, extra_args)

    return optax.GradientTransformationExtraArgs(
        lambda params: init_each(inner, params, tasks.number), update_fn
    )


def init_each(inner: optax.GradientTransformation, params: Any, num_tasks: int) -> Any:
    """The states of one copy of `inner` per task, stacked along a leading axis."""

    def concrete(leaf: Any) -> Any:
        shaped = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.zeros(leaf.shape, leaf.dtype) if shaped else leaf

    like = jax.tree.map(concrete, params)
    return jax.vmap(inner.init, in_axes=None, axis_size=num_tasks)(like)


def update_each(
    inner: optax.GradientTransformation,
    updates: Any,
    states: Any,
    params: Any,
    keep: jax.Array,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """The updates of one copy of `inner` per task; those not in `keep` [T] stay as they are."""
    update = optax.with_extra_args_support(inner).update

    def one(gradient: Any, state: Any, keep: jax.Array) -> tuple[Any, Any]:
        moved = update(gradient, state, params, **extra_args)
        return jax.tree.map(lambda new, old: jnp.where(keep, new, old), moved, (gradient, state))

    return jax.vmap(one)(updates, states, keep)


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`: the inner state, and how many steps were skipped (int32)."""

    inner_state: Any
    skipped_steps: jax.Array


def skip_nonfinite(
    inner: optax.GradientTransformation, *, axis_name: Any = None
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

    def init_fn(params: Any) -> SkipNonfiniteState:
        return SkipNonfiniteState(inner.init(params), jnp.zeros((), jnp.int32))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
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


def drop_extra_args(
    inner: optax.GradientTransformation, *names: str
) -> optax.GradientTransformationExtraArgs:
    """Hides extra arguments from a transformation that refuses those it does not know.

    optax's line searches hand every extra argument to their `value_fn`, so `losses=`, which a method
    earlier in the chain needs, makes them raise. Wrap them in `drop_extra_args(inner, "losses")`.

    Args:
      inner: the transformation to wrap.
      *names: the extra arguments that it must not see.

    Returns:
      `inner` without those arguments.

    Raises:
      ValueError: if no name is given.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> tx = mtl.drop_extra_args(optax.scale(2.0), "losses")
      >>> tx.update(jnp.ones(1), tx.init(jnp.zeros(1)), losses=jnp.ones(2))[0].tolist()
      [2.0]
    """
    if not names:
        raise ValueError("drop_extra_args: name the extra arguments to drop, such as 'losses'.")
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        kept = {name: value for name, value in extra_args.items() if name not in names}
        return inner.update(updates, state, params, **kept)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


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


def _all_finite(tree: Any) -> jax.Array:
    checks = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    return jnp.all(jnp.stack(checks)) if checks else jnp.ones((), bool)
