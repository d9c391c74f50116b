"""Geometric loss strategy: the geometric mean of the losses."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.log_weights import exp_weights, magnitudes


def gls(
    num_tasks: int, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""Minimises the geometric mean of the losses.

    Relative progress on each task then counts the same, whatever the losses' units. The objective
    :math:`F = (\prod_t L_t)^{1/T}` has the gradient :math:`\sum_t w_t g_t` with

    .. math:: w_t = F / (T L_t).

    Mean-like where all losses are equal (then every weight is 1/T). Equation 2 of the paper. Computed
    through logarithms: the product itself leaves the range of float32 with a few tasks.

    Degenerate input: a negative loss counts by its size and is still descended; a loss of 0, where the
    gradient of F is undefined, has weight 0 and is left out of the mean. No weight exceeds 1.8e19
    (float32). T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`. Stateless. Cost: O(T).

    Raises:
      ValueError: for missing `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.gls(2)
      >>> losses = jnp.array([8., 0.5])
      >>> print(np.asarray(tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=losses)[0]).round(3))
      [0.125 2.   ]

    References:
      Chennupati, Sistu, Yogamani and Rawashdeh, MultiNet++: Multi-Stream Feature Aggregation and
      Geometric Loss Strategy for Multi-Task Learning, 2019.
    """
    num_tasks = check_num_tasks("gls", num_tasks)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        sizes, usable = magnitudes(evidence.losses, evidence.active)
        logs = jnp.log(sizes)
        count = jnp.maximum(jnp.sum(usable), 1).astype(logs.dtype)
        mean = jnp.sum(jnp.where(usable, logs, 0)) / count
        return exp_weights(mean - logs - jnp.log(count), usable), state

    rule = Rule("gls", num_tasks, frozenset({"losses"}), lambda dtype: (), weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="gls",
    factory=gls,
    needs=("losses",),
    family="from_losses",
    scale="own",
    reference="Chennupati et al., MultiNet++, 2019",
    make=gls,
    properties=frozenset({"permutation", "scale", "split"}),
)
