"""COSMOS: a weighted sum of the losses with a penalty on their angle to a preference vector."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Nonnegative, factory
from mtl_optax.core.types import PerTask
from mtl_optax.core.validation import task_numbers
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.log_weights import clip_weights, largest_weight
from mtl_optax.solvers.preference import active_preference, unit


@factory
def cosmos(
    tasks: int | Collection[str],
    *,
    preference: PerTask | None = None,
    lam: Nonnegative = 1.0,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Minimises a weighted sum of the losses and their angle to a preference vector.

    A weighted sum reaches only the convex part of a Pareto front, and favours its ends. With
    ``preference`` r and ``lam`` :math:`\lambda`, the objective :math:`r \cdot L - \lambda \cos(r, L)` has
    the weights

    .. math::
        w = r - \frac{\lambda}{|L|} \left( \frac{r}{|r|} - \cos(r, L) \frac{L}{|L|} \right).

    Scale: the method's own. Equation 5 of the paper.

    Args:
      tasks: T, or the task names.
      preference: r, `[T]` or a dictionary by task name, nonnegative; None means 1 over the number of
        present tasks.
      lam: weight of the angle, >= 0; 0.01 to 8 in the paper. 0 is `fixed_weights(preference)`.
      **options: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state. `update` needs `losses=`. Cost: O(T).

    Raises:
      ValueError: if `preference` is not `[T]`, or `lam` is negative.

    Notes:
      Weights can be negative: a loss that is too small for the preference may increase. Their size is at
      most 1.8e19 (float32).

      The paper also draws r from a Dirichlet distribution at every step, as an input of the network, to
      learn the whole front. `optax.inject_hyperparams` can change `preference` at every step.

      If all losses are 0, w = r. Absent tasks are excluded from r and L. With one task, the update is r
      times its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.cosmos(2)
      >>> losses = jnp.array([4., 3.])
      >>> print(np.asarray(tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=losses)[0]).round(3))
      [0.517 0.477]

    References:
      Ruchte and Grabocka, Scalable Pareto Front Approximation for Deep Multi-Objective Learning, 2021,
      https://arxiv.org/abs/2103.13392
    """
    vector = task_numbers("cosmos", "preference", preference, tasks, 0)

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        losses = inputs.losses
        wanted = active_preference(vector, inputs.active, losses.dtype)
        (direction, _), (unit_losses, length) = unit(wanted), unit(losses)
        # The part of the preference orthogonal to the losses: |L| times the gradient of the cosine.
        orthogonal = direction - jnp.sum(direction * unit_losses) * unit_losses
        shortest = 1 / largest_weight(losses.dtype)
        step = jnp.asarray(lam, losses.dtype) * orthogonal / jnp.maximum(length, shortest)
        return clip_weights(wanted - jnp.where(length > 0, step, 0)), state

    return from_rule("cosmos", tasks, WeightRule(frozenset({"losses"}), weigh), **options)
