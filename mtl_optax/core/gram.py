"""Inner products of the task gradients, per block.

Products and sums are all that is used: they need no reshape of a sharded axis, and the devices of a mesh
exchange only the sums, not the gradients. A single CPU device reads large leaves in pieces.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtl_optax.core.leaves import Leaf, TaskRows, row_products, size_of, stack_of
from mtl_optax.core.types import DType

# Up to this many products, XLA computes them pair by pair, without a stack of the rows.
_MAX_PAIRWISE = 512
# A CPU's product of a matrix with very many columns reads it from memory for every pair of rows. Pieces
# of this many columns fit its cache; smaller leaves are not worth a loop.
_PIECE, _LARGE = 8_192, 524_288


def gram_matrices(leaves: Sequence[Leaf], blocks: Sequence[int], num_blocks: int) -> jax.Array:
    """Computes the Gram matrix of the task gradients in every block.

    `G[b, s, t]` is the sum over the leaves of block b of `<g_s, g_t>`, accumulated in float32 (float64 if
    any leaf is float64). It is exactly symmetric. On a mesh the result is replicated.
    Inside `shard_map` the sums are local.

    Args:
      leaves: the leaves of the gradient, stacked `[T, ...]` or `TaskRows`.
      blocks: the block of each leaf.
      num_blocks: the number of blocks; a block without leaves gets zeros.

    Returns:
      `[num_blocks, T, T]`.
    """
    grams = _sum_per_block(_gram, leaves, blocks, num_blocks, 2)
    return jnp.where(np.tri(leaves[0].shape[0], dtype=bool)[None], grams.mT, grams)


def squared_norms(leaves: Sequence[Leaf], blocks: Sequence[int], num_blocks: int) -> jax.Array:
    """Computes the squared norm of each task gradient in every block.

    The result is `[num_blocks, T]`, the diagonals of `gram_matrices`. It has the same arguments and
    precision, and takes T products instead of T (T + 1) / 2.
    """
    return _sum_per_block(_squares, leaves, blocks, num_blocks, 1)


def _sum_per_block(
    products: Callable[[Leaf, DType], jax.Array],
    leaves: Sequence[Leaf],
    blocks: Sequence[int],
    num_blocks: int,
    rank: int,
) -> jax.Array:
    """Sums the `products` of the leaves in each block, `[T]` for `rank` 1 and `[T, T]` for `rank` 2."""
    num_tasks = leaves[0].shape[0]
    double = any(leaf.dtype == jnp.float64 for leaf in leaves)
    dtype = jnp.dtype(jnp.float64 if double else jnp.float32)
    pairwise = len(leaves) * num_tasks**rank <= _MAX_PAIRWISE
    parts: list[list[jax.Array]] = [[] for _ in range(num_blocks)]
    for leaf, block in zip(leaves, blocks, strict=True):
        if size_of(leaf):
            parts[block].append(products(leaf if pairwise else stack_of(leaf), dtype))
    zeros = [jnp.zeros((num_tasks,) * rank, dtype)]
    return jnp.stack([functools.reduce(operator.add, part or zeros) for part in parts])


def _gram(leaf: Leaf, dtype: DType) -> jax.Array:
    """Computes all inner products of a stacked leaf, and the upper triangle of those of a separate one."""
    if not isinstance(leaf, TaskRows):
        return _stack_products(leaf, dtype)
    pairs = combinations_with_replacement([row.astype(dtype) for row in leaf.rows], 2)
    found = jnp.stack([jnp.sum(a * b) for a, b in pairs])
    place = np.zeros((len(leaf.rows), len(leaf.rows)), np.int32)
    place[np.triu_indices_from(place)] = np.arange(len(found))
    return found[place]


def _stack_products(stack: jax.Array, dtype: DType) -> jax.Array:
    """Computes `row_products`, in pieces on a single CPU device."""

    def whole(stack: jax.Array) -> jax.Array:
        return row_products(stack.astype(dtype))

    def in_pieces(stack: jax.Array) -> jax.Array:
        rows = stack.reshape(stack.shape[0], -1)
        number, rest = divmod(rows.shape[1], _PIECE)

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            return total + whole(lax.dynamic_slice_in_dim(rows, i * _PIECE, _PIECE, axis=1))

        return lax.fori_loop(0, number, add, whole(rows[:, rows.shape[1] - rest :]))

    sharded = jax.device_count() > 1 or any(jax.typeof(stack).sharding.spec)
    if size_of(stack) < _LARGE or sharded:
        return whole(stack)
    return lax.platform_dependent(stack, cpu=in_pieces, default=whole)


def _squares(leaf: Leaf, dtype: DType) -> jax.Array:
    if not isinstance(leaf, TaskRows):
        stack = leaf.astype(dtype)
        return jnp.sum(stack * stack, axis=tuple(range(1, stack.ndim)))
    return jnp.stack([jnp.sum(jnp.square(row.astype(dtype))) for row in leaf.rows])
