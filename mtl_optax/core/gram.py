"""Inner products of per-task gradients, block by block: what a method needs of T large gradients.

Two ways of computing serve all backends. On a single CPU device the gradients are walked in blocks
that fit the cache (`gram_cpu.py`), because one matrix product over millions of columns leaves the
cache for every pair of tasks. Everywhere else, and on every mesh, plain products and sums are left
to XLA: they need no reshape of a sharded axis, and what the devices exchange is the sums, never the
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations_with_replacement
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtl_optax.core import gram_cpu
from mtl_optax.core.leaves import Leaf, Reader, TaskRows, pair_index, row_products, size_of

# Off the cache path, products are taken pair by pair (nothing is stacked) up to this many.
_MAX_PAIRWISE = 512


def gram_matrices(
    leaves: Sequence[Leaf],
    blocks: Sequence[int],
    num_blocks: int,
    scales: jax.Array | None = None,
) -> jax.Array:
    """The Gram matrix of the task gradients in every block.

    `G[b, s, t]` is the sum over the leaves of block b of `<g_s, g_t>`, accumulated in float32 (float64
    where a leaf is float64) and exactly symmetric. Each gradient is read once on a CPU; on a mesh the
    result is replicated. Inside `shard_map` the sums are local.

    Args:
      leaves: the leaves of the gradient, stacked `[T, ...]` or `TaskRows`.
      blocks: the block of each leaf.
      num_blocks: how many blocks there are; one without leaves gets zeros.
      scales: `[num_blocks, T]`, what each gradient is multiplied by as it is read; no scaled copy of a
        large leaf is made on a CPU. None for ones.

    Returns:
      `[num_blocks, T, T]`.
    """
    kinds = (2, gram_cpu.gram, _gram)
    grams = _sum_per_block(leaves, blocks, num_blocks, scales, *kinds)
    return jnp.where(np.tri(leaves[0].shape[0], dtype=bool)[None], grams.mT, grams)


def squared_norms(
    leaves: Sequence[Leaf],
    blocks: Sequence[int],
    num_blocks: int,
    scales: jax.Array | None = None,
) -> jax.Array:
    """The squared norm of each task gradient in every block, `[num_blocks, T]`.

    The diagonals of `gram_matrices`, with the same arguments and precision, at T instead of
    T (T + 1) / 2 products.
    """
    squares = _sums_of(jnp.square)
    return _sum_per_block(leaves, blocks, num_blocks, scales, 1, squares, squares)


def finiteness(leaves: Sequence[Leaf]) -> jax.Array:
    """Per task 0 where all its numbers are finite and NaN elsewhere, `[T]`.

    Made to be added up: over mapped axes the answers of the devices are summed. The sum of `x - x` is
    taken because XLA fuses a sum of floats on every backend, where it would store flags first.
    """
    marks = _sums_of(lambda x: x - x)
    # XLA would compute the sum again in every operation that reads a cheap function of it, one a leaf.
    # A square root counts as expensive, and leaves 0 and NaN what they are.
    return jnp.sqrt(_sum_per_block(leaves, (0,) * len(leaves), 1, None, 1, marks, marks)[0])


def _sum_per_block(
    leaves: Sequence[Leaf],
    blocks: Sequence[int],
    num_blocks: int,
    scales: jax.Array | None,
    rank: int,
    in_cache: Callable[..., jax.Array],
    by_xla: Callable[..., jax.Array],
) -> jax.Array:
    """Sums what one of two functions makes of each leaf, `[T]` or `[T, T]` by `rank`, over each block."""
    blocks, num_tasks = tuple(blocks), leaves[0].shape[0]
    double = any(leaf.dtype == jnp.float64 for leaf in leaves)
    dtype = jnp.dtype(jnp.float64 if double else jnp.float32)
    zeros = jnp.zeros((num_tasks,) * rank, dtype)

    def reader(block: int) -> Reader:
        return Reader(dtype, None if scales is None else scales[block].astype(dtype))

    def total(parts: Iterable[tuple[jax.Array, int]]) -> jax.Array:
        sums: list[jax.Array | None] = [None] * num_blocks
        for part, block in parts:
            done = sums[block]
            sums[block] = part if done is None else done + part
        return jnp.stack([zeros if part is None else part for part in sums])

    def anywhere(leaves: Sequence[Leaf]) -> jax.Array:
        pairwise = len(leaves) * num_tasks**rank <= _MAX_PAIRWISE
        kept = [pair for pair in zip(leaves, blocks, strict=True) if size_of(pair[0])]
        return total((by_xla(leaf, reader(block), pairwise), block) for leaf, block in kept)

    def on_one_cpu(leaves: Sequence[Leaf]) -> jax.Array:
        kept = gram_cpu.merge_small(leaves, blocks, dtype)
        return total(
            (in_cache(leaf, reader(block), gram_cpu.has_kernel(place, leaf)), block)
            for place, (leaf, block) in enumerate(kept)
        )

    if jax.default_backend() == "cpu" and jax.device_count() == 1 and _unsharded(leaves):
        return lax.platform_dependent(leaves, cpu=on_one_cpu, default=anywhere)
    return anywhere(leaves)


def _gram(leaf: Leaf, reader: Reader, pairwise: bool) -> jax.Array:
    if not isinstance(leaf, TaskRows) or not pairwise:
        return row_products(reader.stack(leaf))
    pairs = combinations_with_replacement(reader.rows(leaf), 2)
    return jnp.stack([jnp.sum(a * b) for a, b in pairs])[pair_index(leaf.shape[0])]


def _sums_of(function: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """Sums of a function of each element, one a task."""

    def sums(leaf: Leaf, reader: Reader, pairwise: bool) -> jax.Array:
        if not isinstance(leaf, TaskRows) or not pairwise:
            stack = function(reader.stack(leaf))
            return jnp.sum(stack, axis=tuple(range(1, stack.ndim)))
        return jnp.stack([jnp.sum(function(row)) for row in reader.rows(leaf)])

    return sums


def _unsharded(leaves: Any) -> bool:
    arrays = jax.tree.leaves(leaves)
    return all(axis is None for x in arrays for axis in jax.typeof(x).sharding.spec)
