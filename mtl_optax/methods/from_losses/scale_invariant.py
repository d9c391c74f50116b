"""Scale-invariant weighting: the sum of the logarithms of the losses."""

from __future__ import annotations

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.log_weights import largest_weight


def scale_invariant(
    num_tasks: int, *, eps: Any = 0.0, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""Minimises the sum of the logarithms of the losses.

    The unit of a loss then does not matter: :math:`\sum_t \log(L_t + \epsilon)` has the gradient
    :math:`\sum_t w_t g_t` with

    .. math:: w_t = 1 / (L_t + \epsilon).

    The scale is the method's own. The baseline of that name in the Nash-MTL paper (section 5), without
    an ``eps`` there.

    Degenerate input: logarithms need positive losses. A negative loss counts by its size, weight
    :math:`1/(|L_t| + \epsilon)`, and is still descended; a loss of 0 without ``eps`` has weight 0. No
    weight exceeds 1.8e19 (float32). T = 1: the gradient over the loss.

    Args:
      num_tasks: T, static.
      eps: added to each loss, >= 0.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`. Stateless. Cost: O(T).

    Raises:
      ValueError: for a negative `eps` or missing `losses`.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.scale_invariant(2)
      >>> tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=jnp.array([4., 0.5]))[0].tolist()
      [0.25, 2.0]

    References:
      Navon et al., Multi-Task Learning as a Bargaining Game, 2022.
    """
    num_tasks = check_num_tasks("scale_invariant", num_tasks)
    check_range("scale_invariant", eps=(eps, 0, math.inf))

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        dtype = evidence.losses.dtype
        sizes = jnp.abs(evidence.losses) + jnp.asarray(eps, dtype)
        bounded = jnp.maximum(sizes, 1 / largest_weight(dtype))
        return jnp.where(sizes >= jnp.finfo(dtype).tiny, 1 / bounded, 0), state

    rule = Rule("scale_invariant", num_tasks, frozenset({"losses"}), lambda dtype: (), weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="scale_invariant",
    factory=scale_invariant,
    needs=("losses",),
    family="from_losses",
    scale="own",
    reference="Navon et al., Multi-Task Learning as a Bargaining Game, 2022",
    make=scale_invariant,
    properties=frozenset({"permutation", "scale", "split"}),
)
