"""What `check` finds by executing an optimizer on leaves of at most two elements."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from mtl_optax.core.method import PROGRAM

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
_Tree = TypeVar("_Tree")
_Node = TypeVar("_Node")
# The gradients that reach every method, by the position and the name of the method.
_Reached = dict[tuple[int, str], list[jax.Array]]
_Reach = Callable[[optax.Updates, optax.Params], _Reached]


def methods_in(program: Jaxpr) -> list[str]:
    """Returns the names of the methods whose `update` a program calls, in the order of the calls."""
    names = []
    for eqn in program.eqns:
        name = _method_of(eqn)
        if name:
            names.append(name)
            continue
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if isinstance(inner, ClosedJaxpr):
                names += methods_in(inner.jaxpr)
    return names


def fault_before_methods(
    init: Callable[[optax.Params], optax.OptState],
    update: Callable[[optax.Updates, optax.OptState, optax.Params, dict[str, object]], object],
    params: optax.Params,
    gradients: optax.Updates,
    extra_args: dict[str, object],
    num_tasks: int,
) -> str | None:
    """Detects wrong gradients at the input of the first method of each leaf.

    The gradient of a task must not depend on the gradients of other tasks, and no term of the parameters
    may be added to it. (A factor may depend on the parameters, as in
    `per_task(optax.adaptive_grad_clip(0.1), T)`.)

    Args:
      init: the `init` of the optimizer.
      update: the `update` of the optimizer.
      params: the shapes of the parameters.
      gradients: the shapes of the gradients, which have a task axis or not.
      extra_args: the arrays among the extra arguments, or their shapes. Those with the shapes of the
        parameters, such as the `noise` of `graddrop`, become as small as these.
      num_tasks: T.

    Returns:
      A sentence with the remedy, or None. It is also None if the optimizer fails on such small leaves.
    """
    extra_args = {
        name: _small(value) if _has_shapes_of(value, gradients_like(params)) else value
        for name, value in extra_args.items()
    }
    extra_args = jax.tree.map(_ones, extra_args)
    params = _small(params)
    trained = gradients_like(params)

    def with_tasks(gradient: jax.ShapeDtypeStruct, p: jax.ShapeDtypeStruct) -> object:
        tasks = gradient.shape[: gradient.ndim - p.ndim]
        return jax.ShapeDtypeStruct((*tasks, *p.shape), gradient.dtype)

    try:
        gradients = jax.tree.map(with_tasks, gradients, trained)
        trace = jax.make_jaxpr(lambda g, p, extra: update(g, init(p), p, extra))
        program = trace(gradients, params, extra_args)
        reach = jax.jit(
            lambda *trees: _what_reaches_methods(program, jax.tree.leaves((*trees, extra_args)))
        )
        method = _mixes_tasks(reach, gradients, params, num_tasks)
        if method:
            return (
                f"what stands before {method} mixes the tasks, as optax.clip_by_global_norm does with "
                "one norm over all of them: the gradient of a task depends on those of the others. Put "
                "it after the method, or apply it per task: mtl_optax.per_task(inner, tasks)."
            )
        method = _adds_parameters(reach, gradients, params)
    # Some optimizers fail on other shapes.
    except Exception:
        return None
    if method:
        return (
            f"what stands before {method} adds a term of the parameters, such as a weight decay, to the "
            "gradient of every task. Put it after the method."
        )
    return None


def _mixes_tasks(
    reach: _Reach, gradients: optax.Updates, params: optax.Params, num_tasks: int
) -> str | None:
    """Returns a method at which the gradients of one task change those of the others, or None.

    The gradients of the one task are multiplied by about a million.
    """
    quiet, weights = _numbers(gradients, 1e-2, seed=0), _numbers(params, 1.0, seed=1)
    reached = reach(quiet, weights)
    for task in range(num_tasks):
        others = np.arange(num_tasks) != task
        factors = np.where(others, 1, 1e6)

        def louder(gradient: jax.Array, p: jax.Array, factors: np.ndarray = factors) -> jax.Array:
            if gradient.ndim == p.ndim:  # it has no task axis
                return gradient
            return (gradient.T * factors).T.astype(gradient.dtype)

        loud = jax.tree.map(louder, quiet, gradients_like(params))
        method = _differs(reached, reach(loud, weights), others)
        if method:
            return method
    return None


def _adds_parameters(reach: _Reach, gradients: optax.Updates, params: optax.Params) -> str | None:
    """Returns a method at which other parameters change gradients that are all 0, or None."""
    zeros = _numbers(gradients, 0.0, seed=0)
    some, others = (_numbers(params, 1.0, seed=seed) for seed in (1, 2))
    return _differs(reach(zeros, some), reach(zeros, others), ...)


def rounded_hyperparameter(
    init: Callable[[optax.Params], optax.OptState], params: optax.Params, state: optax.OptState
) -> str | None:
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


def gradients_like(params: optax.Params) -> optax.Params:
    """Returns the tree of the gradients: the parameters, or the fast ones of `optax.lookahead`."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def leaves_in(tree: optax.Params) -> list[tuple[str, jax.Array]]:
    """Returns the leaves of a tree, with their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def nodes_in(
    tree: optax.Params, kinds: type[_Node] | tuple[type[_Node], ...]
) -> list[tuple[str, _Node]]:
    """Returns the outermost nodes of these types in a tree, with their paths."""
    is_one = lambda node: isinstance(node, kinds)  # noqa: E731
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_one)
    return [(jax.tree_util.keystr(path), node) for path, node in nodes if is_one(node)]


def _method_of(eqn: JaxprEqn) -> str | None:
    """Returns the name of the method whose program an equation calls."""
    program = str(eqn.params.get("name", ""))
    return program.removeprefix(PROGRAM) if program.startswith(PROGRAM) else None


def _what_reaches_methods(program: ClosedJaxpr, arguments: Sequence[jax.Array]) -> _Reached:
    """Evaluates a program without its methods, and returns the gradients that reach them.

    The results of a method are replaced by zeros, because a method may mix the tasks: the gradients of a
    later method of the same leaf do not change then. All branches of a `cond` are evaluated. Gradients
    that reach a method as they are in `arguments` are left out.
    """
    reached: _Reached = {}
    unchanged = set(map(id, arguments))

    def run(program: ClosedJaxpr, arguments: Sequence[jax.Array]) -> list[jax.Array]:
        variables = [*program.jaxpr.constvars, *program.jaxpr.invars]
        values = dict(zip(variables, [*program.consts, *arguments], strict=True))
        read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]  # noqa: E731
        for eqn in program.jaxpr.eqns:
            inputs, method = list(map(read, eqn.invars)), _method_of(eqn)
            if method:
                # The gradients are the last arguments. Before them are the floating inputs of the step,
                # which do not differ between two runs or are in `arguments`, and an integer, its count.
                gradients = itertools.takewhile(_is_floating, reversed(inputs))
                # Scalars, such as an extra argument, have no task axis.
                reached[len(reached), method] = [
                    g for g in gradients if id(g) not in unchanged and jnp.ndim(g) > 0
                ]
                results = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
            else:
                results = _evaluate(eqn, inputs, run)
            values.update(zip(eqn.outvars, results, strict=True))
        return list(map(read, program.jaxpr.outvars))

    run(program, arguments)
    return reached


def _evaluate(
    eqn: JaxprEqn,
    inputs: list[jax.Array],
    run: Callable[[ClosedJaxpr, Sequence[jax.Array]], list[jax.Array]],
) -> list[jax.Array]:
    """Evaluates an equation; `run` evaluates the programs in it that may call a method."""
    kind = eqn.primitive.name
    called = eqn.params.get("jaxpr" if kind in ("jit", "pjit") else "call_jaxpr")
    if isinstance(called, ClosedJaxpr):
        return run(called, inputs)
    if kind == "cond":
        index, *operands = inputs
        branches = [run(branch, operands) for branch in eqn.params["branches"]]
        return [lax.select_n(index, *cases) for cases in zip(*branches, strict=True)]
    results = eqn.primitive.bind(*inputs, **eqn.params)
    return results if eqn.primitive.multiple_results else [results]


def _is_floating(x: jax.Array) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _differs(reached: _Reached, other: _Reached, rows: np.ndarray | EllipsisType) -> str | None:
    """Returns the name of the first method whose gradients differ between two runs in these rows."""
    for (place, name), gradients in reached.items():
        for one, two in zip(gradients, other[place, name], strict=True):
            one, two = (np.asarray(x, float)[rows] for x in (one, two))
            if not np.allclose(one, two, rtol=1e-3, atol=0, equal_nan=True):
                return name
    return None


def _numbers(tree: _Tree, scale: float, seed: int) -> _Tree:
    """Draws arrays for a tree of shapes."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.asarray(scale * random.standard_normal(x.shape), x.dtype), tree
    )


def _small(tree: _Tree) -> _Tree:
    """Reduces each leaf to at most two elements, along the first dimension of size 2 or more."""

    def small(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = [min(size, 1) for size in leaf.shape]
        for axis in [axis for axis, size in enumerate(leaf.shape) if size > 1][:1]:
            shape[axis] = 2
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    return jax.tree.map(small, tree)


def _has_shapes_of(tree: object, other: object) -> bool:
    """Whether two trees have the same structure, and leaves of the same shapes."""
    shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]  # noqa: E731
    return jax.tree.structure(tree) == jax.tree.structure(other) and shapes(tree) == shapes(other)


def _ones(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Replaces a shape by an array of ones."""
    return jnp.ones(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _is_narrow(leaf: object) -> bool:
    return getattr(leaf, "dtype", None) in (jnp.bfloat16, jnp.float16)
