"""PBI: penalty-based boundary intersection, the losses led along a preference direction."""

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
from mtl_optax.solvers.preference import active_preference, unit


def pbi(
    num_tasks: int,
    *,
    preference: Any = None,
    theta: Any = 5.0,
    reference: Any = 0.0,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Leads the losses down a preference direction, with a penalty on leaving it.

    Reaches points of a Pareto front that no weighted sum does. With the unit preference :math:`\hat r`,
    ``theta`` :math:`\theta` and ``reference`` z, the losses split into :math:`d_1 = (L - z) \cdot \hat r`
    along the direction and :math:`d_2 = |L - z - d_1 \hat r|` across it. The objective
    :math:`d_1 + \theta d_2` has the weights

    .. math:: w = \hat r + \theta\, (L - z - d_1 \hat r) / d_2 .

    They can be negative: a loss that is too small for the direction may rise. The scale is the method's
    own: the weights have the length :math:`\sqrt{1 + \theta^2}`. The minimising form (footnote 6) of the
    decomposition in the paper, which is on evolutionary search. `optax.inject_hyperparams` can change
    ``preference`` from step to step.

    Degenerate input: losses on the direction (up to rounding): :math:`w = \hat r`, the least
    subgradient. Absent tasks are left out of r and L. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      preference: r `[T]`, nonnegative, not all 0; None is equal preference.
      theta: penalty, >= 0; the paper uses 5.
      reference: z, a lower bound of the losses, a scalar or `[T]`.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`. Stateless. Cost: O(T).

    Raises:
      ValueError: for a `preference` or `reference` that does not fit, a negative `theta` or missing
        `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.pbi(2, theta=1.0)
      >>> losses = jnp.array([4., 3.])
      >>> print(np.asarray(tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=losses)[0]).round(3))
      [1.414 0.   ]

    References:
      Zhang and Li, MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition, 2007.
    """
    num_tasks = check_num_tasks("pbi", num_tasks)
    check_range("pbi", theta=(theta, 0, math.inf))
    if preference is not None and np.shape(preference) != (num_tasks,):
        raise ValueError(f"pbi: preference must be [{num_tasks}]; found {np.shape(preference)}.")
    if np.shape(reference) not in ((), (num_tasks,)):
        raise ValueError(
            f"pbi: reference must be a scalar or [{num_tasks}]; found {np.shape(reference)}."
        )

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        active, dtype = evidence.active, evidence.losses.dtype
        direction, _ = unit(active_preference(preference, active, dtype))
        origin = jnp.broadcast_to(jnp.asarray(reference, dtype), (num_tasks,))
        ahead, _ = unit(jnp.where(active, evidence.losses - origin, 0))
        across = ahead - jnp.sum(ahead * direction) * direction
        outward, distance = unit(across)
        # Below this the direction of the rest is that of rounding errors.
        leaves = distance > 4 * num_tasks * float(jnp.finfo(dtype).eps)
        return direction + jnp.asarray(theta, dtype) * jnp.where(leaves, outward, 0), state

    rule = Rule("pbi", num_tasks, frozenset({"losses"}), lambda dtype: (), weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="pbi",
    factory=pbi,
    needs=("losses",),
    family="from_losses",
    scale="own",
    reference="Zhang and Li, MOEA/D, 2007",
    make=pbi,
    properties=frozenset({"permutation", "scale", "split"}),
)
