"""The state of a method: its fields, its initial value, and its checks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.rule import UpdateRule, WeightRule
from mtl_optax.core.types import Label
from mtl_optax.core.validation import Tasks


class BalanceState(NamedTuple):
    """The state of every method. B is the number of blocks, which is 1 for `blocks="all"`.

    Attributes:
      balance_count: int32 scalar, the number of updates.
      weights: `[B, T]`, the weights of the last update.
      kept_weights: `[B, T]`, the weights as computed last, for methods that limit them while
        `update_every` reuses them; None for other methods.
      norms: `[B, T]`, the last norms of the gradients or, with a `GradientAverage`, of the averages; None
        if the method needs none.
      cosine: `[B, T, T]`, the cosines when weights were last computed; None if the method needs none.
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
            lambda x: jnp.broadcast_to(x, (*one_block, *jnp.shape(x))), rule.init(num_tasks, dtype)
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
        kind = type(state).__name__
        if states_in(state):
            raise TypeError(
                f"{name}: the state is that of a whole optimizer that holds a method, a {kind}: give it to "
                "update of that optimizer."
            )
        raise TypeError(
            f"{name}: the state must be what init of this method returns, found a {kind}."
        )
    shape = jnp.shape(state.weights)
    if len(shape) != 2 or shape[1] != tasks.number:
        raise ValueError(
            f"{name}: the weights in the state must have the shape [blocks, {tasks.number}], found "
            f"{list(shape)}: make it by init of the same method."
        )


def check_fields(
    name: str,
    rule: WeightRule | UpdateRule,
    state: BalanceState,
    updates: optax.Updates,
    blocks: str | Label = "all",
) -> None:
    """Raises if a leaf of the state differs from what `init` returns; floats may have another width.

    The number of blocks is not checked for methods that need only losses, which accept any number.
    """
    num_blocks, num_tasks = state.weights.shape
    known = None if rule.needs & {"norms", "gram"} else num_blocks
    wanted = jax.eval_shape(
        lambda params: first_state(rule, num_tasks, params, blocks, known),
        task_tree.without_task_axis(updates),
    )
    found, wanted = _kinds(state), _kinds(wanted)
    wrong = [path for path in {**wanted, **found} if found.get(path) != wanted.get(path)]
    if wrong:
        # The state of the rule is last; its fields are those that tell methods apart.
        path = wrong[-1]
        raise ValueError(
            f"{name}: the state was made by another method or for other parameters: its leaf {path} is "
            f"{found.get(path, 'missing')}, expected {wanted.get(path, 'none')}. Make it by init of the "
            "same method, on the tree whose gradients update is given."
        )


def _kinds(state: BalanceState) -> dict[str, str]:
    """Describes every leaf by its shape and dtype, without the width of floats."""
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        dtype = jnp.result_type(leaf)
        kind = "float" if jnp.issubdtype(dtype, jnp.floating) else dtype
        described[jax.tree_util.keystr(path)] = f"{kind}{list(jnp.shape(leaf))}"
    return described


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
