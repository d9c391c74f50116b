"""The two forms of a leaf of a task tree.

A *stacked* leaf is one array with a leading task axis. A *separate* leaf is a `TaskRows` with one array
per task: it holds gradients that were computed one by one (the cotangents of a fork) and avoids a copy
into one array. Both forms represent the same values.

Measured on one CPU core, a fork of 8 tasks on a dense network: with separate leaves, a whole step takes
1.05 times as long as a plain one and needs 55 MiB of temporary memory; with stacked leaves it takes 1.47
times as long and needs 149 MiB.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.core.types import DType


class TaskRows(NamedTuple):
    """A leaf of a task tree, as T separate arrays `[*shape]`."""

    rows: tuple[jax.Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stacked form."""
        return (len(self.rows), *self.rows[0].shape)

    @property
    def dtype(self) -> DType:
        """The dtype of each row."""
        return self.rows[0].dtype


Leaf: TypeAlias = jax.Array | TaskRows


def is_rows(node: object) -> bool:
    """Whether a node of a tree is a separate leaf."""
    return isinstance(node, TaskRows)


def leaves_of(updates: object) -> list[Leaf]:
    """Returns the leaves of a task tree, of both forms."""
    return jax.tree.leaves(updates, is_leaf=is_rows)


def rows_of(leaf: Leaf) -> tuple[jax.Array, ...]:
    """Returns the T rows `[*shape]` of a leaf; those of a stacked leaf are static slices."""
    if isinstance(leaf, TaskRows):
        return leaf.rows
    return tuple(lax.index_in_dim(leaf, t, keepdims=False) for t in range(leaf.shape[0]))


def stack_of(leaf: Leaf) -> jax.Array:
    """Returns the stacked form of a leaf."""
    return jnp.stack(leaf.rows) if isinstance(leaf, TaskRows) else leaf


def size_of(leaf: Leaf) -> int:
    """Returns the number of elements per task."""
    return math.prod(leaf.shape[1:])


def row_products(stack: jax.Array) -> jax.Array:
    """Computes the inner products of all pairs of rows, without a reshape of a sharded axis."""
    axes = tuple(range(1, stack.ndim))
    sharding = jax.typeof(stack).sharding
    # On explicit meshes, JAX requires the sharding of a result whose summed axes were sharded.
    sharded = any(axis is not None for axis in sharding.spec)
    return lax.dot_general(
        stack,
        stack,
        ((axes, axes), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=stack.dtype,
        out_sharding=sharding.update(spec=jax.P(None, None)) if sharded else None,
    )
