"""Inner products of per-task gradients, block by block, without a task axis."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def gram_matrices(
    leaves: Sequence[Sequence[jax.Array]], blocks: Sequence[int], num_blocks: int
) -> jax.Array:
    """Return the Gram matrix of every block, ``[num_blocks, T, T]``."""
    num_tasks = len(leaves[0])
    pairs = [(s, t) for s in range(num_tasks) for t in range(s, num_tasks)]
    products = _sum_blocks(leaves, blocks, num_blocks, pairs)
    index = {pair: k for k, pair in enumerate(pairs)}
    order = [
        index[min(s, t), max(s, t)] for s in range(num_tasks) for t in range(num_tasks)
    ]
    return products[:, jnp.array(order)].reshape(num_blocks, num_tasks, num_tasks)


def squared_norms(
    leaves: Sequence[Sequence[jax.Array]], blocks: Sequence[int], num_blocks: int
) -> jax.Array:
    """Return the squared norm of every task in every block, ``[num_blocks, T]``."""
    pairs = [(t, t) for t in range(len(leaves[0]))]
    return _sum_blocks(leaves, blocks, num_blocks, pairs)


def _sum_blocks(leaves, blocks, num_blocks, pairs):
    dtype = jnp.result_type(jnp.float32, *(leaf[0].dtype for leaf in leaves))
    totals = [jnp.zeros((len(pairs),), dtype) for _ in range(num_blocks)]
    for leaf, block in zip(leaves, blocks, strict=True):
        rows = [row.astype(dtype) for row in leaf]
        products = jnp.stack([jnp.sum(rows[s] * rows[t]) for s, t in pairs])
        totals[block] = totals[block] + products
    return jnp.stack(totals)
