"""The factors of the gradients of B examples, by one backward pass (`mode="examples"`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp

from mtl_optax.core.validation import where
from mtl_optax.placement.factors import Factors
from mtl_optax.placement.loss_vector import split_result
from mtl_optax.placement.marked_program import Marked, evaluate

Aux = TypeVar("Aux")
Params = TypeVar("Params")
# The arguments of a loss function after the parameters, positional and by keyword.
Arguments: TypeAlias = tuple[tuple[object, ...], dict[str, object]]


def check_examples(number: int, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments:
    """Raises if the arguments of a loss function are not a batch of examples.

    Args:
      number: B.
      args: the positional arguments.
      kwargs: the keyword arguments.

    Returns:
      `(args, kwargs)`, whose leaves are `[B, ...]`.

    Raises:
      ValueError: if the first axis of an array is not that of the examples, or there is no array.

    Example:

      >>> import jax.numpy as jnp
      >>> args, kwargs = check_examples(2, (jnp.ones((2, 3)),), {"y": jnp.ones(2)})
    """
    arrays = jax.tree_util.tree_leaves_with_path({"args": args, "kwargs": kwargs})
    wrong = [
        f"shape {jnp.shape(x)} at {where(path)}"
        for path, x in arrays
        if jnp.shape(x)[:1] != (number,)
    ]
    if wrong or not arrays:
        raise ValueError(
            f'weighted_value_and_grad: with mode="examples" and {number} tasks, every array among the '
            f"arguments after the state has {number} examples along its first axis; found "
            f"{wrong[0] if wrong else 'no arrays'}. Close loss_fn over what examples share."
        )
    return args, kwargs


def loss_of_example(
    loss_fn: Callable[..., object], has_aux: bool
) -> Callable[[object, Arguments], tuple[jax.Array, object]]:
    """Makes the loss of one example from the losses of a batch, by a batch of one.

    Args:
      loss_fn: `(params, *args, **kwargs) -> losses [B]`, or `(losses, aux)` with `has_aux`.
      has_aux: whether there is `aux`.

    Returns:
      `(params, (args, kwargs)) -> (loss, aux)`.

    Example:

      >>> import jax.numpy as jnp
      >>> of_example = loss_of_example(lambda w, x: x @ w, has_aux=False)
      >>> float(of_example(jnp.ones(2), ((jnp.array([1., 2.]),), {}))[0])
      3.0
    """

    def of_example(params: object, example: Arguments) -> tuple[jax.Array, object]:
        args, kwargs = jax.tree.map(lambda x: jnp.asarray(x)[None], example)
        losses, result = split_result(loss_fn(params, *args, **kwargs), has_aux)
        if isinstance(losses, tuple) or losses.shape != (1,):
            shape = losses.shape if isinstance(losses, jax.Array) else f"{len(losses)} scalars"
            raise ValueError(
                'weighted_value_and_grad: with mode="examples" loss_fn returns one loss for each example '
                f"of a batch, [B]; for a batch of one example it returned {shape}."
            )
        return losses[0], cast("tuple[object, object]", result)[1] if has_aux else None

    return of_example


def gradients_in_factors(
    loss_fn: Callable[[Params, Arguments], tuple[jax.Array, Aux]], params: Params, batch: Arguments
) -> tuple[jax.Array, Aux, list[Factors]]:
    """Computes the losses of B examples and the factors of their gradients, by one backward pass.

    Args:
      loss_fn: `(params, example) -> (loss, aux)`.
      params: the parameters.
      batch: the examples, with leaves `[B, ...]`.

    Returns:
      The losses `[B]`, `aux` with leaves `[B, ...]`, and the factors for every leaf of `params`.

    Raises:
      ValueError: for a `shard_map` inside `loss_fn`.

    Example:

      >>> import jax.numpy as jnp
      >>> loss_fn = lambda kernel, x: (jnp.sum((x @ kernel) ** 2), None)
      >>> x = jnp.ones((8, 3, 2))  # 8 examples, 3 positions
      >>> losses, _, (factors,) = gradients_in_factors(loss_fn, jnp.ones((2, 5)), x)
      >>> factors.left.shape, factors.right.shape
      ((8, 3, 5), (8, 3, 2))
    """
    per_example = jax.vmap(jax.value_and_grad(loss_fn, has_aux=True), (None, 0))
    program, shapes = jax.make_jaxpr(per_example, return_shape=True)(params, batch)
    inputs = [Marked(value) for value in jax.tree.leaves((params, batch))]
    results = evaluate(program, inputs)
    (losses, aux), grads = jax.tree.structure(shapes).unflatten([x.value for x in results])
    first = len(results) - len(jax.tree.leaves(grads))
    factors = [x.mark if isinstance(x.mark, Factors) else _held(x.value) for x in results[first:]]
    return losses, aux, factors


def _held(gradients: jax.Array) -> Factors:
    """Gradients `[B, *shape]` as they are, with 1 as the other factor."""
    examples, *shape = gradients.shape
    left = jnp.ones((examples, 1, 1), gradients.dtype)
    right = gradients.reshape(examples, 1, math.prod(shape))
    return Factors(left, right, (), tuple(shape), tuple(range(len(shape))))
