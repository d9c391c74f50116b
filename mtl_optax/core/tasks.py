"""The number of tasks, their names, and their order.

Task names are sorted, as JAX sorts the keys of a dictionary, and every array `[T]` and every task axis
has this order. The order in which the names are passed has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_optax.core.arguments import check_range, describe
from mtl_optax.core.types import DType

_NAME_STATIC = "Under optax.inject_hyperparams name it static: static_args=('{}', ...)."


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

    def describe(self) -> str:
        """Describes an argument with one entry per task, for messages."""
        if self.names is None:
            return "one entry per task in the order of the task axis"
        return f"one entry per task in the order {list(self.names)}"


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
    if isinstance(tasks, jax.Array):
        raise TypeError(
            f"{name}: tasks must be a Python integer, found a JAX array. "
            + _NAME_STATIC.format("tasks")
        )
    if isinstance(tasks, str):
        raise TypeError(
            f"{name}: tasks must be a Python integer or a collection of task names; found the single "
            f"string {tasks!r}. For one task give ({tasks!r},)."
        )
    if isinstance(tasks, Tasks):
        return tasks
    if isinstance(tasks, Collection):
        return _named(name, tasks)
    if isinstance(tasks, bool) or not hasattr(tasks, "__index__"):
        raise TypeError(
            f"{name}: tasks must be a Python integer or a collection of task names, found "
            f"{tasks!r}."
        )
    value = int(tasks)
    if value < 1:
        raise ValueError(f"{name}: tasks must be at least 1, found {value}.")
    return Tasks(value, None)


def find_target(name: str, target: int | str | None, tasks: Tasks) -> int:
    """Returns the index of a target, from its index or name; None means 0 if the tasks have no names."""
    if target is None and tasks.names is not None:
        raise TypeError(
            f"{name}: say which task is the target, such as target={tasks.names[0]!r}; the tasks are "
            f"{list(tasks.names)}."
        )
    if isinstance(target, jax.Array):
        raise TypeError(
            f"{name}: target must be a Python integer, found a JAX array. "
            + _NAME_STATIC.format("target")
        )
    if isinstance(target, str):
        if tasks.names is None or target not in tasks.names:
            known = (
                f"the tasks are {list(tasks.names)}" if tasks.names else "the tasks have no names"
            )
            raise ValueError(f"{name}: target must be a task; {known}, found {target!r}.")
        return tasks.names.index(target)
    target = 0 if target is None else target
    if isinstance(target, bool) or not isinstance(target, (int, np.integer)):
        raise TypeError(f"{name}: target must be a task's index or name, found {describe(target)}.")
    if not 0 <= int(target) < tasks.number:
        raise ValueError(
            f"{name}: target must be the index of a task, 0 to {tasks.number - 1}; found {target}."
        )
    return int(target)


def names_of(name: str, what: str, value: Mapping[Any, Any], tasks: Tasks) -> tuple[Any, ...]:
    """Returns the keys of a dictionary with one entry per task, in the order of the task axis."""
    wanted = tasks.names if tasks.names is not None else tuple(sorted(value, key=str))
    if set(value) != set(wanted) or len(wanted) != tasks.number:
        expected = list(tasks.names) if tasks.names else f"{tasks.number} names"
        raise WrongEntries(
            f"{name}: {what} must have one entry per task, {expected}; found {sorted(value, key=str)}."
        )
    return wanted


def task_vector(
    name: str, what: str, value: Any, tasks: Tasks, dtype: DType | None = None
) -> jax.Array:
    """Returns one number per task as an array `[T]`, from an array, a sequence, or a dictionary."""
    if isinstance(value, Mapping):
        value = [value[task] for task in names_of(name, what, value, tasks)]
    if isinstance(value, (tuple, list)):
        value = jnp.stack([jnp.asarray(x) for x in value])
    if jnp.shape(value) != (tasks.number,):
        raise WrongEntries(
            f"{name}: {what} must have shape ({tasks.number},), {tasks.describe()}; found "
            f"{jnp.shape(value)}."
        )
    return jnp.asarray(value, dtype)


def task_numbers(
    name: str,
    what: str,
    value: Any,
    tasks: Tasks,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    or_one: bool = False,
) -> Any:
    """Checks an argument of a factory that has one number per task.

    Args:
      name: the factory's name, for messages.
      what: the argument's name.
      value: an array or a sequence `[T]`, or a dictionary by task name.
      tasks: the tasks.
      low: the smallest number allowed.
      high: the largest number allowed.
      or_one: whether one number for all tasks is allowed too.

    Returns:
      An array `[T]`, or the one number. It is a new NumPy array unless an entry is a JAX array.

    Raises:
      TypeError, ValueError: if the number of entries or their names are wrong, or an entry is not a number
        in the range.

    Example:

      >>> task_numbers("pcd", "tau", {"b": 0.2, "a": 0.1}, Tasks(2, ("a", "b"))).tolist()
      [0.1, 0.2]
    """
    if isinstance(value, Mapping):
        value = [value[task] for task in names_of(name, what, value, tasks)]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (tuple, list)):
        for entry in value:
            check_range(name, what, entry, low, high)
        traced = any(isinstance(entry, jax.Array) for entry in value)
        value = jnp.stack(list(map(jnp.asarray, value))) if traced else np.array(value)
    elif np.ndim(value) == 0:
        check_range(name, what, value, low, high)
    shape = np.shape(value)
    if shape != (tasks.number,) and not (or_one and shape == ()):
        one = "be a number or " * or_one
        raise ValueError(
            f"{name}: {what} must {one}have shape ({tasks.number},), {tasks.describe()}; found {shape}."
        )
    return value


def _named(name: str, names: Collection[Any]) -> Tasks:
    wrong = [task for task in names if not isinstance(task, str)]
    if wrong:
        raise TypeError(f"{name}: task names must be strings, found {wrong[0]!r}.")
    if len(set(names)) < len(names):
        twice = sorted(task for task in set(names) if list(names).count(task) > 1)
        raise ValueError(f"{name}: task names must differ, found {twice} more than once.")
    if not names:
        raise ValueError(f"{name}: tasks must be at least 1, found no task names.")
    return Tasks(len(names), tuple(sorted(names)))
