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
    """An array `[B, ...]` of B gradients, each a sum over P positions: `left[b].T @ right[b]`.

    Attributes:
      left: `[B, P, M]`; for a table, the numbers of its rows, integers `[B, P]`; M stands for no row.
      right: `[B, P, N]`.
      rows: the shape that is flattened to M.
      columns: the shape that is flattened to N.
      order: the transposition of `[*rows, *columns]` to the shape of a gradient.
    """

    left: jax.Array
    right: jax.Array
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def is_table(self) -> bool:
        """Whether `left` is one-hot."""
        return self.left.ndim == 2

    @property
    def num_rows(self) -> int:
        """M."""
        return math.prod(self.rows)

    def transposed(self, permutation: Sequence[int]) -> Factors | None:
        """The factors of the array with its axes permuted; None if the examples are not in front."""
        if permutation[0] != 0:
            return None
        return self._replace(order=tuple(self.order[axis - 1] for axis in permutation[1:]))

    def plus(self, other: Factors) -> Factors | None:
        """The factors of the sum, with the positions of both; None if the layouts differ."""
        if self.is_table != other.is_table:  # the table is used as a kernel elsewhere
            return self._with_one_hot().plus(other._with_one_hot())
        for same in (other,) if other.is_table else (other, other._swapped()):
            if same[2:] == self[2:]:
                left = jnp.concatenate([self.left, same.left], 1)
                return self._replace(left=left, right=jnp.concatenate([self.right, same.right], 1))
        return None

    def _swapped(self) -> Factors:
        """The factors of the same array, with `left` and `right` exchanged."""
        m, n = len(self.rows), len(self.columns)
        order = tuple(axis + n if axis < m else axis - m for axis in self.order)
        return Factors(self.right, self.left, self.columns, self.rows, order)

    def _with_one_hot(self) -> Factors:
        """The factors of the same array, which is no table."""
        if not self.is_table:
            return self
        return self._replace(left=jax.nn.one_hot(self.left, self.num_rows, dtype=self.right.dtype))


@dataclasses.dataclass(frozen=True)
class ExampleGradients:
    """The gradients of the losses of B examples, represented by their factors.

    Every function takes `chosen`, which says for every leaf whether it counts.

    Attributes:
      factors: those of every leaf.
      axis_name: mapped axes over which the leaves are divided.

    Example:

      >>> left, right = jnp.ones((2, 1, 3)), jnp.array([[[1.]], [[2.]]])
      >>> gradients = ExampleGradients([Factors(left, right, (3,), (1,), (0, 1))], None)
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
                return _gram(leaf._replace(left=left[None], right=right[None]), dtype)[0, 0]

            return jax.vmap(of_example)(leaf.left, leaf.right)

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

          >>> left, right = jnp.ones((2, 1, 3)), jnp.array([[[1.]], [[jnp.nan]]])
          >>> gradients = ExampleGradients([Factors(left, right, (3,), (1,), (0, 1))], None)
          >>> both = jnp.array([True, True])
          >>> total, active = gradients.weighted_sum(jnp.full(2, 5.0), both, [True])
          >>> total[0].tolist(), active.tolist()
          ([[5.0], [5.0], [5.0]], [True, False])
        """
        leaves = [leaf for leaf, here in zip(self.factors, chosen, strict=True) if here]
        for x in [] if finite else [x for leaf in leaves for x in (leaf.left, leaf.right)]:
            active &= jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
        keep, weight = (x.reshape(-1, 1, 1) for x in (active, weights))

        def of_leaf(leaf: Factors) -> jax.Array:
            """One product over the positions of all examples."""
            (examples, positions, columns), dtype = leaf.right.shape, leaf.right.dtype
            right = task_tree.narrow(jnp.where(keep, leaf.right, 0) * weight, dtype)
            right = right.reshape(examples * positions, columns)
            wide = task_tree.statistics_dtype(right)
            if leaf.is_table:
                table = jnp.zeros((leaf.num_rows, columns), wide)
                total = table.at[leaf.left.ravel()].add(right.astype(wide), mode="drop")
            else:
                left = jnp.where(keep, leaf.left, 0).reshape(len(right), leaf.num_rows)
                total = jnp.einsum("pm,pn->mn", left, right, preferred_element_type=wide)
            total = total.reshape(*leaf.rows, *leaf.columns).transpose(leaf.order)
            return task_tree.narrow(total, dtype)

        return [of_leaf(leaf) for leaf in leaves], active

    def _sum(self, of_leaf: Callable[[Factors], jax.Array], chosen: Sequence[bool]) -> jax.Array:
        parts = [of_leaf(leaf) for leaf, here in zip(self.factors, chosen, strict=True) if here]
        return task_tree.sum_over(functools.reduce(operator.add, parts), self.axis_name)


def _gram(leaf: Factors, dtype: DType) -> jax.Array:
    """The Gram matrix of the gradients with respect to one leaf."""
    examples, positions, columns = leaf.right.shape
    rows, left, right = leaf.num_rows, leaf.left, leaf.right.astype(dtype)
    pairs = examples * positions**2

    def by_positions(mine: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Multiplies the products of positions of one example and all others."""
        if leaf.is_table:
            same = mine[0][None, :, None] == left[:, None]
        else:
            same = _product("pm,cqm->cpq", mine[0], left)
        return jnp.sum(same * _product("pn,cqn->cpq", mine[1], right), axis=(1, 2))

    def by_tables(mine: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Reads the gradient of one example in the rows that the other examples look up."""
        table = jnp.zeros((rows, columns), dtype).at[mine[0]].add(mine[1], mode="drop")
        return jnp.sum(table.at[left].get(mode="fill", fill_value=0) * right, axis=(1, 2))

    def by_rows() -> jax.Array:
        """Multiplies some rows of all gradients at a time, as many as have the size of `right`."""
        padded = jnp.pad(left, ((0, 0), (0, 0), (0, -rows % positions)))
        parts = jnp.moveaxis(padded.reshape(examples, positions, -1, positions), 2, 0)

        def add(total: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
            return total + row_products(_product("bpm,bpn->bmn", part, right)), None

        return lax.scan(add, jnp.zeros((examples, examples), dtype), parts)[0]

    # The way with fewer multiplications is chosen; factors that both ways share are left out.
    if leaf.is_table:
        # For the norm of one example, a table costs more than it saves.
        few = examples == 1 or pairs <= rows + examples * positions
    else:
        left = left.astype(dtype)
        few = pairs * (rows + columns) <= (examples + positions) * rows * columns
    if few:
        # For as many examples at once as fit the size of `right`.
        return lax.map(by_positions, (left, right), batch_size=max(1, columns // max(1, positions)))
    return lax.map(by_tables, (left, right)) if leaf.is_table else by_rows()
