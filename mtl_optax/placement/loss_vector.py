"""The result of a user's loss function: an array `[T]`, or a tuple or dictionary of T scalars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, TypeGuard, TypeVar, cast

import jax
import jax.numpy as jnp

from mtl_optax.core.types import DType, Losses
from mtl_optax.core.validation import Tasks, task_vector, where

Result = TypeVar("Result")
# The losses (a tuple if they can be differentiated separately), and what the loss function returned.
Split: TypeAlias = tuple[tuple[jax.Array, ...] | jax.Array, Result]


def loss_terms(losses: object) -> tuple[jax.Array, ...] | jax.Array:
    """Converts losses to a tuple of floating scalars of one dtype; an array `[T]` stays an array.

    Args:
      losses: a tuple or list of scalars, a dictionary of scalars (taken in the order of its sorted names),
        or an array `[T]`.

    Returns:
      T scalars, which can be differentiated separately, or the array `[T]`.

    Raises:
      TypeError: if the losses are not real floating-point numbers.
      ValueError: if an entry is not scalar, an array is not one-dimensional, or there are no losses.

    Example:

      >>> import jax.numpy as jnp
      >>> [float(loss) for loss in loss_terms({"click": jnp.array(1.0), "buy": 2.0})]
      [2.0, 1.0]
    """
    if isinstance(losses, Mapping):
        entries: dict[str, object] = {repr(name): losses[name] for name in sorted(losses)}
        kind = "dictionary"
        remedy = "Give every loss a name of its own, or add them up to one number."
    elif isinstance(losses, (tuple, list)):
        entries = {f"entry {t}": loss for t, loss in enumerate(losses)}
        kind = type(losses).__name__
        remedy = "Make it one number, or pass has_aux=True if one output is auxiliary."
    else:
        return _array_of_losses(losses)
    rule = f"a {kind} of losses must hold one scalar per task; found "
    if not entries:
        raise ValueError(rule + "none.")
    for name, loss in entries.items():
        if not _is_array(loss):
            if loss is None and kind == "dictionary":
                remedy = "For a task that is absent from this batch return 0.0, and pass active=."
            raise TypeError(f"{rule}{_described(loss)} for {name}. {remedy}")
        if jnp.shape(loss) != ():
            raise ValueError(f"{rule}shape {jnp.shape(loss)} for {name}. {remedy}")
    dtype = jnp.result_type(*entries.values())
    _check_floating(dtype)
    return tuple(jnp.asarray(loss, dtype) for loss in entries.values())


def loss_vector(losses: object) -> jax.Array:
    """Converts losses to one floating array `[T]`.

    Args:
      losses: as in `loss_terms`.

    Returns:
      The losses `[T]`.

    Raises:
      As `loss_terms`.

    Example:

      >>> import jax.numpy as jnp
      >>> loss_vector({"click": jnp.array(1.0), "buy": jnp.array(2.0)}).tolist()
      [2.0, 1.0]
    """
    terms = loss_terms(losses)
    return jnp.stack(terms) if isinstance(terms, tuple) else terms


def split_result(result: Result, has_aux: bool) -> Split[Result]:
    """Separates the losses from the result of a user's loss function.

    Args:
      result: losses, or `(losses, aux)` with `has_aux`.
      has_aux: as in `jax.value_and_grad`.

    Returns:
      `(losses, result)`: the losses as returned by `loss_terms`, and the unchanged result.

    Raises:
      TypeError: if `has_aux` is True and the result is not a pair.
      TypeError, ValueError: as in `loss_terms`.

    Example:

      >>> import jax.numpy as jnp
      >>> split_result((jnp.ones(2), "aux"), has_aux=True)[0].tolist()
      [1.0, 1.0]
    """
    if not has_aux:
        return loss_terms(result), result
    if isinstance(result, (tuple, list)) and len(result) == 2:
        return loss_terms(result[0]), result
    size = f" of {len(result)}" if isinstance(result, (Mapping, tuple, list)) else ""
    raise TypeError(
        f"has_aux=True: loss_fn must return (losses, aux); found {_described(result)}{size}. Leave "
        "has_aux out if it returns the losses alone."
    )


def check_tasks(name: str, result: object, has_aux: bool, tasks: Tasks) -> None:
    """Raises if the result of a loss function does not have one loss per task, under the same names.

    Args:
      name: the name of the caller, for messages.
      result: losses, or `(losses, aux)` with `has_aux`.
      has_aux: as in `jax.value_and_grad`.
      tasks: the tasks of the method.

    Returns:
      None.

    Raises:
      ValueError: if the number or the names of the losses differ from those of the tasks.

    Example:

      >>> check_tasks("fork", {"buy": 1.0, "click": 2.0}, False, Tasks(2, ("buy", "click")))
    """
    losses = cast("tuple[object, object]", result)[0] if has_aux else result
    task_vector(name, "the losses of loss_fn", cast(Losses, losses), tasks)


def check_differentiable(name: str, params: object, *, integers: bool = False) -> None:
    """Raises if a leaf of `params` is not a real floating-point array, as `jax.grad` does.

    Args:
      name: the name of the caller, for messages.
      params: the parameters with respect to which the losses are differentiated.
      integers: whether leaves may be integers and booleans, whose gradient the caller makes 0.

    Returns:
      None.

    Raises:
      TypeError: if a leaf is not of these dtypes, or no array; the message contains its path.

    Example:

      >>> import jax.numpy as jnp
      >>> check_differentiable("per_task_value_and_grad", {"w": jnp.ones(2)})
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not _is_array(leaf):
            raise TypeError(
                f"{name}: the leaf {where(path)} of the parameters is {_described(leaf)}, not an "
                "array. Pass the arrays alone: eqx.partition(model, eqx.is_inexact_array), or "
                "nnx.split(model, nnx.Param, ...)."
            )
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"{name}: the leaf {where(path)} of the parameters is {dtype}, and methods compare real "
                "gradients. Keep its real and imaginary part as two leaves."
            )
        if integers and (dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer)):
            continue
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}: cannot differentiate with respect to the leaf {where(path)} of {dtype}. Pass "
                "values that are not parameters as another argument; for an nnx.Module pass "
                "nnx.split(model, nnx.Param, ...)."
            )


def _array_of_losses(losses: object) -> jax.Array:
    rule = "losses must be a tuple or dictionary of one scalar per task, or an array [T]; found "
    if not _is_array(losses):
        raise TypeError(f"{rule}{_described(losses)}.")
    if jnp.ndim(losses) != 1:
        raise ValueError(
            f"{rule}shape {jnp.shape(losses)}. Return the loss of every task instead of their sum, and "
            "with has_aux=True (losses, aux)."
        )
    _check_floating(jnp.result_type(losses))
    return jnp.asarray(losses)


def _check_floating(dtype: DType) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"losses must be real floating point, found {dtype}.")


def _is_array(value: object) -> TypeGuard[jax.Array]:
    return hasattr(value, "dtype") or isinstance(value, (int, float, complex))


def _described(value: object) -> str:
    if value is None:
        return "None"
    if _is_array(value):
        return f"an array of shape {jnp.shape(value)}"
    return f"a {type(value).__name__}"
