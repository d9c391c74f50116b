"""IMTL: learned loss scales (IMTL-L) combined with equal projections (IMTL-G)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Transformation, factory
from mtl_optax.core.shared_rules import trained_scale_rule
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.equal_projection import equal_projection_weights


@factory
def imtl(
    tasks: int | Collection[str],
    *,
    optimizer: Transformation = optax.adam(1e-3),
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Scales all losses to the same size, then gives all tasks the same progress.

    `imtl_l` balances the losses, and with them the heads; `imtl_g` balances the shared parameters.

    With the trained :math:`s` of `imtl_l` and the gradients :math:`e^{s_t} g_t` of the scaled losses:

    .. math:: a = \text{the weights of IMTL-G for } e^{s_t} g_t, \qquad
        update = \sum_t a_t\, e^{s_t} g_t, \qquad \partial_{s_t} = e^{s_t} L_t - 1

    where ``optimizer`` trains s. Scale: the method's own, like a mean at the first step, at
    which s = 0; later it is proportional to :math:`e^{s}`. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      optimizer: any optax optimizer, which trains s from 0.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `TrainedState`, whose `values` are s. `update` needs `losses=`. Cost: one
      pass over the gradients for the Gram matrix, one for the sum, and a `[T, T]` eigenvalue problem.

    Notes:
      The first update is that of `imtl_g`. As in public code, a does not enter the gradient of s. The
      weights of the heads are :math:`e^{s_t}`, without a.

      Zero gradients and absent tasks are treated as in `imtl_g` and `imtl_l`. With one task, the update
      is :math:`e^{s} g`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.imtl(2)
      >>> grads, losses = jnp.array([[3., 0.], [0., 1.]]), jnp.array([2., 0.5])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(np.asarray(update).round(3))
      [0.75 0.75]

    References:
      Liu, Li, Kuang, Xue, Chen, Yang, Liao and Zhang, Towards Impartial Multi-task Learning, 2021,
      https://openreview.net/forum?id=IMPnRXEWpvr
    """
    scales = trained_scale_rule(optimizer)

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        scale, state = scales.weigh(inputs, state)
        # A common factor of the scales cancels in a. Dividing by the largest prevents overflow.
        present = jnp.where(inputs.active, scale, 0)
        relative = safe_divide(present, jnp.max(present))
        geometry = inputs.geometry._replace(norms=inputs.norms * relative)
        return equal_projection_weights(geometry) * scale, state

    rule = WeightRule(frozenset({"losses", "gram"}), weigh, scales.init)
    return from_rule("imtl", tasks, rule, **options)
