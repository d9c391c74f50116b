"""The decorator of all method factories, which checks option names and records the arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, ParamSpec

import jax
import numpy as np

from mtl_optax.core.method import Method, Options, Origin, flat_options, is_method

P = ParamSpec("P")


def factory(make: Callable[P, Method]) -> Callable[P, Method]:
    """Decorates a function that takes the tasks and options and returns a `Method`.

    The arguments are recorded in the `origin` of the method. An unknown option raises a TypeError, which
    suggests the option with the most similar name.

    Args:
      make: the factory, whose first parameter is `tasks`.

    Returns:
      The decorated factory, with the same signature and docstring.
    """
    signature = inspect.signature(make)
    tasks, *own = signature.parameters
    common = Options._fields if "options" in own else ()
    own = [name for name in own if name != "options"]
    known = list(dict.fromkeys([tasks, *own, *common]))

    call: Callable[..., Method] = make

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Method:
        options = flat_options(kwargs)
        _refuse_unknown(make.__name__, options, known)
        method = call(*args, **options)
        bound = signature.bind(*args, **options)
        given = _after_tasks(bound)
        bound.apply_defaults()
        # The common options are compared by `Method.options`, which includes their defaults.
        arguments = {name: value for name, value in _after_tasks(bound).items() if name in own}
        origin = Origin(made, given, arguments)
        definition = dataclasses.replace(method.definition, origin=origin)
        return Method(definition.init, definition.update)

    return made


def _after_tasks(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Returns the arguments after the tasks; mutable arrays are copied."""
    _, *arguments = bound.arguments.items()
    return {name: _own(value) for name, value in flat_options(dict(arguments)).items()}


def _own(value: object) -> Any:
    def copied(leaf: object) -> Any:
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    return jax.tree.map(copied, value, is_leaf=is_method)


def _refuse_unknown(name: str, given: dict[str, Any], known: list[str]) -> None:
    for option in given:
        if option not in known:
            near = get_close_matches(option, known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(known)}."
            raise TypeError(f"{name}: takes no argument {option}. {hint}")
