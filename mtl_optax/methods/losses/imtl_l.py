"""IMTL-L: a learned factor that scales every loss to the same size."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import optax

from mtl_optax.core.factory import Transformation, factory
from mtl_optax.core.shared_rules import trained_scale_rule
from mtl_optax.rule import Method, MethodOptions, from_rule


@factory
def imtl_l(
    tasks: int | Collection[str],
    *,
    optimizer: Transformation = optax.adam(1e-3),
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Learns one scale per task that brings every loss to 1.

    Losses of different sizes contribute unequally to a sum. IMTL-L trains :math:`s_t` to minimise
    :math:`e^{s_t} L_t - s_t`, whose minimum is at a scaled loss of 1, without a prior over the tasks:

    .. math:: w_t = e^{s_t}, \qquad \partial_{s_t} = e^{s_t} L_t - 1 .

    The weights use s before the step. Scale: the method's own. It is the loss part of algorithm 1 of the
    paper; `imtl` combines it with the gradient part, `imtl_g`.

    Args:
      tasks: T, or the task names.
      optimizer: any optax optimizer, which trains s from 0.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `TrainedState` (s). `update` needs `losses=`. Cost: O(T).

    Notes:
      The authors' code is not public.

      If a loss is 0 or below, s has no finite optimum, so weights are limited to [1/1.8e19, 1.8e19]
      (float32). The s of an absent task does not change.

    Example:

      >>> import jax.numpy as jnp, numpy as np, optax, mtl_optax as mtl
      >>> tx = mtl.imtl_l(2, optimizer=optax.sgd(0.1))
      >>> grads, losses = jnp.eye(2), jnp.array([4., 0.5])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(update, np.asarray(state.rule_state.values).round(3))
      [1. 1.] [[-0.3   0.05]]

    References:
      Liu, Li, Kuang, Xue, Chen, Yang, Liao and Zhang, Towards Impartial Multi-task Learning, 2021,
      https://openreview.net/forum?id=IMPnRXEWpvr
    """
    return from_rule("imtl_l", tasks, trained_scale_rule(optimizer), **options)
