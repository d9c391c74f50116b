"""Sharpness-aware task gradients: those at a point of larger loss near the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.validation import check_range

Result = TypeVar("Result")
Grads = TypeVar("Grads", bound=optax.Updates)


def sharpness_aware(
    value_and_grad: Callable[..., tuple[Result, Grads]], radius: float, *, each_task: bool = False
) -> Callable[..., tuple[Result, Grads]]:
    r"""Takes the gradient of each task at parameters that are moved uphill, as in SAM.

    With the gradients :math:`g_t` at the parameters :math:`\theta` and ``radius`` :math:`\rho`, all
    gradients are taken at :math:`\theta + \rho\, \sum_t g_t / \lVert\sum_t g_t\rVert`. With ``each_task``,
    the gradient of task t is taken at :math:`\theta + \rho\, g_t / \lVert g_t\rVert`. Any method can
    follow, because the result has the form of what was wrapped.

    Args:
      value_and_grad: a function that returns `(losses, grads)`, with gradients `[T, *shape]` with respect
        to its first argument, such as `per_task_value_and_grad(loss_fn)`.
      radius: the distance by which the parameters are moved, >= 0, in the norm over all of them.
      each_task: whether each task moves by its own gradient.

    Returns:
      A function of the same arguments. The losses (and auxiliary data) are those at the parameters, the
      gradients those at the moved parameters. Tasks that are not finite do not move the others. Cost: two
      calls of `value_and_grad`; with `each_task` T + 1 calls, of which `jax.jit` leaves out the gradients
      that are not used if `value_and_grad` differentiates a dictionary or tuple.

    Raises:
      ValueError: if the radius is negative.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> grad_fn = mtl.per_task_value_and_grad(lambda w: {"a": w[0] ** 2, "b": w[1] ** 2})
      >>> losses, grads = mtl.sharpness_aware(grad_fn, 5.0)(jnp.array([3., 4.]))
      >>> grads.round(2).tolist()  # at [6, 8]
      [[12.0, 0.0], [0.0, 16.0]]

    References:
      Phan et al., Improving Multi-task Learning via Seeking Task-based Flat Regions, 2022 (`each_task`),
      https://arxiv.org/abs/2211.13723

      Ban et al., SAMO, 2025 (its perturbation that all tasks share), https://arxiv.org/abs/2507.07883
    """
    check_range("sharpness_aware", "radius", radius, 0.0)

    def sharp_value_and_grad(
        params: optax.Params, *args: object, **kwargs: object
    ) -> tuple[Result, Grads]:
        losses, grads = value_and_grad(params, *args, **kwargs)
        num_tasks = jax.tree.leaves(grads)[0].shape[0]
        keep = task_tree.finite(grads, num_tasks)
        uphill = task_tree.remove_absent(grads, keep)

        def gradients_towards(direction: Grads) -> Grads:
            norm = jnp.sqrt(task_tree.squared_norm(direction))
            step = jnp.where(norm > 0, radius / jnp.where(norm > 0, norm, 1), 0)
            at = jax.tree.map(lambda p, d: p + (step * d).astype(p.dtype), params, direction)
            return value_and_grad(at, *args, **kwargs)[1]

        if not each_task:
            return losses, gradients_towards(jax.tree.map(lambda g: jnp.sum(g, axis=0), uphill))
        rows = []
        for t in range(num_tasks):
            sharp = gradients_towards(jax.tree.map(lambda g, t=t: g[t], uphill))
            rows.append(jax.tree.map(lambda g, t=t: g[t], sharp))
        return losses, jax.tree.map(lambda *rows: jnp.stack(rows), *rows)

    return sharp_value_and_grad
