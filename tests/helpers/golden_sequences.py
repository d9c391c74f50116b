"""Sequences of updates of the methods that look at the Gram matrix, against reference numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import (
    error,
)

TOLERANCE = 1e-7


def each_step(
    cases: list[Any], keep: Callable[[Any], bool] = lambda step: True
) -> list[tuple[int, int, Any]]:
    """`(case number, step number, step)` of the steps that a check compares."""
    steps = [row for row in all_steps(cases) if keep(row[2])]
    assert steps
    return steps


def all_steps(cases: list[Any]) -> list[tuple[int, int, Any]]:
    return [(i, k, step) for i, case in enumerate(cases) for k, step in enumerate(case["steps"])]


def pad_steps(cases: list[Any], pick: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`pick(step)`, of the given shape, as `[cases, steps, *shape]`; zeros after the last step."""
    steps = max(len(case["steps"]) for case in cases)
    result = np.zeros((len(cases), steps, *shape))
    for i, k, step in all_steps(cases):
        result[i, k] = pick(step)
    return result


def products(left: Any, right: Any, size: int) -> np.ndarray:
    """Inner products of two batches' gradients, padded to `[size, size]`."""
    inner = np.asarray(left) @ np.asarray(right).T
    result = np.zeros((size, size))
    result[: len(inner), : len(inner)] = inner
    return result


def shares(simplex_weights: Any) -> np.ndarray:
    """Of what a case's tasks hold together: the absent ones that pad it keep their part."""
    return np.asarray(simplex_weights) / np.sum(simplex_weights)


def tree_of(flat: Any, shapes: Any) -> Any:
    return {name: np.asarray(flat[name], float).reshape(shape) for name, shape in shapes.items()}


def stack_tasks(gradients: Any, shapes: Any) -> Any:
    trees = [tree_of(g, shapes) for g in gradients]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def run_trees(transformation: Any, case: Any, losses: Any = None) -> Any:
    """Updates of a sequence of stacked trees, the step axis first."""
    steps = [stack_tasks(g, case["shapes"]) for g in case["grads"]]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    given = None if losses is None else jnp.asarray(losses)

    def step(state: Any, inputs: Any) -> Any:
        g, losses = inputs
        extra = {} if losses is None else {"losses": losses}
        update, state = transformation.update(g, state, **extra)
        return state, update

    start = transformation.init({n: jnp.zeros(s) for n, s in case["shapes"].items()})
    return jax.jit(lambda: jax.lax.scan(step, start, (stacked, given))[1])()


def compare_trees(case: Any, updates: Any, tolerance: float) -> None:
    assert len(case["outputs"]["total"]) == len(case["grads"])
    for k, want in enumerate(case["outputs"]["total"]):
        for name, leaf in tree_of(want, case["shapes"]).items():
            assert error(updates[name][k], leaf) <= tolerance, (case["name"], k, name)
