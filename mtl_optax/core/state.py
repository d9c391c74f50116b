"""The state of a method: its fields, the first one, and the check that a state is one of a method's own."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.rule import UpdateRule, WeightRule
from mtl_optax.core.tasks import Tasks
from mtl_optax.core.types import DType, Label


class BalanceState(NamedTuple):
    """The state of every method. B is the number of blocks, 1 with `blocks="all"`.

    Attributes:
      balance_count: int32 scalar, updates done.
      weights: `[B, T]`, the weights used last.
      kept_weights: `[B, T]`, the weights computed last, for methods that use smaller ones where
        `update_every` keeps them for gradients that have grown too much; None for others.
      norms: `[B, T]`, the gradient norms seen last; None if the method needs none.
      cosine: `[B, T, T]`, the cosines seen last; None if the method needs none.
      skipped: int32 `[T]`, how often each task was excluded because it was not finite: a number in its
        gradient or its loss, or the sum of its squared numbers (a norm above 1.8e19 in float32).
      weighed: bool `[T]`, the tasks for which `weights` were computed.
      averages: what the method keeps of the gradients themselves; None for most methods.
      rule_state: what the rule remembers; with a block axis for methods that give weights.
    """

    balance_count: jax.Array
    weights: jax.Array
    kept_weights: jax.Array | None
    norms: jax.Array | None
    cosine: jax.Array | None
    skipped: jax.Array
    weighed: jax.Array
    averages: optax.OptState | None
    rule_state: optax.OptState


def first_state(
    rule: WeightRule | UpdateRule,
    num_tasks: int,
    params: optax.Params,
    blocks: str | Label,
    num_blocks: int | None = None,
) -> BalanceState:
    """What `init` returns.

    Args:
      rule: the mathematics of the method.
      num_tasks: T.
      params: the parameters; shapes are enough.
      blocks: the granularity, which gives the number of blocks.
      num_blocks: B, if it is known already.

    Returns:
      The state.
    """
    dtype = task_tree.statistics_dtype(params)
    needs: frozenset[str] = frozenset()
    kept_weights = averages = None
    if isinstance(rule, UpdateRule):
        num_blocks, rule_state = 1, rule.init(params, num_tasks, dtype)
    else:
        if num_blocks is None:
            num_blocks = task_tree.assign_blocks(params, blocks).count
        needs, one_block = rule.needs, (num_blocks,)
        rule_state = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (*one_block, *jnp.shape(x))), rule.init(dtype)
        )
        if rule.average is not None:
            averages = rule.average.init(params, num_tasks, dtype)
        if rule.bound is not None:
            kept_weights = jnp.zeros((num_blocks, num_tasks), dtype)
    norms = jnp.zeros((num_blocks, num_tasks), dtype) if needs & {"norms", "gram"} else None
    cosine = jnp.zeros((num_blocks, num_tasks, num_tasks), dtype) if "gram" in needs else None
    return BalanceState(
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


def check_state(name: str, state: BalanceState | optax.OptState, tasks: Tasks) -> None:
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
    name: str, rule: WeightRule | UpdateRule, state: BalanceState, updates: optax.Updates
) -> None:
    """Raises where the fields of a state are not those that `init` makes; dtypes may differ in width.

    Weights on losses need no blocks, so that any number of them passes.
    """
    blocks, num_tasks = state.weights.shape
    wanted = jax.eval_shape(
        lambda params: first_state(rule, num_tasks, params, "all", blocks),
        task_tree.without_task_axis(updates),
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


def _difference(found: optax.OptState, want: optax.OptState) -> str | None:
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


def _container(tree: optax.OptState) -> str:
    if tree is None:
        return "empty"
    if jax.tree_util.all_leaves([tree]):
        return "an array"
    return type(tree).__name__ if jax.tree.leaves(tree) else "empty"


def _kind(dtype: DType) -> object:
    """A dtype without its width."""
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), dtype)


def _tasks(number: int) -> str:
    return "1 task" if number == 1 else f"{number} tasks"


def states_in(tree: optax.OptState) -> list[BalanceState]:
    """The states of methods in any tree that holds some: of a chain, a wrapper, a fork's carrier."""
    is_state = lambda node: isinstance(node, BalanceState)  # noqa: E731
    return [node for node in jax.tree.leaves(tree, is_leaf=is_state) if is_state(node)]


def next_count(count: jax.Array, happened: bool | jax.Array = True) -> jax.Array:
    """Counts up if something `happened`; past the largest int32 it goes on from 2**30.

    A counter that stopped there would freeze every random stream folded from it, and one that wrapped
    to 0 would look like a first step.
    """
    last = jnp.asarray(np.iinfo(np.int32).max, count.dtype)
    following = jnp.where(count == last, jnp.asarray(2**30, count.dtype), count + 1)
    return jnp.where(happened, following, count)
