"""Inner products and weighted sums of the gradients of B examples, without these gradients.

With the inputs `A_s` `[P, M]` of a dense layer at the P positions of example s, and the cotangents `D_s`
`[P, N]` of its outputs, the gradient of its kernel is the product `A_s^T D_s`. Its factors are enough:

    <A_s^T D_s, A_t^T D_t> = sum_pq (A_s A_t^T * D_s D_t^T)[p, q]        sum_s w_s A_s^T D_s = A^T (w D)

The gradient of a table is the same product with a one-hot `A_s`, held as the numbers of the rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.core import task_tree
from mtl_optax.core.leaves import row_products
from mtl_optax.core.types import AxisName, DType

_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Factors(NamedTuple):
    """The gradients of B examples with respect to one leaf: in each of L layers, a sum over P positions.

    Attributes:
      left: `[L, B, P, M]`; for a table, the numbers of its rows, integers `[L, B, P]`; M stands for no row.
      right: `[L, B, P, N]`.
      shape: the shape `[L, M, N]`, in which each of L, M and N may be several axes.
      order: the transposition from `shape` to the shape of the leaf.
      dtype: that of the leaf.
    """

    left: jax.Array
    right: jax.Array
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: DType

    @property
    def is_table(self) -> bool:
        """Whether `left` is one-hot."""
        return self.left.ndim == 3

    @property
    def num_rows(self) -> int:
        """M, or 0 for a table without columns."""
        if not self.is_table:
            return self.left.shape[3]
        return math.prod(self.shape) // max(1, self.right.shape[0] * self.right.shape[3])


@dataclasses.dataclass(frozen=True)
class ExampleGradients:
    """The gradients of the losses of B examples, represented by their factors.

    Every function takes `chosen`, which says for every leaf whether it counts.

    Attributes:
      factors: those of every leaf.
      axis_name: mapped axes over which the leaves are divided.

    Example:

      >>> left, right = jnp.ones((1, 2, 1, 3)), jnp.array([[[[1.]], [[2.]]]])
      >>> kernel = Factors(left, right, (3, 1), (0, 1), jnp.float32)
      >>> gradients = ExampleGradients([kernel], None)
      >>> gradients.squared_norms([True]).tolist()
      [3.0, 12.0]
      >>> gradients.gram_matrix([True], jnp.float32).tolist()
      [[3.0, 6.0], [6.0, 12.0]]
    """

    factors: Sequence[Factors]
    axis_name: AxisName

    def squared_norms(self, chosen: Sequence[bool]) -> jax.Array:
        """Computes the squared norms `[B]`, in at least float32."""
        dtype = task_tree.statistics_dtype([leaf.right for leaf in self.factors])

        def of_leaf(leaf: Factors) -> jax.Array:
            def of_example(left: jax.Array, right: jax.Array) -> jax.Array:
                return _gram(leaf._replace(left=left[:, None], right=right[:, None]), dtype)[0, 0]

            return jax.vmap(of_example, 1)(leaf.left, leaf.right)

        return self._sum(of_leaf, chosen)

    def gram_matrix(self, chosen: Sequence[bool], dtype: DType) -> jax.Array:
        """Computes the Gram matrix `[B, B]`, in `dtype`."""
        return self._sum(lambda leaf: _gram(leaf, dtype), chosen)

    def weighted_sum(
        self, weights: jax.Array, active: jax.Array, chosen: Sequence[bool], *, finite: bool = False
    ) -> tuple[list[jax.Array], jax.Array]:
        """Computes `sum_b weights[b] * g_b` of the chosen leaves, over the examples that are finite.

        Args:
          weights: `[B]`.
          active: bool `[B]`, the examples that count.
          chosen: see the class.
          finite: whether the gradients of all active examples are known to be finite.

        Returns:
          The chosen leaves of the sum, and bool `[B]`, the examples that went into it.

        Example:

          >>> left, right = jnp.ones((1, 2, 1, 3)), jnp.array([[[[1.]], [[jnp.nan]]]])
          >>> kernel = Factors(left, right, (3, 1), (0, 1), jnp.float32)
          >>> gradients, both = ExampleGradients([kernel], None), jnp.array([True, True])
          >>> total, active = gradients.weighted_sum(jnp.full(2, 5.0), both, [True])
          >>> total[0].tolist(), active.tolist()
          ([[5.0], [5.0], [5.0]], [True, False])
        """
        leaves = [leaf for leaf, here in zip(self.factors, chosen, strict=True) if here]
        for x in [] if finite else [x for leaf in leaves for x in (leaf.left, leaf.right)]:
            active &= jnp.all(jnp.isfinite(x), axis=(0, *range(2, x.ndim)))
        keep, weight = (x.reshape(1, -1, 1, 1) for x in (active, weights))

        def of_leaf(leaf: Factors) -> jax.Array:
            """One product over the positions of all examples."""
            layers, examples, positions, columns = leaf.right.shape
            right = task_tree.narrow(jnp.where(keep, leaf.right, 0) * weight, leaf.right.dtype)
            right = right.reshape(layers, examples * positions, columns)
            wide = task_tree.statistics_dtype(right)
            if leaf.is_table:
                table = jnp.zeros((layers, leaf.num_rows, columns), wide)
                add = jax.vmap(lambda table, row, x: table.at[row].add(x, mode="drop"))
                total = add(table, leaf.left.reshape(right.shape[:2]), right.astype(wide))
            else:
                left = jnp.where(keep, leaf.left, 0).reshape(*right.shape[:2], leaf.num_rows)
                total = jnp.einsum("lpm,lpn->lmn", left, right, preferred_element_type=wide)
            return task_tree.narrow(total.reshape(leaf.shape).transpose(leaf.order), leaf.dtype)

        return [of_leaf(leaf) for leaf in leaves], active

    def _sum(self, of_leaf: Callable[[Factors], jax.Array], chosen: Sequence[bool]) -> jax.Array:
        parts = [of_leaf(leaf) for leaf, here in zip(self.factors, chosen, strict=True) if here]
        return task_tree.sum_over(functools.reduce(operator.add, parts), self.axis_name)


def _gram(leaf: Factors, dtype: DType) -> jax.Array:
    """The Gram matrix of the gradients with respect to one leaf, the sum of those of its layers."""
    _, examples, positions, columns = leaf.right.shape
    rows = leaf.num_rows

    def by_positions(left: jax.Array, right: jax.Array) -> jax.Array:
        """Multiplies products of positions, for as many examples at once as fit the size of `right`."""

        def row(mine: tuple[jax.Array, jax.Array]) -> jax.Array:
            if leaf.is_table:
                same = mine[0][None, :, None] == left[:, None]
            else:
                same = _product("pm,cqm->cpq", mine[0], left)
            return jnp.sum(same * _product("pn,cqn->cpq", mine[1], right), axis=(1, 2))

        return lax.map(row, (left, right), batch_size=max(1, columns // max(1, positions)))

    def by_tables(left: jax.Array, right: jax.Array) -> jax.Array:
        """Reads the gradient of one example at a time in the rows that the other examples look up."""

        def row(mine: tuple[jax.Array, jax.Array]) -> jax.Array:
            table = jnp.zeros((rows, columns), dtype).at[mine[0]].add(mine[1], mode="drop")
            return jnp.sum(table.at[left].get(mode="fill", fill_value=0) * right, axis=(1, 2))

        return lax.map(row, (left, right))

    def by_rows(left: jax.Array, right: jax.Array) -> jax.Array:
        """Multiplies some rows of all gradients at a time, as many as have the size of `right`."""
        left = jnp.pad(left, ((0, 0), (0, 0), (0, -rows % positions)))
        parts = jnp.moveaxis(left.reshape(examples, positions, -1, positions), 2, 0)

        def add(total: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
            return total + row_products(_product("bpm,bpn->bmn", part, right)), None

        return lax.scan(add, jnp.zeros((examples, examples), dtype), parts)[0]

    # The way with fewer multiplications is chosen; factors that both ways share are left out.
    pairs = examples * positions**2
    if leaf.is_table:
        # For the norm of one example, a table costs more than it saves.
        few, left = examples == 1 or pairs <= rows + examples * positions, leaf.left
    else:
        few = pairs * (rows + columns) <= (examples + positions) * rows * columns
        left = leaf.left.astype(dtype)
    of_layer = by_positions if few else by_tables if leaf.is_table else by_rows
    return lax.map(lambda layer: of_layer(*layer), (left, leaf.right.astype(dtype))).sum(axis=0)
