"""UW-SO: softmax of the inverse losses, which are the optimal weights of uncertainty weighting."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Positive, factory
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.log_weights import clip_weights, magnitudes, softmax


@factory
def uw_so(
    tasks: int | Collection[str], *, temperature: Positive = 1.0, **options: Unpack[MethodOptions]
) -> Method:
    r"""Weighs each loss by a softmax of the inverse losses.

    `uncertainty` learns a noise level per task, which follows a change of the losses slowly. For given
    losses the optimal weights are known: they are proportional to :math:`1/L_t`. This method normalises
    them by a softmax instead of a sum. With ``temperature`` :math:`\tau`:

    .. math:: w = \mathrm{softmax}\big( 1 / (\tau L) \big).

    Scale: mean-like; the weights sum to 1. The method "soft optimal uncertainty weighting" of the paper.

    Args:
      tasks: T, or the task names.
      temperature: tau, >= 1e-6, the number to tune; larger values make the weights more equal. It has the
        unit of an inverse loss.
      **options: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state. `update` needs `losses=`. Cost: O(T).

    Raises:
      ValueError: if the temperature is outside its range.

    Notes:
      No program of the authors is known. Their weights without the softmax (UW-O, proportional to
      :math:`1/L_t`) are those of `scale_invariant` up to a common factor.

      A negative loss counts with its absolute value. A loss of 0 has weight 0 and is excluded from the
      softmax, as are absent tasks. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.uw_so(2)
      >>> losses = jnp.array([1., 0.5])
      >>> print(np.asarray(tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=losses)[0]).round(3))
      [0.269 0.731]

    References:
      Kirchdorfer, Elich, Kutsche, Stuckenschmidt, Schott and Köhler, Analytical Uncertainty-Based Loss
      Weighting in Multi-Task Learning, 2024, https://arxiv.org/abs/2408.07985
    """

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        sizes, usable = magnitudes(inputs.losses, inputs.active)
        return softmax(
            clip_weights(1 / sizes) / jnp.asarray(temperature, sizes.dtype), usable
        ), state

    return from_rule("uw_so", tasks, WeightRule(frozenset({"losses"}), weigh), **options)
