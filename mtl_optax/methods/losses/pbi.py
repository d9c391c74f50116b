"""PBI: penalty-based boundary intersection along a preference direction."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Nonnegative, factory
from mtl_optax.core.types import Number, PerTask
from mtl_optax.core.validation import task_numbers
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.preference import active_preference, unit


@factory
def pbi(
    tasks: int | Collection[str],
    *,
    preference: PerTask | None = None,
    theta: Nonnegative = 5.0,
    reference: Number = 0.0,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Minimises the losses along a preference direction, with a penalty on the distance from it.

    The method reaches points of a Pareto front that no weighted sum reaches. With the unit vector
    :math:`\hat r` of ``preference``, ``theta`` :math:`\theta` and ``reference`` z, the losses have the
    component :math:`d_1 = (L - z) \cdot \hat r` and the distance :math:`d_2 = |L - z - d_1 \hat r|`. The
    objective :math:`d_1 + \theta d_2` has the weights

    .. math:: w = \hat r + \theta\, (L - z - d_1 \hat r) / d_2 .

    Scale: the method's own; :math:`|w| = \sqrt{1 + \theta^2}`. This is the minimising form (footnote 6)
    of the decomposition in the paper, which is about evolutionary search.

    Args:
      tasks: T, or the task names.
      preference: r, `[T]` or a dictionary by task name, nonnegative, not all 0; None means equal
        preferences.
      theta: penalty, >= 0; the paper uses 5.
      reference: z, a lower bound of the losses, a scalar, `[T]`, or a dictionary by task name.
      **options: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state. `update` needs `losses=`. Cost: O(T).

    Raises:
      ValueError: if `preference` or `reference` has the wrong shape, or `theta` is negative.

    Notes:
      Weights can be negative: a loss that is too small for the preference may increase.
      `optax.inject_hyperparams` can change `preference` at every step.

      If the losses are on the direction, up to rounding, :math:`w = \hat r`, the smallest subgradient.
      Absent tasks are excluded from r and L. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.pbi(2, theta=1.0)
      >>> losses = jnp.array([4., 3.])
      >>> print(np.asarray(tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=losses)[0]).round(3))
      [1.414 0.   ]

    References:
      Zhang and Li, MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition, 2007,
      https://doi.org/10.1109/TEVC.2007.892759
    """
    vector = task_numbers("pbi", "preference", preference, tasks, 0)
    reference = task_numbers("pbi", "reference", reference, tasks, or_one=True)

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        active, dtype = inputs.active, inputs.losses.dtype
        direction, _ = unit(active_preference(vector, active, dtype))
        above = inputs.losses - jnp.asarray(reference, dtype)
        unit_losses, _ = unit(jnp.where(active, above, 0))
        residual = unit_losses - jnp.sum(unit_losses * direction) * direction
        unit_residual, distance = unit(residual)
        # A smaller residual, and so its direction, consists of rounding errors.
        apart = distance > 4 * len(active) * float(jnp.finfo(dtype).eps)
        return direction + jnp.asarray(theta, dtype) * jnp.where(apart, unit_residual, 0), state

    return from_rule("pbi", tasks, WeightRule(frozenset({"losses"}), weigh), **options)
