"""Checks of arguments: of a factory, of the tasks, and of `update` at trace time."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from mtl_optax.core.leaves import is_rows
from mtl_optax.core.types import Active, AxisName, DType, Label, Losses, Number, PerTask

# --- the arguments of a factory ----------------------------------------------------------------------


def check_integer(
    name: str, what: str, value: object, low: int, high: float = math.inf, alternative: str = ""
) -> None:
    """Raises if `value` is not a static integer in a closed range; `alternative` is for the message."""
    bounds = f">= {low}" if high == math.inf else f"from {low} to {high}"
    wanted = f"{name}: {what} must be a Python integer {bounds}{alternative}"
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{wanted}, found a JAX array. Under optax.inject_hyperparams name it static: "
            f"static_args=('{what}', ...)."
        )
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{wanted}, found {describe(value)}.")
    if not low <= value <= high:
        raise ValueError(f"{wanted}, found {value}.")


def check_range(
    name: str,
    what: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    half_open: bool = False,
) -> None:
    """Raises if `value` is not a number, or is a Python number outside a closed range.

    With `half_open` the range does not contain `high`. The value of a scalar array is not checked, so that
    `optax.inject_hyperparams` can schedule any number.
    """
    if callable(value):
        raise TypeError(
            f"{name}: {what} must be a number, found the function {describe(value)}. For a schedule give "
            f"{name} to optax.inject_hyperparams, and the schedule to what that returns."
        )
    if isinstance(value, (jax.Array, np.ndarray)) and value.shape == ():
        return
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise TypeError(f"{name}: {what} must be a number, found {describe(value)}.")
    if not low <= value <= high or (half_open and value == high):
        end = ")" if half_open else "]"
        raise ValueError(f"{name}: {what} must be in [{low}, {high}{end}, found {value}.")


def check_seed(name: str, what: str, value: object) -> None:
    """Raises if `value` is not an integer or a scalar array of integers."""
    dtype = getattr(value, "dtype", type(value))
    integer = jax.dtypes.issubdtype(dtype, np.integer) and not isinstance(value, bool)
    _require(integer and not getattr(value, "shape", ()), name, what, "an integer", value)


def check_bool(name: str, what: str, value: object) -> None:
    """Raises if `value` is neither True nor False."""
    _require(isinstance(value, bool), name, what, "True or False", value)


def check_choice(name: str, what: str, value: object, choices: Sequence[str]) -> None:
    """Raises if `value` is not one of the strings in `choices`."""
    if not isinstance(value, str) or value not in choices:
        quoted = [f'"{choice}"' for choice in choices]
        wanted = " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
        raise ValueError(f"{name}: {what} must be {wanted}; found {describe(value)}.")


def check_transformation(name: str, what: str, value: object) -> None:
    """Raises if `value` is not an optax transformation."""
    holds = hasattr(value, "init") and hasattr(value, "update")
    _require(holds, name, what, "an optax transformation, such as optax.adam(1e-3)", value)


def check_blocks(name: str, blocks: str | Label) -> None:
    """Raises if `blocks` is an invalid value of the option `blocks`."""
    holds = callable(blocks) or (isinstance(blocks, str) and blocks in ("all", "leaf"))
    _require(holds, name, "blocks", '"all", "leaf" or a callable (path, leaf) -> label', blocks)


def check_axis_name(name: str, axis_name: AxisName) -> None:
    """Raises if `axis_name` is neither None, a name of a mapped axis, nor a tuple of names."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    holds = axis_name is None or all(isinstance(one, str) for one in names)
    wanted = "the name of a mapped axis, or a tuple of names"
    _require(holds, name, "axis_name", wanted, axis_name)


def _require(holds: bool, name: str, what: str, wanted: str, value: object) -> None:
    if not holds:
        raise TypeError(f"{name}: {what} must be {wanted}; found {describe(value)}.")


def describe(value: object) -> str:
    """Describes an argument in a message: functions by their names, other values by their `repr`."""
    if isinstance(value, Tracer):
        return f"<traced {value.dtype}{list(value.shape)}>"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(describe, value)) + "]"
    if type(value) is tuple:
        return "(" + ", ".join(map(describe, value)) + "," * (len(value) == 1) + ")"
    shown = repr(value)
    return f"{type(value).__name__}(...)" if "0x" in shown else shown


# --- the tasks ---------------------------------------------------------------------------------------

# Task names are sorted, as JAX sorts the keys of a dictionary, and every array `[T]` and every task axis
# has this order. The order in which the names are passed has no effect.


class WrongEntries(ValueError):
    """Raised if the number or the names of the entries do not match the tasks."""


class Tasks(NamedTuple):
    """The number of tasks, and their names.

    Attributes:
      number: T.
      names: the sorted names, or None if the tasks have no names.
    """

    number: int
    names: tuple[str, ...] | None


def read_tasks(name: str, tasks: int | Collection[str] | Tasks) -> Tasks:
    """Reads the argument `tasks` of a factory: an integer or a collection of names.

    Args:
      name: the factory's name, for messages.
      tasks: a positive Python integer, or a collection of distinct strings.

    Returns:
      The tasks, with sorted names.

    Raises:
      TypeError, ValueError: if `tasks` is anything else.

    Example:

      >>> read_tasks("mgda", {"click", "buy"})
      Tasks(number=2, names=('buy', 'click'))
    """
    if isinstance(tasks, Tasks):
        return tasks
    if isinstance(tasks, str):
        raise TypeError(
            f"{name}: tasks must be a Python integer or a collection of task names; found the single "
            f"string {tasks!r}. For one task give ({tasks!r},)."
        )
    if not isinstance(tasks, Collection) or isinstance(tasks, jax.Array):
        check_integer(name, "tasks", tasks, 1, alternative=" or a collection of task names")
        return Tasks(int(tasks), None)
    wrong = [task for task in tasks if not isinstance(task, str)]
    if wrong:
        raise TypeError(f"{name}: task names must be strings, found {wrong[0]!r}.")
    names = sorted(tasks)
    if not names:
        raise ValueError(f"{name}: tasks must be at least 1, found no task names.")
    if len(set(names)) < len(names):
        twice = sorted(task for task in set(names) if names.count(task) > 1)
        raise ValueError(f"{name}: task names must differ, found {twice} more than once.")
    return Tasks(len(names), tuple(names))


def find_target(name: str, target: int | str | None, tasks: int | Collection[str] | Tasks) -> int:
    """Returns the index of a target, from its index or name; None means 0 if the tasks have no names."""
    number, names = read_tasks(name, tasks)
    if isinstance(target, str):
        if names is not None and target in names:
            return names.index(target)
        known = "the tasks have no names" if names is None else f"the tasks are {list(names)}"
        raise ValueError(f"{name}: target must be a task; {known}, found {target!r}.")
    if target is None and names is not None:
        raise TypeError(
            f"{name}: say which task is the target, such as target={names[0]!r}; the tasks are "
            f"{list(names)}."
        )
    index = 0 if target is None else target
    check_integer(name, "target", index, 0, number - 1, " or a task's name")
    return int(index)


def names_of(name: str, what: str, value: Mapping[str, object], tasks: Tasks) -> tuple[str, ...]:
    """Returns the keys of a dictionary with one entry per task, in the order of the task axis."""
    wanted = tasks.names if tasks.names is not None else tuple(sorted(value, key=str))
    if set(value) != set(wanted) or len(wanted) != tasks.number:
        expected = list(tasks.names) if tasks.names else f"{tasks.number} names"
        raise WrongEntries(
            f"{name}: {what} must have one entry per task, {expected}; found {sorted(value, key=str)}."
        )
    return wanted


def task_vector(
    name: str, what: str, value: Losses | Active | PerTask, tasks: Tasks, dtype: DType | None = None
) -> jax.Array:
    """Returns one number per task as an array `[T]`, from an array, a sequence, or a dictionary by name."""
    vector = jnp.asarray(_in_order(name, what, value, tasks), dtype)
    _check_entries(name, what, vector.shape, tasks)
    return vector


def task_numbers(
    name: str,
    what: str,
    value: Number | PerTask | None,
    tasks: int | Collection[str] | Tasks,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    or_one: bool = False,
) -> Any:
    """Checks an argument of a factory that has one number per task.

    Args:
      name: the factory's name, for messages.
      what: the argument's name.
      value: an array or a sequence `[T]`, a dictionary by task name, one number with `or_one`, or None.
      tasks: the tasks.
      low: the smallest number allowed.
      high: the largest number allowed.
      or_one: whether one number for all tasks is allowed too.

    Returns:
      An array `[T]`, a new NumPy array unless an entry is a JAX array; None for None.

    Raises:
      TypeError, ValueError: if the number of entries or their names are wrong, or an entry is not a number
        in the range.

    Example:

      >>> task_numbers("pcd", "tau", {"b": 0.2, "a": 0.1}, Tasks(2, ("a", "b"))).tolist()
      [0.1, 0.2]
    """
    if value is None:
        return None
    tasks = read_tasks(name, tasks)
    given = _in_order(name, what, value, tasks)
    if isinstance(given, np.ndarray):
        given = given.tolist()
    several = isinstance(given, (tuple, list))
    for entry in given if several else [given] * (np.ndim(given) == 0):
        check_range(name, what, entry, low, high)
    if several:
        traced = any(isinstance(entry, jax.Array) for entry in given)
        given = jnp.asarray(given) if traced else np.array(given)
    if or_one and np.ndim(given) == 0:
        spread = jnp.broadcast_to if isinstance(given, jax.Array) else np.broadcast_to
        return spread(given, (tasks.number,))
    _check_entries(name, what, np.shape(given), tasks, "be a number or " * or_one)
    return given


def _in_order(name: str, what: str, value: object, tasks: Tasks) -> Any:
    """Returns the entries of a dictionary in the order of the task axis, and other values unchanged."""
    if isinstance(value, Mapping):
        return [value[task] for task in names_of(name, what, value, tasks)]
    return value


def _check_entries(
    name: str, what: str, found: tuple[int, ...], tasks: Tasks, alternative: str = ""
) -> None:
    if found != (tasks.number,):
        order = "of the task axis" if tasks.names is None else list(tasks.names)
        raise WrongEntries(
            f"{name}: {what} must {alternative}have shape ({tasks.number},), one entry per task in the "
            f"order {order}; found {found}."
        )


# --- the arguments of `update` -----------------------------------------------------------------------

_NO_TASK_AXIS = (
    "These have no task axis: take one gradient per task with mtl_optax.per_task_value_and_grad. A method "
    "before this one needs reduce=False; in place of optax.MultiSteps around it use mtl_optax.accumulate."
)


class MissingLosses(ValueError):
    """Raised if a method that needs losses gets none; its arguments are what is needed, and a remedy."""

    def __str__(self) -> str:
        return " ".join(map(str, self.args))


class NotFloating(TypeError):
    """Raised if gradients are not real floating-point numbers."""


class WrongTaskAxis(ValueError):
    """Raised if a leaf of the gradients does not have the shape `[T, *shape]`."""


def check_updates(
    name: str, updates: optax.Updates, tasks: Tasks, params: optax.Params | None = None
) -> None:
    """Raises if `updates` does not hold one gradient per task; the message names the leaf.

    Without `params` the check cannot detect a missing task axis if the first dimension of every leaf is
    T.
    """
    leaves = jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_rows)
    found = [leaf.shape if is_rows(leaf) else jnp.shape(leaf) for _, leaf in leaves]
    shapes = [shape[1:] for shape in found]
    if params is not None:
        if jax.tree.structure(updates, is_leaf=is_rows) != jax.tree.structure(params):
            raise ValueError(
                f"{name}: updates and params differ in structure: "
                f"{difference('the updates', updates, 'params', params)}. Give the gradients of the same "
                "tree as params (for a part of it, optax.partition)."
            )
        shapes = [jnp.shape(p) for p in jax.tree.leaves(params)]
    wrong = []
    for (path, leaf), got, shape in zip(leaves, found, shapes, strict=True):
        dtype = leaf.dtype if is_rows(leaf) else jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise NotFloating(
                f"{name}: gradients must be real floating point; leaf {where(path)} is {dtype}. Keep what "
                "is not trained out of the parameters that init and update are given."
            )
        if got != (tasks.number, *shape):
            wrong.append((path, got, (tasks.number, *shape)))
    if wrong:
        path, got, want = wrong[0]
        remedy = _remedy([(got, want) for _, got, want in wrong], tasks.number)
        raise WrongTaskAxis(
            f"{name}: updates must carry a leading task axis of size {tasks.number}: leaf {where(path)} "
            f"has shape {got}, expected {want}{and_more(wrong)}. {remedy}"
        )


def _remedy(wrong: list[tuple[tuple[int, ...], tuple[int, ...]]], num_tasks: int) -> str:
    """Returns the remedy for shapes that were found, each with the one that is expected."""
    if all(got == want[1:] for got, want in wrong):
        return _NO_TASK_AXIS
    if all(want[1:] == (num_tasks, *got) for got, want in wrong):
        return (
            "The parameters have a task axis and the gradients have none: call update(gradients, state, "
            "params) in this order."
        )
    if all(got and got[1:] == want[1:] for got, want in wrong):
        sizes = ", ".join(map(str, sorted({got[0] for got, _ in wrong})))
        return (
            f"The task axis has size {sizes} but tasks={num_tasks}: give the number of losses that loss_fn "
            "returns."
        )
    if all(got == (math.prod(want),) for got, want in wrong):
        return (
            "The gradients of all tasks were concatenated into one vector, as optax.flatten does: put it "
            "after the method."
        )
    return (
        "Stack one gradient per task along axis 0 of every leaf, as "
        "mtl_optax.per_task_value_and_grad does."
    )


def read_losses(
    name: str, losses: Losses | None, tasks: Tasks, dtype: DType, extra_args: Mapping[str, object]
) -> jax.Array:
    """Returns the losses as an array `[T]`, and raises if there are none."""
    if losses is not None:
        return task_vector(name, "losses", losses, tasks, dtype)
    if len(getattr(extra_args.get("value"), "shape", ())) == 1:
        remedy = "Found a vector in value=, which optax keeps for one scalar."
    else:
        remedy = (
            "Where a trainer calls update, give it mtl_optax.with_extra_args(tx, losses=losses)."
        )
    raise MissingLosses(
        f"{name}: needs the losses of this step: update(..., losses=losses), an array [{tasks.number}] in "
        "the order of the task axis, or a dictionary by task name.",
        remedy,
    )


def read_active(name: str, active: Active | None, tasks: Tasks) -> jax.Array:
    """Returns the mask of the tasks in this batch, bool `[T]`; all tasks by default."""
    if active is None:
        return jnp.ones((tasks.number,), bool)
    return task_vector(name, "active", active, tasks, jnp.dtype(bool))


# --- descriptions of trees, for messages -------------------------------------------------------------


def where(path: tuple[object, ...]) -> str:
    """Describes a path in a tree."""
    return jax.tree_util.keystr(path) or "(the root)"


def and_more(leaves: Collection[object]) -> str:
    """Describes how many leaves there are besides the first."""
    more = len(leaves) - 1
    return f" (and {more} more {'leaf' if more == 1 else 'leaves'})" if more else ""


def difference(name: str, tree: optax.Params, other_name: str, other: optax.Params) -> str:
    """Describes how the structures of two trees differ."""
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
