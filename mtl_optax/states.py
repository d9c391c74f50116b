"""Reads the state of a method, and moves it to other tasks."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax.core.method import Method
from mtl_optax.core.state import BalanceState, check_state, states_in
from mtl_optax.core.task_tree import assign_blocks

State = TypeVar("State", bound=optax.OptState)


def diagnostics(
    state: optax.OptState, method: Method | None = None, params: optax.Params | None = None
) -> dict[str, Any]:
    """Reads weights, norms, cosines and counts of skipped tasks from the state of an optimizer.

    `state` is the state of a method, the state of a chain or wrapper around it, or a fork's carrier. It
    works inside jit too. The state contains no names: pass the method for the names of tasks, and also
    the parameters for the names of blocks.

    Args:
      state: any pytree with the state of at least one method of this library.
      method: the `Method` of the state. Without it, tasks are numbered.
      params: the parameters, of which only the shapes are used. Without them, blocks are numbered.

    Returns:
      A dictionary with `weights` `[T]`, the weights of the last update (see the method); `norms`
      `[T]` and `cosines` `[T, T]`, if the method computes them; with the cosines also `alignment`,
      `2 |mean_t g_t / |g_t||^2 - 1`, which is 1 if all gradients have the same direction; `skipped`
      `[T]`, how often each task was excluded because it was not finite; `fallback_count`, the number of
      steps without a solution, for `nash_mtl`, `fairgrad`, `scale_by_pub`, `epo`, `pcd`, `gradnorm` and
      methods that are built on them; and `steps`, the number of updates. With several blocks, all
      entries except `skipped` and `steps` have a leading block axis, or are dictionaries by block name.
      With task names, each task axis becomes a dictionary. If the state contains several methods, the
      dictionary has the entries of the first method, and `all` is a list with the entries of every method.

    Raises:
      ValueError: if `state` contains no state of a method, or `method` or `params` do not match it.

    References:
      The alignment score: Wang et al., Gradient Alignment in Physics-informed Neural Networks, 2025,
      https://arxiv.org/abs/2502.00604

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.metabalance(("click", "buy"), target="buy", relax_factor=1.0)
      >>> params, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([[3., 4.], [0., 10.]])}
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> {name: float(w) for name, w in mtl.diagnostics(state, tx)["weights"].items()}
      {'buy': 1.0, 'click': 0.5}
    """
    found = [_read(node, method, params) for node in _states("diagnostics", state)]
    return found[0] if len(found) == 1 else {**found[0], "all": found}


def head_weights(state: optax.OptState) -> jax.Array:
    """Returns one weight per task, for the heads in papers that weight the losses.

    Args:
      state: any pytree with the state of a method of this library.

    Returns:
      `[T]`: the weights of the last update, averaged over blocks.

    Raises:
      ValueError: if there is no state of a method in `state`.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.fixed_weights(2, [1.0, 0.5])
      >>> _, state = tx.update(jnp.eye(2), tx.init(jnp.zeros(2)))
      >>> mtl.head_weights(state).tolist()
      [1.0, 0.5]
    """
    return jnp.mean(jnp.asarray(_states("head_weights", state)[0].weights), axis=0)


def change_tasks(state: State, old: Method, new: Method, params: optax.Params) -> State:
    """Adds tasks to the state of a method, or removes tasks from it; the others keep what it remembers.

    Tasks are matched by name. Weights, norms, averages, counts and the state of the rule of a task that
    both methods have are copied; a new task has the entries of `new.init`, as in a first step. What is not
    per task, such as the number of steps, is copied. Weights that are learned on the simplex are copied as
    they are; the next update of the rule normalises them.

    Args:
      state: the state of `old`, or any pytree that contains it, such as the state of a chain.
      old: the method of the state, with task names.
      new: a method of the same factory and options, with other task names and another number of tasks. To
        exchange a task, remove it first and then add the other.
      params: what `old.init` was given: the parameters, or the representation. Only shapes are used.

    Returns:
      The state for `new`, on which `new.update` continues.

    Raises:
      ValueError: if the number of tasks is the same, or `state` is not of `old` and `params`.
      TypeError: if the tasks have no names, or the methods are not of the same factory.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> old = mtl.inverse_norm(("click", "buy"))
      >>> new = mtl.inverse_norm(("click", "buy", "like"))
      >>> params, grads = jnp.zeros(2), jnp.array([[2., 0.], [0., 4.]])
      >>> _, state = old.update(grads, old.init(params))
      >>> mtl.change_tasks(state, old, new, params).norms.tolist()  # buy, click, like
      [[2.0, 4.0, 0.0]]
    """
    for method in (old, new):
        if not isinstance(method, Method) or method.task_names is None:
            raise TypeError(
                f"change_tasks: expected a method with task names, found {method!r}: tasks are matched "
                "by name."
            )
    if old.name != new.name:
        raise TypeError(
            f"change_tasks: both methods must be of one factory, found {old.name} and {new.name}."
        )
    if old.num_tasks == new.num_tasks:
        raise ValueError(
            f"change_tasks: both methods have {old.num_tasks} tasks. To exchange a task, remove it first, "
            "and then add the other."
        )
    fresh, before, after = new.init(params), old.task_names or (), new.task_names or ()
    is_state = lambda node: isinstance(node, BalanceState)  # noqa: E731

    def change(node: optax.OptState) -> optax.OptState:
        if not is_state(node):
            return node
        check_state("change_tasks", node, old.tasks)
        if jax.tree.structure(node) != jax.tree.structure(fresh):
            raise ValueError(f"change_tasks: the state was not made by {old!r}.")
        return jax.tree.map(functools.partial(_move, before, after), node, fresh)

    _states("change_tasks", state)
    return jax.tree.map(change, state, is_leaf=is_state)


def _move(
    before: tuple[str, ...], after: tuple[str, ...], leaf: jax.Array, fresh: jax.Array
) -> jax.Array:
    """Copies the entries of the tasks in `before` and `after`, along every axis of tasks, into `fresh`."""
    shapes = jnp.shape(leaf), jnp.shape(fresh)
    differ = [axis for axis, (a, b) in enumerate(zip(*shapes, strict=False)) if a != b]
    sizes = len(before), len(after)
    if len(shapes[0]) != len(shapes[1]) or any(
        (shapes[0][axis], shapes[1][axis]) != sizes for axis in differ
    ):
        raise ValueError(
            f"change_tasks: a leaf of the state has the shape {shapes[0]}, and that of the new method "
            f"{shapes[1]}: give the params that init of the old method was given."
        )
    if not differ:
        return leaf
    both = [name for name in before if name in after]
    for axis in differ:
        leaf = jnp.take(leaf, np.array([before.index(name) for name in both], int), axis)
    places = [np.arange(size) for size in shapes[1]]
    for axis in differ:
        places[axis] = np.array([after.index(name) for name in both], int)
    return fresh.at[np.ix_(*places)].set(leaf)


def _states(name: str, tree: optax.Params) -> list[BalanceState]:
    states = states_in(tree)
    if not states:
        raise ValueError(
            f"{name}: no state of a method of mtl_optax in a {type(tree).__name__}; give the optimizer "
            "state that holds it."
        )
    return states


def _read(
    state: BalanceState, method: Method | None, params: optax.Params | None
) -> dict[str, Any]:
    if method is not None and not isinstance(method, Method):
        raise ValueError(
            "diagnostics: method must be what a method's factory returned, found a "
            f"{type(method).__name__}; of a chain give the method inside it."
        )
    tasks = None if method is None else method.task_names
    blocks = _block_names(state, method, params)
    read = {}
    # The last entry is the number of task axes, which are the last axes of the array.
    for key, array, axes in (
        ("weights", state.weights, 1),
        ("norms", state.norms, 1),
        ("cosines", state.cosine, 2),
        ("alignment", _alignment(state.cosine), 0),
        ("fallback_count", _fallback_count(state.rule_state), 0),
    ):
        if array is None:
            continue
        # The counts of an `UpdateRule` have no axis of blocks.
        array = jnp.atleast_1d(array)
        if array.shape[0] == 1:
            read[key] = _by_task(array[0], tasks, axes)
        elif blocks is None:
            read[key] = _by_task(array, tasks, axes)
        else:
            rows = (_by_task(row, tasks, axes) for row in array)
            read[key] = dict(zip(blocks, rows, strict=True))
    return {
        **read,
        "skipped": _by_task(_integers(state.skipped), tasks, 1),
        "steps": _integers(state.balance_count),
    }


def _alignment(cosine: jax.Array | None) -> jax.Array | None:
    """Computes the alignment score of the nonzero gradients in each block, `[B]`."""
    if cosine is None:
        return None
    cosine = jnp.asarray(cosine)
    nonzero = jnp.sum(jnp.diagonal(cosine, axis1=-2, axis2=-1), axis=-1)
    return 2 * jnp.sum(cosine, axis=(-2, -1)) / jnp.maximum(nonzero, 1) ** 2 - 1


def _fallback_count(rule_state: optax.OptState) -> jax.Array | None:
    """Returns the fallback count of the rule, or of its base, in each block, `[B]`."""
    for _, count in optax.tree.get_all_with_path(rule_state, "fallback_count"):
        return _integers(count)
    return None


def _by_task(array: jax.Array, names: tuple[str, ...] | None, axes: int) -> Any:
    """Converts the last `axes` axes of an array to nested dictionaries, if the tasks have names."""
    if names is None or axes == 0:
        return array
    rows = jnp.moveaxis(array, -axes, 0)
    return {name: _by_task(row, names, axes - 1) for name, row in zip(names, rows, strict=True)}


def _block_names(
    state: BalanceState, method: Method | None, params: optax.Params | None
) -> tuple[str, ...] | None:
    if params is None:
        return None
    blocks = assign_blocks(params, "leaf" if method is None else method.options.blocks)
    if blocks.count != state.weights.shape[0]:
        raise ValueError(
            f"diagnostics: the state has {state.weights.shape[0]} blocks, and these parameters give "
            f"{blocks.count}. Give the parameters of `init`, and the method for blocks other than leaves."
        )
    return blocks.names


def _integers(leaf: object) -> jax.Array:
    """Returns integers; decodes them from 16-bit halves if they are encoded in a fork's carrier."""
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    halves = [leaf[..., k].astype(jnp.int32) << (16 * k) for k in range(leaf.shape[-1])]
    return sum(halves, jnp.zeros(leaf.shape[:-1], jnp.int32))
