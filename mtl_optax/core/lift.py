"""The lift: how a rule becomes an optax transformation that removes the task axis.

Everything that all methods share is here once: checks, blocks, absent tasks, kept weights, the fields of
the state, compilation. See `rule.py` for what a rule may rely on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtl_optax.core import checks, task_tree
from mtl_optax.core.arguments import check_axis_name, check_blocks, check_bool, check_integer
from mtl_optax.core.first_state import check_fields, check_state, first_state
from mtl_optax.core.method import (
    BalanceState,
    Method,
    MethodOptions,
    Options,
    Origin,
    flat_options,
    tell_update,
)
from mtl_optax.core.rule import Evidence, TaskGradients, UpdateRule, WeightRule
from mtl_optax.core.tasks import names_of, read_tasks


def from_rule(
    name: str, num_tasks: Any, rule: WeightRule | UpdateRule, **given: Unpack[MethodOptions]
) -> Method:
    """Lifts a rule to a method.

    Args:
      name: the method's name, for messages.
      num_tasks: T, or the task names.
      rule: the mathematics, a `WeightRule` or an `UpdateRule`.
      **given: see `MethodOptions`; an `UpdateRule` takes `axis_name` only.

    Returns:
      The method.

    Raises:
      ValueError, TypeError: for options or a number of tasks that cannot be. At trace time, `update`
        raises for updates without the task axis, a wrong T, missing or misshapen `losses` or `active`.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> def weigh(evidence, state):
      ...     return 1 / evidence.norms, state
      >>> unit = mtl.from_rule("unit", 2, mtl.WeightRule(frozenset({"norms"}), weigh))
      >>> state = unit.init({"w": jnp.zeros(2)})
      >>> updates, state = unit.update({"w": jnp.array([[3., 0.], [0., 4.]])}, state)
      >>> updates["w"].tolist()
      [1.0, 1.0]
    """
    tasks = read_tasks(name, num_tasks)
    arguments: Any = flat_options(dict(given))
    options = _read_options(name, rule, arguments)
    axis_name = options.axis_name
    on_gradients = isinstance(rule, UpdateRule) or rule.average is not None
    advance: Callable[..., Any] = _by_update if isinstance(rule, UpdateRule) else _by_weights

    def init(params: Any) -> BalanceState:
        """The first state of the method.

        Args:
          params: the parameters or, on a fork, the representation. Shapes are enough.

        Returns:
          A `BalanceState`.
        """
        state = first_state(rule, options, tasks.number, params)
        # Equal zeros may share a buffer, and a shared buffer cannot be donated.
        return jax.tree.map(jnp.copy, state)

    # Compiled on its own, so that a call outside jit is one program too; inside jit it is inlined.
    @jax.jit
    def balance(
        updates: Any, state: BalanceState, params: Any, losses: Any, present: jax.Array, extra: Any
    ) -> tuple[Any, BalanceState]:
        check_fields(name, rule, options, state, updates)
        keep = present if losses is None else present & jnp.isfinite(losses)
        if on_gradients:
            updates = task_tree.stacked(updates)
            keep = keep & task_tree.finite(updates, tasks.number, axis_name)
        view = TaskGradients(
            updates=task_tree.remove_absent(updates, keep) if on_gradients else updates,
            active=keep,
            step=state.balance_count,
            dtype=state.weights.dtype,
            losses=None if losses is None else jnp.where(keep, losses, 0),
            params=params,
            extra=extra,
        )
        result, state, keep = advance(rule, options, view, state, present)
        return task_tree.narrow_like(result, updates), _count(state, present & ~keep)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        losses: Any = None,
        active: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, BalanceState]:
        """Balances the gradients of the tasks.

        Args:
          updates: one gradient per task, leaves `[T, *shape]`.
          state: from `init`, or from the last update.
          params: the parameters, to which the shapes of `updates` are compared.
          losses: the raw losses of this step, `[T]` or a dictionary by task name; for methods that need
            them.
          active: the tasks that are in this batch, bool `[T]` or a dictionary by task name; None is all.
          **extra_args: those that the documentation of the method names; others are ignored.

        Returns:
          `(update, state)`: leaves `[*shape]`, with `reduce=False` `[T, *shape]`, and the new state.
        """
        tell_update(method, updates)
        check_state(name, state, tasks)
        checks.check_updates(name, updates, tasks, params)
        if "losses" in rule.needs:
            losses = checks.read_losses(name, losses, tasks, state.weights.dtype, extra_args)
        else:
            if isinstance(losses, Mapping):  # names that differ would mean another target
                names_of(name, "losses", losses, tasks)
            losses = None
        present = checks.read_active(name, active, tasks)
        extra = {key: extra_args.get(key) for key in rule.extra}
        return balance(updates, state, params if on_gradients else None, losses, present, extra)

    origin = Origin(functools.partial(from_rule, name, rule=rule), arguments, {"rule": rule})
    method = Method.of(init, update, name, tasks, rule, options, origin)
    return method


def weigh_by_losses(
    method: Method, losses: Any, state: BalanceState, active: Any, extra_args: dict[str, Any]
) -> tuple[jax.Array, BalanceState]:
    """The weights `[T]` of a method that looks at losses alone, at O(T), and its new state."""
    name, tasks, rule = method.name, method.tasks, method.rule
    assert isinstance(rule, WeightRule)
    check_state(name, state, tasks)
    check_fields(name, rule, method.options, state, ())
    losses = checks.read_losses(name, losses, tasks, state.weights.dtype, extra_args)
    present = checks.read_active(name, active, tasks)
    keep = present & jnp.isfinite(losses)
    evidence = Evidence(
        active=keep,
        step=state.balance_count,
        losses=jnp.where(keep, losses, 0),
        extra={key: extra_args.get(key) for key in rule.extra},
    )
    state, keep = _weigh(rule, method.options.update_every, evidence, state, lambda e, _: e)
    # Every block saw the same losses.
    weights = jnp.where(keep, jnp.mean(state.weights, axis=0), 0)
    return weights, _count(state, present & ~keep)


def rule_of(name: str, weigher: Any, num_tasks: int) -> WeightRule:
    """The rule of a weighting method that another method is built on."""
    rule = getattr(weigher, "rule", None)
    if not isinstance(weigher, Method) or not isinstance(rule, WeightRule):
        raise TypeError(
            f"{name}: expected a weighting method of mtl_optax (one whose update is a weighted sum "
            f"of task gradients), found {weigher!r}."
        )
    if weigher.num_tasks != num_tasks:
        raise ValueError(
            f"{name}: the weigher has num_tasks={weigher.num_tasks}, expected {num_tasks}."
        )
    if rule.average is not None:
        raise TypeError(
            f"{name}: expected a method that weighs the gradients of this step; {weigher.name} weighs "
            "averages of gradients."
        )
    if rule.finish is not None:
        raise ValueError(
            f"{name}: takes the weights of {weigher.name} only, so its max_norm would be lost. Leave it "
            "out, and put optax.clip_by_global_norm after the whole method."
        )
    return rule


def is_due(state: BalanceState, active: jax.Array, update_every: int) -> jax.Array:
    """Whether new weights are due: by the count, or for a task that the old ones do not cover."""
    return (state.balance_count % update_every == 0) | jnp.any(active & ~state.weighed)


def next_count(count: jax.Array, happened: Any = True) -> jax.Array:
    """Counts up where something `happened`; past the largest int32 it goes on from 2**30.

    A counter that stopped there would freeze every random stream folded from it, and one that wrapped
    to 0 would look like a first step.
    """
    last = jnp.asarray(np.iinfo(np.int32).max, count.dtype)
    following = jnp.where(count == last, jnp.asarray(2**30, count.dtype), count + 1)
    return jnp.where(happened, following, count)


# --- the two kinds -----------------------------------------------------------------------------------


def _by_update(
    rule: UpdateRule,
    options: Options,
    view: TaskGradients,
    state: BalanceState,
    present: jax.Array,
) -> tuple[Any, BalanceState, jax.Array]:
    """The update that the rule gives, the new state, and which tasks went into it."""
    update, weights, rule_state = rule.apply(view, state.rule_state)
    weights = jnp.where(view.active, weights, 0).astype(state.weights.dtype)
    state = state._replace(weights=weights[None], weighed=view.active, rule_state=rule_state)
    return update, state, view.active


def _by_weights(
    rule: WeightRule,
    options: Options,
    view: TaskGradients,
    state: BalanceState,
    present: jax.Array,
) -> tuple[Any, BalanceState, jax.Array]:
    """The weighted sum, the new state, and which tasks went into it."""
    blocks = task_tree.assign_blocks(task_tree.without_task_axis(view.updates), options.blocks)
    _check_blocks(rule, blocks.count, state.weights.shape[0])
    axis_name, updates, averages = options.axis_name, view.updates, state.averages
    weighted = updates
    if rule.average is not None:
        updates, averages = rule.average.apply(view, averages)
        weighted = updates if rule.average.weighted else weighted

    looks_at_norms = bool(rule.needs & {"norms", "gram"})

    def look(evidence: Evidence, with_cosines: bool) -> Evidence:
        """Adds what the rule needs, and takes non-finite tasks out of the active ones."""
        cosine = None
        seen = (updates, blocks, evidence.active, state.weights.dtype, axis_name)
        if with_cosines:
            cosine, norms, finite = task_tree.gram(*seen)
        else:
            norms, finite = task_tree.norms(*seen)
        keep = evidence.active & finite
        losses = None if evidence.losses is None else jnp.where(keep, evidence.losses, 0)
        norms = norms if looks_at_norms else None
        return evidence._replace(active=keep, losses=losses, norms=norms, cosine=cosine)

    evidence = Evidence(view.active, view.step, view.losses, extra=view.extra)
    # The averages are as large as the gradients: they stay out of the `cond` over the weights.
    state, keep = _weigh(rule, options.update_every, evidence, state._replace(averages=()), look)
    weights = state.weights
    if looks_at_norms and weighted is updates:
        # What counts as a zero gradient adds nothing, however large its weight.
        weights = jnp.where(state.norms > 0, weights, 0)
    if options.reduce:
        result = task_tree.combine(weighted, weights, keep, blocks)
    else:
        result = task_tree.scale(weighted, weights, keep, present & ~keep, blocks)
    if rule.finish is not None:
        result = rule.finish(result, options, weights.dtype)
    return result, state._replace(averages=averages), keep


def _check_blocks(rule: WeightRule, count: int, in_state: int) -> None:
    """Raises for a state that was made for another tree, where blocks would be mixed up."""
    if count != in_state and rule.needs & {"norms", "gram"}:
        raise ValueError(
            f"the state has {in_state} blocks, and these gradients have {count}: make it by init of the "
            "tree whose gradients update is given, the parameters or, on a fork, the representation."
        )


def _weigh(
    rule: WeightRule,
    update_every: int,
    evidence: Evidence,
    state: BalanceState,
    look: Callable[[Evidence, bool], Evidence],
) -> tuple[BalanceState, jax.Array]:
    """The state with new weights, where they are due, and which tasks to keep."""
    num_blocks, dtype = state.weights.shape[0], state.weights.dtype
    largest = float(jnp.finfo(dtype).max)

    def fresh(state: BalanceState) -> tuple[BalanceState, jax.Array]:
        seen = look(evidence, "gram" in rule.needs)
        weights, rule_state = _over_blocks(rule.weigh, seen, state.rule_state, num_blocks)
        weights = jnp.where(seen.active, jnp.clip(weights, -largest, largest), 0).astype(dtype)
        return state._replace(
            weights=weights,
            kept_weights=jax.tree.map(lambda _: weights, state.kept_weights),
            weighed=seen.active,
            norms=() if seen.norms is None else seen.norms,
            cosine=() if seen.cosine is None else seen.cosine,
            rule_state=jax.tree.map(_like, rule_state, state.rule_state),
        ), seen.active

    def kept(state: BalanceState) -> tuple[BalanceState, jax.Array]:
        seen = look(evidence, False)
        if rule.bound is not None:
            limits = _over_blocks(rule.bound, seen, state.rule_state, num_blocks)
            weights = jnp.minimum(state.kept_weights, limits).astype(dtype)
            state = state._replace(weights=weights)
        return state._replace(norms=() if seen.norms is None else seen.norms), seen.active

    if update_every == 1:
        return fresh(state)
    return lax.cond(is_due(state, evidence.active, update_every), fresh, kept, state)


def _over_blocks(
    function: Callable[[Evidence, Any], Any], evidence: Evidence, rule_state: Any, num_blocks: int
) -> Any:
    """One call of a rule's `weigh` or `bound`, vmapped over the blocks."""
    mapped: Any = Evidence(
        active=None,  # type: ignore[arg-type]
        step=None,  # type: ignore[arg-type]
        norms=None if evidence.norms is None else 0,
        cosine=None if evidence.cosine is None else 0,
    )
    if num_blocks > 1:
        mapped_function = jax.vmap(function, in_axes=(mapped, 0), axis_size=num_blocks)
        return mapped_function(evidence, rule_state)
    # For one block without vmap, which would turn a solver's `cond` into both of its branches.
    only = evidence._replace(
        norms=None if evidence.norms is None else evidence.norms[0],
        cosine=None if evidence.cosine is None else evidence.cosine[0],
    )
    result = function(only, jax.tree.map(lambda x: x[0], rule_state))
    return jax.tree.map(lambda x: jnp.asarray(x)[None], result)


# --- state and options -------------------------------------------------------------------------------


def _count(state: BalanceState, broken: jax.Array) -> BalanceState:
    return state._replace(
        balance_count=next_count(state.balance_count), skipped=next_count(state.skipped, broken)
    )


def _read_options(name: str, rule: WeightRule | UpdateRule, given: dict[str, Any]) -> Options:
    on_updates = isinstance(rule, UpdateRule)
    wrong = sorted(given.keys() - ({"axis_name"} if on_updates else set(Options._fields)))
    if wrong:
        kind = "a method that gives the update itself" if on_updates else "a weighting method"
        raise TypeError(f"{name}: {kind} takes no argument {', '.join(wrong)}; see MethodOptions.")
    needs = rule.needs - ({"gradients", "losses"} if on_updates else {"losses", "norms", "gram"})
    if needs:
        raise ValueError(
            f"{name}: a rule of type {type(rule).__name__} cannot need {sorted(needs)}."
        )
    options = Options(**given)
    check_blocks(name, options.blocks)
    check_bool(name, "reduce", options.reduce)
    check_integer(name, "update_every", options.update_every, 1)
    check_axis_name(name, options.axis_name)
    return options


def _like(new: Any, old: Any) -> jax.Array:
    if jnp.shape(new) != jnp.shape(old):
        raise ValueError(
            f"a rule changed the shape of its state: {jnp.shape(old)} to {jnp.shape(new)}"
        )
    return jnp.asarray(new).astype(old.dtype)
