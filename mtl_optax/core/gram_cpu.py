"""The Gram matrix on a single CPU device: the gradients are read in pieces that fit the cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtl_optax.core.leaves import (
    Leaf,
    TaskRows,
    pair_index,
    row_products,
    rows_of,
    size_of,
    stack_of,
)
from mtl_optax.core.types import DType

# The largest leaves, with at least _LARGE elements per task, get a separate kernel each. Their number is
# limited to _MAX_KERNELS, because every kernel costs compile time.
_LARGE, _MAX_KERNELS = 262_144, 16
# Stacked leaves below this size are concatenated: the copy takes less time than one operation per leaf.
_SMALL_STACK = 4_096
# The number of elements of all tasks that one iteration reads: a quarter of a megabyte fits the L2 cache.
_LOOP_BLOCK = 65_280
# Products are summed in tiles of _ROWS x _LANES: XLA unrolls the rows and vectorises the lanes.
_ROWS, _LANES = 8, 256
# With more tasks, the sums of one pass no longer fit the registers.
_TASKS_IN_REGISTERS = 5


def gram(leaf: Leaf, dtype: DType, own_kernel: bool) -> jax.Array:
    """Computes the inner products of all pairs of rows of one leaf, `[T, T]`."""
    num_tasks, size = leaf.shape[0], size_of(leaf)
    if not own_kernel:
        return row_products(stack_of(leaf).astype(dtype).reshape(num_tasks, size))
    if num_tasks <= _TASKS_IN_REGISTERS:
        return _sums_in_registers(_flat_rows(leaf), dtype)
    # An odd multiple of 16, because rows at a distance of a power of two share cache sets.
    block = 16 * (_LOOP_BLOCK // max(num_tasks, 16) // 16 | 1)
    if isinstance(leaf, TaskRows):
        return _loop_over_rows(_flat_rows(leaf), block, dtype)
    return _loop_over_stack(leaf.reshape(num_tasks, size), block, dtype)


def has_kernel(place: int, leaf: Leaf) -> bool:
    """Whether a leaf gets a separate kernel; `place` is its index in the order of decreasing size."""
    return place < _MAX_KERNELS and size_of(leaf) >= _LARGE


def merge_small(
    leaves: Sequence[Leaf], blocks: Sequence[int], dtype: DType
) -> list[tuple[Leaf, int]]:
    """Concatenates the small leaves of each block, for fewer operations; sorts by decreasing size."""
    merged: list[tuple[Leaf, int]] = []
    rows: dict[int, list[list[jax.Array]]] = {}
    stacks: dict[int, list[jax.Array]] = {}
    for leaf, block in zip(leaves, blocks, strict=True):
        separate = isinstance(leaf, TaskRows)
        if size_of(leaf) >= (_LARGE if separate else _SMALL_STACK):
            merged.append((leaf, block))
        elif not size_of(leaf):
            continue
        elif isinstance(leaf, TaskRows):
            rows.setdefault(block, []).append([row.astype(dtype) for row in _flat_rows(leaf)])
        else:
            stacks.setdefault(block, []).append(leaf.reshape(leaf.shape[0], -1).astype(dtype))
    for block, group in rows.items():
        tasks = [list(task) for task in zip(*group, strict=True)]
        merged.append((TaskRows(tuple(jnp.concatenate(task) for task in tasks)), block))
    for block, group in stacks.items():
        merged.append((jnp.concatenate(group, axis=1), block))
    return sorted(merged, key=lambda pair: -size_of(pair[0]))


def _sums_in_registers(rows: list[jax.Array], dtype: DType) -> jax.Array:
    """Computes the inner products of all pairs of rows in one fused pass."""
    pairs = list(combinations_with_replacement(range(len(rows)), 2))
    whole = rows[0].size - rows[0].size % (_ROWS * _LANES)
    tiles = [row[:whole].reshape(-1, _ROWS, _LANES).astype(dtype) for row in rows]
    sums = lax.reduce(
        tuple(tiles[s] * tiles[t] for s, t in pairs),
        (np.zeros((), dtype),) * len(pairs),
        lambda left, right: tuple(a + b for a, b in zip(left, right, strict=True)),
        (1,),
    )
    rest = [row[whole:].astype(dtype) for row in rows]
    parts = [
        jnp.sum(part) + jnp.sum(rest[s] * rest[t]) for part, (s, t) in zip(sums, pairs, strict=True)
    ]
    return jnp.stack(parts)[pair_index(len(rows))]


def _loop_over_stack(stack: jax.Array, block: int, dtype: DType) -> jax.Array:
    num_tasks, size = stack.shape

    def add_block(i: jax.Array, total: jax.Array) -> jax.Array:
        part = lax.dynamic_slice(stack, (0, i * block), (num_tasks, block))
        return total + row_products(part.astype(dtype))

    rest = stack[:, size - size % block :].astype(dtype)
    return lax.fori_loop(0, size // block, add_block, row_products(rest))


def _loop_over_rows(rows: list[jax.Array], block: int, dtype: DType) -> jax.Array:
    size = rows[0].size

    def add_block(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, buffer = carry
        # Rows are copied to a small buffer one by one, because a concatenation would interleave their
        # reads.
        for t, row in enumerate(rows):
            part = lax.dynamic_slice(row, (i * block,), (block,)).astype(dtype)
            buffer = lax.dynamic_update_slice(buffer, part[None], (t, 0))
        return total + row_products(buffer), buffer

    rest = jnp.stack([row[size - size % block :].astype(dtype) for row in rows])
    buffer = jnp.stack([row[:block].astype(dtype) for row in rows])
    return lax.fori_loop(0, size // block, add_block, (row_products(rest), buffer))[0]


def _flat_rows(leaf: Leaf) -> list[jax.Array]:
    return [row.reshape(-1) for row in rows_of(leaf)]
