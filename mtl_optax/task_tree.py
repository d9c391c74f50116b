"""The only code that knows the task axis of a pytree.

A *task tree* is a pytree whose leaves are `[T, *shape]`: one gradient per task. Where the T gradients
of a leaf were computed one by one (a fork's cotangents), the leaf is a `TaskRows` instead: the same
numbers, which need never be copied into one array.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.gram_matrix import finiteness, gram_matrices, squared_norms
from mtl_optax.solvers.cosine import cosine_matrix

Rows = list[tuple[jax.Array, ...]]


class TaskRows(NamedTuple):
    """A leaf of a task tree as T separate arrays `[*shape]`."""

    rows: tuple[jax.Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the stack."""
        return (len(self.rows), *self.rows[0].shape)

    @property
    def dtype(self) -> Any:
        """That of each row."""
        return self.rows[0].dtype


def _is_leaf(node: Any) -> bool:
    return isinstance(node, TaskRows)


def leaves_of(updates: Any) -> list[Any]:
    """The leaves of a task tree, in either form."""
    return jax.tree.leaves(updates, is_leaf=_is_leaf)


def without_task_axis(updates: Any) -> Any:
    """The shapes of `updates` with the task axis removed: those of the parameters."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), updates, is_leaf=_is_leaf
    )


class Blocks(NamedTuple):
    """The granularity at which a method looks at gradients.

    Attributes:
      of_leaf: for every leaf the index of its block.
      names: one name a block.
      single: True for the usual one block, whose statistics carry no block axis.
    """

    of_leaf: tuple[int, ...]
    names: tuple[str, ...]
    single: bool

    @property
    def count(self) -> int:
        """The number of blocks; one where there is nothing to look at."""
        return max(1, len(self.names))


def assign_blocks(tree: Any, blocks: Any) -> Blocks:
    """Groups the leaves of `tree`, which is shaped like the parameters, by `blocks`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if isinstance(blocks, str) and blocks == "all":
        return Blocks((0,) * len(leaves), ("all",), True)
    if isinstance(blocks, str) and blocks == "leaf":
        labels = [jax.tree_util.keystr(path) for path, _ in leaves]
    elif callable(blocks):
        labels = [str(blocks(path, leaf)) for path, leaf in leaves]
    else:
        raise ValueError(
            f'blocks must be "all", "leaf" or a callable (path, leaf) -> label; found {blocks!r}.'
        )
    names = tuple(dict.fromkeys(labels))
    return Blocks(tuple(names.index(label) for label in labels), names, False)


def rows_of(updates: Any) -> Rows:
    """For every leaf its T rows `[*shape]`; rows of a stacked leaf are static slices."""

    def rows(leaf: Any) -> tuple[jax.Array, ...]:
        if isinstance(leaf, TaskRows):
            return leaf.rows
        return tuple(lax.index_in_dim(leaf, t, keepdims=False) for t in range(leaf.shape[0]))

    return [rows(leaf) for leaf in leaves_of(updates)]


def statistics_dtype(tree: Any) -> Any:
    """float64 where a leaf is float64, else float32: the dtype of every statistic and weight."""
    wide = any(jnp.dtype(leaf.dtype) == jnp.float64 for leaf in jax.tree.leaves(tree))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


# --- checks, all at trace time ----------------------------------------------------------------------


def check_updates(name: str, updates: Any, num_tasks: int, params: Any = None) -> None:
    """Raises where `updates` is not one gradient per task, saying what was found and where."""
    leaves = jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_leaf)
    if params is not None:
        _check_structure(name, updates, params)
        expected = [(num_tasks, *jnp.shape(p)) for p in jax.tree.leaves(params)]
    else:
        expected = [(num_tasks, *_shape(leaf)[1:]) for _, leaf in leaves]
    wrong = [
        (path, _shape(leaf), shape)
        for (path, leaf), shape in zip(leaves, expected, strict=True)
        if _shape(leaf) != shape
    ]
    for path, leaf in leaves:
        dtype = leaf.dtype if isinstance(leaf, TaskRows) else jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}: gradients must be real floating point; leaf {_where(path)} is {dtype}."
            )
    if wrong:
        found = "; ".join(
            f"leaf {_where(path)} has shape {got}, expected {want}" for path, got, want in wrong[:3]
        )
        more = f" (and {len(wrong) - 3} more leaves)" if len(wrong) > 3 else ""
        raise ValueError(
            f"{name}: updates must carry a leading task axis of size {num_tasks}: {found}{more}. "
            + _remedy(wrong, num_tasks)
        )


def check_not_stacked_like(name: str, updates: Any, seen: set[Any]) -> None:
    """Catches un-stacked gradients whose first dimension happens to equal the number of tasks.

    Without `params` the shapes alone cannot tell; the shapes that `init` saw can.
    """
    if seen and _shapes(updates, 1) not in seen and _shapes(updates, 0) in seen:
        path, leaf = jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_leaf)[0]
        raise ValueError(
            f"{name}: updates have the shapes of the parameters (leaf {_where(path)}: "
            f"{_shape(leaf)}); the first dimension is no task axis. " + _ALREADY_SUMMED
        )


def shapes_of(params: Any) -> Any:
    """Structure and shapes of a tree, hashable."""
    return _shapes(params, 0)


def _shapes(tree: Any, drop: int) -> Any:
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_leaf)
    return treedef, tuple(_shape(leaf)[drop:] for leaf in leaves)


def _shape(leaf: Any) -> tuple[int, ...]:
    return leaf.shape if isinstance(leaf, TaskRows) else jnp.shape(leaf)


_ALREADY_SUMMED = (
    "The gradients were already summed over tasks, or are one task's: take one gradient per task "
    "with mtl_optax.per_task_value_and_grad and put this transformation before the optimizer."
)


def _remedy(wrong: list[tuple[Any, tuple[int, ...], tuple[int, ...]]], num_tasks: int) -> str:
    if all(got == want[1:] for _, got, want in wrong):
        return _ALREADY_SUMMED
    if all(got[1:] == want[1:] and got for _, got, want in wrong):
        sizes = sorted({got[0] for _, got, _ in wrong})
        return (
            f"The task axis has size {', '.join(map(str, sizes))} but num_tasks={num_tasks}: give "
            "the number of losses that loss_fn returns."
        )
    if all(got[1 : len(got)] == want[1 : len(got)] for _, got, want in wrong if got):
        return (
            "Every leaf needs the task axis first: take gradients with "
            "mtl_optax.per_task_value_and_grad."
        )
    return (
        "Stack one gradient per task along axis 0 of every leaf, as "
        "mtl_optax.per_task_value_and_grad does."
    )


def _check_structure(name: str, updates: Any, params: Any) -> None:
    got = jax.tree.structure(updates, is_leaf=_is_leaf)
    want = jax.tree.structure(params)
    if got != want:
        raise ValueError(
            f"{name}: updates and params differ in structure: updates {got}, params {want}. Give "
            "the gradients of the same tree as params (for a part of it, optax.partition)."
        )


def _where(path: Any) -> str:
    return jax.tree_util.keystr(path) or "(the root)"


# --- what methods look at ----------------------------------------------------------------------------


def gram(
    updates: Any,
    blocks: Blocks,
    num_tasks: int,
    dtype: Any,
    active: jax.Array,
    axis_name: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cosines `[B, T, T]`, norms `[B, T]` and which tasks are finite `[T]`.

    Inactive and non-finite tasks get norm 0 and zero cosines, whatever their slots hold. With
    `axis_name` the inner products are summed over those mapped axes first.
    """
    products, scales = _in_range(
        gram_matrices, updates, blocks, num_tasks, dtype, active, axis_name
    )
    diagonal = jnp.diagonal(products, axis1=1, axis2=2)
    norms, keep = _norms(diagonal, scales, active)
    cosine, _ = jax.vmap(cosine_matrix)(products, keep & (norms > 0))
    return cosine.astype(dtype), norms.astype(dtype), jnp.all(keep | ~active[None], axis=0)


def norms(
    updates: Any,
    blocks: Blocks,
    num_tasks: int,
    dtype: Any,
    active: jax.Array,
    axis_name: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Norms `[B, T]` and which tasks are finite `[T]`; as `gram`, without the cosines."""
    squares, scales = _in_range(squared_norms, updates, blocks, num_tasks, dtype, active, axis_name)
    result, keep = _norms(squares, scales, active)
    return result.astype(dtype), jnp.all(keep | ~active[None], axis=0)


def finite(updates: Any, num_tasks: int, axis_name: Any = None) -> jax.Array:
    """Which tasks hold only finite numbers, bool `[T]`: one pass, for methods that need no norms."""
    leaves = _forms(updates)
    if not leaves:
        return jnp.ones((num_tasks,), bool)
    marks = finiteness(leaves)
    return (lax.psum(marks, axis_name) if axis_name is not None else marks) == 0


def _forms(updates: Any) -> list[Any]:
    """The leaves as `gram_matrices` takes them."""
    return [leaf.rows if isinstance(leaf, TaskRows) else leaf for leaf in leaves_of(updates)]


def _norms(squares: jax.Array, scales: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    result = jnp.sqrt(jnp.where(squares > 0, squares, 0)) / scales
    keep = active[None] & jnp.isfinite(squares) & jnp.isfinite(result)
    # A task that is not finite in one block is excluded from all of them.
    keep = keep & jnp.all(keep | ~active[None], axis=0, keepdims=True)
    return jnp.where(keep, result, 0), keep


def _in_range(
    products: Any,
    updates: Any,
    blocks: Blocks,
    num_tasks: int,
    dtype: Any,
    active: jax.Array,
    axis_name: Any,
) -> tuple[jax.Array, jax.Array]:
    """Inner products of `rows * scales` and the `scales` `[B, T]`, normally ones.

    Squares leave the range of float32 for norms below 1e-19 or above 1e19. That is rare, so a second
    pass waits behind a `cond`. It multiplies by a power of two, which is exact, and which the first
    pass has chosen: the gradients are read once more and the devices exchange one matrix more.
    """
    leaves = _forms(updates)
    if not leaves:
        tail = (num_tasks, num_tasks) if products is gram_matrices else (num_tasks,)
        ones = jnp.ones((blocks.count, num_tasks), dtype)
        return jnp.zeros((blocks.count, *tail), dtype), ones

    def of(leaves: Any, scales: jax.Array | None = None) -> jax.Array:
        result = products(leaves, blocks.of_leaf, blocks.count, scales)
        return lax.psum(result, axis_name) if axis_name is not None else result

    plain = of(leaves)
    diagonal = jnp.diagonal(plain, axis1=1, axis2=2) if plain.ndim == 3 else plain
    info = jnp.finfo(plain.dtype)
    # 2**60 of headroom: entries whose squares vanish are then negligible in the sum.
    small = ~(diagonal > float(info.tiny) * 2.0**60)
    large = ~(diagonal < float(info.max) * 2.0**-60)
    # From anywhere in the dtype these lead to where squares, and sums of 2**30 of them, are normal.
    up, down = 2.0 ** (info.maxexp * 11 // 16), 2.0 ** -(info.maxexp * 9 // 16)
    scales = jnp.where(large, down, jnp.where(small, up, 1)).astype(plain.dtype)

    def rescaled(leaves: Any) -> jax.Array:
        result = of(leaves, scales)
        # What fits stays bit for bit what it is, whatever the other tasks hold.
        ordinary = scales == 1
        if result.ndim == 3:
            ordinary = ordinary[:, :, None] & ordinary[:, None, :]
        return jnp.where(ordinary, plain, result)

    fits = jnp.all(~(small | large) | ~active[None])
    return lax.cond(fits, lambda _: plain, rescaled, leaves), scales


# --- what methods return -----------------------------------------------------------------------------


def combine(updates: Any, weights: jax.Array, keep: jax.Array, blocks: Blocks) -> Any:
    """`sum_t weights[t] * g_t` in each leaf's dtype; tasks not in `keep` [T] contribute exactly 0.

    `weights` is `[B, T]`. The sum is one elementwise pass over the T gradients.
    """
    leaves = [
        narrow(functools.reduce(operator.add, terms), leaf.dtype)
        for leaf, terms in _weighted(updates, weights, keep, blocks)
    ]
    return jax.tree.unflatten(jax.tree.structure(updates, is_leaf=_is_leaf), leaves)


def scale(
    updates: Any, weights: jax.Array, keep: jax.Array, broken: jax.Array, blocks: Blocks
) -> Any:
    """`weights[t] * g_t`, the task axis kept: what `reduce=False` returns.

    A `broken` task, present but not finite, becomes NaN for the next method to see.
    """
    leaves = [
        jnp.stack(
            [
                jnp.where(broken[t], jnp.nan, narrow(term, leaf.dtype))
                for t, term in enumerate(terms)
            ]
        )
        for leaf, terms in _weighted(updates, weights, keep, blocks)
    ]
    return jax.tree.unflatten(jax.tree.structure(updates, is_leaf=_is_leaf), leaves)


def _weighted(
    updates: Any, weights: jax.Array, keep: jax.Array, blocks: Blocks
) -> Iterator[tuple[Any, list[jax.Array]]]:
    """Every leaf with its T weighted rows, in a dtype that holds both."""
    # Taken apart once: with hundreds of leaves this is most of what there is to trace.
    kept = [keep[t] for t in range(keep.shape[0])]
    parts = [[weights[b, t] for t in range(len(kept))] for b in range(weights.shape[0])]
    for leaf, rows, b in zip(leaves_of(updates), rows_of(updates), blocks.of_leaf, strict=True):
        # Beside a float64 leaf a weight may be beyond what the others' float32 holds.
        wide = jnp.promote_types(statistics_dtype(leaf), weights.dtype)
        zero = jnp.zeros((), wide)
        # A select, not a product with 0: an excluded task may hold NaN.
        yield (
            leaf,
            [
                jnp.where(k, row.astype(wide) * weight.astype(wide), zero)
                for row, weight, k in zip(rows, parts[b], kept, strict=True)
            ],
        )


def narrow(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts to a leaf's dtype; what float16 cannot hold becomes its largest number, not infinity."""
    if jnp.finfo(dtype).max < jnp.finfo(x.dtype).max:
        limit = jnp.asarray(jnp.finfo(dtype).max, x.dtype)
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)


def per_task_zeros(params: Any, num_tasks: int, dtype: Any) -> Any:
    """Buffers `[T, *shape]` that keep the sharding of `params`."""
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)
    return optax.tree.batch_shape(zeros, (num_tasks,))


def remove_absent(updates: Any, keep: jax.Array) -> Any:
    """The task tree with the slots of tasks not in `keep` [T] set to 0."""

    def one(leaf: jax.Array) -> jax.Array:
        return jnp.where(along_tasks(keep, leaf.ndim), leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(one, updates)


def move_towards(averages: Any, updates: Any, step: jax.Array, active: jax.Array) -> Any:
    """`averages + step * (updates - averages)` for active tasks; the others stay where they are.

    Written with the two shares, so that a step of 1 gives exactly `updates` whatever was there.
    """

    def one(average: jax.Array, leaf: jax.Array) -> jax.Array:
        moved = (1 - step) * average + step * leaf.astype(average.dtype)
        return jnp.where(along_tasks(active, leaf.ndim), moved, average)

    return jax.tree.map(one, averages, updates)


def along_tasks(vector: jax.Array, ndim: int) -> jax.Array:
    """`vector` [T] as `[T, 1, ...]` with `ndim` dimensions, to meet leaves `[T, *shape]`."""
    return vector.reshape((-1,) + (1,) * (ndim - 1))
