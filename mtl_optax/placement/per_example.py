"""The factors of the gradients of B examples, read from the program by which JAX computes them.

In the program of `vmap(grad(loss))`, the gradients with respect to the kernel of a dense layer are the
result of one `dot_general`, and those of a table of one `scatter-add`, perhaps transposed or cast; their
operands are the factors. `_evaluate` runs the program, and marks each such result with its factors. XLA
removes the product itself, because nothing reads it. A parameter that is used several times has the
positions of all uses, and one that is used in a `scan` over layers has such a product per layer.

Every other gradient, such as that of a bias, a scale or a convolution, is stored as it is, `[B, *shape]`,
with 1 as the other factor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from mtl_optax.core.validation import where
from mtl_optax.placement.factors import Factors
from mtl_optax.placement.loss_vector import split_result


def check_examples(number: int, args: Any, kwargs: Any) -> Any:
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


def loss_of_example(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[[Any, Any], Any]:
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

    def of_example(params: object, example: Any) -> tuple[jax.Array, Any]:
        args, kwargs = jax.tree.map(lambda x: jnp.asarray(x)[None], example)
        losses, result = split_result(loss_fn(params, *args, **kwargs), has_aux)
        if isinstance(losses, tuple) or losses.shape != (1,):
            shape = losses.shape if isinstance(losses, jax.Array) else f"{len(losses)} scalars"
            raise ValueError(
                'weighted_value_and_grad: with mode="examples" loss_fn returns one loss for each example '
                f"of a batch, [B]; for a batch of one example it returned {shape}."
            )
        return losses[0], result[1] if has_aux else None

    return of_example


def gradients_in_factors(
    loss_fn: Callable[[Any, Any], Any], params: object, batch: object
) -> tuple[jax.Array, Any, list[Factors]]:
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
    inputs = [(value, None) for value in jax.tree.leaves((params, batch))]
    results = _evaluate(program.jaxpr, program.consts, inputs)
    values = [value for value, _ in results]
    (losses, aux), grads = jax.tree.structure(shapes).unflatten(values)
    first = len(results) - len(jax.tree.leaves(grads))
    return losses, aux, [_factors(*result) for result in results[first:]]


_static = partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Product:
    """The mark of an array that is the sum over p of `left[..., p, m] * right[..., p, n]`.

    `left` is `[*batch, P, M]`, or for a table the numbers of the rows, integers `[*batch, P]`. `right` is
    `[*batch, P, N]`. `free` has the shapes that are flattened to M and N, and `order` is the transposition
    of `[*batch, *free[0], *free[1]]` to the array.
    """

    left: jax.Array
    right: jax.Array
    batch: tuple[int, ...] = _static()
    free: tuple[tuple[int, ...], tuple[int, ...]] = _static()
    order: tuple[int, ...] = _static()

    def transposed(self, permutation: Sequence[int]) -> _Product:
        return dataclasses.replace(self, order=tuple(self.order[axis] for axis in permutation))

    @property
    def is_table(self) -> bool:
        return self.left.ndim < self.right.ndim

    def swapped(self) -> _Product:
        """The same array, with `left` and `right` exchanged."""
        start, (rows, columns) = len(self.batch), map(len, self.free)
        moved = [*range(start), *range(start + columns, start + columns + rows)]
        moved += range(start, start + columns)
        order = tuple(moved[axis] for axis in self.order)
        return _Product(self.right, self.left, self.batch, (self.free[1], self.free[0]), order)

    def with_one_hot(self) -> _Product:
        if not self.is_table:
            return self
        left = jax.nn.one_hot(self.left, math.prod(self.free[0]), dtype=self.right.dtype)
        return dataclasses.replace(self, left=left)

    def plus(self, other: _Product) -> _Product | None:
        """The mark of the sum: the positions of both, if the arrays have one layout."""
        if self.is_table != other.is_table:  # the table is used as a kernel elsewhere
            return self.with_one_hot().plus(other.with_one_hot())
        layout = self.batch, self.free, self.order
        if layout != (other.batch, other.free, other.order):
            other = other if other.is_table else other.swapped()
            if layout != (other.batch, other.free, other.order):
                return None
        left, right = (
            jnp.concatenate(parts, len(self.batch))
            for parts in ((self.left, other.left), (self.right, other.right))
        )
        return dataclasses.replace(self, left=left, right=right)

    def stacked(self, length: int) -> _Product:
        """The mark of the same array after a scan has stacked it, and its `left` and `right`."""
        order = (0, *(axis + 1 for axis in self.order))
        return dataclasses.replace(self, batch=(length, *self.batch), order=order)


# A value and its mark: a `_Product`, "zero", or None.
_Marked: TypeAlias = tuple[Any, Any]
# The equations that call another program.
_CALLS = {"jit", "remat2", "closed_call", "custom_jvp_call", "custom_vjp_call"}


def _evaluate(program: Jaxpr, consts: Sequence[Any], inputs: Sequence[_Marked]) -> list[_Marked]:
    """Runs a program equation by equation, and returns its results with their marks."""
    known: dict[Any, _Marked] = dict(zip(program.invars, inputs, strict=True))
    known.update(zip(program.constvars, [(const, None) for const in consts], strict=True))

    def read(atom: Any) -> _Marked:
        if isinstance(atom, Literal):
            return atom.val, "zero" if atom.val == 0 else None
        return known[atom]

    for eqn in program.eqns:
        operands = [read(atom) for atom in eqn.invars]
        values = [value for value, _ in operands]
        if eqn.primitive.name in _CALLS:
            inner: Any = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive.name == "remat2":  # else XLA would keep what is to be recomputed
                operands = [(x, None) for x in lax.optimization_barrier(values)]
            constants = getattr(inner, "consts", ())
            results = _evaluate(getattr(inner, "jaxpr", inner), constants, operands)
        elif eqn.primitive.name == "scan":
            results = _evaluate_scan(values, **eqn.params)
        elif eqn.primitive.name == "shard_map":
            raise ValueError(
                'weighted_value_and_grad: mode="examples" cannot run a shard_map inside loss_fn. Let jit '
                'divide the model, or use mode="products".'
            )
        else:
            value = eqn.primitive.bind(*values, **eqn.params)
            if eqn.primitive.multiple_results:
                results = [(x, None) for x in value]
            else:
                results = [(value, _mark(eqn, values, [mark for _, mark in operands]))]
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in program.outvars]


def _evaluate_scan(
    values: list[Any],
    jaxpr: Any,
    num_consts: int,
    num_carry: int,
    length: int,
    reverse: bool,
    **_: Any,
) -> list[_Marked]:
    carried = num_consts + num_carry

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[_Marked]]:
        inputs = [(x, None) for x in (*values[:num_consts], *carry, *xs)]
        results = _evaluate(jaxpr.jaxpr, jaxpr.consts, inputs)
        ys = [(y, m if isinstance(m, _Product) else None) for y, m in results[num_carry:]]
        return [x for x, _ in results[:num_carry]], ys

    carry, ys = lax.scan(body, values[num_consts:carried], values[carried:], length, reverse)
    return [(x, None) for x in carry] + [(y, m and m.stacked(length)) for y, m in ys]


def _mark(eqn: JaxprEqn, values: Sequence[Any], marks: Sequence[Any]) -> Any:
    """The mark of the result of an equation."""
    match eqn.primitive.name, *marks:
        case "convert_element_type", mark:
            return mark
        case "broadcast_in_dim", "zero":
            return "zero"
        case "transpose", _Product() as product:
            return product.transposed(eqn.params["permutation"])
        case "add_any", _Product() as one, _Product() as other:
            return one.plus(other)
        case "dot_general", *_:
            return _dot(values, *eqn.params["dimension_numbers"])
        case "scatter-add", "zero", *_:
            return _scatter(values, eqn.params["dimension_numbers"], eqn.params["mode"])
    return None


def _dot(values: Sequence[jax.Array], summed: Any, batch: Any) -> _Product | None:
    """The mark of a product, if both operands have the axis of the examples."""
    if not batch[0]:
        return None
    sides, shapes = [], []
    for x, positions, shared in zip(values, summed, batch, strict=True):
        free = [axis for axis in range(x.ndim) if axis not in (*positions, *shared)]
        sizes = [[x.shape[axis] for axis in axes] for axes in (shared, positions, free)]
        x = x.transpose(*shared, *positions, *free)
        sides.append(x.reshape(*sizes[0], math.prod(sizes[1]), math.prod(sizes[2])))
        shapes.append(tuple(sizes[2]))
    left, right = sides
    order = tuple(range(len(shared) + len(shapes[0]) + len(shapes[1])))
    return _Product(left, right, left.shape[:-2], (shapes[0], shapes[1]), order)


def _scatter(values: Sequence[Any], numbers: Any, mode: Any) -> _Product | None:
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
    return _Product(left, right, batch, ((rows,), tuple(row)), tuple(range(table.ndim)))


def _factors(gradients: jax.Array, mark: Any) -> Factors:
    """The factors of the gradients `[B, *shape]` with respect to a leaf."""
    examples, *shape = gradients.shape
    if not isinstance(mark, _Product) or mark.order[0] >= len(mark.batch):
        right = gradients.reshape(1, examples, 1, math.prod(shape))
        left = jnp.ones((*right.shape[:3], 1), right.dtype)
        return Factors(left, right, tuple(shape), tuple(range(len(shape))), gradients.dtype)
    here, last = mark.order[0], len(mark.batch) - 1
    layers = mark.batch[:here] + mark.batch[here + 1 :]
    left, right = (jnp.moveaxis(x, here, last) for x in (mark.left, mark.right))
    left, right = (x.reshape(math.prod(layers), *x.shape[last:]) for x in (left, right))
    order = tuple(axis - (axis > here) for axis in mark.order[1:])
    shape = (*layers, *mark.free[0], *mark.free[1])
    return Factors(left, right, shape, order, gradients.dtype)
