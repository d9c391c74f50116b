"""Operations on task trees, the pytrees with a task axis.

A *task tree* is a pytree with leaves `[T, *shape]`, one gradient per task. A leaf has one of the two
forms in `leaves.py`.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.core.gram import gram_matrices, squared_norms
from mtl_optax.core.leaves import is_rows, leaves_of, rows_of, stack_of
from mtl_optax.core.types import AxisName, DType, Label, Number
from mtl_optax.solvers.arithmetic import move_average
from mtl_optax.solvers.cosine import geometry_of

_Tree = TypeVar("_Tree")


class Blocks(NamedTuple):
    """The groups of leaves for which a method computes separate weights.

    Attributes:
      of_leaf: the index of the block of every leaf.
      names: one name per block.
    """

    of_leaf: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def count(self) -> int:
        """The number of blocks; 1 for a tree without leaves."""
        return max(1, len(self.names))


class Measured(NamedTuple):
    """The lengths and angles of the task gradients in every block.

    Attributes:
      active: bool `[T]`, the tasks that were active and whose gradients are finite in all blocks.
      norms: `[B, T]`, 0 for the other tasks; None if the method needs none.
      cosine: `[B, T, T]`, 0 for the other tasks; None if the method needs none.
    """

    active: jax.Array
    # Arrays for every method that reads them.
    norms: jax.Array = None  # type: ignore[assignment]
    cosine: jax.Array = None  # type: ignore[assignment]


def assign_blocks(tree: optax.Params, blocks: str | Label) -> Blocks:
    """Groups the leaves of a tree shaped like the parameters, by the option `blocks`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if blocks == "all":
        return Blocks((0,) * len(leaves), ("all",))
    if blocks == "leaf":
        labels = [jax.tree_util.keystr(path) for path, _ in leaves]
    else:
        assert callable(blocks)
        labels = [str(blocks(path, leaf)) for path, leaf in leaves]
    names = tuple(dict.fromkeys(labels))
    return Blocks(tuple(names.index(label) for label in labels), names)


def without_task_axis(updates: optax.Updates) -> optax.Params:
    """Returns the shapes of `updates` without the task axis, which are those of the parameters."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), updates, is_leaf=is_rows
    )


def stacked(updates: optax.Updates) -> optax.Updates:
    """Returns the task tree with every leaf in the stacked form."""
    return jax.tree.map(stack_of, updates, is_leaf=is_rows)


def statistics_dtype(tree: optax.Params) -> DType:
    """Returns the dtype of statistics and weights: float64 if any leaf is float64, else float32."""
    wide = any(jnp.result_type(leaf) == jnp.float64 for leaf in jax.tree.leaves(tree))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


# --- the inputs of methods --------------------------------------------------------------------------


def products(
    updates: optax.Updates,
    blocks: Blocks,
    num_tasks: int,
    axis_name: AxisName = None,
    *,
    pairs: bool,
) -> jax.Array:
    """Returns squared norms `[B, T]` or, with `pairs`, all inner products `[B, T, T]` in every block.

    With `axis_name` they are summed over those mapped axes.
    """
    leaves = leaves_of(updates)
    if not leaves:
        return jnp.zeros((blocks.count, *(num_tasks,) * (2 if pairs else 1)))
    of_blocks = gram_matrices if pairs else squared_norms
    return sum_over(of_blocks(leaves, blocks.of_leaf, blocks.count), axis_name)


def measure(products: jax.Array, active: jax.Array, dtype: DType) -> Measured:
    """Returns norms and cosines from squared norms `[B, T]` (without cosines) or products `[B, T, T]`.

    A gradient counts as zero if its squared norm is below the smallest normal number of the dtype in which
    it is accumulated, and as non-finite if its squared norm overflows. No quotient of two of the remaining
    norms overflows.
    """
    pairs = products.ndim == 3
    # All tests use the root. XLA would duplicate the sum of squares in every operation that reads a cheap
    # function of it, one per leaf; it does not duplicate a root, which it considers expensive.
    roots = jnp.sqrt(jnp.diagonal(products, axis1=1, axis2=2) if pairs else products)
    # A task that is non-finite in one block is excluded from all blocks.
    active = active & jnp.all(jnp.isfinite(roots), axis=0)
    smallest = jnp.sqrt(jnp.finfo(roots.dtype).tiny)
    norms = jnp.where(active[None] & (roots >= smallest), roots, 0).astype(dtype)
    if not pairs:
        return Measured(active, norms)
    cosine = jax.vmap(geometry_of)(products, norms > 0).cosine.astype(dtype)
    return Measured(active, norms, cosine)


def norms(
    updates: optax.Updates,
    blocks: Blocks,
    active: jax.Array,
    dtype: DType,
    axis_name: AxisName = None,
) -> Measured:
    """Returns the norms, without cosines."""
    squares = products(updates, blocks, active.shape[0], axis_name, pairs=False)
    return measure(squares, active, dtype)


def finite(updates: optax.Updates, num_tasks: int, axis_name: AxisName = None) -> jax.Array:
    """Returns which tasks are finite, bool `[T]`, for methods that need no norms."""
    whole = Blocks((0,) * len(leaves_of(updates)), ("all",))
    everyone = jnp.ones((num_tasks,), bool)
    return norms(updates, whole, everyone, statistics_dtype(updates), axis_name).active


def squared_norm(gradient: optax.Params, axis_name: AxisName = None) -> jax.Array:
    """The squared norm of one gradient, a tree without a task axis and with at least one leaf."""
    rows = [leaf[None] for leaf in jax.tree.leaves(gradient)]
    return sum_over(squared_norms(rows, (0,) * len(rows), 1)[0, 0], axis_name)


def sum_over(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Sums over mapped axes; None means that there are none."""
    return x if axis_name is None else lax.psum(x, axis_name)


# --- the results of methods -------------------------------------------------------------------------


def combine(
    updates: _Tree,
    weights: jax.Array,
    keep: jax.Array,
    blocks: Blocks,
    broken: jax.Array | None = None,
) -> _Tree:
    """Returns `sum_t weights[t] * g_t` in each leaf's dtype, over the tasks in `keep` `[T]`.

    `weights` is `[B, T]`. The sum takes one elementwise pass over the T gradients. With `broken` `[T]`, for
    `reduce=False`, the result is `weights[t] * g_t` with the task axis. The entries of a broken task,
    present but non-finite, become NaN, so that the next method excludes it too.
    """
    # Indexed once, because with hundreds of leaves this would dominate the time of tracing.
    kept = [keep[t] for t in range(keep.shape[0])]
    parts = [[weights[b, t] for t in range(len(kept))] for b in range(weights.shape[0])]
    results = []
    for leaf, b in zip(leaves_of(updates), blocks.of_leaf, strict=True):
        # If another leaf is float64, a weight may be outside the range of float32.
        wide = jnp.promote_types(statistics_dtype(leaf), weights.dtype)
        zero = jnp.zeros((), wide)
        limit = float(jnp.finfo(wide).max) / len(kept)
        # A select instead of a product with 0, because the entries of an excluded task may be NaN. Clipped
        # terms have a finite sum.
        terms = [
            jnp.where(k, jnp.clip(row.astype(wide) * weight.astype(wide), -limit, limit), zero)
            for row, weight, k in zip(rows_of(leaf), parts[b], kept, strict=True)
        ]
        if broken is None:
            results.append(narrow(functools.reduce(operator.add, terms), leaf.dtype))
        else:
            rows = [narrow(term, leaf.dtype) for term in terms]
            results.append(
                jnp.stack([jnp.where(broken[t], jnp.nan, row) for t, row in enumerate(rows)])
            )
    return jax.tree.unflatten(jax.tree.structure(updates, is_leaf=is_rows), results)


def narrow(x: jax.Array, dtype: DType) -> jax.Array:
    """Casts to a dtype; a number outside its range becomes its largest number, not infinity."""
    if jnp.finfo(dtype).max < jnp.finfo(x.dtype).max:
        limit = jnp.asarray(jnp.finfo(dtype).max, x.dtype)
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)


def narrow_like(result: optax.Updates, updates: optax.Updates) -> optax.Updates:
    """Casts every leaf by `narrow` to the dtype of the same leaf of `updates`."""
    return jax.tree.map(lambda x, g: narrow(x, g.dtype), result, updates)


# --- buffers of the size of the gradients -----------------------------------------------------------


def per_task_zeros(params: optax.Params, num_tasks: int, dtype: DType) -> optax.Updates:
    """Returns zeros `[T, *shape]` with the sharding of `params`."""
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)
    return optax.tree.batch_shape(zeros, (num_tasks,))


def remove_absent(updates: _Tree, keep: jax.Array) -> _Tree:
    """Sets the entries of all tasks outside `keep` `[T]` to 0."""

    def one(leaf: jax.Array) -> jax.Array:
        return jnp.where(along_tasks(keep, leaf.ndim), leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(one, updates)


def move_averages(
    averages: _Tree, updates: optax.Updates, decay: Number, active: jax.Array
) -> _Tree:
    """Applies `move_average` to the gradients of the active tasks."""

    def one(average: jax.Array, leaf: jax.Array) -> jax.Array:
        new = leaf.astype(average.dtype)
        return move_average(average, new, decay, along_tasks(active, leaf.ndim))

    return jax.tree.map(one, averages, updates)


def along_tasks(vector: jax.Array, ndim: int) -> jax.Array:
    """Reshapes `[T]` to `[T, 1, ...]` with `ndim` dimensions, to broadcast over `[T, *shape]`."""
    return vector.reshape((-1,) + (1,) * (ndim - 1))
