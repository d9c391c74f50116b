"""ConFIG: the direction with the same cosine to every gradient."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import optax

from mtl_optax.core.factory import factory
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.equal_projection import config_weights


@factory
def conflict_free(tasks: int | Collection[str], **options: Unpack[MethodOptions]) -> Method:
    r"""Takes the direction that has the same cosine with every gradient.

    It is made for physics-informed networks, whose losses (equation, boundary, data) differ by orders of
    magnitude. The direction does not depend on the lengths of the gradients.

    With the unit gradients :math:`u_t` as rows of U:

    .. math:: d_0 = \frac{U^+ 1}{|U^+ 1|}, \qquad update = \Big(\sum_t g_t \cdot d_0\Big)\, d_0

    Scale: sum-like. Equation 2 of the paper, with equal weights.

    Args:
      tasks: T, or the task names.
      **options: see `MethodOptions`.

    Returns:
      A `Method`. Cost: one pass over the gradients for the Gram matrix, one for the sum, and a `[T, T]`
      eigenvalue problem.

    Notes:
      The pseudo-inverse is computed on the cosine matrix, to the dtype's precision. For linearly
      independent gradients all cosines are positive, and no loss increases to first order. Otherwise
      equal cosines may not exist, and the least-squares direction can conflict.

      A zero gradient is ignored. If all gradients are zero, or opposite (without a common direction), the
      update is 0. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.conflict_free(2)
      >>> grads = jnp.array([[2., 0.], [0., 1.]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> print(np.asarray(update).round(3))
      [1.5 1.5]

    References:
      Liu, Chu and Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks,
      2024, https://arxiv.org/abs/2408.11104
    """

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        return config_weights(inputs.geometry), state

    return from_rule("conflict_free", tasks, WeightRule(frozenset({"gram"}), weigh), **options)
