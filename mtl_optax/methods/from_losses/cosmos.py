"""COSMOS: a weighted sum of the losses that is pulled towards a preference direction."""

from __future__ import annotations

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.log_weights import largest_weight
from mtl_optax.solvers.preference import active_preference, unit


def cosmos(
    num_tasks: int,
    *,
    preference: Any = None,
    lam: Any = 1.0,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Minimises the preferred weighted sum of the losses and their angle to the preference.

    A weighted sum alone reaches only the convex part of a Pareto front, and its ends too easily. With
    ``preference`` r, ``lam`` :math:`\lambda`, the objective :math:`r \cdot L - \lambda \cos(r, L)` has
    the weights

    .. math::
        w = r - \frac{\lambda}{|L|} \left( \frac{r}{|r|} - \cos(r, L) \frac{L}{|L|} \right).

    They can be negative: a loss that is too small for the preferred direction may rise. The scale is the
    method's own; ``lam`` = 0 is `fixed_weights(preference)`. Equation 5 of the paper, which also draws r
    from a Dirichlet distribution at every step and feeds it to the network, to learn the whole front: use
    `optax.inject_hyperparams` to change ``preference`` from step to step.

    Degenerate input: all losses 0: w = r. No weight exceeds 1.8e19 (float32) in size. Absent tasks are
    left out of r and L. T = 1: r times the gradient.

    Args:
      num_tasks: T, static.
      preference: r `[T]`, nonnegative; None is 1/T each (1 over the number of tasks present).
      lam: weight of the angle, >= 0; the paper's values go from 0.01 to 8.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`. Stateless. Cost: O(T).

    Raises:
      ValueError: for a `preference` that is not `[T]`, a negative `lam` or missing `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.cosmos(2)
      >>> losses = jnp.array([4., 3.])
      >>> print(np.asarray(tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=losses)[0]).round(3))
      [0.517 0.477]

    References:
      Ruchte and Grabocka, Scalable Pareto Front Approximation for Deep Multi-Objective Learning, 2021.
    """
    num_tasks = check_num_tasks("cosmos", num_tasks)
    check_range("cosmos", lam=(lam, 0, math.inf))
    if preference is not None and np.shape(preference) != (num_tasks,):
        raise ValueError(f"cosmos: preference must be [{num_tasks}]; found {np.shape(preference)}.")

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        losses = evidence.losses
        wanted = active_preference(preference, evidence.active, losses.dtype)
        (direction, _), (ahead, length) = unit(wanted), unit(losses)
        # The part of the preference across the losses: what turns them towards it.
        across = direction - jnp.sum(direction * ahead) * ahead
        largest = largest_weight(losses.dtype)
        pull = across / jnp.maximum(length, 1 / largest) * jnp.asarray(lam, losses.dtype)
        return jnp.clip(wanted - jnp.where(length > 0, pull, 0), -largest, largest), state

    rule = Rule("cosmos", num_tasks, frozenset({"losses"}), lambda dtype: (), weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="cosmos",
    factory=cosmos,
    needs=("losses",),
    family="from_losses",
    scale="own",
    reference="Ruchte and Grabocka, Scalable Pareto Front Approximation, 2021",
    make=cosmos,
    properties=frozenset({"permutation", "scale", "split"}),
)
