"""The part of `check` that executes an optimizer, on leaves of at most two elements."""

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
    """Detects wrong gradients at the input of the first method of each leaf.

    The gradient of a task must not depend on the gradients of other tasks. To test this, half of the
    gradients are multiplied by about a million, and the others must not change. No term of the parameters
    may be added to a gradient. To test this, all gradients are 0, and a change of the parameters must
    have no effect. (A factor may depend on the parameters, as in
    `per_task(optax.adaptive_grad_clip(0.1), T)`.)

    Args:
      init: the `init` of the optimizer.
      update: the `update` of the optimizer.
      params: the shapes of the parameters.
      gradients: the shapes of the gradients, which have a task axis or not.
      num_tasks: T.

    Returns:
      A sentence with the remedy, or None. It is also None if the optimizer fails on such small leaves.
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
    # Some optimizers fail on other shapes, or call methods in a branch of `lax.cond`.
    except Exception:
        return None
    if method:
        return (
            f"what stands before {method} adds a term of the parameters, such as a weight decay, to the "
            "gradient of every task. Put it after the method."
        )
    return None


def rounded_hyperparameter(init: Any, params: optax.Params, state: optax.OptState) -> str | None:
    """Detects a number that `optax.inject_hyperparams` changes by rounding to the parameters' dtype.

    The number, or its distance from 1, must change by more than a tenth. For example, a decay of 0.999
    becomes 1 in bfloat16.

    Args:
      init: the `init` of the optimizer.
      params: the shapes of the parameters.
      state: the shapes of the state.

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
    # Some optimizers fail on other shapes.
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
    """Returns the tree of the gradients: the parameters, or the fast ones of `optax.lookahead`."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def leaves_in(tree: optax.Params) -> list[tuple[str, Any]]:
    """Returns the leaves of a tree, with their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def nodes_in(tree: optax.Params, kinds: type | tuple[type, ...]) -> list[tuple[str, Any]]:
    """Returns the outermost nodes of these types in a tree, with their paths."""
    is_one = lambda node: isinstance(node, kinds)  # noqa: E731
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_one)
    return [(jax.tree_util.keystr(path), node) for path, node in nodes if is_one(node)]


def _what_reaches_methods(init: Any, update: Any) -> Any:
    """Returns a function from gradients and parameters to the inputs of the first method of each leaf.

    The function returns a dictionary by method and path, without gradients that are unchanged. Later
    methods of the same leaf are ignored, because the first method may mix the tasks.
    """

    @jax.jit
    def reach(gradients: optax.Updates, params: optax.Params) -> dict[tuple[str, str], jax.Array]:
        came, first = dict(leaves_in(gradients)), {}
        # An error after the methods does not affect their recorded inputs.
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
    """Yields masks `[T]` such that, for any two tasks, one mask has the first but not the second.

    There are two masks per binary digit of the task index, because two indices differ in a digit.
    """
    tasks = np.arange(num_tasks)
    for digit in range((num_tasks - 1).bit_length()):
        has_digit = tasks >> digit & 1 == 1
        yield has_digit
        yield ~has_digit


def _choose(is_loud: np.ndarray, quiet: Any, loud: Any, param: Any) -> Any:
    """Selects the row of each task from `loud` or `quiet`; without a task axis it returns `quiet`."""
    if quiet.ndim == param.ndim:
        return quiet
    return jnp.where(is_loud.reshape(-1, *[1] * param.ndim), loud, quiet)


def _differs(reached: dict[tuple[str, str], Any], other: Any, rows: Any) -> str | None:
    """Describes the first method and leaf whose rows differ between two runs."""
    for key, leaf in reached.items():
        if not jnp.allclose(leaf[rows], other[key][rows], rtol=1e-3, atol=0, equal_nan=True):
            return "{} (leaf {})".format(*key)
    return None


def _small(tree: optax.Params) -> Any:
    """Reduces each leaf to at most two elements, along the first dimension of size 2 or more."""

    def small(leaf: jax.Array) -> Any:
        shape = [min(size, 1) for size in leaf.shape]
        for axis in [axis for axis, size in enumerate(leaf.shape) if size > 1][:1]:
            shape[axis] = 2
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    return jax.tree.map(small, tree)


def _is_narrow(leaf: jax.Array) -> bool:
    return getattr(leaf, "dtype", None) in (jnp.bfloat16, jnp.float16)
