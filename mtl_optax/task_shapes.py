"""Checks at trace time that a tree is one gradient per task: what was found, where, what to do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax.task_tree import TaskRows, is_leaf


def check_updates(name: str, updates: Any, num_tasks: int, params: Any = None) -> None:
    """Raises where `updates` is not one gradient per task, saying what was found and where."""
    leaves = jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_leaf)
    if params is not None:
        _check_structure(name, updates, params)
        expected = [(num_tasks, *jnp.shape(p)) for p in jax.tree.leaves(params)]
    else:
        expected = [(num_tasks, *_shape(leaf)[1:]) for _, leaf in leaves]
    wrong = [
        (path, _shape(leaf), shape)
        for (path, leaf), shape in zip(leaves, expected, strict=True)
        if _shape(leaf) != shape
    ]
    for path, leaf in leaves:
        dtype = leaf.dtype if isinstance(leaf, TaskRows) else jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}: gradients must be real floating point; leaf {_where(path)} is {dtype}."
            )
    if wrong:
        found = "; ".join(
            f"leaf {_where(path)} has shape {got}, expected {want}" for path, got, want in wrong[:3]
        )
        more = f" (and {len(wrong) - 3} more leaves)" if len(wrong) > 3 else ""
        raise ValueError(
            f"{name}: updates must carry a leading task axis of size {num_tasks}: {found}{more}. "
            + _remedy(wrong, num_tasks)
        )


def check_not_stacked_like(name: str, updates: Any, seen: set[Any]) -> None:
    """Catches un-stacked gradients whose first dimension happens to equal the number of tasks.

    Without `params` the shapes alone cannot tell; the shapes that `init` saw can.
    """
    if seen and _shapes(updates, 1) not in seen and _shapes(updates, 0) in seen:
        path, leaf = jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_leaf)[0]
        raise ValueError(
            f"{name}: updates have the shapes of the parameters (leaf {_where(path)}: "
            f"{_shape(leaf)}); the first dimension is no task axis. " + _ALREADY_SUMMED
        )


def shapes_of(params: Any) -> Any:
    """Structure and shapes of a tree, hashable."""
    return _shapes(params, 0)


def _shapes(tree: Any, drop: int) -> Any:
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
    return treedef, tuple(_shape(leaf)[drop:] for leaf in leaves)


def _shape(leaf: Any) -> tuple[int, ...]:
    return leaf.shape if isinstance(leaf, TaskRows) else jnp.shape(leaf)


_ALREADY_SUMMED = (
    "The gradients were already summed over tasks, or are one task's: take one gradient per task "
    "with mtl_optax.per_task_value_and_grad and put this transformation before the optimizer."
)


def _remedy(wrong: list[tuple[Any, tuple[int, ...], tuple[int, ...]]], num_tasks: int) -> str:
    if all(got == want[1:] for _, got, want in wrong):
        return _ALREADY_SUMMED
    if all(got[1:] == want[1:] and got for _, got, want in wrong):
        sizes = sorted({got[0] for _, got, _ in wrong})
        return (
            f"The task axis has size {', '.join(map(str, sizes))} but num_tasks={num_tasks}: give "
            "the number of losses that loss_fn returns."
        )
    if all(got[1 : len(got)] == want[1 : len(got)] for _, got, want in wrong if got):
        return (
            "Every leaf needs the task axis first: take gradients with "
            "mtl_optax.per_task_value_and_grad."
        )
    return (
        "Stack one gradient per task along axis 0 of every leaf, as "
        "mtl_optax.per_task_value_and_grad does."
    )


def _check_structure(name: str, updates: Any, params: Any) -> None:
    got = jax.tree.structure(updates, is_leaf=is_leaf)
    want = jax.tree.structure(params)
    if got != want:
        raise ValueError(
            f"{name}: updates and params differ in structure: updates {got}, params {want}. Give "
            "the gradients of the same tree as params (for a part of it, optax.partition)."
        )


def _where(path: Any) -> str:
    return jax.tree_util.keystr(path) or "(the root)"
