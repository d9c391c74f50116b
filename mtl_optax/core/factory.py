"""The decorator of all method factories, and the types of arguments that it checks.

A factory declares the range of an argument by its type, such as `weight_lr: Nonnegative`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Literal, ParamSpec, TypeAlias, get_args, get_origin

import jax
import numpy as np
import optax

from mtl_optax.core import validation as check
from mtl_optax.core.method import Method, Options, Origin, flat_options, is_method
from mtl_optax.core.types import Number

P = ParamSpec("P")

FACTORIES: dict[str, Callable[..., Method]] = {}
"""The factories that were imported, by name."""

AnyNumber: TypeAlias = Annotated[Number, check.check_range]
Nonnegative: TypeAlias = Annotated[Number, partial(check.check_range, low=0)]
# A divisor that must not be 0, such as a temperature.
Positive: TypeAlias = Annotated[Number, partial(check.check_range, low=1e-6)]
Share: TypeAlias = Annotated[Number, partial(check.check_range, low=0, high=1)]
# The decay of an EMA; with 1 the average would never change.
Decay: TypeAlias = Annotated[Number, partial(check.check_range, low=0, high=1, half_open=True)]
NonnegativeInt: TypeAlias = Annotated[int, partial(check.check_integer, low=0)]
PositiveInt: TypeAlias = Annotated[int, partial(check.check_integer, low=1)]
Flag: TypeAlias = Annotated[bool, check.check_bool]
Seed: TypeAlias = Annotated[int | jax.Array, check.check_seed]
Transformation: TypeAlias = Annotated[optax.GradientTransformation, check.check_transformation]


def factory(make: Callable[P, Method]) -> Callable[P, Method]:
    """Decorates a function that takes the tasks and options and returns a `Method`.

    Every argument whose type is a `Literal` or one of the types above is checked. The arguments are
    recorded in the `origin` of the method, and the factory is added to `FACTORIES`. An unknown option
    raises a TypeError, which suggests the option with the most similar name.

    Args:
      make: the factory, whose first parameter is `tasks`.

    Returns:
      The decorated factory, with the same signature and docstring.
    """
    signature, types = inspect.signature(make), typing.get_type_hints(make, include_extras=True)
    tasks, *own = signature.parameters
    common = Options._fields if "options" in own else ()
    own = [name for name in own if name != "options"]
    known = list(dict.fromkeys([tasks, *own, *common]))

    call: Callable[..., Method] = make

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Method:
        options = flat_options(kwargs)
        _refuse_unknown(make.__name__, options, known)
        bound = signature.bind(*args, **options)
        given = _after_tasks(bound)
        bound.apply_defaults()
        # The common options are compared by `Method.options`, which includes their defaults.
        arguments = {name: value for name, value in _after_tasks(bound).items() if name in own}
        for name, value in arguments.items():
            _check(make.__name__, name, value, types[name])
        method = call(*args, **options)
        origin = Origin(made, given, arguments)
        definition = dataclasses.replace(method.definition, origin=origin)
        return Method(definition.init, definition.update)

    FACTORIES[make.__name__] = made
    return made


def _after_tasks(bound: inspect.BoundArguments) -> dict[str, object]:
    """Returns the arguments after the tasks; mutable arrays are copied."""
    _, *arguments = bound.arguments.items()
    return {name: _own(value) for name, value in flat_options(dict(arguments)).items()}


def _own(value: object) -> object:
    def copied(leaf: object) -> object:
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    return jax.tree.map(copied, value, is_leaf=is_method)


def _check(name: str, what: str, value: object, kind: object) -> None:
    """Raises if `value` is outside the range that its type declares."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if isinstance(choices[0], int):
            check.check_integer(name, what, value, choices[0], choices[-1])
        else:
            check.check_choice(name, what, value, choices)
    elif get_origin(kind) is Annotated:
        for one in get_args(kind)[1:]:
            one(name, what, value)
    elif value is not None and type(None) in get_args(kind):
        for one in get_args(kind):
            _check(name, what, value, one)


def _refuse_unknown(name: str, given: dict[str, object], known: list[str]) -> None:
    for option in given:
        if option not in known:
            near = get_close_matches(option, known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(known)}."
            raise TypeError(f"{name}: takes no argument {option}. {hint}")
