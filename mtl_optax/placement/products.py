"""Norms, inner products and a weighted sum of T gradients, of which none is kept.

With the Jacobian J of the losses, the gradient of task t is `g_t = J^T e_t`, a backward pass, and its inner
products with all gradients are `J g_t`, a forward pass of tangents: the transpose of the backward pass.
XLA uses each layer's part of `g_t` as soon as it is there, so not even one whole gradient is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.core import task_tree
from mtl_optax.core.types import AxisName, DType
from mtl_optax.placement.pull_back import (
    Pullback,
    chosen_leaves,
    is_unrolled,
    pull_in_turn,
)


def squared_norms(
    pullback: Pullback, losses: jax.Array, chosen: Sequence[bool], axis_name: AxisName
) -> jax.Array:
    """The squared norms `[T]` of the gradients of the chosen leaves, by T backward passes.

    Args:
      pullback: what `vjp_of_losses` returned for losses of one primal.
      losses: the losses `[T]`.
      chosen: for every leaf of the primal whether it counts.
      axis_name: mapped axes over which the leaves are divided.

    Returns:
      `[T]`, accumulated in at least float32.

    Example:

      >>> from mtl_optax.placement.pull_back import vjp_of_losses
      >>> losses, pullback, _ = vjp_of_losses(lambda x: ((x, 3 * x), None), 2.0)
      >>> squared_norms(pullback, losses, [True], None).tolist()
      [1.0, 9.0]
    """
    return pull_in_turn(
        pullback,
        losses,
        lambda _, grads: task_tree.squared_norm(chosen_leaves(grads, chosen), axis_name),
    )


def gram_matrix(
    pullback: Pullback,
    losses: jax.Array,
    chosen: Sequence[bool],
    axis_name: AxisName,
    dtype: DType,
) -> jax.Array:
    """The Gram matrix of the gradients of the chosen leaves, by T backward and T forward passes.

    The diagonal is `squared_norms`. The other products have the precision of the model's own arithmetic.
    Where one of two tasks is not finite, so is their product.

    Args:
      pullback: as for `squared_norms`.
      losses: as for `squared_norms`.
      chosen: as for `squared_norms`.
      axis_name: as for `squared_norms`.
      dtype: that of the result.

    Returns:
      `[T, T]`.

    Raises:
      TypeError: if a `custom_vjp` of the model has a backward pass that JAX cannot transpose.

    Example:

      >>> from mtl_optax.placement.pull_back import vjp_of_losses
      >>> losses, pullback, _ = vjp_of_losses(lambda x: ((x, 3 * x), None), 2.0)
      >>> gram_matrix(pullback, losses, [True], None, "float32").tolist()
      [[1.0, 3.0], [3.0, 9.0]]
    """
    num_tasks = losses.shape[0]

    def row(t: int | jax.Array, grads: Any) -> tuple[jax.Array, jax.Array]:
        gradient = chosen_leaves(grads, chosen)
        local = task_tree.squared_norm(gradient)
        square = task_tree.sum_over(local, axis_name)
        like = jnp.broadcast_to(jnp.zeros_like(square, losses.dtype), losses.shape)
        products = _tangents(pullback, losses, chosen, gradient, like).astype(dtype)
        # With `check_vma=True` the sum over devices has another type, and the transpose has summed.
        if jax.typeof(local) == jax.typeof(square):
            products = task_tree.sum_over(products, axis_name)
        # Each pair once: the first task needs no forward pass.
        before = jnp.arange(num_tasks) < t
        return square.astype(dtype), jnp.where(before, products, 0)

    squares, lower = pull_in_turn(pullback, losses, row)
    # What only a forward pass overflows in, as in float16, would make the cosine of two finite tasks NaN.
    finite = jnp.isfinite(squares)
    overflows = finite[:, None] & finite[None, :] & ~jnp.isfinite(lower + lower.T)
    squares = jnp.where(jnp.any(overflows, axis=1), jnp.nan, squares)
    return lower + lower.T + jnp.diag(squares)


def weighted_sum(
    pullback: Pullback,
    losses: jax.Array,
    weights: jax.Array,
    active: jax.Array,
    chosen: Sequence[bool],
    axis_name: AxisName,
) -> tuple[list[jax.Array], jax.Array]:
    """`sum_t weights[t] * g_t` of the chosen leaves, by one backward pass.

    Where that is not finite, it is made again task by task, from what is finite. For losses that are not
    kept apart it is 0.

    Args:
      pullback: as for `squared_norms`.
      losses: as for `squared_norms`.
      weights: `[T]`.
      active: bool `[T]`, the tasks that count.
      chosen: as for `squared_norms`.
      axis_name: as for `squared_norms`.

    Returns:
      The chosen leaves of the sum, and bool `[T]`, the tasks that went into it.

    Example:

      >>> import jax.numpy as jnp
      >>> from mtl_optax.placement.pull_back import vjp_of_losses
      >>> losses, pullback, _ = vjp_of_losses(lambda x: ((x, 0 * jnp.sqrt(0 * x)), None), 2.0)
      >>> both = jnp.array([True, True])
      >>> total, active = weighted_sum(pullback, losses, jnp.ones(2), both, [True], None)
      >>> float(total[0]), active.tolist()
      (1.0, [True, False])
    """
    cotangents = jnp.where(active, task_tree.narrow(weights, losses.dtype), 0)
    once = chosen_leaves(pullback.whole(cotangents), chosen)
    fits = jnp.isfinite(task_tree.squared_norm(once, axis_name))
    if not is_unrolled(pullback, losses.shape[0]):
        return [jnp.where(fits, leaf, 0) for leaf in once], active & fits

    def add(total: list[jax.Array], t: int) -> list[jax.Array]:
        wide = weights.dtype
        return [
            task_tree.narrow(x.astype(wide) + weights[t] * g.astype(wide), x.dtype)
            for x, g in zip(total, chosen_leaves(pullback.of_task(t), chosen), strict=True)
        ]

    def finite() -> jax.Array:
        return active & jnp.isfinite(squared_norms(pullback, losses, chosen, axis_name))

    went_in = lax.cond(fits, lambda: active, finite)
    total = [jnp.where(fits, leaf, 0) for leaf in once]
    # A branch for each task, which XLA takes in turn and in place; one `cond` over all of them would hold
    # `once` beside its result.
    for t in range(losses.shape[0]):
        missing = ~fits & went_in[t]
        total = lax.cond(missing, lambda total, t=t: add(total, t), lambda total: total, total)
    return total, went_in


def _tangents(
    pullback: Pullback,
    losses: jax.Array,
    chosen: Sequence[bool],
    gradient: list[jax.Array],
    like: jax.Array,
) -> jax.Array:
    """`J g`, with the type of `like` inside `shard_map`.

    As the transpose of the pullback: the tangent map of `jax.linearize` is not there for a `custom_vjp`,
    and takes zeros through the leaves that are not chosen.
    """

    def pull(cotangents: jax.Array) -> list[jax.Array]:
        return chosen_leaves(pullback.whole(cotangents + jnp.zeros_like(losses)), chosen)

    try:
        return jax.linear_transpose(pull, like)(gradient)[0]
    except (
        Exception
    ) as error:  # of whatever type: each primitive that has no transpose raises its own
        raise TypeError(
            'weighted_value_and_grad: mode="products" transposes the backward pass of the model, and JAX '
            "cannot transpose that of a custom_vjp in it (a kernel, or a rule that is not linear in its "
            'cotangents). Use mode="map", which holds one gradient per task.'
        ) from error
