"""What `check` finds by running an optimizer on leaves of at most two elements."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax.core.method import update_calls

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def fault_before_methods(
    init: Any, update: Any, params: optax.Params, gradients: optax.Updates, num_tasks: int
) -> str | None:
    """What is wrong with the gradients that reach the first method of each leaf.

    The gradient of a task must not depend on those of the others: from one run to the next, half of them
    grow by a factor of a million, and the other half must stay. And no term of the parameters may be
    added to it: where all gradients are zero, other parameters must change nothing. (That a factor
    depends on the parameters, as in `per_task(optax.adaptive_grad_clip(0.1), T)`, is right.)

    Args:
      init: that of the optimizer.
      update: that of the optimizer.
      params: shapes.
      gradients: shapes, those of the parameters with or without a task axis.
      num_tasks: T.

    Returns:
      A sentence with the remedy, or None; None also where the optimizer refuses such small leaves.
    """
    reach = _what_reaches_methods(init, update)
    random = np.random.default_rng(0)

    def numbers(tree: optax.Params, scale: float) -> Any:
        draw = lambda x: jnp.asarray(scale * random.standard_normal(x.shape), x.dtype)  # noqa: E731
        return jax.tree.map(draw, tree)

    def with_tasks(gradient: Any, param: Any) -> Any:
        tasks = gradient.shape[: gradient.ndim - param.ndim]
        return jax.ShapeDtypeStruct((*tasks, *param.shape), gradient.dtype)

    params = _small(params)
    trained = gradients_like(params)
    try:
        gradients = jax.tree.map(with_tasks, gradients, trained)
        if not jax.eval_shape(reach, gradients, params):
            return None
        quiet, loud = numbers(gradients, 1e-2), numbers(gradients, 1e4)
        weights, others = numbers(params, 1.0), numbers(params, 1.0)
        reached = reach(quiet, weights)
        for is_loud in _halves(num_tasks):
            louder = jax.tree.map(functools.partial(_choose, is_loud), quiet, loud, trained)
            method = _differs(reached, reach(louder, weights), rows=~is_loud)
            if method:
                return (
                    f"what stands before {method} mixes the tasks, as optax.clip_by_global_norm does with "
                    "one norm over all of them: the gradient of a task depends on those of the others. "
                    "Put it after the method, or lift it over the tasks: mtl_optax.per_task(inner, tasks)."
                )
        zeros = jax.tree.map(jnp.zeros_like, quiet)
        method = _differs(reach(zeros, weights), reach(zeros, others), rows=...)
    # Not every optimizer works on other shapes, or outside of a branch of `lax.cond`.
    except Exception:
        return None
    if method:
        return (
            f"what stands before {method} adds a term of the parameters, such as a weight decay, to the "
            "gradient of every task. Put it after the method."
        )
    return None


def rounded_hyperparameter(init: Any, params: optax.Params, state: optax.OptState) -> str | None:
    """Which number `optax.inject_hyperparams` rounds to another one in the dtype of the parameters.

    That is one that moves, or whose distance from 1 moves, by more than a tenth, as a decay of 0.999 in
    bfloat16, which is 1.

    Args:
      init: that of the optimizer.
      params: shapes.
      state: the shapes of its state.

    Returns:
      A sentence with the remedy, or None.
    """
    injected = [node.hyperparams for _, node in nodes_in(state, _INJECTED)]
    if not any(map(_is_narrow, jax.tree.leaves(injected))):
        return None
    narrow = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _small(params))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_narrow(x) else x, narrow)
    try:
        states = [nodes_in(init(like), _INJECTED) for like in (narrow, wide)]
    # Not every optimizer works on other shapes.
    except Exception:
        return None
    for (path, node), (_, meant) in zip(*states, strict=True):
        for name, value in node.hyperparams.items():
            if not _is_narrow(value):
                continue
            got, was = (np.ravel(np.asarray(x, float)) for x in (value, meant.hyperparams[name]))
            moved = abs(got - was) > 0.1 * np.minimum(abs(was), abs(1 - was))
            if moved.any():
                return (
                    f"optax.inject_hyperparams, found at state{path}, rounds {name} from "
                    f"{was[moved][0]:g} to {got[moved][0]:g} in {value.dtype}, the dtype of the "
                    "parameters. Give it hyperparam_dtype=jnp.float32, or name this argument in "
                    "static_args."
                )
    return None


def gradients_like(params: optax.Params) -> Any:
    """The tree of the gradients; the parameters of `optax.lookahead` are a pair, of which they know one."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def leaves_in(tree: optax.Params) -> list[tuple[str, Any]]:
    """The leaves of a tree, with their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def nodes_in(tree: optax.Params, kinds: type | tuple[type, ...]) -> list[tuple[str, Any]]:
    """The outermost nodes of these types in a tree, with their paths."""
    is_one = lambda node: isinstance(node, kinds)  # noqa: E731
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_one)
    return [(jax.tree_util.keystr(path), node) for path, node in nodes if is_one(node)]


def _what_reaches_methods(init: Any, update: Any) -> Any:
    """A function from gradients and parameters to what the first method of each leaf is given.

    The result is a dictionary by method and path, without the gradients that nothing has changed. A
    later method of the same leaf does not count: between two methods tasks are meant to meet.
    """

    @jax.jit
    def reach(gradients: optax.Updates, params: optax.Params) -> dict[tuple[str, str], jax.Array]:
        came, first = dict(leaves_in(gradients)), {}
        # What is raised behind the methods changes nothing of what has reached them.
        with update_calls() as calls, suppress(Exception), jax.numpy_rank_promotion("allow"):
            update(gradients, init(params), params)
        for method, updates in calls:
            for path, leaf in leaves_in(updates):
                first.setdefault(path, (method.name, leaf))
        return {
            (name, path): leaf for path, (name, leaf) in first.items() if leaf is not came.get(path)
        }

    return reach


def _halves(num_tasks: int) -> Iterator[np.ndarray]:
    """Masks `[T]` of which, for any two tasks, one holds the first and not the second.

    There are two for each binary digit of the tasks' numbers, since any two differ in some digit.
    """
    tasks = np.arange(num_tasks)
    for digit in range((num_tasks - 1).bit_length()):
        has_digit = tasks >> digit & 1 == 1
        yield has_digit
        yield ~has_digit


def _choose(is_loud: np.ndarray, quiet: Any, loud: Any, param: Any) -> Any:
    """The rows of a leaf for all tasks; without a task axis it is left quiet."""
    if quiet.ndim == param.ndim:
        return quiet
    return jnp.where(is_loud.reshape(-1, *[1] * param.ndim), loud, quiet)


def _differs(reached: dict[tuple[str, str], Any], other: Any, rows: Any) -> str | None:
    """The first method, and leaf, that two runs give other rows."""
    for key, leaf in reached.items():
        if not jnp.allclose(leaf[rows], other[key][rows], rtol=1e-3, atol=0, equal_nan=True):
            return "{} (leaf {})".format(*key)
    return None


def _small(tree: optax.Params) -> Any:
    """Of each leaf at most two elements, along the first dimension that has two."""

    def small(leaf: jax.Array) -> Any:
        shape = [min(size, 1) for size in leaf.shape]
        for axis in [axis for axis, size in enumerate(leaf.shape) if size > 1][:1]:
            shape[axis] = 2
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    return jax.tree.map(small, tree)


def _is_narrow(leaf: jax.Array) -> bool:
    return getattr(leaf, "dtype", None) in (jnp.bfloat16, jnp.float16)
