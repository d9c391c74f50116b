"""Runs a program, and finds which of its results are products.

In the program of `vmap(grad(loss))`, the gradients with respect to the kernel of a dense layer are the
result of one `dot_general`, and those of a table of one `scatter-add`, perhaps transposed or cast; their
operands are the factors. `evaluate` runs the program, and marks each such result with its factors. XLA
removes the product itself, because nothing reads it. A parameter that is used several times has the
positions of all uses.

Every other result, such as the gradient of a bias, a scale, a convolution or layers in a `scan`, has no
mark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from mtl_optax.placement.factors import Factors


class Zeros(NamedTuple):
    """The mark of an array of zeros."""


Mark: TypeAlias = Factors | Zeros | None


class Marked(NamedTuple):
    """A value of the program, and what is known of it."""

    value: jax.Array
    mark: Mark = None


# The equations that call another program.
_CALLS = {"jit", "remat2", "closed_call", "custom_jvp_call", "custom_vjp_call"}


def evaluate(program: ClosedJaxpr, inputs: Sequence[Marked]) -> list[Marked]:
    """Runs a program equation by equation, and returns its results with their marks.

    Args:
      program: a jaxpr.
      inputs: the values of its arguments, with their marks.

    Returns:
      The results.

    Raises:
      ValueError: for a `shard_map` in the program.

    Example:

      >>> of_examples = jax.vmap(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)), (None, 0))
      >>> w, x = jnp.ones((2, 5)), jnp.ones((8, 3, 2))
      >>> (result,) = evaluate(jax.make_jaxpr(of_examples)(w, x), [Marked(w), Marked(x)])
      >>> result.value.shape, result.mark.left.shape, result.mark.right.shape
      ((8, 2, 5), (8, 3, 5), (8, 3, 2))
    """
    jaxpr = program.jaxpr
    known: dict[Var, Marked] = dict(zip(jaxpr.invars, inputs, strict=True))
    known.update(zip(jaxpr.constvars, map(Marked, program.consts), strict=True))

    def read(atom: Var | Literal) -> Marked:
        if isinstance(atom, Literal):
            return Marked(atom.val, Zeros() if atom.val == 0 else None)
        return known[atom]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _evaluate(eqn, list(map(read, eqn.invars))), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(eqn: JaxprEqn, operands: list[Marked]) -> list[Marked]:
    """The results of one equation."""
    name, values = eqn.primitive.name, [operand.value for operand in operands]
    if name in _CALLS:
        inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
        if name == "remat2":  # else XLA would keep what is to be recomputed
            operands = [Marked(value) for value in lax.optimization_barrier(values)]
        return evaluate(
            inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()), operands
        )
    if name == "shard_map":
        raise ValueError(
            'weighted_value_and_grad: mode="examples" cannot run a shard_map inside loss_fn. Let jit '
            'divide the model, or use mode="products".'
        )
    result = eqn.primitive.bind(*values, **eqn.params)
    if eqn.primitive.multiple_results:
        return [Marked(value) for value in result]
    return [Marked(result, _mark(eqn, operands, result))]


def _mark(eqn: JaxprEqn, operands: Sequence[Marked], result: jax.Array) -> Mark:
    """The mark of the result of an equation."""
    values = [operand.value for operand in operands]
    match eqn.primitive.name, *(operand.mark for operand in operands):
        case "convert_element_type", Factors() as factors:
            return factors._replace(right=factors.right.astype(result.dtype))
        case "convert_element_type" | "broadcast_in_dim", Zeros():
            return Zeros()
        case "transpose", Factors() as factors:
            return factors.transposed(eqn.params["permutation"])
        case "add_any", Factors() as one, Factors() as other:
            return one.plus(other)
        case "dot_general", *_:
            summed, batch = eqn.params["dimension_numbers"]
            return _dot(values, summed, batch, result)
        case "scatter-add", Zeros(), *_:
            return _scatter(values, eqn.params["dimension_numbers"], eqn.params["mode"])
    return None


# Axes of the two operands of a product.
_Axes: TypeAlias = tuple[Sequence[int], Sequence[int]]


def _dot(
    values: Sequence[jax.Array], summed: _Axes, batch: _Axes, result: jax.Array
) -> Factors | None:
    """The mark of a product, if both operands have the axis of the examples and no other in common."""
    if len(batch[0]) != 1:
        return None
    sides, shapes = [], []
    for x, positions, shared in zip(values, summed, batch, strict=True):
        free = [axis for axis in range(x.ndim) if axis not in (*positions, *shared)]
        size = math.prod(x.shape[axis] for axis in positions)
        x = x.transpose(*shared, *positions, *free)
        shapes.append(x.shape[1 + len(positions) :])
        sides.append(x.reshape(len(x), size, math.prod(shapes[-1])))
    (left, right), (rows, columns) = sides, shapes
    order = tuple(range(result.ndim - 1))
    return Factors(left, right.astype(result.dtype), rows, columns, order)


def _scatter(
    values: Sequence[jax.Array], numbers: lax.ScatterDimensionNumbers, mode: object
) -> Factors | None:
    """The mark of the transpose of a lookup of whole rows in a table `[B, M, *row]`."""
    table, indices, updates = values
    batch, rows, *row = table.shape
    row_axes = tuple(range(updates.ndim - len(row), updates.ndim))
    of_rows = lax.ScatterDimensionNumbers(row_axes, (1,), (1,), (0,), (0,))
    whole = list(updates.shape[updates.ndim - len(row) :]) == row
    if numbers != of_rows or not whole or mode == lax.GatherScatterMode.CLIP:
        return None
    left = indices.reshape(batch, -1)
    right = updates.reshape(batch, left.shape[1], math.prod(row))
    inside = (left >= 0) & (left < rows)
    left, right = jnp.where(inside, left, rows), jnp.where(inside[..., None], right, 0)
    return Factors(left, right, (rows,), tuple(row), tuple(range(table.ndim - 1)))
