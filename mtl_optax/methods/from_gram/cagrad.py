"""CAGrad: the best worst-case progress close to the mean gradient."""

from __future__ import annotations

import math
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_integer, check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.conflict_averse import conflict_averse_weights


def cagrad(
    num_tasks: int,
    *,
    c: Any = 0.4,
    rescale: Literal[0, 1, 2] = 1,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Stays near the mean gradient and makes the slowest task as fast as it can there.

    The mean gradient minimises the mean loss but may sacrifice a task; MGDA sacrifices the mean. CAGrad
    searches the ball around the mean gradient :math:`g_0` for the direction whose worst progress is best:

    .. math:: d = \arg\max_{|d - g_0| \le c\,|g_0|}\ \min_t\ g_t \cdot d
        \;=\; g_0 + c\,|g_0|\, \frac{g_w}{|g_w|}, \qquad
        update = d, \;\; \frac{d}{1 + c^2} \;\text{ or }\; \frac{d}{1 + c}

    for ``rescale`` 0, 1, 2, where :math:`g_w` is a convex combination of the task gradients. Mean-like:
    equal gradients give :math:`(1 + c)` times one of them before rescaling. With :math:`c < 1` it
    converges to a minimum of the mean loss; c = 0 is the mean. Algorithm 1 of the paper.

    Solved exactly on the cosine matrix; the authors' program stops early, at uniform weights for gradient
    norms around 1e-3 or of very different size. It also multiplies by T, to replace a sum of losses:
    put ``optax.scale(T)`` after this transformation for that.

    Degenerate input: a zero gradient counts in the mean only (its progress is 0 whatever d is). A zero
    mean, or all zero: 0. Where the hull of the gradients holds 0 the correction vanishes or stays finite.
    T = 1: :math:`(1 + c)\, g`, rescaled.

    Args:
      num_tasks: T, static.
      c: radius of the ball relative to the mean gradient; not negative.
      rescale: what divides the result: 0 nothing, 1 `1 + c**2`, 2 `1 + c`.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients for the
      Gram matrix, one for the sum, and a few `[T, T]` factorisations.

    Raises:
      ValueError: for a negative `c` or an unknown `rescale`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.cagrad(2, c=0.5, rescale=0)
      >>> grads = jnp.array([[2., 0.], [0., 1.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [1.    1.059]

    References:
      Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, 2021.
    """
    num_tasks = check_num_tasks("cagrad", num_tasks)
    check_range("cagrad", c=(c, 0, math.inf))
    check_integer("cagrad", "rescale", rescale, 0, 2)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        radius = jnp.asarray(c, evidence.norms.dtype)
        weights = conflict_averse_weights(evidence.cosine, evidence.norms, evidence.active, radius)
        divisor = (1, 1 + radius * radius, 1 + radius)[rescale]
        return weights / divisor, state

    rule = Rule("cagrad", num_tasks, frozenset({"gram"}), lambda dtype: (), weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="cagrad",
    factory=cagrad,
    needs=("gram",),
    family="from_gram",
    scale="own",
    reference="Liu et al., Conflict-Averse Gradient Descent, 2021",
    make=cagrad,
    properties=frozenset({"permutation", "scale", "split"}),
)
