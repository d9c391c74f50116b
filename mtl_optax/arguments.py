"""Checks of static arguments: what was found, and how to give it right."""

from __future__ import annotations

from typing import Any

import jax

_NAME_STATIC = "Under optax.inject_hyperparams name it static: static_args=('{}', ...)."


def check_num_tasks(name: str, num_tasks: Any) -> int:
    """`num_tasks` as a static positive integer, or an error that says how to make it one."""
    if isinstance(num_tasks, jax.Array):
        raise TypeError(
            f"{name}: num_tasks must be a Python integer, found a JAX array. "
            + _NAME_STATIC.format("num_tasks")
        )
    try:
        value = int(num_tasks.__index__())
    except (AttributeError, TypeError):
        raise TypeError(
            f"{name}: num_tasks must be a Python integer, found {num_tasks!r}."
        ) from None
    if value < 1:
        raise ValueError(f"{name}: num_tasks must be at least 1, found {value}.")
    return value


def check_integer(name: str, what: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises where `value` is not a static integer in its closed range."""
    wanted = f">= {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name}: {what} must be a Python integer {wanted}, found a JAX array. "
            + _NAME_STATIC.format(what)
        )
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < low or (high is not None and value > high):
        raise ValueError(f"{name}: {what} must be a Python integer {wanted}, found {value!r}.")


def check_task_index(name: str, what: str, index: Any, num_tasks: int) -> int:
    """`index` as a task's static number."""
    if isinstance(index, jax.Array):
        raise TypeError(
            f"{name}: {what} must be a Python integer, found a JAX array. "
            + _NAME_STATIC.format(what)
        )
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise TypeError(f"{name}: {what} must be a Python integer, found {index!r}.")
    if not 0 <= int(index) < num_tasks:
        raise ValueError(
            f"{name}: {what} must be the index of a task, 0 to {num_tasks - 1}; found {index}."
        )
    return int(index)


def check_range(name: str, **ranges: tuple[Any, float, float]) -> None:
    """Raises where a Python number is outside its closed range; schedules and arrays pass."""
    for what, (value, low, high) in ranges.items():
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise ValueError(f"{name}: {what} must be in [{low}, {high}], found {value}.")
