"""Checks of the arguments of a factory, and their description in messages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from mtl_optax.core.types import AxisName, Label

_NUMBER = (int, float, np.integer, np.floating)


def check_integer(name: str, what: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises if `value` is not a static integer in a closed range."""
    wanted = f">= {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name}: {what} must be a Python integer {wanted}, found a JAX array. Under "
            f"optax.inject_hyperparams name it static: static_args=('{what}', ...)."
        )
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < low or (high is not None and value > high):
        raise ValueError(
            f"{name}: {what} must be a Python integer {wanted}, found {describe(value)}."
        )


def check_seed(name: str, what: str, value: Any) -> None:
    """Raises if `value` is not an integer or a scalar array of integers."""
    dtype = getattr(value, "dtype", type(value))
    if isinstance(value, bool) or not jax.dtypes.issubdtype(dtype, np.integer) or np.shape(value):
        raise TypeError(f"{name}: {what} must be an integer, found {describe(value)}.")


def check_range(
    name: str, what: str, value: Any, low: float = -math.inf, high: float = math.inf
) -> None:
    """Raises if `value` is not a number, or is a Python number outside a closed range.

    The value of a scalar array is not checked, so that `optax.inject_hyperparams` can schedule any
    number.
    """
    _check_number(name, what, value)
    if isinstance(value, _NUMBER) and not low <= value <= high:
        raise ValueError(f"{name}: {what} must be in [{low}, {high}], found {value}.")


def check_decay(name: str, what: str, value: Any) -> None:
    """Raises if the decay of an EMA is outside [0, 1): with 1 the average would never change."""
    _check_number(name, what, value)
    if isinstance(value, _NUMBER) and not 0 <= value < 1:
        raise ValueError(f"{name}: {what} must be in [0, 1), found {value}.")


def check_bool(name: str, what: str, value: Any) -> None:
    """Raises if `value` is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {what} must be True or False, found {describe(value)}.")


def check_choice(name: str, what: str, value: Any, choices: Sequence[str]) -> None:
    """Raises if `value` is not one of the strings in `choices`."""
    if not isinstance(value, str) or value not in choices:
        quoted = [f'"{choice}"' for choice in choices]
        wanted = " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
        raise ValueError(f"{name}: {what} must be {wanted}; found {describe(value)}.")


def check_transformation(name: str, what: str, value: Any) -> None:
    """Raises if `value` is not an optax transformation."""
    if not hasattr(value, "init") or not hasattr(value, "update"):
        raise TypeError(
            f"{name}: {what} must be an optax transformation, such as optax.adam(1e-3); found "
            f"{describe(value)}."
        )


def check_blocks(name: str, blocks: str | Label) -> None:
    """Raises if `blocks` is an invalid value of the option `blocks`."""
    if not callable(blocks) and not (isinstance(blocks, str) and blocks in ("all", "leaf")):
        raise TypeError(
            f'{name}: blocks must be "all", "leaf" or a callable (path, leaf) -> label; found '
            f"{describe(blocks)}."
        )


def check_axis_name(name: str, axis_name: AxisName) -> None:
    """Raises if `axis_name` is neither None, a name of a mapped axis, nor a tuple of names."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not all(isinstance(one, str) for one in names):
        raise TypeError(
            f"{name}: axis_name must be the name of a mapped axis, or a tuple of names; found "
            f"{describe(axis_name)}."
        )


def describe(value: Any) -> str:
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


def _check_number(name: str, what: str, value: Any) -> None:
    if callable(value):
        raise TypeError(
            f"{name}: {what} must be a number, found the function {describe(value)}. For a schedule give "
            f"{name} to optax.inject_hyperparams, and the schedule to what that returns."
        )
    is_array = isinstance(value, (jax.Array, np.ndarray)) and np.shape(value) == ()
    if isinstance(value, bool) or not (isinstance(value, _NUMBER) or is_array):
        raise TypeError(f"{name}: {what} must be a number, found {describe(value)}.")
