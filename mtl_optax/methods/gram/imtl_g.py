"""IMTL-G: the same projection on every unit gradient."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import optax

from mtl_optax.core.factory import factory
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.equal_projection import equal_projection_weights


@factory
def imtl_g(tasks: int | Collection[str], **options: Unpack[MethodOptions]) -> Method:
    r"""Finds weights of sum 1 whose update has the same projection on every unit gradient.

    A plain sum favours tasks with long gradients, MGDA those with short ones. IMTL-G favours neither.

    With :math:`n_t = |g_t|` and the cosine matrix C:

    .. math:: update \cdot g_t / n_t \text{ equal for all } t, \qquad
        a_t = \frac{(C^+ 1)_t / n_t}{\sum_s (C^+ 1)_s / n_s}, \qquad update = \sum_t a_t g_t

    Scale: mean-like. The closed form of section 3.1 of the paper.

    Args:
      tasks: T, or the task names.
      **options: see `MethodOptions`.

    Returns:
      A `Method`. Cost: one pass over the gradients for the Gram matrix, one for the sum, and a `[T, T]`
      eigenvalue problem.

    Notes:
      As in the paper, the weights and the common projection can be negative: for some gradients the
      update increases every loss. With `conflict_free` and `upgrad` this cannot happen.

      A zero gradient has weight 0. A singular C (more tasks than dimensions, identical gradients) is
      inverted on its range. If the unit gradients cancel (opposite gradients), the weights are
      proportional to 1 / n and the update is 0. If no solution exists (all gradients are zero, or the
      coefficients sum to 0), the weights are equal. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.imtl_g(2)
      >>> grads = jnp.array([[3., 0.], [0., 1.]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> print(np.asarray(update).round(3))
      [0.75 0.75]

    References:
      Liu, Li, Kuang, Xue, Chen, Yang, Liao and Zhang, Towards Impartial Multi-task Learning, 2021,
      https://openreview.net/forum?id=IMPnRXEWpvr
    """

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        return equal_projection_weights(inputs.geometry), state

    return from_rule("imtl_g", tasks, WeightRule(frozenset({"gram"}), weigh), **options)
