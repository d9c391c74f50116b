"""Inner products of the task gradients, per block.

There are two implementations. On a single CPU device, `gram_cpu.py` reads the gradients in pieces that
fit the cache, because one matrix product over millions of columns would read the gradients from memory
for every pair of tasks. On all other backends, and on every mesh, plain products and sums are used: they
need no reshape of a sharded axis, and the devices exchange only the sums, not the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations_with_replacement

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtl_optax.core import gram_cpu
from mtl_optax.core.leaves import Leaf, TaskRows, pair_index, row_products, size_of, stack_of
from mtl_optax.core.types import DType

# Up to this many products, XLA computes them pair by pair, without a stack of the rows.
_MAX_PAIRWISE = 512


def gram_matrices(
    leaves: Sequence[Leaf],
    blocks: Sequence[int],
    num_blocks: int,
) -> jax.Array:
    """Computes the Gram matrix of the task gradients in every block.

    `G[b, s, t]` is the sum over the leaves of block b of `<g_s, g_t>`, accumulated in float32 (float64 if
    any leaf is float64). It is exactly symmetric. On a CPU each gradient is read once. On a mesh the
    result is replicated. Inside `shard_map` the sums are local.

    Args:
      leaves: the leaves of the gradient, stacked `[T, ...]` or `TaskRows`.
      blocks: the block of each leaf.
      num_blocks: the number of blocks; a block without leaves gets zeros.

    Returns:
      `[num_blocks, T, T]`.
    """
    grams = _sum_per_block(leaves, blocks, num_blocks, 2, gram_cpu.gram, _gram)
    return jnp.where(np.tri(leaves[0].shape[0], dtype=bool)[None], grams.mT, grams)


def squared_norms(
    leaves: Sequence[Leaf],
    blocks: Sequence[int],
    num_blocks: int,
) -> jax.Array:
    """Computes the squared norm of each task gradient in every block.

    The result is `[num_blocks, T]`, the diagonals of `gram_matrices`. It has the same arguments and
    precision, and takes T products instead of T (T + 1) / 2.
    """
    return _sum_per_block(leaves, blocks, num_blocks, 1, _squares, _squares)


def _sum_per_block(
    leaves: Sequence[Leaf],
    blocks: Sequence[int],
    num_blocks: int,
    rank: int,
    in_cache: Callable[..., jax.Array],
    by_xla: Callable[..., jax.Array],
) -> jax.Array:
    """Sums the products of the leaves in each block, `[T]` for `rank` 1 and `[T, T]` for `rank` 2."""
    blocks, num_tasks = tuple(blocks), leaves[0].shape[0]
    double = any(leaf.dtype == jnp.float64 for leaf in leaves)
    dtype = jnp.dtype(jnp.float64 if double else jnp.float32)
    zeros = jnp.zeros((num_tasks,) * rank, dtype)

    def total(parts: Iterable[tuple[jax.Array, int]]) -> jax.Array:
        sums: list[jax.Array | None] = [None] * num_blocks
        for part, block in parts:
            done = sums[block]
            sums[block] = part if done is None else done + part
        return jnp.stack([zeros if part is None else part for part in sums])

    def anywhere(leaves: Sequence[Leaf]) -> jax.Array:
        pairwise = len(leaves) * num_tasks**rank <= _MAX_PAIRWISE
        kept = [pair for pair in zip(leaves, blocks, strict=True) if size_of(pair[0])]
        return total((by_xla(leaf, dtype, pairwise), block) for leaf, block in kept)

    def on_one_cpu(leaves: Sequence[Leaf]) -> jax.Array:
        kept = gram_cpu.merge_small(leaves, blocks, dtype)
        return total(
            (in_cache(leaf, dtype, gram_cpu.has_kernel(place, leaf)), block)
            for place, (leaf, block) in enumerate(kept)
        )

    if jax.default_backend() == "cpu" and jax.device_count() == 1 and _unsharded(leaves):
        return lax.platform_dependent(leaves, cpu=on_one_cpu, default=anywhere)
    return anywhere(leaves)


def _gram(leaf: Leaf, dtype: DType, pairwise: bool) -> jax.Array:
    if not isinstance(leaf, TaskRows) or not pairwise:
        return row_products(stack_of(leaf).astype(dtype))
    pairs = combinations_with_replacement([row.astype(dtype) for row in leaf.rows], 2)
    return jnp.stack([jnp.sum(a * b) for a, b in pairs])[pair_index(leaf.shape[0])]


def _squares(leaf: Leaf, dtype: DType, pairwise: bool) -> jax.Array:
    if not isinstance(leaf, TaskRows) or not pairwise:
        stack = stack_of(leaf).astype(dtype)
        return jnp.sum(stack * stack, axis=tuple(range(1, stack.ndim)))
    return jnp.stack([jnp.sum(jnp.square(row.astype(dtype))) for row in leaf.rows])


def _unsharded(leaves: object) -> bool:
    arrays = jax.tree.leaves(leaves)
    return all(axis is None for x in arrays for axis in jax.typeof(x).sharding.spec)
