"""Inner products of per-task gradients, block by block: what a method needs of T large gradients.

A leaf comes in one of two forms. *Stacked*, an array with a leading task axis, is for gradients
that are in memory as one array. *Separate*, a sequence of one array a task, is for gradients that
were computed one by one and should never be copied into one array. The numbers are the same;
each form is read in place.

Two ways of computing serve all backends. On a single CPU device the gradients are walked in blocks
that fit the cache, since one matrix product over millions of columns leaves the cache for every
pair of tasks. Everywhere else, and on every mesh, plain products and sums are left to XLA: they
need no reshape of a sharded axis, and what the devices exchange is the sums, never the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations_with_replacement
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Leaf = jax.Array | Sequence[jax.Array]

# The largest leaves, from this many elements a task on, get a kernel of their own. Each costs compile
# time, so only so many do.
_LARGE, _MAX_KERNELS = 262_144, 16
# Stacked leaves are read where they are, unless that takes longer to start than to copy them.
_SMALL_STACK = 4_096
# Elements of all tasks in one block of the loop: a quarter of a megabyte, inside an L2 cache.
_LOOP_BLOCK = 65_280
# Sums of _ROWS rows of _LANES products: XLA unrolls the rows and vectorises the lanes.
_ROWS, _LANES = 8, 256
# With more tasks the products of one pass no longer fit the registers beside what XLA fuses in.
_TASKS_IN_REGISTERS = 5
# Off the cache path, products are taken pair by pair (nothing is stacked) up to this many.
_MAX_PAIRWISE = 512


def gram_matrices(
    leaves: Sequence[Leaf],
    blocks: Sequence[int],
    num_blocks: int,
    scales: jax.Array | None = None,
) -> jax.Array:
    """Return the Gram matrix of the task gradients in every block.

    ``G[b, s, t]`` is the sum over the leaves of block ``b`` of ``<g_s, g_t>``, accumulated in
    float32 (float64 when a leaf is float64) and exactly symmetric. Each gradient is read once on a
    CPU; on a mesh the result is replicated. Inside ``shard_map`` the sums are local.

    Args:
      leaves: the leaves of the gradient, each ``[T, ...]`` or a sequence of T arrays of one shape.
      blocks: the block of each leaf.
      num_blocks: how many blocks there are; one without leaves gets zeros.
      scales: ``[num_blocks, T]``, what each gradient is multiplied by as it is read; no scaled copy of a
        large leaf is made on a CPU. None for ones.

    Returns:
      ``[num_blocks, T, T]``.
    """
    grams = _sum_per_block(leaves, blocks, num_blocks, scales, (2, _gram_in_cache, _gram_by_xla))
    return jnp.where(np.tri(len(leaves[0]), dtype=bool)[None], grams.mT, grams)


def squared_norms(
    leaves: Sequence[Leaf],
    blocks: Sequence[int],
    num_blocks: int,
    scales: jax.Array | None = None,
) -> jax.Array:
    """Return the squared norm of each task gradient in every block, ``[num_blocks, T]``.

    The diagonals of :func:`gram_matrices`, with the same arguments and precision, at T instead of
    T (T + 1) / 2 products.
    """
    squares = _sums_by_xla(jnp.square)
    return _sum_per_block(leaves, blocks, num_blocks, scales, (1, squares, squares))


def finiteness(leaves: Sequence[Leaf]) -> jax.Array:
    """Return per task 0 where all its numbers are finite and NaN elsewhere, ``[T]``.

    Made to be added up: over mapped axes the answers of the devices are summed. The sum of ``x - x`` is
    taken because a sum of floats is what XLA fuses on every backend; a count of flags is stored first.
    """
    marks = _sums_by_xla(lambda x: x - x)
    # XLA copies what leads to a result into every operation that uses it, one a leaf, unless it is dear:
    # a root is, and leaves 0 and NaN what they are.
    return jnp.sqrt(_sum_per_block(leaves, (0,) * len(leaves), 1, None, (1, marks, marks))[0])


def _sum_per_block(leaves, blocks, num_blocks, scales, kind) -> jax.Array:
    rank, in_cache, by_xla = kind
    leaves = [leaf if isinstance(leaf, jax.Array) else tuple(leaf) for leaf in leaves]
    blocks = tuple(blocks)
    double = any(_dtype(leaf) == jnp.float64 for leaf in leaves)
    dtype = jnp.dtype(jnp.float64 if double else jnp.float32)
    zeros = jnp.zeros((len(leaves[0]),) * rank, dtype)

    def wide_in(block: int) -> _Wide:
        return _Wide(dtype, None if scales is None else scales[block].astype(dtype))

    def total(parts: Iterable[tuple[jax.Array, int]]) -> jax.Array:
        sums: list[jax.Array | None] = [None] * num_blocks
        for part, block in parts:
            done = sums[block]
            sums[block] = part if done is None else done + part
        return jnp.stack([zeros if part is None else part for part in sums])

    def anywhere(leaves):
        pairwise = len(leaves) * len(leaves[0]) ** rank <= _MAX_PAIRWISE
        kept = [(leaf, block) for leaf, block in zip(leaves, blocks, strict=True) if _size(leaf)]
        return total((by_xla(leaf, wide_in(block), pairwise), block) for leaf, block in kept)

    def on_one_cpu(leaves):
        kept = _merge_small(leaves, blocks, dtype)
        kept.sort(key=lambda pair: -_size(pair[0]))
        return total(
            (in_cache(leaf, wide_in(block), i < _MAX_KERNELS and _size(leaf) >= _LARGE), block)
            for i, (leaf, block) in enumerate(kept)
        )

    if jax.default_backend() == "cpu" and jax.device_count() == 1 and _unsharded(leaves):
        return lax.platform_dependent(leaves, cpu=on_one_cpu, default=anywhere)
    return anywhere(leaves)


class _Wide(NamedTuple):
    """How a gradient is read: in the accumulator's dtype and times its task's scale."""

    dtype: jnp.dtype
    scale: jax.Array | None  # [T]

    def row(self, row: jax.Array, t: int) -> jax.Array:
        row = row.astype(self.dtype)
        return row if self.scale is None else row * self.scale[t]

    def stack(self, stack: jax.Array) -> jax.Array:
        stack = stack.astype(self.dtype)
        if self.scale is None:
            return stack
        return stack * self.scale.reshape((-1,) + (1,) * (stack.ndim - 1))


# On a single CPU device: blocks that fit the cache.


def _gram_in_cache(leaf: Leaf, wide: _Wide, own_kernel: bool) -> jax.Array:
    num_tasks, size = len(leaf), _size(leaf)
    if not own_kernel:
        return _dot(_stack(leaf, wide).reshape(num_tasks, size))
    if num_tasks <= _TASKS_IN_REGISTERS:
        return _sums_in_registers(_flat_rows(leaf), wide)
    # An odd multiple of 16: rows a power of two apart would all fall on the same cache lines.
    block = 16 * (_LOOP_BLOCK // max(num_tasks, 16) // 16 | 1)
    if isinstance(leaf, jax.Array):
        return _loop_over_stack(leaf.reshape(num_tasks, size), block, wide)
    return _loop_over_rows(_flat_rows(leaf), block, wide)


def _sums_in_registers(rows: list[jax.Array], wide: _Wide) -> jax.Array:
    """The products of all pairs of rows, from one fused pass over them."""
    pairs = list(combinations_with_replacement(range(len(rows)), 2))
    whole = rows[0].size - rows[0].size % (_ROWS * _LANES)
    tiles = [wide.row(row[:whole].reshape(-1, _ROWS, _LANES), t) for t, row in enumerate(rows)]
    sums = lax.reduce(
        tuple(tiles[s] * tiles[t] for s, t in pairs),
        (np.zeros((), wide.dtype),) * len(pairs),
        lambda left, right: tuple(a + b for a, b in zip(left, right, strict=True)),
        (1,),
    )
    rest = [wide.row(row[whole:], t) for t, row in enumerate(rows)]
    parts = [
        jnp.sum(part) + jnp.sum(rest[s] * rest[t]) for part, (s, t) in zip(sums, pairs, strict=True)
    ]
    return jnp.stack(parts)[_pair_index(len(rows))]


def _loop_over_stack(stack: jax.Array, block: int, wide: _Wide) -> jax.Array:
    num_tasks, size = stack.shape

    def add_block(i, gram):
        part = lax.dynamic_slice(stack, (0, i * block), (num_tasks, block))
        return gram + _dot(wide.stack(part))

    rest = wide.stack(stack[:, size - size % block :])
    return lax.fori_loop(0, size // block, add_block, _dot(rest))


def _loop_over_rows(rows: list[jax.Array], block: int, wide: _Wide) -> jax.Array:
    size = rows[0].size

    def add_block(i, carry):
        gram, buffer = carry
        # Row by row into one small buffer: a concatenation would read with all rows interleaved.
        for t, row in enumerate(rows):
            part = wide.row(lax.dynamic_slice(row, (i * block,), (block,)), t)
            buffer = lax.dynamic_update_slice(buffer, part[None], (t, 0))
        return gram + _dot(buffer), buffer

    rest = jnp.stack([wide.row(row[size - size % block :], t) for t, row in enumerate(rows)])
    buffer = jnp.stack([row[:block].astype(wide.dtype) for row in rows])
    return lax.fori_loop(0, size // block, add_block, (_dot(rest), buffer))[0]


def _merge_small(leaves: Sequence[Leaf], blocks, dtype) -> list[tuple[Leaf, int]]:
    """Join the smaller leaves of one block: each alone is an operation to compile and to start."""
    merged: list[tuple[Leaf, int]] = []
    rows: dict[int, list[list[jax.Array]]] = {}
    stacks: dict[int, list[jax.Array]] = {}
    for leaf, block in zip(leaves, blocks, strict=True):
        stacked = isinstance(leaf, jax.Array)
        if _size(leaf) >= (_SMALL_STACK if stacked else _LARGE):
            merged.append((leaf, block))
        elif not _size(leaf):
            continue
        elif isinstance(leaf, jax.Array):
            stacks.setdefault(block, []).append(leaf.reshape(len(leaf), -1).astype(dtype))
        else:
            rows.setdefault(block, []).append([row.astype(dtype) for row in _flat_rows(leaf)])
    for block, group in rows.items():
        tasks = [list(task) for task in zip(*group, strict=True)]
        merged.append((tuple(jnp.concatenate(task) for task in tasks), block))
    for block, group in stacks.items():
        merged.append((jnp.concatenate(group, axis=1), block))
    return merged


# Anywhere else: what XLA partitions and fuses by itself.


def _gram_by_xla(leaf: Leaf, wide: _Wide, pairwise: bool) -> jax.Array:
    if isinstance(leaf, jax.Array) or not pairwise:
        return _dot(_stack(leaf, wide))
    rows = [wide.row(row, t) for t, row in enumerate(leaf)]
    pairs = combinations_with_replacement(rows, 2)
    return jnp.stack([jnp.sum(left * right) for left, right in pairs])[_pair_index(len(rows))]


def _sums_by_xla(of: Callable[[jax.Array], jax.Array]) -> Callable[[Leaf, _Wide, bool], jax.Array]:
    """Sums of `of` each element, one a task."""

    def sums(leaf: Leaf, wide: _Wide, pairwise: bool) -> jax.Array:
        if isinstance(leaf, jax.Array) or not pairwise:
            stack = of(_stack(leaf, wide))
            return jnp.sum(stack, axis=tuple(range(1, stack.ndim)))
        return jnp.stack([jnp.sum(of(wide.row(row, t))) for t, row in enumerate(leaf)])

    return sums


def _dot(stack: jax.Array) -> jax.Array:
    """Return the products of all rows of ``[T, ...]``, without a reshape of a sharded axis."""
    axes = tuple(range(1, stack.ndim))
    sharding = jax.typeof(stack).sharding
    # Explicit meshes ask to be told that the contracted axes' shards are to be summed.
    told = any(axis is not None for axis in sharding.spec)
    return lax.dot_general(
        stack,
        stack,
        ((axes, axes), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=stack.dtype,
        out_sharding=sharding.update(spec=jax.P(None, None)) if told else None,
    )


def _stack(leaf: Leaf, wide: _Wide) -> jax.Array:
    return wide.stack(leaf if isinstance(leaf, jax.Array) else jnp.stack(leaf))


def _flat_rows(leaf: Leaf) -> list[jax.Array]:
    if isinstance(leaf, jax.Array):
        leaf = [lax.index_in_dim(leaf, t, keepdims=False) for t in range(len(leaf))]
    return [row.reshape(-1) for row in leaf]


def _pair_index(num_tasks: int) -> np.ndarray:
    """Return where the pair of each matrix entry stands in ``combinations_with_replacement``."""
    index = np.zeros((num_tasks, num_tasks), np.int32)
    upper = np.triu_indices(num_tasks)
    index[upper] = np.arange(len(upper[0]))
    return np.maximum(index, index.T)


def _unsharded(leaves: Sequence[Leaf]) -> bool:
    arrays = jax.tree.leaves(leaves)
    return all(axis is None for x in arrays for axis in jax.typeof(x).sharding.spec)


def _size(leaf: Leaf) -> int:
    return math.prod(leaf.shape[1:]) if isinstance(leaf, jax.Array) else leaf[0].size


def _dtype(leaf: Leaf):
    return leaf.dtype if isinstance(leaf, jax.Array) else leaf[0].dtype
