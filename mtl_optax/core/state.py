"""The state of a method: its fields, its initial value, and its checks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.rule import UpdateRule, WeightRule
from mtl_optax.core.types import DType, Label
from mtl_optax.core.validation import Tasks


class BalanceState(NamedTuple):
    """The state of every method. B is the number of blocks, which is 1 for `blocks="all"`.

    Attributes:
      balance_count: int32 scalar, the number of updates.
      weights: `[B, T]`, the weights of the last update.
      kept_weights: `[B, T]`, the weights as computed last, for methods that limit them while
        `update_every` reuses them; None for other methods.
      norms: `[B, T]`, the last gradient norms; None if the method needs none.
      cosine: `[B, T, T]`, the last cosines; None if the method needs none.
      skipped: int32 `[T]`, how often each task was excluded because its loss, an entry of its gradient or
        its squared gradient norm was not finite (in float32, a norm above 1.8e19).
      weighed: bool `[T]`, the tasks for which `weights` were computed.
      averages: buffers of the size of the gradients; None for most methods.
      rule_state: the state of the rule; it has a block axis if the rule is a `WeightRule`.
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
    """Returns the initial state of a method.

    Args:
      rule: the mathematics of the method.
      num_tasks: T.
      params: the parameters, of which only shapes and dtypes are used.
      blocks: the option `blocks`, which determines the number of blocks.
      num_blocks: B, if it is already known.

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
    """Raises if `state` is not the state of a method for these tasks."""
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
    """Raises if a field of the state differs from what `init` returns; dtypes may differ in width.

    The number of blocks is not checked, because methods on losses accept any number.
    """
    blocks, num_tasks = state.weights.shape
    wanted = jax.eval_shape(
        lambda params: first_state(rule, num_tasks, params, "all", blocks),
        task_tree.without_task_axis(updates),
    )
    # The state of the rule is the last field; its type names the method, so it is checked first.
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
    """Describes the first difference between a field of the state and the expected one."""
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
    """Returns the kind of a dtype, without its width."""
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), dtype)


def _tasks(number: int) -> str:
    return "1 task" if number == 1 else f"{number} tasks"


def states_in(tree: optax.OptState) -> list[BalanceState]:
    """Returns the states of methods in a tree, such as the state of a chain or a fork's carrier."""
    is_state = lambda node: isinstance(node, BalanceState)  # noqa: E731
    return [node for node in jax.tree.leaves(tree, is_leaf=is_state) if is_state(node)]


def next_count(count: jax.Array, happened: bool | jax.Array = True) -> jax.Array:
    """Increments a counter if `happened`; after the largest int32 it continues at 2**30.

    A counter that stopped there would repeat the random numbers that depend on it, and a counter that
    wrapped to 0 would repeat the first step.
    """
    last = jnp.asarray(np.iinfo(np.int32).max, count.dtype)
    following = jnp.where(count == last, jnp.asarray(2**30, count.dtype), count + 1)
    return jnp.where(happened, following, count)
