"""STCH: smooth Tchebycheff scalarisation, a smooth maximum of the losses."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.early_losses import early_loss_rule
from mtl_optax.core.factory import NonnegativeInt, Positive, PositiveInt, factory
from mtl_optax.rule import Method, MethodOptions, from_rule


@factory
def stch(
    tasks: int | Collection[str],
    *,
    mu: Positive = 1.0,
    warmup_steps: NonnegativeInt = 0,
    nadir_steps: PositiveInt = 1,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Minimises a smooth maximum of the losses, each relative to its mean early in training.

    A maximum uses only the worst task and is not smooth. A smooth maximum uses all tasks and can reach
    every Pareto-optimal point. With ``mu`` :math:`\mu` and the nadir :math:`z_t`, the mean loss over the
    ``nadir_steps`` steps after the first ``warmup_steps``, the objective
    :math:`T \mu \log \sum_t (L_t / z_t)^{1/\mu}` has the weights

    .. math:: w_t = T\, \mathrm{softmax}_t\big( \log(L_t / z_t) / \mu \big) / L_t .

    Until the nadir of every present task is known, :math:`w_t = 1 / L_t` (the sum of log losses). Scale:
    the method's own. Equation 10 of the paper, in the form of the authors' code.

    Args:
      tasks: T, or the task names.
      mu: smoothing, >= 1e-6; smaller values are closer to the maximum.
      warmup_steps: steps before the nadir is measured, static, >= 0.
      nadir_steps: steps over which the nadir is averaged, static, >= 1.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `EarlyLossState`. `update` needs `losses=`. Cost: O(T).

    Raises:
      ValueError: if a number is outside its range.

    Notes:
      The equation in the paper has losses minus an ideal point, and a preference vector; the authors'
      code has log losses relative to the nadir. The warm-up in the code is in epochs: ``warmup_steps`` is
      epochs times steps per epoch, and ``nadir_steps`` is one epoch.

      A negative loss is weighted by its absolute value, so that it still decreases. A loss of 0 has
      weight 0 and is excluded from the softmax (the code adds 1e-20). Weights are at most 1.8e19
      (float32). Each task counts the steps at which it was present. With one task, the update is its
      gradient divided by the loss.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.stch(2, mu=0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> for losses in ([4., 1.], [2., 1.]):
      ...     update, state = tx.update(jnp.eye(2), state, losses=jnp.array(losses))
      >>> print(np.asarray(update).round(3))
      [0.2 1.6]

    References:
      Lin, Zhang, Yang, Liu, Wang and Zhang, Smooth Tchebycheff Scalarization for Multi-Objective
      Optimization, 2024, https://arxiv.org/abs/2402.19078
    """

    def score(sizes: jax.Array, nadir: jax.Array, _: jax.Array) -> jax.Array:
        return (jnp.log(sizes) - jnp.log(nadir)) / jnp.asarray(mu, sizes.dtype)

    return from_rule("stch", tasks, early_loss_rule(warmup_steps, nadir_steps, score), **options)
