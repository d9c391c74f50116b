"""CAGrad: the best worst-case progress near the mean gradient."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Nonnegative, factory
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.conflict_averse import conflict_averse_weights


@factory
def cagrad(
    tasks: int | Collection[str],
    *,
    c: Nonnegative = 0.4,
    rescale: Literal[0, 1, 2] = 1,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Maximises the smallest progress of any task within a ball around the mean gradient.

    The mean gradient minimises the mean loss but can increase the loss of a task. MGDA avoids that, but
    does not minimise the mean loss. CAGrad improves the worst task near the mean gradient.

    With the mean gradient :math:`g_0` and progress :math:`g_t \cdot d`:

    .. math:: d = \arg\max_{|d - g_0| \le c\,|g_0|}\ \min_t\ g_t \cdot d
        \;=\; g_0 + c\,|g_0|\, \frac{g_w}{|g_w|}, \qquad
        update = d, \;\; \frac{d}{1 + c^2} \;\text{ or }\; \frac{d}{1 + c}

    for ``rescale`` 0, 1 and 2, where :math:`g_w` is a convex combination of the task gradients. Scale:
    the method's own; equal gradients g give :math:`(1 + c)\, g` before rescaling. With :math:`c < 1` the
    method converges to a minimum of the mean loss; c = 0 is the mean. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      c: radius of the ball relative to the norm of the mean gradient; not negative.
      rescale: divisor of the result: 0 for 1, 1 for `1 + c**2`, 2 for `1 + c`.
      **options: see `MethodOptions`.

    Returns:
      A `Method`. Cost: one pass over the gradients for the Gram matrix, one for the sum, and a few
      `[T, T]` factorisations.

    Raises:
      ValueError: if `c` is negative, or `rescale` is unknown.

    Notes:
      There are two differences from the authors' code. The problem is solved exactly, on the cosine
      matrix; their solver stops early, at uniform weights, for norms around 1e-3 or of very different
      size. The result is not multiplied by T; to replace a sum of losses, chain ``optax.scale(T)`` after
      the method.

      A zero gradient affects only the mean, because its progress is 0 for any d. If the mean is zero, the
      update is 0. If 0 is in the convex hull of the gradients, the correction of the mean is zero or
      finite. With one task, the update is :math:`(1 + c)\, g`, rescaled.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.cagrad(2, c=0.5, rescale=0)
      >>> grads = jnp.array([[2., 0.], [0., 1.]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> print(np.asarray(update).round(3))
      [1.    1.059]

    References:
      Liu, Liu, Jin, Stone and Liu, Conflict-Averse Gradient Descent for Multi-task Learning, 2021,
      https://arxiv.org/abs/2110.14048
    """

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        radius = jnp.asarray(c, inputs.norms.dtype)
        divisor = (1, 1 + radius * radius, 1 + radius)[rescale]
        return conflict_averse_weights(inputs.geometry, radius) / divisor, state

    return from_rule("cagrad", tasks, WeightRule(frozenset({"gram"}), weigh), **options)
