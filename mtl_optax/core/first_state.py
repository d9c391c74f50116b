"""The first state of a method, and the check that a state given to `update` is one of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax.core import task_tree
from mtl_optax.core.method import BalanceState, GradientsState, Options, states_in
from mtl_optax.core.rule import UpdateRule, WeightRule
from mtl_optax.core.tasks import Tasks


def first_state(
    rule: WeightRule | UpdateRule,
    options: Options,
    num_tasks: int,
    params: Any,
    num_blocks: int | None = None,
) -> BalanceState:
    """What `init` returns.

    Args:
      rule: the mathematics of the method.
      options: its options.
      num_tasks: T.
      params: the parameters; shapes are enough.
      num_blocks: B; None is what `options.blocks` makes of the parameters.

    Returns:
      The state.
    """
    dtype = task_tree.statistics_dtype(params)
    norms: Any = ()
    cosine: Any = ()
    averages: Any = ()
    kept_weights: Any = ()
    if isinstance(rule, UpdateRule):
        kind, num_blocks = GradientsState, 1
        rule_state = rule.init(params, num_tasks, dtype)
    else:
        if num_blocks is None:
            num_blocks = task_tree.assign_blocks(params, options.blocks).count
        rule_state = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (num_blocks, *jnp.shape(x))), rule.init(dtype)
        )
        if rule.needs & {"norms", "gram"}:
            norms = jnp.zeros((num_blocks, num_tasks), dtype)
        if "gram" in rule.needs:
            cosine = jnp.zeros((num_blocks, num_tasks, num_tasks), dtype)
        if rule.average is not None:
            averages = rule.average.init(params, num_tasks, dtype)
        if rule.bound is not None:
            kept_weights = jnp.zeros((num_blocks, num_tasks), dtype)
        kind = BalanceState
    return kind(
        balance_count=jnp.zeros((), jnp.int32),
        weights=jnp.zeros((num_blocks, num_tasks), dtype),
        kept_weights=kept_weights,
        norms=norms,
        cosine=cosine,
        skipped=jnp.zeros((num_tasks,), jnp.int32),
        weighed=jnp.zeros((num_tasks,), bool),
        averages=averages,
        rule_state=rule_state,
    )


def check_state(name: str, state: Any, tasks: Tasks) -> None:
    """Raises where `state` is not the state of a method for these tasks."""
    if not isinstance(state, BalanceState):
        if states_in(state):
            raise TypeError(
                f"{name}: the state is that of a whole optimizer that holds a method, a "
                f"{type(state).__name__}: give it to update of that optimizer."
            )
        raise TypeError(
            f"{name}: the state must be what init of this method returns, found a {type(state).__name__}."
        )
    shape = jnp.shape(state.weights)
    if len(shape) != 2:
        raise ValueError(
            f"{name}: the weights in the state must have the shape [blocks, tasks], found {shape}."
        )
    if shape[1] != tasks.number:
        raise ValueError(
            f"{name}: the state is for {_tasks(shape[1])}, and this method has {tasks.number}: make it by "
            "init of the same method."
        )


def check_fields(
    name: str, rule: WeightRule | UpdateRule, options: Options, state: BalanceState, updates: Any
) -> None:
    """Raises where the fields of a state are not those that `init` makes; dtypes may differ in width.

    Weights on losses need no blocks, so that any number of them passes.
    """
    blocks, num_tasks = state.weights.shape
    wanted = jax.eval_shape(
        lambda params: first_state(rule, options, num_tasks, params, blocks),
        task_tree.without_task_axis(updates),
    )
    if type(state) is not type(wanted):
        raise ValueError(
            _foreign(name, f"it is a {type(state).__name__}, not a {type(wanted).__name__}")
        )
    # The state of the rule is the last field, and its type says the most.
    for field in reversed(BalanceState._fields):
        difference = _difference(getattr(state, field), getattr(wanted, field))
        if difference:
            raise ValueError(_foreign(name, f"{field}{difference}"))


def _foreign(name: str, why: str) -> str:
    return (
        f"{name}: the state was made by another method or for other parameters: {why}. Make it by init of "
        "the same method, on the tree whose gradients update is given."
    )


def _difference(found: Any, want: Any) -> str | None:
    """Where a field of the state first differs from what it should be."""
    if jax.tree.structure(found) != jax.tree.structure(want):
        got, expected = _container(found), _container(want)
        return " has another structure" if got == expected else f" is {got}, not {expected}"
    leaves = jax.tree_util.tree_leaves_with_path(want)
    for (path, leaf), got in zip(leaves, jax.tree.leaves(found), strict=True):
        shape, dtype = jnp.shape(got), jnp.result_type(got)
        if shape != leaf.shape or _kind(dtype) != _kind(leaf.dtype):
            where = jax.tree_util.keystr(path)
            return f"{where} is {dtype}{list(shape)}, not {leaf.dtype}{list(leaf.shape)}"
    return None


def _container(tree: Any) -> str:
    if jax.tree_util.all_leaves([tree]):
        return "an array"
    return type(tree).__name__ if jax.tree.leaves(tree) else "empty"


def _kind(dtype: Any) -> Any:
    """A dtype without its width."""
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), dtype)


def _tasks(number: int) -> str:
    return "1 task" if number == 1 else f"{number} tasks"
