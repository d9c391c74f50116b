"""Checks of the arguments of `update` at trace time."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.leaves import TaskRows, is_rows
from mtl_optax.core.tasks import Tasks, task_vector
from mtl_optax.core.types import DType

_NO_TASK_AXIS = (
    "These have no task axis: take one gradient per task with mtl_optax.per_task_value_and_grad. A method "
    "before this one needs reduce=False; in place of optax.MultiSteps around it use mtl_optax.accumulate."
)


class MissingLosses(ValueError):
    """Raised if a method that needs losses gets none."""


class NotFloating(TypeError):
    """Raised if gradients are not real floating-point numbers."""


class WrongTaskAxis(ValueError):
    """Raised if a leaf of the gradients does not have the shape `[T, *shape]`.

    Attributes:
      found: describes the shapes that were found.
      is_missing: whether the task axis is missing, so that the leaves have the shapes of the parameters.
    """

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"{found} {remedy}")
        self.found = found
        self.is_missing = remedy == _NO_TASK_AXIS


def check_updates(
    name: str, updates: optax.Updates, tasks: Tasks, params: optax.Params | None = None
) -> None:
    """Raises if `updates` does not hold one gradient per task; the message names the leaf.

    Without `params` the check cannot detect a missing task axis if the first dimension of every leaf is
    T.
    """
    num_tasks = tasks.number
    leaves = jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_rows)
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
            raise NotFloating(
                f"{name}: gradients must be real floating point; leaf {where(path)} is {dtype}. Keep what "
                "is not trained out of the parameters that init and update are given."
            )
    if wrong:
        path, got, want = wrong[0]
        found = (
            f"{name}: updates must carry a leading task axis of size {num_tasks}: leaf {where(path)} has "
            f"shape {got}, expected {want}{and_more(wrong)}."
        )
        raise WrongTaskAxis(found, _remedy(wrong, num_tasks))


def read_losses(
    name: str, losses: Any, tasks: Tasks, dtype: DType, extra_args: Mapping[str, Any]
) -> jax.Array:
    """Returns the losses as an array `[T]`, and raises if there are none."""
    if losses is None:
        vector = jnp.ndim(extra_args.get("value", 0.0)) == 1
        raise MissingLosses(
            f"{name}: needs the losses of this step: update(..., losses=losses), an array "
            f"[{tasks.number}] in the order of the task axis, or a dictionary by task name."
            + (" Found a vector in value=, which optax keeps for one scalar." * vector)
        )
    return task_vector(name, "losses", losses, tasks, dtype)


def read_active(name: str, active: Any, tasks: Tasks) -> jax.Array:
    """Returns the mask of the tasks in this batch, bool `[T]`; all tasks by default."""
    if active is None:
        return jnp.ones((tasks.number,), bool)
    return task_vector(name, "active", active, tasks, jnp.bool_)


def where(path: tuple[object, ...]) -> str:
    """Describes a path in a tree, for messages."""
    return jax.tree_util.keystr(path) or "(the root)"


def and_more(leaves: Collection[Any]) -> str:
    """Describes how many leaves there are besides the first, for messages."""
    more = len(leaves) - 1
    return f" (and {more} more {'leaf' if more == 1 else 'leaves'})" if more else ""


def difference(name: str, tree: optax.Params, other_name: str, other: Any) -> str:
    """Describes how the structures of two trees differ, for messages."""
    paths, others = (
        {where(path) for path, _ in jax.tree_util.tree_leaves_with_path(t, is_leaf=is_rows)}
        for t in (tree, other)
    )
    for has, has_not, extra in (
        (name, other_name, paths - others),
        (other_name, name, others - paths),
    ):
        if extra:
            return f"{has} have leaf {min(extra)}{and_more(extra)}, which {has_not} do not have"
    return f"{name} and {other_name} have the same leaves in nodes of other types"


def _shape(leaf: Any) -> tuple[int, ...]:
    return leaf.shape if isinstance(leaf, TaskRows) else jnp.shape(leaf)


def _remedy(wrong: list[tuple[Any, tuple[int, ...], tuple[int, ...]]], num_tasks: int) -> str:
    if all(got == want[1:] for _, got, want in wrong):
        return _NO_TASK_AXIS
    if all(want[1:] == (num_tasks, *got) for _, got, want in wrong):
        return (
            "The parameters have a task axis and the gradients have none: call update(gradients, state, "
            "params) in this order."
        )
    if all(got[1:] == want[1:] and got for _, got, want in wrong):
        sizes = sorted({got[0] for _, got, _ in wrong})
        return (
            f"The task axis has size {', '.join(map(str, sizes))} but tasks={num_tasks}: give "
            "the number of losses that loss_fn returns."
        )
    if all(got == (math.prod(want),) for _, got, want in wrong):
        return (
            "The gradients of all tasks were concatenated into one vector, as optax.flatten does: put it "
            "after the method."
        )
    return (
        "Stack one gradient per task along axis 0 of every leaf, as "
        "mtl_optax.per_task_value_and_grad does."
    )


def _check_structure(name: str, updates: optax.Updates, params: optax.Params) -> None:
    if jax.tree.structure(updates, is_leaf=is_rows) != jax.tree.structure(params):
        raise ValueError(
            f"{name}: updates and params differ in structure: "
            f"{difference('the updates', updates, 'params', params)}. Give the gradients of the same tree "
            "as params (for a part of it, optax.partition)."
        )
