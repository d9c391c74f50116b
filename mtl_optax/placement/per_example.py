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
from mtl_optax.placement.marked_program import Marked, Product, evaluate

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
      ((1, 8, 3, 5), (1, 8, 3, 2))
    """
    per_example = jax.vmap(jax.value_and_grad(loss_fn, has_aux=True), (None, 0))
    program, shapes = jax.make_jaxpr(per_example, return_shape=True)(params, batch)
    inputs = [Marked(value) for value in jax.tree.leaves((params, batch))]
    results = evaluate(program.jaxpr, program.consts, inputs)
    (losses, aux), grads = jax.tree.structure(shapes).unflatten([x.value for x in results])
    first = len(results) - len(jax.tree.leaves(grads))
    return losses, aux, [_factors(*result) for result in results[first:]]


def _factors(gradients: jax.Array, mark: object) -> Factors:
    """The factors of the gradients `[B, *shape]` with respect to a leaf.

    Gradients that are no product are stored as they are, with 1 as the other factor.
    """
    examples, *shape = gradients.shape
    if not isinstance(mark, Product) or mark.order[0] >= len(mark.batch):
        right = gradients.reshape(1, examples, 1, math.prod(shape))
        left = jnp.ones((*right.shape[:3], 1), right.dtype)
        return Factors(left, right, tuple(shape), tuple(range(len(shape))), gradients.dtype)
    here, last = mark.order[0], len(mark.batch) - 1
    layers = mark.batch[:here] + mark.batch[here + 1 :]
    left, right = (jnp.moveaxis(x, here, last) for x in (mark.left, mark.right))
    left, right = (x.reshape(math.prod(layers), *x.shape[last:]) for x in (left, right))
    order = tuple(axis - (axis > here) for axis in mark.order[1:])
    shape = (*layers, *mark.rows, *mark.columns)
    return Factors(left, right, shape, order, gradients.dtype)
