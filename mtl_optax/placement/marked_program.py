"""Runs a program, and finds which of its results are products.

In the program of `vmap(grad(loss))`, the gradients with respect to the kernel of a dense layer are the
result of one `dot_general`, and those of a table of one `scatter-add`, perhaps transposed or cast; their
operands are the factors. `evaluate` runs the program, and marks each such result with its factors. XLA
removes the product itself, because nothing reads it. A parameter that is used several times has the
positions of all uses, and one that is used in a `scan` over layers has such a product per layer.

Every other result, such as the gradient of a bias, a scale or a convolution, has no mark.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

_static = partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product:
    """The mark of an array that is the sum over p of `left[..., p, m] * right[..., p, n]`.

    Attributes:
      left: `[*batch, P, M]`; for a table the numbers of its rows, integers `[*batch, P]`.
      right: `[*batch, P, N]`.
      batch: the shape of the axes in front.
      rows: the shape that is flattened to M.
      columns: the shape that is flattened to N.
      order: the transposition of `[*batch, *rows, *columns]` to the array.
    """

    left: jax.Array
    right: jax.Array
    batch: tuple[int, ...] = _static()
    rows: tuple[int, ...] = _static()
    columns: tuple[int, ...] = _static()
    order: tuple[int, ...] = _static()

    @property
    def is_table(self) -> bool:
        """Whether `left` is one-hot."""
        return self.left.ndim < self.right.ndim

    def transposed(self, permutation: Sequence[int]) -> Product:
        """The mark of the array with its axes permuted."""
        return dataclasses.replace(self, order=tuple(self.order[axis] for axis in permutation))

    def stacked(self, length: int) -> Product:
        """The mark of the same array after a scan has stacked it, and its `left` and `right`."""
        order = (0, *(axis + 1 for axis in self.order))
        return dataclasses.replace(self, batch=(length, *self.batch), order=order)

    def swapped(self) -> Product:
        """The mark of the same array, with `left` and `right` exchanged."""
        first = len(self.batch)
        middle, end = first + len(self.columns), first + len(self.columns) + len(self.rows)
        moved = [*range(first), *range(middle, end), *range(first, middle)]
        order = tuple(moved[axis] for axis in self.order)
        return Product(self.right, self.left, self.batch, self.columns, self.rows, order)

    def with_one_hot(self) -> Product:
        """The mark of the same array, which is no table."""
        if not self.is_table:
            return self
        left = jax.nn.one_hot(self.left, math.prod(self.rows), dtype=self.right.dtype)
        return dataclasses.replace(self, left=left)

    def plus(self, other: Product) -> Product | None:
        """The mark of the sum: the positions of both, if the arrays have one layout."""
        if self.is_table != other.is_table:  # the table is used as a kernel elsewhere
            return self.with_one_hot().plus(other.with_one_hot())
        for same in (other,) if other.is_table else (other, other.swapped()):
            if same._layout == self._layout:
                left = jnp.concatenate([self.left, same.left], len(self.batch))
                right = jnp.concatenate([self.right, same.right], len(self.batch))
                return dataclasses.replace(self, left=left, right=right)
        return None

    @property
    def _layout(self) -> tuple[tuple[int, ...], ...]:
        return self.batch, self.rows, self.columns, self.order


class Zeros(NamedTuple):
    """The mark of an array of zeros."""


class Marked(NamedTuple):
    """A value of the program, and what is known of it."""

    value: jax.Array
    mark: Product | Zeros | None = None


# The equations that call another program.
_CALLS = {"jit", "remat2", "closed_call", "custom_jvp_call", "custom_vjp_call"}


def evaluate(program: Jaxpr, consts: Sequence[jax.Array], inputs: Sequence[Marked]) -> list[Marked]:
    """Runs a program equation by equation, and returns its results with their marks.

    Args:
      program: a jaxpr.
      consts: the values of its constants.
      inputs: the values of its arguments, with their marks.

    Returns:
      The results.

    Raises:
      ValueError: for a `shard_map` in the program.

    Example:

      >>> of_examples = jax.vmap(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)), (None, 0))
      >>> w, x = jnp.ones((2, 5)), jnp.ones((8, 3, 2))
      >>> program = jax.make_jaxpr(of_examples)(w, x)
      >>> (result,) = evaluate(program.jaxpr, program.consts, [Marked(w), Marked(x)])
      >>> result.value.shape, result.mark.left.shape, result.mark.right.shape
      ((8, 2, 5), (8, 3, 5), (8, 3, 2))
    """
    known: dict[Var, Marked] = dict(zip(program.invars, inputs, strict=True))
    known.update(zip(program.constvars, map(Marked, consts), strict=True))

    def read(atom: Var | Literal) -> Marked:
        if isinstance(atom, Literal):
            return Marked(atom.val, Zeros() if atom.val == 0 else None)
        return known[atom]

    for eqn in program.eqns:
        results = _evaluate_equation(eqn, [read(atom) for atom in eqn.invars])
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in program.outvars]


def _evaluate_equation(eqn: JaxprEqn, operands: list[Marked]) -> list[Marked]:
    name, values = eqn.primitive.name, [operand.value for operand in operands]
    if name in _CALLS:
        inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
        if name == "remat2":  # else XLA would keep what is to be recomputed
            operands = [Marked(value) for value in lax.optimization_barrier(values)]
        if isinstance(inner, ClosedJaxpr):
            return evaluate(inner.jaxpr, inner.consts, operands)
        return evaluate(inner, (), operands)
    if name == "scan":
        return _evaluate_scan(values, **eqn.params)
    if name == "shard_map":
        raise ValueError(
            'weighted_value_and_grad: mode="examples" cannot run a shard_map inside loss_fn. Let jit '
            'divide the model, or use mode="products".'
        )
    result = eqn.primitive.bind(*values, **eqn.params)
    if eqn.primitive.multiple_results:
        return [Marked(value) for value in result]
    return [Marked(result, _mark(eqn, operands))]


def _evaluate_scan(
    values: list[jax.Array],
    jaxpr: ClosedJaxpr,
    num_consts: int,
    num_carry: int,
    length: int,
    reverse: bool,
    **_: object,
) -> list[Marked]:
    carried = num_consts + num_carry

    def body(carry: list[jax.Array], xs: list[jax.Array]) -> tuple[list[jax.Array], list[Marked]]:
        inputs = [Marked(x) for x in (*values[:num_consts], *carry, *xs)]
        results = evaluate(jaxpr.jaxpr, jaxpr.consts, inputs)
        return [x.value for x in results[:num_carry]], results[num_carry:]

    carry, ys = lax.scan(body, values[num_consts:carried], values[carried:], length, reverse)
    stacked = [
        Marked(y.value, y.mark.stacked(length) if isinstance(y.mark, Product) else y.mark)
        for y in ys
    ]
    return [*map(Marked, carry), *stacked]


def _mark(eqn: JaxprEqn, operands: Sequence[Marked]) -> Product | Zeros | None:
    """The mark of the result of an equation."""
    values = [operand.value for operand in operands]
    match eqn.primitive.name, *(operand.mark for operand in operands):
        case "convert_element_type", mark:
            return mark
        case "broadcast_in_dim", Zeros():
            return Zeros()
        case "transpose", Product() as product:
            return product.transposed(eqn.params["permutation"])
        case "add_any", Product() as one, Product() as other:
            return one.plus(other)
        case "dot_general", *_:
            return _dot(values, *eqn.params["dimension_numbers"])
        case "scatter-add", Zeros(), *_:
            return _scatter(values, eqn.params["dimension_numbers"], eqn.params["mode"])
    return None


# Axes of the two operands of a product.
_Axes: TypeAlias = tuple[Sequence[int], Sequence[int]]


def _dot(values: Sequence[jax.Array], summed: _Axes, batch: _Axes) -> Product | None:
    """The mark of a product, if both operands have the axis of the examples."""
    if not batch[0]:
        return None
    sides, shapes = [], []
    for x, positions, shared in zip(values, summed, batch, strict=True):
        free = [axis for axis in range(x.ndim) if axis not in (*positions, *shared)]
        sizes = [tuple(x.shape[axis] for axis in axes) for axes in (shared, positions, free)]
        x = x.transpose(*shared, *positions, *free)
        sides.append(x.reshape(*sizes[0], math.prod(sizes[1]), math.prod(sizes[2])))
        shapes.append(sizes[2])
    (left, right), (rows, columns) = sides, shapes
    order = tuple(range(len(batch[0]) + len(rows) + len(columns)))
    return Product(left, right, left.shape[:-2], rows, columns, order)


def _scatter(
    values: Sequence[jax.Array], numbers: lax.ScatterDimensionNumbers, mode: object
) -> Product | None:
    """The mark of the transpose of a lookup of whole rows in a table `[*batch, M, *row]`."""
    table, indices, updates = values
    first = tuple(range(len(numbers.operand_batching_dims)))
    (rows, *row), along = table.shape[len(first) :], (len(first),)
    row_axes = tuple(range(updates.ndim - len(row), updates.ndim))
    of_rows = lax.ScatterDimensionNumbers(row_axes, along, along, first, first)
    whole = [updates.shape[axis] for axis in row_axes] == row
    if numbers != of_rows or not whole or mode == lax.GatherScatterMode.CLIP:
        return None
    batch = table.shape[: len(first)]
    positions = math.prod(indices.shape[len(first) : -1])
    right = updates.reshape(*batch, positions, math.prod(row))
    left = indices.reshape(*batch, positions)
    inside = (left >= 0) & (left < rows)
    left, right = jnp.where(inside, left, rows), jnp.where(inside[..., None], right, 0)
    return Product(left, right, batch, (rows,), tuple(row), tuple(range(table.ndim)))
