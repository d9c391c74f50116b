"""UPGrad and DualProj: projections onto the cone of directions that conflict with no task."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Unpack

import jax
import optax

from mtl_optax.core.factory import factory
from mtl_optax.core.types import PerTask
from mtl_optax.core.validation import task_numbers
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.dual_cone import dualproj_weights, upgrad_weights


@factory
def upgrad(
    tasks: int | Collection[str],
    *,
    preference: PerTask | None = None,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Projects each task gradient on the cone of directions without conflict, and averages the results.

    No loss increases to first order, and each task keeps as much of its gradient as this allows. With
    :math:`P_C` the projection onto :math:`C = \{d : g_t \cdot d \ge 0 \text{ for all } t\}` and
    ``preference`` :math:`u`:

    .. math:: update = \sum_t P_C(u_t\, g_t).

    The update is linear in the norm of each gradient. Scale: mean-like with the default u = 1/T.

    Args:
      tasks: T, or the task names.
      preference: u, `[T]` or a dictionary by task name, not negative; None means 1/T for present tasks.
      **options: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state. Cost: one pass over the gradients for the Gram matrix, one for
      the sum, and a batch of T quadratic programs of size T.

    Raises:
      ValueError: if `preference` does not have T entries.

    Notes:
      Nonnegative least squares on the cosine matrix computes the exact projections. The authors' library
      adds 1e-4 to a normalised Gram matrix, so that small conflicts remain, and treats gradients with a
      norm below about 5e-3 as zero. For two tasks the update is half that of `pcgrad`.

      A zero gradient is no constraint. For opposite gradients, only components orthogonal to them remain.
      If 0 is inside the convex hull of the gradients, the update is 0. With one task, the update is its
      gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.upgrad(2)
      >>> grads = jnp.array([[1., 0.], [-1., 1.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [0.25 0.75]

    References:
      Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024,
      https://arxiv.org/abs/2406.16232
    """
    return _dual_cone("upgrad", upgrad_weights, tasks, preference, options)


@factory
def dualproj(
    tasks: int | Collection[str],
    *,
    preference: PerTask | None = None,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Projects the mean gradient onto the cone of directions that conflict with no task.

    No loss increases to first order. If the mean conflicts with no task, the update is the mean. The
    method is made for continual learning (GEM), in which the other gradients are those of earlier tasks.
    With :math:`P_C` the projection onto :math:`C = \{d : g_t \cdot d \ge 0 \text{ for all } t\}` and
    ``preference`` :math:`u`:

    .. math:: update = P_C\Big(\sum_t u_t\, g_t\Big).

    Scale: mean-like with the default u = 1/T.

    Args:
      tasks: T, or the task names.
      preference: u, `[T]` or a dictionary by task name, not negative; None means 1/T for present tasks.
      **options: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state. Cost: one pass over the gradients for the Gram matrix, one for
      the sum, and a quadratic program of size T.

    Raises:
      ValueError: if `preference` does not have T entries.

    Notes:
      Nonnegative least squares on the cosine matrix computes the exact projection. For public code and
      degenerate input, see `upgrad`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.dualproj(2)
      >>> grads = jnp.array([[1., 0.], [-3., 1.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [0.  0.5]

    References:
      Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, 2017,
      https://arxiv.org/abs/1706.08840
    """
    return _dual_cone("dualproj", dualproj_weights, tasks, preference, options)


def _dual_cone(
    name: str,
    solve: Callable[..., jax.Array],
    tasks: int | Collection[str],
    preference: PerTask | None,
    options: MethodOptions,
) -> Method:
    vector = task_numbers(name, "preference", preference, tasks, 0)

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        return solve(inputs.geometry, vector), state

    return from_rule(name, tasks, WeightRule(frozenset({"gram"}), weigh), **options)
