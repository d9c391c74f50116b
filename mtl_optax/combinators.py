"""Small transformations that make an algebra of the methods: reducers, per-task lifting, guards."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax import arguments, task_tree
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.guard import Guard


def fixed_weights(
    num_tasks: int, weights: Any, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    """Weighs every task by a given number.

    The weighted sum `sum_t weights[t] * g_t` with constants: linear scalarisation, the baseline that a
    careful grid search can make hard to beat. Sum-like with weights of one.

    Args:
      num_tasks: T, static.
      weights: `[T]`, any real numbers; they multiply the raw gradients.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients.

    Raises:
      ValueError: where `weights` does not have T entries.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.fixed_weights(2, [1.0, 0.5])
      >>> state = tx.init(jnp.zeros(2))
      >>> tx.update(jnp.array([[1., 0.], [0., 4.]]), state)[0].tolist()
      [1.0, 2.0]

    References:
      Kurin et al., In Defense of the Unitary Scalarization for Deep Multi-Task Learning, 2022.
    """
    num_tasks = arguments.check_num_tasks("fixed_weights", num_tasks)
    weights = jnp.asarray(weights)
    if weights.shape != (num_tasks,):
        raise ValueError(
            f"fixed_weights: weights must have shape ({num_tasks},), one number per task; found "
            f"{weights.shape}."
        )

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        return weights, state

    return _constant("fixed_weights", num_tasks, weigh, options)


def sum_tasks(
    num_tasks: int, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    """Sums the task gradients: plain multi-task training.

    The update is `sum_t g_t` over the tasks present; sum-like. The end of a chain of transformations
    that keep the task axis, and the baseline of every comparison.

    Args:
      num_tasks: T, static.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients.

    Raises:
      TypeError: where `num_tasks` is not a static integer.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.sum_tasks(2)
      >>> tx.update(jnp.array([[1., 0.], [0., 4.]]), tx.init(jnp.zeros(2)))[0].tolist()
      [1.0, 4.0]

    References:
      Caruana, Multitask Learning, 1997.
    """
    num_tasks = arguments.check_num_tasks("sum_tasks", num_tasks)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        return jnp.ones((num_tasks,)), state

    return _constant("sum_tasks", num_tasks, weigh, options)


def mean_tasks(
    num_tasks: int, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    """Averages the task gradients.

    The update is the mean of `g_t` over the tasks present; mean-like.

    Args:
      num_tasks: T, static.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients.

    Raises:
      TypeError: where `num_tasks` is not a static integer.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.mean_tasks(2)
      >>> tx.update(jnp.array([[1., 0.], [0., 4.]]), tx.init(jnp.zeros(2)))[0].tolist()
      [0.5, 2.0]

    References:
      Caruana, Multitask Learning, 1997.
    """
    num_tasks = arguments.check_num_tasks("mean_tasks", num_tasks)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        present = jnp.maximum(jnp.sum(evidence.active), 1)
        return jnp.broadcast_to(1 / present, (num_tasks,)), state

    return _constant("mean_tasks", num_tasks, weigh, options)


def _constant(
    name: str, num_tasks: int, weigh: Any, options: WeightingOptions
) -> optax.GradientTransformationExtraArgs:
    rule = Rule(name, num_tasks, frozenset(), lambda dtype: (), weigh)
    return from_rule(rule, **options)


def per_task(
    inner: optax.GradientTransformation, num_tasks: int
) -> optax.GradientTransformationExtraArgs:
    """Lifts any optax transformation over the task axis: `[T, ...]` to `[T, ...]`.

    Every task gets its own copy of `inner` and of its state, by `vmap`. It is what makes a stateful or
    norm-taking transformation correct before a balancing method: `per_task(optax.trace(0.9), T)` keeps
    one momentum per task, `per_task(optax.clip_by_global_norm(1.0), T)` clips each task's gradient.

    An absent or non-finite task leaves its own state as it was; its slot passes through unchanged, so
    that the method after it excludes and counts it.

    Args:
      inner: a transformation from leaves `[*shape]` to leaves `[*shape]`.
      num_tasks: T, static.

    Returns:
      A transformation on leaves `[T, *shape]`; T times the state of `inner`.

    Raises:
      ValueError: where updates do not carry the task axis.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> tx = optax.chain(mtl.per_task(optax.clip_by_global_norm(1.0), 2), mtl.sum_tasks(2))
      >>> state = tx.init(jnp.zeros(2))
      >>> [round(float(x), 3) for x in tx.update(jnp.array([[3., 4.], [0., 0.5]]), state)[0]]
      [0.6, 1.3]

    References:
      The lifting of AdaTask: Yang et al., AdaTask: A Task-Aware Adaptive Learning Rate Approach to
      Multi-Task Learning, 2023.
    """
    num_tasks = arguments.check_num_tasks("per_task", num_tasks)
    guard = Guard("per_task", num_tasks, frozenset({"gradients"}), reduces=False)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> Any:
        like = jax.tree.map(_concrete, params)
        return jax.vmap(inner.init, in_axes=None, axis_size=num_tasks)(like)

    def update_fn(
        updates: Any, state: Any, params: Any = None, *, active: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        guard.check(updates, params, extra_args)
        keep = task_tree.finite(updates, num_tasks) & guard.present(active)

        def one(update: Any, state: Any, keep: jax.Array) -> tuple[Any, Any]:
            new_update, new_state = inner.update(update, state, params, **extra_args)
            return jax.tree.map(
                lambda new, old: jnp.where(keep, new, old),
                (new_update, new_state),
                (update, state),
            )

        return jax.vmap(one)(updates, state, keep)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`: the inner state, and how many steps were skipped (int32)."""

    inner_state: Any
    skipped_steps: jax.Array


def skip_nonfinite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Skips a whole step where anything in it is not finite.

    Where a gradient, a loss given as `losses=`, or the update that `inner` makes of them holds NaN or
    infinity, the update is 0 and the inner state stays as it was; what an absent task's slots hold
    (`active=`) does not count. The methods here exclude a non-finite task by themselves; this guard is
    for those who rather lose the step than train on the remaining tasks, and for the heads, whose
    gradients no method looks at. `optax.apply_if_finite` cannot stand around a transformation that
    removes the task axis: its zeros keep that axis.

    Args:
      inner: the whole optimizer, balancing method included.

    Returns:
      A transformation with the input and output of `inner`. Cost: one pass over gradients and update.

    Raises:
      Whatever `inner` raises.

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
        seen = _of_active((updates, extra_args.get("losses")), extra_args.get("active"))
        ok = _all_finite((seen, result))
        result = jax.tree.map(lambda u: jnp.where(ok, u, jnp.zeros((), u.dtype)), result)
        kept = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old), inner_state, state.inner_state
        )
        skipped = jnp.where(ok, state.skipped_steps, optax.safe_increment(state.skipped_steps))
        return result, SkipNonfiniteState(kept, skipped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class AccumulateState(NamedTuple):
    """State of `accumulate`: sums over the micro-batches so far, and how often each task was in one."""

    inner_state: Any
    micro_count: jax.Array
    gradients: Any
    losses: jax.Array
    present: jax.Array


def accumulate(
    inner: optax.GradientTransformation, num_tasks: int, every_k: int
) -> optax.GradientTransformationExtraArgs:
    """Averages per-task gradients over `every_k` micro-batches before `inner` sees them.

    The update is 0 on all calls but every `every_k`-th, when `inner` gets each task's mean gradient and
    mean loss over the micro-batches in which the task was present and finite; a task that was in none
    of them is passed on as inactive. `optax.MultiSteps` cannot do this: its accumulator has no task
    axis. Where the micro-batches come from one batch, `optax.microbatching` over the function that
    returns per-task gradients needs no state at all.

    Args:
      inner: the whole optimizer, balancing method included.
      num_tasks: T, static.
      every_k: micro-batches per step, static.

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
    num_tasks = arguments.check_num_tasks("accumulate", num_tasks)
    arguments.check_integer("accumulate", "every_k", every_k, 1)
    guard = Guard("accumulate", num_tasks, frozenset({"losses"}), reduces=False)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> AccumulateState:
        dtype = task_tree.statistics_dtype(params)
        return AccumulateState(
            inner_state=inner.init(params),
            micro_count=jnp.zeros((), jnp.int32),
            gradients=task_tree.per_task_zeros(params, num_tasks, dtype),
            losses=jnp.zeros((num_tasks,), dtype),
            present=jnp.zeros((num_tasks,), dtype),
        )

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        losses: Any = None,
        active: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, AccumulateState]:
        task_tree.check_updates("accumulate", updates, num_tasks, params)
        keep = task_tree.finite(updates, num_tasks) & guard.present(active)
        if losses is not None:
            losses = guard.losses(losses, state.losses.dtype, extra_args)
            keep = keep & jnp.isfinite(losses)
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
                lambda total, g: task_tree.narrow(
                    total / times.reshape((-1,) + (1,) * (total.ndim - 1)), g.dtype
                ),
                sums.gradients,
                updates,
            )
            given = {} if losses is None else {"losses": sums.losses / times}
            result, inner_state = inner.update(
                mean, sums.inner_state, params, active=sums.present > 0, **given, **extra_args
            )
            empty = jax.tree.map(jnp.zeros_like, sums._replace(inner_state=None))
            return result, empty._replace(inner_state=inner_state)

        def wait(sums: AccumulateState) -> tuple[Any, AccumulateState]:
            shapes, _ = jax.eval_shape(step, sums)
            return jax.tree.map(jnp.zeros_like, shapes), sums

        return lax.cond(sums.micro_count == every_k, step, wait, sums)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def drop_extra_args(
    inner: optax.GradientTransformation, *names: str
) -> optax.GradientTransformationExtraArgs:
    """Hides extra arguments from a transformation that refuses those it does not know.

    optax's line searches hand every extra argument to their `value_fn`, so `losses=`, which a method
    earlier in the chain needs, makes them raise. Wrap them by `drop_extra_args(inner, "losses")`.

    Args:
      inner: the transformation to shield.
      *names: the extra arguments that it must not see.

    Returns:
      `inner` without those arguments.

    Raises:
      ValueError: where no name is given.

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


def _concrete(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return leaf


def _of_active(tree: Any, active: Any) -> Any:
    """The leaves `[T, ...]` of a tree with the slots of absent tasks set to 0."""
    if active is None:
        return tree
    active = jnp.asarray(active)

    def one(leaf: Any) -> Any:
        # A head's gradient may have no task axis: what it holds shows in the update.
        stacked = jnp.shape(leaf)[:1] == active.shape
        return task_tree.remove_absent(leaf, active) if stacked else leaf

    return jax.tree.map(one, tree)


def _all_finite(tree: Any) -> jax.Array:
    checks = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    return jnp.all(jnp.stack(checks)) if checks else jnp.ones((), bool)
