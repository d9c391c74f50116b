"""Checks of a factory's static arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def check_integer(name: str, what: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises where `value` is not a static integer in its closed range."""
    wanted = f">= {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name}: {what} must be a Python integer {wanted}, found a JAX array. Under "
            f"optax.inject_hyperparams name it static: static_args=('{what}', ...)."
        )
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < low or (high is not None and value > high):
        raise ValueError(f"{name}: {what} must be a Python integer {wanted}, found {value!r}.")


def check_range(name: str, **ranges: tuple[Any, float, float]) -> None:
    """Raises where a Python number is outside its closed range; schedules and arrays pass."""
    for what, (value, low, high) in ranges.items():
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise ValueError(f"{name}: {what} must be in [{low}, {high}], found {value}.")


def check_choice(name: str, what: str, value: Any, choices: Sequence[str]) -> None:
    """Raises where `value` is none of the words in `choices`."""
    if value not in choices:
        quoted = [f'"{choice}"' for choice in choices]
        wanted = " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
        raise ValueError(f"{name}: {what} must be {wanted}; found {value!r}.")


def check_per_task(name: str, what: str, value: Any, num_tasks: int) -> None:
    """Raises where `value` is given and is not one number per task, `[T]`."""
    if value is not None and np.shape(value) != (num_tasks,):
        raise ValueError(
            f"{name}: {what} must have shape ({num_tasks},), one number per task; found "
            f"{np.shape(value)}."
        )
