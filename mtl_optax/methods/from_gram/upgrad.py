"""UPGrad and DualProj: projections onto the cone of directions that hurt no task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.dual_cone import dualproj_weights, upgrad_weights


def upgrad(
    num_tasks: int, *, preference: Any = None, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""Projects each gradient onto the cone of directions that hurt no task, then averages.

    The cone is :math:`C = \{d : g_t \cdot d \ge 0 \text{ for all } t\}`, and :math:`P_C` the projection
    onto it. With ``preference`` u:

    .. math:: update = \sum_t P_C(u_t\, g_t).

    No loss rises to first order, and each task keeps as much of its own gradient as that allows, which is
    linear in its length. Mean-like with the default u = 1/T. For two tasks it is half of `pcgrad`.

    The projections are exact, by non-negative least squares on the cosine matrix. The authors' library
    adds 1e-4 to a normalised Gram matrix, which leaves small conflicts, and treats gradients of norm below
    about 5e-3 as zero.

    Degenerate input: a zero gradient restricts nothing. Opposite gradients leave what is orthogonal to
    them; 0 inside the convex hull: 0. All zero: 0. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      preference: u, `[T]`, not negative; None is 1/T over the tasks present.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients for the
      Gram matrix, one for the sum, and T quadratic programs of size T as one batch.

    Raises:
      ValueError: for a `preference` without T entries.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.upgrad(2)
      >>> grads = jnp.array([[1., 0.], [-1., 1.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [0.25 0.75]

    References:
      Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024.
    """
    return _dual_cone("upgrad", upgrad_weights, num_tasks, preference, options)


def dualproj(
    num_tasks: int, *, preference: Any = None, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""Projects the mean gradient onto the cone of directions that hurt no task.

    The nearest direction to the mean gradient along which no loss rises to first order: with
    :math:`C = \{d : g_t \cdot d \ge 0 \text{ for all } t\}` and ``preference`` u,

    .. math:: update = P_C\Big(\sum_t u_t\, g_t\Big).

    Where the mean hurts no task the update is the mean. Mean-like with the default u = 1/T. Made for
    continual learning (GEM), where the other gradients are those of earlier tasks. Exact, by non-negative
    least squares on the cosine matrix; see `upgrad` for what public code does.

    Degenerate input: as `upgrad`.

    Args:
      num_tasks: T, static.
      preference: u, `[T]`; None is 1/T over the tasks present.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients for the
      Gram matrix, one for the sum, and a quadratic program of size T.

    Raises:
      ValueError: for a `preference` without T entries.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.dualproj(2)
      >>> grads = jnp.array([[1., 0.], [-3., 1.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [0.  0.5]

    References:
      Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, 2017.
    """
    return _dual_cone("dualproj", dualproj_weights, num_tasks, preference, options)


def _dual_cone(
    name: str,
    solve: Callable[..., jax.Array],
    num_tasks: int,
    preference: Any,
    options: WeightingOptions,
) -> optax.GradientTransformationExtraArgs:
    num_tasks = check_num_tasks(name, num_tasks)
    if preference is not None and jnp.shape(preference) != (num_tasks,):
        raise ValueError(
            f"{name}: preference must have shape ({num_tasks},), one number per task; found "
            f"{jnp.shape(preference)}."
        )

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        norms = evidence.norms
        goal = None if preference is None else jnp.asarray(preference, norms.dtype)
        return solve(evidence.cosine, norms, evidence.active, goal), state

    rule = Rule(name, num_tasks, frozenset({"gram"}), lambda dtype: (), weigh)
    return from_rule(rule, **options)


_PROPERTIES = frozenset({"non_conflicting", "permutation", "scale", "split"})

METHOD = Method(
    name="upgrad",
    factory=upgrad,
    needs=("gram",),
    family="from_gram",
    scale="mean",
    reference="Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024",
    make=upgrad,
    properties=_PROPERTIES,
)

DUALPROJ = METHOD._replace(
    name="dualproj",
    factory=dualproj,
    reference="Lopez-Paz and Ranzato, Gradient Episodic Memory, 2017",
    make=dualproj,
)
