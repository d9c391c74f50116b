"""IGB: improvable gap balancing, larger weights for losses that are far above their desired values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax

from mtl_optax.core.early_losses import early_loss_rule
from mtl_optax.core.factory import NonnegativeInt, PositiveInt, factory
from mtl_optax.rule import Method, MethodOptions, from_rule
from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.log_weights import clip_weights


@factory
def igb(
    tasks: int | Collection[str],
    *,
    warmup_steps: NonnegativeInt = 0,
    base_steps: PositiveInt = 1,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Gives larger weights to log losses that have decreased least since the start of training.

    The improvable gap of a task says how far its training is from the desired state. If the desired
    losses are small, the gap is the loss relative to its value early in training. With the base
    :math:`b_t`, the mean loss over the ``base_steps`` steps after the first ``warmup_steps``, the weights
    of the log losses are T softmax(L / b), and so those of the losses are

    .. math:: w_t = T\, \mathrm{softmax}_t( L_t / b_t ) / L_t .

    Until the base of every present task is known, :math:`w_t = 1 / L_t` (the sum of log losses). Scale:
    the method's own. The first algorithm of the paper, IGBv1.

    Args:
      tasks: T, or the task names.
      warmup_steps: steps before the base is measured, static, >= 0.
      base_steps: steps over which it is averaged, static, >= 1. In the authors' code both are one epoch.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `EarlyLossState`. `update` needs `losses=`. Cost: O(T).

    Raises:
      ValueError: if a number is outside its range.

    Notes:
      IGBv2, which finds the weights by reinforcement learning, is not part of this library.

      A negative loss is weighted by its absolute value, so that it still decreases. A loss of 0 has
      weight 0 and is excluded from the softmax; a ratio to a base of 0 counts as 1. Weights are at most
      1.8e19 (float32). Each task counts the steps at which it was present. With one task, the update is
      its gradient divided by the loss.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.igb(2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for losses in ([4., 1.], [2., 1.]):
      ...     update, state = tx.update(jnp.eye(2), state, losses=jnp.array(losses))
      >>> print(np.asarray(update).round(3))
      [0.378 1.245]

    References:
      Dai, Fei and Lu, Improvable Gap Balancing for Multi-Task Learning, 2023,
      https://arxiv.org/abs/2307.15429
    """

    def score(sizes: jax.Array, base: jax.Array, nonzero: jax.Array) -> jax.Array:
        return clip_weights(safe_divide(sizes, base, 1, where=nonzero))

    return from_rule("igb", tasks, early_loss_rule(warmup_steps, base_steps, score), **options)
